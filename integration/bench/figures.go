//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// errNoisy is why a figure is not given.
var errNoisy = errors.New("the machine was too noisy for some figures; stop what else runs on it and try again")

const (
	// maxSpread is how far apart a figure's rounds may be, as a share of their median.
	maxSpread = 0.60
	// patience is how many rounds are tried for each that is wanted.
	patience = 3
)

// figure is one line of the table.
type figure struct {
	Key    string   `json:"-"`
	What   string   `json:"what"`
	Unit   string   `json:"unit"`
	Goal   *float64 `json:"goal,omitempty"`
	Least  bool     `json:"-"` // the goal is a lower bound
	Median float64  `json:"median"`
	Min    float64  `json:"min"`
	Max    float64  `json:"max"`
	Runs   int      `json:"runs"`
	// Refused says why there is no figure; the fields above are zero then.
	Refused string `json:"refused,omitempty"`

	rounds []float64
	spread bool // may be as far apart as it likes: the largest of many
}

// figures are those of one run.
type figures struct {
	list []*figure
	by   map[string]*figure
}

func newFigures() *figures { return &figures{by: map[string]*figure{}} }

// declare says what a key means; what is not declared cannot be added.
func (f *figures) declare(key, what, unit string) *figure {
	if x := f.by[key]; x != nil {
		return x
	}
	x := &figure{Key: key, What: what, Unit: unit}
	f.by[key] = x
	f.list = append(f.list, x)
	return x
}

func (x *figure) below(goal float64) *figure   { x.Goal = &goal; return x }
func (x *figure) atLeast(goal float64) *figure { x.Goal, x.Least = &goal, true; return x }
func (x *figure) anySpread() *figure           { x.spread = true; return x }

func (f *figures) add(key string, v float64) { f.by[key].rounds = append(f.by[key].rounds, v) }

// settle works out a figure from its rounds.
func (x *figure) settle(wanted int) {
	if x.Refused != "" || x.Runs > 0 {
		return
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
			fmt.Fprintf(t, "%s\t-\t\t\t\t%s\t%s: %s\n", x.Key, x.goal(), x.What, x.Refused)
			continue
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", x.Key, number(x.Median), number(x.Min), number(x.Max), x.Runs, x.goal(), strings.TrimSpace(x.What+", "+x.Unit))
	}
	_ = t.Flush()
}

func (x *figure) goal() string {
	switch {
	case x.Goal == nil:
		return ""
	case x.Least:
		return "≥ " + number(*x.Goal) + x.verdict()
	default:
		return "< " + number(*x.Goal) + x.verdict()
	}
}

func (x *figure) verdict() string {
	switch {
	case x.Refused != "":
		return ""
	case x.Least && x.Median >= *x.Goal, !x.Least && x.Median < *x.Goal:
		return " met"
	default:
		return " MISSED"
	}
}

func number(v float64) string {
	switch {
	case v >= 1000:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.3g", v)
	}
}

// write writes the figures as one JSON object, by key.
func (f *figures) write(path string) error {
	text, err := json.MarshalIndent(f.by, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
