package ca_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
)

// firstStore is a ca.Store that holds what Init writes.
type firstStore struct {
	memoryStore
	load, swap error
	swaps      int
}

// Load implements ca.Store.
func (s *firstStore) Load(ctx context.Context) (journal.Journal, ca.Revision, error) {
	if s.load != nil {
		return journal.Journal{}, 0, s.load
	}
	return s.memoryStore.Load(ctx)
}

// Swap implements ca.Store.
func (s *firstStore) Swap(_ context.Context, old ca.Revision, j journal.Journal) (ca.Revision, error) {
	if s.swaps++; s.swap != nil {
		return 0, s.swap
	}
	if old != 0 {
		return 0, api.E(api.StateConflict, "not the first")
	}
	s.journal = j
	return 1, nil
}

// founder is a ca.Founder that always finds the same root.
type founder struct {
	root  journal.Authority
	fail  error
	found int
}

// Found implements ca.Founder.
func (f *founder) Found(context.Context, spiffeid.TrustDomain, time.Time) (journal.Authority, error) {
	f.found++
	return f.root, f.fail
}

// TestInit makes one root, once, where there is none.
//
// spiffe: ID-09
func TestInit(t *testing.T) {
	broken := errors.New("broken")
	for _, tt := range []struct {
		name                    string
		change                  func(*firstStore, *founder, *published)
		want                    api.Reason // empty: a root is made; Internal: broken
		found, swaps, published int
	}{
		{"nothing there", func(*firstStore, *founder, *published) {}, "", 1, 1, 1},
		{"a record", func(s *firstStore, _ *founder, _ *published) { s.journal.Schema = 1 }, api.StateExists, 0, 0, 0},
		{"a damaged record", func(s *firstStore, _ *founder, _ *published) { s.load = api.E(api.StateCorrupt, "x") }, api.StateCorrupt, 0, 0, 0},
		{"a newer record", func(s *firstStore, _ *founder, _ *published) { s.load = api.E(api.StateNewer, "x") }, api.StateNewer, 0, 0, 0},
		{"a store that is away", func(s *firstStore, _ *founder, _ *published) { s.load = broken }, api.Internal, 0, 0, 0},
		{"a published bundle", func(_ *firstStore, _ *founder, p *published) { p.there = true }, api.BundlePublished, 0, 0, 0},
		{"no root to be had", func(_ *firstStore, f *founder, _ *published) { f.fail = broken }, api.Internal, 1, 0, 0},
		{"a root that is none", func(_ *firstStore, f *founder, _ *published) { f.root.ID = "00" }, api.StateCorrupt, 1, 0, 0},
		{"another was first", func(s *firstStore, _ *founder, _ *published) { s.swap = api.E(api.StateConflict, "x") }, api.StateConflict, 1, 1, 0},
		{"a write of unknown outcome", func(s *firstStore, _ *founder, _ *published) { s.swap = api.E(api.StateUnknown, "x") }, api.StateUnknown, 1, 1, 0},
		{"nowhere to publish", func(_ *firstStore, _ *founder, p *published) { p.fail = broken }, api.Internal, 1, 1, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			made := newBare(t, nil).store.journal
			s, f, p := &firstStore{}, &founder{root: made.Authorities[0]}, &published{}
			tt.change(s, f, p)
			b, err := ca.Init(t.Context(), exampleOrg, s, f, p, nil)
			if tt.want != "" {
				wantReason(t, err, tt.want)
			} else {
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(made, s.journal); diff != "" {
					t.Errorf("the record (-want +got):\n%s", diff)
				}
				if got := p.all(); b.Generation.String() != "1.1" || len(b.Roots) != 1 || got[0] != b {
					t.Errorf("the bundle is %+v", b)
				}
			}
			if f.found != tt.found || s.swaps != tt.swaps || len(p.got) != tt.published {
				t.Errorf("%d roots made, %d writes, %d times published; want %d, %d, %d", f.found, s.swaps, len(p.got), tt.found, tt.swaps, tt.published)
			}
		})
	}
}
