package store_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
)

var testDomain = spiffeid.RequireTrustDomainFromString("example.org")

func testSealer() *ca.Sealer {
	s, err := ca.NewSealer(bytes.Repeat([]byte{7}, ca.SealKeyBytes))
	if err != nil {
		panic(err)
	}
	return s
}

// stateOf returns what a store holds; nil where there is none, and an empty one where it holds no record.
func stateOf(c store.Config) (*store.Snapshot, error) {
	if _, err := os.Lstat(c.Path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	s, closeStore, err := store.Open(context.Background(), c, false)
	if err != nil {
		return nil, err
	}
	snap, err := store.Snap(context.Background(), s)
	if api.ReasonOf(err) == api.StateMissing {
		var replicas []ca.Replica
		replicas, err = s.Replicas(context.Background())
		snap = store.Snapshot{Replicas: replicas}
	}
	return &snap, errors.Join(err, closeStore())
}

// held is what a store may hold.
func held(t testing.TB) store.Snapshot {
	t.Helper()
	at := time.Date(2026, 11, 1, 2, 3, 4, 0, time.UTC)
	return store.Snapshot{Journal: newJournal(t), Replicas: []ca.Replica{
		{Name: "ca-0", Minted: []ca.Minted{{At: at, NotAfter: at.Add(time.Hour), Root: "ab"}}}, {Name: "ca-1"},
	}}
}

func sealed(t testing.TB, s store.Snapshot) []byte {
	t.Helper()
	data, err := s.Seal(testSealer(), time.Date(2026, 11, 2, 3, 4, 5, 0, time.UTC))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestBackup seals what a store holds and opens it again; what can be read without the key is the header alone.
func TestBackup(t *testing.T) {
	s := held(t)
	data := sealed(t, s)
	got, h, err := store.Unseal(data, testDomain, testSealer())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s, got); diff != "" {
		t.Errorf("another comes back (-want +got):\n%s", diff)
	}
	want := store.BackupHeader{TrustDomain: "example.org", Generation: "1.1", Schema: journal.Schema, At: time.Date(2026, 11, 2, 3, 4, 5, 0, time.UTC)}
	if h != want {
		t.Errorf("header %+v, want %+v", h, want)
	}
	if bytes.Contains(data, []byte("ca-0")) || bytes.Contains(data, s.Journal.Authorities[0].Certificate[:40]) || bytes.Contains(data, []byte("authorities")) {
		t.Error("the content is there to be read")
	}
	if bytes.Equal(data, sealed(t, s)) {
		t.Error("two backups of one store are the same: there is no nonce")
	}
}

// resum puts the checksum right after a change.
func resum(data []byte) []byte {
	end := len(data) - sha256.Size
	sum := sha256.Sum256(data[:end])
	return append(bytes.Clone(data[:end]), sum[:]...)
}

// TestBackupRefused: a backup that was cut off anywhere, in which any bit was changed, with or without its checksum, that is of
// another trust domain, of a later version, or under another key, is refused, each for its own reason.
//
// threat: E06, E07
func TestBackupRefused(t *testing.T) {
	good := sealed(t, held(t))
	step := 1
	if testing.Short() {
		step = 13
	}
	for n := 0; n < len(good); n += step {
		_, _, err := store.Unseal(good[:n], testDomain, testSealer())
		want(t, err, api.BackupDamaged)
	}
	for at := 0; at < len(good); at += step {
		data := bytes.Clone(good)
		data[at] ^= 1 << (at % 8)
		_, _, err := store.Unseal(data, testDomain, testSealer())
		want(t, err, api.BackupDamaged)
		if at < len(good)-sha256.Size { // by somebody who knows the format
			_, _, err := store.Unseal(resum(data), testDomain, testSealer())
			switch r := api.ReasonOf(err); r {
			case api.BackupDamaged, api.SealKeyWrong, api.StateForeign, api.StateNewer:
			default:
				t.Fatalf("byte %d: %v", at, err)
			}
		}
	}
	other, err := ca.NewSealer(bytes.Repeat([]byte{8}, ca.SealKeyBytes))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		data   []byte
		td     string
		sealer *ca.Sealer
		want   api.Reason
	}{
		{"another trust domain", good, "example.com", testSealer(), api.StateForeign},
		{"another key", good, "example.org", other, api.SealKeyWrong},
		{"a later version", resum(bytes.Replace(good, []byte("signet-backup/1\n"), []byte("signet-backup/2\n"), 1)), "example.org", testSealer(), api.StateNewer},
		{"something follows", append(bytes.Clone(good), 0), "example.org", testSealer(), api.BackupDamaged},
		{"another's header", resum(bytes.Replace(good, []byte(`"1.1"`), []byte(`"9.9"`), 1)), "example.org", testSealer(), api.SealKeyWrong},
		{"empty", nil, "example.org", testSealer(), api.BackupDamaged},
		{"a certificate", []byte("-----BEGIN CERTIFICATE-----\n" + strings.Repeat("A", 200)), "example.org", testSealer(), api.BackupDamaged},
		{"too large", append([]byte("signet-backup/1\n"), make([]byte, store.MaxBackup)...), "example.org", testSealer(), api.BackupDamaged},
		{"a record of a newer schema", hand(t, `{"schema":99}`, 99), "example.org", testSealer(), api.StateNewer},
		{"no record", hand(t, `{"schema":1}`, 1), "example.org", testSealer(), api.StateCorrupt},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := store.Unseal(tt.data, spiffeid.RequireTrustDomainFromString(tt.td), tt.sealer)
			want(t, err, tt.want)
		})
	}
}

// hand makes a backup with the right key and any record.
func hand(t testing.TB, record string, schema int) []byte {
	t.Helper()
	header := []byte(`{"trustDomain":"example.org","generation":"1.1","schema":1,"at":"2026-11-02T03:04:05Z"}`)
	if schema != 1 {
		header = bytes.Replace(header, []byte(`"schema":1`), []byte(`"schema":99`), 1)
	}
	data := []byte("signet-backup/1\n")
	for _, part := range [][]byte{header, testSealer().Seal([]byte(`{"journal":`+record+`}`), "signet-backup\x00"+string(header))} {
		data = append(binary.BigEndian.AppendUint32(data, uint32(len(part))), part...)
	}
	return resum(append(data, make([]byte, sha256.Size)...))
}

// FuzzUnseal: whatever comes as a backup is refused with a reason, or is one.
func FuzzUnseal(f *testing.F) {
	good := sealed(f, held(f))
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add(hand(f, `{"schema":1}`, 1))
	f.Add([]byte("signet-backup/1\n\x00\x00\x00\x02{}\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, data := range [][]byte{data, resum(append(bytes.Clone(data), make([]byte, sha256.Size)...))} {
			s, h, err := store.Unseal(data, testDomain, testSealer())
			if err != nil {
				if r := api.ReasonOf(err); r == "" || r == api.Internal {
					t.Fatalf("%v has no reason", err)
				}
				continue
			}
			if err := s.Journal.Validate(); err != nil || h.TrustDomain != testDomain.Name() {
				t.Fatalf("%+v: %v", h, err)
			}
		}
	})
}

// TestRestoredSnapshot adds a replica that may have signed under each trusted root, once, and leaves the others alone.
func TestRestoredSnapshot(t *testing.T) {
	s := held(t)
	now := time.Date(2026, 11, 3, 0, 0, 0, 0, time.UTC)
	told := ca.Restored{By: "uid:7", BackupAt: now.Add(-time.Hour)}
	got, err := s.Restored(told, []api.Generation{{Epoch: 9000, Number: 3}}, now)
	if err == nil {
		got, err = got.Restored(told, nil, now) // and again
	}
	if err != nil {
		t.Fatal(err)
	}
	if g := got.Journal.Generation(); g != (api.Generation{Epoch: 9002, Number: 1}) {
		t.Errorf("generation %s", g)
	}
	lost := ca.Replica{Name: "before-restore-9002", Minted: []ca.Minted{{At: now, NotAfter: now.Add(24 * time.Hour), Root: s.Journal.Authorities[0].ID}},
		Restored: &ca.Restored{At: now, By: "uid:7", Backup: "9001.1", BackupAt: told.BackupAt, Generation: "9002.1"}}
	wanted := slices.Concat([]ca.Replica{lost}, s.Replicas)
	if diff := cmp.Diff(wanted, got.Replicas); diff != "" {
		t.Errorf("the replicas (-want +got):\n%s", diff)
	}
}

// TestPut makes a store from a snapshot, and puts one in the place of another only if that is asked for and nobody uses it.
//
// threat: E08
func TestPut(t *testing.T) {
	ctx, s := t.Context(), held(t)
	c := store.Config{Path: filepath.Join(t.TempDir(), "signet.db")}
	wantHeld := func(path string, s store.Snapshot) {
		t.Helper()
		got, err := stateOf(store.Config{Path: path})
		if err != nil || got == nil || !cmp.Equal(*got, s) {
			t.Fatalf("%v: %s", err, cmp.Diff(&s, got))
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("mode %s (%v)", info.Mode(), err)
		}
	}
	if kept, err := store.Put(ctx, c, s, true); err != nil || kept != "" { // there is nothing to replace
		t.Fatal(kept, err)
	}
	wantHeld(c.Path, s)
	_, err := store.Put(ctx, c, s, false)
	want(t, err, api.StateExists)

	other := held(t)
	_, closeStore := open(t, c)
	_, err = store.Put(ctx, c, other, true)
	want(t, err, api.StateLocked)
	if err := closeStore(); err != nil {
		t.Fatal(err)
	}
	wantHeld(c.Path, s)
	kept, err := store.Put(ctx, c, other, true)
	if err != nil {
		t.Fatal(err)
	}
	wantHeld(c.Path, other)
	wantHeld(kept, s)

	for name, spoil := range map[string]func(path string) error{
		"damaged": func(p string) error { return os.WriteFile(p, []byte("text"), 0o600) },
		"empty":   func(p string) error { return os.WriteFile(p, nil, 0o644) },
	} {
		c := store.Config{Path: filepath.Join(t.TempDir(), name)}
		if err := spoil(c.Path); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Put(ctx, c, s, true); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		wantHeld(c.Path, s)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(c.Path, link); err != nil {
		t.Fatal(err)
	}
	_, err = store.Put(ctx, store.Config{Path: link}, s, true)
	want(t, err, api.FileUnsafe)
	_, err = store.Put(ctx, store.Config{Kind: "etcd"}, s, true)
	want(t, err, api.ConfigInvalid)
	_, err = store.Put(ctx, c, store.Snapshot{}, true)
	want(t, err, api.StateCorrupt)
	wantHeld(c.Path, other)
	left, err := filepath.Glob(filepath.Join(filepath.Dir(c.Path), ".signet-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}

// TestReplacedMeanwhile: who waited for the lock of a store that was replaced meanwhile does not go on with the old one.
func TestReplacedMeanwhile(t *testing.T) {
	c := store.Config{Path: filepath.Join(t.TempDir(), "signet.db")}
	if _, err := store.Put(t.Context(), c, held(t), false); err != nil {
		t.Fatal(err)
	}
	_, closeStore := open(t, c) // holds the lock of the old one
	result := make(chan error, 1)
	go func() {
		_, closeStore, err := store.Open(context.Background(), c, false)
		if err == nil {
			err = closeStore()
		}
		result <- err
	}()
	if err := os.Rename(c.Path, c.Path+".old"); err != nil {
		t.Fatal(err)
	}
	if err := closeStore(); err != nil {
		t.Fatal(err)
	}
	switch err := <-result; api.ReasonOf(err) {
	case api.StateLocked, api.StateMissing: // it came before the rename, or after
	default:
		t.Errorf("%v, want %s or %s", err, api.StateLocked, api.StateMissing)
	}
}

// TestPeek reads a store that is open and written to all the time: each time one of the records that were written, and never an
// older one than before.
func TestPeek(t *testing.T) {
	c := store.Config{Path: filepath.Join(t.TempDir(), "signet.db")}
	_, err := store.Peek(t.Context(), c)
	want(t, err, api.StateMissing)
	s, closeStore := open(t, c)
	_, err = store.Peek(t.Context(), c)
	want(t, err, api.StateMissing)
	j := newJournal(t)
	rev, err := s.Swap(t.Context(), 0, j)
	if err != nil {
		t.Fatal(err)
	}
	rounds := 200
	if testing.Short() {
		rounds = 40
	}
	var writer sync.WaitGroup
	writer.Go(func() {
		for i := range rounds {
			j.Number++
			next, err := s.Swap(t.Context(), rev, j)
			if err == nil { // large and small, so that pages are freed and taken again
				err = s.SaveReplica(t.Context(), ca.Replica{Name: "ca-0", Minted: make([]ca.Minted, 1+i%3*100)})
			}
			if err != nil {
				t.Error(err)
				return
			}
			rev = next
		}
	})
	last, reads := uint32(0), 0
	for last < uint32(rounds) && !t.Failed() {
		got, err := store.Peek(t.Context(), c)
		if api.ReasonOf(err) == api.StateConflict { // a busy machine
			continue
		}
		if err != nil {
			t.Error(err)
			break
		}
		if got.Journal.Number < last || len(got.Replicas) > 1 {
			t.Errorf("number %d after %d, %d replicas", got.Journal.Number, last, len(got.Replicas))
			break
		}
		last, reads = got.Journal.Number, reads+1
	}
	writer.Wait()
	t.Logf("read %d times", reads)
	before, err := os.ReadFile(c.Path)
	if err != nil {
		t.Fatal(err)
	}
	got, err := store.Peek(t.Context(), c)
	if err != nil || got.Journal.Number != j.Number {
		t.Errorf("number %d, want %d (%v)", got.Journal.Number, j.Number, err)
	}
	if after, err := os.ReadFile(c.Path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the file was changed (%v)", err)
	}
	if err := closeStore(); err != nil {
		t.Fatal(err)
	}
	_, err = store.Peek(t.Context(), store.Config{Kind: "etcd"})
	want(t, err, api.ConfigInvalid)
	if err := os.Chmod(c.Path, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = store.Peek(t.Context(), c)
	want(t, err, api.FileUnsafe)
}
