package agent

import (
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
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
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
}

// Refused returns why a pod that holds nothing will not get anything either; nil while an identity is held or on its way,
// however long the CA is away.
func (h Held) Refused() *api.Error {
	if h.SVID != nil || h.Refusal == nil {
		return nil
	}
	switch h.Refusal.Reason.Kind() {
	case api.KindInvalid, api.KindUnauthenticated, api.KindPermissionDenied:
		return h.Refusal
	}
	return nil
}

// Identity is the identity of one pod, kept fresh while its pod lives.
type Identity struct {
	agent *Agent
	key   podKey
	pod   Pod
	held  latest.Value[Held]
	wake  chan struct{} // holds one token: a fresh proof was offered

	mu          sync.Mutex // guards what follows
	evidence    attestor.Evidence
	evidenceEnd time.Time
	volume      string
	streams     map[uint64]*apiv1.Stream
}

// signer obtains one SVID from the CA. It blocks while there is no session, and returns the CA's refusal as *api.Error.
type signer interface {
	issue(ctx context.Context, item *apiv1.IssueItem) (*apiv1.SVID, error)
}

func newIdentity(k podKey, p Pod, a *Agent) *Identity {
	return &Identity{agent: a, key: k, pod: p, wake: make(chan struct{}, 1), streams: map[uint64]*apiv1.Stream{}}
}

// Pod returns whose identity it is.
func (id *Identity) Pod() Pod { return id.pod }

// Held follows what is held.
func (id *Identity) Held() *latest.Value[Held] { return &id.held }

// Report takes over what a client of this identity has acknowledged; nil removes the stream.
func (id *Identity) Report(stream uint64, s *apiv1.Stream) {
	id.mu.Lock()
	if s == nil {
		delete(id.streams, stream)
	} else {
		id.streams[stream] = s
	}
	id.mu.Unlock()
	id.agent.touch()
}

// offer hands over a proof; a later one replaces an earlier one.
func (id *Identity) offer(e attestor.Evidence, end time.Time, volume string) {
	id.mu.Lock()
	defer id.mu.Unlock()
	if !end.After(id.evidenceEnd) {
		return
	}
	id.evidence, id.evidenceEnd, id.volume = e, end, volume
	select {
	case id.wake <- struct{}{}:
	default:
	}
}

// proof returns the newest evidence; ok is false when it has expired.
func (id *Identity) proof(now time.Time) (e attestor.Evidence, volume string, ok bool) {
	id.mu.Lock()
	defer id.mu.Unlock()
	return id.evidence, id.volume, now.Before(id.evidenceEnd)
}

// idle reports whether nobody uses the identity and nothing can renew it: its pod is gone.
func (id *Identity) idle(now time.Time) bool {
	id.mu.Lock()
	defer id.mu.Unlock()
	return len(id.streams) == 0 && !now.Before(id.evidenceEnd)
}

// keep renews one identity until its pod is gone or ctx ends. A failure keeps the last good SVID and backs off with
// jitter, for this identity alone; a fresh proof ends the wait.
func (a *Agent) keep(ctx context.Context, id *Identity) {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = a.cfg.MinBackoff, a.cfg.MaxBackoff
	b.RandomizationFactor = 0.5
	for {
		now := time.Now()
		h := id.held.Load()
		if h.SVID != nil && !now.Before(h.SVID.Certificates[0].NotAfter) {
			a.expire(id, h)
			h = id.held.Load()
		}
		if h.SVID == nil && id.idle(now) {
			a.forget(id)
			return
		}
		wait := max(0, h.RenewAt.Sub(now))
		if h.SVID == nil && h.Refusal == nil {
			wait = 0
		}
		if wait == 0 {
			err := a.renew(ctx, id)
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				b.Reset()
				continue
			}
			wait = a.failed(id, err, b.NextBackOff())
		}
		if h := id.held.Load(); h.SVID != nil { // never sleep over the end of what is held
			wait = min(wait, max(0, time.Until(h.SVID.Certificates[0].NotAfter)))
		}
		if !a.sleep(ctx, id, wait) {
			return
		}
	}
}

// sleep waits, and returns false when ctx ended. A fresh proof ends the wait of an identity that failed: then a retry
// makes sense at once. One that is good needs no proof before its time.
func (a *Agent) sleep(ctx context.Context, id *Identity, wait time.Duration) bool {
	t := time.NewTimer(wait)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
			return true
		case <-id.wake:
			h := id.held.Load()
			if h.Refusal == nil {
				continue
			}
			if api.ReasonOf(h.Refusal) == api.TokenExpired {
				id.held.Set(Held{SVID: h.SVID, RenewAt: time.Time{}, Refusal: h.Refusal})
				return true
			}
		}
	}
}

// failed notes a failure and says how long to wait. What is held stays; a workload that has nothing learns the reason,
// unless it is only that the CA is away: then it waits.
func (a *Agent) failed(id *Identity, err error, wait time.Duration) time.Duration {
	e := api.AsError(err)
	if e.RetryAfter > wait {
		wait = e.RetryAfter
	}
	a.metrics.renewals.WithLabelValues("failed").Inc()
	h := id.held.Load()
	left := "none"
	if h.SVID != nil {
		left = time.Until(h.SVID.Certificates[0].NotAfter).Round(time.Second).String()
	}
	a.log.Warn("identity not renewed, keeping what is held", "pod", id.pod.Namespace+"/"+id.pod.Name, "reason", string(e.Reason),
		"detail", e.Detail, "correlation_id", e.CorrelationID, "held_for", left, "retry_in", wait.String())
	id.held.Set(Held{SVID: h.SVID, RenewAt: time.Now().Add(wait), Refusal: e})
	a.touch()
	return wait
}

// expire drops an SVID whose time is over: it is never served.
func (a *Agent) expire(id *Identity, h Held) {
	a.log.Error("identity expired", "pod", id.pod.Namespace+"/"+id.pod.Name, "spiffe_id", h.SVID.ID.String())
	a.metrics.expired.Inc()
	id.held.Set(Held{RenewAt: h.RenewAt, Refusal: h.Refusal})
	a.uncache(id)
	a.touch()
}

// renew obtains one SVID with a fresh key and installs it, after it was checked against the bundle that is held.
func (a *Agent) renew(ctx context.Context, id *Identity) error {
	e, volume, ok := id.proof(time.Now())
	if !ok {
		return api.E(api.TokenExpired, "the workload's token has expired; a fresh one comes with its next stream")
	}
	key, csr, err := newKey()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, a.cfg.IssueTimeout)
	defer cancel()
	item := &apiv1.IssueItem{Evidence: &apiv1.Evidence{Kind: e.Kind, Data: e.Data}, Csr: csr, Volume: volume}
	got, err := a.signer().issue(ctx, item)
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
	h := Held{SVID: svid, RenewAt: renewAt(got.GetRenewAt(), svid.Certificates[0], time.Now())}
	id.held.Set(h)
	a.metrics.renewals.WithLabelValues("ok").Inc()
	a.cacheIdentity(id, h)
	a.touch()
	a.log.Info("identity renewed", "pod", id.pod.Namespace+"/"+id.pod.Name, "spiffe_id", svid.ID.String(),
		"serial", serial(svid), "not_after", svid.Certificates[0].NotAfter, "renew_at", h.RenewAt)
	return nil
}

// signer is the session, when there is one; its calls wait for it.
func (a *Agent) signer() signer { return linked{a} }

// newKey returns a fresh P-256 key and a CSR that names nothing: identity comes from attestation.
func newKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return key, csr, err
}

// accept checks what came from the CA: that it is for our key, a SPIFFE leaf of our trust domain with a path, and that it
// verifies now under the bundle that is held, the very one that workloads will get.
func (a *Agent) accept(chain [][]byte, key *ecdsa.PrivateKey) (*x509svid.SVID, error) {
	reject := func(err error) (*x509svid.SVID, error) {
		return nil, api.Wrap(api.SVIDRejected, err, fmt.Sprintf("the SVID that came back is not acceptable: %v", err))
	}
	var certs []*x509.Certificate
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return reject(err)
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return reject(errors.New("the chain is empty"))
	}
	if !key.PublicKey.Equal(certs[0].PublicKey) {
		return reject(errors.New("it is for another key"))
	}
	id, _, err := x509svid.Verify(certs, a.trust.Load().Bundle)
	if err != nil {
		return reject(err)
	}
	if _, err := api.ParseWorkloadID(id.String()); err != nil {
		return reject(err)
	}
	return &x509svid.SVID{ID: id, Certificates: certs, PrivateKey: key}, nil
}

// renewAt takes the CA's renewal time where it makes sense, and half of what is left where it does not.
func renewAt(t *timestamppb.Timestamp, leaf *x509.Certificate, now time.Time) time.Time {
	if at := t.AsTime(); t.IsValid() && at.After(now) && at.Before(leaf.NotAfter) {
		return at
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
	}
	if h.Refusal != nil {
		p.LastError = string(h.Refusal.Reason)
	}
	id.mu.Lock()
	defer id.mu.Unlock()
	for _, n := range slices.Sorted(maps.Keys(id.streams)) {
		p.Streams = append(p.Streams, id.streams[n])
	}
	return p
}
