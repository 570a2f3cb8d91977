//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/internal/audit"
)

// operators take three rotations through a CA that may be killed at any moment: one is aborted, one is rolled back, and an
// emergency removes a root. What they ask for they ask again until they hear that it is done.
type operators struct {
	*server
	compromised string          // the root that the emergency is about
	heard       map[string]bool // what they were told is done
	latest      api.Generation  // of the records that they saw
}

// The operations, in their order.
const (
	opAborted = "a"
	opBack    = "b"
	opFire    = "c"
)

// ask runs the command line. Its answer is worth something only where the exit code is 0.
func (o *operators) ask(ctx context.Context, words ...string) error {
	what := strings.Join(words[:2], " ") + " " + words[2]
	args := append(append([]string{"rotate"}, words...), "--socket="+filepath.Join(o.dir, "admin.sock"), "--timeout=30s")
	out, err := exec.CommandContext(ctx, filepath.Join(os.Getenv("SIGNET_BIN"), "signet"), args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("signet rotate %s: %w: %s", strings.Join(words, " "), err, out)
	}
	o.heard[what] = true
	return nil
}

// record reads the record, whether or not the CA runs.
func (o *operators) record() (journal.Journal, error) {
	for {
		s, err := store.Peek(o.t.Context(), store.Config{Path: filepath.Join(o.state, "signet.db")})
		if api.ReasonOf(err) == api.StateConflict { // it is written to all the time
			continue
		}
		if g := s.Journal.Generation(); err == nil && g.Sequence() < o.latest.Sequence() {
			err = fmt.Errorf("the record has generation %s, and had %s", g, o.latest)
		} else if err == nil {
			o.latest = g
		}
		return s.Journal, err
	}
}

// await reads the record until it is as it should be, or the CA is gone.
func (o *operators) await(ctx context.Context, what string, is func(journal.Journal) bool) error {
	for {
		j, err := o.record()
		if err != nil {
			return err
		}
		if is(j) {
			return nil
		}
		select {
		case <-o.p.ended():
			return errors.New("the CA is gone")
		case <-ctx.Done():
			return fmt.Errorf("never came: %s: %+v", what, j.Operation)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ended returns how an operation ended; empty where it did not.
func ended(j journal.Journal, id string) journal.Outcome {
	for _, p := range j.Past {
		if p.ID == id {
			return p.Outcome
		}
	}
	return ""
}

// newRoot is the state of the root of the operation under way.
func newRoot(j journal.Journal) journal.State {
	for _, a := range j.Authorities {
		if j.Operation != nil && a.ID == j.Operation.Authority {
			return a.State
		}
	}
	return journal.Removed
}

// rotate asks for all of it, from wherever it stands.
func (o *operators) rotate() error {
	ctx, cancel := context.WithTimeout(o.t.Context(), patience)
	defer cancel()
	j, err := o.record()
	if err != nil {
		return err
	}
	if ended(j, opAborted) == "" {
		err := o.ask(ctx, "start", "--id", opAborted, "--reason=test", "--soak=1h")
		if err == nil {
			err = o.await(ctx, "a published root", func(j journal.Journal) bool { return newRoot(j) == journal.Published })
		}
		if err == nil {
			err = o.ask(ctx, "abort", "--reason=test", opAborted, "--yes")
		}
		if err != nil {
			return err
		}
	}
	if j.Operation == nil || j.Operation.ID != opFire {
		if ended(j, opBack) == "" && (j.Operation == nil || j.Operation.Back == nil) {
			err := o.ask(ctx, "start", "--id", opBack, "--reason=test", "--soak=1s")
			if err == nil {
				err = o.await(ctx, "an active root", func(j journal.Journal) bool {
					return newRoot(j) == journal.Active || ended(j, opBack) != ""
				})
			}
			if err == nil {
				err = o.ask(ctx, "rollback", "--reason=test", opBack, "--yes")
			}
			if j, lerr := o.record(); err != nil && (lerr != nil || ended(j, opBack) != journal.Done) {
				return err // unless the old root, under which nobody had anything, was gone sooner
			}
		}
	}
	if j, err = o.record(); err != nil {
		return err
	}
	if o.compromised == "" {
		o.compromised = j.ActiveAuthority().ID
	}
	if ended(j, opFire) == "" {
		if err := o.ask(ctx, "emergency", "--id", opFire, "--reason=test", "--confirm=0", "--straggler=1s", o.compromised); err != nil {
			return err
		}
	}
	return o.await(ctx, "the compromised root's end", func(j journal.Journal) bool { return ended(j, opFire) == journal.Done })
}

// judge looks at what the CA left: one whole record, not an earlier one; what was heard of; each step in the ledger before it was
// taken; and nothing published that is ahead of the record.
func (o *operators) judge(when string) {
	o.t.Helper()
	fail := func(format string, args ...any) { o.t.Helper(); o.t.Errorf(when+": "+format, args...) }
	if err := lookAtInit(o.state); err != nil {
		fail("the store: %v", err)
		return
	}
	j, err := o.record()
	if err != nil {
		fail("the record: %v", err)
		return
	}
	known := func(id string) bool { return j.Operation != nil && j.Operation.ID == id || ended(j, id) != "" }
	back := j.Operation != nil && j.Operation.Back != nil || ended(j, opBack) != ""
	for what, is := range map[string]bool{
		"start --id " + opAborted: known(opAborted), "abort --reason=test " + opAborted: ended(j, opAborted) == journal.Aborted,
		"start --id " + opBack: known(opBack), "rollback --reason=test " + opBack: back,
		"emergency --id " + opFire: known(opFire),
	} {
		if o.heard[what] && !is {
			fail("it was told that %q is done, and it is not: %+v", what, j.Operation)
		}
	}
	said := map[string]bool{}
	for rec, err := range audit.Scan(filepath.Join(o.state, "ledger")) {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			fail("the ledger: %v", err)
			return
		}
		if rec.Method == "step" {
			said[strings.FieldsFunc(rec.Detail, func(r rune) bool { return r == ';' })[0]] = true
		}
	}
	for step, is := range map[string]bool{
		"publish, operation " + opAborted: ended(j, opAborted) == "" && known(opAborted) && newRoot(j) == journal.Published,
		"publish, operation " + opBack:    back,
		"activate, operation " + opBack:   back,
		"remove, operation " + opFire:     ended(j, opFire) == journal.Done,
	} {
		if is && !said[step] {
			fail("%q happened, and is not on record: %v", step, said)
		}
	}
	data, err := os.ReadFile(filepath.Join(o.state, "bundle", "bundle.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var shown struct {
		Sequence uint64 `json:"spiffe_sequence"`
	}
	if err == nil {
		err = json.Unmarshal(data, &shown)
	}
	if err != nil || shown.Sequence > j.Generation().Sequence() {
		fail("published is %d, the record has %d: %v", shown.Sequence, j.Generation().Sequence(), err)
	}
}

// TestRotationKilled kills the real CA at a write, sync or rename of its record, its ledger or what it publishes while operators
// abort a rotation, roll one back, and remove a root in an emergency. What is left is one whole state in their order, with all
// that they were told is done, and the CA that is started again takes it to the same end. Of the points a part is taken;
// SIGNET_FAULTS=all takes each.
//
// threat: E01
func TestRotationKilled(t *testing.T) {
	binary(t)
	points, total := 12, 0
	t.Run("undisturbed", func(t *testing.T) {
		o := newOperators(t)
		o.life("undisturbed", 0)
		total = o.changes()
		o.finish()
	})
	if total < 50 || t.Failed() {
		t.Fatalf("%d changes", total)
	}
	t.Logf("%d changes", total)
	if testing.Short() {
		points = 3
	}
	if exhaustive() {
		points = total
	}
	for n := range points {
		at := 1 + n*total/points
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			t.Parallel()
			o := newOperators(t)
			if o.life(fmt.Sprintf("killed at change %d", at), at) {
				o.life("started again", 0)
			}
			o.finish()
		})
	}
}

func newOperators(t *testing.T) *operators {
	return &operators{server: newServer(t, ""), heard: map[string]bool{}}
}

// life is one process: it is killed at that change, and in the middle of it where it is a write and their number is even; with 0
// it is not. False where it lived through all of it.
func (o *operators) life(what string, at int) bool {
	o.t.Helper()
	n := 0
	o.start(func(c call) (act, unix.Errno) {
		if !c.changes() {
			return pass, 0
		}
		if n++; n != at {
			return pass, 0
		}
		if at%2 == 0 && (c.name == "write" || c.name == "pwrite64") {
			return tear, 0
		}
		return die, 0
	})
	err := o.rotate()
	if err == nil {
		o.p.cmd.Process.Signal(unix.SIGTERM) // and as it ends it may be killed as well
	}
	if err != nil && at == 0 {
		o.t.Fatalf("%s: %v\n%s", what, err, o.p.said())
	}
	code := o.wait()
	if killed := at > 0 && code == -1; !killed && (err != nil || code != 0) {
		o.t.Fatalf("%s: it ended with %d, who asked it with %v:\n%s", what, code, err, o.p.said())
	}
	o.judge(what)
	return code == -1
}

// changes is how many calls of the last process changed something.
func (o *operators) changes() (n int) {
	for _, c := range o.p.warden.seen() {
		if c.changes() {
			n++
		}
	}
	return n
}

// finish fails unless it all came to its end.
func (o *operators) finish() {
	o.t.Helper()
	j, err := o.record()
	if err != nil {
		o.t.Fatal(err)
	}
	a, b, c := ended(j, opAborted), ended(j, opBack), ended(j, opFire)
	// Where nothing was signed under the root that goes, it goes at once: before the rollback, or right after it.
	if a != journal.Aborted || b != journal.Superseded && b != journal.RolledBack && b != journal.Done || c != journal.Done {
		o.t.Errorf("the three ended %q, %q and %q", a, b, c)
	}
	if len(j.Authorities) != 1 || j.ActiveAuthority().ID == o.compromised {
		o.t.Errorf("at the end there are %+v", j.Authorities)
	}
}
