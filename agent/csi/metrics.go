package csi

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/internal/metrics"
)

// Metrics are the plugin's own. No label holds the name of a pod.
type Metrics struct {
	prometheus.Collector // all of them

	calls      *prometheus.CounterVec
	failures   *prometheus.CounterVec
	swept      *prometheus.CounterVec
	remade     prometheus.Counter
	forgotten  prometheus.Counter
	volumes    prometheus.Gauge
	registered prometheus.Gauge
}

// NewMetrics returns a plugin's metrics, to be registered by the caller.
func NewMetrics() *Metrics {
	m := &Metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_agent_volume_calls_total", Help: "Calls of kubelet that were done, by call (publish, unpublish, other)."}, []string{"call"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_agent_volume_failures_total", Help: "Calls of kubelet that failed, by call (publish, unpublish) and reason."}, []string{"call", "reason"}),
		swept: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_agent_volumes_swept_total", Help: "Volumes of pods that were gone without a word, by what was left (pod_gone, leftover)."}, []string{"what"}),
		remade: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_agent_sockets_remade_total", Help: "Sockets of pods that somebody removed or replaced. Any is worth a look."}),
		forgotten: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_agent_volumes_not_remembered_total", Help: "Volumes that could not be remembered for the next start."}),
		volumes: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_agent_volumes", Help: "Volumes that are published."}),
		registered: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_agent_kubelet_registered", Help: "1 while kubelet has registered the volume plugin."}),
	}
	m.Collector = metrics.Group{m.calls, m.failures, m.swept, m.remade, m.forgotten, m.volumes, m.registered}
	return m
}

// Collector returns the metrics of d.
func (d *Driver) Collector() prometheus.Collector { return d.metrics }
