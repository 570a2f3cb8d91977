package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// TokenReview is the status of a TokenReview as the API server wrote it, unchecked. Its fields are those of the attestor's
// own type of that name, so that one converts to the other.
type TokenReview struct {
	Authenticated bool
	Audiences     []string
	Error         string // foreign text
	Username      string
	UID           string
	Groups        []string
	Extra         map[string][]string
}

// ReviewToken posts one TokenReview for exactly this audience, once. An error is any
// answer that is not a TokenReview about this token; where the server said when to come back, the error has a method
// RetryAfter() time.Duration. Its text holds the server's words.
func (c *Client) ReviewToken(ctx context.Context, token []byte, audience string) (TokenReview, error) {
	if audience == "" { // the API server would check its own audience instead
		return TokenReview{}, errors.New("a review needs an audience")
	}
	ask := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: string(token), Audiences: []string{audience}}}
	answer, err := post(ctx, c.pace, c.authentication, "tokenreviews", ask)
	if err != nil {
		return TokenReview{}, err
	}
	if t := answer.Spec.Token; t != "" && t != ask.Spec.Token {
		return TokenReview{}, errors.New("the answer is about another token")
	}
	s := answer.Status
	review := TokenReview{
		Authenticated: s.Authenticated, Audiences: s.Audiences, Error: s.Error,
		Username: s.User.Username, UID: s.User.UID, Groups: s.User.Groups,
		Extra: make(map[string][]string, len(s.User.Extra)),
	}
	for k, v := range s.User.Extra {
		review.Extra[k] = v
	}
	return review, nil
}

// ErrForbidden is what an error wraps where the API server answered that the client lacks the permission.
var ErrForbidden = errors.New("the API server does not allow it")

// Rule is a permission that the client needs.
type Rule struct {
	Group, Resource, Verb string
	Namespace, Name       string // empty: of all namespaces, of all names
}

// CheckReview asks the API server whether this client may review tokens, as CheckRules does.
func (c *Client) CheckReview(ctx context.Context) error {
	return c.CheckRules(ctx, Rule{Group: "authentication.k8s.io", Resource: "tokenreviews", Verb: "create"})
}

// CheckRules asks the API server whether this client has each permission, by SelfSubjectAccessReviews. The error of a
// client that has not wraps ErrForbidden and names the first rule that is missing; any other error says that it is not
// known.
func (c *Client) CheckRules(ctx context.Context, rules ...Rule) error {
	for _, r := range rules {
		attributes := authorizationv1.ResourceAttributes{Verb: r.Verb, Group: r.Group, Version: "v1", Resource: r.Resource, Namespace: r.Namespace, Name: r.Name}
		ask := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &attributes}}
		answer, err := post(ctx, c.pace, c.authorization, "selfsubjectaccessreviews", ask)
		if err != nil {
			return err
		}
		if !answer.Status.Allowed || answer.Status.Denied {
			return fmt.Errorf("%w: %s", ErrForbidden, r)
		}
	}
	return nil
}

// String is the rule as RBAC has it.
func (r Rule) String() string {
	role, names := "ClusterRole", ""
	if r.Namespace != "" {
		role = "Role in namespace " + r.Namespace
	}
	if r.Name != "" {
		names = fmt.Sprintf(", resourceNames: [%q]", r.Name)
	}
	return fmt.Sprintf("a %s of the CA's ServiceAccount must have the rule {apiGroups: [%q], resources: [%q]%s, verbs: [%q]}",
		role, r.Group, r.Resource, names, r.Verb)
}

// delayed is an error with the time after which the server wants to be asked again.
type delayed struct {
	error
	after time.Duration
}

// Unwrap returns the error within.
func (d delayed) Unwrap() error { return d.error }

// RetryAfter is how long the server asked to be left alone.
func (d delayed) RetryAfter() time.Duration { return d.after }

func delay(err error) error {
	if status := apierrors.APIStatus(nil); errors.As(err, &status) {
		if details := status.Status().Details; details != nil && details.RetryAfterSeconds > 0 {
			return delayed{err, time.Duration(details.RetryAfterSeconds) * time.Second}
		}
	}
	return err
}
