package arch

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A rule of the SPIFFE specifications, in our words. Level is M (must), S (should) or empty (may, or a definition).
type rule struct{ id, level, text string }

// A chapter is proven rule by rule, or stands for a part that is not built yet.
type chapter struct {
	title    string
	required bool // every rule needs a test
	rules    []rule
}

var chapters = []chapter{
	{"SPIFFE ID", true, []rule{
		{"ID-01", "M", "The scheme is spiffe, the trust domain is not empty, there is no query and no fragment."},
		{"ID-02", "M", "There is no user and no port."},
		{"ID-03", "M", "A trust domain consists of a-z, 0-9, dot, dash and underscore; nothing is percent-encoded."},
		{"ID-04", "M", "A trust domain that looks like an IP address or a DNS name means nothing special."},
		{"ID-05", "M", "A path has no percent-encoding, no empty, dot or double-dot segment and no slash at its end."},
		{"ID-06", "M", "A path segment consists of letters, digits, dot, dash and underscore."},
		{"ID-07", "M", "An ID of up to 2048 bytes is read and never a longer one written; a trust domain has at most 255."},
		{"ID-08", "", "Scheme and trust domain do not depend on letter case when read, the path does."},
		{"ID-09", "M", "Each trust domain has its own signing authority."},
	}},
	{"X.509-SVID", true, []rule{
		{"X-01", "M", "A certificate with more than one URI, or none, is no SVID and is refused."},
		{"X-02", "", "Names of other kinds may stand beside the SPIFFE ID."},
		{"X-03", "M", "The ID of a leaf has a path, and validators insist on it."},
		{"X-04", "M", "The subject alternative name is critical when the subject is empty."},
		{"X-05", "M", "A signing certificate is a CA and may sign certificates."},
		{"X-06", "S", "A signing certificate has an ID of its trust domain, which must have no path."},
		{"X-07", "M", "A signing certificate never authenticates anybody."},
		{"X-08", "M", "A leaf is not a CA."},
		{"X-09", "M", "Key usage is there and critical."},
		{"X-10", "M", "A leaf may make digital signatures and must not sign certificates or revocation lists."},
		{"X-11", "S", "Extended key usage is there; if so, it must hold server and client authentication."},
		{"X-13", "M", "Paths are validated as RFC 5280 says."},
		{"X-14", "M", "Validators check that a leaf is not a CA, its usages, its scheme, its path, and that it has one URI."},
		{"X-15", "M", "A bundle's entry says x509-svid, has no key id, and holds exactly one CA certificate."},
		{"X-16", "M", "Readers pass over entries without a certificate, and over all certificates of an entry but the first."},
	}},
	{"JWT-SVID", false, []rule{
		{"J-01", "M", "Compact serialization only."},
		{"J-02", "M", "No header but alg, kid and typ."},
		{"J-03", "M", "The algorithm is one of RS, ES or PS with 256, 384 or 512; others are refused before anything else."},
		{"J-04", "", "A key id is always issued."},
		{"J-05", "M", "The type, if there is one, is JWT or JOSE."},
		{"J-06", "M", "The subject is the SPIFFE ID."},
		{"J-07", "M", "There is an audience, and the validator's own value is in it."},
		{"J-08", "M", "There is an expiry, and it is checked."},
		{"J-10", "M", "A bundle's entry says jwt-svid and has a key id."},
	}},
	{"Trust bundle", false, []rule{
		{"B-01", "M", "A bundle is a JWK set."},
		{"B-02", "", "The sequence never goes down and changes with the content."},
		{"B-03", "", "The refresh hint is in seconds."},
		{"B-04", "M", "The keys are there; none of them means that all are revoked, which a failed fetch does not."},
		{"B-05", "M", "An entry of unknown type or use is passed over, the others are kept."},
		{"B-06", "M", "Every entry has its type and use."},
		{"B-08", "M", "Trust domains are never merged."},
	}},
	{"Federation", false, []rule{
		{"F-01", "", "Keys are published three to five refresh hints before they are used."},
		{"F-02", "", "Keys are removed after the last SVID under them has expired."},
		{"F-03", "", "The endpoint is asked at the hint, else every five minutes."},
		{"F-04", "", "Bundles are ordered by their sequence and never go back."},
		{"F-05", "M", "Clients speak https_web and https_spiffe."},
		{"F-07", "M", "URL, profile and trust domain are configured, never derived."},
		{"F-08", "M", "The URL is https, without a user."},
		{"F-10", "M", "GET returns the current bundle as application/json."},
		{"F-11", "", "Redirects: temporary ones only, by the same rules, never to http."},
		{"F-13", "M", "For https_spiffe the endpoint's ID is known beforehand."},
	}},
	{"Workload endpoint", false, []rule{
		{"E-01", "", "It is local: gRPC over a Unix socket."},
		{"E-02", "M", "A call without the header workload.spiffe.io: true is an invalid argument."},
		{"E-03", "M", "TLS is not required."},
		{"E-04", "M", "Clients honour SPIFFE_ENDPOINT_SOCKET."},
		{"E-05", "M", "No credential is ever required of a workload."},
		{"E-06", "", "Unavailable while starting, permission denied without an identity, unimplemented for unknown calls."},
		{"E-07", "M", "The service is not extended; another one stands beside it."},
		{"E-08", "S", "Reflection is offered."},
	}},
	{"Workload API", false, []rule{
		{"A-01", "M", "The X.509 and JWT profiles are there; WIT is unimplemented or complete."},
		{"A-02", "M", "Each message of a stream is complete."},
		{"A-03", "M", "The first response comes as soon as possible."},
		{"A-05", "M", "A field that is absent is gone."},
		{"A-07", "M", "At least one SVID, leaf first, DER, its key as PKCS#8."},
		{"A-08", "", "Hints are unique."},
		{"A-09", "M", "Bundles contain that of the own trust domain."},
		{"A-10", "", "Revocation lists are optional."},
		{"A-11", "M", "Fetching a JWT-SVID takes an audience."},
		{"A-12", "M", "JWT bundles hold JWT keys only."},
		{"A-13", "M", "A JWT-SVID is validated by the bundle of its subject's trust domain."},
		{"A-14", "", "The default identity comes first, and the order is stable."},
	}},
}

// A test, or one row of its table, names the rules that it proves in a comment right above it:
//
//	// spiffe
//
// and a script of the command line in a line that begins with "# spiffe:".
var (
	marker   = regexp.MustCompile(`^(?://|#) ?spiffe:\s*([^/\s].*)$`)
	ruleName = regexp.MustCompile(`^[A-Z]+-\d{2}$`)
)

// proof is a test and its file, "TestX (folder/x_test.go)".
type proof struct{ test, file string }

func proofs(t *testing.T) map[string][]proof {
	t.Helper()
	known := make(map[string]bool)
	for _, c := range chapters {
		for _, r := range c.rules {
			known[r.id] = true
		}
	}
	return proofsOf(t, marker, ruleName, known)
}

// proofsOf collects, by name, what the comments of all tests and scripts say that they prove. Marker finds the list of names in a
// comment, name tells what is one, and known are those that there are.
func proofsOf(t *testing.T, marker, name *regexp.Regexp, known map[string]bool) map[string][]proof {
	t.Helper()
	all := make(map[string][]proof)
	add := func(where, list string, p proof) {
		for id := range strings.SplitSeq(list, ",") {
			id = strings.TrimSpace(id)
			switch {
			case !name.MatchString(id):
				t.Errorf("%s: %q is not a name of what can be proven", where, id)
			case !known[id]:
				t.Errorf("%s: no table of internal/arch has %s", where, id)
			case !slices.Contains(all[id], p):
				all[id] = append(all[id], p)
			}
		}
	}
	for _, p := range slices.Concat(packages(t), toolTests(t)) {
		for _, f := range p.tests {
			if p.rel == "internal/arch" && strings.HasPrefix(filepath.Base(f.name), "threats_") {
				continue // it shows what a mark looks like
			}
			for _, group := range f.ast.Comments {
				for _, c := range group.List {
					m := marker.FindStringSubmatch(c.Text)
					if m == nil {
						continue
					}
					test := testAt(f.ast, c.Pos())
					if test == "" {
						t.Errorf("%s: no test belongs to this comment", position(c.Pos()))
						continue
					}
					add(position(c.Pos()), m[1], proof{test, f.name})
				}
			}
		}
	}
	for _, script := range scripts(t) {
		src, err := os.ReadFile(filepath.Join(rootDir(t), filepath.FromSlash(script)))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(src)) {
			if m := marker.FindStringSubmatch(strings.TrimSpace(line)); m != nil && line[0] == '#' {
				add(script, m[1], proof{strings.TrimSuffix(filepath.Base(script), ".txtar"), script})
			}
		}
	}
	return all
}

// toolTests returns the tests of the folders below tools, which are modules of their own.
func toolTests(t *testing.T) (all []pkg) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(rootDir(t), "tools", "*", "*_test.go"))
	if err != nil || len(found) == 0 {
		t.Fatalf("no test of a tool was found (%v)", err)
	}
	for _, path := range found {
		files, err := parse(rootDir(t), pkg{Dir: filepath.Dir(path)}, []string{filepath.Base(path)})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, pkg{tests: files})
	}
	return all
}

// scripts returns the scripts of all commands, of which there are some.
func scripts(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(rootDir(t), "cmd", "*", "testdata", "script", "*.txtar"))
	if err != nil || len(found) == 0 {
		t.Fatalf("no script of a command was found (%v)", err)
	}
	var names []string
	for _, path := range found {
		rel, err := filepath.Rel(rootDir(t), path)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, filepath.ToSlash(rel))
	}
	return names
}

// testAt returns the test or fuzz function, or the table beside one, that a comment stands in or before.
func testAt(f *ast.File, pos token.Pos) string {
	for _, decl := range f.Decls {
		if pos >= decl.End() {
			continue
		}
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if d.Recv == nil && (strings.HasPrefix(d.Name.Name, "Test") || strings.HasPrefix(d.Name.Name, "Fuzz")) {
				return d.Name.Name
			}
		case *ast.GenDecl:
			if s, ok := d.Specs[0].(*ast.ValueSpec); ok && d.Tok == token.VAR {
				return s.Names[0].Name
			}
		}
		return ""
	}
	return ""
}

func TestConformance(t *testing.T) {
	all := proofs(t)
	var doc bytes.Buffer
	doc.WriteString("# SPIFFE conformance\n\n" +
		"Which test proves which rule of the SPIFFE specifications (`standards/` of spiffe/spiffe). The rules are told in our\n" +
		"words; M is a must, S a should. Made by `make generate` from the comments `// spiffe: RULE, ...` above tests.\n")
	for _, c := range chapters {
		fmt.Fprintf(&doc, "\n## %s\n\n", c.title)
		var missing []string
		any := false
		for _, r := range c.rules {
			any = any || len(all[r.id]) > 0
			if len(all[r.id]) == 0 {
				missing = append(missing, r.id)
			}
		}
		if c.required && len(missing) > 0 {
			t.Errorf("no test proves %s", strings.Join(missing, ", "))
		}
		if !c.required && !any {
			doc.WriteString("Not part of this version.\n")
			continue
		}
		doc.WriteString("| rule | | | proven by |\n|---|---|---|---|\n")
		for _, r := range c.rules {
			fmt.Fprintf(&doc, "| %s | %s | %s | %s |\n", r.id, r.level, r.text, list(all[r.id]))
		}
	}
	golden(t, "docs/conformance.md", doc.Bytes())
}

// list groups proofs by file: `TestA`, `TestB` (folder/x_test.go).
func list(ps []proof) string {
	if len(ps) == 0 {
		return "not yet"
	}
	byFile := make(map[string][]string)
	for _, p := range ps {
		byFile[p.file] = append(byFile[p.file], "`"+p.test+"`")
	}
	var parts []string
	for _, f := range slices.Sorted(maps.Keys(byFile)) {
		tests := slices.Compact(slices.Sorted(slices.Values(byFile[f])))
		parts = append(parts, strings.Join(tests, ", ")+" ("+f+")")
	}
	return strings.Join(parts, "; ")
}

// golden compares a generated document with the one in the repository, or writes it with -update.
func golden(t *testing.T, name string, want []byte) {
	t.Helper()
	path := filepath.Join(rootDir(t), filepath.FromSlash(name))
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v: run `make generate`", err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is stale: run `make generate`", name)
	}
}
