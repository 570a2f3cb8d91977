package arch

import (
	"bufio"
	"bytes"
	"go/ast"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	// A path of somebody's machine in code or manual works there and nowhere else.
	machinePath = regexp.MustCompile(`(^|[^A-Za-z0-9_.~$})-])/(tmp|work|root)(/|\b)`)
	// Unfinished work is finished, or written down where work is planned.
	unfinished = regexp.MustCompile(`\b(T[O]DO|F[I]XME|X[X]X)\b`)
)

func TestText(t *testing.T) {
	for _, name := range tracked(t) {
		ext := filepath.Ext(name)
		text := slices.Contains([]string{".go", ".md", ".proto", ".sh", ".yaml", ".yml", ".mk"}, ext) || filepath.Base(name) == "Makefile" || name == ".ci/run"
		if !text || strings.HasSuffix(name, ".pb.go") {
			continue
		}
		src, err := os.ReadFile(filepath.Join(rootDir(t), filepath.FromSlash(name)))
		if os.IsNotExist(err) {
			continue // removed from the work tree, not yet from the index
		} else if err != nil {
			t.Fatal(err)
		}
		paths := (ext == ".go" || ext == ".md") && !strings.HasSuffix(name, "_test.go")
		lines := bufio.NewScanner(bytes.NewReader(src))
		lines.Buffer(nil, 1<<20)
		for n := 1; lines.Scan(); n++ {
			if m := unfinished.FindString(lines.Text()); m != "" {
				t.Errorf("%s:%d: %s", name, n, m)
			}
			if m := machinePath.FindString(lines.Text()); m != "" && paths {
				t.Errorf("%s:%d: path of a machine: %s", name, n, m)
			}
		}
		if err := lines.Err(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTextPatterns(t *testing.T) {
	for s, want := range map[string]bool{
		"cd /tmp": true, "`/work/x`": true, "/root": true, `"/tmp/a"`: true, "(/tmp)": true,
		"a/tmp": false, "/tmpfs": false, "ca/root/x": false, "$DIR/tmp": false, "/rooted": false, "${DIR}/tmp": false, "/workload": false, "f()/tmp": false,
	} {
		if machinePath.MatchString(s) != want {
			t.Errorf("%q taken for a path of a machine: %v", s, !want)
		}
	}
	for s, want := range map[string]bool{"// TO" + "DO: x": true, "FIX" + "ME": true, "mktemp X" + "XX": true, "XXXX": false, "todo": false} {
		if unfinished.MatchString(s) != want {
			t.Errorf("%q taken for unfinished: %v", s, !want)
		}
	}
}

// A replace directive is ignored by whoever imports or installs the module: they would build something else.
func TestNoReplace(t *testing.T) {
	mod, err := os.ReadFile(filepath.Join(rootDir(t), "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	if regexp.MustCompile(`(?m)^\s*replace\b`).Match(mod) {
		t.Error("the root go.mod has a replace directive")
	}
}

// A reason that no code gives is a promise in the manual that nothing keeps. Some come before their code: this warns.
func TestWarnReasons(t *testing.T) {
	declared := make(map[string]bool)
	used := make(map[string]bool)
	for _, p := range packages(t) {
		for _, f := range p.files {
			table := f.name == "api/table.go"
			ast.Inspect(f.ast, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.ValueSpec:
					if id, ok := n.Type.(*ast.Ident); ok && table && id.Name == "Reason" {
						for _, name := range n.Names {
							declared[name.Name] = true
						}
					}
				case *ast.SelectorExpr:
					if id, ok := n.X.(*ast.Ident); ok && id.Name == "api" {
						used[n.Sel.Name] = true
					}
				case *ast.Ident:
					if p.rel == "api" && !table {
						used[n.Name] = true
					}
				}
				return true
			})
		}
	}
	if len(declared) == 0 {
		t.Fatal("no reason found in api/table.go")
	}
	var unused []string
	for name := range declared {
		if !used[name] {
			unused = append(unused, name)
		}
	}
	slices.Sort(unused)
	for _, name := range unused {
		t.Log("warning: no code gives the reason api." + name)
	}
}
