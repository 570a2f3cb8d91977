package issuance

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// spiffe
func TestVerifyAccepts(t *testing.T) {
	h := newHierarchy(t, withNames)
	issued := h.issue(t)
	foreign := h.leaf(t, func(c *x509.Certificate) {
		c.Subject = pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}
		c.SerialNumber = big.NewInt(4711)
		c.KeyUsage |= x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement
		c.ExtKeyUsage = nil
		c.SubjectKeyId = nil
		c.DNSNames = []string{"Cart.shop.svc"}
		c.EmailAddresses = []string{"cart@example.org"}
		c.NotAfter = testNow.Add(3 * day)
		c.BasicConstraintsValid = false
	})
	more := h.leaf(t, func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) })
	// Another authority with the same subject must not stand in the way.
	twin := authority(t, nil, h.rootKey, h.rootKey.Public(), func(c *x509.Certificate) { c.RawSubject, c.SubjectKeyId = h.root.RawSubject, []byte("twin") })
	for _, tt := range []struct {
		name         string
		chain, roots []*x509.Certificate
		now          time.Time
	}{
		{"ours", certs(issued.Leaf, h.cert), certs(h.root), testNow},
		{"in its first second", certs(issued.Leaf, h.cert), certs(h.root), issued.Leaf.NotBefore},
		{"in its last second", certs(issued.Leaf, h.cert), certs(h.root), issued.Leaf.NotAfter},
		{"with the root", certs(issued.Leaf, h.cert, h.root), certs(h.root), testNow},
		{"intermediate as the root", certs(issued.Leaf), certs(h.cert), testNow},
		{"of somebody else, all that may be different", certs(foreign, h.cert), certs(h.root), testNow},
		{"a further extended usage", certs(more, h.cert), certs(h.root), testNow},
		{"a second root of that subject", certs(issued.Leaf, h.cert), certs(twin, h.root), testNow},
		{"roots that are not", certs(issued.Leaf, h.cert), certs(nil, issued.Leaf, h.root), testNow},
	} {
		t.Run(tt.name, func(t *testing.T) { wantReason(t, Verify(tt.chain, tt.roots, testID, tt.now), "") })
	}
}

// spiffe
// threat: CVE-2025-6037
func TestVerifyRefuses(t *testing.T) {
	h, other := newHierarchy(t), newHierarchy(t)
	good := h.issue(t).Leaf
	leaf := func(edit func(*x509.Certificate)) []*x509.Certificate { return certs(h.leaf(t, edit), h.cert) }
	// under is a good leaf below an intermediate that is not.
	under := func(edit func(*x509.Certificate)) []*x509.Certificate {
		bad := h
		bad.cert = authority(t, h.root, h.rootKey, h.key.Public(), edit)
		return certs(bad.leaf(t, func(*x509.Certificate) {}), bad.cert)
	}
	flipped := slices.Clone(good.Raw)
	flipped[len(flipped)-1] ^= 1
	corrupt := must(x509.ParseCertificate(flipped))(t)
	middleKey := newKey(t, KeyP256)
	middle := authority(t, h.root, h.rootKey, middleKey.Public(), nil) // path length 0
	deep := h
	deep.cert = authority(t, middle, middleKey, h.key.Public(), nil)
	leafKey := newKey(t, KeyP256)
	template := must(castOf(must(Profile{}.resolve())(t), Request{ID: testID, PublicKey: leafKey.Public()}, h.issuer, testNow))(t).template(t)
	parent := forge(t, template, h.cert, leafKey.Public(), h.key)
	child := forge(t, template, parent, newKey(t, KeyP256).Public(), leafKey)
	tests := []struct {
		name         string
		chain, roots []*x509.Certificate
		now          time.Time
		id           spiffeid.ID
		want         string
	}{
		{"nothing", nil, certs(h.root), testNow, testID, "chain has"},
		{"hole", certs(good, nil), certs(h.root), testNow, testID, "chain has"},
		{"too long", append(certs(good), slices.Repeat(certs(h.cert), maxChain+1)...), certs(h.root), testNow, testID, "chain has"},
		{"no roots", certs(good, h.cert), nil, testNow, testID, "does not lead to a root"},
		{"other root", certs(good, h.cert), certs(other.root), testNow, testID, "does not lead to a root"},
		{"no intermediate", certs(good), certs(h.root), testNow, testID, "does not lead to a root"},
		{"itself as its root", certs(good), certs(good), testNow, testID, "does not lead to a root"},
		{"bad signature", certs(corrupt, h.cert), certs(h.root), testNow, testID, ""},
		{"before", certs(good, h.cert), certs(h.root), good.NotBefore.Add(-time.Second), testID, "expired or is not valid yet"},
		{"after", certs(good, h.cert), certs(h.root), good.NotAfter.Add(time.Second), testID, "expired or is not valid yet"},
		{"other identity", certs(good, h.cert), certs(h.root), testNow, spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/admin"), "another identity"},
		{"other trust domain", certs(good, h.cert), certs(h.root), testNow, spiffeid.RequireFromString("spiffe://example.com/ns/shop/sa/cart"), "another identity"},
		{"no identity", certs(good, h.cert), certs(h.root), testNow, spiffeid.ID{}, "another identity"},

		{"no URI", leaf(rawSAN(true, tlv(0x82, []byte("a.svc")))), certs(h.root), testNow, testID, "one-uri"},
		{"two URIs", leaf(rawSAN(true, uriName(testID.String()), uriName("spiffe://example.org/b"))), certs(h.root), testNow, testID, "one-uri"},
		{"https", leaf(rawSAN(true, uriName("https://example.org/ns/shop/sa/cart"))), certs(h.root), testNow, testID, "workload-id"},
		{"no path", leaf(rawSAN(true, uriName("spiffe://example.org"))), certs(h.root), testNow, testTD.ID(), "workload-id"},
		{"empty query", leaf(rawSAN(true, uriName(testID.String()+"?"))), certs(h.root), testNow, testID, "workload-id"},
		{"empty fragment", leaf(rawSAN(true, uriName(testID.String()+"#"))), certs(h.root), testNow, testID, "workload-id"},
		{"upper-case scheme", leaf(rawSAN(true, uriName("SPIFFE"+testID.String()[6:]))), certs(h.root), testNow, testID, "workload-id"},
		{"authority", leaf(func(c *x509.Certificate) { c.IsCA = true }), certs(h.root), testNow, testID, "not-an-authority"},
		{"the intermediate itself", certs(h.cert), certs(h.root), testNow, testTD.ID(), "not-an-authority"},
		{"the root itself", certs(h.root), certs(h.root), testNow, testTD.ID(), "not-an-authority"},
		{"no key usage", leaf(func(c *x509.Certificate) { c.KeyUsage = 0 }), certs(h.root), testNow, testID, "key-usage"},
		{"no digital signature", leaf(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), certs(h.root), testNow, testID, "digital-signature"},
		{"certificate signing", leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), certs(h.root), testNow, testID, "no-authority-usage"},
		{"revocation list signing", leaf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), certs(h.root), testNow, testID, "no-authority-usage"},
		{"servers only", leaf(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), certs(h.root), testNow, testID, "both-extended-usages"},
		{"san not critical", leaf(rawSAN(false, uriName(testID.String()))), certs(h.root), testNow, testID, "critical-san"},
		{"unknown critical extension", leaf(rawExtension([]int{1, 2, 3, 4}, true, []byte{5, 0})), certs(h.root), testNow, testID, "does not verify"},

		{"signed by a leaf", certs(child, parent, h.cert), certs(h.root), testNow, testID, ""},
		{"under one that may not sign", under(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), certs(h.root), testNow, testID, ""},
		{"under one without key usage", under(func(c *x509.Certificate) { c.KeyUsage = 0 }), certs(h.root), testNow, testID, "may not issue it"},
		{"under one for clients only", under(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), certs(h.root), testNow, testID, "may not issue it"},
		{"under one that is no authority", under(func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false }), certs(h.root), testNow, testID, ""},
		{"under one that expired", under(func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Second) }), certs(h.root), testNow, testID, "expired or is not valid yet"},
		{"under one of other names", under(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.com"} }), certs(h.root), testNow, testID, "outside of what an authority"},
		{"under one that excludes the name", under(func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"example.org"} }), certs(h.root), testNow, testID, "outside of what an authority"},
		{"path too long", certs(deep.leaf(t, func(*x509.Certificate) {}), deep.cert, middle), certs(h.root), testNow, testID, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := Verify(tt.chain, tt.roots, tt.id, tt.now)
			wantReason(t, err, api.SVIDRejected)
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q in it", err, tt.want)
			}
			if strings.Contains(err.Error(), "example") {
				t.Errorf("there is a name in the error: %v", err)
			}
		})
	}
}

// The chain leaf, intermediate, new root signed by the old one verifies for whoever holds either root or both.
//
// spiffe: X-13
func TestCrossSigned(t *testing.T) {
	older, newer := newHierarchy(t), newHierarchy(t)
	cross := must(CrossSign(testTD, older.root, older.rootKey, newer.root, testNow))(t)
	leaf := newer.issue(t).Leaf
	chain := certs(leaf, newer.cert, cross)
	for _, tt := range []struct {
		name  string
		roots []*x509.Certificate
		want  api.Reason
	}{
		{"older", certs(older.root), ""},
		{"newer", certs(newer.root), ""},
		{"both", certs(older.root, newer.root), ""},
		{"both, newer first", certs(newer.root, older.root), ""},
		{"neither", certs(newHierarchy(t).root), api.SVIDRejected},
	} {
		t.Run(tt.name, func(t *testing.T) { wantReason(t, Verify(chain, tt.roots, testID, testNow), tt.want) })
	}
	t.Run("without it, older", func(t *testing.T) {
		wantReason(t, Verify(certs(leaf, newer.cert), certs(older.root), testID, testNow), api.SVIDRejected)
	})
}
