//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kindOfCall says where the arguments of a system call are.
type kindOfCall struct {
	name   string
	path   int  // index of the argument with a path; -1: the first argument is a descriptor
	size   int  // index of the argument with a number of bytes; -1: none
	change bool // it changes what is on disk, or is to make that last
}

// kinds are the calls that are looked at: all by which Go's os package, bbolt and we touch a file.
var kinds = map[uintptr]kindOfCall{
	unix.SYS_OPENAT:          {"openat", 1, -1, false},
	unix.SYS_MKDIRAT:         {"mkdirat", 1, -1, true},
	unix.SYS_RENAMEAT:        {"renameat", 3, -1, true},
	unix.SYS_RENAMEAT2:       {"renameat2", 3, -1, true},
	unix.SYS_LINKAT:          {"linkat", 3, -1, true},
	unix.SYS_UNLINKAT:        {"unlinkat", 1, -1, true},
	unix.SYS_FCHMODAT:        {"fchmodat", 1, -1, true},
	sysStatPath:              {"fstatat", 1, -1, false},
	unix.SYS_FSTAT:           {"fstat", -1, -1, false},
	unix.SYS_FLOCK:           {"flock", -1, -1, false},
	unix.SYS_GETDENTS64:      {"getdents64", -1, 2, false},
	unix.SYS_READ:            {"read", -1, 2, false},
	unix.SYS_PREAD64:         {"pread64", -1, 2, false},
	unix.SYS_WRITE:           {"write", -1, 2, true},
	unix.SYS_PWRITE64:        {"pwrite64", -1, 2, true},
	unix.SYS_WRITEV:          {"writev", -1, -1, true},
	unix.SYS_PWRITEV:         {"pwritev", -1, -1, true},
	unix.SYS_COPY_FILE_RANGE: {"copy_file_range", -1, -1, true},
	unix.SYS_FSYNC:           {"fsync", -1, -1, true},
	unix.SYS_FDATASYNC:       {"fdatasync", -1, -1, true},
	unix.SYS_SYNC_FILE_RANGE: {"sync_file_range", -1, -1, true},
	unix.SYS_FALLOCATE:       {"fallocate", -1, -1, true},
	unix.SYS_FTRUNCATE:       {"ftruncate", -1, -1, true},
	unix.SYS_FCHMOD:          {"fchmod", -1, -1, true},
}

// sync reports whether the call is to make something last.
func (k kindOfCall) sync() bool { return k.name == "fsync" || k.name == "fdatasync" }

// makes reports whether the call needs room on the disk.
func (k kindOfCall) grows() bool {
	switch k.name {
	case "mkdirat", "renameat", "renameat2", "linkat", "write", "pwrite64", "writev", "pwritev", "copy_file_range", "fallocate", "ftruncate", "fsync", "fdatasync":
		return true
	}
	return false
}

// call is one system call on a file of the subject.
type call struct {
	n int // from 1, over all threads
	kindOfCall
	file   string // below the warden's root
	create bool   // openat that may make the file, or opens it for writing
	args   [6]uint64
	did    act
}

func (c call) String() string { return fmt.Sprintf("%d %s %s", c.n, c.name, c.file) }

// changes reports whether the call could fail on a disk that is full or cannot be written.
func (c call) changes() bool { return c.change || c.create }

// act is what the warden does to a call.
type act int

const (
	pass act = iota
	die      // the process is killed before the call
	tear     // half of a write is done, then the process is killed
	fail     // the call fails and does nothing
	half     // half of a write is done and said to be done; what comes behind it fails
	late     // the call is done and said to have failed
)

// warden decides what becomes of each call of one process on files below root.
type warden struct {
	root   string
	decide func(call) (act, unix.Errno) // called in the order of the calls, by one goroutine
	pid    int                          // set before the first call

	mu    sync.Mutex
	calls []call
	bad   error // why the warden itself could not do as decided
}

func (w *warden) seen() []call {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calls
}

func (w *warden) err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.bad
}

// notification and response are struct seccomp_notif and seccomp_notif_resp of linux/seccomp.h.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type response struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

// filter hands the calls of kinds to the listener and lets all others pass.
func filter() []unix.SockFilter {
	const load, equal, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	prog := []unix.SockFilter{
		{Code: load, K: 4}, // arch
		{Code: equal, K: auditArch, Jt: 1},
		{Code: ret, K: unix.SECCOMP_RET_ALLOW},
		{Code: load, K: 0}, // nr
	}
	for nr := range kinds {
		prog = append(prog, unix.SockFilter{Code: equal, K: uint32(nr), Jf: 1}, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_USER_NOTIF})
	}
	return append(prog, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW})
}

// install puts the filter on the calling thread and on what it executes, and returns its listener.
func install() (listener int, err error) {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, err
	}
	rules := filter()
	prog := unix.SockFprog{Len: uint16(len(rules)), Filter: &rules[0]}
	// A call that the warden has received is not interrupted by the signals of Go's scheduler, or it would be counted twice.
	flags := uintptr(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// serve answers the calls of the process until it is gone.
func (w *warden) serve(pid, listener int) {
	defer unix.Close(listener)
	w.pid = pid
	for {
		poll := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, -1); err != nil && !errors.Is(err, unix.EINTR) {
			w.fault(err)
			return
		}
		if poll[0].Revents&unix.POLLIN == 0 {
			if poll[0].Revents != 0 {
				return // nobody is left who has the filter
			}
			continue
		}
		var n notification
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n))); errno != 0 {
			continue // the thread is gone, or was interrupted before we saw its call
		}
		if r := w.answer(pid, n); r != nil {
			r.id = n.id
			// It fails only when the thread is gone meanwhile.
			unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(r)))
		}
	}
}

func (w *warden) fault(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.bad == nil {
		w.bad = err
	}
}

// answer decides about one call and returns what the process is told; nil when it was killed.
func (w *warden) answer(pid int, n notification) *response {
	goOn := &response{flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
	c, ours := w.identify(pid, n)
	if !ours {
		return goOn
	}
	w.mu.Lock()
	c.n = len(w.calls) + 1
	w.mu.Unlock()
	what, errno := w.decide(c)
	c.did = what
	w.mu.Lock()
	w.calls = append(w.calls, c)
	w.mu.Unlock()
	switch what {
	case die:
		unix.Kill(pid, unix.SIGKILL)
		return nil
	case tear, half:
		done, err := w.perform(pid, c, c.args[max(c.size, 0)]/2)
		if err != nil {
			w.fault(fmt.Errorf("%s: %w", c, err))
		}
		if what == tear {
			unix.Kill(pid, unix.SIGKILL)
			return nil
		}
		return &response{val: int64(done)}
	case late:
		_, err := w.perform(pid, c, c.args[max(c.size, 0)])
		if own, ok := errors.AsType[unix.Errno](err); ok {
			errno = own // it fails by itself
		} else if err != nil {
			w.fault(fmt.Errorf("%s: %w", c, err))
		}
		return &response{err: -int32(errno)}
	case fail:
		return &response{err: -int32(errno)}
	}
	return goOn
}

// identify tells whether a call is about a file below the root.
func (w *warden) identify(pid int, n notification) (call, bool) {
	c := call{kindOfCall: kinds[uintptr(n.nr)], args: n.args}
	if c.name == "" {
		return c, false
	}
	var path string
	if c.path < 0 {
		path, _ = os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, int32(n.args[0])))
		path = strings.TrimSuffix(path, " (deleted)")
	} else {
		path = readString(pid, n.args[c.path])
		if !filepath.IsAbs(path) { // of a folder that is open, as os.RemoveAll and openat2's friends do it
			dir, _ := os.Readlink("/proc/" + strconv.Itoa(pid) + "/fd/" + strconv.Itoa(int(int32(n.args[c.path-1]))))
			path = filepath.Join(dir, path)
		}
	}
	c.create = c.name == "openat" && n.args[2]&(unix.O_CREAT|unix.O_WRONLY|unix.O_RDWR|unix.O_TRUNC) != 0
	file, err := filepath.Rel(w.root, path)
	if err != nil || strings.HasPrefix(file, "..") {
		return c, false
	}
	c.file = file
	return c, true
}

// canPerform reports whether the warden can do the call in place of the process.
func (c call) canPerform() bool {
	switch c.name {
	case "write", "pwrite64", "fsync", "fdatasync", "fallocate", "ftruncate", "renameat", "renameat2", "linkat", "unlinkat":
		return true
	}
	return false
}

// perform does the call as the process would, a write of size bytes.
func (w *warden) perform(pid int, c call, size uint64) (n int, err error) {
	if c.path >= 0 {
		last := readString(pid, c.args[c.path])
		switch c.name {
		case "renameat", "renameat2":
			return 0, os.Rename(readString(pid, c.args[1]), last)
		case "linkat":
			return 0, os.Link(readString(pid, c.args[1]), last)
		case "unlinkat":
			return 0, os.Remove(last)
		}
		return 0, errors.ErrUnsupported
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, int(int32(c.args[0])), 0) // the same open file, with its offset
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	switch c.name {
	case "write", "pwrite64":
		data, err := readMemory(pid, c.args[1], int(size))
		switch {
		case err != nil || size == 0:
			return 0, err
		case c.name == "write":
			return unix.Write(fd, data)
		}
		return unix.Pwrite(fd, data, int64(c.args[3]))
	case "fsync", "fdatasync":
		return 0, unix.Fsync(fd)
	case "ftruncate":
		return 0, unix.Ftruncate(fd, int64(c.args[1]))
	case "fallocate":
		return 0, unix.Fallocate(fd, uint32(c.args[1]), int64(c.args[2]), int64(c.args[3]))
	}
	return 0, errors.ErrUnsupported
}

func readMemory(pid int, at uint64, size int) ([]byte, error) {
	data := make([]byte, size)
	if size == 0 {
		return data, nil
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, err
	}
	defer mem.Close()
	n, err := mem.ReadAt(data, int64(at))
	if n > 0 {
		err = nil // a string may end just before memory does
	}
	return data[:n], err
}

// readString reads a path; an empty one where it cannot be read.
func readString(pid int, at uint64) string {
	data, _ := readMemory(pid, at, unix.PathMax)
	s, _, _ := bytes.Cut(data, []byte{0})
	return string(s)
}

// trampolineEnv makes this test binary put the filter on itself and become the command of its arguments.
const trampolineEnv = "SIGNET_FAULTS_TRAMPOLINE"

// exitUnsupported is how the trampoline says that there is no such filter here.
const exitUnsupported = 97

// trampoline hands the listener to the parent through descriptor 3 and becomes the program. It runs on one thread.
func trampoline() {
	os.Unsetenv(trampolineEnv)
	listener, err := install()
	if err != nil {
		fmt.Fprintln(os.Stderr, "seccomp:", err)
		os.Exit(exitUnsupported)
	}
	err = unix.Sendmsg(3, []byte{0}, unix.UnixRights(listener), nil, 0)
	if err == nil {
		unix.CloseOnExec(3)
		err = syscall.Exec(os.Args[1], os.Args[1:], os.Environ())
	}
	fmt.Fprintln(os.Stderr, "trampoline:", err)
	os.Exit(1)
}

// receiveListener is the parent's side; it fails when the trampoline has ended.
func receiveListener(socket int) (int, error) {
	if err := unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, new(unix.NsecToTimeval(int64(30*time.Second)))); err != nil {
		return -1, err
	}
	data, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	var oobn int
	for again := true; again; {
		var err error
		_, oobn, _, _, err = unix.Recvmsg(socket, data, oob, unix.MSG_CMSG_CLOEXEC)
		if again = errors.Is(err, unix.EINTR); err != nil && !again {
			return -1, err
		}
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return -1, err
	}
	if len(messages) == 0 {
		return -1, errors.New("the trampoline ended")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("%d descriptors, %w", len(fds), err)
	}
	return fds[0], nil
}
