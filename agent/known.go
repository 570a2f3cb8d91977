package agent

import (
	"context"
	"crypto"
	"crypto/rand"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
)

// While the API server is away kubelet has no fresh tokens. The CA says so with the key sets; then what is held stands in
// for a token that has expired: its ticket, which came with it, and a signature of its key. The CA decides whether that is
// enough. At all other times nothing is signed and nothing but the token is shown.

// lateAdmission is how long a stream may go on whose token had expired when it began.
const lateAdmission = 10 * time.Minute

// lateAttestor is an attestor of tokens that have expired.
type lateAttestor interface {
	AttestExpired(ctx context.Context, e attestor.Evidence, audience string, now time.Time, grace time.Duration) (attestor.Claims, error)
}

// applyAway takes over which clusters are away, and since when.
func (a *Agent) applyAway(p *apiv1.KeySets) {
	away := map[string]time.Time{}
	for _, s := range p.GetSets() {
		if t := s.GetAwaySince(); t.IsValid() {
			away[s.GetIssuer()] = t.AsTime()
		}
	}
	was := a.away.Load()
	a.away.Set(away)
	for issuer, since := range away {
		if was[issuer].IsZero() {
			a.log.Warn("the CA does not see the cluster; what is held is renewed by its tickets", "cluster", issuer, "since", since)
		}
	}
	for issuer := range was {
		if away[issuer].IsZero() {
			a.log.Info("the CA sees the cluster again, or renews by tickets no more", "cluster", issuer)
		}
	}
}

// awaySince says since when a cluster is away, as the CA said last; the zero time while it is not.
func (a *Agent) awaySince(issuer string) time.Time { return a.away.Load()[issuer] }

// renewable reports whether what is held can be renewed without a token that is good: its cluster is away.
func (id *Identity) renewable(h Held) bool {
	return h.SVID != nil && h.ticket != "" && !id.agent.awaySince(id.key.issuer).IsZero()
}

// renewal is what proves, for a request, that an SVID is held.
func renewal(svid *x509svid.SVID, ticket string, csr []byte) (*apiv1.Renewal, error) {
	digest := api.RenewalDigest([]byte(ticket), csr)
	possession, err := svid.PrivateKey.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	r := &apiv1.Renewal{Ticket: []byte(ticket), Possession: possession}
	for _, c := range svid.Certificates {
		r.Chain = append(r.Chain, c.Raw)
	}
	return r, nil
}

// admitLate is Admit for a token that has expired while its cluster is away: it had not when the CA last saw the cluster,
// and an identity of that very pod is held. It never makes one. Refused is why the token is not good.
func (a *Agent) admitLate(ctx context.Context, v attestor.Attestor, e attestor.Evidence, refused error) (*Identity, time.Time, error) {
	audience, now := api.WorkloadAudience(a.cfg.TrustDomain), time.Now()
	late, ok := v.(lateAttestor)
	said, _, err := attestor.Unchecked(e, audience)
	if err != nil || !ok || api.ReasonOf(refused) != api.TokenExpired {
		return nil, time.Time{}, refused
	}
	since := a.awaySince(said.Issuer)
	if since.IsZero() {
		return nil, time.Time{}, refused
	}
	c, err := late.AttestExpired(ctx, e, audience, now, now.Sub(since))
	if err != nil {
		return nil, time.Time{}, err
	}
	if err := a.checkNode(c); err != nil {
		return nil, time.Time{}, err
	}
	a.mu.Lock()
	id := a.identities[podKey{c.Issuer, c.PodUID, c.ServiceAccountUID}]
	a.mu.Unlock()
	if id == nil {
		return nil, time.Time{}, refused
	}
	held := id.held.Load().SVID
	if held == nil {
		return nil, time.Time{}, refused
	}
	until := now.Add(lateAdmission)
	if end := held.Certificates[0].NotAfter; end.Before(until) {
		until = end
	}
	return id, until, nil
}

// ticketHelps reports whether a refusal is one that the ticket of what is held may get over.
func ticketHelps(err error) bool {
	switch api.ReasonOf(err) {
	case api.DirectoryUnavailable, api.TokenExpired, api.ReviewerUnavailable:
		return err != nil
	}
	return false
}
