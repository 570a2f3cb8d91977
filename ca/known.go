package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/internal/audit"
)

// While the API server of a cluster is away, kubelet has no fresh tokens for its pods, and nobody can say which of them
// live. Then, and only then, what is known is renewed, for a bounded time. In this order: (1) the cluster is away by this
// replica's own watch, no other replica sees it, and the grace that is counted from when it was last seen is not over; (2)
// the workload's last token is valid under the last good key set in everything but its expiry, and had not expired when the
// cluster was last seen; (3) the ticket is ours, and names that very pod, ServiceAccount, node, volume and token, and the
// SVID that is shown; (4) the agent, its node and the pod are what they must be, by the directory as it was when the
// cluster was last seen, and the node is not banned; (5) the policy gives that same identity; (6) the SVID that is shown
// verifies now against our bundle; (7) its key has signed this request. Nothing of it is less than what a token was worth
// at the moment when sight was lost: it is only worth it for longer.

// Renewal is what a caller shows to have an SVID renewed while the API server of his cluster is away.
type Renewal struct {
	Ticket     []byte   // came with the SVID
	Chain      [][]byte // that SVID, DER, leaf first, without the root
	Possession []byte   // signature of its key over api.RenewalDigest
}

// lateAttestor is an Attestor that can tell what a token that has expired was worth.
type lateAttestor interface {
	// AttestExpired checks everything that Attest does but the expiry, which may be up to grace ago, and asks nobody.
	AttestExpired(ctx context.Context, e attestor.Evidence, audience string, now time.Time, grace time.Duration) (attestor.Claims, error)
}

// known is a renewal of what is known, while it is decided about.
type known struct {
	since  time.Time // when the cluster was last seen
	ticket []byte
}

// recall says whether a request is one for the rule of known renewals, step (1): a ticket came with it, and the cluster that its
// evidence names, true or not, is away. It is nil where it is not. An error is that of a cluster of which nothing is renewed.
func (ca *CA) recall(e attestor.Evidence, audience string, ticket []byte, now time.Time) (*known, error) {
	if ca.sights == nil || len(ticket) == 0 {
		return nil, nil
	}
	said, _, err := attestor.Unchecked(e, audience)
	if err != nil {
		return nil, nil // whoever attests it says what is wrong with it
	}
	since, err := ca.sights.absence(said.Issuer, now)
	if err != nil {
		return nil, err
	}
	if since.IsZero() {
		return nil, nil
	}
	return &known{since: since, ticket: ticket}, nil
}

// attestKnown is attest for k, step (2); for nil it is attest itself.
func (ca *CA) attestKnown(ctx context.Context, k *known, e attestor.Evidence, audience string, now time.Time) (attestor.Claims, error) {
	if k == nil {
		return ca.attest(ctx, e, audience, now)
	}
	a, ok := ca.cfg.Attestors[e.Kind].(lateAttestor)
	if !ok {
		return attestor.Claims{}, api.E(api.DirectoryUnavailable, "the cluster cannot be seen now, and evidence of this kind cannot do without")
	}
	return a.AttestExpired(ctx, e, audience, now, elapsed(now, k.since))
}

// note marks the entry of a decision by this rule.
func (k *known) note(e *audit.Entry, c attestor.Claims, now time.Time) {
	if k == nil {
		return
	}
	e.Grace = true
	e.Detail = fmt.Sprintf("renewed by its ticket: the API server has not been seen for %s", elapsed(now, k.since).Round(time.Second))
	if late := now.Sub(c.ExpireAt); late > 0 {
		e.Detail += fmt.Sprintf(", and the token expired %s ago", late.Round(time.Second))
	}
}

// checkTicket is step (3): the ticket is ours and admits the SVID of leaf for c.
func (ca *CA) checkTicket(k *known, kind ticketKind, c attestor.Claims, volume string, leaf *x509.Certificate) error {
	keys := ca.tickets.Load()
	if keys == nil {
		return api.E(api.TicketInvalid, "this CA has no keys of tickets")
	}
	t, err := keys.open(k.ticket)
	if err != nil {
		return err
	}
	return t.admits(ticketOf(kind, c, volume, leaf))
}

// checkRemembered is step (4) of a pod: checkPod by what the directory knew when it last saw the cluster.
func (ca *CA) checkRemembered(c attestor.Claims, now time.Time) error {
	if err := ca.refuseBanned(c.Issuer, c.NodeUID); err != nil {
		return err
	}
	p, err := ca.sights.directory.Recall(podID(c))
	if err != nil {
		return err
	}
	return judgePod(p, c, now, true)
}

// parseHeld parses the chain of a held SVID, bounded before.
func parseHeld(chain [][]byte) ([]*x509.Certificate, error) {
	size := 0
	for _, der := range chain {
		size += len(der)
	}
	if len(chain) == 0 || len(chain) > maxHeldChain || size > api.MaxHeldChainBytes {
		return nil, api.E(api.HeldSVIDInvalid, "the held SVID has %d certificates and %d bytes; it has 1 to %d and at most %d", len(chain), size, maxHeldChain, api.MaxHeldChainBytes)
	}
	var certs []*x509.Certificate
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, api.Wrap(api.HeldSVIDInvalid, err, "a certificate of the held SVID does not parse")
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// maxHeldChain is how many certificates a held SVID may have: a leaf, an intermediate, and what may lie above it.
const maxHeldChain = 5

// checkHeld is step (6): the SVID that is shown is one of id, by our own bundle, now.
func (ca *CA) checkHeld(certs []*x509.Certificate, id spiffeid.ID, now time.Time) error {
	if !now.Before(certs[0].NotAfter) { // crypto/x509 counts the last second as well
		return api.E(api.HeldSVIDInvalid, "the SVID that was shown has expired")
	}
	if err := issuance.Verify(certs, ca.bundle.Load().Roots, id, now); err != nil {
		return api.Wrap(api.HeldSVIDInvalid, err, "the SVID that was shown does not count: "+api.AsError(err).Detail)
	}
	return nil
}

// checkPossession is step (7): the key of the held SVID has signed the ticket and the request.
func checkPossession(leaf *x509.Certificate, ticket, csr, signature []byte) error {
	digest := api.RenewalDigest(ticket, csr)
	good := len(signature) <= api.MaxPossessionBytes
	switch pub := leaf.PublicKey.(type) {
	case *ecdsa.PublicKey:
		good = good && ecdsa.VerifyASN1(pub, digest[:], signature)
	case *rsa.PublicKey:
		good = good && rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], signature) == nil
	case ed25519.PublicKey:
		good = good && ed25519.Verify(pub, digest[:], signature)
	default:
		good = false
	}
	if !good {
		return api.E(api.PossessionUnproven, "the key of the held SVID has not signed this request")
	}
	return nil
}
