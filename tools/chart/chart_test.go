package main

import (
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/common"

	"github.com/signet-ca/signet/deploy"
)

var update = flag.Bool("update", false, "write the renderings instead of comparing them")

const (
	chartDir   = "../../deploy/chart/signet"
	installDir = "../../deploy/install"
	goldenDir  = "../../deploy/testdata"
)

// nested makes {"a": {"b": v}} of "a.b".
func nested(pairs ...string) map[string]any {
	top := map[string]any{}
	for i := 0; i < len(pairs); i += 2 {
		at, keys := top, strings.Split(pairs[i], ".")
		for _, k := range keys[:len(keys)-1] {
			next, ok := at[k].(map[string]any)
			if !ok {
				next = map[string]any{}
				at[k] = next
			}
			at = next
		}
		at[keys[len(keys)-1]] = pairs[i+1]
	}
	return top
}

// installValues are the chart's values of a rendering by `signet install`.
func installValues(pairs ...string) map[string]any {
	values := nested(pairs...)
	values["namespace"] = map[string]any{"create": true}
	return values
}

// What `signet install` prints from is the chart's rendering, with marks.
func TestInstallRendering(t *testing.T) {
	files, hooks, err := render(chartDir, deploy.Namespace, installValues(
		"trustDomain", "@TRUST_DOMAIN@", "issuer", "@ISSUER@", "image.repository", "@REPOSITORY@", "image.tag", "@TAG@",
		"image.pullPolicy", "@PULL_POLICY@", "agent.kubeletDir", "@KUBELET_DIR@"), true)
	if err != nil {
		t.Fatal(err)
	}
	if len(hooks) == 0 {
		t.Error("Helm's hooks are not told from what kubectl is to make")
	}
	var digests []string
	for _, f := range files {
		sum := sha256.Sum256([]byte(f.text))
		digests = append(digests, hex.EncodeToString(sum[:]), "@SHA256:"+f.name+"@")
	}
	marks := strings.NewReplacer(digests...)
	want := map[string]string{}
	for _, f := range files {
		want[fmt.Sprintf("%d-%s", f.rank(), f.name)] = marks.Replace(f.text)
	}
	golden(t, installDir, ".yaml", want)
}

// What the chart yields with other values; deploy's own tests read it.
func TestGolden(t *testing.T) {
	given, err := filepath.Glob(filepath.Join(goldenDir, "*.values.yaml"))
	if err != nil || len(given) == 0 {
		t.Fatal(given, err)
	}
	want, wantHooks := map[string]string{}, map[string]string{}
	for _, path := range given {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		values, err := common.ReadValues(data)
		if err != nil {
			t.Fatal(err)
		}
		files, hooks, err := render(chartDir, deploy.Namespace, values, false)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(filepath.Base(path), ".values.yaml")
		want[name+".rendered.yaml"] = text(files)
		if len(hooks) > 0 {
			wantHooks[name+".hooks.yaml"] = text(hooks)
		}
	}
	golden(t, goldenDir, ".rendered.yaml", want)
	golden(t, goldenDir, ".hooks.yaml", wantHooks)
}

// golden compares the files of a folder with that suffix, all of them, or writes them.
func golden(t *testing.T, dir, suffix string, want map[string]string) {
	t.Helper()
	there, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range there {
		if _, ok := want[filepath.Base(path)]; ok {
			continue
		}
		if !*update {
			t.Errorf("%s is left over; run make generate", path)
		} else if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	if *update {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range want {
		path := filepath.Join(dir, name)
		if *update {
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != text {
			t.Errorf("%s is not what the chart yields; run make generate (%v)", path, err)
		}
	}
}

// The namespace of the operators' ServiceAccounts is closed to pods, so it is none where pods run.
func TestOperatorsNamespace(t *testing.T) {
	for namespace, refused := range map[string]bool{
		"signet-operators": false, "people": false, "kubernetes-people": false, "default-people": false,
		deploy.Namespace: true, "default": true, "kube-system": true, "kube-public": true, "kube-node-lease": true,
	} {
		t.Run(namespace, func(t *testing.T) {
			_, _, err := render(chartDir, deploy.Namespace, nested("operators.namespace", namespace), false)
			if refused != (err != nil) || refused && !strings.Contains(err.Error(), "operators.namespace") {
				t.Error(err)
			}
		})
	}
	values := nested("operators.namespace", "default")
	values["operators"].(map[string]any)["enabled"] = false
	if _, _, err := render(chartDir, deploy.Namespace, values, false); err != nil {
		t.Error(err)
	}
}

// With the same values, `signet install` and Helm print the same bytes, or both refuse.
func TestInstallAsHelm(t *testing.T) {
	long := strings.Repeat("a", 300)
	for _, tc := range []struct {
		name    string
		o       deploy.Options
		refused bool
	}{
		{name: "defaults"},
		{name: "all", o: deploy.Options{
			TrustDomain: "prod.example.org", Issuer: "https://oidc.eks.eu-west-1.amazonaws.com/id/0123ABC", Repository: "registry.example.org:5000/team/signet",
			Tag: "v1.2.3", PullPolicy: "Always", KubeletDir: "/var/snap/microk8s/common/var/lib/kubelet",
		}},
		// What YAML would take for something else than text, were it not quoted.
		{name: "numbers and words", o: deploy.Options{TrustDomain: "1.20", Repository: "5", Tag: "1e3", KubeletDir: "/1"}},
		{name: "null", o: deploy.Options{TrustDomain: "null", Repository: "true", Tag: "no", PullPolicy: "Never"}},
		{name: "dashes", o: deploy.Options{TrustDomain: "a--b", Tag: "_.-", KubeletDir: "/.k/-"}},
		{name: "a trailing slash is the issuer's", o: deploy.Options{Issuer: "https://oidc.prod-aks.azure.com/0f/"}},
		{name: "as long as can be", o: deploy.Options{TrustDomain: long[:253], Tag: long[:128], KubeletDir: "/" + long[:63], Repository: long[:200]}},

		{name: "too long a trust domain", o: deploy.Options{TrustDomain: long[:254]}, refused: true},
		{name: "a trust domain after which no ClusterTrustBundle can be named", o: deploy.Options{TrustDomain: "a_b"}, refused: true},
		{name: "a trust domain in capitals", o: deploy.Options{TrustDomain: "Example.org"}, refused: true},
		{name: "a SPIFFE ID", o: deploy.Options{TrustDomain: "spiffe://example.org"}, refused: true},
		{name: "a quote", o: deploy.Options{TrustDomain: `a"b`}, refused: true},
		{name: "a new line", o: deploy.Options{TrustDomain: "a\nb"}, refused: true},
		{name: "a new line at the end", o: deploy.Options{Tag: "v1\n"}, refused: true},
		{name: "a mark", o: deploy.Options{Tag: "@TRUST_DOMAIN@"}, refused: true},
		{name: "http", o: deploy.Options{Issuer: "http://kubernetes"}, refused: true},
		{name: "an issuer with a quote", o: deploy.Options{Issuer: `https://a"`}, refused: true},
		{name: "a repository with a scheme", o: deploy.Options{Repository: "https://registry"}, refused: true},
		{name: "a repository with a slash at the end", o: deploy.Options{Repository: "registry/"}, refused: true},
		{name: "a tag with a digest", o: deploy.Options{Tag: "v1@sha256:0"}, refused: true},
		{name: "a policy that is none", o: deploy.Options{PullPolicy: "always"}, refused: true},
		{name: "a relative folder", o: deploy.Options{KubeletDir: "kubelet"}, refused: true},
		{name: "the root", o: deploy.Options{KubeletDir: "/"}, refused: true},
		{name: "a folder above", o: deploy.Options{KubeletDir: "/var/../lib"}, refused: true},
		{name: "a slash at the end", o: deploy.Options{KubeletDir: "/var/lib/kubelet/"}, refused: true},
		{name: "too long a folder for sockets", o: deploy.Options{KubeletDir: "/" + long[:64]}, refused: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var pairs []string
			for key, value := range map[string]string{
				"trustDomain": tc.o.TrustDomain, "issuer": tc.o.Issuer, "image.repository": tc.o.Repository, "image.tag": tc.o.Tag,
				"image.pullPolicy": tc.o.PullPolicy, "agent.kubeletDir": tc.o.KubeletDir,
			} {
				if value != "" {
					pairs = append(pairs, key, value)
				}
			}
			got, err := deploy.Install(tc.o)
			files, _, herr := render(chartDir, deploy.Namespace, installValues(pairs...), false)
			if (err != nil) != tc.refused || (herr != nil) != tc.refused {
				t.Fatalf("signet install: %v\nhelm: %v", err, herr)
			}
			if tc.refused {
				return
			}
			if string(got) != text(files) {
				t.Errorf("signet install prints another thing than Helm:\n%s", got)
			}
		})
	}
}
