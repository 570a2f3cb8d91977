package ca_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/latest"
)

// changingKeys is a ca.KeySets that a test changes.
type changingKeys struct{ latest.Value[[]byte] }

// Snapshot implements ca.KeySets.
func (k *changingKeys) Snapshot() ([]byte, <-chan struct{}) { return k.Get() }

// TestSessionPush sends the bundle before anything else, then the key sets, then each of them when it changes.
func TestSessionPush(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		other := &changingKeys{}
		s := catest.New(t, catest.Options{Config: func(cfg *ca.Config) { cfg.KeySets[otherIssuer] = other }})
		time.Sleep(time.Second)
		if missing := s.CA().NotReady(); len(missing) != 1 || !strings.Contains(missing[0], otherIssuer) {
			t.Errorf("not ready for %q, want the key set of %s", missing, otherIssuer)
		}
		l := newNode(t, s, "node-1").session()
		first := s.CA().Bundle()
		wantBundle(t, l.next(), first)
		wantKeys(t, l.next(), map[string]string{catest.IssuerName: string(s.Tokens.JWKS())})

		other.Set([]byte(`{"keys":[1]}`))
		wantKeys(t, l.next(), map[string]string{catest.IssuerName: string(s.Tokens.JWKS()), otherIssuer: `{"keys":[1]}`})
		if missing := s.CA().NotReady(); len(missing) != 0 {
			t.Errorf("not ready for %q", missing)
		}

		root, err := issuance.NewRoot(s.TD, newKey(t), day, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		roots := append([]*x509.Certificate{root}, first.Roots...)
		second := &ca.Bundle{TrustDomain: s.TD, Generation: api.Generation{Epoch: 1, Number: 2}, Roots: roots, Hash: api.BundleHash(roots)}
		s.CA().SetBundle(second)
		wantBundle(t, l.next(), second)
		// Who comes now has it at once, and who only attests has it too.
		n := newNode(t, s, "node-2")
		wantBundle(t, n.session().next(), second)
		resp, _, err := n.attest(nil)
		if err != nil {
			t.Fatal(err)
		}
		wantBundle(t, &apiv1.SessionResponse{Message: &apiv1.SessionResponse_Bundle{Bundle: resp.GetBundle()}}, second)
	})
}

func wantBundle(t *testing.T, m *apiv1.SessionResponse, want *ca.Bundle) {
	t.Helper()
	got := m.GetBundle()
	if got == nil {
		t.Fatalf("the message is %T, want the bundle", m.GetMessage())
	}
	var roots []*x509.Certificate
	for _, der := range got.GetRoots() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, c)
	}
	hash := api.BundleHash(roots)
	if (api.Generation{Epoch: got.GetEpoch(), Number: got.GetNumber()}) != want.Generation || hash != want.Hash || !bytes.Equal(got.GetHash(), want.Hash[:]) {
		t.Errorf("the bundle is %d.%d with %d roots, want %s with %d", got.GetEpoch(), got.GetNumber(), len(roots), want.Generation, len(want.Roots))
	}
}

func wantKeys(t *testing.T, m *apiv1.SessionResponse, want map[string]string) {
	t.Helper()
	got := map[string]string{}
	for _, s := range m.GetKeySets().GetSets() {
		got[s.GetIssuer()] = string(s.GetJwks())
		if !json.Valid(s.GetJwks()) {
			t.Errorf("the key set of %s is no JSON", s.GetIssuer())
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("key sets (-want +got):\n%s", diff)
	}
}

// TestWelcome says who is there.
func TestWelcome(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	stream, err := apiv1.NewAuthorityClient(dial(t, s, n.svid)).Session(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(n.hello()); err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	want := &apiv1.Welcome{Protocol: api.Protocol, TrustDomain: catest.TrustDomain, Replica: catest.Replica}
	if diff := cmp.Diff(want, m.GetWelcome(), protocmp.Transform()); diff != "" {
		t.Errorf("Welcome (-want +got):\n%s", diff)
	}
}

// TestSessionEnds ends sessions when they must end, each with its reason and none counted as a refusal.
func TestSessionEnds(t *testing.T) {
	tests := []struct {
		name          string
		config        func(*ca.Config)
		do            func(s *catest.Server)
		after, before time.Duration // the session ends between them
	}{
		{"with the certificate", func(c *ca.Config) { c.AgentTTL, c.SessionAge = 10*time.Minute, 4*time.Hour }, nil, 10*time.Minute - time.Second, 10*time.Minute + time.Second},
		{"with its age", func(c *ca.Config) { c.AgentTTL, c.SessionAge = 8*time.Hour, 4*time.Hour }, nil, 3 * time.Hour, 4*time.Hour + time.Second},
		{"with its age of an hour", nil, nil, 45 * time.Minute, time.Hour + time.Second},
		{"with the CA", nil, func(s *catest.Server) {
			time.Sleep(time.Minute)
			s.Stop()
		}, time.Minute, time.Minute + time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				s := start(t, catest.Options{Config: tt.config})
				began := time.Now()
				l := newNode(t, s, "node-1").session()
				if tt.do != nil {
					go tt.do(s)
				}
				wantReason(t, l.end(), api.SessionEnded)
				if d := time.Since(began); d < tt.after || d > tt.before {
					t.Errorf("the session ended after %s, want %s to %s", d, tt.after, tt.before)
				}
				synctest.Wait()
				if n := metric(t, s.CA(), "signet_refusals_total"); n != 0 {
					t.Errorf("a planned end counts as %v refusals", n)
				}
				if n := metric(t, s.CA(), "signet_agent_sessions"); n != 0 {
					t.Errorf("%v sessions are left", n)
				}
			})
		})
	}
}

// TestSessionSpread ends the sessions of agents that came together at different times.
func TestSessionSpread(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{Config: func(c *ca.Config) { c.AgentTTL = 4 * time.Hour }})
		ended := make(chan time.Time, 6)
		for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
			l := newNode(t, s, name).session()
			go func() {
				l.end()
				ended <- time.Now()
			}()
		}
		first := <-ended
		for range 4 {
			<-ended
		}
		if d := (<-ended).Sub(first); d < time.Minute {
			t.Errorf("six sessions ended within %s of each other", d)
		}
	})
}

// TestHelloTimeout sends away who has an SVID and says nothing.
func TestHelloTimeout(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{})
		n := newNode(t, s, "node-1")
		stream, err := apiv1.NewAuthorityClient(dial(t, s, n.svid)).Session(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		wantReason(t, (&link{t: t, stream: stream}).end(), api.SessionProtocol)
		if d := time.Since(began); d > 11*time.Second {
			t.Errorf("it was sent away after %s", d)
		}
	})
}

// TestSessionsOfOneNode lets an agent change connections, and no node gather sessions without end.
//
// threat: B07
func TestSessionsOfOneNode(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{})
		n := newNode(t, s, "node-1")
		p := s.Pod("shop", "web", "web", "node-1")
		var links []*link
		ended := make(chan int, 16)
		for i := range 7 {
			l := n.session()
			links = append(links, l)
			go func() {
				err := l.end()
				if api.ReasonOf(err) == api.SessionEnded {
					ended <- i
				}
			}()
			time.Sleep(time.Second)
		}
		for want := range 3 {
			if got := <-ended; got != want {
				t.Errorf("session %d was ended, want the oldest, %d", got, want)
			}
		}
		if n := metric(t, s.CA(), "signet_agent_sessions"); n != 4 {
			t.Errorf("%v sessions of one node, want 4", n)
		}
		if _, err := links[6].issue(n.item(p)); err != nil {
			t.Errorf("the newest session: %v", err)
		}
		if st, err := adminOf(t, s.CA()).GetStatus(t.Context(), &apiv1.GetStatusRequest{}); err != nil || st.GetAgents() != 1 {
			t.Errorf("%d agents (%v), want 1", st.GetAgents(), err)
		}
	})
}

// TestHoldings lists through the admin service what agents report.
func TestHoldings(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{})
		admin := adminOf(t, s.CA())
		n := newNode(t, s, "node-1")
		first := n.session()
		send := func(l *link, r *apiv1.Report) {
			if err := l.stream.Send(report(r)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			time.Sleep(time.Second)
		}
		held := func(key, id, serial string) *apiv1.Holding {
			return &apiv1.Holding{Key: key, SpiffeId: "spiffe://example.org/ns/shop/sa/" + id, Namespace: "shop", PodName: "pod-" + key, Serial: serial}
		}
		want := func(what string, r *apiv1.ListSVIDsRequest, serials ...string) {
			t.Helper()
			resp, err := admin.ListSVIDs(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, h := range resp.GetHoldings() {
				got = append(got, h.GetHolding().GetSerial())
				if h.GetNode() == "" || h.GetNodeUid() == "" || h.GetReportedAt().AsTime().After(time.Now()) {
					t.Errorf("%s: a holding without its node or time: %v", what, h)
				}
			}
			if diff := cmp.Diff(serials, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", what, diff)
			}
		}
		all := &apiv1.ListSVIDsRequest{}
		want("nothing reported", all)
		send(first, &apiv1.Report{Full: true, Changed: []*apiv1.Holding{held("2", "web", "w1"), held("1", "db", "d1")}})
		want("full", all, "d1", "w1")
		send(first, &apiv1.Report{Changed: []*apiv1.Holding{held("1", "db", "d2"), held("3", "api", "a1")}})
		want("changed", all, "a1", "d2", "w1")
		send(first, &apiv1.Report{Removed: []string{"2", "unheard of"}})
		want("removed", all, "a1", "d2")
		want("by identity", &apiv1.ListSVIDsRequest{SpiffeId: "spiffe://example.org/ns/shop/sa/db"}, "d2")
		want("by namespace", &apiv1.ListSVIDsRequest{Namespace: "shop"}, "a1", "d2")
		want("by another namespace", &apiv1.ListSVIDsRequest{Namespace: "bank"})

		second := n.session()
		send(second, &apiv1.Report{Full: true, Changed: []*apiv1.Holding{held("1", "db", "d3"), held("3", "api", "a2")}})
		want("two sessions", all, "a2", "d3")
		far := newNode(t, s, "node-2").session()
		send(far, &apiv1.Report{Full: true, Changed: []*apiv1.Holding{held("1", "db", "d-far")}})
		want("two nodes", all, "a2", "d3", "d-far")
		first.stream.CloseSend()
		far.stream.CloseSend()
		synctest.Wait()
		want("one session and one node gone", all, "a2", "d3")
		send(second, &apiv1.Report{Full: true})
		want("full and empty", all)
	})
}

// TestAdmin tells what there is; the rest is what agents report.
func TestAdmin(t *testing.T) {
	s := start(t, catest.Options{})
	admin := adminOf(t, s.CA())
	st, err := admin.GetStatus(t.Context(), &apiv1.GetStatusRequest{})
	if err != nil || st.GetTrustDomain() != catest.TrustDomain || st.GetReplica() != catest.Replica || st.GetEpoch() != 1 || st.GetNumber() != 1 || len(st.GetNotReady()) != 0 {
		t.Errorf("the status is %v (%v)", st, err)
	}
	b, err := admin.GetBundle(t.Context(), &apiv1.GetBundleRequest{})
	if err != nil || b.GetTrustDomain() != catest.TrustDomain {
		t.Fatalf("the bundle is %v (%v)", b, err)
	}
	wantBundle(t, &apiv1.SessionResponse{Message: &apiv1.SessionResponse_Bundle{Bundle: b.GetBundle()}}, s.CA().Bundle())
	list, err := admin.ListAuthorities(t.Context(), &apiv1.ListAuthoritiesRequest{})
	if err != nil || len(list.GetAuthorities()) != 2 {
		t.Fatalf("the authorities are %v (%v)", list, err)
	}
	root, over := list.GetAuthorities()[0], list.GetAuthorities()[1]
	if root.GetKind() != "root" || root.GetState() != "active" || root.GetParent() != root.GetId() ||
		over.GetKind() != "intermediate" || over.GetParent() != root.GetId() || over.GetReplica() != catest.Replica || over.GetKey() != "ECDSA P-256" {
		t.Errorf("the authorities are %v", list)
	}
	if _, err := admin.ListSVIDs(context.Background(), nil); err != nil {
		t.Error(err)
	}
}

// TestNewBundle refuses a record that makes none.
func TestNewBundle(t *testing.T) {
	b := newBare(t, nil)
	j := b.store.journal
	got, err := ca.NewBundle(j)
	if err != nil || len(got.Roots) != 1 || got.Hash != api.BundleHash(got.Roots) || got.Generation.Sequence() != 1<<32|1 {
		t.Errorf("the bundle is %+v (%v)", got, err)
	}
	j.TrustDomain = "Example.org"
	if _, err := ca.NewBundle(j); err == nil {
		t.Error("a bundle of a trust domain that is none")
	}
	j = b.store.journal
	j.Authorities[0].Certificate = []byte{0x30}
	_, err = ca.NewBundle(j)
	wantReason(t, err, api.StateCorrupt)
}

// published is a ca.Publisher in memory.
type published struct {
	there bool

	mu   sync.Mutex
	fail error
	got  []*ca.Bundle
}

// Published implements ca.Publisher.
func (p *published) Published(context.Context, spiffeid.TrustDomain) (bool, error) {
	return p.there, nil
}

// Publish implements ca.Publisher.
func (p *published) Publish(_ context.Context, b *ca.Bundle) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.got = append(p.got, b)
	return p.fail
}

func (p *published) setFail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fail = err
}

func (p *published) all() []*ca.Bundle {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.got)
}

// TestPublish shows the bundle at the start, at each change, and once a minute; a publisher that fails is asked again soon,
// then ever more seldom, and stops nothing.
func TestPublish(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		p := &published{}
		b := newBare(t, func(cfg *ca.Config) { cfg.Publisher = p })
		b.start()
		if got := p.all(); len(got) != 1 || got[0].Generation != b.ca.Bundle().Generation || got[0].RecordSchema != journal.Schema {
			t.Fatalf("published %d times", len(got))
		}
		next := *b.ca.Bundle()
		next.Generation.Number++
		b.ca.SetBundle(&next)
		synctest.Wait()
		if got := p.all(); len(got) != 2 || got[1].Generation != next.Generation {
			t.Fatalf("published %d times", len(got))
		}
		p.setFail(errors.New("no space left on device"))
		time.Sleep(time.Minute + 8*time.Second) // the first failure, then after 1 s, 2 s and 4 s at most
		if n := len(p.all()); n < 6 || n > 8 {
			t.Errorf("published %d times in the first seconds", n)
		}
		time.Sleep(20 * time.Minute)
		n := len(p.all())
		if n < 26 || n > 50 || metric(t, b.ca, "signet_bundle_publish_failures_total") != float64(n-2) {
			t.Errorf("published %d times in twenty minutes", n)
		}
		p.setFail(nil)
		time.Sleep(10 * time.Minute)
		if more := len(p.all()) - n; more < 9 || more > 11 {
			t.Errorf("published %d times in ten minutes", more)
		}
		if len(b.ca.NotReady()) > 0 {
			t.Error("the CA cannot issue because it cannot publish")
		}
	})
}
