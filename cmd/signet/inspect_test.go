package main

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	apiv1 "github.com/signet-ca/signet/api/v1"
)

// found writes findings as "RULE@CERTIFICATE", warnings with a question mark.
func found(fs []finding) []string {
	out := []string{}
	for _, f := range fs {
		mark := ""
		if f.Level == levelWarning {
			mark = "?"
		}
		out = append(out, fmt.Sprintf("%s@%d%s", f.Rule, f.Certificate, mark))
	}
	return out
}

// Each way to spoil a chain yields its own finding and no other.
func TestInspectRules(t *testing.T) {
	tests := []struct {
		kind string
		want []string
	}{
		{"good", nil},
		// spiffe: X-01
		{"no-uri", []string{"X-01@1"}},
		// spiffe
		{"two-uris", []string{"X-01@1"}},
		// spiffe: ID-01, X-14
		{"https", []string{"ID-01@1"}},
		// spiffe
		{"no-path", []string{"X-03@1"}},
		// spiffe
		{"ca-leaf", []string{"X-08@1"}},
		// spiffe: X-09
		{"no-ku", []string{"X-09@1"}},
		// spiffe: X-09
		{"ku-soft", []string{"X-09@1"}},
		// spiffe: X-10
		{"ku-no-sign", []string{"X-10@1"}},
		// spiffe
		{"ku-cert-sign", []string{"X-10@1"}},
		// spiffe
		{"ku-crl-sign", []string{"X-10@1"}},
		// spiffe: X-11
		{"no-eku", []string{"X-11@1?"}},
		// spiffe: X-11
		{"eku-server", []string{"X-11@1"}},
		// spiffe: X-11
		{"eku-client", []string{"X-11@1"}},
		// spiffe: X-11
		{"eku-any", []string{"X-11@1", "X-11@1"}},
		// spiffe: X-04
		{"san-soft", []string{"X-04@1"}},
		// spiffe: X-04
		{"san-soft-name", nil},
		{"expired", []string{"EXPIRED@1"}},
		{"future", []string{"NOT-YET-VALID@1"}},
		{"last-second", nil}, // NotAfter is inclusive (RFC 5280 section 4.1.2.5)
		{"sha1", []string{"WEAK-SIGNATURE@1", "X-13@1"}},
		{"rsa-1024", []string{"WEAK-KEY@1"}},
		{"rsa-2048", nil},
		{"ed25519", nil},
		{"p224", []string{"WEAK-KEY@1"}},
		{"huge-issuer", []string{"HUGE-KEY@2"}},
		// spiffe: X-05
		{"inter-no-ca", []string{"X-13@1", "X-05@2"}},
		// spiffe: X-05
		{"inter-no-sign", []string{"X-13@1", "X-05@2"}},
		{"inter-no-uri", nil},
		// spiffe: X-06
		{"inter-path", []string{"X-06@2"}},
		// spiffe: ID-09
		{"inter-foreign", []string{"ID-09@2"}},
		{"inter-two-uris", []string{"X-01@2"}},
		{"inter-expired", []string{"EXPIRED@2"}},
		{"alone", nil},
	}
	for _, tt := range tests {
		t.Run(tt.kind, func(t *testing.T) {
			chain, ok := mint(t, tt.kind)
			if !ok {
				t.Fatal("no such kind")
			}
			got := found(inspect(chain.certs, nil, testNow))
			if diff := cmp.Diff(append([]string{}, tt.want...), got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A chain that begins with its authority is found out, whatever else is said about it.
func TestInspectReversed(t *testing.T) {
	chain, _ := mint(t, "reversed")
	got := strings.Join(found(inspect(chain.certs, nil, testNow)), " ")
	for _, want := range []string{"X-08@1", "X-03@1", "X-05@2", "X-13@1"} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is not in %s", want, got)
		}
	}
}

// spiffe
func TestInspectTrust(t *testing.T) {
	good, _ := mint(t, "good")
	other := fixedAuthority(t, "another root", fixedKey(9), nil, fixedKey(9), time.Hour)
	tests := []struct {
		name  string
		kind  string
		roots []*x509.Certificate
		want  []string
	}{
		{"under its root", "good", []*x509.Certificate{good.root}, nil},
		{"among others", "good", []*x509.Certificate{other, good.root}, nil},
		{"under another root", "good", []*x509.Certificate{other}, []string{"X-13@1"}},
		{"under a bundle that trusts nothing", "good", []*x509.Certificate{}, []string{"X-13@1"}},
		{"without its intermediate", "alone", []*x509.Certificate{good.root}, []string{"X-13@1"}},
		{"expired", "expired", []*x509.Certificate{good.root}, []string{"EXPIRED@1", "X-13@1"}},
		{"no path", "no-path", []*x509.Certificate{good.root}, []string{"X-03@1"}}, // go-spiffe would accept it
		{"huge key", "huge-issuer", []*x509.Certificate{good.root}, []string{"HUGE-KEY@2", "X-13@1"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m, _ := mint(t, tt.kind)
			in := newInspection(&chain{source: "test", certs: m.certs}, tt.roots, testNow)
			if diff := cmp.Diff(append([]string{}, tt.want...), found(in.Findings)); diff != "" {
				t.Error(diff)
			}
			if want := map[bool]string{true: verifiedYes, false: verifiedNo}[len(tt.want) == 0]; in.Verified != want {
				t.Errorf("verified %q, want %q", in.Verified, want)
			}
		})
	}
}

// spiffe: ID-01, ID-02, ID-03, ID-04, ID-05, ID-06, ID-07, X-03
func TestIDRules(t *testing.T) {
	const base = "spiffe://example.org/"
	tests := []struct {
		uri  string
		want string // empty: no finding
	}{
		{base + "ns/shop/sa/web", ""},
		{base + "A-b._9", ""},
		{"spiffe://10.0.0.1/a", ""},        // nothing special for what looks like an address
		{"spiffe://1.2.3.4.5/a", ""},       // or a broken one
		{"spiffe://under_score.org/a", ""}, // or for what is no DNS name
		{"spiffe://-.-/a", ""},             //
		{base + strings.Repeat("a", 2048-len(base)), ""},
		{base + strings.Repeat("a", 2049-len(base)), "ID-07"},
		{"spiffe://" + strings.Repeat("a", 255) + "/a", ""},
		{"spiffe://" + strings.Repeat("a", 256) + "/a", "ID-07"},
		{"spiffe://example.org", "X-03"},
		{"", "ID-01"},
		{"spiffe://", "ID-01"},
		{"spiffe:example.org/a", "ID-01"},
		{"https://example.org/a", "ID-01"},
		{"spiffe:///a", "ID-01"},
		{base + "a?b=c", "ID-01"},
		{base + "a#b", "ID-01"},
		{"spiffe://user@example.org/a", "ID-02"},
		{"spiffe://user:pass@example.org/a", "ID-02"},
		{"spiffe://example.org:443/a", "ID-02"},
		{"spiffe://example.org:/a", "ID-02"},
		{"spiffe://exa%6dple.org/a", "ID-03"},
		{"spiffe://ex\u00e4mple.org/a", "ID-03"},
		{"spiffe://exa mple.org/a", "ID-03"},
		{"SPIFFE://example.org/a", "ID-08"},
		{"spiffe://Example.org/a", "ID-08"},
		{base, "ID-05"},
		{base + "a/", "ID-05"},
		{base + "a//b", "ID-05"},
		{base + "./a", "ID-05"},
		{base + "a/../b", "ID-05"},
		{base + "%41", "ID-05"},
		{base + "a%2fb", "ID-05"},
		{base + "a b", "ID-06"},
		{base + "a:b", "ID-06"},
		{base + "\u00e4", "ID-06"},
		{base + "a\x00", "ID-06"},
	}
	for _, tt := range tests {
		t.Run(tt.uri[:min(len(tt.uri), 60)], func(t *testing.T) {
			r := &rules{number: 1}
			idRules(r, tt.uri)
			var got strings.Builder
			for _, f := range r.found {
				got.WriteString(f.Rule)
			}
			if got.String() != tt.want {
				t.Errorf("found %q, want %q: %+v", got.String(), tt.want, r.found)
			}
		})
	}
}

// What stands in a certificate is shown as it stands there: url.URL would write the scheme in lower case.
func TestRawURIs(t *testing.T) {
	chain := mintWith(t, withURIs("SPIFFE://example.org/a%41"))
	if diff := cmp.Diff([]string{"SPIFFE://example.org/a%41"}, rawURIs(chain.certs[0])); diff != "" {
		t.Error(diff)
	}
}

// spiffe, B-01, B-04, B-05, B-06
func TestParseSPIFFEBundle(t *testing.T) {
	chain, _ := mint(t, "good")
	x5c := base64.StdEncoding.EncodeToString(chain.root.Raw)
	entry := func(s string) string { return strings.ReplaceAll(s, "CERT", `"`+x5c+`"`) }
	tests := []struct {
		name string
		doc  string
		want int    // roots
		err  string // part of the error
	}{
		{"one root", `{"keys":[{"kty":"EC","use":"x509-svid","x5c":[CERT]}]}`, 1, ""},
		{"empty: all is revoked", `{"keys":[]}`, 0, ""},
		{"no keys is not empty", `{}`, 0, "no keys"},
		{"null keys is not empty", `{"keys":null}`, 0, "no keys"},
		{"not JSON", `{`, 0, "not a SPIFFE bundle"},
		{"unknown kty", `{"keys":[{"kty":"FUTURE","use":"other"},{"kty":"EC","use":"x509-svid","x5c":[CERT]}]}`, 1, ""},
		{"unknown use", `{"keys":[{"kty":"EC","use":"wit-svid","x5c":[CERT]}]}`, 0, ""},
		{"JWT key", `{"keys":[{"kty":"EC","use":"jwt-svid","kid":"a"},{"kty":"EC","use":"x509-svid","x5c":[CERT]}]}`, 1, ""},
		{"no kty", `{"keys":[{"use":"x509-svid","x5c":[CERT]}]}`, 0, ""},
		{"no use", `{"keys":[{"kty":"EC","x5c":[CERT]}]}`, 0, ""},
		{"no x5c", `{"keys":[{"kty":"EC","use":"x509-svid"}]}`, 0, ""},
		{"only the first of x5c", `{"keys":[{"kty":"EC","use":"x509-svid","x5c":[CERT,"%%%"]}]}`, 1, ""},
		{"odd entry", `{"keys":[7,{"kty":"EC","use":"x509-svid","x5c":[CERT]}]}`, 1, ""},
		{"not base64", `{"keys":[{"kty":"EC","use":"x509-svid","x5c":["%%%"]}]}`, 0, "key 1"},
		{"not a certificate", `{"keys":[{"kty":"EC","use":"x509-svid","x5c":["AAAA"]}]}`, 0, "key 1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			roots, err := parseRoots([]byte(entry(tt.doc)))
			if (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			if len(roots) != tt.want {
				t.Errorf("%d roots, want %d", len(roots), tt.want)
			}
		})
	}
}

// spiffe: X-15, B-01, B-03, B-06
func TestWriteSPIFFE(t *testing.T) {
	f := newFakeAdmin(t)
	resp, err := f.GetBundle(t.Context(), &apiv1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := readBundle(resp)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := b.writeSPIFFE(&out); err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Keys     []map[string]any `json:"keys"`
		Sequence uint64           `json:"spiffe_sequence"`
		Hint     int              `json:"spiffe_refresh_hint"`
	}
	if err := json.Unmarshal(out.Bytes(), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Sequence != newGeneration || doc.Hint != 300 || len(doc.Keys) != 1 {
		t.Errorf("sequence %d, hint %d, %d keys", doc.Sequence, doc.Hint, len(doc.Keys))
	}
	for _, k := range doc.Keys {
		chain, _ := k["x5c"].([]any)
		if _, kid := k["kid"]; k["use"] != "x509-svid" || k["kty"] == "" || kid || len(chain) != 1 {
			t.Errorf("entry %v", k)
		}
	}
	if _, err := spiffebundle.Parse(b.td, out.Bytes()); err != nil {
		t.Error(err)
	}
	if roots, err := parseRoots(out.Bytes()); err != nil || len(roots) != 1 || !roots[0].Equal(f.root) {
		t.Errorf("read back %d roots, %v", len(roots), err)
	}
}

func TestParseCertificates(t *testing.T) {
	chain, _ := mint(t, "good")
	leaf, inter := chain.certs[0], chain.certs[1]
	tests := []struct {
		name    string
		in      []byte
		want    int
		ignored int
		err     string
	}{
		{"PEM with a key before it", chain.pem(), 2, 1, ""},
		{"PEM with text around it", []byte("subject=x\n" + pemOf(leaf) + "\n---\n"), 1, 0, ""},
		{"DER", leaf.Raw, 1, 0, ""},
		{"DER, one after the other", append(bytes.Clone(leaf.Raw), inter.Raw...), 2, 0, ""},
		{"empty", nil, 0, 0, "empty"},
		{"blank", []byte(" \n"), 0, 0, "empty"},
		{"text", []byte("hello"), 0, 0, "neither PEM nor"},
		{"DER with more behind it", append(bytes.Clone(leaf.Raw), 1), 0, 0, "neither PEM nor"},
		{"a DER key", mustPKCS8(t, chain), 0, 0, "certificate 1"},
		{"only a key", []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), 0, 1, "no certificate"},
		{"bad base64 inside", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), 0, 0, "certificate 1"},
		{"too many", bytes.Repeat([]byte(pemOf(leaf)), maxCertificates+1), 0, 0, "more than 100"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			certs, ignored, err := parseCertificates(tt.in)
			if (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			if len(certs) != tt.want || ignored != tt.ignored {
				t.Errorf("%d certificates, %d ignored, want %d and %d", len(certs), ignored, tt.want, tt.ignored)
			}
		})
	}
}

func mustPKCS8(t *testing.T, m *minted) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(m.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestReadAllIsBounded(t *testing.T) {
	if _, err := readAll(bytes.NewReader(make([]byte, maxInput))); err != nil {
		t.Errorf("at the limit: %v", err)
	}
	if _, err := readAll(bytes.NewReader(make([]byte, maxInput+1))); err == nil {
		t.Error("above the limit: no error")
	}
}

// FuzzInspect: whatever the bytes, what is printed about them is printable, and nothing panics.
//
// threat: L14
func FuzzInspect(f *testing.F) {
	for _, kind := range []string{"good", "two-uris", "ca-leaf", "san-soft", "inter-path", "reversed"} {
		chain, _ := mint(f, kind)
		f.Add(chain.pem())
		f.Add(append(bytes.Clone(chain.certs[0].Raw), chain.certs[1].Raw...))
	}
	hostile := mintWith(f, func(b *blueprint) {
		b.leaf.Subject.CommonName = "\x1b]0;owned\a\r\n\u202e"
		b.uris = []string{"spiffe://example.org/%1b"}
	})
	f.Add(hostile.pem())
	root, _ := mint(f, "good")
	f.Fuzz(func(t *testing.T, data []byte) {
		certs, ignored, err := parseCertificates(data)
		if err != nil {
			if certs != nil {
				t.Error("certificates beside an error")
			}
			return
		}
		if len(certs) == 0 || len(certs) > maxCertificates {
			t.Fatalf("%d certificates without an error", len(certs))
		}
		in := newInspection(&chain{source: "fuzz", certs: certs, ignored: ignored}, []*x509.Certificate{root.root}, testNow)
		for _, format := range []string{"wide", "json"} {
			var out bytes.Buffer
			o := &output{format: format}
			r := result{object: in, text: func(bool) []block { return describeInspection(in, certs, testNow) }}
			if err := o.render(&out, r); err != nil {
				t.Fatalf("%s: %v", format, err)
			}
			for line := range strings.Lines(out.String()) {
				if line = strings.TrimSuffix(line, "\n"); line != scrub(line) {
					t.Errorf("%s lets control characters through: %q", format, line)
				}
			}
		}
	})
}

// FuzzBundle: a bundle file yields roots or an error, never a panic.
func FuzzBundle(f *testing.F) {
	chain, _ := mint(f, "good")
	f.Add([]byte(pemOf(chain.root)))
	f.Add([]byte(`{"keys":[{"kty":"EC","use":"x509-svid","x5c":["` + base64.StdEncoding.EncodeToString(chain.root.Raw) + `"]}]}`))
	f.Add([]byte(`{"keys":[{"kty":"EC"},7,null]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		roots, err := parseRoots(data)
		if err != nil && roots != nil || len(roots) > maxCertificates {
			t.Errorf("%d roots, error %v", len(roots), err)
		}
	})
}
