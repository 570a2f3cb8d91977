package issuance

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/signet-ca/signet/api"
)

// A broken row edits a good certificate so that it breaks one rule, perhaps along with others that cannot be kept then.
type brokenRow struct {
	lint string
	edit func(*x509.Certificate)
}

func rawExtension(oid asn1.ObjectIdentifier, critical bool, value []byte) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oid, Critical: critical, Value: value})
	}
}

func rawSAN(critical bool, names ...[]byte) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.URIs, c.DNSNames = nil, nil
		rawExtension(oidSubjectAltName, critical, san(names...))(c)
	}
}

// keyUsageBits is the DER of a KeyUsage.
func keyUsageBits(b byte) []byte { return []byte{3, 2, 0, b} }

// spiffe: ID-01, ID-02, ID-03, ID-05, ID-06, ID-07, X-01, X-03, X-04, X-08, X-09, X-10, X-11
// threat: C26
func TestLintLeaf(t *testing.T) {
	h := newHierarchy(t, withNames)
	rows := []brokenRow{
		{"one-uri", rawSAN(true)},
		{"one-uri", rawSAN(true, uriName(testID.String()), uriName(testID.String()))},
		{"one-uri", rawSAN(true, tlv(0x82, []byte("cart.shop.svc")))},
		{"workload-id", rawSAN(true, uriName("spiffe://example.org"))},
		{"workload-id", rawSAN(true, uriName("spiffe://"+strings.Repeat("a", 256)+"/x"))},
		{"not-an-authority", func(c *x509.Certificate) { c.IsCA = true }},
		{"key-usage", func(c *x509.Certificate) { c.KeyUsage = 0 }},
		{"key-usage", func(c *x509.Certificate) { c.KeyUsage = 0; rawExtension(oidKeyUsage, false, keyUsageBits(0x80))(c) }},
		{"digital-signature", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }},
		{"no-authority-usage", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }},
		{"no-authority-usage", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }},
		{"both-extended-usages", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }},
		{"both-extended-usages", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }},
		{"both-extended-usages", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }},
		{"critical-san", rawSAN(false, uriName(testID.String()))},

		{"basic-constraints", func(c *x509.Certificate) { c.BasicConstraintsValid = false }},
		{"basic-constraints", func(c *x509.Certificate) {
			c.BasicConstraintsValid = false
			rawExtension(oidBasicConstraints, false, []byte{tagSequence, 0})(c)
		}},
		{"key-usage-alone", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyEncipherment }},
		{"extended-usages-alone", func(c *x509.Certificate) { c.ExtKeyUsage = nil }},
		{"extended-usages-alone", func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) }},
		{"extended-usages-alone", func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} }},
		{"empty-subject", func(c *x509.Certificate) { c.Subject.CommonName = "cart" }},
		{"serial", func(c *x509.Certificate) { c.SerialNumber = big.NewInt(1) }},
		{"serial", func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 159) }},
		{"serial", func(c *x509.Certificate) { c.SerialNumber = new(big.Int) }},
		{"other-names", func(c *x509.Certificate) { c.EmailAddresses = []string{"a@example.org"} }},
		{"other-names", func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} }},
		{"other-names", rawSAN(true, uriName(testID.String()), tlv(0xa0, oid(1, 2, 3), tlv(0xa0, tlv(12, []byte("x")))))},
		{"other-names", func(c *x509.Certificate) { c.DNSNames = []string{"UPPER.svc"} }},
		{"key-identifiers", func(c *x509.Certificate) { c.SubjectKeyId = nil }},
		{"key-identifiers", func(c *x509.Certificate) { c.SubjectKeyId = []byte{1, 2, 3} }},
		{"lifetime", func(c *x509.Certificate) { c.NotAfter = c.NotBefore }},
		{"lifetime", func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(MaxTTL + MaxBackdate + time.Second) }},
		{"extensions", rawExtension(asn1.ObjectIdentifier{1, 2, 3, 4}, false, []byte{5, 0})},
		{"extensions", func(c *x509.Certificate) { c.OCSPServer = []string{"http://ocsp.example.org"} }},
	}
	for _, uri := range malformedIDs {
		// crypto/x509 does not even parse some of them; LintLeaf never sees those.
		if u, err := url.Parse(uri); err == nil && isASCII(uri) && !strings.ContainsFunc(u.Host, func(r rune) bool { return r == 0 || r == ' ' || r == utf8.RuneError }) && u.Host != "" {
			rows = append(rows, brokenRow{"workload-id", rawSAN(true, uriName(uri))})
		}
	}
	checkRows(t, leafLints, rows, []string{"version", "signature-algorithm", "authority-key-identifier"}, LintLeaf,
		func(edit func(*x509.Certificate)) *x509.Certificate { return h.leaf(t, edit) })

	// These cannot be reached through crypto/x509's encoder, so a parsed certificate is changed.
	for _, tt := range []brokenRow{
		{"version", func(c *x509.Certificate) { c.Version = 1 }},
		{"signature-algorithm", func(c *x509.Certificate) { c.SignatureAlgorithm = x509.SHA1WithRSA }},
		{"signature-algorithm", func(c *x509.Certificate) { c.SignatureAlgorithm = x509.UnknownSignatureAlgorithm }},
		{"authority-key-identifier", func(c *x509.Certificate) { c.AuthorityKeyId = nil }},
		{"authority-key-identifier", func(c *x509.Certificate) { c.AuthorityKeyId = c.SubjectKeyId }},
	} {
		c := h.leaf(t, func(*x509.Certificate) {})
		tt.edit(c)
		wantLint(t, LintLeaf(c), tt.lint)
	}
}

func isASCII(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r >= 0x80 }) < 0 && strings.ToValidUTF8(s, "") == s
}

// spiffe
func TestLintAuthorities(t *testing.T) {
	h := newHierarchy(t)
	key := newKey(t, KeyP256)
	common := []brokenRow{
		{"authority", func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero, c.MaxPathLen = false, false, 0 }},
		{"key-usage", func(c *x509.Certificate) { c.KeyUsage = 0 }},
		{"key-usage", func(c *x509.Certificate) { c.KeyUsage = 0; rawExtension(oidKeyUsage, false, keyUsageBits(6))(c) }},
		{"certificate-signing", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }},
		{"trust-domain-id", func(c *x509.Certificate) { c.URIs = nil }},
		{"trust-domain-id", func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs...) }},
		{"trust-domain-id", func(c *x509.Certificate) { c.URIs = []*url.URL{testID.URL()} }},
		{"trust-domain-id", func(c *x509.Certificate) { c.URIs = []*url.URL{parseURL(t, "spiffe://example.org/")} }},
		{"trust-domain-id", rawSAN(false, uriName("spiffe://example.org?"))},
		{"trust-domain-id", rawSAN(false, uriName("spiffe://"+strings.Repeat("a", 256)))},
		{"basic-constraints", func(c *x509.Certificate) {
			c.BasicConstraintsValid, c.IsCA = false, false
			rawExtension(oidBasicConstraints, false, tlv(tagSequence, []byte{1, 1, 0xff}))(c)
		}},
		{"usages-alone", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }},
		{"usages-alone", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }},
		{"serial", func(c *x509.Certificate) { c.SerialNumber = big.NewInt(7) }},
		{"name-constraints", func(c *x509.Certificate) { c.ExcludedDNSDomains, c.PermittedDNSDomainsCritical = []string{""}, false }},
		{"lifetime", func(c *x509.Certificate) { c.NotAfter = c.NotBefore }},
		{"extensions", rawExtension(asn1.ObjectIdentifier{1, 2, 3, 4}, false, []byte{5, 0})},
	}
	own := []brokenRow{
		{"own-subject", func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "root"} }},
		{"own-subject", func(c *x509.Certificate) { c.Subject = pkix.Name{SerialNumber: "1"} }},
		{"key-identifiers", func(c *x509.Certificate) { c.SubjectKeyId = []byte{1} }},
	}
	lengths := func(lens ...int) (rows []brokenRow) {
		for _, n := range lens {
			rows = append(rows, brokenRow{"path-length", func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = n, n == 0 }})
		}
		return rows
	}
	make := func(parent *x509.Certificate, parentKey crypto.Signer, pathLen int) func(func(*x509.Certificate)) *x509.Certificate {
		return func(edit func(*x509.Certificate)) *x509.Certificate {
			return authority(t, parent, parentKey, key.Public(), func(c *x509.Certificate) {
				c.MaxPathLen, c.MaxPathLenZero = pathLen, pathLen == 0
				edit(c)
			})
		}
	}
	skip := []string{"version", "signature-algorithm", "self-signed", "not-self-signed", "authority-key-identifier"}
	t.Run("root", func(t *testing.T) {
		checkRows(t, slices.Concat(authorityLints, rootLints), slices.Concat(common, own, lengths(0, 1)), skip, LintRoot, make(nil, key, -1))
		wantLint(t, LintRoot(h.cert), "self-signed")
	})
	t.Run("intermediate", func(t *testing.T) {
		checkRows(t, slices.Concat(authorityLints, intermediateLints), slices.Concat(common, own, lengths(-1, 1)), skip, LintIntermediate, make(h.root, h.rootKey, 0))
		wantLint(t, LintIntermediate(h.root), "not-self-signed")
		wantLint(t, LintIntermediate(h.root), "authority-key-identifier")
	})
	t.Run("cross", func(t *testing.T) {
		checkRows(t, slices.Concat(authorityLints, crossLints), slices.Concat(common, lengths(-1, 0, 2)), skip, LintCross, make(h.root, h.rootKey, 1))
		wantLint(t, LintCross(h.root), "not-self-signed")
	})
}

// checkRows checks that a good certificate passes, that each row breaks its rule, and that each rule has a row.
func checkRows(t *testing.T, lints []lint, rows []brokenRow, skip []string, check func(*x509.Certificate) error,
	make func(edit func(*x509.Certificate)) *x509.Certificate) {
	t.Helper()
	if err := check(make(func(*x509.Certificate) {})); err != nil {
		t.Fatalf("a good certificate fails: %v", err)
	}
	seen := map[string]bool{}
	for _, tt := range rows {
		seen[tt.lint] = true
		wantLint(t, check(make(tt.edit)), tt.lint)
	}
	for _, l := range lints {
		if !seen[l.name] && !slices.Contains(skip, l.name) {
			t.Errorf("no row breaks %s", l.name)
		}
		if l.rule == "" || l.check == nil {
			t.Errorf("%s has no source or no function", l.name)
		}
	}
}

func wantLint(t *testing.T, err error, lint string) {
	t.Helper()
	if api.ReasonOf(err) != api.LintFailed || !strings.Contains(err.Error(), lint+":") {
		t.Errorf("error %v, want %s", err, lint)
	}
}

func TestLintNames(t *testing.T) {
	for _, lints := range [][]lint{leafLints, slices.Concat(authorityLints, rootLints), slices.Concat(authorityLints, intermediateLints), slices.Concat(authorityLints, crossLints)} {
		seen := map[string]bool{}
		for _, l := range lints {
			if seen[l.name] {
				t.Errorf("%s is there twice", l.name)
			}
			seen[l.name] = true
		}
	}
}
