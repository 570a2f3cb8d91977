//go:build linux

package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// cpus are processors, by number.
type cpus []int

func (c cpus) String() string {
	s := make([]string, len(c))
	for i, n := range c {
		s[i] = strconv.Itoa(n)
	}
	return strings.Join(s, ",")
}

// usable returns the processors that this process may use.
func usable() (cpus, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, err
	}
	var c cpus
	for i := range 8 * len(set) * 8 {
		if set.IsSet(i) {
			c = append(c, i)
		}
	}
	return c, nil
}

// pin becomes a program that uses these processors alone; Go's runtime takes their number for GOMAXPROCS.
func pin(list string, args []string) error {
	var set unix.CPUSet
	for s := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(s)
		if err != nil {
			return err
		}
		set.Set(n)
	}
	runtime.LockOSThread()
	if err := unix.SchedSetaffinity(0, &set); err != nil { // of this thread, which is the one that execs
		return err
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	return syscall.Exec(path, args, os.Environ())
}

// spent is the processor time that a process has had so far, of user and system, by its own clock (clock_getcpuclockid(3)).
func spent(pid int) (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &t); err != nil {
		return 0, fmt.Errorf("processor time of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// resident is a process's resident memory in bytes (VmRSS of proc_pid_status(5)).
func resident(pid int) (int64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "VmRSS:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("no VmRSS")
}

// busy is the time that all processors together have worked so far, for whomever, and that a hypervisor took
// (proc_stat(5)). Interrupts are left out: ours are in it, and in nobody's clock.
func busy() (time.Duration, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(text), "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return 0, errors.New("/proc/stat is not as it should be")
	}
	var ticks int64
	for _, i := range []int{1, 2, 3, 8} { // user, nice, system, steal
		n, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100), nil // USER_HZ is 100 on every Linux that runs Go
}

// window is a stretch of time in which something is measured.
type window struct {
	pids  []int // of us, this process first
	began time.Time
	cpu   []time.Duration
	busy  time.Duration
}

// imprecision is how far off busy may be where nobody else works: a tick of each of two processors.
const imprecision = 20 * time.Millisecond

// taken is what a window was.
type taken struct {
	elapsed time.Duration
	cpu     map[int]time.Duration // by process
	foreign float64               // processors that others had, on average
}

func open(pids ...int) (*window, error) {
	w := &window{pids: append([]int{os.Getpid()}, pids...)}
	for _, pid := range w.pids {
		t, err := spent(pid)
		if err != nil {
			return nil, err
		}
		w.cpu = append(w.cpu, t)
	}
	var err error
	w.busy, err = busy()
	w.began = time.Now()
	return w, err
}

func (w *window) close() (taken, error) {
	t := taken{elapsed: time.Since(w.began), cpu: map[int]time.Duration{}}
	all, err := busy()
	if err != nil {
		return t, err
	}
	ours := time.Duration(0)
	for i, pid := range w.pids {
		now, err := spent(pid)
		if err != nil {
			return t, err
		}
		t.cpu[pid] = now - w.cpu[i]
		ours += t.cpu[pid]
	}
	t.foreign = max(0, (all-w.busy-ours-imprecision).Seconds()/t.elapsed.Seconds())
	return t, nil
}
