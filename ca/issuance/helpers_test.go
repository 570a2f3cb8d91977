package issuance

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"io"
	"math/big"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

var (
	testTD  = spiffeid.RequireTrustDomainFromString("example.org")
	testID  = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/cart")
	testNow = time.Date(2026, time.November, 22, 12, 0, 0, 0, time.UTC)
)

const day = 24 * time.Hour

// hierarchy is a root, an intermediate of it, and the issuer made of them.
type hierarchy struct {
	rootKey, key crypto.Signer
	root, cert   *x509.Certificate
	issuer       *Issuer
}

func newHierarchy(t testing.TB, edit ...func(*IntermediateRequest)) hierarchy {
	t.Helper()
	h := hierarchy{rootKey: newKey(t, KeyP256), key: newKey(t, KeyP256)}
	h.root = must(NewRoot(testTD, h.rootKey, 365*day, testNow))(t)
	r := IntermediateRequest{TrustDomain: testTD, PublicKey: h.key.Public(), NotAfter: testNow.Add(4 * day), ExcludeNames: true}
	for _, e := range edit {
		e(&r)
	}
	h.cert = must(SignIntermediate(h.root, h.rootKey, r, testNow))(t)
	h.issuer = must(NewIssuer(testTD, []*x509.Certificate{h.cert}, h.root, h.key))(t)
	return h
}

func withNames(r *IntermediateRequest) { r.ExcludeNames = false }

// issue signs a leaf for testID and a fresh P-256 key.
func (h hierarchy) issue(t testing.TB) *Issued {
	t.Helper()
	p := must(Prepare(Profile{}, Request{ID: testID, PublicKey: newKey(t, KeyP256).Public()}, h.issuer, testNow))(t)
	return must(p.Sign())(t)
}

// leaf signs whatever edit makes of the template of a good leaf, past all checks.
func (h hierarchy) leaf(t testing.TB, edit func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	r := Request{ID: testID, PublicKey: newKey(t, KeyP256).Public()}
	p := must(Profile{}.resolve())(t)
	template := must(castOf(p, r, h.issuer, testNow))(t).template(t)
	edit(template)
	return forge(t, template, h.cert, r.PublicKey, h.key)
}

// template is what crypto/x509 is to be told for the same leaf.
func (c *cast) template(t testing.TB) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(c.serial[:]), NotBefore: c.notBefore, NotAfter: c.notAfter,
		URIs: []*url.URL{must(url.Parse(c.uri))(t)}, DNSNames: c.dnsNames, SubjectKeyId: c.keyID,
	}
	ofEveryLeaf(template)
	return template
}

// authority signs whatever edit makes of the template of a good authority, past all checks.
func authority(t testing.TB, parent *x509.Certificate, parentKey crypto.Signer, pub crypto.PublicKey, edit func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	template := must(authorityTemplate(testTD, "intermediate", newKey(t, KeyP256).Public()))(t)
	template.SubjectKeyId = must(keyID(must(x509.MarshalPKIXPublicKey(pub))(t)))(t)
	template.NotBefore, template.NotAfter, template.MaxPathLenZero = testNow.Add(-time.Minute), testNow.Add(4*day), true
	if edit != nil {
		edit(template)
	}
	if parent == nil {
		parent = template
	}
	return forge(t, template, parent, pub, parentKey)
}

// forge signs a certificate that crypto/x509 encodes, whatever it says.
func forge(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der := must(x509.CreateCertificate(rand.Reader, template, parent, pub, key))(t)
	return must(x509.ParseCertificate(der))(t)
}

func newKey(t testing.TB, kind KeyKind) crypto.Signer {
	t.Helper()
	return must(GenerateKey(kind))(t)
}

// must returns a function that returns v, or ends the test with err.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// wantReason fails unless err has that reason; the empty one stands for no error.
func wantReason(t testing.TB, err error, want api.Reason) {
	t.Helper()
	if want == "" && err == nil {
		return
	}
	if want == "" || err == nil || api.ReasonOf(err) != want {
		t.Fatalf("error %v, want reason %q", err, want)
	}
}

func certs(c ...*x509.Certificate) []*x509.Certificate { return c }

func parseURL(t testing.TB, s string) *url.URL {
	t.Helper()
	return must(url.Parse(s))(t)
}

// tlv encodes one DER element of a single-byte tag.
func tlv(tag byte, contents ...[]byte) []byte {
	body := slices.Concat(contents...)
	out := []byte{tag}
	switch n := len(body); {
	case n < 0x80:
		out = append(out, byte(n))
	case n < 0x100:
		out = append(out, 0x81, byte(n))
	case n < 0x10000:
		out = append(out, 0x82, byte(n>>8), byte(n))
	default:
		out = append(out, 0x83, byte(n>>16), byte(n>>8), byte(n))
	}
	return append(out, body...)
}

const (
	tagSequence = 0x30
	tagSet      = 0x31
)

// san encodes a subjectAltName with these names; tags are of the context class, as 0x86 for a URI.
func san(names ...[]byte) []byte { return tlv(tagSequence, names...) }

func uriName(s string) []byte { return tlv(0x86, []byte(s)) }

func oid(arcs ...int) []byte { return encode(asn1.ObjectIdentifier(arcs)) }

// requestParts are what a PKCS#10 request is put together from.
type requestParts struct {
	key        crypto.Signer
	version    []byte
	subject    []byte
	spki       []byte
	attributes []byte // elements of the SET
	infoTail   []byte // behind the attributes
	algorithm  []byte
	signed     func(info []byte) []byte // makes the signature
	outerTail  []byte                   // behind the signature
}

// goodRequest returns the parts of a request that is accepted, signed by key.
func goodRequest(t testing.TB, key crypto.Signer) requestParts {
	t.Helper()
	p := requestParts{key: key, version: []byte{2, 1, 0}, subject: tlv(tagSequence)}
	p.spki = must(x509.MarshalPKIXPublicKey(key.Public()))(t)
	var opts crypto.SignerOpts = crypto.SHA256
	for der, algorithm := range requestSignatures() {
		switch {
		case algorithm == x509.ECDSAWithSHA256 && KeyName(key.Public())[0] == 'E',
			algorithm == x509.SHA256WithRSA && KeyName(key.Public())[0] == 'R':
			p.algorithm = []byte(der)
		}
	}
	if KeyName(key.Public()) == "Ed25519" {
		p.algorithm, opts = []byte(identifier(oidEd25519, nil)), crypto.Hash(0)
	}
	p.signed = func(info []byte) []byte {
		return must(crypto.SignMessage(key, rand.Reader, info, opts))(t)
	}
	return p
}

// der encodes the request.
func (p requestParts) der() []byte {
	info := tlv(tagSequence, p.version, p.subject, p.spki, tlv(0xa0, p.attributes), p.infoTail)
	return tlv(tagSequence, info, p.algorithm, tlv(3, []byte{0}, p.signed(info)), p.outerTail)
}

// extensionRequest encodes the attribute that asks for extensions.
func extensionRequest(extensions ...[]byte) []byte {
	return tlv(tagSequence, derExtensionRequest, tlv(tagSet, tlv(tagSequence, extensions...)))
}

func sanExtensionDER(value []byte) []byte {
	return tlv(tagSequence, derSubjectAltName, tlv(4, value))
}

// brokenSigner has a public key and signs as its function says.
type brokenSigner struct {
	crypto.Signer
	sign func(message []byte) ([]byte, error)
}

func (s brokenSigner) SignMessage(_ io.Reader, msg []byte, _ crypto.SignerOpts) ([]byte, error) {
	return s.sign(bytes.Clone(msg))
}
