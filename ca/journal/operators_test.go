package journal

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
)

// operators are what people and replicas do to the record of a small fleet.
type operators struct {
	roots []root
	base  Journal

	abort, rollback, engine, excuse, unexcuse, ban operation
	// With a pod that rejects the bundle: the engine, and who takes the step over that pod.
	held, force operation
}

func newOperators(t testing.TB) operators {
	roots := pool(t, 4)
	rejected := func(j Journal) Acks {
		acks := ready(t, j, t0)
		s := &acks.Agents[0].Pods[0].Streams[0]
		s.Acked, s.Nack = Held{}, "no"
		return acks
	}
	next := func(acks func(Journal) Acks) func(Journal) (Step, error) {
		return func(j Journal) (Step, error) {
			s, _ := Next(j, t0, acks(j))
			if !s.Is() {
				return s, api.E(api.RotationBlocked, "nothing can be done")
			}
			return s, nil
		}
	}
	return operators{
		roots:    roots,
		base:     journalOf(t, roots[0]),
		abort:    wish("abort", func(j Journal) (Journal, error) { return Abort(j, request("op"), t0) }),
		rollback: wish("rollback", func(j Journal) (Journal, error) { return Rollback(j, request("op"), t0) }),
		engine:   taking("step", next(func(j Journal) Acks { return ready(t, j, t0) })),
		held:     taking("step, if nobody waits for the pod", next(rejected)),
		force: taking("force", func(j Journal) (Step, error) {
			return Force(j, t0, rejected(j), []string{"pod/shop/web-0"}, "uid:0")
		}),
		excuse: wish("excuse", func(j Journal) (Journal, error) {
			return j.WithExcuse(Excuse{Scope: ScopePod, Name: "shop/web-0", Reason: "r", By: "b", Until: t0.Add(time.Hour)}, t0)
		}),
		unexcuse: wish("unexcuse", func(j Journal) (Journal, error) { return j.WithoutExcuse(ScopePod, "", "shop/web-0", t0) }),
		ban:      wish("ban", func(j Journal) (Journal, error) { return j.WithBan(Ban{Cluster: "c", NodeUID: "n", At: t0, By: "b"}) }),
	}
}

func (o operators) start(id string, root int) operation {
	return wish(fmt.Sprint("start ", id, " with root ", root), func(j Journal) (Journal, error) { return Start(j, planned(id, o.roots[root].Authority), t0) })
}

func (o operators) emergency(id string, compromised, root int) operation {
	return wish(fmt.Sprint("emergency ", id, ": ", compromised, ", with root ", root), func(j Journal) (Journal, error) {
		return Taint(j, TaintRequest{Request: request(id), Compromised: o.roots[compromised].ID, Authority: o.roots[root].Authority}, t0)
	})
}

// late is a replica that was paused since it decided.
func (o operators) late(j Journal) operation {
	s, err := o.engine.decide(j)
	return taking(fmt.Sprint("late ", s.Do), func(Journal) (Step, error) { return s, err })
}

// after is the record after some operations.
func (o operators) after(t testing.TB, all ...operation) Journal {
	j := o.base
	for _, op := range all {
		j = must(t)(op.do(j))
	}
	return j
}

// TestConcurrentOperators plays every order in which operators load the record, swap it, and begin anew where somebody was
// first, and has porcupine check that each history is linearizable.
//
// threat: E09, E10, E19
func TestConcurrentOperators(t *testing.T) {
	o := newOperators(t)
	start := o.start("op", 1)
	prepared := o.after(t, start)
	published := o.after(t, start, o.engine)
	active := o.after(t, start, o.engine, o.engine)
	for _, tt := range []struct {
		name string
		from Journal
		all  []operation
	}{
		{"two begin", o.base, []operation{o.start("a", 1), o.start("b", 2)}},
		{"three begin, two of them the same", o.base, []operation{o.start("a", 1), o.start("b", 2), o.start("a", 3)}},
		{"one begins, one declares an emergency", o.base, []operation{o.start("a", 1), o.emergency("fire", 0, 2), o.engine}},
		{"two declare the same emergency", o.base, []operation{o.emergency("fire", 0, 2), o.emergency("flood", 0, 3), o.engine}},
		{"abort, and the step", published, []operation{o.abort, o.engine, o.late(published)}},
		{"abort twice, and the step", published, []operation{o.abort, o.abort, o.engine}},
		{"abort and begin another", published, []operation{o.abort, o.start("b", 2), o.late(published)}},
		{"abort or roll back", published, []operation{o.abort, o.engine, o.rollback}},
		{"roll back, and the removal", active, []operation{o.rollback, o.engine, o.late(active)}},
		{"roll back, and an emergency", active, []operation{o.rollback, o.emergency("fire", 1, 2), o.engine}},
		{"three replicas", prepared, []operation{o.engine, o.engine, o.engine}},
		{"those that do not meddle", published, []operation{o.excuse, o.ban, o.engine}},
		{"excuse, take it back, and the step", published, []operation{o.excuse, o.unexcuse, o.held}},
		{"force, and an excuse", published, []operation{o.force, o.excuse, o.held}},
		{"force twice, and an abort", published, []operation{o.force, o.force, o.abort}},
		{"force, and an emergency", published, []operation{o.force, o.emergency("fire", 0, 2), o.held}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var todo [][]operation
			for _, op := range tt.all {
				todo = append(todo, []operation{op})
			}
			n, bad := orders(newRecords(t).game(tt.from, noBug, todo...))
			if bad != nil {
				t.Fatalf("not linearizable:\n%s", bad)
			}
			if n < 6 {
				t.Errorf("%d histories only", n)
			}
		})
	}
}

// TestConcurrentHistories draws long histories of five operators, among them swaps whose outcome nobody hears of, after which the
// same is asked for again.
//
// threat: E09, E19
func TestConcurrentHistories(t *testing.T) {
	n := uint64(200)
	if testing.Short() {
		n = 40
	}
	o := newOperators(t)
	answers := map[string]int{}
	for seed := range n {
		g, ok := o.drawn(newRecords(t), noBug, seed)
		if !ok {
			t.Fatalf("seed %d is not linearizable:\n%s", seed, &g)
		}
		for _, op := range g.history {
			if op.Input.(operation).change != nil {
				answers[op.Output.(string)]++
			}
		}
	}
	t.Log(answers)
	for _, want := range []string{done, unknown, string(api.RotationUnderWay), string(api.RotationOver), string(api.RotationTooLate), string(api.RotationBlocked),
		string(api.BlockersChanged), string(api.AuthorityRefused)} {
		if answers[want] == 0 {
			t.Errorf("nobody was ever answered %s", want)
		}
	}
}

// drawn plays one history.
func (o operators) drawn(r *records, with bug, seed uint64) (game, bool) {
	random := rand.New(rand.NewPCG(seed, 8))
	all := []operation{look, look, o.abort, o.rollback, o.engine, o.engine, o.held, o.held, o.force, o.excuse, o.unexcuse, o.ban,
		o.start("op", 1), o.start("op", 2), o.start("other", 2), o.start("op", 3), o.emergency("fire", 0, 3), o.emergency("flood", 1, 2)}
	todo := make([][]operation, 5)
	for i := range todo {
		for range 6 {
			todo[i] = append(todo[i], all[random.IntN(len(all))])
		}
	}
	g := r.game(o.base, with, todo...)
	from := g.record
	for moved := true; moved; {
		moved = false
		for range 3 * len(g.players) { // nobody is kept from his end for ever
			i, lost := random.IntN(len(g.players)), random.IntN(8) == 0
			if p := &g.players[i]; lost && p.at < len(p.todo) && p.loaded {
				p.todo = slices.Insert(slices.Clone(p.todo), p.at+1, p.todo[p.at]) // he asks again, should nobody answer
			}
			moved = g.move(i, lost) || moved
		}
		for i := range g.players {
			moved = g.move(i, false) || moved
		}
	}
	return g, g.linearizable(from)
}

// TestOperatorsCaught shows that the histories tell: with each of the bugs some of them have no explanation.
func TestOperatorsCaught(t *testing.T) {
	o := newOperators(t)
	start := o.start("op", 1)
	published := o.after(t, start, o.engine)
	excused := o.after(t, start, o.engine, o.excuse)
	for _, tt := range []struct {
		bug  bug
		from Journal
		todo [][]operation // nil: drawn histories tell
	}{
		{blindSwap, o.base, [][]operation{{o.start("a", 1)}, {o.start("b", 2)}}},
		{blindSwap, published, [][]operation{{o.excuse}, {o.ban}}},
		{oldLoad, published, [][]operation{{o.abort, look}}},
		{decided, excused, [][]operation{{o.unexcuse, look}, {o.held}}},
		{again, published, [][]operation{{o.abort}, {o.engine}}},
		{again, published, [][]operation{{o.ban}, {o.engine}}},
		{deaf, published, [][]operation{{o.excuse}, {o.engine}}},
		{blindSwap, o.base, nil},
		{oldLoad, o.base, nil},
		{decided, o.base, nil},
		{again, o.base, nil},
		{deaf, o.base, nil},
		{repeated, o.base, nil},
	} {
		t.Run(string(tt.bug), func(t *testing.T) {
			caught := false
			if tt.todo != nil {
				if n, bad := orders(newRecords(t).game(tt.from, noBug, tt.todo...)); bad != nil {
					t.Fatalf("without it, the last of %d is bad:\n%s", n, bad)
				}
				_, bad := orders(newRecords(t).game(tt.from, tt.bug, tt.todo...))
				caught = bad != nil
			}
			for seed := uint64(0); tt.todo == nil && seed < 100 && !caught; seed++ {
				_, ok := o.drawn(newRecords(t), tt.bug, seed)
				caught = !ok
			}
			if !caught {
				t.Error("every history with it has an explanation")
			}
		})
	}
}
