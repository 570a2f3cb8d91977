package issuance

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// The request asks for what an upstream may copy: a CA for leaves only, of the trust domain, by a name of its own.
func TestNewIntermediateCSR(t *testing.T) {
	subjects := map[string]bool{}
	for _, kind := range []KeyKind{KeyP256, KeyP384, KeyEd25519, KeyRSA2048} {
		for _, exclude := range []bool{false, true} {
			key := newKey(t, kind)
			der := must(NewIntermediateCSR(testTD, key, exclude))(t)
			r := must(x509.ParseCertificateRequest(der))(t)
			if err := r.CheckSignature(); err != nil {
				t.Errorf("%s: %v", kind, err)
			}
			if subjects[string(r.RawSubject)] || r.Subject.SerialNumber == "" {
				t.Errorf("%s: the subject %s is not its own", kind, r.Subject)
			}
			subjects[string(r.RawSubject)] = true
			var asked []string
			for _, e := range r.Extensions {
				asked = append(asked, e.Id.String())
				if e.Id.Equal(oidBasicConstraints) && !bytes.Equal(e.Value, []byte{0x30, 6, 1, 1, 0xff, 2, 1, 0}) {
					t.Errorf("%s: basic constraints %x", kind, e.Value)
				}
			}
			want := []string{"2.5.29.17", "2.5.29.19"}
			if exclude {
				want = append(want, "2.5.29.30")
			}
			slices.Sort(asked)
			if !slices.Equal(asked, want) {
				t.Errorf("%s: it asks for %v, want %v", kind, asked, want)
			}
			if pub := must(ParseIntermediateCSR(der, testTD))(t); !sameKey(pub, key.Public()) {
				t.Errorf("%s: another key", kind)
			}
		}
	}
	key := newKey(t, KeyP256)
	for _, tt := range []struct {
		name    string
		td      spiffeid.TrustDomain
		key     crypto.Signer
		exclude bool
		want    api.Reason
	}{
		{"no trust domain", spiffeid.TrustDomain{}, key, false, api.ConfigInvalid},
		{"no key", testTD, nil, false, api.ConfigInvalid},
		{"a trust domain that reads as an address", trustDomain(t, "10.0.0.1"), key, true, api.ConfigInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := NewIntermediateCSR(tt.td, tt.key, tt.exclude)
			wantReason(t, err, tt.want)
		})
	}
}

func TestParseIntermediateCSRRefuses(t *testing.T) {
	key, other := newKey(t, KeyP256), newKey(t, KeyP256)
	good := must(NewIntermediateCSR(testTD, key, false))(t)
	template := func(uris ...string) []byte {
		r := &x509.CertificateRequest{}
		for _, u := range uris {
			r.URIs = append(r.URIs, parseURL(t, u))
		}
		return must(x509.CreateCertificateRequest(rand.Reader, r, key))(t)
	}
	stolen := goodRequest(t, key)
	stolen.spki = must(x509.MarshalPKIXPublicKey(other.Public()))(t)
	stolen.attributes = extensionRequest(sanExtensionDER(san(uriName(testTD.IDString()))))
	for _, tt := range []struct {
		name string
		der  []byte
		want api.Reason
	}{
		{"nothing", nil, api.CSRMalformed},
		{"something behind", append(bytes.Clone(good), 0), api.CSRMalformed},
		{"too large", make([]byte, api.MaxCSRBytes+1), api.CSRTooLarge},
		{"another's key", stolen.der(), api.CSRSignature},
		{"no name", template(), api.IDMismatch},
		{"two names", template("spiffe://example.org", "spiffe://example.com"), api.IDMismatch},
		{"a workload's", template("spiffe://example.org/ns/a/sa/b"), api.IDMismatch},
		{"another trust domain", template("spiffe://example.com"), api.IDMismatch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseIntermediateCSR(tt.der, testTD)
			wantReason(t, err, tt.want)
		})
	}
	if _, err := ParseIntermediateCSR(good, spiffeid.TrustDomain{}); api.ReasonOf(err) != api.IDMismatch {
		t.Errorf("without a trust domain: %v", err)
	}
}

// Whatever is refused of an intermediate is refused of the authority above which it would be signed, wherever it is.
//
// threat: F04, F07
func TestCheckParent(t *testing.T) {
	h, middleKey := newHierarchy(t), newKey(t, KeyP256)
	below := func(root *x509.Certificate, key crypto.Signer) []*x509.Certificate {
		return certs(authority(t, root, key, middleKey.Public(), func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }), root)
	}
	root := func(edit func(*x509.Certificate)) []*x509.Certificate {
		return below(authority(t, nil, h.key, h.key.Public(), func(c *x509.Certificate) {
			c.MaxPathLen, c.MaxPathLenZero = -1, false
			edit(c)
		}), h.key)
	}
	for _, tt := range []struct {
		name string
		path []*x509.Certificate
		key  crypto.Signer
		td   spiffeid.TrustDomain
		now  time.Time
		want api.Reason
	}{
		{"a root", certs(h.root), h.rootKey, testTD, testNow, ""},
		{"an intermediate for leaves only", certs(h.cert, h.root), h.key, testTD, testNow, api.UpstreamRefused},
		{"another key", certs(h.root), h.key, testTD, testNow, api.UpstreamRefused},
		{"no key", certs(h.root), nil, testTD, testNow, api.UpstreamRefused},
		{"no path", nil, h.rootKey, testTD, testNow, api.UpstreamRefused},
		{"another trust domain", certs(h.root), h.rootKey, trustDomain(t, "example.com"), testNow, api.ConfigInvalid},
		{"expired", certs(h.root), h.rootKey, testTD, h.root.NotAfter, api.UpstreamRefused},
		{"below a root", below(h.root, h.rootKey), middleKey, testTD, testNow, ""},
		{"below a root that has room for one", root(func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }), middleKey, testTD, testNow, api.UpstreamPathLength},
		{"below a root for other names", root(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.com"} }), middleKey, testTD, testNow, api.UpstreamConstraints},
		{"below a root for other DNS names", root(func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"com"} }), middleKey, testTD, testNow, api.UpstreamConstraints},
		{"below a root for servers", root(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), middleKey, testTD, testNow, api.UpstreamAuthority},
	} {
		t.Run(tt.name, func(t *testing.T) {
			wantReason(t, CheckParent(tt.path, tt.key, tt.td, []string{"a.svc"}, tt.now), tt.want)
		})
	}
}

func TestPathTo(t *testing.T) {
	h, older := newHierarchy(t), newHierarchy(t)
	cross := must(CrossSign(testTD, older.root, older.rootKey, h.root, testNow))(t)
	for _, tt := range []struct {
		name  string
		chain []*x509.Certificate
		root  *x509.Certificate
		want  []*x509.Certificate
	}{
		{"the root itself", certs(h.root), h.root, certs(h.root)},
		{"one below", certs(h.cert), h.root, certs(h.cert, h.root)},
		{"in disorder", certs(h.cert, older.cert, cross, h.root), older.root, certs(h.cert, cross, older.root)},
		{"another root", certs(h.root), older.root, nil},
		{"a gap", certs(h.cert), older.root, nil},
		{"nothing", nil, h.root, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := PathTo(tt.chain, tt.root, testNow); !slices.EqualFunc(got, tt.want, (*x509.Certificate).Equal) {
				t.Errorf("a path of %d, want one of %d", len(got), len(tt.want))
			}
		})
	}
	if PathTo(certs(h.cert), h.root, h.cert.NotAfter.Add(time.Second)) != nil {
		t.Error("there is a path after its end")
	}
}

// Each row breaks one thing of a cross certificate that is good otherwise.
func TestCheckCross(t *testing.T) {
	older, newer, third := newHierarchy(t), newHierarchy(t), newHierarchy(t)
	sign := func(edit func(*x509.Certificate)) *x509.Certificate {
		c := *must(CrossSign(testTD, older.root, older.rootKey, newer.root, testNow))(t)
		edit(&c)
		return forge(t, &c, older.root, newer.rootKey.Public(), older.rootKey)
	}
	good := must(CrossSign(testTD, older.root, older.rootKey, newer.root, testNow))(t)
	short := must(NewRoot(testTD, newKey(t, KeyP256), time.Hour, testNow))(t)
	constrained := authority(t, nil, older.rootKey, older.rootKey.Public(), func(c *x509.Certificate) {
		c.MaxPathLen, c.MaxPathLenZero, c.PermittedURIDomains = -1, false, []string{"example.com"}
	})
	for _, tt := range []struct {
		name string
		edit func(*CrossCheck)
		want string // in the error; empty for none
	}{
		{"good", func(*CrossCheck) {}, ""},
		{"nothing", func(r *CrossCheck) { r.Cross = nil }, "is not there"},
		{"no older root", func(r *CrossCheck) { r.Older = nil }, "is not there"},
		{"no newer root", func(r *CrossCheck) { r.Newer = nil }, "is not there"},
		{"the newer root itself", func(r *CrossCheck) { r.Cross = newer.root }, "is one of the roots"},
		{"the older root itself", func(r *CrossCheck) { r.Cross = older.root }, "is one of the roots"},
		{"one root", func(r *CrossCheck) { r.Older = newer.root }, "is one of the roots"},
		{"of another root", func(r *CrossCheck) { r.Newer = third.root }, "is not for the newer root's key"},
		{"another subject", func(r *CrossCheck) {
			r.Cross = sign(func(c *x509.Certificate) { c.RawSubject = third.root.RawSubject })
		}, "newer root's subject"},
		{"another key identifier", func(r *CrossCheck) { r.Cross = sign(func(c *x509.Certificate) { c.SubjectKeyId = []byte("x") }) }, "newer root's key identifier"},
		{"by another root", func(r *CrossCheck) { r.Older = third.root }, "does not name the older root's key"},
		{"by another key", func(r *CrossCheck) {
			posing := *older.root
			posing.PublicKey = third.rootKey.Public()
			r.Cross = forge(t, good, &posing, newer.rootKey.Public(), third.rootKey)
		}, "is not signed by the older root"},
		{"no path length", func(r *CrossCheck) { r.Cross = sign(func(c *x509.Certificate) { c.MaxPathLen = -1 }) }, "path length of 1"},
		{"path length 0", func(r *CrossCheck) {
			r.Cross = sign(func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
		}, "path length of 1"},
		{"path length 2", func(r *CrossCheck) { r.Cross = sign(func(c *x509.Certificate) { c.MaxPathLen = 2 }) }, "path length of 1"},
		{"no authority", func(r *CrossCheck) {
			r.Cross = sign(func(c *x509.Certificate) { c.IsCA, c.MaxPathLen = false, 0 })
		}, "path length of 1"},
		{"may not sign", func(r *CrossCheck) { r.Cross = sign(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }) }, "may not sign certificates"},
		{"for clients only", func(r *CrossCheck) {
			r.Cross = sign(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })
		}, "both servers and clients"},
		{"of another trust domain", func(r *CrossCheck) {
			r.Cross = sign(func(c *x509.Certificate) { c.URIs = []*url.URL{parseURL(t, "spiffe://example.com")} })
		}, "something else than the trust domain"},
		{"constrained", func(r *CrossCheck) {
			r.Cross = sign(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.com"} })
		}, "constrains names"},
		{"by a constrained root", func(r *CrossCheck) {
			r.Older = constrained
			r.Cross = forge(t, good, constrained, newer.rootKey.Public(), older.rootKey)
		}, "constrains names"},
		{"expired", func(r *CrossCheck) {
			r.Cross = sign(func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Second) })
		}, "not now"},
		{"by an expired root", func(r *CrossCheck) { r.Older = short }, "does not name the older root's key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := CrossCheck{TrustDomain: testTD, Cross: good, Older: older.root, Newer: newer.root}
			tt.edit(&r)
			err := CheckCross(r, testNow)
			if tt.want == "" {
				wantReason(t, err, "")
				return
			}
			wantReason(t, err, api.UpstreamCross)
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "example") {
				t.Errorf("error %v, want %q in it", err, tt.want)
			}
		})
	}
}

// What an upstream's root without the ID of a trust domain signs is as good.
func TestCrossSignUpstreams(t *testing.T) {
	older, newer := newHierarchy(t), newHierarchy(t)
	bare := func(h hierarchy) *x509.Certificate {
		return authority(t, nil, h.rootKey, h.rootKey.Public(), func(c *x509.Certificate) { c.URIs, c.MaxPathLen, c.MaxPathLenZero = nil, -1, false })
	}
	a, b := bare(older), bare(newer)
	cross := must(CrossSign(testTD, a, older.rootKey, b, testNow))(t)
	wantReason(t, CheckCross(CrossCheck{TrustDomain: testTD, Cross: cross, Older: a, Newer: b}, testNow), "")
}
