package issuance

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/md5"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// stdCSR is a request as crypto/x509 writes it.
func stdCSR(t testing.TB, key crypto.Signer, edit func(*x509.CertificateRequest)) []byte {
	t.Helper()
	var r x509.CertificateRequest
	if edit != nil {
		edit(&r)
	}
	return must(x509.CreateCertificateRequest(rand.Reader, &r, key))(t)
}

// spiffe: ID-02, X-01
func TestParseCSRAccepts(t *testing.T) {
	p256, all := newKey(t, KeyP256), Keys{Ed25519: true}
	uri := testID.URL()
	rsaKey := must(testRSA())(t)
	tests := []struct {
		name string
		der  []byte
		key  crypto.Signer
	}{
		{"bare", stdCSR(t, p256, nil), p256},
		{"the URI", stdCSR(t, p256, func(r *x509.CertificateRequest) { r.URIs = []*url.URL{uri} }), p256},
		{"critical URI", edited(t, p256, func(p *requestParts) {
			p.attributes = extensionRequest(tlv(tagSequence, derSubjectAltName, []byte{1, 1, 0xff}, tlv(4, san(uriName(testID.String())))))
		}), p256},
		{"no extensions", edited(t, p256, func(p *requestParts) { p.attributes = extensionRequest() }), p256},
		{"hostile subject", stdCSR(t, p256, func(r *x509.CertificateRequest) {
			r.Subject = pkix.Name{CommonName: "a\n{\"level\":\"error\"}\x1b[31m", Organization: []string{strings.Repeat("x", 4000)}}
		}), p256},
		{"subject that is no name", edited(t, p256, func(p *requestParts) { p.subject = tlv(tagSequence, []byte{0x31, 0x84, 0xff, 0xff}) }), p256},
		{"p-384", stdCSR(t, newKey(t, KeyP384), nil), nil},
		{"ed25519", stdCSR(t, newKey(t, KeyEd25519), nil), nil},
		{"rsa", stdCSR(t, rsaKey, nil), rsaKey},
		{"rsa with sha-384", stdCSR(t, rsaKey, func(r *x509.CertificateRequest) { r.SignatureAlgorithm = x509.SHA384WithRSA }), rsaKey},
		{"rsa with sha-512", stdCSR(t, rsaKey, func(r *x509.CertificateRequest) { r.SignatureAlgorithm = x509.SHA512WithRSA }), rsaKey},
		{"p-256 with sha-512", stdCSR(t, p256, func(r *x509.CertificateRequest) { r.SignatureAlgorithm = x509.ECDSAWithSHA512 }), p256},
		{"as large as may be", edited(t, p256, func(p *requestParts) {
			p.subject = tlv(tagSequence, make([]byte, api.MaxCSRBytes-len(goodRequest(t, p256).der())-16))
		}), p256},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			csr := must(ParseCSR(tt.der, all))(t)
			if tt.key != nil && !sameKey(csr.PublicKey, tt.key.Public()) {
				t.Error("another key came out")
			}
			if want := sha256.Sum256(must(x509.MarshalPKIXPublicKey(csr.PublicKey))(t)); csr.SPKI != want {
				t.Error("the hash is not that of the key")
			}
			if err := csr.Match(testID); err != nil {
				t.Errorf("does not match: %v", err)
			}
		})
	}
}

// spiffe: X-01
func TestMatch(t *testing.T) {
	key := newKey(t, KeyP256)
	named := func(id string) *CSR {
		return must(ParseCSR(edited(t, key, func(p *requestParts) {
			p.attributes = extensionRequest(sanExtensionDER(san(uriName(id))))
		}), Keys{}))(t)
	}
	for _, tt := range []struct {
		name string
		csr  *CSR
		want api.Reason
	}{
		{"names nothing", must(ParseCSR(stdCSR(t, key, nil), Keys{}))(t), ""},
		{"the same", named(testID.String()), ""},
		{"other path", named("spiffe://example.org/ns/shop/sa/admin"), api.IDMismatch},
		{"longer path", named(testID.String() + "/x"), api.IDMismatch},
		{"other case", named("spiffe://example.org/ns/Shop/sa/cart"), api.IDMismatch},
		{"other trust domain", named("spiffe://example.com/ns/shop/sa/cart"), api.IDMismatch},
	} {
		t.Run(tt.name, func(t *testing.T) { wantReason(t, tt.csr.Match(testID), tt.want) })
	}
	t.Run("zero ID", func(t *testing.T) { wantReason(t, named(testID.String()).Match(spiffeid.ID{}), api.IDMismatch) })
}

// edited is the DER of a request after edit.
func edited(t testing.TB, key crypto.Signer, edit func(*requestParts)) []byte {
	t.Helper()
	p := goodRequest(t, key)
	edit(&p)
	return p.der()
}

// threat: C20, C21, C24, CVE-2026-40097
func TestParseCSRForm(t *testing.T) {
	key := newKey(t, KeyP256)
	good := goodRequest(t, key).der()
	request := func(edit func(*requestParts)) []byte { return edited(t, key, edit) }
	tests := []struct {
		name string
		der  []byte
		want api.Reason
	}{
		{"good", good, ""},
		{"nil", nil, api.CSRMalformed},
		{"empty sequence", tlv(tagSequence), api.CSRMalformed},
		{"a byte too large", append(bytes.Clone(good), make([]byte, api.MaxCSRBytes+1-len(good))...), api.CSRTooLarge},
		{"5 MiB", make([]byte, 5<<20), api.CSRTooLarge},
		{"a byte behind", append(bytes.Clone(good), 0), api.CSRMalformed},
		{"twice", slices.Concat(good, good), api.CSRMalformed},
		{"cut short", good[:len(good)-1], api.CSRMalformed},
		{"pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good}), api.CSRMalformed},
		{"pem header only", bytes.Repeat([]byte("-----BEGIN"), 1000), api.CSRMalformed},
		{"indefinite length", slices.Concat([]byte{tagSequence, 0x80}, good[3:], []byte{0, 0}), api.CSRMalformed},
		{"long form of a short length", tlv(tagSequence, []byte{2, 0x81, 1, 0}), api.CSRMalformed},
		{"length above the input", []byte{tagSequence, 0x84, 0xff, 0xff, 0xff, 0xff}, api.CSRMalformed},
		{"10000 levels deep", nested(5000), api.CSRMalformed},
		{"version 1", request(func(p *requestParts) { p.version = []byte{2, 1, 1} }), api.CSRMalformed},
		{"version -1", request(func(p *requestParts) { p.version = []byte{2, 1, 0xff} }), api.CSRMalformed},
		{"version of two bytes", request(func(p *requestParts) { p.version = []byte{2, 2, 0, 0} }), api.CSRMalformed},
		{"subject is a set", request(func(p *requestParts) { p.subject = tlv(tagSet) }), api.CSRMalformed},
		{"more behind the attributes", request(func(p *requestParts) { p.infoTail = []byte{5, 0} }), api.CSRMalformed},
		{"more behind the signature", request(func(p *requestParts) { p.outerTail = []byte{5, 0} }), api.CSRMalformed},
		{"signature with spare bits", withSpareBits(t, good), api.CSRMalformed},
		{"attribute is no sequence", request(func(p *requestParts) { p.attributes = []byte{5, 0} }), api.CSRMalformed},
		{"attribute with three parts", request(func(p *requestParts) {
			p.attributes = tlv(tagSequence, derExtensionRequest, tlv(tagSet), []byte{5, 0})
		}), api.CSRMalformed},
		{"attribute without values", request(func(p *requestParts) { p.attributes = tlv(tagSequence, derExtensionRequest, tlv(tagSet)) }), api.CSRMalformed},
		{"attribute with two values", request(func(p *requestParts) {
			p.attributes = tlv(tagSequence, derExtensionRequest, tlv(tagSet, tlv(tagSequence), tlv(tagSequence)))
		}), api.CSRMalformed},
		{"extensions asked for twice", request(func(p *requestParts) {
			p.attributes = slices.Concat(extensionRequest(), extensionRequest())
		}), api.CSRMalformed},
		{"cut attributes", request(func(p *requestParts) { p.attributes = []byte{tagSequence, 9} }), api.CSRMalformed},
		{"cut extensions", request(func(p *requestParts) { p.attributes = extensionRequest([]byte{tagSequence, 9}) }), api.CSRMalformed},
		{"extension of one part", request(func(p *requestParts) { p.attributes = extensionRequest(tlv(tagSequence, derSubjectAltName)) }), api.CSRMalformed},
		{"extension value is no octet string", request(func(p *requestParts) {
			p.attributes = extensionRequest(tlv(tagSequence, derSubjectAltName, san()))
		}), api.CSRMalformed},
		{"critical written as 1", request(func(p *requestParts) {
			p.attributes = extensionRequest(tlv(tagSequence, derSubjectAltName, []byte{1, 1, 1}, tlv(4, san(uriName(testID.String())))))
		}), api.CSRMalformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseCSR(tt.der, Keys{})
			wantReason(t, err, tt.want)
		})
	}
}

// nested returns that many sequences inside of each other, as deep as they fit.
func nested(levels int) []byte {
	var der []byte
	for range levels {
		if next := tlv(tagSequence, der); len(next) <= api.MaxCSRBytes {
			der = next
		}
	}
	return der
}

// withSpareBits says of the signature, the last element, that its last bit does not belong to it.
func withSpareBits(t *testing.T, der []byte) []byte {
	parts := must(fields(must(element(der))(t), 3, 3))(t)
	out := bytes.Clone(der)
	out[len(out)-len(parts[2].Bytes)] = 1
	return out
}

// spiffe: ID-01, ID-02, ID-03, ID-05, ID-06, ID-07, X-01, X-03
// threat: C01, C02, C03, C04, C05, C06, C07, C08, C09, C10, C11, C12, CVE-2021-27098, B02
func TestParseCSRNames(t *testing.T) {
	key := newKey(t, KeyP256)
	tests := []struct {
		name       string
		extensions [][]byte
		want       api.Reason
	}{
		{"authority", ext(19, tlv(tagSequence, []byte{1, 1, 0xff})), api.CSRForbiddenExtension},
		{"not an authority", ext(19, tlv(tagSequence)), api.CSRForbiddenExtension},
		{"key usage", ext(15, []byte{3, 2, 7, 0x80}), api.CSRForbiddenExtension},
		{"extended key usage", ext(37, tlv(tagSequence, oid(1, 3, 6, 1, 5, 5, 7, 3, 1))), api.CSRForbiddenExtension},
		{"name constraints", ext(30, tlv(tagSequence)), api.CSRForbiddenExtension},
		{"unknown extension", [][]byte{tlv(tagSequence, oid(1, 2, 3, 4), tlv(4))}, api.CSRForbiddenExtension},
		{"URI and key usage", slices.Concat(names(uriName(testID.String())), ext(15, []byte{3, 2, 7, 0x80})), api.CSRForbiddenExtension},
		{"names twice", slices.Concat(names(uriName(testID.String())), names(uriName(testID.String()))), api.CSRMalformed},

		{"dns", names(tlv(0x82, []byte("cart.shop.svc"))), api.CSRExtraSAN},
		{"uri and dns", names(uriName(testID.String()), tlv(0x82, []byte("cart.shop.svc"))), api.CSRExtraSAN},
		{"email", names(tlv(0x81, []byte("a@example.org"))), api.CSRExtraSAN},
		{"ip", names(tlv(0x87, net.IPv4(10, 0, 0, 1).To4())), api.CSRExtraSAN},
		{"other name", names(tlv(0xa0, oid(1, 2, 3), tlv(0xa0, tlv(12, []byte("x"))))), api.CSRExtraSAN},
		{"x400", names(tlv(0xa3)), api.CSRExtraSAN},
		{"directory name", names(tlv(0xa4, tlv(tagSequence))), api.CSRExtraSAN},
		{"edi party", names(tlv(0xa5)), api.CSRExtraSAN},
		{"registered id", names(tlv(0x88, []byte{0x2a, 3})), api.CSRExtraSAN},
		{"tag 9", names(tlv(0x89, []byte("x"))), api.CSRExtraSAN},
		{"uri and dns, constructed", names(tlv(0xa6, uriName(testID.String()))), api.CSRExtraSAN},

		{"two URIs", names(uriName(testID.String()), uriName(testID.String())), api.CSRURICount},
		{"500 URIs", names(slices.Repeat([][]byte{uriName("spiffe://example.org/a")}, 500)...), api.CSRURICount},
		{"no names", names(), api.CSRMalformed},
		{"universal string", names(tlv(22, []byte(testID.String()))), api.CSRMalformed},
		{"cut names", [][]byte{sanExtensionDER(tlv(tagSequence, []byte{0x86, 9, 'x'}))}, api.CSRMalformed},
		{"names with a tail", [][]byte{sanExtensionDER(append(san(uriName(testID.String())), 5, 0))}, api.CSRMalformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			der := edited(t, key, func(p *requestParts) { p.attributes = extensionRequest(tt.extensions...) })
			_, err := ParseCSR(der, Keys{})
			wantReason(t, err, tt.want)
		})
	}
	for _, uri := range malformedIDs {
		t.Run("URI "+uri[:min(len(uri), 60)], func(t *testing.T) {
			der := edited(t, key, func(p *requestParts) { p.attributes = extensionRequest(names(uriName(uri))...) })
			_, err := ParseCSR(der, Keys{})
			wantReason(t, err, api.IDMalformed)
			if len(uri) > 10 && strings.Contains(err.Error(), uri) {
				t.Errorf("the error repeats what was sent: %v", err)
			}
		})
	}
	attributes := map[string][]byte{
		"challenge password": tlv(tagSequence, oid(1, 2, 840, 113549, 1, 9, 7), tlv(tagSet, tlv(12, []byte("secret")))),
		"old extensions":     tlv(tagSequence, oid(1, 3, 6, 1, 4, 1, 311, 2, 1, 14), tlv(tagSet, tlv(tagSequence))),
	}
	for name, attribute := range attributes {
		t.Run(name, func(t *testing.T) {
			_, err := ParseCSR(edited(t, key, func(p *requestParts) { p.attributes = attribute }), Keys{})
			wantReason(t, err, api.CSRForbiddenExtension)
		})
	}
}

// malformedIDs are URIs that a workload's SPIFFE ID cannot be.
var malformedIDs = []string{
	"", "x", "/", "spiffe:", "spiffe:/example.org/a", "spiffe://", "spiffe:///a", "spiffe://example.org", "spiffe://example.org/",
	"SPIFFE://example.org/a", "https://example.org/a", "spiffe://Example.org/a", "spiffe://EXAMPLE.ORG/a",
	"spiffe://example.org:443/a", "spiffe://example.org:/a", "spiffe://user@example.org/a", "spiffe://user:pass@example.org/a", "spiffe://@example.org/a",
	"spiffe://example.org/a?", "spiffe://example.org/a?x=y", "spiffe://example.org/a#", "spiffe://example.org/a#b",
	"spiffe://example.org/%61", "spiffe://ex%61mple.org/a", "spiffe://example.org/%2e%2e/a", "spiffe://example.org/a%00",
	"spiffe://example.org/.", "spiffe://example.org/..", "spiffe://example.org/a/../b", "spiffe://example.org/./a",
	"spiffe://example.org//a", "spiffe://example.org/a//b", "spiffe://example.org/a/", "spiffe://example.org/a b", "spiffe://example.org/a\\b",
	"spiffe://example.org/a\n", "spiffe://example.org/a\x00", "spiffe://example.org/\u00e4", "spiffe://ex\u00e4mple.org/a", "spiffe://xn--\xff/a",
	"spiffe://[::1]/a", "spiffe://[fe80::1%25eth0]/a", "spiffe://[::1%25.example.org]/a", "spiffe://example.org,evil.org/a", "spiffe://*.example.org/a",
	" spiffe://example.org/a", "spiffe://example.org/a ", "spiffe://example.org/" + strings.Repeat("a", 2048),
}

// ext is one extension under 2.5.29.
func ext(n int, value []byte) [][]byte {
	return [][]byte{tlv(tagSequence, oid(2, 5, 29, n), tlv(4, value))}
}

// names is a subjectAltName extension.
func names(n ...[]byte) [][]byte { return [][]byte{sanExtensionDER(san(n...))} }

// threat: C13, C14, C15
func TestParseCSRKeys(t *testing.T) {
	key := newKey(t, KeyP256)
	rsaKey := must(testRSA())(t)
	rsaSPKI := func(n *big.Int, e int) []byte {
		return must(x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: n, E: e}))(t)
	}
	ecSPKI := func(curve []byte, point []byte) []byte {
		return tlv(tagSequence, tlv(tagSequence, encode(oidECDSA), curve), tlv(3, []byte{0}, point))
	}
	point := must(key.Public().(*ecdsa.PublicKey).Bytes())(t)
	bad := bytes.Clone(point)
	bad[64] ^= 1
	null := []byte{5, 0}
	rsaBits := encode(struct {
		N *big.Int
		E int
	}{rsaKey.N, rsaKey.E})
	p224 := must(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))(t)
	p521 := must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))(t)
	small := func(b byte) []byte {
		return tlv(tagSequence, []byte(identifier(oidEd25519, nil)), tlv(3, []byte{0, b}, make([]byte, 31)))
	}
	tests := []struct {
		name string
		spki []byte
		want api.Reason
	}{
		{"p-224", must(x509.MarshalPKIXPublicKey(&p224.PublicKey))(t), api.KeyType},
		{"p-521", must(x509.MarshalPKIXPublicKey(&p521.PublicKey))(t), api.KeyType},
		{"secp256k1", ecSPKI(oid(1, 3, 132, 0, 10), point), api.KeyType},
		{"brainpool", ecSPKI(oid(1, 3, 36, 3, 3, 2, 8, 1, 1, 7), point), api.KeyType},
		{"explicit parameters", ecSPKI(tlv(tagSequence, []byte{2, 1, 1}), point), api.KeyType},
		{"no curve", ecSPKI(nil, point), api.KeyType},
		{"implicit curve", ecSPKI(null, point), api.KeyType},
		{"off the curve", ecSPKI(encode(oidP256), bad), api.WeakKey},
		{"infinity", ecSPKI(encode(oidP256), []byte{0}), api.WeakKey},
		{"compressed", ecSPKI(encode(oidP256), append([]byte{2}, point[1:33]...)), api.WeakKey},
		{"point of the other curve", ecSPKI(encode(oidP384), point), api.WeakKey},

		{"rsa 1024", rsaSPKI(new(big.Int).Rsh(rsaKey.N, 1024), 65537), api.WeakKey},
		{"rsa 8192", rsaSPKI(new(big.Int).Lsh(rsaKey.N, 6144), 65537), api.KeyTooLarge},
		{"rsa 100000", rsaSPKI(new(big.Int).Lsh(rsaKey.N, 100000), 65537), api.KeyTooLarge},
		{"exponent 1", rsaSPKI(rsaKey.N, 1), api.WeakKey},
		{"exponent 3", rsaSPKI(rsaKey.N, 3), api.WeakKey},
		{"even modulus", rsaSPKI(new(big.Int).Add(rsaKey.N, big.NewInt(1)), 65537), api.WeakKey},
		{"modulus times two", rsaSPKI(new(big.Int).Lsh(rsaKey.N, 1), 65537), api.KeyType},
		{"exponent 0", rsaSPKI(rsaKey.N, 0), api.CSRMalformed},
		{"negative modulus", rsaSPKI(new(big.Int).Neg(rsaKey.N), 65537), api.CSRMalformed},
		{"rsa without null", tlv(tagSequence, tlv(tagSequence, encode(oidRSA)), tlv(3, []byte{0}, rsaBits)), api.KeyType},
		{"rsa-pss key", tlv(tagSequence, tlv(tagSequence, oid(1, 2, 840, 113549, 1, 1, 10)), tlv(3, []byte{0}, rsaBits)), api.KeyType},
		{"rsa with a tail", tlv(tagSequence, []byte(identifier(oidRSA, null)), tlv(3, []byte{0}, rsaBits, null)), api.CSRMalformed},
		{"rsa with more inside", tlv(tagSequence, []byte(identifier(oidRSA, null)),
			tlv(3, []byte{0}, tlv(tagSequence, must(element(rsaBits))(t).Bytes, null))), api.CSRMalformed},

		{"dsa", tlv(tagSequence, tlv(tagSequence, oid(1, 2, 840, 10040, 4, 1)), tlv(3, []byte{0, 2, 1, 1})), api.KeyType},
		{"x25519", tlv(tagSequence, tlv(tagSequence, oid(1, 3, 101, 110)), tlv(3, []byte{0}, make([]byte, 32))), api.KeyType},
		{"ed448", tlv(tagSequence, tlv(tagSequence, oid(1, 3, 101, 113)), tlv(3, []byte{0}, make([]byte, 57))), api.KeyType},
		{"ml-dsa-44", tlv(tagSequence, tlv(tagSequence, oid(2, 16, 840, 1, 101, 3, 4, 3, 17)), tlv(3, []byte{0}, make([]byte, 1312))), api.KeyType},
		{"ed25519 of small order", small(1), api.WeakKey},
		{"ed25519 of 31 bytes", tlv(tagSequence, []byte(identifier(oidEd25519, nil)), tlv(3, []byte{0}, make([]byte, 31))), api.CSRMalformed},
		{"ed25519 with parameters", tlv(tagSequence, []byte(identifier(oidEd25519, null)), tlv(3, []byte{0}, make([]byte, 32))), api.KeyType},

		{"empty key", tlv(tagSequence), api.CSRMalformed},
		{"key of three parts", tlv(tagSequence, []byte(identifier(oidRSA, null)), tlv(3, []byte{0}, rsaBits), null), api.CSRMalformed},
		{"key with spare bits", ecSPKIWithSpareBits(point), api.WeakKey},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := goodRequest(t, key)
			p.spki = tt.spki
			p.signed = func([]byte) []byte { return []byte("never looked at") }
			began := time.Now()
			_, err := ParseCSR(p.der(), Keys{Ed25519: true})
			wantReason(t, err, tt.want)
			if d := time.Since(began); d > 10*time.Second { // a big number may take minutes
				t.Errorf("refusing it took %s", d)
			}
		})
	}
	t.Run("ed25519 where not allowed", func(t *testing.T) {
		_, err := ParseCSR(stdCSR(t, newKey(t, KeyEd25519), nil), Keys{})
		wantReason(t, err, api.KeyType)
	})
}

// ecSPKIWithSpareBits says that the last bit does not belong to the point.
func ecSPKIWithSpareBits(point []byte) []byte {
	return tlv(tagSequence, []byte(identifier(oidECDSA, encode(oidP256))), tlv(3, []byte{1}, point))
}

// threat: C17
func TestParseCSRSignature(t *testing.T) {
	key, other, rsaKey := newKey(t, KeyP256), newKey(t, KeyP256), must(testRSA())(t)
	sign := func(k crypto.Signer, digest []byte, h crypto.Hash) []byte {
		return must(k.Sign(rand.Reader, digest, h))(t)
	}
	tests := []struct {
		name string
		key  crypto.Signer
		edit func(*requestParts)
	}{
		{"one bit", key, func(p *requestParts) {
			good := p.signed
			p.signed = func(info []byte) []byte { s := good(info); s[len(s)-1] ^= 1; return s }
		}},
		{"empty", key, func(p *requestParts) { p.signed = func([]byte) []byte { return nil } }},
		{"by another key", key, func(p *requestParts) { p.signed = goodRequest(t, other).signed }},
		{"of something else", key, func(p *requestParts) {
			good := p.signed
			p.signed = func(info []byte) []byte { return good(info[1:]) }
		}},
		{"ecdsa with sha-1", key, func(p *requestParts) {
			p.algorithm = []byte(identifier(asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}, nil))
			p.signed = func(info []byte) []byte { d := sha1.Sum(info); return sign(key, d[:], crypto.SHA1) }
		}},
		{"rsa with sha-1", rsaKey, func(p *requestParts) {
			p.algorithm = []byte(identifier(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 5}, asn1.NullBytes))
			p.signed = func(info []byte) []byte { d := sha1.Sum(info); return sign(rsaKey, d[:], crypto.SHA1) }
		}},
		{"rsa with md5", rsaKey, func(p *requestParts) {
			p.algorithm = []byte(identifier(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 4}, asn1.NullBytes))
			p.signed = func(info []byte) []byte { d := md5.Sum(info); return sign(rsaKey, d[:], crypto.MD5) }
		}},
		{"rsa algorithm for an ecdsa key", key, func(p *requestParts) { p.algorithm = goodRequest(t, rsaKey).algorithm }},
		{"ed25519 algorithm for an ecdsa key", key, func(p *requestParts) { p.algorithm = []byte(identifier(oidEd25519, nil)) }},
		{"ecdsa algorithm with null", key, func(p *requestParts) {
			p.algorithm = []byte(identifier(asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}, asn1.NullBytes))
		}},
		{"no algorithm", key, func(p *requestParts) { p.algorithm = tlv(tagSequence) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseCSR(edited(t, tt.key, tt.edit), Keys{})
			wantReason(t, err, api.CSRSignature)
		})
	}
	t.Run("rsa-pss", func(t *testing.T) {
		der := stdCSR(t, rsaKey, func(r *x509.CertificateRequest) { r.SignatureAlgorithm = x509.SHA256WithRSAPSS })
		_, err := ParseCSR(der, Keys{})
		wantReason(t, err, api.CSRSignature)
	})
	t.Run("every single bit of the signed part", func(t *testing.T) {
		good := goodRequest(t, key).der()
		for i := range 8 * len(good) {
			der := bytes.Clone(good)
			der[i/8] ^= 1 << (i % 8)
			if _, err := ParseCSR(der, Keys{}); err == nil {
				t.Fatalf("bit %d is not covered", i)
			}
		}
	})
}

// What a refusal costs, crypto aside, must not depend on what was sent.
//
// threat: C21
func TestParseCSRAllocations(t *testing.T) {
	key := newKey(t, KeyP256)
	for name, der := range map[string][]byte{
		"URIs": edited(t, key, func(p *requestParts) {
			p.attributes = extensionRequest(names(slices.Repeat([][]byte{uriName("")}, 7000)...)...)
		}),
		"attributes": edited(t, key, func(p *requestParts) { p.attributes = slices.Repeat([]byte{tagSequence, 0}, 7000) }),
		"extensions": edited(t, key, func(p *requestParts) { p.attributes = extensionRequest(slices.Repeat([]byte{tagSequence, 0}, 7000)) }),
		"subject":    edited(t, key, func(p *requestParts) { p.subject = tlv(tagSequence, slices.Repeat([]byte{tagSet, 0}, 7000)) }),
		"fields":     tlv(tagSequence, slices.Repeat([]byte{5, 0}, 7000)),
	} {
		t.Run(name, func(t *testing.T) {
			if len(der) > api.MaxCSRBytes {
				t.Fatal("not even parsed")
			}
			if n := testing.AllocsPerRun(10, func() { ParseCSR(der, Keys{}) }); n > 200 {
				t.Errorf("%.0f allocations", n)
			}
		})
	}
}
