package issuance

import (
	"bytes"
	"crypto/fips140"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/cryptotest"
	"time"

	"github.com/google/go-cmp/cmp"
	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	zl "github.com/zmap/zlint/v3/lint"
)

var update = flag.Bool("update", false, "write the golden files anew")

// A golden certificate is one of each kind that Signet makes, byte for byte the same at each run: the random numbers are.
type golden struct {
	name string
	cert *x509.Certificate
}

// goldenCertificates makes them all. Whoever calls it cannot be a parallel test.
func goldenCertificates(t *testing.T) []golden {
	t.Helper()
	if v := fips140.Version(); v == "v1.0.0" {
		t.Skipf("testing/cryptotest does not work with version %s of the cryptographic module", v)
	}
	var out []golden
	seed := uint64(0)
	fresh := func() { seed++; cryptotest.SetGlobalRandom(t, seed) } // a change of one certificate is no change of the next
	add := func(name string, c *x509.Certificate) { out = append(out, golden{name, c}) }

	fresh()
	h := newHierarchy(t)
	add("root", h.root)
	add("intermediate-excluding-names", h.cert)
	fresh()
	open := newHierarchy(t, withNames)
	add("intermediate", open.cert)
	fresh()
	add("cross", must(CrossSign(testTD, h.root, h.rootKey, open.root, testNow))(t))
	fresh()
	rsaKey := newKey(t, KeyRSA2048)
	fresh()
	add("root-rsa-2048", must(NewRoot(testTD, rsaKey, 365*day, testNow))(t))
	fresh()
	add("root-ed25519", must(NewRoot(testTD, newKey(t, KeyEd25519), 365*day, testNow))(t))
	fresh()
	add("root-beyond-2050", must(NewRoot(testTD, newKey(t, KeyP384), 30*365*day, testNow))(t))
	leaf := func(name string, iss *Issuer, r Request) {
		fresh()
		if r.PublicKey == nil {
			r.PublicKey = rsaKey.Public()
		}
		r.ID = testID
		add(name, must(must(Prepare(Profile{}, r, iss, testNow))(t).Sign())(t).Leaf)
	}
	for _, kind := range []KeyKind{KeyP256, KeyP384, KeyEd25519} {
		fresh()
		leaf("leaf-"+string(kind), h.issuer, Request{PublicKey: newKey(t, kind).Public()})
	}
	leaf("leaf-rsa-2048", h.issuer, Request{})
	fresh()
	leaf("leaf-with-names", open.issuer, Request{PublicKey: newKey(t, KeyP256).Public(), DNSNames: []string{"cart.shop.svc", "*.cart.shop.svc"}})
	return out
}

// spiffe
// threat: K07
func TestGolden(t *testing.T) {
	for _, g := range goldenCertificates(t) {
		t.Run(g.name, func(t *testing.T) {
			for file, got := range map[string][]byte{g.name + ".der": g.cert.Raw, g.name + ".txt": []byte(describe(g.cert))} {
				path := filepath.Join("testdata", file)
				if *update {
					if err := os.MkdirAll("testdata", 0o755); err != nil {
						t.Fatal(err)
					}
					if err := os.WriteFile(path, got, 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(path)
				if err != nil {
					t.Fatalf("%v (run with -update)", err)
				}
				if strings.HasSuffix(file, ".txt") {
					if d := cmp.Diff(string(want), string(got)); d != "" {
						t.Errorf("(-want +got):\n%s", d)
					}
				} else if !bytes.Equal(want, got) {
					t.Errorf("%s differs", file)
				}
			}
		})
	}
}

// describe writes a certificate for people, every extension of it.
func describe(c *x509.Certificate) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-20s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("version", "%d", c.Version)
	line("serial", "%s", SerialString(c.SerialNumber))
	line("issuer", "%s", c.Issuer)
	line("subject", "%s", c.Subject)
	line("not before", "%s", c.NotBefore.Format(time.RFC3339))
	line("not after", "%s", c.NotAfter.Format(time.RFC3339))
	line("key", "%s", KeyName(c.PublicKey))
	line("signature", "%s", c.SignatureAlgorithm)
	for _, e := range c.Extensions {
		name := map[string]string{
			"2.5.29.14": "key id", "2.5.29.15": "key usage", "2.5.29.17": "alternative name", "2.5.29.19": "basic constraints",
			"2.5.29.30": "name constraints", "2.5.29.35": "authority key id", "2.5.29.37": "extended key usage",
		}[e.Id.String()]
		if e.Critical {
			name += " !"
		}
		value := fmt.Sprintf("%x", e.Value)
		switch e.Id.String() {
		case "2.5.29.14":
			value = fmt.Sprintf("%x", c.SubjectKeyId)
		case "2.5.29.15":
			value = fmt.Sprintf("%09b (bit 0 last)", c.KeyUsage)
		case "2.5.29.17":
			value = fmt.Sprint(c.URIs, c.DNSNames)
		case "2.5.29.19":
			value = fmt.Sprintf("authority %v, path length %d", c.IsCA, maxPathLen(c))
		case "2.5.29.30":
			value = fmt.Sprintf("excluded: DNS names %q, addresses %v", c.ExcludedDNSDomains, c.ExcludedIPRanges)
		case "2.5.29.35":
			value = fmt.Sprintf("%x", c.AuthorityKeyId)
		case "2.5.29.37":
			value = fmt.Sprint(c.ExtKeyUsage)
		}
		line(name, "%s", value)
	}
	return b.String()
}

// notForSPIFFE are the lints of zlint that our certificates fail on purpose, each with the reason.
// Nothing of RFC 5280 is among them.
var notForSPIFFE = map[string]string{
	"e_ext_san_uniform_resource_identifier_present": "web PKI: an SVID is a URI",
	"e_ca_country_name_missing":                     "web PKI: a trust domain has no country",
	"n_ca_digital_signature_not_set":                "we sign no OCSP responses",
	"e_dnsname_not_valid_tld":                       "web PKI: names of services are not public",
	"w_ct_sct_policy_count_unsatisfied":             "web PKI: no certificate transparency",

	"w_sub_ca_aia_missing":                           noRevocation,
	"w_sub_cert_aia_does_not_contain_issuing_ca_url": noRevocation,
	"e_sub_cert_aia_missing":                         noRevocation,
	"e_sub_ca_crl_distribution_points_missing":       noRevocation,

	"e_sub_cert_certificate_policies_missing": noPolicies,
	"e_sub_cert_cert_policy_empty":            noPolicies,
	"e_sub_ca_certificate_policies_missing":   noPolicies,
	"e_invalid_ca_certificate_policies":       noPolicies,

	"n_sub_ca_eku_missing": noAuthorityEKU,
	"n_mp_allowed_eku":     noAuthorityEKU,

	"w_ext_subject_key_identifier_not_recommended_subscriber": "web PKI: RFC 5280 section 4.2.1.2 recommends it",
	"e_algorithm_identifier_improper_encoding":                noEd25519,
	"e_signature_algorithm_not_supported":                     noEd25519,
	"e_cabf_ecc_allowed_key_usages of authorities":            "a rule for leaves, which zlint applies to every certificate",
}

const (
	noRevocation   = "web PKI: SVIDs are short-lived, nothing is to be fetched"
	noPolicies     = "web PKI: there are no certificate policies"
	noAuthorityEKU = "web PKI: SPIFFE X509-SVID section 4.4 warns of extended usages of authorities"
	noEd25519      = "web PKI: Ed25519 is not in use there"
)

// spiffe: X-13
func TestZLint(t *testing.T) {
	used := map[string]bool{}
	for _, g := range goldenCertificates(t) {
		t.Run(g.name, func(t *testing.T) {
			c := must(zx509.ParseCertificate(g.cert.Raw))(t)
			for name, result := range zlint.LintCertificate(c).Results {
				if result.Status < zl.Notice || result.Status == zl.NA || result.Status == zl.NE {
					continue
				}
				if c.IsCA && notForSPIFFE[name] == "" {
					name += " of authorities"
				}
				if notForSPIFFE[name] == "" {
					t.Errorf("%s: %s %s", name, result.Status, result.Details)
				}
				used[name] = true
			}
		})
	}
	for name := range notForSPIFFE {
		if !used[name] {
			t.Errorf("%s is excused, but nothing fails it", name)
		}
	}
}

// OpenSSL, in its strict mode, agrees with us on which chains verify.
//
// spiffe: X-13
func TestOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	h, open, newer := newHierarchy(t), newHierarchy(t, withNames), newHierarchy(t)
	cross := must(CrossSign(testTD, h.root, h.rootKey, newer.root, testNow))(t)
	leaf := h.issue(t).Leaf
	named := func(c *x509.Certificate) { c.DNSNames = []string{"cart.shop.svc"} }
	addressed := func(c *x509.Certificate) { c.IPAddresses = append(c.IPAddresses, []byte{10, 0, 0, 1}) }
	for _, tt := range []struct {
		name  string
		chain []*x509.Certificate
		root  *x509.Certificate
		ok    bool
		more  []*x509.Certificate // roots
	}{
		{"chain", certs(leaf, h.cert), h.root, true, nil},
		{"other root", certs(leaf, h.cert), open.root, false, nil},
		{"dns name, not excluded", certs(open.leaf(t, named), open.cert), open.root, true, nil},
		{"dns name, excluded", certs(h.leaf(t, named), h.cert), h.root, false, nil},
		{"address, excluded", certs(h.leaf(t, addressed), h.cert), h.root, false, nil},
		{"cross-signed, under the older root", certs(newer.issue(t).Leaf, newer.cert, cross), h.root, true, nil},
		{"cross-signed, under the newer root", certs(newer.issue(t).Leaf, newer.cert, cross), newer.root, true, nil},
		{"cross-signed, under both roots", certs(newer.issue(t).Leaf, newer.cert, cross), h.root, true, certs(newer.root)},
		{"cross-signed, under both roots, the newer first", certs(newer.issue(t).Leaf, newer.cert, cross), newer.root, true, certs(h.root)},
		{"cross-signed, under neither root", certs(newer.issue(t).Leaf, newer.cert, cross), open.root, false, nil},
		{"without it, under the older root", certs(newer.issue(t).Leaf, newer.cert), h.root, false, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, purpose := range []string{"sslserver", "sslclient"} {
				dir := t.TempDir()
				out, err := exec.CommandContext(t.Context(), openssl, "verify", "-x509_strict", "-purpose", purpose,
					"-attime", fmt.Sprint(testNow.Unix()), "-CAfile", writePEM(t, dir, "root", append(certs(tt.root), tt.more...)...),
					"-untrusted", writePEM(t, dir, "chain", tt.chain[1:]...), writePEM(t, dir, "leaf", tt.chain[0])).CombinedOutput()
				if err == nil != tt.ok {
					t.Errorf("%s: %v: %s", purpose, err, out)
				}
			}
			wantOK := Verify(tt.chain, append(certs(tt.root), tt.more...), testID, testNow) == nil
			if wantOK != tt.ok {
				t.Error("Verify differs")
			}
		})
	}
}

func writePEM(t *testing.T, dir, name string, certs ...*x509.Certificate) string {
	t.Helper()
	var all [][]byte
	for _, c := range certs {
		all = append(all, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	path := filepath.Join(dir, name+".pem")
	if err := os.WriteFile(path, slices.Concat(all...), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
