package envoy

import (
	"os"
	"syscall"
)

// attributes make the child the leader of its own group, and have the kernel kill it when its parent dies.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

func kill(p *os.Process) error      { return syscall.Kill(-p.Pid, syscall.SIGKILL) }
func terminate(p *os.Process) error { return syscall.Kill(-p.Pid, syscall.SIGTERM) }
