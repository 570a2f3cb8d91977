package audit

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"iter"
	"math"
	"slices"
	"strings"
	"time"
)

// Query says which records are wanted. The zero Query wants all.
type Query struct {
	Since, Until time.Time          // from Since on and before Until; zero: no bound
	Last         int                // only the newest so many; zero: all
	ID           string             // only records of this correlation id, found from the newest on: what is older is not read
	Values       []string           // each is the whole value of some field: most lines that lack one are not even parsed
	Match        func(*Record) bool // decides; nil: all
}

const (
	// maxLast is up to how many of the newest are found from the end; beyond, all are counted first.
	maxLast = 10_000
	// clockSlack is how far an entry's time may be from those of its neighbours.
	clockSlack = time.Hour
)

// Records yields what is on record and matches, oldest first: the ledger, the ring of refusals and the sample. It holds
// nobody up, and reads one segment at a time. It ends with the first error: of ctx, of reading, or a *CorruptError.
func (l *Log) Records(ctx context.Context, q Query) iter.Seq2[Record, error] {
	open := l.ring.repeated()
	return find(ctx, q, func(ctx context.Context) ([]scan, []Record, error) {
		ledger := l.snapshot()
		ledger.ctx = ctx
		refusals, err := scanRefusals(ctx, l.dir)
		return append(refusals, ledger), l.sample.records(), err
	}, func(r *Record) {
		// A window that is open has not written its sum yet.
		if sum, ok := open[r.CorrelationID]; ok && r.Source == SourceRefusals && r.Count == 0 {
			r.Count, r.Last = sum.Count, sum.Last
		}
	})
}

// Export yields what is on record in dir and matches, oldest first: the ledger and the ring of refusals. The folder may be
// in use, or a copy.
func Export(ctx context.Context, dir string, q Query) iter.Seq2[Record, error] {
	return find(ctx, q, func(ctx context.Context) ([]scan, []Record, error) {
		ledger, err := openScan(dir)
		if err != nil {
			return nil, nil, err
		}
		ledger.ctx = ctx
		refusals, err := scanRefusals(ctx, dir)
		return append(refusals, ledger), nil, err
	}, func(*Record) {})
}

// scanRefusals returns one scan for each part of the ring, for none of them says anything about the next.
func scanRefusals(ctx context.Context, dir string) ([]scan, error) {
	parts, err := listParts(dir, refusalPrefix)
	var all []scan
	for _, p := range parts {
		all = append(all, scan{parts: []part{p}, limit: math.MaxInt64, source: SourceRefusals, ctx: ctx})
	}
	return all, err
}

func find(ctx context.Context, q Query, open func(context.Context) ([]scan, []Record, error), amend func(*Record)) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		scans, more, err := open(ctx)
		if err != nil {
			yield(Record{}, err)
			return
		}
		f := finder{Query: q, needles: needles(q.Values), amend: amend}
		switch {
		case q.ID != "":
			f.needles = append(f.needles, needles([]string{q.ID})...)
			f.byID(scans, more)(yield)
		case q.Last <= 0:
			f.merged(scans, more)(yield)
		case q.Last <= maxLast:
			f.newest(scans, more)(yield)
		default:
			f.skipping(scans, more)(yield)
		}
	}
}

// finder answers one query.
type finder struct {
	Query
	needles [][]byte
	amend   func(*Record)
}

// needles are how values stand in a line. One that JSON would write in another way is none: it only costs time.
func needles(values []string) (all [][]byte) {
	for _, v := range values {
		odd := func(c rune) bool { return c < ' ' || c > '~' || strings.ContainsRune(`"\<>&`, c) }
		if !strings.ContainsFunc(v, odd) {
			all = append(all, []byte(`"`+v+`"`))
		}
	}
	return all
}

func (f *finder) pass(line []byte) bool {
	return !slices.ContainsFunc(f.needles, func(n []byte) bool { return !bytes.Contains(line, n) })
}

func (f *finder) matches(r *Record) bool {
	f.amend(r)
	if !f.Since.IsZero() && later(r.Time, r.Last).Before(f.Since) || !f.Until.IsZero() && !r.Time.Before(f.Until) {
		return false
	}
	return (f.ID == "" || r.CorrelationID == f.ID) && (f.Match == nil || f.Match(r))
}

// from yields what matches of a scan. The ring is no proof of anything: where it is damaged, its part just ends.
func (f *finder) from(s scan) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		for rec, err := range records(f.prune(s), f.pass) {
			if err != nil && s.source == SourceRefusals && s.ctx.Err() == nil {
				return
			}
			if err != nil || f.matches(&rec) {
				if !yield(rec, err) {
					return
				}
			}
		}
	}
}

// prune leaves out the oldest parts if they end before Since, and the newest if they begin after Until.
func (f *finder) prune(s scan) scan {
	for !f.Since.IsZero() && len(s.parts) > 1 && f.tooOld(s.parts[1]) {
		s.parts = s.parts[1:]
	}
	for n := len(s.parts); !f.Until.IsZero() && n > 1 && begins(s.parts[n-1]).After(f.Until.Add(clockSlack)); n-- {
		s.parts, s.limit, s.sealed = s.parts[:n-1], math.MaxInt64, true
	}
	return s
}

// tooOld reports whether all before a part is older than what is asked for.
func (f *finder) tooOld(next part) bool {
	at := begins(next)
	return !f.Since.IsZero() && !at.IsZero() && at.Before(f.Since.Add(-clockSlack))
}

// merged yields everything, by time.
func (f *finder) merged(scans []scan, more []Record) iter.Seq2[Record, error] {
	var all []iter.Seq2[Record, error]
	var ring []iter.Seq2[Record, error]
	for _, s := range scans {
		if s.source == SourceRefusals {
			ring = append(ring, f.from(s))
		} else {
			all = append(all, f.from(s))
		}
	}
	all = append(all, concat(ring), func(yield func(Record, error) bool) {
		for _, r := range more {
			if f.matches(&r) && !yield(r, nil) {
				return
			}
		}
	})
	return merge(all)
}

func concat(all []iter.Seq2[Record, error]) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		for _, seq := range all {
			for r, err := range seq {
				if !yield(r, err) {
					return
				}
			}
		}
	}
}

// merge yields the records of several sequences by time, each in the order that it has.
func merge(all []iter.Seq2[Record, error]) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		type head struct {
			rec  Record
			err  error
			next func() (Record, error, bool)
		}
		var heads []*head
		for _, seq := range all {
			next, stop := iter.Pull2(seq)
			defer stop()
			h := &head{next: next}
			var ok bool
			if h.rec, h.err, ok = next(); ok {
				heads = append(heads, h)
			}
		}
		for len(heads) > 0 {
			h := slices.MinFunc(heads, func(a, b *head) int {
				switch {
				case a.err != nil:
					return -1
				case b.err != nil:
					return 1
				}
				return a.rec.Time.Compare(b.rec.Time)
			})
			if !yield(h.rec, h.err) || h.err != nil {
				return
			}
			var ok bool
			if h.rec, h.err, ok = h.next(); !ok {
				heads = slices.DeleteFunc(heads, func(x *head) bool { return x == h })
			}
		}
	}
}

// newest yields the last few. It reads from the newest part backwards, and no more of them than it needs.
func (f *finder) newest(scans []scan, more []Record) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		found := map[string][]Record{SourceSample: nil}
		for _, r := range more {
			if f.matches(&r) {
				found[SourceSample] = append(found[SourceSample], r)
			}
		}
		for _, s := range slices.Backward(scans) {
			for i := len(s.parts); i > 0 && len(found[s.source]) < f.Last; i-- {
				one := s
				one.parts = s.parts[i-1 : i]
				if i < len(s.parts) {
					if f.tooOld(s.parts[i]) {
						break
					}
					one.limit, one.sealed = math.MaxInt64, true
				}
				part, err := f.tail(one)
				if i < len(s.parts) && errors.Is(err, fs.ErrNotExist) {
					break // it went because of its age
				}
				if err != nil {
					yield(Record{}, err)
					return
				}
				all := fold(append(part, found[s.source]...))
				found[s.source] = slices.Clone(all[max(0, len(all)-f.Last):]) // nothing holds the others
			}
		}
		var all []Record
		for _, source := range []string{SourceLedger, SourceRefusals, SourceSample} {
			all = append(all, found[source]...)
		}
		slices.SortStableFunc(all, func(a, b Record) int { return a.Time.Compare(b.Time) })
		for _, r := range all[max(0, len(all)-f.Last):] {
			if !yield(r, nil) {
				return
			}
		}
	}
}

// tail returns the last of what matches in a scan, twice as many as are wanted: two of them may be one.
func (f *finder) tail(s scan) ([]Record, error) {
	var kept []Record
	oldest := 0 // once there are so many
	for r, err := range f.from(s) {
		switch {
		case err != nil:
			return nil, err
		case len(kept) < 2*f.Last:
			kept = append(kept, r)
		default:
			kept[oldest] = r
			oldest = (oldest + 1) % len(kept)
		}
	}
	return slices.Concat(kept[oldest:], kept[:oldest]), nil
}

// fold makes one of the two records that a refusal has that came again: of when it came first, and of how often it came.
func fold(all []Record) []Record {
	type key struct {
		source, id, reason string
		kind               Kind
		at                 time.Time
	}
	first := map[key]int{}
	kept := all[:0]
	for _, r := range all {
		k := key{r.Source, r.CorrelationID, r.Reason, r.Kind, r.Time}
		if i, ok := first[k]; !ok || r.Kind != KindRefuse || r.CorrelationID == "" {
			first[k] = len(kept)
			kept = append(kept, r)
		} else if r.Count > kept[i].Count {
			kept[i] = r
		}
	}
	return kept
}

// byID yields the records of one correlation id. The ring and the sample are small and are read first. Of the ledger it is
// read, from the newest segment on, up to the one that has it; where the others have it, only what is of the same time.
func (f *finder) byID(scans []scan, more []Record) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		var all []Record
		for _, s := range scans {
			if s.source != SourceRefusals {
				continue
			}
			for r, err := range f.from(s) {
				if err != nil {
					yield(Record{}, err)
					return
				}
				all = append(all, r)
			}
		}
		for _, r := range more {
			if f.matches(&r) {
				all = append(all, r)
			}
		}
		elsewhere := all
		for _, s := range scans {
			if s.source == SourceRefusals {
				continue
			}
			ledger, err := f.backwards(s, elsewhere)
			if err != nil {
				yield(Record{}, err)
				return
			}
			all = append(ledger, all...)
		}
		all = fold(all)
		slices.SortStableFunc(all, func(a, b Record) int { return a.Time.Compare(b.Time) })
		if f.Last > 0 {
			all = all[max(0, len(all)-f.Last):]
		}
		for _, r := range all {
			if !yield(r, nil) {
				return
			}
		}
	}
}

// backwards returns what matches of the newest part that has anything. Where something was found elsewhere, only parts that
// may be of the time of that are looked at.
func (f *finder) backwards(s scan, elsewhere []Record) (found []Record, err error) {
	var from, to time.Time
	for i, r := range elsewhere {
		if i == 0 || r.Time.Before(from) {
			from = r.Time
		}
		to = later(to, r.Time)
	}
	for i := len(s.parts); i > 0 && len(found) == 0; i-- {
		one := s
		one.parts = s.parts[i-1 : i]
		if i < len(s.parts) {
			one.limit, one.sealed = math.MaxInt64, true
			at := begins(s.parts[i])
			if f.tooOld(s.parts[i]) || len(elsewhere) > 0 && !at.IsZero() && at.Before(from.Add(-clockSlack)) {
				break
			}
		}
		if len(elsewhere) > 0 && begins(one.parts[0]).After(to.Add(clockSlack)) {
			continue
		}
		for r, err := range f.from(one) {
			if i < len(s.parts) && errors.Is(err, fs.ErrNotExist) {
				return found, nil // it went because of its age
			}
			if err != nil {
				return nil, err
			}
			found = append(found, r)
		}
	}
	return found, nil
}

// skipping yields the last many. It looks twice: first for where they begin, then for what they say. What came in between
// is not told, and of what went no other is told instead.
func (f *finder) skipping(scans []scan, more []Record) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		var last []place
		next := 0 // where the oldest of them is, once there are enough
		for r, err := range f.merged(scans, more) {
			switch {
			case err != nil:
				yield(Record{}, err)
				return
			case len(last) < f.Last:
				last = append(last, place{r.Source, r.Seq})
			default:
				last[next] = place{r.Source, r.Seq}
				next = (next + 1) % f.Last
			}
		}
		from, to := map[string]uint64{}, map[string]uint64{} // each source is in the order of its numbers
		for _, p := range last {
			if n, ok := from[p.source]; !ok || p.seq < n {
				from[p.source] = p.seq
			}
			to[p.source] = max(to[p.source], p.seq)
		}
		for r, err := range f.merged(scans, more) {
			if n, ok := from[r.Source]; err == nil && (!ok || r.Seq < n || r.Seq > to[r.Source]) {
				continue
			}
			if !yield(r, err) {
				return
			}
		}
	}
}

// place is where a record is.
type place struct {
	source string
	seq    uint64
}
