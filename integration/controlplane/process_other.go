//go:build !linux

package controlplane

import "syscall"

func processAttributes() *syscall.SysProcAttr { return nil }
