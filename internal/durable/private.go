package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// ErrUnsafe is matched by errors.Is when a file or folder was refused because others could read or replace it.
var ErrUnsafe = errors.New("open to others")

// An UnsafeError names a file or folder that was refused, and why. It matches ErrUnsafe.
type UnsafeError struct {
	Path string
	Why  string // "is a symbolic link", "has mode 0644, want 0600" and so on
}

// Error returns "PATH WHY".
func (e *UnsafeError) Error() string { return e.Path + " " + e.Why }

// Is reports whether target is ErrUnsafe.
func (e *UnsafeError) Is(target error) bool { return target == ErrUnsafe }

// MkdirPrivate makes the folder path with mode 0700, and its missing parents likewise, and makes that durable. A folder
// that is there already is accepted if it is one that only this user can enter: no symbolic link, owned by the user of
// the process, nothing for group and others. Otherwise the error matches ErrUnsafe, and nothing was changed. The folders
// above that existed before are the operator's and are not judged.
func MkdirPrivate(path string) error {
	path = filepath.Clean(path)
	err := os.Mkdir(path, 0o700)
	if errors.Is(err, fs.ErrNotExist) {
		if err := MkdirPrivate(filepath.Dir(path)); err != nil {
			return err
		}
		err = os.Mkdir(path, 0o700)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	made := err == nil
	if err := checkDir(path); err != nil {
		return err
	}
	if made {
		return SyncDir(filepath.Dir(path))
	}
	return nil
}

// checkDir judges the folder that was opened, not the name, which could be replaced in between.
func checkDir(path string) error {
	d, err := openNoFollow(path)
	if err != nil {
		return err
	}
	defer d.Close()
	info, err := d.Stat()
	if err != nil {
		return err
	}
	switch {
	case !info.IsDir():
		return &UnsafeError{path, "is not a folder"}
	case owner(info) != os.Geteuid():
		return &UnsafeError{path, fmt.Sprintf("is owned by user %d, want %d", owner(info), os.Geteuid())}
	case info.Mode().Perm()&0o077 != 0:
		return &UnsafeError{path, fmt.Sprintf("has mode %#o, want 0700", info.Mode().Perm())}
	}
	return nil
}

// Reading says how far ReadPrivate may relax for files that something else laid down. The zero Reading relaxes nothing.
// Kubernetes mounts a Secret as symbolic links, and where the pod has an fsGroup it adds the group's read bit: reading
// one takes both, given by whoever knows that the path is such a mount.
type Reading struct {
	FollowLinks bool // the file may be reached through symbolic links
	GroupRead   bool // its group may read it
}

// ReadPrivate reads a file that holds a secret: a regular file of at most max bytes, not a symbolic link, owned by the
// user of the process or root, with nothing for group and others. Otherwise the error matches ErrUnsafe. The rules are
// checked on the open file, so it cannot be exchanged between check and read. A missing file matches fs.ErrNotExist.
func ReadPrivate(path string, max int64) ([]byte, error) {
	return Reading{}.ReadPrivate(path, max)
}

// ReadPrivate is the function ReadPrivate, relaxed as r says.
func (r Reading) ReadPrivate(path string, max int64) ([]byte, error) {
	open := openNoFollow
	if r.FollowLinks {
		open = openNonblock
	}
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	forbidden := fs.FileMode(0o077)
	if r.GroupRead {
		forbidden = 0o037
	}
	uid := owner(info)
	switch {
	case !info.Mode().IsRegular():
		return nil, &UnsafeError{path, "is not a regular file"}
	case uid != 0 && uid != os.Geteuid():
		return nil, &UnsafeError{path, fmt.Sprintf("is owned by user %d, want %d or root", uid, os.Geteuid())}
	case info.Mode().Perm()&forbidden != 0:
		return nil, &UnsafeError{path, fmt.Sprintf("has mode %#o, want %#o", info.Mode().Perm(), info.Mode().Perm()&^forbidden)}
	}
	// The size that was checked is not trusted: the file may grow.
	data, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > max {
		return nil, &UnsafeError{path, fmt.Sprintf("is larger than %d bytes", max)}
	}
	return data, nil
}

// openNoFollow opens path for reading unless it is a symbolic link, and never waits: a FIFO would hold us for ever.
func openNoFollow(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.EMLINK) {
		return nil, &UnsafeError{path, "is a symbolic link"}
	}
	return f, err
}

func openNonblock(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
}

// owner returns the user id of a file, and -1, which nobody has, where the file system knows none.
func owner(info fs.FileInfo) int {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}
