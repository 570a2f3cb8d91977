package audit

import (
	"context"
	"fmt"
	"time"
)

// maxBatch is the size of a batch to which no entry is added any more. It bounds what a crash can tear, and is less than
// the smallest segment: a batch is never split.
const maxBatch = 512 << 10

// batch is the entries that share one write and one sync.
type batch struct {
	bodies [][]byte
	size   int
	done   chan struct{} // closed when err is known
	err    error
}

// Append puts e on record and returns nil when it is on disk. Its time defaults to now. An error that matches ErrFailed
// says that the outcome is unknown and that this ledger is done; all others that the entry was not written, but for one:
// when ctx ends while the write of somebody else's batch is waited for, the entry may still get on record. Then too the
// caller must not do what the entry says. Whoever leads a batch waits until its outcome is known, whatever its ctx, for
// others wait for it too.
func (l *Log) Append(ctx context.Context, e Entry) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	body, err := encode(e)
	if err != nil {
		return err
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

// encode returns the JSON of an entry, in UTC.
func encode(e Entry) ([]byte, error) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Time, e.NotAfter, e.Last = e.Time.UTC(), e.NotAfter.UTC(), e.Last.UTC()
	body, err := appendEntry(make([]byte, 0, entryBytes), &e)
	if err == nil && len(body)+overhead > MaxEntryBytes {
		err = fmt.Errorf("%w: %d bytes", ErrTooLarge, len(body))
	}
	return body, err
}

// join puts an entry into a batch that is not written yet. Whoever begins a batch is its leader and has to write it, so
// no goroutine is needed, and a batch grows for as long as the one before it takes and somebody else is ready. Its numbers are given when
// it is written: then the order of the leaders does not matter, and a batch without room leaves no gap.
func (l *Log) join(body []byte) (b *batch, leader bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.err != nil:
		return nil, false, l.err
	case l.closed:
		return nil, false, ErrClosed
	}
	if l.batch == nil || l.batch.size >= maxBatch {
		l.batch, leader = &batch{done: make(chan struct{})}, true
	}
	l.batch.bodies = append(l.batch.bodies, body)
	l.batch.size += len(body) + overhead
	l.appends.Add(1)
	return l.batch, leader, nil
}

// write waits for the batch before, closes b to newcomers, and puts it on disk.
func (l *Log) write(b *batch) {
	l.writing.Lock()
	defer l.writing.Unlock()
	defer close(b.done)
	l.lull.wait()
	l.mu.Lock()
	if l.batch == b {
		l.batch = nil
	}
	b.err = l.err
	first := l.last + 1
	l.mu.Unlock()
	if b.err != nil {
		return
	}
	l.buffer = l.buffer[:0]
	for i, body := range b.bodies {
		l.buffer = appendLine(l.buffer, first+uint64(i), first, body)
	}
	b.err = l.put(first, len(b.bodies))
}

// put writes the buffer, which holds n entries, into the current segment or the next.
func (l *Log) put(first uint64, n int) error {
	if l.current.size+int64(len(l.buffer)) > l.current.room {
		if err := l.roll(first); err != nil {
			return err
		}
	}
	c := l.current
	_, err := c.file.WriteAt(l.buffer, c.size)
	if err == nil {
		err = syncData(c.file)
	}
	if err != nil {
		return l.fail(err)
	}
	c.size += int64(len(l.buffer))
	if c.wantsZeros() {
		poke(l.behind)
	}
	l.counts.entries.Add(uint64(n))
	l.counts.syncs.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last += uint64(n)
	l.size = c.size
	return nil
}

// fail ends the ledger for good: err is of a write whose outcome is unknown.
func (l *Log) fail(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.err = fmt.Errorf("%w: %w", ErrFailed, err)
		close(l.failed)
	}
	return l.err
}
