package attestor_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
)

// threat: A20
func TestSignature(t *testing.T) {
	c := newCluster(t, "RS256")
	ec, p521 := newCluster(t, "ES256"), newCluster(t, "ES512")
	other := newCluster(t, "RS256")
	header := attestortest.Header
	signedBy := func(o cluster, alg string) func(*attestortest.Draft) {
		return func(d *attestortest.Draft) {
			d.Header["alg"] = alg
			d.Sign = o.Draft(o.pod, audience, ttl).Sign
		}
	}
	var jwks struct{ Keys []struct{ N string } }
	if err := json.Unmarshal(c.JWKS(), &jwks); err != nil {
		t.Fatal(err)
	}
	modulus, _ := base64.RawURLEncoding.DecodeString(jwks.Keys[0].N)
	mac := func(key []byte) func(*attestortest.Draft) {
		return func(d *attestortest.Draft) {
			d.Header["alg"] = "HS256"
			d.Sign = func(in []byte) ([]byte, error) {
				h := hmac.New(sha256.New, key)
				h.Write(in)
				return h.Sum(nil), nil
			}
		}
	}
	c.run(t, c.attestor, []row{
		{"typ JWT", header("typ", "JWT"), 0, ""},
		{"typ wit+jwt", header("typ", "wit+jwt"), 0, api.TokenMalformed},
		{"typ at+jwt", header("typ", "at+jwt"), 0, api.TokenMalformed},
		{"I01 alg none", header("alg", "none"), 0, api.TokenSignature},
		{"I01 alg None", header("alg", "None"), 0, api.TokenSignature},
		{"I01 alg missing", func(d *attestortest.Draft) { delete(d.Header, "alg") }, 0, api.TokenSignature},
		{"I01 alg empty", header("alg", ""), 0, api.TokenSignature},
		{"alg list", header("alg", []any{"RS256"}), 0, api.TokenSignature},
		{"alg rs256", header("alg", "rs256"), 0, api.TokenSignature},
		{"I02 HS256 by the key set", mac(c.JWKS()), 0, api.TokenSignature},
		{"I02 HS256 by the modulus", mac(modulus), 0, api.TokenSignature},
		{"I02 HS256 by nothing", mac(nil), 0, api.TokenSignature},
		{"A20 signed by another's key", signedBy(other, "RS256"), 0, api.TokenSignature},
		{"A20 RS256 key as PS256", header("alg", "PS256"), 0, api.TokenSignature},
		{"A20 RS256 key as RS512", header("alg", "RS512"), 0, api.TokenSignature},
		{"A20 RS256 key as ES256", signedBy(ec, "ES256"), 0, api.TokenSignature},
		{"A20 unknown kid", header("kid", "unknown"), 0, api.TokenSignature},
		{"A20 no kid", func(d *attestortest.Draft) { delete(d.Header, "kid") }, 0, api.TokenSignature},
		{"I03 kid is a path", header("kid", "../../etc/passwd"), 0, api.TokenSignature},
		{"I03 kid is a URL", header("kid", "https://example.net/key"), 0, api.TokenSignature},
		{"I03 kid is SQL", header("kid", "' UNION SELECT 'key"), 0, api.TokenSignature},
		{"I03 kid is a number", header("kid", 1), 0, api.TokenSignature},
		{"I03 kid of 257 bytes", header("kid", strings.Repeat("k", 257)), 0, api.TokenSignature},
		{"I04 jwk", header("jwk", map[string]any{"kty": "RSA", "n": jwks.Keys[0].N, "e": "AQAB"}), 0, api.TokenSignature},
		{"I04 jku", header("jku", "https://example.net/jwks"), 0, api.TokenSignature},
		{"I04 x5u", header("x5u", "https://example.net/cert"), 0, api.TokenSignature},
		{"I04 x5c", header("x5c", []any{"MIIB"}), 0, api.TokenSignature},
		{"A20 crit", header("crit", []any{"exp"}), 0, api.TokenSignature},
		{"A20 crit empty", header("crit", []any{}), 0, api.TokenSignature},
		{"A20 b64", header("b64", false), 0, api.TokenSignature},
		{"zip", header("zip", "DEF"), 0, api.TokenSignature},
		{"cty", header("cty", "JWT"), 0, api.TokenSignature},
		{"I08 PBES2", func(d *attestortest.Draft) {
			d.Header["alg"], d.Header["p2c"] = "PBES2-HS256+A128KW", 1<<31-1
		}, 0, api.TokenSignature},
		{"empty signature", func(d *attestortest.Draft) {
			d.Sign = func([]byte) ([]byte, error) { return nil, nil }
		}, 0, api.TokenMalformed},
	})
	ec.run(t, ec.attestor, []row{
		{"I11 P-256 key as ES384", header("alg", "ES384"), 0, api.TokenSignature},
		{"I11 P-256 key as ES512", header("alg", "ES512"), 0, api.TokenSignature},
		{"I11 signed by P-521", signedBy(p521, "ES256"), 0, api.TokenSignature},
		{"A20 all zero", func(d *attestortest.Draft) {
			d.Sign = func([]byte) ([]byte, error) { return make([]byte, 64), nil } // CVE-2022-21449
		}, 0, api.TokenSignature},
		{"A20 DER", func(d *attestortest.Draft) {
			sign := d.Sign
			d.Sign = func(in []byte) ([]byte, error) { s, err := sign(in); return append([]byte{0x30, 0x44}, s...), err }
		}, 0, api.TokenSignature},
		{"A20 EdDSA", header("alg", "EdDSA"), 0, api.TokenSignature},
	})
	p521.run(t, p521.attestor, []row{{"I11 P-521 key as ES256", header("alg", "ES256"), 0, api.TokenSignature}})
}

// An ECDSA signature (r, s) has a twin (r, -s) that anyone can derive. It says the same, and must not be a second token.
func TestSignatureTwin(t *testing.T) {
	c := newCluster(t, "ES256")
	n, _ := new(big.Int).SetString("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551", 16)
	token := c.token(t, attestortest.Without("jti"))
	i := strings.LastIndexByte(token, '.') + 1
	sig, _ := base64.RawURLEncoding.DecodeString(token[i:])
	new(big.Int).Sub(n, new(big.Int).SetBytes(sig[32:])).FillBytes(sig[32:])
	twin := token[:i] + base64.RawURLEncoding.EncodeToString(sig)
	a, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.attestor.Attest(t.Context(), evidence(twin), audience, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if twin == token || a != b || !strings.HasPrefix(a.TokenID, "sha256:") {
		t.Errorf("got %+v and %+v", a, b)
	}
}

// Two parsers must not be able to disagree about a token: whoever reads the first of two members, the last, or takes
// "Exp" for "exp".
//
// threat: A20
func TestDuplicateMembers(t *testing.T) {
	c := newCluster(t, "ES256")
	raw := func(f func(claims string) string) func(*attestortest.Draft) {
		return func(d *attestortest.Draft) {
			b, err := json.Marshal(d.Claims)
			if err != nil {
				t.Fatal(err)
			}
			d.RawClaims = []byte(f(string(b)))
		}
	}
	front := func(s string) func(*attestortest.Draft) {
		return raw(func(claims string) string { return "{" + s + "," + claims[1:] })
	}
	inside := func(object, s string) func(*attestortest.Draft) {
		return raw(func(claims string) string { return strings.Replace(claims, object+`":{`, object+`":{`+s+",", 1) })
	}
	head := func(s string) func(*attestortest.Draft) {
		return func(d *attestortest.Draft) {
			b, _ := json.Marshal(d.Header)
			d.RawHeader = []byte("{" + s + "," + string(b[1:]))
		}
	}
	c.run(t, c.attestor, []row{
		{"the unchanged text", raw(func(s string) string { return s }), 0, ""},
		{"white space", raw(func(s string) string { return "\n" + strings.ReplaceAll(s, `,"`, ", \t\"") + " " }), 0, ""},
		{"an unknown claim", front(`"groups":["a"]`), 0, ""},
		{"sub", front(`"sub":"system:serviceaccount:kube-system:admin"`), 0, api.TokenMalformed},
		{"the same sub", front(`"sub":"system:serviceaccount:shop:cart"`), 0, api.TokenMalformed},
		{"iss", front(`"iss":"https://other.example"`), 0, api.TokenMalformed},
		{"exp", front(`"exp":99999999999`), 0, api.TokenMalformed},
		{"Exp", front(`"Exp":99999999999`), 0, api.TokenMalformed},
		{"ſub with a long s", front(`"ſub":"x"`), 0, api.TokenMalformed},
		{"escaped", front(`"\u0073ub":"x"`), 0, api.TokenMalformed},
		{"kubernetes.io", front(`"kubernetes.io":{}`), 0, api.TokenMalformed},
		{"with the Kelvin sign", front(`"\u212aubernetes.io":{}`), 0, api.TokenMalformed},
		{"namespace", inside("kubernetes.io", `"namespace":"kube-system"`), 0, api.TokenMalformed},
		{"Namespace", inside("kubernetes.io", `"Namespace":"kube-system"`), 0, api.TokenMalformed},
		{"pod", inside("kubernetes.io", `"pod":{"name":"x","uid":"y"}`), 0, api.TokenMalformed},
		{"pod.uid", inside("pod", `"uid":"y"`), 0, api.TokenMalformed},
		{"pod.UID", inside("pod", `"UID":"y"`), 0, api.TokenMalformed},
		{"in a claim that nobody reads", front(`"x":{"a":1,"a":2}`), 0, api.TokenMalformed},
		{"alg", head(`"alg":"none"`), 0, api.TokenMalformed},
		{"Alg", head(`"Alg":"none"`), 0, api.TokenMalformed},
		{"kid", head(`"kid":"x"`), 0, api.TokenMalformed},
		{"two objects", raw(func(s string) string { return s + s }), 0, api.TokenMalformed},
		{"something behind", raw(func(s string) string { return s + "0" }), 0, api.TokenMalformed},
		{"trailing comma", raw(func(s string) string { return s[:len(s)-1] + ",}" }), 0, api.TokenMalformed},
		{"invalid UTF-8", front("\"x\":\"\xff\""), 0, api.TokenMalformed},
		{"byte order mark", raw(func(s string) string { return "\ufeff" + s }), 0, api.TokenMalformed},
		{"a list", raw(func(s string) string { return "[" + s + "]" }), 0, api.TokenMalformed},
		{"null", raw(func(string) string { return "null" }), 0, api.TokenMalformed},
		{"empty", raw(func(string) string { return "{}" }), 0, api.IssuerUnknown},
		{"deep", front(`"x":` + strings.Repeat("[", 3000) + strings.Repeat("]", 3000)), 0, api.TokenMalformed},
		{"wide", front(`"x":[` + strings.Repeat("0,", 3000) + `0]`), 0, api.TokenMalformed},
	})
}

// threat: A20, A21
func TestShape(t *testing.T) {
	c := newCluster(t, "ES256")
	good := c.token(t)
	part := strings.Split(good, ".")
	pad := func(n int) string { return strings.Repeat("A", n) }
	for _, r := range []struct {
		name, token string
		want        api.Reason
	}{
		{"empty", "", api.TokenMissing},
		{"A21 one byte too large", good + pad(api.MaxTokenBytes+1-len(good)), api.TokenTooLarge},
		{"A21 1 MiB", pad(1 << 20), api.TokenTooLarge},
		{"A21 100000 dots", strings.Repeat(".", 100_000), api.TokenTooLarge},
		{"A21 dots within the limit", strings.Repeat(".", api.MaxTokenBytes), api.TokenMalformed},
		{"A21 10 MiB header", pad(10<<20) + "." + part[1] + "." + part[2], api.TokenTooLarge},
		{"A21 header of 2 KiB", pad(2<<10) + "." + part[1] + "." + part[2], api.TokenMalformed},
		{"A22 newline", good + "\n", api.TokenAmbiguous},
		{"A22 carriage return", good + "\r\n", api.TokenAmbiguous},
		{"A22 newline inside", good[:40] + "\n" + good[40:], api.TokenAmbiguous},
		{"A22 NUL", good + "\x00", api.TokenAmbiguous},
		{"A22 space before", " " + good, api.TokenAmbiguous},
		{"A22 Bearer", "Bearer " + good, api.TokenAmbiguous},
		{"A22 two", good + " " + good, api.TokenAmbiguous},
		{"A22 two with a comma", good + "," + good, api.TokenAmbiguous},
		{"two without anything between", good + good, api.TokenMalformed},
		{"no dot", pad(100), api.TokenMalformed},
		{"one dot", part[0] + "." + part[1], api.TokenMalformed},
		{"no signature", part[0] + "." + part[1] + ".", api.TokenMalformed},
		{"no payload", part[0] + ".." + part[2], api.TokenMalformed},
		{"no header", "." + part[1] + "." + part[2], api.TokenMalformed},
		{"four parts", good + ".AAAA", api.TokenMalformed},
		{"I08 JWE, five parts", "eyJhbGciOiJQQkVTMi1IUzI1NitBMTI4S1cifQ.AAAA.AAAA.AAAA.AAAA", api.TokenMalformed},
		{"I07 JSON", `{"payload":"` + part[1] + `","protected":"` + part[0] + `","signature":"` + part[2] + `"}`, api.TokenMalformed},
		{"padding", good + "=", api.TokenMalformed},
		{"standard base64", strings.Replace(good, part[2], "+/"+part[2][2:], 1), api.TokenMalformed},
		{"header is no JSON", "AAAA." + part[1] + "." + part[2], api.TokenMalformed},
		{"quotes", `"` + good + `"`, api.TokenMalformed},
	} {
		t.Run(r.name, func(t *testing.T) {
			got, err := c.attestor.Attest(t.Context(), evidence(r.token), audience, time.Now())
			refused(t, r.token, got, err, r.want)
		})
	}
	t.Run("another kind", func(t *testing.T) {
		got, err := c.attestor.Attest(t.Context(), attestor.Evidence{Kind: "x509", Data: []byte(good)}, audience, time.Now())
		refused(t, good, got, err, api.EvidenceKind)
	})
}

// What an unauthenticated caller sends costs at most 64 KiB, however it is made; or ten times the largest token where it
// names an issuer and a key of ours, for then the JOSE library parses it too.
//
// threat: A21, CVE-2025-30204
func TestMemory(t *testing.T) {
	if raceEnabled {
		t.Skip("allocations cannot be measured under the race detector")
	}
	c := newCluster(t, "ES256")
	good := c.token(t)
	part := strings.Split(good, ".")
	enc := base64.RawURLEncoding.EncodeToString
	sized := func(payload string) string { return part[0] + "." + enc([]byte(payload)) + "." + part[2] }
	const room = 11 << 10
	for _, r := range []struct {
		name, token string
		limit       uint64
	}{
		{"A21 64 MiB", strings.Repeat("A", 64<<20), 1 << 10},
		{"A21 dots", strings.Repeat(".", api.MaxTokenBytes), 1 << 10},
		{"one long string", sized(`{"iss":"` + strings.Repeat("a", room) + `"}`), 64 << 10},
		{"many values", sized(`{"x":[` + strings.Repeat("1,", room/2) + `1]}`), 64 << 10},
		{"many members", sized(`{` + strings.Repeat(`"a":1,`, room/6) + `"b":1}`), 64 << 10},
		{"many lists", sized(`{"x":` + strings.Repeat("[", room/2) + strings.Repeat("]", room/2) + `}`), 64 << 10},
		{"up to the signature", sized(`{"iss":"` + c.Name() + `","x":"` + strings.Repeat("a", room) + `"}`), 10 * api.MaxTokenBytes},
		{"escapes", sized(`{"x":"` + strings.Repeat(`\u0041`, room/6) + `"}`), 64 << 10},
	} {
		t.Run(r.name, func(t *testing.T) {
			e := evidence(r.token)
			const runs = 20
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range runs {
				if _, err := c.attestor.Attest(t.Context(), e, audience, time.Now()); err == nil {
					t.Fatal("accepted")
				}
			}
			runtime.ReadMemStats(&after)
			if got := (after.TotalAlloc - before.TotalAlloc) / runs; got > r.limit {
				t.Errorf("a refusal allocates %d bytes, above %d", got, r.limit)
			}
		})
	}
}

// No change of a good token is accepted, wherever it is made.
//
// threat: A20
func TestMutations(t *testing.T) {
	c := newCluster(t, "ES256")
	good := c.token(t)
	now := time.Now()
	if _, err := c.attestor.Attest(t.Context(), evidence(good), audience, now); err != nil {
		t.Fatal(err)
	}
	n := 0
	try := func(how string, at int, token string) {
		if token == good {
			return
		}
		n++
		got, err := c.attestor.Attest(t.Context(), evidence(token), audience, now)
		if err == nil {
			t.Errorf("%s at %d: accepted", how, at)
		} else if r := api.ReasonOf(err); r == api.Internal || got != (attestor.Claims{}) {
			t.Errorf("%s at %d: %v, %+v", how, at, err, got)
		}
	}
	for i := range len(good) {
		b := good[i]
		try("low bit", i, good[:i]+string(next(b))+good[i+1:])
		try("case", i, good[:i]+string(rune(b^0x20))+good[i+1:])
		try("A", i, good[:i]+"A"+good[i+1:])
		try("left out", i, good[:i]+good[i+1:])
		try("doubled", i, good[:i+1]+good[i:])
		try("cut", i, good[:i])
		try("dot", i, good[:i]+"."+good[i:])
		try("newline", i, good[:i]+"\n"+good[i:])
	}
	part := strings.Split(good, ".")
	for i, p := range [][]int{{0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}, {0, 0, 2}, {1, 1, 2}, {0, 1, 1}, {0, 1, 0}} {
		try("parts moved", i, part[p[0]]+"."+part[p[1]]+"."+part[p[2]])
	}
	other := strings.Split(c.token(t), ".")
	for i := range part {
		mixed := slices.Clone(part)
		mixed[i] = other[i]
		try("part of another token", i, strings.Join(mixed, "."))
	}
	if n < 500 {
		t.Errorf("only %d mutations", n)
	}
	t.Logf("%d mutations refused", n)
}

// next returns the character of the base64url alphabet that follows b: a change of its lowest bits.
func next(b byte) rune {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return rune(alphabet[(strings.IndexByte(alphabet, b)+1)%len(alphabet)])
}

func BenchmarkAttest(b *testing.B) {
	for _, alg := range []string{"ES256", "RS256"} {
		b.Run(alg, func(b *testing.B) {
			c := newCluster(b, alg)
			e, now := evidence(c.token(b)), time.Now()
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.attestor.Attest(b.Context(), e, audience, now); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	// A set of as many keys as there may be costs what one key costs.
	b.Run("ES256 of 64 keys", func(b *testing.B) {
		c := newCluster(b, "ES256")
		for range attestor.MaxKeys - 1 {
			if err := c.Rotate(); err != nil {
				b.Fatal(err)
			}
		}
		c.attestor = newAttestor(b, c.Issuer, attestor.ServiceAccountConfig{})
		e, now := evidence(c.token(b)), time.Now()
		for b.Loop() {
			if _, err := c.attestor.Attest(b.Context(), e, audience, now); err != nil {
				b.Fatal(err)
			}
		}
	})
}
