//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// measured are figures with these rounds.
func measured(t *testing.T, rounds map[string][]float64) *figures {
	t.Helper()
	b := &bench{figures: newFigures()}
	for key, all := range rounds {
		b.figures.declare(key, "", "")
		for _, v := range all {
			b.figures.add(key, v)
		}
	}
	b.settle(3)
	return b.figures
}

func TestCompare(t *testing.T) {
	c := committed{Ratios: map[string]kept{"share": {0.5, true}, "cost": {2, false}}}
	for name, tt := range map[string]struct {
		share, cost []float64
		limit       float64
		lost        []string
		compared    int
	}{
		"as before":           {[]float64{0.5, 0.49, 0.51}, []float64{2, 2.1, 1.9}, loss, nil, 2},
		"a little worse":      {[]float64{0.41, 0.41, 0.42}, []float64{2.3, 2.3, 2.35}, loss, nil, 2},
		"better":              {[]float64{0.9, 0.9, 0.9}, []float64{1, 1, 1}, loss, nil, 2},
		"a share lost":        {[]float64{0.39, 0.39, 0.39}, []float64{2, 2, 2}, loss, []string{"share"}, 2},
		"a cost grown":        {[]float64{0.5, 0.5, 0.5}, []float64{2.5, 2.5, 2.5}, loss, []string{"cost"}, 2},
		"both":                {[]float64{0.1, 0.1, 0.1}, []float64{9, 9, 9}, loss, []string{"cost", "share"}, 2},
		"too few rounds":      {[]float64{0.1}, []float64{9}, loss, nil, 0},
		"too far apart":       {[]float64{0.1, 0.5, 0.1}, []float64{1, 9, 9}, loss, nil, 0},
		"one is too noisy":    {[]float64{0.1, 0.5, 0.1}, []float64{9, 9, 9}, loss, []string{"cost"}, 1},
		"nothing is left":     {[]float64{0, 0, 0}, []float64{2, 2, 2}, loss, []string{"share"}, 2},
		"another processor":   {[]float64{0.3, 0.3, 0.3}, []float64{2.9, 2.9, 2.9}, lossElsewhere, nil, 2},
		"another, and a loss": {[]float64{0.2, 0.2, 0.2}, []float64{3.1, 3.1, 3.1}, lossElsewhere, []string{"cost", "share"}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			v := compare(measured(t, map[string][]float64{"share": tt.share, "cost": tt.cost}), c, tt.limit)
			if got := slices.Sorted(maps.Keys(v.lost)); !slices.Equal(got, tt.lost) || v.compared != tt.compared || v.gone != nil {
				t.Errorf("lost %q of %d, %v; want %q of %d", got, v.compared, v.gone, tt.lost, tt.compared)
			}
		})
	}
}

func TestCompareGone(t *testing.T) {
	v := compare(measured(t, nil), committed{Ratios: map[string]kept{"share": {0.5, true}}}, loss)
	if v.gone == nil {
		t.Error("a ratio that nothing measures any more is not missed")
	}
}

// A loss counts only if the same ratio is worse each time that it is measured; noise never does.
func TestConfirm(t *testing.T) {
	failed := errors.New("failed")
	for name, tt := range map[string]struct {
		lost     [][]string // of each measurement
		gone     bool
		fails    bool
		measured int
	}{
		"none":                  {lost: [][]string{nil}, measured: 1},
		"once":                  {lost: [][]string{{"a"}, nil}, measured: 2},
		"twice":                 {lost: [][]string{{"a"}, {"a"}, nil}, measured: 3},
		"each time":             {lost: [][]string{{"a"}, {"a"}, {"a"}}, fails: true, measured: 3},
		"another one each time": {lost: [][]string{{"a"}, {"b"}}, measured: 2},
		"one of two":            {lost: [][]string{{"a", "b"}, {"b"}, {"b"}}, fails: true, measured: 3},
		"a key is gone":         {lost: [][]string{nil}, gone: true, fails: true, measured: 1},
	} {
		t.Run(name, func(t *testing.T) {
			n := 0
			err := confirm(3, func() (*figures, error) { n++; return newFigures(), nil }, func(*figures) verdict {
				v := verdict{lost: map[string]error{}}
				for _, key := range tt.lost[n-1] {
					v.lost[key] = failed
				}
				if tt.gone {
					v.gone = failed
				}
				return v
			})
			if errors.Is(err, failed) != tt.fails || n != tt.measured {
				t.Errorf("%v after %d measurements, want a failure: %v after %d", err, n, tt.fails, tt.measured)
			}
		})
	}
	if err := confirm(3, func() (*figures, error) { return nil, failed }, nil); !errors.Is(err, failed) {
		t.Errorf("got %v of a measurement that failed", err)
	}
}

// The committed ratios are those of figures that the short form measures, and ratios.
func TestKeep(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ratios.json")
	if err := os.WriteFile(path, []byte(`{"model": "old", "ratios": {"share": {"value": 0.1, "more": true}, "cost": {"value": 1}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := keep(path, measured(t, map[string][]float64{"share": {0.5, 0.5, 0.5}})); err == nil {
		t.Error("kept without one of them")
	}
	if err := keep(path, measured(t, map[string][]float64{"share": {0.5, 0.5, 0.5}, "cost": {2, 2, 2}, "other": {1, 1, 1}})); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var c committed
	if err := json.Unmarshal(text, &c); err != nil {
		t.Fatal(err)
	}
	if want := map[string]kept{"share": {0.5, true}, "cost": {2, false}}; !maps.Equal(c.Ratios, want) || c.Model != modelName() {
		t.Errorf("kept %+v, want %v", c, want)
	}
}
