package attestor

import "errors"

// Claimed is what refused evidence says of itself, from a signature that was good: for the record of the refusal, so that
// it is found by the pod. It proves nothing (the evidence may be for somebody else, or of last year), which is why it is
// another type than Claims: nothing that decides takes it.
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
func refusedOf(c Claims, err error) error {
	return &claimedError{err, Claimed{
		Issuer: c.Issuer, Namespace: c.Namespace, ServiceAccount: c.ServiceAccount, ServiceAccountUID: c.ServiceAccountUID,
		PodName: c.PodName, PodUID: c.PodUID, NodeName: c.NodeName, NodeUID: c.NodeUID, TokenID: c.TokenID,
	}}
}
