package ca

import (
	"context"
	"math"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
)

// gate bounds how many are in work and how many wait for their turn. Turns go round among those who wait, whoever they
// are; who is due first goes first within his own line and, at every second turn, among all, for as many turns as urgency may
// give one (see lines). When all places are taken whoever has most of them gives one up, his least urgent; so a crowd waits
// behind itself.
//
// It holds before anything of a request is looked at. What one says of his urgency is believed, for a lie gains next to
// nothing: docs/decisions/0020-urgency.md.
type gate struct {
	mu         sync.Mutex
	concurrent int
	free       int  // turns that nobody has
	room       int  // places to wait
	paced      bool // there are not more places than can be served while one waits
	pace       pace
	lines      lines
	urgent     bool // the next turn goes to who is due first

	returning []*waiter // those who gave a turn back for a while, the first first; before all others
}

// waiter is one who waits for a turn.
type waiter struct {
	due    time.Time     // when he should have been served; zero: he does not say, and comes after who does
	number uint64        // in the order in which they came
	turn   bool          // false: sent away
	after  time.Duration // when he may come back; while he was sent away

	decided chan struct{} // closed when turn is known
}

// newGate returns a gate with so many turns and places.
func newGate(concurrent, queue int) *gate {
	return &gate{concurrent: concurrent, free: concurrent, room: queue, lines: newLines()}
}

// newPacedGate returns one that sends away early who would wait for too long: see patience. It is for work that takes no longer
// than it must.
func newPacedGate(concurrent, queue int) *gate {
	g := newGate(concurrent, queue)
	g.paced = true
	return g
}

// enter waits for a turn of who; Overloaded when too many wait. After a nil error leave must be called.
func (g *gate) enter(ctx context.Context, who string) error { return g.enterBy(ctx, who, time.Time{}) }

// enterBy is enter for somebody who is due at some time.
func (g *gate) enterBy(ctx context.Context, who string, due time.Time) error {
	w, err := g.line(ctx, who, due)
	if w == nil {
		return err
	}
	select {
	case <-w.decided:
	case <-ctx.Done():
		if g.withdraw(who, w) {
			return ctx.Err()
		}
	}
	if !w.turn {
		return comeBack(w.after)
	}
	return nil
}

// line takes a turn where one is free, or else a place in who's line. It returns neither waiter nor error for a turn.
func (g *gate) line(ctx context.Context, who string, due time.Time) (*waiter, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.free > 0 {
		g.free--
		return nil, nil
	}
	now := time.Now()
	if g.lines.waiting == 0 {
		g.pace.begin(now)
	}
	g.lines.grant(g.pace.now(now, g.concurrent))
	w := &waiter{due: due, number: math.MaxUint64} // behind who is due at the same time
	if g.inVain(ctx, who, w, now) || g.lines.waiting >= g.places(now) && !g.makeRoom(who, w, now) {
		return nil, comeBack(g.after(who, due, now))
	}
	w.decided = make(chan struct{})
	g.lines.add(who, w, now)
	return w, nil
}

// places returns how many may wait now.
func (g *gate) places(now time.Time) int {
	rate := g.pace.now(now, g.concurrent)
	if !g.paced || rate == 0 {
		return g.room
	}
	return min(g.room, max(g.concurrent, int(rate*patience.Seconds())))
}

// after returns when who may come back with a request that is sent away. Beyond its share a node comes behind all who were
// promised a place, as the round would serve it, and moves nobody else.
func (g *gate) after(who string, due, now time.Time) time.Duration {
	if g.lines.promise(who, now) {
		return g.pace.after(now, g.concurrent, due)
	}
	c := g.lines.credits[who]
	if c.promised.Before(g.pace.promised) {
		c.promised = g.pace.promised
	}
	wait := g.pace.behind(&c.promised, max(1, len(g.lines.of)), now, g.concurrent, due)
	g.lines.keep(who, c)
	return wait
}

// inVain reports whether a newcomer's time would be over before his turn came, be it by the round or by urgency. It never is
// where not more wait before him than are in work: a pace that is measured wrongly must not keep places empty.
func (g *gate) inVain(ctx context.Context, who string, w *waiter, now time.Time) bool {
	end, ok := ctx.Deadline()
	rate := g.pace.now(now, g.concurrent)
	if !ok || !g.paced || rate == 0 {
		return false
	}
	ahead, others := 0, len(g.lines.of)
	if own := g.lines.of[who]; own != nil {
		ahead, others = own.ahead(w), others-1
	}
	before, turns := min(g.lines.waiting, ahead+(ahead+1)*others), end.Sub(now).Seconds()*rate
	return before >= g.concurrent && float64(before) > turns && float64(2*g.lines.moreUrgent(who, w, now)+1) > turns
}

// makeRoom sends somebody away for the sake of a newcomer: the least urgent of whoever has most places; false where that is the
// newcomer himself. Of two lines that would only change their lengths the more urgent is preferred.
func (g *gate) makeRoom(who string, w *waiter, now time.Time) bool {
	if g.lines.waiting == 0 {
		return false
	}
	own, most := g.lines.of[who], g.lines.crowded.list[0]
	have := 0
	if own != nil {
		have = len(own.waiters)
	}
	switch has := len(most.waiters); {
	case has > have+1:
	case has == have+1 && w.before(most.last()):
	case has == have && have > 0 && w.before(own.last()):
		most = own
	default:
		return false
	}
	x := g.lines.take(most, len(most.waiters)-1, now)
	x.after = g.after(most.who, x.due, now)
	close(x.decided)
	return true
}

// withdraw takes w out of its line; false where it was decided meanwhile.
func (g *gate) withdraw(who string, w *waiter) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.lines.remove(who, w, time.Now())
}

// leave gives the turn to the next.
func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.returning) > 0 {
		w := g.returning[0]
		g.returning = g.returning[1:]
		w.turn = true
		close(w.decided)
		return
	}
	if g.lines.waiting == 0 {
		g.free++
		return
	}
	now := time.Now()
	g.pace.note(now)
	g.lines.grant(g.pace.now(now, g.concurrent))
	g.lines.sweep(now)
	var w *waiter
	if g.urgent = !g.urgent; g.urgent {
		w = g.lines.nextUrgent(now)
	}
	if w == nil {
		w = g.lines.next(now)
	}
	w.turn = true
	close(w.decided)
}

// whence tells apart where unattested callers come from: by the address of the other side, without its port.
func whence(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return p.Addr.String()
	}
	return host
}

// admitter is a connection whose listener keeps places for those who have proven who they are.
type admitter interface {
	// Admit makes the connection one of those whose other side is told apart by key.
	Admit(key string)
}

// transport is the TLS of the agents' port. It tells a listener that asks for it which connections are those of agents, so
// that a crowd of strangers cannot take their places.
type transport struct {
	credentials.TransportCredentials
	ca *CA
}

// ServerHandshake implements credentials.TransportCredentials.
func (t transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	if id, uid, ok := t.ca.agentOf(info); ok {
		if a, ok := raw.(admitter); ok && t.ca.refuseBannedAgent(uid) == nil {
			a.Admit(id)
		}
		conn = t.ca.conns.keep(uid, conn)
	}
	return conn, info, nil
}

// Clone implements credentials.TransportCredentials.
func (t transport) Clone() credentials.TransportCredentials {
	return transport{t.TransportCredentials.Clone(), t.ca}
}

// agentOf returns the SPIFFE ID of the agent on the other side of a connection, whose chain was verified in the handshake,
// and the UID of its node.
func (ca *CA) agentOf(info credentials.AuthInfo) (id, uid string, ok bool) {
	tlsInfo, ok := info.(credentials.TLSInfo)
	if !ok || len(tlsInfo.State.PeerCertificates) == 0 {
		return "", "", false
	}
	agent, err := x509svid.IDFromCert(tlsInfo.State.PeerCertificates[0])
	if err != nil {
		return "", "", false
	}
	uid, ok = api.NodeUID(agent, ca.cfg.TrustDomain)
	return agent.String(), uid, ok
}
