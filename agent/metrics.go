package agent

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/internal/metrics"
)

// Metrics are the agent's own. No label holds the name of a workload.
type Metrics struct {
	prometheus.Collector // all of them

	renewals        *prometheus.CounterVec
	first           prometheus.Histogram
	expired         prometheus.Counter
	sessionFailures prometheus.Counter
	trustRefused    prometheus.Counter
	connected       prometheus.Gauge
	banned          prometheus.Gauge
	generation      prometheus.Gauge
	selfEnd         prometheus.Gauge
}

// NewMetrics returns an agent's metrics, to be registered by the caller.
func NewMetrics() *Metrics {
	m := &Metrics{
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_agent_renewals_total", Help: "Attempts to obtain an SVID for a workload, by result (ok, failed)."}, []string{"result"}),
		first: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "signet_agent_first_svid_duration_seconds", Help: "Time from the first token of a pod to its first SVID.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}}),
		expired: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_agent_expired_total", Help: "SVIDs that expired because they could not be renewed."}),
		sessionFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_agent_session_failures_total", Help: "Attempts to open a session with the CA that failed, and sessions that broke."}),
		trustRefused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_agent_bundles_refused_total", Help: "Trust bundles from the CA that did not follow from the one held. Any is an incident."}),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_agent_connected", Help: "1 while there is a session with the CA."}),
		banned: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_agent_banned", Help: "1 while the CA refuses this node because it is banned."}),
		generation: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_agent_bundle_sequence", Help: "Generation of the trust bundle that is held, as spiffe_sequence."}),
		selfEnd: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_agent_own_svid_not_after_timestamp_seconds", Help: "When the agent's own SVID expires."}),
	}
	m.Collector = metrics.Group{m.renewals, m.first, m.expired, m.sessionFailures, m.trustRefused, m.connected, m.banned, m.generation, m.selfEnd}
	return m
}

// heldCollector reads what an agent holds when it is asked.
type heldCollector struct {
	agent        *Agent
	count, first *prometheus.Desc
}

// Collector returns the metrics of a, and what it holds now.
func (a *Agent) Collector() prometheus.Collector {
	return metrics.Group{a.metrics, &heldCollector{
		agent: a,
		count: prometheus.NewDesc("signet_agent_svids", "SVIDs that are held for workloads.", nil, nil),
		first: prometheus.NewDesc("signet_agent_svid_earliest_not_after_timestamp_seconds", "When the first of the held SVIDs expires.", nil, nil),
	}}
}

// Describe implements prometheus.Collector.
func (h *heldCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- h.count
	ch <- h.first
}

// Collect implements prometheus.Collector.
func (h *heldCollector) Collect(ch chan<- prometheus.Metric) {
	count, first := 0, 0.0
	for _, id := range h.agent.list() {
		s := id.held.Load().SVID
		if s == nil {
			continue
		}
		if end := float64(s.Certificates[0].NotAfter.Unix()); count == 0 || end < first {
			first = end
		}
		count++
	}
	ch <- prometheus.MustNewConstMetric(h.count, prometheus.GaugeValue, float64(count))
	if count > 0 {
		ch <- prometheus.MustNewConstMetric(h.first, prometheus.GaugeValue, first)
	}
}

func (m *Metrics) setTrust(t *Trust) { m.generation.Set(float64(t.Generation.Sequence())) }
