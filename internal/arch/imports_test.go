package arch

import (
	"path"
	"slices"
	"strings"
	"testing"
)

// anything stands for "what it wires": commands, harnesses and test packages are the places where parts meet.
const anything = "*"

// allowed is the house: what each package of ours may import of our packages, leaf first. A package without a row fails,
// so a new package, like a new arrow, is a decision. "api" stands for api and api/v1.
var allowed = []struct {
	pkg string
	may []string
}{
	{"api", nil},
	{"api/v1", nil},
	{"internal/latest", nil},
	{"internal/run", nil},
	{"internal/metrics", nil}, // collectors as one
	{"internal/durable", nil},
	{"internal/strictyaml", nil},
	{"internal/kube", nil},
	{"internal/arch", nil},
	{"internal/audit", []string{"internal/durable"}},
	{"internal/ready", nil},
	{"internal/daemon", []string{"api", "internal/ready", "internal/run"}}, // what the two servers' processes do alike
	{"internal/wycheproof", nil}, // vectors, for tests
	{"internal/envoy", nil},      // real Envoys, for the demo and the integration tests
	{"attestor", []string{"api"}},
	{"ca/issuance", []string{"api"}},
	{"ca/journal", []string{"api"}},
	{"ca", []string{"api", "attestor", "ca/issuance", "ca/journal", "internal/audit", "internal/latest", "internal/metrics", "internal/run"}},
	{"ca/store", []string{"api", "ca", "ca/issuance", "ca/journal", "internal/durable", "internal/kube", "internal/strictyaml"}},
	{"ca/upstream", []string{"api", "ca", "ca/issuance", "ca/journal", "internal/durable", "internal/kube", "internal/strictyaml"}},
	{"ca/cluster", []string{"api", "ca", "ca/journal", "internal/durable", "internal/kube", "internal/latest", "internal/metrics", "internal/run"}},
	{"sds", []string{"api", "internal/latest"}},
	{"agent", []string{"api", "attestor", "internal/durable", "internal/latest", "internal/metrics", "internal/run"}},
	{"agent/csi", []string{"api", "internal/durable", "internal/latest", "internal/metrics", "internal/run"}},
	{"agent/workloadapi", []string{"api", "internal/durable", "internal/latest", "internal/ready", "internal/run"}},
	{"migrate", []string{"api"}},
	{"deploy", nil},
	{"internal/canary", nil},                         // finds secrets where none belong, for tests
	{"scripts/testsum", []string{"internal/canary"}}, // counts tests for the Makefile
	{"cmd/signet", []string{anything}},
	{"cmd/signet/demo", []string{anything}},
	{"cmd/signet-ca", []string{anything}},
	{"cmd/signet-agent", []string{anything}},
}

// nobody tells of the packages that nothing imports outside tests, but for the arrows of exceptions.
func nobody(pkg string) bool {
	return under(pkg, "cmd") || under(pkg, "scripts") || under(pkg, "integration") || isTestPackage(pkg)
}

var exceptions = map[[2]string]string{
	{"cmd/signet", "cmd/signet/demo"}:            "a part of the command, in a folder of its own",
	{"cmd/signet/demo", "attestor/attestortest"}: "the demo signs the tokens that a cluster would sign",

	{"integration/nodes", "integration/controlplane"}: "the nodes of that control plane",
	{"integration/bench", "integration/controlplane"}: "its API server reviews the tokens",
}

// isTestPackage tells the packages that put real parts in memory for the tests of others: ca/catest, attestor/attestortest.
func isTestPackage(pkg string) bool {
	return path.Base(pkg) == path.Base(path.Dir(pkg))+"test"
}

// mayImport returns the row of a package and whether there is one.
func mayImport(pkg string) ([]string, bool) {
	if under(pkg, "integration") || isTestPackage(pkg) {
		return []string{anything}, true
	}
	for _, row := range allowed {
		if row.pkg == pkg {
			return row.may, true
		}
	}
	return nil, false
}

func arrowAllowed(from, to string) bool {
	if _, ok := exceptions[[2]string{from, to}]; ok {
		return true
	}
	if nobody(to) && !(isTestPackage(to) && (under(from, "integration") || isTestPackage(from))) {
		return false
	}
	may, _ := mayImport(from)
	return slices.Contains(may, anything) || slices.Contains(may, to) || to == "api/v1" && slices.Contains(may, "api")
}

func TestImports(t *testing.T) {
	for _, p := range packages(t) {
		if len(p.files) == 0 && len(p.tests) > 0 {
			continue // a folder of tests only
		}
		if _, ok := mayImport(p.rel); !ok {
			t.Errorf("package %s has no row in the table of allowed imports", p.rel)
			continue
		}
		for _, to := range ours(p.Imports) {
			if !arrowAllowed(p.rel, to) {
				t.Errorf("%s imports %s, which the table of allowed imports does not say", p.rel, to)
			}
		}
	}
}

// The table's own logic, on arrows that must never appear.
func TestImportsRefuses(t *testing.T) {
	for _, arrow := range [][2]string{
		{"agent", "ca"}, {"agent", "ca/issuance"}, {"sds", "agent"}, {"ca/issuance", "ca"}, {"internal/durable", "api"},
		{"cmd/signet-ca", "cmd/signet"}, {"ca", "attestor/attestortest"}, {"cmd/signet-ca", "attestor/attestortest"},
		{"agent", "integration/envoytest"}, {"ca", "ca/catest"}, {"api", "api/v1"}, {"unheard/of", "api"},
	} {
		if arrowAllowed(arrow[0], arrow[1]) {
			t.Errorf("%s may import %s", arrow[0], arrow[1])
		}
	}
	if !arrowAllowed("ca", "api/v1") || !arrowAllowed("ca/catest", "ca") || !arrowAllowed("integration/mesh", "ca/catest") {
		t.Error("the table refuses what it says")
	}
}

// Foreign packages with a price: who may import them.
//
// threat: D24, L19
func TestForeignImports(t *testing.T) {
	for _, rule := range []struct {
		prefix string
		only   []string
		why    string
	}{
		{"k8s.io/client-go", []string{"internal/kube"}, "thin conversions keep 48 modules and every API call in one place"},
		{"k8s.io/cli-runtime/pkg/genericclioptions", nil, "it pulls kustomize, which imports plugin"},
		{"k8s.io/cli-runtime/pkg/resource", nil, "it pulls kustomize, which imports plugin"},
		{"plugin", nil, "nothing is loaded into a process that holds keys"},
		{"net/http/pprof", nil, "it registers itself on the default mux, and a heap holds keys"},
		{"math/rand", nil, "math/rand/v2 for jitter, crypto/rand for the rest"},
	} {
		for _, p := range packages(t) {
			for _, imp := range p.Imports {
				if (imp == rule.prefix || rule.prefix != "math/rand" && under(imp, rule.prefix)) && !slices.Contains(rule.only, p.rel) {
					t.Errorf("%s imports %s: %s", p.rel, imp, rule.why)
				}
			}
		}
	}
}

// binaries says what no binary may link, and how many modules besides ours it links at most (0: not limited).
var binaries = []struct {
	cmd     string
	never   []string // import paths or their beginnings; ours without the module
	modules int
}{
	{"cmd/signet-agent", []string{
		"github.com/hashicorp/vault", "github.com/cloudflare/cfssl", "go.etcd.io/bbolt", "github.com/zmap", "k8s.io/client-go",
		"ca", "migrate", "attestor/attestortest", "internal/envoy", "testing",
	}, 30},
	{"cmd/signet", []string{"ca", "agent", "github.com/hashicorp/vault", "github.com/cloudflare/cfssl", "go.etcd.io/bbolt", "sigs.k8s.io/kustomize", "testing"}, 0},
	{"cmd/signet-ca", []string{"agent", "migrate", "attestor/attestortest", "internal/envoy", "sigs.k8s.io/kustomize", "testing"}, 0},
}

// threat: N07
func TestBinaries(t *testing.T) {
	present := make(map[string]bool)
	for _, p := range packages(t) {
		present[p.rel] = true
	}
	for _, b := range binaries {
		t.Run(b.cmd, func(t *testing.T) {
			if !present[b.cmd] {
				t.Fatal("it does not exist")
			}
			out, err := goList(rootDir(t), "-deps", "-f", "{{.ImportPath}}\t{{with .Module}}{{.Path}}{{end}}", "./"+b.cmd)
			if err != nil {
				t.Fatal(err)
			}
			modules := make(map[string]bool)
			for line := range strings.Lines(string(out)) {
				dep, mod, _ := strings.Cut(strings.TrimSpace(line), "\t")
				if mod != "" && mod != module {
					modules[mod] = true
				}
				for _, never := range b.never {
					if under(short(dep), never) {
						t.Errorf("links %s", dep)
					}
				}
			}
			t.Logf("links %d modules besides ours", len(modules))
			if b.modules > 0 && len(modules) > b.modules {
				t.Errorf("links %d modules besides ours, at most %d are allowed", len(modules), b.modules)
			}
		})
	}
}
