package agent_test

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

const (
	here      = "node-1"
	elsewhere = "node-2"
	tokenLife = time.Hour
	svidLife  = time.Hour // of the CA's default policy
)

// bubble runs a test in fake time against a real CA that is ready.
func bubble(t *testing.T, o catest.Options, f func(t *testing.T, s *catest.Server)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := catest.New(t, o)
		s.WaitReady()
		f(t, s)
	})
}

// proverFunc is a Prover.
type proverFunc func(context.Context) (attestor.Evidence, error)

func (f proverFunc) Prove(ctx context.Context) (attestor.Evidence, error) { return f(ctx) }

// ownToken proves the agent of a node with a fresh token each time, as kubelet keeps one there.
func ownToken(s *catest.Server, node string) attestor.Prover {
	pod := s.AgentPod(node)
	return proverFunc(func(context.Context) (attestor.Evidence, error) {
		return s.Evidence(pod, api.AgentAudience(s.TD), tokenLife), nil
	})
}

// node is one agent with what a test can see of it.
type node struct {
	*agent.Agent
	t       testing.TB
	log     *records
	metrics *prometheus.Registry
	stop    func() // ends Run and waits for it
}

// newNode makes the agent of a node, which does not run yet.
func newNode(t testing.TB, s *catest.Server, name string, change ...func(*agent.Config)) *node {
	t.Helper()
	n := &node{t: t, log: &records{}, metrics: prometheus.NewRegistry()}
	cfg := agent.Config{
		TrustDomain: s.TD, Dial: s.Dial, Trust: firstTrust(t, s), Prover: ownToken(s, name), Verifier: verifier,
		Log: slog.New(n.log),
	}
	for _, c := range change {
		c(&cfg)
	}
	a, err := agent.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.Agent = a
	n.metrics.MustRegister(a.Collector())
	return n
}

// startNode makes an agent and runs it until the test ends or stop is called.
func startNode(t testing.TB, s *catest.Server, name string, change ...func(*agent.Config)) *node {
	t.Helper()
	n := newNode(t, s, name, change...)
	n.start()
	return n
}

func (n *node) start() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := n.Run(ctx); err != nil {
			n.t.Errorf("the agent ended: %v", err)
		}
	}()
	n.stop = func() {
		cancel()
		<-done
	}
	n.t.Cleanup(n.stop)
}

// metric returns the value of a metric without labels, or with one label's value behind a slash.
func (n *node) metric(name string) float64 {
	n.t.Helper()
	name, label, _ := strings.Cut(name, "/")
	families, err := n.metrics.Gather()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if label != "" && m.GetLabel()[0].GetValue() != label {
				continue
			}
			return m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return 0
}

func firstTrust(t testing.TB, s *catest.Server) *agent.Trust {
	t.Helper()
	b := s.CA().Bundle()
	trust, err := agent.NewTrust(b.TrustDomain, b.Generation, b.Roots)
	if err != nil {
		t.Fatal(err)
	}
	return trust
}

func verifier(sets agent.KeySets) (attestor.Attestor, error) {
	keys := map[string]attestor.Keys{}
	for issuer, jwks := range sets {
		k, err := attestor.StaticKeys(jwks)
		if err != nil {
			return nil, err
		}
		keys[issuer] = k
	}
	return attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: keys})
}

// workload is a pod that asks for its identity.
type workload struct {
	s   *catest.Server
	pod attestortest.Pod
}

func newWorkload(s *catest.Server, name, node string) *workload {
	return &workload{s, s.Pod("shop", name, "web", node)}
}

func (w *workload) token(ttl time.Duration, change ...func(*attestortest.Draft)) attestor.Evidence {
	return w.s.Evidence(w.pod, api.WorkloadAudience(w.s.TD), ttl, change...)
}

// admit admits a workload with a fresh token.
func (n *node) admit(w *workload) *agent.Identity {
	n.t.Helper()
	end := time.Now().Add(tokenLife).Truncate(time.Second)
	id, until, err := n.Admit(n.t.Context(), w.token(tokenLife), "shared")
	if err != nil {
		n.t.Fatalf("not admitted: %v", err)
	}
	if !until.Equal(end) {
		n.t.Errorf("admitted until %s with a token until %s", until, end)
	}
	return id
}

// keepFresh admits a workload with a fresh token each 48 minutes, as its proxy does, until the test ends or stop is called.
func (n *node) keepFresh(w *workload) (id *agent.Identity, stop func()) {
	n.t.Helper()
	id = n.admit(w)
	ctx, cancel := context.WithCancel(n.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(tokenLife * 8 / 10):
			}
			n.Admit(ctx, w.token(tokenLife), "shared")
		}
	}()
	stop = func() {
		cancel()
		<-done
	}
	n.t.Cleanup(stop)
	return id, stop
}

// await follows what an identity holds until it is as wanted, and fails after a time.
func await(t testing.TB, id *agent.Identity, within time.Duration, what string, want func(agent.Held) bool) agent.Held {
	t.Helper()
	timeout := time.After(within)
	for {
		h, changed := id.Held().Get()
		if want(h) {
			return h
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("after %s there is no %s; held: SVID %t, refusal %v", within, what, h.SVID != nil, h.Refusal)
		}
	}
}

func hasSVID(h agent.Held) bool  { return h.SVID != nil }
func lostSVID(h agent.Held) bool { return h.SVID == nil }
func another(than agent.Held) func(agent.Held) bool {
	return func(h agent.Held) bool { return h.SVID != nil && (than.SVID == nil || serial(h) != serial(than)) }
}

func serial(h agent.Held) string      { return h.SVID.Certificates[0].SerialNumber.Text(16) }
func notAfter(h agent.Held) time.Time { return h.SVID.Certificates[0].NotAfter }

// records is a log that tests can read.
type records struct {
	mu  sync.Mutex
	all []record
}

type record struct {
	at    time.Time
	level slog.Level
	text  string
	attrs map[string]string
}

func (r *records) Enabled(context.Context, slog.Level) bool { return true }
func (r *records) WithAttrs([]slog.Attr) slog.Handler       { panic("not used") }
func (r *records) WithGroup(string) slog.Handler            { panic("not used") }
func (r *records) Handle(_ context.Context, s slog.Record) error {
	one := record{at: s.Time, level: s.Level, text: s.Message, attrs: map[string]string{}}
	s.Attrs(func(a slog.Attr) bool {
		one.attrs[a.Key] = a.Value.String()
		return true
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, one)
	return nil
}

// find returns the records with that text, and with that reason unless it is empty.
func (r *records) find(text string, reason api.Reason) []record {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []record
	for _, one := range r.all {
		if one.text == text && (reason == "" || one.attrs["reason"] == string(reason)) {
			found = append(found, one)
		}
	}
	return found
}

// holdings returns what the CA was told, by SPIFFE ID and pod, as the operator's tool sees it.
func holdings(t testing.TB, s *catest.Server) map[string]*apiv1.NodeHolding {
	t.Helper()
	l := bufconn.Listen(64 << 10)
	server := s.CA().NewAdminServer()
	go server.Serve(l)
	defer server.Stop()
	conn, err := grpc.NewClient("passthrough:///admin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	resp, err := apiv1.NewAdminClient(conn).ListSVIDs(t.Context(), &apiv1.ListSVIDsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	byPod := map[string]*apiv1.NodeHolding{}
	for _, h := range resp.GetHoldings() {
		byPod[h.GetHolding().GetPodName()] = h
	}
	return byPod
}

// memory is a Cache.
type memory struct {
	mu      sync.Mutex
	entries map[string][]byte
	fails   error // of Put
}

func newMemory() *memory { return &memory{entries: map[string][]byte{}} }

func (m *memory) Put(name string, data []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fails == nil {
		m.entries[name] = bytes.Clone(data)
	}
	return m.fails
}

func (m *memory) Delete(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.entries, name)
	return nil
}

func (m *memory) All() iter.Seq2[string, []byte] {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.All(maps.Clone(m.entries))
}

func (m *memory) get(name string) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.entries[name])
}

func (m *memory) names() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.entries))
}

// spiffe
func TestFirstSVID(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := newNode(t, s, here)
		if got := n.NotReady(); len(got) != 1 {
			t.Errorf("an agent that does not run is not ready for %q", got)
		}
		n.start()
		time.Sleep(time.Second) // the key sets are there
		w := newWorkload(s, "web-1", here)
		token := w.token(tokenLife)
		began := time.Now()
		id, until, err := n.Admit(t.Context(), token, "shared")
		if err != nil || time.Since(began) != 0 {
			t.Fatalf("Admit took %s, error %v; want it at once", time.Since(began), err)
		}
		if !until.Equal(began.Add(tokenLife).Truncate(time.Second)) {
			t.Errorf("admitted until %s, the token ends at %s", until, began.Add(tokenLife))
		}
		if got := id.Pod(); got != (agent.Pod{Namespace: "shop", Name: "web-1", UID: w.pod.UID}) {
			t.Errorf("the identity is of pod %v", got)
		}
		h := await(t, id, time.Second, "SVID", hasSVID)
		if got, want := h.SVID.ID.String(), "spiffe://example.org/ns/shop/sa/web"; got != want {
			t.Errorf("SVID of %s, want %s", got, want)
		}
		if trust := n.Trust().Load(); trust.Generation != (api.Generation{Epoch: 1, Number: 1}) {
			t.Errorf("bundle of generation %s", trust.Generation)
		}
		if missing := n.NotReady(); len(missing) > 0 {
			t.Errorf("not ready: %q", missing)
		}
		if again := n.admit(w); again != id {
			t.Error("the same pod got a second identity")
		}

		// What proxies say of it reaches the CA, not more often than once a second.
		time.Sleep(2 * time.Second)
		got := holdings(t, s)["web-1"]
		if got.GetNode() != here || got.GetHolding().GetSpiffeId() != h.SVID.ID.String() || len(got.GetHolding().GetStreams()) != 0 {
			t.Errorf("the CA was told %v", got)
		}
		if got.GetHolding().GetRenewAt().AsTime() != h.RenewAt || got.GetHolding().GetNotAfter().AsTime() != notAfter(h) {
			t.Errorf("the CA was told of renewal at %s and end at %s", got.GetHolding().GetRenewAt().AsTime(), got.GetHolding().GetNotAfter().AsTime())
		}
		id.Report(7, &apiv1.Stream{Id: 7, Acks: 1, AckedSerial: got.GetHolding().GetSerial(), WantsBundle: true, AckedGeneration: 1<<32 | 1})
		id.Report(8, &apiv1.Stream{Id: 8, Nacks: 1, Nack: "no"})
		time.Sleep(2 * time.Second)
		streams := holdings(t, s)["web-1"].GetHolding().GetStreams()
		if len(streams) != 2 || streams[0].GetAcks() != 1 || streams[0].GetAckedGeneration() != 1<<32|1 || streams[1].GetNack() != "no" {
			t.Errorf("the CA was told of streams %v", streams)
		}
		id.Report(7, nil)
		time.Sleep(2 * time.Second)
		if streams := holdings(t, s)["web-1"].GetHolding().GetStreams(); len(streams) != 1 || streams[0].GetId() != 8 {
			t.Errorf("after stream 7 ended the CA was told of %v", streams)
		}
	})
}

// An SVID is never there before the bundle that it verifies under: whoever sees it can use it.
func TestBundleBeforeSVID(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		// The first trust of this agent came without a generation, as PEM.
		plain, err := agent.NewTrust(s.TD, api.Generation{}, s.CA().Bundle().Roots)
		if err != nil {
			t.Fatal(err)
		}
		n := newNode(t, s, here, func(c *agent.Config) { c.Trust = plain })
		var events []string
		var wg sync.WaitGroup
		var mu sync.Mutex
		note := func(what string) {
			mu.Lock()
			defer mu.Unlock()
			events = append(events, what)
		}
		wg.Go(func() {
			trust, changed := n.Trust().Get()
			for trust.Generation.Sequence() == 0 {
				<-changed
				trust, changed = n.Trust().Get()
			}
			note("bundle")
		})
		n.start()
		id := n.admit(newWorkload(s, "web-1", here))
		await(t, id, time.Second, "SVID", hasSVID)
		note("SVID")
		wg.Wait()
		if !slices.Equal(events, []string{"bundle", "SVID"}) {
			t.Errorf("it came in the order %v", events)
		}
	})
}

func TestAdmitRefuses(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		w := newWorkload(s, "web-1", here)
		foreign, err := attestortest.NewIssuer(attestortest.Config{Issuer: catest.IssuerName})
		if err != nil {
			t.Fatal(err)
		}
		forged, err := foreign.Token(w.pod, api.WorkloadAudience(s.TD), tokenLife)
		if err != nil {
			t.Fatal(err)
		}
		old := w.token(time.Minute)
		time.Sleep(time.Minute)
		for _, tt := range []struct {
			name  string
			token attestor.Evidence
			want  api.Reason
		}{
			{"of another node", newWorkload(s, "web-2", elsewhere).token(tokenLife), api.NodeMismatch},
			{"for another audience", s.Evidence(w.pod, "vault", tokenLife), api.TokenAudience},
			{"of an agent", s.Evidence(w.pod, api.AgentAudience(s.TD), tokenLife), api.TokenAudience},
			{"for another trust domain", s.Evidence(w.pod, "signet:other.example", tokenLife), api.TokenAudience},
			{"for two audiences", w.token(tokenLife, attestortest.Audiences(api.WorkloadAudience(s.TD), "vault")), api.TokenAudienceNotExclusive},
			{"expired", old, api.TokenExpired},
			{"too long", w.token(25 * time.Hour), api.TokenTTLTooLong},
			{"of another issuer", w.token(tokenLife, attestortest.Claim("iss", "https://elsewhere.test")), api.IssuerUnknown},
			{"forged", attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(forged)}, api.TokenSignature},
			{"no token at all", attestor.Evidence{Kind: api.EvidenceServiceAccount}, api.TokenMissing},
			{"of another kind", attestor.Evidence{Kind: "tpm", Data: []byte("x")}, api.EvidenceKind},
		} {
			id, until, err := n.Admit(t.Context(), tt.token, "shared")
			if id != nil || !until.IsZero() || api.ReasonOf(err) != tt.want {
				t.Errorf("a token %s: identity %v until %v, error %v; want %s", tt.name, id, until, err, tt.want)
			}
		}
		if got := n.metric("signet_agent_svids"); got != 0 {
			t.Errorf("%v SVIDs are held for tokens that were refused", got)
		}
	})
}

// Admit waits for the first key sets, and no longer than its caller.
func TestAdmitWaitsForKeySets(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := newNode(t, s, here)
		w := newWorkload(s, "web-1", here)
		s.Stop()
		n.start()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		if _, _, err := n.Admit(ctx, w.token(tokenLife), "shared"); api.ReasonOf(err) != api.KeysUnavailable || time.Since(began) != time.Minute {
			t.Errorf("after %s: %v, want %s after a minute", time.Since(began), err, api.KeysUnavailable)
		}
		s.Start()
		await(t, n.admit(w), time.Minute, "SVID", hasSVID)
	})
}

// A workload that the policy does not allow gets that very reason, at once and later; it is tried again by backoff alone,
// which is jittered and bounded, and nobody else waits for it.
func TestRefusedByPolicy(t *testing.T) {
	o := catest.Options{Policy: ca.PolicyFile{Namespaces: []string{"shop"}}}
	bubble(t, o, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		bad := &workload{s, s.Pod("attic", "web-0", "web", here)}
		id := n.admit(bad)
		h := await(t, id, time.Second, "refusal", func(h agent.Held) bool { return h.Refused() != nil })
		if h.Refused().Reason != api.NamespaceNotAllowed || h.Refused().CorrelationID == "" {
			t.Errorf("refused with %v", h.Refused())
		}
		if _, _, err := n.Admit(t.Context(), bad.token(tokenLife), "shared"); api.ReasonOf(err) != api.NamespaceNotAllowed {
			t.Errorf("the next stream is told %v", err)
		}
		for i := range 20 { // fresh tokens do not make it try sooner
			time.Sleep(30 * time.Second)
			n.Admit(t.Context(), bad.token(tokenLife), "shared")
			good := n.admit(newWorkload(s, fmt.Sprint("web-", i), here))
			began := time.Now()
			await(t, good, time.Second, "SVID", hasSVID)
			if d := time.Since(began); d > 100*time.Millisecond {
				t.Errorf("another workload waited %s", d)
			}
		}
		tries := n.log.find("identity not renewed, keeping what is held", api.NamespaceNotAllowed)
		checkBackoff(t, tries, 10*time.Minute)
	})
}

// checkBackoff proves that tries in a time are spaced by 125 ms to 30 s, growing and with jitter.
func checkBackoff(t *testing.T, tries []record, in time.Duration) {
	t.Helper()
	if len(tries) < int(in/(30*time.Second)) || len(tries) > int(in/(10*time.Second))+12 {
		t.Fatalf("%d tries in %s", len(tries), in)
	}
	var waits []time.Duration
	for i, r := range tries[1:] {
		d := r.at.Sub(tries[i].at)
		if d < 125*time.Millisecond || d > 30*time.Second+time.Second {
			t.Errorf("%s between tries %d and %d", d, i, i+1)
		}
		waits = append(waits, d)
	}
	late := waits[len(waits)/2:]
	if slices.Max(waits[:3]) > 2*time.Second || slices.Min(late) < 9*time.Second {
		t.Errorf("the backoff does not grow: %v", waits)
	}
	slices.Sort(late)
	if len(slices.Compact(late)) < len(late)*3/4 {
		t.Errorf("the backoff has no jitter: %v", waits)
	}
}
