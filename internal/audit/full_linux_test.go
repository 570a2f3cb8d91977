package audit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// mounted returns a folder on a tmpfs of so many KiB.
func mounted(t *testing.T, kib int) string {
	t.Helper()
	mount := t.TempDir()
	if err := syscall.Mount("tmpfs", mount, "tmpfs", 0, fmt.Sprintf("size=%dk,mode=700", kib)); err != nil {
		t.Skipf("a small file system cannot be mounted here, which needs root: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(mount, syscall.MNT_DETACH) })
	return mount
}

// occupy takes all that is left of a file system until give is called.
func occupy(t *testing.T, mount string) (give func()) {
	t.Helper()
	path := filepath.Join(mount, "others")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 4096); ; {
		if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// settled waits until it was tried to make the next segment.
func settled(t *testing.T, l *Log) {
	t.Helper()
	waitFor(t, l, func() bool { return l.making == nil })
}

// appendUntilFull appends until there is no room and returns how many entries there were.
func appendUntilFull(t *testing.T, l *Log) (n int) {
	t.Helper()
	for ; n < 100_000; n++ {
		if err := l.Append(t.Context(), entry(n+1)); errors.Is(err, ErrFull) {
			if errors.Is(err, ErrFailed) || !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("error %v", err)
			}
			return n
		} else if err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("it is never full")
	return 0
}

// goesOn waits until l takes entries again.
func goesOn(t *testing.T, l *Log) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := l.Append(t.Context(), entry(1))
		if err == nil {
			break
		}
		if !errors.Is(err, ErrFull) || ctx.Err() != nil {
			t.Fatal(err)
		}
		settled(t, l)
	}
	if why := l.NotReady(); why != "" {
		t.Errorf("it takes entries and says %q", why)
	}
}

// A disk that others fill takes nothing from what was reserved: the current segment and the next are filled to their end.
// Only then nothing is taken, nothing that was acknowledged is lost, and it all goes on when there is room again.
//
// threat: E27
func TestAppendDiskFull(t *testing.T) {
	mount := mounted(t, 4<<10)
	dir := filepath.Join(mount, "ledger")
	l := open(t, dir)
	settled(t, l)
	give := occupy(t, mount)
	n := appendUntilFull(t, l)
	if room := 2 * (MinSegment - maxTorn) / 500; n < room {
		t.Errorf("%d entries before it was full, want at least %d: what was reserved was not there", n, room)
	}
	if l.NotReady() == "" {
		t.Error("it is full and says that it is ready")
	}
	select {
	case <-l.Failed():
		t.Fatal("a full disk ended the ledger")
	default:
	}
	// What is there already can be read, and a restart does not mend it, nor is it harmed.
	if got := len(scanAll(t, dir)); got != n {
		t.Errorf("%d entries on record, want %d", got, n)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, dir)
	if l.Cut() != 0 {
		t.Errorf("%d bytes cut", l.Cut())
	}
	if more := appendUntilFull(t, l); more > 2000 {
		t.Errorf("%d entries fit after a restart", more)
	} else {
		n += more
	}
	give()
	goesOn(t, l)
	if got := len(scanAll(t, dir)); got != n+1 {
		t.Errorf("%d entries on record, want %d", got, n+1)
	}
}

// A ledger that never had any room opens all the same.
func TestOpenDiskFull(t *testing.T) {
	mount := mounted(t, 512)
	dir := filepath.Join(mount, "ledger")
	l := open(t, dir)
	if n := appendUntilFull(t, l); n != 0 {
		t.Errorf("%d entries in a segment that could not be reserved", n)
	}
	if err := syscall.Mount("tmpfs", mount, "tmpfs", syscall.MS_REMOUNT, "size=4m,mode=700"); err != nil {
		t.Fatal(err)
	}
	goesOn(t, l)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, dir)
	if got := len(scanAll(t, dir)); got != 1 || l.Cut() != 0 {
		t.Errorf("%d entries, %d bytes cut", got, l.Cut())
	}
}

// The ring on a full disk only counts, and the ledger does not notice; afterwards both are written.
func TestRefuseDiskFull(t *testing.T) {
	mount := mounted(t, 4<<10)
	dir := filepath.Join(mount, "ledger")
	l := open(t, dir)
	settled(t, l)
	give := occupy(t, mount)
	failures := 0
	for i := range 200 {
		e := refusal(i)
		if id, err := l.Refuse(t.Context(), e); err != nil {
			failures++
			if id != e.CorrelationID {
				t.Errorf("id %q of a refusal that could not be written", id)
			}
		}
		if err := l.Append(t.Context(), entry(i)); err != nil {
			t.Fatalf("the ring stopped the ledger: %v", err)
		}
	}
	if failures < 190 {
		t.Fatalf("%d refusals could not be written on a full disk", failures)
	}
	found := 0
	for rec, err := range l.Records(t.Context(), Query{}) {
		if err != nil {
			t.Fatal(err)
		}
		if rec.Source == SourceSample {
			found++
		}
	}
	if found == 0 {
		t.Error("none of them can be found")
	}
	give()
	for i := 1000; ; i++ {
		if _, err := l.Refuse(t.Context(), refusal(i)); err == nil {
			break
		}
		time.Sleep(time.Millisecond) // it is tried again after a second at most; the test's own limit ends this
	}
}
