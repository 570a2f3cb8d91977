package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/internal/canary"
	"github.com/signet-ca/signet/internal/daemon/daemontest"
)

// Users of TestProcess where the test is root: the CA's own, and somebody else's.
const (
	caUser   = 65534
	stranger = 65533
)

// process is a signet-ca of its own, with all that it said.
type process struct {
	t              *testing.T
	dir, binary    string
	user           int // it runs as; the test's own unless that is root
	agents, web    string
	people         string // the operators' port
	issuer         *attestortest.Issuer
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer // whole once it has ended
	ended          chan error
	search         canary.Search
}

const processConfig = `apiVersion: signet.dev/v1
kind: CAConfig
trustDomain: example.org
development: true
replica: ca-0
listen: %s
adminSocket: %s/admin/admin.sock
http: %s
store: {kind: bolt, path: %[2]s/state/signet.db}
seal: {keyFile: %[2]s/seal/key}
ledger: {dir: %[2]s/ledger, segmentSize: 1MiB}
policyFile: %[2]s/policy.yaml
publish: {dir: %[2]s/bundle}
issuers:
  - issuer: https://kubernetes.default.svc.cluster.local
    jwks: {url: %[4]s, caFile: %[2]s/jwks.pem, tokenFile: %[2]s/bearer}
directory: {kind: none}
operators: {listen: %[5]s}
`

// newProcess writes a configuration with a marker in each secret, and makes the root.
func newProcess(t *testing.T) *process {
	t.Helper()
	dir, err := os.MkdirTemp("", "ca")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &process{t: t, dir: dir, user: os.Geteuid(), binary: filepath.Join(dir, "signet-ca")}
	p.search.Add("the marker", []byte(canary.Marker))
	if p.issuer, err = attestortest.NewIssuer(attestortest.Config{Issuer: "https://kubernetes.default.svc.cluster.local"}); err != nil {
		t.Fatal(err)
	}
	jwks := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.Header.Get("Authorization"), canary.Marker) {
			http.Error(w, "who are you", http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", "application/jwk-set+json")
		w.Write(p.issuer.JWKS())
	}))
	t.Cleanup(jwks.Close)
	var aerr, perr error
	p.agents, err = daemontest.FreeAddress()
	p.web, aerr = daemontest.FreeAddress()
	p.people, perr = daemontest.FreeAddress()
	exe, xerr := os.Executable()
	if err := errors.Join(err, aerr, perr, xerr); err != nil {
		t.Fatal(err)
	}
	binary, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		os.WriteFile(p.binary, binary, 0o755),
		os.WriteFile(dir+"/ca.yaml", fmt.Appendf(nil, processConfig, p.agents, dir, p.web, jwks.URL, p.people), 0o600),
		os.WriteFile(dir+"/policy.yaml", []byte("apiVersion: signet.dev/v1\nkind: Policy\nnamespaces: [shop]\n"), 0o600),
		os.WriteFile(dir+"/jwks.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: jwks.Certificate().Raw}), 0o600),
		os.WriteFile(dir+"/bearer", []byte(canary.Marker), 0o600),
		os.Chmod(dir, 0o755),
	); err != nil {
		t.Fatal(err)
	}
	if p.user == 0 {
		p.user = caUser
		if err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			return errors.Join(err, os.Chown(path, caUser, caUser))
		}); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := p.command("init").CombinedOutput(); err != nil {
		t.Fatalf("init: %v\n%s", err, out)
	}
	key, err := os.ReadFile(dir + "/seal/key")
	if err != nil {
		t.Fatal(err)
	}
	p.search.Add("the seal key", key)
	return p
}

func (p *process) command(name string, more ...string) *exec.Cmd {
	cmd := exec.Command(p.binary, append([]string{name, "--config", p.dir + "/ca.yaml"}, more...)...)
	cmd.Env = append(os.Environ(), "GOTRACEBACK=crash", "SIGNET_CANARY="+canary.Marker)
	cmd.Dir = p.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: caUser, Gid: caUser}
	}
	return cmd
}

// run starts the CA and waits until it is ready.
func (p *process) run() {
	p.t.Helper()
	p.cmd = p.command("run", "--log-level", "debug", "--log-format", "json")
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.ended = make(chan error, 1)
	go func() { p.ended <- p.cmd.Wait() }()
	p.t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.ended
	})
	deadline := time.After(60 * time.Second)
	for p.get("/readyz") != "ok\n" {
		select {
		case err := <-p.ended:
			close(p.ended)
			p.t.Fatalf("it ended with %v:\n%s", err, p.stderr.String())
		case <-deadline:
			last := p.get("/readyz")
			p.cmd.Process.Kill()
			<-p.ended
			close(p.ended)
			p.t.Fatalf("not ready: %s\n%s", last, p.stderr.String())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (p *process) get(path string) string {
	resp, err := http.Get("http://" + p.web + path)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return string(body)
}

// asUser connects to the admin socket as another user of this machine. Only the thread that connects changes its user, and
// it ends with its goroutine.
func asUser(uid int) func(context.Context, string) (net.Conn, error) {
	return func(_ context.Context, path string) (net.Conn, error) {
		type result struct {
			conn net.Conn
			err  error
		}
		done := make(chan result)
		go func() {
			if uid != os.Geteuid() {
				runtime.LockOSThread() // and never unlocked, so that the thread is thrown away
				if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
					done <- result{nil, errno}
					return
				}
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
			}
			if err != nil {
				done <- result{nil, err}
				return
			}
			f := os.NewFile(uintptr(fd), path)
			defer f.Close()
			conn, err := net.FileConn(f)
			done <- result{conn, err}
		}()
		r := <-done
		return r.conn, r.err
	}
}

// status asks for the CA's status as a user, on an admin socket whose mode lets everybody through.
func (p *process) status(uid int) error {
	p.t.Helper()
	path := p.dir + "/admin/admin.sock"
	if err := os.Chmod(path, 0o666); err != nil {
		p.t.Fatal(err)
	}
	conn, err := grpc.NewClient("passthrough:///"+path, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(asUser(uid)))
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(p.t.Context(), 60*time.Second)
	defer cancel()
	_, err = apiv1.NewAdminClient(conn).GetStatus(ctx, &apiv1.GetStatusRequest{})
	return api.FromStatus(err)
}

// live attests an agent, opens its session, and asks for what is given and what is refused; all answers are returned.
func (p *process) live() string {
	p.t.Helper()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	token := func(pod attestortest.Pod, audience string) *apiv1.Evidence {
		text, err := p.issuer.Token(pod, audience, time.Hour)
		if err != nil {
			p.t.Fatal(err)
		}
		p.search.Add("a token", []byte(text))
		return &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(text)}
	}
	key, err := canary.NewKey()
	if err != nil {
		p.t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		p.t.Fatal(err)
	}
	p.search.Add("a CSR", csr)
	agent := attestortest.NewPod("signet-system", "signet-agent", "signet-agent", "node-1")
	dial := func(certs ...tls.Certificate) apiv1.AuthorityClient {
		// Who the CA is is proven elsewhere.
		conn, err := grpc.NewClient(p.agents, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: certs})))
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(func() { conn.Close() })
		return apiv1.NewAuthorityClient(conn)
	}
	ctx, cancel := context.WithTimeout(p.t.Context(), 60*time.Second)
	p.t.Cleanup(cancel)
	own := &apiv1.AttestAgentRequest{Protocol: api.Protocol, Evidence: token(agent, api.AgentAudience(td)), Csr: csr}
	attested, err := dial().AttestAgent(ctx, own)
	if err != nil {
		p.t.Fatal(err)
	}
	client := dial(tls.Certificate{Certificate: attested.GetChain(), PrivateKey: key})
	session, err := client.Session(ctx)
	if err != nil {
		p.t.Fatal(err)
	}
	if err := session.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Hello{Hello: &apiv1.Hello{Protocol: api.Protocol, Evidence: own.GetEvidence()}}}); err != nil {
		p.t.Fatal(err)
	}
	if _, err := session.Recv(); err != nil {
		p.t.Fatal(err)
	}
	var answers strings.Builder
	web := attestortest.NewPod("shop", "web", "web", "node-1")
	resp, err := client.Issue(ctx, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{
		{Evidence: token(web, api.WorkloadAudience(td)), Csr: p.csr()},
		{Evidence: token(web, "vault"), Csr: p.csr()},
		{Evidence: token(attestortest.NewPod("attic", "web", "web", "node-1"), api.WorkloadAudience(td)), Csr: p.csr()},
		{Evidence: token(web, api.WorkloadAudience(td)), Csr: []byte(canary.Marker)},
		{Evidence: &apiv1.Evidence{Kind: canary.Marker, Data: []byte(canary.Marker)}},
		{Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(canary.Marker)}},
	}})
	if err != nil || resp.GetResults()[0].GetSvid() == nil {
		p.t.Fatalf("no SVID: %v", err)
	}
	fmt.Fprintln(&answers, resp)
	_, err = dial().Issue(ctx, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{{Csr: csr}}})
	fmt.Fprintln(&answers, err, status.Convert(err).Details())
	return answers.String() + p.operate(ctx)
}

// operate comes in from elsewhere, as an operator and as several who are none.
func (p *process) operate(ctx context.Context) string {
	p.t.Helper()
	conn, err := grpc.NewClient(p.people, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	token := func(account string, change ...func(*attestortest.Draft)) string {
		text, err := p.issuer.Token(attestortest.NewPod("signet-operators", "", account, ""), "signet-admin:example.org", 10*time.Minute,
			append([]func(*attestortest.Draft){attestortest.Unbound}, change...)...)
		if err != nil {
			p.t.Fatal(err)
		}
		p.search.Add("an operator's token", []byte(text))
		return text
	}
	var answers strings.Builder
	for want, text := range map[api.Reason]string{
		"": token("viewer"), api.OperatorRequired: token("mallory"), api.TokenAudience: token("viewer", attestortest.Audiences("vault")),
		api.TokenMalformed: canary.Marker,
	} {
		r, err := apiv1.NewAdminClient(conn).GetStatus(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+text), &apiv1.GetStatusRequest{})
		if reason := api.ReasonOf(api.FromStatus(err)); err == nil && want != "" || err != nil && reason != want {
			p.t.Errorf("an operator: %v, want %q", err, want)
		}
		fmt.Fprintln(&answers, r, err, status.Convert(err).Details())
	}
	return answers.String()
}

// csr returns a request of a fresh key.
func (p *process) csr() []byte {
	p.t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		p.t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		p.t.Fatal(err)
	}
	p.search.Add("a CSR", csr)
	return csr
}

// TestProcess proves of the real process that nobody reads its memory and no core has it, that the admin socket asks the
// kernel who calls, and that no secret is in anything that it ever said, the dump of its goroutines included.
//
// threat: L01, L18, B23
func TestProcess(t *testing.T) {
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &before); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: before.Max, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Setrlimit(unix.RLIMIT_CORE, &before) })
	p := newProcess(t)
	p.run()
	proc := fmt.Sprintf("/proc/%d", p.cmd.Process.Pid)
	limits, err := os.ReadFile(proc + "/limits")
	if err != nil || !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).Match(limits) {
		t.Errorf("the core of the process has no limit of 0 (%v):\n%s", err, limits)
	}
	// What belongs to a process that cannot be dumped, the kernel gives to root.
	info, err := os.Stat(proc + "/mem")
	if err != nil {
		t.Fatal(err)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 0 || p.user == 0 {
		t.Errorf("the memory of a process of user %d belongs to user %d, want root: it can be dumped", p.user, uid)
	}

	answers := p.live()
	for name, uid := range map[string]int{"the CA's own user": p.user, "root": 0, "a stranger": stranger} {
		t.Run(name, func(t *testing.T) {
			if os.Geteuid() != 0 && uid != p.user {
				t.Skip("only root can be somebody else")
			}
			err := p.status(uid)
			if uid == stranger && api.ReasonOf(err) != api.AdminForbidden || uid != stranger && err != nil {
				t.Errorf("GetStatus: %v", err)
			}
		})
	}
	metrics := p.get("/metrics")
	if err := p.cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	err = <-p.ended
	close(p.ended)
	state, _ := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if err == nil || state.CoreDump() {
		t.Errorf("it ended with %v, core dumped: %t", err, state.CoreDump())
	}
	if cores, _ := filepath.Glob(p.dir + "/core*"); len(cores) > 0 {
		t.Errorf("there is %v", cores)
	}
	for what, text := range map[string]string{"stdout": p.stdout.String(), "stderr": p.stderr.String(), "metrics": metrics, "answers": answers} {
		for _, name := range p.search.Find([]byte(text)) {
			t.Errorf("%s is in %s", name, what)
		}
	}
	for _, want := range []string{"goroutine ", `"level":"INFO"`, `"msg":"refused"`, "TOKEN_AUDIENCE"} {
		if !strings.Contains(p.stderr.String(), want) {
			t.Errorf("%q is not in stderr", want)
		}
	}
	if !strings.Contains(metrics, "signet_refusals_total") || !strings.Contains(answers, "NAMESPACE_NOT_ALLOWED") {
		t.Error("metrics or answers are not what was asked for")
	}
}
