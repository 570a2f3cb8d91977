package attestor

import (
	"context"
	"time"

	"github.com/signet-ca/signet/api"
)

// MaxPersonSkew is how far in the future "iat" and "nbf" of a person's token may be. A kubelet has its tokens long before it
// needs them; a person's is shown the moment that it was made, and he may have come because of the CA's clock.
const MaxPersonSkew = time.Minute

// AttestPerson checks a token that a person asked the API server for, by a TokenRequest for a ServiceAccount that stands
// for a role. It is Attest but for three things: the token must be bound to nothing, since what is bound to a pod, a node or a
// secret came from a kubelet or lies where others reach it; it lives at most api.MaxAdminTTL; and it may come from
// MaxPersonSkew in the future. Who the person is the token does not say; its id does, in the API server's audit log. The
// claims have no pod and no node.
func (a *ServiceAccount) AttestPerson(ctx context.Context, e Evidence, audience string, now time.Time) (Claims, error) {
	return a.reviewed(ctx, e, audience, now, kinds{claims: personClaims, maxLifetime: min(a.maxLifetime, api.MaxAdminTTL), skew: MaxPersonSkew})
}

// personClaims reads what the API server wrote about the ServiceAccount, and wants nothing else there: the token of a
// version that binds it to one thing more must not pass for one that is bound to nothing.
func personClaims(m map[string]any) (Claims, error) {
	k, err := ownClaims(m)
	switch {
	case api.ReasonOf(err) == api.TokenNotPodBound:
		return Claims{}, api.E(api.TokenBound, "the token comes from a Secret")
	case err != nil:
		return Claims{}, err
	}
	c, err := subject(m, k)
	if err != nil {
		return Claims{}, err
	}
	for member := range k {
		switch member {
		case "namespace", "serviceaccount":
		default:
			return boundTo(c, k), api.E(api.TokenBound, "the token is bound to a pod, a node, a secret or something else")
		}
	}
	return c, nil
}

// boundTo says also on which pod and node a token is that is bound to them: where it was taken from. What is malformed is
// left out.
func boundTo(c Claims, k map[string]any) Claims {
	if name, uid, ok := reference(k["pod"]); ok && api.IsSubdomain(name) && api.IsUID(uid) {
		c.PodName, c.PodUID = name, uid
	}
	if name, uid, ok := reference(k["node"]); ok && api.IsSubdomain(name) && api.IsUID(uid) {
		c.NodeName, c.NodeUID = name, uid
	}
	return c
}
