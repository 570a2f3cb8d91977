package daemon

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/signet-ca/signet/api"
)

// serve accepts connections on l, sends each one byte and ends it. The returned function closes l and says how many came.
func serve(t *testing.T, l net.Listener) func() int {
	t.Helper()
	var wg sync.WaitGroup
	n := 0
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n++
			c.Write([]byte{1})
			c.Close()
		}
	})
	end := sync.OnceValue(func() int { l.Close(); wg.Wait(); return n })
	t.Cleanup(func() { end() })
	return end
}

// dialOwn fails unless somebody answers at path.
func dialOwn(t *testing.T, path string) {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("nobody answers at %s: %v", path, err)
	}
}

// leftover makes a socket as a killed process leaves it.
func leftover(path string) error {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	return l.Close()
}

func TestListenUnix(t *testing.T) {
	tests := []struct {
		name  string
		setup func(dir, path string) error
		want  api.Reason // empty: it listens
	}{
		{"nothing there", func(string, string) error { return nil }, ""},
		{"no folder", func(dir, _ string) error { return os.Remove(dir) }, ""},
		{"leftover", func(_, path string) error { return leftover(path) }, ""},
		{"sticky folder", func(dir, _ string) error { return os.Chmod(dir, 0o777|fs.ModeSticky) }, ""},
		{"folder that its group may write to", func(dir, _ string) error { return os.Chmod(dir, 0o775) }, api.SocketUnsafe},
		{"folder that all may write to", func(dir, _ string) error { return os.Chmod(dir, 0o757) }, api.SocketUnsafe},
		{"regular file", func(_, path string) error { return os.WriteFile(path, []byte("kept"), 0o600) }, api.SocketUnsafe},
		{"empty file", func(_, path string) error { return os.WriteFile(path, nil, 0o600) }, api.SocketUnsafe},
		{"folder", func(_, path string) error { return os.Mkdir(path, 0o700) }, api.SocketUnsafe},
		{"pipe", func(_, path string) error { return syscall.Mkfifo(path, 0o600) }, api.SocketUnsafe},
		{"dangling link", func(_, path string) error { return os.Symlink("nowhere", path) }, api.SocketUnsafe},
		{"link to a leftover", func(_, path string) error {
			return errors.Join(leftover(path+"2"), os.Symlink(path+"2", path))
		}, api.SocketUnsafe},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "d")
			path := filepath.Join(dir, "s")
			if err := errors.Join(os.Mkdir(dir, 0o755), tt.setup(dir, path)); err != nil {
				t.Fatal(err)
			}
			before, _ := os.Lstat(path)
			l, err := ListenUnix(path, 0o600)
			if tt.want != "" {
				after, _ := os.Lstat(path)
				if api.ReasonOf(err) != tt.want || l != nil {
					t.Errorf("%v, %v; want %s", l, err, tt.want)
				}
				if (before == nil) != (after == nil) || before != nil && (!os.SameFile(before, after) || before.Size() != after.Size()) {
					t.Error("what was in the way was touched")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			end := serve(t, l)
			if l.Addr().String() != path || l.Addr().Network() != "unix" {
				t.Errorf("address %s %s", l.Addr().Network(), l.Addr())
			}
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
				t.Errorf("the folder holds %v, want the socket alone (%v)", entries, err)
			}
			dialOwn(t, path)
			end()
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the socket is still there after its end: %v", err)
			}
		})
	}
}

func TestListenUnixMode(t *testing.T) {
	dir := t.TempDir()
	for _, umask := range []int{0, 0o022, 0o077} {
		for _, mode := range []fs.FileMode{0o600, 0o660, 0o666, 0o777} {
			old := syscall.Umask(umask)
			l, err := ListenUnix(filepath.Join(dir, "s"), mode)
			syscall.Umask(old)
			if err != nil {
				t.Fatal(err)
			}
			info, err := os.Lstat(filepath.Join(dir, "s"))
			if err != nil || info.Mode() != fs.ModeSocket|mode {
				t.Errorf("umask %03o: mode %v, %v; want %v", umask, info.Mode(), err, mode)
			}
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestListenUnixLive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first, err := ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	end := serve(t, first)
	if second, err := ListenUnix(path, 0o600); api.ReasonOf(err) != api.SocketUnsafe || second != nil {
		t.Errorf("a second server: %v, %v; want %s", second, err, api.SocketUnsafe)
	}
	dialOwn(t, path) // the first is none the worse
	end()
	third, err := ListenUnix(path, 0o600)
	if err != nil {
		t.Fatalf("after the end of the first: %v", err)
	}
	third.Close()
}

// TestListenUnixLateClose proves that a server that ends late leaves the socket of its successor alone.
func TestListenUnixLateClose(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first, err := ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil { // by somebody who tidies up
		t.Fatal(err)
	}
	second, err := ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, second)
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	first.Close() // a gRPC server closes its listener, and so may its owner
	dialOwn(t, path)
}

func TestListenUnixLong(t *testing.T) {
	for _, path := range []string{
		filepath.Join(t.TempDir(), strings.Repeat("s", 108)),
		filepath.Join(t.TempDir(), strings.Repeat("d", 108), "s"),
	} {
		if l, err := ListenUnix(path, 0o600); api.ReasonOf(err) != api.ConfigInvalid {
			t.Errorf("%v, %v; want %s", l, err, api.ConfigInvalid)
		}
		if _, err := os.Lstat(filepath.Dir(filepath.Dir(path))); err != nil {
			t.Error(err)
		}
	}
}

// TestListenUnixAfterKill starts a second process after the first one was killed and could not tidy up.
func TestListenUnixAfterKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	cmd, line := startChild(t, "listen", "SOCKET="+path)
	if got := line(); got != "listening" {
		t.Fatal(got)
	}
	if l, err := ListenUnix(path, 0o600); api.ReasonOf(err) != api.SocketUnsafe {
		t.Fatalf("while it lives: %v, %v; want %s", l, err, api.SocketUnsafe)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if _, err := os.Lstat(path); err != nil {
		t.Fatalf("the killed process left no socket, so this proves nothing: %v", err)
	}
	l, err := ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l)
	dialOwn(t, path)
}
