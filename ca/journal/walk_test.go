package journal

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
)

// TestWalk goes through the states that a small fleet can reach: two replicas, two agents with a pod each, or one; and in any order
// bundles are delivered, acknowledged, agents go and come back, replicas take up a root or sleep, SVIDs are issued, hours pass,
// steps are taken, and operators begin, abort, roll back, excuse and declare emergencies. The smaller fleets are gone through to
// the end, with each of these; of the larger ones as many states as there is time for, drawn near and far. In each:
//
//   - I1: exactly one authority is active. I8: the record is valid. (I5 is ca/issuance's; I9 and I10 are TestExcuses's and TestDue's.)
//   - I2: outside an emergency each unexpired SVID chains to a root of the bundle.
//   - I3: and it verifies at every live pod that nobody excused, by the bundle that this pod acknowledged last: by its root, or
//     by the root that cross-signed it.
//   - I4: of two bundles the later one has the higher generation, and no generation has two.
//   - I6: the key of an authority is there until nobody trusts it.
//   - I7: a step taken twice is taken once.
//   - Where an operation is under way there is a step, or somebody by name who stands in its way.
//
// threat: E09, E13, E14, E19
func TestWalk(t *testing.T) {
	limit := 12_500
	if testing.Short() {
		limit = 6_000
	}
	if n, err := strconv.Atoi(os.Getenv("SIGNET_TEST_WALK")); err == nil { // a million goes to the end of most
		limit = n
	}
	for _, tt := range []struct {
		name  string
		whole bool // to its end
		rules rules
	}{
		{"calm, cross-signed", true, rules{cross: true, roots: 2, hours: 2, calm: true}},
		{"calm, not cross-signed", true, rules{roots: 2, hours: 2, calm: true}},
		{"calm, rolled back", false, rules{cross: true, roots: 2, hours: 2, calm: true, back: true}},
		{"planned, cross-signed", false, rules{cross: true, roots: 2, hours: 3}},
		{"planned, not cross-signed", false, rules{roots: 2, hours: 3}},
		{"two in a row", false, rules{cross: true, roots: 3, hours: 5, calm: true}},
		{"rolled back and aborted", false, rules{cross: true, roots: 2, hours: 3, back: true}},
		{"excused", false, rules{roots: 2, hours: 3, excuse: true, calm: true}},
		{"emergency", false, rules{cross: true, roots: 3, hours: 2, taint: true, calm: true}},
		{"one replica, rolled back", true, rules{cross: true, roots: 2, hours: 2, back: true, calm: true, replicas: 1}},
		{"one agent, cross-signed", true, rules{cross: true, roots: 2, hours: 3, agents: 1, replicas: 1}},
		{"one agent, not cross-signed", true, rules{roots: 2, hours: 3, agents: 1, replicas: 1}},
		{"one agent, rolled back and aborted", true, rules{cross: true, roots: 2, hours: 2, back: true, agents: 1, replicas: 1}},
		{"one agent, excused", true, rules{roots: 2, hours: 2, excuse: true, agents: 1, replicas: 1}},
		{"one agent, emergency", true, rules{cross: true, roots: 3, hours: 2, taint: true, calm: true, agents: 1, replicas: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWalk(t, tt.rules)
			w.run(limit)
			t.Logf("%d states, %d records, all of them: %t", len(w.seen), len(w.journals), w.whole)
			if tt.whole && !w.whole && limit >= 12_500 {
				t.Error("there are more states than were walked through")
			}
			for _, want := range tt.rules.reaches() {
				if !w.reached[want] && (tt.whole || limit > 100_000) {
					t.Errorf("no way leads to %s", want)
				}
			}
		})
	}
}

// rules say what may happen in a walk.
type rules struct {
	cross, back, excuse, taint bool
	calm                       bool // agents do not go away, so that more of the rest fits
	roots, hours               int
	agents, replicas           int // from 1 to walkers; 0: so many
}

func (r rules) reaches() []string {
	want := []string{"publish", "activate"}
	switch {
	case r.taint:
		want = append(want, "tainted", "remove", "after superseded")
	case r.back:
		want = append(want, "after aborted", "rolled back")
	default:
		want = append(want, "remove", "after done")
	}
	return want
}

// The lives of SVIDs and of intermediates, in hours: somebody who is late by the limit of an hour still has an SVID.
const (
	walkTTL  = 2
	walkMint = 3
)

const walkers = 2 // of agents, and of replicas

// world is all that there is at one moment: what people see of it is in acks.
type world struct {
	journal  int // index into walk.journals
	hour     int8
	used     int8 // roots that were taken so far
	alarm    bool // there was an emergency
	excused  bool // agent 0 is
	agents   [walkers]walkAgent
	replicas [walkers]walkReplica
}

type walkAgent struct {
	away        bool
	held, acked bundleMask
	leaf        int8 // index of the root above its pod's SVID
	cross       int8 // index of the root that cross-signed that one, as its chain has it; -1: none
	until       int8 // hour in which the SVID expires
}

type walkReplica struct {
	signs int8               // index of the root that it goes by
	mints [maxWalkRoots]int8 // until when its intermediates under each last; 0: none, or destroyed
	leafs [maxWalkRoots]int8 // until when the last SVID lasts under each
	gone  [maxWalkRoots]bool // that one was destroyed
}

const maxWalkRoots = 3

// bundleMask is a bundle: its number in the record, and which roots are in it.
type bundleMask struct {
	number uint32
	roots  uint8
}

type walk struct {
	t        *testing.T
	rules    rules
	roots    []root
	journals []Journal
	hashes   map[bundleMask][32]byte
	byText   map[string]int
	seen     map[world]bool
	reached  map[string]bool
	whole    bool
}

func newWalk(t *testing.T, r rules) *walk {
	r.agents, r.replicas = cmp.Or(r.agents, walkers), cmp.Or(r.replicas, walkers)
	w := &walk{t: t, rules: r, roots: pool(t, maxWalkRoots), byText: map[string]int{}, hashes: map[bundleMask][32]byte{}, seen: map[world]bool{}, reached: map[string]bool{}}
	return w
}

// run goes through the states until none is left or there are too many: then it has been near and far.
func (w *walk) run(limit int) {
	start := world{journal: w.intern(journalOf(w.t, w.roots[0])), used: 1}
	for i := range walkers {
		b := bundleMask{1, 1}
		start.agents[i] = walkAgent{held: b, acked: b, cross: -1, until: walkTTL}
		start.replicas[i].mints[0], start.replicas[i].leafs[0] = walkMint, walkTTL
	}
	start.canonical(w.rules)
	todo, pick := []world{start}, rand.New(rand.NewPCG(1, 2))
	w.seen[start] = true
	w.check(start)
	for len(todo) > 0 {
		k := pick.IntN(len(todo))
		s := todo[k]
		todo[k] = todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, n := range w.successors(s) {
			n.canonical(w.rules)
			if w.seen[n] {
				continue
			}
			if len(w.seen) >= limit {
				return
			}
			w.seen[n] = true
			w.check(n)
			if w.t.Failed() {
				return
			}
			todo = append(todo, n)
		}
	}
	w.whole = true
}

// canonical makes one of worlds that differ only in who is called first.
func (s *world) canonical(r rules) {
	if r.replicas == walkers && s.replicas[0].compare(s.replicas[1]) > 0 {
		s.replicas[0], s.replicas[1] = s.replicas[1], s.replicas[0]
	}
	if r.agents == walkers && !s.excused && s.agents[0].compare(s.agents[1]) > 0 {
		s.agents[0], s.agents[1] = s.agents[1], s.agents[0]
	}
}

func (r walkReplica) compare(o walkReplica) int {
	number := func(r walkReplica) (n int64) {
		for k := range r.mints {
			n = n<<9 | int64(r.mints[k])<<5 | int64(r.leafs[k])<<1
			if r.gone[k] {
				n++
			}
		}
		return n<<2 | int64(r.signs)
	}
	return cmp.Compare(number(r), number(o))
}

func (a walkAgent) compare(o walkAgent) int {
	number := func(a walkAgent) int64 {
		n := int64(a.held.number)<<40 | int64(a.held.roots)<<32 | int64(a.acked.number)<<24 | int64(a.acked.roots)<<16 | int64(a.leaf)<<12 | int64(a.cross+1)<<8 | int64(a.until)<<1
		if a.away {
			n++
		}
		return n
	}
	return cmp.Compare(number(a), number(o))
}

func (w *walk) intern(j Journal) int {
	text, err := json.Marshal(j)
	if err != nil {
		w.t.Fatal(err)
	}
	if i, ok := w.byText[string(text)]; ok {
		return i
	}
	if err := j.Validate(); err != nil { // I1, I8
		w.t.Fatal(err)
	}
	for _, a := range j.Authorities {
		if len(a.SealedKey) == 0 {
			w.t.Fatalf("I6: the key of %s is gone, and it is %s", a.ID, a.State)
		}
	}
	i := len(w.journals)
	w.byText[string(text)] = i
	w.journals = append(w.journals, j)
	w.hashes[w.bundle(j)] = heldOf(w.t, j).Hash
	if j.Operation != nil && j.Operation.Back != nil {
		w.reached["rolled back"] = true
	}
	for _, a := range j.Authorities {
		w.reached[string(a.State)] = true
	}
	for _, p := range j.Past {
		w.reached["after "+string(p.Outcome)] = true
	}
	return i
}

func (w *walk) now(s world) time.Time { return t0.Add(time.Duration(s.hour) * time.Hour) }

func (w *walk) index(id string) int8 {
	return int8(slices.IndexFunc(w.roots, func(r root) bool { return r.ID == id }))
}

// bundle is the one of a record.
func (w *walk) bundle(j Journal) bundleMask {
	b := bundleMask{number: j.Number}
	for _, a := range j.Authorities {
		if a.State.Trusted() {
			b.roots |= 1 << w.index(a.ID)
		}
	}
	return b
}

// acks is the evidence that this world gives.
func (w *walk) acks(s world) Acks {
	held := func(b bundleMask) Held {
		return Held{Generation: api.Generation{Epoch: 1, Number: b.number}, Hash: w.hashes[b]}
	}
	at := func(hour int8) time.Time { return t0.Add(time.Duration(hour) * time.Hour) }
	var acks Acks
	for i, r := range s.replicas[:w.rules.replicas] {
		out := Replica{Name: fmt.Sprint("ca-", i), Reachable: true, Signs: w.roots[r.signs].ID, Leaves: map[string]time.Time{}}
		out.Ready = r.mints[w.index(w.journals[s.journal].ActiveAuthority().ID)] > s.hour
		for k := range r.mints {
			if r.mints[k] > 0 || r.gone[k] {
				out.Intermediates = append(out.Intermediates, Intermediate{Root: w.roots[k].ID, NotAfter: at(r.mints[k]), Destroyed: r.gone[k]})
			}
			if r.leafs[k] > 0 {
				out.Leaves[w.roots[k].ID] = at(r.leafs[k])
			}
		}
		acks.Replicas = append(acks.Replicas, out)
	}
	for i, a := range s.agents[:w.rules.agents] {
		name := fmt.Sprint("node-", i)
		acks.Agents = append(acks.Agents, Agent{Node: name, NodeUID: name, Connected: !a.away, Until: at(a.until), Held: held(a.held),
			Pods: []Pod{{Namespace: "shop", Name: name, UID: name, Roots: []string{w.roots[a.leaf].ID}, Streams: []Stream{{Bundle: true, Acked: held(a.acked)}}}}})
	}
	return acks
}

// successors are the worlds that one event leads to.
func (w *walk) successors(s world) []world {
	var all []world
	j := w.journals[s.journal]
	current, active := w.bundle(j), w.index(j.ActiveAuthority().ID)
	if int(s.hour) < w.rules.hours {
		n := s
		n.hour++
		all = append(all, n)
	}
	for i, a := range s.agents[:w.rules.agents] {
		change := func(f func(*walkAgent)) {
			n := s
			f(&n.agents[i])
			all = append(all, n)
		}
		if !w.rules.calm {
			change(func(a *walkAgent) { a.away = !a.away })
		}
		if a.away {
			continue
		}
		if a.held != current {
			change(func(a *walkAgent) { a.held = current })
		}
		if a.acked != a.held {
			change(func(a *walkAgent) { a.acked = a.held })
		}
		for k, r := range s.replicas[:w.rules.replicas] {
			if r.mints[r.signs] <= s.hour || a.leaf == r.signs && a.until == s.hour+walkTTL {
				continue
			}
			n := s
			n.agents[i] = w.issue(s, a, r.signs, current)
			n.replicas[k].leafs[r.signs] = max(r.leafs[r.signs], n.agents[i].until)
			all = append(all, n)
		}
	}
	for k, r := range s.replicas[:w.rules.replicas] {
		if r.signs == active && r.mints[active] > s.hour {
			continue
		}
		n := s
		for old := range n.replicas[k].mints { // it takes up the active root, and destroys what it had
			if n.replicas[k].mints[old] > 0 {
				n.replicas[k].gone[old] = true
			}
			n.replicas[k].mints[old] = 0
		}
		n.replicas[k].signs, n.replicas[k].mints[active], n.replicas[k].gone[active] = active, s.hour+walkMint, false
		all = append(all, n)
	}
	return append(all, w.decided(s, j)...)
}

// issue is an agent after it got an SVID for its pod. Whoever had none that is valid gets the bundle first.
func (w *walk) issue(s world, a walkAgent, under int8, current bundleMask) walkAgent {
	if a.until <= s.hour {
		a.held, a.acked = current, current
	}
	a.leaf, a.until, a.cross = under, s.hour+walkTTL, -1
	j := w.journals[s.journal]
	if i := j.find(w.roots[under].ID); i >= 0 && j.Authorities[i].CrossBy != "" {
		a.cross = w.index(j.Authorities[i].CrossBy)
	}
	return a
}

// decided are the worlds that a change of the record leads to.
func (w *walk) decided(s world, j Journal) []world {
	var all []world
	now := w.now(s)
	to := func(next Journal, err error, change func(*world)) {
		if err != nil {
			return
		}
		w.follows(j, next)
		n := s
		n.journal = w.intern(next)
		if change != nil {
			change(&n)
		}
		all = append(all, n)
	}
	step, blockers := Next(j, now, w.acks(s))
	if step.Is() {
		w.reached[string(step.Do)] = true
		for _, b := range blockers {
			w.reached[string(b.Pass)] = true
		}
		next, err := Apply(j, step, now)
		if err != nil {
			w.t.Fatalf("%v is not taken: %v", step, err)
		}
		if again, err := Apply(next, step, now); err != nil || w.intern(again) != w.intern(next) { // I7
			w.t.Fatalf("I7: %v, taken twice: %v", step, err)
		}
		to(next, nil, nil)
	} else if (j.Operation != nil) != slices.ContainsFunc(blockers, func(b Blocker) bool { return b.Blocks() && b.Name != "" && b.Why != "" }) {
		w.t.Fatalf("stuck, and nobody is named: %+v, %+v", j.Operation, blockers)
	}
	if int(s.used) < w.rules.roots {
		fresh := w.roots[s.used]
		a := fresh.Authority
		if w.rules.cross {
			a = w.crossed(s.used, w.index(j.ActiveAuthority().ID))
		}
		next, err := Start(j, planned(fmt.Sprint("op-", s.used), a), now)
		to(next, err, func(n *world) { n.used++ })
		if w.rules.taint {
			for _, old := range j.Authorities {
				next, err := Taint(j, TaintRequest{Request: request(fmt.Sprint("fire-", s.used)), Compromised: old.ID, Authority: fresh.Authority}, now)
				to(next, err, func(n *world) { n.used++; n.alarm = true })
			}
		}
	}
	if o := j.Operation; o != nil && w.rules.back {
		next, err := Abort(j, request(o.ID), now)
		to(next, err, nil)
		next, err = Rollback(j, request(o.ID), now)
		to(next, err, nil)
	}
	if o := j.Operation; o != nil && w.rules.excuse && !s.excused {
		next, err := j.WithExcuse(Excuse{Scope: ScopeNode, Name: "node-0", Reason: "r", By: "b", Until: now.Add(24 * time.Hour)}, now)
		to(next, err, func(n *world) { n.excused = true })
	}
	return all
}

// crossed is a root signed by another one. It is made once, so that there are not more records than there are.
func (w *walk) crossed(i, by int8) Authority {
	if r := &w.roots[i]; r.CrossBy != w.roots[by].ID {
		a := r.by(w.t, w.roots[by])
		r.Cross, r.CrossBy = a.Cross, a.CrossBy
	}
	return w.roots[i].Authority
}

// follows checks that the bundle of a record that follows another is the same, or has a higher generation. I4.
func (w *walk) follows(before, after Journal) {
	b, a := w.bundle(before), w.bundle(after)
	if changed := b.roots != a.roots; changed != (a.number > b.number) || a.number < b.number {
		w.t.Fatalf("I4: %v is followed by %v", b, a)
	}
}

// check fails the test where a state breaks an invariant.
func (w *walk) check(s world) {
	j := w.journals[s.journal]
	current := w.bundle(j)
	replaces := int8(-1)
	if o := j.Operation; o != nil {
		replaces = w.index(o.Replaces)
	} else if n := len(j.Past); n > 0 {
		replaces = w.index(j.Past[n-1].Replaces)
	}
	for i, p := range s.agents[:w.rules.agents] {
		if p.until <= s.hour || s.alarm {
			continue
		}
		if current.roots&(1<<p.leaf) == 0 {
			w.t.Fatalf("I2: the SVID of agent %d is under root %d, the bundle is %b\n%s", i, p.leaf, current.roots, w.tell(s))
		}
		for k, v := range s.agents[:w.rules.agents] {
			// A pod that is late by two rotations though its agent is not.
			late := replaces >= 0 && v.acked.roots&(1<<replaces) == 0 && (v.held.roots&(1<<replaces) != 0 || v.held == current)
			if v.until <= s.hour || s.excused && k == 0 || late {
				continue
			}
			if v.acked.roots&(1<<p.leaf) == 0 && (p.cross < 0 || v.acked.roots&(1<<p.cross) == 0) {
				w.t.Fatalf("I3: agent %d trusts %b and is shown an SVID under root %d, cross-signed by %d\n%s", k, v.acked.roots, p.leaf, p.cross, w.tell(s))
			}
		}
	}
}

func (w *walk) tell(s world) string {
	j := w.journals[s.journal]
	var b strings.Builder
	fmt.Fprintf(&b, "hour %d, generation %s, excused %t\n", s.hour, j.Generation(), s.excused)
	for _, a := range j.Authorities {
		fmt.Fprintf(&b, "root %d %s cross-signed by %d\n", w.index(a.ID), a.State, w.index(a.CrossBy))
	}
	fmt.Fprintf(&b, "agents %+v\nreplicas %+v\noperation %+v\npast %+v\n", s.agents, s.replicas, j.Operation, j.Past)
	return b.String()
}
