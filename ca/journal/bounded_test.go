package journal

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"
)

// TestManyRotations rotates again and again: the record does not grow, so neither does what it costs to read it, and the
// bundle never holds more than two roots. Every third rotation is rolled back, aborted or an emergency.
//
// threat: E25
func TestManyRotations(t *testing.T) {
	rotations := 1_500
	if testing.Short() {
		rotations = 1_100
	}
	if n, err := strconv.Atoi(os.Getenv("SIGNET_TEST_ROTATIONS")); err == nil {
		rotations = max(rotations, n)
	}
	const warm = 1000 // until all that is bounded is full
	roots := pool(t, 160)
	j, now := journalOf(t, roots[0]), t0
	highest, limit := j.Generation(), 0
	// An id is used again only once the record has forgotten it, and so is a root.
	fresh := func() (root, bool) {
		for _, r := range roots {
			if j.find(r.ID) < 0 && j.findGone(r.ID) < 0 {
				return r, true
			}
		}
		return root{}, false
	}
	for n := range rotations {
		now = now.Add(time.Hour)
		next, ok := fresh()
		if !ok {
			t.Fatal("the record forgets nothing")
		}
		id := fmt.Sprintf("op-%06d", n)
		if n%9 == 8 {
			j = must(t)(Taint(j, TaintRequest{Request: request(id), Compromised: j.ActiveAuthority().ID, Authority: next.Authority}, now))
		} else {
			j = must(t)(Start(j, planned(id, next.Authority), now))
		}
		for steps := 0; j.Operation != nil; steps++ {
			if steps > 6 {
				t.Fatalf("rotation %d has no end", n)
			}
			switch s := stateOf(j, next.ID); {
			case n%9 == 2 && s == Published:
				j = must(t)(Abort(j, request(id), now))
				continue
			case n%9 == 5 && s == Active:
				j = must(t)(Rollback(j, request(id), now))
			}
			j = step(t, j, now, ready(t, j, now))
			if trusted := len(slices.DeleteFunc(slices.Clone(j.Authorities), func(a Authority) bool { return !a.State.Trusted() })); trusted > 2 {
				t.Fatalf("rotation %d: %d roots in the bundle", n, trusted)
			}
			if g := j.Generation(); g.Sequence() < highest.Sequence() {
				t.Fatalf("generation %s after %s", g, highest)
			}
			highest = j.Generation()
		}
		if n%20 > 0 {
			continue
		}
		data, err := j.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if n < warm {
			limit = max(limit, len(data)+len(data)/10)
		} else if len(data) > limit || len(j.Authorities) != 1 || len(j.Gone) > 2*MaxGone || len(j.Past) > MaxPast {
			t.Fatalf("rotation %d: a record of %d bytes, %d authorities, %d gone; it had %d bytes", n, len(data), len(j.Authorities), len(j.Gone), limit)
		}
	}
	if limit > 96<<10 {
		t.Errorf("a record of %d bytes", limit)
	}
}
