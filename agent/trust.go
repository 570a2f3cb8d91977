package agent

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// maxRoots bounds a bundle; a rotation has three, and a hundred of one subject would make Go's verifier give up.
const maxRoots = 64

// Trust is the trust bundle at one generation. It is never changed once made.
type Trust struct {
	Generation api.Generation // zero for a bundle that came without one
	Hash       [sha256.Size]byte
	Bundle     *x509bundle.Bundle
}

// NewTrust returns a Trust of these roots; there must be at least one and at most 64.
func NewTrust(td spiffeid.TrustDomain, g api.Generation, roots []*x509.Certificate) (*Trust, error) {
	if len(roots) == 0 || len(roots) > maxRoots {
		return nil, fmt.Errorf("a trust bundle of %d roots, want 1 to %d", len(roots), maxRoots)
	}
	return &Trust{Generation: g, Hash: api.BundleHash(roots), Bundle: x509bundle.FromX509Authorities(td, roots)}, nil
}

// ParseTrust reads a published bundle: the SPIFFE format, whose sequence is the generation, or PEM, which has none.
func ParseTrust(td spiffeid.TrustDomain, data []byte) (*Trust, error) {
	if block, _ := pem.Decode(data); block != nil {
		b, err := x509bundle.Parse(td, data)
		if err != nil {
			return nil, err
		}
		return NewTrust(td, api.Generation{}, b.X509Authorities())
	}
	b, err := spiffebundle.Parse(td, data)
	if err != nil {
		return nil, err
	}
	seq, _ := b.SequenceNumber()
	return NewTrust(td, api.FromSequence(seq), b.X509Authorities())
}

func trustFromProto(td spiffeid.TrustDomain, p *apiv1.Bundle) (*Trust, error) {
	if len(p.GetRoots()) > maxRoots {
		return nil, fmt.Errorf("a trust bundle of %d roots, want at most %d", len(p.GetRoots()), maxRoots)
	}
	var roots []*x509.Certificate
	for _, der := range p.GetRoots() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		roots = append(roots, c)
	}
	t, err := NewTrust(td, api.Generation{Epoch: p.GetEpoch(), Number: p.GetNumber()}, roots)
	if err != nil {
		return nil, err
	}
	if string(p.GetHash()) != string(t.Hash[:]) {
		return nil, fmt.Errorf("the hash of the trust bundle does not fit its roots")
	}
	return t, nil
}

// applyTrust takes over a bundle from the CA if it follows from the one that is held. A lower generation is refused; the
// same one with other roots is an alarm; neither changes anything.
func (a *Agent) applyTrust(p *apiv1.Bundle) error {
	next, err := trustFromProto(a.cfg.TrustDomain, p)
	if err != nil {
		return api.Wrap(api.BundleRollback, err, "the CA sent a trust bundle that does not parse")
	}
	held := a.trust.Load()
	was, is := held.Generation.Sequence(), next.Generation.Sequence()
	switch {
	case is < was:
		a.metrics.trustRefused.Inc()
		return api.E(api.BundleRollback, "the CA sent the trust bundle of generation %s, generation %s is held", next.Generation, held.Generation)
	case is == was && next.Hash != held.Hash:
		a.metrics.trustRefused.Inc()
		return api.E(api.BundleEquivocation, "the CA sent another trust bundle for generation %s than the one that is held", held.Generation)
	case is == was:
		return nil
	}
	a.trust.Set(next)
	a.metrics.setTrust(next)
	a.cacheTrust(next)
	a.touch()
	a.log.Info("trust bundle applied", "generation", next.Generation.String(), "roots", len(next.Bundle.X509Authorities()))
	return nil
}

// GetX509BundleForTrustDomain implements x509bundle.Source with the newest bundle.
func (a *Agent) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return a.trust.Load().Bundle.GetX509BundleForTrustDomain(td)
}
