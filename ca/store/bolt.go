package store

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
)

func init() { Register("bolt", openBolt) }

// boltStore is the embedded default: one file, one replica.
type boltStore struct{ db *bbolt.DB }

var (
	bucketJournal  = []byte("journal") // keys "record" and "revision"
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
	info, err := os.Lstat(c.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && create:
		if err := createBolt(c.Path); err != nil {
			return nil, nil, fmt.Errorf("creating the store: %w", err)
		}
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, api.E(api.StateMissing, "there is no store at %s", c.Path)
	case err != nil:
		return nil, nil, err
	case !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0:
		return nil, nil, api.E(api.FileUnsafe, "%s must be a regular file of mode 0600, it is %s", c.Path, info.Mode())
	}
	db, err := openFile(c.Path)
	if err != nil {
		return nil, nil, err
	}
	return &boltStore{db}, db.Close, nil
}

// openFile opens an existing file. bbolt panics on some damage; that is StateCorrupt like any other.
func openFile(path string) (db *bbolt.DB, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = api.E(api.StateCorrupt, "the store %s is damaged: %v", path, p)
		}
	}()
	db, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, api.E(api.StateLocked, "the store %s is in use by another process", path)
	case err != nil:
		return nil, api.Wrap(api.StateCorrupt, err, fmt.Sprintf("the store %s cannot be opened: %v", path, err))
	}
	err = db.View(func(tx *bbolt.Tx) error {
		if tx.Bucket(bucketJournal) == nil || tx.Bucket(bucketReplicas) == nil {
			return api.E(api.StateCorrupt, "the store %s is not one of ours", path)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

func createBolt(path string) (err error) {
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
		return nil
	})
	if err := errors.Join(err, db.Sync(), db.Close()); err != nil {
		return err
	}
	// A link fails where a rename would replace a store that somebody else made meanwhile.
	if err := os.Link(tmp.Name(), path); err != nil {
		return err
	}
	if err := os.Remove(tmp.Name()); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Load implements ca.Store.
func (s *boltStore) Load(context.Context) (j journal.Journal, rev ca.Revision, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		j, rev, err = load(tx)
		return err
	})
	return j, rev, err
}

func load(tx *bbolt.Tx) (journal.Journal, ca.Revision, error) {
	b := tx.Bucket(bucketJournal)
	data, rev := b.Get(keyRecord), b.Get(keyRevision)
	if data == nil && rev == nil {
		return journal.Journal{}, 0, api.E(api.StateMissing, "the store holds no record")
	}
	if len(rev) != 8 {
		return journal.Journal{}, 0, api.E(api.StateCorrupt, "the record has no revision")
	}
	j, err := journal.Decode(data)
	return j, ca.Revision(binary.BigEndian.Uint64(rev)), err
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
		b := tx.Bucket(bucketJournal)
		return errors.Join(b.Put(keyRecord, data), b.Put(keyRevision, binary.BigEndian.AppendUint64(nil, uint64(next))))
	})
	if err != nil {
		return 0, err
	}
	return next, nil
}

// Replica implements ca.Store.
func (s *boltStore) Replica(_ context.Context, name string) (ca.Replica, error) {
	r := ca.Replica{Name: name}
	err := s.db.View(func(tx *bbolt.Tx) error {
		data := tx.Bucket(bucketReplicas).Get([]byte(name))
		if data == nil {
			return nil
		}
		if err := json.Unmarshal(data, &r); err != nil {
			return api.E(api.StateCorrupt, "the record of a replica is damaged: %v", err)
		}
		return nil
	})
	return r, err
}

// SaveReplica implements ca.Store.
func (s *boltStore) SaveReplica(_ context.Context, r ca.Replica) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return s.update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketReplicas).Put([]byte(r.Name), data) })
}

// update runs a transaction. What fails before the commit changed nothing and is returned as it is; a commit that fails
// may still be visible, so its outcome is unknown.
func (s *boltStore) update(f func(*bbolt.Tx) error) error {
	tx, err := s.db.Begin(true)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	if err := tx.Commit(); err != nil {
		return api.Wrap(api.StateUnknown, err, fmt.Sprintf("the store's commit failed: %v", err))
	}
	return nil
}
