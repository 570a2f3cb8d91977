package journal

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// maxCopies is how many copies are named of those that pass for one reason, and of those that do not: each namespace may have one.
const maxCopies = 32

// copies finds the places that do not show the bundle, or not for long enough. Each is judged by itself, and those that fail are named
// first: of many that are merely not written yet nobody needs the names.
func (g *gate) copies() {
	all := slices.Clone(g.acks.Copies)
	slices.SortStableFunc(all, func(a, b Copy) int {
		return -cmp.Compare(min(1, len(a.Failed)), min(1, len(b.Failed)))
	})
	named, more := map[Pass]int{}, map[Pass]*Blocker{}
	for _, c := range all {
		b := g.copy(c)
		if named[b.Pass]++; named[b.Pass] <= maxCopies {
			g.found = append(g.found, b)
			continue
		}
		if m := more[b.Pass]; m != nil {
			m.Until = last(m.Until, b.Until)
		} else {
			more[b.Pass] = &Blocker{Kind: ByCopy, Why: b.Why, Until: b.Until, Pass: b.Pass}
		}
	}
	for pass, m := range more {
		m.Name = fmt.Sprintf("copies/%d-more", named[pass]-maxCopies)
		g.found = append(g.found, *m)
	}
}

// copy says what is to be said of one copy: it never is more than unproven.
func (g *gate) copy(c Copy) Blocker {
	b := Blocker{Kind: ByCopy, Name: c.Kind + "/" + c.Name, Namespace: c.Namespace}
	b.Why = g.lacks(c.Held, "shows")
	switch {
	case b.Why == "":
		g.soak(&b, c.At, "it shows the bundle, but not who has read it")
	case c.Failed != "":
		b.Why += "; it cannot be written: " + c.Failed
	}
	if b.Pass == "" {
		b.Pass = g.pass(b)
	}
	if b.Pass == "" && c.Failed != "" && g.op.Kind == Emergency && g.now.Sub(c.FailedAt) >= g.op.Straggler {
		b.Pass = Urgent // as of an agent that is away: in the next minute it is no more likely to come than in the last one
	}
	return b
}

// last is when both are ready, where zero is that nobody knows when one is.
func last(a, b time.Time) time.Time {
	if a.IsZero() || b.IsZero() {
		return time.Time{}
	}
	if b.After(a) {
		return b
	}
	return a
}
