package agent

import (
	"bytes"
	"context"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
)

// Owner is whose a token is in the words of kubelet, which delivers it.
type Owner struct {
	Pod
	ServiceAccount string
	Node           string // its name
}

// Offer takes over a token that kubelet delivered for a volume of a pod, starts to fetch the pod's identity and keeps it
// fresh until it is released as often as it was offered; the next token is offered in the same way. It never waits for the
// CA or for key sets.
//
// It refuses, with an *api.Error, a token that is not of this very pod, and one that the key sets refute. One that they
// cannot judge, because there are none yet or the token's key is newer than they are, is the CA's to judge, with each
// request. Until it has, an identity that is held for that same pod UID, ServiceAccount UID and issuer is served on kubelet's
// word: nobody but kubelet's own user can deliver a token. A new identity is only ever given by the CA.
func (a *Agent) Offer(ctx context.Context, e attestor.Evidence, of Owner, volume string) (*Identity, error) {
	return a.deliver(ctx, e, of, volume, false)
}

// Resume is Offer for a token that was taken over before a restart: that it has expired since is no reason to refuse.
func (a *Agent) Resume(ctx context.Context, e attestor.Evidence, of Owner, volume string) (*Identity, error) {
	return a.deliver(ctx, e, of, volume, true)
}

func (a *Agent) deliver(ctx context.Context, e attestor.Evidence, of Owner, volume string, late bool) (*Identity, error) {
	audience := api.WorkloadAudience(a.cfg.TrustDomain)
	said, end, err := attestor.Unchecked(e, audience)
	if err != nil {
		return nil, err
	}
	if err := a.compare(said, of); err != nil {
		return nil, err
	}
	now := time.Now()
	if v := a.verifier.Load(); v != nil {
		if _, err := v.Attest(ctx, e, audience, now); refuted(err, late) {
			return nil, err
		}
	}
	if latest := now.Add(attestor.DefaultMaxLifetime); end.After(latest) {
		end = latest // it may be a lie, and must not outlive every later token
	}
	return a.enter(podKey{said.Issuer, said.PodUID, said.ServiceAccountUID}, of.Pod, func(id *Identity) { id.deliver(e, end, volume) })
}

// compare holds what a token says of itself against the words of kubelet.
func (a *Agent) compare(said attestor.Claimed, of Owner) error {
	if said.PodUID != of.UID || said.PodName != of.Name || said.Namespace != of.Namespace || said.ServiceAccount != of.ServiceAccount {
		return api.E(api.PodMismatch, "the token is not that of the pod that it was delivered for")
	}
	if self := a.self.Load(); said.NodeName != of.Node || self != nil && said.NodeUID != self.nodeUID {
		return api.E(api.NodeMismatch, "the token's pod runs on another node")
	}
	return nil
}

// refuted reports whether a token is known to be bad. What a key set cannot say, it does not refute: it may be older than the
// key that signed the token.
func refuted(err error, late bool) bool {
	if err == nil {
		return false
	}
	switch api.ReasonOf(err) {
	case api.TokenSignature, api.IssuerUnknown, api.KeysUnavailable:
		return false
	case api.TokenExpired:
		return !late
	}
	return true
}

// deliver is offer for kubelet's token, for one more volume. Here any other token replaces one that was refused.
func (id *Identity) deliver(e attestor.Evidence, end time.Time, volume string) {
	id.mu.Lock()
	defer id.mu.Unlock()
	id.volumes++
	id.released = false
	refused := aboutToken(id.held.Load().Refusal) && !bytes.Equal(e.Data, id.proof.evidence.Data)
	if end.After(id.proof.end) || refused {
		id.take(e, end, volume)
	}
}

// Release lets go of what one Offer took. With the last of them the identity is dropped, from the cache too, as soon as no
// stream uses it: the pod is gone.
func (id *Identity) Release() {
	id.mu.Lock()
	id.volumes--
	id.released = id.volumes == 0
	id.mu.Unlock()
	id.drop()
}

// drop drops an identity whose volumes are gone, unless a stream uses it; whose last stream ends calls it again.
func (id *Identity) drop() {
	a := id.agent
	a.mu.Lock()
	id.mu.Lock()
	gone := id.released && len(id.streams) == 0 && a.identities[id.key] == id
	id.mu.Unlock()
	if gone {
		delete(a.identities, id.key)
		if id.stop != nil {
			id.stop()
		}
	}
	a.mu.Unlock()
	if gone {
		a.uncache(id, true)
		a.touch()
	}
}
