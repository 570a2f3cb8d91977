package attestor

import (
	"errors"
	"time"

	"github.com/signet-ca/signet/api"
)

// Claimed is what refused evidence says of itself, from a signature that was good: for the record of the refusal, so that
// it is found by the pod; or what evidence says that nobody has checked at all. It proves nothing (the evidence may be for
// somebody else, or of last year), which is why it is another type than Claims: nothing that decides takes it.
type Claimed struct {
	Issuer, Namespace, ServiceAccount, ServiceAccountUID string
	PodName, PodUID, NodeName, NodeUID, TokenID          string
}

// ClaimedBy returns what evidence says of itself that Attest refused with err; false where its signature was not good, or
// where it says nothing of a pod.
func ClaimedBy(err error) (Claimed, bool) {
	e, ok := errors.AsType[*claimedError](err)
	if !ok {
		return Claimed{}, false
	}
	return e.claimed, true
}

// claimedError is a refusal that came after the signature was verified.
type claimedError struct {
	error   // an *api.Error
	claimed Claimed
}

// Unwrap lets the refusal be found.
func (e *claimedError) Unwrap() error { return e.error }

// refusedOf is the refusal of evidence that says c of itself.
func refusedOf(c Claims, err error) error { return &claimedError{err, claimedOf(c)} }

func claimedOf(c Claims) Claimed {
	return Claimed{
		Issuer: c.Issuer, Namespace: c.Namespace, ServiceAccount: c.ServiceAccount, ServiceAccountUID: c.ServiceAccountUID,
		PodName: c.PodName, PodUID: c.PodUID, NodeName: c.NodeName, NodeUID: c.NodeUID, TokenID: c.TokenID,
	}
}

// Unchecked returns what evidence says of itself before anybody has checked it, and until when it says to be good. It is
// for a courier who was told by somebody that he believes whose evidence he carries, so that he can refuse what is
// another's at once and need not wait for the means to check it; who decides asks an Attestor. It fails as Attest does with
// what is no token for that audience alone, or none of a pod on a node.
func Unchecked(e Evidence, audience string) (c Claimed, expireAt time.Time, err error) {
	jws, m, err := takeApart(e)
	if err != nil {
		return Claimed{}, time.Time{}, err
	}
	k, err := kubernetesClaims(m)
	if err != nil {
		return Claimed{}, time.Time{}, err
	}
	id, err := tokenID(m, jws)
	if err != nil {
		return Claimed{}, time.Time{}, err
	}
	if err := checkAudience(m["aud"], audience); err != nil {
		return Claimed{}, time.Time{}, err
	}
	exp, ok := numericDate(m["exp"])
	iss, _ := m["iss"].(string)
	if !ok || iss == "" {
		return Claimed{}, time.Time{}, api.E(api.TokenMalformed, "the token's exp or iss is missing or malformed")
	}
	k.Issuer, k.TokenID = iss, id
	return claimedOf(k), exp, nil
}
