package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

const (
	mintSkew     = time.Minute      // by which an upstream's clock may be ahead; what it signed is used once it is valid
	askAgain     = 10 * time.Minute // for which a request that failed is made again as it is, before it gets a new key
	maxAnnounced = 16               // roots that an upstream can announce; the rest is dropped
	probePause   = time.Minute

	firstMintPause, maxMintPause = 200 * time.Millisecond, time.Minute
)

// asking is a request for an intermediate and its key, which is nowhere else.
type asking struct {
	MintRequest
	key crypto.Signer
	at  time.Time
}

// request returns what to ask the root for: the request that failed a moment ago, as an upstream may have signed it already,
// or else a new one with a new key.
func (ca *CA) request(root journal.Authority, cert *x509.Certificate, notAfter, now time.Time) (*asking, error) {
	exclude := len(ca.cfg.Policy.DNSNames()) == 0 && issuance.CanExcludeNames(ca.cfg.TrustDomain)
	if r := ca.asking.Swap(nil); r != nil {
		if r.Root.ID == root.ID && now.Sub(r.at).Abs() < askAgain {
			return r, nil
		}
		ca.keys.begin(r.ID).close() // it is given up
	}
	key, err := issuance.GenerateKey(ca.cfg.Keys)
	if err != nil {
		return nil, err
	}
	csr, err := issuance.NewIntermediateCSR(ca.cfg.TrustDomain, key, exclude)
	if err != nil {
		return nil, err
	}
	if notAfter.After(cert.NotAfter) {
		notAfter = cert.NotAfter
	}
	return &asking{key: key, at: now, MintRequest: MintRequest{
		ID:           issuance.Fingerprint(key.Public()),
		TrustDomain:  ca.cfg.TrustDomain,
		Root:         root,
		CSR:          csr,
		NotAfter:     notAfter.Truncate(time.Second),
		ExcludeNames: exclude,
	}}, nil
}

// proveIssuer refuses a fresh intermediate under which the replica's own identity does not verify for whoever has its root,
// alone or among all that are trusted.
func (ca *CA) proveIssuer(s *signing, good *issuance.Intermediate, now time.Time) error {
	id, err := api.ReplicaID(ca.cfg.TrustDomain, ca.cfg.Replica)
	if err != nil {
		return err
	}
	chain := slices.Concat([]*x509.Certificate{s.self.Leaf}, good.Chain)
	for _, roots := range [][]*x509.Certificate{{good.Root}, ca.bundle.Load().Roots} {
		if err := issuance.Verify(chain, roots, id, now); err != nil {
			return api.Wrap(api.UpstreamProbe, err, "the CA's own identity does not verify under the intermediate: "+api.AsError(err).Detail)
		}
	}
	return nil
}

// mintPause is how long the upstream is left alone after it was asked in vain so many times in a row: from a fifth of a
// second to a minute, half of it by chance.
func mintPause(times int) time.Duration {
	d := min(firstMintPause<<min(max(times-1, 0), 16), maxMintPause)
	return d/2 + rand.N(d/2)
}

// noteVain counts that the upstream was asked in vain, or answered with what is no good.
func (ca *CA) noteVain(err error, now time.Time) Vain {
	v := Vain{Times: 1, At: now, Reason: api.ReasonOf(err)}
	if last := ca.vain.Load(); last != nil {
		v.Times += last.Times
	}
	ca.vain.Store(&v)
	return v
}

// recallVain returns for how long the upstream is to be left alone after a start.
func (ca *CA) recallVain(ctx context.Context, now time.Time) (time.Duration, error) {
	r, err := ReplicaOf(ctx, ca.cfg.Store, ca.cfg.Replica)
	if err != nil || r.Vain.Times == 0 {
		return 0, err
	}
	ca.vain.Store(&r.Vain)
	if since := now.Sub(r.Vain.At); since >= 0 && since < maxMintPause {
		return max(0, mintPause(r.Vain.Times)-since), nil
	}
	return 0, nil
}

// watchUpstream keeps the roots that the upstream announces.
func (ca *CA) watchUpstream(ctx context.Context) error {
	for failed := 1; ; failed++ {
		err := ca.cfg.Upstream.WatchRoots(ctx, func(roots []*x509.Certificate) {
			failed = 0
			ca.announce(ctx, roots)
		})
		if ctx.Err() != nil {
			return nil
		}
		pause := mintPause(failed + 1)
		ca.log.WarnContext(ctx, "the upstream does not tell its roots", "error", err, "retry_in", pause.String())
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// announce notes which of the upstream's roots are not in the record. They are shown, and nothing else: whom they would be
// trusted by is decided by a rotation.
func (ca *CA) announce(ctx context.Context, roots []*x509.Certificate) {
	var fresh []*x509.Certificate
	known := ca.record.Load().Authorities
	for _, c := range roots[:min(len(roots), maxAnnounced)] {
		if c == nil || slices.ContainsFunc(fresh, c.Equal) || slices.ContainsFunc(known, func(a journal.Authority) bool { return string(a.Certificate) == string(c.Raw) }) {
			continue
		}
		fresh = append(fresh, c)
		if !slices.ContainsFunc(ca.told.Load(), c.Equal) {
			ca.log.WarnContext(ctx, "the upstream announces a root that is not in the record; it is not used before a rotation",
				"root", fmt.Sprintf("%x", c.SubjectKeyId), "not_after", c.NotAfter)
		}
	}
	ca.metrics.rootsAnnounced.Set(float64(len(fresh)))
	ca.told.Set(fresh)
}

// announced are the roots that the upstream told of, without those that a rotation has taken up since.
func (ca *CA) announced() []*x509.Certificate {
	known := ca.record.Load().Authorities
	return slices.DeleteFunc(slices.Clone(ca.told.Load()), func(c *x509.Certificate) bool {
		return slices.ContainsFunc(known, func(a journal.Authority) bool { return string(a.Certificate) == string(c.Raw) })
	})
}

// AnnouncedRoots returns the roots that the upstream signs under and that are not in the record, and a channel that is closed
// when that changes. They are as the upstream told them: unchecked, and trusted by nobody.
func (ca *CA) AnnouncedRoots() ([]*x509.Certificate, <-chan struct{}) { return ca.told.Get() }

// ProbeUpstream reports whether the upstream would sign under the active root now, without any effect.
func (ca *CA) ProbeUpstream(ctx context.Context) error {
	j := ca.record.Load()
	if j.Schema == 0 {
		return api.E(api.CAUnavailable, "the CA is starting")
	}
	limited, cancel := context.WithTimeout(ctx, mintTime)
	defer cancel()
	return ca.cfg.Upstream.Probe(limited, ca.cfg.TrustDomain, j.ActiveAuthority())
}

// probed is what a probe of the upstream found.
type probed struct {
	at, since time.Time  // since when it is so
	err       *api.Error // nil: it would sign
}

// reason is why it would not sign; empty where it would, and before it was asked.
func (p *probed) reason() api.Reason {
	if p == nil || p.err == nil {
		return ""
	}
	return p.err.Reason
}

// noteProbe keeps what a probe found, and reports whether that is another reason than before.
func (ca *CA) noteProbe(err error, now time.Time) (changed bool) {
	p := &probed{at: now, since: now}
	if err != nil {
		p.err = api.AsError(err)
	}
	last := ca.probed.Load()
	if changed = last.reason() != p.reason(); last != nil && !changed {
		p.since = last.since
	}
	ca.probed.Store(p)
	up := 0.0
	if err == nil {
		up = 1
	}
	ca.metrics.upstreamUp.Set(up)
	return changed
}

// upstreamStatus is what people are told of the upstream.
func (ca *CA) upstreamStatus() *apiv1.UpstreamStatus {
	s := &apiv1.UpstreamStatus{Kind: ca.cfg.UpstreamKind}
	if p := ca.probed.Load(); p != nil {
		s.Healthy, s.Reason, s.ProbedAt, s.Since = p.err == nil, string(p.reason()), timeProto(p.at), timeProto(p.since)
		if p.err != nil {
			s.Detail = p.err.Detail
		}
	}
	for _, c := range ca.announced() {
		s.Announced = append(s.Announced, hexID(c))
	}
	if signing := ca.signing.Load(); signing != nil {
		s.IntermediateNotAfter = timeProto(signing.cert.NotAfter)
	}
	s.MintBudget, s.MintLeft = uint32(ca.cfg.MintBudget), uint32(ca.cfg.MintBudget)
	if own := ca.own.Load(); own != nil {
		s.MintLeft -= min(s.MintLeft, uint32(mintedLately(own.Minted, ca.record.Load().ActiveAuthority().ID, time.Now())))
	}
	return s
}

// probeUpstream asks now and then, and whenever it tells of its roots, whether the upstream would sign, so that its absence
// is known long before it is needed.
func (ca *CA) probeUpstream(ctx context.Context) error {
	for {
		_, told := ca.told.Get()
		err := ca.ProbeUpstream(ctx)
		if ctx.Err() != nil {
			return nil
		}
		switch changed := ca.noteProbe(err, time.Now()); {
		case !changed:
		case err != nil:
			ca.log.WarnContext(ctx, "the upstream would not sign", "reason", string(api.ReasonOf(err)), "error", err)
		default:
			ca.log.InfoContext(ctx, "the upstream would sign again")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-told:
		case <-time.After(probePause):
		}
	}
}

// CrossSign has the upstream sign the newer authority by the older one, on record, and checks what comes of it. It refuses
// for an older root that is suspected or no longer trusted: its trust would live on. The errors are those of
// CrossSigner.CrossSign; UpstreamCross where the upstream signs no roots, and for an answer that is not what was asked for.
func (ca *CA) CrossSign(ctx context.Context, older, newer journal.Authority) (*x509.Certificate, error) {
	up, ok := ca.cfg.Upstream.(CrossSigner)
	switch {
	case !ok:
		return nil, api.E(api.UpstreamCross, "the upstream does not sign roots")
	case older.State != journal.Active && older.State != journal.Retiring:
		return nil, api.E(api.UpstreamCross, "authority %s is %s, and one in this state vouches for no other", older.ID, older.State)
	case newer.State == journal.Tainted || newer.State == journal.Removed:
		return nil, api.E(api.UpstreamCross, "authority %s is %s, and nothing vouches for it", newer.ID, newer.State)
	}
	from, err := x509.ParseCertificate(older.Certificate)
	if err != nil {
		return nil, api.Wrap(api.StateCorrupt, err, "the older root's certificate does not parse")
	}
	to, err := x509.ParseCertificate(newer.Certificate)
	if err != nil {
		return nil, api.Wrap(api.StateCorrupt, err, "the newer root's certificate does not parse")
	}
	now := time.Now()
	e := audit.Entry{Time: now, Kind: audit.KindMint, CorrelationID: api.NewCorrelationID(), SPIFFEID: ca.cfg.TrustDomain.IDString(), NotAfter: to.NotAfter, Issuer: older.ID}
	if err := ca.cfg.Ledger.Append(ctx, e); err != nil {
		return nil, unrecorded(err, "the cross certificate could not be recorded, so it was not asked for")
	}
	limited, cancel := context.WithTimeout(ctx, mintTime)
	defer cancel()
	cross, err := up.CrossSign(limited, ca.cfg.TrustDomain, older, to)
	if err != nil {
		return nil, err
	}
	check := issuance.CrossCheck{TrustDomain: ca.cfg.TrustDomain, Cross: cross, Older: from, Newer: to}
	if err := issuance.CheckCross(check, now); err != nil {
		return nil, err
	}
	return cross, nil
}
