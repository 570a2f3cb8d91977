package audit

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("AUDIT_TEST_WRITER"); dir != "" {
		if err := appendForEver(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// appendForEver appends from eight goroutines and reports each entry on stdout once it is acknowledged.
func appendForEver(dir string) error {
	l, err := openPatient(dir, small)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make(chan error, 8)
	for w := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				e := entry(i)
				e.Serial = fmt.Sprintf("%d-%d-%d", os.Getpid(), w, i)
				e.Detail = strings.Repeat("x", 1000) // so that segments are changed meanwhile
				if err := l.Append(context.Background(), e); err != nil {
					errs <- err
					return
				}
				fmt.Println(e.Serial)
			}
		})
	}
	return <-errs
}

// What was acknowledged before a SIGKILL is there afterwards, once and whole, over more than one segment.
func TestAppendKilled(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	acknowledged := make(map[string]bool)
	for round, after := range []int{1, 7, 40, 200, 500, 3000} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "AUDIT_TEST_WRITER="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		n := 0
		for r := bufio.NewReader(out); ; n++ {
			line, err := r.ReadString('\n')
			if err != nil {
				break // a report cut short is none
			}
			acknowledged[line[:len(line)-1]] = true
			if n == after {
				cmd.Process.Kill() // and go on reading what it had reported
			}
		}
		cmd.Wait()
		if n <= after {
			t.Fatalf("round %d: the child ended by itself after %d entries", round, n)
		}
		l, err := openPatient(dir, small)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		seen := make(map[string]bool)
		for rec, err := range l.All() {
			if err != nil {
				t.Fatal(err)
			}
			if seen[rec.Serial] {
				t.Errorf("round %d: %s is there twice", round, rec.Serial)
			}
			seen[rec.Serial] = true
		}
		for serial := range acknowledged {
			if !seen[serial] {
				t.Errorf("round %d: %s was acknowledged and is lost", round, serial)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// failed checks that l has failed for good with an error that matches cause, for whoever asks and however often.
func failed(t *testing.T, l *Log, cause error) {
	t.Helper()
	select {
	case <-l.Failed():
	default:
		t.Error("Failed is not closed")
	}
	first := l.Err()
	if !errors.Is(first, ErrFailed) || !errors.Is(first, cause) {
		t.Errorf("the ledger failed with %v, want %v", first, cause)
	}
	for range 3 {
		if err := l.Append(t.Context(), entry(1)); err != first {
			t.Errorf("error %v afterwards, want the first again", err)
		}
	}
}

func TestAppendFails(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	for _, tc := range []struct {
		name  string
		file  *os.File
		cause error
	}{
		{"disk full", full, syscall.ENOSPC},
		{"no sync", null, syscall.EINVAL}, // it takes the bytes and cannot sync them
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := open(t, filepath.Join(t.TempDir(), "ledger"))
			if err := l.Append(t.Context(), entry(1)); err != nil {
				t.Fatal(err)
			}
			select {
			case <-l.Failed():
				t.Fatal("Failed is closed before anything failed")
			default:
			}
			l.writing.Lock()
			l.current.file.Close()
			l.current.file = tc.file
			l.writing.Unlock()
			// Nobody who waits for the batch that fails is told otherwise, nor who comes for the next one.
			l.writing.Lock()
			var wg sync.WaitGroup
			for n := range 8 {
				wg.Go(func() {
					if err := l.Append(t.Context(), entry(n)); !errors.Is(err, ErrFailed) || !errors.Is(err, tc.cause) {
						t.Errorf("error %v, want %v", err, tc.cause)
					}
				})
			}
			waitFor(t, l, func() bool { return l.batch != nil && len(l.batch.bodies) == 8 })
			l.writing.Unlock()
			wg.Wait()
			failed(t, l, tc.cause)
			n := 0
			for _, err := range l.All() {
				if n++; err != nil {
					t.Error(err)
				}
			}
			if n != 1 {
				t.Errorf("%d entries count as written, want 1", n)
			}
		})
	}
}
