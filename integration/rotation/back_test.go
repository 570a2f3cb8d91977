//go:build integration

package rotation

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	apiv1 "github.com/signet-ca/signet/api/v1"
)

// TestWaysBack aborts a rotation, rolls one back, and declares an emergency, and looks at what people and scripts are told.
func TestWaysBack(t *testing.T) {
	if testing.Short() {
		t.Skip("it waits for SVIDs to expire")
	}
	t.Parallel()
	w := newWorld(t, 2, short)
	a, b := w.peer(w.agents[0], "web", false), w.peer(w.agents[1], "db", true)
	pair, back := w.connect(a, b), w.connect(b, a)
	old := w.active()

	// Until the new root is active: abort.
	w.refuse(w.agents[1], &stubborn{name: "stubborn", words: "not this one", streams: 1})
	w.must(0, "rotate", "start", "--id=one", "--soak=1s")
	aborted := w.await("it waits", func(r *apiv1.Rotation) bool { return newRootIs("published")(r) && len(waits(r)) > 0 }).GetOperation().GetAuthority()
	w.must(1, "rotate", "start", "--id=two", "--soak=1s")
	w.must(1, "rotate", "rollback", "one", "--yes")
	w.must(1, "rotate", "abort", "two", "--yes")
	w.must(2, "rotate", "abort", "one") // nobody is here to be asked
	w.must(0, "rotate", "abort", "one", "--yes", "--reason=test")
	w.must(0, "rotate", "abort", "one", "--yes") // the same again
	w.await("it is aborted", ended("one", "aborted"))
	if s, code := w.status(); code != 0 || s.State != "None" {
		t.Errorf("after the abort: exit code %d, %s", code, s.State)
	}
	if roots := w.roots(); roots[old] != "active" || roots[aborted] != "removed" {
		t.Errorf("after the abort the roots are %v", roots)
	}
	w.connected(2)
	pair.more(t, 10)

	// After that: rollback, which waits for what was issued meanwhile.
	w.must(0, "rotate", "start", "--id=two", "--soak=1s", "--straggler=1s")
	undone := w.await("the second is active", newRootIs("active")).GetOperation().GetAuthority()
	eventually(t, "somebody has an SVID under it", func(context.Context) error {
		if !a.under(undone) {
			return errors.New("not yet")
		}
		return nil
	})
	w.must(1, "rotate", "abort", "two", "--yes")
	w.must(0, "rotate", "rollback", "two", "--yes", "--reason=test")
	w.must(0, "rotate", "rollback", "two", "--yes")
	if roots := w.roots(); roots[old] != "active" || roots[undone] != "retiring" {
		t.Errorf("after the rollback the roots are %v", roots)
	}
	if out, talk, code := w.signet("rotate", "status", "--watch"); !strings.Contains(out, "no rotation is under way") && // it was over before
		(code != 3 || !strings.Contains(out+talk, "rolled back") && !strings.Contains(out+talk, "rolled-back")) {
		t.Errorf("who watches is told, with exit code %d, %s%s", code, out, talk)
	}
	w.await("it is rolled back", ended("two", "rolled-back"))
	if roots := w.roots(); roots[old] != "active" || roots[undone] != "removed" {
		t.Errorf("at the end the roots are %v", roots)
	}
	pair.more(t, 10)
	back.more(t, 10)

	// The root is compromised.
	w.must(2, "rotate", "emergency", old, "--id=three")                // nobody is here to be asked
	w.must(2, "rotate", "emergency", old, "--id=three", "--confirm=1") // there are more
	w.must(1, "rotate", "emergency", "00000000", "--confirm=0")
	out, talk, code := w.signet("rotate", "emergency", old, "--dry-run", "-o", "json")
	var plan struct{ Forecast struct{ Losing int } }
	if err := json.Unmarshal([]byte(out), &plan); err != nil || code != 0 && code != 3 || plan.Forecast.Losing < 2 { // 3: the stubborn pod is named
		t.Fatalf("the plan: exit code %d, %v, %d lose mTLS\n%s%s", code, err, plan.Forecast.Losing, out, talk)
	}
	number := fmt.Sprintf("--confirm=%d", plan.Forecast.Losing)
	if s, code := w.status(); code != 0 || s.Operation != nil {
		t.Errorf("what was refused, or only planned, has begun %+v", s.Operation)
	}
	w.must(0, "rotate", "emergency", old, "--id=three", number, "--soak=1s", "--straggler=10s", "--reason=test", "--wait=2m")
	w.must(0, "rotate", "emergency", old, "--id=three", number) // the same again
	roots := w.roots()
	if roots[old] != "compromised" {
		t.Errorf("after the emergency the roots are %v", roots)
	}
	w.must(1, "rotate", "rollback", "three", "--yes")
	fresh := w.active()
	for _, p := range []*peer{a, b} {
		if p.trusts(old) {
			eventually(t, p.name+" trusts the compromised root no more", func(context.Context) error {
				if p.trusts(old) {
					return fmt.Errorf("it does")
				}
				return nil
			})
		}
		if !p.trusts(fresh) {
			t.Errorf("%s does not trust the new root", p.name)
		}
	}
	pair.more(t, 10)
	back.more(t, 10)
}
