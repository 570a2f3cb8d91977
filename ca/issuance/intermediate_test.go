package issuance

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
)

// spiffe
func TestCheckIntermediateAccepts(t *testing.T) {
	h := newHierarchy(t)
	open := newHierarchy(t, withNames)
	older := newHierarchy(t)
	cross := must(CrossSign(testTD, older.root, older.rootKey, h.root, testNow))(t)
	middleKey := newKey(t, KeyP256)
	middle := authority(t, h.root, h.rootKey, middleKey.Public(), func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false })
	below := func(edit func(*x509.Certificate)) *x509.Certificate {
		return authority(t, middle, middleKey, h.key.Public(), edit)
	}
	simple := authority(t, h.root, h.rootKey, middleKey.Public(), func(c *x509.Certificate) {
		c.MaxPathLen, c.MaxPathLenZero, c.KeyUsage = 1, false, x509.KeyUsageCertSign
	})
	underSimple := certs(authority(t, simple, middleKey, h.key.Public(), nil), simple)
	for _, tt := range []struct {
		name     string
		check    IntermediateCheck
		chain    []*x509.Certificate
		root     *x509.Certificate
		notAfter time.Time
		warnings []Warning
	}{
		{"ours", IntermediateCheck{Chain: certs(h.cert), Roots: certs(h.root)}, certs(h.cert), h.root, h.cert.NotAfter, nil},
		{"with its root, twice", IntermediateCheck{Chain: certs(h.cert, h.root, h.cert, h.root), Roots: certs(h.root)}, certs(h.cert), h.root, h.cert.NotAfter, nil},
		{"with junk", IntermediateCheck{Chain: certs(h.cert, open.cert, open.root, older.cert), Roots: certs(open.root, h.root)}, certs(h.cert), h.root, h.cert.NotAfter, nil},
		{"many times the same", IntermediateCheck{Chain: slices.Repeat(certs(h.cert), 200), Roots: certs(h.root)}, certs(h.cert), h.root, h.cert.NotAfter, nil},
		{"in disorder", IntermediateCheck{Chain: certs(below(nil), h.root, middle), Roots: certs(h.root)}, nil, h.root, middle.NotAfter, []Warning{WarnNames}},
		{"under the older root", IntermediateCheck{Chain: certs(h.cert, cross), Roots: certs(older.root)}, certs(h.cert, cross), older.root, h.cert.NotAfter, nil},
		{"shortest of two paths", IntermediateCheck{Chain: certs(h.cert, cross), Roots: certs(older.root, h.root)}, certs(h.cert), h.root, h.cert.NotAfter, nil},
		{"no path length", IntermediateCheck{Chain: certs(below(func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = -1, false }), middle), Roots: certs(h.root)}, nil, h.root, middle.NotAfter, []Warning{WarnPathLength, WarnNames}},
		{"no ID", IntermediateCheck{Chain: certs(below(func(c *x509.Certificate) { c.URIs = nil }), middle), Roots: certs(h.root)}, nil, h.root, middle.NotAfter, []Warning{WarnNames, WarnNoID}},
		{"permits our URIs", IntermediateCheck{Chain: certs(below(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org"} }), middle), Roots: certs(h.root)}, nil, h.root, middle.NotAfter, []Warning{WarnNames, WarnURIConstraints}},
		{"excludes other URIs", IntermediateCheck{Chain: certs(below(func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"example.com"} }), middle), Roots: certs(h.root)}, nil, h.root, middle.NotAfter, []Warning{WarnNames, WarnURIConstraints}},
		{"outlives what is above it", IntermediateCheck{Chain: certs(below(func(c *x509.Certificate) { c.NotAfter = testNow.Add(1000 * day) }), middle), Roots: certs(h.root)}, nil, h.root, middle.NotAfter, []Warning{WarnNames, WarnNotAfter}},
		{"above, no signing of revocation lists", IntermediateCheck{Chain: underSimple, Roots: certs(h.root)}, underSimple, h.root, h.cert.NotAfter, []Warning{WarnNames}},
		{"for servers and clients", IntermediateCheck{Chain: certs(below(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
		}), middle), Roots: certs(h.root)}, nil, h.root, middle.NotAfter, []Warning{WarnNames}},
		{"valid within the skew", IntermediateCheck{Skew: time.Minute, Chain: certs(below(func(c *x509.Certificate) { c.NotBefore = testNow.Add(time.Minute) }), middle), Roots: certs(h.root)}, nil, h.root, middle.NotAfter, []Warning{WarnNames}},
		{"dns names wanted and possible", IntermediateCheck{Chain: certs(below(func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"svc"} }), middle), Roots: certs(h.root), DNSNames: []string{"a.svc"}}, nil, h.root, middle.NotAfter, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.check.TrustDomain, tt.check.PublicKey, tt.check.MinLifetime = testTD, h.key.Public(), day
			got := must(CheckIntermediate(tt.check, testNow))(t)
			if tt.chain == nil {
				tt.chain = certs(tt.check.Chain[0], middle)
			}
			if !slices.EqualFunc(got.Chain, tt.chain, (*x509.Certificate).Equal) || !got.Root.Equal(tt.root) {
				t.Errorf("chain of %d", len(got.Chain))
			}
			if !got.NotAfter.Equal(tt.notAfter) {
				t.Errorf("NotAfter %s, want %s", got.NotAfter, tt.notAfter)
			}
			if d := cmp.Diff(tt.warnings, got.Warnings); d != "" {
				t.Errorf("warnings (-want +got):\n%s", d)
			}
			at := testNow
			if got.NotBefore.After(at) {
				at = got.NotBefore
			}
			// What is accepted must serve.
			iss := must(NewIssuer(testTD, got.Chain, got.Root, h.key))(t)
			p := must(Prepare(Profile{}, Request{ID: testID, PublicKey: newKey(t, KeyP256).Public()}, iss, at))(t)
			leaf := must(p.Sign())(t).Leaf
			wantReason(t, Verify(append(certs(leaf), got.Chain...), certs(got.Root), testID, at), "")
		})
	}
}

// spiffe, ID-09
// threat: F01, F02, F03, F04, F05, F06, F07, F08, F09, F10, F12
func TestCheckIntermediateRefuses(t *testing.T) {
	h, other := newHierarchy(t), newHierarchy(t)
	sign := func(edit func(*x509.Certificate)) []*x509.Certificate {
		return certs(authority(t, h.root, h.rootKey, h.key.Public(), edit))
	}
	// under is an intermediate below an authority that is edited, or of another key.
	under := func(key crypto.Signer, edit func(*x509.Certificate)) []*x509.Certificate {
		middle := authority(t, h.root, h.rootKey, key.Public(), func(c *x509.Certificate) {
			c.MaxPathLen, c.MaxPathLenZero = 1, false
			if edit != nil {
				edit(c)
			}
		})
		return certs(authority(t, middle, key, h.key.Public(), nil), middle)
	}
	p224 := must(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))(t)
	var many []*x509.Certificate
	for range 200 {
		many = append(many, authority(t, h.root, h.rootKey, h.key.Public(), nil))
	}
	// A and B sign each other and lead nowhere.
	a, b := newKey(t, KeyP256), newKey(t, KeyP256)
	nameB := authority(t, nil, b, b.Public(), nil)
	loopA := authority(t, nameB, b, a.Public(), func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = -1, false })
	loopB := authority(t, loopA, a, b.Public(), func(c *x509.Certificate) {
		c.RawSubject, c.MaxPathLen, c.MaxPathLenZero = nameB.RawSubject, -1, false
	})
	loop := certs(authority(t, loopB, b, h.key.Public(), nil), loopA, loopB)
	sha1Root := sha1Signed(t, h)
	tests := []struct {
		name   string
		edit   func(*IntermediateCheck)
		reason api.Reason
		want   string
	}{
		{"nothing", func(r *IntermediateCheck) { r.Chain = nil }, api.UpstreamAnswer, "chain is empty"},
		{"hole", func(r *IntermediateCheck) { r.Chain = certs(h.cert, nil) }, api.UpstreamAnswer, "has a hole"},
		{"200 certificates", func(r *IntermediateCheck) { r.Chain = many }, api.UpstreamAnswer, "more than 9 certificates"},
		{"loop", func(r *IntermediateCheck) { r.Chain = loop }, api.UpstreamChain, "does not lead to a root"},
		{"other key", func(r *IntermediateCheck) { r.PublicKey = other.key.Public() }, api.UpstreamKey, "another key"},
		{"no key", func(r *IntermediateCheck) { r.PublicKey = nil }, api.UpstreamKey, "another key"},
		{"p-224", func(r *IntermediateCheck) {
			r.PublicKey, r.Chain = p224.Public(), certs(authority(t, h.root, h.rootKey, p224.Public(), nil))
		}, api.UpstreamKey, "key is not acceptable"},
		{"root first", func(r *IntermediateCheck) { r.Chain, r.PublicKey = certs(h.root, h.cert), h.rootKey.Public() }, api.UpstreamChain, "is a root"},
		{"other root", func(r *IntermediateCheck) { r.Roots = certs(other.root) }, api.UpstreamChain, "does not lead to a root"},
		{"no root", func(r *IntermediateCheck) { r.Roots = nil }, api.UpstreamChain, "does not lead to a root"},
		{"root that is a leaf", func(r *IntermediateCheck) { r.Roots = certs(h.issue(t).Leaf) }, api.UpstreamChain, "does not lead to a root"},
		{"itself as a root", func(r *IntermediateCheck) { r.Roots = certs(h.cert) }, api.UpstreamChain, "is a root"},
		{"gap", func(r *IntermediateCheck) { r.Chain = under(newKey(t, KeyP256), nil)[:1] }, api.UpstreamChain, "does not lead to a root"},
		{"expired", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Second) })
		}, api.UpstreamLifetime, "has expired"},
		{"not valid yet", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.NotBefore = testNow.Add(time.Second) })
		}, api.UpstreamClock, "is valid only in"},
		{"too short a life", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.NotAfter = testNow.Add(day - time.Second) })
		}, api.UpstreamLifetime, "at least 24h0m0s are needed"},
		{"too short a life above", func(r *IntermediateCheck) {
			r.Chain = under(newKey(t, KeyP256), func(c *x509.Certificate) { c.NotAfter = testNow.Add(day - time.Second) })
		}, api.UpstreamLifetime, "at least 24h0m0s are needed"},
		{"leaf", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false })
		}, api.UpstreamAuthority, "certificate 1 of the path is not an authority"},
		{"no certificate signing", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })
		}, api.UpstreamAuthority, "certificate 1 of the path may not sign"},
		{"no signing of revocation lists", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign })
		}, api.UpstreamAuthority, "certificate 1 of the path may not sign revocation lists"},
		{"no key usage", func(r *IntermediateCheck) { r.Chain = sign(func(c *x509.Certificate) { c.KeyUsage = 0 }) }, api.UpstreamAuthority, "certificate 1 of the path may not sign"},
		{"key usage not critical", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.KeyUsage = 0; rawExtension(oidKeyUsage, false, keyUsageBits(6))(c) })
		}, api.UpstreamAuthority, "certificate 1 of the path has a key usage"},
		{"for clients only", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })
		}, api.UpstreamAuthority, "servers and clients"},
		{"for code signing", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} })
		}, api.UpstreamAuthority, "servers and clients"},
		{"path length above", func(r *IntermediateCheck) {
			r.Chain = under(newKey(t, KeyP256), func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
		}, api.UpstreamPathLength, "certificate 2 of the path has a path length"},
		{"other trust domain", func(r *IntermediateCheck) { r.TrustDomain = trustDomain(t, "example.com") }, api.UpstreamTrustDomain, "the ID of something else"},
		{"two IDs", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.URIs = append(c.URIs, parseURL(t, "spiffe://example.com")) })
		}, api.UpstreamTrustDomain, "the ID of something else"},
		{"an ID with a path", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.URIs[0] = parseURL(t, "spiffe://example.org/a") })
		}, api.UpstreamTrustDomain, "the ID of something else"},
		{"a web address", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.URIs[0] = parseURL(t, "https://example.org") })
		}, api.UpstreamTrustDomain, "the ID of something else"},
		{"permits other URIs", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.com"} })
		}, api.UpstreamConstraints, "constrains names"},
		{"excludes our URIs", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"org"} })
		}, api.UpstreamConstraints, "constrains names"},
		{"excludes all URIs, above", func(r *IntermediateCheck) {
			r.Chain = under(newKey(t, KeyP256), func(c *x509.Certificate) { c.ExcludedURIDomains = []string{""} })
		}, api.UpstreamConstraints, "constrains names"},
		{"excludes dns names that are wanted", func(r *IntermediateCheck) { r.DNSNames = []string{"a.svc"} }, api.UpstreamConstraints, "constrains names"},
		{"permits other dns names", func(r *IntermediateCheck) {
			r.Chain, r.DNSNames = sign(func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"com"} }), []string{"a.svc"}
		}, api.UpstreamConstraints, "constrains names"},
		{"no subject", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.RawSubject = []byte{0x30, 0} })
		}, api.UpstreamSubject, "no subject or no key identifier"},
		{"its issuer's subject", func(r *IntermediateCheck) {
			r.Chain = sign(func(c *x509.Certificate) { c.RawSubject = h.root.RawSubject })
		}, api.UpstreamSubject, "names another issuer's key, or none"},
		{"names another issuer's key", func(r *IntermediateCheck) {
			r.Chain = certs(forge(t, unaltered(t, h), withKeyID(h.root, "another"), h.key.Public(), h.rootKey))
		}, api.UpstreamSubject, "names another issuer's key"},
		{"weak key above", func(r *IntermediateCheck) { r.Chain = under(p224, nil) }, api.UpstreamAlgorithm, "P-224"},
		{"sha-1", func(r *IntermediateCheck) { r.Chain = sha1Root }, api.UpstreamAlgorithm, "algorithm that is not accepted"},
		{"another root, which comes along", func(r *IntermediateCheck) { r.Chain, r.Roots = certs(h.cert, h.root), certs(other.root) }, api.UpstreamRoot, "another root"},
		{"another root behind one more", func(r *IntermediateCheck) {
			r.Chain, r.Roots = append(under(newKey(t, KeyP256), nil), h.root), certs(other.root)
		}, api.UpstreamRoot, "another root"},
		{"not valid yet, above", func(r *IntermediateCheck) {
			r.Chain = under(newKey(t, KeyP256), func(c *x509.Certificate) { c.NotBefore = testNow.Add(time.Second) })
		}, api.UpstreamClock, "is valid only in"},
		{"not valid within the skew", func(r *IntermediateCheck) {
			r.Skew = time.Minute
			r.Chain = sign(func(c *x509.Certificate) { c.NotBefore = testNow.Add(time.Minute + time.Second) })
		}, api.UpstreamClock, "is valid only in"},
		{"the subject of an authority in use", func(r *IntermediateCheck) { r.Authorities = certs(nil, other.root, h.cert) }, api.UpstreamSubject, "subject of another authority"},
		{"the subject of an authority above", func(r *IntermediateCheck) {
			middleKey := newKey(t, KeyP256)
			middle := authority(t, h.root, h.rootKey, middleKey.Public(), func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false })
			r.Chain = certs(authority(t, middle, middleKey, h.key.Public(), func(c *x509.Certificate) {
				c.RawSubject, c.AuthorityKeyId = h.root.RawSubject, middle.SubjectKeyId
			}), middle)
		}, api.UpstreamSubject, "subject of another authority"},
		{"no issuer's key", func(r *IntermediateCheck) {
			r.Chain = certs(forge(t, unaltered(t, h), withKeyID(h.root, ""), h.key.Public(), h.rootKey))
		}, api.UpstreamSubject, "names another issuer's key, or none"},
		{"unknown critical extension", func(r *IntermediateCheck) { r.Chain = sign(rawExtension([]int{1, 2, 3, 4}, true, []byte{5, 0})) }, api.UpstreamChain, "does not verify"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := IntermediateCheck{TrustDomain: testTD, PublicKey: h.key.Public(), Chain: certs(h.cert), Roots: certs(h.root), MinLifetime: day}
			tt.edit(&r)
			_, err := CheckIntermediate(r, testNow)
			wantReason(t, err, tt.reason)
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q in it", err, tt.want)
			}
			if strings.Contains(err.Error(), "example") {
				t.Errorf("there is a name in the error: %v", err)
			}
		})
	}
}

// unaltered is the template of a good intermediate.
func unaltered(t *testing.T, h hierarchy) *x509.Certificate {
	c := must(authorityTemplate(testTD, "intermediate", h.key.Public()))(t)
	c.NotBefore, c.NotAfter, c.MaxPathLenZero = testNow.Add(-time.Minute), testNow.Add(4*day), true
	return c
}

// withKeyID is c as if it had another key identifier.
func withKeyID(c *x509.Certificate, id string) *x509.Certificate {
	other := *c
	other.SubjectKeyId = []byte(id)
	return &other
}

// sha1Signed is an intermediate whose signature claims to be with SHA-1. crypto/x509 makes none, so its names are changed;
// the signature is no matter, as no verifier gets that far.
func sha1Signed(t *testing.T, h hierarchy) []*x509.Certificate {
	t.Helper()
	c := authority(t, h.root, h.rootKey, h.key.Public(), nil)
	with256, with1 := oid(1, 2, 840, 10045, 4, 3, 2), oid(1, 2, 840, 10045, 4, 1)
	var parts [][]byte
	for _, f := range must(fields(must(element(c.RawTBSCertificate))(t), 3, 10))(t) {
		if string(f.FullBytes) == string(tlv(tagSequence, with256)) {
			f.FullBytes = tlv(tagSequence, with1)
		}
		parts = append(parts, f.FullBytes)
	}
	der := tlv(tagSequence, tlv(tagSequence, parts...), tlv(tagSequence, with1), tlv(3, []byte{0}, c.Signature))
	return certs(must(x509.ParseCertificate(der))(t))
}

func TestCheckPathKey(t *testing.T) {
	for _, tt := range []struct {
		name string
		pub  crypto.PublicKey
		ok   bool
	}{
		{"rsa 1024", &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}, false},
		{"rsa 8192", &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 8191), E: 65537}, true},
		{"p-521", &ecdsa.PublicKey{Curve: elliptic.P521()}, true},
		{"p-224", &ecdsa.PublicKey{Curve: elliptic.P224()}, false},
		{"ed25519", newKey(t, KeyEd25519).Public(), true},
		{"none", nil, false},
	} {
		if err := checkPathKey(tt.pub); err == nil != tt.ok {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestWarningsHaveTexts(t *testing.T) {
	for _, w := range []Warning{WarnPathLength, WarnNames, WarnURIConstraints, WarnNoID, WarnNotAfter} {
		if w.Text() == string(w) {
			t.Errorf("%s has no text", w)
		}
	}
}
