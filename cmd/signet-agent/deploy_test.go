package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/signet-ca/signet/deploy"
)

// Every configuration that the chart writes is one that this program takes.
func TestDeployedConfig(t *testing.T) {
	t.Setenv("NODE_NAME", "node-1")
	for name, data := range deployed(t, "signet-agent") {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "agent.yaml")
			if err := os.WriteFile(path, []byte(data["agent.yaml"]), 0o600); err != nil {
				t.Fatal(err)
			}
			l, err := load(path)
			if err != nil {
				t.Fatal(err)
			}
			if l.Development != (name == "development") || l.CSI == nil || l.CSI.Driver != "csi.signet.dev" || l.Node != "node-1" || l.Cache.Dir == "" {
				t.Errorf("%+v", l.config)
			}
		})
	}
}

// deployed is the data of a ConfigMap in each rendering of the chart that is on record.
func deployed(t *testing.T, configMap string) map[string]map[string]string {
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
	found := map[string]map[string]string{}
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
