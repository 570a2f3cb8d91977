package daemon

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// childEnv names what this test binary is to do instead of its tests, for what a process can only do to itself.
const childEnv = "SIGNET_DAEMON_TEST_CHILD"

// children are the things to do. Each prints a line when it is as far as the test waits for.
var children = map[string]func(){
	"harden": hardenChild,
	"listen": func() {
		if _, err := ListenUnix(os.Getenv("SOCKET"), 0o600); err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println("listening")
		select {} // until it is killed
	},
	"signals": func() {
		ctx, stop := Signals()
		defer stop()
		fmt.Println("running")
		<-ctx.Done()
		fmt.Println("ending")
		select {} // until the second signal
	},
}

func TestMain(m *testing.M) {
	if do, ok := children[os.Getenv(childEnv)]; ok {
		time.AfterFunc(time.Minute, func() { os.Exit(3) }) // should the test be gone
		do()
		return
	}
	os.Exit(m.Run())
}

// startChild starts this binary as the named child and returns a reader of its lines. The process ends with the test.
func startChild(t *testing.T, name string, env ...string) (*exec.Cmd, func() string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, exe)
	cmd.Env = append(os.Environ(), append(env, childEnv+"="+name)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); cmd.Wait() })
	lines := bufio.NewReader(out)
	return cmd, func() string {
		t.Helper()
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("the child said %q, then %v", line, err)
		}
		return strings.TrimSpace(line)
	}
}

// TestSignals proves that the first signal asks the process to end and the second ends it.
func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			cmd, line := startChild(t, "signals")
			if got := line(); got != "running" {
				t.Fatal(got)
			}
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if got := line(); got != "ending" {
				t.Fatal(got)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			// The child stops listening for signals just after it says so: ask until it hears.
			again, deadline := time.NewTicker(10*time.Millisecond), time.After(20*time.Second)
			defer again.Stop()
			for {
				select {
				case <-again.C:
					cmd.Process.Signal(sig)
					continue
				case <-ended:
				case <-deadline:
					t.Fatal("the second signal did not end the process")
				}
				break
			}
			if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != sig {
				t.Errorf("the process ended as %v, want by %v", cmd.ProcessState, sig)
			}
		})
	}
	t.Run("stop", func(t *testing.T) {
		ctx, stop := Signals()
		if ctx.Err() != nil {
			t.Error("ended before it began")
		}
		stop()
		if ctx.Err() == nil {
			t.Error("the context goes on after it was stopped")
		}
	})
}
