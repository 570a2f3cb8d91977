package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
)

// Snapshot is all that a store holds, at one moment.
type Snapshot struct {
	Journal  journal.Journal
	Replicas []ca.Replica // sorted by name
}

// Snap returns what an open store holds.
func Snap(ctx context.Context, s ca.Store) (Snapshot, error) {
	j, _, err := s.Load(ctx)
	if err != nil {
		return Snapshot{}, err
	}
	replicas, err := s.Replicas(ctx)
	return Snapshot{j, replicas}, err
}

// Peek returns what a store holds, whether or not a process has it open, and neither waits for its lock nor changes anything.
// Errors are those of Open and of ca.Store, and StateConflict where the file is written to without a pause.
//
// bbolt never writes to a page that its last commit refers to, and its two meta pages, of which the later one is written last,
// say which commit that is. A copy during which neither of them changed therefore holds that commit, whatever was being written.
// It is opened as a store in the memory of this process, and checked like any other.
func Peek(ctx context.Context, c Config) (Snapshot, error) {
	if err := onlyBolt(c); err != nil {
		return Snapshot{}, err
	}
	data, err := readStable(c.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return Snapshot{}, api.E(api.StateMissing, "there is no store at %s", c.Path)
	}
	if err != nil {
		return Snapshot{}, err
	}
	db, _, err := openWhole(c.Path, func(string, int, fs.FileMode) (*os.File, error) { return memoryFile(data) })
	if err != nil {
		return Snapshot{}, err
	}
	s, err := Snap(ctx, &boltStore{db})
	return s, errors.Join(err, db.Close())
}

func onlyBolt(c Config) error {
	switch {
	case c.Kind != "" && c.Kind != "bolt":
		return api.E(api.ConfigInvalid, "a store of kind %q is in no file", c.Kind)
	case c.Path == "":
		return api.E(api.ConfigInvalid, "store.path is required for bolt")
	}
	return nil
}

// maxStore bounds what is read of a store's file: many times what a record and its replicas need.
const maxStore = 64 << 20

// copyTries is how often a file is copied during which a commit was made. A copy takes less than a millisecond, a commit more.
const copyTries = 100

// readStable returns the content of a store's file as of one commit.
func readStable(path string) ([]byte, error) {
	f, err := openPrivate(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for range copyTries {
		before, err := metas(f)
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(io.NewSectionReader(f, 0, maxStore+1))
		if err != nil {
			return nil, err
		}
		if len(data) > maxStore {
			return nil, api.E(api.StateCorrupt, "the store %s is larger than %d bytes", path, maxStore)
		}
		after, err := metas(f)
		if err != nil {
			return nil, err
		}
		if bytes.Equal(before, after) {
			return data, nil
		}
	}
	return nil, api.E(api.StateConflict, "the store %s is written to without a pause", path)
}

// A meta page: a header of 16 bytes, then magic, version and page size of 4 bytes each, and so on up to its checksum.
const (
	metaBytes     = 80
	metaPageSize  = 24
	leastPageSize = 1 << 10
	mostPageSize  = 16 << 20
)

// metas returns both meta pages of a file, or what is in their place.
func metas(f *os.File) ([]byte, error) {
	all := make([]byte, 2*metaBytes)
	if _, err := f.ReadAt(all[:metaBytes], 0); err != nil && err != io.EOF {
		return nil, err
	}
	page := int64(binary.NativeEndian.Uint32(all[metaPageSize:]))
	if page < leastPageSize || page > mostPageSize { // the first one is damaged
		page = int64(os.Getpagesize())
	}
	if _, err := f.ReadAt(all[metaBytes:], page); err != nil && err != io.EOF {
		return nil, err
	}
	return all, nil
}
