package arch

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

// configFiles are the files that operators write, by the struct that they are decoded into.
var configFiles = []struct {
	title, dir, root, say string
}{
	{"signet-ca", "cmd/signet-ca", "config", "`signet-ca run --config FILE`; `signet-ca check-config` says what is wrong with one, each with its line."},
	{"The policy", "ca", "PolicyFile", "`policyFile` of signet-ca's configuration. It is read at the start."},
	{"signet-agent", "cmd/signet-agent", "config", "`signet-agent run --config FILE`; `signet-agent check-config` says what is wrong with one."},
}

// structDirs are where the structs of configuration are declared; a selector names its package by the folder's last part.
var structDirs = []string{"ca", "ca/store", "ca/upstream"}

// TestConfig makes docs/config.md from the comments of the structs that configuration is decoded into. Every field must
// say what it is and name its default, or that it is required.
func TestConfig(t *testing.T) {
	var page strings.Builder
	page.WriteString("# Configuration\n\n<!-- Made from the comments in the code by `make generate`. -->\n\n" +
		"Files are strict YAML: an unknown key, a key that is there twice, an anchor or a bare number for a duration is refused with\nits line. Durations are written like `90s` or `1h30m`.\n")
	for _, f := range configFiles {
		fmt.Fprintf(&page, "\n## %s\n\n%s\n\n| field | type | what it says |\n|---|---|---|\n", f.title, f.say)
		r := configReader{t: t, structs: structsOf(t, append([]string{f.dir}, structDirs...)...), page: &page}
		r.fields(f.dir, f.root, "")
	}
	golden(t, "docs/config.md", []byte(page.String()))
}

type configReader struct {
	t       *testing.T
	structs map[string]*ast.StructType // by folder and name
	page    *strings.Builder
}

// fields writes a row for each field of a struct, and for those of the structs in it.
func (r *configReader) fields(dir, name, prefix string) {
	s := r.structs[dir+"."+name]
	if s == nil {
		r.t.Fatalf("there is no struct %s in %s", name, dir)
	}
	for _, f := range s.Fields.List {
		key := yamlKey(r.t, f)
		if key == "" {
			continue
		}
		text := strings.Join(strings.Fields(f.Doc.Text()+" "+f.Comment.Text()), " ")
		inner, innerDir, kind := r.describe(dir, f.Type)
		if text == "" {
			r.t.Errorf("%s.%s has no comment", name, key)
		}
		if inner == "" && !strings.Contains(text, "Default:") && !strings.Contains(text, "Required") && !strings.Contains(text, "required") && !strings.Contains(text, "default:") {
			r.t.Errorf("%s.%s names neither its default nor that it is required: %q", name, key, text)
		}
		fmt.Fprintf(r.page, "| `%s%s` | %s | %s |\n", prefix, key, kind, strings.ReplaceAll(text, "|", "\\|"))
		if inner != "" {
			if strings.HasPrefix(kind, "list") {
				key += "[]"
			}
			r.fields(innerDir, inner, prefix+key+".")
		}
	}
}

// describe names a field's type for people, and the struct within it.
func (r *configReader) describe(dir string, e ast.Expr) (inner, innerDir, kind string) {
	switch e := e.(type) {
	case *ast.ArrayType:
		inner, innerDir, kind = r.describe(dir, e.Elt)
		return inner, innerDir, "list of " + kind
	case *ast.StarExpr: // a section that means something by being there
		return r.describe(dir, e.X)
	case *ast.Ident:
		if r.structs[dir+"."+e.Name] != nil {
			return e.Name, dir, "section"
		}
		return "", "", map[string]string{"string": "text", "int": "number", "bool": "true or false"}[e.Name]
	case *ast.SelectorExpr:
		pkg := e.X.(*ast.Ident).Name
		if pkg == "time" {
			return "", "", "duration"
		}
		for _, d := range structDirs {
			if filepath.Base(d) == pkg && r.structs[d+"."+e.Sel.Name] != nil {
				return e.Sel.Name, d, "section"
			}
		}
	}
	r.t.Fatalf("a configuration field in %s has a type that this test does not know", dir)
	return "", "", ""
}

func yamlKey(t *testing.T, f *ast.Field) string {
	if f.Tag == nil {
		return ""
	}
	tag, err := strconv.Unquote(f.Tag.Value)
	if err != nil {
		t.Fatal(err)
	}
	return reflect.StructTag(tag).Get("yaml")
}

func structsOf(t *testing.T, dirs ...string) map[string]*ast.StructType {
	t.Helper()
	found := map[string]*ast.StructType{}
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(rootDir(t), dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(f, func(n ast.Node) bool {
				if ts, ok := n.(*ast.TypeSpec); ok {
					if st, ok := ts.Type.(*ast.StructType); ok {
						found[dir+"."+ts.Name.Name] = st
					}
				}
				return true
			})
		}
	}
	return found
}
