//go:build linux

package csi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/canary"
	"github.com/signet-ca/signet/internal/daemon"
)

// identities believes tokens that podVolume.token made, for the pod that they name.
type identities struct {
	mu      sync.Mutex
	offers  map[string]int       // tokens that were taken, by pod's name
	live    map[string]*workload // by volume id
	restore error                // answer to Restore
	refuse  error                // answer to Offer, after the claims
	block   chan struct{}        // Offer waits for it, longer than it may: who else comes meanwhile has all the time he needs
}

func newIdentities() *identities {
	return &identities{offers: map[string]int{}, live: map[string]*workload{}}
}

func (i *identities) check(v Volume, token []byte) error {
	parts := strings.Split(string(token), ".")
	if len(parts) != 3 {
		return api.E(api.TokenMalformed, "the token is none")
	}
	data, err := base64.RawURLEncoding.DecodeString(parts[1])
	var p Pod
	if err != nil || json.Unmarshal(data, &p) != nil {
		return api.E(api.TokenMalformed, "the token is none")
	}
	if p != v.Pod {
		return api.E(api.PodMismatch, "the token is that of another pod")
	}
	return nil
}

func (i *identities) Offer(_ context.Context, v Volume, token []byte) (Workload, error) {
	if err := i.check(v, token); err != nil {
		return nil, err
	}
	i.mu.Lock()
	block, refuse := i.block, i.refuse
	i.mu.Unlock()
	if block != nil {
		<-block
	}
	if refuse != nil {
		return nil, refuse
	}
	return i.take(v), nil
}

func (i *identities) Restore(_ context.Context, v Volume, token []byte) (Workload, error) {
	if err := i.check(v, token); err != nil {
		return nil, err
	}
	if i.restore != nil {
		return nil, i.restore
	}
	return i.take(v), nil
}

func (i *identities) take(v Volume) *workload {
	i.mu.Lock()
	defer i.mu.Unlock()
	w := &workload{of: i, v: v}
	i.offers[v.Pod.Name]++
	i.live[v.ID] = w
	return w
}

func (i *identities) count(name string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.offers[name]
}

func (i *identities) open() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.live)
}

// workload tells whoever connects whose socket it is, and holds the line until it ends.
type workload struct {
	of *identities
	v  Volume
}

func (w *workload) Offer(_ context.Context, token []byte) error {
	if err := w.of.check(w.v, token); err != nil {
		return err
	}
	w.of.mu.Lock()
	defer w.of.mu.Unlock()
	w.of.offers[w.v.Pod.Name]++
	return w.of.refuse
}

func (w *workload) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		c, err := l.Accept()
		if err != nil {
			l.Close()
			return err
		}
		wg.Go(func() {
			defer c.Close()
			fmt.Fprintln(c, w.v.Pod.Name)
			gone := make(chan struct{})
			wg.Go(func() { defer close(gone); io.Copy(io.Discard, c) })
			select {
			case <-ctx.Done():
			case <-gone:
			}
		})
	}
}

func (w *workload) Close() {
	w.of.mu.Lock()
	defer w.of.mu.Unlock()
	if w.of.live[w.v.ID] == w {
		delete(w.of.live, w.v.ID)
	}
}

// rig is a node: kubelet's folder, what the agent remembers, and an agent that can be stopped and started.
type rig struct {
	t          testing.TB
	k          *kubelet
	cfg        Config
	identities *identities
	d          *Driver
	logs       *logBuffer
	stop       func()
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func testConfig(dir string, i Identities) Config {
	return Config{
		Node: "node-1", KubeletDir: filepath.Join(dir, "kubelet"), StateDir: filepath.Join(dir, "state"), Audience: audience,
		Identities: i,
		Listen:     func(path string) (net.Listener, error) { return daemon.ListenUnix(path, 0o600) },
		Bind: func(path string) (*net.UnixListener, error) {
			return net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		},
	}
}

// newRig makes a node whose agent runs and is registered.
func newRig(t testing.TB, change ...func(*Config)) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("", "csi") // t.TempDir is too long for kubelet's own sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &rig{t: t, k: newKubelet(t, filepath.Join(dir, "kubelet")), identities: newIdentities(), logs: &logBuffer{}}
	r.cfg = testConfig(dir, r.identities)
	r.cfg.Log = slog.New(slog.NewTextHandler(r.logs, nil))
	for _, f := range change {
		f(&r.cfg)
	}
	t.Cleanup(func() {
		if r.stop != nil {
			r.stop()
		}
		if strings.Contains(r.logs.String(), canary.Marker) {
			t.Error("the log holds a token")
		}
		if t.Failed() {
			t.Log(r.logs.String())
		}
	})
	r.start()
	r.k.register()
	return r
}

func (r *rig) start() {
	r.t.Helper()
	d, err := New(r.cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.d = d
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	r.stop = func() {
		r.stop = nil
		cancel()
		select {
		case err := <-done:
			if err != nil {
				r.t.Error(err)
			}
		case <-time.After(60 * time.Second):
			r.t.Error("Run does not end")
		}
	}
}

func (r *rig) publish(p podVolume, n int) {
	r.t.Helper()
	if err := r.k.publish(p, r.k.request(p, p.token(n))); err != nil {
		r.t.Fatal(err)
	}
}

// connect opens the socket as the pod would, through the folder that is mounted for it.
func (r *rig) connect(p podVolume) (net.Conn, string, error) {
	dir, err := os.Open(r.k.target(p))
	if err != nil {
		return nil, "", err
	}
	defer dir.Close()
	return connectIn(dir)
}

func connectIn(dir *os.File) (net.Conn, string, error) {
	c, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), SocketName))
	if err != nil {
		return nil, "", err
	}
	c.SetDeadline(time.Now().Add(60 * time.Second))
	name, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		c.Close()
		return nil, "", err
	}
	return c, strings.TrimSpace(name), nil
}

// served checks that the pod's socket is its own.
func (r *rig) served(p podVolume) net.Conn {
	r.t.Helper()
	c, name, err := r.connect(p)
	if err != nil {
		r.t.Fatal(err)
	}
	if name != p.Name {
		r.t.Fatalf("the socket is that of %q, want %q", name, p.Name)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

// alive checks that a connection is open, ended that it was closed by the other side.
func alive(t testing.TB, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection ended: %v", err)
	}
}

func ended(t testing.TB, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(60 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection is open: %v", err)
	}
}

// records returns the names of what is remembered.
func (r *rig) records() []string {
	r.t.Helper()
	all, err := os.ReadDir(r.cfg.StateDir)
	if err != nil {
		r.t.Fatal(err)
	}
	var names []string
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

// clean checks that nothing of a pod is left but what kubelet itself removes.
func (r *rig) clean(p podVolume) {
	r.t.Helper()
	if _, err := os.Lstat(r.k.target(p)); !errors.Is(err, os.ErrNotExist) {
		r.t.Errorf("the folder is left: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(r.cfg.StateDir, p.id()+recordSuffix)); !errors.Is(err, os.ErrNotExist) {
		r.t.Errorf("the record is left: %v", err)
	}
}
