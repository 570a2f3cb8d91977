package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	"github.com/signet-ca/signet/internal/canary"
)

// A blueprint is a chain before it is signed. It starts as a correct one; a kind of bad chain spoils a part of it.
type blueprint struct {
	leaf, inter *x509.Certificate
	leafKey     crypto.Signer
	leafPublic  crypto.PublicKey // of leafKey unless spoiled
	interPublic crypto.PublicKey // of the intermediate's key unless spoiled
	uris        []string
	sanCritical bool
	interURIs   []string
	order       func([]*x509.Certificate) []*x509.Certificate
}

// A minted chain is leaf first, and the root that its bundle holds.
type minted struct {
	certs []*x509.Certificate
	root  *x509.Certificate
	key   crypto.Signer
}

func (m *minted) pem() []byte {
	var out bytes.Buffer
	if key, err := x509.MarshalPKCS8PrivateKey(m.key); err == nil {
		pem.Encode(&out, &pem.Block{Type: "PRIVATE KEY", Bytes: key})
	}
	for _, c := range m.certs {
		out.WriteString(pemOf(c))
	}
	return out.Bytes()
}

func (m *minted) tls() tls.Certificate {
	t := tls.Certificate{PrivateKey: m.key}
	for _, c := range m.certs {
		t.Certificate = append(t.Certificate, c.Raw)
	}
	return t
}

// sanExtension writes URI names as they are, which x509.CreateCertificate would not.
func sanExtension(critical bool, uris ...string) pkix.Extension {
	var names []asn1.RawValue
	for _, u := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
	}
	value, err := asn1.Marshal(names)
	if err != nil {
		panic(err) // our own constants
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: critical, Value: value}
}

func extUsage(us ...x509.ExtKeyUsage) func(*blueprint) {
	return func(b *blueprint) { b.leaf.ExtKeyUsage = us }
}

func withURIs(uris ...string) func(*blueprint) {
	return func(b *blueprint) { b.uris = uris }
}

// kinds are the ways to spoil a chain, and what must be found.
func kinds(tb testing.TB) map[string]func(*blueprint) {
	return map[string]func(*blueprint){
		"good":          func(*blueprint) {},
		"no-uri":        withURIs(),
		"two-uris":      withURIs("spiffe://example.org/a", "spiffe://example.org/b"),
		"https":         withURIs("https://example.org/a"),
		"no-path":       withURIs("spiffe://example.org"),
		"ca-leaf":       func(b *blueprint) { b.leaf.IsCA, b.leaf.BasicConstraintsValid = true, true },
		"no-ku":         func(b *blueprint) { b.leaf.KeyUsage = 0 },
		"ku-soft":       func(b *blueprint) { b.leaf.KeyUsage = 0; b.leaf.ExtraExtensions = []pkix.Extension{softKeyUsage()} },
		"ku-no-sign":    func(b *blueprint) { b.leaf.KeyUsage = x509.KeyUsageKeyEncipherment },
		"ku-cert-sign":  func(b *blueprint) { b.leaf.KeyUsage |= x509.KeyUsageCertSign },
		"ku-crl-sign":   func(b *blueprint) { b.leaf.KeyUsage |= x509.KeyUsageCRLSign },
		"no-eku":        extUsage(),
		"eku-server":    extUsage(x509.ExtKeyUsageServerAuth),
		"eku-client":    extUsage(x509.ExtKeyUsageClientAuth),
		"eku-any":       extUsage(x509.ExtKeyUsageAny),
		"san-soft":      func(b *blueprint) { b.sanCritical = false },
		"san-soft-name": func(b *blueprint) { b.sanCritical, b.leaf.Subject = false, pkix.Name{CommonName: "web"} },
		"expired":       func(b *blueprint) { b.leaf.NotAfter = testNow.Add(-3 * time.Minute) },
		"future":        func(b *blueprint) { b.leaf.NotBefore = testNow.Add(time.Hour) },
		"last-second":   func(b *blueprint) { b.leaf.NotAfter = testNow },
		"sha1": func(b *blueprint) {
			b.leaf.SignatureAlgorithm = x509.ECDSAWithSHA1
		},
		"rsa-1024": func(b *blueprint) { b.leafKey = rsaKey(tb, 1024); b.leafPublic = b.leafKey.Public() },
		"rsa-2048": func(b *blueprint) { b.leafKey = rsaKey(tb, 2048); b.leafPublic = b.leafKey.Public() },
		"ed25519": func(b *blueprint) {
			b.leafKey = ed25519.NewKeyFromSeed(make([]byte, 32))
			b.leafPublic = b.leafKey.Public()
		},
		"p224": func(b *blueprint) { b.leafKey = ecKey(tb, elliptic.P224()); b.leafPublic = b.leafKey.Public() },
		"huge-issuer": func(b *blueprint) {
			n := new(big.Int).Lsh(big.NewInt(1), 16383)
			b.interPublic = &rsa.PublicKey{N: n.Add(n, big.NewInt(1)), E: 65537}
		},
		"inter-no-ca": func(b *blueprint) { b.inter.IsCA = false },
		"inter-no-sign": func(b *blueprint) {
			b.inter.KeyUsage = x509.KeyUsageCRLSign
		},
		"inter-no-uri":   func(b *blueprint) { b.interURIs = nil },
		"inter-path":     func(b *blueprint) { b.interURIs = []string{"spiffe://example.org/ca"} },
		"inter-foreign":  func(b *blueprint) { b.interURIs = []string{"spiffe://example.com"} },
		"inter-two-uris": func(b *blueprint) { b.interURIs = []string{"spiffe://example.org", "spiffe://example.com"} },
		"inter-expired":  func(b *blueprint) { b.inter.NotAfter = testNow.Add(-time.Minute) },
		"reversed": func(b *blueprint) {
			b.order = func(c []*x509.Certificate) []*x509.Certificate { return []*x509.Certificate{c[1], c[0]} }
		},
		"alone": func(b *blueprint) {
			b.order = func(c []*x509.Certificate) []*x509.Certificate { return c[:1] }
		},
	}
}

func softKeyUsage() pkix.Extension {
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: []byte{3, 2, 7, 0x80}} // digitalSignature
}

func rsaKey(tb testing.TB, bits int) *rsa.PrivateKey {
	tb.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func ecKey(tb testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	tb.Helper()
	make := func() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(curve, rand.Reader) }
	if curve == elliptic.P256() {
		make = canary.NewKey
	}
	k, err := make()
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

// mint makes a chain of one of the kinds.
func mint(tb testing.TB, kind string) (*minted, bool) {
	tb.Helper()
	spoil, ok := kinds(tb)[kind]
	if !ok {
		return nil, false
	}
	return mintWith(tb, spoil), true
}

func mintWith(tb testing.TB, spoil func(*blueprint)) *minted {
	tb.Helper()
	rootKey, interKey := fixedKey(1), ecKey(tb, elliptic.P256())
	root := fixedAuthority(tb, "signet root 7f3a", rootKey, nil, rootKey, 365*24*time.Hour)
	b := &blueprint{
		leaf: &x509.Certificate{
			SerialNumber: big.NewInt(0x1234abcd), NotBefore: testNow.Add(-30 * time.Second), NotAfter: testNow.Add(59*time.Minute + 30*time.Second),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			BasicConstraintsValid: true,
		},
		inter: &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "signet intermediate c41e"}, NotBefore: testNow.Add(-time.Hour),
			NotAfter: testNow.Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
			SubjectKeyId: bytes.Repeat([]byte{0xc4}, 20),
		},
		leafKey: ecKey(tb, elliptic.P256()), uris: []string{"spiffe://example.org/ns/shop/sa/web"}, sanCritical: true,
		interURIs: []string{"spiffe://example.org"},
	}
	b.leafPublic, b.interPublic = b.leafKey.Public(), interKey.Public()
	spoil(b)
	if len(b.uris) > 0 {
		b.leaf.ExtraExtensions = append(b.leaf.ExtraExtensions, sanExtension(b.sanCritical, b.uris...))
	}
	if len(b.interURIs) > 0 {
		b.inter.ExtraExtensions = append(b.inter.ExtraExtensions, sanExtension(false, b.interURIs...))
	}
	certs := []*x509.Certificate{
		sign(tb, b.leaf, &x509.Certificate{Subject: b.inter.Subject, SubjectKeyId: b.inter.SubjectKeyId}, b.leafPublic, interKey),
		sign(tb, b.inter, root, b.interPublic, rootKey),
	}
	if b.order != nil {
		certs = b.order(certs)
	}
	return &minted{certs: certs, root: root, key: b.leafKey}
}

func sign(tb testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		tb.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}
