//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// newJournal returns a valid record.
func newJournal() (journal.Journal, error) {
	key, err := issuance.GenerateKey(issuance.KeyP256)
	if err != nil {
		return journal.Journal{}, err
	}
	root, err := issuance.NewRoot(td, key, 24*time.Hour, time.Now())
	if err != nil {
		return journal.Journal{}, err
	}
	return journal.New(td, journal.Authority{ID: hex.EncodeToString(root.SubjectKeyId), Certificate: root.Raw, SealedKey: []byte("sealed")})
}

// script carries steps out and says of each that it is tried, that it is done, or why it is not. A step that changed
// nothing is tried once more, as its caller would; an unknown outcome is the end.
type script struct{}

func (script) step(name string, f func() error) {
	for attempt := range 2 {
		fmt.Println("try", name)
		err := f()
		if err == nil {
			fmt.Println("done", name)
			return
		}
		fmt.Println("fail", name, api.ReasonOf(err), err)
		if attempt > 0 || api.ReasonOf(err) == api.StateUnknown {
			os.Exit(1)
		}
	}
}

// storeChild makes a store and writes three records and two replicas, each larger than the one before.
func storeChild(dir string) {
	ctx := context.Background()
	j, err := newJournal()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	var s ca.Store
	var closeStore func() error
	var do script
	do.step("create", func() (err error) {
		s, closeStore, err = store.Open(ctx, store.Config{Path: filepath.Join(dir, "signet.db")}, true)
		return err
	})
	replica := ca.Replica{Name: "ca-0"}
	for n := range 3 {
		j.Number = uint32(n + 1)
		do.step("record", func() error {
			_, err := s.Swap(ctx, ca.Revision(n), j)
			return err
		})
		replica.Minted = append(replica.Minted, ca.Minted{At: time.Now(), NotAfter: time.Now(), Root: strings.Repeat("a", 4000)})
		do.step("replica", func() error { return s.SaveReplica(ctx, replica) })
	}
	do.step("close", func() error { return closeStore() })
}

// told is what a child said about the steps of one name.
type told struct{ tried, done, unknown int }

// outcomes returns how many writes are at least, and at most, on disk.
func (o told) outcomes() (least, most int) { return o.done, o.done + o.unknown }

// tell counts the steps of a name. One that was tried and of which nothing more was said has an unknown outcome.
func tell(said, name string) (o told) {
	open := false
	for line := range strings.Lines(said) {
		f := strings.Fields(line)
		if len(f) < 2 || f[1] != name {
			continue
		}
		switch f[0] {
		case "try":
			o.tried++
			open = true
		case "done":
			o.done++
			open = false
		case "fail":
			open = len(f) > 2 && f[2] == string(api.StateUnknown)
		}
	}
	if open {
		o.unknown = 1
	}
	return o
}

func judgeStore(r run) error {
	ctx := context.Background()
	cfg := store.Config{Path: filepath.Join(r.dir, "signet.db")}
	if strings.Contains(r.said, string(api.StateCorrupt)) {
		return fmt.Errorf("a disk that fails was taken for a damaged store")
	}
	if (r.code == 1) != strings.Contains(r.said, "fail ") && r.code != 0 {
		return fmt.Errorf("it failed without a word")
	}
	s, closeStore, err := store.Open(ctx, cfg, false)
	if api.ReasonOf(err) == api.StateMissing && tell(r.said, "create").done == 0 {
		s, closeStore, err = store.Open(ctx, cfg, true) // nothing was made: make it now
	}
	if err != nil {
		return fmt.Errorf("opening the store again: %w", err)
	}
	defer func() { closeStore() }()
	least, most := tell(r.said, "record").outcomes()
	j, rev, err := s.Load(ctx)
	switch {
	case err != nil && (api.ReasonOf(err) != api.StateMissing || least > 0):
		return fmt.Errorf("the record: %w", err)
	case int(rev) < least || int(rev) > most:
		return fmt.Errorf("the record has revision %d, want %d to %d", rev, least, most)
	case int(j.Number) != int(rev):
		return fmt.Errorf("record number %d under revision %d", j.Number, rev)
	}
	least, most = tell(r.said, "replica").outcomes()
	replica, err := ca.ReplicaOf(ctx, s, "ca-0")
	if err != nil || len(replica.Minted) < least || len(replica.Minted) > most {
		return fmt.Errorf("the replica holds %d, want %d to %d: %v", len(replica.Minted), least, most, err)
	}
	// It goes on.
	if j, err = newJournal(); err != nil {
		return err
	}
	next, err := s.Swap(ctx, rev, j)
	if err != nil || next != rev+1 {
		return fmt.Errorf("the next record: revision %d after %d, %v", next, rev, err)
	}
	return nil
}

// TestStore proves every call of the bolt store: after a kill or an error at any of them the store opens and holds the
// record before or the one after, what was acknowledged is there, and what failed without an unknown outcome is not.
//
// threat: E01, E03
func TestStore(t *testing.T) {
	subject{
		run:   func(t testing.TB, w *warden) (int, string) { return child(t, w, "store", w.root) },
		judge: judgeStore,
	}.enumerate(t)
}

// lookChild opens the store that is there and reads its record.
func lookChild(dir string) {
	s, closeStore, err := store.Open(context.Background(), store.Config{Path: filepath.Join(dir, "signet.db")}, false)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("open")
	_, rev, err := s.Load(context.Background())
	fmt.Println("revision", rev, api.ReasonOf(err), closeStore())
}

// TestStoreSettles proves that what a killed process left is made durable by the next one before it is built on: a reader
// sees pages that are in the kernel's memory alone, and names whose folder was never synced.
func TestStoreSettles(t *testing.T) {
	for _, last := range []string{"unlinkat", "pwrite64"} {
		t.Run("killed behind "+last, func(t *testing.T) {
			dir := folder(t)
			var before call
			w := &warden{root: dir, decide: func(c call) (act, unix.Errno) {
				if last == before.name && c.sync() && (last == "unlinkat" || c.n > 40) || before.name == "unlinkat" && c.name == "openat" && last == "unlinkat" {
					return die, 0
				}
				before = c
				return pass, 0
			}}
			if code, said := child(t, w, "store", dir); code != -1 {
				t.Fatalf("it ended with %d:\n%s", code, said)
			}
			w = &warden{root: dir, decide: func(call) (act, unix.Errno) { return pass, 0 }}
			code, said := child(t, w, "look", dir)
			if code != 0 || !strings.Contains(said, "revision") {
				t.Fatalf("it ended with %d:\n%s", code, said)
			}
			file, name := false, false
			for _, c := range w.seen() {
				file = file || c.sync() && c.file == "signet.db"
				name = name || c.sync() && c.file == "."
			}
			if !file || !name {
				t.Errorf("synced: the file %t, its name %t; the calls were %v", file, name, w.seen())
			}
		})
	}
}
