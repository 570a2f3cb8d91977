package audit

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Segments past their retention that are slow to read hold up nobody: the next segment is made all the same.
func TestRetireAside(t *testing.T) {
	dir := folder(t)
	l, err := openPatient(dir, Options{SegmentSize: MinSegment, Retention: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	fill := func(segments int) {
		for len(l.snapshot().parts) < segments {
			if err := l.Append(t.Context(), Entry{Kind: KindIssue, Detail: strings.Repeat("x", 50_000)}); err != nil {
				t.Error(err)
				return
			}
		}
	}
	fill(2)
	oldest := l.snapshot().parts[0].path // whose reader now hangs as on a disk that does not answer
	if err := errors.Join(os.Remove(oldest), syscall.Mkfifo(oldest, 0o600)); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		fill(5)
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Error("no room is made while the age of a segment is looked at")
	}
	// Whoever opens it then finds nothing in it.
	closed := make(chan error, 1)
	go func() { closed <- l.Close() }()
	for {
		select {
		case err := <-closed:
			if err != nil {
				t.Error(err)
			}
			<-done
			return
		default:
		}
		if f, err := os.OpenFile(oldest, os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
			f.Close()
		}
		time.Sleep(time.Millisecond)
	}
}

// Close does not wait until all is read that may be too old.
func TestRetireEnds(t *testing.T) {
	dir, _ := rolled(t, 3)
	l, err := openPatient(dir, Options{SegmentSize: MinSegment, Retention: 50 * 365 * 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	known := map[uint64]extent{}
	later := entry(1).Time.AddDate(100, 0, 0)
	if l.retire(ctx, later, known); len(known) != 0 || len(l.snapshot().parts) != 3 {
		t.Errorf("after its end it read %d segments, and left %d", len(known), len(l.snapshot().parts))
	}
	if l.retire(t.Context(), later, known); len(l.snapshot().parts) != 1 {
		t.Errorf("%d segments are left, want 1", len(l.snapshot().parts))
	}
}

// A next segment that is not made in time is waited for a moment only, and then nothing is written.
func TestAppendWaitsForSpare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "ledger")
		l := open(t, dir)
		defer l.Close()
		l.patient = spareWait
		synctest.Wait()
		l.mu.Lock() // as if a disk took its time to make it
		spare := l.spare
		l.spare, l.making, l.rolling = nil, make(chan struct{}), true
		l.mu.Unlock()
		begun := time.Now()
		var err error
		n := 0
		for ; err == nil; n++ {
			err = l.Append(t.Context(), long(n))
		}
		if took := time.Since(begun); !errors.Is(err, ErrFull) || errors.Is(err, ErrFailed) || took > 5*time.Second {
			t.Errorf("after %v: %v", took, err)
		}
		if l.NotReady() == "" {
			t.Error("it is ready, and takes no entry")
		}
		l.mu.Lock()
		l.spare, l.rolling = spare, false
		close(l.making)
		l.making, l.starved = nil, false
		l.mu.Unlock()
		if err := l.Append(t.Context(), long(n)); err != nil {
			t.Error(err)
		}
		if got := len(scanAll(t, dir)); got != n || l.NotReady() != "" {
			t.Errorf("%d entries, want %d; %q", got, n, l.NotReady())
		}
	})
}
