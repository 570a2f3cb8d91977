package main

import (
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// The states of the rotation as a whole.
const (
	rotationNone    = "None"    // none is under way
	rotationMoving  = "Moving"  // the next step is about to be taken
	rotationWaiting = "Waiting" // every step waits for somebody
	rotationTrouble = "Trouble" // the CA cannot decide, or cannot store what it decided
)

// A rotationView is where the rotation stands.
type rotationView struct {
	header
	TrustDomain string           `json:"trustDomain"`
	Replica     string           `json:"replica,omitempty"`
	Generation  string           `json:"generation"` // of the bundle, EPOCH.NUMBER
	Now         string           `json:"now"`        // by the CA's clock
	State       string           `json:"state"`
	Operation   *operationView   `json:"operation,omitempty"`
	Steps       []stepView       `json:"steps"`
	Gates       []*gateView      `json:"gates"`
	Progress    progressView     `json:"progress"`
	Forecast    *forecastView    `json:"forecast,omitempty"`
	Authorities []rootView       `json:"authorities"`
	Replicas    []replicaView    `json:"replicas"`
	Excuses     []*excuseView    `json:"excuses"`
	Past        []*operationView `json:"past"`
	Schedule    *scheduleView    `json:"schedule,omitempty"`
	Trouble     *troubleView     `json:"trouble,omitempty"`

	now time.Time
}

// An operationView is one rotation, under way or over.
type operationView struct {
	ID          string         `json:"id"`
	Kind        string         `json:"kind"`
	By          string         `json:"by"`
	Reason      string         `json:"reason,omitempty"`
	Automatic   bool           `json:"automatic,omitempty"`
	Begun       string         `json:"begun,omitempty"`
	Authority   string         `json:"authority,omitempty"` // the root that is, or will be, active
	Replaces    string         `json:"replaces,omitempty"`
	Compromised []string       `json:"compromised,omitempty"`
	Straggler   string         `json:"straggler,omitempty"` // a duration
	Soak        string         `json:"soak,omitempty"`      // a duration
	Latest      string         `json:"latest,omitempty"`
	RolledBack  *wordView      `json:"rolledBack,omitempty"`
	Forced      []overrideView `json:"forced,omitempty"`
	Ended       string         `json:"ended,omitempty"`
	Outcome     string         `json:"outcome,omitempty"`
	EndedBy     *wordView      `json:"endedBy,omitempty"` // who ended it before it was done

	begun, ended, latest time.Time
}

// A wordView is who said something, and when.
type wordView struct {
	By     string `json:"by"`
	Reason string `json:"reason,omitempty"`
	At     string `json:"at,omitempty"`

	at time.Time
}

// An overrideView is a step that was forced.
type overrideView struct {
	Step  string `json:"step"`
	By    string `json:"by"`
	At    string `json:"at,omitempty"`
	Count uint32 `json:"count"`
}

// A stepView is one step: done, or to come.
type stepView struct {
	Step      string `json:"step"`                // publish, activate or remove
	Authority string `json:"authority,omitempty"` // empty: its root is yet to be made
	State     string `json:"state"`               // done, next, waiting or later
	Blocking  int    `json:"blocking,omitempty"`
	Earliest  string `json:"earliest,omitempty"`
	Latest    string `json:"latest,omitempty"` // absent of one that is to come: it may wait until somebody decides

	earliest, latest time.Time
}

// A gateView is a step, and who is not ready for it.
type gateView struct {
	Step      string         `json:"step"`
	Authority string         `json:"authority"`
	Blocking  int            `json:"blocking"`
	Passed    int            `json:"passed"`
	Forcible  bool           `json:"forcible"`
	Digest    string         `json:"digest,omitempty"` // lower-case hex
	Blockers  []*blockerView `json:"blockers"`         // at most 500
}

// A blockerView is somebody or something that a step waits for, or passes over.
type blockerView struct {
	Kind      string `json:"kind"`
	Name      string `json:"name"`
	Cluster   string `json:"cluster,omitempty"`
	Node      string `json:"node,omitempty"`
	NodeUID   string `json:"nodeUID,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Pod       string `json:"pod,omitempty"`
	PodUID    string `json:"podUID,omitempty"`
	Why       string `json:"why"`
	Nack      string `json:"nack,omitempty"` // its proxy's own words; never trusted
	Until     string `json:"until,omitempty"`
	Pass      string `json:"pass,omitempty"` // why it does not hold up the step
	Hard      bool   `json:"hard,omitempty"` // nobody can force the step over it

	until time.Time
}

// A progressView is how far the bundle of this generation has come.
type progressView struct {
	Agents          uint32 `json:"agents"`
	AgentsHolding   uint32 `json:"agentsHolding"`
	Pods            uint32 `json:"pods"`
	PodsHolding     uint32 `json:"podsHolding"`
	PodsCompromised uint32 `json:"podsCompromised,omitempty"`
}

// A forecastView is what a rotation would do, or has left to do.
type forecastView struct {
	Operation     string         `json:"operation,omitempty"`
	Kind          string         `json:"kind"`
	Active        *rootView      `json:"active,omitempty"`
	Next          *rootView      `json:"next,omitempty"`
	CrossSigned   bool           `json:"crossSigned"`
	NotCross      string         `json:"notCrossSigned,omitempty"` // why not
	Replicas      uint32         `json:"replicas"`
	Agents        uint32         `json:"agents"`
	Pods          uint32         `json:"pods"`
	Streams       uint32         `json:"streams"`
	Unheard       uint32         `json:"unheardAgents,omitempty"` // since the CA was started: their pods are counted nowhere
	Missing       []*blockerView `json:"missing"`                 // at most 500
	MissingCount  int            `json:"missingCount"`
	Unproven      []*blockerView `json:"unproven"` // at most 500
	UnprovenCount int            `json:"unprovenCount"`
	Steps         []stepView     `json:"steps"`
	Losing        uint32         `json:"losing,omitempty"` // pods, in an emergency
}

// A rootView is a root as people are told of it.
type rootView struct {
	ID       string `json:"id"`
	State    string `json:"state,omitempty"`
	NotAfter string `json:"notAfter,omitempty"`

	notAfter time.Time
}

// A replicaView is a replica of the CA as a rotation sees it.
type replicaView struct {
	Name          string `json:"name"`
	Reachable     bool   `json:"reachable"`
	Signs         string `json:"signs,omitempty"` // id of the root under which its next intermediate is
	Intermediates uint32 `json:"intermediates"`
}

// An excuseView is somebody's word that nothing waits for somebody.
type excuseView struct {
	Scope   string `json:"scope"`
	Cluster string `json:"cluster,omitempty"`
	Name    string `json:"name"`
	Reason  string `json:"reason"`
	By      string `json:"by"`
	At      string `json:"at,omitempty"`
	Until   string `json:"until,omitempty"`

	until time.Time
}

// A scheduleView is when the active root is replaced by itself.
type scheduleView struct {
	Prepare   string `json:"prepare,omitempty"`
	Latest    string `json:"latest,omitempty"`
	Expires   string `json:"expires,omitempty"`
	Automatic bool   `json:"automatic"`

	prepare, latest, expires time.Time
}

// A troubleView is what keeps the CA from going on.
type troubleView struct {
	Reason string `json:"reason"`
	Code   string `json:"code,omitempty"`
	Detail string `json:"detail,omitempty"`
}

func newRotation(in *apiv1.Rotation, now time.Time) *rotationView {
	v := &rotationView{
		TrustDomain: in.GetTrustDomain(), Replica: in.GetReplica(), Generation: api.Generation{Epoch: in.GetEpoch(), Number: in.GetNumber()}.String(),
		now: timeOf(in.GetNow()), Operation: newOperation(in.GetOperation()), Forecast: newForecast(in.GetForecast()),
		Progress: progressView{Agents: in.GetAgents(), AgentsHolding: in.GetAgentsHolding(), Pods: in.GetPods(), PodsHolding: in.GetPodsHolding(),
			PodsCompromised: in.GetPodsCompromised()},
		Gates: []*gateView{}, Authorities: []rootView{}, Replicas: []replicaView{}, Excuses: []*excuseView{}, Past: []*operationView{}, Steps: []stepView{},
	}
	if v.now.IsZero() {
		v.now = now
	}
	v.Now = stamp(v.now)
	v.header = newHeader("Rotation", "none")
	if v.Operation != nil {
		v.header = newHeader("Rotation", v.Operation.ID)
	}
	for _, g := range in.GetGates() {
		v.Gates = append(v.Gates, newGate(g))
	}
	for _, r := range in.GetAuthorities() {
		if x := newRoot(r); x != nil {
			v.Authorities = append(v.Authorities, *x)
		}
	}
	for _, r := range in.GetReplicas() {
		v.Replicas = append(v.Replicas, replicaView{Name: r.GetName(), Reachable: r.GetReachable(), Signs: r.GetSigns(), Intermediates: r.GetIntermediates()})
	}
	for _, e := range in.GetExcuses() {
		x := &excuseView{Scope: e.GetScope(), Cluster: e.GetCluster(), Name: e.GetName(), Reason: e.GetReason(), By: e.GetBy(),
			At: stamp(timeOf(e.GetAt())), until: timeOf(e.GetUntil())}
		x.Until = stamp(x.until)
		v.Excuses = append(v.Excuses, x)
	}
	for _, p := range in.GetPast() {
		if x := newOperation(p); x != nil {
			v.Past = append(v.Past, x)
		}
	}
	if s := in.GetSchedule(); s != nil {
		v.Schedule = &scheduleView{Automatic: s.GetAutomatic(), prepare: timeOf(s.GetPrepare()), latest: timeOf(s.GetLatest()), expires: timeOf(s.GetExpires())}
		v.Schedule.Prepare, v.Schedule.Latest, v.Schedule.Expires = stamp(v.Schedule.prepare), stamp(v.Schedule.latest), stamp(v.Schedule.expires)
	}
	if in.GetTroubleReason() != "" || in.GetTrouble() != "" {
		v.Trouble = &troubleView{Reason: in.GetTroubleReason(), Detail: in.GetTrouble()}
		if p, ok := findPage(in.GetTroubleReason()); ok {
			v.Trouble.Code = p.Code()
		}
	}
	v.judge()
	return v
}

// judge sums up: whether it goes on, and what of it is done.
func (v *rotationView) judge() {
	blocked := len(v.Gates) > 0 && !slices.ContainsFunc(v.Gates, func(g *gateView) bool { return g.Blocking == 0 })
	switch {
	case v.Trouble != nil:
		v.State = rotationTrouble
	case v.Operation == nil:
		v.State = rotationNone
	case blocked:
		v.State = rotationWaiting
	default:
		v.State = rotationMoving
	}
	if v.Operation == nil || v.Forecast == nil {
		return
	}
	left := v.Forecast.Steps
	if v.Operation.RolledBack == nil {
		for _, do := range []string{"publish", "activate"} {
			if !slices.ContainsFunc(left, func(s stepView) bool { return s.Step == do }) {
				v.Steps = append(v.Steps, stepView{Step: do, Authority: v.Operation.Authority, State: "done"})
			}
		}
	}
	for _, s := range left {
		s.State = "later"
		for _, g := range v.Gates {
			if g.Step == s.Step && g.Authority == s.Authority {
				s.Blocking, s.State = g.Blocking, "waiting"
				if g.Blocking == 0 {
					s.State = "next"
				}
			}
		}
		v.Steps = append(v.Steps, s)
	}
}

func newOperation(in *apiv1.RotationOperation) *operationView {
	if in == nil {
		return nil
	}
	v := &operationView{
		ID: in.GetId(), Kind: in.GetKind(), By: in.GetBy(), Reason: in.GetWhy(), Automatic: in.GetAutomatic(), Authority: in.GetAuthority(),
		Replaces: in.GetReplaces(), Compromised: slices.Clone(in.GetCompromised()), Outcome: in.GetOutcome(),
		Straggler: lasting(in.GetLimits().GetStraggler()), Soak: lasting(in.GetLimits().GetSoak()),
		begun: timeOf(in.GetBegun()), ended: timeOf(in.GetEnded()), latest: timeOf(in.GetLatest()),
	}
	v.Begun, v.Ended, v.Latest = stamp(v.begun), stamp(v.ended), stamp(v.latest)
	v.RolledBack, v.EndedBy = newWord(in.GetRolledBack()), newWord(in.GetEndedBy())
	for _, f := range in.GetForced() {
		v.Forced = append(v.Forced, overrideView{Step: f.GetDo(), By: f.GetBy(), At: stamp(timeOf(f.GetAt())), Count: f.GetCount()})
	}
	return v
}

func newWord(in *apiv1.RotationWord) *wordView {
	if in == nil {
		return nil
	}
	v := &wordView{By: in.GetBy(), Reason: in.GetWhy(), at: timeOf(in.GetAt())}
	v.At = stamp(v.at)
	return v
}

// String is who said it, and why.
func (v *wordView) String() string {
	if v == nil {
		return ""
	}
	return v.By + after(": ", v.Reason)
}

func newGate(in *apiv1.RotationGate) *gateView {
	v := &gateView{Step: in.GetDo(), Authority: in.GetAuthority(), Blocking: int(in.GetBlocking()), Passed: int(in.GetPassed()),
		Forcible: in.GetForcible(), Digest: hex.EncodeToString(in.GetDigest()), Blockers: []*blockerView{}}
	for _, b := range in.GetBlockers() {
		v.Blockers = append(v.Blockers, newBlocker(b))
	}
	return v
}

func newBlocker(in *apiv1.RotationBlocker) *blockerView {
	v := &blockerView{
		Kind: in.GetKind(), Name: in.GetName(), Cluster: in.GetCluster(), Node: in.GetNode(), NodeUID: in.GetNodeUid(), Namespace: in.GetNamespace(),
		Pod: in.GetPod(), PodUID: in.GetPodUid(), Why: in.GetWhy(), Nack: in.GetNack(), Pass: in.GetPass(), Hard: in.GetHard(), until: timeOf(in.GetUntil()),
	}
	v.Until = stamp(v.until)
	return v
}

func newForecast(in *apiv1.RotationForecast) *forecastView {
	if in == nil {
		return nil
	}
	v := &forecastView{
		Operation: in.GetOperation(), Kind: in.GetKind(), Active: newRoot(in.GetActive()), Next: newRoot(in.GetNext()), CrossSigned: in.GetCross(),
		NotCross: in.GetNoCross(), Replicas: in.GetReplicas(), Agents: in.GetAgents(), Pods: in.GetPods(), Streams: in.GetStreams(), Unheard: in.GetUnheard(),
		MissingCount: max(int(in.GetMissingCount()), len(in.GetMissing())), UnprovenCount: max(int(in.GetUnprovenCount()), len(in.GetUnproven())),
		Missing: []*blockerView{}, Unproven: []*blockerView{}, Steps: []stepView{}, Losing: in.GetLosing(),
	}
	for _, b := range in.GetMissing() {
		v.Missing = append(v.Missing, newBlocker(b))
	}
	for _, b := range in.GetUnproven() {
		v.Unproven = append(v.Unproven, newBlocker(b))
	}
	for _, s := range in.GetSteps() {
		x := stepView{Step: s.GetDo(), Authority: s.GetAuthority(), State: "later", earliest: timeOf(s.GetEarliest()), latest: timeOf(s.GetLatest())}
		x.Earliest, x.Latest = stamp(x.earliest), stamp(x.latest)
		v.Steps = append(v.Steps, x)
	}
	return v
}

func newRoot(in *apiv1.RotationRoot) *rootView {
	if in == nil {
		return nil
	}
	v := &rootView{ID: in.GetId(), State: in.GetState(), notAfter: timeOf(in.GetNotAfter())}
	v.NotAfter = stamp(v.notAfter)
	return v
}

// lasting writes a duration; nothing where none is given, or nonsense.
func lasting(d *durationpb.Duration) string {
	if d == nil || !d.IsValid() {
		return ""
	}
	return d.AsDuration().String()
}

// ended is the operation of that id among those that are over; nil: it is not.
func (v *rotationView) ended(id string) *operationView {
	for _, p := range slices.Backward(v.Past) {
		if p.ID == id {
			return p
		}
	}
	return nil
}

// stateOf is the state of a root; empty where it is not in the record.
func (v *rotationView) stateOf(id string) string {
	for _, r := range v.Authorities {
		if r.ID == id {
			return r.State
		}
	}
	return ""
}

// next is the gate that matters: the first that is open, or else the first there is.
func (v *rotationView) next() *gateView {
	for _, g := range v.Gates {
		if g.Blocking == 0 {
			return g
		}
	}
	if len(v.Gates) == 0 {
		return nil
	}
	return v.Gates[0]
}

// rests reports whether all that stands in the way is the life of SVIDs, which nobody can mend or excuse.
func (g *gateView) rests() bool {
	named := 0
	for _, b := range g.Blockers {
		if b.Pass != "" {
			continue
		}
		if b.Kind != "leaves" {
			return false
		}
		named++
	}
	return named == g.Blocking
}

// String is how far it has come, for people.
func (p progressView) String() string {
	s := fmt.Sprintf("%d of %s, %d of %s hold the bundle", p.AgentsHolding, plural(int(p.Agents), "agent"), p.PodsHolding, plural(int(p.Pods), "pod"))
	if p.PodsCompromised > 0 {
		s += fmt.Sprintf("; %s with an SVID under a compromised root", plural(int(p.PodsCompromised), "pod"))
	}
	return s
}
