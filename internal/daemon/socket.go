package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/signet-ca/signet/api"
)

// ListenUnix listens on a Unix socket of the given mode. Its folder is made (0755) where it is missing, and must belong to
// this user or root and be writable by nobody else. A socket that nobody answers on is taken for a leftover and removed;
// anything else that lies there is SocketUnsafe, and so is a socket on which somebody answers.
func ListenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := checkFolder(dir); err != nil {
		return nil, err
	}
	if err := removeLeftover(path); err != nil {
		return nil, err
	}
	// The socket is born with the mode 0600 of a private name and shown under its own name when its mode is right, so
	// that nobody can connect in between.
	hidden := filepath.Join(dir, fmt.Sprintf(".%s.%d", filepath.Base(path), os.Getpid()))
	if err := removeLeftover(hidden); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: hidden, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(hidden, mode), os.Rename(hidden, path)); err != nil {
		return nil, errors.Join(err, l.Close(), os.Remove(hidden))
	}
	return &unixListener{l, path}, nil
}

// unixListener removes the socket when it is closed, and tells the address under which it can be reached.
type unixListener struct {
	*net.UnixListener
	path string
}

// Addr implements net.Listener.
func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close implements net.Listener.
func (l *unixListener) Close() error {
	err := os.Remove(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(l.UnixListener.Close(), err)
}

func checkFolder(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
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
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return api.E(api.SocketUnsafe, "another process serves %s", path)
	}
	return os.Remove(path)
}

// OwnerOnly wraps the listener of a Unix socket: only processes of this user and of root get through, whatever the mode
// of the socket has become. Others see their connection end.
func OwnerOnly(l net.Listener) net.Listener { return ownerListener{l} }

type ownerListener struct{ net.Listener }

// Accept implements net.Listener.
func (l ownerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(c)
		if err == nil && (uid == 0 || uid == os.Geteuid()) {
			return c, nil
		}
		c.Close()
	}
}
