package daemon

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/signet-ca/signet/api"
)

// ListenUnix listens on a Unix socket of the given mode. Its folder is made (0755) where it is missing, and must belong to
// this user or root and be writable by nobody else, unless it is sticky. A socket that nobody listens on is
// taken for a leftover and removed; anything else that lies there is SocketUnsafe, and so is a socket on which somebody
// listens.
func ListenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	dir := filepath.Dir(path)
	// The kernel's bound holds for the name below, too; a name above it would be shown and could not be connected to.
	if room := len(syscall.RawSockaddrUnix{}.Path) - 1; max(len(path), len(dir)+len("/.4294967295/s")) > room {
		return nil, api.E(api.ConfigInvalid, "the path of the socket %s is too long: the system takes %d bytes", path, room)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := checkFolder(dir); err != nil {
		return nil, err
	}
	if err := removeLeftover(path); err != nil {
		return nil, err
	}
	// The socket is born in a folder that only this user can enter and shown under its own name when its mode is right, so
	// that nobody can connect in between, whatever the umask.
	hidden, err := os.MkdirTemp(dir, ".")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(hidden)
	born := filepath.Join(hidden, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: born, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(born, mode)
	info, serr := os.Lstat(born)
	if err = errors.Join(err, serr); err == nil {
		err = os.Rename(born, path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &unixListener{UnixListener: l, path: path, info: info}, nil
}

// unixListener removes the socket when it is closed, and tells the address under which it can be reached.
type unixListener struct {
	*net.UnixListener
	path string
	info fs.FileInfo // of the socket, to tell it from one that took its place
	once sync.Once
}

// Addr implements net.Listener.
func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close implements net.Listener. What lies at the path by then is removed only if it is this socket still: a process that
// ends late takes nothing from the one that follows it.
func (l *unixListener) Close() error {
	var err error
	l.once.Do(func() {
		if info, serr := os.Lstat(l.path); serr == nil && os.SameFile(info, l.info) {
			err = os.Remove(l.path)
		}
	})
	return errors.Join(l.UnixListener.Close(), err)
}

// checkFolder refuses a folder in which somebody else could put another socket in place of ours.
func checkFolder(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if uid, ok := ownerUID(info); ok && uid != 0 && uid != os.Geteuid() {
		return api.E(api.SocketUnsafe, "the folder %s belongs to user %d", dir, uid)
	}
	if info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		return api.E(api.SocketUnsafe, "the folder %s can be written to by others (mode %s)", dir, info.Mode().Perm())
	}
	return nil
}

func removeLeftover(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return api.E(api.SocketUnsafe, "%s is there and is not a socket", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		c.Close()
		return api.E(api.SocketUnsafe, "another process serves %s", path)
	case errors.Is(err, syscall.ECONNREFUSED): // nobody listens; any other error may come from one who does and is busy
		return os.Remove(path)
	}
	return api.Wrap(api.SocketUnsafe, err, "it cannot be told whether another process serves "+path)
}
