package cluster

import (
	"math"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/internal/kube"
	"github.com/signet-ca/signet/internal/metrics"
)

// Metrics are those of the directories and of the publisher that were given them. No label holds the name of a namespace,
// a pod or anything else that somebody else chose.
type Metrics struct {
	prometheus.Collector // all of them

	watchFailures *prometheus.CounterVec
	reverts       *prometheus.CounterVec
	failures      *prometheus.CounterVec
	watches       *watchCollector
	copies        *copiesCollector
	trustBundle   prometheus.Gauge
}

// Kinds of what is published, as metrics name them.
const (
	kindBundle      = "bundle"       // the ConfigMap that agents believe
	kindCopy        = "copy"         // of it, in another namespace
	kindTrustBundle = "trust_bundle" // the ClusterTrustBundle
)

// NewMetrics returns metrics that nothing reports to yet, to be registered by the caller.
func NewMetrics() *Metrics {
	m := &Metrics{
		watchFailures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_watch_failures_total", Help: "Times that a watch of the cluster could not be opened or broke off, by cause."},
			[]string{"part", "cluster", "resource", "cause"}),
		reverts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_bundle_reverts_total", Help: "Changes of the published bundle by somebody else that were found, to be put right, by what was changed (bundle, copy, trust_bundle); one counts again with each attempt that it takes. Any is worth a look; of bundle it is an incident."},
			[]string{"kind"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_bundle_write_failures_total", Help: "Attempts to publish the bundle that failed, by what was written (bundle, copy, trust_bundle) and cause."},
			[]string{"kind", "cause"}),
		trustBundle: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_bundle_trust_bundle_published", Help: "1 while the ClusterTrustBundle holds the bundle; 0 while it does not, or the API server knows no such kind, or none is wanted."}),
		watches: &watchCollector{
			connected: prometheus.NewDesc("signet_watch_connected", "1 while a watch of the cluster has an open stream.", watchLabels, nil),
			age:       prometheus.NewDesc("signet_watch_age_seconds", "Time up to which a watch of the cluster is known to have missed nothing, before now: since its last probe that was answered. +Inf before its first list.", watchLabels, nil),
			objects:   prometheus.NewDesc("signet_watch_objects", "Objects of a watch of the cluster that are remembered.", watchLabels, nil),
		},
		copies: &copiesCollector{desc: prometheus.NewDesc("signet_bundle_copies",
			"Namespaces that ask for a copy of the bundle, by what they have (current; outdated, or none yet; foreign: a ConfigMap of its name that is somebody else's).", []string{"state"}, nil)},
	}
	for _, kind := range []string{kindBundle, kindCopy, kindTrustBundle} {
		m.reverts.WithLabelValues(kind) // so that the first is seen as a rise from 0
	}
	m.Collector = metrics.Group{m.watchFailures, m.reverts, m.failures, m.trustBundle, m.watches, m.copies}
	return m
}

var watchLabels = []string{"part", "cluster", "resource"}

// watched is one watch as the metrics show it.
type watched struct {
	part, cluster string
	resource      kube.Resource
	watch         *kube.Watch
	objects       func() int
}

// add shows a watch. Labels that are the same may be there once only.
func (m *Metrics) add(w watched) {
	m.watches.mu.Lock()
	defer m.watches.mu.Unlock()
	m.watches.all = append(m.watches.all, w)
}

// failed counts one failure of a watch.
func (m *Metrics) failed(part, cluster string, r kube.Resource, err error) {
	m.watchFailures.WithLabelValues(part, cluster, string(r), string(kube.CauseOf(err))).Inc()
}

// watchCollector asks the watches when it is asked.
type watchCollector struct {
	connected, age, objects *prometheus.Desc

	mu  sync.Mutex
	all []watched
}

// Describe implements prometheus.Collector.
func (c *watchCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.connected
	ch <- c.age
	ch <- c.objects
}

// Collect implements prometheus.Collector.
func (c *watchCollector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	all := c.all[:len(c.all):len(c.all)]
	c.mu.Unlock()
	for _, w := range all {
		gauge := func(d *prometheus.Desc, v float64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, w.part, w.cluster, string(w.resource))
		}
		connected, since := 0.0, math.Inf(1)
		if w.watch.Connected() {
			connected = 1
		}
		if seen := w.watch.Seen(); !seen.IsZero() {
			since = age(time.Now(), seen).Seconds()
		}
		gauge(c.connected, connected)
		gauge(c.age, since)
		gauge(c.objects, float64(w.objects()))
	}
}

// age is how long ago seen was. Time that the machine slept counts: the monotonic clock stands still then, so both clocks
// must agree.
func age(now, seen time.Time) time.Duration {
	return max(now.Sub(seen), now.Round(0).Sub(seen.Round(0)))
}

// copiesCollector counts the copies when it is asked.
type copiesCollector struct {
	desc *prometheus.Desc

	mu    sync.Mutex
	count func() (current, outdated, foreign int) // nil: no copies are made
}

func (c *copiesCollector) set(count func() (current, outdated, foreign int)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count = count
}

// Describe implements prometheus.Collector.
func (c *copiesCollector) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

// Collect implements prometheus.Collector.
func (c *copiesCollector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	count := c.count
	c.mu.Unlock()
	if count == nil {
		return
	}
	current, outdated, foreign := count()
	for state, n := range map[string]int{"current": current, "outdated": outdated, "foreign": foreign} {
		ch <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(n), state)
	}
}
