package attestor_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
)

// jwkOf returns the one entry of a new issuer's set, changed.
func jwkOf(t testing.TB, alg string, change ...func(m map[string]any)) map[string]any {
	t.Helper()
	iss, err := attestortest.NewIssuer(attestortest.Config{Algorithm: alg})
	if err != nil {
		t.Fatal(err)
	}
	var set struct{ Keys []map[string]any }
	if err := json.Unmarshal(iss.JWKS(), &set); err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(set.Keys[0])
	}
	return set.Keys[0]
}

func with(name string, v any) func(map[string]any) { return func(m map[string]any) { m[name] = v } }

func lacking(name string) func(map[string]any) { return func(m map[string]any) { delete(m, name) } }

func jwks(t testing.TB, keys ...any) []byte {
	t.Helper()
	if keys == nil {
		keys = []any{}
	}
	b, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// rsaOf is an RSA entry with a modulus of this many bits, which nobody has the factors of.
func rsaOf(bits int) map[string]any {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	n.SetBit(n, 0, 1)
	return map[string]any{"kty": "RSA", "kid": "rsa", "n": base64.RawURLEncoding.EncodeToString(n.Bytes()), "e": "AQAB"}
}

func TestParseKeySetEntries(t *testing.T) {
	good := jwkOf(t, "ES256", with("kid", "good"))
	var p256, p384 = jwkOf(t, "ES256"), jwkOf(t, "ES384")
	for _, r := range []struct {
		name  string
		entry any
		algs  []string // with which the key can be found; none: ignored
	}{
		{"RS256", jwkOf(t, "RS256"), []string{"RS256"}},
		{"RSA of any algorithm", jwkOf(t, "RS256", lacking("alg")), []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}},
		{"RSA 2048", rsaOf(2048), []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}},
		{"RSA 4096", rsaOf(4096), []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}},
		{"P-256", jwkOf(t, "ES256", lacking("alg")), []string{"ES256"}},
		{"P-384", p384, []string{"ES384"}},
		{"P-521", jwkOf(t, "ES512"), []string{"ES512"}},
		{"Ed25519", jwkOf(t, "EdDSA"), []string{"EdDSA"}},
		{"without use", jwkOf(t, "ES256", lacking("use")), []string{"ES256"}},
		{"key_ops verify", jwkOf(t, "ES256", with("key_ops", []any{"sign", "verify"})), []string{"ES256"}},
		{"with x5c and x5u that nobody heeds", jwkOf(t, "ES256", with("x5c", []any{"AAAA"}), with("x5u", "https://example.net")), []string{"ES256"}},
		{"RSA 1024", rsaOf(1024), nil},
		{"RSA 2047", rsaOf(2047), nil},
		{"RSA 4097", rsaOf(4097), nil},
		{"I09 RSA 16384", rsaOf(16384), nil},
		{"RSA even", jwkOf(t, "RS256", with("n", base64.RawURLEncoding.EncodeToString(append([]byte{0x80}, make([]byte, 255)...)))), nil},
		{"RSA exponent 1", jwkOf(t, "RS256", with("e", "AQ")), nil},
		{"RSA exponent even", jwkOf(t, "RS256", with("e", "Ag")), nil},
		{"RSA exponent huge", jwkOf(t, "RS256", with("e", "AQAAAAE")), nil},
		{"RSA exponent missing", jwkOf(t, "RS256", lacking("e")), nil},
		{"RSA modulus is a number", jwkOf(t, "RS256", with("n", 7)), nil},
		{"RSA-OAEP", jwkOf(t, "RS256", with("alg", "RSA-OAEP")), nil},
		{"RSA as ES256", jwkOf(t, "RS256", with("alg", "ES256")), nil},
		{"RSA as HS256", jwkOf(t, "RS256", with("alg", "HS256")), nil},
		{"alg null", jwkOf(t, "ES256", with("alg", nil)), nil},
		{"P-256 as ES384", jwkOf(t, "ES256", with("alg", "ES384")), nil},
		{"I11 P-256 point said to be P-384", jwkOf(t, "ES256", with("crv", "P-384"), lacking("alg")), nil},
		{"I11 P-384 point said to be P-256", jwkOf(t, "ES384", with("crv", "P-256"), lacking("alg")), nil},
		{"P-224", jwkOf(t, "ES256", with("crv", "P-224")), nil},
		{"secp256k1", jwkOf(t, "ES256", with("crv", "secp256k1")), nil},
		{"off the curve", jwkOf(t, "ES256", with("y", p256["x"])), nil},
		{"at infinity", jwkOf(t, "ES256", with("x", strings.Repeat("A", 43)), with("y", strings.Repeat("A", 43))), nil},
		{"short coordinate", jwkOf(t, "ES256", with("x", "AQ")), nil},
		{"Ed448", jwkOf(t, "EdDSA", with("crv", "Ed448")), nil},
		{"X25519", jwkOf(t, "EdDSA", with("crv", "X25519")), nil},
		{"short Ed25519", jwkOf(t, "EdDSA", with("x", "AQ")), nil},
		{"use enc", jwkOf(t, "ES256", with("use", "enc")), nil},
		{"use null", jwkOf(t, "ES256", with("use", nil)), nil},
		{"key_ops without verify", jwkOf(t, "ES256", with("key_ops", []any{"sign"})), nil},
		{"key_ops string", jwkOf(t, "ES256", with("key_ops", "verify")), nil},
		{"key_ops of objects", jwkOf(t, "ES256", with("key_ops", []any{map[string]any{}})), nil},
		{"no kid", jwkOf(t, "ES256", lacking("kid")), nil},
		{"kid empty", jwkOf(t, "ES256", with("kid", "")), nil},
		{"kid of 257 bytes", jwkOf(t, "ES256", with("kid", strings.Repeat("k", 257))), nil},
		{"symmetric", map[string]any{"kty": "oct", "kid": "o", "k": "c2VjcmV0", "alg": "HS256"}, nil},
		{"private EC", jwkOf(t, "ES256", with("d", "AQ")), nil},
		{"private RSA", jwkOf(t, "RS256", with("p", "AQ")), nil},
		{"unknown kty", map[string]any{"kty": "AKP", "kid": "m", "alg": "ML-DSA-65", "pub": "AAAA"}, nil},
		{"no kty", jwkOf(t, "ES256", lacking("kty")), nil},
		{"not an object", "key", nil},
		{"null", nil, nil},
		{"empty", map[string]any{}, nil},
	} {
		t.Run(r.name, func(t *testing.T) {
			set, err := attestor.ParseKeySet(jwks(t, r.entry, good))
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := set.Find("good", "ES256"); !ok {
				t.Error("the good key went with it")
			}
			m, _ := r.entry.(map[string]any)
			kid, _ := m["kid"].(string)
			var algs []string
			for _, alg := range append(allAlgorithms, "", "none", "HS256", "RSA-OAEP") {
				if _, ok := set.Find(kid, alg); ok {
					algs = append(algs, alg)
				}
			}
			if !slices.Equal(algs, r.algs) {
				t.Errorf("found by %v, want %v; ignored: %q", algs, r.algs, set.Ignored())
			}
			if want := 1 + min(len(r.algs), 1); set.Len() != want || len(set.Ignored()) != 2-want {
				t.Errorf("%d keys, ignored %q; want %d keys", set.Len(), set.Ignored(), want)
			}
			stable(t, set)
		})
	}
}

// stable fails unless the canonical form of a set is a set of the same form, without secrets.
func stable(t testing.TB, set *attestor.KeySet) {
	t.Helper()
	again, err := attestor.ParseKeySet(set.JWKS())
	if err != nil {
		t.Fatalf("the canonical form does not parse: %v", err)
	}
	if !bytes.Equal(again.JWKS(), set.JWKS()) || again.Len() != set.Len() || len(again.Ignored()) != 0 {
		t.Errorf("not stable: %s\nthen %s, ignoring %q", set.JWKS(), again.JWKS(), again.Ignored())
	}
	var std jose.JSONWebKeySet
	if err := json.Unmarshal(set.JWKS(), &std); err != nil && strings.Contains(err.Error(), "modulus too large") {
		return // its limit is lower
	} else if err != nil {
		t.Errorf("another reader refuses the set: %v", err)
	}
	for _, k := range std.Keys {
		if !k.Valid() || !k.IsPublic() {
			t.Errorf("another reader finds key %q not valid or not public", k.KeyID)
		}
	}
}

func TestParseKeySetDuplicateIDs(t *testing.T) {
	a, b := jwkOf(t, "ES256", with("kid", "same")), jwkOf(t, "ES256", with("kid", "same"))
	rsaKey, other := jwkOf(t, "RS256", with("kid", "same")), jwkOf(t, "ES256")
	secret := jwkOf(t, "RS256", with("kid", "same"), with("d", "AQ"))
	for _, r := range []struct {
		name string
		keys []any
		algs []string // by which "same" can be found
	}{
		{"one key twice", []any{a, a, other}, []string{"ES256"}},
		{"two keys of one algorithm", []any{a, b, other}, nil},
		{"whichever comes first", []any{b, a, other}, nil},
		{"and a third", []any{a, b, a, other}, nil},
		{"and a third before", []any{a, a, b, other}, nil},
		{"keys of different algorithms", []any{rsaKey, a, other}, []string{"RS256", "ES256"}},
		{"one is published with its secret", []any{a, secret, other}, nil},
	} {
		t.Run(r.name, func(t *testing.T) {
			set, err := attestor.ParseKeySet(jwks(t, r.keys...))
			if err != nil {
				t.Fatal(err)
			}
			var algs []string
			for _, alg := range allAlgorithms {
				if _, ok := set.Find("same", alg); ok {
					algs = append(algs, alg)
				}
			}
			if !slices.Equal(algs, r.algs) {
				t.Errorf("found by %v, want %v", algs, r.algs)
			}
			stable(t, set)
		})
	}
}

func TestParseKeySetRefuses(t *testing.T) {
	good := jwkOf(t, "ES256")
	entry, _ := json.Marshal(good)
	many := make([]any, attestor.MaxKeys+1)
	for i := range many {
		many[i] = good
	}
	for _, r := range []struct {
		name string
		set  []byte
	}{
		{"nothing", nil},
		{"no JSON", []byte("<html>")},
		{"a list", []byte("[]")},
		{"no keys", []byte("{}")},
		{"keys null", []byte(`{"keys":null}`)},
		{"keys is an object", []byte(`{"keys":{}}`)},
		{"empty", jwks(t)},
		{"none usable", jwks(t, rsaOf(1024))},
		{"keys twice", fmt.Appendf(nil, `{"keys":[%s],"keys":[%s]}`, entry, entry)},
		{"Keys", fmt.Appendf(nil, `{"Keys":[%s]}`, entry)},
		{"a member twice", fmt.Appendf(nil, `{"keys":[{"kid":"x",%s]}`, entry[1:])},
		{"something behind", append(jwks(t, good), '1')},
		{"65 keys", jwks(t, many...)},
		{"I09 above 1 MiB", append(jwks(t, good), bytes.Repeat([]byte(" "), attestor.MaxKeySetBytes)...)},
		{"I09 many values", fmt.Appendf(nil, `{"keys":[%s],"x":[%s0]}`, entry, strings.Repeat("0,", 100_000))},
		{"deep", fmt.Appendf(nil, `{"keys":[%s],"x":%s%s}`, entry, strings.Repeat("[", 100_000), strings.Repeat("]", 100_000))},
		{"I10 a discovery document", []byte(`{"issuer":"https://other.example","jwks_uri":"https://other.example/jwks"}`)},
	} {
		t.Run(r.name, func(t *testing.T) {
			if set, err := attestor.ParseKeySet(r.set); err == nil {
				t.Errorf("accepted with %d keys", set.Len())
			}
			if _, err := attestor.StaticKeys(r.set); err == nil {
				t.Error("accepted as static keys")
			}
		})
	}
}

func TestKeySetOrderDoesNotMatter(t *testing.T) {
	keys := []any{jwkOf(t, "ES256"), jwkOf(t, "RS256"), jwkOf(t, "EdDSA"), rsaOf(1024)}
	a, err := attestor.ParseKeySet(jwks(t, keys...))
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(keys)
	b, err := attestor.ParseKeySet(jwks(t, keys...))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.JWKS(), b.JWKS()) {
		t.Errorf("%s\nthen %s", a.JWKS(), b.JWKS())
	}
}

// Tokens that another library signed are accepted, whatever its key.
func TestTokensOfAnotherLibrary(t *testing.T) {
	c := newCluster(t, "ES256")
	for _, alg := range allAlgorithms {
		t.Run(alg, func(t *testing.T) {
			private := newKey(t, alg)
			jwk := jose.JSONWebKey{Key: private, KeyID: "k", Algorithm: alg, Use: "sig"}
			set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{jwk.Public()}})
			if err != nil {
				t.Fatal(err)
			}
			keys, err := attestor.StaticKeys(set)
			if err != nil {
				t.Fatal(err)
			}
			signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(alg), Key: jwk}, new(jose.SignerOptions).WithType("JWT"))
			if err != nil {
				t.Fatal(err)
			}
			claims, err := json.Marshal(c.Draft(c.pod, audience, ttl).Claims)
			if err != nil {
				t.Fatal(err)
			}
			jws, err := signer.Sign(claims)
			if err != nil {
				t.Fatal(err)
			}
			token, err := jws.CompactSerialize()
			if err != nil {
				t.Fatal(err)
			}
			a, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{c.Name(): keys}})
			if err != nil {
				t.Fatal(err)
			}
			c := c
			c.attestor = a
			accepted(t, c, token)
			// The private half must not be in the set.
			set, err = json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{jwk}})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := attestor.StaticKeys(set); err == nil {
				t.Error("a set with a private key only was accepted")
			}
		})
	}
}

func newKey(t *testing.T, alg string) any {
	t.Helper()
	var key any
	var err error
	switch alg {
	case "ES256":
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ES384":
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "ES512":
		key, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case "EdDSA":
		_, key, err = ed25519.GenerateKey(rand.Reader)
	default:
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestStaticKeysLookup(t *testing.T) {
	c := newCluster(t, "ES256")
	keys, err := attestor.StaticKeys(c.JWKS())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keys.Lookup(t.Context(), c.KeyID(), "ES256"); err != nil {
		t.Error(err)
	}
	for _, ref := range [][2]string{{"", ""}, {c.KeyID(), "RS256"}, {c.KeyID(), "none"}, {c.KeyID() + "x", "ES256"}} {
		if _, err := keys.Lookup(t.Context(), ref[0], ref[1]); api.ReasonOf(err) != api.TokenSignature {
			t.Errorf("%q: got %v, want %s", ref, err, api.TokenSignature)
		}
	}
}

func TestByKeySets(t *testing.T) {
	one, other := newCluster(t, "ES256"), newCluster(t, "RS256")
	tests := []struct {
		name   string
		sets   map[string][]byte
		fails  bool
		reason api.Reason // of what one's token gets; empty: its claims
	}{
		{"its own keys", map[string][]byte{one.Name(): one.JWKS()}, false, ""},
		{"among others", map[string][]byte{one.Name(): one.JWKS(), "https://other.example": other.JWKS()}, false, ""},
		{"another's keys", map[string][]byte{one.Name(): other.JWKS()}, false, api.TokenSignature},
		{"another issuer", map[string][]byte{"https://other.example": one.JWKS()}, false, api.IssuerUnknown},
		{"none", nil, true, ""},
		{"no name", map[string][]byte{"": one.JWKS()}, true, ""},
		{"one of two cannot be used", map[string][]byte{one.Name(): one.JWKS(), "https://other.example": []byte(`{"keys":[]}`)}, true, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, err := attestor.ByKeySets(tt.sets)
			if tt.fails {
				if err == nil || a != nil {
					t.Errorf("got %v, %v; want an error alone", a, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			token := one.token(t)
			c, err := a.Attest(t.Context(), evidence(token), audience, time.Now())
			if tt.reason != "" {
				refused(t, token, c, err, tt.reason)
			} else if err != nil || c.Issuer != one.Name() {
				t.Errorf("claims of issuer %q, %v", c.Issuer, err)
			}
		})
	}
}
