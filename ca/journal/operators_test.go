package journal

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
)

// operation is what one of several operators wants at the same time, as a function of the record alone: his answer and the
// record that he wants.
type operation struct {
	name string
	do   func(Journal) (Journal, error)
}

// TestConcurrentOperators plays every order in which operators load the record, swap it, and begin anew where somebody was
// first, and checks that each history is linearizable: there is an order of the whole operations, which keeps to the order of
// those that did not overlap, in which one after the other gives the same answers and the same record.
//
// threat: E09, E10, E19
func TestConcurrentOperators(t *testing.T) {
	roots := pool(t, 4)
	base := journalOf(t, roots[0])
	start := func(id string, r root) operation {
		return operation{"start " + id, func(j Journal) (Journal, error) { return Start(j, planned(id, r.Authority), t0) }}
	}
	abort := operation{"abort", func(j Journal) (Journal, error) { return Abort(j, request("op"), t0) }}
	rollback := operation{"rollback", func(j Journal) (Journal, error) { return Rollback(j, request("op"), t0) }}
	taint := func(id, compromised string, r root) operation {
		return operation{"taint " + id, func(j Journal) (Journal, error) {
			return Taint(j, TaintRequest{Request: request(id), Compromised: compromised, Authority: r.Authority}, t0)
		}}
	}
	// As a replica does it: decided anew on what is loaded.
	engine := operation{"step", func(j Journal) (Journal, error) {
		s, _ := Next(j, t0, ready(t, j, t0))
		if !s.Is() {
			return Journal{}, api.E(api.RotationBlocked, "nothing can be done")
		}
		return Apply(j, s, t0)
	}}
	// And as one that was paused would do it: decided on the record of then.
	stale := func(j Journal) operation {
		s, found := Next(j, t0, ready(t, j, t0))
		if !s.Is() {
			t.Fatalf("no step to be late with: %+v", found)
		}
		return operation{"late " + string(s.Do), func(j Journal) (Journal, error) { return Apply(j, s, t0) }}
	}
	excuse := operation{"excuse", func(j Journal) (Journal, error) {
		return j.WithExcuse(Excuse{Scope: ScopeNode, Name: "n", Reason: "r", By: "b", Until: t0.Add(time.Hour)}, t0)
	}}
	ban := operation{"ban", func(j Journal) (Journal, error) { return j.WithBan(Ban{Cluster: "c", NodeUID: "n", At: t0, By: "b"}) }}
	prepared := must(t)(Start(base, planned("op", roots[1].Authority), t0))
	published := step(t, prepared, t0, ready(t, prepared, t0))
	active := step(t, published, t0, ready(t, published, t0))
	for _, tt := range []struct {
		name string
		from Journal
		all  []operation
	}{
		{"two begin", base, []operation{start("a", roots[1]), start("b", roots[2])}},
		{"three begin, two of them the same", base, []operation{start("a", roots[1]), start("b", roots[2]), start("a", roots[3])}},
		{"one begins, one declares an emergency", base, []operation{start("a", roots[1]), taint("fire", roots[0].ID, roots[2]), engine}},
		{"two declare the same emergency", base, []operation{taint("fire", roots[0].ID, roots[2]), taint("flood", roots[0].ID, roots[3]), engine}},
		{"abort, and the step", published, []operation{abort, engine, stale(published)}},
		{"abort twice, and the step", published, []operation{abort, abort, engine}},
		{"abort and begin another", published, []operation{abort, start("b", roots[2]), stale(published)}},
		{"abort or roll back", published, []operation{abort, engine, rollback}},
		{"roll back, and the removal", active, []operation{rollback, engine, stale(active)}},
		{"roll back, and an emergency", active, []operation{rollback, taint("fire", roots[1].ID, roots[2]), engine}},
		{"three replicas", prepared, []operation{engine, engine, engine}},
		{"those that do not meddle", published, []operation{excuse, ban, engine}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := 0
			schedules(len(tt.all), tt.from, tt.all, func(h history) {
				n++
				if why := h.linearizable(tt.from, tt.all); why != "" {
					t.Fatalf("%s\n%s", strings.Join(h.told, "\n"), why)
				}
			})
			if n < 6 {
				t.Errorf("%d histories only", n)
			}
		})
	}
}

// history is one order of events and what came of it.
type history struct {
	begun, ended []int // by operation, the number of the event
	answers      []string
	final        string
	told         []string
}

// player is an operator in the middle of his operation.
type player struct {
	revision int // that he loaded; -1: none
	loaded   Journal
	done     bool
}

// schedules plays every order of the operators' events: to load, and to swap what follows from it. One who finds that somebody
// was first loads again.
func schedules(n int, from Journal, all []operation, each func(history)) {
	type moment struct {
		players  []player
		record   Journal
		revision int
		event    int
		h        history
	}
	var play func(m moment)
	play = func(m moment) {
		moved := false
		for i := range n {
			p := m.players[i]
			if p.done {
				continue
			}
			moved = true
			next := m
			next.players = slices.Clone(m.players)
			next.h = history{slices.Clone(m.h.begun), slices.Clone(m.h.ended), slices.Clone(m.h.answers), "", slices.Clone(m.h.told)}
			next.event++
			if p.revision < 0 {
				if next.h.begun[i] < 0 {
					next.h.begun[i] = next.event
				}
				next.players[i].revision, next.players[i].loaded = m.revision, m.record
				next.h.told = append(next.h.told, fmt.Sprintf("%s loads %d", all[i].name, m.revision))
				play(next)
				continue
			}
			changed, err := all[i].do(p.loaded)
			answer := "done"
			switch {
			case err != nil: // what was loaded says so, whatever it is now
				answer = string(api.ReasonOf(err))
			case p.revision != m.revision:
				next.players[i].revision = -1
				next.h.told = append(next.h.told, all[i].name+" was not first")
				play(next)
				continue
			default:
				next.record, next.revision = changed, m.revision+1
			}
			next.players[i].done = true
			next.h.ended[i], next.h.answers[i] = next.event, answer
			next.h.told = append(next.h.told, fmt.Sprintf("%s: %s", all[i].name, answer))
			play(next)
		}
		if !moved {
			m.h.final = text(m.record)
			each(m.h)
		}
	}
	start := moment{players: slices.Repeat([]player{{revision: -1}}, n), record: from}
	start.h = history{begun: slices.Repeat([]int{-1}, n), ended: slices.Repeat([]int{-1}, n), answers: make([]string, n)}
	play(start)
}

// linearizable says why no order of whole operations explains the history; empty where one does.
func (h history) linearizable(from Journal, all []operation) string {
	var why []string
	var try func(j Journal, taken []int) bool
	try = func(j Journal, taken []int) bool {
		if len(taken) == len(all) {
			if text(j) != h.final {
				why = append(why, fmt.Sprintf("%v ends with another record", taken))
				return false
			}
			return true
		}
		for i := range all {
			if slices.Contains(taken, i) {
				continue
			}
			// Nobody who ended before i began may come after it.
			late := false
			for k := range all {
				late = late || k != i && !slices.Contains(taken, k) && h.ended[k] < h.begun[i]
			}
			if late {
				continue
			}
			next, err := all[i].do(j)
			answer := "done"
			if err != nil {
				answer, next = string(api.ReasonOf(err)), j
			}
			if answer != h.answers[i] {
				why = append(why, fmt.Sprintf("%v, then %s answers %s", taken, all[i].name, answer))
				continue
			}
			if try(next, append(slices.Clone(taken), i)) {
				return true
			}
		}
		return false
	}
	if try(from, nil) {
		return ""
	}
	return strings.Join(why, "\n")
}

func text(j Journal) string {
	data, err := json.Marshal(j)
	if err != nil {
		return err.Error()
	}
	return string(data)
}
