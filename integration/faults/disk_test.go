//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/store"
)

// mountTmpfs mounts a file system that is small.
func mountTmpfs(t testing.TB, megabytes int) string {
	t.Helper()
	dir := folder(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=700", megabytes)); err != nil {
		t.Skipf("no file system can be mounted here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// disk is an ext4 file system on a loop device: one that can really fail.
type disk struct {
	t          testing.TB
	image, dir string
}

func newDisk(t testing.TB, megabytes int) *disk {
	t.Helper()
	for _, tool := range []string{"mkfs.ext4", "mount", "umount"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("there is no %s here", tool)
		}
	}
	d := &disk{t: t, image: filepath.Join(folder(t), "image"), dir: folder(t)}
	f, err := os.Create(d.image)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(int64(megabytes)<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", d.image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", d.image, d.dir).CombinedOutput(); err != nil {
		t.Skipf("no file system can be mounted here: %s", out)
	}
	t.Cleanup(func() { unix.Unmount(d.dir, unix.MNT_DETACH) })
	return d
}

// command runs mount or umount.
func (d *disk) command(argv ...string) {
	d.t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		d.t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
}

// again mounts it once more, after what befell it: its journal is replayed, as after a power failure.
func (d *disk) again() {
	d.t.Helper()
	d.command("umount", d.dir)
	d.command("mount", "-o", "loop", d.image, d.dir)
}

// abort makes the file system do what it does when it meets an error of its own: it is read-only from now on, under
// everybody who has files open.
func (d *disk) abort() { d.t.Helper(); d.command("mount", "-o", "remount,abort", d.dir) }

// pull ends the file system as a power failure does: what was not synced is lost, its journal included.
func (d *disk) pull() {
	d.t.Helper()
	f, err := os.Open(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	const shutdown, noLogFlush = 0x8004587d, 2 // EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
	flags := uint32(noLogFlush)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), shutdown, uintptr(unsafe.Pointer(&flags))); errno != 0 {
		d.t.Skipf("this kernel does not shut ext4 down: %v", errno)
	}
}

func passAll(call) (act, unix.Errno) { return pass, 0 }

// TestDiskLost takes the file system from under the real CA while it issues, as an error of its own (read-only) and as a
// power failure: the CA ends and says why, and once the disk is back every certificate that left is on record and the CA
// goes on.
//
// threat: E03
func TestDiskLost(t *testing.T) {
	for _, tc := range []struct {
		name string
		lose func(*disk)
	}{
		{"read-only", (*disk).abort},
		{"power", (*disk).pull},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDisk(t, 64)
			s := newServer(t, filepath.Join(d.dir, "state"))
			for round := range 2 {
				s.start(passAll)
				ended := make(chan error, 1)
				before := s.client.held()
				go func() { ended <- s.use(1 << 20) }() // until it fails
				for deadline := time.Now().Add(patience); s.client.held() < before+100; {
					if time.Now().After(deadline) {
						t.Fatalf("nothing is issued:\n%s", s.p.said())
					}
					unix.Poll(nil, 10)
				}
				tc.lose(d)
				code := s.wait()
				if err := <-ended; err == nil || code != 1 || !strings.Contains(s.p.said(), string(api.LedgerFailed)) {
					t.Errorf("it ended with %d, the client with %v:\n%s", code, err, s.p.said())
				}
				d.again()
				s.judge(fmt.Sprintf("round %d", round))
			}
			s.start(passAll)
			if err := s.use(20); err != nil {
				t.Errorf("with the disk back: %v\n%s", err, s.p.said())
			}
			s.stop()
			s.judge("at the end")
			t.Logf("%d certificates", s.client.held())
		})
	}
}

// TestDiskReadOnly starts the CA, and init, on a file system that is mounted read-only: both say so and end with exit code 1,
// and nothing is the worse for it.
//
// threat: E03
func TestDiskReadOnly(t *testing.T) {
	d := newDisk(t, 64)
	s := newServer(t, filepath.Join(d.dir, "state"))
	d.command("mount", "-o", "remount,ro", d.dir)
	s.start(passAll)
	if code := s.wait(); code != 1 || !strings.Contains(s.p.said(), "read-only file system") {
		t.Errorf("run ended with %d:\n%s", code, s.p.said())
	}
	fresh := filepath.Join(d.dir, "fresh")
	configure(t, s.dir, fresh, s.client.tokens)
	if said, err := initAgain(s.dir); err == nil || !strings.Contains(said, "read-only file system") {
		t.Errorf("init ended with %v: %s", err, said)
	}
	d.command("mount", "-o", "remount,rw", d.dir)
	if said, err := initAgain(s.dir); err != nil {
		t.Errorf("init on a disk that can be written: %v: %s", err, said)
	}
	s.address = configure(t, s.dir, s.state, s.client.tokens)
	s.start(passAll)
	if err := s.use(20); err != nil {
		t.Errorf("on a disk that can be written: %v\n%s", err, s.p.said())
	}
	s.stop()
	s.judge("at the end")
}

// TestDiskFull fills the file system below the real CA. Its ledger has room for some more, then issuance stops, with the
// reason LEDGER_FULL and nothing else: the process lives, also when it is started on a disk that is full, and issues again by
// itself when there is room.
//
// threat: E27
func TestDiskFull(t *testing.T) {
	dir := mountTmpfs(t, 4) // two segments of the ledger, the refusals and the store have room, a third segment has not
	s := newServer(t, filepath.Join(dir, "state"))
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	s.start(passAll)
	if err := s.client.open(ctx, s.address); err != nil {
		t.Fatalf("%v\n%s", err, s.p.said())
	}
	defer s.client.close()
	err := s.client.issueAll(ctx, 20_000)
	if api.ReasonOf(err) != api.LedgerFull || s.client.held() < 500 {
		t.Fatalf("after %d certificates: %v\n%s", s.client.held(), err, s.p.said())
	}
	if api.LedgerFull.Kind() != api.KindUnavailable {
		t.Errorf("%s is of kind %v", api.LedgerFull, api.LedgerFull.Kind())
	}
	held := s.client.held()
	if err := s.client.issueAll(ctx, 8); api.ReasonOf(err) != api.LedgerFull {
		t.Errorf("asked once more: %v", err)
	}
	t.Logf("full after %d certificates", held)
	s.judgeLedger("full")
	ballast(t, dir)
	resize(t, dir, 6)
	s.recover(ctx, func() error { return s.client.issueAll(ctx, 8) })

	// And once more over a restart.
	if err := s.client.issueAll(ctx, 1<<20); api.ReasonOf(err) != api.LedgerFull {
		t.Fatalf("after %d certificates: %v\n%s", s.client.held(), err, s.p.said())
	}
	s.client.close()
	s.stop()
	s.judge("full once more")
	ballast(t, dir)
	s.start(passAll)
	// What is left of the segment may still take the intermediate.
	for !strings.Contains(s.p.said(), "the ledger's next segment cannot be made") {
		select {
		case <-s.p.ended():
			t.Fatalf("started on a full disk it ended with %d:\n%s", s.wait(), s.p.said())
		case <-ctx.Done():
			t.Fatalf("started on a full disk it says nothing:\n%s", s.p.said())
		case <-time.After(10 * time.Millisecond):
		}
	}
	resize(t, dir, 16)
	s.recover(ctx, func() error { return s.use(8) })
	s.stop()
	s.judge("at the end")
}

// TestDiskFullStore proves that a full disk ends nothing that the store does: its file has room of its own. Once that is
// gone too, the outcome is unknown, and what is read afterwards is the record before or the one after.
//
// threat: E04
func TestDiskFullStore(t *testing.T) {
	dir := mountTmpfs(t, 3)
	cfg := store.Config{Path: filepath.Join(dir, "signet.db")}
	s, closeStore, err := store.Open(t.Context(), cfg, true)
	if err != nil {
		t.Fatal(err)
	}
	ballast(t, dir)
	j, err := newJournal()
	if err != nil {
		t.Fatal(err)
	}
	r := ca.Replica{Name: "ca-0"}
	for n := range 100 {
		j.Number = uint32(n + 1)
		if _, err := s.Swap(t.Context(), ca.Revision(n), j); err != nil {
			t.Fatalf("record %d: %v", n, err)
		}
		r.Minted = append(r.Minted, ca.Minted{At: time.Now(), NotAfter: time.Now(), Root: strings.Repeat("a", 1000)})
		if err := s.SaveReplica(t.Context(), r); err != nil {
			t.Fatalf("replica %d: %v", n, err)
		}
	}
	good := len(r.Minted)
	r.Minted = append(r.Minted, ca.Minted{Root: strings.Repeat("a", 3<<20)})
	if err := s.SaveReplica(t.Context(), r); api.ReasonOf(err) != api.StateUnknown {
		t.Errorf("a replica larger than the disk: %v", err)
	}
	if err := closeStore(); err != nil {
		t.Error(err)
	}
	s, closeStore, err = store.Open(t.Context(), cfg, false)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ca.ReplicaOf(t.Context(), s, "ca-0")
	if err != nil || len(got.Minted) != good {
		t.Errorf("%d are there, want %d: %v", len(got.Minted), good, err)
	}
	if _, rev, err := s.Load(t.Context()); err != nil || rev != 100 {
		t.Errorf("revision %d, want 100: %v", rev, err)
	}
	if err := closeStore(); err != nil {
		t.Error(err)
	}
}

// ballast takes what room is left.
func ballast(t testing.TB, dir string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "ballast"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for {
		if _, err := f.Write(make([]byte, 4096)); errors.Is(err, unix.ENOSPC) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// resize makes room.
func resize(t testing.TB, dir string, megabytes int) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, fmt.Sprintf("size=%dm,mode=700", megabytes)); err != nil {
		t.Fatal(err)
	}
}

// recover waits until the running CA issues again.
func (s *server) recover(ctx context.Context, issue func() error) {
	s.t.Helper()
	err := issue()
	for err != nil && ctx.Err() == nil {
		select {
		case <-s.p.ended():
			s.t.Fatalf("it ended with %d:\n%s", s.wait(), s.p.said())
		case <-time.After(100 * time.Millisecond):
		}
		err = issue()
	}
	if err != nil {
		s.t.Fatalf("with room again: %v\n%s", err, s.p.said())
	}
}
