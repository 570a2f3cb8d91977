//go:build integration && linux

package faults

import "golang.org/x/sys/unix"

const (
	auditArch   = unix.AUDIT_ARCH_X86_64
	sysStatPath = unix.SYS_NEWFSTATAT
)
