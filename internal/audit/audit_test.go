package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/internal/durable"
)

// small makes a ledger that costs little.
var small = Options{SegmentSize: MinSegment, RefusalBytes: MinRefusals}

// fileName is the first segment.
var fileName = partName(ledgerPrefix, 1)

// folder returns the name of a ledger that is not there yet, on a tmpfs where there is one: for tests to which the disk is
// but a price.
func folder(t testing.TB) string {
	if dir, err := os.MkdirTemp("/dev/shm", "signet-test-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		return filepath.Join(dir, "ledger")
	}
	return filepath.Join(t.TempDir(), "ledger")
}

func open(t testing.TB, dir string) *Log {
	t.Helper()
	l, err := openPatient(dir, small)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// openPatient is Open of a ledger that waits for its next segment for as long as a busy machine may take to make it: an
// entry that finds no room is for the tests that have taken the room away.
func openPatient(dir string, o Options) (*Log, error) {
	l, err := Open(dir, o)
	if err == nil {
		l.patient = time.Minute
	}
	return l, err
}

// entry is number n of a test: every field is set, some with what would break a line.
func entry(n int) Entry {
	at := time.Date(2026, 11, 22, 10, 0, 0, n, time.UTC)
	return Entry{
		Time: at, Kind: KindIssue, CorrelationID: fmt.Sprintf("%016x", n), SPIFFEID: "spiffe://example.org/ns/a/sa/b",
		Cluster: "https://issuer", Namespace: "a\n{\"seq\":7}", ServiceAccount: "b", ServiceAccountUID: "c", Pod: "d\x00\xff\u2028", PodUID: "e",
		Node: "f", NodeUID: "g", TokenID: "h", DNSNames: []string{"i", `j","crc":"00000000"}`}, Serial: "0a", NotAfter: at.Add(time.Hour), Issuer: "0b", Reason: "<k>",
	}
}

// fill makes a closed ledger with n entries and returns its folder.
func fill(t testing.TB, n int) string {
	t.Helper()
	dir := folder(t)
	l := open(t, dir)
	for i := range n {
		if err := l.Append(t.Context(), entry(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// content returns a file without the room behind it.
func content(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.TrimRight(data, "\x00")
}

func scanAll(t testing.TB, dir string) []Record {
	t.Helper()
	var all []Record
	for rec, err := range Scan(dir) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, rec)
	}
	return all
}

func TestAppendThenScan(t *testing.T) {
	dir := fill(t, 3)
	l := open(t, dir)
	if l.Cut() != 0 {
		t.Errorf("%d bytes cut from a ledger that was closed", l.Cut())
	}
	before := time.Now()
	if err := l.Append(t.Context(), Entry{Kind: KindRefuse, Reason: "POD_DELETED"}); err != nil {
		t.Fatal(err)
	}
	got := scanAll(t, dir)
	var want []Record
	for i := range 3 {
		e := entry(i + 1)
		e.Pod = "d\x00\ufffd\u2028" // JSON has no way to write a byte that is not UTF-8
		want = append(want, Record{Source: SourceLedger, Seq: uint64(i + 1), Entry: e})
	}
	want = append(want, Record{Source: SourceLedger, Seq: 4, Entry: Entry{Time: got[3].Time, Kind: KindRefuse, Reason: "POD_DELETED"}})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("scanned (-want +got):\n%s", diff)
	}
	if at := got[3].Time; at.Before(before.Add(-time.Second)) || at.After(time.Now()) || at.Location() != time.UTC {
		t.Errorf("time %v by default, want now in UTC", at)
	}
	data, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(data), "\n"); n != 4 {
		t.Errorf("%d lines for 4 entries: a value broke its line", n)
	}
	if info, err := os.Stat(filepath.Join(dir, fileName)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", info.Mode(), err)
	}
}

func TestScanStopsEarly(t *testing.T) {
	n := 0
	for range Scan(fill(t, 3)) {
		if n++; n == 2 {
			break
		}
	}
	if n != 2 {
		t.Errorf("%d entries seen, want 2", n)
	}
	for _, err := range Scan(t.TempDir()) {
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("error %v for a folder without a ledger", err)
		}
	}
}

func TestAppendConcurrently(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	l := open(t, dir)
	const writers, each = 16, 50
	var acknowledged [writers]atomic.Int64
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if err := l.Append(t.Context(), Entry{Kind: "test", Pod: fmt.Sprint(w), Serial: fmt.Sprint(i)}); err != nil {
					t.Error(err)
				}
				acknowledged[w].Store(int64(i + 1))
			}
		})
	}
	// Whoever reads meanwhile finds at least what was acknowledged before.
	for range 20 {
		var want, got [writers]int64
		for w := range writers {
			want[w] = acknowledged[w].Load()
		}
		seq := uint64(0)
		for rec, err := range l.All() {
			if err != nil {
				t.Fatal(err)
			}
			if seq++; rec.Seq != seq {
				t.Fatalf("entry %d follows %d", rec.Seq, seq-1)
			}
			var w int
			fmt.Sscan(rec.Pod, &w)
			if rec.Serial != fmt.Sprint(got[w]) {
				t.Fatalf("writer %d: entry %s in place of %d", w, rec.Serial, got[w])
			}
			got[w]++
		}
		for w := range writers {
			if got[w] < want[w] {
				t.Fatalf("writer %d: %d entries read, %d acknowledged", w, got[w], want[w])
			}
		}
	}
	wg.Wait()
	if got := len(scanAll(t, dir)); got != writers*each {
		t.Errorf("%d entries, want %d", got, writers*each)
	}
}

// waitFor waits until cond holds for l.
func waitFor(t *testing.T, l *Log, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); runtime.Gosched() {
		l.mu.Lock()
		ok := cond()
		l.mu.Unlock()
		if ok {
			return
		}
	}
	t.Fatal("it did not happen")
}

// While one batch is on its way to the disk, all who come share the next one. Those who leave are on record all the
// same, and the leader, on whom the others wait, does not leave.
func TestAppendSharesBatch(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	l := open(t, dir)
	ctx, cancel := context.WithCancel(t.Context())
	l.writing.Lock() // a disk that takes its time
	var wg sync.WaitGroup
	var left, stayed atomic.Int32
	enter := func(n int) {
		wg.Go(func() {
			switch err := l.Append(ctx, entry(n)); {
			case err == nil:
				stayed.Add(1)
			case errors.Is(err, context.Canceled) && !errors.Is(err, ErrFailed):
				left.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	enter(1)
	waitFor(t, l, func() bool { return l.batch != nil })
	shared := l.batch
	for n := range 9 {
		enter(n + 2)
	}
	waitFor(t, l, func() bool { return len(shared.bodies) == 10 && l.batch == shared })
	cancel()
	for left.Load() < 9 {
		runtime.Gosched()
	}
	if size := l.size; size != 0 {
		t.Errorf("%d bytes count as written before they are", size)
	}
	l.writing.Unlock()
	wg.Wait()
	if left.Load() != 9 || stayed.Load() != 1 {
		t.Errorf("%d left and %d stayed, want 9 and the leader", left.Load(), stayed.Load())
	}
	if got := len(scanAll(t, dir)); got != 10 {
		t.Errorf("%d entries on record, want 10", got)
	}
	if err := l.Append(ctx, entry(11)); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v for a context that has ended before", err)
	}
	if got := len(scanAll(t, dir)); got != 10 {
		t.Errorf("%d entries on record, want 10", got)
	}
}

func TestAppendTooLarge(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	l := open(t, dir)
	for n := MaxEntryBytes - 200; n < MaxEntryBytes+200; n++ {
		if err := l.Append(t.Context(), Entry{Kind: "test", Pod: strings.Repeat("x", n)}); err != nil && !errors.Is(err, ErrTooLarge) {
			t.Fatal(err)
		}
	}
	if err := l.Append(t.Context(), entry(1)); err != nil {
		t.Errorf("the ledger does not go on after an entry that was too large: %v", err)
	}
	// The longest that was accepted can be read back.
	if got := scanAll(t, dir); len(got) < 2 || len(got) > 300 {
		t.Errorf("%d entries on record", len(got))
	}
}

func TestOpenLocked(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	l := open(t, dir)
	if _, err := Open(dir, small); !errors.Is(err, ErrLocked) {
		t.Errorf("error %v, want ErrLocked", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(t.Context(), entry(1)); !errors.Is(err, ErrClosed) {
		t.Errorf("error %v, want ErrClosed", err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	open(t, dir)
}

func TestOpenUnsafe(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, small); !errors.Is(err, durable.ErrUnsafe) {
		t.Errorf("error %v, want durable.ErrUnsafe", err)
	}
	for _, name := range []string{fileName, lockName} {
		dir := filepath.Join(t.TempDir(), "ledger")
		if err := errors.Join(os.Mkdir(dir, 0o700), os.Symlink("elsewhere", filepath.Join(dir, name))); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, small); err == nil {
			t.Errorf("%s was followed as a link", name)
		}
	}
}

// A crash may leave the last line torn, and nothing else. What is cut was never acknowledged; what was is never cut.
func TestOpenDamaged(t *testing.T) {
	dir := fill(t, 3)
	good := content(t, filepath.Join(dir, fileName))
	lines := strings.SplitAfter(string(good), "\n")[:3]
	flip := func(s string, i int) string { return s[:i] + string(s[i]^1) + s[i+1:] }
	in := func(n, batch uint64) string { return string(appendLine(nil, n, batch, []byte(`{"kind":"x"}`))) }
	other := func(n uint64) string { return in(n, n) }
	zeros := func(n int) string { return strings.Repeat("\x00", n) }
	type row struct {
		name, content string
		keep          int    // entries that stay; -1: refused
		seq           uint64 // of the line that is refused
		why           string
	}
	rows := []row{
		{"whole", string(good), 3, 0, ""},
		{"empty", "", 0, 0, ""},
		{"zeros at the end", string(good) + strings.Repeat("\x00", 4096), 3, 0, ""},
		{"many zeros at the end", string(good) + strings.Repeat("\x00", 3*MaxEntryBytes), 3, 0, ""},
		{"zeros, then the end of the line", lines[0] + strings.Repeat("\x00", 512) + lines[1][512%len(lines[1]):], 1, 0, ""},
		{"last line rotten", lines[0] + lines[1] + flip(lines[2], 30), 2, 0, ""},
		{"last line empty", string(good) + "\n", 3, 0, ""},
		{"middle line rotten", lines[0] + flip(lines[1], 30) + lines[2], -1, 2, wrongChecksum},
		{"checksum rotten", lines[0] + flip(lines[1], len(lines[1])-6) + lines[2], -1, 2, wrongChecksum},
		{"middle line missing", lines[0] + lines[2], -1, 2, wrongNumber},
		{"first lines missing", lines[2], -1, 1, wrongNumber},
		{"line twice at the end", string(good) + lines[2], -1, 4, wrongNumber},
		{"two torn lines", lines[0] + "{\n{", 1, 0, ""},
		// One write of three lines, whose pieces reached the disk in another order.
		{"the start of a batch missing", lines[0] + zeros(len(other(2))) + in(3, 2) + in(4, 2), 1, 0, ""},
		{"the middle of a batch missing", lines[0] + other(2) + zeros(len(in(3, 2))) + in(4, 2), 2, 0, ""},
		{"the middle of a batch rotten", lines[0] + other(2) + flip(in(3, 2), 20) + in(4, 2), 2, 0, ""},
		{"half of a batch missing", lines[0] + zeros(len(other(2))+10) + in(3, 2)[10:] + in(4, 2), 1, 0, ""},
		{"a batch missing before another", lines[0] + zeros(len(other(2))) + in(3, 2) + other(4), -1, 2, gap},
		{"a batch rotten before another", lines[0] + flip(other(2), 12) + in(3, 2) + other(4) + in(5, 4), -1, 2, wrongChecksum},
		{"a batch rotten before the rest of another", lines[0] + flip(other(2), 12) + flip(other(3), 12) + in(4, 3), -1, 2, wrongChecksum},
		{"a batch missing, the next behind half a line", lines[0] + zeros(len(other(2))-1) + "x" + other(3), -1, 2, gap},
		{"a batch that begins behind itself", lines[0] + in(2, 3), 1, 0, ""},
		{"more than one write is torn", lines[0] + "x" + zeros(maxTorn) + "x", -1, 2, tooLong},
		{"an old number behind a gap", lines[0] + zeros(100) + other(1), -1, 2, gap},
		{"an empty line between", lines[0] + "\n" + lines[1], -1, 2, noChecksum},
		{"a long line between", lines[0] + strings.Repeat("x", 2*MaxEntryBytes) + "\n" + other(2), -1, 2, tooLong},
		{"number with a prefix", lines[0] + other(20), -1, 2, wrongNumber},
	}
	for n := 0; n < len(lines[2]); n += 11 {
		rows = append(rows, row{fmt.Sprintf("torn after %d bytes", n), lines[0] + lines[1] + lines[2][:n], 2, 0, ""})
	}
	for _, tc := range rows {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(dir, fileName)
			if err := os.WriteFile(path, []byte(tc.content), 0o600); err != nil {
				t.Fatal(err)
			}
			l, err := openPatient(dir, small)
			if tc.keep < 0 {
				ce, ok := errors.AsType[*CorruptError](err)
				if !ok || ce.Seq != tc.seq || ce.Why != tc.why {
					t.Fatalf("error %v, want entry %d refused: %s", err, tc.seq, tc.why)
				}
				if got, _ := os.ReadFile(path); string(got) != tc.content {
					t.Error("a damaged ledger was changed")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			var kept strings.Builder
			for line := range strings.Lines(tc.content) {
				if kept.Len() == 0 || strings.HasPrefix(line, seqStart) {
					kept.WriteString(line)
				}
				if strings.Count(kept.String(), "\n") >= tc.keep {
					break
				}
			}
			n := 0
			if tc.keep > 0 {
				n = kept.Len()
			}
			got, _ := os.ReadFile(path)
			if !strings.HasPrefix(string(got), tc.content[:n]) || strings.Trim(string(got[n:]), "\x00") != "" {
				t.Errorf("what is kept is not the first %d bytes", n)
			}
			if want := len(strings.TrimRight(tc.content[n:], "\x00")); l.Cut() != int64(want) {
				t.Errorf("%d bytes cut, want %d", l.Cut(), want)
			}
			if err := l.Append(t.Context(), entry(9)); err != nil {
				t.Fatal(err)
			}
			all := scanAll(t, dir)
			if len(all) != tc.keep+1 || all[tc.keep].Seq != uint64(tc.keep+1) {
				t.Errorf("%d entries after one more, want %d", len(all), tc.keep+1)
			}
		})
	}
}

// Scan of a ledger in use ends before a line that is being written, and tells damage like Open does.
func TestScanDamaged(t *testing.T) {
	dir := fill(t, 2)
	path := filepath.Join(dir, fileName)
	good := content(t, path)
	for _, tc := range []struct {
		name, content string
		good          int
		corrupt       bool
	}{
		{"half a line", string(good[:len(good)-3]), 1, false},
		{"rotten", "x" + string(good[1:]), 0, true},
		{"not an entry", string(appendLine(nil, 1, 1, []byte(`{"time":5}`))) + string(good), 0, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := os.WriteFile(path, []byte(tc.content), 0o600); err != nil {
				t.Fatal(err)
			}
			n := 0
			for _, err := range Scan(dir) {
				if err == nil {
					n++
				} else if ce, ok := errors.AsType[*CorruptError](err); !ok || !tc.corrupt || ce.Offset != 0 {
					t.Errorf("error %v", err)
				}
			}
			if n != tc.good {
				t.Errorf("%d entries, want %d", n, tc.good)
			}
		})
	}
}

// FuzzOpen: no content makes Open panic, change what it refuses, or keep what it cannot read back.
func FuzzOpen(f *testing.F) {
	line := string(appendLine(nil, 1, 1, []byte(`{"time":"2026-11-22T10:00:00Z","kind":"issue"}`)))
	for _, seed := range []string{"", line, line + line, line[:20], line + "\x00\x00", "\n", line + "{\n", strings.Repeat("x", 2*MaxEntryBytes)} {
		f.Add([]byte(seed))
	}
	batch := string(appendLine(nil, 2, 2, []byte(`{"kind":"a"}`))) + string(appendLine(nil, 3, 2, []byte(`{"kind":"b"}`)))
	f.Add([]byte(line + batch))
	f.Add([]byte(line + strings.Repeat("\x00", 40) + batch[40:] + "\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := folder(t)
		path := filepath.Join(dir, fileName)
		if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(path, data, 0o600)); err != nil {
			t.Fatal(err)
		}
		l, err := Open(dir, small)
		after, rerr := os.ReadFile(path)
		if rerr != nil {
			t.Fatal(rerr)
		}
		if err != nil {
			if _, ok := errors.AsType[*CorruptError](err); !ok || string(after) != string(data) {
				t.Fatalf("error %v, content changed: %v", err, string(after) != string(data))
			}
			return
		}
		defer l.Close()
		kept := 0
		for kept < len(data) && data[kept] == after[kept] {
			kept++
		}
		if len(bytes.Trim(after[kept:], "\x00")) != 0 || len(bytes.TrimRight(data[kept:], "\x00")) > int(l.Cut()) {
			t.Fatal("more than the end was changed")
		}
		for _, err := range l.All() {
			if _, ok := errors.AsType[*CorruptError](err); err != nil && !ok {
				t.Fatal(err)
			}
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, writers := range []int{1, 64, 512} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			l, err := Open(filepath.Join(b.TempDir(), "ledger"), Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			e := entry(1)
			b.SetParallelism(max(1, writers/runtime.GOMAXPROCS(0)))
			b.ReportAllocs()
			if writers == 1 {
				for b.Loop() {
					if err := l.Append(b.Context(), e); err != nil {
						b.Fatal(err)
					}
				}
			} else {
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if err := l.Append(b.Context(), e); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
			b.ReportMetric(float64(l.counts.entries.Load())/float64(l.counts.syncs.Load()), "entries/sync")
		})
	}
}
