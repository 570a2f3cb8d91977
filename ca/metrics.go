package ca

import (
	"crypto/x509"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/metrics"
)

// Metrics are the CA's own. No label holds a name that a workload or a client chose.
type Metrics struct {
	prometheus.Collector // all of them

	issued          *prometheus.CounterVec
	refusals        *prometheus.CounterVec
	issueSeconds    prometheus.Histogram
	sessions        prometheus.Gauge
	authorityEnd    *prometheus.GaugeVec
	generation      prometheus.Gauge
	mintFailures    prometheus.Counter
	mintRefusals    *prometheus.CounterVec
	upstreamUp      prometheus.Gauge
	rootsAnnounced  prometheus.Gauge
	publishFailures prometheus.Counter
	foreignBundles  prometheus.Counter
	banned          prometheus.Gauge
	breakGlass      prometheus.Counter
	known           *prometheus.CounterVec
	away            *prometheus.GaugeVec

	rotationBegun    prometheus.Gauge
	rotationBlockers *prometheus.GaugeVec
	rotationSteps    *prometheus.CounterVec
	rotationFailures prometheus.Counter
	rotationSchedule *prometheus.GaugeVec
	authorities      *prometheus.GaugeVec
	waiting          prometheus.Gauge
	waitSeconds      prometheus.Histogram
	turnedAway       *prometheus.CounterVec
}

// NewMetrics returns the CA's metrics, to be registered by the caller.
func NewMetrics() *Metrics {
	m := &Metrics{
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_svids_issued_total", Help: "SVIDs issued, by what they are for (workload, agent)."}, []string{"kind"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_refusals_total", Help: "Requests refused, by reason of the closed table."}, []string{"reason"}),
		issueSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "signet_issue_duration_seconds", Help: "Time from an attested request's turn to its SVID.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1}}),
		sessions: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_agent_sessions", Help: "Sessions of agents that are open now."}),
		authorityEnd: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "signet_authority_not_after_timestamp_seconds", Help: "When an authority expires, by kind (root, intermediate) and id."}, []string{"kind", "id"}),
		generation: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_bundle_sequence", Help: "Generation of the trust bundle, as spiffe_sequence."}),
		mintFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_intermediate_failures_total", Help: "Intermediates that could not be minted."}),
		publishFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_bundle_publish_failures_total", Help: "Times that the bundle could not be published."}),
		breakGlass: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_break_glass_calls_total", Help: "Calls that were let in by a break-glass certificate; normally none."}),
	}
	m.banned = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "signet_ca_nodes_banned", Help: "Nodes that operators have banned and not allowed again."})
	m.known = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "signet_ca_grace_renewals_total", Help: "SVIDs renewed by their tickets while the API server of their cluster was away, by what they are for (workload, agent)."}, []string{"kind"})
	m.mintRefusals = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "signet_ca_upstream_refusals_total", Help: "Intermediates that the upstream did not sign or that were refused, by reason of the closed table."}, []string{"reason"})
	m.upstreamUp = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "signet_ca_upstream_up", Help: "Whether the upstream would sign under the active root, as it was last probed."})
	m.rootsAnnounced = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "signet_ca_upstream_roots_announced", Help: "Roots that the upstream signs under and that are not in the record: a rotation is wanted."})
	m.away = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "signet_ca_cluster_away_seconds", Help: "For how long the API server of a cluster has been away for this replica; 0 while it is there."}, []string{"cluster"})
	m.waiting = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "signet_ca_admission_waiting", Help: "Workloads' requests that wait for their turn now."})
	m.waitSeconds = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "signet_ca_admission_wait_seconds", Help: "Time that a workload's request waited for its turn, where it had one.",
		Buckets: []float64{.0001, .001, .005, .025, .1, .25, .5, 1, 2.5, 5}})
	m.turnedAway = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "signet_ca_admission_refused_total", Help: "Workloads' requests that were sent away to come back later, unread, by what the agent says that it holds for them (nothing, minute: less than one is left, longer, unsaid)."}, []string{"holds"})
	for _, u := range []urgency{holdsNothing, holdsMinute, holdsLonger, holdsUnsaid} {
		m.turnedAway.WithLabelValues(string(u))
	}
	for _, kind := range []string{"workload", "agent"} {
		m.known.WithLabelValues(kind) // so that the first is seen as a rise from 0
	}
	m.rotationBegun = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "signet_ca_rotation_begun_timestamp_seconds", Help: "When the rotation under way was begun; 0 while there is none."})
	m.rotationBlockers = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "signet_ca_rotation_blockers", Help: "Who stands in the way of the next step of the rotation, by kind."}, []string{"kind"})
	m.rotationSteps = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "signet_ca_rotation_steps_total", Help: "Steps of rotations that were taken, by what they do (publish, activate, remove)."}, []string{"step"})
	m.rotationFailures = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "signet_ca_rotation_failures_total", Help: "Times that a rotation could not be decided on or stored, or not be begun by itself."})
	m.rotationSchedule = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "signet_ca_rotation_schedule_timestamp_seconds", Help: "Of the active root, when a rotation is due (prepare), when it waits for nobody any more (latest), and when the root expires (expires)."}, []string{"what"})
	m.authorities = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "signet_ca_authorities", Help: "Roots in the record, by state."}, []string{"state"})
	m.foreignBundles = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "signet_ca_foreign_bundles_total", Help: "Sessions of agents that hold a bundle which this CA never had: of a later generation, or another one of the same."})
	m.Collector = metrics.Group{m.foreignBundles, m.rotationBegun, m.rotationBlockers, m.rotationSteps, m.rotationFailures, m.rotationSchedule, m.authorities, m.known, m.away, m.issued, m.refusals, m.issueSeconds, m.sessions, m.authorityEnd, m.generation, m.mintFailures, m.publishFailures, m.banned, m.breakGlass, m.mintRefusals, m.upstreamUp, m.rootsAnnounced,
		m.waiting, m.waitSeconds, m.turnedAway}
	return m
}

// count notes one attempt to issue.
func (m *Metrics) count(kind string, err error) {
	if err == nil {
		m.issued.WithLabelValues(kind).Inc()
	} else if kind == "workload" { // a refused agent is counted at the boundary
		m.refusals.WithLabelValues(string(api.ReasonOf(err))).Inc()
	}
}

// countKnown notes an SVID that was renewed by its ticket; nothing for nil.
func (m *Metrics) countKnown(kind string, k *known) {
	if k != nil {
		m.known.WithLabelValues(kind).Inc()
	}
}

// setAway shows for how long a cluster is away: since it was last seen or, where that is not known, since this process was
// started.
func (m *Metrics) setAway(issuer string, away bool, since, started, now time.Time) {
	v := 0.0
	if since.IsZero() {
		since = started
	}
	if away {
		v = max(0, elapsed(now, since).Seconds())
	}
	m.away.WithLabelValues(issuer).Set(v)
}

func (m *Metrics) setBundle(b *Bundle) {
	m.generation.Set(float64(b.Generation.Sequence()))
	m.authorityEnd.DeletePartialMatch(prometheus.Labels{"kind": "root"})
	for _, r := range b.Roots {
		m.authorityEnd.WithLabelValues("root", hexID(r)).Set(float64(r.NotAfter.Unix()))
	}
}

func (m *Metrics) setIntermediate(c *x509.Certificate) {
	m.authorityEnd.DeletePartialMatch(prometheus.Labels{"kind": "intermediate"})
	m.authorityEnd.WithLabelValues("intermediate", hexID(c)).Set(float64(c.NotAfter.Unix()))
}

// blockerKinds and rootStates are what gauges are told of, so that one that is over is seen to be.
var (
	blockerKinds = []journal.BlockerKind{journal.ByAgent, journal.ByPod, journal.ByCopy, journal.ByReplica, journal.ByLeaves, journal.ByAuthority, journal.ByClock, journal.ByAbsence}
	rootStates   = []journal.State{journal.Prepared, journal.Published, journal.Active, journal.Retiring, journal.Tainted}
)

// setRotation shows where a rotation stands.
func (m *Metrics) setRotation(j journal.Journal, found []journal.Blocker) {
	due := journal.Due(j, time.Now())
	begun := 0.0
	if j.Operation != nil {
		begun = float64(j.Operation.Begun.Unix())
	}
	m.rotationBegun.Set(begun)
	blockers, states := map[journal.BlockerKind]int{}, map[journal.State]int{}
	for _, b := range found {
		if b.Blocks() {
			blockers[b.Kind]++
		}
	}
	for _, a := range j.Authorities {
		states[a.State]++
	}
	for _, k := range blockerKinds {
		m.rotationBlockers.WithLabelValues(string(k)).Set(float64(blockers[k]))
	}
	for what, at := range map[string]time.Time{"prepare": due.Prepare, "latest": due.Latest, "expires": due.Expires} {
		if !at.IsZero() {
			m.rotationSchedule.WithLabelValues(what).Set(float64(at.Unix()))
		}
	}
	for _, s := range rootStates {
		m.authorities.WithLabelValues(string(s)).Set(float64(states[s]))
	}
}

// Metrics returns the CA's metrics, for the caller to register.
func (ca *CA) Metrics() *Metrics { return ca.metrics }
