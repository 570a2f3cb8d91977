package main

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/agent/workloadapi"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/metrics"
	"github.com/signet-ca/signet/sds"
)

// sdsMetrics are those of the SDS server.
type sdsMetrics struct {
	prometheus.Collector // all of them

	streams prometheus.Gauge
	refused *prometheus.CounterVec
	pushed  *prometheus.CounterVec
	answers *prometheus.CounterVec
	latency prometheus.Histogram
}

func newMetrics() *sdsMetrics {
	m := &sdsMetrics{
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_sds_streams", Help: "SDS streams that are open now."}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_sds_refusals_total", Help: "SDS streams that were not let in or were ended, by reason of the closed table."}, []string{"reason"}),
		pushed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_sds_pushes_total", Help: "Secrets pushed, by kind (identity, trust)."}, []string{"kind"}),
		answers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_sds_updates_total", Help: "Answers to pushes, by result (ack, nack)."}, []string{"result"}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "signet_sds_answer_duration_seconds", Help: "Time from a push to its answer.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .5, 1, 5, 30}}),
	}
	m.Collector = metrics.Group{m.streams, m.refused, m.pushed, m.answers, m.latency}
	return m
}

func (m *sdsMetrics) hooks() sds.Hooks {
	return sds.Hooks{
		Opened: func(string) { m.streams.Inc() },
		Closed: func(_ string, reason api.Reason) {
			m.streams.Dec()
			if reason != "" {
				m.refused.WithLabelValues(string(reason)).Inc()
			}
		},
		Refused: func(_ string, reason api.Reason) { m.refused.WithLabelValues(string(reason)).Inc() },
		Pushed:  func(_, kind string) { m.pushed.WithLabelValues(kind).Inc() },
		Answered: func(_ string, acked bool, in time.Duration) {
			result := "nack"
			if acked {
				result = "ack"
			}
			m.answers.WithLabelValues(result).Inc()
			m.latency.Observe(in.Seconds())
		},
	}
}

// podMetrics are those of the Workload API, whose sockets are the pods'.
type podMetrics struct {
	prometheus.Collector // all of them

	streams *prometheus.GaugeVec
	refused *prometheus.CounterVec
	pushed  *prometheus.CounterVec
}

func newPodMetrics() *podMetrics {
	m := &podMetrics{
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "signet_workloadapi_streams", Help: "Streams of the Workload API that are open now, by call."}, []string{"call"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_workloadapi_refusals_total", Help: "Calls of the Workload API that were not let in or were ended, by reason of the closed table."}, []string{"reason"}),
		pushed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_workloadapi_pushes_total", Help: "Messages of the Workload API that were delivered, by call."}, []string{"call"}),
	}
	m.Collector = metrics.Group{m.streams, m.refused, m.pushed}
	return m
}

func (m *podMetrics) hooks() workloadapi.Hooks {
	return workloadapi.Hooks{
		Opened: func(call string) { m.streams.WithLabelValues(call).Inc() },
		Closed: func(call string, reason api.Reason) {
			m.streams.WithLabelValues(call).Dec()
			if reason != "" {
				m.refused.WithLabelValues(string(reason)).Inc()
			}
		},
		Refused: func(_ string, reason api.Reason) { m.refused.WithLabelValues(string(reason)).Inc() },
		Pushed:  func(call string) { m.pushed.WithLabelValues(call).Inc() },
	}
}
