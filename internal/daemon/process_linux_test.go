package daemon

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/api"
)

// nobody is a user that is not the one of the test.
const nobody = 65534

func hardenChild() {
	if err := Harden(); err != nil {
		fmt.Println(err)
		return
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	var core unix.Rlimit
	lerr := unix.Getrlimit(unix.RLIMIT_CORE, &core)
	fmt.Println(dumpable, err, core.Cur, core.Max, lerr)
}

// threat: B23, L04
func TestHarden(t *testing.T) {
	_, line := startChild(t, "harden")
	if got, want := line(), "0 <nil> 0 0 <nil>"; got != want {
		t.Errorf("dumpable and the limits of core dumps: %s, want %s", got, want)
	}
}

// dialAs connects to a socket as another user and returns what comes from there. Only the thread that connects changes its
// user, and it ends with its goroutine.
func dialAs(uid int, path string) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked, so that the thread is thrown away
		done <- func() error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
				return errno
			}
			if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
				return err
			}
			n, err := unix.Read(fd, make([]byte, 1))
			if n == 0 && err == nil {
				return io.EOF
			}
			return err
		}()
	}()
	return <-done
}

// TestModeForeign proves that the mode of a socket keeps another user out, where it is asked to.
func TestModeForeign(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // the way there is open, too
		t.Fatal(err)
	}
	// The test would prove nothing if something else kept the other user out.
	plain, err := ListenUnix(filepath.Join(dir, "open"), 0o666)
	if err != nil {
		t.Fatal(err)
	}
	accepted := serve(t, plain)
	if err := dialAs(nobody, filepath.Join(dir, "open")); err != nil {
		t.Errorf("mode 0666: %v", err)
	}
	if n := accepted(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
	shut, err := ListenUnix(filepath.Join(dir, "shut"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer shut.Close()
	if err := dialAs(nobody, filepath.Join(dir, "shut")); err != unix.EACCES {
		t.Errorf("mode 0600: %v, want %v", err, unix.EACCES)
	}
}

func TestListenUnixForeignFolder(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a folder away")
	}
	dir := t.TempDir()
	if err := os.Chown(dir, nobody, -1); err != nil {
		t.Fatal(err)
	}
	if l, err := ListenUnix(filepath.Join(dir, "s"), 0o600); api.ReasonOf(err) != api.SocketUnsafe {
		t.Errorf("in the folder of another user: %v, %v; want %s", l, err, api.SocketUnsafe)
	}
}

// TestListenUnixBusy proves that a server that does not get around to answering is not taken for a leftover.
func TestListenUnixBusy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	full := false
	for range 16 { // fill its backlog
		c, err := net.Dial("unix", path)
		if err != nil {
			full = true
			break
		}
		defer c.Close()
	}
	if !full {
		t.Fatal("the backlog is not full, so this proves nothing")
	}
	if l, err := ListenUnix(path, 0o600); api.ReasonOf(err) != api.SocketUnsafe {
		t.Errorf("%v, %v; want %s", l, err, api.SocketUnsafe)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket of the other process is gone: %v", err)
	}
}
