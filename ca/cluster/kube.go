package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/kube"
	"github.com/signet-ca/signet/internal/run"
)

// Defaults and bounds of a KubeDirectory.
const (
	DefaultStale = 5 * time.Second
	MinStale     = time.Second
	MaxStale     = time.Minute

	liveLookups = 16              // under way at once
	missTime    = time.Second     // for which a pod that is not there is not looked up again
	maxMisses   = 4096            // remembered at once
	maxGone     = 1 << 14         // deleted pods that are remembered
	clockSkew   = 2 * time.Second // between the API servers of one cluster, by whole seconds
)

// KubeConfig configures a KubeDirectory.
type KubeConfig struct {
	Issuer string        // of the cluster's tokens. Required.
	Client *kube.Client  // of its API server. Required.
	Stale  time.Duration // how long the watches may be cut; zero: DefaultStale
	Log    *slog.Logger  // required

	// Persist is a file that keeps what was last seen over a restart, in a folder of this process alone. Empty: nothing is.
	Persist string

	// Agents is the DaemonSet whose pods are agents. Zero: it is not asked whose pod an agent is.
	Agents DaemonSet

	// Metrics that the watches report to. Nil: nobody asks.
	Metrics *Metrics
}

// DaemonSet is one by its names.
type DaemonSet struct{ Namespace, Name string }

// KubeDirectory is a ca.Directory over watches of one cluster's pods, ServiceAccounts and nodes. Run keeps it; before its
// first lists are complete, and while a watch has been cut for longer than Stale, nothing can be told.
//
// Of a pod only what a decision needs is kept. The UIDs of its ServiceAccount and of its node are those that live under
// these names now, so a token that names others is refused.
type KubeDirectory struct {
	cfg     KubeConfig
	watches []*kube.Watch
	lookups chan struct{} // one token for each live look-up that may be under way

	mu       sync.RWMutex
	pods     map[string]kubePod // by UID
	accounts map[account]owner
	nodes    map[string]string // UIDs by name
	gone     map[string]struct{}
	goneRing []string
	goneNext int
	misses   map[string]time.Time // until when, by UID
	agents   agentSet
	changes  uint64    // of what is kept in Persist
	ends     uint64    // those of them by which something is gone, or soon will be
	restored time.Time // up to when Persist had seen everything; zero: there was none

	missing  atomic.Pointer[string] // the permission that is missing; nil: none that is known of
	told     sync.Mutex
	lastTold map[string]time.Time // by what was told
}

type account struct{ namespace, name string }

// owner is a ServiceAccount.
type owner struct {
	uid  string
	made time.Time
}

// kubePod is what is kept of a pod.
type kubePod struct {
	namespace, name, account, node string
	made, deleteAt                 int64 // Unix seconds; deleteAt 0: it is not being deleted
	finished                       bool
	daemonSet                      string // UID
}

// NewKubeDirectory returns a directory that knows nothing before Run.
func NewKubeDirectory(cfg KubeConfig) (*KubeDirectory, error) {
	if cfg.Stale == 0 {
		cfg.Stale = DefaultStale
	}
	if cfg.Issuer == "" || cfg.Client == nil || cfg.Log == nil || cfg.Stale < MinStale || cfg.Stale > MaxStale {
		return nil, fmt.Errorf("a directory needs an issuer, a client, a log, and a bound between %s and %s", MinStale, MaxStale)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics()
	}
	d := &KubeDirectory{
		cfg: cfg, lookups: make(chan struct{}, liveLookups), lastTold: map[string]time.Time{},
		pods: map[string]kubePod{}, accounts: map[account]owner{}, nodes: map[string]string{},
		gone: map[string]struct{}{}, goneRing: make([]string, maxGone), misses: map[string]time.Time{},
		agents: agentSet{turn: make(chan struct{}, 1)},
	}
	d.watches = []*kube.Watch{
		d.watch(kube.Nodes, d.replaceNodes, d.applyNode, func() int { return len(d.nodes) }),
		d.watch(kube.ServiceAccounts, d.replaceAccounts, d.applyAccount, func() int { return len(d.accounts) }),
		d.watch(kube.Pods, d.replacePods, d.applyPod, func() int { return len(d.pods) }),
	}
	if cfg.Persist != "" {
		d.restore()
	}
	return d, nil
}

// watch makes one whose objects are counted by count, which is called while d.mu is held.
func (d *KubeDirectory) watch(r kube.Resource, replace func([]kube.Object), apply func(kube.Object, bool), count func() int) *kube.Watch {
	const part = "directory"
	w := d.cfg.Client.NewWatch(kube.WatchConfig{
		Resource: r, Stale: d.cfg.Stale, Replace: replace, Apply: apply,
		Failed: func(err error) {
			d.cfg.Metrics.failed(part, d.cfg.Issuer, r, err)
			d.tell(string(r), err.Error())
		},
	})
	d.cfg.Metrics.add(watched{part, d.cfg.Issuer, r, w, func() int {
		d.mu.RLock()
		defer d.mu.RUnlock()
		return count()
	}})
	return w
}

// tell logs a problem, of one watch at most once a minute.
func (d *KubeDirectory) tell(what, problem string) {
	d.told.Lock()
	defer d.told.Unlock()
	if last := d.lastTold[what]; !last.IsZero() && time.Since(last) < time.Minute {
		return
	}
	d.lastTold[what] = time.Now()
	d.cfg.Log.Warn("the cluster is not seen", "issuer", d.cfg.Issuer, "resource", what, "error", problem[:min(len(problem), 512)])
}

// Rules are the permissions that it needs.
func (d *KubeDirectory) Rules() []kube.Rule {
	var rules []kube.Rule
	for _, r := range []kube.Resource{kube.Pods, kube.ServiceAccounts, kube.Nodes} {
		for _, verb := range []string{"get", "list", "watch"} {
			rules = append(rules, kube.Rule{Resource: string(r), Verb: verb})
		}
	}
	if a := d.cfg.Agents; a != (DaemonSet{}) {
		rules = append(rules, kube.Rule{Group: kube.AppsGroup, Resource: string(kube.DaemonSets), Verb: "get", Namespace: a.Namespace, Name: a.Name})
	}
	return rules
}

// Run follows the cluster until ctx ends.
func (d *KubeDirectory) Run(ctx context.Context) error {
	tasks := []run.Task{{Name: "permissions", Run: d.checkRules}, {Name: "memory", Run: d.remember}}
	for _, w := range d.watches {
		tasks = append(tasks, run.Task{Name: "watch", Run: w.Run})
	}
	defer d.cfg.Client.Close()
	return run.All(ctx, tasks...)
}

// How often it is checked that the API server lets us see the cluster, while it does and while it does not.
const (
	checkGood = 5 * time.Minute
	checkBad  = 5 * time.Second
)

func (d *KubeDirectory) checkRules(ctx context.Context) error {
	for {
		wait := checkGood
		err := d.cfg.Client.CheckRules(ctx, d.Rules()...)
		switch {
		case err == nil:
			d.missing.Store(nil)
		case errors.Is(err, kube.ErrForbidden):
			d.missing.Store(new(err.Error()))
			d.tell("permissions", err.Error())
			wait = checkBad
		default:
			wait = checkBad
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// NotReady names a permission that is missing; empty while none is known to be. An API server that does not answer is not
// told here: agents must reach a CA that cannot attest anybody new, for the bundle and for an answer that says why.
func (d *KubeDirectory) NotReady() string {
	if rule := d.missing.Load(); rule != nil {
		return fmt.Sprintf("the cluster of issuer %s cannot be seen: %s", d.cfg.Issuer, *rule)
	}
	return ""
}

var errUnsynced = errors.New("its first lists are not complete")

// current says whether what is known is not older than allowed.
func (d *KubeDirectory) current(now time.Time) error {
	for _, w := range d.watches {
		seen := w.Seen()
		if seen.IsZero() {
			return errUnsynced
		}
		if old := age(now, seen); old > d.cfg.Stale {
			return fmt.Errorf("a watch has been cut for %s", old.Round(100*time.Millisecond))
		}
	}
	return nil
}

// Pod implements ca.Directory.
func (d *KubeDirectory) Pod(ctx context.Context, id ca.PodID) (ca.Pod, error) {
	if id.Issuer != d.cfg.Issuer {
		return ca.Pod{}, errUnknown()
	}
	if err := d.current(time.Now()); err != nil {
		return ca.Pod{}, unavailable(err)
	}
	d.mu.RLock()
	p, known := d.pods[id.UID]
	_, gone := d.gone[id.UID]
	missed := time.Now().Before(d.misses[id.UID])
	d.mu.RUnlock()
	switch {
	case gone:
		return ca.Pod{}, api.E(api.PodDeleted, "the pod is deleted")
	case missed:
		return ca.Pod{}, errUnknown()
	case !known || p.node == "": // the watch may be a moment behind, about the pod or about where it runs
		var err error
		if p, err = d.lookUp(ctx, id); err != nil {
			return ca.Pod{}, err
		}
	}
	return d.complete(ctx, id, p)
}

func errUnknown() error { return api.E(api.PodUnknown, "the cluster knows no such pod") }

func unavailable(err error) error {
	return api.Wrap(api.DirectoryUnavailable, err, "the cluster cannot be seen now")
}

// complete adds who owns the pod and where it runs, as it is now.
func (d *KubeDirectory) complete(ctx context.Context, id ca.PodID, p kubePod) (ca.Pod, error) {
	d.mu.RLock()
	sa, node := d.accounts[account{p.namespace, p.account}], d.nodes[p.node]
	_, gone := d.gone[id.UID] // in the meantime
	d.mu.RUnlock()
	if sa.uid == "" {
		o, err := d.live(ctx, kube.ServiceAccounts, p.namespace, p.account)
		if errors.Is(err, kube.ErrNotFound) {
			return ca.Pod{}, api.E(api.PodMismatch, "the pod's ServiceAccount is gone")
		}
		if err != nil {
			return ca.Pod{}, unavailable(err)
		}
		sa = owner{o.UID, o.Created}
	}
	if node == "" {
		o, err := d.live(ctx, kube.Nodes, "", p.node)
		if errors.Is(err, kube.ErrNotFound) {
			return ca.Pod{}, api.E(api.PodMismatch, "the pod's node is gone")
		}
		if err != nil {
			return ca.Pod{}, unavailable(err)
		}
		node = o.UID
	}
	switch {
	case gone:
		return ca.Pod{}, api.E(api.PodDeleted, "the pod is deleted")
	case olderThan(p, sa):
		return ca.Pod{}, errAccountAnew()
	}
	return d.pod(id, p, sa, node), nil
}

// olderThan reports whether a pod still runs as what its ServiceAccount once was, though kubelet gets tokens of the new one
// for it.
func olderThan(p kubePod, sa owner) bool {
	return time.Unix(p.made, 0).Add(clockSkew).Before(sa.made)
}

func errAccountAnew() error {
	return api.E(api.PodMismatch, "the pod is older than its ServiceAccount, which was made anew")
}

// pod is a pod as it is told.
func (d *KubeDirectory) pod(id ca.PodID, p kubePod, sa owner, node string) ca.Pod {
	pod := ca.Pod{
		Issuer: d.cfg.Issuer, Namespace: p.namespace, Name: p.name, UID: id.UID,
		ServiceAccount: p.account, ServiceAccountUID: sa.uid, NodeName: p.node, NodeUID: node, Finished: p.finished,
		DaemonSet: p.daemonSet,
	}
	if p.deleteAt != 0 {
		pod.DeleteAt = time.Unix(p.deleteAt, 0)
	}
	return pod
}

// lookUp asks the cluster about a pod that the watch has not told of. What it finds is not kept: the watch will tell.
func (d *KubeDirectory) lookUp(ctx context.Context, id ca.PodID) (kubePod, error) {
	if id.Name == "" || id.Namespace == "" {
		return kubePod{}, errUnknown()
	}
	o, err := d.live(ctx, kube.Pods, id.Namespace, id.Name)
	switch {
	case err != nil && !errors.Is(err, kube.ErrNotFound):
		return kubePod{}, unavailable(err)
	case err != nil || o.UID != id.UID || o.NodeName == "":
		d.miss(id.UID, time.Now())
		return kubePod{}, errUnknown()
	}
	return reduce(o), nil
}

// live reads one object past the watch, if few enough do at this moment; others wait for their turn.
func (d *KubeDirectory) live(ctx context.Context, r kube.Resource, namespace, name string) (kube.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Stale)
	defer cancel()
	select {
	case d.lookups <- struct{}{}:
		defer func() { <-d.lookups }()
	case <-ctx.Done():
		return kube.Object{}, ctx.Err()
	}
	return d.cfg.Client.Get(ctx, r, namespace, name)
}

// miss remembers for a moment that there is no such pod.
func (d *KubeDirectory) miss(uid string, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.misses) >= maxMisses {
		maps.DeleteFunc(d.misses, func(_ string, until time.Time) bool { return !now.Before(until) })
	}
	if len(d.misses) < maxMisses {
		d.misses[uid] = now.Add(missTime)
	}
}

func reduce(o kube.Object) kubePod {
	p := kubePod{
		namespace: o.Namespace, name: o.Name, account: o.ServiceAccount, node: o.NodeName, made: o.Created.Unix(),
		finished: o.Phase == "Succeeded" || o.Phase == "Failed", daemonSet: o.DaemonSet,
	}
	if !o.DeleteAt.IsZero() {
		p.deleteAt = o.DeleteAt.Unix()
	}
	return p
}

func (d *KubeDirectory) replacePods(all []kube.Object) {
	pods := make(map[string]kubePod, len(all))
	for _, o := range all {
		pods[o.UID] = reduce(o)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.changed(true)
	for uid := range d.pods {
		if _, still := pods[uid]; !still {
			d.bury(uid)
		}
	}
	d.pods = pods
}

func (d *KubeDirectory) applyPod(o kube.Object, deleted bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.misses, o.UID)
	if p, was := reduce(o), d.pods[o.UID]; !deleted {
		d.changed(p.finished != was.finished || p.deleteAt != was.deleteAt)
		d.pods[o.UID] = p
		return
	}
	d.changed(true)
	delete(d.pods, o.UID)
	d.bury(o.UID)
}

// changed notes a change of what Persist keeps; ends says that by it something is gone, or soon will be.
func (d *KubeDirectory) changed(ends bool) {
	d.changes++
	if ends {
		d.ends++
	}
}

// bury remembers a pod that is gone, for no UID ever comes back: a read that began before must not bring it back either.
func (d *KubeDirectory) bury(uid string) {
	if _, ok := d.gone[uid]; ok {
		return
	}
	delete(d.gone, d.goneRing[d.goneNext])
	d.goneRing[d.goneNext], d.gone[uid] = uid, struct{}{}
	d.goneNext = (d.goneNext + 1) % len(d.goneRing)
}

func (d *KubeDirectory) replaceAccounts(all []kube.Object) {
	accounts := make(map[account]owner, len(all))
	for _, o := range all {
		accounts[account{o.Namespace, o.Name}] = owner{o.UID, o.Created}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.changed(true)
	d.accounts = accounts
}

func (d *KubeDirectory) applyAccount(o kube.Object, deleted bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	k := account{o.Namespace, o.Name}
	was, ok := d.accounts[k]
	d.changed(deleted || ok && was.uid != o.UID)
	if deleted {
		delete(d.accounts, k)
		return
	}
	d.accounts[k] = owner{o.UID, o.Created}
}

func (d *KubeDirectory) replaceNodes(all []kube.Object) {
	nodes := make(map[string]string, len(all))
	for _, o := range all {
		nodes[o.Name] = o.UID
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.changed(true)
	d.nodes = nodes
}

func (d *KubeDirectory) applyNode(o kube.Object, deleted bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	was, ok := d.nodes[o.Name]
	d.changed(deleted || ok && was != o.UID)
	if deleted {
		delete(d.nodes, o.Name)
		return
	}
	d.nodes[o.Name] = o.UID
}

// Clusters is a ca.Directory of several clusters, by issuer.
type Clusters map[string]*KubeDirectory

// Pod implements ca.Directory.
func (c Clusters) Pod(ctx context.Context, id ca.PodID) (ca.Pod, error) {
	if d := c[id.Issuer]; d != nil {
		return d.Pod(ctx, id)
	}
	return ca.Pod{}, errUnknown()
}

// Tasks keep each of them.
func (c Clusters) Tasks() []run.Task {
	var tasks []run.Task
	for _, issuer := range slices.Sorted(maps.Keys(c)) {
		tasks = append(tasks, run.Task{Name: "cluster of " + issuer, Run: c[issuer].Run})
	}
	return tasks
}

// NotReady names the permissions that are missing.
func (c Clusters) NotReady() []string {
	var missing []string
	for _, issuer := range slices.Sorted(maps.Keys(c)) {
		if why := c[issuer].NotReady(); why != "" {
			missing = append(missing, why)
		}
	}
	return missing
}
