//go:build integration && linux

package faults

import "golang.org/x/sys/unix"

const (
	auditArch   = unix.AUDIT_ARCH_AARCH64
	sysStatPath = unix.SYS_FSTATAT
)
