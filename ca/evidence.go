package ca

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/journal"
)

// What a rotation is decided on. Whoever is not listed is not waited for, so everybody is who may hold something: agents with a
// session by what they report, agents without one until the last SVID of their node has expired, over restarts of the CA too, and
// every replica that ever wrote a record.

const (
	workloadAPI  = "workload-api" // Stream.protocol
	maxPodsTold  = 1024           // of an agent that is away
	maxNackTold  = 512            // bytes
	maxNameTold  = 253            // bytes
	maxLabelTold = 63             // bytes, of a namespace or a UID
	keepAgentsIn = time.Second    // between two writes of who was seen
	parted       = time.Minute    // by how much the two clocks may part at once
	partedFor    = time.Hour      // for how long nothing is decided by them after that
)

// absent are the agents that had a session and have none. The zero value is ready.
type absent struct {
	mu sync.Mutex
	of map[nodeKey]journal.Agent
}

// put notes what an agent had. What was known of it before is not forgotten for a session that said nothing.
func (a *absent) put(agent journal.Agent) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.of == nil {
		a.of = map[nodeKey]journal.Agent{}
	}
	k := nodeKey{agent.Cluster, agent.NodeUID}
	if was, ok := a.of[k]; ok {
		if was.Until.After(agent.Until) {
			agent.Until = was.Until
		}
		if agent.Held == (journal.Held{}) && len(agent.Pods) == 0 {
			agent.Held, agent.Pods, agent.PodsUnknown = was.Held, was.Pods, was.PodsUnknown
		}
	}
	a.of[k] = agent
}

// get returns what the agent of a node had when it went; nothing where that is not known.
func (a *absent) get(k nodeKey) journal.Agent {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.of[k]
}

// live returns those whose SVIDs may not have expired, and forgets the others.
func (a *absent) live(now time.Time) map[nodeKey]journal.Agent {
	a.mu.Lock()
	defer a.mu.Unlock()
	maps.DeleteFunc(a.of, func(_ nodeKey, agent journal.Agent) bool { return !now.Before(agent.Until) })
	return maps.Clone(a.of)
}

// gather returns the evidence for a decision about j.
func (ca *CA) gather(ctx context.Context, j journal.Journal, now time.Time) (journal.Acks, error) {
	replicas, err := ca.cfg.Store.Replicas(ctx)
	if err != nil {
		return journal.Acks{}, err
	}
	acks := journal.Acks{Clock: ca.clocks.check(now)}
	var seen []AgentSeen
	for _, r := range replicas {
		if r.Name == ca.cfg.Replica {
			continue
		}
		reachable := now.Sub(r.Beat).Abs() < beatFresh
		e := replicaOf(r, reachable, r.Signs)
		e.Ready = reachable && slices.ContainsFunc(e.Intermediates, func(i journal.Intermediate) bool {
			return i.Root == j.ActiveAuthority().ID && !i.Destroyed && now.Before(i.NotAfter)
		})
		if !e.Ready && r.Vain.Times > 0 {
			e.Vain = string(r.Vain.Reason)
		}
		acks.Replicas = append(acks.Replicas, e)
		seen = append(seen, r.Agents...)
	}
	own, ok := Replica{Name: ca.cfg.Replica}, false
	if p := ca.own.Load(); p != nil {
		own, ok = *p, true
	}
	if i := slices.IndexFunc(replicas, func(r Replica) bool { return r.Name == own.Name }); !ok && i >= 0 {
		own = replicas[i]
	}
	own.Minted = ca.keysOf(own.Minted)
	e, s := replicaOf(own, true, ca.record.Load().ActiveAuthority().ID), ca.signing.Load()
	e.Ready = s != nil && s.root == j.ActiveAuthority().ID && now.Before(s.cert.NotAfter)
	if why := ca.unminted.Load(); why != nil && !e.Ready {
		e.Vain = string(why.Reason) + ": " + why.Detail
	}
	acks.Replicas = append(acks.Replicas, e)
	slices.SortFunc(acks.Replicas, func(a, b journal.Replica) int { return strings.Compare(a.Name, b.Name) })
	acks.Agents = ca.agents(j, seen, now)
	acks.Copies, _ = ca.copies()
	return acks, nil
}

// replicaOf is a replica as evidence.
func replicaOf(r Replica, reachable bool, signs string) journal.Replica {
	e := journal.Replica{Name: r.Name, Reachable: reachable, Signs: signs, Leaves: map[string]time.Time{}}
	for _, m := range r.Minted {
		e.Intermediates = append(e.Intermediates, journal.Intermediate{Root: m.Root, NotAfter: m.NotAfter, Longest: m.Longest, Destroyed: m.Destroyed})
		if m.Destroyed && m.Leaves.After(e.Leaves[m.Root]) {
			e.Leaves[m.Root] = m.Leaves
		}
	}
	return e
}

// agents returns those with a session, by the newest of their node, and those without that may still hold something. One whose
// node is banned is no concern of a rotation: nothing is renewed there, and whoever holds up a rotation may be why it is banned. Nor is
// one without a session whose node is gone, unless another replica may have that session.
func (ca *CA) agents(j journal.Journal, seen []AgentSeen, now time.Time) []journal.Agent {
	issued := map[nodeKey]time.Time{} // until when, by this replica
	ca.memory.holders(now, func(k nodeKey, _ string, ids map[spiffeid.ID]time.Time) {
		for _, until := range ids {
			if until.After(issued[k]) {
				issued[k] = until
			}
		}
	})
	all, elsewhere := map[nodeKey]journal.Agent{}, map[nodeKey]bool{}
	for _, s := range seen {
		k := nodeKey{s.Cluster, s.NodeUID}
		all[k], elsewhere[k] = s.agent(), true
	}
	maps.Copy(all, ca.away.live(now))
	newest := map[nodeKey]*session{}
	for _, x := range ca.sessions.all() {
		k := nodeKey{x.issuer, x.nodeUID}
		switch old := newest[k]; {
		case old == nil:
		case old.began.After(x.began):
			x.forget()
			continue
		default:
			old.forget()
		}
		newest[k] = x
	}
	for k, x := range newest {
		all[k] = x.agent(j)
	}
	var list []journal.Agent
	for k, a := range all {
		if issued[k].After(a.Until) {
			a.Until = issued[k]
		}
		if _, banned := j.Banned(k.cluster, k.uid); !banned && (a.Connected || now.Before(a.Until) && (elsewhere[k] || !ca.gone(k, a))) {
			list = append(list, a)
		}
	}
	slices.SortFunc(list, func(a, b journal.Agent) int {
		return cmp.Or(strings.Compare(a.Cluster, b.Cluster), strings.Compare(a.NodeUID, b.NodeUID))
	})
	return list
}

// agent is a session as evidence; what is in it must not be changed.
func (x *session) agent(j journal.Journal) journal.Agent {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.told != nil && x.toldOf == j.Generation() {
		return *x.told
	}
	a := journal.Agent{Cluster: x.issuer, Node: x.nodeName, NodeUID: x.nodeUID, Connected: true, Seen: x.heard, Until: x.leaf.NotAfter, Root: x.root}
	if a.Seen.IsZero() {
		a.Seen = x.began
	} else {
		a.Held = held(x.generation, x.hash)
	}
	if x.until.After(a.Until) {
		a.Until = x.until
	}
	for _, key := range slices.Sorted(maps.Keys(x.holdings)) {
		a.Pods = append(a.Pods, podOf(x.holdings[key], j))
	}
	x.told, x.toldOf = &a, j.Generation()
	return a
}

// forget drops what was made of a session of which nobody asks any more: a node can have several.
func (x *session) forget() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.told = nil
}

// podOf is a holding as evidence. Its words are an agent's, who may be anybody that has a node.
func podOf(r reported, j journal.Journal) journal.Pod {
	h := r.holding
	p := journal.Pod{Namespace: word(h.GetNamespace(), maxLabelTold), Name: word(h.GetPodName(), maxNameTold), UID: word(h.GetPodUid(), maxLabelTold)}
	switch root := h.GetRootKeyId(); {
	case h.GetSerial() == "":
	case root != "":
		p.Roots = []string{root}
	default: // an agent of an earlier version: under whatever is worst
		for _, a := range j.Authorities {
			if a.State == journal.Tainted {
				p.Roots = append(p.Roots, a.ID)
			}
		}
	}
	for _, s := range h.GetStreams() {
		p.Streams = append(p.Streams, journal.Stream{
			WorkloadAPI: s.GetProtocol() == workloadAPI,
			Bundle:      s.GetWantsBundle(),
			Acked:       held(api.FromSequence(s.GetAckedGeneration()), s.GetAckedHash()),
			Pushed:      held(api.FromSequence(s.GetPushedGeneration()), s.GetPushedHash()),
			PushedAt:    r.brought.at,
			Nack:        word(s.GetNack(), maxNackTold),
		})
	}
	return p
}

// word is foreign text that people may be shown.
func word(s string, limit int) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, cut(s, limit))
}

// held is a bundle that somebody reports; none where the report makes no sense.
func held(g api.Generation, hash []byte) journal.Held {
	h := journal.Held{Generation: g}
	if g == (api.Generation{}) || len(hash) != len(h.Hash) {
		return journal.Held{}
	}
	copy(h.Hash[:], hash)
	return h
}

// brought is a bundle that streams of the Workload API of one pod were given, and since when the first of them has it, as far as is
// known here. It is counted for the pod, since one that opens a stream each minute would never get through a soak of five.
type brought struct {
	bundle journal.Held
	at     time.Time
}

// broughtOf returns what the newest of a pod's bundles is and since when, after what it was before.
func broughtOf(was brought, h *apiv1.Holding, now time.Time) brought {
	for _, s := range h.GetStreams() {
		is := held(api.FromSequence(s.GetPushedGeneration()), s.GetPushedHash())
		if s.GetProtocol() == workloadAPI && is != was.bundle && is.Generation.Sequence() >= was.bundle.Generation.Sequence() {
			was = brought{is, now}
		}
	}
	return was
}

// noteForeign tells, once a session, of an agent that holds a bundle of a later generation than the record ever had, or another one of
// its generation: the record was rolled back, or somebody else is a CA to that agent. It is an alarm and no more: one agent's word must
// not stop issuance.
func (ca *CA) noteForeign(ctx context.Context, x *session) {
	b := ca.bundle.Load()
	x.mu.Lock()
	is, want := held(x.generation, x.hash), journal.Held{Generation: b.Generation, Hash: b.Hash}
	was := x.foreign
	x.foreign = was || is.Generation.Sequence() > want.Generation.Sequence() || is.Generation == want.Generation && is != want
	foreign := x.foreign
	x.mu.Unlock()
	if foreign && !was {
		ca.metrics.foreignBundles.Inc()
		ca.log.ErrorContext(ctx, "an agent says that it holds a bundle that this CA never had: its record was rolled back, or somebody else hands out bundles",
			"node", x.nodeName, "node_uid", x.nodeUID, "holds", is.Generation.String(), "record", want.Generation.String())
	}
}

// brings reports whether a pod's streams of the Workload API were given that bundle, each of them. A pod that was not there before its
// agent had that bundle never had another one, so there is nothing that it would have to be rid of, and no soak begins with it: where pods
// come and go, somebody would always be in one.
func brings(h *apiv1.Holding, b journal.Held) bool {
	return !slices.ContainsFunc(h.GetStreams(), func(s *apiv1.Stream) bool {
		return s.GetProtocol() == workloadAPI && held(api.FromSequence(s.GetPushedGeneration()), s.GetPushedHash()) != b
	})
}

// broughtBefore returns what the pods of a node were brought, as its sessions before x said, by UID, and what its agent was: an agent
// opens another session once an hour and more often, and a pod would never get through a soak for it.
func (ca *CA) broughtBefore(x *session) (all map[string]brought, agent brought) {
	all = map[string]brought{}
	for _, p := range ca.away.get(nodeKey{x.issuer, x.nodeUID}).Pods {
		for _, s := range p.Streams {
			if s.WorkloadAPI && s.Pushed.Generation.Sequence() >= all[p.UID].bundle.Generation.Sequence() {
				all[p.UID] = brought{s.Pushed, s.PushedAt}
			}
		}
	}
	for _, other := range ca.sessions.of(x.nodeUID) {
		if other.issuer != x.issuer {
			continue
		}
		other.mu.Lock()
		for _, r := range other.holdings {
			if uid := r.holding.GetPodUid(); r.brought.bundle.Generation.Sequence() >= all[uid].bundle.Generation.Sequence() {
				all[uid] = r.brought
			}
		}
		if other.brought.bundle.Generation.Sequence() >= agent.bundle.Generation.Sequence() {
			agent = other.brought
		}
		other.mu.Unlock()
	}
	return all, agent
}

// rootAbove returns the id of the root above a chain that verified: of the first certificate from the leaf upwards that one of
// the roots has issued, by its key id.
func rootAbove(chain, roots []*x509.Certificate) string {
	for _, c := range chain {
		for _, r := range roots {
			if len(r.SubjectKeyId) > 0 && bytes.Equal(c.AuthorityKeyId, r.SubjectKeyId) {
				return hex.EncodeToString(r.SubjectKeyId)
			}
		}
	}
	return ""
}

// noteAway keeps what an agent had whose session ends. It is called before the session is forgotten, so that at no moment the agent
// is neither here nor away.
func (ca *CA) noteAway(x *session) {
	a := x.agent(ca.record.Load())
	a.Connected, a.Seen = false, time.Now()
	if len(a.Pods) > maxPodsTold {
		a.Pods = a.Pods[:maxPodsTold]
	}
	ca.away.put(a)
}

// agent is what is left of one that was seen.
func (s AgentSeen) agent() journal.Agent {
	return journal.Agent{Cluster: s.Cluster, Node: s.Node, NodeUID: s.NodeUID, Seen: s.Seen, Until: s.Until, Root: s.Root, PodsUnknown: true,
		Held: held(api.Generation{Epoch: s.Epoch, Number: s.Number}, s.Hash)}
}

// recallAgents reads who was seen before this process was started. Where that cannot be read nothing may be decided by it.
func (ca *CA) recallAgents(ctx context.Context) error {
	r, err := ReplicaOf(ctx, ca.cfg.Store, ca.cfg.Replica)
	if err != nil {
		return err
	}
	for _, s := range r.Agents {
		a := s.agent()
		if a.Seen.Before(ca.started) { // as long as it has a session that is not written down again
			a.Seen = ca.started
		}
		ca.away.put(a)
	}
	ca.seen = r.Agents
	return nil
}

// keepAgents writes down which agents were seen, at most once a second, where it is another list than the one on record; and where other
// replicas share the store that this one lives, a few times a minute. It fails only when a write has an unknown outcome.
func (ca *CA) keepAgents(ctx context.Context) error {
	_, shared := ca.cfg.Store.(SharedStore)
	for beat := shared; ; {
		_, changed := ca.evidence.Get()
		err := ca.saveAgents(ctx, time.Now(), beat)
		switch {
		case err == nil || ctx.Err() != nil:
		case api.ReasonOf(err) == api.StateUnknown:
			return err
		default:
			ca.log.WarnContext(ctx, "which agents were seen could not be written down", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(keepAgentsIn):
		}
		var due <-chan time.Time
		if shared {
			due = time.After(beatFresh / 3)
		}
		beat = false
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-due:
			beat = true
		}
	}
}

// saveAgents writes the list, unless it says what was written last and no beat is due.
func (ca *CA) saveAgents(ctx context.Context, now time.Time, beat bool) error {
	j := ca.record.Load()
	list := seenOf(ca.agents(j, nil, now), ca.seen, max(ca.cfg.Policy.MaxTTL(), ca.cfg.AgentTTL))
	if !beat && slices.EqualFunc(list, ca.seen, sameSeen) {
		return nil
	}
	ca.replica.Lock()
	defer ca.replica.Unlock()
	r, err := ReplicaOf(ctx, ca.cfg.Store, ca.cfg.Replica)
	if err != nil {
		return err
	}
	r.Agents, r.Signs, r.Beat = list, j.ActiveAuthority().ID, now.UTC()
	r.Minted = ca.keysOf(r.Minted)
	ca.own.Store(&r)
	if err := ca.cfg.Store.SaveReplica(ctx, r); err != nil {
		return err
	}
	ca.seen = list
	return nil
}

// seenOf is what is written down of agents. How long they may hold something is said a quarter of an SVID's life ahead, so that
// it need not be written anew with each of them.
func seenOf(agents []journal.Agent, was []AgentSeen, longest time.Duration) []AgentSeen {
	before := map[nodeKey]AgentSeen{}
	for _, s := range was {
		before[nodeKey{s.Cluster, s.NodeUID}] = s
	}
	var list []AgentSeen
	for _, a := range agents {
		s := AgentSeen{Cluster: a.Cluster, NodeUID: a.NodeUID, Node: a.Node, Seen: a.Seen.UTC().Truncate(time.Millisecond), Until: a.Until.UTC().Truncate(time.Second).Add(time.Second),
			Epoch: a.Held.Generation.Epoch, Number: a.Held.Generation.Number, Root: a.Root}
		if a.Held != (journal.Held{}) {
			s.Hash = a.Held.Hash[:]
		}
		old, ok := before[nodeKey{a.Cluster, a.NodeUID}]
		if a.Connected && ok { // that it is still there is not written down again and again
			s.Seen = old.Seen
		}
		switch {
		case !a.Connected:
		case ok && !old.Until.Before(s.Until):
			s.Until = old.Until
		default:
			s.Until = s.Until.Add(longest / 4)
		}
		list = append(list, s)
	}
	if len(list) > MaxAgentsSeen {
		slices.SortStableFunc(list, func(a, b AgentSeen) int { return b.Until.Compare(a.Until) })
		list = list[:MaxAgentsSeen]
		slices.SortFunc(list, func(a, b AgentSeen) int {
			return cmp.Or(strings.Compare(a.Cluster, b.Cluster), strings.Compare(a.NodeUID, b.NodeUID))
		})
	}
	return list
}

func sameSeen(a, b AgentSeen) bool {
	return a.Cluster == b.Cluster && a.NodeUID == b.NodeUID && a.Node == b.Node && a.Seen.Equal(b.Seen) && a.Until.Equal(b.Until) &&
		a.Epoch == b.Epoch && a.Number == b.Number && bytes.Equal(a.Hash, b.Hash) && a.Root == b.Root
}

// clocks compares what has passed by the machine's two clocks. Where they part, somebody has set the one that certificates go by.
type clocks struct {
	mu    sync.Mutex
	last  time.Time     // when they were compared last
	apart time.Duration // in all; wall clock less the other
	since time.Time     // when they parted last; zero while they are together
}

// check says why the clock is not to be believed now; empty while it is. It is asked now and then.
func (c *clocks) check(now time.Time) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	by := now.Round(0).Sub(c.last.Round(0)) - now.Sub(c.last)
	c.last = now
	if by.Abs() >= parted {
		c.apart += by
		c.since = now
	}
	if c.since.IsZero() || c.apart.Abs() < parted || now.Sub(c.since) >= partedFor {
		c.apart, c.since = 0, time.Time{}
		return ""
	}
	return fmt.Sprintf("the clock of the CA's machine was set by %s %s ago", c.apart.Round(time.Second), now.Sub(c.since).Round(time.Second))
}

// withdrawn reports whether a root of the older bundle is not in the newer.
func withdrawn(older, newer *Bundle) bool {
	return slices.ContainsFunc(older.Roots, func(r *x509.Certificate) bool { return !slices.ContainsFunc(newer.Roots, r.Equal) })
}

// endDistrusted ends the streams of agents whose SVID does not verify any more: the root above it was removed, and a stream that
// is open already is not what is left of it.
func (ca *CA) endDistrusted() {
	now := time.Now()
	for _, x := range ca.sessions.all() {
		if _, err := ca.verifyPeer(x.chain, now); err != nil {
			ca.noteAway(x)
			ca.sessions.end(x, err)
		}
	}
}
