package journal

import (
	"cmp"
	"fmt"
	"slices"
)

// maxPods is how many pods of one agent are named: more than a kubelet runs. What an agent says of its pods is its own word, and whoever
// has taken a node could otherwise have each step put on record with thousands of them.
const maxPods = 512

// fewPods keeps of what was found from some place on, which is the pods of one agent, as many as are named, those that stand in the way
// first. Each of them was judged by itself; the rest is one blocker for each reason to pass, and one for those that have none.
func (g *gate) fewPods(a Agent, from int) {
	if len(g.found)-from <= maxPods {
		return
	}
	all := slices.Clone(g.found[from:])
	slices.SortStableFunc(all, func(a, b Blocker) int { return cmp.Compare(min(1, len(a.Pass)), min(1, len(b.Pass))) })
	g.found = append(g.found[:from], all[:maxPods]...)
	count, more := map[Pass]int{}, map[Pass]*Blocker{}
	for _, b := range all[maxPods:] {
		count[b.Pass]++
		if m := more[b.Pass]; m != nil {
			m.Until = last(m.Until, b.Until)
		} else {
			first := podBlocker(a, Pod{}, b.Why)
			first.Until, first.Pass = b.Until, b.Pass
			more[b.Pass] = &first
		}
	}
	for pass, m := range more {
		m.More = count[pass]
		m.Name = fmt.Sprintf("pods/%s/%d-more", cmp.Or(a.Node, a.NodeUID), count[pass])
		g.found = append(g.found, *m)
	}
}
