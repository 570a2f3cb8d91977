package audit

import (
	"errors"
	"os"
	"syscall"
)

// allocate reserves the first size bytes of f, which reads as zeros where nothing was written. What the file system cannot
// do matches errors.ErrUnsupported.
func allocate(f *os.File, size int64) error {
	return control(f, "fallocate", func(fd int) error { return syscall.Fallocate(fd, 0, 0, size) })
}

// syncData puts the bytes of f on disk, and of what is known about them only that without which they are not found.
func syncData(f *os.File) error { return control(f, "fdatasync", syscall.Fdatasync) }

// control calls do with the descriptor of f, which stays open meanwhile whoever closes f.
func control(f *os.File, name string, do func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = conn.Control(func(fd uintptr) {
		for {
			if result = do(int(fd)); !errors.Is(result, syscall.EINTR) {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	return os.NewSyscallError(name, result)
}
