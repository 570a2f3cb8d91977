package journal

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/signet-ca/signet/api"
)

// Do is what a step does.
type Do string

// The steps of a rotation, in their order.
const (
	Publish  Do = "publish"  // prepared -> published: into the bundle
	Activate Do = "activate" // published -> active, and the active one -> retiring, or tainted where it is compromised
	Remove   Do = "remove"   // retiring or tainted -> removed: out of the bundle, its key gone
)

// Step is one change of the record, decided by Next. The zero Step is none.
type Step struct {
	Operation string // id
	Do        Do
	Authority string // id
	// Generation is that of the bundle under which it was decided. It is not taken under another.
	Generation api.Generation
	// Passed are those who are not ready and do not stand in the way, and why not.
	Passed []Blocker
	// Forced are the names of those over whom somebody takes it, and By is who.
	Forced []string
	By     string
}

// Is reports whether there is a step.
func (s Step) Is() bool { return s.Do != "" }

// String is what a log says of a step.
func (s Step) String() string {
	return fmt.Sprintf("%s %s (operation %s)", s.Do, s.Authority, s.Operation)
}

// BlockerKind says what stands in the way.
type BlockerKind string

// The kinds of blockers.
const (
	ByAgent     BlockerKind = "agent"     // a node's agent does not have the bundle
	ByPod       BlockerKind = "pod"       // a pod has not acknowledged it, or still has an SVID that must go
	ByCopy      BlockerKind = "copy"      // a place where the bundle is shown does not have it
	ByReplica   BlockerKind = "replica"   // a replica may still sign under the old root
	ByLeaves    BlockerKind = "leaves"    // SVIDs under the old root have not expired
	ByAuthority BlockerKind = "authority" // the root itself cannot be used now
	ByClock     BlockerKind = "clock"     // the clock is not to be believed
	ByAbsence   BlockerKind = "absence"   // most agents are away
)

// Pass says why a blocker does not hold up the step.
type Pass string

// The reasons to pass.
const (
	Excused   Pass = "excused"   // somebody said that nothing waits for it
	Straggler Pass = "straggler" // the limit is over, and the chain carries the cross-signed root, so that it loses nothing
	Unproven  Pass = "unproven"  // it cannot acknowledge; it was brought the bundle, and given time but in an emergency
	Overdue   Pass = "overdue"   // the latest date of an automatic rotation is over
	Expired   Pass = "expired"   // the active root has expired, so there is nothing to lose
	Urgent    Pass = "urgent"    // an emergency, and its limit is over, or it was away for that long when it began
	Forced    Pass = "forced"    // an operator named it
)

// Blocker is somebody or something that a step waits for, or would have waited for.
type Blocker struct {
	Kind BlockerKind
	Name string // "node/NAME", "pod/NAMESPACE/NAME", "replica/NAME", ...: what people are told, and name in a Force

	Cluster, Node, NodeUID string // of an agent or a pod
	Namespace, Pod, PodUID string // of a pod; of a copy of the bundle the namespace alone

	Why   string    // what is missing
	Nack  string    // of a pod: its proxy's own words
	Until time.Time // when it ends by itself; zero: nobody knows
	Pass  Pass      // why it does not hold up the step; empty: it does
	Hard  bool      // nobody can force the step over it: unexpired SVIDs would be refused everywhere
}

// Blocks reports whether it holds up the step.
func (b Blocker) Blocks() bool { return b.Pass == "" }

// Next returns the step that can be taken now, or the zero Step. With it come those that were passed over (as in
// Step.Passed); without it, all who stand in the way, by name, and again those that do not. Where an operation is under way
// there is a step or somebody who stands in the way; where there is none, neither.
func Next(j Journal, now time.Time, acks Acks) (Step, []Blocker) {
	var all []Blocker
	for _, s := range j.candidates() {
		found := j.gate(s, now, acks)
		if !slices.ContainsFunc(found, Blocker.Blocks) {
			s.Passed = found
			return s, found
		}
		all = append(all, found...)
	}
	return Step{}, all
}

// Gate is a step that the states of the authorities allow, and who is not ready for it.
type Gate struct {
	Step     Step // without those who are passed over
	Blockers []Blocker
}

// Gates returns the steps that Next chooses from, in the order in which they are wanted: it takes the first over which nobody
// stands in the way, and Force one of them over exactly those who do.
func Gates(j Journal, now time.Time, acks Acks) []Gate {
	var all []Gate
	for _, s := range j.candidates() {
		all = append(all, Gate{s, j.gate(s, now, acks)})
	}
	return all
}

// Force returns the step that is taken over exactly those who stand in its way. RotationBlocked where one of them can be
// forced by nobody, BlockersChanged where others stand in the way than were named: what people agreed to was another list.
func Force(j Journal, now time.Time, acks Acks, names []string, by string) (Step, error) {
	if !goodBy(by, "") {
		return Step{}, api.E(api.RotationInvalid, "a step is forced by somebody")
	}
	named := slices.Sorted(slices.Values(names))
	refused := api.E(api.BlockersChanged, "those named are not those who stand in the way now")
	for _, s := range j.candidates() {
		found := j.gate(s, now, acks)
		var blocking []string
		hard := ""
		for i, b := range found {
			if b.Blocks() {
				blocking = append(blocking, b.Name)
				found[i].Pass = Forced
				if b.Hard {
					hard = cmp.Or(hard, fmt.Sprintf("%s: %s", b.Name, b.Why))
				}
			}
		}
		slices.Sort(blocking)
		switch {
		case len(blocking) == 0 || !slices.Equal(blocking, named):
			continue
		case hard != "":
			refused = api.E(api.RotationBlocked, "nobody can force the step over %s", hard)
			continue
		}
		s.Passed, s.Forced, s.By = found, named, by
		return s, nil
	}
	return Step{}, refused
}

// candidates returns the steps that the states of the authorities allow, in the order in which they are wanted.
func (j Journal) candidates() []Step {
	if j.Operation == nil {
		return nil
	}
	var steps []Step
	add := func(do Do, a Authority) {
		steps = append(steps, Step{Operation: j.Operation.ID, Do: do, Authority: a.ID, Generation: j.Generation()})
	}
	if i := j.find(j.Operation.Authority); i >= 0 {
		switch a := j.Authorities[i]; a.State {
		case Prepared:
			add(Publish, a)
		case Published:
			add(Activate, a)
		}
	}
	for _, state := range []State{Tainted, Retiring} {
		for _, a := range j.Authorities {
			if a.State == state {
				add(Remove, a)
			}
		}
	}
	return steps
}

func (j Journal) find(id string) int {
	return slices.IndexFunc(j.Authorities, func(a Authority) bool { return a.ID == id })
}

func (j Journal) findGone(id string) int {
	return slices.IndexFunc(j.Gone, func(g Gone) bool { return g.ID == id })
}

// held returns the bundle of the record, as whoever has it reports it.
func (j Journal) held() (Held, error) {
	roots, err := j.Roots()
	if err != nil {
		return Held{}, err
	}
	return Held{Generation: j.Generation(), Hash: api.BundleHash(roots)}, nil
}

func compareBlockers(a, b Blocker) int {
	return cmp.Or(strings.Compare(string(a.Kind), string(b.Kind)), strings.Compare(a.Name, b.Name),
		strings.Compare(a.Cluster, b.Cluster), strings.Compare(a.NodeUID, b.NodeUID), strings.Compare(a.PodUID, b.PodUID))
}
