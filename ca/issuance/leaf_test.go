package issuance

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"math"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/cryptotest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// spiffe
// threat: C26, K06
func TestIssue(t *testing.T) {
	h := newHierarchy(t)
	for _, kind := range []KeyKind{KeyP256, KeyP384, KeyEd25519, KeyRSA2048} {
		t.Run(string(kind), func(t *testing.T) {
			key := newKey(t, kind)
			p := must(Prepare(Profile{}, Request{ID: testID, PublicKey: key.Public()}, h.issuer, testNow))(t)
			issued := must(p.Sign())(t)
			leaf := issued.Leaf

			if !sameKey(key.Public(), leaf.PublicKey) {
				t.Error("the leaf is for another key")
			}
			if len(leaf.URIs) != 1 || leaf.URIs[0].String() != testID.String() || issued.ID != testID || p.ID() != testID {
				t.Errorf("the leaf is for %v", leaf.URIs)
			}
			if err := Verify(certs(leaf, h.cert), certs(h.root), testID, testNow); err != nil {
				t.Errorf("Verify: %v", err)
			}
			if got, want := leaf.NotBefore, testNow.Add(-DefaultBackdate); !got.Equal(want) || !got.Equal(p.NotBefore()) {
				t.Errorf("NotBefore %s, want %s", got, want)
			}
			if got, want := leaf.NotAfter, testNow.Add(DefaultTTL); !got.Equal(want) || !got.Equal(p.NotAfter()) {
				t.Errorf("NotAfter %s, want %s", got, want)
			}
			if sha256.Sum256(leaf.RawTBSCertificate) != p.Hash() || SerialString(leaf.SerialNumber) != p.Serial() {
				t.Error("what was recorded is not what was signed")
			}
			if len(p.Serial()) != 40 {
				t.Errorf("serial %s", p.Serial())
			}
			if len(issued.Chain) != 2 || !bytes.Equal(issued.Chain[0], leaf.Raw) || !bytes.Equal(issued.Chain[1], h.cert.Raw) {
				t.Error("the chain is not leaf and intermediate")
			}
		})
	}
}

// spiffe: ID-03, ID-07, ID-09, X-03
// threat: C23
func TestPrepareRefuses(t *testing.T) {
	h := newHierarchy(t)
	names := newHierarchy(t, withNames)
	pub := newKey(t, KeyP256).Public()
	id := func(s string) func(*Request) { return func(r *Request) { r.ID = spiffeid.RequireFromString(s) } }
	key := func(k crypto.PublicKey) func(*Request) { return func(r *Request) { r.PublicKey = k } }
	dns := func(n ...string) func(*Request) { return func(r *Request) { r.DNSNames = n } }
	same := func(*Request) {}
	var many []string
	for i := range maxDNSNames + 1 {
		many = append(many, strings.Repeat("a", i+1)+".shop.svc")
	}
	type row struct {
		name string
		p    Profile
		want api.Reason
	}
	for _, tt := range []row{
		{"ttl negative", Profile{TTL: -1}, api.ConfigInvalid},
		{"ttl of 9s", Profile{TTL: 9 * time.Second}, api.ConfigInvalid},
		{"ttl of 10s", Profile{TTL: MinTTL}, ""},
		{"ttl of 24h", Profile{TTL: MaxTTL}, ""},
		{"ttl of 24h and a bit", Profile{TTL: MaxTTL + 1}, api.ConfigInvalid},
		{"ttl of 292 years", Profile{TTL: math.MaxInt64}, api.ConfigInvalid},
		{"backdate negative", Profile{Backdate: -1}, api.ConfigInvalid},
		{"backdate of 2m", Profile{Backdate: MaxBackdate}, ""},
		{"backdate above", Profile{Backdate: MaxBackdate + 1}, api.ConfigInvalid},
		{"renewal from nan", Profile{RenewFrom: math.NaN()}, api.ConfigInvalid},
		{"renewal at the end", Profile{RenewTo: 1}, api.ConfigInvalid},
		{"renewal backwards", Profile{RenewFrom: 0.6, RenewTo: 0.4}, api.ConfigInvalid},
		{"renewal before the start", Profile{RenewFrom: -0.1}, api.ConfigInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Prepare(tt.p, Request{ID: testID, PublicKey: pub}, h.issuer, testNow)
			wantReason(t, err, tt.want)
		})
	}
	for _, tt := range []struct {
		name string
		now  time.Time
		want api.Reason
	}{
		{"before the issuer", h.cert.NotBefore.Add(-time.Second), api.SignerUnavailable},
		{"issuer expired", h.cert.NotAfter.Add(time.Second), api.SignerUnavailable},
		{"issuer about to expire", h.cert.NotAfter.Add(-minUseful + time.Second), api.SignerUnavailable},
		{"issuer with little left", h.cert.NotAfter.Add(-minUseful), ""},
		{"no time", time.Time{}, api.SignerUnavailable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Prepare(Profile{}, Request{ID: testID, PublicKey: pub}, h.issuer, tt.now)
			wantReason(t, err, tt.want)
		})
	}
	for _, tt := range []struct {
		name string
		iss  *Issuer
		edit func(*Request)
		want api.Reason
	}{
		{"good", h.issuer, same, ""},
		{"no ID", h.issuer, func(r *Request) { r.ID = spiffeid.ID{} }, api.IDMalformed},
		{"trust domain's ID", h.issuer, id("spiffe://example.org"), api.IDMalformed},
		{"2048 bytes", h.issuer, id("spiffe://example.org/" + strings.Repeat("a", 2027)), ""},
		{"2049 bytes", h.issuer, id("spiffe://example.org/" + strings.Repeat("a", 2028)), api.IDMalformed},
		{"other trust domain", h.issuer, id("spiffe://example.com/a"), api.IDMismatch},
		{"subdomain", h.issuer, id("spiffe://a.example.org/a"), api.IDMismatch},

		{"no key", h.issuer, key(nil), api.KeyType},
		{"the intermediate's key", h.issuer, key(h.key.Public()), api.KeyReused},
		{"the root's key", h.issuer, key(h.rootKey.Public()), api.KeyReused},

		{"dns name", names.issuer, dns("cart.shop.svc"), ""},
		{"wildcard", names.issuer, dns("*.cart.shop.svc", "cart.shop.svc"), ""},
		{"dns name under an issuer that excludes names", h.issuer, dns("cart.shop.svc"), api.LintFailed},
		{"dns name twice", names.issuer, dns("cart.shop.svc", "cart.shop.svc"), api.LintFailed},
		{"empty dns name", names.issuer, dns(""), api.LintFailed},
		{"upper case", names.issuer, dns("Cart.shop.svc"), api.LintFailed},
		{"trailing dot", names.issuer, dns("cart.shop.svc."), api.LintFailed},
		{"ip address", names.issuer, dns("10.0.0.1"), api.LintFailed},
		{"ipv6 address", names.issuer, dns("::1"), api.LintFailed},
		{"short ip address", names.issuer, dns("10.1"), api.LintFailed},
		{"long label", names.issuer, dns(strings.Repeat("a", 64) + ".svc"), api.LintFailed},
		{"long name", names.issuer, dns(strings.Repeat("a.", 126) + "svc"), api.LintFailed},
		{"hyphen first", names.issuer, dns("-a.svc"), api.LintFailed},
		{"wildcard of everything", names.issuer, dns("*.svc"), api.LintFailed},
		{"bare star", names.issuer, dns("*"), api.LintFailed},
		{"star inside", names.issuer, dns("a.*.shop.svc"), api.LintFailed},
		{"not ascii", names.issuer, dns("c\u00e4rt.shop.svc"), api.LintFailed},
		{"33 dns names", names.issuer, dns(many...), api.LintFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := Request{ID: testID, PublicKey: pub}
			tt.edit(&r)
			p, err := Prepare(Profile{}, r, tt.iss, testNow)
			wantReason(t, err, tt.want)
			if err == nil {
				must(p.Sign())(t)
			}
		})
	}
}

// A leaf that is not what was asked for is caught before it is signed, whatever made it so.
//
// threat: C26
func TestCheckLeaf(t *testing.T) {
	h, other := newHierarchy(t, withNames), newHierarchy(t, withNames)
	leaf := h.leaf(t, func(*x509.Certificate) {})
	for _, tt := range []struct {
		name string
		c    *x509.Certificate
		edit func(*Request)
		want string
	}{
		{"good", leaf, func(*Request) {}, ""},
		{"identity", leaf, func(r *Request) { r.ID = spiffeid.RequireFromString("spiffe://example.org/b") }, "another identity"},
		{"key", leaf, func(r *Request) { r.PublicKey = other.key.Public() }, "another key"},
		{"dns name missing", leaf, func(r *Request) { r.DNSNames = []string{"a.svc"} }, "other DNS names"},
		{"dns name too many", h.leaf(t, func(c *x509.Certificate) { c.DNSNames = []string{"a.svc"} }), func(*Request) {}, "other DNS names"},
		{"issuer", other.leaf(t, func(*x509.Certificate) {}), func(*Request) {}, "another issuer"},
		{"too late", h.leaf(t, func(c *x509.Certificate) { c.NotAfter = h.cert.NotAfter.Add(time.Second) }), func(*Request) {}, "outlives"},
		{"too early", h.leaf(t, func(c *x509.Certificate) { c.NotBefore = h.cert.NotBefore.Add(-time.Second) }), func(*Request) {}, "outlives"},
		{"expired", h.leaf(t, func(c *x509.Certificate) { c.NotAfter = testNow }), func(*Request) {}, "not valid now"},
		{"not valid yet", h.leaf(t, func(c *x509.Certificate) { c.NotBefore = testNow.Add(time.Second) }), func(*Request) {}, "not valid now"},
		{"rule", h.leaf(t, func(c *x509.Certificate) { c.Subject.CommonName = "x" }), func(*Request) {}, "empty-subject"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := Request{ID: testID, PublicKey: tt.c.PublicKey}
			tt.edit(&r)
			err := checkLeaf(tt.c, r, h.issuer, testNow)
			if tt.want == "" {
				wantReason(t, err, "")
				return
			}
			wantReason(t, err, api.LintFailed)
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q in it", err, tt.want)
			}
		})
	}
}

// No leaf outlives its issuer, the issuer's root, or its own TTL, whenever it is made; renewal comes before half of it.
//
// threat: C23
func TestLifetimeProperty(t *testing.T) {
	h := newHierarchy(t)
	pub := newKey(t, KeyP256).Public()
	random := mathrand.New(mathrand.NewPCG(1, 2))
	issued := 0
	for range 2000 {
		// Most moments are near the end of the issuer, where something happens.
		now := h.cert.NotAfter.Add(-time.Duration(random.ExpFloat64() * float64(12*time.Hour))).Add(time.Duration(random.IntN(1e9)))
		profile := Profile{
			TTL:      MinTTL + time.Duration(random.Int64N(int64(MaxTTL-MinTTL))),
			Backdate: time.Duration(random.Int64N(int64(MaxBackdate))),
		}
		p, err := Prepare(profile, Request{ID: testID, PublicKey: pub}, h.issuer, now)
		if err != nil {
			if left := h.cert.NotAfter.Sub(now); left >= minUseful && now.After(h.cert.NotBefore.Add(time.Second)) {
				t.Fatalf("refused with %s left: %v", left, err)
			}
			continue
		}
		issued++
		switch {
		case p.NotAfter().After(h.cert.NotAfter), p.NotAfter().After(h.root.NotAfter), p.NotBefore().Before(h.cert.NotBefore):
			t.Fatalf("the leaf %s to %s is outside of its issuer", p.NotBefore(), p.NotAfter())
		case p.NotAfter().After(now.Add(profile.TTL)):
			t.Fatalf("the leaf lives longer than %s", profile.TTL)
		case p.NotBefore().After(now):
			t.Fatal("the leaf is not valid yet")
		case p.renewAt.Before(now.Truncate(time.Second)), p.renewAt.Sub(now) > p.NotAfter().Sub(now.Truncate(time.Second))/2:
			t.Fatalf("renewal at %s of a leaf from %s to %s", p.renewAt, now, p.NotAfter())
		}
	}
	if issued < 1000 {
		t.Errorf("only %d were issued", issued)
	}
}

// A root that ends before its intermediate, as some upstreams make them, ends the leaf.
func TestLeafEndsWithTheRoot(t *testing.T) {
	h := newHierarchy(t)
	h.root = authority(t, nil, h.rootKey, h.rootKey.Public(), func(c *x509.Certificate) {
		c.NotAfter, c.MaxPathLenZero, c.MaxPathLen = testNow.Add(10*time.Minute), false, -1
	})
	h.cert = authority(t, h.root, h.rootKey, h.key.Public(), nil)
	iss := must(NewIssuer(testTD, certs(h.cert), h.root, h.key))(t)
	p := must(Prepare(Profile{}, Request{ID: testID, PublicKey: newKey(t, KeyP256).Public()}, iss, testNow))(t)
	if !p.NotAfter().Equal(h.root.NotAfter) || !iss.NotAfter().Equal(h.root.NotAfter) {
		t.Errorf("the leaf ends %s, the root %s", p.NotAfter(), h.root.NotAfter)
	}
}

// threat: K09
func TestRenewalIsSpreadEvenly(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 42)
	const draws, buckets = 20000, 20
	for _, tt := range []struct{ from, to float64 }{{DefaultRenewFrom, DefaultRenewTo}, {0.1, 0.9}} {
		p := must(Profile{RenewFrom: tt.from, RenewTo: tt.to}.resolve())(t)
		var counts [buckets]int
		for range draws {
			part := float64(p.DrawRenewal(time.Hour)) / float64(time.Hour)
			i := int((part - tt.from) / (tt.to - tt.from) * buckets)
			if i < 0 || i >= buckets {
				t.Fatalf("drew %f, outside of %f to %f", part, tt.from, tt.to)
			}
			counts[i]++
		}
		chi2 := 0.0
		for _, n := range counts {
			d := float64(n) - draws/buckets
			chi2 += d * d / (draws / buckets)
		}
		if chi2 > 43.8 { // one in a thousand even draws, 19 degrees of freedom
			t.Errorf("%f to %f: chi-square %.1f, counts %v", tt.from, tt.to, chi2, counts)
		}
	}
}

// threat: C25
func TestSerialsDiffer(t *testing.T) {
	seen := make(map[string]bool)
	for range 10000 {
		s := newSerial()
		if s.Sign() <= 0 || len(s.Bytes()) != serialBytes || s.BitLen() > 159 {
			t.Fatalf("serial %x", s)
		}
		seen[SerialString(s)] = true
	}
	if len(seen) != 10000 {
		t.Errorf("%d different ones of 10000", len(seen))
	}
}

// threat: C27
func TestSignOnce(t *testing.T) {
	h := newHierarchy(t)
	var calls atomic.Int32
	h.issuer.key = brokenSigner{h.key, func(m []byte) ([]byte, error) {
		calls.Add(1)
		return crypto.SignMessage(h.key, rand.Reader, m, crypto.SHA256)
	}}
	p := must(Prepare(Profile{}, Request{ID: testID, PublicKey: newKey(t, KeyP256).Public()}, h.issuer, testNow))(t)
	if calls.Load() != 0 {
		t.Fatal("something was signed before Sign")
	}
	var good, refused atomic.Int32
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if _, err := p.Sign(); err == nil {
				good.Add(1)
			} else if api.ReasonOf(err) == api.Internal {
				refused.Add(1)
			}
		})
	}
	wg.Wait()
	if good.Load() != 1 || refused.Load() != 31 || calls.Load() != 1 {
		t.Errorf("%d good, %d refused, %d signatures", good.Load(), refused.Load(), calls.Load())
	}
}

// What a faulty key, library or HSM returns never leaves.
//
// threat: C26
func TestCorruptSignatureIsCaught(t *testing.T) {
	h := newHierarchy(t)
	other := newKey(t, KeyP256)
	sign := func(k crypto.Signer, m []byte) ([]byte, error) {
		return crypto.SignMessage(k, rand.Reader, m, crypto.SHA256)
	}
	tests := []struct {
		name string
		sign func(m []byte) ([]byte, error)
		want api.Reason
	}{
		{"good", func(m []byte) ([]byte, error) { return sign(h.key, m) }, ""},
		{"one bit", func(m []byte) ([]byte, error) { s, err := sign(h.key, m); s[len(s)-1] ^= 1; return s, err }, api.LintFailed},
		{"other message", func(m []byte) ([]byte, error) { m[len(m)-1] ^= 1; return sign(h.key, m) }, api.LintFailed},
		{"other key", func(m []byte) ([]byte, error) { return sign(other, m) }, api.LintFailed},
		{"nothing", func([]byte) ([]byte, error) { return nil, nil }, api.LintFailed},
		{"a megabyte", func([]byte) ([]byte, error) { return make([]byte, 1<<20), nil }, api.LintFailed},
		{"error", func([]byte) ([]byte, error) { return nil, errors.New("the HSM is on fire") }, api.SignerUnavailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			iss := *h.issuer
			iss.key = brokenSigner{h.key, tt.sign}
			p := must(Prepare(Profile{}, Request{ID: testID, PublicKey: other.Public()}, &iss, testNow))(t)
			issued, err := p.Sign()
			wantReason(t, err, tt.want)
			if (issued == nil) != (err != nil) {
				t.Error("a certificate came with the error")
			}
			if err != nil && strings.Contains(err.Error(), "fire") {
				t.Error("the cause is shown")
			}
			_, err = p.Sign()
			wantReason(t, err, api.Internal)
		})
	}
}

// Prepare cannot sign: a key that fails the test when asked for anything is never asked.
func TestPrepareDoesNotSign(t *testing.T) {
	h := newHierarchy(t)
	h.issuer.key = brokenSigner{h.key, func([]byte) ([]byte, error) {
		t.Error("the issuing key was used")
		return nil, io.ErrUnexpectedEOF
	}}
	must(Prepare(Profile{}, Request{ID: testID, PublicKey: newKey(t, KeyP256).Public()}, h.issuer, testNow))(t)
}

// spiffe: X-13
func TestNewIssuer(t *testing.T) {
	h, h2 := newHierarchy(t), newHierarchy(t)
	cross := must(CrossSign(testTD, h2.root, h2.rootKey, h.root, testNow))(t)
	other := spiffeid.RequireTrustDomainFromString("example.com")
	pathLen := func(n int) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = n, n == 0 }
	}
	middleKey := newKey(t, KeyP256)
	middle := authority(t, h.root, h.rootKey, middleKey.Public(), pathLen(1))
	below := authority(t, middle, middleKey, h.key.Public(), nil)
	tooShort := authority(t, h.root, h.rootKey, middleKey.Public(), pathLen(0))
	tests := []struct {
		name  string
		td    spiffeid.TrustDomain
		chain []*x509.Certificate
		root  *x509.Certificate
		key   crypto.Signer
		want  api.Reason
	}{
		{"plain", testTD, certs(h.cert), h.root, h.key, ""},
		{"with the cross certificate, under its root", testTD, certs(h.cert, cross), h.root, h.key, ""},
		{"with the cross certificate, under the older root", testTD, certs(h.cert, cross), h2.root, h.key, ""},
		{"two below the root", testTD, certs(below, middle), h.root, h.key, ""},
		{"no chain", testTD, nil, h.root, h.key, api.SignerUnavailable},
		{"hole", testTD, certs(h.cert, nil), h.root, h.key, api.SignerUnavailable},
		{"no root", testTD, certs(h.cert), nil, h.key, api.SignerUnavailable},
		{"no key", testTD, certs(h.cert), h.root, nil, api.SignerUnavailable},
		{"too long", testTD, slices.Repeat(certs(h.cert), maxChain+1), h.root, h.key, api.SignerUnavailable},
		{"other key", testTD, certs(h.cert), h.root, h2.key, api.SignerUnavailable},
		{"other root", testTD, certs(h.cert), h2.root, h.key, api.SignerUnavailable},
		{"other trust domain", other, certs(h.cert), h.root, h.key, api.SignerUnavailable},
		{"no trust domain", spiffeid.TrustDomain{}, certs(h.cert), h.root, h.key, api.SignerUnavailable},
		{"wrong order", testTD, certs(middle, below), h.root, middleKey, api.SignerUnavailable},
		{"gap", testTD, certs(below), h.root, h.key, api.SignerUnavailable},
		{"path too short", testTD, certs(authority(t, tooShort, middleKey, h.key.Public(), nil), tooShort), h.root, h.key, api.SignerUnavailable},
		{"root as issuer", testTD, certs(h.root), h.root, h.rootKey, api.SignerUnavailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			iss, err := NewIssuer(tt.td, tt.chain, tt.root, tt.key)
			wantReason(t, err, tt.want)
			if err != nil {
				return
			}
			p := must(Prepare(Profile{}, Request{ID: testID, PublicKey: newKey(t, KeyP256).Public()}, iss, testNow))(t)
			issued := must(p.Sign())(t)
			if err := Verify(append(certs(issued.Leaf), tt.chain...), certs(iss.Root()), testID, testNow); err != nil {
				t.Errorf("its leaf does not verify: %v", err)
			}
			if iss.TrustDomain() != tt.td || iss.Certificate() != tt.chain[0] || len(issued.Chain) != len(tt.chain)+1 {
				t.Error("the issuer is not what it was made of")
			}
		})
	}
}

func TestCheckBundle(t *testing.T) {
	h, h2 := newHierarchy(t), newHierarchy(t)
	again := must(x509.ParseCertificate(h.root.Raw))(t)
	for _, tt := range []struct {
		name  string
		roots []*x509.Certificate
		want  api.Reason
	}{
		{"its own", certs(h.root), ""},
		{"among others", certs(h2.root, again), ""},
		{"not there", certs(h2.root), api.SignerUnavailable},
		{"the intermediate instead", certs(h.cert), api.SignerUnavailable},
		{"empty", nil, api.SignerUnavailable},
	} {
		t.Run(tt.name, func(t *testing.T) { wantReason(t, h.issuer.CheckBundle(tt.roots), tt.want) })
	}
}
