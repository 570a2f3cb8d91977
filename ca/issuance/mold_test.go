package issuance

import (
	"bytes"
	"crypto/x509"
	mathrand "math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
)

// A leaf from the mold is, byte for byte, the one that x509.CreateCertificate encodes: whatever its key, its issuer's key, its
// times on either side of 2050, the length of its ID and its DNS names.
//
// threat: C26
func TestMoldIsCreateCertificate(t *testing.T) {
	random := mathrand.New(mathrand.NewPCG(3, 4))
	kinds := []KeyKind{KeyP256, KeyP384, KeyEd25519, KeyRSA2048}
	var subjects [][]byte
	for _, kind := range kinds {
		subjects = append(subjects, must(x509.MarshalPKIXPublicKey(newKey(t, kind).Public()))(t))
	}
	names := []string{"cart.shop.svc", "*.cart.shop.svc", strings.Repeat("a.", 100) + "b"}
	for _, kind := range kinds {
		key := newKey(t, kind)
		parent := authority(t, nil, key, key.Public(), nil)
		m := must(newMold(parent))(t)
		for n := range 300 {
			spki := subjects[random.IntN(len(subjects))]
			from := time.Unix(random.Int64N(1<<33), random.Int64N(1e9)) // until 2242
			c := &cast{
				serial: drawSerial(), notBefore: from, notAfter: from.Add(time.Duration(random.Int64N(int64(365 * day)))),
				spki: spki, keyID: must(keyID(spki))(t), dnsNames: names[:random.IntN(len(names)+1)],
				uri: "spiffe://example.org/" + strings.Repeat("x", random.IntN(300)),
			}
			template := c.template(t)
			got := must(m.pour(c))(t)
			want := must(build(template, parent, must(x509.ParsePKIXPublicKey(spki))(t), parent.PublicKey))(t)
			if !bytes.Equal(got.tbs, want.tbs) {
				t.Fatalf("%s, %d: the mold's leaf\n%x\nis not the encoder's\n%x", kind, n, got.tbs, want.tbs)
			}
			if !bytes.Equal(got.preview.Raw, want.preview.Raw) || got.opts != want.opts {
				t.Fatalf("%s, %d: they would be signed in different ways", kind, n)
			}
		}
	}
}

// What is changed between the look and the signature, in memory say, is not released, though its signature is good.
//
// threat: C26
func TestChangedAfterTheLook(t *testing.T) {
	h := newHierarchy(t)
	p := must(Prepare(Profile{}, Request{ID: testID, PublicKey: newKey(t, KeyP256).Public()}, h.issuer, testNow))(t)
	at := bytes.Index(p.unsigned.tbs, []byte("/ns/shop/"))
	p.unsigned.tbs[at+1] = 'x'
	issued, err := p.Sign()
	wantReason(t, err, api.LintFailed)
	if issued != nil {
		t.Error("it was released")
	}
}

// What Sign returns is what anybody reads who parses its bytes.
func TestIssuedIsWhatParses(t *testing.T) {
	leaf := newHierarchy(t).issue(t).Leaf
	parsed := must(x509.ParseCertificate(leaf.Raw))(t)
	if !parsed.Equal(leaf) || !bytes.Equal(parsed.RawTBSCertificate, leaf.RawTBSCertificate) || !bytes.Equal(parsed.Signature, leaf.Signature) ||
		parsed.SerialNumber.Cmp(leaf.SerialNumber) != 0 || !parsed.NotAfter.Equal(leaf.NotAfter) || !bytes.Equal(parsed.RawSubjectPublicKeyInfo, leaf.RawSubjectPublicKeyInfo) {
		t.Error("the issued certificate is not the one in its bytes")
	}
}
