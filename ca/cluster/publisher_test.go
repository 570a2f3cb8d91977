package cluster

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func newRoots(t *testing.T, kinds ...issuance.KeyKind) []*x509.Certificate {
	t.Helper()
	var roots []*x509.Certificate
	for _, kind := range kinds {
		key, err := issuance.GenerateKey(kind)
		if err != nil {
			t.Fatal(err)
		}
		root, err := issuance.NewRoot(td, key, 24*time.Hour, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, root)
	}
	return roots
}

func newBundle(g api.Generation, roots ...*x509.Certificate) *ca.Bundle {
	return &ca.Bundle{TrustDomain: td, Generation: g, Roots: roots, Hash: api.BundleHash(roots)}
}

func newFiles(dir string) *FilePublisher {
	return NewFilePublisher(dir, slog.New(slog.DiscardHandler), nil)
}

func publish(t *testing.T, p *FilePublisher, b *ca.Bundle) {
	t.Helper()
	if err := p.Publish(t.Context(), b); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// holds fails unless both files in dir are those of b.
func holds(t *testing.T, dir string, b *ca.Bundle) {
	t.Helper()
	sb, err := spiffebundle.Parse(td, read(t, filepath.Join(dir, BundleJSON)))
	if err != nil {
		t.Fatal(err)
	}
	if api.BundleHash(sb.X509Authorities()) != b.Hash || len(sb.X509Authorities()) != len(b.Roots) {
		t.Errorf("%s does not hold the roots of generation %s", BundleJSON, b.Generation)
	}
	if seq, ok := sb.SequenceNumber(); !ok || seq != b.Generation.Sequence() {
		t.Errorf("sequence %d, want %d", seq, b.Generation.Sequence())
	}
	xb, err := x509bundle.Parse(td, read(t, filepath.Join(dir, BundlePEM)))
	if err != nil {
		t.Fatal(err)
	}
	if api.BundleHash(xb.X509Authorities()) != b.Hash || len(xb.X509Authorities()) != len(b.Roots) {
		t.Errorf("%s does not hold the roots of generation %s", BundlePEM, b.Generation)
	}
}

// TestPublishShape reads the file as its JSON is, for a library may be more lenient than the specification.
//
// spiffe: B-01, B-03, B-06, X-15
func TestPublishShape(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "for", "it")
	roots := newRoots(t, issuance.KeyP256, issuance.KeyP384, issuance.KeyRSA2048)
	b := newBundle(api.Generation{Epoch: 3, Number: 7}, roots...)
	publish(t, newFiles(dir), b)
	holds(t, dir, b)

	var doc map[string]json.RawMessage
	if err := json.Unmarshal(read(t, filepath.Join(dir, BundleJSON)), &doc); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{"spiffe_sequence": "12884901895", "spiffe_refresh_hint": "300"} { // 3<<32 + 7; seconds
		if got := string(doc[key]); got != want {
			t.Errorf("%s is %s, want %s", key, got, want)
		}
	}
	var keys []map[string]any
	if err := json.Unmarshal(doc["keys"], &keys); err != nil {
		t.Fatal(err)
	}
	if len(keys) != len(roots) {
		t.Fatalf("%d keys, want %d", len(keys), len(roots))
	}
	delete(doc, "keys")
	delete(doc, "spiffe_sequence")
	delete(doc, "spiffe_refresh_hint")
	if len(doc) != 0 {
		t.Errorf("the document holds more: %v", doc)
	}
	for i, k := range keys {
		if want := []string{"EC", "EC", "RSA"}[i]; k["kty"] != want || k["use"] != "x509-svid" {
			t.Errorf("entry %d: kty %v, use %v; want %s, x509-svid", i, k["kty"], k["use"], want)
		}
		for _, name := range []string{"kid", "d", "p", "q", "k"} { // a key id, and every member of a private key
			if _, ok := k[name]; ok {
				t.Errorf("entry %d has %q", i, name)
			}
		}
		x5c, _ := k["x5c"].([]any)
		if len(x5c) != 1 {
			t.Fatalf("entry %d has %d certificates, want exactly 1", i, len(x5c))
		}
		der, err := base64.StdEncoding.DecodeString(x5c[0].(string))
		if err != nil {
			t.Fatal(err)
		}
		if c, err := x509.ParseCertificate(der); err != nil || !c.Equal(roots[i]) || !c.IsCA {
			t.Errorf("entry %d does not hold root %d: %v", i, i, err)
		}
	}
	if text := read(t, filepath.Join(dir, BundlePEM)); bytes.Count(text, []byte("-----BEGIN CERTIFICATE-----")) != len(roots) || bytes.Contains(text, []byte("PRIVATE")) {
		t.Errorf("%s:\n%s", BundlePEM, text)
	}
	for _, name := range []string{BundleJSON, BundlePEM} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != 0o644 {
			t.Errorf("%s: %v, %v; everybody may read it, nobody else may write it", name, info.Mode(), err)
		}
	}
}

// TestPublishGenerations proves that what is published never goes back, and that its sequence is the generation, which the
// record raises with each change of the content.
//
// spiffe: B-02
func TestPublishGenerations(t *testing.T) {
	dir := t.TempDir()
	p := newFiles(dir)
	roots := newRoots(t, issuance.KeyP256, issuance.KeyP256)
	steps := []struct {
		name string
		b    *ca.Bundle
		want api.Reason
	}{
		{"first", newBundle(api.Generation{Epoch: 1, Number: 1}, roots[0]), ""},
		{"the same again", newBundle(api.Generation{Epoch: 1, Number: 1}, roots[0]), ""},
		{"a root more", newBundle(api.Generation{Epoch: 1, Number: 2}, roots...), ""},
		{"the number before", newBundle(api.Generation{Epoch: 1, Number: 1}, roots[0]), api.BundleRollback},
		{"a later epoch with a lower number", newBundle(api.Generation{Epoch: 2, Number: 1}, roots[1]), ""},
		{"an earlier epoch with a higher number", newBundle(api.Generation{Epoch: 1, Number: 9}, roots...), api.BundleRollback},
		{"next", newBundle(api.Generation{Epoch: 2, Number: 2}, roots...), ""},
	}
	var now *ca.Bundle
	var last uint64
	for _, s := range steps {
		err := p.Publish(t.Context(), s.b)
		switch {
		case s.want == "" && err != nil, s.want != "" && api.ReasonOf(err) != s.want:
			t.Fatalf("%s: %v, want %q", s.name, err, s.want)
		case s.want == "":
			now = s.b
		}
		holds(t, dir, now)
		if now.Generation.Sequence() < last {
			t.Errorf("%s: the sequence went back to %d", s.name, now.Generation.Sequence())
		}
		last = now.Generation.Sequence()
	}
}

// TestPublishKeepsLater proves that a later bundle is kept also where this build does not understand all of it.
func TestPublishKeepsLater(t *testing.T) {
	for name, doc := range map[string]string{
		"unknown key type": `{"keys":[{"kty":"AKP","use":"x509-svid","x5c":["AA=="]}],"spiffe_sequence":4294967300}`,
		"unknown use":      `{"keys":[{"kty":"EC","use":"later"}],"spiffe_sequence":4294967300,"later":{}}`,
		"all revoked":      `{"keys":[],"spiffe_sequence":4294967300}`,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			replace(t, filepath.Join(dir, BundleJSON), doc)
			replace(t, filepath.Join(dir, BundlePEM), "later")
			err := newFiles(dir).Publish(t.Context(), newBundle(api.Generation{Epoch: 1, Number: 3}, newRoots(t, issuance.KeyP256)...))
			if api.ReasonOf(err) != api.BundleRollback {
				t.Errorf("%v, want %s", err, api.BundleRollback)
			}
			if got := string(read(t, filepath.Join(dir, BundleJSON))) + string(read(t, filepath.Join(dir, BundlePEM))); got != doc+"later" {
				t.Errorf("the later bundle was changed: %s", got)
			}
		})
	}
}

// TestPublishPutsRight proves that a foreign change does not last.
func TestPublishPutsRight(t *testing.T) {
	roots := newRoots(t, issuance.KeyP256, issuance.KeyP256)
	foreign := spiffebundle.FromX509Authorities(td, roots[1:])
	foreign.SetSequenceNumber(api.Generation{Epoch: 1, Number: 2}.Sequence())
	swapped, err := foreign.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	both := []string{BundleJSON, BundlePEM}
	tests := []struct {
		name   string
		files  []string
		change func(path string) error
	}{
		{"removed", both, os.Remove},
		{"emptied", both, func(path string) error { return os.Truncate(path, 0) }},
		{"garbage", both, func(path string) error { return os.WriteFile(path, []byte("\x00}{"), 0o644) }},
		{"null", both, func(path string) error { return os.WriteFile(path, []byte("null"), 0o644) }},
		{"no keys", []string{BundleJSON}, func(path string) error {
			return os.WriteFile(path, []byte(`{"spiffe_sequence":18446744073709551615}`), 0o644)
		}},
		{"sequence is no number", []string{BundleJSON}, func(path string) error {
			return os.WriteFile(path, []byte(`{"keys":[],"spiffe_sequence":-1}`), 0o644)
		}},
		{"another root in the same generation", []string{BundleJSON}, func(path string) error { return os.WriteFile(path, swapped, 0o644) }},
		{"dangling link", both, func(path string) error {
			return errors.Join(os.Remove(path), os.Symlink(path+".nowhere", path))
		}},
	}
	for _, tt := range tests {
		for _, name := range tt.files {
			t.Run(tt.name+" "+name, func(t *testing.T) {
				dir := t.TempDir()
				p, b := newFiles(dir), newBundle(api.Generation{Epoch: 1, Number: 2}, roots[0])
				publish(t, p, b)
				if err := tt.change(filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
				publish(t, p, b)
				holds(t, dir, b)
				want := []string{BundleJSON, BundlePEM}
				if diff := cmp.Diff(want, names(t, dir)); diff != "" {
					t.Errorf("files: %s", diff)
				}
			})
		}
	}
}

// TestPublishLeavesAlone proves that files which hold the bundle are not written again: readers watch them.
func TestPublishLeavesAlone(t *testing.T) {
	dir := t.TempDir()
	p, b := newFiles(dir), newBundle(api.Generation{Epoch: 1, Number: 1}, newRoots(t, issuance.KeyP256)...)
	publish(t, p, b)
	before := stat(t, dir)
	publish(t, p, b)
	publish(t, newFiles(dir), b) // as after a restart
	for i, after := range stat(t, dir) {
		if !os.SameFile(before[i], after) || !before[i].ModTime().Equal(after.ModTime()) {
			t.Errorf("%s was written again", after.Name())
		}
	}
	if err := os.Remove(filepath.Join(dir, BundlePEM)); err != nil {
		t.Fatal(err)
	}
	publish(t, p, b)
	if !os.SameFile(before[0], stat(t, dir)[0]) {
		t.Errorf("%s was written again because of %s", BundleJSON, BundlePEM)
	}
}

func TestPublished(t *testing.T) {
	tests := []struct {
		name  string
		setup func(dir string) error
		want  bool
	}{
		{"no folder", os.Remove, false},
		{"empty folder", func(string) error { return nil }, false},
		{"another file", func(dir string) error { return os.WriteFile(filepath.Join(dir, "README"), nil, 0o644) }, false},
		{"JSON", func(dir string) error { return os.WriteFile(filepath.Join(dir, BundleJSON), []byte("{}"), 0o644) }, true},
		{"PEM", func(dir string) error { return os.WriteFile(filepath.Join(dir, BundlePEM), nil, 0o644) }, true},
		{"dangling link", func(dir string) error { return os.Symlink("nowhere", filepath.Join(dir, BundleJSON)) }, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "bundle")
			if err := errors.Join(os.Mkdir(dir, 0o755), tt.setup(dir)); err != nil {
				t.Fatal(err)
			}
			if got, err := newFiles(dir).Published(t.Context(), td); err != nil || got != tt.want {
				t.Errorf("Published = %t, %v; want %t", got, err, tt.want)
			}
		})
	}
	t.Run("cannot be told", func(t *testing.T) { // then it is not "no": init would make a second root
		file := filepath.Join(t.TempDir(), "file")
		replace(t, file, "")
		if got, err := newFiles(filepath.Join(file, "bundle")).Published(t.Context(), td); err == nil || got {
			t.Errorf("Published = %t, %v", got, err)
		}
	})
}

// TestShown tells which bundle is published, and nothing where that cannot be told from what is there.
//
// threat: E05
func TestShown(t *testing.T) {
	dir := t.TempDir()
	p := newFiles(filepath.Join(dir, "bundle"))
	shows := func(want journal.Held) {
		t.Helper()
		if got, err := p.Shown(t.Context(), td); err != nil || got != want {
			t.Errorf("%+v (%v), want %+v", got, err, want)
		}
	}
	shows(journal.Held{})
	b := newBundle(api.Generation{Epoch: 7000, Number: 3}, newRoots(t, issuance.KeyP256)...)
	publish(t, p, b)
	shows(journal.Held{Generation: b.Generation, Hash: b.Hash})
	path := filepath.Join(dir, "bundle", BundleJSON)
	if err := os.Remove(filepath.Join(dir, "bundle", BundlePEM)); err != nil {
		t.Fatal(err)
	}
	shows(journal.Held{Generation: b.Generation}) // half of it says nothing of the roots
	if err := os.WriteFile(path, []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	shows(journal.Held{})
	if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o755)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Shown(t.Context(), td); err == nil {
		t.Error("what cannot be read shows nothing")
	}
}

func TestPublishFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	replace(t, file, "kept")
	b := newBundle(api.Generation{Epoch: 1, Number: 1}, newRoots(t, issuance.KeyP256)...)
	if err := newFiles(filepath.Join(file, "bundle")).Publish(t.Context(), b); err == nil {
		t.Error("published under a file")
	}
	if got := string(read(t, file)); got != "kept" {
		t.Errorf("the file holds %q", got)
	}
}

// names returns the names in dir, sorted.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	slices.SortFunc(all, strings.Compare)
	return all
}

// stat returns what the system knows of the bundle's JSON and PEM.
func stat(t *testing.T, dir string) []fs.FileInfo {
	t.Helper()
	var infos []fs.FileInfo
	for _, name := range []string{BundleJSON, BundlePEM} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		infos = append(infos, info)
	}
	return infos
}
