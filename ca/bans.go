package ca

import (
	"context"
	"maps"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca/journal"
)

// A ban is about one node: the UID of one cluster. A node that was made anew under the same name is another one. The record
// holds the bans, so they outlive every replica; what is decided here is decided by the record that was read last.
//
// A token names cluster and node. An agent's SVID names the node's UID alone, so where nothing but an SVID is shown a ban of
// that UID counts whichever cluster it is in: API servers draw them at random, and two clusters have one in common only if
// somebody forged it.

// banned answers who is banned. It is replaced whole, never changed.
type banned struct {
	record journal.Journal
	uids   map[string]struct{}
}

// bannedRetry is the least time after which an agent that is banned comes again, drawn up to twice as long: somebody has to
// allow it, and that takes minutes.
const bannedRetry = time.Minute

func nodeBanned() error {
	return &api.Error{Reason: api.NodeBanned, Detail: "the agent's node is banned", RetryAfter: bannedRetry + rand.N(bannedRetry)}
}

// refuseBanned refuses what comes from a node that is banned.
func (ca *CA) refuseBanned(cluster, nodeUID string) error {
	if nodeUID == "" {
		return nil // it is no node's
	}
	b := ca.bans.Load()
	if b == nil {
		return api.E(api.CAUnavailable, "the CA is starting")
	}
	if _, ok := b.record.Banned(cluster, nodeUID); !ok {
		return nil
	}
	return nodeBanned()
}

// refuseBannedAgent refuses whoever shows the SVID of a node that is banned.
func (ca *CA) refuseBannedAgent(nodeUID string) error {
	b := ca.bans.Load()
	if b == nil {
		return api.E(api.CAUnavailable, "the CA is starting")
	}
	if _, ok := b.uids[nodeUID]; ok {
		return nodeBanned()
	}
	return nil
}

// bundleOf returns the bundle of a record before it is decided by; StateForeign where it belongs to another trust domain.
func (ca *CA) bundleOf(j journal.Journal) (*Bundle, error) {
	if j.TrustDomain != ca.cfg.TrustDomain.Name() {
		return nil, api.E(api.StateForeign, "the record belongs to trust domain %q, the configuration says %q", j.TrustDomain, ca.cfg.TrustDomain)
	}
	return NewBundle(j)
}

// install makes a record that was read or stored the one by which is decided, and its bundle the one that is told, which comes
// first: nobody is given an SVID that he cannot verify. Whoever is banned by it and was not before has no session any more when
// it returns. The caller holds ca.changing, so that the newest is installed last.
func (ca *CA) install(j journal.Journal, bundle *Bundle, r Revision) {
	ca.revision = r
	if old := ca.bundle.Load(); old == nil || old.Generation.Sequence() < bundle.Generation.Sequence() {
		ca.bundle.Set(bundle)
		ca.metrics.setBundle(bundle)
		if old != nil && withdrawn(old, bundle) {
			ca.endDistrusted()
		}
	}
	b := &banned{record: j, uids: map[string]struct{}{}}
	for _, ban := range j.Bans {
		b.uids[ban.NodeUID] = struct{}{}
	}
	ca.bans.Store(b) // before streams are ended: one that begins now finds it
	ca.record.Set(j)
	ca.metrics.rootsAnnounced.Set(float64(len(ca.announced())))
	ca.metrics.banned.Set(float64(len(j.Bans)))
	for uid := range b.uids {
		ca.streams.end(uid, nodeBanned())
		ca.sessions.drop(uid)
	}
}

// reload reads the record anew and installs it: at the start, before a decision that depends on it, and when another replica
// has changed it.
func (ca *CA) reload(ctx context.Context) error {
	ca.changing.Lock()
	defer ca.changing.Unlock()
	j, revision, err := ca.cfg.Store.Load(ctx)
	if err != nil {
		return err
	}
	b, err := ca.bundleOf(j)
	if err != nil {
		return err
	}
	ca.install(j, b, revision)
	return nil
}

// streams are those of agents that are open now, by the UID of their node. The zero value is ready.
type streams struct {
	mu     sync.Mutex
	byNode map[string]map[*context.CancelCauseFunc]struct{}
}

// follow returns the context of a stream of an agent, which ends with the refusal once its node is banned. Done must be
// called when the stream has ended.
func (ca *CA) follow(ctx context.Context, nodeUID string) (following context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	ca.streams.add(nodeUID, &cancel)
	if err := ca.refuseBannedAgent(nodeUID); err != nil { // between its admission and now
		cancel(err)
	}
	return ctx, func() {
		ca.streams.remove(nodeUID, &cancel)
		cancel(nil)
	}
}

func (s *streams) add(nodeUID string, cancel *context.CancelCauseFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byNode == nil {
		s.byNode = map[string]map[*context.CancelCauseFunc]struct{}{}
	}
	if s.byNode[nodeUID] == nil {
		s.byNode[nodeUID] = map[*context.CancelCauseFunc]struct{}{}
	}
	s.byNode[nodeUID][cancel] = struct{}{}
}

func (s *streams) remove(nodeUID string, cancel *context.CancelCauseFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byNode[nodeUID], cancel)
	if len(s.byNode[nodeUID]) == 0 {
		delete(s.byNode, nodeUID)
	}
}

// end ends the streams of a node.
func (s *streams) end(nodeUID string, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for cancel := range s.byNode[nodeUID] {
		(*cancel)(why)
	}
}

// bannedGrace is how long the connections of a node that was banned are left open, so that its agent reads why.
const bannedGrace = 2 * time.Second

// closeBanned closes the connections of nodes that were banned. A stream that has ended is not over while its handler waits
// for an agent that does not read, which a stolen one may do for as long as it likes.
func (ca *CA) closeBanned(ctx context.Context) error {
	for {
		_, changed := ca.record.Get()
		if b := ca.bans.Load(); len(b.uids) > 0 {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(bannedGrace):
				still := maps.Clone(b.uids) // who was allowed again meanwhile keeps what he has opened since
				maps.DeleteFunc(still, func(uid string, _ struct{}) bool { return ca.refuseBannedAgent(uid) == nil })
				ca.conns.close(still)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// conns are the connections on which an agent has shown its SVID, by the UID of its node. The zero value is ready.
type conns struct {
	mu     sync.Mutex
	byNode map[string]map[*agentConn]struct{}
}

// agentConn is one of them until it is closed.
type agentConn struct {
	net.Conn
	of      *conns
	nodeUID string
}

// Close implements net.Conn.
func (c *agentConn) Close() error {
	c.of.mu.Lock()
	delete(c.of.byNode[c.nodeUID], c)
	if len(c.of.byNode[c.nodeUID]) == 0 {
		delete(c.of.byNode, c.nodeUID)
	}
	c.of.mu.Unlock()
	return c.Conn.Close()
}

func (s *conns) keep(nodeUID string, conn net.Conn) net.Conn {
	c := &agentConn{conn, s, nodeUID}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byNode == nil {
		s.byNode = map[string]map[*agentConn]struct{}{}
	}
	if s.byNode[nodeUID] == nil {
		s.byNode[nodeUID] = map[*agentConn]struct{}{}
	}
	s.byNode[nodeUID][c] = struct{}{}
	return c
}

// close closes the connections of these nodes.
func (s *conns) close(uids map[string]struct{}) {
	var all []*agentConn
	s.mu.Lock()
	for uid := range uids {
		for c := range s.byNode[uid] {
			all = append(all, c)
		}
	}
	s.mu.Unlock()
	for _, c := range all {
		c.Close() // its reader is told, and ends what is left
	}
}
