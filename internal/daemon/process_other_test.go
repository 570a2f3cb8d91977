//go:build !linux

package daemon

// hardenChild has nothing to show where the system cannot harden.
func hardenChild() {}
