// Package metrics holds what every part that counts needs of Prometheus beside its client.
//
// No part registers its metrics itself: it hands them out as one collector, and the command that wires it decides what is
// shown where. So nothing is shown by having been linked, and a test may have many of the same part.
package metrics

import "github.com/prometheus/client_golang/prometheus"

// Group is several collectors as one. It does not change once it is registered.
type Group []prometheus.Collector

// Describe implements prometheus.Collector.
func (g Group) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range g {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (g Group) Collect(ch chan<- prometheus.Metric) {
	for _, c := range g {
		c.Collect(ch)
	}
}
