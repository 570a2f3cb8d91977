package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/durable"
)

func init() { Register("bolt", openBolt) }

// boltStore is the embedded default: one file, one replica.
type boltStore struct{ db *bbolt.DB }

var (
	bucketJournal  = []byte("journal") // keys "record" and "revision"; its sequence is the revision too
	bucketReplicas = []byte("replicas")
	keyRecord      = []byte("record")
	keyRevision    = []byte("revision")
)

// openBolt opens the file, or with create makes it: in a temporary file that is synced and renamed, since bbolt's own
// creation does not survive a power failure.
func openBolt(_ context.Context, c Config, create bool) (ca.Store, func() error, error) {
	if c.Path == "" {
		return nil, nil, api.E(api.ConfigInvalid, "store.path is required for bolt")
	}
	db, err := openFile(c.Path)
	if create && errors.Is(err, fs.ErrNotExist) {
		if err := createBolt(c.Path); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, nil, fmt.Errorf("creating the store: %w", err)
		}
		db, err = openFile(c.Path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, api.E(api.StateMissing, "there is no store at %s", c.Path)
	}
	if err != nil {
		return nil, nil, err
	}
	return &boltStore{db}, db.Close, nil
}

// openFile opens an existing file and reads all of it: what is damaged is found now, not in the middle of a rotation.
func openFile(path string) (*bbolt.DB, error) {
	db, file, err := openWhole(path, openPrivate)
	if err != nil {
		return nil, err
	}
	if err := inPlace(file, path); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	// A full disk must end nothing but issuance, and a commit that finds no room ends the process. Without the room, or
	// where a file system cannot reserve it, the commit itself will tell.
	_ = durable.Reserve(file, reserved)
	if err := settle(db); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// inPlace refuses a file that was replaced by a restore while its lock was waited for: what is written to it is lost.
func inPlace(file *os.File, path string) error {
	locked, err := file.Stat()
	if err != nil {
		return err
	}
	there, err := os.Lstat(path)
	if err != nil || !os.SameFile(locked, there) {
		return errors.Join(api.E(api.StateLocked, "the store %s was replaced while it was opened", path), ignoreMissing(err))
	}
	return nil
}

// openWhole opens what open returns as the store at path, and reads all of it. bbolt panics on some damage and faults on a file
// that was cut off; that is StateCorrupt like any other.
func openWhole(path string, open func(string, int, fs.FileMode) (*os.File, error)) (db *bbolt.DB, file *os.File, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = api.E(api.StateCorrupt, "the store %s is damaged: %s", path, toldBy(p))
			// bbolt's mapping is lost, and would keep the lock beyond the end of the file.
			db, err = nil, errors.Join(err, syscall.Flock(int(file.Fd()), syscall.LOCK_UN), file.Close())
		}
	}()
	db, err = bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout: time.Second,
		OpenFile: func(name string, flag int, perm fs.FileMode) (*os.File, error) {
			file, err = open(name, flag, perm)
			return file, err
		},
	})
	_, known := errors.AsType[*api.Error](err)
	_, failed := errors.AsType[syscall.Errno](err) // of the lock and the sync too, which have no path
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, nil, api.E(api.StateLocked, "the store %s is in use by another process", path)
	case known || errors.Is(err, fs.ErrNotExist):
		return nil, nil, err
	case failed:
		return nil, nil, fmt.Errorf("the store %s cannot be opened: %w", path, err)
	case err != nil:
		return nil, nil, api.Wrap(api.StateCorrupt, err, fmt.Sprintf("the store %s cannot be opened: %v", path, err))
	}
	if err := db.View(check); err != nil {
		return nil, nil, errors.Join(api.E(api.StateCorrupt, "the store %s is damaged: %v", path, err), db.Close())
	}
	return db, file, nil
}

// reserved is the room that the file has from the start: for records many times larger than they are.
const reserved = 1 << 20

// settle makes durable what was read: the last commit, and the file's very name, of a process that was killed before its
// sync, or whose sync failed. Whoever reads them acts on them, so a power failure must no longer take them away.
func settle(db *bbolt.DB) error {
	if err := db.Sync(); err != nil {
		return fmt.Errorf("the store %s cannot be synced: %w", db.Path(), err)
	}
	return durable.SyncDir(filepath.Dir(db.Path()))
}

// openPrivate opens a file that is there and that nobody else can read. It makes none and takes no empty one, for bbolt
// would make a new store of it.
func openPrivate(path string, flag int, perm fs.FileMode) (*os.File, error) {
	f, err := os.OpenFile(path, flag&^os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, perm)
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.EISDIR) || errors.Is(err, syscall.ENXIO) {
		return nil, api.E(api.FileUnsafe, "%s is not a regular file", path)
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0:
		err = api.E(api.FileUnsafe, "%s must be a regular file of mode 0600, it is %s", path, info.Mode())
	case info.Size() == 0:
		err = api.E(api.StateCorrupt, "the store %s is empty", path)
	default:
		return f, nil
	}
	return nil, errors.Join(err, f.Close())
}

// check reads every key, then has bbolt compare its pages, once they are known to end within the file: bbolt follows one
// that claims to be larger.
func check(tx *bbolt.Tx) error {
	if tx.Bucket(bucketJournal) == nil || tx.Bucket(bucketReplicas) == nil {
		return errors.New("it is not one of ours")
	}
	var sum byte // what is added up is read
	err := tx.ForEach(func(_ []byte, b *bbolt.Bucket) error {
		return b.ForEach(func(k, v []byte) error {
			for _, part := range [][]byte{k, v} {
				for _, c := range part {
					sum += c
				}
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	pages := int(tx.Size()) / tx.DB().Info().PageSize
	for id := 0; id < pages; id++ {
		p, err := tx.Page(id)
		if err != nil {
			return err
		}
		if p.Type == "free" {
			continue
		}
		if p.OverflowCount >= pages-id {
			return fmt.Errorf("page %d goes beyond the end", id)
		}
		id += p.OverflowCount
	}
	for cerr := range tx.Check() { // to its end, or its goroutine would never end
		if err == nil {
			err = cerr
		}
	}
	return err
}

// createBolt makes an empty store where there is none.
func createBolt(path string) error {
	// A link fails where a rename would replace a store that somebody else made meanwhile.
	return makeBolt(path, func(*bbolt.Tx) error { return nil }, func(tmp string) error {
		if err := os.Link(tmp, path); err != nil {
			return err
		}
		return os.Remove(tmp)
	})
}

// makeBolt makes a store with what fill puts into it in a temporary file, and once that is on disk has place give it its name.
func makeBolt(path string, fill func(*bbolt.Tx) error, place func(tmp string) error) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, ".signet-*.tmp")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ignoreMissing(os.Remove(tmp.Name())))
		}
	}()
	if err := tmp.Close(); err != nil {
		return err
	}
	db, err := bbolt.Open(tmp.Name(), 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, b := range [][]byte{bucketJournal, bucketReplicas} {
			if _, err := tx.CreateBucket(b); err != nil {
				return err
			}
		}
		return fill(tx)
	})
	if err := errors.Join(err, db.Sync(), db.Close()); err != nil {
		return err
	}
	if err := place(tmp.Name()); err != nil {
		return err
	}
	return durable.SyncDir(dir)
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Load implements ca.Store.
func (s *boltStore) Load(context.Context) (j journal.Journal, rev ca.Revision, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		j, rev, err = load(tx)
		return err
	})
	return j, rev, err
}

// load tells a store without a record from one whose record was lost: init would make a new root of the first.
func load(tx *bbolt.Tx) (journal.Journal, ca.Revision, error) {
	b := tx.Bucket(bucketJournal)
	if k, _ := b.Cursor().First(); k == nil && b.Sequence() == 0 {
		return journal.Journal{}, 0, api.E(api.StateMissing, "the store holds no record")
	}
	data, rev := b.Get(keyRecord), ca.Revision(b.Sequence())
	j, err := journal.Decode(data)
	if api.ReasonOf(err) == api.StateNewer { // who wrote it may seal it in another way
		return journal.Journal{}, rev, err
	}
	if rev == 0 || !bytes.Equal(b.Get(keyRevision), sealRevision(rev, data)) {
		return journal.Journal{}, 0, api.E(api.StateCorrupt, "the record is not the one that was written")
	}
	return j, rev, err
}

// sealRevision is the value of the key "revision": the revision (8 bytes, big-endian) and the SHA-256 of it and the record.
func sealRevision(rev ca.Revision, data []byte) []byte {
	head := binary.BigEndian.AppendUint64(nil, uint64(rev))
	sum := sha256.Sum256(slices.Concat(head, data))
	return append(head, sum[:]...)
}

// Swap implements ca.Store.
func (s *boltStore) Swap(_ context.Context, old ca.Revision, j journal.Journal) (ca.Revision, error) {
	data, err := j.Encode()
	if err != nil {
		return 0, err
	}
	next := old + 1
	err = s.update(func(tx *bbolt.Tx) error {
		_, rev, err := load(tx)
		if err != nil && api.ReasonOf(err) != api.StateMissing {
			return err
		}
		if rev != old {
			return api.E(api.StateConflict, "the record has revision %d, the change was made for %d", rev, old)
		}
		return put(tx, data, next)
	})
	if err != nil {
		return 0, err
	}
	return next, nil
}

// put writes a record.
func put(tx *bbolt.Tx, data []byte, rev ca.Revision) error {
	b := tx.Bucket(bucketJournal)
	return errors.Join(b.Put(keyRecord, data), b.Put(keyRevision, sealRevision(rev, data)), b.SetSequence(uint64(rev)))
}

// Replicas implements ca.Store.
func (s *boltStore) Replicas(context.Context) (all []ca.Replica, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketReplicas).ForEach(func(name, data []byte) error { // in the order of their names
			r := ca.Replica{Name: string(name)}
			if err := json.Unmarshal(data, &r); err != nil {
				return api.E(api.StateCorrupt, "the record of a replica is damaged: %v", err)
			}
			all = append(all, r)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// SaveReplica implements ca.Store.
func (s *boltStore) SaveReplica(_ context.Context, r ca.Replica) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return s.update(func(tx *bbolt.Tx) error { return putReplica(tx, r.Name, data) })
}

func putReplica(tx *bbolt.Tx, name string, data []byte) error {
	return tx.Bucket(bucketReplicas).Put([]byte(name), data)
}

// view runs a transaction that reads. A panic of bbolt is damage.
func (s *boltStore) view(f func(*bbolt.Tx) error) (err error) {
	defer damaged(&err)
	return s.db.View(f)
}

// update runs a transaction. What fails before the commit changed nothing and is returned as it is; a commit that fails
// may still be visible, so its outcome is unknown.
func (s *boltStore) update(f func(*bbolt.Tx) error) error {
	tx, err := s.db.Begin(true)
	if err != nil {
		return err
	}
	if err := protect(tx, f); err != nil {
		return errors.Join(err, protect(tx, (*bbolt.Tx).Rollback))
	}
	if err := protect(tx, (*bbolt.Tx).Commit); err != nil {
		protect(tx, (*bbolt.Tx).Rollback) // after a panic it still holds the lock; after an error it is done already
		return api.Wrap(api.StateUnknown, err, fmt.Sprintf("the store's commit failed: %v", err))
	}
	return nil
}

func protect(tx *bbolt.Tx, f func(*bbolt.Tx) error) (err error) {
	defer damaged(&err)
	return f(tx)
}

func damaged(err *error) {
	if p := recover(); p != nil {
		*err = api.E(api.StateCorrupt, "the store is damaged: %s", toldBy(p))
	}
}

// toldBy is what a panic of bbolt says of the damage: its own words, or that it read where the file has nothing.
func toldBy(p any) string {
	if _, ok := p.(runtime.Error); ok {
		return "it ends, or leads, where there is nothing"
	}
	return fmt.Sprint(p)
}
