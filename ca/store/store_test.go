package store_test

import (
	"context"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/internal/canary"
)

// setups returns, for each driver, the configuration of a store that does not exist yet.
var setups = map[string]func(t *testing.T) store.Config{
	"bolt": func(t *testing.T) store.Config {
		return store.Config{Kind: "bolt", Path: filepath.Join(t.TempDir(), "signet.db")}
	},
}

// TestConformance holds every driver to the contract of ca.Store.
func TestConformance(t *testing.T) {
	for _, kind := range store.Kinds() {
		setup, ok := setups[kind]
		if !ok {
			t.Errorf("driver %s has no setup here", kind)
			continue
		}
		for name, test := range map[string]func(*testing.T, store.Config){
			"absent": absent, "create": create, "swap": swap, "concurrent swaps": concurrentSwaps, "invalid": invalid,
			"reopen": reopen, "replicas": replicas, "concurrent replicas": concurrentReplicas, "closed": closed,
		} {
			t.Run(kind+"/"+name, func(t *testing.T) { test(t, setup(t)) })
		}
	}
}

func newJournal(t testing.TB) journal.Journal {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	root, err := issuance.NewRoot(td, key, 24*time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	j, err := journal.New(td, journal.Authority{ID: hex.EncodeToString(root.SubjectKeyId), Certificate: root.Raw, SealedKey: []byte("sealed")})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// open opens a store that must open; it is closed with the test.
func open(t testing.TB, c store.Config) (ca.Store, func() error) {
	t.Helper()
	s, closeStore, err := store.Open(context.Background(), c, true)
	if err != nil {
		t.Fatal(err)
	}
	once := sync.OnceValue(closeStore)
	t.Cleanup(func() { once() })
	return s, once
}

func want(t testing.TB, err error, r api.Reason) {
	t.Helper()
	if api.ReasonOf(err) != r || err == nil {
		t.Fatalf("%v, want %s", err, r)
	}
}

func absent(t *testing.T, c store.Config) {
	for range 2 { // asking makes nothing
		_, _, err := store.Open(t.Context(), c, false)
		want(t, err, api.StateMissing)
	}
	s, _ := open(t, c)
	_, rev, err := s.Load(t.Context())
	want(t, err, api.StateMissing)
	if rev != 0 {
		t.Errorf("revision %d of nothing", rev)
	}
	_, err = s.Swap(t.Context(), 7, newJournal(t))
	want(t, err, api.StateConflict)
	_, _, err = s.Load(t.Context())
	want(t, err, api.StateMissing)
}

func create(t *testing.T, c store.Config) {
	s, _ := open(t, c)
	j := newJournal(t)
	rev, err := s.Swap(t.Context(), 0, j)
	if err != nil || rev == 0 {
		t.Fatalf("revision %d (%v)", rev, err)
	}
	_, err = s.Swap(t.Context(), 0, newJournal(t))
	want(t, err, api.StateConflict)
	wantLoad(t, s, j, rev)
}

func wantLoad(t *testing.T, s ca.Store, j journal.Journal, rev ca.Revision) {
	t.Helper()
	got, at, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(j, got); diff != "" || at != rev {
		t.Errorf("revision %d, want %d; the journal (-want +got):\n%s", at, rev, diff)
	}
}

func swap(t *testing.T, c store.Config) {
	s, _ := open(t, c)
	j := newJournal(t)
	seen := map[ca.Revision]bool{0: true}
	var rev ca.Revision
	for i := range 20 {
		j.Number = uint32(i + 1)
		old := rev
		var err error
		if rev, err = s.Swap(t.Context(), old, j); err != nil || seen[rev] {
			t.Fatalf("change %d: revision %d (%v)", i, rev, err)
		}
		seen[rev] = true
		for _, stale := range []ca.Revision{old, 0, rev + 1} {
			other := j
			other.Number = 1000
			_, err := s.Swap(t.Context(), stale, other)
			want(t, err, api.StateConflict)
		}
		wantLoad(t, s, j, rev)
	}
}

func concurrentSwaps(t *testing.T, c store.Config) {
	s, _ := open(t, c)
	var rev ca.Revision
	for round := range 5 {
		var wg sync.WaitGroup
		var winner atomic.Uint64
		var won atomic.Int32
		for i := range 8 {
			j := newJournal(t)
			j.Number = uint32(100*round + i + 1)
			wg.Go(func() {
				next, err := s.Swap(t.Context(), rev, j)
				switch {
				case err == nil:
					won.Add(1)
					winner.Store(uint64(next)<<32 | uint64(j.Number))
				case api.ReasonOf(err) != api.StateConflict:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Fatalf("%d of 8 writers won", won.Load())
		}
		j, at, err := s.Load(t.Context())
		if err != nil || uint64(at)<<32|uint64(j.Number) != winner.Load() {
			t.Fatalf("loaded number %d at %d (%v), another one won", j.Number, at, err)
		}
		rev = at
	}
}

func invalid(t *testing.T, c store.Config) {
	s, _ := open(t, c)
	j := newJournal(t)
	rev, err := s.Swap(t.Context(), 0, j)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []journal.Journal{{}, {Schema: journal.Schema + 1}} {
		if _, err := s.Swap(t.Context(), rev, bad); err == nil {
			t.Error("a record that nobody could read was written")
		}
	}
	wantLoad(t, s, j, rev)
}

func reopen(t *testing.T, c store.Config) {
	s, closeStore := open(t, c)
	j := newJournal(t)
	rev, err := s.Swap(t.Context(), 0, j)
	if err != nil {
		t.Fatal(err)
	}
	r := ca.Replica{Name: "ca-0", Minted: []ca.Minted{{At: time.Unix(1, 2).UTC(), NotAfter: time.Unix(3, 0).UTC(), Root: "aa"}}}
	if err := s.SaveReplica(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	for _, create := range []bool{false, true} { // create makes nothing anew
		if err := closeStore(); err != nil {
			t.Fatal(err)
		}
		s, closeStore, err = store.Open(t.Context(), c, create)
		if err != nil {
			t.Fatal(err)
		}
		wantLoad(t, s, j, rev)
		wantReplica(t, s, r)
	}
	next, err := s.Swap(t.Context(), rev, j)
	if err != nil || next == rev {
		t.Errorf("revision %d after %d (%v)", next, rev, err)
	}
	if err := closeStore(); err != nil {
		t.Fatal(err)
	}
}

func wantReplica(t *testing.T, s ca.Store, want ca.Replica) {
	t.Helper()
	got, err := ca.ReplicaOf(t.Context(), s, want.Name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("replica (-want +got):\n%s", diff)
	}
}

func replicas(t *testing.T, c store.Config) {
	s, _ := open(t, c)
	wantReplica(t, s, ca.Replica{Name: "never saved"})
	if all, err := s.Replicas(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("%d replicas saved nothing (%v)", len(all), err)
	}
	minted := ca.Minted{At: time.Unix(1, 2).UTC(), NotAfter: time.Unix(3, 0).UTC(), Root: "aa"}
	one := ca.Replica{Name: "ca-0", Minted: []ca.Minted{minted}}
	two := ca.Replica{Name: "ca-1", Minted: []ca.Minted{minted, minted}}
	for _, r := range []ca.Replica{one, two} {
		if err := s.SaveReplica(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	wantReplica(t, s, one)
	wantReplica(t, s, two)
	one.Minted = nil
	one.Clusters = map[string]ca.Sight{"https://a": {Seen: time.Unix(5, 6).UTC()}, "https://b": {Seen: time.Unix(7, 0).UTC(), Since: time.Unix(4, 0).UTC()}}
	if err := s.SaveReplica(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	wantReplica(t, s, one)
	wantReplica(t, s, two)
	last := ca.Replica{Name: "ca-10"} // by name, not by number
	if err := s.SaveReplica(t.Context(), last); err != nil {
		t.Fatal(err)
	}
	all, err := s.Replicas(t.Context())
	if diff := cmp.Diff([]ca.Replica{one, two, last}, all); err != nil || diff != "" {
		t.Errorf("replicas (%v) (-want +got):\n%s", err, diff)
	}
	_, _, err = s.Load(t.Context())
	want(t, err, api.StateMissing) // a replica's record is not the journal
}

func concurrentReplicas(t *testing.T, c store.Config) {
	s, _ := open(t, c)
	var wg sync.WaitGroup
	for i := range 8 {
		name := fmt.Sprint("ca-", i)
		wg.Go(func() {
			for n := range 5 {
				r := ca.Replica{Name: name, Minted: make([]ca.Minted, n+1)}
				if err := s.SaveReplica(t.Context(), r); err != nil {
					t.Error(err)
				}
				got, err := ca.ReplicaOf(t.Context(), s, name)
				if err != nil || len(got.Minted) != n+1 {
					t.Errorf("%s: %d entries (%v), want %d", name, len(got.Minted), err, n+1)
				}
			}
		})
	}
	wg.Wait()
}

func closed(t *testing.T, c store.Config) {
	s, closeStore := open(t, c)
	if err := closeStore(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Load(t.Context()); err == nil {
		t.Error("a closed store loads")
	}
	if _, err := s.Swap(t.Context(), 0, newJournal(t)); err == nil {
		t.Error("a closed store swaps")
	}
	if _, err := ca.ReplicaOf(t.Context(), s, "x"); err == nil {
		t.Error("a closed store reads replicas")
	}
	if err := s.SaveReplica(t.Context(), ca.Replica{Name: "x"}); err == nil {
		t.Error("a closed store saves replicas")
	}
}

func TestOpenRefuses(t *testing.T) {
	_, _, err := store.Open(t.Context(), store.Config{Kind: "sqlite"}, true)
	want(t, err, api.ConfigInvalid)
	_, _, err = store.Open(t.Context(), store.Config{}, true) // bolt, without its path
	want(t, err, api.ConfigInvalid)
}

func TestRegisterTwice(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a driver was replaced")
		}
	}()
	store.Register("bolt", nil)
}
