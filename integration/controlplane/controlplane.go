// Package controlplane starts a real Kubernetes control plane for tests: etcd, API server and the controllers of
// ServiceAccount tokens, of the version that integration/cluster pins. It needs no root, listens on loopback only, lives in
// a folder of the test, and is gone with it.
//
// There are no nodes unless Config asks for a control plane that can have some (integration/nodes): a pod here is an
// object. That is all that tokens and their reviews depend on.
package controlplane

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/internal/daemon/daemontest"
)

// Issuer is the "iss" of the cluster's tokens.
const Issuer = "https://kubernetes.default.svc.cluster.local"

// BinaryVariable names the environment variable with the path of the program of integration/cluster.
const BinaryVariable = "SIGNET_CLUSTER"

// patience is how long anything here may take to start. It is for a machine that has much else to do.
const patience = 3 * time.Minute

// Services is the range of the Services' addresses, of which the API server's own is the first.
const Services = "10.96.0.0/16"

// Config says what to start.
type Config struct {
	// Address is where the API server listens, for nodes that are reached from there as well. Then all controllers run
	// and the scheduler too. The zero value is loopback and a cluster without nodes.
	Address netip.Addr
}

// ControlPlane is one that runs.
type ControlPlane struct {
	URL        string // of the API server
	Dir        string // of everything
	CAFile     string // PEM, of the API server's certificate
	SigningKey string // file of the RSA key that signs ServiceAccount tokens, PKCS#1 PEM

	config    Config
	admin     *http.Client
	t         testing.TB // with which all of it ends
	binary    string
	etcd      string               // URL
	parts     map[string]*exec.Cmd // the last of each component
	apiserver *exec.Cmd
	ended     <-chan error // of the API server
}

// Start starts a control plane without nodes that ends with the test. Without BinaryVariable the test is skipped.
func Start(t testing.TB) *ControlPlane {
	t.Helper()
	return Config{}.Start(t)
}

// Start starts a control plane that ends with the test. Without BinaryVariable the test is skipped.
func (cfg Config) Start(t testing.TB) *ControlPlane {
	t.Helper()
	nodes := cfg.Address.IsValid()
	if !nodes {
		cfg.Address = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	binary := os.Getenv(BinaryVariable)
	if binary == "" {
		t.Skip(BinaryVariable + " names no control plane; `make e2e` builds one")
	}
	dir, err := os.MkdirTemp("", "signet-cluster-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := &ControlPlane{config: cfg, t: t, Dir: dir, parts: map[string]*exec.Cmd{}, CAFile: filepath.Join(dir, "ca.crt"), SigningKey: filepath.Join(dir, "sa.key")}
	if err := writeKeys(dir, cfg.Address); err != nil {
		t.Fatal(err)
	}
	if c.admin, err = c.client("admin"); err != nil {
		t.Fatal(err)
	}
	c.binary, c.etcd = binary, c.startEtcd(t, binary)
	for try := 1; ; try++ { // between asking for a free port and using it somebody else may
		if err = c.startAPIServer(t); err == nil {
			break
		}
		if try == 3 {
			t.Fatal(err)
		}
	}
	if nodes {
		c.startControllers(t, "--controllers=*", "--use-service-account-credentials")
		c.start(t, binary, nil, "kube-scheduler", "--kubeconfig="+c.UserKubeconfig(t, "scheduler"), "--leader-elect=false", "--secure-port=0")
	} else {
		c.startControllers(t, "--controllers=serviceaccount-token-controller,serviceaccount-controller")
	}
	return c
}

// start runs one component, with its output in a log that is shown if the test fails.
func (c *ControlPlane) start(t testing.TB, binary string, stdout io.Writer, args ...string) (*exec.Cmd, <-chan error) {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(c.Dir, args[0]+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() // the child has its own
	cmd := exec.Command(binary, args...)
	cmd.Dir, cmd.Stderr = c.Dir, log
	if cmd.Stdout = stdout; stdout == nil {
		cmd.Stdout = log
	}
	cmd.SysProcAttr = processAttributes()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.parts[args[0]] = cmd
	ended := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Go(func() { ended <- cmd.Wait(); close(ended) })
	t.Cleanup(func() {
		cmd.Process.Kill() // nothing of it is kept, so nothing is lost
		wg.Wait()
		if t.Failed() {
			t.Logf("the end of %s's log:\n%s", args[0], c.tail(args[0]))
		}
	})
	return cmd, ended
}

// tail returns the end of a component's log.
func (c *ControlPlane) tail(component string) []byte {
	data, err := os.ReadFile(filepath.Join(c.Dir, component+".log"))
	if err != nil {
		return nil
	}
	return data[max(0, len(data)-2048):]
}

// startEtcd returns the URL that it chose.
func (c *ControlPlane) startEtcd(t testing.TB, binary string) string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	_, ended := c.start(t, binary, w, "etcd", filepath.Join(c.Dir, "etcd"))
	w.Close()
	if err := r.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	url, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		select {
		case err = <-ended:
		default:
		}
		t.Fatalf("etcd: %v\n%s", err, c.tail("etcd"))
	}
	return strings.TrimSpace(url)
}

// startAPIServer starts it on a free port.
func (c *ControlPlane) startAPIServer(t testing.TB) error {
	t.Helper()
	free, err := daemontest.FreeAddress()
	if err != nil {
		return err
	}
	_, port, err := net.SplitHostPort(free)
	if err != nil {
		return err
	}
	c.URL = "https://" + net.JoinHostPort(c.config.Address.String(), port)
	return c.runAPIServer(t, port)
}

// Restart kills the API server and starts another one in its place.
func (c *ControlPlane) Restart(t testing.TB) {
	t.Helper()
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	<-c.ended
	_, port, err := net.SplitHostPort(strings.TrimPrefix(c.URL, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.runAPIServer(c.t, port); err != nil { // a part of the test may be over before the next needs it
		t.Fatal(err)
	}
}

// auditPolicy has the API server put on record who asked for which token, which is the end of the trail from a credential
// id to a person.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Metadata
    resources: [{group: "", resources: [serviceaccounts/token]}]
  - level: None
`

// AuditLog is the path of the API server's audit log, JSON lines.
func (c *ControlPlane) AuditLog() string { return filepath.Join(c.Dir, "audit.log") }

// runAPIServer returns when it is ready.
func (c *ControlPlane) runAPIServer(t testing.TB, port string) error {
	t.Helper()
	file := func(name string) string { return filepath.Join(c.Dir, name) }
	address := c.config.Address.String()
	args := []string{
		"kube-apiserver",
		"--etcd-servers=" + c.etcd, "--bind-address=" + address, "--secure-port=" + port, "--advertise-address=" + address,
		"--service-cluster-ip-range=" + Services, "--cert-dir=" + file("generated"),
		"--tls-cert-file=" + file("apiserver.crt"), "--tls-private-key-file=" + file("apiserver.key"), "--client-ca-file=" + c.CAFile,
		"--service-account-issuer=" + Issuer, "--service-account-signing-key-file=" + c.SigningKey,
		"--service-account-key-file=" + c.SigningKey, "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--audit-policy-file=" + file("audit.yaml"), "--audit-log-path=" + c.AuditLog(),
	}
	if err := os.WriteFile(file("audit.yaml"), []byte(auditPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	if c.config.Address.IsLoopback() {
		args = append(args, "--endpoint-reconciler-type=none") // it refuses to tell anybody of an address of loopback
	} else {
		args = append(args, "--kubelet-certificate-authority="+c.CAFile, "--kubelet-preferred-address-types=InternalIP",
			"--kubelet-client-certificate="+file("admin.crt"), "--kubelet-client-key="+file("admin.key"))
	}
	cmd, ended := c.start(t, c.binary, nil, args...)
	c.apiserver, c.ended = cmd, ended
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		var err error
		// The role that lets the controllers in is written after /readyz is good for the first time.
		if err = c.Do(ctx, http.MethodGet, "/apis/rbac.authorization.k8s.io/v1/clusterroles/system:kube-controller-manager", nil, nil); err == nil {
			if err = c.Do(ctx, http.MethodGet, "/readyz", nil, nil); err == nil {
				return nil
			}
		}
		select {
		case err := <-ended:
			return fmt.Errorf("kube-apiserver ended: %w\n%s", err, c.tail("kube-apiserver"))
		case <-ctx.Done():
			return fmt.Errorf("kube-apiserver is not ready: %w\n%s", err, c.tail("kube-apiserver"))
		case <-tick.C:
		}
	}
}

func (c *ControlPlane) startControllers(t testing.TB, more ...string) {
	t.Helper()
	c.start(t, c.binary, nil, append([]string{"kube-controller-manager", "--kubeconfig=" + c.UserKubeconfig(t, "controllers"),
		"--leader-elect=false", "--secure-port=0", "--service-account-private-key-file=" + c.SigningKey, "--root-ca-file=" + c.CAFile,
		"--flex-volume-plugin-dir=" + filepath.Join(c.Dir, "flexvolumes")}, more...)...)
}

// UserKubeconfig writes the kubeconfig of one whose certificate is among the files, such as "admin", and returns its path.
func (c *ControlPlane) UserKubeconfig(t testing.TB, name string) string {
	t.Helper()
	return c.Kubeconfig(t, name, fmt.Sprintf(`{"client-certificate": %q, "client-key": %q}`,
		filepath.Join(c.Dir, name+".crt"), filepath.Join(c.Dir, name+".key")))
}

// Kubeconfig writes a kubeconfig for this API server with that user, which is JSON, and returns its path.
func (c *ControlPlane) Kubeconfig(t testing.TB, name, user string) string {
	t.Helper()
	path := filepath.Join(c.Dir, name+".kubeconfig")
	text := fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "x",
		"contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
		"clusters": [{"name": "x", "cluster": {"server": %q, "certificate-authority": %q}}],
		"users": [{"name": "x", "user": %s}]}`, c.URL, c.CAFile, user)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Pause stops the API server in its tracks, as a frozen machine would; Resume lets it go on.
func (c *ControlPlane) Pause() error { return c.apiserver.Process.Signal(syscall.SIGSTOP) }

// Resume ends Pause.
func (c *ControlPlane) Resume() error { return c.apiserver.Process.Signal(syscall.SIGCONT) }

// Processes are the numbers of its components' processes.
func (c *ControlPlane) Processes() []int {
	var pids []int
	for _, cmd := range c.parts {
		pids = append(pids, cmd.Process.Pid)
	}
	return pids
}

// Kill ends the API server for good.
func (c *ControlPlane) Kill() error { return c.apiserver.Process.Kill() }

// client speaks TLS as the named user.
func (c *ControlPlane) client(name string) (*http.Client, error) {
	ca, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	cert, err := tls.LoadX509KeyPair(filepath.Join(c.Dir, name+".crt"), filepath.Join(c.Dir, name+".key"))
	if err != nil {
		return nil, err
	}
	return &http.Client{
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: true},
		Timeout:   time.Minute,
	}, nil
}

// Do asks the API server as its administrator: in, if it is there, is sent as JSON, and out, if it is there, filled from
// the answer. Any status but success is an error.
func (c *ControlPlane) Do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	r, err := http.NewRequestWithContext(ctx, method, c.URL+path, body)
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := c.admin.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %.300s", method, path, resp.Status, data)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(data, out)
}
