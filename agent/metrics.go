package agent

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the agent's own. No label holds the name of a workload.
type Metrics struct {
	renewals        *prometheus.CounterVec
	expired         prometheus.Counter
	sessionFailures prometheus.Counter
	trustRefused    prometheus.Counter
	connected       prometheus.Gauge
	generation      prometheus.Gauge
	selfEnd         prometheus.Gauge
	held            *heldCollector
}

// NewMetrics returns an agent's metrics, to be registered by the caller.
func NewMetrics() *Metrics {
	return &Metrics{
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_agent_renewals_total", Help: "Attempts to obtain an SVID for a workload, by result (ok, failed)."}, []string{"result"}),
		expired: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_agent_expired_total", Help: "SVIDs that expired because they could not be renewed."}),
		sessionFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_agent_session_failures_total", Help: "Attempts to open a session with the CA that failed, and sessions that broke."}),
		trustRefused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_agent_bundles_refused_total", Help: "Trust bundles from the CA that did not follow from the one held. Any is an incident."}),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_agent_connected", Help: "1 while there is a session with the CA."}),
		generation: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_agent_bundle_sequence", Help: "Generation of the trust bundle that is held, as spiffe_sequence."}),
		selfEnd: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_agent_own_svid_not_after_timestamp_seconds", Help: "When the agent's own SVID expires."}),
		held: &heldCollector{
			count: prometheus.NewDesc("signet_agent_svids", "SVIDs that are held for workloads.", nil, nil),
			first: prometheus.NewDesc("signet_agent_svid_earliest_not_after_timestamp_seconds", "When the first of the held SVIDs expires.", nil, nil),
		},
	}
}

// heldCollector reads what an agent holds when it is asked.
type heldCollector struct {
	agent        *Agent // nil until Collector
	count, first *prometheus.Desc
}

// Collector returns the metrics of a.
func (a *Agent) Collector() prometheus.Collector {
	m := *a.metrics
	m.held = &heldCollector{agent: a, count: m.held.count, first: m.held.first}
	return &m
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.all() {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m.all() {
		c.Collect(ch)
	}
}

func (m *Metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.renewals, m.expired, m.sessionFailures, m.trustRefused, m.connected, m.generation, m.selfEnd, m.held}
}

// Describe implements prometheus.Collector.
func (h *heldCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- h.count
	ch <- h.first
}

// Collect implements prometheus.Collector.
func (h *heldCollector) Collect(ch chan<- prometheus.Metric) {
	if h.agent == nil {
		return
	}
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
