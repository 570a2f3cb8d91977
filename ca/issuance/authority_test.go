package issuance

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

func trustDomain(t testing.TB, name string) spiffeid.TrustDomain {
	t.Helper()
	return must(spiffeid.TrustDomainFromString(name))(t)
}

// spiffe, ID-09
func TestNewRoot(t *testing.T) {
	for _, kind := range []KeyKind{KeyP256, KeyP384, KeyEd25519, KeyRSA2048} {
		t.Run(string(kind), func(t *testing.T) {
			key := newKey(t, kind)
			root := must(NewRoot(testTD, key, 365*day, testNow))(t)
			if err := root.CheckSignatureFrom(root); err != nil {
				t.Error(err)
			}
			if got := root.NotAfter; !got.Equal(testNow.Add(365 * day)) {
				t.Errorf("NotAfter %s", got)
			}
			if maxPathLen(root) != -1 || root.URIs[0].String() != "spiffe://example.org" || root.KeyUsage&x509.KeyUsageDigitalSignature != 0 {
				t.Errorf("path length %d, URI %v, key usage %b", root.MaxPathLen, root.URIs, root.KeyUsage)
			}
			if got := root.Subject.String(); !strings.HasPrefix(got, "SERIALNUMBER="+root.Subject.SerialNumber+",CN=example.org root,O=Signet") {
				t.Errorf("subject %s", got)
			}
		})
	}
}

// Verifiers look for an issuer by its subject, and Go gives up after 100 of the same.
func TestAuthoritiesAreTellable(t *testing.T) {
	h := newHierarchy(t)
	subjects, ids := map[string]bool{}, map[string]bool{}
	roots := certs()
	for range 150 {
		root := must(NewRoot(testTD, newKey(t, KeyP256), day, testNow))(t)
		subjects[string(root.RawSubject)], ids[string(root.SubjectKeyId)] = true, true
		roots = append(roots, root)
	}
	if len(subjects) != 150 || len(ids) != 150 {
		t.Errorf("%d subjects and %d key identifiers of 150", len(subjects), len(ids))
	}
	if err := Verify(certs(h.issue(t).Leaf, h.cert), append(roots, h.root), testID, testNow); err != nil {
		t.Errorf("a leaf does not verify among 151 roots: %v", err)
	}
	again := must(NewRoot(testTD, h.rootKey, day, testNow))(t)
	if bytes.Equal(again.RawSubject, h.root.RawSubject) {
		t.Error("two roots of one key have one subject")
	}
}

// spiffe: ID-04, ID-07
func TestNewRootArguments(t *testing.T) {
	key := newKey(t, KeyP256)
	for _, tt := range []struct {
		name string
		td   spiffeid.TrustDomain
		key  crypto.Signer
		ttl  time.Duration
		want api.Reason
	}{
		{"one label", trustDomain(t, "a"), key, day, ""},
		{"ipv4-like", trustDomain(t, "10.0.0.1"), key, day, ""},
		{"underscore", trustDomain(t, "my_td.prod-1"), key, day, ""},
		{"255 bytes", trustDomain(t, strings.Repeat("a", 255)), key, day, ""},
		{"256 bytes", trustDomain(t, strings.Repeat("a", 256)), key, day, api.ConfigInvalid},
		{"dot first", trustDomain(t, ".a"), key, day, api.ConfigInvalid},
		{"dot last", trustDomain(t, "a."), key, day, api.ConfigInvalid},
		{"two dots", trustDomain(t, "a..b"), key, day, api.ConfigInvalid},
		{"no trust domain", spiffeid.TrustDomain{}, key, day, api.ConfigInvalid},
		{"no key", testTD, nil, day, api.ConfigInvalid},
		{"ttl 0", testTD, key, 0, api.ConfigInvalid},
		{"ttl negative", testTD, key, -day, api.ConfigInvalid},
		{"a second", testTD, key, time.Second, ""},
		{"beyond 2050", testTD, key, 30 * 365 * day, ""},
		{"292 years", testTD, key, math.MaxInt64, ""},
		{"signer that fails", testTD, brokenSigner{key, func([]byte) ([]byte, error) { return nil, errors.New("no") }}, day, api.UpstreamRefused},
		{"signer that lies", testTD, brokenSigner{key, func([]byte) ([]byte, error) { return []byte("no"), nil }}, day, api.LintFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root, err := NewRoot(tt.td, tt.key, tt.ttl, testNow)
			wantReason(t, err, tt.want)
			if err == nil && len(root.Subject.CommonName) > 64 {
				t.Errorf("the common name has %d bytes", len(root.Subject.CommonName))
			}
		})
	}
	t.Run("beyond the year 9999", func(t *testing.T) {
		_, err := NewRoot(testTD, key, day, time.Date(9999, 12, 31, 12, 0, 0, 0, time.UTC))
		wantReason(t, err, api.LintFailed)
	})
}

// spiffe
func TestSignIntermediate(t *testing.T) {
	h := newHierarchy(t)
	key := newKey(t, KeyP256)
	request := IntermediateRequest{TrustDomain: testTD, PublicKey: key.Public(), NotAfter: testNow.Add(day)}
	c := must(SignIntermediate(h.root, h.rootKey, request, testNow))(t)
	if !c.NotAfter.Equal(request.NotAfter) || !c.NotBefore.Equal(testNow.Add(-authorityBackdate)) {
		t.Errorf("from %s to %s", c.NotBefore, c.NotAfter)
	}
	if maxPathLen(c) != 0 || !bytes.Equal(c.AuthorityKeyId, h.root.SubjectKeyId) || constrainsNames(c) {
		t.Errorf("path length %d, constraints %v", c.MaxPathLen, constrainsNames(c))
	}
	request.NotAfter = testNow.Add(1000 * day)
	if c = must(SignIntermediate(h.root, h.rootKey, request, testNow))(t); !c.NotAfter.Equal(h.root.NotAfter) {
		t.Errorf("outlives its parent: %s", c.NotAfter)
	}
	request.ExcludeNames = true
	if c = must(SignIntermediate(h.root, h.rootKey, request, testNow))(t); !excludesNames(c) || !c.PermittedDNSDomainsCritical {
		t.Error("names are not excluded")
	}
}

// spiffe: ID-04, ID-09
func TestSignIntermediateRefuses(t *testing.T) {
	h := newHierarchy(t)
	key := newKey(t, KeyP256)
	other := newHierarchy(t)
	root := func(edit func(*x509.Certificate)) *x509.Certificate {
		return authority(t, nil, h.rootKey, h.rootKey.Public(), func(c *x509.Certificate) {
			c.MaxPathLen, c.MaxPathLenZero = -1, false
			edit(c)
		})
	}
	type in struct {
		parent *x509.Certificate
		key    crypto.Signer
		r      IntermediateRequest
		now    time.Time
	}
	for _, tt := range []struct {
		name string
		edit func(*in)
		want api.Reason
	}{
		{"good", func(*in) {}, ""},
		{"no parent", func(i *in) { i.parent = nil }, api.UpstreamRefused},
		{"no key", func(i *in) { i.key = nil }, api.UpstreamRefused},
		{"other key", func(i *in) { i.key = other.rootKey }, api.UpstreamRefused},
		{"parent of path length 0", func(i *in) { i.parent, i.key = h.cert, h.key }, api.UpstreamRefused},
		{"parent is no authority", func(i *in) { i.parent = root(func(c *x509.Certificate) { c.IsCA, c.MaxPathLen = false, 0 }) }, api.UpstreamRefused},
		{"parent may not sign", func(i *in) { i.parent = root(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }) }, api.UpstreamRefused},
		{"parent without subject", func(i *in) { i.parent = root(func(c *x509.Certificate) { c.RawSubject = []byte{0x30, 0} }) }, api.UpstreamRefused},
		{"parent without a trust domain", func(i *in) { i.parent = root(func(c *x509.Certificate) { c.URIs = nil }) }, ""},
		{"parent of names that exclude ours", func(i *in) {
			i.parent = root(func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"example.org"} })
		}, api.UpstreamConstraints},
		{"parent of names that admit ours", func(i *in) {
			i.parent = root(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org"} })
		}, ""},
		{"parent of other names", func(i *in) {
			i.parent = root(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.com"} })
		}, api.UpstreamConstraints},
		{"parent expired", func(i *in) { i.now = h.root.NotAfter }, api.UpstreamRefused},
		{"parent not valid yet", func(i *in) { i.now = h.root.NotBefore.Add(-time.Second) }, api.UpstreamRefused},
		{"other trust domain", func(i *in) { i.r.TrustDomain = trustDomain(t, "example.com") }, api.ConfigInvalid},
		{"no trust domain", func(i *in) { i.r.TrustDomain = spiffeid.TrustDomain{} }, api.ConfigInvalid},
		{"no end", func(i *in) { i.r.NotAfter = time.Time{} }, api.ConfigInvalid},
		{"ends now", func(i *in) { i.r.NotAfter = testNow }, api.ConfigInvalid},
		{"parent's key", func(i *in) { i.r.PublicKey = h.rootKey.Public() }, api.KeyReused},
		{"no public key", func(i *in) { i.r.PublicKey = nil }, api.KeyType},
		{"signer that lies", func(i *in) {
			i.key = brokenSigner{h.rootKey, func([]byte) ([]byte, error) { return []byte("no"), nil }}
		}, api.LintFailed},
		{"signer that fails", func(i *in) {
			i.key = brokenSigner{h.rootKey, func([]byte) ([]byte, error) { return nil, errors.New("no") }}
		}, api.UpstreamRefused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i := in{h.root, h.rootKey, IntermediateRequest{TrustDomain: testTD, PublicKey: key.Public(), NotAfter: testNow.Add(day), ExcludeNames: true}, testNow}
			tt.edit(&i)
			c, err := SignIntermediate(i.parent, i.key, i.r, i.now)
			wantReason(t, err, tt.want)
			if (c == nil) != (err != nil) {
				t.Error("a certificate came with the error")
			}
		})
	}
}

// crypto/x509 does not compare a URI whose host is an address with constraints of any kind, so for such trust domains
// names cannot be excluded; everything else about them works.
//
// spiffe: ID-04
func TestTrustDomainThatReadsAsAnAddress(t *testing.T) {
	for name, want := range map[string]bool{"example.org": true, "a": true, "1": true, "my_td": true, "10.0.0.1": false, "10.0.0": true, "a..b": false} {
		if got := CanExcludeNames(trustDomain(t, name)); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	td := trustDomain(t, "10.0.0.1")
	rootKey, key := newKey(t, KeyP256), newKey(t, KeyP256)
	root := must(NewRoot(td, rootKey, day, testNow))(t)
	r := IntermediateRequest{TrustDomain: td, PublicKey: key.Public(), NotAfter: testNow.Add(day), ExcludeNames: true}
	_, err := SignIntermediate(root, rootKey, r, testNow)
	wantReason(t, err, api.ConfigInvalid)

	r.ExcludeNames = false
	iss := must(NewIssuer(td, certs(must(SignIntermediate(root, rootKey, r, testNow))(t)), root, key))(t)
	id := spiffeid.RequireFromString("spiffe://10.0.0.1/a")
	p := must(Prepare(Profile{}, Request{ID: id, PublicKey: newKey(t, KeyP256).Public()}, iss, testNow))(t)
	issued := must(p.Sign())(t)
	wantReason(t, Verify(certs(issued.Leaf, iss.Certificate()), certs(root), id, testNow), "")
}

// An intermediate that excludes names does so whoever has its key.
func TestExcludedNames(t *testing.T) {
	h, open := newHierarchy(t), newHierarchy(t, withNames)
	named := func(c *x509.Certificate) { c.DNSNames = []string{"cart.shop.svc"} }
	wantReason(t, Verify(certs(h.leaf(t, func(*x509.Certificate) {}), h.cert), certs(h.root), testID, testNow), "")
	wantReason(t, Verify(certs(h.leaf(t, named), h.cert), certs(h.root), testID, testNow), api.SVIDRejected)
	wantReason(t, Verify(certs(open.leaf(t, named), open.cert), certs(open.root), testID, testNow), "")
}

func TestCrossSign(t *testing.T) {
	older, newer := newHierarchy(t), newHierarchy(t)
	cross := must(CrossSign(testTD, older.root, older.rootKey, newer.root, testNow))(t)
	if !bytes.Equal(cross.RawSubject, newer.root.RawSubject) || !bytes.Equal(cross.SubjectKeyId, newer.root.SubjectKeyId) ||
		!bytes.Equal(cross.RawIssuer, older.root.RawSubject) || maxPathLen(cross) != 1 {
		t.Error("it does not stand for the newer root under the older")
	}
	upstream := authority(t, nil, newer.rootKey, newer.rootKey.Public(), func(c *x509.Certificate) {
		c.Subject.SerialNumber, c.SubjectKeyId, c.URIs, c.MaxPathLen, c.MaxPathLenZero = "", []byte("theirs"), nil, -1, false
	})
	foreignKey := newKey(t, KeyP256)
	foreign := must(NewRoot(trustDomain(t, "example.com"), foreignKey, day, testNow))(t)
	short := must(NewRoot(testTD, foreignKey, time.Hour, testNow))(t)
	for _, tt := range []struct {
		name   string
		parent *x509.Certificate
		key    crypto.Signer
		root   *x509.Certificate
		now    time.Time
		want   api.Reason
	}{
		{"good", older.root, older.rootKey, newer.root, testNow, ""},
		{"a root of an upstream", older.root, older.rootKey, upstream, testNow, ""},
		{"itself", older.root, older.rootKey, older.root, testNow, api.KeyReused},
		{"nothing", older.root, older.rootKey, nil, testNow, api.ConfigInvalid},
		{"a leaf", older.root, older.rootKey, newer.issue(t).Leaf, testNow, api.ConfigInvalid},
		{"of another trust domain", older.root, older.rootKey, foreign, testNow, api.ConfigInvalid},
		{"by another trust domain", foreign, foreignKey, newer.root, testNow, api.ConfigInvalid},
		{"by an upstream's", upstream, newer.rootKey, older.root, testNow, ""},
		{"by an intermediate", older.cert, older.key, newer.root, testNow, api.UpstreamRefused},
		{"expired", older.root, older.rootKey, short, testNow.Add(time.Hour), api.ConfigInvalid},
		{"by an expired one", short, foreignKey, newer.root, testNow.Add(time.Hour), api.UpstreamRefused},
		{"other key", older.root, newer.rootKey, newer.root, testNow, api.UpstreamRefused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := CrossSign(testTD, tt.parent, tt.key, tt.root, tt.now)
			wantReason(t, err, tt.want)
			if err == nil && (c.NotAfter.After(tt.parent.NotAfter) || c.NotAfter.After(tt.root.NotAfter)) {
				t.Error("it outlives a root")
			}
		})
	}
}

// The encoder's bytes are those that x509.CreateCertificate signs, so the two ways to make a certificate cannot differ.
func TestBuildIsCreateCertificate(t *testing.T) {
	h := newHierarchy(t)
	for _, kind := range []KeyKind{KeyP256, KeyP384, KeyEd25519, KeyRSA2048} {
		key := newKey(t, kind)
		template := must(authorityTemplate(testTD, "root", key.Public()))(t)
		template.NotBefore, template.NotAfter, template.MaxPathLen = testNow, testNow.Add(day), -1
		u := must(build(template, template, h.key.Public(), key.Public()))(t)
		der := must(x509.CreateCertificate(rand.Reader, template, template, h.key.Public(), key))(t)
		want := must(x509.ParseCertificate(der))(t)
		if !bytes.Equal(u.tbs, want.RawTBSCertificate) {
			t.Errorf("%s: the to-be-signed forms differ", kind)
		}
		got := must(u.sign(key))(t)
		if err := got.CheckSignatureFrom(got); err == nil != sameKey(h.key.Public(), key.Public()) {
			t.Errorf("%s: %v", kind, err)
		}
		if err := (&x509.Certificate{PublicKey: key.Public()}).CheckSignature(got.SignatureAlgorithm, got.RawTBSCertificate, got.Signature); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
	}
}
