//go:build !linux

package envoy

import (
	"os"
	"syscall"
)

// Other systems know no parent-death signal, and Windows no groups: the process itself is all that is ended.
func attributes() *syscall.SysProcAttr { return nil }

func kill(p *os.Process) error      { return p.Kill() }
func terminate(p *os.Process) error { return p.Signal(os.Interrupt) }
