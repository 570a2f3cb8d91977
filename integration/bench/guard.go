//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
)

// loss is how much worse than its committed value a ratio may be.
const loss = 0.20

// committed is one ratio that is kept: its value when it was last written down, and whether more of it is better.
type committed struct {
	Value float64 `json:"value"`
	More  bool    `json:"more,omitempty"`
}

// guard compares ratios with those of a file, and says which have become worse by more than a fifth. What could not be
// measured on this machine is said and no failure: a guard that cries at noise is not heard.
func (f *figures) guard(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var all map[string]committed
	if err := json.Unmarshal(text, &all); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	var lost []error
	var names []string
	for name := range all {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		want, x := all[name], f.by[name]
		switch {
		case x == nil:
			lost = append(lost, fmt.Errorf("%s: there is no such figure any more", name))
		case x.Refused != "":
			fmt.Fprintf(os.Stderr, "bench: %s is not compared: %s\n", name, x.Refused)
		case worse(x.Median, want):
			lost = append(lost, fmt.Errorf("%s is %s (%s to %s); it was %s, and a fifth of that is the most that may be lost", name, number(x.Median), number(x.Min), number(x.Max), number(want.Value)))
		default:
			fmt.Fprintf(os.Stderr, "bench: %s is %s, it was %s\n", name, number(x.Median), number(want.Value))
		}
	}
	return errors.Join(lost...)
}

func worse(now float64, was committed) bool {
	if was.More {
		return now < was.Value*(1-loss)
	}
	return now > was.Value*(1+loss)
}
