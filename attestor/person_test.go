package attestor_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
)

// TestAttestPerson takes a token that is bound to nothing and lives a quarter of an hour at most, and only such a one.
func TestAttestPerson(t *testing.T) {
	c := newCluster(t, "ES256")
	iat := time.Now().Truncate(time.Second)
	lives := func(d time.Duration) func(*attestortest.Draft) {
		return func(x *attestortest.Draft) {
			x.Claims["iat"], x.Claims["nbf"], x.Claims["exp"] = iat.Unix(), iat.Unix(), iat.Add(d).Unix()
		}
	}
	ahead := func(d time.Duration) func(*attestortest.Draft) {
		return func(x *attestortest.Draft) {
			x.Claims["iat"], x.Claims["nbf"], x.Claims["exp"] = iat.Add(d).Unix(), iat.Add(d).Unix(), iat.Add(d+10*time.Minute).Unix()
		}
	}
	member := func(name string, value any) func(*attestortest.Draft) {
		return func(x *attestortest.Draft) { x.Kubernetes()[name] = value }
	}
	for _, row := range []struct {
		name   string
		change []func(*attestortest.Draft)
		want   api.Reason // empty: good
	}{
		{"ten minutes", []func(*attestortest.Draft){lives(10 * time.Minute)}, ""},
		{"a quarter of an hour", []func(*attestortest.Draft){lives(api.MaxAdminTTL)}, ""},
		{"a second more", []func(*attestortest.Draft){lives(api.MaxAdminTTL + time.Second)}, api.TokenTTLTooLong},
		{"of a clock that is a minute ahead", []func(*attestortest.Draft){ahead(time.Minute)}, ""},
		{"of a clock that is more than that ahead", []func(*attestortest.Draft){ahead(time.Minute + 2*time.Second)}, api.TokenNotYetValid},
		{"no end", []func(*attestortest.Draft){lives(time.Minute), attestortest.Without("exp")}, api.TokenMalformed},
		{"bound to null", []func(*attestortest.Draft){lives(time.Minute), member("pod", nil)}, api.TokenBound},
		{"bound to an empty pod", []func(*attestortest.Draft){lives(time.Minute), member("pod", map[string]any{})}, api.TokenBound},
		{"that the API server would extend", []func(*attestortest.Draft){lives(time.Minute), member("warnafter", iat.Unix())}, api.TokenBound},
		{"of no ServiceAccount", []func(*attestortest.Draft){lives(time.Minute), member("serviceaccount", nil)}, api.SubjectMalformed},
		{"without claims of Kubernetes", []func(*attestortest.Draft){lives(time.Minute), attestortest.Without("kubernetes.io")}, api.TokenMalformed},
	} {
		t.Run(row.name, func(t *testing.T) {
			token := c.token(t, append([]func(*attestortest.Draft){attestortest.Unbound}, row.change...)...)
			got, err := c.attestor.AttestPerson(t.Context(), evidence(token), audience, iat.Add(time.Second))
			if row.want != "" {
				refused(t, token, got, err, row.want)
				return
			}
			if err != nil || got.ServiceAccount != c.pod.ServiceAccount || got.PodUID != "" || got.NodeUID != "" || got.TokenID == "" {
				t.Errorf("%+v, %v", got, err)
			}
			// It is nothing to whoever wants a pod's.
			got, err = c.attestor.Attest(t.Context(), evidence(token), audience, iat.Add(time.Second))
			refused(t, token, got, err, api.TokenNotPodBound)
		})
	}
	token := c.token(t) // a pod's
	got, err := c.attestor.AttestPerson(t.Context(), evidence(token), audience, time.Now())
	refused(t, token, got, err, api.TokenBound)
	if of, ok := attestor.ClaimedBy(err); !ok || of.PodUID != c.pod.UID || of.NodeUID != c.pod.NodeUID || of.ServiceAccount != c.pod.ServiceAccount || of.TokenID == "" {
		t.Errorf("whose the token of a pod is: %v, %+v", ok, of)
	}
	for name, change := range map[string]func(*attestortest.Draft){"expired": lives(-time.Second), "for another audience": attestortest.Audiences("other")} {
		token := c.token(t, change)
		got, err := c.attestor.AttestPerson(t.Context(), evidence(token), audience, time.Now())
		refused(t, token, got, err, api.TokenBound)
		if of, ok := attestor.ClaimedBy(err); ok {
			t.Errorf("%s: whose it is is told, %+v", name, of)
		}
	}
}

// TestAttestPersonReviewed asks the API server, whose answer may speak of no pod.
func TestAttestPersonReviewed(t *testing.T) {
	for name, row := range map[string]struct {
		change func(*attestor.TokenReview)
		want   api.Reason
	}{
		"yes": {func(*attestor.TokenReview) {}, ""},
		"no":  {func(a *attestor.TokenReview) { a.Authenticated = false }, api.TokenReviewRefused},
		"about another credential": {func(a *attestor.TokenReview) {
			a.Extra["authentication.kubernetes.io/credential-id"] = []string{"JTI=x"}
		}, api.TokenReviewMismatch},
		"about a ServiceAccount":    {func(a *attestor.TokenReview) { a.UID = "another" }, api.TokenReviewMismatch},
		"that speaks of a pod":      {func(a *attestor.TokenReview) { a.Extra["authentication.kubernetes.io/pod-uid"] = []string{"x"} }, api.TokenReviewMismatch},
		"that speaks of a node too": {func(a *attestor.TokenReview) { a.Extra["authentication.kubernetes.io/node-name"] = []string{"x"} }, api.TokenReviewMismatch},
	} {
		t.Run(name, func(t *testing.T) {
			r := &reviewer{}
			c := reviewed(t, r, attestor.ReviewConfig{})
			a := yes(c.pod)
			a.Extra = map[string][]string{"authentication.kubernetes.io/credential-id": {"JTI=" + testJTI}}
			row.change(&a)
			r.answer = says(a, nil)
			token, err := c.Token(c.pod, audience, 10*time.Minute, attestortest.Unbound, attestortest.Claim("jti", testJTI))
			if err != nil {
				t.Fatal(err)
			}
			got, err := c.attestor.AttestPerson(t.Context(), evidence(token), audience, time.Now())
			if row.want != "" {
				refused(t, token, got, err, row.want)
			} else if err != nil || got.TokenID != testJTI {
				t.Errorf("%+v, %v", got, err)
			}
			if n := r.asked.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

// FuzzPerson signs whatever claims it is given with a good key, as FuzzToken does: what is taken is what two other parsers
// read, and is bound to nothing that they could see.
func FuzzPerson(f *testing.F) {
	c := newCluster(f, "EdDSA")
	now := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	text := func(change ...func(*attestortest.Draft)) []byte {
		d := c.Draft(c.pod, audience, ttl)
		attestortest.Unbound(d)
		for name, at := range map[string]time.Time{"iat": now, "nbf": now, "exp": now.Add(10 * time.Minute)} {
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
	f.Add(text())
	f.Add(text(func(d *attestortest.Draft) { d.Kubernetes()["secret"] = map[string]any{"name": "x"} }))
	f.Add(text(func(d *attestortest.Draft) { d.Kubernetes()["Pod"] = "x" }))
	f.Add(text(attestortest.Audiences(audience, "other")))
	f.Add(text(attestortest.Without("kubernetes.io")))
	f.Add([]byte(`{"kubernetes.io":{},` + string(text()[1:])))
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(c.JWKS(), &set); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, claims []byte) {
		d := c.Draft(c.pod, audience, ttl)
		d.RawClaims = append([]byte{}, claims...)
		token, err := d.Compact()
		if err != nil {
			t.Fatal(err)
		}
		got, err := c.attestor.AttestPerson(t.Context(), evidence(token), audience, now)
		if err != nil {
			if r := api.ReasonOf(err); r == api.Internal || got != (attestor.Claims{}) {
				t.Errorf("%v, %+v", err, got)
			}
			return
		}
		agrees(t, set, token, got)
		var raw struct {
			K map[string]any `json:"kubernetes.io"`
		}
		tok, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.EdDSA})
		if err != nil || tok.UnsafeClaimsWithoutVerification(&raw) != nil || len(raw.K) != 2 || got.ExpireAt.Sub(got.IssuedAt) > api.MaxAdminTTL {
			t.Errorf("%v, %v, %+v", err, raw.K, got)
		}
	})
}
