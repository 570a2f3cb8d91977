package agent

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// checkVolatile reports why what is written to dir could reach a disk.
func checkVolatile(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if st.Type != unix.TMPFS_MAGIC && st.Type != unix.RAMFS_MAGIC {
		return fmt.Errorf("the cache folder %s is not on a tmpfs", dir)
	}
	swaps, err := os.ReadFile("/proc/swaps")
	if err != nil {
		return fmt.Errorf("whether there is swap cannot be told: %w", err)
	}
	if bytes.Count(bytes.TrimSpace(swaps), []byte("\n")) > 0 { // the first line is the heading
		return fmt.Errorf("the machine has swap, so what the cache folder %s holds could reach a disk", dir)
	}
	return nil
}
