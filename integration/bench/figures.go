//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// errNoisy is why a figure is not given.
var errNoisy = errors.New("some figures were refused, the table says which and why; stop what else runs on this machine and try again")

const (
	// maxSpread is how far apart a figure's rounds may be, as a share of their median.
	maxSpread = 0.60
	// patience is how many rounds are tried for each that is wanted.
	patience = 3
)

// figure is one line of the table, and its value in the file by its key.
type figure struct {
	Key     string   `json:"-"`
	Bench   string   `json:"bench"`
	What    string   `json:"what"`
	Unit    string   `json:"unit"`
	Goal    *float64 `json:"goal,omitempty"`
	AtLeast bool     `json:"at_least,omitempty"` // the goal is a lower bound
	Median  float64  `json:"median"`
	Min     float64  `json:"min"`
	Max     float64  `json:"max"`
	Runs    int      `json:"runs"`
	// Refused says why there is no figure; the four fields above are zero then.
	Refused string `json:"refused,omitempty"`

	rounds []float64
	spread bool // may be as far apart as it likes: the largest of many
	single bool // is taken once in a run
}

// figures are those of one run, in the order in which they were declared.
type figures struct {
	bench string // that goes on
	list  []*figure
	by    map[string]*figure
}

func newFigures() *figures { return &figures{by: map[string]*figure{}} }

// declare says what a key means; what is not declared cannot be added.
func (f *figures) declare(key, what, unit string) *figure {
	if x := f.by[key]; x != nil {
		return x
	}
	x := &figure{Key: key, Bench: f.bench, What: what, Unit: unit}
	f.by[key] = x
	f.list = append(f.list, x)
	return x
}

func (x *figure) below(goal float64) *figure   { x.Goal = &goal; return x }
func (x *figure) atLeast(goal float64) *figure { x.Goal, x.AtLeast = &goal, true; return x }
func (x *figure) anySpread() *figure           { x.spread = true; return x }
func (x *figure) once() *figure                { x.single = true; return x }

func (f *figures) add(key string, v float64) { f.by[key].rounds = append(f.by[key].rounds, v) }

// refuse gives up all figures of these keys for a reason other than noise.
func (f *figures) refuse(why string, keys ...string) {
	for _, key := range keys {
		f.by[key].Refused = why
	}
}

// settle works out a figure from its rounds.
func (x *figure) settle(wanted int) {
	if x.Refused != "" || x.Runs > 0 {
		return
	}
	if x.single {
		wanted = 1
	}
	if len(x.rounds) < wanted {
		x.Refused = fmt.Sprintf("others used the machine: %d of %d rounds were quiet enough", len(x.rounds), wanted)
		return
	}
	s := slices.Sorted(slices.Values(x.rounds))
	median, low, high := s[len(s)/2], s[0], s[len(s)-1]
	if !x.spread && median > 0 && (high-low)/median > maxSpread {
		x.Refused = fmt.Sprintf("its rounds are too far apart: %s to %s", number(low), number(high))
		return
	}
	x.Median, x.Min, x.Max, x.Runs = median, low, high, len(s)
}

// settle works out all figures that have been declared and not settled yet.
func (b *bench) settle(wanted int) {
	for _, x := range b.figures.list {
		x.settle(wanted)
	}
}

func (f *figures) refused() error {
	if slices.ContainsFunc(f.list, func(x *figure) bool { return x.Refused != "" }) {
		return errNoisy
	}
	return nil
}

func (f *figures) print(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "KEY\tMEDIAN\tMIN\tMAX\tROUNDS\tGOAL\tWHAT")
	for _, x := range f.list {
		if x.Refused != "" {
			fmt.Fprintf(t, "%s\t-\t\t\t\t%s\t%s: REFUSED, %s\n", x.Key, x.GoalText(), x.What, x.Refused)
			continue
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", x.Key, number(x.Median), number(x.Min), number(x.Max), x.Runs, strings.TrimSpace(x.GoalText()+" "+x.Verdict()), strings.TrimSpace(x.What+", "+x.Unit))
	}
	_ = t.Flush()
}

// GoalText is a figure's goal.
func (x *figure) GoalText() string {
	switch {
	case x.Goal == nil:
		return ""
	case x.AtLeast:
		return "≥ " + plain(*x.Goal)
	default:
		return "< " + plain(*x.Goal)
	}
}

// Verdict says whether a figure with a goal reaches it.
func (x *figure) Verdict() string {
	switch {
	case x.Goal == nil:
		return ""
	case x.Refused != "":
		return "not measured"
	case x.AtLeast && x.Median >= *x.Goal, !x.AtLeast && x.Median < *x.Goal:
		return "met"
	default:
		return "MISSED"
	}
}

// plain is a number that people chose.
func plain(v float64) string { return commas(strconv.FormatFloat(v, 'f', -1, 64)) }

// commas puts them between thousands.
func commas(s string) string {
	whole, _, _ := strings.Cut(s, ".")
	for i := len(whole) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// number is a figure with about three digits that mean something.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a >= 1000:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	short, _ := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 3, 64), 64) // it has just been written
	return strconv.FormatFloat(short, 'f', -1, 64)
}
