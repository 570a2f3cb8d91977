//go:build linux

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestGuard(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ratios.json")
	if err := os.WriteFile(file, []byte(`{"share": {"value": 0.5, "more": true}, "cost": {"value": 2}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		share, cost []float64
		want        []string // in the error
	}{
		"as before":          {[]float64{0.5, 0.49, 0.51}, []float64{2, 2.1, 1.9}, nil},
		"a little worse":     {[]float64{0.41, 0.41, 0.42}, []float64{2.3, 2.3, 2.35}, nil},
		"better":             {[]float64{0.9, 0.9, 0.9}, []float64{1, 1, 1}, nil},
		"a share lost":       {[]float64{0.39, 0.39, 0.39}, []float64{2, 2, 2}, []string{"share is 0.39"}},
		"a cost grown":       {[]float64{0.5, 0.5, 0.5}, []float64{2.5, 2.5, 2.5}, []string{"cost is 2.5"}},
		"both":               {[]float64{0.1, 0.1, 0.1}, []float64{9, 9, 9}, []string{"share", "cost"}},
		"too few rounds":     {[]float64{0.1}, []float64{9}, nil},
		"too far apart":      {[]float64{0.1, 0.5, 0.1}, []float64{1, 9, 9}, nil},
		"nothing is too far": {[]float64{0, 0, 0}, []float64{2, 2, 2}, []string{"share is 0"}},
	} {
		t.Run(name, func(t *testing.T) {
			b := &bench{figures: newFigures()}
			b.figures.declare("share", "", "")
			b.figures.declare("cost", "", "")
			for _, v := range tt.share {
				b.figures.add("share", v)
			}
			for _, v := range tt.cost {
				b.figures.add("cost", v)
			}
			b.settle(3)
			err := b.figures.guard(file)
			if (err == nil) != (tt.want == nil) {
				t.Fatalf("error %v, want %q", err, tt.want)
			}
			for _, part := range tt.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error %v does not say %q", err, part)
				}
			}
		})
	}
}

// A figure is its median, and none where the rounds are too few or too far apart.
func TestSettle(t *testing.T) {
	for name, tt := range map[string]struct {
		rounds []float64
		any    bool
		median float64
	}{
		"median":        {[]float64{3, 1.9, 2}, true, 2},
		"too few":       {[]float64{2, 2}, false, 0},
		"too far apart": {[]float64{1, 2, 3}, false, 0},
		"any spread":    {[]float64{1, 2, 3}, true, 2},
		"close":         {[]float64{2, 2.2, 2.1}, false, 2.1},
	} {
		t.Run(name, func(t *testing.T) {
			b := &bench{figures: newFigures()}
			x := b.figures.declare("x", "", "")
			if tt.any {
				x.anySpread()
			}
			for _, v := range tt.rounds {
				b.figures.add("x", v)
			}
			b.settle(3)
			if x.Median != tt.median || (x.Refused != "") != (tt.median == 0) {
				t.Errorf("%+v, want %v", x, tt.median)
			}
			if (b.figures.refused() != nil) != (tt.median == 0) {
				t.Error("the run does not say whether a figure is missing")
			}
		})
	}
}
