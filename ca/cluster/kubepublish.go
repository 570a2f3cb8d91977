package cluster

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/kube"
	"github.com/signet-ca/signet/internal/latest"
)

// BundleConfigMap is the name of the ConfigMap that holds the bundle, under the keys BundleJSON and BundlePEM.
const BundleConfigMap = "signet-bundle"

// RecordSchema is the annotation of that ConfigMap with the schema of the CA's record. An admission policy of the chart lets
// no CA take this one's place that could not read the record (docs/upgrades.md).
const RecordSchema = kube.OurPrefix + "record-schema"

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

	// Copies: each namespace with the label CopiesLabel gets a copy.
	Copies bool

	// TrustBundle names the trust domain for which a ClusterTrustBundle is kept. Zero: none is.
	TrustBundle spiffeid.TrustDomain

	// Metrics that it reports to. Nil: nobody asks.
	Metrics *Metrics
}

// watch makes a watch that the metrics show.
func (cfg KubePublisherConfig) watch(part string, w kube.WatchConfig, objects func() int) *kube.Watch {
	failed, told := w.Failed, time.Time{} // it is called by one goroutine
	w.Stale = MaxStale
	w.Failed = func(err error) {
		cfg.Metrics.failed(part, "", w.Resource, err)
		if failed != nil {
			failed(err)
		}
		if !errors.Is(err, kube.ErrNotFound) && (told.IsZero() || time.Since(told) > alarmPause) {
			told = time.Now()
			cfg.Log.Warn("what is published is not seen", "part", part, "resource", string(w.Resource), "error", err)
		}
	}
	watch := cfg.Client.NewWatch(w)
	cfg.Metrics.add(watched{part, "", w.Resource, watch, objects})
	return watch
}

// KubePublisher is a ca.Publisher that writes the bundle into the ConfigMap signet-bundle of one namespace. Each write is
// guarded by the version that was read, so of several writers none undoes what it has not seen.
//
// A bundle of a higher generation is never replaced (BundleRollback), unless no CA can have come to that number: then it is
// an alarm, as is all that somebody else changed. One of the same generation with other roots is replaced only if this
// process has published that generation before, and is an alarm all the same. Otherwise two CAs may have the same right to
// the place, and neither is told from the other: BundleEquivocation, and nothing is written until a person has looked.
//
// That ConfigMap is the one that agents believe. Where else the bundle is shown (copies, ClusterTrustBundle) follows from
// it: it is written only after the ConfigMap holds it, and what claims a higher generation there is right only if the
// ConfigMap says so.
type KubePublisher struct {
	cfg     KubePublisherConfig
	watch   *kube.Watch
	changed chan struct{}          // holds one: the object is not as it was
	held    atomic.Int64           // objects that the watch told of: one or none
	copies  *copies                // nil: none are made
	trust   *trustBundle           // nil: none is kept
	told    latest.Value[struct{}] // is set when Copies may say something else

	noting sync.Mutex // held for moments
	place  place      // of the ConfigMap

	mu   sync.Mutex // held while something is written
	last *ca.Bundle // that was published by this process; nil: none yet
}

// NewKubePublisher returns a publisher. What it published is put right at once while Run runs, and copied where that is
// asked for.
func NewKubePublisher(cfg KubePublisherConfig) (*KubePublisher, error) {
	if cfg.Client == nil || cfg.Namespace == "" || cfg.Log == nil {
		return nil, errors.New("a publisher needs a client, a namespace and a log")
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics()
	}
	p := &KubePublisher{cfg: cfg, changed: make(chan struct{}, 1)}
	p.watch = cfg.watch(kindBundle, kube.WatchConfig{
		Resource: kube.ConfigMaps, Namespace: cfg.Namespace, Name: BundleConfigMap, Digest: true,
		Replace: func(all []kube.Object) { p.held.Store(int64(len(all))); wake(p.changed) },
		Apply: func(_ kube.Object, deleted bool) {
			p.held.Store(1)
			if deleted {
				p.held.Store(0)
			}
			wake(p.changed)
		},
	}, func() int { return int(p.held.Load()) })
	if cfg.Copies {
		p.copies = newCopies(cfg, p.confirmed, p.tell)
	}
	if !cfg.TrustBundle.IsZero() {
		p.trust = newTrustBundle(cfg, p.confirmed, p.tell)
	}
	return p, nil
}

// wake notes in a channel that holds one that there is something to do.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Rules are the permissions without which agents get no bundle for their first trust. RBAC cannot narrow "create" down to
// a name. Those for the rest are not among them: a CA that lacks them serves its agents well, and says so in log and
// metrics.
func (p *KubePublisher) Rules() []kube.Rule {
	rules := []kube.Rule{{Resource: string(kube.ConfigMaps), Verb: "create", Namespace: p.cfg.Namespace}}
	for _, verb := range []string{"get", "list", "watch", "update"} {
		rules = append(rules, kube.Rule{Resource: string(kube.ConfigMaps), Verb: verb, Namespace: p.cfg.Namespace, Name: BundleConfigMap})
	}
	return rules
}

// Published implements ca.Publisher: any object of the name counts, for whatever is there was trusted by somebody. So does
// a ClusterTrustBundle where one is kept, for it outlives the namespace. Copies do not: agents do not believe them.
func (p *KubePublisher) Published(ctx context.Context, _ spiffeid.TrustDomain) (bool, error) {
	_, err := p.cfg.Client.Get(ctx, kube.ConfigMaps, p.cfg.Namespace, BundleConfigMap)
	if errors.Is(err, kube.ErrNotFound) && p.trust != nil {
		_, err = p.cfg.Client.Get(ctx, kube.ClusterTrustBundles, "", p.trust.name)
	}
	if errors.Is(err, kube.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// Shown returns the bundle that agents believe: without a generation where there is none that says its own, and without a hash where its
// roots cannot be told.
func (p *KubePublisher) Shown(ctx context.Context, td spiffeid.TrustDomain) (journal.Held, error) {
	ctx, cancel := context.WithTimeout(ctx, publishTime)
	defer cancel()
	old, err := p.cfg.Client.Get(ctx, kube.ConfigMaps, p.cfg.Namespace, BundleConfigMap)
	if errors.Is(err, kube.ErrNotFound) {
		return journal.Held{}, nil
	}
	if err != nil {
		return journal.Held{}, err
	}
	return shownBy(td, old.Data), nil
}

// Publish implements ca.Publisher. An object that holds the bundle already is left alone.
func (p *KubePublisher) Publish(ctx context.Context, b *ca.Bundle) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.publish(ctx, b)
}

// publish is Publish while p.mu is held.
func (p *KubePublisher) publish(ctx context.Context, b *ca.Bundle) error {
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
	p.note(func(place *place) {
		if err == nil {
			place.holds(heldOf(b))
		}
		place.ended(err)
	})
	switch {
	case err == nil:
		p.last = b
		p.spread(b, data)
	case api.ReasonOf(err) == api.BundleRollback, api.ReasonOf(err) == api.BundleEquivocation:
		p.spread(nil, nil) // another CA's is what agents believe
		p.cfg.Metrics.failures.WithLabelValues(kindBundle, string(api.ReasonOf(err))).Inc()
	default:
		p.cfg.Metrics.failures.WithLabelValues(kindBundle, string(kube.CauseOf(err))).Inc()
	}
	return err
}

// spread says what is shown elsewhere from now on; nil: what is there is left as it is.
func (p *KubePublisher) spread(b *ca.Bundle, data map[string]string) {
	if p.copies != nil {
		p.copies.set(b, data)
	}
	if p.trust != nil {
		p.trust.set(b, data[BundlePEM])
	}
}

func (p *KubePublisher) publishOnce(ctx context.Context, b *ca.Bundle, data map[string]string) error {
	old, err := p.cfg.Client.Get(ctx, kube.ConfigMaps, p.cfg.Namespace, BundleConfigMap)
	if err == nil || errors.Is(err, kube.ErrNotFound) {
		is := shownBy(b.TrustDomain, old.Data)
		p.note(func(place *place) { place.holds(is) })
	}
	switch {
	case errors.Is(err, kube.ErrNotFound):
		if p.published(b) {
			p.alarm(ctx, "the published bundle was deleted", nil)
		}
	case err != nil:
		return err
	default:
		done, err := p.compare(ctx, b, old)
		if done || err != nil {
			return err
		}
		if old.Immutable { // somebody wants to keep it as it is
			if err := p.cfg.Client.Delete(ctx, kube.ConfigMaps, old); err != nil {
				return err
			}
			old.ResourceVersion = ""
		}
	}
	_, err = p.cfg.Client.WriteConfigMap(ctx, kube.ConfigMap{
		Namespace: p.cfg.Namespace, Name: BundleConfigMap, ResourceVersion: old.ResourceVersion,
		Labels: map[string]string{partOf: "signet"}, Annotations: annotations(b), Data: data,
	})
	return err
}

// annotations are what is said beside the bundle.
func annotations(b *ca.Bundle) map[string]string {
	if b.RecordSchema == 0 { // it is not known
		return nil
	}
	return map[string]string{RecordSchema: strconv.Itoa(b.RecordSchema)}
}

// published says whether this process has published that very bundle.
func (p *KubePublisher) published(b *ca.Bundle) bool {
	return p.last != nil && p.last.Generation == b.Generation && p.last.Hash == b.Hash
}

// compare says whether what is there is b already, and whether it must be left alone. What does not parse is put right.
func (p *KubePublisher) compare(ctx context.Context, b *ca.Bundle, old kube.Object) (done bool, err error) {
	sequence, hash, good := parseBundle(b.TrustDomain, old.Data)
	foreign, why := judge(b, sequence, hash, good, p.published(b))
	switch {
	case !foreign && why != nil:
		return false, why
	case good && sequence == b.Generation.Sequence() && hash == b.Hash && !old.Immutable:
		if want := annotations(b)[RecordSchema]; want == "" || want == old.Annotations[RecordSchema] {
			return true, nil
		}
		if p.published(b) && p.last.RecordSchema == b.RecordSchema {
			p.alarm(ctx, "what is said of the record beside the published bundle was changed by somebody else, and is put right", nil)
		}
	case foreign:
		p.alarm(ctx, "the published bundle was changed by somebody else, and is put right", why)
	}
	return false, nil
}

func (p *KubePublisher) alarm(ctx context.Context, what string, err error) {
	p.cfg.Metrics.reverts.WithLabelValues(kindBundle).Inc()
	p.cfg.Log.ErrorContext(ctx, what, "namespace", p.cfg.Namespace, "configmap", BundleConfigMap, "error", err)
}

// Run puts what is published right within seconds of a change by somebody else, and copies it, until ctx ends.
func (p *KubePublisher) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { p.watch.Run(ctx) }) // returns nil, as all watches do
	if p.copies != nil {
		for _, w := range p.copies.watches {
			wg.Go(func() { w.Run(ctx) })
		}
		wg.Go(func() { p.copies.run(ctx) })
	}
	if p.trust != nil {
		wg.Go(func() { p.trust.watch.Run(ctx) })
		wg.Go(func() { keep(ctx, p.trust.changed, p.trust.settle) })
	}
	keep(ctx, p.changed, p.restore)
	return nil
}

// restore puts the ConfigMap right.
func (p *KubePublisher) restore(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock() // a newer one that is published meanwhile would make this one look as if another CA had
	if p.last == nil {
		return nil
	}
	err := p.publish(ctx, p.last)
	switch reason := api.ReasonOf(err); {
	case err == nil || ctx.Err() != nil || reason == api.BundleRollback: // rollback: a newer one of ours, most often
		return nil
	default:
		p.cfg.Log.ErrorContext(ctx, "the published bundle cannot be put right", "error", err)
		if reason == api.BundleEquivocation {
			return nil
		}
	}
	return err
}

// keep calls f whenever something changed, at most once a second, and again with growing pauses where it fails, until ctx
// ends.
func keep(ctx context.Context, changed <-chan struct{}, f func(context.Context) error) {
	var again <-chan time.Time // nil: not before something changes
	for fails := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-again:
		}
		again = nil
		if err := f(ctx); err != nil {
			fails++
			again = time.After(backoff(fails, retryMost))
		} else {
			fails = 0
		}
		select { // somebody who changes it all the time costs one write a second
		case <-ctx.Done():
			return
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
