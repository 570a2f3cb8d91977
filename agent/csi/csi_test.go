//go:build linux

package csi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	registrationpb "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/api"
)

// A pod's volume from its first call to its last: one folder, one socket, whoever connects is that pod.
func TestVolume(t *testing.T) {
	r := newRig(t)
	p, q := testPod(1), testPod(2)
	r.publish(p, 1)
	r.publish(q, 1)
	held := r.served(p)
	r.served(q)

	folder, err := os.Stat(r.k.target(p))
	if err != nil || folder.Mode().Perm() != folderMode {
		t.Errorf("folder %v, %v", folder.Mode(), err)
	}
	if s, err := os.Lstat(r.k.sock(p)); err != nil || s.Mode() != os.ModeSocket|socketMode {
		t.Errorf("socket %v, %v", s.Mode(), err)
	}
	before := tree(t, r.k.dir)
	r.publish(p, 1) // the token that it has
	if n := r.identities.count(p.Name); n != 1 {
		t.Errorf("the token was offered %d times", n)
	}
	r.publish(p, 2)
	if n := r.identities.count(p.Name); n != 2 {
		t.Errorf("the second token was offered %d times", n-1)
	}
	sameTree(t, before, tree(t, r.k.dir))
	if now, err := os.Stat(r.k.target(p)); err != nil || !os.SameFile(folder, now) {
		t.Error("the folder was replaced")
	}
	alive(t, held)

	if err := r.k.deletePod(p); err != nil {
		t.Fatal(err)
	}
	ended(t, held)
	r.clean(p)
	if n := r.identities.open(); n != 1 {
		t.Errorf("%d workloads are open, want 1", n)
	}
	r.k.node(func(c csipb.NodeClient) { // again, and with nothing there at all
		if _, err := c.NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: p.id(), TargetPath: r.k.target(p)}); err != nil {
			t.Error(err)
		}
	})
	r.served(q)
	if err := r.k.deletePod(q); err != nil {
		t.Fatal(err)
	}
	if left := r.records(); len(left) != 0 {
		t.Errorf("remembered: %v", left)
	}
	if left, err := os.ReadDir(filepath.Join(r.k.dir, "pods")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A process of any user connects; on the node itself only root comes as far as the folder.
func TestUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	r := newRig(t)
	p := testPod(1)
	r.publish(p, 1)
	dir, err := os.Open(r.k.target(p)) // what the container runtime mounts into the pod
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	type result struct {
		name   string
		inside error // of the way through the mounted folder
		above  error // of the way from kubelet's folder down
		write  error // into the mounted folder
	}
	got := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its rights
		var res result
		unix.SetfsuidRetUid(1000)
		if uid, _ := unix.SetfsuidRetUid(-1); uid != 1000 {
			close(got)
			return
		}
		var c net.Conn
		if c, res.name, res.inside = connectIn(dir); res.inside == nil {
			c.Close()
		}
		_, res.above = os.Lstat(r.k.sock(p))
		res.write = unix.Symlinkat("x", int(dir.Fd()), "x")
		got <- res
	}()
	res, ok := <-got
	if !ok {
		t.Skip("this root cannot be somebody else")
	}
	if res.inside != nil || res.name != p.Name {
		t.Errorf("another user cannot connect: %q, %v", res.name, res.inside)
	}
	if res.above == nil || res.write == nil {
		t.Errorf("another user gets to the folder on the node (%v) or writes to it (%v)", res.above, res.write)
	}
}

// A connection that is handed to another process stays one of the socket's pod.
//
// threat: B10
func TestHandedOver(t *testing.T) {
	r := newRig(t)
	p := testPod(1)
	r.publish(p, 1)
	c, err := net.Dial("unix", shortPath(t, r.k.target(p)))
	if err != nil {
		t.Fatal(err)
	}
	f, err := c.(*net.UnixConn).File()
	c.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("head", "-n", "1")
	cmd.Stdin = f
	out, err := cmd.Output()
	if err != nil || strings.TrimSpace(string(out)) != p.Name {
		t.Errorf("the other process is told %q, %v", out, err)
	}
}

func shortPath(t *testing.T, dir string) string {
	t.Helper()
	link := filepath.Join(os.TempDir(), "csi-link-"+filepath.Base(filepath.Dir(t.TempDir())))
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(link) })
	return filepath.Join(link, SocketName)
}

// The plugin is what kubelet looks for, and says nothing more.
func TestKubelet(t *testing.T) {
	r := newRig(t)
	if nr := r.d.NotReady(); len(nr) != 0 {
		t.Errorf("not ready: %v", nr)
	}
	conn := dial(t, r.k.endpoint)
	defer conn.Close()
	identity := csipb.NewIdentityClient(conn)
	if info, err := identity.GetPluginInfo(t.Context(), &csipb.GetPluginInfoRequest{}); err != nil || info.GetName() != DefaultName || info.GetVendorVersion() != "devel" {
		t.Errorf("plugin %v, %v", info, err)
	}
	if caps, err := identity.GetPluginCapabilities(t.Context(), &csipb.GetPluginCapabilitiesRequest{}); err != nil || len(caps.GetCapabilities()) != 0 {
		t.Errorf("plugin capabilities %v, %v", caps, err)
	}
	if _, err := identity.Probe(t.Context(), &csipb.ProbeRequest{}); err != nil {
		t.Error(err)
	}
	node := csipb.NewNodeClient(conn)
	if caps, err := node.NodeGetCapabilities(t.Context(), &csipb.NodeGetCapabilitiesRequest{}); err != nil || len(caps.GetCapabilities()) != 0 {
		t.Errorf("node capabilities %v, %v", caps, err)
	}
	if _, err := node.NodeStageVolume(t.Context(), &csipb.NodeStageVolumeRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("NodeStageVolume: %v", err)
	}
	if _, err := csipb.NewControllerClient(conn).CreateVolume(t.Context(), &csipb.CreateVolumeRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("CreateVolume: %v", err)
	}
	reg := dial(t, r.d.registrySocket())
	defer reg.Close()
	_, err := registrationpb.NewRegistrationClient(reg).NotifyRegistrationStatus(t.Context(), &registrationpb.RegistrationStatus{Error: "no such driver"})
	if nr := r.d.NotReady(); err != nil || len(nr) != 1 || !strings.Contains(nr[0], "no such driver") {
		t.Errorf("not ready: %v, %v", nr, err)
	}
}

// What is counted, and what is kept of a volume: one file that nobody else can read.
func TestCounted(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Metrics = NewMetrics() })
	p := testPod(1)
	r.publish(p, 1)
	r.publish(p, 1)
	req := r.k.request(p, p.token(1))
	req.Readonly = false
	wantError(t, r.k.publish(p, req), api.VolumeRefused)
	info, err := os.Stat(filepath.Join(r.cfg.StateDir, p.id()+recordSuffix))
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("record %v, %v", info.Mode(), err)
	}
	reg := prometheus.NewRegistry()
	if err := reg.Register(r.cfg.Metrics); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var name strings.Builder
			name.WriteString(f.GetName())
			for _, l := range m.GetLabel() {
				name.WriteString(" " + l.GetValue())
			}
			got[name.String()] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	for name, want := range map[string]float64{
		"signet_agent_volume_calls_total publish": 2, "signet_agent_volume_failures_total publish VOLUME_REFUSED": 1,
		"signet_agent_volumes": 1, "signet_agent_kubelet_registered": 1, "signet_agent_sockets_remade_total": 0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v, want %v", name, v, want)
		}
	}
}

// Hundreds of volumes later there is not one open file or goroutine more.
func TestNothingLeaks(t *testing.T) {
	r := newRig(t)
	p := testPod(1)
	if err := r.k.writeNotes(p); err != nil {
		t.Fatal(err)
	}
	files := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	cycles := func(n int) {
		for range n {
			node := &nodeServer{d: r.d}
			if _, err := node.NodePublishVolume(t.Context(), r.k.request(p, p.token(1))); err != nil {
				t.Fatal(err)
			}
			c, _, err := r.connect(p)
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
			r.d.tend(target{p.UID, p.volume})
			r.d.sweep(time.Now())
			if _, err := node.NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: p.id(), TargetPath: r.k.target(p)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	cycles(1)
	fds, routines := files(), runtime.NumGoroutine()
	cycles(200)
	eventually(t, "what there was before", func() error {
		if f, g := files(), runtime.NumGoroutine(); f > fds || g > routines {
			return fmt.Errorf("%d files, %d goroutines; there were %d and %d", f, g, fds, routines)
		}
		return nil
	})
}

// kubelet's folder of plugins may be emptied under us.
func TestSocketsForKubelet(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for _, path := range []string{r.d.registrySocket(), r.d.nodeSocket()} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		eventually(t, path, func() error { _, err := os.Lstat(path); return err })
	}
	r.k.register()
	r.publish(testPod(1), 1)
}

func TestLimits(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(c *Config) { c.MaxVolumes, c.MaxPublishes, c.MaxMessageBytes = 2, 1, 64<<10 })
	r.publish(testPod(1), 1)
	r.publish(testPod(2), 1)
	third := testPod(3)
	wantError(t, r.k.publish(third, r.k.request(third, third.token(1))), api.Overloaded)
	r.clean(third)
	r.publish(testPod(1), 2)
	if err := r.k.deletePod(testPod(2)); err != nil {
		t.Fatal(err)
	}
	r.publish(third, 1)

	req := r.k.request(third, third.token(1))
	req.Secrets[keyTokens] += strings.Repeat(" ", 64<<10)
	if err := r.k.publish(third, req); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a call that is too large: %v", err)
	}

	// One call waits in Offer: another for the same volume is told to come back, one for another volume too.
	if err := r.k.deletePod(third); err != nil {
		t.Fatal(err)
	}
	block := make(chan struct{})
	r.identities.mu.Lock()
	r.identities.block = block
	r.identities.mu.Unlock()
	if err := r.k.writeNotes(third); err != nil {
		t.Fatal(err)
	}
	first := make(chan error, 1)
	go func() {
		_, err := (&nodeServer{d: r.d}).NodePublishVolume(context.Background(), r.k.request(third, third.token(1)))
		first <- err
	}()
	eventually(t, "a call under way", func() error {
		r.d.mu.Lock()
		defer r.d.mu.Unlock()
		if r.d.busy[target{third.UID, third.volume}] == nil { // of the others our own upkeep may have one
			return errors.New("none")
		}
		return nil
	})
	r.k.node(func(c csipb.NodeClient) {
		_, err := c.NodePublishVolume(t.Context(), r.k.request(testPod(1), testPod(1).token(3)))
		wantError(t, err, api.Overloaded)
		_, err = c.NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: third.id(), TargetPath: r.k.target(third)})
		wantError(t, err, api.StateConflict)
	})
	close(block)
	if err := <-first; err != nil {
		t.Error(err)
	}
	r.served(third)

	// Our own upkeep is waited for: a pod's events show every error.
	var release func()
	eventually(t, "nobody works there", func() error { // not even the guard, which looks at it every second
		var ok bool
		if release, ok = r.d.upkeep(target{third.UID, third.volume}); !ok {
			return errors.New("somebody does")
		}
		return nil
	})
	go func() { first <- r.k.deletePod(third) }()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.d.acquire(ctx, target{third.UID, third.volume}); !errors.Is(err, context.Canceled) {
		t.Errorf("upkeep was not waited for: %v", err)
	}
	release()
	if err := <-first; err != nil {
		t.Error(err)
	}
	r.clean(third)
}

func TestNew(t *testing.T) {
	good := func() Config {
		c := testConfig(t.TempDir(), newIdentities())
		return c
	}
	for _, tc := range []struct {
		name   string
		change func(*Config)
		reason api.Reason
	}{
		{"node", func(c *Config) { c.Node = "" }, api.ConfigInvalid},
		{"audience", func(c *Config) { c.Audience = "" }, api.ConfigInvalid},
		{"identities", func(c *Config) { c.Identities = nil }, api.ConfigInvalid},
		{"listen", func(c *Config) { c.Listen = nil }, api.ConfigInvalid},
		{"bind", func(c *Config) { c.Bind = nil }, api.ConfigInvalid},
		{"name", func(c *Config) { c.Name = "../x" }, api.ConfigInvalid},
		{"long name", func(c *Config) { c.Name = strings.Repeat("a", 64) }, api.ConfigInvalid},
		{"relative", func(c *Config) { c.KubeletDir = "kubelet" }, api.ConfigInvalid},
		{"unclean", func(c *Config) { c.KubeletDir += "/" }, api.ConfigInvalid},
		{"the root", func(c *Config) { c.KubeletDir = "/" }, api.ConfigInvalid},
		{"token", func(c *Config) { c.TokenIn = 7 }, api.ConfigInvalid},
		{"open state", func(c *Config) { os.Mkdir(c.StateDir, 0o755) }, api.FileUnsafe},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := good()
			tc.change(&c)
			if _, err := New(c); api.ReasonOf(err) != tc.reason {
				t.Errorf("error %v, want %s", err, tc.reason)
			}
		})
	}
	c := good()
	c.StateDir = ""
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := prometheus.NewRegistry().Register(d.metrics); err != nil {
		t.Error(err)
	}
	if nr := d.NotReady(); len(nr) != 1 {
		t.Errorf("ready before kubelet knows: %v", nr)
	}
}
