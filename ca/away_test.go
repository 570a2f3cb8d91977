package ca_test

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
)

// shared is a store in which another replica writes its heartbeat too.
type shared struct {
	ca.Store
	seen func() time.Time // by the other replica; nil: there is none

	mu    sync.Mutex
	saved []ca.Replica
}

func (s *shared) Replicas(ctx context.Context) ([]ca.Replica, error) {
	all, err := s.Store.Replicas(ctx)
	if s.seen != nil && err == nil {
		all = append(all, ca.Replica{Name: "ca-1", Clusters: map[string]ca.Sight{catest.IssuerName: {Seen: s.seen()}}})
	}
	return all, err
}

func (s *shared) SaveReplica(ctx context.Context, r ca.Replica) error {
	s.mu.Lock()
	s.saved = append(s.saved, r)
	s.mu.Unlock()
	return s.Store.SaveReplica(ctx, r)
}

// take returns what was saved since it was last called.
func (s *shared) take() []ca.Replica {
	s.mu.Lock()
	defer s.mu.Unlock()
	saved := s.saved
	s.saved = nil
	return saved
}

// A replica that is cut off alone renews nothing by tickets and sends its agents to the one that sees; once nobody sees, it
// does.
func TestAwayAlone(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		var died atomic.Pointer[time.Time]
		s := start(t, graced(func(c *ca.Config) {
			c.Store = &shared{Store: c.Store, seen: func() time.Time {
				if at := died.Load(); at != nil {
					return *at
				}
				return time.Now()
			}}
		}))
		n := newNode(t, s, "node-1")
		l := n.session()
		h := hold(t, n, l, "web-0")
		s.Pods.Lose()
		lost := time.Now()
		wantReason(t, l.end(), api.SessionEnded)
		if took := time.Since(lost); took > time.Minute {
			t.Errorf("the agent was sent away after %s", took)
		}
		if _, err := n.connect(n.helloWithTicket()); api.ReasonOf(err) != api.DirectoryUnavailable || err == nil {
			t.Errorf("a session at a replica that sees nothing: %v", err)
		}
		_, _, err := n.renewSelf(n.svid, nil)
		wantReason(t, err, api.DirectoryUnavailable)

		died.Store(new(time.Now()))
		time.Sleep(2 * time.Minute)
		h.l = n.resume()
		wantOutcome(t, h.renew(), "")
		if got := counted(t, s, "signet_ca_grace_renewals_total", "workload"); got != 1 {
			t.Errorf("%v renewals by tickets, want 1", got)
		}
	})
}

// A heartbeat costs a write a minute while a replica is alone, more among others, and none while nothing changes.
func TestHeartbeat(t *testing.T) {
	for _, tt := range []struct {
		name        string
		other       bool
		least, most int // writes in an hour in which the cluster is seen
	}{
		{"alone", false, 55, 61},
		{"among others", true, 330, 361},
	} {
		t.Run(tt.name, func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				var st *shared
				s := start(t, graced(func(c *ca.Config) {
					st = &shared{Store: c.Store}
					if tt.other {
						st.seen = func() time.Time { return time.Now().Add(-time.Minute) } // there, with a clock that is behind
					}
					c.Store = st
				}))
				time.Sleep(2 * time.Minute)
				st.take()
				time.Sleep(time.Hour)
				saved := st.take()
				if len(saved) < tt.least || len(saved) > tt.most {
					t.Errorf("%d writes in an hour, want %d to %d", len(saved), tt.least, tt.most)
				}
				last := saved[len(saved)-1]
				if at := last.Clusters[catest.IssuerName]; time.Since(at.Seen) > 2*time.Minute || !at.Since.IsZero() || len(last.Minted) == 0 {
					t.Errorf("written down: %+v", last)
				}
				s.Pods.Lose()
				lost := time.Now()
				time.Sleep(3 * time.Hour)
				if saved = st.take(); len(saved) > 3 {
					t.Errorf("%d writes while nothing is seen", len(saved))
				}
				last, err := ca.ReplicaOf(t.Context(), st, catest.Replica)
				if at := last.Clusters[catest.IssuerName]; err != nil || at.Since.IsZero() || at.Since.After(lost) || lost.Sub(at.Since) > 10*time.Second {
					t.Errorf("written down: %+v (%v), lost at %s", at, err, lost)
				}
			})
		})
	}
}

// A heartbeat that cannot be written costs nothing; one whose outcome is unknown ends the process, as every such write does.
func TestHeartbeatFails(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		b := newBare(t, func(c *ca.Config) {
			sealer, err := ca.NewSealer(ca.NewSealKey())
			if err != nil {
				t.Fatal(err)
			}
			c.Grace, c.Sealer, c.Directory = time.Hour, sealer, catest.NewDirectory()
			c.KeySets = map[string]ca.KeySets{catest.IssuerName: keysNone{}}
		})
		c, err := ca.New(b.config)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { ended <- c.Run(ctx) }()
		time.Sleep(2 * time.Minute)
		b.store.setFail(errors.New("no room"))
		time.Sleep(10 * time.Minute)
		select {
		case err := <-ended:
			t.Fatalf("ended for want of room: %v", err)
		default:
		}
		b.store.setFail(api.E(api.StateUnknown, "the disk said nothing"))
		select {
		case err := <-ended:
			wantReason(t, err, api.StateUnknown)
		case <-time.After(5 * time.Minute):
			t.Error("it goes on with a write of unknown outcome")
		}
	})
}

// never is a Directory that has never seen its cluster, and remembers nothing.
type never struct{ *catest.Directory }

// Seen implements ca.Rememberer.
func (never) Seen(string) (time.Time, bool) { return time.Time{}, false }

// A CA that was started while the API server is away and remembers nothing issues nothing: the alert must tell of it.
func TestAwaySinceStart(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, graced(func(c *ca.Config) { c.Directory = never{catest.NewDirectory()} }))
		started := time.Now()
		time.Sleep(30 * time.Second)
		if got := counted(t, s, "signet_ca_cluster_away_seconds", catest.IssuerName); got != 0 {
			t.Errorf("away for %v seconds half a minute after the start", got)
		}
		time.Sleep(10 * time.Minute)
		if got, want := counted(t, s, "signet_ca_cluster_away_seconds", catest.IssuerName), time.Since(started).Seconds(); got < want-10 || got > want+10 {
			t.Errorf("away for %v seconds by the metric, %v after the start", got, want)
		}
	})
}

type keysNone struct{}

// Snapshot implements ca.KeySets.
func (keysNone) Snapshot() ([]byte, <-chan struct{}) { return nil, nil }

// A ban holds while the API server is away, whenever it was said: neither node nor pods are renewed.
//
// threat: B06
func TestKnownBanned(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, graced())
		before, during := newNode(t, s, "node-1"), newNode(t, s, "node-2")
		l1, l2 := before.session(), during.session()
		h1, h2 := hold(t, before, l1, "web-1"), hold(t, during, l2, "web-2")
		ban := func(n *node) {
			t.Helper()
			if _, err := adminOf(t, s.CA()).BanNode(t.Context(), &apiv1.BanNodeRequest{Node: n.pod.NodeUID}); err != nil {
				t.Fatal(err)
			}
		}
		ban(before)
		s.Pods.Lose()
		time.Sleep(time.Minute)
		wantOutcome(t, h2.renew(), "")
		ban(during)
		for _, x := range []*holder{h1, h2} {
			if err := x.renew(); err == nil {
				t.Error("a pod of a banned node is renewed")
			}
			_, _, err := x.n.renewSelf(nil, nil)
			wantReason(t, err, api.NodeBanned)
			if _, _, err := x.n.renewSelf(x.n.svid, nil); err == nil {
				t.Error("the agent of a banned node is renewed")
			}
			if _, err := x.n.connect(x.n.helloWithTicket()); err == nil {
				t.Error("the agent of a banned node has a session")
			}
		}
	})
}

// reviewer is an API server that reviews tokens while it is there.
type reviewer struct {
	away  atomic.Bool
	asked atomic.Int64
	yes   func(token []byte, audience string) attestor.TokenReview
}

// ReviewToken implements attestor.TokenReviewer.
func (r *reviewer) ReviewToken(_ context.Context, token []byte, audience string) (attestor.TokenReview, error) {
	r.asked.Add(1)
	if r.away.Load() {
		return attestor.TokenReview{}, errors.New("connection refused")
	}
	return r.yes(token, audience), nil
}

// Where each token is reviewed, the rule of known renewals does without as well: nobody can be asked.
//
// threat: G01
func TestKnownWithReview(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		var s *catest.Server
		r := &reviewer{yes: func(token []byte, audience string) attestor.TokenReview {
			c, _, err := attestor.Unchecked(attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: token}, audience)
			if err != nil {
				t.Error(err)
			}
			return attestor.TokenReview{
				Authenticated: true, Audiences: []string{audience}, Groups: []string{"system:serviceaccounts"},
				Username: "system:serviceaccount:" + c.Namespace + ":" + c.ServiceAccount, UID: c.ServiceAccountUID,
			}
		}}
		s = start(t, graced(func(c *ca.Config) {
			jwks, _ := c.KeySets[catest.IssuerName].Snapshot()
			keys, err := attestor.StaticKeys(jwks)
			if err != nil {
				t.Fatal(err)
			}
			a, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{
				Issuers: map[string]attestor.Keys{catest.IssuerName: keys},
				Reviews: map[string]attestor.ReviewConfig{catest.IssuerName: {Reviewer: r}},
			})
			if err != nil {
				t.Fatal(err)
			}
			c.Attestors = map[string]attestor.Attestor{api.EvidenceServiceAccount: a}
		}))
		n := newNode(t, s, "node-1")
		l := n.session()
		h := hold(t, n, l, "web-0")
		if r.asked.Load() == 0 {
			t.Fatal("no token was reviewed")
		}
		r.away.Store(true)
		wantReason(t, h.renew(), api.ReviewerUnavailable) // the cluster is seen: then the review is wanted
		s.Pods.Lose()
		time.Sleep(2 * time.Hour / 3)
		asked := r.asked.Load()
		wantOutcome(t, h.renew(), "")
		if r.asked.Load() != asked {
			t.Error("an API server that is away was asked")
		}
		wantReason(t, l2(l.issue(n.item(s.Pod("shop", "new", "web", "node-1")))), api.ReviewerUnavailable)
	})
}

// A record of before there were tickets gets its key at the first start, and keeps it.
func TestTicketKeyAdded(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, graced())
		n := newNode(t, s, "node-1")
		h := hold(t, n, n.session(), "web-0")
		s.Stop()
		keys := func(change func(*journal.Journal)) []journal.TicketKey {
			t.Helper()
			st, closeStore, err := store.Open(t.Context(), store.Config{Kind: "bolt", Path: filepath.Join(s.Dir, "signet.db")}, false)
			if err != nil {
				t.Fatal(err)
			}
			defer closeStore()
			j, rev, err := st.Load(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			had := j.TicketKeys
			if change != nil {
				change(&j)
				if _, err := st.Swap(t.Context(), rev, j); err != nil {
					t.Fatal(err)
				}
			}
			return had
		}
		made := keys(nil)
		if len(made) != 1 {
			t.Fatalf("init made %d keys", len(made))
		}
		s.Start()
		s.WaitReady()
		s.Pods.Lose()
		h.l = n.resume() // by a ticket of before the restart
		wantOutcome(t, h.renew(), "")
		s.Stop()
		if again := keys(func(j *journal.Journal) { j.Schema, j.TicketKeys = 1, nil }); len(again) != 1 || again[0].ID != made[0].ID {
			t.Errorf("the key changed with a restart: %v", again)
		}
		s.Start()
		s.WaitReady()
		time.Sleep(70 * time.Second)
		if _, err := n.connect(n.helloWithTicket()); api.ReasonOf(err) != api.TicketInvalid || err == nil {
			t.Errorf("a ticket under a key that is lost: %v", err)
		}
		s.Pods.Fail(nil)
		n.session()
		s.Stop()
		if fresh := keys(nil); len(fresh) != 1 || fresh[0].ID == made[0].ID {
			t.Errorf("keys after a start without any: %v", fresh)
		}
		s.Start()
	})
}
