//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
)

const (
	// loss is how much worse than its committed value a ratio may be.
	loss = 0.20
	// lossElsewhere is the same on another model of processor, where cryptography and all else need not be as far apart.
	lossElsewhere = 0.50
	// guardTries is how often a loss must be measured, one time after the other, before it is one.
	guardTries = 3
)

// committed is the file of ratios that are kept. They were all taken on one model of processor.
type committed struct {
	Model  string          `json:"model"`
	Ratios map[string]kept `json:"ratios"`
}

// kept is one ratio: its value when it was last written down, and whether more of it is better.
type kept struct {
	Value float64 `json:"value"`
	More  bool    `json:"more,omitempty"`
}

// guard measures and compares ratios with those of a file, and fails for those that are worse by more than a fifth each time
// that they are measured. What could not be measured on this machine is said and no failure: a guard that cries at noise is
// not heard.
func guard(ctx context.Context, o options) error {
	text, err := os.ReadFile(o.guard)
	if err != nil {
		return err
	}
	var c committed
	if err := json.Unmarshal(text, &c); err != nil {
		return fmt.Errorf("%s: %w", o.guard, err)
	}
	limit := loss
	if model := modelName(); model != c.Model {
		limit = lossElsewhere
		say("the ratios were taken on %q and this is %q: a loss counts from %.0f %% on, not %.0f %%", c.Model, model, 100*limit, 100*loss)
	}
	err = confirm(guardTries, func() (*figures, error) {
		d, err := measure(ctx, o)
		return d.figures, err
	}, func(f *figures) verdict { return compare(f, c, limit) })
	if errors.Is(err, errProcessors) {
		say("nothing was compared: %v", err)
		return nil
	}
	return err
}

// verdict is what a comparison found: losses by key, and how many ratios could be compared.
type verdict struct {
	lost     map[string]error
	gone     error // keys that nothing measures any more
	compared int
}

// confirm measures again, at most so often in all, as long as what was lost the first time is lost each time.
func confirm(tries int, measure func() (*figures, error), judge func(*figures) verdict) error {
	var lost map[string]error
	for try := range tries {
		f, err := measure()
		if err != nil {
			return err
		}
		f.print(os.Stdout)
		v := judge(f)
		if v.gone != nil {
			return v.gone
		}
		if try == 0 {
			lost = v.lost
		}
		maps.DeleteFunc(lost, func(key string, _ error) bool { return v.lost[key] == nil })
		if len(lost) == 0 {
			if v.compared == 0 {
				say("guard: nothing was compared, this machine is too noisy now; that is no failure")
			} else {
				say("guard: no ratio has lost more than it may")
			}
			return nil
		}
		for _, key := range slices.Sorted(maps.Keys(lost)) {
			lost[key] = v.lost[key]
			say("guard: measurement %d of %d: %v", try+1, tries, lost[key])
		}
	}
	var all []error
	for _, key := range slices.Sorted(maps.Keys(lost)) {
		all = append(all, lost[key])
	}
	return errors.Join(all...)
}

// compare says which ratios are worse than they may be.
func compare(f *figures, c committed, limit float64) verdict {
	v := verdict{lost: map[string]error{}}
	for _, name := range slices.Sorted(maps.Keys(c.Ratios)) {
		want, x := c.Ratios[name], f.by[name]
		switch {
		case x == nil:
			v.gone = errors.Join(v.gone, fmt.Errorf("%s: there is no such figure any more", name))
			continue
		case x.Refused != "":
			say("guard: %s is not compared: %s", name, x.Refused)
			continue
		case worse(x.Median, want, limit):
			v.lost[name] = fmt.Errorf("%s is %s (%s to %s); it was %s, and %.0f %% of that is the most that may be lost", name, number(x.Median), number(x.Min), number(x.Max), number(want.Value), 100*limit)
		default:
			say("guard: %s is %s, it was %s", name, number(x.Median), number(want.Value))
		}
		v.compared++
	}
	return v
}

func worse(now float64, was kept, limit float64) bool {
	if was.More {
		return now < was.Value*(1-limit)
	}
	return now > was.Value*(1+limit)
}

// keep writes the ratios of a file anew, with their values of now, on this machine.
func keep(path string, f *figures) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var c committed
	if err := json.Unmarshal(text, &c); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	c.Model = modelName()
	for name, k := range c.Ratios {
		x := f.by[name]
		if x == nil || x.Runs == 0 {
			return fmt.Errorf("%s was not measured, so no ratio is written", name)
		}
		k.Value = x.Median
		c.Ratios[name] = k
	}
	if text, err = json.MarshalIndent(c, "", "  "); err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
