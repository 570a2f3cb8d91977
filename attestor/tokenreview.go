package attestor

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/signet-ca/signet/api"
)

// Defaults and limits of ReviewConfig.
const (
	DefaultReviewTimeout  = 5 * time.Second
	MaxReviewTimeout      = 30 * time.Second
	DefaultReviewInFlight = 64
	MaxReviewInFlight     = 4096
)

// TokenReviewer asks the API server of one cluster about a token: Kubernetes' TokenReview. It is safe for concurrent use.
type TokenReviewer interface {
	// ReviewToken asks whether token is good at this moment for exactly this audience, once, until ctx ends at the latest.
	// The token is secret: it is sent to the API server and nowhere else. The answer is returned as it came; it is for
	// the caller to judge. Whatever is no answer is an error, and its text is taken for foreign. An error may have a
	// method RetryAfter() time.Duration, if the API server said when to come back.
	ReviewToken(ctx context.Context, token []byte, audience string) (TokenReview, error)
}

// TokenReview is the status of a TokenReview, as the API server wrote it (authentication.k8s.io/v1, TokenReviewStatus).
// Nothing in it is believed.
type TokenReview struct {
	Authenticated bool
	Audiences     []string // of those that were asked for, the ones that the token is good for
	Error         string   // why it was not checked or not accepted; foreign text
	Username      string   // system:serviceaccount:NAMESPACE:NAME
	UID           string   // of the ServiceAccount
	Groups        []string
	Extra         map[string][]string // pod, node and token id, by the keys of kubernetesExtra
}

// ReviewConfig says who reviews the tokens of one issuer, and how much of that there may be.
type ReviewConfig struct {
	// Reviewer is required.
	Reviewer TokenReviewer

	// Timeout of one review. Zero is DefaultReviewTimeout; the most is MaxReviewTimeout.
	Timeout time.Duration

	// InFlight is how many reviews may be on their way at once. Whoever comes beyond that is refused with
	// api.ReviewerOverloaded before anything is sent. Zero is DefaultReviewInFlight; the most is MaxReviewInFlight.
	InFlight int
}

// review is a ReviewConfig at work.
type review struct {
	reviewer TokenReviewer
	timeout  time.Duration
	slots    chan struct{} // one element for each review on its way
}

func newReview(cfg ReviewConfig) (*review, error) {
	switch {
	case cfg.Reviewer == nil:
		return nil, api.E(api.ConfigInvalid, "a token review lacks its reviewer")
	case cfg.Timeout < 0 || cfg.Timeout > MaxReviewTimeout:
		return nil, api.E(api.ConfigInvalid, "the timeout of a token review is %v; it is above 0 and at most %v", cfg.Timeout, MaxReviewTimeout)
	case cfg.InFlight < 0 || cfg.InFlight > MaxReviewInFlight:
		return nil, api.E(api.ConfigInvalid, "%d token reviews at once; there are 1 to %d", cfg.InFlight, MaxReviewInFlight)
	}
	return &review{
		reviewer: cfg.Reviewer,
		timeout:  cmp.Or(cfg.Timeout, DefaultReviewTimeout),
		slots:    make(chan struct{}, cmp.Or(cfg.InFlight, DefaultReviewInFlight)),
	}, nil
}

// check asks about a token that passed every other check, once, and compares the answer with what the token itself says.
// There is no second try of any kind: no other audience, no none, and no verdict without an answer.
func (r *review) check(ctx context.Context, token []byte, c Claims, audience string) error {
	var answer TokenReview
	var refused error
	if err := waitAside(ctx, func() { answer, refused = r.ask(ctx, token, audience) }); err != nil {
		return err
	}
	if refused != nil {
		return refused
	}
	return answer.check(token, c, audience)
}

// ask asks where there is a slot for it.
func (r *review) ask(ctx context.Context, token []byte, audience string) (TokenReview, error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	default:
		return TokenReview{}, &api.Error{
			Reason: api.ReviewerOverloaded, Detail: fmt.Sprintf("%d tokens are being reviewed", cap(r.slots)),
			RetryAfter: minReviewDelay,
		}
	}
	asked, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	answer, err := r.reviewer.ReviewToken(asked, token, audience)
	switch {
	case err == nil:
		return answer, nil
	case ctx.Err() != nil: // it is the caller who did not wait
		return TokenReview{}, api.AsError(ctx.Err())
	}
	return TokenReview{}, &api.Error{
		Reason: api.ReviewerUnavailable, Detail: "the API server did not answer about the token",
		RetryAfter: retryDelay(err), Err: foreign("no review", err.Error(), token),
	}
}

// How soon a caller may come back to a reviewer that did not answer; a server may ask for more within these bounds.
const (
	minReviewDelay = time.Second
	maxReviewDelay = time.Minute
)

func retryDelay(err error) time.Duration {
	if e, ok := errors.AsType[interface {
		error
		RetryAfter() time.Duration
	}](err); ok {
		return min(max(e.RetryAfter(), minReviewDelay), maxReviewDelay)
	}
	return minReviewDelay
}

// kubernetesExtra are the members of "extra" that tell a token's bindings twice (k8s.io/apiserver/pkg/authentication/
// serviceaccount). API servers before 1.30 write the first two of them only, so one that is missing proves nothing.
var kubernetesExtra = []struct {
	name string
	of   func(Claims) string
}{
	{"authentication.kubernetes.io/pod-name", func(c Claims) string { return c.PodName }},
	{"authentication.kubernetes.io/pod-uid", func(c Claims) string { return c.PodUID }},
	{"authentication.kubernetes.io/node-name", func(c Claims) string { return c.NodeName }},
	{"authentication.kubernetes.io/node-uid", func(c Claims) string { return c.NodeUID }},
	{"authentication.kubernetes.io/credential-id", func(c Claims) string { return "JTI=" + c.TokenID }},
}

const (
	serviceAccountUser  = "system:serviceaccount:"
	serviceAccountGroup = "system:serviceaccounts"
)

// check wants a plain yes, to exactly our audience, about exactly the token that c was read from.
func (a TokenReview) check(token []byte, c Claims, audience string) error {
	switch {
	case !a.Authenticated || a.Error != "":
		return &api.Error{
			Reason: api.TokenReviewRefused, Detail: "the API server does not accept the token",
			Err: foreign("review refused", a.Error, token),
		}
	case len(a.Audiences) != 1 || a.Audiences[0] != audience:
		return api.E(api.ReviewerNotAudienceAware, "the API server's answer is not about the one audience %q", audience)
	case !slices.Contains(a.Groups, serviceAccountGroup):
		return api.E(api.NotAServiceAccount, "the API server does not take the token's owner for a ServiceAccount")
	case a.Username != serviceAccountUser+c.Namespace+":"+c.ServiceAccount:
		return errReviewMismatch("ServiceAccount")
	case a.UID != c.ServiceAccountUID:
		return errReviewMismatch("ServiceAccount's UID")
	}
	for _, x := range kubernetesExtra {
		if v, ok := a.Extra[x.name]; ok && (len(v) != 1 || v[0] != x.of(c)) {
			return errReviewMismatch(x.name[strings.LastIndexByte(x.name, '/')+1:])
		}
	}
	return nil
}

func errReviewMismatch(what string) error {
	return api.E(api.TokenReviewMismatch, "the API server's answer names another %s than the token", what)
}

const (
	maxForeign = 256 // bytes of a server's words that get into our log
	minQuote   = 16  // bytes from which on they are a quotation of the token
)

// foreign makes an error of words that are not ours, for our own log only: bounded, escaped, and without the token, which
// an API server in a debugging mood, or a proxy before it, may quote.
func foreign(what, text string, token []byte) error {
	if text == "" {
		return errors.New(what + ", and not why")
	}
	text = text[:min(len(text), maxForeign)]
	for i := range len(text) - minQuote + 1 {
		if bytes.Contains(token, []byte(text[i:i+minQuote])) {
			return errors.New(what + ", in words that quote the token")
		}
	}
	return errors.New(what + ": " + strconv.QuoteToASCII(text))
}
