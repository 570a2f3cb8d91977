package upstream

import (
	"context"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
)

// both is two upstreams, of which one brings the next root. Each signs under the roots whose keys it has: so a switch from one to
// the other begins with a start at which nothing stops, and the old root can sign the new one, and be gone back to.
type both struct {
	next   ca.Upstream // the one that is configured
	sealed ca.Upstream // for roots whose keys lie in the record
	other  ca.Upstream // for the others
}

// of is the upstream that has the key of a root.
func (b *both) of(root journal.Authority) ca.Upstream {
	if len(root.SealedKey) > 0 {
		return b.sealed
	}
	return b.other
}

// Mint implements ca.Upstream.
func (b *both) Mint(ctx context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
	return b.of(r.Root).Mint(ctx, r)
}

// Probe implements ca.Upstream.
func (b *both) Probe(ctx context.Context, td spiffeid.TrustDomain, root journal.Authority) error {
	return b.of(root).Probe(ctx, td, root)
}

// WatchRoots implements ca.Upstream. Of a root that nobody means to go to, nothing is told.
func (b *both) WatchRoots(ctx context.Context, tell func([]*x509.Certificate)) error {
	return b.next.WatchRoots(ctx, tell)
}

// Found implements ca.Founder.
func (b *both) Found(ctx context.Context, td spiffeid.TrustDomain, now time.Time) (journal.Authority, error) {
	f, ok := b.next.(ca.Founder)
	if !ok {
		return journal.Authority{}, api.E(api.AuthorityRefused, "the upstream neither makes roots nor says which one is to follow")
	}
	return f.Found(ctx, td, now)
}

// CrossSign implements ca.CrossSigner.
func (b *both) CrossSign(ctx context.Context, td spiffeid.TrustDomain, older journal.Authority, newer *x509.Certificate) (*x509.Certificate, error) {
	c, ok := b.of(older).(ca.CrossSigner)
	if !ok {
		return nil, api.E(api.UpstreamCross, "the upstream does not sign roots")
	}
	return c.CrossSign(ctx, td, older, newer)
}

// CanCross implements ca.CrossProber.
func (b *both) CanCross(ctx context.Context, td spiffeid.TrustDomain, older journal.Authority) error {
	c, ok := b.of(older).(ca.CrossProber)
	if !ok {
		return api.E(api.UpstreamCross, "the upstream does not sign roots")
	}
	return c.CanCross(ctx, td, older)
}
