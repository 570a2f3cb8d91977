package audit

import (
	"context"
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

// Bounds of the ring of refusals.
const (
	window     = time.Minute // in which a refusal that repeats is only counted
	maxWindows = 4096        // at once; beyond, the oldest ends early
	maxPending = 2 * maxWindows
	ringParts  = 4 // files of the same size
	ringRetry  = time.Minute
)

var errRing = errors.New("the ring of refusals cannot be written")

// ring keeps refusals of known callers in files of their own, of a fixed size in all. One goroutine owns the files, so a
// disk that fails or hangs holds up nobody longer than he wants to wait; while they cannot be written, it only counts.
type ring struct {
	dir    string
	budget int64
	log    *slog.Logger
	counts *counts
	wake   chan struct{} // of capacity 1
	stop   chan struct{}

	mu      sync.Mutex // guards what follows
	windows map[refusalKey]*refusals
	order   []*refusals // by when they were opened, those too that ended early
	pending []pending
	closing bool

	// Owned by keep.
	parts   []ringPart
	file    *os.File // of the last part; nil before the first write and after a failed one
	next    uint64   // number of the next line
	broken  bool     // the last write failed
	retryAt time.Time
	wait    time.Duration
}

type ringPart struct {
	part
	size int64
}

// refusalKey is what makes two refusals the same: who asked, for which pod, and why he was refused.
type refusalKey struct{ method, caller, callerNodeUID, cluster, podUID, nodeUID, reason string }

// refusals are those of one key within a window.
type refusals struct {
	key    refusalKey
	first  Entry
	opened time.Time
	ended  bool
	count  uint64
	last   time.Time
	done   chan struct{} // closed when it is known whether the first is on disk
	err    error         // why it is not
}

// pending is what waits to be written: the first of a window, or its sum.
type pending struct {
	body []byte
	of   *refusals // whose first this is; nil for a sum
}

// openRing finds what is there. Nothing that is wrong with it stops anybody.
func openRing(dir string, budget int64, log *slog.Logger, c *counts) *ring {
	r := &ring{
		dir: dir, budget: budget, log: log, counts: c, wait: retryMin, next: 1,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), windows: map[refusalKey]*refusals{},
	}
	parts, err := listParts(dir, refusalPrefix)
	if err != nil {
		log.Warn("the ring of refusals cannot be read", "error", err)
	}
	for i, p := range parts {
		info, err := os.Lstat(p.path)
		if err != nil {
			continue
		}
		r.parts = append(r.parts, ringPart{p, info.Size()})
		r.next = p.first
		whole := true
		for line, err := range (scan{parts: []part{p}, limit: info.Size(), sealed: true}).lines() {
			if whole = err == nil; whole {
				r.next = line.seq + 1
			}
		}
		if !whole { // behind a damaged line there may be more, whose numbers are not used again
			r.next += uint64(info.Size())/uint64(overhead) + 1
		} else if i == len(parts)-1 {
			r.file, _ = os.OpenFile(p.path, os.O_WRONLY|os.O_APPEND|syscall.O_NOFOLLOW, 0) // else a new part is begun
		}
	}
	return r
}

// Refuse puts the refusal of a known caller on record and returns the correlation id under which it is found. That is its
// own, unless the same caller was refused for the same reason less than a minute ago: then it is counted, and the id is
// that of the first. It returns when the first is on disk. An error says that it is not, or not yet; the id is good all
// the same. No error of it concerns the ledger.
func (l *Log) Refuse(ctx context.Context, e Entry) (correlationID string, err error) {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return e.CorrelationID, ErrClosed
	}
	l.appends.Add(1)
	l.mu.Unlock()
	defer l.appends.Done()
	w, err := l.ring.refuse(e, time.Now())
	if err == nil {
		select {
		case <-w.done:
			err = w.err
		case <-ctx.Done():
			err = ctx.Err()
		}
		e.CorrelationID = w.first.CorrelationID
	}
	if err != nil {
		l.Sample(e)
	}
	return e.CorrelationID, err
}

// refuse counts a refusal into its window, which it opens where there is none.
func (r *ring) refuse(e Entry, now time.Time) (*refusals, error) {
	if e.Time.IsZero() {
		e.Time = now
	}
	key := refusalKey{e.Method, e.Caller, e.CallerNodeUID, e.Cluster, e.PodUID, e.NodeUID, e.Reason}
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.windows[key]; w != nil && now.Sub(w.opened) < window {
		w.count++
		w.last = now
		r.counts.coalesced.Add(1)
		return w, nil
	} else if w != nil {
		r.end(w)
	}
	body, err := encode(e)
	if err != nil || len(r.pending) >= maxPending {
		r.counts.dropped.Add(1)
		return nil, errors.Join(errRing, err)
	}
	if len(r.windows) >= maxWindows {
		for len(r.order) > 0 && r.order[0].ended {
			r.order = r.order[1:]
		}
		r.end(r.order[0])
	}
	w := &refusals{key: key, first: e, opened: now, count: 1, done: make(chan struct{})}
	r.windows[key] = w
	r.order = append(r.order, w)
	r.pending = append(r.pending, pending{body, w})
	poke(r.wake)
	return w, nil
}

// end closes a window and has its sum written, where it says more than its first entry. The caller holds mu.
func (r *ring) end(w *refusals) {
	if w.ended {
		return
	}
	w.ended = true
	if r.windows[w.key] == w {
		delete(r.windows, w.key)
	}
	lost := false
	select {
	case <-w.done:
		lost = w.err != nil
	default:
	}
	if w.count < 2 && !lost {
		return
	}
	e := w.first
	e.Count, e.Last = w.count, w.last
	body, err := encode(e)
	if err != nil || len(r.pending) >= maxPending {
		r.counts.dropped.Add(1)
		return
	}
	r.pending = append(r.pending, pending{body: body})
}

// repeated returns, by correlation id, the sums of the windows that are open.
func (r *ring) repeated() map[string]Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	open := map[string]Entry{}
	for _, w := range r.windows {
		if w.count > 1 {
			open[w.first.CorrelationID] = Entry{Count: w.count, Last: w.last.UTC()}
		}
	}
	return open
}

// close ends every window and has keep end when their sums are written.
func (r *ring) close() {
	r.mu.Lock()
	r.closing = true
	r.mu.Unlock()
	close(r.stop)
}

// keep writes what is pending and ends windows, until close.
func (r *ring) keep() {
	for {
		todo, next, closing := r.take(time.Now())
		for len(todo) > 0 {
			todo = r.write(todo)
		}
		if closing {
			if r.file != nil {
				r.file.Close()
			}
			return
		}
		var due <-chan time.Time
		if next > 0 {
			due = time.After(next)
		}
		select {
		case <-r.wake:
		case <-due:
		case <-r.stop:
		}
	}
}

// take ends the windows whose time has come and returns what is to be written, and in how long the next one ends; zero
// where there is none.
func (r *ring) take(now time.Time) (todo []pending, next time.Duration, closing bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.order) > 0 {
		w := r.order[0]
		if left := window - now.Sub(w.opened); !w.ended && left > 0 && !r.closing {
			next = left
			break
		}
		r.end(w)
		r.order = r.order[1:]
	}
	todo, r.pending = r.pending, nil
	return todo, next, r.closing
}

// write puts the first of todo on disk, as many as fit into one write, tells those who wait, and returns the rest.
func (r *ring) write(todo []pending) []pending {
	n, size := 0, 0
	for n < len(todo) && size < maxBatch/8 {
		size += len(todo[n].body) + overhead
		n++
	}
	err := errRing
	now := time.Now()
	if !r.broken || !now.Before(r.retryAt) {
		err = r.put(todo[:n])
		r.note(err, now)
	}
	if err != nil {
		r.counts.dropped.Add(uint64(n))
	} else {
		r.counts.refusalsWritten.Add(uint64(n))
	}
	for _, p := range todo[:n] {
		if p.of != nil {
			p.of.err = err
			close(p.of.done)
		}
	}
	return todo[n:]
}

// note tells of a ring that cannot be written, and of one that can again.
func (r *ring) note(err error, now time.Time) {
	switch {
	case err != nil && !r.broken:
		r.log.Error("the ring of refusals cannot be written: refusals are only counted", "error", err)
	case err == nil && r.broken:
		r.log.Info("the ring of refusals is written again")
	}
	r.broken = err != nil
	r.counts.ringBroken.Store(r.broken)
	if r.broken {
		r.retryAt = now.Add(r.wait)
		r.wait = min(2*r.wait, ringRetry)
		return
	}
	r.wait = retryMin
}

// put writes lines to the newest part. After an error that part is left alone: what it holds is read up to where it is
// whole.
func (r *ring) put(entries []pending) error {
	var lines []byte
	for i, p := range entries {
		lines = appendLine(lines, r.next+uint64(i), r.next, p.body)
	}
	if r.file == nil || r.parts[len(r.parts)-1].size+int64(len(lines)) > r.budget/ringParts {
		if err := r.roll(int64(len(lines))); err != nil {
			return err
		}
	}
	newest := &r.parts[len(r.parts)-1]
	_, err := r.file.Write(lines)
	if err == nil {
		err = syncData(r.file)
	}
	r.next += uint64(len(entries)) // never used again, whatever became of them
	if err != nil {
		r.file.Close()
		r.file = nil
		if newest.size == 0 && os.Remove(newest.path) == nil {
			r.parts = r.parts[:len(r.parts)-1]
		}
		return err
	}
	newest.size += int64(len(lines))
	return nil
}

// roll begins a new part and removes the oldest, so that the whole stays within its budget.
func (r *ring) roll(need int64) error {
	if r.file != nil {
		r.file.Close()
		r.file = nil
	}
	total := max(need, r.budget/ringParts)
	for _, p := range r.parts {
		total += p.size
	}
	for len(r.parts) > 0 && (total > r.budget || len(r.parts) >= 4*ringParts) {
		if err := os.Remove(r.parts[0].path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		total -= r.parts[0].size
		r.parts = r.parts[1:]
	}
	p := part{r.next, filepath.Join(r.dir, partName(refusalPrefix, r.next))}
	f, err := os.OpenFile(p.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	if err := durable.SyncDir(r.dir); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", p.name(), err), f.Close(), os.Remove(p.path))
	}
	r.file = f
	r.parts = append(r.parts, ringPart{p, 0})
	return nil
}
