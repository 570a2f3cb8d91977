package arch

import (
	"bytes"
	"cmp"
	"fmt"
	"go/ast"
	"go/token"
	"slices"
	"strings"
	"testing"
)

// position is "FILE:LINE".
func position(pos token.Pos) string {
	p := fset.Position(pos)
	return fmt.Sprintf("%s:%d", p.Filename, p.Line)
}

// One file of each package says what the package is for, so that there is one place to read and to keep true.
func TestPackageDoc(t *testing.T) {
	for _, p := range packages(t) {
		var with []string
		own := false
		for _, f := range p.files {
			if f.generated() {
				continue
			}
			own = true
			if f.ast.Doc != nil && strings.TrimSpace(f.ast.Doc.Text()) != "" {
				with = append(with, f.name)
			}
		}
		if own && len(with) != 1 {
			t.Errorf("package %s has %d package docs, want 1: %q", p.rel, len(with), with)
		}
	}
}

func TestExportedDocumented(t *testing.T) {
	for _, p := range packages(t) {
		for _, f := range p.files {
			if f.generated() {
				continue
			}
			for _, decl := range f.ast.Decls {
				for _, name := range undocumented(decl) {
					t.Errorf("%s: %s has no comment", position(name.Pos()), name.Name)
				}
			}
		}
	}
}

// undocumented returns the exported names of a declaration that nothing is said about. Fields are left to their authors.
func undocumented(decl ast.Decl) []*ast.Ident {
	switch d := decl.(type) {
	case *ast.FuncDecl:
		if d.Doc == nil && d.Name.IsExported() && (d.Recv == nil || ast.IsExported(receiver(d))) {
			return []*ast.Ident{d.Name}
		}
	case *ast.GenDecl:
		var names []*ast.Ident
		for _, spec := range d.Specs {
			switch s := spec.(type) {
			case *ast.TypeSpec:
				if d.Doc == nil && s.Doc == nil && s.Name.IsExported() {
					names = append(names, s.Name)
				}
			case *ast.ValueSpec:
				if d.Doc != nil || s.Doc != nil || s.Comment != nil {
					continue
				}
				for _, n := range s.Names {
					if n.IsExported() {
						names = append(names, n)
					}
				}
			}
		}
		return names
	}
	return nil
}

// receiver returns the name of a method's type.
func receiver(d *ast.FuncDecl) string {
	expr := d.Recv.List[0].Type
	for {
		switch e := expr.(type) {
		case *ast.StarExpr:
			expr = e.X
		case *ast.IndexExpr:
			expr = e.X
		case *ast.IndexListExpr:
			expr = e.X
		case *ast.Ident:
			return e.Name
		default:
			return ""
		}
	}
}

// maxMethods is how many methods an interface of ours may have. A larger one says that the consumer asks for a thing
// rather than for what it needs of it.
const maxMethods = 4

func TestInterfacesSmall(t *testing.T) {
	for _, p := range packages(t) {
		local := make(map[string]*ast.InterfaceType) // of this package, by name
		for _, f := range p.files {
			ast.Inspect(f.ast, func(n ast.Node) bool {
				if s, ok := n.(*ast.TypeSpec); ok {
					if i, ok := s.Type.(*ast.InterfaceType); ok {
						local[s.Name.Name] = i
					}
				}
				return true
			})
		}
		for _, f := range p.files {
			if f.generated() {
				continue
			}
			ast.Inspect(f.ast, func(n ast.Node) bool {
				if i, ok := n.(*ast.InterfaceType); ok {
					if m := methods(i, local, 0); m > maxMethods {
						t.Errorf("%s: an interface with %d methods, at most %d are allowed", position(i.Pos()), m, maxMethods)
					}
				}
				return true
			})
		}
	}
}

// methods counts those of embedded interfaces of the same package too; one from elsewhere counts as one.
func methods(i *ast.InterfaceType, local map[string]*ast.InterfaceType, depth int) int {
	n := 0
	for _, m := range i.Methods.List {
		id, ok := m.Type.(*ast.Ident)
		switch {
		case len(m.Names) > 0:
			n += len(m.Names)
		case ok && local[id.Name] != nil && depth < 8:
			n += methods(local[id.Name], local, depth+1)
		default:
			n++
		}
	}
	return n
}

func TestFolderDepth(t *testing.T) {
	for _, p := range packages(t) {
		if n := strings.Count(p.rel, "/") + 1; n > 3 {
			t.Errorf("package %s is %d folders deep, at most 3 are allowed", p.rel, n)
		}
	}
}

// A command's main wires and decides nothing, so that all that decides can be tested.
func TestMainsShort(t *testing.T) {
	for _, p := range packages(t) {
		if p.Name != "main" {
			continue
		}
		for _, f := range p.files {
			for _, decl := range f.ast.Decls {
				d, ok := decl.(*ast.FuncDecl)
				if lines := bytes.Count(f.src, []byte{'\n'}); ok && d.Recv == nil && d.Name.Name == "main" && lines >= 100 {
					t.Errorf("%s with func main has %d lines, want below 100", f.name, lines)
				}
			}
		}
	}
}

// Init is for drivers that register themselves, and a process ends in its main.
func TestHabits(t *testing.T) {
	for _, p := range packages(t) {
		for _, f := range p.files {
			if f.generated() {
				continue
			}
			for _, decl := range f.ast.Decls {
				if d, ok := decl.(*ast.FuncDecl); ok && d.Recv == nil && d.Name.Name == "init" && !onlyRegisters(d) {
					t.Errorf("%s: init does more than register a driver", position(d.Pos()))
				}
			}
			if p.Name == "main" {
				continue
			}
			ast.Inspect(f.ast, func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok && isSelector(call.Fun, "os", "Exit") {
					t.Errorf("%s: os.Exit outside a main package", position(n.Pos()))
				}
				return true
			})
		}
	}
}

func onlyRegisters(d *ast.FuncDecl) bool {
	for _, stmt := range d.Body.List {
		expr, ok := stmt.(*ast.ExprStmt)
		if !ok {
			return false
		}
		call, ok := expr.X.(*ast.CallExpr)
		if !ok {
			return false
		}
		name := ""
		switch fun := call.Fun.(type) {
		case *ast.Ident:
			name = fun.Name
		case *ast.SelectorExpr:
			name = fun.Sel.Name
		}
		if !strings.HasPrefix(strings.ToLower(name), "register") {
			return false
		}
	}
	return true
}

func isSelector(expr ast.Expr, x, sel string) bool {
	s, ok := expr.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	id, ok := s.X.(*ast.Ident)
	return ok && id.Name == x && s.Sel.Name == sel
}

// Sizes are a smoke alarm, not a rule: `make lint` prints them.
func TestWarnSizes(t *testing.T) {
	type alarm struct {
		lines int
		text  string
	}
	var alarms []alarm
	for _, p := range packages(t) {
		for _, f := range p.files {
			if f.generated() {
				continue
			}
			if n := bytes.Count(f.src, []byte{'\n'}); n > 500 {
				alarms = append(alarms, alarm{n, fmt.Sprintf("%s has %d lines, above 500", f.name, n)})
			}
			for _, decl := range f.ast.Decls {
				d, ok := decl.(*ast.FuncDecl)
				if !ok || d.Body == nil {
					continue
				}
				if n := fset.Position(d.End()).Line - fset.Position(d.Pos()).Line + 1; n > 60 {
					alarms = append(alarms, alarm{n, fmt.Sprintf("%s: %s has %d lines, above 60", position(d.Pos()), d.Name.Name, n)})
				}
			}
		}
	}
	slices.SortFunc(alarms, func(a, b alarm) int { return cmp.Compare(b.lines, a.lines) })
	for _, a := range alarms {
		t.Log("warning:", a.text)
	}
}
