package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"
)

// maxRows is how many of those who are waited for a table names; -o wide names all that the CA told of.
const maxRows = 20

// text is the rotation for people: what it is about, the steps, who is waited for, and who is not though he is not ready.
func (v *rotationView) text(wide bool) []block {
	blocks := []block{{pairs: v.summary()}}
	if v.Operation == nil {
		return append(blocks, v.excuses(), pastOf(v.Past, wide, v.now))
	}
	past := block{}
	if wide {
		past = pastOf(v.Past, wide, v.now)
	}
	blocks = append(blocks, block{table: v.stepTable()})
	waited, excused, passed := v.sorted()
	several := len(v.Gates) > 1
	return append(blocks,
		block{title: "Waited for:", table: blockerTable(waited, v.now, wide, several, "")},
		block{title: "Excused, and not waited for:", table: blockerTable(excused, v.now, wide, several, "")},
		block{title: "Not ready, and passed over:", table: blockerTable(passed, v.now, wide, several, "as")},
		v.excuses(), past)
}

func (v *rotationView) summary() []pair {
	now := v.now
	pairs := []pair{v.about()}
	if o := v.Operation; o != nil {
		kind := o.Kind
		if o.Automatic {
			kind += ", automatic"
		}
		pairs = append(pairs, known(
			pair{"Operation", o.ID + " (" + kind + ")"},
			pair{"Begun", instant(o.begun, now) + after(" by ", o.By) + after(": ", o.Reason)},
			pair{"Roots", v.rootsOf(o)},
			pair{"Compromised", strings.Join(shorts(o.Compromised), ", ")},
			pair{"State", v.stateText()},
			pair{"Progress", v.Progress.String()},
			pair{"Cross-signed", v.Forecast.crossText()},
		)...)
		if w := o.RolledBack; w != nil {
			pairs = append(pairs, pair{"Rolled back", instant(w.at, now) + after(" by ", w.By) + after(": ", w.Reason)})
		}
		for _, f := range o.Forced {
			pairs = append(pairs, pair{"Forced", fmt.Sprintf("%s over %d, at %s by %s", f.Step, f.Count, dash(f.At), f.By)})
		}
		if !o.latest.IsZero() {
			pairs = append(pairs, pair{"Waits until", o.Latest + " (" + comes(o.latest, now) + "), then for nobody unless most agents are away"})
		}
	} else {
		pairs = append(pairs, pair{"Rotation", "none is under way"})
		if n := len(v.Past); n > 0 {
			p := v.Past[n-1]
			pairs = append(pairs, pair{"The last one", p.ID + " (" + p.Kind + "): " + p.Outcome + ", " + instant(p.ended, now) + after("; begun by ", p.By) + after("; ended by ", p.EndedBy.String())})
		}
		pairs = append(pairs, v.scheduleText()...)
	}
	if t := v.Trouble; t != nil {
		pairs = append(pairs, pair{"TROUBLE", strings.TrimSpace(t.Code+" "+t.Reason) + after(": ", t.Detail)})
	}
	return pairs
}

func (v *rotationView) scheduleText() []pair {
	s := v.Schedule
	if s == nil || s.expires.IsZero() {
		return nil
	}
	if !s.Automatic {
		return []pair{{"The next one", "is begun by nobody but you: the automatic rotation is off, and the root expires " + s.Expires + " (" + comes(s.expires, v.now) + ")"}}
	}
	return []pair{{"The next one", fmt.Sprintf("begins by itself %s (%s), waits for nobody from %s on; the root expires %s", dash(s.Prepare), comes(s.prepare, v.now), dash(s.Latest), s.Expires)}}
}

func (v *rotationView) rootsOf(o *operationView) string {
	one := func(id string) string {
		if state := v.stateOf(id); state != "" {
			return short(id) + " (" + state + ")"
		}
		return short(id)
	}
	return one(o.Replaces) + " -> " + one(o.Authority)
}

func (v *rotationView) stateText() string {
	g := v.next()
	switch {
	case v.State == rotationTrouble:
		return "TROUBLE: the CA cannot go on, see below"
	case g == nil:
		return "about to go on"
	case g.Blocking == 0:
		return "about to " + stepText(g.Step, g.Authority)
	}
	return fmt.Sprintf("WAIT: to %s, for %d", stepText(g.Step, g.Authority), g.Blocking) + after("; that ends by itself ", v.ends(g))
}

// ends says when the step is taken at the latest, though nobody does anything: once the last of those who stand in its way no longer
// does, or nobody is waited for any more; empty where neither is known.
func (v *rotationView) ends(g *gateView) string {
	last := v.untilGone(g)
	for _, s := range v.Steps {
		if s.Step == g.Step && s.Authority == g.Authority && !s.latest.IsZero() && (last.IsZero() || s.latest.Before(last)) {
			last = s.latest
		}
	}
	if last.IsZero() {
		return ""
	}
	return comes(last, v.now)
}

// untilGone is when the last of those who stand in the way of g no longer does; zero where that is not known of all of them.
func (v *rotationView) untilGone(g *gateView) time.Time {
	var last time.Time
	named := 0
	for _, b := range g.Blockers {
		if b.Pass != "" {
			continue
		}
		if b.until.IsZero() {
			return time.Time{}
		}
		named++
		if b.until.After(last) {
			last = b.until
		}
	}
	if named < g.Blocking {
		return time.Time{}
	}
	return last
}

func stepText(do, authority string) string {
	switch do {
	case "publish":
		return "publish " + short(authority)
	case "activate":
		return "activate " + short(authority)
	case "remove":
		return "remove " + short(authority)
	}
	return do + " " + short(authority)
}

func (f *forecastView) crossText() string {
	switch {
	case f == nil:
		return ""
	case f.CrossSigned:
		return "yes: who still has only the old root verifies what is issued under the new one"
	}
	late := "Nobody is passed over for being late"
	if f.Kind == "emergency" {
		late = "After the limit nobody is waited for"
	}
	return "NO" + after(": ", f.NotCross) + ". " + late
}

func (v *rotationView) stepTable() *metav1.Table {
	var rows [][]string
	for _, s := range v.Steps {
		state := s.State
		if s.Blocking > 0 {
			state = fmt.Sprintf("WAIT for %d", s.Blocking)
		}
		earliest, latest := s.window(v.now)
		rows = append(rows, []string{s.Step, short(s.Authority), state, earliest, latest})
	}
	return table([]column{{name: "step"}, {name: "root"}, {name: "state"}, {name: "earliest"}, {name: "latest"}}, rows)
}

// window is when the step can be taken, and when it is in any case.
func (s stepView) window(now time.Time) (earliest, latest string) {
	if s.State == "done" {
		return "-", "-"
	}
	earliest, latest = comes(s.earliest, now), comes(s.latest, now)
	if s.latest.IsZero() {
		latest = "when all are ready"
	}
	return earliest, latest
}

// comes is how long it is to t: "now", "in 41m".
func comes(t, now time.Time) string {
	switch d := t.Sub(now); {
	case t.IsZero():
		return "-"
	case d < time.Second:
		return "now"
	default:
		return "in " + duration.HumanDuration(d)
	}
}

// A waitee is a blocker with the step it is about.
type waitee struct {
	step string
	*blockerView
}

// sorted tells those who stand in the way from those who are excused and those who are passed over.
func (v *rotationView) sorted() (waited, excused, passed []waitee) {
	for _, g := range v.Gates {
		left := g.Blocking
		for _, b := range g.Blockers {
			w := waitee{g.Step + " " + short(g.Authority), b}
			switch b.Pass {
			case "":
				waited = append(waited, w)
				left--
			case "excused":
				excused = append(excused, w)
			default:
				passed = append(passed, w)
			}
		}
		if left > 0 {
			waited = append(waited, waitee{g.Step + " " + short(g.Authority), &blockerView{Name: fmt.Sprintf("and %d more", left), Why: "the CA names no more than these at once"}})
		}
	}
	return waited, excused, passed
}

// blockerTable names who is not ready. as is the name of a column that says why he is passed over; empty: none.
func blockerTable(all []waitee, now time.Time, wide, several bool, as string) *metav1.Table {
	columns := []column{{name: "who"}, {name: "why"}, {name: "until"}}
	if several {
		columns = append([]column{{name: "step"}}, columns...)
	}
	if as != "" {
		columns = append(columns, column{name: as})
	}
	columns = append(columns, column{name: "node", wide: true}, column{name: "cluster", wide: true}, column{name: "uid", wide: true}, column{name: "force", wide: true})
	shown := all
	if !wide && len(all) > maxRows {
		shown = all[:maxRows]
	}
	var rows [][]string
	for _, w := range shown {
		row := []string{w.Name, w.whyText(), comes(w.until, now)}
		if several {
			row = append([]string{w.step}, row...)
		}
		if as != "" {
			row = append(row, w.Pass)
		}
		uid, force := w.PodUID, "yes"
		if uid == "" {
			uid = w.NodeUID
		}
		if w.Hard {
			force = "no"
		}
		rows = append(rows, append(row, dash(w.Node), dash(w.Cluster), dash(uid), force))
	}
	if more := len(all) - len(shown); more > 0 {
		row := slices.Repeat([]string{"-"}, len(columns))
		row[slices.IndexFunc(columns, func(c column) bool { return c.name == "who" })] = fmt.Sprintf("and %d more", more)
		row[slices.IndexFunc(columns, func(c column) bool { return c.name == "why" })] = "-o wide names them"
		rows = append(rows, row)
	}
	return table(columns, rows)
}

// whyText is what is missing, with the proxy's own words.
func (b *blockerView) whyText() string {
	return clip(dash(b.Why), maxFound) + after("; its proxy says: ", clip(b.Nack, maxFound))
}

func (v *rotationView) excuses() block {
	var rows [][]string
	for _, e := range v.Excuses {
		rows = append(rows, []string{e.Scope, e.Name, comes(e.until, v.now), e.Reason, e.By, dash(e.Cluster)})
	}
	return block{title: "Excuses:", table: table([]column{{name: "scope"}, {name: "name"}, {name: "until"}, {name: "reason"}, {name: "by"}, {name: "cluster", wide: true}}, rows)}
}

// pastOf lists the rotations that are over, the last first; when not wide, none but the last three.
func pastOf(past []*operationView, wide bool, now time.Time) block {
	var rows [][]string
	for _, p := range slices.Backward(past) {
		if !wide && len(rows) == 3 {
			break
		}
		rows = append(rows, []string{p.ID, p.Kind, p.Outcome, lasted(p.ended, now), p.By, dash(p.Reason), short(p.Replaces), short(p.Authority), dash(p.EndedBy.String())})
	}
	return block{title: "Over:", table: table([]column{{name: "operation"}, {name: "kind"}, {name: "outcome"}, {name: "ago"}, {name: "by"}, {name: "reason"},
		{name: "from", wide: true}, {name: "to", wide: true}, {name: "ended-by", wide: true}}, rows)}
}

func shorts(ids []string) (s []string) {
	for _, id := range ids {
		s = append(s, short(id))
	}
	return s
}

// namedInLine is how many of those who are waited for a line names.
const namedInLine = 3

// line is the rotation in one line, for logs: what of it changes is worth another one.
func (v *rotationView) line() string {
	if v.Operation == nil {
		return "no rotation is under way"
	}
	var parts []string
	if t := v.Trouble; t != nil {
		parts = append(parts, "TROUBLE "+strings.TrimSpace(t.Code+" "+t.Reason)+after(": ", t.Detail))
	}
	if g := v.next(); g != nil {
		if g.Blocking == 0 {
			parts = append(parts, "about to "+stepText(g.Step, g.Authority))
		} else {
			parts = append(parts, fmt.Sprintf("waits to %s for %d: %s", stepText(g.Step, g.Authority), g.Blocking, g.named()))
		}
		if g.Passed > 0 {
			parts = append(parts, fmt.Sprintf("%d passed over", g.Passed))
		}
	}
	return v.Operation.ID + ": " + strings.Join(append(parts, v.Progress.String()), "; ")
}

// named names a few of those who stand in the way.
func (g *gateView) named() string {
	var names []string
	for _, b := range g.Blockers {
		if b.Pass == "" && len(names) < namedInLine {
			names = append(names, clip(b.Name, maxFound)+" "+b.whyText())
		}
	}
	s := strings.Join(names, ", ")
	if more := g.Blocking - len(names); more > 0 {
		s += fmt.Sprintf(" and %d more", more)
	}
	return s
}
