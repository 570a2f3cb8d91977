package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/signet-ca/signet"

var update = flag.Bool("update", false, "write the generated documents instead of comparing them")

// pkg is what `go list` says of one package, with paths of ours shortened to the folder.
type pkg struct {
	ImportPath                         string
	Name                               string
	Dir                                string
	GoFiles, CgoFiles                  []string
	TestGoFiles, XTestGoFiles          []string
	Imports, TestImports, XTestImports []string
	rel                                string // folder below the root, "." for the root itself
	files                              []file // without tests
	tests                              []file
}

type file struct {
	name string // below the root, with slashes
	src  []byte
	ast  *ast.File
}

// generated reports whether a tool wrote the file.
func (f file) generated() bool { return ast.IsGenerated(f.ast) }

var fset = token.NewFileSet()

// root is the top folder of the repository.
var root = sync.OnceValues(func() (string, error) { return filepath.Abs(filepath.Join("..", "..")) })

func rootDir(t *testing.T) string {
	t.Helper()
	dir, err := root()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// goList runs `go list` with args in the root.
func goList(dir string, args ...string) ([]byte, error) {
	cmd := exec.Command("go", append([]string{"list", "-e"}, args...)...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, errors.New("go list: " + stderr.String())
	}
	return out, nil
}

// load reads and parses every package of ours, those behind the integration tags too.
var load = sync.OnceValues(func() ([]pkg, error) {
	dir, err := root()
	if err != nil {
		return nil, err
	}
	if err := visit(dir); err != nil {
		return nil, err
	}
	out, err := goList(dir, "-tags=integration,envoy,cluster", "-json=ImportPath,Name,Dir,GoFiles,CgoFiles,TestGoFiles,XTestGoFiles,Imports,TestImports,XTestImports", "./...")
	if err != nil {
		return nil, err
	}
	var all []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		p.rel = short(p.ImportPath)
		if p.files, err = parse(dir, p, slices.Concat(p.GoFiles, p.CgoFiles)); err != nil {
			return nil, err
		}
		if p.tests, err = parse(dir, p, slices.Concat(p.TestGoFiles, p.XTestGoFiles)); err != nil {
			return nil, err
		}
		all = append(all, p)
	}
})

// visit opens every folder that may hold a package, so that `go test` sees a new file and does not answer from its cache.
func visit(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		name := d.Name()
		if err == nil && d.IsDir() && path != dir && (strings.HasPrefix(name, ".") || name == "bin") {
			return fs.SkipDir
		}
		return err
	})
}

func parse(root string, p pkg, names []string) ([]file, error) {
	var files []file
	for _, name := range names {
		path := filepath.Join(p.Dir, name)
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return nil, err
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		f, err := parser.ParseFile(fset, rel, src, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		files = append(files, file{filepath.ToSlash(rel), src, f})
	}
	return files, nil
}

func packages(t *testing.T) []pkg {
	t.Helper()
	all, err := load()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatal("no package found")
	}
	return all
}

// short is the folder of an import path of ours, and any other path as it is.
func short(path string) string {
	if path == module {
		return "."
	}
	return strings.TrimPrefix(path, module+"/")
}

// ours returns the folders of those imports that are packages of ours.
func ours(imports []string) []string {
	var list []string
	for _, path := range imports {
		if rel := short(path); rel != path {
			list = append(list, rel)
		}
	}
	return list
}

// under reports whether path is parent or lies below it.
func under(path, parent string) bool { return path == parent || strings.HasPrefix(path, parent+"/") }

// tracked returns the files that git knows, below the root. Without git (an unpacked archive) the test is skipped.
func tracked(t *testing.T) []string {
	t.Helper()
	cmd := exec.Command("git", "ls-files", "-z")
	cmd.Dir = rootDir(t)
	out, err := cmd.Output()
	if err != nil {
		t.Skip("not a git checkout")
	}
	return slices.DeleteFunc(strings.Split(string(out), "\x00"), func(s string) bool { return s == "" })
}
