package cluster

import (
	"errors"
	"io/fs"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/kube"
)

// Kinds of places where the bundle is shown, as a rotation names them.
const (
	placeConfigMap   = "configmap"
	placeTrustBundle = "clustertrustbundle"
	placeFile        = "file"
)

// errForeign is of a ConfigMap that is to be a copy and is somebody else's.
var errForeign = api.E(api.BundleForeign, "a ConfigMap of the bundle's name is somebody else's")

// place is what is known of one place where the bundle is shown: what it holds, as it was read there, never as it should be. Both times
// are those of this process: after a restart what is there is there since it was seen.
type place struct {
	held   journal.Held // zero: none, or nothing that is one
	since  time.Time
	other  bool       // it held another bundle before
	reason api.Reason // why it could not be written last; empty: nothing is wrong
	failed time.Time  // since when it cannot
}

// holds notes what is there.
func (p *place) holds(h journal.Held) {
	if p.held != h || p.since.IsZero() {
		p.other = p.other || p.held != journal.Held{}
		p.held, p.since = h, time.Now()
	}
}

// ended notes how an attempt to write it ended.
func (p *place) ended(err error) {
	switch {
	case err == nil:
		p.failed = time.Time{}
	case p.reason == "":
		p.failed = time.Now()
	}
	p.reason = failedBy(err)
}

// copy is the place as evidence.
func (p *place) copy(kind, name, namespace string) journal.Copy {
	return journal.Copy{Kind: kind, Name: name, Namespace: namespace, Held: p.held, At: p.since, Failed: string(p.reason), FailedAt: p.failed}
}

// failedBy is the reason for which something could not be written; empty where it was.
func failedBy(err error) api.Reason {
	switch reason := api.ReasonOf(err); {
	case err == nil:
		return ""
	case reason != api.Internal:
		return reason
	case kube.CauseOf(err) == kube.CauseForbidden, errors.Is(err, fs.ErrPermission):
		return api.PublishForbidden
	}
	return api.PublishFailed
}

// heldOf is a bundle as whoever shows it has it.
func heldOf(b *ca.Bundle) journal.Held { return journal.Held{Generation: b.Generation, Hash: b.Hash} }

// Copies implements ca.CopyTeller.
func (p *KubePublisher) Copies() ([]journal.Copy, <-chan struct{}) {
	_, changed := p.told.Get() // before anything is read
	p.noting.Lock()
	list := []journal.Copy{p.place.copy(placeConfigMap, p.cfg.Namespace+"/"+BundleConfigMap, "")}
	p.noting.Unlock()
	if p.trust != nil {
		list = p.trust.tell(list)
	}
	if p.copies != nil {
		list = p.copies.tell(list)
	}
	return list, changed
}

// note keeps what was found out of the ConfigMap.
func (p *KubePublisher) note(f func(*place)) {
	p.noting.Lock()
	f(&p.place)
	p.noting.Unlock()
	p.tell()
}

// tell has whoever asked for Copies ask again.
func (p *KubePublisher) tell() { p.told.Set(struct{}{}) }
