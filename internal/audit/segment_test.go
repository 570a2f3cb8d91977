package audit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// long is an entry of which few fit into a segment.
func long(n int) Entry {
	e := entry(n)
	e.Detail = strings.Repeat("x", 20_000)
	return e
}

// rolled makes a closed ledger of several segments and returns its folder and their files.
func rolled(t testing.TB, segments int) (string, []part) {
	t.Helper()
	dir := folder(t)
	l := open(t, dir)
	for n := 1; len(l.snapshot().parts) < segments || l.size == 0; n++ {
		if err := l.Append(t.Context(), long(n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	parts, err := listParts(dir, ledgerPrefix)
	if err != nil || len(parts) != segments {
		t.Fatalf("%d segments, %v, want %d", len(parts), err, segments)
	}
	return dir, parts
}

// Segments are changed under a crowd: every entry is there once and in order, for those too who read meanwhile, in this
// process and in others.
func TestAppendRolls(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	l := open(t, dir)
	const writers, each = 16, 25
	var acknowledged atomic.Int64
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				e := long(i)
				e.Pod, e.Serial = fmt.Sprint(w), fmt.Sprint(i)
				if err := l.Append(t.Context(), e); err != nil {
					t.Error(err)
				}
				acknowledged.Add(1)
			}
		})
	}
	read := func(all func() []Record) {
		t.Helper()
		want := int(acknowledged.Load())
		got := all()
		if len(got) < want {
			t.Errorf("%d entries read, %d acknowledged before", len(got), want)
		}
		for i, rec := range got {
			if rec.Seq != uint64(i+1) {
				t.Fatalf("entry %d at place %d", rec.Seq, i+1)
			}
		}
	}
	for acknowledged.Load() < writers*each/2 {
		read(func() []Record { return scanAll(t, dir) })
		read(func() (all []Record) {
			for rec, err := range l.All() {
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, rec)
			}
			return all
		})
	}
	wg.Wait()
	next := map[string]int{}
	for _, rec := range scanAll(t, dir) {
		if rec.Serial != fmt.Sprint(next[rec.Pod]) {
			t.Fatalf("writer %s: entry %s in place of %d", rec.Pod, rec.Serial, next[rec.Pod])
		}
		next[rec.Pod]++
	}
	total := 0
	for _, n := range next {
		total += n
	}
	parts := l.snapshot().parts
	if total != writers*each || len(parts) < 5 {
		t.Errorf("%d entries in %d segments, want %d in some", total, len(parts), writers*each)
	}
	for _, p := range parts[:len(parts)-1] {
		if info, err := os.Stat(p.path); err != nil || info.Size() >= MinSegment {
			t.Errorf("%s keeps room that it will not use: %v, %v", p.name(), info.Size(), err)
		}
	}
	if report, err := Verify(t.Context(), dir); err != nil || report.Last != writers*each || report.Segments != len(parts) || len(report.Damage) != 0 || report.Torn != 0 {
		t.Errorf("verified: %+v, %v", report, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, dir)
	if l.last != writers*each || l.Cut() != 0 {
		t.Errorf("opened again: last %d, cut %d", l.last, l.Cut())
	}
}

// The one file of lines that earlier builds wrote is the first segment.
func TestOpenEarlier(t *testing.T) {
	for _, size := range []int{10, MinSegment / 15_000, MinSegment / 10_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			dir := folder(t)
			var content []byte
			for n := range size {
				body, err := encode(long(n + 1))
				if err != nil {
					t.Fatal(err)
				}
				content = appendLine(content, uint64(n+1), uint64(n+1), body)
			}
			content = append(content, `{"seq":99999,"torn`...)
			path := filepath.Join(dir, fileName)
			if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(path, content, 0o600)); err != nil {
				t.Fatal(err)
			}
			l := open(t, dir)
			if l.Cut() != 18 {
				t.Errorf("%d bytes cut", l.Cut())
			}
			for range 100 {
				if err := l.Append(t.Context(), long(1)); err != nil {
					t.Fatal(err)
				}
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			open(t, dir)
			if got := len(scanAll(t, dir)); got != size+100 {
				t.Errorf("%d entries, want %d", got, size+100)
			}
		})
	}
}

// A segment that is missing or shortened is damage, wherever it is; what is left over of making one is none.
func TestOpenSegments(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(dir string, parts []part) error
		why    string // empty: it opens
		open   bool   // Open sees it too, and not only Verify
	}{
		{"all there", func(string, []part) error { return nil }, "", true},
		{"oldest gone, as by its age", func(_ string, p []part) error { return os.Remove(p[0].path) }, "", true},
		{"one in the middle gone", func(_ string, p []part) error { return os.Remove(p[1].path) }, missing, true},
		{"newest gone", func(_ string, p []part) error { return os.Remove(p[3].path) }, "", true},
		{"one in the middle empty", func(_ string, p []part) error { return os.Truncate(p[1].path, 0) }, missing, true},
		{"one in the middle without its last line", func(_ string, p []part) error {
			info, err := os.Stat(p[1].path)
			return errors.Join(err, os.Truncate(p[1].path, info.Size()-20_400))
		}, "", true}, // set below: how much a line is
		{"one in the middle torn", func(_ string, p []part) error {
			info, err := os.Stat(p[1].path)
			return errors.Join(err, os.Truncate(p[1].path, info.Size()-1))
		}, noNewline, true},
		{"one in the middle with its room", func(_ string, p []part) error { return os.Truncate(p[1].path, MinSegment) }, "", true},
		{"one in the middle rotten", func(_ string, p []part) error {
			f, err := os.OpenFile(p[1].path, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte("X"), MinSegment/2)
			return errors.Join(err, f.Close())
		}, wrongChecksum, false},
		{"something in the next one", func(dir string, _ []part) error {
			return os.WriteFile(filepath.Join(dir, spareName), []byte("something"), 0o600)
		}, "", true},
		{"the next one is a link", func(dir string, _ []part) error {
			return errors.Join(os.Remove(filepath.Join(dir, spareName)), os.Symlink("/dev/null", filepath.Join(dir, spareName)))
		}, "", true},
		{"other files", func(dir string, _ []part) error {
			return errors.Join(os.WriteFile(filepath.Join(dir, "ledger-1.jsonl"), []byte("x"), 0o600), os.WriteFile(filepath.Join(dir, "notes"), nil, 0o600))
		}, "", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir, parts := rolled(t, 4)
			if err := tc.change(dir, parts); err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(tc.name, "last line") {
				tc.why = noNewline
			}
			report, err := Verify(t.Context(), dir)
			if err != nil {
				t.Fatal(err)
			}
			if (len(report.Damage) > 0) != (tc.why != "") {
				t.Errorf("verified: %v, want %q", report.Damage, tc.why)
			}
			for _, err := range report.Damage[:min(1, len(report.Damage))] {
				if ce, ok := errors.AsType[*CorruptError](err); !ok || ce.Why != tc.why {
					t.Errorf("verified: %v, want %q", err, tc.why)
				}
			}
			l, err := openPatient(dir, small)
			if tc.why != "" && tc.open {
				if ce, ok := errors.AsType[*CorruptError](err); !ok || ce.Why != tc.why {
					t.Fatalf("opened: %v, want %q", err, tc.why)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			for n := range 120 { // over the next segment, whatever was found there
				if err := l.Append(t.Context(), long(n)); err != nil {
					t.Fatal(err)
				}
			}
			bad := 0
			for _, err := range l.All() {
				if err != nil {
					bad++
				}
			}
			if (bad > 0) == tc.open {
				t.Errorf("%d errors of reading", bad)
			}
		})
	}
}

// What is written ahead is zeros, and never where lines are.
func TestWriteAhead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	l, err := openPatient(dir, Options{SegmentSize: 3 * zeroAhead})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for n := range 300 {
				if err := l.Append(t.Context(), long(n)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := len(scanAll(t, dir)); got != 1200 {
		t.Errorf("%d entries, want 1200", got)
	}
}

// A segment goes when all in it is older than the retention and no certificate in it is good any more, and not before.
func TestRetention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "ledger")
		const day = 24 * time.Hour
		l, err := openPatient(dir, Options{SegmentSize: MinSegment, Retention: 30 * day})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { l.Close() }()
		fill := func(notAfter time.Duration) {
			t.Helper()
			for begun := len(l.snapshot().parts); len(l.snapshot().parts) == begun; {
				e := Entry{Kind: KindIssue, NotAfter: time.Now().Add(notAfter), Detail: strings.Repeat("x", 50_000)}
				if err := l.Append(t.Context(), e); err != nil {
					t.Fatal(err)
				}
			}
		}
		left := func() int {
			t.Helper()
			synctest.Wait()
			parts, err := listParts(dir, ledgerPrefix)
			if err != nil || len(parts) != len(l.snapshot().parts) {
				t.Fatalf("%d segments on disk, %d known, %v", len(parts), len(l.snapshot().parts), err)
			}
			return len(parts)
		}
		fill(time.Hour)
		fill(60 * day) // a certificate that lives long keeps its segment, and those behind it
		time.Sleep(10 * day)
		fill(time.Hour)
		for _, step := range []struct {
			days, want int
		}{{19, 4}, {3, 3}, {25, 3}, {5, 1}, {100, 1}} {
			time.Sleep(time.Duration(step.days) * day)
			if got := left(); got != step.want {
				t.Errorf("after %d days more there are %d segments, want %d", step.days, got, step.want)
			}
		}
		if err := l.Append(t.Context(), entry(1)); err != nil {
			t.Fatal(err)
		}
		got := scanAll(t, dir)
		if first := l.snapshot().parts[0].first; len(got) == 0 || got[0].Seq != first || first == 1 {
			t.Errorf("%d entries from %d", len(got), first)
		}
		// For ever is for ever.
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if l, err = openPatient(dir, small); err != nil {
			t.Fatal(err)
		}
		fill(time.Hour)
		time.Sleep(10_000 * day)
		if got := left(); got != 2 {
			t.Errorf("%d segments, want 2", got)
		}
	})
}

// Who reads while segments are removed passes over what is gone.
func TestScanRemoved(t *testing.T) {
	dir, parts := rolled(t, 4)
	s, err := openScan(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(parts[0].path), os.Remove(parts[1].path)); err != nil {
		t.Fatal(err)
	}
	first := uint64(0)
	for rec, err := range records(s, nil) {
		if err != nil {
			t.Fatal(err)
		}
		if first == 0 {
			first = rec.Seq
		}
	}
	if first != parts[2].first {
		t.Errorf("it begins with %d, want %d", first, parts[2].first)
	}
}

// Where the file system reserves nothing, zeros are written.
func TestReserve(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 3*zeroChunk + 100
	if err := writeRoom(f, 4, size); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(path); err != nil || len(data) != size || strings.TrimRight(string(data), "\x00") != "kept" {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	if info, err := f.Stat(); err != nil {
		t.Fatal(err)
	} else if st := info.Sys().(*syscall.Stat_t); st.Blocks*512 < size {
		t.Errorf("%d bytes on disk, want %d", st.Blocks*512, size)
	}
	if err := writeRoom(os.NewFile(^uintptr(0), "none"), 0, 1); !errors.Is(err, fs.ErrInvalid) && err == nil {
		t.Errorf("error %v", err)
	}
}
