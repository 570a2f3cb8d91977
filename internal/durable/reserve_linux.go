package durable

import (
	"errors"
	"os"
	"syscall"
)

// Reserve makes the first size bytes of f its own, so that writing there meets no full disk; f grows to that size, by
// zeros. What the file system cannot do matches errors.ErrUnsupported, and a full disk syscall.ENOSPC.
func Reserve(f *os.File, size int64) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = conn.Control(func(fd uintptr) {
		for {
			if result = syscall.Fallocate(int(fd), 0, 0, size); !errors.Is(result, syscall.EINTR) {
				return
			}
		}
	})
	return errors.Join(err, os.NewSyscallError("fallocate", result))
}
