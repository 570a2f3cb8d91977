package audit

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/signet-ca/signet/internal/durable"
)

const (
	ledgerPrefix  = "ledger-"
	refusalPrefix = "refusals-"
	partSuffix    = ".jsonl"
	spareName     = "next" // the segment that comes next, before its first number is known
)

// part is a file of lines, named by the number of the first.
type part struct {
	first uint64
	path  string
}

// name returns the file's name without its folder.
func (p part) name() string { return filepath.Base(p.path) }

func partName(prefix string, first uint64) string {
	return fmt.Sprintf("%s%020d%s", prefix, first, partSuffix)
}

// listParts returns the files of a prefix in dir, oldest first. Other names are passed over.
func listParts(dir, prefix string) ([]part, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var parts []part
	for _, e := range entries {
		digits, ours := strings.CutPrefix(strings.TrimSuffix(e.Name(), partSuffix), prefix)
		first, err := strconv.ParseUint(digits, 10, 64)
		if ours && err == nil && first > 0 && e.Name() == partName(prefix, first) {
			parts = append(parts, part{first, filepath.Join(dir, e.Name())})
		}
	}
	slices.SortFunc(parts, func(a, b part) int { return strings.Compare(a.path, b.path) })
	return parts, nil
}

// segment is a file of the ledger that is written, or will be. Its room is reserved: a write into it does not meet a full
// disk. What no line has reached yet is zeros.
type segment struct {
	path string
	file *os.File
	// The same file, opened once more, for writing zeros ahead: a failed sync is reported once to each open file, and the
	// one that matters must never be swallowed by the one that does not.
	ahead  *os.File
	room   int64 // bytes that are reserved
	size   int64 // bytes of lines
	zeroed int64 // up to here zeros were really written, which makes the sync of what is written over them cheap
}

// zeroAhead is how far before the lines zeros are written, zeroChunk how much at once.
const (
	zeroAhead = 4 << 20
	zeroChunk = 256 << 10
)

var zeros [zeroChunk]byte

// adopt makes a segment of an open file with size bytes of lines, and reserves what it lacks of want bytes. Where the
// disk is full it has no room but for what it holds.
func adopt(f *os.File, path string, size, want int64) (*segment, error) {
	s := &segment{path: path, file: f, room: size, size: size}
	if size < want {
		switch written, err := reserve(f, size, want); {
		case err == nil:
			s.room, s.zeroed = want, written
		case !isFull(err):
			return nil, err
		}
	}
	var err error
	s.ahead, err = os.OpenFile(path, os.O_RDWR|syscall.O_NOFOLLOW, 0)
	return s, err
}

// reserve makes the room from the end of the lines in f to want bytes ours, durably, and full of zeros. It returns up to
// where zeros were really written. After an error the file may be longer, and what it is longer by is zeros.
func reserve(f *os.File, from, want int64) (written int64, err error) {
	if err = allocate(f, want); errors.Is(err, errors.ErrUnsupported) {
		written, err = want, writeRoom(f, from, want)
	}
	if err != nil {
		return 0, err
	}
	return written, f.Sync()
}

// writeRoom writes zeros.
func writeRoom(f *os.File, from, to int64) error {
	for from < to {
		n, err := f.WriteAt(zeros[:min(zeroChunk, to-from)], from)
		if err != nil {
			return err
		}
		from += int64(n)
	}
	return nil
}

// isFull reports whether err says that there is no room, and so that nothing was done.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func (s *segment) wantsZeros() bool {
	return max(s.zeroed, s.size) < min(s.room, s.size+zeroAhead/2)
}

func (s *segment) close() error { return errors.Join(s.file.Close(), s.ahead.Close()) }

// roll goes on to the segment that waits, whose first number is first. The caller holds writing.
func (l *Log) roll(first uint64) error {
	next, err := l.takeSpare()
	if err != nil {
		return err
	}
	path := filepath.Join(l.dir, partName(ledgerPrefix, first))
	defer l.rolled()
	if err := os.Rename(next.path, path); isFull(err) {
		next.close() // keep takes it over again
		return fmt.Errorf("%w: %w", ErrFull, err)
	} else if err != nil {
		return l.fail(err)
	}
	if err := durable.SyncDir(l.dir); err != nil {
		return l.fail(err)
	}
	next.path = path
	old := l.current
	l.current = next
	l.mu.Lock()
	empty := l.segments[len(l.segments)-1].first == first // it had no room
	if empty {
		l.segments = l.segments[:len(l.segments)-1]
	}
	l.segments = append(slices.Clip(l.segments), part{first, path})
	l.size, l.room = 0, next.room
	l.mu.Unlock()
	if !empty { // and not under mu: a slow disk may take long for it, and whoever only asks takes mu
		old.file.Truncate(old.size) // for room, and so that its last line is quickly found; it may as well stay as it is
	}
	old.close() // every line in it is on disk
	return nil
}

// rolled lets keep make the next spare.
func (l *Log) rolled() {
	l.mu.Lock()
	l.rolling = false
	l.mu.Unlock()
	poke(l.wake)
	poke(l.behind)
}

// spareWait bounds how long a batch waits for a segment that is being made: the same for all who share it, and so no
// matter of the context of the one who leads it.
const spareWait = time.Second

var errSlow = errors.New("the next segment is not made yet")

// takeSpare returns the segment that waits. It waits a moment for one that is being made, and not for room. Until rolled
// is called no other is made, for both would have the same name.
func (l *Log) takeSpare() (*segment, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if making := l.making; l.spare == nil && making != nil {
		l.mu.Unlock()
		timer := time.NewTimer(l.patient)
		select {
		case <-making:
		case <-timer.C:
		}
		timer.Stop()
		l.mu.Lock()
	}
	if l.spare == nil {
		l.starved = true
		l.counts.full.Add(1)
		return nil, fmt.Errorf("%w: %w", ErrFull, cmp.Or(l.noRoom, errSlow))
	}
	s := l.spare
	l.spare, l.making, l.rolling = nil, make(chan struct{}), true
	return s, nil
}

// poke wakes whoever waits on c, which has room for one.
func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// How often it is tried to make room on a full disk, and how often old segments are looked for.
const (
	retryMin    = time.Second
	retryMax    = 10 * time.Second
	retireEvery = 24 * time.Hour
)

// keep makes room ahead of what is written, until Close. What is too old may give it some.
func (l *Log) keep(ctx context.Context) {
	for wait := retryMin; ; {
		var again <-chan time.Time
		if err := l.makeSpare(); err != nil {
			again = time.After(wait)
			wait = min(2*wait, retryMax)
		} else {
			wait = retryMin
		}
		poke(l.older)
		select {
		case <-ctx.Done():
			return
		case <-l.wake:
		case <-again:
		}
	}
}

// keepAhead writes zeros ahead of the lines, until Close. It is apart from keep, for a leader that waits for a segment
// holds what it waits for.
func (l *Log) keepAhead(ctx context.Context) {
	for {
		l.writeZeros()
		select {
		case <-ctx.Done():
			return
		case <-l.behind:
		}
	}
}

// makeSpare makes the segment that comes next, where there is none.
func (l *Log) makeSpare() error {
	l.mu.Lock()
	if l.spare != nil || l.rolling {
		l.mu.Unlock()
		return nil
	}
	if l.making == nil {
		l.making = make(chan struct{})
	}
	before := l.noRoom
	l.mu.Unlock()
	s, err := newSpare(filepath.Join(l.dir, spareName), l.options.SegmentSize)
	l.mu.Lock()
	l.spare, l.noRoom = s, err
	if err == nil {
		l.starved = false
	}
	close(l.making)
	l.making = nil
	left := l.room - l.size
	l.mu.Unlock()
	switch {
	case err != nil && before == nil:
		l.log.Error("the ledger's next segment cannot be made: issuance stops when the current one is full", "error", err, "left_bytes", left)
	case err == nil && before != nil:
		l.log.Info("the ledger has room again")
	}
	return err
}

// newSpare makes a segment at path, or takes over what an earlier process left there.
func newSpare(path string, size int64) (s *segment, err error) {
	f, err := openSpare(path, size)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(path) // whatever it took is given back
		}
	}()
	s = &segment{path: path, file: f, room: size}
	if s.zeroed, err = reserve(f, 0, size); err != nil {
		return nil, err
	}
	if err := durable.SyncDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	s.ahead, err = os.OpenFile(path, os.O_RDWR|syscall.O_NOFOLLOW, 0)
	return s, err
}

// openSpare opens a file of at most size zeros at path. What is there already keeps its room; what is no such file goes.
func openSpare(path string, size int64) (*os.File, error) {
	if info, err := os.Lstat(path); err == nil && (!info.Mode().IsRegular() || info.Size() > size) {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err = onlyZeros(f); errors.Is(err, errNotEmpty) {
		err = f.Truncate(0)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// onlyZeros returns an error unless r holds nothing else.
func onlyZeros(r io.Reader) error {
	buffer := make([]byte, zeroChunk)
	for {
		n, err := r.Read(buffer)
		if !bytes.Equal(buffer[:n], zeros[:n]) {
			return errNotEmpty
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

var errNotEmpty = errors.New("there is something where only zeros belong")

// writeZeros writes zeros before the lines of the current segment. The room is reserved already; this makes the sync of a
// line cheap, for nothing but its bytes is left to be written then.
func (l *Log) writeZeros() {
	for {
		l.writing.Lock()
		s := l.current
		from := max(s.zeroed, s.size)
		n := min(zeroChunk, min(s.room, s.size+zeroAhead)-from)
		if n <= 0 {
			l.writing.Unlock()
			return
		}
		_, err := s.ahead.WriteAt(zeros[:n], from)
		s.zeroed = from + n
		l.writing.Unlock()
		if err == nil {
			err = syncData(s.ahead)
		}
		if err != nil && !errors.Is(err, os.ErrClosed) {
			l.log.Warn("the ledger could not write ahead", "error", err) // it matters when a line is written there
			return
		}
	}
}
