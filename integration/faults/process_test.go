//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"bytes"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// childEnv names what this test binary does instead of its tests: a subject without the rest of a CA.
const childEnv = "SIGNET_FAULTS_CHILD"

// children are those subjects; each gets the folder that it works in.
var children = map[string]func(dir string){
	"calls":   callsChild,
	"durable": durableChild,
	"ledger":  ledgerChild,
	"look":    lookChild,
	"store":   storeChild,

	"power":   powerChild,
	"create":  stepChild("create"),
	"step":    stepChild("step"),
	"replica": stepChild("replica"),
	"backup":  stepChild("backup"),
	"restore": stepChild("restore"),
	"replace": stepChild("replace"),
}

// The main goroutine stays on the first thread, so that a filter and what it executes are one.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	if os.Getenv(trampolineEnv) != "" {
		trampoline()
	}
	if child, ok := children[os.Getenv(childEnv)]; ok {
		child(os.Args[1])
		return
	}
	os.Exit(m.Run())
}

// process is a program under a warden.
type process struct {
	cmd    *exec.Cmd
	warden *warden
	wait   sync.WaitGroup // of the warden, and of who waits for the process
	done   chan struct{}  // closed when the process is gone

	mu     sync.Mutex
	output bytes.Buffer // both streams
	line   func(string) // called for each line; may be nil
	rest   string
}

// Write takes the output of the process.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	p.output.Write(b)
	var lines []string
	if p.line != nil {
		all := strings.Split(p.rest+string(b), "\n")
		lines, p.rest = all[:len(all)-1], all[len(all)-1]
	}
	p.mu.Unlock()
	for _, l := range lines {
		p.line(l)
	}
	return len(b), nil
}

func (p *process) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.output.String()
}

// start starts a program under w. It is killed when the test ends, at the latest.
func start(t testing.TB, w *warden, line func(string), env []string, argv ...string) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "warden")
	p := &process{cmd: exec.Command(exe, argv...), warden: w, line: line, done: make(chan struct{})}
	p.cmd.Env = append(append(os.Environ(), trampolineEnv+"=1"), env...)
	p.cmd.ExtraFiles = []*os.File{theirs}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = p.cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	listener, err := receiveListener(pair[0])
	if err != nil {
		p.cmd.Process.Kill()
		p.cmd.Wait()
		if p.cmd.ProcessState.ExitCode() == exitUnsupported {
			t.Skipf("system calls cannot be failed here: %s", p.said())
		}
		t.Fatalf("%v: %s", err, p.said())
	}
	p.wait.Go(func() { w.serve(p.cmd.Process.Pid, listener) })
	p.wait.Go(func() { p.cmd.Wait(); close(p.done) })
	t.Cleanup(func() { p.cmd.Process.Kill(); p.end() })
	return p
}

// ended is closed when the process is gone and all it said was read.
func (p *process) ended() <-chan struct{} { return p.done }

// end waits for the process and returns its exit code, and -1 when it was killed.
func (p *process) end() int {
	p.wait.Wait()
	return p.cmd.ProcessState.ExitCode()
}

// child runs one of children to its end.
func child(t testing.TB, w *warden, name, dir string, env ...string) (code int, said string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, w, nil, append(env, childEnv+"="+name), exe, dir)
	code = p.end()
	if err := w.err(); err != nil {
		t.Fatal(err)
	}
	return code, p.said()
}
