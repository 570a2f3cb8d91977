package cluster

import (
	"context"
	"crypto/sha256"
	"errors"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/kube"
)

// settle makes one namespace as it should be. What the watches told may be a moment old, so all is looked at once more.
func (c *copies) settle(ctx context.Context, namespace string) error {
	c.mu.Lock()
	want, asked, s := c.want, c.labels[namespace], *c.space(namespace)
	c.mu.Unlock()
	if want == nil {
		return nil
	}
	old, err := c.client.Get(ctx, kube.ConfigMaps, namespace, BundleConfigMap)
	there := err == nil
	if err != nil && !errors.Is(err, kube.ErrNotFound) {
		return err
	}
	ours := there && (old.Annotations[CopyOf] == c.original || s.ours && s.uid == old.UID)
	if asked && ours {
		c.reads(old, want)
	}
	switch {
	case !asked:
		return c.withdraw(ctx, old, ours)
	case there && !ours:
		c.foreign(ctx, namespace, old.UID)
		return nil
	case there && !old.Immutable && kube.Digest(old.Data) == want.digest && old.Annotations[CopyOf] == c.original:
		return nil
	case !there:
		return c.restore(ctx, namespace, want, s)
	}
	return c.replace(ctx, namespace, want, s, old)
}

// reads keeps which bundle a copy holds that holds another one than is wanted.
func (c *copies) reads(old kube.Object, want *wanted) {
	is, digest := shownBy(want.bundle.TrustDomain, old.Data), kube.Digest(old.Data)
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.space(old.Namespace); s.uid == old.UID && s.digest == digest { // else the watch will tell of it
		s.place.holds(is)
		s.read = digest
	}
}

// withdraw deletes the copy of a namespace that no longer asks for it, once the API server has confirmed that.
func (c *copies) withdraw(ctx context.Context, old kube.Object, ours bool) error {
	if !ours {
		return nil
	}
	if asked, err := c.asks(ctx, old.Namespace); asked || err != nil {
		return err
	}
	if err := c.client.Delete(ctx, kube.ConfigMaps, old); err != nil && !errors.Is(err, kube.ErrNotFound) {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.space(old.Namespace); s.uid == old.UID { // the watch will tell the same
		s.uid, s.good = "", [sha256.Size]byte{}
	}
	return nil
}

// asks says whether a namespace asks for a copy, past the watch.
func (c *copies) asks(ctx context.Context, namespace string) (bool, error) {
	o, err := c.client.Get(ctx, kube.Namespaces, "", namespace)
	if errors.Is(err, kube.ErrNotFound) {
		return false, nil
	}
	return err == nil && o.DeleteAt.IsZero() && o.Labels[CopiesLabel] == "true", err
}

// restore makes a copy where there is none.
func (c *copies) restore(ctx context.Context, namespace string, want *wanted, s copyState) error {
	if s.good == want.digest { // there was one; but a namespace that ends loses all, and is no longer asked about
		if asked, err := c.asks(ctx, namespace); !asked || err != nil {
			return err
		}
		c.alarm(ctx, namespace, "a copy of the bundle was deleted by somebody else, and is made anew", nil)
	}
	return c.write(ctx, namespace, "", want)
}

// replace brings a copy up to date, and tells if it is not merely an older one.
func (c *copies) replace(ctx context.Context, namespace string, want *wanted, s copyState, old kube.Object) error {
	sequence := publishedSequence([]byte(old.Data[BundleJSON]))
	if sequence > want.bundle.Generation.Sequence() {
		// Either somebody's tampering or a newer bundle that another replica has published: the original knows.
		if err := c.confirm(ctx, want.bundle); err != nil {
			return err
		}
	}
	if s.good == want.digest || sequence == 0 || sequence >= want.bundle.Generation.Sequence() || old.Annotations[CopyOf] != c.original || old.Immutable {
		c.alarm(ctx, namespace, "a copy of the bundle was changed by somebody else, and is put right", tampered(sequence, want.bundle))
	}
	if !old.Immutable {
		return c.write(ctx, namespace, old.ResourceVersion, want)
	}
	if err := c.client.Delete(ctx, kube.ConfigMaps, old); err != nil {
		return err
	}
	return c.write(ctx, namespace, "", want)
}

func (c *copies) write(ctx context.Context, namespace, version string, want *wanted) error {
	o, err := c.client.WriteConfigMap(ctx, kube.ConfigMap{
		Namespace: namespace, Name: BundleConfigMap, ResourceVersion: version,
		Labels:      map[string]string{partOf: "signet", CopyLabel: "true"},
		Annotations: map[string]string{CopyOf: c.original}, Data: want.data,
	})
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.space(namespace)
	if s.uid != o.UID { // the watch has not told of it yet
		s.uid, s.ours, s.digest, s.immutable = o.UID, true, kube.Digest(o.Data), o.Immutable
	}
	s.good = want.digest
	c.sees(s)
	return nil
}

// foreign tells once of a ConfigMap of the bundle's name that is not ours. It is left alone.
func (c *copies) foreign(ctx context.Context, namespace, uid string) {
	c.mu.Lock()
	s := c.space(namespace)
	quiet := s.told == uid || s.quiet()
	s.told = uid
	c.mu.Unlock()
	if !quiet {
		c.log.WarnContext(ctx, "a namespace that asks for a copy of the bundle has a ConfigMap of its name that is not ours; it is left alone",
			"namespace", namespace, "configmap", BundleConfigMap)
	}
}

// confirmed says whether the original holds exactly b now, errReplaced where it does not.
func (p *KubePublisher) confirmed(ctx context.Context, b *ca.Bundle) error {
	o, err := p.cfg.Client.Get(ctx, kube.ConfigMaps, p.cfg.Namespace, BundleConfigMap)
	if errors.Is(err, kube.ErrNotFound) {
		return errReplaced
	}
	if err != nil {
		return err
	}
	if sequence, hash, good := parseBundle(b.TrustDomain, o.Data); !good || sequence != b.Generation.Sequence() || hash != b.Hash {
		return errReplaced
	}
	return nil
}
