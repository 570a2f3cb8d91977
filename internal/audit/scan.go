package audit

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"iter"
	"math"
	"os"
	"path/filepath"
	"time"
)

// Where a record is from.
const (
	SourceLedger   = "ledger"   // what was issued, durable before it left
	SourceRefusals = "refusals" // the ring of refused callers that were known
	SourceSample   = "sample"   // some of the refusals that are only counted, in memory
)

// A Record is an entry and its place on record.
type Record struct {
	Source string `json:"source"`
	Seq    uint64 `json:"seq"` // from 1; in the ledger without gaps, but the oldest may be gone
	Entry
}

// All yields the entries of the ledger that were on disk when it was called, oldest first, while others go on appending.
// It ends with the first error, which is a *CorruptError or one of reading.
func (l *Log) All() iter.Seq2[Record, error] { return records(l.snapshot(), nil) }

// Scan yields the entries of the ledger in dir, oldest first, without opening it for writing: it may be in use. It ends
// quietly before a torn end, and with the first error, which is a *CorruptError or one of reading.
func Scan(dir string) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		s, err := openScan(dir)
		if err != nil {
			yield(Record{}, err)
			return
		}
		records(s, nil)(yield)
	}
}

// ScanRefusals yields the entries of the ring of refusals in dir, oldest first. It may be in use. What is damaged there
// is passed over: it is no proof of anything.
func ScanRefusals(dir string) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		parts, err := listParts(dir, refusalPrefix)
		if err != nil {
			yield(Record{}, err)
			return
		}
		for _, p := range parts {
			for rec, err := range records(scan{parts: []part{p}, limit: math.MaxInt64, source: SourceRefusals}, nil) {
				if err == nil && !yield(rec, nil) {
					return
				}
			}
		}
	}
}

// scan is what is to be read.
type scan struct {
	parts  []part
	limit  int64 // of the last part: what is behind it does not count; math.MaxInt64: none
	sealed bool  // up to the limit all was on disk once, so nothing can be torn
	source string
	ctx    context.Context // nil: it is read to its end
}

// snapshot is what is on disk now.
func (l *Log) snapshot() scan {
	l.mu.Lock()
	defer l.mu.Unlock()
	return scan{parts: l.segments, limit: l.size, sealed: true, source: SourceLedger} // the slice is replaced, never changed
}

// openScan is what there is in a folder that somebody else may write to.
func openScan(dir string) (scan, error) {
	parts, err := listParts(dir, ledgerPrefix)
	if err == nil && len(parts) == 0 {
		_, err = os.Lstat(filepath.Join(dir, lockName)) // no ledger is an error, an empty one is none
		if err == nil {
			return scan{source: SourceLedger}, nil
		}
	}
	return scan{parts: parts, limit: math.MaxInt64, source: SourceLedger}, err
}

// lines yields the lines of a scan. An error is the last that it yields. What is yielded is valid until the next.
func (s scan) lines() iter.Seq2[*reader, error] {
	return func(yield func(*reader, error) bool) {
		next := uint64(0) // number of the line that must come; zero: any
		for i := range s.parts {
			r, gone, goOn := s.part(i, next, yield)
			if !goOn {
				return
			}
			if next = 0; !gone {
				next = r.seq + 1
			}
		}
	}
}

// part yields the lines of one part. Gone is one that was removed since it was listed, because of its age.
func (s scan) part(i int, next uint64, yield func(*reader, error) bool) (r *reader, gone, goOn bool) {
	p, last := s.parts[i], i == len(s.parts)-1
	if next != 0 && next != p.first {
		return nil, false, yield(nil, &CorruptError{p.name(), next, 0, missing}) && false
	}
	f, err := os.Open(p.path)
	if errors.Is(err, fs.ErrNotExist) && !last {
		return nil, true, true
	}
	if err != nil {
		return nil, false, yield(nil, err) && false
	}
	defer f.Close()
	limit := int64(math.MaxInt64)
	if last {
		limit = s.limit
	}
	r = newReaderAt(f, p, p.first, 0, limit)
	for again := false; ; again = true {
		r.sealed = !last || s.sealed
		read := false
		for r.next() {
			if s.ctx != nil && s.ctx.Err() != nil {
				return r, false, yield(nil, s.ctx.Err()) && false
			}
			if read = true; !yield(r, nil) {
				return r, false, false
			}
		}
		// Where somebody writes at this moment, what looked damaged may be whole by now: what comes later in the file was
		// written later, so one more look tells.
		if r.err == nil || again && !read {
			break
		}
		r = newReaderAt(f, p, r.seq+1, r.offset, limit)
	}
	if r.err != nil {
		return r, false, yield(nil, r.err) && false
	}
	return r, false, true
}

// records yields what the lines of a scan hold. Those that pass over are not parsed.
func records(s scan, pass func(line []byte) bool) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		for r, err := range s.lines() {
			if err != nil {
				yield(Record{}, err)
				return
			}
			if pass != nil && !pass(r.line) {
				continue
			}
			rec := Record{Source: s.source}
			if err := json.Unmarshal(r.line, &rec); err != nil {
				yield(Record{}, &CorruptError{r.part.name(), r.seq, r.offset - int64(len(r.line)) - 1, notParsed})
				return
			}
			if !yield(rec, nil) {
				return
			}
		}
	}
}

// extent is how far what a segment holds reaches.
type extent struct {
	newest   time.Time // of all its entries
	notAfter time.Time // of all its certificates
}

// extentOf reads the whole of one segment.
func extentOf(ctx context.Context, p part) (e extent, err error) {
	for rec, err := range records(scan{parts: []part{p}, limit: math.MaxInt64, sealed: true, ctx: ctx}, nil) {
		if err != nil {
			return e, err
		}
		e.newest, e.notAfter = later(e.newest, rec.Time), later(e.notAfter, rec.NotAfter)
		e.newest = later(e.newest, rec.Last)
	}
	return e, nil
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// begins returns the time of the first entry of a part; zero where there is none.
func begins(p part) time.Time {
	for rec, err := range records(scan{parts: []part{p}, limit: math.MaxInt64, sealed: true}, nil) {
		if err != nil {
			break
		}
		return rec.Time
	}
	return time.Time{}
}
