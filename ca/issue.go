package ca

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/internal/audit"
)

// Request asks for one SVID: the proof of what the workload is, a proof of possession of its key, and where on the node
// its token was delivered.
type Request struct {
	Evidence attestor.Evidence
	CSR      []byte   // PKCS#10 DER
	Volume   string   // opaque, at most 256 bytes
	Renewal  *Renewal // nil: nothing was shown that the caller holds
}

// granted is an SVID and its ticket.
type granted struct {
	*issuance.Issued
	ticket []byte // nil where there are none
}

// maxVolume bounds Request.Volume.
const maxVolume = 256

// asker is who asks: the agent of one node, in a live session.
type asker struct {
	nodeUID, nodeName string
	issuer            string // of the cluster that attested the agent
}

// issue is the main path, numbered as in ARCHITECTURE.md. Whatever it refuses has its reason; what it issues is on record
// before it is signed, and was verified before it is returned. What the record is to say of a refusal is in e then.
func (ca *CA) issue(ctx context.Context, who asker, r Request, now time.Time, e *audit.Entry) (*granted, error) {
	if len(r.Volume) > maxVolume {
		return nil, api.E(api.TokenMalformed, "the volume's name is longer than %d bytes", maxVolume)
	}
	// (4) Attest: token before CSR, so that nothing is spent on a key whose owner is unknown.
	// Where its cluster is away, what it holds already may count for what nobody can say now: see known.go.
	audience := api.WorkloadAudience(ca.cfg.TrustDomain)
	k, err := ca.recall(r.Evidence, audience, r.ticket(), now)
	if err != nil {
		return nil, err
	}
	claims, err := ca.attestKnown(ctx, k, r.Evidence, audience, now)
	if err != nil {
		return nil, err
	}
	*e = entryOf(audit.KindIssue, claims, now)
	k.note(e, claims, now)
	issued, err := ca.decideAndSign(ctx, who, claims, r, k, now, e)
	if err != nil {
		return nil, err
	}
	ca.issued.Add(1)
	ca.metrics.countKnown("workload", k)
	return &granted{issued, ca.ticket(ticketWorkload, claims, r.Volume, issued.Leaf)}, nil
}

// ticket returns the ticket that came with a request; nil where none did.
func (r Request) ticket() []byte {
	if r.Renewal == nil {
		return nil
	}
	return r.Renewal.Ticket
}

// ticket makes the ticket of an SVID that was issued to c.
func (ca *CA) ticket(kind ticketKind, c attestor.Claims, volume string, leaf *x509.Certificate) []byte {
	keys := ca.tickets.Load()
	if keys == nil {
		return nil
	}
	return keys.seal(ticketOf(kind, c, volume, leaf))
}

func (ca *CA) decideAndSign(ctx context.Context, who asker, claims attestor.Claims, r Request, k *known, now time.Time, e *audit.Entry) (*issuance.Issued, error) {
	// (4) Decide: the claimed node must be the caller's, the pod must live, the policy must allow it. The policy needs
	// nobody's answer, so it comes first for the record: a refusal is found by the identity that was asked for, too.
	d, denied := ca.cfg.Policy.Decide(claims)
	if denied == nil {
		e.SPIFFEID, e.DNSNames = d.ID.String(), d.DNSNames
	}
	var held []*x509.Certificate
	if k != nil {
		var err error
		if held, err = parseHeld(r.Renewal.Chain); err != nil {
			return nil, err
		}
		if err := ca.checkTicket(k, ticketWorkload, claims, r.Volume, held[0]); err != nil {
			return nil, err
		}
	}
	if err := ca.authorize(ctx, who, claims, r.Volume, k, now); err != nil {
		return nil, err
	}
	if denied != nil {
		return nil, denied
	}
	if k != nil {
		if err := ca.checkHeld(held, d.ID, now); err != nil {
			return nil, err
		}
		if err := checkPossession(held[0], k.ticket, r.CSR, r.Renewal.Possession); err != nil {
			return nil, err
		}
	}
	csr, err := issuance.ParseCSR(r.CSR, ca.cfg.Policy.Keys())
	if err != nil {
		return nil, err
	}
	if err := csr.Match(d.ID); err != nil {
		return nil, err
	}
	// (5) Prepare, record, sign, verify.
	s, err := ca.signer(now)
	if err != nil {
		return nil, err
	}
	p, err := issuance.Prepare(issuance.Profile{TTL: d.TTL}, issuance.Request{ID: d.ID, PublicKey: csr.PublicKey, DNSNames: d.DNSNames}, s.issuer, now)
	if err != nil {
		return nil, err
	}
	if err := ca.memory.bindKey(csr.SPKI, d.ID, now, p.NotAfter()); err != nil {
		return nil, err
	}
	issued, err := ca.recordAndSign(ctx, s, p, e)
	if err != nil {
		return nil, err
	}
	ca.memory.notePod(claims.Issuer, claims.PodUID, issued.Leaf.NotAfter)
	ca.memory.noteNode(nodeKey{claims.Issuer, claims.NodeUID}, claims.NodeName, d.ID, issued.Leaf.NotAfter)
	return issued, nil
}

// recordAndSign puts the decision on record and signs. Before the result leaves, Sign verified it under its issuer, whose
// whole path was verified when it was made, and here the root of that path must be in our own bundle.
func (ca *CA) recordAndSign(ctx context.Context, s *signing, p *issuance.Prepared, e *audit.Entry) (*issuance.Issued, error) {
	if err := ca.refuseBanned(e.Cluster, e.NodeUID); err != nil { // since it was attested
		return nil, err
	}
	e.Serial, e.NotAfter, e.Issuer = p.Serial(), p.NotAfter(), hex.EncodeToString(s.cert.SubjectKeyId)
	if err := ca.cfg.Ledger.Append(ctx, *e); err != nil {
		if cause := ctx.Err(); cause != nil && errors.Is(err, cause) {
			return nil, err // it is the caller who did not wait
		}
		return nil, unrecorded(err, "the decision could not be recorded, so nothing was signed")
	}
	issued, err := p.Sign()
	if err != nil {
		return nil, err
	}
	if err := s.issuer.CheckBundle(ca.bundle.Load().Roots); err != nil {
		return nil, err
	}
	if err := ca.refuseBanned(e.Cluster, e.NodeUID); err != nil { // the ledger may have taken its time
		return nil, err
	}
	return issued, nil
}

// entryOf begins the ledger's entry about an attested caller.
func entryOf(kind audit.Kind, c attestor.Claims, now time.Time) audit.Entry {
	return audit.Entry{
		Time: now, Kind: kind, CorrelationID: api.NewCorrelationID(),
		Cluster: c.Issuer, Namespace: c.Namespace, ServiceAccount: c.ServiceAccount, ServiceAccountUID: c.ServiceAccountUID,
		Pod: c.PodName, PodUID: c.PodUID, Node: c.NodeName, NodeUID: c.NodeUID, TokenID: c.TokenID,
	}
}

// attest checks evidence with the attestor of its kind.
func (ca *CA) attest(ctx context.Context, e attestor.Evidence, audience string, now time.Time) (attestor.Claims, error) {
	a, ok := ca.cfg.Attestors[e.Kind]
	if !ok {
		return attestor.Claims{}, api.E(api.EvidenceKind, "evidence of this kind is not accepted")
	}
	return a.Attest(ctx, e, audience, now)
}

// authorize decides whether this agent may have an SVID for the attested workload: same cluster, same node, one place for
// each token, and a pod that lives.
func (ca *CA) authorize(ctx context.Context, who asker, c attestor.Claims, volume string, k *known, now time.Time) error {
	if err := ca.refuseBanned(c.Issuer, c.NodeUID); err != nil {
		return err
	}
	if c.Issuer != who.issuer {
		return api.E(api.IssuerMismatch, "the workload's token comes from another cluster than the agent's")
	}
	if c.NodeUID == "" {
		return api.E(api.NodeUnverifiable, "the token does not say on which node its pod runs")
	}
	if c.NodeUID != who.nodeUID || c.NodeName != who.nodeName { // the name goes on record, so it must be true too
		return api.E(api.NodeMismatch, "the workload's pod runs on another node than the agent that asks")
	}
	if err := ca.checkPod(ctx, c, k, now); err != nil {
		return err
	}
	return ca.memory.bindToken(c.Issuer, c.TokenID, who.nodeUID, volume, c.ExpireAt)
}

func podID(c attestor.Claims) PodID {
	return PodID{Issuer: c.Issuer, UID: c.PodUID, Namespace: c.Namespace, Name: c.PodName}
}

// checkPod asks the directory whether the pod of the token lives and is the one it claims to be. Until its deletion time
// only renewals pass; after it nothing does, whether or not the object still exists. For a known renewal it is asked what it
// knew when it last saw the cluster.
func (ca *CA) checkPod(ctx context.Context, c attestor.Claims, k *known, now time.Time) error {
	if k != nil {
		return ca.checkRemembered(c, now)
	}
	if ca.cfg.Directory == nil {
		return nil
	}
	p, err := ca.cfg.Directory.Pod(ctx, podID(c))
	if err != nil {
		return err
	}
	return judgePod(p, c, now, ca.memory.holds(c.Issuer, c.PodUID, now))
}

// judgePod compares the token's pod with the one that the cluster knows. Holds says that it holds an SVID.
func judgePod(p Pod, c attestor.Claims, now time.Time, holds bool) error {
	if p.UID != c.PodUID || p.Namespace != c.Namespace || p.Name != c.PodName || p.ServiceAccount != c.ServiceAccount ||
		p.ServiceAccountUID != "" && p.ServiceAccountUID != c.ServiceAccountUID ||
		p.NodeUID != "" && p.NodeUID != c.NodeUID {
		return api.E(api.PodMismatch, "the token's pod is not the pod that the cluster knows")
	}
	if p.Finished {
		return api.E(api.PodDeleted, "the pod has finished")
	}
	if p.DeleteAt.IsZero() {
		return nil
	}
	if !now.Before(p.DeleteAt) {
		return api.E(api.PodDeleted, "the pod is deleted")
	}
	if !holds {
		return api.E(api.PodDeleted, "the pod is being deleted, so only an identity that it holds is renewed")
	}
	return nil
}
