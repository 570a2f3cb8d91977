package agent_test

import (
	"bytes"
	"context"
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
		TrustDomain: s.TD, Dial: s.Dial, Trust: firstTrust(t, s), Prover: ownToken(s, name), Verifier: attestor.ByKeySets,
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

// refusal returns why the CA refuses a workload. Admit itself says so where the CA was quick, what it handed out does later.
func (n *node) refusal(w *workload) *api.Error {
	n.t.Helper()
	id, _, err := n.Admit(n.t.Context(), w.token(tokenLife), "shared")
	if err != nil {
		return api.AsError(err)
	}
	return await(n.t, id, time.Second, "refusal", func(h agent.Held) bool { return h.Refused() != nil }).Refused()
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
	server := s.CA().NewAdminServer(catest.AsUser(0))
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
