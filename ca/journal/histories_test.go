package journal

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/anishathalye/porcupine"

	"github.com/signet-ca/signet/api"
)

// operation is what one of several operators wants at the same time. Like the CA he decides on the record that he has loaded,
// and changes that one; who decides nothing has no decide. A look has neither.
type operation struct {
	name   string
	decide func(Journal) (Step, error)
	change func(Journal, Step) (Journal, error)
}

func wish(name string, f func(Journal) (Journal, error)) operation {
	return operation{name: name, change: func(j Journal, _ Step) (Journal, error) { return f(j) }}
}

// taking is a step that is decided on the record, and taken.
func taking(name string, decide func(Journal) (Step, error)) operation {
	return operation{name, decide, func(j Journal, s Step) (Journal, error) { return Apply(j, s, t0) }}
}

var look = operation{name: "look"}

// do is the operation done by somebody who is alone: the answer, and the record that it leaves.
func (o operation) do(j Journal) (Journal, error) {
	var s Step
	if o.decide != nil {
		var err error
		if s, err = o.decide(j); err != nil {
			return j, err
		}
	}
	next, err := o.change(j, s)
	if err != nil {
		return j, err
	}
	return next, nil
}

// answers of an operation besides the reasons of its errors, and the records that were looked at.
const (
	done    = "done"
	unknown = "unknown" // the store did not say whether the record was written
)

func answerOf(err error) string {
	if err == nil {
		return done
	}
	return string(api.ReasonOf(err))
}

// records numbers the records that come up; what follows from one is worked out once.
type records struct {
	t      testing.TB
	all    []Journal
	number map[string]int
	after  map[string]outcome // by name of the operation and number of the record
}

type outcome struct {
	record int
	answer string
}

func newRecords(t testing.TB) *records {
	return &records{t: t, number: map[string]int{}, after: map[string]outcome{}}
}

func (r *records) of(j Journal) int {
	data, err := json.Marshal(j)
	if err != nil {
		r.t.Fatal(err)
	}
	n, ok := r.number[string(data)]
	if !ok {
		n = len(r.all)
		r.number[string(data)], r.all = n, append(r.all, j)
	}
	return n
}

// do returns what an operation alone makes of a record.
func (r *records) do(o operation, record int) outcome {
	if o.change == nil {
		return outcome{record, fmt.Sprint(record)}
	}
	key := fmt.Sprint(record, " ", o.name)
	found, ok := r.after[key]
	if !ok {
		next, err := o.do(r.all[record])
		found = outcome{r.of(next), answerOf(err)}
		r.after[key] = found
	}
	return found
}

// model is one record and operators who come one after the other. An operation whose outcome is unknown was done or was not.
func (r *records) model(from int) porcupine.Model {
	m := porcupine.NondeterministicModel{
		Init: func() []any { return []any{from} },
		Step: func(state, input, output any) []any {
			found := r.do(input.(operation), state.(int))
			switch output {
			case unknown:
				return []any{state, found.record}
			case found.answer:
				return []any{found.record}
			}
			return nil
		},
		DescribeOperation: func(input, output any) string { return fmt.Sprint(input.(operation).name, ": ", output) },
	}
	return m.ToModel()
}

// bug is something that is wrong with who changes the record, or with the store.
type bug string

const (
	noBug     bug = "nothing"
	blindSwap bug = "the store looks at no revision"
	oldLoad   bug = "the store shows the record before the last one"
	decided   bug = "what was decided is done to the record of whoever was first"
	again     bug = "what was made of the older record is written over that of whoever was first"
	deaf      bug = "a swap that failed is taken for done"
	repeated  bug = "what was written with an unknown outcome is written once more"
)

// player is an operator; his operations follow each other.
type player struct {
	todo     []operation
	at       int  // of todo
	begun    int  // the event with which this operation began; 0: it has not
	loaded   bool // and revision and record are what he loaded
	revision int
	record   int
	step     Step // that he decided
	hasStep  bool
	made     int // the record that he made of it; -1: none yet
}

func (p *player) next() { *p = player{todo: p.todo, at: p.at + 1, made: -1} }

// game is a store and who changes it. Each move is one access to the store.
type game struct {
	*records
	bug      bug
	players  []player
	record   int
	before   int // the record before it
	revision int
	event    int
	history  []porcupine.Operation
}

func (r *records) game(from Journal, with bug, todo ...[]operation) game {
	g := game{records: r, bug: with, record: r.of(from)}
	g.before = g.record
	for _, all := range todo {
		g.players = append(g.players, player{todo: all, made: -1})
	}
	return g
}

func (g game) clone() game {
	g.players, g.history = slices.Clone(g.players), slices.Clip(g.history)
	return g
}

// move lets a player load, or swap; false where he is at his end. The outcome of a swap may be lost on its way.
func (g *game) move(i int, lost bool) bool {
	p := &g.players[i]
	if p.at == len(p.todo) {
		return false
	}
	g.event++
	o := p.todo[p.at]
	if p.begun == 0 {
		p.begun = g.event
	}
	if !p.loaded {
		p.loaded, p.revision, p.record = true, g.revision, g.record
		if g.bug == oldLoad {
			p.record = g.before
		}
		if o.change == nil {
			g.ends(i, fmt.Sprint(p.record))
		}
		return true
	}
	made := g.make(p, o)
	switch {
	case made.answer != done: // what he loaded says so
		g.ends(i, made.answer)
	case p.revision != g.revision && g.bug != blindSwap:
		if g.bug == deaf {
			g.ends(i, done)
			return true
		}
		p.loaded = false
	default:
		g.before, g.record, g.revision = g.record, made.record, g.revision+1
		if lost && g.bug == repeated {
			p.loaded, p.made = false, made.record
		} else if lost {
			g.ends(i, unknown)
		} else {
			g.ends(i, done)
		}
	}
	return true
}

// make is what a player makes of the record that he loaded.
func (g *game) make(p *player, o operation) outcome {
	switch {
	case p.made >= 0:
		return outcome{p.made, done}
	case g.bug == decided && o.decide != nil:
		j := g.all[p.record]
		if !p.hasStep {
			s, err := o.decide(j)
			if err != nil {
				return outcome{p.record, answerOf(err)}
			}
			p.step, p.hasStep = s, true
		}
		next, err := o.change(j, p.step)
		if err != nil {
			return outcome{p.record, answerOf(err)}
		}
		return outcome{g.of(next), done}
	}
	made := g.do(o, p.record)
	if g.bug == again && made.answer == done {
		p.made = made.record
	}
	return made
}

// ends puts the player's operation and its answer into the history.
func (g *game) ends(i int, answer string) {
	p := &g.players[i]
	g.history = append(g.history, porcupine.Operation{ClientId: i, Input: p.todo[p.at], Output: answer, Call: int64(p.begun), Return: int64(g.event)})
	p.next()
}

// linearizable reports whether whole operations, one after the other, in an order that keeps to that of those that did not
// overlap, explain all answers and the record at the end.
func (g *game) linearizable(from int) bool {
	end := int64(g.event + 1)
	last := porcupine.Operation{ClientId: len(g.players), Input: look, Output: fmt.Sprint(g.record), Call: end, Return: end + 1}
	return porcupine.CheckOperations(g.model(from), append(slices.Clone(g.history), last))
}

func (g *game) String() string {
	var s strings.Builder
	for _, o := range g.history {
		fmt.Fprintf(&s, "%d: %4d to %4d  %s: %s\n", o.ClientId, o.Call, o.Return, o.Input.(operation).name, o.Output)
	}
	return s.String()
}

// orders plays every order in which the players can move, and returns how many there are, and the first that is not
// linearizable.
func orders(g game) (n int, bad *game) {
	from := g.record
	var play func(g game)
	play = func(g game) {
		ended := true
		for i := range g.players {
			next := g.clone()
			if bad == nil && next.move(i, false) {
				ended = false
				play(next)
			}
		}
		if ended && bad == nil {
			if n++; !g.linearizable(from) {
				bad = &g
			}
		}
	}
	play(g)
	return n, bad
}
