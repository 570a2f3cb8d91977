// Package audit is the ledger in which the authority puts every decision on record before its effect leaves.
//
// Append returns only when the entry is on disk, so a certificate that somebody holds has its entry, whatever crashed
// afterwards; the reverse is harmless and expected, an entry whose certificate was never signed. Callers that come
// while the disk is busy share its next sync, so the ledger costs a request one sync, and the disk one for many
// requests. A write that failed has an unknown outcome. It is never retried: the ledger fails for good, says so, and
// the process has to end and read again what is there. That a disk is full is no such failure, for room is reserved
// before it is used: while one segment is filled the next one waits, so it is known long before it matters.
//
// What others can cause as often as they like, being refused, is kept apart from what only the authority decides:
// refusals of callers that are known go to a ring of a fixed size, each caller and reason once a minute, the others to a
// sample in memory. Whatever happens to either, no entry of the ledger waits for it.
//
// A ledger is a folder of segments: files of JSON lines in the order of their sequence numbers, each line with a CRC-32C
// of its own bytes at its end, each file named by its first number. The checksum finds torn and rotten lines; it is no
// protection against somebody who can write to the file. An entry holds no token, no key and no address of anybody: what
// was decided, for whom, and why.
package audit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/signet-ca/signet/internal/durable"
)

var (
	// ErrFailed is matched by every error of a ledger that could not be written once: the entry may or may not be on
	// disk, and no other will be accepted.
	ErrFailed = errors.New("the ledger failed")
	// ErrFull is matched by the error of Append when the disk has no room for the entry, or is too slow to reserve it.
	// Nothing was written. The ledger goes on by itself when there is room again.
	ErrFull = errors.New("the ledger has no room")
	// ErrClosed is returned by Append after Close.
	ErrClosed = errors.New("the ledger is closed")
	// ErrLocked is returned by Open when another process has the ledger open.
	ErrLocked = errors.New("another process has the ledger open")
	// ErrTooLarge is returned by Append for an entry above MaxEntryBytes. Nothing was written, and the ledger goes on.
	ErrTooLarge = errors.New("the entry is too large")
)

// MaxEntryBytes is the length of the longest line.
const MaxEntryBytes = 64 << 10

// The smallest Options.
const (
	MinSegment  = 1 << 20
	MinRefusals = 256 << 10
)

// A Kind says what was decided. Readers must expect kinds that they do not know.
type Kind string

// The kinds of this build.
const (
	KindIssue       Kind = "issue"        // a workload's SVID is about to be signed
	KindAttestAgent Kind = "attest-agent" // an agent's SVID is about to be signed
	KindMint        Kind = "mint"         // an intermediate is about to be asked for
	KindRefuse      Kind = "refuse"       // somebody was refused
	KindBanNode     Kind = "ban-node"     // a node is about to be banned
	KindAllowNode   Kind = "allow-node"   // the ban of a node is about to be taken back
	KindRotate      Kind = "rotate"       // a rotation is about to be begun, taken a step further or ended, or somebody excused
	KindBackup      Kind = "backup"       // a backup of all that the store holds is about to be sent
	KindRestore     Kind = "restore"      // the record was restored from a backup; written at the start that follows
	KindOperator    Kind = "operator"     // an operator came in from elsewhere: a token's first call, each call of a break-glass certificate
)

// Entry is one decision. Fields that do not apply are empty and left out of the line.
type Entry struct {
	Time              time.Time `json:"time"` // of the decision, UTC
	Kind              Kind      `json:"kind"`
	CorrelationID     string    `json:"correlationID,omitempty"` // also in the caller's error and in the log
	SPIFFEID          string    `json:"spiffeID,omitempty"`      // the identity, that was asked for where it was refused; empty where that is not known
	Cluster           string    `json:"cluster,omitempty"`       // issuer of the token that was attested
	Namespace         string    `json:"namespace,omitempty"`
	ServiceAccount    string    `json:"serviceAccount,omitempty"`
	ServiceAccountUID string    `json:"serviceAccountUID,omitempty"`
	Pod               string    `json:"pod,omitempty"`
	PodUID            string    `json:"podUID,omitempty"`
	Node              string    `json:"node,omitempty"`
	NodeUID           string    `json:"nodeUID,omitempty"`
	TokenID           string    `json:"tokenID,omitempty"`  // jti, or a hash where there is none; never the token
	DNSNames          []string  `json:"dnsNames,omitempty"` // certified beside the SPIFFE ID
	Serial            string    `json:"serial,omitempty"`   // of the certificate, lower-case hex
	NotAfter          time.Time `json:"notAfter,omitzero"`  // of the certificate
	Issuer            string    `json:"issuer,omitempty"`   // key id of the authority that signs, lower-case hex
	Reason            string    `json:"reason,omitempty"`   // of a refusal, from the closed table
	Detail            string    `json:"detail,omitempty"`   // of a refusal: what was found, in words; of a ban: why, in the operator's; free of secrets
	Method            string    `json:"method,omitempty"`   // the call that was made: "Issue", "AttestAgent", "Session"
	Caller            string    `json:"caller,omitempty"`   // SPIFFE ID of who made the call; or "uid:" and a user of this machine, "sa:" and an operator's ServiceAccount and token, "break-glass:" and a name; empty where nobody was known
	CallerNode        string    `json:"callerNode,omitempty"`
	CallerNodeUID     string    `json:"callerNodeUID,omitempty"`
	Count             uint64    `json:"count,omitempty"` // of refusals that this entry stands for; 0 means 1
	Last              time.Time `json:"last,omitzero"`   // the last of them, where there are more
	Grace             bool      `json:"grace,omitempty"` // decided by the rule of known renewals: the API server was away
}

// Options say how a ledger is kept. The zero Options are good.
type Options struct {
	// SegmentSize is the room of one segment in bytes, reserved before it is used. Zero: 64 MiB; at least MinSegment.
	SegmentSize int64
	// Retention is how long an entry is kept at least. Zero: for ever.
	Retention time.Duration
	// RefusalBytes is the room of the ring of refusals. Zero: 16 MiB; at least MinRefusals.
	RefusalBytes int64
	// Log gets alarms: no room, a ring that cannot be written. Nil: discarded.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	o.SegmentSize = max(MinSegment, cmp.Or(o.SegmentSize, 64<<20))
	o.RefusalBytes = max(MinRefusals, cmp.Or(o.RefusalBytes, 16<<20))
	o.Log = cmp.Or(o.Log, slog.New(slog.DiscardHandler))
	return o
}

// Log is an open ledger. It is safe for concurrent use, and the only writer of its folder.
type Log struct {
	dir     string
	options Options
	log     *slog.Logger
	cut     int64
	lock    *os.File // holds the folder's flock
	ring    *ring
	sample  sample
	patient time.Duration // how long a batch waits for a segment that is being made: spareWait, or what a test sets
	counts  counts

	appends sync.WaitGroup // callers inside Append, for Close
	tasks   sync.WaitGroup // keep, keepAhead, keepYoung, and the ring's
	stop    func()         // ends them, but for the ring's
	wake    chan struct{}  // wakes keep; of capacity 1
	behind  chan struct{}  // wakes keepAhead; of capacity 1
	older   chan struct{}  // wakes keepYoung; of capacity 1

	writing sync.Mutex // held by the leader of the batch that is being written
	current *segment   // guarded by writing
	buffer  []byte     // guarded by writing
	lull    *lull      // guarded by writing

	failed chan struct{} // closed when err is set

	mu       sync.Mutex    // guards what follows; taken after writing, never before it
	last     uint64        // sequence number that is on disk
	size     int64         // bytes of the current segment that are on disk
	room     int64         // bytes of the current segment in all
	segments []part        // oldest first; the last is the current one
	batch    *batch        // gathers entries until a leader writes it; nil when empty
	spare    *segment      // the room that comes next; nil while there is none
	making   chan struct{} // closed when it was tried to make one; nil while nobody tries
	rolling  bool          // the spare is becoming the current segment
	noRoom   error         // why there is no spare; nil while there is one or it is being made
	starved  bool          // an entry found no room since there was any
	err      error         // why the ledger failed; never changes once it is set
	closed   bool
}

// counts are for metrics.
type counts struct {
	entries, syncs, full, removed             atomic.Uint64
	refusalsWritten, coalesced, dropped, seen atomic.Uint64
	ringBroken                                atomic.Bool
}

// Open opens the ledger in the folder dir, which it makes if it is missing. It checks every line of the newest segment,
// and of the others that they are there and follow one another; Verify checks the whole. What a crash may leave at the
// end, the torn write of a batch that nobody was told of, is cut off, and Cut says how long it was. Anything else that is
// wrong is a *CorruptError, and nothing is changed. A folder that is open to others matches durable.ErrUnsafe, one that
// another process has open ErrLocked. A full disk is no error: then Append says ErrFull.
func Open(dir string, o Options) (*Log, error) {
	if err := durable.MkdirPrivate(dir); err != nil {
		return nil, err
	}
	lock, err := acquire(filepath.Join(dir, lockName))
	if err != nil {
		return nil, err
	}
	o = o.withDefaults()
	l := &Log{
		dir: dir, options: o, log: o.Log, lock: lock,
		failed: make(chan struct{}), wake: make(chan struct{}, 1), behind: make(chan struct{}, 1), older: make(chan struct{}, 1),
		making: make(chan struct{}), patient: spareWait,
	}
	if l.lull, err = newLull(); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	if err := l.open(); err != nil {
		l.lull.close()
		return nil, errors.Join(err, lock.Close())
	}
	l.ring = openRing(dir, o.RefusalBytes, o.Log, &l.counts)
	ctx, stop := context.WithCancel(context.Background()) // until Close
	l.stop = stop
	l.tasks.Go(func() { l.keep(ctx) })
	l.tasks.Go(func() { l.keepAhead(ctx) })
	l.tasks.Go(func() { l.keepYoung(ctx) })
	l.tasks.Go(l.ring.keep)
	return l, nil
}

// lockName is the file that is locked; it also tells a ledger from any other folder.
const lockName = "lock"

// acquire takes the lock that ends with the process, however the process ends.
func acquire(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = ErrLocked
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// open finds the end of the ledger and makes it ready to be written.
func (l *Log) open() (err error) {
	parts, err := listParts(l.dir, ledgerPrefix)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		parts = []part{{first: 1, path: filepath.Join(l.dir, partName(ledgerPrefix, 1))}}
	}
	for i, p := range parts[:len(parts)-1] {
		if err := checkSealed(p, parts[i+1]); err != nil {
			return err
		}
	}
	newest := parts[len(parts)-1]
	f, err := os.OpenFile(newest.path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := durable.SyncDir(l.dir); err != nil {
		return err
	}
	r := newReader(f, newest)
	for r.next() {
	}
	if r.err != nil {
		return r.err
	}
	if l.cut = r.torn; l.cut > 0 {
		if _, err := f.WriteAt(make([]byte, r.torn), r.offset); err != nil {
			return err
		}
	}
	// What a killed process wrote may not have reached the disk yet; from here on it counts as if it had.
	if err := f.Sync(); err != nil {
		return err
	}
	l.current, err = adopt(f, newest.path, r.offset, l.options.SegmentSize)
	if err != nil {
		return err
	}
	l.last, l.size, l.room, l.segments = r.seq, r.offset, l.current.room, parts
	return nil
}

// Cut returns how many bytes of a torn write Open cut off. Zero is what a clean stop leaves.
func (l *Log) Cut() int64 { return l.cut }

// Failed is closed when the ledger has failed for good. The process must end then: Err says why.
func (l *Log) Failed() <-chan struct{} { return l.failed }

// Err returns why the ledger failed, and nil while it has not.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// NotReady says why Append would not put an entry on record now; empty while it would.
func (l *Log) NotReady() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.err != nil:
		return "the ledger cannot be written"
	case l.spare == nil && l.noRoom != nil && (l.starved || l.room-l.size < MaxEntryBytes):
		return "the ledger has no room: the disk is full"
	case l.spare == nil && l.starved:
		return "the ledger has no room yet: the disk is slow"
	}
	return ""
}

// Close waits for the callers of Append and Refuse, puts on record what repeated, and gives the folder up. What was
// acknowledged is on disk already.
func (l *Log) Close() error {
	l.mu.Lock()
	closed := l.closed
	l.closed = true
	l.mu.Unlock()
	if closed {
		return nil
	}
	l.appends.Wait()
	l.stop()
	l.ring.close()
	l.tasks.Wait()
	l.lull.close()
	errs := []error{l.current.close()}
	if l.spare != nil {
		errs = append(errs, l.spare.close())
	}
	return errors.Join(append(errs, l.lock.Close())...)
}
