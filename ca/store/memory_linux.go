package store

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// memoryFile returns a file with that content which is on no disk.
func memoryFile(data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("signet-store", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "copy of the store")
	if _, err := f.Write(data); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
