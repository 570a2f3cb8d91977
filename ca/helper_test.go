package ca_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"iter"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/audit"
	"github.com/signet-ca/signet/internal/canary"
)

// start returns a CA that is ready.
func start(t *testing.T, o catest.Options) *catest.Server {
	t.Helper()
	s := catest.New(t, o)
	s.WaitReady()
	return s
}

// node is the agent of one node, as bare as the wire is: it says whatever a test wants it to.
type node struct {
	t    *testing.T
	s    *catest.Server
	pod  attestortest.Pod
	svid *x509svid.SVID

	first  *apiv1.Evidence // on which it was attested
	ticket []byte          // that came with svid
}

// newNode attests the agent of a node.
func newNode(t *testing.T, s *catest.Server, name string) *node {
	t.Helper()
	n := &node{t: t, s: s, pod: s.AgentPod(name)}
	resp, key, err := n.attest(nil)
	if err != nil {
		t.Fatalf("the agent of %s was not attested: %v", name, err)
	}
	n.svid, n.ticket = svidOf(t, resp.GetChain(), key), resp.GetTicket()
	return n
}

// attest asks for the agent's own SVID, with a request that change may alter.
func (n *node) attest(change func(*apiv1.AttestAgentRequest)) (*apiv1.AttestAgentResponse, crypto.Signer, error) {
	n.t.Helper()
	key := newKey(n.t)
	r := &apiv1.AttestAgentRequest{Evidence: n.token(n.pod, api.AgentAudience(n.s.TD)), Csr: newCSR(n.t, key), Protocol: api.Protocol}
	if n.first == nil {
		n.first = r.Evidence
	}
	if change != nil {
		change(r)
	}
	resp, err := apiv1.NewAuthorityClient(dial(n.t, n.s, nil)).AttestAgent(n.t.Context(), r)
	return resp, key, api.FromStatus(err)
}

func (n *node) token(p attestortest.Pod, audience string, change ...func(*attestortest.Draft)) *apiv1.Evidence {
	n.t.Helper()
	return proto(n.s.Evidence(p, audience, time.Hour, change...))
}

func proto(e attestor.Evidence) *apiv1.Evidence { return &apiv1.Evidence{Kind: e.Kind, Data: e.Data} }

// link is one connection of an agent with a session on it.
type link struct {
	t      *testing.T
	n      *node
	client apiv1.AuthorityClient
	stream apiv1.Authority_SessionClient
}

// connect opens a connection and a session that begins with first; nil: a good Hello. The error is the CA's refusal.
func (n *node) connect(first *apiv1.SessionRequest) (*link, error) {
	n.t.Helper()
	l := &link{t: n.t, n: n, client: apiv1.NewAuthorityClient(dial(n.t, n.s, n.svid))}
	ctx, cancel := context.WithCancel(n.t.Context())
	n.t.Cleanup(cancel)
	stream, err := l.client.Session(ctx)
	if err != nil {
		return nil, api.FromStatus(err)
	}
	l.stream = stream
	if first == nil {
		first = n.hello()
	}
	if err := stream.Send(first); err != nil && err != io.EOF {
		return nil, api.FromStatus(err)
	}
	m, err := stream.Recv()
	if err != nil {
		return nil, api.FromStatus(err)
	}
	if m.GetWelcome() == nil {
		n.t.Fatalf("the first message is %T, want Welcome", m.GetMessage())
	}
	return l, nil
}

func (n *node) hello() *apiv1.SessionRequest {
	n.t.Helper()
	return helloWith(&apiv1.Hello{Protocol: api.Protocol, Version: "test", Evidence: n.token(n.pod, api.AgentAudience(n.s.TD))})
}

func helloWith(h *apiv1.Hello) *apiv1.SessionRequest {
	return &apiv1.SessionRequest{Message: &apiv1.SessionRequest_Hello{Hello: h}}
}

func report(r *apiv1.Report) *apiv1.SessionRequest {
	return &apiv1.SessionRequest{Message: &apiv1.SessionRequest_Report{Report: r}}
}

// session opens a session that must succeed.
func (n *node) session() *link {
	n.t.Helper()
	l, err := n.connect(nil)
	if err != nil {
		n.t.Fatalf("no session: %v", err)
	}
	return l
}

// next returns the next message of the session.
func (l *link) next() *apiv1.SessionResponse {
	l.t.Helper()
	m, err := l.stream.Recv()
	if err != nil {
		l.t.Fatalf("the session ended: %v", api.FromStatus(err))
	}
	return m
}

// end reads the session to its end and returns why it ended; nil for a good end.
func (l *link) end() error {
	for {
		if _, err := l.stream.Recv(); err == io.EOF {
			return nil
		} else if err != nil {
			return api.FromStatus(err)
		}
	}
}

// issue sends one request and returns its result; a refusal of the whole call or of the item is the error.
func (l *link) issue(item *apiv1.IssueItem) (*apiv1.SVID, error) {
	l.t.Helper()
	resp, err := l.client.Issue(l.t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
	if err != nil {
		return nil, api.FromStatus(err)
	}
	if len(resp.GetResults()) != 1 {
		l.t.Fatalf("%d results for one request", len(resp.GetResults()))
	}
	return resp.GetResults()[0].GetSvid(), refusal(resp.GetResults()[0])
}

func refusal(r *apiv1.IssueResult) error {
	if f := r.GetRefusal(); f != nil {
		return &api.Error{Reason: api.Reason(f.GetReason()), Detail: f.GetMessage(), CorrelationID: f.GetCorrelationId()}
	}
	return nil
}

// item asks for the SVID of a pod with a fresh token and key.
func (n *node) item(p attestortest.Pod) *apiv1.IssueItem {
	n.t.Helper()
	return &apiv1.IssueItem{Evidence: n.token(p, api.WorkloadAudience(n.s.TD)), Csr: newCSR(n.t, newKey(n.t)), Volume: "volume-of-" + p.UID}
}

// dial connects as an agent does; with a nil SVID without a client certificate.
func dial(t *testing.T, s *catest.Server, svid *x509svid.SVID) *grpc.ClientConn {
	t.Helper()
	replica, err := api.ReplicaID(s.TD, catest.Replica)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509bundle.FromX509Authorities(s.TD, s.CA().Bundle().Roots)
	config := tlsconfig.TLSClientConfig(roots, tlsconfig.AuthorizeID(replica))
	if svid != nil {
		config = tlsconfig.MTLSClientConfig(svid, roots, tlsconfig.AuthorizeID(replica))
	}
	return dialTLS(t, s, config)
}

func dialTLS(t *testing.T, s *catest.Server, config *tls.Config) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///ca",
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.Dial(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(8<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// adminOf connects to the admin service of a CA.
func adminOf(t testing.TB, c *ca.CA) apiv1.AdminClient {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	server := c.NewAdminServer(catest.AsUser(0))
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(l)
	}()
	conn, err := grpc.NewClient("passthrough:///admin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		<-done
	})
	return apiv1.NewAdminClient(conn)
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// newCSR makes a request without a name, changed as the test wants.
func newCSR(t testing.TB, key crypto.Signer, change ...func(*x509.CertificateRequest)) []byte {
	t.Helper()
	r := &x509.CertificateRequest{}
	for _, c := range change {
		c(r)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, r, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func withURI(t testing.TB, uri string) func(*x509.CertificateRequest) {
	t.Helper()
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	return func(r *x509.CertificateRequest) { r.URIs = append(r.URIs, u) }
}

func svidOf(t testing.TB, chain [][]byte, key crypto.Signer) *x509svid.SVID {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := x509svid.ParseRaw(slices.Concat(chain...), der)
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

func leafOf(t testing.TB, s *apiv1.SVID) *x509.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(s.GetChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func intermediateOf(t testing.TB, s *apiv1.SVID) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(s.GetChain()[1])
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// wantReason fails unless err has the reason.
func wantReason(t *testing.T, err error, want api.Reason) {
	t.Helper()
	if err == nil {
		t.Fatalf("nothing was refused, want %s", want)
	}
	if got := api.ReasonOf(err); got != want {
		t.Fatalf("refused with %s (%v), want %s", got, err, want)
	}
}

// ledgerOf returns what is on disk now: first the ledger, then the refusals.
func ledgerOf(t *testing.T, s *catest.Server) []audit.Record {
	t.Helper()
	var all []audit.Record
	for _, of := range []func(string) iter.Seq2[audit.Record, error]{audit.Scan, audit.ScanRefusals} {
		for r, err := range of(filepath.Join(s.Dir, "ledger")) {
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, r)
		}
	}
	return all
}

// hooked is an attestor with something before it.
type hooked struct {
	attestor.Attestor
	before func(context.Context, attestor.Evidence)
}

// Attest implements attestor.Attestor.
func (h hooked) Attest(ctx context.Context, e attestor.Evidence, audience string, now time.Time) (attestor.Claims, error) {
	h.before(ctx, e)
	return h.Attestor.Attest(ctx, e, audience, now)
}

// hook puts f before the attestor of a configuration.
func hook(cfg *ca.Config, f func(context.Context, attestor.Evidence)) {
	for kind, a := range cfg.Attestors {
		cfg.Attestors[kind] = hooked{a, f}
	}
}

// switched is an upstream that can be away.
type switched struct {
	ca.Upstream
	away atomic.Bool
}

// Mint implements ca.Upstream.
func (s *switched) Mint(ctx context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
	if s.away.Load() {
		return nil, errors.New("connection refused")
	}
	return s.Upstream.Mint(ctx, r)
}

func mustURIs(t testing.TB, uris ...string) []*url.URL {
	var all []*url.URL
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			t.Error(err)
		}
		all = append(all, u)
	}
	return all
}

func spiffeTD(t testing.TB, name string) spiffeid.TrustDomain {
	t.Helper()
	if name == "" {
		return spiffeid.TrustDomain{}
	}
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		t.Fatal(err)
	}
	return td
}

func hexOf(b []byte) string { return hex.EncodeToString(b) }

// readAll returns the content of every file below dir.
func readAll(t testing.TB, dir string) []byte {
	t.Helper()
	var all []byte
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		all = append(all, data...)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
