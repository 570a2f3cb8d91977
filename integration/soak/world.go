//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/agent/csi/csitest"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/internal/daemon/daemontest"
	"github.com/signet-ca/signet/internal/envoy"
)

const (
	trustDomain = "soak.example"
	issuerName  = "https://kubernetes.default.svc.soak"
	namespace   = "soak"
	patience    = 2 * time.Minute // of whoever waits for a process
	tokenTTL    = 12 * time.Hour  // longer than any run: who comes back comes with the same token
)

// In a cluster only the lifetimes are longer, and the tokens' keys and the pods come from an API server.
const (
	caConfig = `apiVersion: signet.dev/v1
kind: CAConfig
trustDomain: soak.example
development: true
replica: ca-0
listen: %[1]q
adminSocket: %[2]s/admin.sock
http: none
store: {kind: bolt, path: %[2]s/signet.db}
seal: {keyFile: %[2]s/seal.key}
ledger: {dir: %[2]s/ledger, segmentSize: 4MiB}
upstream: {kind: selfsigned}
policyFile: %[2]s/policy.yaml
publish: {dir: %[2]s/bundle}
issuers: [{issuer: %[3]q, jwks: {file: %[2]s/jwks.json}}]
directory: {kind: file, path: %[2]s/pods.json}
agents: {namespace: signet-system, serviceAccount: signet-agent, ttl: %[4]s}
mintBudget: 10000 # as many rotations and restarts in an hour as may be
manualRotation: true
`
	policy = `apiVersion: signet.dev/v1
kind: Policy
template: /ns/{namespace}/sa/{serviceAccount}
ttl: %s
namespaces: ["*"]
`
	agentConfig = `apiVersion: signet.dev/v1
kind: AgentConfig
trustDomain: soak.example
development: true
ca: {address: %[1]q, bundleFile: %[2]s/bundle/bundle.json}
tokenFile: %[3]s/token
node: %[4]s
csi: {kubeletDir: %[3]s/kubelet}
sharedSocket: %[3]s/sds
cache: {dir: %[3]s/cache}
http: none
`
)

// world is a trust domain: a CA, and nodes with an agent each.
type world struct {
	cfg     Config
	dir     string // on a tmpfs where there is one; its path is short
	td      spiffeid.TrustDomain
	issuer  *attestortest.Issuer
	pods    []attestortest.Pod
	address string // of the CA
	ca      *envoy.Program
	nodes   []*node
	died    func(error) // ends everything
	down    outages     // of the CA
	logs    []io.Closer
	ends    []func() error // of what is served here
	wg      sync.WaitGroup
}

// node is one machine of the cluster.
type node struct {
	name    string
	dir     string
	agent   *envoy.Program
	kubelet *csitest.Kubelet
	down    outages // of its agent
}

// sds is the socket of the node's proxies.
func (n *node) sds() string { return filepath.Join(n.dir, "sds") }

// newWorld makes the root of a trust domain and the configuration of all. Nothing runs yet.
func newWorld(ctx context.Context, cfg Config, died func(error)) (w *world, err error) {
	w = &world{cfg: cfg, td: spiffeid.RequireTrustDomainFromString(trustDomain), died: died}
	if w.dir, err = os.MkdirTemp("/dev/shm", "ss"); err != nil {
		if w.dir, err = os.MkdirTemp("", "ss"); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(w.dir)
		}
	}()
	if w.issuer, err = attestortest.NewIssuer(attestortest.Config{Issuer: issuerName}); err != nil {
		return nil, err
	}
	if w.address, err = daemontest.FreeAddress(); err != nil {
		return nil, err
	}
	if err := os.Mkdir(w.join("logs"), 0o700); err != nil {
		return nil, err
	}
	for i := range cfg.Nodes {
		if err := w.addNode(fmt.Sprintf("node-%d", i+1)); err != nil {
			return nil, err
		}
	}
	err = errors.Join(
		w.write("ca.yaml", fmt.Sprintf(caConfig, w.address, w.dir, issuerName, cfg.TTL)),
		w.write("policy.yaml", fmt.Sprintf(policy, cfg.TTL)),
		w.issuer.WriteJWKS(w.join("jwks.json")),
	)
	if err != nil {
		return nil, err
	}
	w.ca, err = w.program("signet-ca", "signet-ca", w.join("ca.yaml"))
	if err != nil {
		return nil, err
	}
	return w, envoy.Run(ctx, envoy.Command{Name: "signet-ca init", Path: w.ca.Path, Args: []string{"init", "--config", w.join("ca.yaml")}, Log: w.ca.Log})
}

func (w *world) addNode(name string) error {
	n := &node{name: name, dir: w.join(name)}
	err := os.Mkdir(n.dir, 0o700)
	if err != nil {
		return err
	}
	if n.kubelet, err = csitest.New(filepath.Join(n.dir, "kubelet"), name, api.WorkloadAudience(w.td)); err != nil {
		return err
	}
	pod := attestortest.NewPod("signet-system", "signet-agent-"+name, "signet-agent", name)
	w.pods = append(w.pods, pod)
	if err := w.issuer.WriteToken(filepath.Join(n.dir, "token"), pod, api.AgentAudience(w.td), tokenTTL); err != nil {
		return err
	}
	if err := w.write(filepath.Join(name, "agent.yaml"), fmt.Sprintf(agentConfig, w.address, w.dir, n.dir, name)); err != nil {
		return err
	}
	n.agent, err = w.program("signet-agent of "+name, "signet-agent", filepath.Join(n.dir, "agent.yaml"))
	w.nodes = append(w.nodes, n)
	return err
}

func (w *world) join(elem ...string) string {
	return filepath.Join(append([]string{w.dir}, elem...)...)
}

func (w *world) write(name, content string) error {
	return os.WriteFile(w.join(name), []byte(content), 0o600)
}

// log creates the log of one process.
func (w *world) log(name string) (io.Writer, error) {
	f, err := os.OpenFile(w.join("logs", name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	w.logs = append(w.logs, f)
	return f, err
}

func (w *world) program(name, binary, config string) (*envoy.Program, error) {
	log, err := w.log(filepath.Base(filepath.Dir(config)) + "-" + binary)
	return &envoy.Program{Name: name, Path: filepath.Join(w.cfg.Bin, binary), Args: []string{"run", "--config", config, "--log-level", "debug"}, Log: log, Died: w.died}, err
}

// pod makes a pod on a node, before the CA is started.
func (w *world) pod(name string, n *node) attestortest.Pod {
	p := attestortest.NewPod(namespace, name, name, n.name)
	w.pods = append(w.pods, p)
	return p
}

// id is what a pod is attested as.
func (w *world) id(p attestortest.Pod) spiffeid.ID {
	return spiffeid.RequireFromSegments(w.td, "ns", p.Namespace, "sa", p.ServiceAccount)
}

// start starts the CA and the agents, once all pods are made.
func (w *world) start(ctx context.Context) error {
	data, err := attestortest.Directory(issuerName, slices.Values(w.pods))
	if err == nil {
		err = w.write("pods.json", string(data))
	}
	if err == nil {
		err = w.startCA(ctx)
	}
	for _, n := range w.nodes {
		if err == nil {
			err = w.startAgent(ctx, n)
		}
	}
	return err
}

// startCA starts the CA, or starts it again, and returns when agents can connect.
func (w *world) startCA(ctx context.Context) error {
	return w.serves(ctx, w.ca, "grpc")
}

// startAgent starts an agent, or starts it again, and returns when it serves and kubelet has registered it.
func (w *world) startAgent(ctx context.Context, n *node) error {
	if err := w.serves(ctx, n.agent, "sds"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return n.kubelet.Register(ctx)
}

func (w *world) serves(ctx context.Context, p *envoy.Program, what string) error {
	if err := p.Start(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not within %s", patience))
	defer cancel()
	_, err := p.Await(ctx, what)
	return err
}

// end stops the CA and the agents and removes the folder; what the processes said is kept in the folder that it returns, if asked.
func (w *world) end(keep bool) (logs string) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), 20*time.Second, errors.New("it took longer than 20 s"))
	defer cancel()
	for _, n := range w.nodes {
		_ = n.agent.Stop(ctx) // it is killed then
	}
	_ = w.ca.Stop(ctx)
	for _, end := range w.ends {
		_ = end() // nothing is under way any more
	}
	w.wg.Wait()
	for _, l := range w.logs {
		_ = l.Close() // nothing more is written
	}
	if keep {
		to, err := os.MkdirTemp("", "soak-logs-")
		if err == nil {
			err = os.CopyFS(to, os.DirFS(w.join("logs")))
		}
		if err == nil {
			logs = to
		}
	}
	_ = os.RemoveAll(w.dir)
	return logs
}
