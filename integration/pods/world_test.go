//go:build integration

package pods

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/internal/canary"
	"github.com/signet-ca/signet/internal/daemon/daemontest"
)

const (
	trustDomain = "example.org"
	issuerName  = "https://kubernetes.default.svc.test"
	nodeName    = "node-1"
	patience    = 60 * time.Second // of whoever waits for a process
)

// world is one node, its kubelet, and a CA, in a folder on a tmpfs.
type world struct {
	t       *testing.T
	dir     string
	issuer  *attestortest.Issuer
	pods    map[string]attestortest.Pod
	kubelet *kubelet
	ca      *process // nil while it is away
	agent   *process
	http    string // of the agent
}

const caConfig = `apiVersion: signet.dev/v1
kind: CAConfig
trustDomain: example.org
development: true
listen: %[1]q
adminSocket: %[2]s/admin.sock
http: none
store: {kind: bolt, path: %[2]s/signet.db}
seal: {keyFile: %[2]s/seal.key}
ledger: {dir: %[2]s/ledger, segmentSize: 1MiB}
upstream: {kind: selfsigned}
policyFile: %[2]s/policy.yaml
publish: {dir: %[2]s/bundle}
issuers: [{issuer: %[3]q, jwks: {file: %[2]s/jwks.json}}]
directory: {kind: file, path: %[2]s/pods.json}
agents: {namespace: signet-system, serviceAccount: signet-agent}
`

const policy = `apiVersion: signet.dev/v1
kind: Policy
template: /ns/{namespace}/sa/{serviceAccount}
ttl: 10m
namespaces: ["*"]
`

const agentConfig = `apiVersion: signet.dev/v1
kind: AgentConfig
trustDomain: example.org
development: true
ca: {address: %[1]q, bundleFile: %[2]s/bundle/bundle.json}
tokenFile: %[2]s/agent.token
csi: {kubeletDir: %[2]s/kubelet}
cache: {dir: %[2]s/cache}
http: %[3]q
`

// newWorld makes the root of a trust domain and the configuration of all; nothing runs yet.
func newWorld(t *testing.T) *world {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sp")
	if err != nil {
		dir, err = os.MkdirTemp("", "sp")
	}
	if err == nil {
		err = os.Chmod(dir, 0o755) // nobody's program lies in it
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, pods: map[string]attestortest.Pod{}, kubelet: newKubelet(t, filepath.Join(dir, "kubelet"))}
	if w.issuer, err = attestortest.NewIssuer(attestortest.Config{Issuer: issuerName}); err != nil {
		t.Fatal(err)
	}
	address, err := daemontest.FreeAddress()
	if err == nil {
		w.http, err = daemontest.FreeAddress()
	}
	if err != nil {
		t.Fatal(err)
	}
	w.write("ca.yaml", fmt.Sprintf(caConfig, address, dir, issuerName))
	w.write("policy.yaml", policy)
	w.write("agent.yaml", fmt.Sprintf(agentConfig, address, dir, w.http))
	w.write("jwks.json", string(w.issuer.JWKS()))
	agent := w.pod("signet-system", "signet-agent-x", "signet-agent")
	w.write("agent.token", w.token(agent, "signet-agent:"+trustDomain))
	init := exec.CommandContext(t.Context(), binary(t, "signet-ca"), "init", "--config", filepath.Join(dir, "ca.yaml"))
	if out, err := init.CombinedOutput(); err != nil {
		t.Fatalf("signet-ca init: %v\n%s", err, out)
	}
	t.Cleanup(w.end)
	return w
}

// binary returns the path of one of our programs, which `make build` made.
func binary(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("SIGNET_BIN")
	if dir == "" {
		t.Fatal("SIGNET_BIN is not set: run this by `make test`, which builds the programs first")
	}
	return filepath.Join(dir, name)
}

func (w *world) write(name, content string) {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	err := os.WriteFile(path+".new", []byte(content), 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// pod makes a pod that lives on this node.
func (w *world) pod(namespace, name, account string) attestortest.Pod {
	w.t.Helper()
	p := attestortest.NewPod(namespace, name, account, nodeName)
	w.pods[p.UID] = p
	w.writePods()
	return p
}

func (w *world) writePods() {
	w.t.Helper()
	data, err := attestortest.Directory(issuerName, maps.Values(w.pods))
	if err != nil {
		w.t.Fatal(err)
	}
	w.write("pods.json", string(data))
}

func (w *world) token(p attestortest.Pod, audience string) string {
	w.t.Helper()
	token, err := w.issuer.Token(p, cmp.Or(audience, "signet:"+trustDomain), time.Hour)
	if err != nil {
		w.t.Fatal(err)
	}
	return token
}

// process is one of our programs, running.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{}
}

func (w *world) start(name, config string) *process {
	w.t.Helper()
	path := filepath.Join(w.dir, name+".log")
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		w.t.Fatal(err)
	}
	defer log.Close()
	p := &process{t: w.t, done: make(chan struct{})}
	args := []string{binary(w.t, name), "run", "--config", filepath.Join(w.dir, config), "--log-level", "debug"}
	if setpriv, err := exec.LookPath("setpriv"); err == nil && os.Getuid() == 0 {
		args = append([]string{setpriv, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"}, args...) // as in its container
	}
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Stderr, p.cmd.Env = log, append(os.Environ(), "NODE_NAME="+nodeName)
	if err := p.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		p.cmd.Wait()
	}()
	return p
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Error(err)
	}
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Errorf("%s did not end", p.cmd.Path)
		p.cmd.Process.Kill()
		<-p.done
	}
}

func (w *world) startCA() {
	w.t.Helper()
	w.ca = w.start("signet-ca", "ca.yaml")
}

func (w *world) stopCA() {
	w.t.Helper()
	w.ca.signal(syscall.SIGTERM)
	w.ca = nil
}

// startAgent starts the agent and registers it, as kubelet does.
func (w *world) startAgent() {
	w.t.Helper()
	w.agent = w.start("signet-agent", "agent.yaml")
	w.kubelet.register()
}

// end ends what runs, and shows the logs of a test that failed. No log may hold a token or a key.
func (w *world) end() {
	for _, p := range []*process{w.agent, w.ca} {
		if p != nil {
			p.signal(syscall.SIGTERM)
		}
	}
	logs, _ := filepath.Glob(filepath.Join(w.dir, "*.log"))
	for _, path := range logs {
		data, err := os.ReadFile(path)
		if err != nil {
			w.t.Error(err)
		}
		if bytes.Contains(data, []byte(canary.Marker)) || bytes.Contains(data, []byte("eyJ")) || bytes.Contains(data, []byte("PRIVATE KEY")) {
			w.t.Errorf("%s holds a token or a key", filepath.Base(path))
		}
		if bytes.Contains(data, []byte("DATA RACE")) {
			w.t.Errorf("%s tells of a data race", filepath.Base(path))
		}
		if w.t.Failed() {
			w.t.Logf("%s:\n%s", filepath.Base(path), data)
		}
	}
}

// get returns the answer of the agent's port.
func (w *world) get(path string) (string, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+w.http+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// awaitGet waits until the agent's port answers with a text that holds all of these.
func (w *world) awaitGet(path string, want ...string) {
	w.t.Helper()
	eventually(w.t, path, func() error {
		got, err := w.get(path)
		for _, s := range want {
			if err == nil && !strings.Contains(got, s) {
				err = fmt.Errorf("%q is not in %.3000s", s, got)
			}
		}
		return err
	})
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		pause := time.NewTimer(5 * time.Millisecond)
		<-pause.C
	}
}
