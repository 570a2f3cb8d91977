package ca

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

// The life of an intermediate: at least a day and four times the longest SVID, renewed at a third, so that two thirds of
// its life are left to get over an outage of the root.
const (
	minIntermediateTTL = 24 * time.Hour
	intermediateTTLs   = 4
	renewIntermediate  = 3
	mintTime           = 30 * time.Second // for the root to answer
)

// signing is all that is needed to sign: an intermediate whose key exists only in this process, and the identity of this
// replica under it. It is replaced whole, never changed.
type signing struct {
	issuer  *issuance.Issuer
	cert    *x509.Certificate // the intermediate
	root    string            // id of the authority above it
	cross   []byte            // the root's own cross certificate in its chain, DER; nil where there is none
	use     *keyUse           // of its key
	renewAt time.Time         // of the intermediate
	self    *tls.Certificate  // this replica's own identity
	selfEnd time.Time         // when self is due
}

// keepIntermediate has an intermediate minted at the start, at a third of its life, and when the active authority is
// another one; and keeps this replica's own identity fresh under it. It fails only when a write has an unknown outcome, or
// the seal key is another one, which no waiting mends: an upstream that is away costs nothing while the intermediate lives.
func (ca *CA) keepIntermediate(ctx context.Context) error {
	pause, err := ca.recallVain(ctx, time.Now())
	if err != nil {
		ca.log.WarnContext(ctx, "how often the upstream was asked in vain is not known", "error", err)
	}
	under := ca.record.Load().ActiveAuthority().ID
	for failed := 0; ; {
		if !ca.restSigning(ctx, pause, under) {
			return nil
		}
		under = ca.record.Load().ActiveAuthority().ID
		err := ca.refreshSigning(ctx, time.Now())
		switch {
		case ctx.Err() != nil:
			return nil
		case api.ReasonOf(err) == api.StateUnknown || api.ReasonOf(err) == api.SealKeyWrong:
			return err
		case err != nil:
			failed++
			if v := ca.vain.Load(); v != nil {
				failed = max(failed, v.Times)
			}
			pause = mintPause(failed)
			ca.unminted.Store(api.AsError(err))
			ca.metrics.mintFailures.Inc()
			ca.log.ErrorContext(ctx, "no new intermediate", "reason", string(api.ReasonOf(err)), "error", err, "retry_in", pause.String())
		default:
			failed = 0
			ca.unminted.Store(nil)
			s := ca.signing.Load()
			pause = min(max(time.Until(earlier(s.renewAt, s.selfEnd)), 100*time.Millisecond), signingLook)
		}
	}
}

// restSigning waits for what is due, and no longer than until another authority than that is the active one. It returns false
// when ctx has ended.
func (ca *CA) restSigning(ctx context.Context, pause time.Duration, under string) bool {
	due := time.NewTimer(pause)
	defer due.Stop()
	for {
		j, changed := ca.record.Get()
		if j.ActiveAuthority().ID != under {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-due.C:
			return true
		case <-changed:
		}
	}
}

// signingLook bounds the wait for what is due: the timers of a machine that slept, or whose clock was set, are late.
const signingLook = 20 * time.Second

// over reports whether a certificate is to be replaced: its time has come by either clock, or it is not valid yet, for it was
// made by a clock that has been set back since.
func over(c *x509.Certificate, at, now time.Time) bool {
	return elapsed(now, at) >= 0 || now.Before(c.NotBefore)
}

// refreshSigning mints what is due and installs it. When nothing could be minted, the old intermediate goes on, and so does
// the replica's own identity under it.
func (ca *CA) refreshSigning(ctx context.Context, now time.Time) error {
	j, s := ca.record.Load(), ca.signing.Load()
	var failed error
	active := j.ActiveAuthority()
	if s == nil || over(s.cert, s.renewAt, now) || s.root != active.ID || !bytes.Equal(s.cross, crossOf(active, now)) {
		fresh, err := ca.mint(ctx, now)
		if err != nil && (s == nil || api.ReasonOf(err) == api.StateUnknown) {
			return err
		}
		if failed = err; err == nil {
			ca.signing.Set(fresh)
			ca.metrics.setIntermediate(fresh.cert)
			if s != nil {
				ca.endKey(ctx, s.use)
			}
			return nil
		}
	}
	if !over(s.self.Leaf, s.selfEnd, now) {
		return failed
	}
	self, err := ca.identify(ctx, s, now)
	if err != nil {
		return errors.Join(failed, err)
	}
	ca.signing.Set(self)
	return failed
}

// endKey waits until nobody signs with a key any more, whose last reference then is gone: the one to follow is in its place already.
func (ca *CA) endKey(ctx context.Context, u *keyUse) {
	select {
	case <-u.close():
		ca.evidence.Set(struct{}{})
	case <-ctx.Done():
	}
}

// crossOf returns what chains under an authority carry besides: itself signed by the one before it, while that is valid.
func crossOf(a journal.Authority, now time.Time) []byte {
	if len(a.Cross) == 0 {
		return nil
	}
	if c, err := x509.ParseCertificate(a.Cross); err != nil || !now.Before(c.NotAfter) || now.Before(c.NotBefore) {
		return nil
	}
	return a.Cross
}

// mintTries is how often an intermediate is asked for anew because another authority became the active one meanwhile.
const mintTries = 3

// mint is mintOnce, again where what came of it is under a root that is not the active one any more.
func (ca *CA) mint(ctx context.Context, now time.Time) (*signing, error) {
	for try := 1; ; try++ {
		s, err := ca.mintOnce(ctx, now)
		if !errors.Is(err, errRootChanged) || try == mintTries {
			return s, err
		}
		now = time.Now()
	}
}

// errRootChanged says that another authority became the active one while an intermediate was asked for.
var errRootChanged error = api.E(api.StateConflict, "another root became the active one while an intermediate was asked for")

// mintOnce asks the root for an intermediate, and issues this replica's own identity under it: the first leaf that it signs
// is the proof that it can. Its lifetime is in the record before it is asked for, and the record bounds how many are asked
// for in an hour, over restarts too. Once it is booked the shared record is read again: either the root is still the active one,
// or whoever made another the active one finds what was booked before he removes this one.
func (ca *CA) mintOnce(ctx context.Context, now time.Time) (fresh *signing, err error) {
	j := ca.record.Load()
	root := j.ActiveAuthority()
	rootCert, err := x509.ParseCertificate(root.Certificate)
	if err != nil {
		return nil, err
	}
	longest := max(ca.cfg.Policy.MaxTTL(), ca.cfg.AgentTTL)
	ask, err := ca.request(root, rootCert, now.Add(max(minIntermediateTTL, intermediateTTLs*longest)), now)
	if err != nil {
		return nil, err
	}
	use := ca.keys.begin(ask.ID)
	defer func() {
		if err != nil && ca.asking.Load() != ask { // it is given up, and its key with it
			use.close()
		}
	}()
	if err := ca.bookMint(ctx, Minted{ID: ask.ID, At: now, NotAfter: ask.NotAfter, Root: root.ID, Longest: longest}); err != nil {
		return nil, err
	}
	if err := ca.stillActive(ctx, root.ID); err != nil {
		return nil, err
	}
	chain, err := ca.askRoot(ctx, ask, now)
	if err != nil {
		return nil, err
	}
	fresh, err = ca.accept(ctx, ask, chain, j, rootCert, longest, now)
	if err == nil && ca.record.Load().ActiveAuthority().ID != root.ID {
		return nil, errRootChanged
	}
	if err != nil {
		ca.metrics.mintRefusals.WithLabelValues(string(api.ReasonOf(err))).Inc()
		ca.noteVain(err, now)
		return nil, err
	}
	ca.vain.Store(nil)
	ca.log.InfoContext(ctx, "intermediate minted", "issuer", fmt.Sprintf("%x", fresh.cert.SubjectKeyId), "root", root.ID, "not_after", fresh.cert.NotAfter)
	return fresh, nil
}

// stillActive reads the shared record again, and fails where another authority is the active one by now.
func (ca *CA) stillActive(ctx context.Context, root string) error {
	if err := ca.reload(ctx); err != nil {
		return err
	}
	if ca.record.Load().ActiveAuthority().ID != root {
		return errRootChanged
	}
	return nil
}

// accept makes what was asked for of what the root answered, if it is that.
func (ca *CA) accept(ctx context.Context, ask *asking, chain []*x509.Certificate, j journal.Journal, root *x509.Certificate, longest time.Duration, now time.Time) (*signing, error) {
	inUse, err := j.Roots()
	if err != nil {
		return nil, err
	}
	if s := ca.signing.Load(); s != nil {
		inUse = append(inUse, s.cert)
	}
	good, err := issuance.CheckIntermediate(issuance.IntermediateCheck{
		TrustDomain: ca.cfg.TrustDomain,
		PublicKey:   ask.key.Public(),
		Chain:       chain,
		Roots:       []*x509.Certificate{root},
		Authorities: inUse,
		MinLifetime: issuance.LeastLife(longest, root, now),
		Skew:        mintSkew,
		DNSNames:    ca.cfg.Policy.DNSNames(),
	}, now)
	if err != nil {
		return nil, err
	}
	for _, w := range good.Warnings {
		ca.log.WarnContext(ctx, "intermediate accepted with a weakness", "weakness", string(w), "detail", w.Text())
	}
	if early := good.NotBefore.Sub(now); early > 0 { // by the upstream's clock; for others it is not valid before
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(early):
			now = good.NotBefore
		}
	}
	cross := crossOf(j.ActiveAuthority(), now)
	chain, err = withCross(good.Chain, cross)
	if err != nil {
		return nil, err
	}
	issuer, err := issuance.NewIssuer(ca.cfg.TrustDomain, chain, good.Root, ask.key)
	if err != nil {
		return nil, err
	}
	s, err := ca.identify(ctx, &signing{
		issuer:  issuer,
		cert:    issuer.Certificate(),
		root:    ask.Root.ID,
		cross:   cross,
		use:     ca.keys.begin(ask.ID),
		renewAt: now.Add(issuer.NotAfter().Sub(now) / renewIntermediate),
	}, now)
	if err != nil {
		return nil, err
	}
	return s, ca.proveIssuer(s, good, now)
}

// withCross returns a chain with the root's own cross certificate at its end, if there is one.
func withCross(chain []*x509.Certificate, cross []byte) ([]*x509.Certificate, error) {
	if cross == nil {
		return chain, nil
	}
	c, err := x509.ParseCertificate(cross)
	if err != nil {
		return nil, api.Wrap(api.StateCorrupt, err, "the root's cross certificate does not parse")
	}
	return slices.Concat(chain, []*x509.Certificate{c}), nil
}

// askRoot puts the request on record and makes it. What fails is taken off the budget: a root that is away for an hour must
// not cost a second one. The request is kept, and is booked again before it is made again.
func (ca *CA) askRoot(ctx context.Context, r *asking, now time.Time) ([]*x509.Certificate, error) {
	e := audit.Entry{Time: now, Kind: audit.KindMint, CorrelationID: api.NewCorrelationID(), SPIFFEID: r.TrustDomain.IDString(), NotAfter: r.NotAfter, Issuer: r.Root.ID}
	if err := ca.cfg.Ledger.Append(ctx, e); err != nil {
		return nil, unrecorded(err, "the intermediate could not be recorded, so it was not asked for")
	}
	limited, cancel := context.WithTimeout(ctx, mintTime)
	defer cancel()
	chain, err := ca.cfg.Upstream.Mint(limited, r.MintRequest)
	if err != nil {
		ca.asking.Store(r)
		ca.metrics.mintRefusals.WithLabelValues(string(api.ReasonOf(err))).Inc()
		if berr := ca.unbookMint(ctx, ca.noteVain(err, now)); berr != nil {
			return nil, errors.Join(berr, err)
		}
		return nil, err
	}
	return chain, nil
}

// bookMint writes down that an intermediate may exist; MintBudget when too many were asked for under its root in the last hour.
// What a clock that was wrong has put into the future does not count. Nor does what is under another root: who asks again and again
// asks the active one, and a rotation, least of all an emergency, never waits for what was spent under the root that goes.
func (ca *CA) bookMint(ctx context.Context, m Minted) error {
	ca.replica.Lock()
	defer ca.replica.Unlock()
	r, err := ReplicaOf(ctx, ca.cfg.Store, ca.cfg.Replica)
	if err != nil {
		return err
	}
	j, kept, recent := ca.record.Load(), r.Minted[:0:0], mintedLately(r.Minted, m.Root, m.At)
	for _, old := range r.Minted {
		if old.NotAfter.After(m.At) && j.Has(old.Root) { // one that was removed is trusted by nobody and never asked again
			kept = append(kept, old)
		}
	}
	if recent >= ca.cfg.MintBudget {
		ca.own.Store(&r) // as it is stored, for people to see what is spent
		return api.E(api.MintBudget, "%d intermediates were minted under this root in the last hour, the budget is %d", recent, ca.cfg.MintBudget)
	}
	r.Minted, r.Vain = append(ca.keysOf(kept), m), Vain{}
	ca.own.Store(&r)
	if err := ca.cfg.Store.SaveReplica(ctx, r); err != nil {
		return err
	}
	ca.keys.forget(r.Minted) // now that it is stored what has become of them
	return nil
}

// mintedLately counts those under a root that were booked within an hour of now.
func mintedLately(all []Minted, root string, now time.Time) (n int) {
	for _, m := range all {
		if m.Root == root && now.Sub(m.At).Abs() < time.Hour {
			n++
		}
	}
	return n
}

// unbookMint takes back what was booked when the upstream was asked in vain, and writes that down instead.
func (ca *CA) unbookMint(ctx context.Context, v Vain) error {
	ca.replica.Lock()
	defer ca.replica.Unlock()
	r, err := ReplicaOf(ctx, ca.cfg.Store, ca.cfg.Replica)
	if err != nil {
		return err
	}
	r.Minted = slices.DeleteFunc(r.Minted, func(m Minted) bool { return m.At.Equal(v.At) })
	if v.Reason != api.SealKeyWrong { // the right one works at once
		r.Vain = v
	}
	ca.own.Store(&r)
	return ca.cfg.Store.SaveReplica(ctx, r)
}

// identify returns s with a fresh identity of this replica, signed by its own intermediate: the server certificate by
// which agents know their CA.
func (ca *CA) identify(ctx context.Context, s *signing, now time.Time) (*signing, error) {
	id, err := api.ReplicaID(ca.cfg.TrustDomain, ca.cfg.Replica)
	if err != nil {
		return nil, err
	}
	key, err := issuance.GenerateKey(ca.cfg.Keys)
	if err != nil {
		return nil, err
	}
	p, err := issuance.Prepare(issuance.Profile{}, issuance.Request{ID: id, PublicKey: key.Public()}, s.issuer, now)
	if err != nil {
		return nil, err
	}
	e := audit.Entry{Time: now, Kind: audit.KindIssue, CorrelationID: api.NewCorrelationID(), SPIFFEID: id.String()}
	next := *s
	// Nobody else holds it, and it goes with its intermediate: no removal of the root waits until it would expire.
	s = new(next)
	s.use = newKeyUse()
	issued, err := ca.recordAndSign(ctx, s, p, &e)
	if err != nil {
		return nil, err
	}
	next.self = &tls.Certificate{Certificate: issued.Chain, PrivateKey: key, Leaf: issued.Leaf}
	next.selfEnd = issued.RenewAt
	return &next, nil
}

// signer returns what to sign with now, in use until leave is called on it; SignerUnavailable when there is nothing.
func (ca *CA) signer(now time.Time) (*signing, error) {
	for {
		s := ca.signing.Load()
		if s == nil || !now.Before(s.cert.NotAfter) {
			return nil, api.E(api.SignerUnavailable, "the CA has no intermediate to sign with")
		}
		if s.use.enter() {
			return s, nil
		} // its successor was there before its end
	}
}

// leave ends the use that signer began.
func (s *signing) leave() { s.use.leave() }

// ServerTLS returns the TLS configuration of the agents' port: TLS 1.3 alone, this replica's newest identity, and a
// client certificate that, where there is one, must verify against the bundle as it is now. Session tickets are off: a
// resumed session would skip that check.
func (ca *CA) ServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ClientAuth:             tls.RequestClientCert,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2"},
		GetCertificate:         ca.waitSelf,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil // AttestAgent needs none; every other call refuses
			}
			_, err := ca.verifyPeer(cs.PeerCertificates, time.Now())
			if err != nil { // the client sees a TLS alert only
				ca.metrics.refusals.WithLabelValues(string(api.ReasonOf(err))).Inc()
				ca.log.Debug("client certificate refused", "error", err, "cause", errors.Unwrap(err))
			}
			return err
		},
	}
}

// waitSelf returns this replica's newest identity. In the first moments after a start it waits for it, so that an agent
// that is quick is not sent away; the handshake's own deadline bounds the wait.
func (ca *CA) waitSelf(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	for {
		s, changed := ca.signing.Get()
		if s != nil {
			return s.self, nil
		}
		select {
		case <-changed:
		case <-ca.stopping:
			return nil, errors.New("the CA is stopping")
		case <-hello.Context().Done():
			return nil, hello.Context().Err()
		case <-time.After(handshakeTime):
			return nil, errors.New("the CA has no identity yet")
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// jitter returns a duration drawn evenly from [3/4 d, d).
func jitter(d time.Duration) time.Duration {
	return d - time.Duration(rand.Int64N(int64(d/4)+1))
}
