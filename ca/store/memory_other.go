//go:build !linux

package store

import (
	"errors"
	"os"
)

// memoryFile returns a file with that content, which nobody else can read and which has no name any more.
func memoryFile(data []byte) (*os.File, error) {
	f, err := os.CreateTemp("", "signet-store-*")
	if err != nil {
		return nil, err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, os.Remove(f.Name())); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
