//go:build !linux

package agent

import "errors"

// checkVolatile reports why what is written to dir could reach a disk.
func checkVolatile(string) error {
	return errors.New("whether the cache folder can reach a disk cannot be told on this system")
}
