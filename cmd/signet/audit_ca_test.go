package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/internal/canary"
)

// A realCA is a CA with its admin socket, and an agent that has a session with it.
type realCA struct {
	*catest.Server
	t      *testing.T
	socket string
	agent  apiv1.AuthorityClient
	door   apiv1.AuthorityClient // for who has no SVID
}

func newRealCA(t *testing.T) *realCA {
	t.Helper()
	s := catest.New(t, catest.Options{Policy: ca.PolicyFile{Namespaces: []string{"shop"}}})
	s.WaitReady()
	dir, err := os.MkdirTemp("", "sgn") // short: a socket's path has little room
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &realCA{Server: s, t: t, socket: filepath.Join(dir, "admin.sock")}
	l, err := net.Listen("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	admin := s.CA().NewAdminServer(catest.AsUser(os.Getuid()))
	var wg sync.WaitGroup
	wg.Go(func() { admin.Serve(l) })
	t.Cleanup(func() { admin.Stop(); wg.Wait() })

	r.door = r.dial(nil)
	pod := s.AgentPod("node-1")
	key, csr := newRequest(t)
	resp, err := r.door.AttestAgent(t.Context(), &apiv1.AttestAgentRequest{Evidence: wire(s.Evidence(pod, api.AgentAudience(s.TD), time.Hour)),
		Csr: csr, Protocol: api.Protocol})
	if err != nil {
		t.Fatal(err)
	}
	r.agent = r.dial(svidOf(t, resp.GetChain(), key))
	stream, err := r.agent.Session(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	hello := &apiv1.Hello{Protocol: api.Protocol, Version: "test", Evidence: wire(s.Evidence(pod, api.AgentAudience(s.TD), time.Hour))}
	if err := stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Hello{Hello: hello}}); err != nil {
		t.Fatal(err)
	}
	if m, err := stream.Recv(); err != nil || m.GetWelcome() == nil {
		t.Fatalf("no session: %v, %v", m, err)
	}
	return r
}

func wire(e attestor.Evidence) *apiv1.Evidence { return &apiv1.Evidence{Kind: e.Kind, Data: e.Data} }

func newRequest(t *testing.T) (crypto.Signer, []byte) {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, csr
}

func svidOf(t *testing.T, chain [][]byte, key crypto.Signer) *x509svid.SVID {
	t.Helper()
	s := &x509svid.SVID{PrivateKey: key}
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		s.Certificates = append(s.Certificates, c)
	}
	id, err := x509svid.IDFromCert(s.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	s.ID = id
	return s
}

func (r *realCA) dial(svid *x509svid.SVID) apiv1.AuthorityClient {
	r.t.Helper()
	replica, err := api.ReplicaID(r.TD, catest.Replica)
	if err != nil {
		r.t.Fatal(err)
	}
	roots := x509bundle.FromX509Authorities(r.TD, r.CA().Bundle().Roots)
	config := tlsconfig.TLSClientConfig(roots, tlsconfig.AuthorizeID(replica))
	if svid != nil {
		config = tlsconfig.MTLSClientConfig(svid, roots, tlsconfig.AuthorizeID(replica))
	}
	conn, err := grpc.NewClient("passthrough:///ca", grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return r.Dial(ctx) }))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return apiv1.NewAuthorityClient(conn)
}

// issue asks for one SVID and returns its serial number, or the refusal.
func (r *realCA) issue(evidence attestor.Evidence, volume string) (serial string, refused *apiv1.Refusal) {
	r.t.Helper()
	_, csr := newRequest(r.t)
	resp, err := r.agent.Issue(r.t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{{Evidence: wire(evidence), Csr: csr, Volume: volume}}})
	if err != nil || len(resp.GetResults()) != 1 {
		r.t.Fatalf("%v, %v", resp, err)
	}
	if s := resp.GetResults()[0].GetSvid(); s != nil {
		leaf, err := x509.ParseCertificate(s.GetChain()[0])
		if err != nil {
			r.t.Fatal(err)
		}
		return issuance.SerialString(leaf.SerialNumber), nil
	}
	return "", resp.GetResults()[0].GetRefusal()
}

// run is one command line against the CA.
func (r *realCA) run(wantExit int, args ...string) string {
	r.t.Helper()
	a, stdout, stderr := newTestApp(map[string]string{socketEnv: r.socket})
	a.now = time.Now
	if exit := a.main(append([]string{"signet", "--timeout", "1m"}, args...)); exit != wantExit {
		r.t.Fatalf("signet %s: exit code %d\n%s%s", strings.Join(args, " "), exit, stdout, stderr)
	}
	r.t.Logf("$ signet %s\n%s%s", strings.Join(args, " "), stdout, stderr)
	return stdout.String()
}

// What a real CA issued and refused is found again: by serial, by pod, by reason, and by correlation id.
func TestAuditOfCA(t *testing.T) {
	r := newRealCA(t)
	web := r.Evidence(r.Pod("shop", "web-0", "web", "node-1"), api.WorkloadAudience(r.TD), time.Hour)
	serial, refused := r.issue(web, "volume-a")
	if refused != nil {
		t.Fatal(refused)
	}
	_, replayed := r.issue(web, "volume-b")
	if replayed.GetReason() != string(api.TokenReplayedElsewhere) {
		t.Fatalf("not refused: %v", replayed)
	}
	job := r.Evidence(r.Pod("kube-system", "job-7", "job", "node-1"), api.WorkloadAudience(r.TD), time.Hour)
	_, foreign := r.issue(job, "volume-a")
	for range 2 {
		r.issue(job, "volume-a")
	}
	_, csr := newRequest(t)
	_, err := r.door.AttestAgent(t.Context(), &apiv1.AttestAgentRequest{Evidence: wire(web), Csr: csr, Protocol: api.Protocol})
	stranger := api.AsError(api.FromStatus(err))

	for _, want := range []struct {
		args string
		text []string
	}{
		{"audit", []string{"mint", "attest-agent", "spiffe://example.org/ns/shop/sa/web", serial[:8], "TOKEN_REPLAYED_ELSEWHERE", "NAMESPACE_NOT_ALLOWED x3, last ",
			"TOKEN_AUDIENCE"}},
		{"audit --refused --node node-1 --no-headers", []string{"TOKEN_REPLAYED_ELSEWHERE", "NAMESPACE_NOT_ALLOWED x3"}},
		{"audit --serial " + serial + " -o jsonpath={.items[*].pod}", []string{"web-0"}},
		{"audit --serial " + strings.ToUpper(serial[:10]) + " -o jsonpath={.items[*].serial}", []string{serial}},
		{"audit --pod shop/web-0 --kind issue -o jsonpath={.items[*].correlationID}", []string{""}},
		{"audit --reason NAMESPACE_NOT_ALLOWED -o jsonpath={.items[*].count}", []string{"3"}},
		{"audit --refused --node node-1 -o name", []string{replayed.GetCorrelationId(), foreign.GetCorrelationId()}},
		{"audit --since 1h --until 0s --kind mint,attest-agent -o name", []string{"auditentry.cli.signet.dev/"}},
		{"audit export --spiffe-id spiffe://example.org/ns/shop/sa/web", []string{`"type":"issue"`, serial}},
		{"why " + replayed.GetCorrelationId(), []string{"TOKEN_REPLAYED_ELSEWHERE (SGN-0117): ", "pod shop/web-0 (", "The first use of this token",
			"the same node", "serial " + serial}},
		{"why " + foreign.GetCorrelationId(), []string{"NAMESPACE_NOT_ALLOWED", "3 times, first ", "Issue, by spiffe://example.org/signet/agent/", "on node-1",
			"pod kube-system/job-7 (", "Add the namespace to the policy file"}},
		{"why " + stranger.CorrelationID, []string{"TOKEN_AUDIENCE", "AttestAgent, by somebody unknown", "gone when it restarts"}},
	} {
		got := r.run(exitGood, strings.Fields(want.args)...)
		for _, text := range want.text {
			if !strings.Contains(got, text) {
				t.Errorf("signet %s: no %q in\n%s", want.args, text, got)
			}
		}
	}
	r.run(exitFailed, "why", fmt.Sprintf("%016x", 1))
}

// TestAuditMost: what --last may say is what a CA picks out.
func TestAuditMost(t *testing.T) {
	if auditMost != ca.MaxAuditLast {
		t.Errorf("%d here, %d there", auditMost, ca.MaxAuditLast)
	}
}
