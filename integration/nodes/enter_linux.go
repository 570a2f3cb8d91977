package nodes

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/integration/controlplane"
)

// stageVariable names the environment variable that tells the copies of the test's program apart: "" is the one that was
// started, then "cage" is the first process of its namespaces, in which "tests" runs them, and "node" is the first process
// of a node's.
const stageVariable = "SIGNET_NODES_STAGE"

// workPattern is for the folders below the system's for temporary files: one for each run, with all that it writes.
const workPattern = "signet-e2e-"

// Main runs the tests of a package that uses Start and returns the exit code: TestMain has nothing else to do.
func Main(m *testing.M) int {
	if !wanted() || os.Getuid() != 0 {
		return m.Run() // Start says what is missing
	}
	var code int
	var err error
	switch stage := os.Getenv(stageVariable); stage {
	case "":
		code, err = enter()
	case "cage":
		code, err = cage()
	case "tests":
		return m.Run()
	case "node":
		err = serveNode(os.Getenv(nodeVariable))
	default:
		err = fmt.Errorf("there is no stage %q", stage)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "nodes:", err)
		return 1
	}
	return code
}

// wanted reports whether the tests are to have nodes of their own.
func wanted() bool {
	return os.Getenv(controlplane.BinaryVariable) != "" && os.Getenv(KubeconfigVariable) == ""
}

// enter runs the tests in namespaces of their own and removes what outlives those.
func enter() (code int, err error) {
	if err := sweep(); err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", workPattern)
	if err != nil {
		return 0, err
	}
	lock, err := lockFolder(dir)
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	if err := saveSysctls(dir); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, remove(dir)) }()
	cmd := copyOf("cage", syscall.CLONE_NEWPID|syscall.CLONE_NEWNS|syscall.CLONE_NEWNET)
	cmd.Args = os.Args
	cmd.Env = append(cmd.Env, "TMPDIR="+dir)
	cmd.Stdout = os.Stdout
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT)
	defer signal.Stop(stop)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	done := make(chan struct{})
	go func() { // ends before enter does, by done
		select {
		case <-stop:
			_ = cmd.Process.Kill()
		case <-done:
		}
	}()
	err = cmd.Wait()
	close(done)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() > 0 {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// copyOf is this program once more, at another stage, in new namespaces. It dies with this one.
func copyOf(stage string, namespaces uintptr) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), stageVariable+"="+stage)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// cage is the first process of the namespaces: it readies them, runs the tests, and waits for all that lost its parent.
func cage() (int, error) {
	if err := ready(); err != nil {
		return 0, err
	}
	if err := os.Setenv(stageVariable, "tests"); err != nil {
		return 0, err
	}
	tests, err := syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	if err != nil {
		return 0, err
	}
	status := reap(tests)
	if status.Signaled() {
		return 0, fmt.Errorf("the tests ended by %v", status.Signal())
	}
	return status.ExitStatus(), nil
}

// ready gives the calling process, the first of new namespaces, a view of its own: of processes, and of the folders in
// which the parts of a node leave their marks.
func ready() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	for _, folder := range []string{"/run", "/var/lib"} {
		if err := unix.Mount("tmpfs", folder, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
			return fmt.Errorf("mounting %s: %w", folder, err)
		}
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	return nil
}

// reap waits for every process that is left to this one, until the given one has ended; 0 is none, and for ever.
func reap(until int) syscall.WaitStatus {
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	for {
		for {
			var status syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
			if errors.Is(err, syscall.EINTR) {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
			if pid == until {
				return status
			}
		}
		<-children
	}
}

// lockFolder marks a folder as in use for as long as the file is open: no child inherits it, and a kill closes it.
func lockFolder(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
