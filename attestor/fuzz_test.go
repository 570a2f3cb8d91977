package attestor_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
)

// plain is how an ordinary program reads the claims: by encoding/json, which takes the last of two members and ignores
// case. It must not be able to see anything else in a token than what was attested.
type plain struct {
	Iss string           `json:"iss"`
	Sub string           `json:"sub"`
	Aud jwt.Audience     `json:"aud"`
	Exp *jwt.NumericDate `json:"exp"`
	Iat *jwt.NumericDate `json:"iat"`
	Jti string           `json:"jti"`
	K   struct {
		Namespace string `json:"namespace"`
		SA        named  `json:"serviceaccount"`
		Pod       named  `json:"pod"`
		Node      named  `json:"node"`
	} `json:"kubernetes.io"`
}

type named struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// agrees fails unless two other parsers and another verifier see in token what was attested.
func agrees(t *testing.T, set jose.JSONWebKeySet, token string, got attestor.Claims) {
	t.Helper()
	tok, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		t.Fatalf("another parser refuses it: %v", err)
	}
	var strict, usual plain
	if err := tok.Claims(set, &strict); err != nil {
		t.Fatalf("another verifier refuses it: %v", err)
	}
	var raw map[string]json.RawMessage
	if err := tok.UnsafeClaimsWithoutVerification(&raw); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(raw)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &usual); err != nil {
		t.Fatalf("the usual parser refuses it: %v", err)
	}
	for _, p := range []plain{strict, usual} {
		want := attestor.Claims{
			Kind: api.EvidenceServiceAccount, Issuer: p.Iss,
			Namespace: p.K.Namespace, ServiceAccount: p.K.SA.Name, ServiceAccountUID: p.K.SA.UID,
			PodName: p.K.Pod.Name, PodUID: p.K.Pod.UID, NodeName: p.K.Node.Name, NodeUID: p.K.Node.UID,
			TokenID: p.Jti, IssuedAt: p.Iat.Time().UTC(), ExpireAt: p.Exp.Time().UTC(),
		}
		if _, ok := raw["jti"]; !ok {
			want.TokenID = got.TokenID
		}
		if got != want || p.Sub != "system:serviceaccount:"+got.Namespace+":"+got.ServiceAccount || len(p.Aud) != 1 || p.Aud[0] != audience {
			t.Errorf("attested %+v\nthey see %+v", got, p)
		}
	}
}

// FuzzToken signs whatever header and claims it is given with a good key. Each worker has a key of its own: KID in a header
// stands for it. Its signatures are deterministic, or the fuzzer would take each for news.
//
// threat: A20
func FuzzToken(f *testing.F) {
	c := newCluster(f, "EdDSA")
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	text := func(change ...func(*attestortest.Draft)) []byte {
		d := c.Draft(c.pod, audience, ttl)
		for name, at := range map[string]time.Time{"iat": now, "nbf": now, "exp": now.Add(ttl)} {
			d.Claims[name] = at.Unix()
		}
		for _, ch := range change {
			ch(d)
		}
		b, err := json.Marshal(d.Claims)
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	header := []byte(`{"alg":"EdDSA","kid":"KID"}`)
	f.Add(header, text())
	f.Add(header, text(attestortest.Claim("aud", audience), attestortest.Without("nbf", "jti")))
	f.Add(header, text(attestortest.Audiences(audience, "other")))
	f.Add(header, []byte(`{"sub":"a",`+string(text()[1:])))
	f.Add(header, []byte(strings.Replace(string(text()), `"pod":{`, `"pod":{"Name":"x",`, 1)))
	f.Add([]byte(`{"typ":"JWT",`+string(header[1:])), text())
	f.Add([]byte(`{"alg":"none"}`), []byte(`{}`))
	f.Add([]byte(`{"ALG":"EdDSA",`+string(header[1:])), []byte(`null`))
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(c.JWKS(), &set); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, header, claims []byte) {
		d := c.Draft(c.pod, audience, ttl)
		d.RawHeader = append([]byte{}, bytes.Replace(header, []byte("KID"), []byte(c.KeyID()), 1)...) // never nil
		d.RawClaims = append([]byte{}, claims...)
		token, err := d.Compact()
		if err != nil {
			t.Fatal(err)
		}
		said, end, serr := attestor.Unchecked(evidence(token), audience)
		if serr != nil && (api.ReasonOf(serr) == api.Internal || said != (attestor.Claimed{}) || !end.IsZero()) {
			t.Errorf("unchecked: %v, %+v, %s", serr, said, end)
		}
		got, err := c.attestor.Attest(t.Context(), evidence(token), audience, now)
		if err != nil {
			if r := api.ReasonOf(err); r == api.Internal || got != (attestor.Claims{}) {
				t.Errorf("%v, %+v", err, got)
			}
			return
		}
		agrees(t, set, token, got)
		saysAlike(t, said, end, serr, got)
	})
}

// FuzzCompact changes the text of a good token in one place. Nothing but the token itself is accepted.
func FuzzCompact(f *testing.F) {
	c := newCluster(f, "ES256")
	now := time.Now()
	good := c.token(f)
	dot := strings.IndexByte(good, '.')
	f.Add(0, 0, []byte("Bearer "))
	f.Add(0, len(good), []byte("e30.e30.e30"))
	f.Add(0, len(good), []byte(`{"payload":"e30","protected":"e30","signature":"e30"}`))
	f.Add(0, dot, []byte("eyJhbGciOiJub25lIn0"))
	f.Add(dot, 1, []byte(".."))
	f.Add(len(good)-1, 1, []byte("A"))
	f.Add(len(good), 0, []byte("\n"))
	f.Add(len(good), 0, []byte(" "+good))
	f.Add(strings.LastIndexByte(good, '.')+1, len(good), []byte{})
	f.Fuzz(func(t *testing.T, at, cut int, insert []byte) {
		at = min(max(at, 0), len(good))
		cut = min(max(cut, 0), len(good)-at)
		token := good[:at] + string(insert) + good[at+cut:]
		got, err := c.attestor.Attest(t.Context(), evidence(token), audience, now)
		switch {
		case err != nil && (api.ReasonOf(err) == api.Internal || got != (attestor.Claims{})):
			t.Errorf("%v, %+v", err, got)
		case (err == nil) != (token == good):
			t.Errorf("%q: %v, %+v", token, err, got)
		}
		e, err := attestor.FromMetadata([]string{token})
		if err == nil && (len(e.Data) == 0 || len(e.Data) > api.MaxTokenBytes || strings.ContainsAny(string(e.Data), " \t\r\n\x00,")) {
			t.Errorf("metadata passed: %q", e.Data)
		}
	})
}

// FuzzJWKS parses any key set: what is kept is public, of the allowed kinds, and stable.
func FuzzJWKS(f *testing.F) {
	for _, alg := range []string{"ES256", "ES384", "ES512", "RS256", "EdDSA"} {
		f.Add(jwks(f, jwkOf(f, alg)))
	}
	f.Add(jwks(f, jwkOf(f, "ES256", with("kid", "a")), jwkOf(f, "ES256", with("kid", "a")), jwkOf(f, "EdDSA")))
	f.Add(jwks(f, jwkOf(f, "ES256"), map[string]any{"kty": "oct", "kid": "o", "k": "AAAA"}))
	f.Add(jwks(f, rsaOf(2048), rsaOf(1024), nil, "x"))
	f.Add([]byte(`{"keys":[]}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		set, err := attestor.ParseKeySet(data)
		if err != nil {
			return
		}
		if set.Len() < 1 || set.Len() > attestor.MaxKeys {
			t.Errorf("%d keys", set.Len())
		}
		stable(t, set)
	})
}
