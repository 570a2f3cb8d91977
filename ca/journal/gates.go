package journal

import (
	"crypto/x509"
	"fmt"
	"slices"
	"time"
)

// clockSlack is by how much the clocks of two replicas may differ.
const clockSlack = 5 * time.Minute

// gate collects who is not ready for one step.
type gate struct {
	j     Journal
	op    *Operation
	do    Do
	about Authority
	now   time.Time
	acks  Acks
	want  Held
	found []Blocker

	rest  Pass // passAll, once it was asked
	asked bool
}

// gate returns who is not ready for a step, and of each whether it stands in the way.
func (j Journal) gate(s Step, now time.Time, acks Acks) []Blocker {
	g := &gate{j: j, op: j.Operation, do: s.Do, about: j.Authorities[j.find(s.Authority)], now: now, acks: acks}
	var err error
	if g.want, err = j.held(); err != nil { // a record that was validated has none
		return []Blocker{{Kind: ByAuthority, Name: "authority/" + s.Authority, Why: err.Error(), Hard: true}}
	}
	g.clock()
	switch {
	case s.Do == Publish:
		g.authority(false)
	case s.Do == Activate:
		g.authority(true)
		g.anybody()
		g.holders()
		g.absence()
	case g.about.State == Tainted:
		g.reissued()
		g.signers(false)
		g.somebody()
	default:
		g.anybody()
		g.signers(true)
		if len(g.acks.Replicas) > 0 && !expired(g.about, g.now) { // nothing can be issued under one that has expired
			g.somebody()
		}
		if g.op.Back == nil { // who lacks what was rolled back loses nothing with it
			g.holders()
			g.absence()
		}
	}
	slices.SortFunc(g.found, compareBlockers)
	return g.found
}

func (g *gate) add(b Blocker) {
	if b.Pass == "" {
		b.Pass = g.pass(b)
	}
	g.found = append(g.found, b)
}

// addOf adds a blocker that is an agent, or a pod of it.
func (g *gate) addOf(a Agent, b Blocker) {
	if b.Pass == "" {
		b.Pass = g.pass(b)
	}
	if b.Pass == "" && g.longAway(a) {
		b.Pass = Urgent
	}
	g.found = append(g.found, b)
}

// longAway reports whether an agent has been away for longer than an emergency waits for anybody. That it comes back in the next
// minute is no more likely than in the last one.
func (g *gate) longAway(a Agent) bool {
	return g.op.Kind == Emergency && !a.Connected && g.now.Sub(a.Seen) >= g.op.Straggler
}

// older reports whether a bundle is from before the root that is replaced came into it: then the cross-signed root leads whoever
// holds it to nothing that he knows.
func (g *gate) older(h Held) bool {
	i := g.j.find(g.op.Replaces)
	return h != Held{} && i >= 0 && h.Generation.Sequence() < g.j.Authorities[i].Since
}

// pass says why a step need not wait for b. What holds of all is in its doc; excuses come first, since they are somebody's word.
func (g *gate) pass(b Blocker) Pass {
	switch b.Kind {
	case ByAgent, ByPod, ByCopy:
	default:
		return ""
	}
	for _, e := range g.j.Excuses {
		if e.covers(b, g.now) {
			return Excused
		}
	}
	if !g.asked {
		g.rest, g.asked = g.passAll(), true
	}
	return g.rest
}

// passAll is pass as far as it is the same of all agents, pods and copies. It is asked once for all of them: it parses certificates.
func (g *gate) passAll() Pass {
	active := g.j.ActiveAuthority()
	next := active // under which is signed once the step is taken
	if g.do == Activate {
		next = g.about
	}
	over := func(since time.Time) bool { return !since.IsZero() && g.waited(since) }
	since := next.Times.Published
	if g.about.State == Tainted {
		since = g.about.Times.Tainted
	}
	switch {
	case g.op.Kind == Emergency && over(since) && over(g.op.Begun):
		return Urgent
	case g.do == Activate && expired(active, g.now):
		return Expired
	case g.crossed(next) && over(since):
		return Straggler
	}
	return g.overdue()
}

// waited reports whether the operation's limit is over since then. In an emergency a time that is yet to come was told by a clock that
// was wrong, and nothing waits for it to come again.
func (g *gate) waited(since time.Time) bool {
	return g.now.Sub(since) >= g.op.Straggler || g.op.Kind == Emergency && since.After(g.now.Add(clockSlack))
}

// overdue is Overdue once the latest date of an automatic rotation is over.
func (g *gate) overdue() Pass {
	if g.op.Automatic && !g.op.Latest.IsZero() && !g.now.Before(g.op.Latest) {
		return Overdue
	}
	return ""
}

// crossed reports whether chains under a carry it signed by the root that this operation replaces: then whoever holds that one
// verifies them, with or without the new bundle.
func (g *gate) crossed(a Authority) bool {
	if len(a.Cross) == 0 || a.CrossBy != g.op.Replaces || a.ID != g.op.Authority {
		return false
	}
	c, err := x509.ParseCertificate(a.Cross)
	return err == nil && g.now.Before(c.NotAfter) && !g.now.Before(c.NotBefore)
}

func expired(a Authority, now time.Time) bool {
	c, err := x509.ParseCertificate(a.Certificate)
	return err != nil || !now.Before(c.NotAfter)
}

// clock stops everything that counts on time while the clock is wrong. An emergency goes on: it has its acknowledgements.
func (g *gate) clock() {
	b := Blocker{Kind: ByClock, Name: "clock"}
	switch {
	case g.acks.Clock != "":
		b.Why = g.acks.Clock
	case g.now.Add(clockSlack).Before(g.j.Changed):
		b.Why = fmt.Sprintf("the record was changed at %s, which is yet to come by this clock", g.j.Changed.Format(time.RFC3339))
		b.Until = g.j.Changed
	default:
		return
	}
	if g.op.Kind == Emergency {
		b.Pass = Urgent
	}
	g.add(b)
}

// authority checks that the new root can be used.
func (g *gate) authority(signs bool) {
	b := Blocker{Kind: ByAuthority, Name: "authority/" + g.about.ID, Hard: true}
	c, err := x509.ParseCertificate(g.about.Certificate)
	switch {
	case err != nil:
		b.Why = "its certificate does not parse"
	case !g.now.Before(c.NotAfter):
		b.Why = "it has expired"
	case signs && g.now.Before(c.NotBefore):
		b.Why, b.Until = "it is not valid yet", c.NotBefore
	default:
		return
	}
	g.add(b)
}

// anybody stops a step of which nobody has said anything: no evidence is not proof.
func (g *gate) anybody() {
	if len(g.acks.Replicas) == 0 {
		b := Blocker{Kind: ByReplica, Name: "replicas", Why: "no replica has said what it and its agents hold", Hard: true}
		if g.op.Kind == Emergency && g.do == Activate {
			b.Hard = false
		}
		g.add(b)
	}
}

// holders finds everybody live who does not hold the bundle of the record.
func (g *gate) holders() {
	for _, a := range g.acks.Agents {
		if !a.live(g.now) {
			continue // it gets the bundle before any SVID, should it come back
		}
		if why := g.lacks(a.Held, "holds"); why != "" {
			b := agentBlocker(a, why)
			if !a.Connected {
				b.Why = fmt.Sprintf("has been away since %s, and %s", a.Seen.Format(time.RFC3339), why)
				b.Until = a.Until
			}
			// A whole node is not given up for being late by two rotations. A pod is: no single one holds up anything for ever.
			if b.Pass = g.pass(b); b.Pass == Straggler && g.older(a.Held) {
				b.Pass = g.overdue()
			}
			if b.Pass == "" && g.longAway(a) {
				b.Pass = Urgent
			}
			g.found = append(g.found, b)
		} else if a.PodsUnknown {
			b := agentBlocker(a, "has not been heard of since the CA was started, so what its pods have is not known")
			b.Until = a.Until
			g.addOf(a, b)
		}
		pods := len(g.found)
		for _, p := range a.Pods {
			g.pod(a, p)
		}
		g.fewPods(a, pods)
	}
	g.copies()
}

// pod finds what the streams of one pod still owe: at most one blocker, and the worst.
func (g *gate) pod(a Agent, p Pod) {
	var owes, waits Blocker // of which there is one at most; they are named once there is
	for _, s := range p.Streams {
		switch {
		case s.WorkloadAPI:
			if why := g.lacks(s.Pushed, "was brought"); why != "" {
				owes.Why = why
			} else if waits.Why == "" || g.now.Sub(s.PushedAt) < g.op.Soak {
				g.soak(&waits, s.PushedAt, "the Workload API tells nobody whether the bundle is used")
			}
		case s.Bundle:
			if why := g.lacks(s.Acked, "acknowledged"); why != "" {
				owes.Why = why
				if s.Nack != "" {
					owes.Why, owes.Nack = "rejected the bundle; it "+why, s.Nack
				}
			}
		}
	}
	is := owes
	if is.Why == "" {
		is = waits
	}
	if is.Why == "" {
		return
	}
	b := podBlocker(a, p, is.Why)
	b.Nack, b.Until, b.Pass = is.Nack, is.Until, is.Pass
	g.addOf(a, b)
}

// soak judges one that was brought the bundle and cannot say that it uses it: for a while it stands in the way, and is never
// taken for one that is ready. In an emergency that it was brought is enough: what it could still be waited for is nothing that
// anybody would hear of, and meanwhile the thief is believed.
func (g *gate) soak(b *Blocker, since time.Time, why string) {
	b.Why = why
	if g.op.Kind == Emergency {
		b.Pass = Unproven
		return
	}
	if ready := since.Add(g.op.Soak); g.now.Before(ready) {
		b.Until, b.Pass = ready, ""
		return
	}
	b.Pass = Unproven
}

// lacks says how a bundle differs from that of the record; empty where it is the same.
func (g *gate) lacks(h Held, verb string) string {
	switch c := h.Generation; {
	case h == g.want:
		return ""
	case h == (Held{}):
		return verb + " none so far"
	case c == g.want.Generation:
		return fmt.Sprintf("%s ANOTHER bundle of generation %s: two of one number", verb, c)
	case c.Sequence() > g.want.Generation.Sequence():
		return fmt.Sprintf("%s generation %s, LATER than this record's %s: the record was rolled back", verb, c, g.want.Generation)
	default:
		return fmt.Sprintf("%s generation %s, not %s", verb, c, g.want.Generation)
	}
}

// absence stops what passes only for the date where most agents are away: then it is the CA that is cut off, not they.
func (g *gate) absence() {
	if !slices.ContainsFunc(g.found, func(b Blocker) bool { return b.Pass == Overdue }) {
		return
	}
	live, away := 0, 0
	for _, a := range g.acks.Agents {
		if a.live(g.now) {
			live++
			if !a.Connected {
				away++
			}
		}
	}
	if 2*away > live {
		g.add(Blocker{Kind: ByAbsence, Name: "agents", Why: fmt.Sprintf("%d of %d agents are away", away, live)})
	}
}

// signers finds who may still sign under the root that goes, and what was signed under it. Where a root is compromised its
// thief signs anyway: then it is a matter of the limit.
func (g *gate) signers(hard bool) {
	active := g.j.ActiveAuthority().ID
	for _, r := range g.acks.Replicas {
		until := r.mayHave(g.about.ID)
		b := Blocker{Kind: ByReplica, Name: "replica/" + r.Name, Hard: hard}
		switch leaves := r.Leaves[g.about.ID]; {
		case g.now.Before(until) && r.Reachable:
			b.Why, b.Until = "has an intermediate under the old root", until
			if r.Vain != "" { // the end of that one would be the end of all issuance, and nothing to wait for
				b.Why, b.Until = b.Why+", and gets none under the active one: "+r.Vain, time.Time{}
			}
		case g.now.Before(until):
			b.Why, b.Until = "cannot be asked whether it destroyed its intermediate under the old root", until
		case r.Reachable && r.Signs != active:
			b.Why = "has not taken up the active root"
		case hard && g.now.Before(leaves):
			b.Kind, b.Name, b.Why, b.Until = ByLeaves, "leaves/"+r.Name, "SVIDs that it signed under the old root have not expired", leaves
		default:
			continue
		}
		if !hard && g.waited(g.about.Times.Tainted) {
			b.Pass = Urgent
		}
		g.add(b)
	}
}

// somebody stops the removal of a root while nobody can sign under the active one: it would be the end of all issuance, and of
// every session, for as long as the upstream is away, and of the way back. Where the root is compromised, what its thief has meanwhile
// he had before. Who wants him out at any price can force it.
func (g *gate) somebody() {
	if g.acks.ready() {
		return
	}
	b := Blocker{Kind: ByReplica, Name: "replicas", Why: "none has an intermediate under the active root, so nobody could issue anything"}
	if i := slices.IndexFunc(g.acks.Replicas, func(r Replica) bool { return r.Vain != "" }); i >= 0 {
		b.Why += "; " + g.acks.Replicas[i].Name + " gets none: " + g.acks.Replicas[i].Vain
	}
	g.add(b)
}

// reissued finds who still has an SVID under a compromised root.
func (g *gate) reissued() {
	for _, a := range g.acks.Agents {
		if !a.live(g.now) {
			continue
		}
		if a.Root == g.about.ID {
			g.addOf(a, agentBlocker(a, "has an SVID of its own under the compromised root"))
		}
		pods := len(g.found)
		for _, p := range a.Pods {
			if slices.Contains(p.Roots, g.about.ID) {
				g.addOf(a, podBlocker(a, p, "has an SVID under the compromised root"))
			}
		}
		g.fewPods(a, pods)
	}
}

func agentBlocker(a Agent, why string) Blocker {
	name := a.Node
	if name == "" {
		name = a.NodeUID
	}
	return Blocker{Kind: ByAgent, Name: "node/" + name, Cluster: a.Cluster, Node: a.Node, NodeUID: a.NodeUID, Why: why}
}

func podBlocker(a Agent, p Pod, why string) Blocker {
	return Blocker{Kind: ByPod, Name: "pod/" + p.Namespace + "/" + p.Name, Cluster: a.Cluster, Node: a.Node, NodeUID: a.NodeUID,
		Namespace: p.Namespace, Pod: p.Name, PodUID: p.UID, Why: why}
}
