package audit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// refusal is that of pod number n.
func refusal(n int) Entry {
	return Entry{Kind: KindRefuse, CorrelationID: fmt.Sprintf("%016x", n), PodUID: fmt.Sprint("pod-", n), Reason: "NODE_MISMATCH", Method: "Issue"}
}

func refusalsOf(t testing.TB, dir string) []Record {
	t.Helper()
	var all []Record
	for rec, err := range ScanRefusals(dir) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, rec)
	}
	return all
}

// The first refusal is on disk before anybody hears of it. Those that follow within a minute are counted and have its id;
// their sum is written when the minute is over, and by Close.
func TestRefuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "ledger")
		l := open(t, dir)
		refuse := func(e Entry, want string) {
			t.Helper()
			if id, err := l.Refuse(t.Context(), e); err != nil || id != want {
				t.Errorf("id %q, %v, want %q", id, err, want)
			}
		}
		first := refusal(1)
		refuse(first, first.CorrelationID)
		if got := refusalsOf(t, dir); len(got) != 1 || got[0].CorrelationID != first.CorrelationID || got[0].Source != SourceRefusals || got[0].Count != 0 {
			t.Fatalf("on disk after the first: %+v", got)
		}
		again := first
		for n := range 500 {
			again.CorrelationID = fmt.Sprint(n)
			time.Sleep(time.Millisecond)
			refuse(again, first.CorrelationID)
		}
		other := first
		other.CorrelationID, other.Reason = "other", "POD_DELETED"
		refuse(other, "other")
		if got := refusalsOf(t, dir); len(got) != 2 {
			t.Errorf("%d entries on disk, want 2", len(got))
		}
		for rec, err := range l.Records(t.Context(), Query{Values: []string{first.CorrelationID}}) {
			if err != nil || rec.Count != 501 {
				t.Errorf("while it goes on: count %d, %v, want 501", rec.Count, err)
			}
		}
		time.Sleep(2 * window)
		synctest.Wait()
		got := refusalsOf(t, dir)
		if len(got) != 3 || got[2].CorrelationID != first.CorrelationID || got[2].Count != 501 || got[2].Last.Sub(got[2].Time) != 500*time.Millisecond {
			t.Fatalf("on disk after a minute: %+v", got)
		}
		again.CorrelationID = "new"
		refuse(again, "new")
		refuse(first, "new")
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if got = refusalsOf(t, dir); len(got) != 5 || got[4].CorrelationID != "new" || got[4].Count != 2 {
			t.Errorf("on disk after Close: %+v", got[3:])
		}
		if got := len(scanAll(t, dir)); got != 0 {
			t.Errorf("%d entries in the ledger", got)
		}
		l = open(t, dir)
		defer l.Close()
		refuse(first, first.CorrelationID)
		if got = refusalsOf(t, dir); len(got) != 6 || got[5].Seq != 6 {
			t.Errorf("on disk after a restart: %+v", got[4:])
		}
	})
}

// However many callers there are, so many windows are open; the ring stays within its budget, and the newest are there.
func TestRefuseBounded(t *testing.T) {
	dir := folder(t)
	l := open(t, dir)
	const callers = 2 * maxWindows
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for n := w; n < callers; n += 8 {
				e := refusal(n)
				e.Detail = strings.Repeat("x", 100)
				if _, err := l.Refuse(t.Context(), e); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	l.ring.mu.Lock()
	if n, m := len(l.ring.windows), len(l.ring.order); n != maxWindows || m > callers {
		t.Errorf("%d windows, %d in order", n, m)
	}
	l.ring.mu.Unlock()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	parts, err := listParts(dir, refusalPrefix)
	if err != nil {
		t.Fatal(err)
	}
	total := int64(0)
	for _, p := range parts {
		info, err := os.Stat(p.path)
		if err != nil {
			t.Fatal(err)
		}
		total += info.Size()
	}
	if total > MinRefusals || total < MinRefusals/2 {
		t.Errorf("%d bytes in %d parts, want at most %d", total, len(parts), MinRefusals)
	}
	got := refusalsOf(t, dir)
	if last := got[len(got)-1].Seq; last != callers || uint64(len(got)) != last-got[0].Seq+1 {
		t.Errorf("entries %d to %d, %d of them, want the newest up to %d", got[0].Seq, last, len(got), callers)
	}
}

// Whatever lies where the ring is kept, the ledger opens and works, and refusals are written.
func TestRefuseDamaged(t *testing.T) {
	line := string(appendLine(nil, 1, 1, []byte(`{"kind":"refuse"}`)))
	for _, tc := range []struct {
		name string
		put  func(t *testing.T, path string) error
		kept int
	}{
		{"garbage", func(t *testing.T, path string) error { return os.WriteFile(path, []byte("\x00garbage\n\n"), 0o600) }, 0},
		{"torn", func(t *testing.T, path string) error { return os.WriteFile(path, []byte(line+line[:20]), 0o600) }, 1},
		{"empty", func(t *testing.T, path string) error { return os.WriteFile(path, nil, 0o600) }, 0},
		{"whole", func(t *testing.T, path string) error { return os.WriteFile(path, []byte(line), 0o600) }, 1},
		{"a folder", func(t *testing.T, path string) error { return os.Mkdir(path, 0o700) }, 0},
		{"a link to nowhere", func(t *testing.T, path string) error { return os.Symlink("nowhere", path) }, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := folder(t)
			if err := errors.Join(os.Mkdir(dir, 0o700), tc.put(t, filepath.Join(dir, partName(refusalPrefix, 1)))); err != nil {
				t.Fatal(err)
			}
			l := open(t, dir)
			if id, err := l.Refuse(t.Context(), refusal(7)); err != nil || id != refusal(7).CorrelationID {
				t.Errorf("id %q, %v", id, err)
			}
			if err := l.Append(t.Context(), entry(1)); err != nil {
				t.Error(err)
			}
			got := refusalsOf(t, dir)
			if len(got) != tc.kept+1 || got[tc.kept].PodUID != "pod-7" {
				t.Errorf("on record: %+v", got)
			}
		})
	}
}

// A ring that cannot be written is told once, tried again, and never keeps anybody waiting.
func TestRefuseBroken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "ledger")
		l := open(t, dir)
		defer l.Close()
		if _, err := l.Refuse(t.Context(), refusal(1)); err != nil {
			t.Fatal(err)
		}
		l.ring.file.Close() // the goroutine that owns it is idle
		for n := range 3 {
			if _, err := l.Refuse(t.Context(), refusal(2+n)); err == nil {
				t.Error("it was not written, and nobody said so")
			}
		}
		if id, err := l.Refuse(t.Context(), refusal(3)); err == nil || id != refusal(3).CorrelationID {
			t.Errorf("id %q, %v of one that repeats and is not on disk", id, err)
		}
		if !l.counts.ringBroken.Load() || l.counts.dropped.Load() != 3 {
			t.Errorf("broken: %v, dropped: %d", l.counts.ringBroken.Load(), l.counts.dropped.Load())
		}
		time.Sleep(2 * time.Second)
		if _, err := l.Refuse(t.Context(), refusal(9)); err != nil {
			t.Errorf("it is not tried again: %v", err)
		}
		time.Sleep(2 * window)
		synctest.Wait()
		// What could not be written then is written with its sum.
		found := map[string]uint64{}
		for _, rec := range refusalsOf(t, dir) {
			found[rec.PodUID] += max(1, rec.Count)
		}
		for pod, want := range map[string]uint64{"pod-1": 1, "pod-2": 1, "pod-3": 2, "pod-4": 1, "pod-9": 1} {
			if found[pod] != want {
				t.Errorf("%s: %d refusals on record, want %d", pod, found[pod], want)
			}
		}
	})
}

// Who does not want to wait gets his id at once.
func TestRefuseLeaves(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "ledger"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for n := range 10 {
		if id, err := l.Refuse(ctx, refusal(n)); id != refusal(n).CorrelationID || err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("id %q, %v", id, err)
		}
	}
}

func TestSample(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, filepath.Join(t.TempDir(), "ledger"))
		defer l.Close()
		for n := range 100 {
			l.Sample(Entry{CorrelationID: fmt.Sprint("a", n)})
		}
		if got := l.sample.records(); len(got) != sampleRate || got[9].CorrelationID != "a9" || got[9].Seq != 10 || got[9].Time.IsZero() {
			t.Errorf("kept of 100 in one second: %+v", got)
		}
		for n := range 2 * sampleSize {
			time.Sleep(time.Second)
			l.Sample(Entry{CorrelationID: fmt.Sprint("b", n)})
		}
		got := l.sample.records()
		if len(got) != sampleSize || got[0].CorrelationID != fmt.Sprint("b", sampleSize) || got[sampleSize-1].CorrelationID != fmt.Sprint("b", 2*sampleSize-1) {
			t.Errorf("%d kept, %s to %s", len(got), got[0].CorrelationID, got[len(got)-1].CorrelationID)
		}
	})
}

// What is sampled can be sent and does not grow, whatever somebody called himself.
//
// threat: L15
func TestSampleText(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "ledger"))
	text := "a\xff" + strings.Repeat("\u20ac", 1<<20)
	e := Entry{DNSNames: []string{text}}
	v := reflect.ValueOf(&e).Elem()
	for i := range v.NumField() {
		if f := v.Field(i); f.Type() == reflect.TypeFor[string]() {
			f.SetString(text)
		}
	}
	l.Sample(e)
	got := reflect.ValueOf(l.sample.records()[0].Entry)
	for i := range got.NumField() {
		if f := got.Field(i); f.Type() == reflect.TypeFor[string]() && (!utf8.ValidString(f.String()) || f.Len() > 2*sampleText || f.Len() < 2) {
			t.Errorf("%s: %d bytes, %.20q", got.Type().Field(i).Name, f.Len(), f.String())
		}
	}
	if got := l.sample.records()[0].DNSNames; len(got) != 0 {
		t.Errorf("%d DNS names were kept", len(got))
	}
}
