package daemon

import (
	"math"

	"golang.org/x/sys/unix"
)

// maxFiles is how many file descriptors the process may have. Go has raised the soft limit to the hard one.
func maxFiles() int {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return math.MaxInt32
	}
	return int(min(r.Cur, math.MaxInt32))
}
