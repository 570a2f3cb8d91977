package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/internal/durable"
)

var testDomain = spiffeid.RequireTrustDomainFromString("example.org")

// testSealer seals under a key that this process and those that it starts know.
func testSealer() *ca.Sealer {
	s, err := ca.NewSealer(bytes.Repeat([]byte{7}, ca.SealKeyBytes))
	if err != nil {
		panic(err)
	}
	return s
}

// What a process of this binary does in a folder, named by the environment, in place of the tests. All of it is done by one
// thread, since strace counts calls by thread.
const (
	childDo  = "SIGNET_TEST_DO"
	childDir = "SIGNET_TEST_DIR"
)

// The files in that folder.
const (
	fileStore  = "signet.db"
	fileNext   = "next.json"   // the record that "swap" writes
	fileSealed = "sealed"      // the backup that "restore" and "replace" read
	fileBackup = "backup.made" // the one that "backup" writes
)

func child(do, dir string) error {
	runtime.LockOSThread()
	ctx, c := context.Background(), store.Config{Path: filepath.Join(dir, fileStore)}
	switch do {
	case "record":
		return recordedSteps(ctx, dir, func(n int) { syscall.Unlink(filepath.Join(dir, fmt.Sprint("ack-", n))) }) // one call, seen in the trace
	case "create":
		_, closeStore, err := store.Open(ctx, c, true)
		return errors.Join(err, closeIf(closeStore))
	case "backup":
		s, err := store.Peek(ctx, c)
		if err != nil {
			return err
		}
		data, err := s.Seal(testSealer(), time.Now())
		if err != nil {
			return err
		}
		return durable.CreateFile(filepath.Join(dir, fileBackup), data, 0o600)
	case "restore", "replace":
		data, err := os.ReadFile(filepath.Join(dir, fileSealed))
		if err != nil {
			return err
		}
		s, _, err := store.Unseal(data, testDomain, testSealer())
		if err != nil {
			return err
		}
		_, err = store.Put(ctx, c, s, do == "replace")
		return err
	}
	s, closeStore, err := store.Open(ctx, c, false)
	if err != nil {
		return err
	}
	defer closeStore()
	if do == "replica" {
		return s.SaveReplica(ctx, lateReplica)
	}
	data, err := os.ReadFile(filepath.Join(dir, fileNext))
	if err != nil {
		return err
	}
	next, err := journal.Decode(data)
	if err != nil {
		return err
	}
	_, rev, err := s.Load(ctx)
	if err != nil {
		return err
	}
	_, err = s.Swap(ctx, rev, next)
	return err
}

func closeIf(f func() error) error {
	if f == nil {
		return nil
	}
	return f()
}

var lateReplica = ca.Replica{Name: "ca-9", Minted: []ca.Minted{{Root: "ab"}}}

// calls are those that change a file or a folder, or make it durable. What opens one is not among them: at the next of these it
// has happened.
var calls = []string{"write", "pwrite64", "fdatasync", "fsync", "ftruncate", "fallocate", "fchmod", "linkat", "renameat", "renameat2", "unlinkat"}

// strace returns the command that traces this binary while it does something in a folder; the test is skipped where nobody can.
func strace(t *testing.T, do, dir string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("there is no strace here")
	}
	cmd := exec.Command(path, append(append([]string{"-f"}, args...), os.Args[0])...)
	cmd.Env = append(os.Environ(), childDo+"="+do, childDir+"="+dir, "GOMAXPROCS=1")
	return cmd
}

// TestKilled kills a real process at each call with which it makes a store, writes a record, saves a replica, makes a backup, and
// restores one, where there is a store and where there is none. Whoever comes next finds the state before or the one after, whole,
// and can go on from it; and the one after if the process said that it was done.
//
// threat: E01
func TestKilled(t *testing.T) {
	first := newJournal(t)
	next := first
	next.Number, next.Epoch = 9, 2
	before := store.Snapshot{Journal: first, Replicas: []ca.Replica{{Name: "ca-0"}}}
	swapped := store.Snapshot{Journal: next, Replicas: before.Replicas}
	for _, tt := range []struct {
		do            string
		before, after *store.Snapshot // nil: there is no store
	}{
		{"create", nil, &store.Snapshot{}},
		{"swap", &before, &swapped},
		{"replica", &before, &store.Snapshot{Journal: first, Replicas: []ca.Replica{{Name: "ca-0"}, lateReplica}}},
		{"backup", &before, &before},
		{"restore", nil, &swapped},
		{"replace", &before, &swapped},
	} {
		t.Run(tt.do, func(t *testing.T) {
			t.Parallel()
			killed, found := 0, map[string]int{}
			for _, call := range calls {
				for when := 1; ; when++ {
					dir := prepare(t, tt.before, swapped)
					cmd := strace(t, tt.do, dir, "-o", "/dev/null", "-e", "trace="+call, "-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", call, when))
					out, err := cmd.CombinedOutput()
					if strings.Contains(string(out), "ptrace") {
						t.Skipf("processes cannot be traced here: %s", out)
					}
					found[outcome(t, fmt.Sprintf("killed at %s %d", call, when), dir, tt.do, tt.before, tt.after, err == nil)]++
					if err == nil {
						break // it was not called that often
					}
					killed++
					if when > 200 {
						t.Fatalf("%s is called without end: %s", call, out)
					}
					if testing.Short() {
						when += 6
					}
				}
			}
			t.Logf("killed %d times: %v", killed, found)
			if found["before"] == 0 || found["after"] == 0 || killed < 3 {
				t.Errorf("killed %d times: %v", killed, found)
			}
		})
	}
}

// prepare makes the folder in which a process is killed.
func prepare(t *testing.T, before *store.Snapshot, next store.Snapshot) string {
	t.Helper()
	dir := t.TempDir()
	if before != nil {
		if _, err := store.Put(t.Context(), store.Config{Path: filepath.Join(dir, fileStore)}, *before, false); err != nil {
			t.Fatal(err)
		}
	}
	record, err := next.Journal.Encode()
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := next.Seal(testSealer(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(dir, fileNext), record, 0o600), os.WriteFile(filepath.Join(dir, fileSealed), sealed, 0o600)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// outcome says in which state a process left its folder.
func outcome(t *testing.T, what, dir, do string, before, after *store.Snapshot, done bool) string {
	t.Helper()
	c := store.Config{Path: filepath.Join(dir, fileStore)}
	got, err := stateOf(c)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	which := ""
	if sameState(got, before) {
		which = "before"
	}
	if sameState(got, after) {
		which = "after"
	}
	if do == "backup" {
		if which == "" {
			t.Fatalf("%s: the store was changed", what)
		}
		data, err := os.ReadFile(filepath.Join(dir, fileBackup))
		which = "after"
		if errors.Is(err, fs.ErrNotExist) {
			which, err = "before", nil
		} else if err == nil {
			_, _, err = store.Unseal(data, testDomain, testSealer())
		}
		if err != nil {
			t.Fatalf("%s: the backup: %v", what, err)
		}
	}
	if which == "" || done && which != "after" {
		t.Fatalf("%s: neither as before nor as after (%q):\n%s", what, which, cmp.Diff(before, got))
	}
	// The next one does what was to be done, whatever was left behind.
	if err := child0(do, dir); err != nil && !(do == "restore" || do == "backup") {
		t.Fatalf("%s: again: %v", what, err)
	}
	return which
}

// child0 is child without a thread of its own.
func child0(do, dir string) (err error) {
	done := make(chan struct{})
	go func() { // whose thread ends with it
		defer close(done)
		err = child(do, dir)
	}()
	<-done
	return err
}

// stateOf returns what a store holds; nil where there is none, and an empty one where it holds no record.
func stateOf(c store.Config) (*store.Snapshot, error) {
	if _, err := os.Lstat(c.Path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	s, closeStore, err := store.Open(context.Background(), c, false)
	if err != nil {
		return nil, err
	}
	snap, err := store.Snap(context.Background(), s)
	if api.ReasonOf(err) == api.StateMissing {
		var replicas []ca.Replica
		replicas, err = s.Replicas(context.Background())
		snap = store.Snapshot{Replicas: replicas}
	}
	return &snap, errors.Join(err, closeStore())
}

func sameState(a, b *store.Snapshot) bool {
	return (a == nil) == (b == nil) && (a == nil || reflect.DeepEqual(*a, *b)) // thousands of times, and faster than cmp
}
