package audit

import (
	"context"
	"os"
	"time"

	"github.com/signet-ca/signet/internal/durable"
)

// keepYoung removes what is too old, until Close. It is apart from keep, for all that may be too old has to be read first,
// and that can be much.
func (l *Log) keepYoung(ctx context.Context) {
	daily := time.NewTicker(retireEvery)
	defer daily.Stop()
	known := map[uint64]extent{}
	for {
		l.retire(ctx, time.Now(), known)
		select {
		case <-ctx.Done():
			return
		case <-l.older:
		case <-daily.C:
		}
	}
}

// retire removes the oldest segments as long as every entry in them is older than the retention and every certificate in
// them has expired: what is still good somewhere is never forgotten. The current segment always stays. Known is kept
// between calls, so that a segment that has to stay is read once. It ends with ctx.
func (l *Log) retire(ctx context.Context, now time.Time, known map[uint64]extent) {
	if l.options.Retention <= 0 {
		return
	}
	removed := 0
	for {
		parts := l.snapshot().parts
		if len(parts) < 2 || !l.mayGo(ctx, parts[0], now, known) {
			break
		}
		if err := os.Remove(parts[0].path); err != nil {
			l.log.Error("a ledger segment past its retention cannot be removed", "segment", parts[0].name(), "error", err)
			break
		}
		l.log.Info("ledger segment removed", "segment", parts[0].name(), "newest", known[parts[0].first].newest)
		delete(known, parts[0].first)
		l.mu.Lock()
		l.segments = l.segments[1:]
		l.mu.Unlock()
		l.counts.removed.Add(1)
		removed++
	}
	if removed > 0 {
		poke(l.wake) // there may be room now
		if err := durable.SyncDir(l.dir); err != nil {
			l.log.Error("the ledger's folder cannot be synced", "error", err) // then they come back and go again
		}
	}
}

// mayGo reports whether the oldest segment is past its retention.
func (l *Log) mayGo(ctx context.Context, oldest part, now time.Time, known map[uint64]extent) bool {
	end := now.Add(-l.options.Retention)
	e, ok := known[oldest.first]
	if !ok {
		if at := begins(oldest); at.IsZero() || at.After(end) {
			return false // the cheap answer: it began too late to be old enough
		}
		var err error
		if e, err = extentOf(ctx, oldest); ctx.Err() != nil {
			return false
		} else if err != nil {
			l.log.Error("a ledger segment cannot be read, so it stays", "segment", oldest.name(), "error", err)
			known[oldest.first] = extent{newest: now.AddDate(1000, 0, 0)}
			return false
		}
		known[oldest.first] = e
	}
	return e.newest.Before(end) && e.notAfter.Before(now)
}
