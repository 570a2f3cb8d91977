package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/internal/latest"
)

// Pod names the pod that an identity belongs to.
type Pod struct{ Namespace, Name, UID string }

// Held is what an agent holds for a pod at one moment.
type Held struct {
	SVID    *x509svid.SVID // nil while it is on its way or refused, and after it expired
	RenewAt time.Time
	Refusal *api.Error // the last attempt's failure; nil after a success

	ticket string // came with SVID; empty where it has none

	waits bool // for what comes by itself: a session, or kubelet's next token. So it is no refusal, and what came ends the wait
}

// Refused returns why a pod that holds nothing will not get anything either; nil while an identity is held or on its way,
// however long the CA is away.
func (h Held) Refused() *api.Error {
	if h.SVID == nil && !h.waits && final(h.Refusal) {
		return h.Refusal
	}
	return nil
}

// final reports whether a refusal is about the workload, so that waiting would not help it. The agent's own troubles never
// are: see link.issue.
func final(e *api.Error) bool {
	if e == nil {
		return false
	}
	switch e.Reason.Kind() {
	case api.KindInvalid, api.KindUnauthenticated, api.KindPermissionDenied:
		return true
	}
	return false
}

// aboutToken reports whether a refusal is about the one token that came, and says nothing of the next.
func aboutToken(e *api.Error) bool {
	return e != nil && e.Reason.Kind() == api.KindUnauthenticated
}

// Identity is the identity of one pod, kept fresh while its pod lives.
type Identity struct {
	agent *Agent
	key   podKey
	pod   Pod
	held  latest.Value[Held] // written with mu held, so that no change is lost
	wake  chan struct{}      // holds one token: a fresh proof was offered
	began time.Time          // when it was asked for
	given atomic.Bool        // it has held an SVID
	stop  context.CancelFunc // ends its keeper; guarded by agent.mu, nil before Run
	alone bool               // see link.unanswered; its keeper's
	again int                // how often in a row it was given an SVID that is to be replaced at once; its keeper's

	mu      sync.Mutex // guards what follows
	proof   proof
	streams map[uint64]*apiv1.Stream
	// ended is the last stream that ended without an answer to the bundle that it was given, or as the only one with a bundle, until a
	// later one has acknowledged that bundle; nil while there is none. It is told of until endedUntil, or for ever where that is zero.
	ended      *apiv1.Stream
	endedUntil time.Time

	volumes  int  // of its pod, each from Offer to Release: kubelet keeps bringing tokens as long as there is one
	released bool // there were volumes, and all are gone

	cacheMu sync.Mutex // guards what follows; held while its entry in the cache is written or removed
	dropped bool       // it is kept no more, and has no entry any more
}

// proof is a token, and where on the node it was delivered.
type proof struct {
	evidence attestor.Evidence
	volume   string
	end      time.Time // when it expires
	n        int       // counts the proofs of an identity
}

// Bounds of what the CA hears of the streams of one identity. It ends the session of an agent that says more than 128 KiB of
// one pod, so no pod may make its agent do so.
const (
	maxReportedStreams = 64
	maxReportedNames   = 1024 // bytes of the names of one stream
)

func newIdentity(k podKey, p Pod, a *Agent) *Identity {
	return &Identity{agent: a, key: k, pod: p, wake: make(chan struct{}, 1), began: time.Now(), streams: map[uint64]*apiv1.Stream{}}
}

// Pod returns whose identity it is.
func (id *Identity) Pod() Pod { return id.pod }

// Held follows what is held.
func (id *Identity) Held() *latest.Value[Held] { return &id.held }

// Report takes over what a client of this identity has acknowledged; nil removes the stream. The number is that stream's
// alone among all of this identity, over whichever socket they came. Of its names the CA hears the first KiB.
func (id *Identity) Report(stream uint64, s *apiv1.Stream) {
	size := 0
	for i, name := range s.GetNames() {
		if size += len(name); size > maxReportedNames {
			s = proto.CloneOf(s)
			s.Names = s.Names[:i]
			break
		}
	}
	id.mu.Lock()
	if s == nil {
		id.end(id.streams[stream])
		delete(id.streams, stream)
	} else {
		id.streams[stream] = s
		switch e := id.ended; {
		case e == nil:
		case e.GetId() == 0: // restored, and whatever comes first says what there is
			id.ended = nil
		case s.GetWantsBundle() && s.GetId() > e.GetId() && s.GetAckedGeneration() >= e.GetPushedGeneration():
			id.ended = nil
		}
	}
	released := id.released
	id.mu.Unlock()
	id.agent.touch()
	if s == nil && released {
		id.drop()
	}
}

// reconnects is how long a client that goes on may take until its next stream: Envoy tries again after 30 s at most, whatever its
// stream has ended of.
const reconnects = 35 * time.Second

// end notes that a stream has ended. What it owes an answer to is not forgotten with it: a client that takes no bundle and
// reconnects for ever would be one that has nothing to acknowledge. Nor is the last one that had a bundle and owes nothing, for the
// time that its client may take until its next: meanwhile it still verifies by that bundle. The caller holds mu.
func (id *Identity) end(s *apiv1.Stream) {
	if !s.GetWantsBundle() {
		return
	}
	owes := s.GetAckedGeneration() < s.GetPushedGeneration()
	for _, other := range id.streams {
		switch {
		case other == s || !other.GetWantsBundle():
		case !owes, other.GetId() > s.GetId() && other.GetAckedGeneration() >= s.GetPushedGeneration():
			return
		}
	}
	if !owes && id.ended != nil && id.endedUntil.IsZero() {
		return // that one is told of already, and owes something
	}
	id.ended, id.endedUntil = proto.CloneOf(s), time.Time{}
	id.ended.Ended = true
	if !owes {
		id.endedUntil = time.Now().Add(reconnects)
	}
}

// gone forgets a stream that ended and did not come back, and reports whether it did.
func (id *Identity) gone(now time.Time) bool {
	id.mu.Lock()
	defer id.mu.Unlock()
	if id.ended == nil || id.endedUntil.IsZero() || now.Before(id.endedUntil) {
		return false
	}
	id.ended = nil
	return true
}

// offer hands over a proof; one that expires later replaces an earlier one. What was said of the earlier token is not true
// of it: a refusal for its sake is forgotten, and the next attempt follows at once.
func (id *Identity) offer(e attestor.Evidence, end time.Time, volume string) {
	id.mu.Lock()
	defer id.mu.Unlock()
	if end.After(id.proof.end) {
		id.take(e, end, volume)
	}
}

// take is offer without a choice; the caller holds mu.
func (id *Identity) take(e attestor.Evidence, end time.Time, volume string) {
	id.proof = proof{evidence: e, volume: volume, end: end, n: id.proof.n + 1}
	if h := id.held.Load(); aboutToken(h.Refusal) {
		id.held.Set(Held{SVID: h.SVID, ticket: h.ticket, RenewAt: time.Now()})
	}
	select {
	case id.wake <- struct{}{}:
	default:
	}
}

// newest returns the newest proof; ok is false when it has expired.
func (id *Identity) newest(now time.Time) (p proof, ok bool) {
	id.mu.Lock()
	defer id.mu.Unlock()
	return id.proof, now.Before(id.proof.end)
}

// set replaces what is held by what f makes of it.
func (id *Identity) set(f func(Held) Held) {
	id.mu.Lock()
	defer id.mu.Unlock()
	id.held.Set(f(id.held.Load()))
}

// idle reports whether nobody uses the identity and nothing can renew it: its pod is gone.
func (id *Identity) idle(now time.Time) bool {
	id.mu.Lock()
	defer id.mu.Unlock()
	return id.volumes == 0 && len(id.streams) == 0 && !now.Before(id.proof.end) && id.held.Load().SVID == nil
}

// keep renews one identity until its pod is gone or ctx ends. A failure keeps the last good SVID and backs off with
// jitter, for this identity alone; a fresh proof ends the wait for one. It decides when; how is renew's matter, which is
// Agent.renew but where a test lets months pass.
func (a *Agent) keep(ctx context.Context, id *Identity, renew func(context.Context, *Identity, proof) error) {
	b := a.newBackoff()
	for ctx.Err() == nil {
		now := time.Now()
		h := id.held.Load()
		if h.SVID != nil && !now.Before(h.SVID.Certificates[0].NotAfter) {
			a.expire(id, h)
			continue
		}
		if id.idle(now) && a.forget(id) {
			return
		}
		if id.gone(now) {
			a.touch()
		}
		wait := until(h.RenewAt, now)
		if wait <= 0 {
			p, ok := id.newest(now)
			switch {
			case ok || id.renewable(h):
				err := renew(ctx, id, p)
				if ctx.Err() != nil {
					return
				}
				if err == nil {
					b.Reset()
				} else {
					a.failed(id, p, err, a.pause(b, err))
				}
				continue
			case !final(h.Refusal):
				a.failed(id, p, api.E(api.TokenExpired, "the workload's token has expired; a fresh one comes with its next stream or from kubelet"), 0)
				continue
			}
			wait = maxSleep // only a fresh proof helps, and it wakes the keeper
		}
		if h.SVID != nil { // never sleep over the end of what is held
			wait = min(wait, time.Until(h.SVID.Certificates[0].NotAfter))
		}
		if a.sleep(ctx, id, h, min(wait, maxSleep)) {
			id.set(func(h Held) Held { h.RenewAt = time.Now(); return h })
		}
	}
}

// sleep waits until a fresh proof is offered, and no longer than wait. It ends with true when there is a session for an
// identity that holds nothing and failed for want of one: its pod waits for it, and the sessions of a fleet do not come
// back all at once.
func (a *Agent) sleep(ctx context.Context, id *Identity, h Held, wait time.Duration) (session bool) {
	var linked <-chan struct{}
	if h.SVID == nil && h.waits && h.Refusal.Reason == api.CAUnavailable {
		l, changed := a.link.Get()
		if l != nil {
			return true
		}
		linked = changed
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-id.wake:
	case <-linked:
	}
	return false
}

// newBackoff returns delays from half of MinBackoff up to MaxBackoff.
func (a *Agent) newBackoff() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.RandomizationFactor = 0.5
	b.InitialInterval, b.MaxInterval = a.cfg.MinBackoff, a.cfg.MaxBackoff*2/3 // to which half is added at most
	return b
}

// pause is how long an identity waits after a failure, unless the CA says that it shall be longer. One that was sent away
// because the CA has too much to do comes back when the CA says, and not later each time: its place is promised. What is no
// time worth a promise is none: for ever would all who are sent away ask a few times a second.
func (a *Agent) pause(b *backoff.ExponentialBackOff, err error) time.Duration {
	if e := api.AsError(err); e.Reason == api.Overloaded && e.RetryAfter >= time.Second {
		return a.cfg.MinBackoff
	}
	return b.NextBackOff()
}

// maxRetryAfter bounds what the CA can ask for: it must not be able to put an agent to sleep.
const maxRetryAfter = 5 * time.Minute

// failed notes a failure with a proof, and when the next try is due. What is held stays; a workload that has nothing learns
// the reason, unless it is only that the CA is away: then it waits.
func (a *Agent) failed(id *Identity, p proof, err error, wait time.Duration) {
	e := api.AsError(err)
	a.metrics.renewals.WithLabelValues("failed").Inc()
	left := "none"
	id.set(func(h Held) Held {
		wait = max(wait, min(e.RetryAfter, maxRetryAfter))
		if h.SVID != nil {
			until := time.Until(h.SVID.Certificates[0].NotAfter)
			left = until.Round(time.Second).String()
			wait = min(wait, max(a.cfg.MinBackoff, until/2)) // what is held must not end for it, whoever chose it
		}
		if aboutToken(e) && id.proof.n != p.n { // there is a newer token already
			return Held{SVID: h.SVID, ticket: h.ticket, RenewAt: time.Now()}
		}
		waits := errors.Is(err, errNoSession) || e.Reason == api.TokenExpired && id.volumes > 0
		return Held{SVID: h.SVID, ticket: h.ticket, RenewAt: time.Now().Add(wait), Refusal: e, waits: waits}
	})
	a.log.Warn("identity not renewed, keeping what is held", attrs(e, "pod", id.pod.Namespace+"/"+id.pod.Name, "held_for", left, "retry_in", wait.String())...)
	a.touch()
}

// attrs returns what the log says of an error, and more. The cause is told where the detail does not hold it already.
func attrs(e *api.Error, more ...any) []any {
	all := []any{"reason", string(e.Reason), "detail", e.Detail}
	if e.Err != nil && !strings.Contains(e.Err.Error(), e.Detail) {
		all = append(all, "cause", e.Err.Error())
	}
	if e.CorrelationID != "" {
		all = append(all, "correlation_id", e.CorrelationID)
	}
	return append(all, more...)
}

// expire drops an SVID whose time is over: it is never served.
func (a *Agent) expire(id *Identity, h Held) {
	a.log.Error("identity expired", "pod", id.pod.Namespace+"/"+id.pod.Name, "spiffe_id", h.SVID.ID.String())
	a.metrics.expired.Inc()
	id.set(func(h Held) Held { return Held{RenewAt: h.RenewAt, Refusal: h.Refusal, waits: h.waits} })
	a.uncache(id, false)
	a.touch()
}

// renew obtains one SVID with a fresh key and installs it, after it was checked against the bundle that is held. It does
// not wait beyond the end of the SVID that it replaces, which must not be served then.
func (a *Agent) renew(ctx context.Context, id *Identity, p proof) error {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.IssueTimeout)
	defer cancel()
	if old := id.held.Load().SVID; old != nil {
		ctx, cancel = context.WithDeadline(ctx, old.Certificates[0].NotAfter)
		defer cancel()
	}
	l, err := a.acquire(ctx)
	if err != nil {
		return err
	}
	defer l.calls.Done()
	key, csr, err := newKey()
	if err != nil {
		return err
	}
	item := &apiv1.IssueItem{
		Evidence: &apiv1.Evidence{Kind: p.evidence.Kind, Data: p.evidence.Data}, Csr: csr, Volume: p.volume, HoldsUntil: &timestamppb.Timestamp{},
	}
	h, until := id.held.Load(), time.Time{}
	if h.SVID != nil {
		until = h.SVID.Certificates[0].NotAfter
		item.HoldsUntil = timestamppb.New(until)
	}
	if id.renewable(h) {
		if item.Renewal, err = renewal(h.SVID, h.ticket, csr); err != nil {
			return err
		}
	}
	x := newAsk(ctx, item, until, time.Now())
	x.alone = id.alone
	got, err := l.issue(ctx, x)
	id.alone = l.unanswered(x, err)
	if err != nil {
		return err
	}
	svid, err := a.accept(got.GetChain(), key)
	if err != nil {
		return err
	}
	if api.IsReserved(svid.ID) || svid.ID.String() != got.GetSpiffeId() {
		return api.E(api.SVIDRejected, "the CA answered with another identity than it said")
	}
	h = Held{SVID: svid, ticket: string(a.ticket(got.GetTicket(), svid.ID.String())), RenewAt: renewAt(got.GetRenewAt(), svid.Certificates[0], time.Now())}
	id.set(func(Held) Held { return h })
	h = a.replaceAtOnce(id, h)
	if !id.given.Swap(true) {
		a.metrics.first.Observe(time.Since(id.began).Seconds())
	}
	a.metrics.renewals.WithLabelValues("ok").Inc()
	a.cacheIdentity(id, h)
	a.touch()
	a.log.Info("identity renewed", "pod", id.pod.Namespace+"/"+id.pod.Name, "spiffe_id", svid.ID.String(),
		"serial", serial(svid), "not_after", svid.Certificates[0].NotAfter, "renew_at", h.RenewAt)
	return nil
}

// ticket returns what came with an SVID of that ID, or nil where it is larger than any CA reads: all requests that it goes with
// would fail for it.
func (a *Agent) ticket(came []byte, id string) []byte {
	if len(came) <= api.MaxTicketBytes {
		return came
	}
	a.log.Warn("the CA's ticket is too large, doing without", "spiffe_id", id, "bytes", len(came), "most", api.MaxTicketBytes)
	return nil
}

// newKey returns a fresh P-256 key and a CSR that names nothing: identity comes from attestation.
func newKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return key, csr, err
}

// accept checks what came from the CA: that it is for our key, and all that check does.
func (a *Agent) accept(chain [][]byte, key *ecdsa.PrivateKey) (*x509svid.SVID, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	svid, err := a.check(chain, der, now)
	if err != nil {
		if certs, perr := parseChain(chain); perr == nil {
			if e := a.clockSkew(certs, "what the CA has just issued", now); e != nil {
				return nil, e
			}
		}
		return nil, api.Wrap(api.SVIDRejected, err, fmt.Sprintf("the SVID that came back is not acceptable: %v", err))
	}
	return svid, nil
}

// maxChain bounds the certificates of an SVID; a rotation has three.
const maxChain = 8

// check parses an SVID: a SPIFFE leaf of our trust domain with a path (SPIFFE X509-SVID sections 2 to 5) for that key, and
// authorities of which each issued the one before. It must verify now under the bundle that is held, the very one that
// workloads get.
func (a *Agent) check(chain [][]byte, key []byte, now time.Time) (*x509svid.SVID, error) {
	if len(chain) > maxChain {
		return nil, fmt.Errorf("the chain has %d certificates, at most %d are allowed", len(chain), maxChain)
	}
	svid, err := x509svid.ParseRaw(slices.Concat(chain...), key)
	if err != nil {
		return nil, err
	}
	// Order is a matter of names; the signatures are verified once, by Verify.
	for i, c := range svid.Certificates[1:] {
		if !bytes.Equal(svid.Certificates[i].RawIssuer, c.RawSubject) {
			return nil, errors.New("the chain is not in order")
		}
	}
	if last := svid.Certificates[len(svid.Certificates)-1]; bytes.Equal(last.RawIssuer, last.RawSubject) {
		return nil, errors.New("the root is in the chain")
	}
	if _, _, err := x509svid.Verify(svid.Certificates, a.trust.Load().Bundle, x509svid.WithTime(now)); err != nil {
		return nil, err
	}
	if _, err := api.ParseWorkloadID(svid.ID.String()); err != nil {
		return nil, err
	}
	return svid, nil
}

// renewAt takes the CA's renewal time where it makes sense, and half of what is left where it does not. It is told by both
// clocks: see until.
func renewAt(t *timestamppb.Timestamp, leaf *x509.Certificate, now time.Time) time.Time {
	if at := t.AsTime(); t.IsValid() && at.After(now) && at.Before(leaf.NotAfter) {
		return now.Add(at.Sub(now))
	}
	return now.Add(leaf.NotAfter.Sub(now) / 2)
}

func serial(s *x509svid.SVID) string {
	return hex.EncodeToString(s.Certificates[0].SerialNumber.Bytes())
}

// holding is what the CA hears of an identity.
func (id *Identity) holding() *apiv1.Holding {
	h := id.held.Load()
	p := &apiv1.Holding{
		Key:       id.key.issuer + "/" + id.key.podUID + "/" + id.key.serviceAccountUID,
		Namespace: id.pod.Namespace, PodName: id.pod.Name, PodUid: id.pod.UID,
	}
	if h.SVID != nil {
		leaf := h.SVID.Certificates[0]
		p.SpiffeId, p.Serial = h.SVID.ID.String(), serial(h.SVID)
		p.NotBefore, p.NotAfter = timestamppb.New(leaf.NotBefore), timestamppb.New(leaf.NotAfter)
		p.RenewAt, p.IssuerKeyId = timestamppb.New(h.RenewAt), hex.EncodeToString(leaf.AuthorityKeyId)
		p.RootKeyId = rootAbove(h.SVID.Certificates, id.agent.trust.Load().Bundle.X509Authorities())
	}
	if h.Refusal != nil {
		p.LastError = string(h.Refusal.Reason)
	}
	id.mu.Lock()
	defer id.mu.Unlock()
	numbers := slices.Sorted(maps.Keys(id.streams))
	room := maxReportedStreams
	if id.ended != nil {
		room--
	}
	for _, n := range numbers[max(0, len(numbers)-room):] {
		p.Streams = append(p.Streams, id.streams[n])
	}
	if id.ended != nil {
		p.Streams = append(p.Streams, id.ended)
	}
	return p
}
