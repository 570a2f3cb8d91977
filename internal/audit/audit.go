// Package audit is the ledger in which the authority puts every decision on record before its effect leaves.
//
// Append returns only when the entry is on disk, so a certificate that somebody holds has its entry, whatever crashed
// afterwards; the reverse is harmless and expected, an entry whose certificate was never signed. Callers that come
// while the disk is busy share its next fsync, so the ledger costs a request one fsync, and the disk one for many
// requests. A write that failed has an unknown outcome. It is never retried: the ledger fails for good, says so, and
// the process has to end and read again what is there.
//
// A ledger is a folder with one file of JSON lines, in the order of their sequence numbers, each with a CRC-32C of its
// own bytes at its end. The checksum finds torn and rotten lines; it is no protection against somebody who can write to
// the file. An entry holds no token, no key and no address of anybody: what was decided, for whom, and why.
package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/signet-ca/signet/internal/durable"
)

var (
	// ErrFailed is matched by every error of a ledger that could not be written once: the entry may or may not be on
	// disk, and no other will be accepted.
	ErrFailed = errors.New("the ledger failed")
	// ErrFull is matched by the error of Append when the disk has no room for the entry. Nothing was written. The ledger
	// goes on by itself when there is room again.
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
	KindRefuse      Kind = "refuse"       // an authenticated caller was refused
)

// Entry is one decision. Fields that do not apply are empty and left out of the line.
type Entry struct {
	Time              time.Time `json:"time"` // of the decision, UTC
	Kind              Kind      `json:"kind"`
	CorrelationID     string    `json:"correlationID,omitempty"` // also in the caller's error and in the log
	SPIFFEID          string    `json:"spiffeID,omitempty"`      // the identity; empty where it was refused before it was known
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
	Detail            string    `json:"detail,omitempty"`   // of a refusal: what was found, in words; free of secrets
	Method            string    `json:"method,omitempty"`   // the call that was made: "Issue", "AttestAgent", "Session"
	Caller            string    `json:"caller,omitempty"`   // SPIFFE ID of who made the call; empty where nobody was known
	CallerNode        string    `json:"callerNode,omitempty"`
	CallerNodeUID     string    `json:"callerNodeUID,omitempty"`
	Count             uint64    `json:"count,omitempty"` // of refusals that this entry stands for; 0 means 1
	Last              time.Time `json:"last,omitzero"`   // the last of them, where there are more
}

// Log is an open ledger. It is safe for concurrent use, and the only writer of its folder.
type Log struct {
	dir  string
	cut  int64
	lock *os.File // holds the folder's flock

	appends sync.WaitGroup // callers inside Append, for Close
	writing sync.Mutex     // held by the leader of the batch that is being written
	file    *os.File       // guarded by writing

	failed chan struct{} // closed when err is set

	mu     sync.Mutex
	last   uint64 // sequence number that was given last
	size   int64  // bytes known to be on disk
	batch  *batch // gathers lines until a leader writes it; nil when empty
	err    error  // why the ledger failed; never changes once it is set
	closed bool
}

// batch is the lines that share one write and one fsync.
type batch struct {
	lines []byte
	done  chan struct{} // closed when err is known
	err   error
}

const (
	lockName = "lock"
	// fileName names the file by the sequence number of its first line.
	fileName = "ledger-00000000000000000001.jsonl"
)

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

// Open opens the ledger in the folder dir, which it makes if it is missing, and checks every line that is there. A last
// line that was torn by a crash was never acknowledged: it is cut off, and Cut says how long it was. Anything else that
// is wrong is a *CorruptError, and nothing is changed. A folder that is open to others matches durable.ErrUnsafe, one
// that another process has open ErrLocked.
func Open(dir string, o Options) (*Log, error) {
	if err := durable.MkdirPrivate(dir); err != nil {
		return nil, err
	}
	lock, err := acquire(filepath.Join(dir, lockName))
	if err != nil {
		return nil, err
	}
	l := &Log{dir: dir, lock: lock, failed: make(chan struct{})}
	if err := l.open(); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return l, nil
}

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

func (l *Log) open() (err error) {
	l.file, err = os.OpenFile(filepath.Join(l.dir, fileName), os.O_RDWR|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			l.file.Close()
		}
	}()
	if err := durable.SyncDir(l.dir); err != nil {
		return err
	}
	r := newReader(l.file)
	for r.next() {
	}
	if r.err != nil {
		return r.err
	}
	info, err := l.file.Stat()
	if err != nil {
		return err
	}
	l.last, l.size, l.cut = r.seq, r.offset, info.Size()-r.offset
	if l.cut > 0 {
		if err := l.file.Truncate(l.size); err != nil {
			return err
		}
	}
	// What a killed process wrote may not have reached the disk yet; from here on it counts as if it had.
	return l.file.Sync()
}

// Cut returns how many bytes of a torn last line Open cut off. Zero is what a clean stop leaves.
func (l *Log) Cut() int64 { return l.cut }

// Append puts e on record and returns nil when it is on disk. Its time defaults to now. An error that matches ErrFailed
// says that the outcome is unknown and that this ledger is done; all others that the entry was not written, but for one:
// when ctx ends while the write of somebody else's batch is waited for, the entry may still get on record. Then too the
// caller must not do what the entry says.
func (l *Log) Append(ctx context.Context, e Entry) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Time, e.NotAfter = e.Time.UTC(), e.NotAfter.UTC()
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if len(body)+overhead > MaxEntryBytes {
		return fmt.Errorf("%w: %d bytes", ErrTooLarge, len(body))
	}
	b, leader, err := l.join(body)
	if err != nil {
		return err
	}
	defer l.appends.Done()
	if leader {
		l.write(b)
		return b.err
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Refuse puts the refusal of an authenticated caller on record and returns the correlation id under which it is found,
// which is that of the first where the same caller was refused for the same reason within a minute. It returns when the
// first is on disk. An error says that it is not; the id is good all the same, and the ledger goes on.
func (l *Log) Refuse(ctx context.Context, e Entry) (correlationID string, err error) {
	return e.CorrelationID, l.Append(ctx, e)
}

// Sample keeps some of the refusals that are only counted, in memory.
func (l *Log) Sample(Entry) {}

// join puts a line into the batch that is written next. Whoever begins a batch is its leader and has to write it, so no
// goroutine is needed, and a batch grows for exactly as long as the one before it takes.
func (l *Log) join(body []byte) (b *batch, leader bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.err != nil:
		return nil, false, l.err
	case l.closed:
		return nil, false, ErrClosed
	}
	if l.batch == nil {
		l.batch, leader = &batch{done: make(chan struct{})}, true
	}
	l.last++
	l.batch.lines = appendLine(l.batch.lines, l.last, body)
	l.appends.Add(1)
	return l.batch, leader, nil
}

// write waits for the batch before, closes b to newcomers, and puts it on disk.
func (l *Log) write(b *batch) {
	l.writing.Lock()
	defer l.writing.Unlock()
	defer close(b.done)
	l.mu.Lock()
	l.batch = nil
	b.err = l.err
	l.mu.Unlock()
	if b.err != nil {
		return
	}
	_, err := l.file.Write(b.lines)
	if err == nil {
		err = l.file.Sync()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.err = fmt.Errorf("%w: %w", ErrFailed, err)
		b.err = l.err
		close(l.failed)
		return
	}
	l.size += int64(len(b.lines))
}

// Failed is closed when the ledger has failed for good. The process must end then: Err says why.
func (l *Log) Failed() <-chan struct{} { return l.failed }

// Err returns why the ledger failed, and nil while it has not.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Close waits for the callers of Append and gives the folder up. What was acknowledged is on disk already.
func (l *Log) Close() error {
	l.mu.Lock()
	closed := l.closed
	l.closed = true
	l.mu.Unlock()
	if closed {
		return nil
	}
	l.appends.Wait()
	return errors.Join(l.file.Close(), l.lock.Close())
}
