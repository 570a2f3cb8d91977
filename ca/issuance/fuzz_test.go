package issuance

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/signet-ca/signet/api"
)

// FuzzCSR: whatever comes in, ParseCSR answers with a reason of its own, and what it accepts crypto/x509 reads the same way.
//
// spiffe: X-01
// threat: C20, CVE-2026-40097
func FuzzCSR(f *testing.F) {
	key := newKey(f, KeyP256)
	for _, der := range [][]byte{
		nil, {tagSequence, 0}, nested(100),
		stdCSR(f, key, nil), stdCSR(f, newKey(f, KeyP384), nil), stdCSR(f, newKey(f, KeyEd25519), nil), stdCSR(f, must(testRSA())(f), nil),
		edited(f, key, func(p *requestParts) { p.attributes = extensionRequest(names(uriName(testID.String()))...) }),
		edited(f, key, func(p *requestParts) {
			p.attributes = extensionRequest(names(uriName(testID.String()), tlv(0x82, []byte("a.svc")))...)
		}),
		edited(f, key, func(p *requestParts) {
			p.attributes = extensionRequest(ext(19, tlv(tagSequence, []byte{1, 1, 0xff}))...)
		}),
	} {
		f.Add(der)
	}
	reasons := []api.Reason{
		api.CSRTooLarge, api.CSRMalformed, api.CSRSignature, api.CSRExtraSAN, api.CSRURICount, api.CSRForbiddenExtension,
		api.IDMalformed, api.KeyType, api.WeakKey, api.KeyTooLarge,
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		csr, err := ParseCSR(der, Keys{Ed25519: true})
		if err != nil {
			if r := api.ReasonOf(err); !slices.Contains(reasons, r) || (r == api.CSRTooLarge) != (len(der) > api.MaxCSRBytes) {
				t.Fatalf("%d bytes: %v", len(der), err)
			}
			return
		}
		if err := CheckKey(csr.PublicKey, Keys{Ed25519: true}); err != nil {
			t.Fatalf("accepted with %v", err)
		}
		std, err := x509.ParseCertificateRequest(der)
		if err != nil {
			return // its subject, which we skip, does not parse
		}
		if err := std.CheckSignature(); err != nil || !sameKey(std.PublicKey, csr.PublicKey) {
			t.Fatalf("crypto/x509 sees another key or no signature: %v", err)
		}
		if len(std.DNSNames)+len(std.EmailAddresses)+len(std.IPAddresses) > 0 || len(std.URIs) > 1 || len(std.Extensions) > 1 {
			t.Fatal("crypto/x509 sees more names or extensions")
		}
		if want := len(std.URIs) == 0 || std.URIs[0].String() == testID.String(); (csr.Match(testID) == nil) != want {
			t.Fatalf("crypto/x509 sees the URIs %v", std.URIs)
		}
	})
}

// goldenFiles reads golden certificates: seeds whose keys are the same in every process that takes part in fuzzing.
func goldenFiles(f *testing.F, names ...string) (out []*x509.Certificate) {
	f.Helper()
	for _, name := range names {
		der := must(os.ReadFile(filepath.Join("testdata", name+".der")))(f)
		out = append(out, must(x509.ParseCertificate(der))(f))
	}
	return out
}

// FuzzVerifyChain: no chain verifies but the one that was signed, and no certificate that parses upsets the lints. Run it
// with -fuzzminimizetime 20x: by default the fuzzer spends its time on making certificates smaller.
//
// spiffe
func FuzzVerifyChain(f *testing.F) {
	g := goldenFiles(f, "leaf-ecdsa-p256", "intermediate-excluding-names", "root", "cross", "leaf-with-names", "intermediate", "leaf-ed25519", "leaf-rsa-2048")
	leaf, intermediate, root := g[0], g[1], g[2]
	signed := certs(leaf, g[6], g[7]) // by intermediate, for testID
	for _, c := range g {
		f.Add(c.Raw, intermediate.Raw)
		f.Add(leaf.Raw, c.Raw)
	}
	f.Fuzz(func(t *testing.T, leafDER, intermediateDER []byte) {
		leaf, err := x509.ParseCertificate(leafDER)
		if err != nil {
			return
		}
		chain := certs(leaf)
		for _, lint := range []func(*x509.Certificate) error{LintLeaf, LintRoot, LintIntermediate, LintCross} {
			if err := lint(leaf); err != nil && api.ReasonOf(err) != api.LintFailed {
				t.Fatal(err)
			}
		}
		if c, err := x509.ParseCertificate(intermediateDER); err == nil {
			chain = append(chain, c)
		}
		if err := Verify(chain, certs(root), testID, testNow); err != nil {
			if api.ReasonOf(err) != api.SVIDRejected {
				t.Fatal(err)
			}
			return
		}
		if !slices.ContainsFunc(signed, func(c *x509.Certificate) bool { return bytes.Equal(c.RawTBSCertificate, leaf.RawTBSCertificate) }) {
			t.Fatalf("%x verifies, and was never signed", leafDER)
		}
	})
}

// FuzzIntermediate: of all answers an upstream could give, only the certificate that it signed is accepted.
func FuzzIntermediate(f *testing.F) {
	g := goldenFiles(f, "intermediate-excluding-names", "root", "cross", "intermediate")
	intermediate, root := g[0], g[1]
	for _, c := range g {
		f.Add(c.Raw)
		f.Add(slices.Concat(intermediate.Raw, c.Raw))
		f.Add(slices.Concat(c.Raw, intermediate.Raw, root.Raw))
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		chain, err := x509.ParseCertificates(der)
		if err != nil {
			return
		}
		got, err := CheckIntermediate(IntermediateCheck{
			TrustDomain: testTD, PublicKey: intermediate.PublicKey, Chain: chain, Roots: certs(root), MinLifetime: day,
		}, testNow)
		if err != nil {
			if !strings.HasPrefix(string(api.ReasonOf(err)), "UPSTREAM_") || api.ReasonOf(err) == api.UpstreamRefused {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(got.Chain[0].RawTBSCertificate, intermediate.RawTBSCertificate) || !got.Root.Equal(root) {
			t.Fatal("something else was accepted")
		}
	})
}

// FuzzIntermediateCSR: no request without a proof of its key, or for another trust domain, yields a key.
func FuzzIntermediateCSR(f *testing.F) {
	key := newKey(f, KeyP256)
	for _, exclude := range []bool{false, true} {
		f.Add(must(NewIntermediateCSR(testTD, key, exclude))(f))
	}
	f.Add(goodRequest(f, key).der())
	f.Fuzz(func(t *testing.T, der []byte) {
		pub, err := ParseIntermediateCSR(der, testTD)
		if err != nil {
			if api.ReasonOf(err) == api.Internal {
				t.Fatal(err)
			}
			return
		}
		if r, err := x509.ParseCertificateRequest(der); err != nil || r.CheckSignature() != nil || !sameKey(pub, r.PublicKey) {
			t.Fatalf("%x proves nothing", der)
		}
	})
}

// FuzzElement: the walk over DER sees the elements that encoding/asn1 sees, but for those with a tag above 30.
func FuzzElement(f *testing.F) {
	key := newKey(f, KeyP256)
	for _, der := range [][]byte{
		nil, {tagSequence, 0}, {tagSequence, 0x80, 0, 0}, {2, 0x81, 1, 0}, {2, 0x82, 0, 1, 0}, {0x1f, 0x1f, 0}, {0x9f, 0x81, 0, 0}, {4, 0x84, 0xff, 0xff, 0xff, 0xff},
		nested(20), stdCSR(f, key, nil), must(encodeKey(key.Public()))(f),
	} {
		f.Add(der)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		var want asn1.RawValue
		wantRest, wantErr := asn1.Unmarshal(der, &want)
		got, rest, err := next(der)
		if err != nil {
			if wantErr == nil && want.Tag < 0x1f {
				t.Fatalf("refused, and encoding/asn1 reads %v", want)
			}
			return
		}
		if wantErr != nil || got.Class != want.Class || got.Tag != want.Tag || got.IsCompound != want.IsCompound ||
			!bytes.Equal(got.Bytes, want.Bytes) || !bytes.Equal(got.FullBytes, want.FullBytes) || !bytes.Equal(rest, wantRest) {
			t.Fatalf("%v and %x, encoding/asn1 has %v and %x, %v", got, rest, want, wantRest, wantErr)
		}
	})
}
