// Command testsum runs `go test` one or more times and ends with one line that says what the tests came to.
//
//	testsum ./... -- -tags=envoy ./sds/
//
// Each group of arguments goes to a `go test` of its own, one after the other, and a group that fails does not keep the
// next from running. Packages are told as they finish, failed tests with their output, skipped tests with their reason:
// a test that did not run must not look like one that passed. All that they and go print is searched for the marker that
// is in each secret of the tests, and to have shown one is a failure. The last line is "N passed, M failed, K skipped", tests
// and subtests alike; a package that does not build or ends without a verdict counts as one that failed.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testsum:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	s := newSum(os.Stdout)
	var failed error
	for {
		group := args
		i := slices.Index(args, "--")
		if i >= 0 {
			group, args = args[:i], args[i+1:]
		}
		if err := goTest(ctx, s, group); err != nil {
			failed = err
		}
		if i < 0 || ctx.Err() != nil {
			break
		}
	}
	s.close()
	if failed == nil && s.failed > 0 {
		failed = fmt.Errorf("%d failed", s.failed)
	}
	return failed
}

// goTest runs one `go test` to its end and counts what it says.
func goTest(ctx context.Context, s *sum, args []string) error {
	cmd := exec.CommandContext(ctx, "go", slices.Concat([]string{"test"}, args, []string{"-json"})...) // last: -C has to be first
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	var said bytes.Buffer // little: what a build or a download has to say
	cmd.Stderr = io.MultiWriter(os.Stderr, &said)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	rerr := s.read(out)
	err = cmd.Wait()
	s.search("go test", "", said.String())
	if err != nil {
		return fmt.Errorf("go test: %w", err)
	}
	return rerr
}
