package csi

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/api"
)

// A way from folder to folder that nobody can bend: no link is followed, no other file system is entered, and nothing is
// above where it began. What was checked is what is used, because it is open.
const resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

// tempPrefix begins the name under which a socket is made; what a killed process left is known by it.
const tempPrefix = ".signet-"

// maxEntries is how many names of a folder are read: ours has one or two.
const maxEntries = 64

// maxNotes bounds what is read of kubelet's notes, a few hundred bytes.
const maxNotes = 64 << 10

// errGone matches fs.ErrNotExist.
var errGone error = api.Wrap(api.VolumeTarget, fs.ErrNotExist, "kubelet's folder of the volume is not there")

// fileID tells a file from every other, also from one that has got its number after it.
type fileID struct {
	major, minor uint32
	inode        uint64
	birth        unix.StatxTimestamp // zero where the file system knows none
}

// pods is kubelet's folder of pods.
type pods struct{ dir string }

// checkSystem reports whether folders can be opened without following links.
func checkSystem() error {
	fd, err := unix.Openat2(unix.AT_FDCWD, ".", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: resolve})
	if err != nil {
		return api.E(api.SocketUnsafe, "the system cannot open folders without following links (openat2: %v): it needs Linux 5.6, and a seccomp profile that allows it", err)
	}
	return unix.Close(fd)
}

// openIn opens what is below a folder.
func openIn(dir int, path string, flags uint64) (*os.File, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: resolve}
	for tries := 0; ; tries++ {
		fd, err := unix.Openat2(dir, path, &how)
		if err == nil {
			return os.NewFile(uintptr(fd), path), nil
		}
		if tries >= 100 || !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return nil, err
		}
	}
}

// refuse says why a folder could not be opened.
func refuse(err error, what string) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return errGone
	case errors.Is(err, unix.ELOOP):
		return api.E(api.SocketUnsafe, "a symbolic link lies on the way to %s", what)
	case errors.Is(err, unix.EXDEV):
		return api.E(api.SocketUnsafe, "another file system is mounted on the way to %s", what)
	case errors.Is(err, unix.ENOTDIR):
		return api.E(api.SocketUnsafe, "something that is no folder lies on the way to %s", what)
	}
	return failed("open "+what, err)
}

func failed(doing string, err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		err = pe.Err
	}
	if oe, ok := errors.AsType[*net.OpError](err); ok {
		err = oe.Err
	}
	return api.E(api.VolumeFailed, "cannot %s: %v", doing, err)
}

func identify(dir int, name string) (fileID, uint32, error) {
	var st unix.Statx_t
	err := unix.Statx(dir, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st)
	id := fileID{major: st.Dev_major, minor: st.Dev_minor, inode: st.Ino}
	if st.Mask&unix.STATX_BTIME != 0 {
		id.birth = st.Btime
	}
	return id, uint32(st.Mode), err
}

// root opens the folder of pods itself. The way there is the operator's, and may have links.
func (p pods) root() (*os.File, error) {
	fd, err := unix.Open(p.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), p.dir), nil
}

// exists reports whether a pod has a folder; an error means that nothing is known.
func (p pods) exists(podUID string) (bool, error) {
	root, err := p.root()
	if err != nil {
		return false, err // also where it does not exist: that says nothing about the pod
	}
	defer root.Close()
	_, _, err = identify(int(root.Fd()), podUID)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// folder is a volume's folder as kubelet made it, open; mount is inside.
type folder struct{ *os.File }

// open opens a volume's folder. The error matches fs.ErrNotExist where it, or one above, is missing.
func (p pods) open(t target) (folder, error) {
	root, err := p.root()
	if err != nil {
		return folder{}, failed("open kubelet's folder of pods", err) // that it is missing says nothing about a pod
	}
	defer root.Close()
	f, err := openIn(int(root.Fd()), t.parent(), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return folder{}, refuse(err, "the volume's folder")
	}
	if err := checkOwner(f, "the volume's folder", 0); err != nil {
		f.Close()
		return folder{}, err
	}
	return folder{f}, nil
}

// checkOwner refuses a folder that belongs to somebody else than this user and root, or only this user where root is not
// asked for, or that others can write to.
func checkOwner(f *os.File, what string, root int) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return failed("look at "+what, err)
	}
	switch {
	case int(st.Uid) != os.Geteuid() && int(st.Uid) != root:
		return api.E(api.SocketUnsafe, "%s belongs to user %d", what, st.Uid)
	case st.Mode&0o022 != 0:
		return api.E(api.SocketUnsafe, "%s can be written to by others (mode %#o)", what, st.Mode&0o7777)
	}
	return nil
}

// hasMount reports whether a volume has the folder that the pod sees.
func (p pods) hasMount(t target) (bool, error) {
	f, err := p.open(t)
	if err == nil {
		defer f.Close()
		_, _, err = identify(int(f.Fd()), mountFolder)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// mount is the folder that the pod sees, open.
type mount struct {
	*os.File
	id fileID
}

// inside opens mount as it is; the error matches fs.ErrNotExist where there is none.
func (f folder) inside() (mount, error) {
	m, err := openIn(int(f.Fd()), mountFolder, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return mount{}, refuse(err, "the folder of the socket")
	}
	id, _, err := identify(int(m.Fd()), "")
	if err == nil {
		err = checkOwner(m, "the folder of the socket", os.Geteuid())
	} else {
		err = failed("look at the folder of the socket", err)
	}
	if err != nil {
		m.Close()
		return mount{}, err
	}
	return mount{m, id}, nil
}

// make opens mount, and makes it where it is missing; made says so. One that was there must be known, or hold nothing but
// what an earlier process of ours left.
func (f folder) make(known fileID) (m mount, made bool, err error) {
	err = unix.Mkdirat(int(f.Fd()), mountFolder, folderMode)
	if made = err == nil; !made && !errors.Is(err, unix.EEXIST) {
		return mount{}, false, failed("make the folder of the socket", err)
	}
	if m, err = f.inside(); err != nil {
		if made { // an empty folder and nothing else: what may have taken its place is not ours
			unix.Unlinkat(int(f.Fd()), mountFolder, unix.AT_REMOVEDIR)
		}
		return mount{}, made, err
	}
	if !made && m.id != known {
		_, err = m.ours(true)
	}
	if err == nil {
		if cerr := m.Chmod(folderMode); cerr != nil { // whatever the umask
			err = failed("set the mode of the socket's folder", cerr)
		}
	}
	if err != nil {
		m.Close()
		if made {
			err = errors.Join(err, f.remove())
		}
		return mount{}, made, err
	}
	return m, made, nil
}

// ours returns the names in the folder that are ours to remove. There may be no others; strictly, they must be sockets.
func (m mount) ours(strictly bool) ([]string, error) {
	again, err := openIn(int(m.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY) // with an offset of its own
	if err != nil {
		return nil, failed("read the folder of the socket", err)
	}
	defer again.Close()
	names, err := again.Readdirnames(maxEntries)
	if err != nil && len(names) > 0 || len(names) == maxEntries {
		return nil, api.E(api.SocketUnsafe, "the folder of the socket holds things that are not ours")
	}
	for _, name := range names {
		var st unix.Stat_t
		err := unix.Fstatat(int(m.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, failed("look at the folder of the socket", err)
		}
		kind := st.Mode & unix.S_IFMT
		if name != SocketName && !strings.HasPrefix(name, tempPrefix) || kind == unix.S_IFDIR ||
			strictly && (kind != unix.S_IFSOCK || int(st.Uid) != os.Geteuid()) {
			return nil, api.E(api.SocketUnsafe, "the folder of the socket holds things that are not ours")
		}
	}
	return names, nil
}

// listen puts a socket into the folder, in place of the one there. It is born under a name that nobody knows, and shown
// when it is as it must be. Its address leads through the open folder: a path from kubelet's folder down would be too long
// for one, and could be bent.
func (m mount) listen(bind func(string) (*net.UnixListener, error), step func(string)) (l *net.UnixListener, id fileID, err error) {
	fd := int(m.Fd())
	if old, oerr := m.ours(false); oerr == nil {
		for _, name := range old {
			if strings.HasPrefix(name, tempPrefix) {
				unix.Unlinkat(fd, name, 0) // a killed process left it
			}
		}
	}
	name := tempPrefix + rand.Text()
	l, err = bind("/proc/self/fd/" + strconv.Itoa(fd) + "/" + name)
	if err != nil {
		return nil, fileID{}, failed("listen on the pod's socket", err)
	}
	l.SetUnlinkOnClose(false)
	step("bound the socket")
	if id, err = m.show(name, step); err != nil {
		unix.Unlinkat(fd, name, 0)
		l.Close()
		return nil, fileID{}, err
	}
	step("showed the socket")
	return l, id, nil
}

// show gives a new socket its mode and its name.
func (m mount) show(name string, step func(string)) (fileID, error) {
	fd := int(m.Fd())
	s, err := openIn(fd, name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return fileID{}, failed("open the new socket", err)
	}
	defer s.Close()
	id, mode, err := identify(int(s.Fd()), "")
	if err != nil || mode&unix.S_IFMT != unix.S_IFSOCK {
		return fileID{}, api.E(api.SocketUnsafe, "the new socket was replaced before it was shown")
	}
	if err := os.Chmod("/proc/self/fd/"+strconv.Itoa(int(s.Fd())), socketMode); err != nil {
		return fileID{}, failed("set the mode of the socket", err)
	}
	step("set the mode")
	if err := unix.Renameat(fd, name, fd, SocketName); err != nil {
		return fileID{}, failed("put the socket in place", err)
	}
	return id, nil
}

// remove takes mount away with what is ours in it. Where there is none, nothing is done; where there is something else in it,
// nothing either, and that is an error.
func (f folder) remove() error {
	m, err := f.inside()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer m.Close()
	names, err := m.ours(false)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := unix.Unlinkat(int(m.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return failed("remove the socket", err)
		}
	}
	if err := unix.Unlinkat(int(f.Fd()), mountFolder, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		return failed("remove the folder of the socket", err)
	}
	return nil
}

// look reports whether a volume's folder and socket are those that were made: nil when they are, errNoSocket when only the
// socket is not, and an *api.Error when the folder is not.
func (p pods) look(v *volume) error {
	f, err := p.open(v.target)
	if err != nil {
		return err
	}
	defer f.Close()
	m, err := f.inside()
	if err != nil {
		return err
	}
	defer m.Close()
	if v.folder != (fileID{}) && m.id != v.folder {
		return api.E(api.SocketUnsafe, "the folder of the socket was replaced")
	}
	if id, _, err := identify(int(m.Fd()), SocketName); err != nil || id != v.socket.file() {
		return errNoSocket
	}
	return nil
}

// unpublishable reports whether kubelet can never ask for this volume to be removed: its notes, from which it would, are
// missing, empty or torn, because it was killed while it wrote them.
func (f folder) unpublishable() bool {
	data, err := openIn(int(f.Fd()), volumeData, unix.O_RDONLY|unix.O_NONBLOCK)
	if errors.Is(err, unix.ENOENT) {
		return true
	}
	if err != nil {
		return false
	}
	defer data.Close()
	if info, err := data.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() > maxNotes {
		return false
	}
	text, err := io.ReadAll(io.LimitReader(data, maxNotes))
	if err != nil {
		return false
	}
	var notes map[string]string
	return json.Unmarshal(text, &notes) != nil || notes["volumeHandle"] == ""
}

// removeAll takes the volume's whole folder away, with kubelet's notes where those are worth nothing: kubelet itself would
// stumble over them for ever.
func (p pods) removeAll(t target) error {
	f, err := p.open(t)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.remove(); err != nil {
		return err
	}
	if !f.unpublishable() {
		return nil // kubelet was faster
	}
	if err := unix.Unlinkat(int(f.Fd()), volumeData, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return failed("remove kubelet's notes", err)
	}
	root, err := p.root()
	if err != nil {
		return failed("open kubelet's folder of pods", err)
	}
	defer root.Close()
	above, err := openIn(int(root.Fd()), t.podUID+"/"+csiFolder, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return refuse(err, "the volume's folder")
	}
	defer above.Close()
	if err := unix.Unlinkat(int(above.Fd()), t.name, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		return failed("remove the volume's folder", err)
	}
	return nil
}

// leftovers returns the volumes that hold our socket and nothing else, and that kubelet can never ask to be removed.
func (p pods) leftovers() ([]target, error) {
	root, err := p.root()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	uids, err := names(root, ".")
	if err != nil {
		return nil, err
	}
	var all []target
	for _, uid := range uids {
		if !api.IsUID(uid) {
			continue
		}
		volumes, err := names(root, uid+"/"+csiFolder)
		if err != nil {
			continue // it has none
		}
		for _, name := range volumes {
			if t := (target{uid, name}); api.IsLabel(name) && p.leftover(t) {
				all = append(all, t)
			}
		}
	}
	return all, nil
}

func (p pods) leftover(t target) bool {
	f, err := p.open(t)
	if err != nil {
		return false
	}
	defer f.Close()
	if !f.unpublishable() {
		return false
	}
	m, err := f.inside()
	if err != nil {
		return false
	}
	defer m.Close()
	names, err := m.ours(true)
	return err == nil && slices.Contains(names, SocketName)
}

// names returns what is in a folder.
func names(root *os.File, path string) ([]string, error) {
	d, err := openIn(int(root.Fd()), path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}
