package attestor_test

import (
	"errors"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
)

// TestClaimedBy tells whose token was refused where its signature was good, and of no other.
func TestClaimedBy(t *testing.T) {
	no := &reviewer{answer: says(attestor.TokenReview{}, nil)}
	c := reviewed(t, no, attestor.ReviewConfig{})
	away := &reviewer{answer: says(attestor.TokenReview{}, errors.New("away"))}
	for _, tt := range []struct {
		name   string
		by     *reviewer
		change func(*attestortest.Draft)
		want   api.Reason
		known  bool
	}{
		{"another audience", no, attestortest.Audiences("vault"), api.TokenAudience, true},
		{"two audiences", no, attestortest.Audiences(audience, "vault"), api.TokenAudienceNotExclusive, true},
		{"expired", no, attestortest.Claim("exp", time.Now().Add(-time.Second).Unix()), api.TokenExpired, true},
		{"no times", no, attestortest.Claim("exp", "never"), api.TokenMalformed, true},
		{"no good id", no, attestortest.Claim("jti", "a b"), api.TokenMalformed, true},
		{"not accepted by the API server", no, nil, api.TokenReviewRefused, true},
		{"not reviewed", away, nil, api.ReviewerUnavailable, true},

		{"another issuer", no, attestortest.Claim("iss", "https://evil.test"), api.IssuerUnknown, false},
		{"another key", no, attestortest.Header("kid", "unknown"), api.TokenSignature, false},
		{"no pod", no, func(d *attestortest.Draft) { delete(d.Kubernetes(), "pod") }, api.TokenNotPodBound, false},
		{"no node", no, func(d *attestortest.Draft) { delete(d.Kubernetes(), "node") }, api.NodeUnverifiable, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var change []func(*attestortest.Draft)
			if tt.change != nil {
				change = append(change, attestortest.Claim("iat", time.Now().Add(-2*time.Minute).Unix()), attestortest.Claim("nbf", time.Now().Add(-2*time.Minute).Unix()), tt.change)
			}
			a := newAttestor(t, c.Issuer, attestor.ServiceAccountConfig{Reviews: map[string]attestor.ReviewConfig{c.Name(): {Reviewer: tt.by}}})
			token := c.token(t, change...)
			claims, err := a.Attest(t.Context(), evidence(token), audience, time.Now())
			refused(t, token, claims, err, tt.want)
			got, known := attestor.ClaimedBy(err)
			p := c.pod
			want := attestor.Claimed{Issuer: c.Name(), Namespace: p.Namespace, ServiceAccount: p.ServiceAccount, ServiceAccountUID: p.ServiceAccountUID,
				PodName: p.Name, PodUID: p.UID, NodeName: p.NodeName, NodeUID: p.NodeUID, TokenID: got.TokenID}
			if !tt.known {
				want = attestor.Claimed{}
			}
			if known != tt.known || got != want || tt.known && (got.TokenID == "") != (tt.name == "no good id") {
				t.Errorf("told: %+v, %v", got, known)
			}
		})
	}
}

// saysAlike checks that what Attest believed is what the evidence had said before it was checked.
func saysAlike(t *testing.T, said attestor.Claimed, end time.Time, err error, c attestor.Claims) {
	t.Helper()
	want := attestor.Claimed{Issuer: c.Issuer, Namespace: c.Namespace, ServiceAccount: c.ServiceAccount, ServiceAccountUID: c.ServiceAccountUID,
		PodName: c.PodName, PodUID: c.PodUID, NodeName: c.NodeName, NodeUID: c.NodeUID, TokenID: c.TokenID}
	if err != nil || said != want || !end.Equal(c.ExpireAt) {
		t.Errorf("unchecked: %+v until %s, %v; checked: %+v until %s", said, end, err, want, c.ExpireAt)
	}
}

// TestUnchecked reads what nobody has checked: a signature and a time may be anything, and the rest is as Attest wants it.
func TestUnchecked(t *testing.T) {
	c := newCluster(t, "ES256")
	token := c.token(t)
	claims, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	said, end, err := attestor.Unchecked(evidence(token), audience)
	saysAlike(t, said, end, err, claims)
	for _, tt := range []struct {
		name   string
		change func(*attestortest.Draft)
		want   api.Reason
	}{
		{"another issuer", attestortest.Claim("iss", "https://evil.test"), ""},
		{"another key", attestortest.Header("kid", "unknown"), ""},
		{"expired", attestortest.Claim("exp", int64(1)), ""},
		{"no issuer", attestortest.Without("iss"), api.TokenMalformed},
		{"no end", attestortest.Without("exp"), api.TokenMalformed},
		{"no good id", attestortest.Claim("jti", "a b"), api.TokenMalformed},
		{"another audience", attestortest.Audiences("vault"), api.TokenAudience},
		{"no pod", func(d *attestortest.Draft) { delete(d.Kubernetes(), "pod") }, api.TokenNotPodBound},
		{"no node", func(d *attestortest.Draft) { delete(d.Kubernetes(), "node") }, api.NodeUnverifiable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			token := c.token(t, tt.change)
			said, _, err := attestor.Unchecked(evidence(token), audience)
			if (err == nil) != (tt.want == "") || err != nil && api.ReasonOf(err) != tt.want {
				t.Fatalf("error %v, want %q", err, tt.want)
			}
			if err == nil && said.PodUID != c.pod.UID || err != nil && said != (attestor.Claimed{}) {
				t.Errorf("it says %+v", said)
			}
		})
	}
	if _, _, err := attestor.Unchecked(attestor.Evidence{Kind: "x", Data: []byte(token)}, audience); api.ReasonOf(err) != api.EvidenceKind {
		t.Errorf("another kind: %v", err)
	}
}
