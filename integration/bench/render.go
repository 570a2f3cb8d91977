//go:build linux

package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/template"
)

// page is docs/benchmarks.md without its figures.
//
//go:embed page.md.tmpl
var page string

// headings are the chapters of the page, by bench; a bench that has none is told under its name.
var headings = map[string]string{
	"issuance":    "Issuance over gRPC",
	"inprocess":   "Issuance without a network",
	"attestation": "Attestation against a key set",
	"review":      "Attestation with a TokenReview",
	"sds":         "The first secret of a proxy",
	"fanout":      "A new bundle to all streams, and what an agent costs",
	"svids":       "New SVIDs to all streams",
	"herd":        "A herd after an outage",
	"idle":        "5,000 idle agents",
	"rotation":    "A rotation of 1,000 agents with 50,000 workloads",
	"drill":       "A root is compromised: 1,000 workloads on 20 agents",
	"replace":     "1,000 SVIDs of one agent replaced",
}

// chapter is a bench on the page.
type chapter struct {
	Title string
	Loads []load4   // issuance's
	Rest  []*figure // all others
}

// load4 is a row of issuance: one kind of load.
type load4 struct {
	Clients, CSRs int
	SVIDs         *figure
	Ceiling       *figure
	Unchecked     *figure
	CPU           *figure
	P50, P99      *figure
}

// renderFile prints the page of a file of figures, or writes it to out.
func renderFile(file, out string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	d, err := decodeDocument(text)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	md, err := d.render()
	if err != nil {
		return err
	}
	if out == "" {
		_, err = os.Stdout.Write(md)
		return err
	}
	return os.WriteFile(out, md, 0o644)
}

// render makes the page.
func (d document) render() ([]byte, error) {
	t, err := template.New("page").Funcs(template.FuncMap{"span": rangeOf, "grouped": grouped, "value": value, "cell": cell}).Parse(page)
	if err != nil {
		return nil, err
	}
	var all []*chapter
	var names []string
	for _, x := range d.list {
		i := slices.Index(names, x.Bench)
		if i < 0 {
			if x.Refused == notAsked {
				continue
			}
			i = len(names)
			title := headings[x.Bench]
			if title == "" {
				title = strings.ToUpper(x.Bench[:min(1, len(x.Bench))]) + x.Bench[min(1, len(x.Bench)):]
			}
			names, all = append(names, x.Bench), append(all, &chapter{Title: title})
		}
		if !slices.Contains(goals, x.Key) && !all[i].load(x) {
			all[i].Rest = append(all[i].Rest, x)
		}
	}
	var aims []*figure
	for _, key := range goals {
		if x := d.by[key]; x != nil {
			aims = append(aims, x)
		}
	}
	var out bytes.Buffer
	err = t.Execute(&out, struct {
		About    about
		Goals    []*figure
		Chapters []*chapter
	}{d.about, aims, all})
	return out.Bytes(), err
}

// load files a figure of one kind of load, by its key, and says whether it is one.
func (c *chapter) load(x *figure) bool {
	var clients, csrs int
	rest, ok := strings.CutPrefix(x.Key, "issue_")
	if n, _ := fmt.Sscanf(rest, "%dx%d", &clients, &csrs); !ok || n != 2 {
		return false
	}
	i := slices.IndexFunc(c.Loads, func(l load4) bool { return l.Clients == clients && l.CSRs == csrs })
	if i < 0 {
		i = len(c.Loads)
		c.Loads = append(c.Loads, load4{Clients: clients, CSRs: csrs})
	}
	l := &c.Loads[i]
	_, suffix, _ := strings.Cut(rest, "_")
	field, ok := map[string]**figure{
		"svids": &l.SVIDs, "of_ceiling": &l.Ceiling, "of_ceiling_unchecked": &l.Unchecked, "cpu_us": &l.CPU, "p50_ms": &l.P50, "p99_ms": &l.P99,
	}[suffix]
	if ok {
		*field = x
	}
	return ok
}

// value is a figure's median, with its unit.
func value(x *figure) string {
	if x.Refused != "" {
		return "refused: " + x.Refused
	}
	unit := x.Unit
	if unit == "share" || unit == "ratio" {
		unit = ""
	}
	return strings.TrimSpace(grouped(x.Median) + " " + unit)
}

// cell is a figure's median alone.
func cell(x *figure) string {
	if x == nil || x.Refused != "" {
		return "refused"
	}
	return grouped(x.Median)
}

// rangeOf is the least and the largest of a figure's rounds.
func rangeOf(x *figure) string {
	switch {
	case x.Refused != "":
		return ""
	case x.Runs == 1:
		return "taken once"
	}
	return grouped(x.Min) + " to " + grouped(x.Max)
}

// grouped is number with commas between thousands.
func grouped(v float64) string { return commas(number(v)) }
