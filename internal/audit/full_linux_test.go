package audit

import (
	"path/filepath"
	"syscall"
	"testing"
)

// On a file system that is really full the ledger fails, keeps what it acknowledged, and opens again.
func TestAppendDiskFull(t *testing.T) {
	mount := t.TempDir()
	if err := syscall.Mount("tmpfs", mount, "tmpfs", 0, "size=64k,mode=700"); err != nil {
		t.Skipf("cannot mount a small file system: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(mount, syscall.MNT_DETACH) })
	dir := filepath.Join(mount, "ledger")
	l := open(t, dir)
	n := 0
	for ; n < 1000; n++ {
		if err := l.Append(t.Context(), entry(n+1)); err != nil {
			break
		}
	}
	if n == 0 || n == 1000 {
		t.Fatalf("%d entries fit", n)
	}
	failed(t, l, syscall.ENOSPC)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, dir)
	if got := len(scanAll(t, dir)); got != n || l.Cut() == 0 {
		t.Errorf("%d entries, %d bytes cut, want %d entries and a torn one", got, l.Cut(), n)
	}
}
