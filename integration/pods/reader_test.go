//go:build integration

package pods

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/sds"
)

// envReader makes this program a workload: it reads its X509-SVID over the socket in the folder that is open as file 3.
const envReader = "SIGNET_TEST_READER"

func TestMain(m *testing.M) {
	if os.Getenv(envReader) != "" {
		if err := read(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// seen is what a workload got.
type seen struct {
	UID        int
	ID, Serial string
	Took       time.Duration
}

func read() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	began := time.Now()
	c, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix:///proc/self/fd/3/agent.sock"))
	for status.Code(err) == codes.Unavailable && ctx.Err() == nil { // nobody listens: the agent has not started yet
		pause := time.NewTimer(5 * time.Millisecond)
		<-pause.C
		c, err = workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix:///proc/self/fd/3/agent.sock"))
	}
	if err != nil {
		return err
	}
	svid := c.DefaultSVID()
	if _, _, err := x509svid.Verify(svid.Certificates, c.Bundles); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(seen{
		UID: os.Getuid(), ID: svid.ID.String(), Serial: svid.Certificates[0].SerialNumber.Text(16), Took: time.Since(began),
	})
}

// nobody is a user without any right.
const nobody = 65534

// read reads a pod's SVID in a process of its own that sees the folder and nothing above it, as a container does: as nobody
// where this test may do that.
func (w *world) read(v volume) seen {
	w.t.Helper()
	folder, err := os.Open(w.kubelet.target(v))
	if err != nil {
		w.t.Fatal(err)
	}
	defer folder.Close()
	cmd := exec.CommandContext(w.t.Context(), w.program())
	cmd.Env, cmd.ExtraFiles, cmd.Dir = append(os.Environ(), envReader+"=1"), []*os.File{folder}, "/"
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatalf("the workload of %s got nothing: %v\n%s", v.Name, err, stderr.String())
	}
	var s seen
	if err := json.Unmarshal(out, &s); err != nil {
		w.t.Fatal(err)
	}
	if os.Getuid() == 0 && s.UID != nobody {
		w.t.Errorf("the workload ran as %d", s.UID)
	}
	if want := fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", trustDomain, v.Namespace, v.ServiceAccount); s.ID != want {
		w.t.Errorf("the workload of %s is %s, want %s", v.Name, s.ID, want)
	}
	return s
}

// program returns a copy of this program where everybody may run it.
func (w *world) program() string {
	w.t.Helper()
	path := filepath.Join(w.dir, "reader")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	self, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	in, err := os.Open(self)
	if err != nil {
		w.t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		w.t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// socket returns a path to a pod's socket that is short enough for an address, as long as the test goes on.
func (w *world) socket(v volume) string {
	w.t.Helper()
	folder, err := os.Open(w.kubelet.target(v))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { folder.Close() })
	return fmt.Sprintf("/proc/self/fd/%d/agent.sock", folder.Fd())
}

// sds returns the serial of the SVID that a proxy of the pod is given, which shows no token.
func (w *world) sds(v volume) string {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	conn := dial(w.t, w.socket(v))
	defer conn.Close()
	resp, err := secret.NewSecretDiscoveryServiceClient(conn).FetchSecrets(ctx,
		&discovery.DiscoveryRequest{TypeUrl: sds.TypeURL, ResourceNames: []string{sds.NameDefault, sds.NameRootCA}})
	if err != nil {
		w.t.Fatalf("SDS: %v", err)
	}
	if len(resp.GetResources()) != 2 {
		w.t.Fatalf("SDS gave %d secrets", len(resp.GetResources()))
	}
	for _, a := range resp.GetResources() {
		var s tls.Secret
		if err := a.UnmarshalTo(&s); err != nil {
			w.t.Fatal(err)
		}
		if s.GetName() != sds.NameDefault {
			continue
		}
		c := s.GetTlsCertificate()
		svid, err := x509svid.Parse(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
		if err != nil {
			w.t.Fatal(err)
		}
		return svid.Certificates[0].SerialNumber.Text(16)
	}
	w.t.Fatal("SDS gave no SVID")
	return ""
}

// watcher follows a pod's X509-SVIDs as a program with go-spiffe does.
type watcher struct {
	contexts chan *workloadapi.X509Context
	errors   chan error
}

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher.
func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w.contexts <- c }

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher.
func (w *watcher) OnX509ContextWatchError(err error) {
	select {
	case w.errors <- err:
	default:
	}
}

// watch follows a pod's X509-SVIDs until the test ends.
func (w *world) watch(v volume) *watcher {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	x := &watcher{make(chan *workloadapi.X509Context, 100), make(chan error, 1)}
	address := "unix://" + w.socket(v)
	done := make(chan struct{})
	go func() {
		defer close(done)
		workloadapi.WatchX509Context(ctx, x, workloadapi.WithAddr(address))
	}()
	w.t.Cleanup(func() { cancel(); <-done })
	return x
}

// next returns the next that comes.
func (x *watcher) next(t *testing.T) (*x509svid.SVID, *x509bundle.Set) {
	t.Helper()
	select {
	case c := <-x.contexts:
		return c.DefaultSVID(), c.Bundles
	case <-time.After(patience):
		t.Fatal("no X509-SVID came")
		return nil, nil
	}
}
