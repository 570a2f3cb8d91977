package issuance

import (
	"crypto"
	"crypto/x509"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// maxChain is how many certificates a chain has at most, the root aside.
const maxChain = 8

// An Issuer signs the leaves of one trust domain: an intermediate's certificate, what lies between it and its root, and
// its key. It is immutable, and safe for concurrent use when its key is, as those of the standard library are.
type Issuer struct {
	td    spiffeid.TrustDomain
	key   crypto.Signer
	chain []*x509.Certificate // issuing certificate first, as it is presented after a leaf; without the root
	root  *x509.Certificate

	der                 [][]byte            // of chain
	path                []*x509.Certificate // from the issuing certificate to the root
	notBefore, notAfter time.Time           // when all of path is valid
	mold                *mold               // of leaves
	constrained         bool                // some certificate of path constrains names
}

// NewIssuer returns an Issuer for td. The chain begins with the intermediate whose private key is key; each certificate in
// it is signed by the next, and one of them by root. A further one, such as the root's own cross certificate, is
// presented along with the others. It fails with api.SignerUnavailable if any of this does not hold, or if the path could
// not carry a leaf of td. Times are not looked at: Prepare does.
func NewIssuer(td spiffeid.TrustDomain, chain []*x509.Certificate, root *x509.Certificate, key crypto.Signer) (*Issuer, error) {
	if len(chain) == 0 || len(chain) > maxChain || slices.Contains(chain, nil) || root == nil || key == nil {
		return nil, api.E(api.SignerUnavailable, "an issuer needs a key, 1 to %d certificates and a root", maxChain)
	}
	if !sameKey(key.Public(), chain[0].PublicKey) {
		return nil, api.E(api.SignerUnavailable, "the key does not belong to the intermediate")
	}
	iss := &Issuer{td: td, key: key, chain: slices.Clone(chain), root: root}
	var err error
	if iss.path, err = pathOf(chain, root); err != nil {
		return nil, err
	}
	if err := checkPath(td, iss.path, nil); err != nil {
		return nil, api.Wrap(api.SignerUnavailable, err, "the intermediate cannot issue: "+err.Error())
	}
	iss.notBefore, iss.notAfter = validity(iss.path)
	iss.constrained = slices.ContainsFunc(iss.path, constrainsNames)
	if iss.mold, err = newMold(chain[0]); err != nil {
		return nil, api.Wrap(api.SignerUnavailable, err, "the intermediate cannot issue: leaves cannot be encoded")
	}
	for _, c := range chain {
		iss.der = append(iss.der, c.Raw)
	}
	return iss, nil
}

// pathOf returns the certificates from chain[0] to root, and an error unless each of the chain is signed by the next.
func pathOf(chain []*x509.Certificate, root *x509.Certificate) ([]*x509.Certificate, error) {
	var path []*x509.Certificate
	for i, c := range chain {
		if path == nil && c.CheckSignatureFrom(root) == nil {
			path = append(slices.Clone(chain[:i+1]), root)
		}
		if i+1 < len(chain) {
			if err := c.CheckSignatureFrom(chain[i+1]); err != nil {
				return nil, api.Wrap(api.SignerUnavailable, err, "a certificate of the chain is not signed by the next")
			}
		}
	}
	if path == nil {
		return nil, api.E(api.SignerUnavailable, "the chain does not lead to its root")
	}
	return path, nil
}

// validity returns the time in which every certificate of path is valid.
func validity(path []*x509.Certificate) (notBefore, notAfter time.Time) {
	notBefore, notAfter = path[0].NotBefore, path[0].NotAfter
	for _, c := range path[1:] {
		if c.NotBefore.After(notBefore) {
			notBefore = c.NotBefore
		}
		if c.NotAfter.Before(notAfter) {
			notAfter = c.NotAfter
		}
	}
	return notBefore, notAfter
}

// TrustDomain is the trust domain that the issuer signs for.
func (iss *Issuer) TrustDomain() spiffeid.TrustDomain { return iss.td }

// Certificate is the intermediate. It must not be modified.
func (iss *Issuer) Certificate() *x509.Certificate { return iss.chain[0] }

// Root is the authority that leaves of this issuer lead to. It must not be modified.
func (iss *Issuer) Root() *x509.Certificate { return iss.root }

// NotAfter is when the first certificate on the way to the root expires, the root included. No leaf outlives it.
func (iss *Issuer) NotAfter() time.Time { return iss.notAfter }

// CheckBundle reports whether leaves of this issuer verify under a bundle with these roots: whether its root is one of
// them, as everything else about the path was verified when the Issuer was made. It does no signature arithmetic. The
// error is api.SignerUnavailable.
func (iss *Issuer) CheckBundle(roots []*x509.Certificate) error {
	if !slices.ContainsFunc(roots, iss.root.Equal) {
		return api.E(api.SignerUnavailable, "the intermediate's root is not in the trust bundle")
	}
	return nil
}

// usable refuses a time at which a leaf that wants to live for ttl could not be of use.
func (iss *Issuer) usable(ttl time.Duration, now time.Time) error {
	switch {
	case now.Before(iss.notBefore):
		return api.E(api.SignerUnavailable, "the intermediate is not valid yet")
	case now.After(iss.notAfter):
		return api.E(api.SignerUnavailable, "the intermediate or its root has expired")
	case iss.notAfter.Sub(now) < min(ttl/2, minUseful):
		return api.E(api.SignerUnavailable, "the intermediate or its root is about to expire")
	}
	return nil
}

// minUseful is how long a leaf must live to be worth signing when its issuer ends early: time to be delivered, taken up
// by a proxy, and renewed under the next issuer.
const minUseful = time.Minute
