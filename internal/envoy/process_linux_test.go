package envoy

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The test binary plays the processes: TestMain runs one of these when this variable says so.
const playEnv = "SIGNET_ENVOY_TEST_PLAY"

func TestMain(m *testing.M) {
	switch os.Getenv(playEnv) {
	case "":
		os.Exit(m.Run())
	case "deaf": // ends only by SIGKILL
		signal.Ignore(syscall.SIGTERM)
		os.Stdout.WriteString("ready\n")
		select {}
	case "parent": // starts a child, says its id, and is killed
		ready := make(chan bool)
		p, err := Start(Command{Name: "child", Path: "/bin/sh", Args: []string{"-c", "echo here; exec sleep 600"}, Line: func([]byte) { close(ready) }})
		if err != nil {
			os.Exit(1)
		}
		<-ready
		os.Stdout.WriteString(strconv.Itoa(p.Pid()) + "\n")
		select {}
	}
}

func needShell(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("/bin/sh"); err != nil {
		t.Skip("no /bin/sh")
	}
}

func TestRun(t *testing.T) {
	needShell(t)
	tests := map[string]struct {
		script string
		lines  []string
		err    string // part of the error; empty: none
	}{
		"good":                                {"echo one; echo two >&2", []string{"one", "two"}, ""},
		"last line without end":               {"printf 'one\ntwo'", []string{"one", "two"}, ""},
		"failure ends with what it said last": {"echo why; exit 3", []string{"why"}, "exit status 3: why"},
		"killed":                              {"kill -9 $$", nil, "signal: killed"},
		"says nothing":                        {"exit 1", nil, "exit status 1"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			var lines []string
			err := Run(t.Context(), Command{Name: "it", Path: "/bin/sh", Args: []string{"-c", tt.script}, Log: &log,
				Line: func(b []byte) { lines = append(lines, string(b)) }})
			if (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
			if d := cmp.Diff(tt.lines, lines); d != "" {
				t.Error(d)
			}
			if got, want := strings.TrimSpace(log.String()), strings.Join(tt.lines, "\n"); got != want {
				t.Errorf("log %q, want %q", got, want)
			}
		})
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	needShell(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("that will do")
	err := Run(ctx, Command{Name: "it", Path: "/bin/sh", Args: []string{"-c", "echo; exec sleep 600"}, Line: func([]byte) { cancel(why) }})
	if !errors.Is(err, why) {
		t.Errorf("error %v, want %v", err, why)
	}
}

func TestStartTellsWhatIsMissing(t *testing.T) {
	if _, err := Start(Command{Name: "it", Path: "/nonexistent/program"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want one that is %v", err, os.ErrNotExist)
	}
}

func TestKillReachesTheWholeGroup(t *testing.T) {
	needShell(t)
	ready := make(chan string, 1)
	p, err := Start(Command{Name: "it", Path: "/bin/sh", Args: []string{"-c", "sleep 600 & echo $!; wait"}, Line: func(b []byte) { ready <- string(b) }})
	if err != nil {
		t.Fatal(err)
	}
	child := <-ready
	p.Kill()
	p.Kill() // once more does nothing
	if p.Err() == nil {
		t.Error("a killed process ended without error")
	}
	waitGone(t, child)
}

func TestStop(t *testing.T) {
	needShell(t)
	t.Run("one that listens", func(t *testing.T) {
		ready := make(chan bool)
		var said sync.Once // the shell may tell of its child's end
		p, err := Start(Command{Name: "it", Path: "/bin/sh", Args: []string{"-c", "trap 'exit 0' TERM; echo; while :; do sleep 0.01; done"}, Line: func([]byte) { said.Do(func() { close(ready) }) }})
		if err != nil {
			t.Fatal(err)
		}
		<-ready
		if err := p.Stop(t.Context()); err != nil || p.Err() != nil {
			t.Errorf("stop: %v; end: %v", err, p.Err())
		}
	})
	t.Run("one that is deaf", func(t *testing.T) {
		t.Setenv(playEnv, "deaf")
		ready := make(chan bool)
		p, err := Start(Command{Name: "it", Path: os.Args[0], Line: func([]byte) { close(ready) }})
		if err != nil {
			t.Fatal(err)
		}
		<-ready
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := p.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) || p.Err() == nil {
			t.Errorf("stop: %v; end: %v", err, p.Err())
		}
	})
}

func TestOutputForgetsALineWithoutEnd(t *testing.T) {
	var lines []string
	o := &output{line: func(b []byte) { lines = append(lines, string(b)) }}
	o.Write(bytes.Repeat([]byte("x"), maxLine+1))
	if len(o.rest) != 0 {
		t.Errorf("%d bytes are held", len(o.rest))
	}
	o.Write([]byte("a\r\nb\n"))
	if d := cmp.Diff([]string{"a\r", "b"}, lines); d != "" {
		t.Error(d)
	}
}

// waitGone waits until no process has this id; the kernel may need a moment.
func waitGone(t *testing.T, pid string) {
	t.Helper()
	id, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); <-tick.C {
		// An orphan whose new parent reaps late is a zombie for a while: dead.
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
	}
	_ = syscall.Kill(id, syscall.SIGKILL)
	t.Errorf("process %s is still there", pid)
}

func TestChildDiesWithItsParent(t *testing.T) {
	needShell(t)
	parent := exec.Command(os.Args[0])
	parent.Env = append(os.Environ(), playEnv+"=parent")
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 32)
	n, err := out.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait() // it was killed
	waitGone(t, strings.TrimSpace(string(buf[:n])))
}
