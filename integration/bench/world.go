//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
)

const (
	trustDomain = "bench.example"
	issuerName  = "https://kubernetes.default.svc.bench"
	startTime   = 3 * time.Minute // until a program must serve
)

func nodeName(i int) string { return fmt.Sprintf("node-%d", i) }

// Configurations as in a cluster, but for where tokens' keys and pods come from: files, so that no other program's speed is
// measured.
const (
	caConfig = `apiVersion: signet.dev/v1
kind: CAConfig
trustDomain: bench.example
development: true
listen: %[1]q
adminSocket: %[2]s/admin.sock
http: %[4]q
store: {kind: bolt, path: %[2]s/signet.db}
seal: {keyFile: %[2]s/seal.key}
ledger: {dir: %[2]s/ledger}
upstream: {kind: selfsigned}
policyFile: %[2]s/policy.yaml
publish: {dir: %[2]s/bundle}
issuers: [{issuer: %[3]q, jwks: {file: %[2]s/jwks.json}}]
directory: {kind: file, path: %[2]s/pods.json}
agents: {namespace: signet-system, serviceAccount: signet-agent}
`
	policy = `apiVersion: signet.dev/v1
kind: Policy
template: /ns/{namespace}/sa/{serviceAccount}
ttl: 1h
namespaces: ["*"]
`
	agentConfig = `apiVersion: signet.dev/v1
kind: AgentConfig
trustDomain: bench.example
development: true
ca: {address: %[1]q, bundleFile: %[2]s/bundle/bundle.json}
tokenFile: %[2]s/%[5]s.token
node: %[6]s
csi: {kubeletDir: %[3]s/kubelet}
cache: {dir: %[3]s/cache}
http: %[4]q
`
)

// world is a trust domain: its CA, the cluster whose tokens it believes, and maybe one node's agent.
type world struct {
	b           *bench
	dir, memory string // memory is a folder on a tmpfs with a short path, where there is one
	address     string // of the CA
	caHTTP      string
	agentHTTP   string
	cluster     *process
	ca          *process
	agent       *process
	agents      []*process       // of the nodes after the first
	people      *grpc.ClientConn // the CA's socket for its user; nil where nobody asks
	streams     int              // that are open
}

// pods are those that a cluster is to have: agents on so many nodes, workloads on each.
type pods struct {
	Dir       string
	Agents    int
	Workloads int // on each node
	Kubelets  int // nodes after the first whose pods have proxies
}

func (b *bench) newWorld(name string, p pods) (*world, error) {
	w := &world{b: b, dir: filepath.Join(b.dir, name)}
	err := os.Mkdir(w.dir, 0o700)
	if err == nil {
		w.memory, err = shortFolder()
	}
	if err == nil {
		err = kubeletFolders(w.memory)
	}
	for _, a := range []*string{&w.address, &w.caHTTP, &w.agentHTTP} {
		if err == nil {
			*a, err = freeAddress()
		}
	}
	if err == nil {
		w.cluster, err = b.child(w.dir, "cluster", b.client)
	}
	if err == nil {
		p.Dir = w.dir
		_, err = ask[struct{}](w.cluster, "make", p)
	}
	for file, text := range map[string]string{
		"ca.yaml": fmt.Sprintf(caConfig, w.address, w.dir, issuerName, w.caHTTP), "policy.yaml": policy,
		"agent.yaml": fmt.Sprintf(agentConfig, w.address, w.dir, w.memory, w.agentHTTP, "agent", nodeName(0)),
	} {
		if err == nil {
			err = os.WriteFile(filepath.Join(w.dir, file), []byte(text), 0o600)
		}
	}
	if err == nil {
		out, failed := exec.Command(filepath.Join(b.bin, "signet-ca"), "init", "--config", filepath.Join(w.dir, "ca.yaml")).CombinedOutput()
		if failed != nil {
			err = fmt.Errorf("signet-ca init: %w: %s", failed, out)
		}
	}
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// kubeletFolders makes those that an agent finds on a node.
func kubeletFolders(memory string) error {
	for _, sub := range []string{"pods", "plugins", "plugins_registry"} {
		if err := os.MkdirAll(filepath.Join(memory, "kubelet", sub), 0o750); err != nil {
			return err
		}
	}
	return nil
}

// shortFolder makes a folder on a tmpfs, where there is one, whose path is short enough for sockets.
func shortFolder() (string, error) {
	dir, err := os.MkdirTemp("/dev/shm", "sb")
	if err != nil {
		return os.MkdirTemp("", "sb")
	}
	return dir, nil
}

func (w *world) startCA(ctx context.Context) (err error) {
	args := []string{filepath.Join(w.b.bin, "signet-ca"), "run", "--config", filepath.Join(w.dir, "ca.yaml"), "--log-level", "warn"}
	if w.ca, err = w.b.start(w.dir, "signet-ca", w.b.server, false, args...); err != nil {
		return err
	}
	return w.ready(ctx, w.ca, "signet-ca", w.caHTTP)
}

func (w *world) startAgent(ctx context.Context) (err error) {
	args := []string{filepath.Join(w.b.bin, "signet-agent"), "run", "--config", filepath.Join(w.dir, "agent.yaml"), "--log-level", "warn"}
	if w.agent, err = w.b.start(w.dir, "signet-agent", w.b.server, false, args...); err != nil {
		return err
	}
	if _, err = ask[struct{}](w.cluster, "register", w.memory); err != nil {
		return err
	}
	return w.ready(ctx, w.agent, "signet-agent", w.agentHTTP)
}

// startAgents starts those of the nodes after the first, on these processors, and has their kubelets find them.
func (w *world) startAgents(ctx context.Context, n int, where cpus) error {
	for i := 1; i <= n; i++ {
		name, memory := fmt.Sprintf("agent-%d", i), filepath.Join(w.memory, nodeName(i))
		err := kubeletFolders(memory)
		file := filepath.Join(w.dir, name+".yaml")
		if err == nil {
			err = os.WriteFile(file, fmt.Appendf(nil, agentConfig, w.address, w.dir, memory, "none", name, nodeName(i)), 0o600)
		}
		if err != nil {
			return err
		}
		args := []string{filepath.Join(w.b.bin, "signet-agent"), "run", "--config", file, "--log-level", "warn"}
		p, err := w.b.start(w.dir, name, where, false, args...)
		if err != nil {
			return err
		}
		w.agents = append(w.agents, p)
		if err := w.askOn(i, "register", memory); err != nil {
			return err
		}
	}
	return nil
}

// askOn has the kubelet of one node do something.
func (w *world) askOn(node int, what string, arg any) error {
	raw, err := json.Marshal(arg)
	if err != nil {
		return err
	}
	_, err = ask[json.RawMessage](w.cluster, "on", on{node, what, raw})
	return err
}

// ready waits until a program says that it is.
func (w *world) ready(ctx context.Context, p *process, name, address string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTime, fmt.Errorf("%s is not ready after %v", name, startTime))
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", nil)
		if err != nil {
			return err
		}
		if resp, err := http.DefaultClient.Do(req); err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended", name)
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (w *world) close() {
	if w.cluster != nil {
		w.cluster.end()
	}
	if w.people != nil {
		_ = w.people.Close()
	}
	for _, a := range w.agents {
		a.end()
	}
	w.agent.end()
	w.ca.end()
	_ = os.RemoveAll(w.memory)
}

// freeAddress returns an address on loopback that was free a moment ago.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}
