package issuance

import (
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/wycheproof"
)

// algorithmOf returns the DER of the algorithm of a group of vectors, as a request would name it.
func algorithmOf(g wycheproof.Group) string {
	pss := identifier(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 10}, nil) // no request may be signed with it
	want := map[string]x509.SignatureAlgorithm{
		"EcdsaVerify SHA-256": x509.ECDSAWithSHA256, "EcdsaVerify SHA-384": x509.ECDSAWithSHA384, "EcdsaVerify SHA-512": x509.ECDSAWithSHA512,
		"RsassaPkcs1Verify SHA-256": x509.SHA256WithRSA, "RsassaPkcs1Verify SHA-384": x509.SHA384WithRSA, "RsassaPkcs1Verify SHA-512": x509.SHA512WithRSA,
		"EddsaVerify ": x509.PureEd25519,
	}[g.Type+" "+g.SHA]
	for der, algorithm := range requestSignatures() {
		if algorithm == want {
			return der
		}
	}
	return pss
}

// TestWycheproofSignatures has the function that proves possession of a request's key judge signatures and keys that
// broke the verification of others.
//
// threat: C17
func TestWycheproofSignatures(t *testing.T) {
	for _, tc := range []struct {
		pattern           string
		accepted, refused int // at least
	}{
		{"ecdsa_secp*_test.json", 1000, 15000},
		{"ed25519_test.json", 80, 60},
		{"rsa_signature_*_test.json", 60, 6000},
		{"rsa_pss_*_test.json", 0, 3000},
	} {
		t.Run(tc.pattern, func(t *testing.T) {
			var tally wycheproof.Tally
			for _, f := range wycheproof.Read(t, tc.pattern) {
				if strings.Contains(f.Name, "p1363") || strings.Contains(f.Name, "bitcoin") {
					continue // other encodings of the signature than certificates have
				}
				for _, g := range f.Groups {
					countGroup(t, &tally, f.Name, g)
				}
			}
			tally.Want(t, tc.accepted, tc.refused)
		})
	}
}

func countGroup(t *testing.T, tally *wycheproof.Tally, name string, g wycheproof.Group) {
	t.Helper()
	spki, err := element(g.PublicDER)
	if err != nil {
		t.Fatalf("%s: the key of a group is not DER", name)
	}
	pub, keyErr := parseRequestKey(spki, Keys{Ed25519: true})
	algorithm, rule := algorithmOf(g), ""
	switch _, ok := requestSignatures()[algorithm]; {
	case keyErr != nil:
		rule = string(api.ReasonOf(keyErr))
		wantKnown(t, name, keyErr)
	case !ok:
		rule = "algorithm " + strings.TrimSuffix(g.Type, "Verify") + " " + g.SHA
	}
	for _, v := range g.Tests {
		err := keyErr
		if err == nil {
			err = checkPossession(pub, []byte(algorithm), v.Msg, v.Sig)
		}
		if err != nil {
			wantKnown(t, name, err)
		}
		tally.Count(t, name, v, err == nil, rule)
	}
}

// wantKnown fails for a refusal that is a fault of ours.
func wantKnown(t *testing.T, where string, err error) {
	t.Helper()
	if api.ReasonOf(err).Kind() == api.KindInternal {
		t.Errorf("%s: %v", where, err)
	}
}

// TestWycheproofRequests sends the same keys and signatures through ParseCSR as a whole: as requests that are signed for
// something else, each must be refused, whatever the vector says, and a key that no rule accepts before its signature.
//
// threat: C14, C15, C17
func TestWycheproofRequests(t *testing.T) {
	ran, keys, key := 0, map[api.Reason]int{}, newKey(t, KeyP256)
	for _, pattern := range []string{"ecdsa_secp256r1_sha256_test.json", "ecdsa_secp256k1_sha256_test.json", "ecdsa_secp224r1_sha256_test.json",
		"ed25519_test.json", "rsa_signature_2048_sha256_test.json", "rsa_signature_8192_sha256_test.json"} {
		for _, f := range wycheproof.Read(t, pattern) {
			for _, g := range f.Groups {
				for _, v := range g.Tests {
					p := goodRequest(t, key)
					p.spki, p.algorithm = g.PublicDER, []byte(algorithmOf(g))
					p.signed = func([]byte) []byte { return v.Sig }
					_, err := ParseCSR(p.der(), Keys{Ed25519: true})
					if err == nil {
						t.Errorf("%s, vector %d: the signature of something else is accepted", f.Name, v.ID)
						continue
					}
					wantKnown(t, f.Name, err)
					keys[api.ReasonOf(err)]++
					ran++
				}
			}
		}
	}
	t.Logf("%d requests refused: %v", ran, keys)
	if ran < 1900 {
		t.Errorf("%d requests, want at least 1900", ran)
	}
}

// TestWycheproofPoints has ParseCSR read the public keys of key agreement: points that are not on their curve, on another
// one, compressed, at infinity, with explicit parameters.
//
// threat: C15
func TestWycheproofPoints(t *testing.T) {
	var tally wycheproof.Tally
	for _, curve := range []string{"secp224r1", "secp256r1", "secp256k1", "secp384r1", "secp521r1", "brainpoolP256r1", "sect283r1"} {
		for _, f := range wycheproof.Read(t, "ecdh_"+curve+"_test.json") {
			for _, g := range f.Groups {
				for _, v := range g.Tests {
					countPoint(t, &tally, f.Name, v)
				}
			}
		}
	}
	tally.Want(t, 1000, 3500)
}

func countPoint(t *testing.T, tally *wycheproof.Tally, name string, v wycheproof.Vector) {
	t.Helper()
	var text string
	if err := json.Unmarshal(v.Public, &text); err != nil {
		t.Fatal(err)
	}
	der, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := element(der)
	if err != nil {
		tally.Count(t, name, v, false, "not DER")
		return
	}
	pub, err := parseRequestKey(spki, Keys{})
	if err != nil {
		wantKnown(t, name, err)
		tally.Count(t, name, v, false, string(api.ReasonOf(err)))
		return
	}
	if KeyName(pub) != "ECDSA P-256" && KeyName(pub) != "ECDSA P-384" {
		t.Errorf("%s, vector %d: %s", name, v.ID, KeyName(pub))
	}
	// What is wrong may also be the private half, or only what a lenient reader would make of the key.
	if v.Result == "invalid" {
		v.Result = "acceptable"
		if again, err := x509.MarshalPKIXPublicKey(pub); err != nil || string(again) != string(der) {
			t.Errorf("%s, vector %d (%s): accepted in another form than its own", name, v.ID, v.Comment)
		}
	}
	tally.Count(t, name, v, true, "")
}
