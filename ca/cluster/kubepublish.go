package cluster

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/kube"
)

// BundleConfigMap is the name of the ConfigMap that holds the bundle, under the keys BundleJSON and BundlePEM.
const BundleConfigMap = "signet-bundle"

// Bounds of a KubePublisher.
const (
	writeTries  = 5                // against others who write at the same time
	revertPause = time.Second      // between two looks after something changed
	publishTime = 10 * time.Second // for one publication
)

// KubePublisherConfig configures a KubePublisher.
type KubePublisherConfig struct {
	Client    *kube.Client // of the API server. Required.
	Namespace string       // of the ConfigMap. Required.
	Log       *slog.Logger // required
}

// KubePublisher is a ca.Publisher that writes the bundle into the ConfigMap signet-bundle of one namespace. Each write is
// guarded by the version that was read, so of several writers none undoes what it has not seen.
//
// A bundle of a higher generation is never replaced (BundleRollback). One of the same generation with other roots is
// replaced only if this process has published that generation before, and is an alarm all the same: somebody changed it.
// Otherwise two CAs may have the same right to the place, and neither is told from the other: BundleEquivocation, and
// nothing is written until a person has looked.
type KubePublisher struct {
	cfg     KubePublisherConfig
	watch   *kube.Watch
	changed chan struct{} // holds one: the object is not as it was

	mu   sync.Mutex // held while something is written
	last *ca.Bundle // that was published by this process; nil: none yet
}

// NewKubePublisher returns a publisher. What it published is put right at once while Run runs.
func NewKubePublisher(cfg KubePublisherConfig) (*KubePublisher, error) {
	if cfg.Client == nil || cfg.Namespace == "" || cfg.Log == nil {
		return nil, errors.New("a publisher needs a client, a namespace and a log")
	}
	p := &KubePublisher{cfg: cfg, changed: make(chan struct{}, 1)}
	look := func() {
		select {
		case p.changed <- struct{}{}:
		default:
		}
	}
	p.watch = cfg.Client.NewWatch(kube.WatchConfig{
		Resource: kube.ConfigMaps, Namespace: cfg.Namespace, Name: BundleConfigMap, Stale: MaxStale,
		Replace: func([]kube.Object) { look() },
		Apply:   func(kube.Object, bool) { look() },
	})
	return p, nil
}

// Rules are the permissions that it needs. RBAC cannot narrow "create" down to a name.
func (p *KubePublisher) Rules() []kube.Rule {
	rules := []kube.Rule{{Resource: string(kube.ConfigMaps), Verb: "create", Namespace: p.cfg.Namespace}}
	for _, verb := range []string{"get", "list", "watch", "update"} {
		rules = append(rules, kube.Rule{Resource: string(kube.ConfigMaps), Verb: verb, Namespace: p.cfg.Namespace, Name: BundleConfigMap})
	}
	return rules
}

// Published implements ca.Publisher: any object of the name counts, for whatever is there was trusted by somebody.
func (p *KubePublisher) Published(ctx context.Context, _ spiffeid.TrustDomain) (bool, error) {
	_, err := p.cfg.Client.Get(ctx, kube.ConfigMaps, p.cfg.Namespace, BundleConfigMap)
	if errors.Is(err, kube.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// Publish implements ca.Publisher. An object that holds the bundle already is left alone.
func (p *KubePublisher) Publish(ctx context.Context, b *ca.Bundle) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, publishTime)
	defer cancel()
	data, err := documents(b)
	if err != nil {
		return err
	}
	for range writeTries {
		err = p.publishOnce(ctx, b, data)
		if !errors.Is(err, kube.ErrConflict) {
			break
		}
	}
	if err == nil {
		p.last = b
	}
	return err
}

func (p *KubePublisher) publishOnce(ctx context.Context, b *ca.Bundle, data map[string]string) error {
	old, err := p.cfg.Client.Get(ctx, kube.ConfigMaps, p.cfg.Namespace, BundleConfigMap)
	switch {
	case errors.Is(err, kube.ErrNotFound):
		if p.published(b) {
			p.alarm(ctx, "the published bundle was deleted", nil)
		}
	case err != nil:
		return err
	default:
		done, err := p.compare(ctx, b, old.Data)
		if done || err != nil {
			return err
		}
	}
	_, err = p.cfg.Client.WriteConfigMap(ctx, kube.ConfigMap{
		Namespace: p.cfg.Namespace, Name: BundleConfigMap, ResourceVersion: old.ResourceVersion,
		Labels: map[string]string{"app.kubernetes.io/part-of": "signet"}, Data: data,
	})
	return err
}

// published says whether this process has published that very bundle.
func (p *KubePublisher) published(b *ca.Bundle) bool {
	return p.last != nil && p.last.Generation == b.Generation && p.last.Hash == b.Hash
}

// compare says whether what is there is b already, and whether it must be left alone. What does not parse is put right.
func (p *KubePublisher) compare(ctx context.Context, b *ca.Bundle, old map[string]string) (done bool, err error) {
	sequence, hash, good := parseBundle(b.TrustDomain, old)
	ours := b.Generation.Sequence()
	switch {
	case sequence > ours:
		return false, api.E(api.BundleRollback, "the published bundle has generation %s, ours is %s", api.FromSequence(sequence), b.Generation)
	case good && sequence == ours && hash == b.Hash:
		return true, nil
	case good && sequence == ours && !p.published(b):
		return false, api.E(api.BundleEquivocation, "the published bundle has our generation %s and other roots", b.Generation)
	case p.published(b):
		var what error
		if good && sequence == ours {
			what = api.E(api.BundleEquivocation, "another claims generation %s", b.Generation)
		}
		p.alarm(ctx, "the published bundle was changed by somebody else, and is put right", what)
	}
	return false, nil
}

func (p *KubePublisher) alarm(ctx context.Context, what string, err error) {
	p.cfg.Log.ErrorContext(ctx, what, "namespace", p.cfg.Namespace, "configmap", BundleConfigMap, "error", err)
}

// Run puts the object right within seconds of a change by somebody else, until ctx ends.
func (p *KubePublisher) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { p.watch.Run(ctx) }) // returns nil
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.changed:
		}
		p.mu.Lock()
		b := p.last
		p.mu.Unlock()
		if b != nil {
			if err := p.Publish(ctx, b); err != nil && ctx.Err() == nil && api.ReasonOf(err) != api.BundleRollback { // rollback: a newer one of ours, most often
				p.cfg.Log.ErrorContext(ctx, "the published bundle cannot be put right", "error", err)
			}
		}
		select { // somebody who changes it all the time costs one write a second
		case <-ctx.Done():
			return nil
		case <-time.After(revertPause):
		}
	}
}

// documents are the bundle's two forms, by their keys.
func documents(b *ca.Bundle) (map[string]string, error) {
	doc, pemDoc, err := marshalBundle(b)
	if err != nil {
		return nil, err
	}
	return map[string]string{BundleJSON: string(doc), BundlePEM: string(pemDoc)}, nil
}

// parseBundle reads what is published. The sequence is good even where the rest is of a kind that this build does not
// know; hash is that of the roots, if both documents hold the same.
func parseBundle(td spiffeid.TrustDomain, data map[string]string) (sequence uint64, hash [32]byte, good bool) {
	sequence = publishedSequence([]byte(data[BundleJSON]))
	doc, err := spiffebundle.Parse(td, []byte(data[BundleJSON]))
	if err != nil {
		return sequence, hash, false
	}
	pemDoc, err := x509bundle.Parse(td, []byte(data[BundlePEM]))
	if err != nil {
		return sequence, hash, false
	}
	hash = api.BundleHash(doc.X509Authorities())
	return sequence, hash, hash == api.BundleHash(pemDoc.X509Authorities())
}
