package ca

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/internal/audit"
)

// agentVolume is the place that an agent's own token serves.
const agentVolume = "agent"

// attestAgent turns an agent's own token into the identity of the agent of its node. The pod must be one of ours by
// namespace, ServiceAccount and DaemonSet, and must live. What the record is to say of a refusal is in entry then; nothing where nobody
// is known.
//
// While the API server is away the agent shows a ticket, and proves by the certificate of its connection that it holds the
// SVID that goes with it.
func (ca *CA) attestAgent(ctx context.Context, e attestor.Evidence, csrDER, ticket []byte, now time.Time, entry *audit.Entry) (*granted, error) {
	k, err := ca.recall(e, api.AgentAudience(ca.cfg.TrustDomain), ticket, now)
	if err != nil {
		return nil, err
	}
	claims, err := ca.attestNode(ctx, k, e, now)
	if claims.Issuer != "" {
		*entry = entryOf(audit.KindAttestAgent, claims, now)
		k.note(entry, claims, now)
	}
	if err != nil {
		return nil, err
	}
	issued, err := ca.certifyAgent(ctx, claims, csrDER, k, now, entry)
	if err != nil {
		return nil, err
	}
	ca.metrics.countKnown("agent", k)
	return &granted{issued, ca.ticket(ticketAgent, claims, agentVolume, issued.Leaf)}, nil
}

// checkAgentTicket is steps (3), (6) and (7) of a known renewal for the agent who has made a connection: its certificate
// verified against the bundle in the handshake, which proves that he holds its key, and has not expired since. A connection may
// be older than the bundle: once a root can be distrusted at once, the chain has to be verified here again.
func (ca *CA) checkAgentTicket(k *known, c attestor.Claims, who caller) error {
	if who.leaf == nil || who.node != c.NodeUID {
		return api.E(api.HeldSVIDInvalid, "the caller did not show the SVID of that node's agent on his connection")
	}
	return ca.checkTicket(k, ticketAgent, c, agentVolume, who.leaf)
}

func (ca *CA) certifyAgent(ctx context.Context, c attestor.Claims, csrDER []byte, k *known, now time.Time, e *audit.Entry) (*issuance.Issued, error) {
	id, malformed := api.AgentID(ca.cfg.TrustDomain, c.NodeUID)
	if malformed == nil {
		e.SPIFFEID = id.String() // of a refusal as well
	}
	if k != nil {
		if err := ca.checkAgentTicket(k, c, admitted(ctx)); err != nil {
			return nil, err
		}
	}
	if err := ca.checkAgentPod(ctx, c, k, now); err != nil {
		return nil, err
	}
	if err := ca.memory.bindToken(c.Issuer, c.TokenID, c.NodeUID, agentVolume, c.ExpireAt); err != nil {
		return nil, err
	}
	if malformed != nil {
		return nil, api.Wrap(api.IDMalformed, malformed, "the node's UID does not make a SPIFFE ID")
	}
	csr, err := issuance.ParseCSR(csrDER, issuance.Keys{})
	if err != nil {
		return nil, err
	}
	if err := csr.Match(id); err != nil {
		return nil, err
	}
	s, err := ca.signer(now)
	if err != nil {
		return nil, err
	}
	p, err := issuance.Prepare(issuance.Profile{TTL: ca.cfg.AgentTTL}, issuance.Request{ID: id, PublicKey: csr.PublicKey}, s.issuer, now)
	if err != nil {
		return nil, err
	}
	if err := ca.memory.bindKey(csr.SPKI, id, now, p.NotAfter()); err != nil {
		return nil, err
	}
	issued, err := ca.recordAndSign(ctx, s, p, e)
	if err != nil {
		return nil, err
	}
	ca.memory.notePod(c.Issuer, c.PodUID, issued.Leaf.NotAfter)
	return issued, nil
}

// attestNode checks an agent's own token: audience of agents, our agents' ServiceAccount, a node that it is bound to. Where
// it is a good token of somebody who is no agent, the claims come with the error.
func (ca *CA) attestNode(ctx context.Context, k *known, e attestor.Evidence, now time.Time) (attestor.Claims, error) {
	// Any pod can have a token for this audience, so who is no agent is told so before an API server is asked about it.
	var refused attestor.Claims
	ctx = attestor.WithRefusal(ctx, func(c attestor.Claims) error {
		err := ca.checkAgentNode(c)
		if err != nil {
			refused = c
		}
		return err
	})
	c, err := ca.attestKnown(ctx, k, e, api.AgentAudience(ca.cfg.TrustDomain), now)
	if err != nil {
		return refused, err
	}
	return c, ca.checkAgentNode(c)
}

// checkAgentNode wants one of our agents, on a node that is not banned.
func (ca *CA) checkAgentNode(c attestor.Claims) error {
	if err := ca.checkIsAgent(c); err != nil {
		return err
	}
	return ca.refuseBanned(c.Issuer, c.NodeUID)
}

// checkIsAgent wants the ServiceAccount of our agents, and a node.
func (ca *CA) checkIsAgent(c attestor.Claims) error {
	switch {
	case c.Namespace != ca.cfg.Agents.Namespace || c.ServiceAccount != ca.cfg.Agents.ServiceAccount:
		return api.E(api.NotAnAgent, "the token belongs to a pod that is not an agent")
	case c.NodeUID == "":
		return api.E(api.NodeUnverifiable, "the agent's token does not say on which node it runs")
	}
	return nil
}

// checkAgentPod is checkPod for an agent's own pod, which the agents' DaemonSet must have made where the directory can tell.
// Whoever is known to be an agent by his ticket was asked about it when he got that.
func (ca *CA) checkAgentPod(ctx context.Context, c attestor.Claims, k *known, now time.Time) error {
	finder, ok := ca.cfg.Directory.(AgentFinder)
	if !ok || k != nil {
		return ca.checkPod(ctx, c, k, now)
	}
	p, err := finder.Pod(ctx, podID(c))
	if err != nil {
		return err
	}
	if err := judgePod(p, c, now, ca.memory.holds(c.Issuer, c.PodUID, now)); err != nil {
		return err
	}
	return finder.CheckAgent(ctx, p)
}

// verifyPeer returns the identity of a client certificate that verifies now against the bundle as it is now.
func (ca *CA) verifyPeer(certs []*x509.Certificate, now time.Time) (spiffeid.ID, error) {
	b := ca.bundle.Load()
	if b == nil {
		return spiffeid.ID{}, api.E(api.CAUnavailable, "the CA is starting")
	}
	id, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return spiffeid.ID{}, api.Wrap(api.AgentIdentityRequired, err, "the client certificate has no SPIFFE ID")
	}
	if err := issuance.Verify(certs, b.Roots, id, now); err != nil {
		return spiffeid.ID{}, api.Wrap(api.AgentIdentityRequired, err, "the client certificate does not verify against the trust bundle")
	}
	return id, nil
}

func hexID(c *x509.Certificate) string { return hex.EncodeToString(c.SubjectKeyId) }
