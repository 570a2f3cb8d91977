package cluster

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/kube"
)

// What namespaces and copies are known by.
const (
	partOf     = "app.kubernetes.io/part-of"
	copiesPart = "copies" // of the watches, in metrics

	// CopiesLabel asks for a copy of the bundle in the namespace that has it, with the value "true".
	CopiesLabel = kube.OurPrefix + "bundle"
	// CopyLabel is on each copy, with the value "true", so that all can be found.
	CopyLabel = kube.OurPrefix + "bundle-copy"
	// CopyOf is the annotation of a copy: namespace and name of what it is a copy of. Without it a ConfigMap is not ours.
	CopyOf = kube.OurPrefix + "copy-of"
)

// Bounds of the copies. They are for a cluster of thousands of namespaces: a new bundle reaches a thousand in 40 s.
const (
	copyGap      = 40 * time.Millisecond // between two namespaces that are worked on
	copyPause    = time.Second           // between two looks at one namespace
	retryFirst   = time.Second
	retryMost    = time.Minute
	retryRefused = 10 * time.Minute // where it is the namespace, and not the API server
	alarmPause   = time.Minute      // between two alarms about one namespace in the log; all are counted
)

// errReplaced: the original is not the bundle that was to be copied.
var errReplaced = errors.New("the bundle that agents believe is not, or not any more, the one that is copied")

// copies keeps a copy of the bundle in each namespace that asks for one by its label. It only ever touches a ConfigMap that
// says to be a copy of our original, or that said so when it was last seen.
//
// Two watches say where something is to be done: of the namespaces with the label, and of the ConfigMaps with the bundle's
// name, of which no more than a digest is kept. One goroutine does it, one namespace after the other at a bounded rate,
// and looks at the very object before it writes: foreign changes first, then what is merely outdated. Each write is
// guarded by the version that was read, so replicas do not undo each other's.
type copies struct {
	client   *kube.Client
	original string // namespace/name of what is copied
	home     string // the namespace of the original, which needs no copy
	log      *slog.Logger
	metrics  *Metrics
	confirm  func(context.Context, *ca.Bundle) error // asks whether the original is that bundle: errReplaced
	watches  []*kube.Watch
	wake     chan struct{} // holds one: due has changed
	gap      time.Duration
	told     func() // something of what tell says may have changed

	mu     sync.Mutex
	want   *wanted               // nil: nothing is known that should be copied
	labels map[string]bool       // namespaces that ask for a copy; nil before the first list
	made   map[string]time.Time  // when they were made, by the API server's clock
	spaces map[string]*copyState // of namespaces that ask for a copy, or have a ConfigMap of the name
	seen   bool                  // the first list of ConfigMaps is there
	due    map[string]dueCopy    // namespaces to look at
	unseen place                 // why the lists are not there
}

// wanted is what copies should hold.
type wanted struct {
	bundle *ca.Bundle
	data   map[string]string
	digest [sha256.Size]byte
	at     time.Time // since when they should
}

// copyState is what is known of one namespace's ConfigMap.
type copyState struct {
	uid       string // empty: there is none
	digest    [sha256.Size]byte
	immutable bool
	ours      bool              // it is a copy that we made, though it may no longer say so
	good      [sha256.Size]byte // the digest of what it last held rightly
	fails     int               // in a row
	after     time.Time         // when it may be looked at again
	alarmed   time.Time         // when the log was last told of something
	told      string            // UID of the foreign ConfigMap that the log was told of
	place     place             // what of it is evidence
	read      [sha256.Size]byte // the digest of what place holds
}

// sees brings what is told of a copy up to date with what was seen of it. What is neither what is wanted nor what was read is read when
// somebody looks at it.
func (c *copies) sees(s *copyState) {
	switch {
	case s.uid == "":
		s.place.holds(journal.Held{})
	case c.want != nil && s.digest == c.want.digest:
		s.place.holds(heldOf(c.want.bundle))
		s.read = s.digest
	case s.digest != s.read:
		s.place.holds(journal.Held{})
	}
	if s.foreign() {
		s.place.ended(errForeign)
	} else if s.place.reason == api.BundleForeign {
		s.place.ended(nil)
	}
}

// foreign says whether it is somebody else's.
func (s *copyState) foreign() bool { return s.uid != "" && !s.ours }

// quiet says whether the log was told of this namespace a moment ago: whoever owns it must not fill the log. If not, it is
// being told now.
func (s *copyState) quiet() bool {
	now := time.Now()
	if !s.alarmed.IsZero() && now.Sub(s.alarmed) < alarmPause {
		return true
	}
	s.alarmed = now
	return false
}

type dueCopy struct {
	at    time.Time
	first bool // before those that are merely outdated
}

func newCopies(cfg KubePublisherConfig, confirm func(context.Context, *ca.Bundle) error, told func()) *copies {
	c := &copies{
		told: told, client: cfg.Client, home: cfg.Namespace, original: cfg.Namespace + "/" + BundleConfigMap, log: cfg.Log, metrics: cfg.Metrics,
		confirm: confirm, wake: make(chan struct{}, 1), gap: copyGap,
		made: map[string]time.Time{}, spaces: map[string]*copyState{}, due: map[string]dueCopy{},
	}
	watch := func(w kube.WatchConfig, count func() int) {
		w.Failed = func(err error) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.unseen.ended(err)
			c.told()
		}
		watch := cfg.watch(copiesPart, w, func() int {
			c.mu.Lock()
			defer c.mu.Unlock()
			return count()
		})
		c.watches = append(c.watches, watch)
	}
	watch(kube.WatchConfig{
		Resource: kube.Namespaces, Labels: CopiesLabel + "=true", Replace: c.replaceNamespaces, Apply: c.applyNamespace,
	}, func() int { return len(c.labels) })
	watch(kube.WatchConfig{
		Resource: kube.ConfigMaps, Name: BundleConfigMap, Digest: true, ProbeNamespace: c.home, Replace: c.replaceCopies, Apply: c.applyCopy,
	}, c.held)
	c.metrics.copies.set(c.count)
	return c
}

// set says what is to be copied from now on; nil: nothing, and what is there is left as it is.
func (c *copies) set(b *ca.Bundle, data map[string]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case b == nil:
		c.want = nil
		clear(c.due)
		return
	case c.want != nil && c.want.bundle.Generation == b.Generation && c.want.bundle.Hash == b.Hash:
		return
	}
	c.want = &wanted{b, data, kube.Digest(data), time.Now()}
	c.lookAtAll()
}

func (c *copies) replaceNamespaces(all []kube.Object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.labels = make(map[string]bool, len(all))
	clear(c.made)
	for _, o := range all {
		if o.DeleteAt.IsZero() {
			c.labels[o.Name], c.made[o.Name] = true, o.Created
		}
	}
	c.lookAtAll()
}

func (c *copies) applyNamespace(o kube.Object, deleted bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if deleted || !o.DeleteAt.IsZero() {
		delete(c.labels, o.Name)
		delete(c.made, o.Name)
	} else {
		c.labels[o.Name], c.made[o.Name] = true, o.Created
	}
	c.look(o.Name, true)
}

func (c *copies) replaceCopies(all []kube.Object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spaces {
		s.uid = ""
	}
	for _, o := range all {
		c.note(o)
	}
	c.seen = true
	c.lookAtAll()
}

func (c *copies) applyCopy(o kube.Object, deleted bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !deleted {
		c.note(o)
	} else if s := c.spaces[o.Namespace]; s != nil && s.uid == o.UID {
		s.uid = ""
	}
	c.look(o.Namespace, true)
}

// note keeps what is needed of a ConfigMap of the bundle's name.
func (c *copies) note(o kube.Object) {
	s := c.space(o.Namespace)
	s.ours = o.Annotations[CopyOf] == c.original || s.ours && s.uid == o.UID
	s.uid, s.digest, s.immutable = o.UID, o.Digest, o.Immutable
}

func (c *copies) space(namespace string) *copyState {
	s := c.spaces[namespace]
	if s == nil {
		s = &copyState{}
		c.spaces[namespace] = s
	}
	return s
}

// lookAtAll finds out what is to be done everywhere.
func (c *copies) lookAtAll() {
	for namespace := range c.labels {
		c.look(namespace, false)
	}
	for namespace := range c.spaces {
		c.look(namespace, false)
	}
}

// look finds out whether something is to be done in a namespace. Nothing is before both lists are complete: until then
// every copy looks as if nobody wanted it.
func (c *copies) look(namespace string, first bool) {
	if c.want == nil || c.labels == nil || !c.seen || namespace == c.home {
		return
	}
	s, asked := c.spaces[namespace], c.labels[namespace]
	defer c.told()
	switch {
	case s == nil && !asked:
		return
	case s == nil:
		s = c.space(namespace)
	case !asked && s.uid == "":
		delete(c.spaces, namespace)
		delete(c.due, namespace)
		return
	}
	c.sees(s)
	switch {
	case !asked && !s.ours, asked && s.uid != "" && !s.ours && s.told == s.uid:
		return
	case asked && s.uid != "" && s.ours && s.digest == c.want.digest && !s.immutable:
		s.good = s.digest
		return
	}
	c.add(namespace, s.after, first)
}

// add puts a namespace on the list of those to be looked at.
func (c *copies) add(namespace string, at time.Time, first bool) {
	if old, ok := c.due[namespace]; ok {
		first = first || old.first
	}
	c.due[namespace] = dueCopy{at, first}
	wake(c.wake)
}

// next takes the namespace to look at now, or says how long there is none.
func (c *copies) next(now time.Time) (namespace string, wait time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wait = retryRefused
	for ns, d := range c.due { // in no order, so that replicas begin at different ends
		if left := d.at.Sub(now); left > 0 {
			wait = min(wait, left)
			continue
		}
		if namespace = ns; d.first {
			break
		}
	}
	delete(c.due, namespace)
	return namespace, wait
}

// run works until ctx ends.
func (c *copies) run(ctx context.Context) {
	down := 0 // failures in a row that were the API server's
	for {
		namespace, wait := c.next(time.Now())
		if namespace != "" {
			err := c.settle(ctx, namespace)
			if ctx.Err() != nil {
				return
			}
			if wait = c.gap; c.done(namespace, err) {
				down++
				wait = backoff(down, retryMost)
			} else {
				down = 0
			}
			select { // nothing may shorten this
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		case <-time.After(wait):
		}
	}
}

// backoff is how long to wait after that many failures in a row: from retryFirst, doubled each time, with jitter.
func backoff(fails int, most time.Duration) time.Duration {
	d := most
	if fails < 16 {
		d = min(most, retryFirst<<(fails-1))
	}
	return d/2 + rand.N(d/2) + 1
}

// done notes how a look at a namespace ended, and says whether the API server itself is in trouble.
func (c *copies) done(namespace string, err error) (general bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.spaces[namespace]
	if s == nil {
		return false
	}
	defer c.told()
	if !s.foreign() {
		s.place.ended(err)
	}
	if err == nil {
		s.fails, s.after = 0, time.Now().Add(copyPause)
		if s.uid == "" && !c.labels[namespace] {
			delete(c.spaces, namespace)
		}
		return false
	}
	cause := kube.CauseOf(err)
	if errors.Is(err, errReplaced) {
		cause = kube.CauseConflict
	}
	c.metrics.failures.WithLabelValues(kindCopy, string(cause)).Inc()
	if general = cause.General(); general {
		c.add(namespace, time.Now(), true)
		return true
	}
	s.fails++
	s.after = time.Now().Add(backoff(s.fails, retryRefused))
	c.add(namespace, s.after, true)
	if s.fails == 3 { // replicas that are in each other's way are not so for long
		c.log.Warn("a copy of the bundle cannot be written", "namespace", namespace, "error", err)
	}
	return false
}

// count is what the metrics show.
func (c *copies) count() (current, outdated, foreign int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for namespace := range c.labels {
		s := c.spaces[namespace]
		switch {
		case namespace == c.home:
		case s != nil && s.foreign():
			foreign++
		case s != nil && s.uid != "" && c.want != nil && s.digest == c.want.digest:
			current++
		default:
			outdated++
		}
	}
	return current, outdated, foreign
}

// tell appends what each copy that is asked for holds. Where it is not known yet who asks, that is told: none is not evidence of none.
func (c *copies) tell(list []journal.Copy) []journal.Copy {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.labels == nil || !c.seen {
		return append(list, c.unseen.copy(placeConfigMap, "*/"+BundleConfigMap, ""))
	}
	for _, namespace := range slices.Sorted(maps.Keys(c.labels)) {
		if namespace == c.home {
			continue
		}
		var p place
		if s := c.spaces[namespace]; s != nil {
			p = s.place
		}
		// Nobody in a namespace that was made since has another one to be rid of: where namespaces come and go, some copy would always be
		// too young.
		if w := c.want; w != nil && p.held == heldOf(w.bundle) && !p.other && c.made[namespace].After(w.at) {
			p.since = w.at
		}
		list = append(list, p.copy(placeConfigMap, namespace+"/"+BundleConfigMap, namespace))
	}
	return list
}

// held is how many ConfigMaps of the name are remembered.
func (c *copies) held() int {
	n := 0
	for _, s := range c.spaces {
		if s.uid != "" {
			n++
		}
	}
	return n
}

// alarm counts a change by somebody else, and tells of it.
func (c *copies) alarm(ctx context.Context, namespace, what string, reason error) {
	c.metrics.reverts.WithLabelValues(kindCopy).Inc()
	c.mu.Lock()
	quiet := c.space(namespace).quiet()
	c.mu.Unlock()
	if !quiet {
		c.log.ErrorContext(ctx, what, "namespace", namespace, "configmap", BundleConfigMap, "error", reason)
	}
}

// tampered is the reason of an alarm about what held sequence where ours was expected.
func tampered(sequence uint64, b *ca.Bundle) error {
	if sequence == b.Generation.Sequence() {
		return api.E(api.BundleEquivocation, "something else claims generation %s", b.Generation)
	}
	return nil
}
