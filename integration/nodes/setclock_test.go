//go:build cluster && linux

package nodes_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/signet-ca/signet/integration/nodes"
)

// clockVariable is set for the process whose clock TestSetClocks sets.
const clockVariable = "SIGNET_NODES_CLOCK"

// A clock is set in the midst of a program that reads it all the time, on several threads, and set right again.
func TestSetClocks(t *testing.T) {
	if os.Getenv(clockVariable) != "" {
		tellTime()
		return
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestSetClocks$")
	cmd.Env = append(os.Environ(), clockVariable+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewScanner(out)
	for i := range 20 {
		off := []time.Duration{0, 25 * time.Hour, -5 * time.Minute, -25 * time.Hour, 5 * time.Minute, 0}[i%6]
		nodes.SetClocks(t, off, cmd.Process.Pid)
		before := time.Now()
		fmt.Fprintln(in)
		var at int64
		if !answers.Scan() {
			t.Fatalf("after %d turns it has ended: %v", i, answers.Err())
		}
		if _, err := fmt.Sscan(answers.Text(), &at); err != nil {
			t.Fatal(err)
		}
		got := time.UnixMicro(at)
		if got.Before(before.Add(off).Add(-time.Millisecond)) || got.After(time.Now().Add(off).Add(time.Millisecond)) {
			t.Errorf("off by %v it says %v at %v", off, got, before)
		}
	}
	in.Close()
	for answers.Scan() {
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	nodes.SetClocks(t, time.Hour, cmd.Process.Pid) // it has ended
}

// tellTime answers each line with the time, while others read the clock as fast as they can.
func tellTime() {
	for range 4 {
		go func() {
			for {
				_ = time.Now()
			}
		}()
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		fmt.Println(time.Now().UnixMicro())
	}
}
