package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v3"

	"github.com/signet-ca/signet/ca"
)

// alertGroups is a file of rules, as Prometheus reads it.
type alertGroups struct {
	Groups []struct {
		Name  string      `yaml:"name"`
		Rules []alertRule `yaml:"rules"`
	} `yaml:"groups"`
}

type alertRule struct {
	Alert       string            `yaml:"alert"`
	Expr        string            `yaml:"expr"`
	For         string            `yaml:"for"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

var (
	metricWord = regexp.MustCompile(`signet_[a-z0-9_]+`)
	fqName     = regexp.MustCompile(`fqName: "([a-z0-9_]+)"`)
	pageLink   = regexp.MustCompile(`\]\(([a-z-]+\.md)(?:#([a-z0-9-]+))?\)`)
	notInSlug  = regexp.MustCompile(`[^a-z0-9 -]`)
)

// TestAlerts reads the rules of docs/alerts.md as they are: each has a severity, a summary and a line that says what to do, is about
// metrics that the CA has, and leads to pages and headings that are there.
func TestAlerts(t *testing.T) {
	page, err := os.ReadFile("../../docs/alerts.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(page), "```yaml\n")
	block, _, _ = strings.Cut(block, "```")
	dec := yaml.NewDecoder(strings.NewReader(block))
	dec.KnownFields(true)
	var rules alertGroups
	if err := dec.Decode(&rules); err != nil || len(rules.Groups) != 1 || len(rules.Groups[0].Rules) < 9 {
		t.Fatalf("%d groups: %v", len(rules.Groups), err)
	}
	known := caMetrics()
	for _, r := range rules.Groups[0].Rules {
		t.Run(r.Alert, func(t *testing.T) {
			names := metricWord.FindAllString(r.Expr, -1)
			if len(names) == 0 || !slices.Contains([]string{"warning", "critical"}, r.Labels["severity"]) || r.Annotations["summary"] == "" {
				t.Errorf("%+v", r)
			}
			for _, name := range names {
				if !slices.Contains(known, name) {
					t.Errorf("the CA has no metric %s", name)
				}
			}
			if n := strings.Count(string(page), "| `"+r.Alert+"` |"); n != 1 {
				t.Errorf("%d lines say what to do", n)
			}
		})
	}
	for _, link := range pageLink.FindAllStringSubmatch(string(page), -1) {
		if !hasHeading(t, link[1], link[2]) {
			t.Errorf("%s has no heading #%s", link[1], link[2])
		}
	}
}

// caMetrics are the names of the CA's own metrics.
func caMetrics() (names []string) {
	descs := make(chan *prometheus.Desc, 256)
	ca.NewMetrics().Describe(descs)
	close(descs)
	for d := range descs {
		names = append(names, fqName.FindStringSubmatch(d.String())[1])
	}
	return names
}

// hasHeading reports whether a page is there, and has a heading with that anchor; empty: any.
func hasHeading(t *testing.T, page, anchor string) bool {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("../../docs", page))
	if err != nil {
		t.Error(err)
		return true
	}
	for line := range strings.Lines(string(data)) {
		if title, ok := strings.CutPrefix(strings.TrimSpace(line), "## "); ok {
			if slug := strings.ReplaceAll(notInSlug.ReplaceAllString(strings.ToLower(title), ""), " ", "-"); slug == anchor {
				return true
			}
		}
	}
	return anchor == ""
}
