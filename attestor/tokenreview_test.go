package attestor_test

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
)

// reviewer is an API server that says what a test makes it say, and counts how often it was asked.
type reviewer struct {
	asked  atomic.Int64
	answer func(ctx context.Context, token []byte, audience string) (attestor.TokenReview, error)
}

func (r *reviewer) ReviewToken(ctx context.Context, token []byte, audience string) (attestor.TokenReview, error) {
	r.asked.Add(1)
	return r.answer(ctx, token, audience)
}

// yes is what Kubernetes 1.37 answers about a good token of p.
func yes(p attestortest.Pod) attestor.TokenReview {
	return attestor.TokenReview{
		Authenticated: true,
		Audiences:     []string{audience},
		Username:      "system:serviceaccount:" + p.Namespace + ":" + p.ServiceAccount,
		UID:           p.ServiceAccountUID,
		Groups:        []string{"system:serviceaccounts", "system:serviceaccounts:" + p.Namespace, "system:authenticated"},
		Extra: map[string][]string{
			"authentication.kubernetes.io/pod-name":      {p.Name},
			"authentication.kubernetes.io/pod-uid":       {p.UID},
			"authentication.kubernetes.io/node-name":     {p.NodeName},
			"authentication.kubernetes.io/node-uid":      {p.NodeUID},
			"authentication.kubernetes.io/credential-id": {"JTI=" + testJTI},
		},
	}
}

const testJTI = "0b9d1f9e-4c1f-4a63-9d55-9f2f3f3c8d11"

// reviewed is a cluster whose tokens are reviewed by r.
func reviewed(t testing.TB, r *reviewer, cfg attestor.ReviewConfig) cluster {
	t.Helper()
	c := newCluster(t, "EdDSA")
	cfg.Reviewer = r
	c.attestor = newAttestor(t, c.Issuer, attestor.ServiceAccountConfig{Reviews: map[string]attestor.ReviewConfig{c.Name(): cfg}})
	return c
}

func says(a attestor.TokenReview, err error) func(context.Context, []byte, string) (attestor.TokenReview, error) {
	return func(context.Context, []byte, string) (attestor.TokenReview, error) { return a, err }
}

func TestReviewAccepts(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*attestor.TokenReview)
	}{
		{"as Kubernetes 1.37 answers", func(*attestor.TokenReview) {}},
		{"as Kubernetes 1.29 answers", func(a *attestor.TokenReview) {
			for _, k := range []string{"node-name", "node-uid", "credential-id"} {
				delete(a.Extra, "authentication.kubernetes.io/"+k)
			}
		}},
		{"with extra that is not ours to know", func(a *attestor.TokenReview) { a.Extra["example.org/team"] = []string{"a", "b"} }},
		{"without extra", func(a *attestor.TokenReview) { a.Extra = nil }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &reviewer{}
			c := reviewed(t, r, attestor.ReviewConfig{})
			token := c.token(t, attestortest.Claim("jti", testJTI))
			r.answer = func(ctx context.Context, sent []byte, aud string) (attestor.TokenReview, error) {
				if string(sent) != token || aud != audience {
					t.Errorf("asked about another token or audience: %q", aud)
				}
				if d, ok := ctx.Deadline(); !ok || time.Until(d) > attestor.DefaultReviewTimeout {
					t.Errorf("asked until %v", d)
				}
				a := yes(c.pod)
				tc.change(&a)
				return a, nil
			}
			got, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
			if err != nil || got.PodUID != c.pod.UID || got.NodeUID != c.pod.NodeUID || got.TokenID != testJTI {
				t.Errorf("got %+v, %v", got, err)
			}
			if n := r.asked.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

// Every answer but a plain yes about this very token is a refusal, after exactly one question.
func TestReviewRefuses(t *testing.T) {
	const kube = "authentication.kubernetes.io/"
	set := func(key string, values ...string) func(*attestor.TokenReview) {
		return func(a *attestor.TokenReview) { a.Extra[kube+key] = values }
	}
	other := attestortest.NewPod("shop", "cart-7d9f-other", "cart", "node-2.example")
	for _, tc := range []struct {
		name   string
		change func(*attestor.TokenReview)
		want   api.Reason
	}{
		{"no", func(a *attestor.TokenReview) { *a = attestor.TokenReview{} }, api.TokenReviewRefused},
		{"no, and a user", func(a *attestor.TokenReview) { a.Authenticated = false }, api.TokenReviewRefused},
		{"no, and why", func(a *attestor.TokenReview) { a.Authenticated, a.Error = false, "service account has been deleted" }, api.TokenReviewRefused},
		{"yes, and an error", func(a *attestor.TokenReview) { a.Error = "could not check" }, api.TokenReviewRefused},

		// threat: A03
		{"no audiences", func(a *attestor.TokenReview) { a.Audiences = nil }, api.ReviewerNotAudienceAware},
		{"empty audiences", func(a *attestor.TokenReview) { a.Audiences = []string{} }, api.ReviewerNotAudienceAware},
		{"an empty audience", func(a *attestor.TokenReview) { a.Audiences = []string{""} }, api.ReviewerNotAudienceAware},
		// threat: A01
		{"the API server's own audience", func(a *attestor.TokenReview) { a.Audiences = []string{"https://kubernetes.default.svc"} }, api.ReviewerNotAudienceAware},
		{"our audience beside another", func(a *attestor.TokenReview) { a.Audiences = []string{audience, "other"} }, api.ReviewerNotAudienceAware},
		{"our audience twice", func(a *attestor.TokenReview) { a.Audiences = []string{audience, audience} }, api.ReviewerNotAudienceAware},
		{"our audience in capitals", func(a *attestor.TokenReview) { a.Audiences = []string{strings.ToUpper(audience)} }, api.ReviewerNotAudienceAware},

		// threat: A19
		{"no groups", func(a *attestor.TokenReview) { a.Groups = nil }, api.NotAServiceAccount},
		{"an OIDC user named like a ServiceAccount", func(a *attestor.TokenReview) { a.Groups, a.Extra = []string{"system:authenticated"}, nil }, api.NotAServiceAccount},
		{"only the namespace's group", func(a *attestor.TokenReview) { a.Groups = a.Groups[1:] }, api.NotAServiceAccount},

		{"another ServiceAccount", func(a *attestor.TokenReview) { a.Username = "system:serviceaccount:shop:till" }, api.TokenReviewMismatch},
		{"another namespace", func(a *attestor.TokenReview) { a.Username = "system:serviceaccount:bank:cart" }, api.TokenReviewMismatch},
		{"a person", func(a *attestor.TokenReview) { a.Username = "cart" }, api.TokenReviewMismatch},
		{"nobody", func(a *attestor.TokenReview) { a.Username = "" }, api.TokenReviewMismatch},
		{"a longer name", func(a *attestor.TokenReview) { a.Username += ":x" }, api.TokenReviewMismatch},
		{"the ServiceAccount of another time", func(a *attestor.TokenReview) { a.UID = other.UID }, api.TokenReviewMismatch},
		{"no UID", func(a *attestor.TokenReview) { a.UID = "" }, api.TokenReviewMismatch},
		{"another pod", set("pod-name", other.Name), api.TokenReviewMismatch},
		{"the pod of another time", set("pod-uid", other.UID), api.TokenReviewMismatch},
		{"another node", set("node-name", other.NodeName), api.TokenReviewMismatch},
		{"the node of another time", set("node-uid", other.NodeUID), api.TokenReviewMismatch},
		{"another token of the same pod", set("credential-id", "JTI="+other.UID), api.TokenReviewMismatch},
		{"a credential that is no token", set("credential-id", "X509SHA256=00"), api.TokenReviewMismatch},
		{"two pods", set("pod-uid", other.UID, other.UID), api.TokenReviewMismatch},
		{"a pod without a value", set("pod-uid"), api.TokenReviewMismatch},
		{"a pod with an empty value", set("pod-uid", ""), api.TokenReviewMismatch},
		{"another pod's whole answer", func(a *attestor.TokenReview) { *a = yes(other) }, api.TokenReviewMismatch},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &reviewer{}
			c := reviewed(t, r, attestor.ReviewConfig{})
			other.ServiceAccountUID = c.pod.ServiceAccountUID
			a := yes(c.pod)
			tc.change(&a)
			r.answer = says(a, nil)
			token := c.token(t, attestortest.Claim("jti", testJTI))
			got, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
			refused(t, token, got, err, tc.want)
			if n := r.asked.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

// A token without a jti has no credential id, so an answer that has one is about another.
func TestReviewWithoutTokenID(t *testing.T) {
	r := &reviewer{}
	c := reviewed(t, r, attestor.ReviewConfig{})
	r.answer = says(yes(c.pod), nil)
	token := c.token(t, attestortest.Without("jti"))
	got, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
	refused(t, token, got, err, api.TokenReviewMismatch)
}

// What the token itself gives away never reaches the API server.
//
// threat: A01, A02, A04, A13, A16
func TestReviewSparesTheServer(t *testing.T) {
	r := &reviewer{}
	c := reviewed(t, r, attestor.ReviewConfig{})
	r.answer = says(yes(c.pod), nil)
	ago := func(d time.Duration) func(*attestortest.Draft) {
		return func(x *attestortest.Draft) {
			x.Claims["exp"] = time.Now().Add(-d).Unix()
			for _, k := range []string{"iat", "nbf"} {
				x.Claims[k] = time.Now().Add(-d - ttl).Unix()
			}
		}
	}
	kubernetes := func(change func(map[string]any)) func(*attestortest.Draft) {
		return func(d *attestortest.Draft) { change(d.Kubernetes()) }
	}
	for _, tc := range []struct {
		name  string
		token string
		want  api.Reason
	}{
		{"nothing", "", api.TokenMissing},
		{"noise", "not.a.token", api.TokenMalformed},
		{"too large", strings.Repeat("a", api.MaxTokenBytes+1), api.TokenTooLarge},
		{"two", "a.b.c,d.e.f", api.TokenAmbiguous},
		{"of another key", newCluster(t, "EdDSA").token(t), api.TokenSignature},
		{"of another issuer", c.token(t, attestortest.Claim("iss", "https://elsewhere.example")), api.IssuerUnknown},
		{"for the API server", c.token(t, attestortest.Audiences("https://kubernetes.default.svc")), api.TokenAudience},
		{"for us and the API server", c.token(t, attestortest.Audiences(audience, "https://kubernetes.default.svc")), api.TokenAudienceNotExclusive},
		{"for nobody", c.token(t, attestortest.Without("aud")), api.TokenAudience},
		{"expired a second ago", c.token(t, ago(time.Second)), api.TokenExpired},
		{"expired within the API server's leeway", c.token(t, ago(59*time.Second)), api.TokenExpired},
		{"expired beyond the API server's leeway", c.token(t, ago(61*time.Second)), api.TokenExpired},
		{"from the future", c.token(t, attestortest.Claim("nbf", time.Now().Add(time.Minute).Unix())), api.TokenNotYetValid},
		{"of a year", c.token(t, attestortest.Claim("exp", time.Now().AddDate(1, 0, 0).Unix())), api.TokenTTLTooLong},
		{"bound to nothing", c.token(t, kubernetes(func(k map[string]any) { delete(k, "pod"); delete(k, "node") })), api.TokenNotPodBound},
		{"bound to a Secret", c.token(t, kubernetes(func(k map[string]any) { k["secret"] = k["pod"]; delete(k, "pod") })), api.TokenNotPodBound},
		{"of old, from a Secret", c.token(t, attestortest.Without("kubernetes.io"), attestortest.Claim("kubernetes.io/serviceaccount/namespace", "shop")), api.TokenNotPodBound},
		{"without a node", c.token(t, kubernetes(func(k map[string]any) { delete(k, "node") })), api.NodeUnverifiable},
		{"of another subject", c.token(t, attestortest.Claim("sub", "system:serviceaccount:bank:cart")), api.SubjectMalformed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := c.attestor.Attest(t.Context(), evidence(tc.token), audience, time.Now())
			refused(t, tc.token, got, err, tc.want)
			if n := r.asked.Swap(0); n != 0 {
				t.Errorf("the API server was asked %d times", n)
			}
		})
	}
}

// What the caller has no use for is refused before the API server is asked, and the refusal tells whose it was.
func TestReviewSparedByCaller(t *testing.T) {
	r := &reviewer{}
	c := reviewed(t, r, attestor.ReviewConfig{})
	r.answer = says(yes(c.pod), nil)
	for _, no := range []error{nil, api.E(api.NotAnAgent, "not this one")} {
		var seen []attestor.Claims
		ctx := attestor.WithRefusal(t.Context(), func(c attestor.Claims) error {
			seen = append(seen, c)
			return no
		})
		got, err := c.attestor.Attest(ctx, evidence(c.token(t, attestortest.Claim("jti", testJTI))), audience, time.Now())
		claimed, _ := attestor.ClaimedBy(err)
		if n := r.asked.Swap(0); len(seen) != 1 || seen[0].PodUID != c.pod.UID || (n == 0) != (no != nil) || (err == nil) != (no == nil) || (got.PodUID == "") != (no != nil) {
			t.Errorf("refused with %v: %v, %v after %d questions", no, got, err, n)
		} else if no != nil && (claimed.PodUID != c.pod.UID || api.AsError(err).Reason != api.NotAnAgent) {
			t.Errorf("%v of %v", err, claimed)
		}
	}
}

type later struct {
	error
	after time.Duration
}

func (l later) RetryAfter() time.Duration { return l.after }

// Without an answer there is no identity, whatever the token's signature says.
//
// threat: G01, G02
func TestReviewUnavailable(t *testing.T) {
	for _, tc := range []struct {
		name  string
		err   error
		delay time.Duration
	}{
		{"refused", errors.New("connection refused"), time.Second},
		{"busy", later{errors.New("too many requests"), 7 * time.Second}, 7 * time.Second},
		{"busy for ever", later{errors.New("too many requests"), time.Hour}, time.Minute},
		{"busy for a moment", later{errors.New("too many requests"), time.Nanosecond}, time.Second},
		{"a yes with an error", nil, time.Second},
		{"somebody else's deadline", context.DeadlineExceeded, time.Second},
		{"somebody else's end", context.Canceled, time.Second},
		{"a reason that is not the reviewer's to give", api.E(api.PodDeleted, "gone"), time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &reviewer{}
			c := reviewed(t, r, attestor.ReviewConfig{})
			r.answer = says(attestor.TokenReview{}, tc.err)
			if tc.err == nil {
				r.answer = says(yes(c.pod), errors.New("broke off"))
			}
			token := c.token(t)
			got, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
			refused(t, token, got, err, api.ReviewerUnavailable)
			if d := api.AsError(err).RetryAfter; d != tc.delay {
				t.Errorf("retry after %v, want %v", d, tc.delay)
			}
			if n := r.asked.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

// A server's words are for our log: bounded, escaped, and without the token. The caller sees none of them.
func TestReviewForeignWords(t *testing.T) {
	for _, tc := range []struct {
		name   string
		words  func(token string) string
		logged string
	}{
		{"plain", func(string) string { return "pod is gone" }, `review refused: "pod is gone"`},
		{"none", func(string) string { return "" }, "review refused, and not why"},
		{"control characters", func(string) string { return "a\nlevel=INFO\x1b[31m\u202e" }, `review refused: "a\nlevel=INFO\x1b[31m\u202e"`},
		{"long", func(string) string { return strings.Repeat("é", 1<<20) }, ""},
		{"the token", func(token string) string { return "bad token " + token }, "review refused, in words that quote the token"},
		{"a part of its claims", func(token string) string { return "bad: " + token[100:130] }, "review refused, in words that quote the token"},
		{"its end", func(token string) string { return token[len(token)-20:] }, "review refused, in words that quote the token"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := &reviewer{}
			c := reviewed(t, r, attestor.ReviewConfig{})
			token := c.token(t)
			words := tc.words(token)
			for want, answer := range map[api.Reason]func(context.Context, []byte, string) (attestor.TokenReview, error){
				api.TokenReviewRefused:  says(attestor.TokenReview{Error: words}, nil),
				api.ReviewerUnavailable: says(attestor.TokenReview{}, errors.New(words)),
			} {
				r.answer = answer
				got, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
				refused(t, token, got, err, want)
				e := api.AsError(err)
				if words != "" && strings.Contains(e.Detail, words) {
					t.Errorf("the caller sees %q", e.Detail)
				}
				cause := strings.Replace(e.Err.Error(), "no review", "review refused", 1)
				if len(cause) > 2048 || tc.logged != "" && cause != tc.logged {
					t.Errorf("logged %q, want %q", cause, tc.logged)
				}
				for _, b := range []byte(cause) {
					if b < ' ' || b > '~' {
						t.Fatalf("logged %q holds byte %#x", cause, b)
					}
				}
				for _, part := range secrets(token) {
					if strings.Contains(cause, part) {
						t.Errorf("logged %q holds %q of the token", cause, part)
					}
				}
			}
		})
	}
}

// A server that never answers costs its deadline and nothing more.
func TestReviewDeadline(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := &reviewer{answer: func(ctx context.Context, _ []byte, _ string) (attestor.TokenReview, error) {
			<-ctx.Done()
			return attestor.TokenReview{}, ctx.Err()
		}}
		for _, tc := range []struct{ timeout, want time.Duration }{{0, attestor.DefaultReviewTimeout}, {700 * time.Millisecond, 700 * time.Millisecond}} {
			c := reviewed(t, r, attestor.ReviewConfig{Timeout: tc.timeout})
			start, token := time.Now(), c.token(t)
			got, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
			refused(t, token, got, err, api.ReviewerUnavailable)
			if d := time.Since(start); d != tc.want {
				t.Errorf("it took %v, want %v", d, tc.want)
			}
		}
		// A caller who waits for less is told that it is he who did not wait.
		c := reviewed(t, r, attestor.ReviewConfig{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := c.attestor.Attest(ctx, evidence(c.token(t)), audience, time.Now())
		if api.ReasonOf(err) != api.DeadlineExceeded {
			t.Errorf("got %v", err)
		}
	})
}

// The API server has a leeway of a minute; a token that expires while it thinks is expired.
//
// threat: A04
func TestReviewOutlivesToken(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := &reviewer{}
		c := reviewed(t, r, attestor.ReviewConfig{})
		r.answer = func(context.Context, []byte, string) (attestor.TokenReview, error) {
			time.Sleep(2 * time.Second)
			return yes(c.pod), nil
		}
		for left, want := range map[time.Duration]bool{2 * time.Second: false, 3 * time.Second: true} {
			token := c.token(t, attestortest.Claim("exp", time.Now().Add(left).Unix()), attestortest.Claim("jti", testJTI))
			got, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
			if want && err != nil {
				t.Errorf("with %v left: %v", left, err)
			} else if !want {
				refused(t, token, got, err, api.TokenExpired)
			}
		}
	})
}

// A flood of good tokens is sent away at the door, and the slots are free again afterwards.
func TestReviewInFlight(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		const most, callers = 4, 100
		r := &reviewer{}
		c := reviewed(t, r, attestor.ReviewConfig{InFlight: most})
		release := make(chan struct{})
		r.answer = func(context.Context, []byte, string) (attestor.TokenReview, error) {
			<-release
			return yes(c.pod), nil
		}
		token := c.token(t, attestortest.Claim("jti", testJTI))
		results := make(chan error, callers)
		attest := func() {
			_, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
			results <- err
		}
		for range callers {
			go attest()
		}
		synctest.Wait()
		if n := r.asked.Load(); n != most {
			t.Errorf("asked %d times at once, want %d", n, most)
		}
		for range callers - most {
			err := <-results
			if e := api.AsError(err); e.Reason != api.ReviewerOverloaded || e.Reason.Kind() != api.KindUnavailable || e.RetryAfter <= 0 {
				t.Fatalf("got %v", err)
			}
		}
		close(release)
		for range most {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		if attest(); <-results != nil {
			t.Error("a slot is not free again")
		}
	})
}

// Each issuer has its own API server; one without a review is believed by its keys.
//
// threat: A24
func TestReviewPerIssuer(t *testing.T) {
	r := &reviewer{}
	one, two := newCluster(t, "EdDSA"), cluster{}
	iss, err := attestortest.NewIssuer(attestortest.Config{Issuer: "https://two.example", Algorithm: "EdDSA"})
	if err != nil {
		t.Fatal(err)
	}
	two.Issuer, two.pod = iss, one.pod
	keys := map[string]attestor.Keys{}
	for _, c := range []cluster{one, two} {
		if keys[c.Name()], err = attestor.StaticKeys(c.JWKS()); err != nil {
			t.Fatal(err)
		}
	}
	a, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: keys, Reviews: map[string]attestor.ReviewConfig{one.Name(): {Reviewer: r}}})
	if err != nil {
		t.Fatal(err)
	}
	r.answer = says(attestor.TokenReview{}, nil)
	if _, err := a.Attest(t.Context(), evidence(two.token(t)), audience, time.Now()); err != nil || r.asked.Load() != 0 {
		t.Errorf("a token of another cluster: %v, asked %d times", err, r.asked.Load())
	}
	if _, err := a.Attest(t.Context(), evidence(one.token(t)), audience, time.Now()); api.ReasonOf(err) != api.TokenReviewRefused {
		t.Errorf("got %v", err)
	}
	// The grace for times without an API server asks none.
	r.asked.Store(0)
	if _, err := a.AttestExpired(t.Context(), evidence(one.token(t)), audience, time.Now(), time.Hour); err != nil || r.asked.Load() != 0 {
		t.Errorf("in the grace: %v, asked %d times", err, r.asked.Load())
	}
}

func TestReviewConfig(t *testing.T) {
	c := newCluster(t, "EdDSA")
	keys, err := attestor.StaticKeys(c.JWKS())
	if err != nil {
		t.Fatal(err)
	}
	r := &reviewer{}
	for _, tc := range []struct {
		name, issuer string
		cfg          attestor.ReviewConfig
	}{
		{"no reviewer", c.Name(), attestor.ReviewConfig{}},
		{"an issuer without keys", "https://elsewhere.example", attestor.ReviewConfig{Reviewer: r}},
		{"a negative timeout", c.Name(), attestor.ReviewConfig{Reviewer: r, Timeout: -1}},
		{"a long timeout", c.Name(), attestor.ReviewConfig{Reviewer: r, Timeout: attestor.MaxReviewTimeout + 1}},
		{"negative slots", c.Name(), attestor.ReviewConfig{Reviewer: r, InFlight: -1}},
		{"too many slots", c.Name(), attestor.ReviewConfig{Reviewer: r, InFlight: attestor.MaxReviewInFlight + 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{
				Issuers: map[string]attestor.Keys{c.Name(): keys},
				Reviews: map[string]attestor.ReviewConfig{tc.issuer: tc.cfg},
			})
			if api.ReasonOf(err) != api.ConfigInvalid {
				t.Errorf("got %v", err)
			}
		})
	}
}

// FuzzReview lets the API server say anything. Only an answer that says of every fact what the token says is a yes.
func FuzzReview(f *testing.F) {
	r := &reviewer{}
	c := reviewed(f, r, attestor.ReviewConfig{})
	c.pod.UID = "7a1d7a35-6d2a-4a28-8d7e-0f2a53f1a001"
	token := c.token(f, attestortest.Claim("jti", testJTI), attestortest.Claim("exp", time.Now().Add(23*time.Hour).Unix()))
	good := yes(c.pod)
	seed := func(change func(*attestor.TokenReview)) {
		a := good
		a.Extra = maps.Clone(good.Extra)
		change(&a)
		data, err := json.Marshal(a)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	seed(func(*attestor.TokenReview) {})
	seed(func(a *attestor.TokenReview) { a.Extra = nil })
	seed(func(a *attestor.TokenReview) { a.Audiences = append(a.Audiences, "x") })
	seed(func(a *attestor.TokenReview) { a.Error = "x" })
	seed(func(a *attestor.TokenReview) { a.Groups = nil })
	f.Fuzz(func(t *testing.T, data []byte) {
		var a attestor.TokenReview
		if json.Unmarshal(data, &a) != nil {
			return
		}
		r.answer = says(a, nil)
		got, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
		sound := a.Authenticated && a.Error == "" && slices.Equal(a.Audiences, good.Audiences) && a.Username == good.Username &&
			a.UID == good.UID && slices.Contains(a.Groups, "system:serviceaccounts")
		for k, v := range good.Extra {
			if w, ok := a.Extra[k]; ok && !slices.Equal(v, w) {
				sound = false
			}
		}
		if sound != (err == nil) {
			t.Errorf("sound is %v, got %v", sound, err)
		}
		if err == nil {
			return
		}
		switch reason := api.ReasonOf(err); reason {
		case api.TokenReviewRefused, api.ReviewerNotAudienceAware, api.NotAServiceAccount, api.TokenReviewMismatch:
			refused(t, token, got, err, reason)
		default:
			t.Errorf("reason %s", reason)
		}
	})
}
