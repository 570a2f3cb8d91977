package ca_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/journal"
)

// sharedStore is a ca.SharedStore, to which others write by its Store.
type sharedStore struct {
	ca.Store

	mu      sync.Mutex
	changed chan struct{} // closed at the next change
	fail    error         // of Await
	failed  int
}

// Await implements ca.SharedStore.
func (s *sharedStore) Await(ctx context.Context, old ca.Revision) error {
	for {
		s.mu.Lock()
		changed, fail := s.changed, s.fail
		if fail != nil {
			s.failed++
		}
		s.mu.Unlock()
		if fail != nil {
			return fail
		}
		if _, now, err := s.Load(ctx); err != nil || now != old {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Swap implements ca.Store.
func (s *sharedStore) Swap(ctx context.Context, old ca.Revision, j journal.Journal) (ca.Revision, error) {
	r, err := s.Store.Swap(ctx, old, j)
	s.tell()
	return r, err
}

func (s *sharedStore) tell() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *sharedStore) setFail(err error) (failed int) {
	s.mu.Lock()
	s.fail = err
	failed = s.failed
	s.mu.Unlock()
	s.tell()
	return failed
}

// TestFollowRecord takes over what other replicas decide without being asked: a ban ends sessions within seconds, and taking
// it back lets the agent in again. While the store does not say, what was read last goes on.
//
// threat: B06
func TestFollowRecord(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		st := &sharedStore{changed: make(chan struct{})}
		s := start(t, catest.Options{Config: func(cfg *ca.Config) {
			st.Store = cfg.Store
			cfg.Store = st
		}})
		n := newNode(t, s, "node-1")
		allow := func() {
			t.Helper()
			j, revision, err := st.Load(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := st.Swap(t.Context(), revision, j.WithoutBan(catest.IssuerName, n.pod.NodeUID)); err != nil {
				t.Fatal(err)
			}
		}
		admitted := func() *link {
			t.Helper()
			for range 600 {
				if l, err := n.connect(nil); err == nil {
					return l
				}
				time.Sleep(100 * time.Millisecond)
			}
			t.Fatal("the node is let in no more")
			return nil
		}
		l := n.session()
		began := time.Now()
		if err := otherBan(t.Context(), st, n.pod.NodeUID); err != nil {
			t.Fatal(err)
		}
		wantReason(t, l.end(), api.NodeBanned)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("the session ended after %s", took)
		}
		allow()
		l = admitted()

		st.setFail(errors.New("no route to host"))
		if err := otherBan(t.Context(), st, n.pod.NodeUID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		if _, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1"))); err != nil {
			t.Errorf("while the store does not say: %v", err)
		}
		if failed := st.setFail(nil); failed < 5 || failed > 40 {
			t.Errorf("in five minutes it was asked %d times", failed)
		}
		wantReason(t, l.end(), api.NodeBanned)
	})
}

// overtaken is a store to which another replica writes just before the record is read for the second time, once that is asked
// for.
type overtaken struct {
	ca.Store
	reads atomic.Int32 // since other was set
	other atomic.Pointer[func(journal.Journal) journal.Journal]
}

// Load implements ca.Store.
func (s *overtaken) Load(ctx context.Context) (journal.Journal, ca.Revision, error) {
	if other := s.other.Load(); other != nil && s.reads.Add(1) == 2 {
		j, revision, err := s.Store.Load(ctx)
		if err == nil {
			_, err = s.Store.Swap(ctx, revision, (*other)(j))
		}
		if err != nil {
			return journal.Journal{}, 0, err
		}
	}
	return s.Store.Load(ctx)
}

// startOvertaken starts a CA whose record others may change first.
func startOvertaken(t *testing.T) (*catest.Server, *overtaken) {
	t.Helper()
	st := &overtaken{}
	return start(t, catest.Options{Config: func(cfg *ca.Config) {
		st.Store = cfg.Store
		cfg.Store = st
	}}), st
}

// TestChangeOvertaken bans a node while another replica changes the bundle: that is taken over with the ban.
func TestChangeOvertaken(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s, st := startOvertaken(t)
		n := newNode(t, s, "node-1")
		st.other.Store(new(func(j journal.Journal) journal.Journal {
			j.Number++
			return j
		}))
		before := s.CA().Bundle().Generation
		banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: n.pod.NodeUID})
		if after := s.CA().Bundle().Generation; after.Number != before.Number+1 {
			t.Errorf("decided by the record of a generation after %s, with the bundle of %s", before, after)
		}
	})
}

// TestChangeForeign writes nothing over the record of another trust domain.
func TestChangeForeign(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s, st := startOvertaken(t)
		n := newNode(t, s, "node-1")
		st.other.Store(new(func(j journal.Journal) journal.Journal {
			j.TrustDomain = "other.example"
			return j
		}))
		_, err := adminOf(t, s.CA()).BanNode(t.Context(), &apiv1.BanNodeRequest{Node: n.pod.NodeUID})
		wantReason(t, api.FromStatus(err), api.StateForeign)
		if j, _, err := st.Store.Load(t.Context()); err != nil || len(j.Bans) > 0 {
			t.Errorf("stored: %d bans (%v)", len(j.Bans), err)
		}
	})
}
