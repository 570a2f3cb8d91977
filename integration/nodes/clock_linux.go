package nodes

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Wall clocks of processes are set one by one, as they run. No namespace has a wall clock of its own, a library that is
// loaded first changes nothing for static programs, and the machine's clock is not a test's to set. What all programs ask is
// code that the kernel maps into each of them, vdso(7): here it is replaced, in one process, by code that asks the kernel
// and adds so many seconds. So the programs are those that are shipped, byte for byte.
//
// The monotonic clock, by which timers run, goes on as it does: what is seen is a clock that is set. On a machine that
// slept, too, more time has passed by the wall clock than by the other.

// vdsoCode is what takes the place of functions of the vDSO; the last four bytes of hole are replaced by the seconds.
var vdsoCode = []struct {
	function string
	code     []byte
	hole     int
}{
	{"__vdso_clock_gettime", []byte{
		0xb8, 228, 0, 0, 0, // mov eax, SYS_clock_gettime
		0x0f, 0x05, // syscall
		0x85, 0xff, // test edi, edi: CLOCK_REALTIME
		0x75, 7, // jnz +7
		0x48, 0x81, 0x06, 0, 0, 0, 0, // add qword [rsi], SECONDS
		0xc3, // ret
	}, 14},
	{"__vdso_gettimeofday", []byte{
		0xb8, 96, 0, 0, 0, // mov eax, SYS_gettimeofday
		0x0f, 0x05, // syscall
		0x48, 0x85, 0xff, // test rdi, rdi
		0x74, 7, // jz +7
		0x48, 0x81, 0x07, 0, 0, 0, 0, // add qword [rdi], SECONDS
		0xc3, // ret
	}, 15},
	{"__vdso_time", []byte{
		0xb8, 201, 0, 0, 0, // mov eax, SYS_time
		0x0f, 0x05, // syscall
		0x48, 0x05, 0, 0, 0, 0, // add rax, SECONDS
		0x48, 0x85, 0xff, // test rdi, rdi
		0x74, 3, // jz +3
		0x48, 0x89, 0x07, // mov [rdi], rax
		0xc3, // ret
	}, 9},
}

// SetClocks has the wall clocks of processes be off by so much, in whole seconds, from now on; 0 sets them right. What these
// processes start has the machine's clock. Processes that have ended are passed over.
func SetClocks(t testing.TB, off time.Duration, pids ...int) {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("clocks are set by code for amd64")
	}
	for _, pid := range pids {
		if err := setClock(pid, int32(off/time.Second)); err != nil && !ended(err) {
			t.Fatalf("the clock of process %d: %v", pid, err)
		}
	}
}

// ended reports whether an error is that of a process that is no more.
func ended(err error) bool { return errors.Is(err, syscall.ESRCH) || errors.Is(err, fs.ErrNotExist) }

// setClock does so for one process, which is stopped meanwhile.
func setClock(pid int, seconds int32) error {
	was, err := stopped(pid)
	if err != nil {
		return err
	}
	at, functions, err := vdso(pid)
	if err != nil || at == 0 { // a process that has ended, and was not waited for, has none
		return err
	}
	mem, err := os.OpenFile(procFile(pid, "mem"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer mem.Close()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if !was {
			if err := freeze(pid); err != nil {
				return err
			}
		}
		ok, err := patch(pid, mem, at, functions, seconds)
		if !was {
			if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
				return err
			}
		}
		if err != nil || ok {
			return err
		}
		if time.Now().After(end) {
			return errors.New("it is always reading the clock")
		}
	}
}

// patch replaces the functions; false where a thread is within the code that would change under it.
func patch(pid int, mem *os.File, at int64, functions map[string]int64, seconds int32) (bool, error) {
	counters, err := counters(pid)
	if err != nil {
		return false, err
	}
	for _, v := range vdsoCode {
		offset, ok := functions[v.function]
		if !ok {
			return false, fmt.Errorf("its vDSO has no %s", v.function)
		}
		code := bytes.Clone(v.code)
		binary.LittleEndian.PutUint32(code[v.hole:], uint32(seconds))
		is := make([]byte, len(code))
		if _, err := mem.ReadAt(is, at+offset); err != nil {
			return false, err
		}
		if bytes.Equal(is[:v.hole], code[:v.hole]) { // ours already: only a number changes
			if _, err := mem.WriteAt(code[v.hole:v.hole+4], at+offset+int64(v.hole)); err != nil {
				return false, err
			}
			continue
		}
		for _, pc := range counters {
			if pc > at+offset && pc < at+offset+int64(len(code)) {
				return false, nil
			}
		}
		if _, err := mem.WriteAt(code, at+offset); err != nil {
			return false, err
		}
	}
	return true, nil
}

func procFile(pid int, name string) string { return filepath.Join("/proc", strconv.Itoa(pid), name) }

// vdso says where the vDSO of a process is, 0 where it has none, and at which offsets its functions are.
func vdso(pid int) (at int64, functions map[string]int64, err error) {
	maps, err := os.ReadFile(procFile(pid, "maps"))
	if err != nil {
		return 0, nil, err
	}
	var from, to int64
	for line := range strings.Lines(string(maps)) {
		if strings.HasSuffix(line, "[vdso]\n") {
			if _, err := fmt.Sscanf(line, "%x-%x", &from, &to); err != nil {
				return 0, nil, err
			}
		}
	}
	if from == 0 {
		return 0, nil, nil
	}
	mem, err := os.Open(procFile(pid, "mem"))
	if err != nil {
		return 0, nil, err
	}
	defer mem.Close()
	image := make([]byte, to-from)
	if _, err := mem.ReadAt(image, from); err != nil {
		return 0, nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return 0, nil, err
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return 0, nil, err
	}
	functions = make(map[string]int64)
	for _, s := range symbols {
		functions[s.Name] = int64(s.Value)
	}
	return from, functions, nil
}

// threads returns the state of each thread of a process.
func threads(pid int) (map[string]byte, error) {
	entries, err := os.ReadDir(procFile(pid, "task"))
	if err != nil {
		return nil, err
	}
	states := make(map[string]byte)
	for _, e := range entries {
		stat, err := os.ReadFile(procFile(pid, filepath.Join("task", e.Name(), "stat")))
		if ended(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if _, rest, ok := bytes.Cut(stat[bytes.LastIndexByte(stat, ')'):], []byte(" ")); ok && len(rest) > 0 {
			states[e.Name()] = rest[0]
		}
	}
	return states, nil
}

// stopped reports whether each thread of a process is stopped.
func stopped(pid int) (bool, error) {
	states, err := threads(pid)
	if err != nil {
		return false, err
	}
	for _, state := range states {
		if state != 'T' && state != 'Z' && state != 'X' {
			return false, nil
		}
	}
	return true, nil
}

// freeze stops a process, and returns when each of its threads has stopped.
func freeze(pid int) error {
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return err
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		ok, err := stopped(pid)
		if ok || err != nil {
			return err
		}
		if time.Now().After(end) {
			return errors.New("it does not stop")
		}
	}
}

// counters are the addresses at which the threads of a stopped process will go on.
func counters(pid int) ([]int64, error) {
	states, err := threads(pid)
	if err != nil {
		return nil, err
	}
	var all []int64
	for thread := range states {
		// proc_pid_syscall(5): the last of its fields.
		text, err := os.ReadFile(procFile(pid, filepath.Join("task", thread, "syscall")))
		if ended(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		fields := strings.Fields(string(text))
		if len(fields) < 3 { // it runs, or has ended
			continue
		}
		pc, err := strconv.ParseUint(fields[len(fields)-1], 0, 64)
		if err != nil {
			return nil, err
		}
		all = append(all, int64(pc))
	}
	return all, nil
}

// All are the numbers, from here, of the node's processes.
func (n *Node) All() ([]int, error) { return n.processes(func(string) bool { return true }) }

// Everybody are the numbers of all processes of the cluster: of its nodes, with those of its pods, and of its control
// plane. Neither the tests nor what they have started otherwise is among them.
func (c *Cluster) Everybody() ([]int, error) {
	var all []int
	for _, n := range c.Nodes {
		pids, err := n.All()
		if err != nil {
			return nil, err
		}
		all = append(all, pids...)
	}
	return append(all, c.Control.Processes()...), nil
}

// Freeze stops all processes of the node, as a machine that sleeps, until the function that it returns is called. Those that
// were stopped before stay so.
func (n *Node) Freeze(t testing.TB) (thaw func()) {
	t.Helper()
	all, err := n.All()
	if err != nil {
		t.Fatal(err)
	}
	var frozen []int
	thaw = func() {
		for _, pid := range frozen {
			_ = syscall.Kill(pid, syscall.SIGCONT) // it may have ended
		}
	}
	t.Cleanup(func() { thaw() })
	for _, pid := range all {
		was, err := stopped(pid)
		if err == nil && !was {
			frozen = append(frozen, pid)
			err = freeze(pid)
		}
		if err != nil && !ended(err) {
			thaw()
			t.Fatalf("stopping process %d: %v", pid, err)
		}
	}
	return thaw
}

// Log is what the containers of a namespace's pods whose names begin like this have said on the node, which needs no API server.
func (n *Node) Log(namespace, prefix string) (string, error) {
	files, err := filepath.Glob(filepath.Join(n.Dir, "log", "pods", namespace+"_"+prefix+"*", "*", "*.log"))
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil && !ended(err) {
			return "", err
		}
		b.Write(data)
	}
	return b.String(), nil
}
