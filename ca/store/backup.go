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
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

// A backup is the text "signet-backup/1\n", a header (its length in 4 bytes, big-endian, and JSON), what a store held, sealed
// (likewise; JSON within; the header is authenticated with it), and the SHA-256 of all that. The checksum needs no key, so that
// damage is told from a wrong key, and a copy can be checked by who must not read it.
const (
	backupMagic   = "signet-backup/"
	backupVersion = "1\n"
	maxHeader     = 4 << 10

	// MaxBackup bounds a backup, in bytes.
	MaxBackup = maxStore
)

// BackupHeader is what is told of a backup without its key. What it says is proven only once the backup is opened.
type BackupHeader struct {
	TrustDomain string    `json:"trustDomain"`
	Generation  string    `json:"generation"`
	Schema      int       `json:"schema"` // of the record
	At          time.Time `json:"at"`
}

// backupBody is what is sealed.
type backupBody struct {
	Journal  json.RawMessage `json:"journal"`
	Replicas []ca.Replica    `json:"replicas,omitempty"`
}

// Seal returns a backup of what a store held at that time. Keys in it are sealed twice: each as it was, and all of it.
func (s Snapshot) Seal(sealer *ca.Sealer, now time.Time) ([]byte, error) {
	record, err := s.Journal.Encode()
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(backupBody{record, s.Replicas})
	if err != nil {
		return nil, err
	}
	header, err := json.Marshal(BackupHeader{
		TrustDomain: s.Journal.TrustDomain, Generation: s.Journal.Generation().String(), Schema: s.Journal.Schema, At: now.UTC().Round(0),
	})
	if err != nil {
		return nil, err
	}
	data := []byte(backupMagic + backupVersion)
	for _, part := range [][]byte{header, sealer.Seal(body, backupContext(header))} {
		data = binary.BigEndian.AppendUint32(data, uint32(len(part)))
		data = append(data, part...)
	}
	sum := sha256.Sum256(data)
	if data = append(data, sum[:]...); len(data) > MaxBackup {
		return nil, api.E(api.StateFull, "a backup of %d bytes is larger than %d", len(data), MaxBackup)
	}
	return data, nil
}

// backupContext keeps a backup from being taken for something else under the same key, and binds it to its header.
func backupContext(header []byte) string { return "signet-backup\x00" + string(header) }

// ReadHeader checks the checksum of a backup and returns what it says of itself, and the part that is sealed. BackupDamaged where
// it is none, or is no longer what was written; StateNewer where a later version wrote it.
func ReadHeader(data []byte) (h BackupHeader, header, sealed []byte, err error) {
	rest, ok := bytes.CutPrefix(data, []byte(backupMagic))
	switch {
	case len(data) > MaxBackup:
		return h, nil, nil, damagedBackup("it is larger than %d bytes", MaxBackup)
	case !ok:
		return h, nil, nil, damagedBackup("it does not begin like one")
	case len(rest) < len(backupVersion)+sha256.Size:
		return h, nil, nil, damagedBackup("it is cut off")
	}
	end := len(data) - sha256.Size
	if sum := sha256.Sum256(data[:end]); !bytes.Equal(sum[:], data[end:]) {
		return h, nil, nil, damagedBackup("its checksum is another: it is cut off, or was changed")
	}
	if rest, ok = bytes.CutPrefix(data[len(backupMagic):end], []byte(backupVersion)); !ok {
		return h, nil, nil, api.E(api.StateNewer, "the backup has another format than this build knows, 1")
	}
	header, rest, ok = cutPart(rest)
	if ok {
		sealed, rest, ok = cutPart(rest)
	}
	if !ok || len(rest) > 0 || len(header) > maxHeader {
		return h, nil, nil, damagedBackup("its parts do not add up")
	}
	dec := json.NewDecoder(bytes.NewReader(header))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&h); err != nil || dec.More() {
		return h, nil, nil, damagedBackup("its header does not parse")
	}
	return h, header, sealed, nil
}

// cutPart returns a part that follows its length, and what comes after it.
func cutPart(data []byte) (part, rest []byte, ok bool) {
	if len(data) < 4 {
		return nil, nil, false
	}
	n := uint64(binary.BigEndian.Uint32(data))
	if data = data[4:]; n > uint64(len(data)) {
		return nil, nil, false
	}
	return data[:n], data[n:], true
}

// Unseal returns what a backup of that trust domain holds, and what it says of itself. Errors are those of ReadHeader and
// journal.Decode; StateForeign where it is of another trust domain, SealKeyWrong where another key sealed it.
func Unseal(data []byte, td spiffeid.TrustDomain, sealer *ca.Sealer) (Snapshot, BackupHeader, error) {
	h, header, sealed, err := ReadHeader(data)
	if err != nil {
		return Snapshot{}, h, err
	}
	if h.TrustDomain != td.Name() {
		return Snapshot{}, h, api.E(api.StateForeign, "the backup is of trust domain %.255q, this CA is of %q", h.TrustDomain, td.Name())
	}
	plain, err := sealer.Open(sealed, backupContext(header))
	switch {
	case api.ReasonOf(err) == api.SealKeyWrong:
		return Snapshot{}, h, api.E(api.SealKeyWrong, "the seal key is not the one under which the backup was made")
	case err != nil:
		return Snapshot{}, h, damagedBackup("what is sealed has an unknown format")
	}
	dec := json.NewDecoder(bytes.NewReader(plain))
	dec.DisallowUnknownFields()
	var body backupBody
	if err := dec.Decode(&body); err != nil || dec.More() {
		return Snapshot{}, h, damagedBackup("its content does not parse")
	}
	j, err := journal.Decode(body.Journal)
	if err != nil {
		return Snapshot{}, h, err
	}
	if j.TrustDomain != h.TrustDomain || j.Generation().String() != h.Generation || j.Schema != h.Schema {
		return Snapshot{}, h, damagedBackup("its header is of another record")
	}
	names := map[string]bool{}
	for _, r := range body.Replicas {
		if r.Name == "" || names[r.Name] {
			return Snapshot{}, h, damagedBackup("a replica in it has no name, or is there twice")
		}
		names[r.Name] = true
	}
	slices.SortFunc(body.Replicas, func(a, b ca.Replica) int { return strings.Compare(a.Name, b.Name) })
	return Snapshot{j, body.Replicas}, h, nil
}

func damagedBackup(format string, args ...any) error {
	return api.E(api.BackupDamaged, "the backup cannot be used: %s", fmt.Sprintf(format, args...))
}

// Restored returns what a backup holds as it goes on at that time: journal.Restored, and one replica more, which nobody can ask.
// It stands for the one that went on after the backup, and may have signed under every trusted root what nobody remembers; so no
// root is taken away while that may be valid. Its record says what a restore it was; of told By and BackupAt are taken, which are
// who restores, and when the backup was made.
func (s Snapshot) Restored(told ca.Restored, seen []api.Generation, now time.Time) (Snapshot, error) {
	j, err := journal.Restored(s.Journal, seen, now)
	if err != nil {
		return Snapshot{}, err
	}
	told = ca.Restored{By: told.By, BackupAt: told.BackupAt, At: now.UTC().Round(0), Backup: s.Journal.Generation().String(), Generation: j.Generation().String()}
	lost := ca.Replica{Name: fmt.Sprintf("%s%d", lostReplica, j.Epoch), Restored: &told}
	for _, a := range j.Authorities {
		if a.State.Trusted() {
			// Its intermediates lasted longer, but their keys were in its memory.
			lost.Minted = append(lost.Minted, ca.Minted{At: now.UTC().Round(0), NotAfter: now.Add(issuance.MaxTTL).UTC().Round(0), Root: a.ID})
		}
	}
	kept := slices.DeleteFunc(slices.Clone(s.Replicas), func(r ca.Replica) bool { return strings.HasPrefix(r.Name, lostReplica) })
	kept = append(kept, lost)
	slices.SortFunc(kept, func(a, b ca.Replica) int { return strings.Compare(a.Name, b.Name) })
	return Snapshot{j, kept}, nil
}

// lostReplica begins the name of the replica that a restore adds; its epoch ends it.
const lostReplica = "before-restore-"

// Put makes a store that holds s, at once and whole. Where there is one already it fails with StateExists; with replace it takes
// its place, damaged or not, unless a process has it open (StateLocked), and the old one is kept under the name that is returned.
// After an error that says nothing else, and after a kill, either the old one is there or the new one. Kinds other than bolt are
// ConfigInvalid.
func Put(_ context.Context, c Config, s Snapshot, replace bool) (kept string, err error) {
	if err := onlyBolt(c); err != nil {
		return "", err
	}
	record, err := s.Journal.Encode()
	if err != nil {
		return "", err
	}
	fill := func(tx *bbolt.Tx) error {
		for _, r := range s.Replicas {
			data, err := json.Marshal(r)
			if err == nil {
				err = putReplica(tx, r.Name, data)
			}
			if err != nil {
				return err
			}
		}
		return put(tx, record, 1)
	}
	old, err := lockOld(c.Path, replace)
	if err != nil {
		return "", err
	}
	if old != nil {
		defer old.Close() // and with it the lock, once the new one is in place
	}
	err = makeBolt(c.Path, fill, func(tmp string) error {
		if old != nil {
			kept = c.Path + ".replaced-" + time.Now().UTC().Format("20060102T150405.000000000Z")
			if err := os.Link(c.Path, kept); err != nil {
				return err
			}
			if err := os.Rename(tmp, c.Path); err != nil {
				return errors.Join(err, os.Remove(kept)) // it is there under its own name
			}
			return nil
		}
		if err := os.Link(tmp, c.Path); err != nil {
			return err
		}
		return os.Remove(tmp)
	})
	if errors.Is(err, fs.ErrExist) {
		return "", storeExists(c.Path)
	}
	if err != nil {
		return "", fmt.Errorf("writing the store: %w", err)
	}
	return kept, nil
}

func storeExists(path string) error {
	return api.E(api.StateExists, "there is a store at %s already", path)
}

// lockOld returns the store that is to be replaced, locked as bbolt locks it; nil where there is none.
func lockOld(path string, replace bool) (*os.File, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case !replace:
		return nil, storeExists(path)
	case !info.Mode().IsRegular():
		return nil, api.E(api.FileUnsafe, "%s is not a regular file", path)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = api.E(api.StateLocked, "the store %s is in use by another process: stop the CA first", path)
	}
	if err == nil {
		err = inPlace(f, path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
