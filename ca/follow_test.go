package ca_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
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
