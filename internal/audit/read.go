package audit

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"os"
	"path/filepath"
	"strconv"
)

// A CorruptError says that a line of the ledger is not one that was written there, and that it is not merely the torn
// end. Nothing repairs it: entries that were acknowledged may be missing.
type CorruptError struct {
	Seq    uint64 // number that the line should have
	Offset int64  // of its first byte in the file
	Why    string
}

// Error returns where and what.
func (e *CorruptError) Error() string {
	return fmt.Sprintf("ledger entry %d at byte %d is damaged: %s", e.Seq, e.Offset, e.Why)
}

// A Record is an entry and its place in the ledger.
type Record struct {
	Seq uint64 `json:"seq"` // from 1, without gaps
	Entry
}

// All yields the entries that were on disk when it was called, oldest first, while others go on appending. It ends with
// the first error, which is a *CorruptError or one of reading.
func (l *Log) All() iter.Seq2[Record, error] {
	l.mu.Lock()
	size := l.size
	l.mu.Unlock()
	return scan(l.dir, size)
}

// Scan yields the entries of the ledger in dir, oldest first, without opening it for writing: it may be in use. It ends
// quietly before a last line that is not complete, and with the first error, which is a *CorruptError or one of reading.
func Scan(dir string) iter.Seq2[Record, error] { return scan(dir, -1) }

// scan reads at most limit bytes; a negative limit is none.
func scan(dir string, limit int64) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		f, err := os.Open(filepath.Join(dir, fileName))
		if err != nil {
			yield(Record{}, err)
			return
		}
		defer f.Close()
		var from io.Reader = f
		if limit >= 0 {
			from = io.LimitReader(f, limit)
		}
		r := newReader(from)
		for r.next() {
			var rec Record
			if err := json.Unmarshal(r.line, &rec); err != nil {
				yield(Record{}, &CorruptError{r.seq, r.offset - int64(len(r.line)) - 1, "its content does not parse"})
				return
			}
			if !yield(rec, nil) {
				return
			}
		}
		if r.err != nil {
			yield(Record{}, r.err)
		}
	}
}

// A line is {"seq":N,<the entry's members>,"crc":"<8 hex digits>"} and a newline. The checksum covers what stands before
// its own member, so a line stays plain JSON and can still be checked without parsing it.
const (
	seqStart = `{"seq":`
	crcStart = `,"crc":"`
	crcEnd   = `"}`
	crcLen   = len(crcStart) + 8 + len(crcEnd)
	overhead = len(seqStart) + 20 + crcLen + 1
)

// checksum is CRC-32C (RFC 3720 appendix B.4); the standard library makes its table once.
func checksum(line []byte) uint32 { return crc32.Checksum(line, crc32.MakeTable(crc32.Castagnoli)) }

// appendLine makes a line of the JSON object body, which has at least one member.
func appendLine(to []byte, seq uint64, body []byte) []byte {
	start := len(to)
	to = append(to, seqStart...)
	to = strconv.AppendUint(to, seq, 10)
	to = append(to, ',')
	to = append(to, body[1:len(body)-1]...)
	sum := checksum(to[start:])
	to = append(to, crcStart...)
	to = fmt.Appendf(to, "%08x", sum)
	return append(append(to, crcEnd...), '\n')
}

// What can be wrong with a line. Only the first two can be the work of a crash.
const (
	noChecksum    = "it has no checksum"
	wrongChecksum = "its checksum does not fit"
	wrongNumber   = "it has another number"
	tooLong       = "it is too long"
)

// checkLine says what keeps line, which is without its newline, from being the line number seq; empty when nothing does.
func checkLine(line []byte, seq uint64) string {
	covered := line[:max(0, len(line)-crcLen)]
	sum, begins := bytes.CutPrefix(line[len(covered):], []byte(crcStart))
	sum, ends := bytes.CutSuffix(sum, []byte(crcEnd))
	if !begins || !ends {
		return noChecksum
	}
	if string(sum) != fmt.Sprintf("%08x", checksum(covered)) {
		return wrongChecksum
	}
	if !bytes.HasPrefix(covered, fmt.Appendf(nil, "%s%d,", seqStart, seq)) {
		return wrongNumber
	}
	return ""
}

// reader reads checked lines.
type reader struct {
	in     *bufio.Reader
	line   []byte // the last good line, without its newline; valid until the next call
	seq    uint64 // of that line
	offset int64  // behind that line
	err    error  // nil at a clean or torn end
}

func newReader(r io.Reader) *reader { return &reader{in: bufio.NewReaderSize(r, MaxEntryBytes)} }

// next reads one line. It returns false at the end, with r.err set unless the end is clean or one torn line: one without
// its newline, or a last one whose bytes did not all reach the disk.
func (r *reader) next() bool {
	line, err := r.in.ReadSlice('\n')
	long := errors.Is(err, bufio.ErrBufferFull)
	for errors.Is(err, bufio.ErrBufferFull) {
		_, err = r.in.ReadSlice('\n')
	}
	if err != nil {
		if !errors.Is(err, io.EOF) {
			r.err = err
		}
		return false
	}
	why := tooLong
	if !long {
		why = checkLine(line[:len(line)-1], r.seq+1)
	}
	if why == "" {
		r.line, r.seq, r.offset = line[:len(line)-1], r.seq+1, r.offset+int64(len(line))
		return true
	}
	if _, err := r.in.Peek(1); !errors.Is(err, io.EOF) || why == wrongNumber {
		r.err = &CorruptError{r.seq + 1, r.offset, why}
	}
	return false
}
