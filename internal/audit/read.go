package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
)

// A CorruptError says that a line of the ledger is not one that was written there, and that it is not merely a torn end.
// Nothing repairs it: entries that were acknowledged may be missing.
type CorruptError struct {
	File   string // name of the segment
	Seq    uint64 // number that the line should have
	Offset int64  // of its first byte in the file
	Why    string
}

// Error returns where and what.
func (e *CorruptError) Error() string {
	return fmt.Sprintf("ledger entry %d at byte %d of %s is damaged: %s", e.Seq, e.Offset, e.File, e.Why)
}

// maxTorn bounds what one crash can tear: a batch, and the entry that was added to it last.
const maxTorn = maxBatch + MaxEntryBytes

// reader reads checked lines of one segment. What follows the last good line is told apart: zeros are room that was not
// used; what one interrupted write can have left is torn; all else is damage.
//
// A write that a power failure interrupts reaches the disk in pieces of any order: a line may be missing in the middle of
// a batch whose end is there. Nobody was told of that batch. But a batch is begun only when the one before is on disk; so
// a line of a later batch proves that what is missing before it was there once.
type reader struct {
	file   io.ReaderAt
	part   part
	limit  int64 // what is behind it does not count
	sealed bool  // nothing can be torn: there is a later segment, or all was on disk
	in     *bufio.Reader
	line   []byte // the last good line, without its newline; valid until the next call
	seq    uint64 // of that line
	batch  uint64 // of that line
	offset int64  // behind that line
	torn   int64  // bytes behind offset that are torn; known after the last line
	err    error  // nil at a clean or torn end
}

func newReader(f io.ReaderAt, p part) *reader { return newReaderAt(f, p, p.first, 0, math.MaxInt64) }

// newReaderAt begins at an offset, where the line number first is expected, and reads up to limit.
func newReaderAt(f io.ReaderAt, p part, first uint64, offset, limit int64) *reader {
	r := &reader{file: f, part: p, seq: first - 1, offset: offset, limit: limit}
	r.in = bufio.NewReaderSize(io.NewSectionReader(f, offset, limit-offset), MaxEntryBytes)
	return r
}

// next reads one line. It returns false at the end, with r.err set unless the end is clean or torn.
func (r *reader) next() bool {
	line, err := r.in.ReadSlice('\n')
	switch {
	case errors.Is(err, io.EOF) && len(line) == 0:
		return false
	case errors.Is(err, io.EOF):
		r.end(noNewline)
		return false
	case errors.Is(err, bufio.ErrBufferFull):
		r.end(tooLong)
		return false
	case err != nil:
		r.err = err
		return false
	}
	seq, batch, why := parseLine(line[:len(line)-1])
	switch {
	case why != "":
		r.end(why)
		return false
	case seq != r.seq+1:
		r.err = r.corrupt(wrongNumber)
		return false
	}
	r.line, r.seq, r.batch, r.offset = line[:len(line)-1], seq, batch, r.offset+int64(len(line))
	return true
}

func (r *reader) corrupt(why string) error {
	return &CorruptError{r.part.name(), r.seq + 1, r.offset, why}
}

// end looks at what follows the last good line, in which the next line is not good, for the given reason.
func (r *reader) end(why string) {
	window, err := io.ReadAll(io.NewSectionReader(r.file, r.offset, min(maxTorn, r.limit-r.offset)))
	if err != nil {
		r.err = err
		return
	}
	rest := r.offset + int64(len(window))
	switch err := onlyZeros(io.NewSectionReader(r.file, rest, max(0, r.limit-rest))); {
	case errors.Is(err, errNotEmpty):
		r.err = r.corrupt(why)
		return
	case err != nil:
		r.err = err
		return
	}
	used := bytes.TrimRight(window, "\x00")
	if len(used) == 0 {
		return
	}
	if window[0] == 0 {
		why = gap
	}
	if r.sealed || laterBatch(used, r.seq+1) {
		r.err = r.corrupt(why)
		return
	}
	r.torn = int64(len(used))
}

// laterBatch reports whether b has a line that was not written together with the line number lost.
func laterBatch(b []byte, lost uint64) bool {
	for line := range bytes.Lines(b) {
		start := bytes.LastIndex(line, []byte(seqStart)) // zeros or half a line may stand before it
		if start < 0 || line[len(line)-1] != '\n' {
			continue
		}
		seq, batch, why := parseLine(line[start : len(line)-1])
		if why == "" && (seq <= lost || batch > lost) {
			return true
		}
	}
	return false
}

// checkSealed checks that a segment is there from its first line to the one before the next segment's first.
func checkSealed(p, next part) error {
	f, err := os.Open(p.path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	head := newReaderAt(f, p, p.first, 0, info.Size())
	head.sealed = true
	if !head.next() {
		if head.err != nil {
			return head.err
		}
		return head.corrupt(missing)
	}
	if lastLine(f, info.Size()) == next.first-1 {
		return nil
	}
	// It was not shortened when it was full, or something is wrong: only the whole of it tells.
	r := newReader(f, p)
	r.sealed = true
	for r.next() {
	}
	if r.err == nil && r.seq != next.first-1 {
		r.err = r.corrupt(missing)
	}
	return r.err
}

// lastLine returns the number of the line at the very end of a file; zero where there is none.
func lastLine(f io.ReaderAt, size int64) uint64 {
	from := max(0, size-MaxEntryBytes-1)
	tail, err := io.ReadAll(io.NewSectionReader(f, from, size-from))
	if err != nil || len(tail) == 0 || tail[len(tail)-1] != '\n' {
		return 0
	}
	tail = tail[:len(tail)-1]
	seq, _, why := parseLine(tail[bytes.LastIndexByte(tail, '\n')+1:])
	if why != "" {
		return 0
	}
	return seq
}
