//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the page anew")

// A figure is its median, and none where the rounds are too few or too far apart.
func TestSettle(t *testing.T) {
	for name, tt := range map[string]struct {
		rounds      []float64
		any, single bool
		median      float64
	}{
		"median":        {[]float64{3, 1.9, 2}, true, false, 2},
		"too few":       {[]float64{2, 2}, false, false, 0},
		"too far apart": {[]float64{1, 2, 3}, false, false, 0},
		"any spread":    {[]float64{1, 2, 3}, true, false, 2},
		"close":         {[]float64{2, 2.2, 2.1}, false, false, 2.1},
		"once":          {[]float64{2}, false, true, 2},
		"not even once": {nil, false, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := &bench{figures: newFigures()}
			x := b.figures.declare("x", "", "")
			if x.spread = tt.any; tt.single {
				x.once()
			}
			for _, v := range tt.rounds {
				b.figures.add("x", v)
			}
			b.settle(3)
			if x.Median != tt.median || (x.Refused != "") != (tt.median == 0) || (x.Runs == 0) != (tt.median == 0) {
				t.Errorf("%+v, want %v", x, tt.median)
			}
			if err := b.figures.refused(); errors.Is(err, errNoisy) != (tt.median == 0) {
				t.Errorf("the run says %v", err)
			}
			var table bytes.Buffer
			if b.figures.print(&table); strings.Contains(table.String(), "REFUSED") != (tt.median == 0) {
				t.Errorf("the table does not say it:\n%s", &table)
			}
		})
	}
}

// A round that others disturbed is taken again, three times as often as wanted in all, and no figure is given without enough of them.
func TestRounds(t *testing.T) {
	for name, tt := range map[string]struct {
		quiet func(n int) bool
		tries int
		given bool
	}{
		"quiet":               {func(int) bool { return true }, 3, true},
		"one of two is noisy": {func(n int) bool { return n%2 == 0 }, 6, true},
		"noisy":               {func(int) bool { return false }, 9, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := &bench{options: options{rounds: 3}, figures: newFigures(), pause: func() {}}
			x, n := b.figures.declare("x", "", ""), 0
			err := b.rounds(func() (bool, error) {
				n++
				if !tt.quiet(n) {
					return false, nil
				}
				b.figures.add("x", 1)
				return true, nil
			})
			b.settle(3)
			if err != nil || n != tt.tries || (x.Refused == "") != tt.given {
				t.Errorf("%v after %d tries: %+v; want %d tries, a figure: %v", err, n, x, tt.tries, tt.given)
			}
		})
	}
}

func TestVerdict(t *testing.T) {
	for _, tt := range []struct {
		atLeast bool
		median  float64
		want    string
	}{{false, 1, "met"}, {false, 2, "MISSED"}, {false, 3, "MISSED"}, {true, 1, "MISSED"}, {true, 2, "met"}, {true, 3, "met"}} {
		x := &figure{Goal: new(2.0), AtLeast: tt.atLeast, Median: tt.median, Runs: 3}
		if got := x.Verdict(); got != tt.want {
			t.Errorf("%v with a goal of 2, at least: %v, is %q, want %q", tt.median, tt.atLeast, got, tt.want)
		}
		if x.Refused = "noise"; x.Verdict() != "not measured" {
			t.Errorf("a refused figure is %q", x.Verdict())
		}
	}
	if got := (&figure{Median: 1}).Verdict(); got != "" {
		t.Errorf("a figure without a goal is %q", got)
	}
}

// The file has the keys of the goals whatever was asked for, and each member of a figure that others read.
func TestDocument(t *testing.T) {
	f := newFigures()
	f.bench = "idle"
	f.declare("idle_5000_cores", "processor time", "processors").below(0.02)
	f.declare("issue_8x1_svids", "more", "SVIDs a second")
	for _, v := range []float64{1.9, 2, 2.1} {
		f.add("issue_8x1_svids", v)
		f.add("idle_5000_cores", v/1000)
	}
	for _, x := range f.list {
		x.settle(3)
	}
	text, err := document{about{Model: "x"}, f}.encode()
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]map[string]any
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatalf("%v:\n%s", err, text)
	}
	want := slices.Concat(goals, []string{aboutKey, "issue_8x1_svids"})
	if got := slices.Sorted(maps.Keys(doc)); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
		t.Errorf("keys %q, want %q", got, want)
	}
	for key, x := range doc {
		for _, member := range []string{"median", "min", "max", "runs"} {
			if _, ok := x[member].(float64); !ok && key != aboutKey {
				t.Errorf("%s has no %s", key, member)
			}
		}
	}
	if x := doc["idle_5000_cores"]; x["median"] != 0.002 || x["runs"] != 3.0 || x["goal"] != 0.02 {
		t.Errorf("got %v", x)
	}
	again, err := decodeDocument(text)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := again.encode(); err != nil || !bytes.Equal(second, text) {
		t.Errorf("read and written again it is another, %v:\n%s", err, second)
	}
	for _, bad := range []string{"", "[]", "{", `{"x": 1}`, `{"x": {}`} {
		if _, err := decodeDocument([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

// What is committed: docs/benchmarks.md is what follows from docs/benchmarks.json, which has every goal, and the guard's
// ratios are ratios.
func TestCommitted(t *testing.T) {
	docs := filepath.Join("..", "..", "docs")
	text, err := os.ReadFile(filepath.Join(docs, "benchmarks.json"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := decodeDocument(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range goals {
		if x := d.by[key]; x == nil || x.Goal == nil {
			t.Errorf("%s, or its goal, is not in docs/benchmarks.json", key)
		}
	}
	want, err := d.render()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(docs, "benchmarks.md")
	if *update {
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
		t.Errorf("docs/benchmarks.md does not follow from docs/benchmarks.json (%v); `go test ./integration/bench -run TestCommitted -update` writes it anew", err)
	}
	var c committed
	if text, err = os.ReadFile(filepath.Join("testdata", "ratios.json")); err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err != nil || len(c.Ratios) == 0 || c.Model == "" {
		t.Fatalf("no ratios are committed: %v", err)
	}
	for key, k := range c.Ratios {
		x := d.by[key]
		if x == nil || x.Unit != "share" && x.Unit != "ratio" {
			t.Errorf("the guard compares %s, which is no ratio", key)
		}
		if x != nil && !slices.Contains(short, x.Bench) {
			t.Errorf("the guard compares %s, which the short form does not measure", key)
		}
		if k.Value <= 0 || k.More != (x != nil && x.Unit == "share") {
			t.Errorf("the guard would have %s go the wrong way: %+v", key, k)
		}
	}
}

func TestRender(t *testing.T) {
	f := newFigures()
	f.bench = "issuance"
	f.declare("issue_grpc_of_ceiling", "the main one", "share").atLeast(0.60)
	f.declare("issue_64x1_svids", "64 clients", "SVIDs a second")
	f.bench = "herd"
	f.declare("herd_p99_ms", "the last of the herd", "ms")
	f.list[0].Median, f.list[0].Min, f.list[0].Max, f.list[0].Runs = 0.7, 0.65, 0.75, 5
	f.list[1].Median, f.list[1].Min, f.list[1].Max, f.list[1].Runs = 12345, 12000, 13000, 5
	f.list[2].Refused = "it was noisy"
	text, err := document{about{Date: "2026-01-02", Processors: 2, Server: 1, Model: "Some CPU", Kernel: "Linux 6", Go: "go1.26"}, f}.encode()
	if err != nil {
		t.Fatal(err)
	}
	d, err := decodeDocument(text)
	if err != nil {
		t.Fatal(err)
	}
	md, err := d.render()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"Measured on 2026-01-02", "Some CPU", "| `issue_grpc_of_ceiling` | the main one | ≥ 0.6 | 0.7 | 0.65 to 0.75 | met |",
		"| 64 | 1 | 12,345 |", "## A herd after an outage", "refused: it was noisy", "| `fanout_10k_ms` |  |  | refused: not asked for |  |",
	} {
		if !strings.Contains(string(md), want) {
			t.Errorf("the page does not say %q:\n%s", want, md)
		}
	}
}

func TestNumbers(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.00004123: "0.0000412", 0.123456: "0.123", 12.34: "12.3", 999.9: "999.9", 1234.5: "1,234", 1234567: "1,234,567", 123: "123.0", -1234: "-1,234"} {
		if got := grouped(v); got != want {
			t.Errorf("%v is %q, want %q", v, got, want)
		}
	}
}

func TestParse(t *testing.T) {
	for args, want := range map[string]string{
		"": "", "--short": "", "--only issuance,idle": "", "--rounds 2": "--rounds", "--only nothing": "nothing", "x": "unexpected", "--keep": "--guard",
	} {
		_, err := parse(strings.Fields(args))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", args, err, want)
		}
	}
	for _, name := range short {
		if !slices.ContainsFunc(benches, func(b benchmark) bool { return b.name == name }) {
			t.Errorf("the short form has %s, which there is not", name)
		}
	}
}
