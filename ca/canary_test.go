package ca_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http/httptest"
	"runtime/pprof"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	pb "google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/canary"
)

// said gathers what left the CA in any way.
type said struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write implements io.Writer.
func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

// add writes a value in every way that somebody may print it.
func (s *said) add(values ...any) {
	log := slog.New(slog.NewJSONHandler(s, nil))
	text := slog.New(slog.NewTextHandler(s, nil))
	for _, v := range values {
		fmt.Fprintf(s, "%v %+v %#v %s %x %q\n", v, v, v, v, v, v)
		log.Info("value", "value", v)
		text.Info("value", "value", v)
		if _, wire := v.(pb.Message); wire {
			continue // nobody writes those as JSON
		}
		if data, err := json.Marshal(v); err == nil {
			s.Write(data)
		}
	}
}

// addError writes an error, its causes and its status with all details.
func (s *said) addError(err error) {
	s.add(err, api.FromStatus(err))
	st := status.Convert(err)
	fmt.Fprintf(s, "%v %+v %s\n", st.Message(), st.Details(), st.Proto())
}

// secretsOf is a life with every secret of it known.
type secretsOf struct {
	*node
	search *canary.Search
	said   *said
	link   *link
}

// item returns a request whose token, key and CSR are looked for.
func (l *secretsOf) item(name string, p attestortest.Pod, change ...func(*attestortest.Draft)) *apiv1.IssueItem {
	l.t.Helper()
	key := newKey(l.t)
	csr := newCSR(l.t, key, func(r *x509.CertificateRequest) { r.Subject = pkix.Name{CommonName: canary.Marker} })
	e := l.token(p, api.WorkloadAudience(l.s.TD), change...)
	l.search.Add("the token of "+name, e.GetData())
	l.search.Add("the CSR of "+name, csr)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		l.t.Fatal(err)
	}
	scalar, err := key.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		l.t.Fatal(err)
	}
	l.search.Add("the key of "+name, der)
	l.search.Add("the private number of "+name, scalar)
	return &apiv1.IssueItem{Evidence: e, Csr: csr, Volume: name}
}

func (l *secretsOf) ask(item *apiv1.IssueItem) {
	l.t.Helper()
	ctx := metadata.AppendToOutgoingContext(l.t.Context(), "authorization", "Bearer "+canary.Marker, "x-secret", canary.Marker)
	resp, err := l.link.client.Issue(ctx, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
	l.said.addError(err)
	l.said.add(resp, item, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
}

// TestCanary lives a whole life with a marker in every secret, refused for every kind of reason, and finds no secret in
// the log of the lowest level, metrics, ledger, answers, errors with their details, a panic's stack or the goroutines.
//
// threat: L01, L02, L18
func TestCanary(t *testing.T) {
	out, search := &said{}, &canary.Search{}
	search.Add("the marker", []byte(canary.Marker))
	boom := []byte("boom-goes-the-handler")
	s := start(t, catest.Options{Log: out, Policy: ca.PolicyFile{Namespaces: []string{"shop"}}, Config: func(cfg *ca.Config) {
		hook(cfg, func(_ context.Context, e attestor.Evidence) {
			if bytes.Contains(e.Data, boom) {
				panic(e) // with the token itself
			}
		})
	}})
	n := newNode(t, s, "node-1")
	l := &secretsOf{node: n, search: search, said: out, link: n.session()}
	live(t, l, boom)

	admin := adminOf(t, s.CA())
	for name, ask := range map[string]func() (pb.Message, error){
		"status":      func() (pb.Message, error) { return admin.GetStatus(t.Context(), nil) },
		"bundle":      func() (pb.Message, error) { return admin.GetBundle(t.Context(), nil) },
		"authorities": func() (pb.Message, error) { return admin.ListAuthorities(t.Context(), nil) },
		"SVIDs":       func() (pb.Message, error) { return admin.ListSVIDs(t.Context(), nil) },
	} {
		m, err := ask()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		wire, err := pb.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		out.Write(wire)
		out.add(m)
	}
	if stream, err := admin.ListAudit(t.Context(), &apiv1.ListAuditRequest{}); err == nil {
		for m, err := stream.Recv(); err == nil; m, err = stream.Recv() {
			out.add(m)
		}
	}
	scrape(t, s.CA(), out)
	if err := pprof.Lookup("goroutine").WriteTo(out, 2); err != nil {
		t.Fatal(err)
	}
	self := s.CA().Self()
	scalar, err := self.PrivateKey.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	search.Add("the CA's own private number", scalar)
	s.Stop()
	out.Write(bytes.ReplaceAll(readAll(t, s.Dir), make([]byte, 4096), nil)) // without the room that is only reserved

	text := out.text.Bytes()
	for _, name := range search.Find(text) {
		t.Errorf("%s was shown", name)
	}
	for _, want := range []string{"level=DEBUG", "msg=refused", "msg=panic", "signet_refusals_total", `"kind":"issue"`, "goroutine "} {
		if !bytes.Contains(text, []byte(want)) {
			t.Errorf("%q is not in what was searched", want)
		}
	}
	if found := search.Find(append(bytes.Clone(text), canary.Marker...)); len(found) != 1 {
		t.Errorf("the search would not find the marker: %v", found)
	}
}

// live asks for SVIDs that are given, and for others that are refused.
func live(t *testing.T, l *secretsOf, boom []byte) {
	t.Helper()
	s := l.s
	web := s.Pod("shop", "web", "web", "node-1")
	l.ask(l.item("web", web))
	l.ask(l.item("web again", web))
	l.ask(l.item("another namespace", s.Pod("attic", "web", "web", "node-1")))
	l.ask(l.item("another node", s.Pod("shop", "far", "web", "node-2")))
	l.ask(l.item("an expired token", web, attestortest.Claim("exp", time.Now().Add(-time.Minute).Unix())))
	l.ask(l.item("an unknown issuer", web, attestortest.Claim("iss", "https://"+canary.Marker+".test")))
	l.ask(l.item("a foreign audience", web, attestortest.Audiences(canary.Marker)))
	l.ask(l.item("a marked subject", web, attestortest.Claim("sub", canary.Marker)))
	l.ask(l.item("a marked kid", web, attestortest.Header("kid", canary.Marker)))
	l.ask(l.item("a marked header", web, attestortest.Header(canary.Marker, "x")))
	gone := s.Pod("shop", "gone", "web", "node-1")
	item := l.item("a pod that is gone", gone)
	s.Pods.Remove(gone)
	l.ask(item)
	for name, change := range map[string]func(*apiv1.IssueItem){
		"no token":      func(i *apiv1.IssueItem) { i.Evidence.Data = nil },
		"two tokens":    func(i *apiv1.IssueItem) { i.Evidence.Data = append(append(i.Evidence.Data, ' '), i.Evidence.Data...) },
		"a cut token":   func(i *apiv1.IssueItem) { i.Evidence.Data = i.Evidence.Data[:len(i.Evidence.Data)-5] },
		"a long token":  func(i *apiv1.IssueItem) { i.Evidence.Data = bytes.Repeat([]byte(canary.Marker), 1000) },
		"a marked kind": func(i *apiv1.IssueItem) { i.Evidence.Kind = canary.Marker },
		"a cut CSR":     func(i *apiv1.IssueItem) { i.Csr = i.Csr[:len(i.Csr)-3] },
		"a wrong CSR":   func(i *apiv1.IssueItem) { i.Csr[len(i.Csr)-1] ^= 1 },
		"a marked CSR":  func(i *apiv1.IssueItem) { i.Csr = []byte(canary.Marker) },
		"a foreign name": func(i *apiv1.IssueItem) {
			i.Csr = newCSR(t, newKey(t), withURI(t, "spiffe://example.org/ns/"+canary.Marker))
		},
		"a panic": func(i *apiv1.IssueItem) { i.Evidence.Data = append(i.Evidence.Data, boom...) },
	} {
		item := l.item(name, s.Pod("shop", "pod", "web", "node-1"))
		change(item)
		item.Volume = name
		l.ask(item)
	}
	for _, r := range []*apiv1.AttestAgentRequest{
		{Protocol: api.Protocol, Evidence: l.token(web, api.WorkloadAudience(s.TD))},
		{Protocol: api.Protocol, Evidence: l.token(web, api.AgentAudience(s.TD)), Csr: []byte(canary.Marker)},
	} {
		l.search.Add("a token for agents", r.GetEvidence().GetData())
		_, err := l.link.client.AttestAgent(t.Context(), r)
		l.said.addError(err)
		l.said.add(r)
	}
	stranger := &node{t: t, s: s, pod: l.pod, svid: foreignSVID(t, s.TD, l.svid.ID)}
	_, err := stranger.connect(l.hello())
	l.said.addError(err)
	bad := &node{t: t, s: s, pod: l.pod, svid: l.svid}
	_, err = bad.connect(helloWith(&apiv1.Hello{Protocol: api.Protocol, Evidence: l.token(web, api.AgentAudience(s.TD))}))
	l.said.addError(err)
}

// scrape writes what Prometheus would read.
func scrape(t *testing.T, c *ca.CA, w io.Writer) {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(c.Metrics()); err != nil {
		t.Fatal(err)
	}
	rec := httptest.NewRecorder()
	promhttp.HandlerFor(reg, promhttp.HandlerOpts{}).ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
	if _, err := io.Copy(w, rec.Body); err != nil {
		t.Fatal(err)
	}
}

// TestRedacted prints what holds secrets in every way there is.
//
// threat: L03
func TestRedacted(t *testing.T) {
	out, search := &said{}, &canary.Search{}
	marker := []byte(canary.Marker)
	search.Add("the marker", marker)
	e := attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: marker}
	wire := &apiv1.Evidence{Kind: "k", Data: marker}
	key := ca.NewSealKey()
	search.Add("the seal key", key)
	sealer, err := ca.NewSealer(key)
	if err != nil {
		t.Fatal(err)
	}
	out.add(e, &e, []attestor.Evidence{e}, map[string]attestor.Evidence{"x": e}, struct{ E attestor.Evidence }{e},
		ca.Request{Evidence: e, CSR: marker}, &ca.Request{Evidence: e, CSR: marker}, []ca.Request{{CSR: marker}}, sealer, *sealer, struct{ S *ca.Sealer }{sealer},
		wire, &apiv1.AttestAgentRequest{Evidence: wire, Csr: marker}, &apiv1.IssueItem{Evidence: wire, Csr: marker},
		&apiv1.IssueRequest{Items: []*apiv1.IssueItem{{Csr: marker}}}, &apiv1.Hello{Evidence: wire}, helloWith(&apiv1.Hello{Evidence: wire}))
	for _, name := range search.Find(out.text.Bytes()) {
		t.Errorf("%s is shown", name)
	}
}
