package store_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/store"
)

// filled makes a store with a record and a replica in it, closed, and returns its configuration.
func filled(t testing.TB) store.Config {
	t.Helper()
	c := store.Config{Path: filepath.Join(t.TempDir(), "signet.db")}
	s, closeStore := open(t, c)
	if _, err := s.Swap(context.Background(), 0, newJournal(t)); err != nil {
		t.Fatal(err)
	}
	if err := s.SaveReplica(context.Background(), ca.Replica{Name: "ca-0", Minted: make([]ca.Minted, 40)}); err != nil {
		t.Fatal(err)
	}
	if err := closeStore(); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestBoltLocked: a store is opened by one process. The next one is refused, and does not wait for ever.
//
// threat: E08
func TestBoltLocked(t *testing.T) {
	c := filled(t)
	open(t, c)
	began := time.Now()
	_, _, err := store.Open(t.Context(), c, false)
	want(t, err, api.StateLocked)
	if d := time.Since(began); d > 30*time.Second {
		t.Errorf("the second one waited %s", d)
	}
}

// TestBoltPlace refuses a file that others could read or that is none.
func TestBoltPlace(t *testing.T) {
	for _, tt := range []struct {
		name string
		make func(t *testing.T, path string) error
		want api.Reason
	}{
		{"readable by all", func(_ *testing.T, p string) error { return os.Chmod(p, 0o644) }, api.FileUnsafe},
		{"readable by the group", func(_ *testing.T, p string) error { return os.Chmod(p, 0o640) }, api.FileUnsafe},
		{"writable by all", func(_ *testing.T, p string) error { return os.Chmod(p, 0o602) }, api.FileUnsafe},
		{"a link", func(_ *testing.T, p string) error {
			return errors.Join(os.Rename(p, p+".real"), os.Symlink(p+".real", p))
		}, api.FileUnsafe},
		{"a link to nothing", func(_ *testing.T, p string) error {
			return errors.Join(os.Remove(p), os.Symlink(p+".gone", p))
		}, api.FileUnsafe},
		{"a folder", func(_ *testing.T, p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) }, api.FileUnsafe},
		{"a pipe", func(_ *testing.T, p string) error { return errors.Join(os.Remove(p), syscall.Mkfifo(p, 0o600)) }, api.FileUnsafe},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := filled(t)
			if err := tt.make(t, c.Path); err != nil {
				t.Fatal(err)
			}
			for _, create := range []bool{false, true} {
				_, _, err := store.Open(t.Context(), c, create)
				want(t, err, tt.want)
			}
			if _, err := os.Lstat(c.Path + ".gone"); !errors.Is(err, fs.ErrNotExist) {
				t.Error("something was made behind the link")
			}
		})
	}
}

// TestBoltMode makes the file for its owner alone, whatever the umask.
func TestBoltMode(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	info, err := os.Stat(filled(t).Path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %s (%v)", info.Mode(), err)
	}
}

// contents returns a small store's file without the room that it has reserved behind.
func contents(t *testing.T, c store.Config) []byte {
	t.Helper()
	data, err := os.ReadFile(c.Path)
	if err != nil {
		t.Fatal(err)
	}
	const used = 32 << 10 // what bbolt begins with
	if len(bytes.Trim(data[used:], "\x00")) > 0 {
		t.Fatal("there is more in it than a small store needs")
	}
	return data[:used]
}

// TestBoltForeign refuses what is no store of ours, and leaves it as it is: a new store in its place would be a new root.
//
// threat: E07
func TestBoltForeign(t *testing.T) {
	good := contents(t, filled(t))
	page := os.Getpagesize()
	flipped := bytes.Clone(good)
	for i := range 2 * page { // both meta pages
		flipped[i] ^= 0xff
	}
	for name, data := range map[string][]byte{
		"empty":           {},
		"one byte":        {0},
		"text":            []byte(strings.Repeat("# configuration\n", 4096)),
		"zeros":           make([]byte, len(good)),
		"cut to a page":   good[:page],
		"cut to metas":    good[:2*page],
		"cut to half":     good[:len(good)/2],
		"no metas":        append(make([]byte, 2*page), good[2*page:]...),
		"metas flipped":   flipped,
		"another's store": otherBolt(t),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "signet.db")
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			for _, create := range []bool{false, true} {
				_, _, err := store.Open(t.Context(), store.Config{Path: path}, create)
				want(t, err, api.StateCorrupt)
				if strings.Contains(fmt.Sprint(err), "runtime error") {
					t.Errorf("that is nothing to tell people: %v", err)
				}
			}
			after, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(after, data) {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
}

// otherBolt returns a bolt file with buckets that are not ours.
func otherBolt(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "other.db")
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucket([]byte("journal"))
		return err
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestBoltDamage changes the file byte by byte. Whatever becomes of it, nothing panics, nothing hangs, and what is read is
// the record as it was written, or damage.
//
// threat: E07
func TestBoltDamage(t *testing.T) {
	c := filled(t)
	good := contents(t, c)
	dir := filepath.Dir(c.Path)
	if fast, err := os.MkdirTemp("/dev/shm", "signet-test-"); err == nil { // thousands of fsyncs are not what is tested
		t.Cleanup(func() { os.RemoveAll(fast) })
		dir = fast
	}
	s, closeStore := open(t, c)
	wanted, _, err := s.Load(t.Context())
	if err := errors.Join(err, closeStore()); err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	step := 7
	if testing.Short() {
		step = 61
	}
	found := map[api.Reason]int{}
	for at := 0; at < len(good); at += step {
		if at%page > 256 && at%31 != 0 { // headers and elements; of the rest a sample
			continue
		}
		for _, change := range []func(byte) byte{
			func(b byte) byte { return b ^ 1 }, func(b byte) byte { return b ^ 0x80 }, func(byte) byte { return 0xff }, func(byte) byte { return 0 },
		} {
			data := bytes.Clone(good)
			if data[at] = change(data[at]); data[at] == good[at] {
				continue
			}
			path := filepath.Join(dir, "damaged.db")
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			s, closeStore, err := store.Open(t.Context(), store.Config{Path: path}, true)
			if err != nil {
				want(t, err, api.StateCorrupt)
				found[api.StateCorrupt]++
				continue
			}
			j, rev, err := s.Load(t.Context())
			if err == nil {
				if diff := cmp.Diff(wanted, j); diff != "" || rev != 1 {
					t.Fatalf("byte %d: loaded revision %d, the record (-want +got):\n%s", at, rev, diff)
				}
				found["GOOD"]++
			} else {
				if api.ReasonOf(err) != api.StateNewer { // the one byte of the schema
					want(t, err, api.StateCorrupt)
				}
				found[api.ReasonOf(err)]++
			}
			ca.ReplicaOf(t.Context(), s, "ca-0")
			s.SaveReplica(t.Context(), ca.Replica{Name: "ca-1"})
			if err := closeStore(); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("what came of it: %v", found)
	if found[api.StateCorrupt] == 0 || found["GOOD"] == 0 {
		t.Error("one of the two was not seen")
	}
}

// TestBoltRecord damages what is in the file and leaves the file good.
func TestBoltRecord(t *testing.T) {
	record, revision := []byte("record"), []byte("revision")
	for _, tt := range []struct {
		name   string
		change func(b *bbolt.Bucket) error
		want   api.Reason
	}{
		{"no revision", func(b *bbolt.Bucket) error { return b.Delete(revision) }, api.StateCorrupt},
		{"no record", func(b *bbolt.Bucket) error { return b.Delete(record) }, api.StateCorrupt},
		{"neither", func(b *bbolt.Bucket) error { return errors.Join(b.Delete(record), b.Delete(revision)) }, api.StateCorrupt},
		{"something else", func(b *bbolt.Bucket) error {
			return errors.Join(b.Delete(record), b.Delete(revision), b.SetSequence(0), b.Put([]byte("recore"), []byte("{}")))
		}, api.StateCorrupt},
		{"another revision", func(b *bbolt.Bucket) error { return b.SetSequence(7) }, api.StateCorrupt},
		{"revision 0", func(b *bbolt.Bucket) error { return b.SetSequence(0) }, api.StateCorrupt},
		{"short revision", func(b *bbolt.Bucket) error { return b.Put(revision, []byte{1}) }, api.StateCorrupt},
		{"another record", func(b *bbolt.Bucket) error {
			return b.Put(record, bytes.Replace(b.Get(record), []byte(`"number":1`), []byte(`"number":2`), 1))
		}, api.StateCorrupt},
		{"of a newer build", func(b *bbolt.Bucket) error {
			return putRecord(b, []byte(`{"schema":99,"more":1}`))
		}, api.StateNewer},
		{"of a newer build that seals in another way", func(b *bbolt.Bucket) error {
			return errors.Join(b.Put(record, []byte(`{"schema":99}`)), b.Put(revision, []byte("new")), b.SetSequence(0))
		}, api.StateNewer},
		{"no JSON", func(b *bbolt.Bucket) error { return putRecord(b, []byte("x")) }, api.StateCorrupt},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := filled(t)
			db, err := bbolt.Open(c.Path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			err = db.Update(func(tx *bbolt.Tx) error {
				return errors.Join(tt.change(tx.Bucket([]byte("journal"))), tx.Bucket([]byte("replicas")).Put([]byte("ca-0"), []byte("[")))
			})
			if err := errors.Join(err, db.Close()); err != nil {
				t.Fatal(err)
			}
			s, _ := open(t, c)
			_, _, err = s.Load(t.Context())
			want(t, err, tt.want)
			_, err = ca.ReplicaOf(t.Context(), s, "ca-0")
			want(t, err, api.StateCorrupt)
			for _, old := range []ca.Revision{0, 1, 7} { // what cannot be read is not written over
				_, err := s.Swap(t.Context(), old, newJournal(t))
				want(t, err, tt.want)
			}
		})
	}
}

// putRecord writes a record as Swap does.
func putRecord(b *bbolt.Bucket, data []byte) error {
	head := binary.BigEndian.AppendUint64(nil, 1)
	sum := sha256.Sum256(append(bytes.Clone(head), data...))
	return errors.Join(b.Put([]byte("record"), data), b.Put([]byte("revision"), append(head, sum[:]...)), b.SetSequence(1))
}

// TestBoltCommitFails has the disk full at the commit: nobody can know what was kept.
func TestBoltCommitFails(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no /dev/full here")
	}
	c := filled(t)
	s, _ := open(t, c)
	j, rev, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	restore := breakFile(t, c.Path)
	_, err = s.Swap(t.Context(), rev, j)
	want(t, err, api.StateUnknown)
	want(t, s.SaveReplica(t.Context(), ca.Replica{Name: "ca-0"}), api.StateUnknown)
	restore()
}

// breakFile makes every write to an open file fail as on a full disk, until restore is called.
func breakFile(t *testing.T, path string) (restore func()) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range fds {
		var fd int
		fmt.Sscan(e.Name(), &fd)
		if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); target != path {
			continue
		}
		full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer full.Close()
		kept, err := syscall.Dup(fd)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Dup3(int(full.Fd()), fd, syscall.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := errors.Join(syscall.Dup3(kept, fd, syscall.O_CLOEXEC), syscall.Close(kept)); err != nil {
				t.Error(err)
			}
		}
	}
	t.Fatal("the store's file is not open")
	return nil
}

// TestMain is also the process that is killed.
// TestBoltRace makes one store from many sides at once: all end up with the same one, or find it in use.
func TestBoltRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "signet.db")
	errs := make(chan error, 4)
	for range cap(errs) {
		go func() {
			_, closeStore, err := store.Open(context.Background(), store.Config{Path: path}, true)
			if err == nil {
				err = closeStore()
			}
			errs <- err
		}()
	}
	for range cap(errs) {
		if err := <-errs; err != nil && api.ReasonOf(err) != api.StateLocked {
			t.Error(err)
		}
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(left) != 1 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}
