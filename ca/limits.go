package ca

import (
	"context"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
)

// gate bounds how many are in work and how many wait for their turn. Turns go round among those who wait, whoever they
// are, and when all places are taken whoever has most of them gives one up; so a crowd waits behind itself.
type gate struct {
	mu      sync.Mutex
	free    int // turns that nobody has
	room    int // places to wait
	waiting int
	lines   map[string][]*waiter // by who waits
	round   []string             // those who wait, whose turn is next first

	returning []*waiter // those who gave a turn back for a while, the first first; before all others
}

// waiter is one who waits for a turn.
type waiter struct {
	decided chan struct{} // closed when turn is known
	turn    bool          // false: sent away
}

func newGate(concurrent, queue int) *gate {
	return &gate{free: concurrent, room: queue, lines: map[string][]*waiter{}}
}

// enter waits for a turn of who; Overloaded when too many wait. After a nil error leave must be called.
func (g *gate) enter(ctx context.Context, who string) error {
	w, err := g.line(who)
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
		return overloaded()
	}
	return nil
}

// line takes a turn where one is free, or else a place in who's line. It returns neither waiter nor error for a turn.
func (g *gate) line(who string) (*waiter, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.free > 0 {
		g.free--
		return nil, nil
	}
	if g.waiting >= g.room {
		longest, most := "", len(g.lines[who])
		for k, l := range g.lines {
			if len(l) > most {
				longest, most = k, len(l)
			}
		}
		if longest == "" {
			return nil, overloaded()
		}
		last := g.lines[longest][most-1]
		g.drop(longest, last)
		close(last.decided)
	}
	w := &waiter{decided: make(chan struct{})}
	if len(g.lines[who]) == 0 {
		g.round = append(g.round, who)
	}
	g.lines[who] = append(g.lines[who], w)
	g.waiting++
	return w, nil
}

// withdraw takes w out of its line; false where it was decided meanwhile.
func (g *gate) withdraw(who string, w *waiter) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-w.decided:
		return false
	default:
		g.drop(who, w)
		return true
	}
}

// drop takes w out of who's line, and who out of the round where nobody is left; the caller holds the lock.
func (g *gate) drop(who string, w *waiter) {
	g.waiting--
	if g.lines[who] = slices.DeleteFunc(g.lines[who], func(x *waiter) bool { return x == w }); len(g.lines[who]) == 0 {
		delete(g.lines, who)
		g.round = slices.DeleteFunc(g.round, func(k string) bool { return k == who })
	}
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
	if len(g.round) == 0 {
		g.free++
		return
	}
	who := g.round[0]
	w, rest := g.lines[who][0], g.lines[who][1:]
	g.waiting--
	if g.round = g.round[1:]; len(rest) > 0 {
		g.lines[who] = rest
		g.round = append(g.round, who)
	} else {
		delete(g.lines, who)
	}
	w.turn = true
	close(w.decided)
}

// overloaded tells whoever is sent away when to come back: not all at the same moment.
func overloaded() error {
	after := time.Second + rand.N(time.Second)
	return &api.Error{Reason: api.Overloaded, Detail: "too many requests are waiting", RetryAfter: after}
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
