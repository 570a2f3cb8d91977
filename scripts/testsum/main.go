// Command testsum runs `go test` one or more times and ends with one line that says what the tests came to.
//
//	testsum ./... -- -tags=envoy ./sds/
//
// Each group of arguments goes to a `go test` of its own, one after the other, and a group that fails does not keep the
// next from running. Packages are told as they finish, failed tests with their output, skipped tests with their reason:
// a test that did not run must not look like one that passed. The last line is "N passed, M failed, K skipped", tests
// and subtests alike; a package that does not build or ends without a verdict counts as one that failed.
package main

import (
	"context"
	"fmt"
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
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	rerr := s.read(out)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("go test: %w", err)
	}
	return rerr
}
