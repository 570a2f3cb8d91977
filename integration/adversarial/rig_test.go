package adversarial

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"iter"
	"maps"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/internal/audit"
	"github.com/signet-ca/signet/internal/canary"
)

const (
	here  = "node-1"
	webID = "spiffe://example.org/ns/shop/sa/web"
	// stranger is part of every name that belongs to somebody else.
	stranger = "stranger"
)

// rig is a CA with an agent's session on it, and the eyes to see what a request led to.
type rig struct {
	*catest.Server
	t        *testing.T
	ledger   *ledger
	log      *lines
	metrics  *prometheus.Registry
	pod      attestortest.Pod // a workload that lives on this node
	key      crypto.Signer    // its key
	csr      []byte           // its request
	agentPod attestortest.Pod
	agent    apiv1.AuthorityClient // with the agent's SVID and a session
	door     apiv1.AuthorityClient // without a certificate
	conn     *grpc.ClientConn      // of an agent without a session

	variants, accepted int
	harmless           map[string]int // why variants were accepted
}

// withRig runs f in fake time, which stands still while a request is under way: times at the very edge are exact.
func withRig(t *testing.T, o catest.Options, f func(t *testing.T, r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newRig(t, o)) })
}

func newRig(t *testing.T, o catest.Options) *rig {
	t.Helper()
	r := &rig{t: t, ledger: &ledger{}, log: &lines{}, metrics: prometheus.NewRegistry(), key: newKey(t), harmless: map[string]int{}}
	change := o.Config
	o.Log = r.log
	o.Config = func(c *ca.Config) {
		c.SessionAge, c.AgentTTL = 24*time.Hour, 24*time.Hour // a suite is one session
		r.ledger.Ledger, c.Ledger = c.Ledger, r.ledger
		if change != nil {
			change(c)
		}
	}
	r.Server = catest.New(t, o)
	r.WaitReady()
	r.metrics.MustRegister(r.CA().Metrics())
	r.csr = newCSR(t, r.key)
	r.pod = r.Pod("shop", "web-0", "web", here)
	r.agentPod = r.AgentPod(here)
	r.door = apiv1.NewAuthorityClient(r.dial(nil))
	svid, client := r.newAgent(r.agentPod)
	r.agent, r.conn = client, r.dial(svid)
	return r
}

// newAgent attests the agent of a node and opens its session.
func (r *rig) newAgent(pod attestortest.Pod) (*x509svid.SVID, apiv1.AuthorityClient) {
	r.t.Helper()
	key := newKey(r.t)
	evidence := wire(r.Evidence(pod, api.AgentAudience(r.TD), time.Hour))
	resp, err := r.door.AttestAgent(r.t.Context(), &apiv1.AttestAgentRequest{Evidence: evidence, Csr: newCSR(r.t, key), Protocol: api.Protocol})
	if err != nil {
		r.t.Fatal(err)
	}
	svid := svidOf(r.t, resp.GetChain(), key)
	client := apiv1.NewAuthorityClient(r.dial(svid))
	ctx, cancel := context.WithCancel(r.t.Context())
	r.t.Cleanup(cancel)
	stream, err := client.Session(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	hello := &apiv1.Hello{Protocol: api.Protocol, Version: "test", Evidence: wire(r.Evidence(pod, api.AgentAudience(r.TD), time.Hour))}
	if err := stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Hello{Hello: hello}}); err != nil {
		r.t.Fatal(err)
	}
	if m, err := stream.Recv(); err != nil || m.GetWelcome() == nil {
		r.t.Fatalf("no session: %v, %v", m, err)
	}
	return svid, client
}

// dial connects over TLS; with a nil SVID without a client certificate.
func (r *rig) dial(svid *x509svid.SVID) *grpc.ClientConn {
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
	return conn
}

// variant is one request that should not have been made.
type variant struct {
	row  string // of the table of threats
	name string
	item *apiv1.IssueItem // asked by the agent of this node
	door bool             // asked of AttestAgent instead, by whoever knocks

	want     []api.Reason     // any of them is right; empty: it is accepted
	harmless string           // it may be accepted, for this reason
	is       string           // the SPIFFE ID that an accepted one is for; empty: webID
	key      crypto.PublicKey // that it is for; nil: the workload's
	dns      string           // the DNS name that it is for; empty: none
}

// answer is what came of a variant.
type answer struct {
	svid   *apiv1.SVID
	reason api.Reason
	text   string
	id     string // correlation id
}

// ask sends a variant and judges what comes of it.
func (r *rig) ask(v variant) {
	r.t.Helper()
	r.variants++
	name := v.row + " " + v.name
	entries, issued := r.ledger.issued(), r.metric("signet_svids_issued_total", "")
	refused := map[api.Reason]float64{}
	for _, reason := range v.want {
		refused[reason] = r.metric("signet_refusals_total", string(reason))
	}
	r.log.take()
	a := r.send(name, v)
	if a.svid != nil {
		if len(v.want) > 0 && v.harmless == "" {
			r.t.Errorf("%s: it was accepted, want %v", name, v.want)
		}
		r.checkSame(name, v, a.svid)
		r.accepted++
		r.harmless[v.harmless]++
		return
	}
	if !slices.Contains(v.want, a.reason) {
		r.t.Errorf("%s: refused with %s (%s), want %v", name, a.reason, a.text, v.want)
		return
	}
	if code := a.reason.GRPC(); !a.reason.Known() || !slices.Contains(codesOf(a.reason), code) {
		r.t.Errorf("%s: refused with %s, which is %s", name, a.reason, code)
	}
	if got := r.metric("signet_refusals_total", string(a.reason)); got != refused[a.reason]+1 {
		r.t.Errorf("%s: %v refusals for %s were counted, want 1", name, got-refused[a.reason], a.reason)
	}
	if r.ledger.issued() != entries || r.metric("signet_svids_issued_total", "") != issued {
		r.t.Errorf("%s: it was refused with %s, and something was issued", name, a.reason)
	}
	r.checkText(name, v, a)
}

// codesOf are the gRPC codes that reasons of a kind may have. None of them is Internal or Unknown.
func codesOf(r api.Reason) []codes.Code {
	switch r.Page().Number / 100 {
	case 1: // tokens
		return []codes.Code{codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument}
	case 2: // pods and nodes
		return []codes.Code{codes.PermissionDenied, codes.Unavailable}
	case 3: // certificate requests
		return []codes.Code{codes.InvalidArgument, codes.PermissionDenied}
	case 7: // secrets
		return []codes.Code{codes.InvalidArgument, codes.PermissionDenied, codes.ResourceExhausted}
	}
	return nil
}

var correlationID = regexp.MustCompile(`^[0-9a-f]{16}$`)

// checkText looks for what no answer and no line of the log may tell.
func (r *rig) checkText(name string, v variant, a answer) {
	r.t.Helper()
	if !correlationID.MatchString(a.id) {
		r.t.Errorf("%s: correlation id %q", name, a.id)
	}
	if a.text == "" || len(a.text) > 300 || strings.ContainsFunc(a.text, func(c rune) bool { return c < ' ' || c > '~' }) {
		r.t.Errorf("%s: the text is %q", name, a.text)
	}
	if strings.Contains(a.text, stranger) {
		r.t.Errorf("%s: the text names somebody else: %q", name, a.text)
	}
	said := a.text + r.log.take()
	for what, secret := range map[string][]byte{"token": v.item.GetEvidence().GetData(), "request": v.item.GetCsr()} {
		if leak := shares(said, secret); leak != "" {
			r.t.Errorf("%s: %q of the %s was told", name, leak, what)
		}
	}
}

// shares returns a run of bytes of secret that text contains, long enough to be no accident; words that a token and a log
// may both hold, such as the names of the caller, are taken apart by what surrounds them.
func shares(text string, secret []byte) string {
	const run = 16
	for at := 0; at+run <= len(secret) && at < 1<<15; at += run / 2 {
		if s := string(secret[at : at+run]); strings.Contains(text, s) && strings.Trim(s, s[:1]) != "" {
			return s
		}
	}
	return ""
}

func (r *rig) send(name string, v variant) answer {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	if v.door {
		_, err := r.door.AttestAgent(ctx, &apiv1.AttestAgentRequest{Evidence: v.item.GetEvidence(), Csr: v.item.GetCsr(), Protocol: api.Protocol})
		if err == nil {
			r.t.Errorf("%s: an agent was attested", name)
			return answer{}
		}
		return r.statusOf(name, err)
	}
	resp, err := r.agent.Issue(ctx, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{v.item}})
	if err != nil {
		return r.statusOf(name, err)
	}
	if len(resp.GetResults()) != 1 {
		r.t.Fatalf("%s: %d results", name, len(resp.GetResults()))
	}
	if s := resp.GetResults()[0].GetSvid(); s != nil {
		return answer{svid: s}
	}
	f := resp.GetResults()[0].GetRefusal()
	return answer{reason: api.Reason(f.GetReason()), text: f.GetMessage(), id: f.GetCorrelationId()}
}

// statusOf reads a refusal from a gRPC status: code and reason must belong together.
func (r *rig) statusOf(name string, err error) answer {
	r.t.Helper()
	st, a := status.Convert(err), answer{text: status.Convert(err).Message()}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == api.ErrorDomain {
			a.reason, a.id = api.Reason(info.GetReason()), info.GetMetadata()["correlation_id"]
		}
	}
	if a.reason == "" || st.Code() != a.reason.GRPC() {
		r.t.Errorf("%s: code %s with reason %q (%s)", name, st.Code(), a.reason, a.text)
	}
	return a
}

// checkSame fails unless an accepted variant led to the SVID that the untouched request leads to: that identity, the key
// whose possession was proven, and nothing besides.
func (r *rig) checkSame(name string, v variant, s *apiv1.SVID) {
	r.t.Helper()
	want, key := v.is, v.key
	if want == "" {
		want = webID
	}
	if key == nil {
		key = r.key.Public()
	}
	leaf, err := x509.ParseCertificate(s.GetChain()[0])
	if err != nil {
		r.t.Fatal(err)
	}
	same, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	switch {
	case s.GetSpiffeId() != want || len(leaf.URIs) != 1 || leaf.URIs[0].String() != want:
		r.t.Errorf("%s: an SVID for %s, want %s", name, s.GetSpiffeId(), want)
	case !ok || !same.Equal(key):
		r.t.Errorf("%s: an SVID for another key", name)
	case v.dns != strings.Join(leaf.DNSNames, " ") || len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0 || leaf.IsCA || len(leaf.Subject.Names) > 0:
		r.t.Errorf("%s: an SVID with more than was attested", name)
	}
	chain := []*x509.Certificate{leaf}
	for _, der := range s.GetChain()[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			r.t.Fatal(err)
		}
		chain = append(chain, c)
	}
	id, err := api.ParseWorkloadID(want)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := issuance.Verify(chain, r.CA().Bundle().Roots, id, time.Now()); err != nil {
		r.t.Errorf("%s: %v", name, err)
	}
}

// tell logs what the suite did and which variants were accepted and why. A generator that has lost its way makes fewer
// than the least.
func (r *rig) tell(least int) {
	r.t.Helper()
	r.t.Logf("%d variants, %d of them accepted", r.variants, r.accepted)
	if r.variants < least {
		r.t.Errorf("%d variants, want at least %d", r.variants, least)
	}
	for why, n := range sorted(r.harmless) {
		if why == "" {
			why = "equal to the untouched request"
		}
		r.t.Logf("accepted: %d: %s", n, why)
	}
}

// item is the untouched request of the workload with another token.
func (r *rig) item(token []byte) *apiv1.IssueItem {
	return &apiv1.IssueItem{Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: token}, Csr: r.csr, Volume: "volume"}
}

// metric returns the sum of a counter, of one label's value or of all.
func (r *rig) metric(name, label string) float64 {
	r.t.Helper()
	families, err := r.metrics.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		for _, m := range f.GetMetric() {
			match := f.GetName() == name && label == ""
			for _, l := range m.GetLabel() {
				match = match || f.GetName() == name && l.GetValue() == label
			}
			if match {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

// ledger counts what was put on record as issued.
type ledger struct {
	ca.Ledger
	mu sync.Mutex
	n  int
}

// Append implements ca.Ledger.
func (l *ledger) Append(ctx context.Context, e audit.Entry) error {
	if e.Kind == audit.KindIssue || e.Kind == audit.KindAttestAgent {
		l.mu.Lock()
		l.n++
		l.mu.Unlock()
	}
	return l.Ledger.Append(ctx, e)
}

func (l *ledger) issued() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n
}

// lines is a log in memory.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// take returns what was written since the last time.
func (l *lines) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.b.String()
	l.b.Reset()
	return s
}

func wire(e attestor.Evidence) *apiv1.Evidence { return &apiv1.Evidence{Kind: e.Kind, Data: e.Data} }

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCSR(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
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

// sorted yields a map in the order of its keys: a suite asks the same questions in the same order each time.
func sorted[V any](m map[string]V) iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}

func clip(s string) string {
	if len(s) > 40 {
		return fmt.Sprintf("%q... (%d)", s[:40], len(s))
	}
	return fmt.Sprintf("%q", s)
}
