//go:build !linux

package durable

import (
	"errors"
	"os"
)

// Reserve makes the first size bytes of f its own where the system can; elsewhere its error matches errors.ErrUnsupported.
func Reserve(*os.File, int64) error { return errors.ErrUnsupported }
