package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/deploy"
)

// Every configuration that the chart writes is one that this program takes.
func TestDeployedConfig(t *testing.T) {
	for name, data := range deployed(t, "signet-ca") {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			ca := strings.Replace(data["ca.yaml"], "/etc/signet/policy.yaml", filepath.Join(dir, "policy.yaml"), 1)
			for name, text := range map[string]string{"policy.yaml": data["policy.yaml"], "ca.yaml": ca} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			l, err := load(filepath.Join(dir, "ca.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			if l.Development != (name == "development") || l.Directory.Kind != "kube" || l.Publish.Kube.Kubeconfig != "in-cluster" || l.Issuers[0].TokenReview.Kubeconfig != "in-cluster" {
				t.Errorf("%+v", l.config)
			}
		})
	}
}

// What the chart says of the records that its CA reads is so, in every rendering: by it an older version is kept away.
//
// threat: E23
func TestDeployedSchema(t *testing.T) {
	want := fmt.Sprintf("signet.dev/record-schema: %q", fmt.Sprint(journal.Schema))
	for name, text := range renderings(t) {
		found := 0
		for doc := range strings.SplitSeq(string(text), "---\n") {
			if strings.Contains(doc, "kind: StatefulSet\n") && strings.Contains(doc, "\n  annotations:\n    "+want) {
				found++
			}
		}
		if found != 1 {
			t.Errorf("%s: %d StatefulSets with %s", name, found, want)
		}
	}
}

// renderings are those of the chart that are on record.
func renderings(t *testing.T) map[string][]byte {
	t.Helper()
	installed, err := deploy.Install(deploy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	paths, err := filepath.Glob("../../deploy/testdata/*.rendered.yaml")
	if err != nil || len(paths) < 3 {
		t.Fatal(paths, err)
	}
	texts := map[string][]byte{"install": installed}
	for _, path := range paths {
		if texts[strings.TrimSuffix(filepath.Base(path), ".rendered.yaml")], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	return texts
}

// deployed is the data of a ConfigMap in each rendering of the chart that is on record.
func deployed(t *testing.T, configMap string) map[string]map[string]string {
	t.Helper()
	texts, found := renderings(t), map[string]map[string]string{}
	for name, text := range texts {
		for doc := range bytes.SplitSeq(text, []byte("---\n")) {
			var o struct {
				Kind     string
				Metadata struct{ Name string }
				Data     map[string]string
			}
			if err := yaml.Unmarshal(doc, &o); err != nil {
				t.Fatal(err)
			}
			if o.Kind == "ConfigMap" && o.Metadata.Name == configMap {
				found[name] = o.Data
			}
		}
	}
	if len(found) != len(texts) {
		t.Fatalf("ConfigMap %s is in %d of %d renderings", configMap, len(found), len(texts))
	}
	return found
}
