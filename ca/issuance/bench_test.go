package issuance

import (
	"crypto/rand"
	"crypto/x509"
	"testing"
)

// BenchmarkIssue is what one SVID costs the CA, by step. The floor, for P-256, is one verification (the CSR's), one
// signature, and one verification of that: BenchmarkFloor.
func BenchmarkIssue(b *testing.B) {
	h := newHierarchy(b)
	for _, kind := range []KeyKind{KeyP256, KeyP384, KeyEd25519, KeyRSA2048} {
		key := newKey(b, kind)
		der := stdCSR(b, key, nil)
		csr := must(ParseCSR(der, Keys{Ed25519: true}))(b)
		request := Request{ID: testID, PublicKey: csr.PublicKey}
		b.Run("ParseCSR/"+string(kind), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				must(ParseCSR(der, Keys{Ed25519: true}))(b)
			}
		})
		b.Run("Prepare/"+string(kind), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				must(Prepare(Profile{}, request, h.issuer, testNow))(b)
			}
		})
		b.Run("PrepareAndSign/"+string(kind), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				must(must(Prepare(Profile{}, request, h.issuer, testNow))(b).Sign())(b)
			}
		})
		b.Run("All/"+string(kind), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				csr := must(ParseCSR(der, Keys{Ed25519: true}))(b)
				must(must(Prepare(Profile{}, Request{ID: testID, PublicKey: csr.PublicKey}, h.issuer, testNow))(b).Sign())(b)
			}
		})
	}
	b.Run("All/parallel", func(b *testing.B) {
		key := newKey(b, KeyP256)
		der := stdCSR(b, key, nil)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				csr := must(ParseCSR(der, Keys{}))(b)
				must(must(Prepare(Profile{}, Request{ID: testID, PublicKey: csr.PublicKey}, h.issuer, testNow))(b).Sign())(b)
			}
		})
	})
}

// BenchmarkFloor is what crypto/x509 alone takes to check a CSR and sign a certificate, which it verifies too.
func BenchmarkFloor(b *testing.B) {
	h := newHierarchy(b)
	key := newKey(b, KeyP256)
	der := stdCSR(b, key, nil)
	template := &x509.Certificate{SerialNumber: newSerial(), NotBefore: testNow, NotAfter: testNow.Add(DefaultTTL)}
	b.ReportAllocs()
	for b.Loop() {
		csr := must(x509.ParseCertificateRequest(der))(b)
		if err := csr.CheckSignature(); err != nil {
			b.Fatal(err)
		}
		must(x509.CreateCertificate(rand.Reader, template, h.cert, csr.PublicKey, h.key))(b)
	}
}

func BenchmarkVerify(b *testing.B) {
	h := newHierarchy(b)
	chain, roots := certs(h.issue(b).Leaf, h.cert), certs(h.root)
	b.ReportAllocs()
	for b.Loop() {
		if err := Verify(chain, roots, testID, testNow); err != nil {
			b.Fatal(err)
		}
	}
}
