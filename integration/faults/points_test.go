//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// fault is one thing that goes wrong, at one call.
type fault struct {
	at     call
	nth    int // of those with its key, from 1; 0: no fault
	do     act
	errno  unix.Errno
	sticky bool // calls that change something fail like it from then on: a disk stays full, a file system read-only
}

func (f fault) String() string {
	s := f.at.String() + ": "
	switch f.do {
	case die:
		return s + "killed before it"
	case tear:
		return s + "killed in the middle of it"
	case half:
		return s + "half of it, then " + unix.ErrnoName(f.errno)
	case late:
		s += "done, and then "
	}
	s += unix.ErrnoName(f.errno)
	if f.sticky {
		s += " from then on"
	}
	return s
}

// decider returns the function that carries the fault out in one life of the process.
func (f fault) decider() func(call) (act, unix.Errno) {
	hit, nth := false, 0
	return func(c call) (act, unix.Errno) {
		if hit {
			if f.sticky && c.changes() {
				return fail, f.errno
			}
			return pass, 0
		}
		if c.key() == f.at.key() {
			nth++
		}
		if nth != f.nth {
			return pass, 0
		}
		hit = true
		return f.do, f.errno
	}
}

// temporary is what is drawn at random in the names of files, or is the time.
var temporary = regexp.MustCompile(`\.signet-(tmp-[A-Z0-9]+|[0-9]+\.tmp)$|\.replaced-[0-9TZ.]+$`)

// key tells calls of the same kind on the same file: threads may change the order of the others.
func (c call) key() string { return c.name + " " + temporary.ReplaceAllString(c.file, ".tmp") }

// faultsOf are all that can go wrong at a call: a kill at each that changes something, and before and amid each write; a
// bad disk at each; a full and a read-only one at those that they stop, once and for good.
func faultsOf(c call, nth int) []fault {
	all := []fault{{c, nth, fail, unix.EIO, false}}
	write := c.name == "write" || c.name == "pwrite64"
	if c.changes() {
		all = append(all, fault{c, nth, die, 0, false}, fault{c, nth, fail, unix.EIO, true}, fault{c, nth, fail, unix.EROFS, true}, fault{c, nth, fail, unix.EROFS, false})
	}
	if c.grows() || c.create {
		all = append(all, fault{c, nth, fail, unix.ENOSPC, true}, fault{c, nth, fail, unix.ENOSPC, false})
	}
	if write {
		all = append(all, fault{c, nth, tear, 0, false}, fault{c, nth, half, unix.ENOSPC, true}, fault{c, nth, half, unix.EIO, true})
	}
	if c.change && c.canPerform() {
		all = append(all, fault{c, nth, late, unix.EIO, false}, fault{c, nth, late, unix.EIO, true})
	}
	return all
}

// run is one life of a subject with one fault.
type run struct {
	fault fault
	dir   string
	code  int // -1: killed
	said  string
	calls []call
}

// hit reports whether the fault happened.
func (r run) hit() bool {
	return slices.ContainsFunc(r.calls, func(c call) bool { return c.did != pass })
}

// subject is what is enumerated.
type subject struct {
	prepare func(t testing.TB, dir string)              // before each run; nil: nothing
	run     func(t testing.TB, w *warden) (int, string) // its root is the folder
	judge   func(r run) error                           // looks at what is left; the process is gone
	sample  bool                                        // of calls that repeat, a part will do; SIGNET_FAULTS=all takes all
	loose   bool                                        // it has threads of its own: a call may be missing in some life
	deadly  bool                                        // a kill is what matters; SIGNET_FAULTS=all takes the errors too
}

// enumerate runs the subject once to learn its calls, and then once for each fault at each of them.
func (s subject) enumerate(t *testing.T) {
	base := quickFolder(t)
	plain := s.one(t, base, "plain", fault{})
	if plain.code != 0 {
		t.Fatalf("without a fault it ended with %d:\n%s", plain.code, plain.said)
	}
	if err := s.judge(plain); err != nil {
		t.Fatalf("without a fault: %v", err)
	}
	var faults []fault
	seen := map[string]int{}
	for _, c := range plain.calls {
		seen[c.key()]++
		if n := seen[c.key()]; !s.sample || exhaustive() || n <= 2 || n%10 == 0 {
			faults = append(faults, faultsOf(c, n)...)
		}
	}
	if s.deadly && !exhaustive() {
		faults = slices.DeleteFunc(faults, func(f fault) bool { return f.do != die && f.do != tear })
	}
	var missed atomic.Int64
	var wg sync.WaitGroup
	turn := make(chan struct{}, runtime.GOMAXPROCS(0))
	for i, f := range faults {
		turn <- struct{}{}
		if t.Failed() && i > 20 {
			break // the first tell enough
		}
		wg.Go(func() {
			defer func() { <-turn }()
			r := s.one(t, base, fmt.Sprint(i), f)
			if !r.hit() {
				missed.Add(1)
			}
			if err := s.verdict(r); err != nil {
				t.Errorf("%s: %v\nexit code %d, it said:\n%s", f, err, r.code, r.said)
			}
		})
	}
	wg.Wait()
	t.Logf("%d calls, %d faults, %d of which found no such call", len(plain.calls), len(faults), missed.Load())
	for _, c := range plain.calls {
		t.Logf("  %s", c)
	}
}

// exhaustive reports whether every point is wanted, in minutes more.
func exhaustive() bool { return os.Getenv("SIGNET_FAULTS") == "all" }

// folder returns an empty folder by its true name, which is how the kernel tells of its files.
func folder(t testing.TB) string {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// quickFolder returns an empty folder in memory where there is one: which calls are made is the same there, and thousands
// of syncs are not waited for.
func quickFolder(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "signet-faults-")
	if err != nil {
		return folder(t)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (s subject) one(t testing.TB, base, name string, f fault) run {
	dir := filepath.Join(base, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Error(err)
	}
	if s.prepare != nil {
		s.prepare(t, dir)
	}
	w := &warden{root: dir, decide: f.decider()}
	code, said := s.run(t, w)
	return run{fault: f, dir: dir, code: code, said: said, calls: w.seen()}
}

// verdict judges what holds for every subject, then what holds for this one, and clears the folder.
func (s subject) verdict(r run) error {
	f := r.fault
	hit := r.hit()
	switch {
	case !hit && !s.loose:
		return fmt.Errorf("the call was never made, the process made %d", len(r.calls))
	case !hit:
	case f.do == die || f.do == tear:
		if r.code != -1 {
			return fmt.Errorf("it was not killed")
		}
	case strings.Contains(r.said, "panic") || strings.Contains(r.said, "goroutine "):
		return fmt.Errorf("it panicked")
	case r.code != 0 && r.code != 1:
		return fmt.Errorf("it ended with %d, want 0 or 1", r.code)
	}
	if err := s.judge(r); err != nil {
		return err
	}
	return os.RemoveAll(r.dir)
}
