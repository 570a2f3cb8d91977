//go:build integration

package rotation

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/internal/canary"
	"github.com/signet-ca/signet/internal/daemon/daemontest"
	"github.com/signet-ca/signet/internal/envoy"
)

const (
	issuerName = "https://kubernetes.default.svc.test"
	patience   = 60 * time.Second // of whoever waits for a process

	// An old root goes once the last SVID under it has expired, which some tests wait for; the others take so long that no stall
	// of the machine is of any consequence.
	short, long = 15 * time.Second, 10 * time.Minute
)

var trustDomain = spiffeid.RequireTrustDomainFromString("example.org")

const caConfig = `apiVersion: signet.dev/v1
kind: CAConfig
trustDomain: example.org
development: true
replica: ca-0
listen: %[1]q
adminSocket: %[2]s/admin.sock
http: none
store: {kind: bolt, path: %[2]s/signet.db}
seal: {keyFile: %[2]s/seal.key}
ledger: {dir: %[2]s/ledger, segmentSize: 1MiB}
upstream: %[4]s
policyFile: %[2]s/policy.yaml
publish: {dir: %[2]s/bundle}
issuers: [{issuer: %[3]q, jwks: {file: %[2]s/jwks.json}}]
directory: {kind: file, path: %[2]s/pods.json}
agents: {namespace: signet-system, serviceAccount: signet-agent, ttl: %[5]s}
`

const policy = `apiVersion: signet.dev/v1
kind: Policy
template: /ns/{namespace}/sa/{serviceAccount}
ttl: %s
namespaces: ["*"]
`

const agentConfig = `apiVersion: signet.dev/v1
kind: AgentConfig
trustDomain: example.org
development: true
ca: {address: %[1]q, bundleFile: %[2]s/bundle/bundle.json}
tokenFile: %[3]s.token
sharedSocket: %[3]s.sock
cache: {dir: %[3]s.cache}
http: none
`

// world is a CA and the agents of some nodes, in a folder on a tmpfs where there is one.
type world struct {
	t       *testing.T
	dir     string
	address string // of the CA
	ttl     time.Duration
	issuer  *attestortest.Issuer
	ca      *program
	admin   apiv1.AdminClient
	pods    []attestortest.Pod
	agents  []*agent
}

// agent is that of one node.
type agent struct {
	*program
	node string
}

// newWorld makes the root of a trust domain, and starts a CA that issues for that long, and the agents of so many nodes.
func newWorld(t *testing.T, nodes int, ttl time.Duration) *world {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sr")
	if err != nil {
		dir, err = os.MkdirTemp("", "sr")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, ttl: ttl}
	if w.issuer, err = attestortest.NewIssuer(attestortest.Config{Issuer: issuerName}); err == nil {
		w.address, err = daemontest.FreeAddress()
	}
	if err != nil {
		t.Fatal(err)
	}
	w.configure("{kind: selfsigned}")
	w.write("policy.yaml", fmt.Sprintf(policy, ttl))
	w.write("jwks.json", string(w.issuer.JWKS()))
	for n := range nodes {
		name := fmt.Sprintf("node-%d", n+1)
		w.write(name+".token", w.token(w.pod("signet-system", "signet-agent-"+name, "signet-agent", name), api.AgentAudience(trustDomain)))
		w.write(name+".yaml", fmt.Sprintf(agentConfig, w.address, dir, filepath.Join(dir, name)))
		w.agents = append(w.agents, &agent{&program{w: w, name: name, path: binary(t, "signet-agent"), args: []string{"run", "--config", filepath.Join(dir, name+".yaml")}}, name})
	}
	if out, err := exec.CommandContext(t.Context(), binary(t, "signet-ca"), "init", "--config", w.join("ca.yaml")).CombinedOutput(); err != nil {
		t.Fatalf("signet-ca init: %v\n%s", err, out)
	}
	w.ca = &program{w: w, name: "ca", path: binary(t, "signet-ca"), args: []string{"run", "--config", w.join("ca.yaml")}}
	conn, err := grpc.NewClient("unix:"+w.join("admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	w.admin = apiv1.NewAdminClient(conn)
	t.Cleanup(func() {
		conn.Close()
		w.end()
	})
	w.ca.start()
	for _, a := range w.agents {
		a.start()
	}
	w.connected(nodes)
	return w
}

// binary returns the path of one of our programs, which `make build` made.
func binary(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("SIGNET_BIN")
	if dir == "" {
		t.Fatal("SIGNET_BIN is not set: run this by `make test`, which builds the programs first")
	}
	return filepath.Join(dir, name)
}

func (w *world) join(name string) string { return filepath.Join(w.dir, name) }

func (w *world) write(name, content string) {
	w.t.Helper()
	path := w.join(name)
	err := os.WriteFile(path+".new", []byte(content), 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// configure writes the configuration of the CA with that upstream.
func (w *world) configure(upstream string) {
	w.t.Helper()
	w.write("ca.yaml", fmt.Sprintf(caConfig, w.address, w.dir, issuerName, upstream, w.ttl))
}

// pod makes a pod that lives.
func (w *world) pod(namespace, name, account, node string) attestortest.Pod {
	w.t.Helper()
	p := attestortest.NewPod(namespace, name, account, node)
	w.pods = append(w.pods, p)
	data, err := attestortest.Directory(issuerName, slices.Values(w.pods))
	if err != nil {
		w.t.Fatal(err)
	}
	w.write("pods.json", string(data))
	return p
}

func (w *world) token(p attestortest.Pod, audience string) string {
	w.t.Helper()
	token, err := w.issuer.Token(p, audience, time.Hour)
	if err != nil {
		w.t.Fatal(err)
	}
	return token
}

// workload makes a pod on the node of an agent, and returns its ID and the file with its token.
func (w *world) workload(a *agent, name string) (spiffeid.ID, string) {
	w.t.Helper()
	p := w.pod("shop", name, name, a.node)
	w.write(name+".token", w.token(p, api.WorkloadAudience(trustDomain)))
	return spiffeid.RequireFromPath(trustDomain, "/ns/shop/sa/"+name), w.join(name + ".token")
}

// client takes secrets as that workload's proxy does.
func (w *world) client(a *agent, name, token string, delta bool) *envoy.Client {
	return &envoy.Client{Socket: a.socket(), Node: name, Delta: delta, Token: func() (string, error) {
		b, err := os.ReadFile(token)
		return string(b), err
	}}
}

func (a *agent) socket() string { return a.w.join(a.node + ".sock") }

// connected waits until the CA answers, and so many agents have a session.
func (w *world) connected(agents int) {
	w.t.Helper()
	eventually(w.t, fmt.Sprintf("%d agents with a session", agents), func(ctx context.Context) error {
		resp, err := w.admin.ListNodes(ctx, &apiv1.ListNodesRequest{})
		if err != nil {
			return err
		}
		n := 0
		for _, x := range resp.GetNodes() {
			if x.GetConnected() {
				n++
			}
		}
		if n != agents {
			err = fmt.Errorf("%d have", n)
		}
		return err
	})
}

// end ends what runs, and shows the logs of a test that failed. No log may hold a token or a key.
func (w *world) end() {
	for _, a := range w.agents {
		a.kill()
	}
	w.ca.kill()
	logs, _ := filepath.Glob(w.join("*.log"))
	for _, path := range logs {
		data, err := os.ReadFile(path)
		if err != nil {
			w.t.Error(err)
		}
		for _, secret := range []string{canary.Marker, "eyJ", "PRIVATE KEY"} {
			if bytes.Contains(data, []byte(secret)) {
				w.t.Errorf("%s holds a token or a key", filepath.Base(path))
			}
		}
		if bytes.Contains(data, []byte("DATA RACE")) {
			w.t.Errorf("%s tells of a data race", filepath.Base(path))
		}
		if w.t.Failed() {
			w.t.Logf("%s:\n%s", filepath.Base(path), data)
		}
	}
}

// program is signet-ca or signet-agent: it can be stopped, killed and started again.
type program struct {
	w          *world
	name, path string
	args       []string

	mu      sync.Mutex
	process *envoy.Process // nil while it is not running
}

func (p *program) start() {
	p.w.t.Helper()
	log, err := os.OpenFile(p.w.join(p.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.w.t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	// Wherever it is left, it ends with the tests.
	p.process, err = envoy.Start(envoy.Command{Name: p.name, Path: p.path, Args: p.args, Log: log})
	if err != nil {
		log.Close()
		p.w.t.Fatal(err)
	}
	process := p.process
	p.w.t.Cleanup(func() {
		process.Kill()
		log.Close()
	})
}

// kill is SIGKILL; one that was stopped is killed as well.
func (p *program) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process != nil {
		p.process.Kill()
	}
	p.process = nil
}

// freeze stops the process where it is (SIGSTOP), and returns what lets it go on.
func (p *program) freeze() (thaw func()) {
	p.w.t.Helper()
	p.mu.Lock()
	pid := p.process.Pid()
	p.mu.Unlock()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		p.w.t.Fatal(err)
	}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.process != nil {
			syscall.Kill(pid, syscall.SIGCONT)
		}
	}
}

// eventually calls f until it returns nil, which has to be in good time.
func eventually(t testing.TB, what string, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for last := errors.New("not tried"); ; {
		err := f(ctx)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%s: not in %v: %v", what, patience, last)
		}
		last = err
		<-tick.C
	}
}
