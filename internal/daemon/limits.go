package daemon

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/peer"

	"github.com/signet-ca/signet/internal/ready"
)

// Limits bound the connections of one port. A connection is a stranger's until somebody vouches for it with Admit; a
// stranger costs little and does not stay.
type Limits struct {
	Port string // its name in metrics and in the log

	// Strangers bounds the connections of strangers. When all places are taken, whoever has the most loses his oldest to a
	// newcomer who has fewer, so that a crowd from one peer keeps nobody else out. Zero: 128.
	Strangers int
	// PerPeer bounds those of one peer: an IPv4 address, a /64 of IPv6, a process on a Unix socket. All processes that
	// this one cannot see, in other PID namespaces say, count as one peer, whose newest connection takes the place of its
	// oldest; others are refused. Zero: 32.
	PerPeer int
	// Nameless says that addresses tell nobody apart, as where all come by a port-forward: then everybody is that one peer.
	Nameless bool
	// Rate bounds the new connections of one peer per second, after a burst of four times as many. Zero: 50.
	Rate int
	// Patience is how long a stranger may stay. Zero: 30 s.
	Patience time.Duration
	// Bytes is how much is read from a stranger. Zero: 64 KiB.
	Bytes int
	// Members bounds the connections that were vouched for. Zero: 16384, or half of the process's file descriptors where
	// that is less.
	Members int
	// PerMember bounds those of one member, who loses his oldest to his newest. Zero: 4.
	PerMember int

	Log *slog.Logger // nil: nothing is logged
}

// SharedSocket are the limits of the socket that all proxies of a node share. Those whose pods are not known yet, as when
// all come back after a restart of the agent, are strangers until a token of theirs was believed.
func SharedSocket(log *slog.Logger) Limits {
	return Limits{Port: "sds", Strangers: 512, Bytes: 128 << 10, Patience: time.Minute, PerMember: 16, Log: log}
}

// Why a connection was refused or ended: the values of the metric's label.
const (
	tooManyOfPeer = "peer_limit" // refused: the peer has its share
	tooFast       = "peer_rate"  // refused: the peer comes too often
	crowded       = "crowded"    // refused: all places are taken, and nobody has more than this peer
	displaced     = "displaced"  // ended: its place went to a peer who has fewer, or to a newer one of the same member or of the nameless
	tooLong       = "too_long"   // ended: a stranger stayed too long
	tooMuch       = "too_much"   // ended: a stranger said too much
)

const (
	burstOfRate = 4
	maxPeers    = 4096 // that are remembered
)

// Listener bounds the connections of the listener that it wraps. Its metrics tell of what it refused.
type Listener struct {
	net.Listener
	limits  Limits
	open    *prometheus.GaugeVec
	refused *prometheus.CounterVec

	mu        sync.Mutex
	strangers crowd
	members   crowd
	rates     map[string]*rate
	untold    int // refusals since the log was told last
	told      time.Time
}

// Limit wraps a listener.
func Limit(l net.Listener, limits Limits) *Listener {
	limits.Strangers = cmp.Or(limits.Strangers, 128)
	limits.PerPeer = cmp.Or(limits.PerPeer, 32)
	limits.Rate = cmp.Or(limits.Rate, 50)
	limits.Patience = cmp.Or(limits.Patience, 30*time.Second)
	limits.Bytes = cmp.Or(limits.Bytes, 64<<10)
	limits.Members = cmp.Or(limits.Members, min(16384, maxFiles()/2))
	limits.PerMember = cmp.Or(limits.PerMember, 4)
	if limits.Log == nil {
		limits.Log = slog.New(slog.DiscardHandler)
	}
	port := prometheus.Labels{"port": limits.Port}
	return &Listener{
		Listener: l,
		limits:   limits,
		open: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "signet_connections", Help: "Connections that are open now, by port and by kind (stranger, member).", ConstLabels: port}, []string{"kind"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_connections_refused_total", Help: "Connections that were refused or ended by a limit, by port and limit.", ConstLabels: port}, []string{"limit"}),
		strangers: crowd{max: limits.Strangers, of: map[string][]*Conn{}},
		members:   crowd{max: limits.Members, of: map[string][]*Conn{}},
		rates:     map[string]*rate{},
	}
}

// Describe implements prometheus.Collector.
func (l *Listener) Describe(ch chan<- *prometheus.Desc) {
	l.open.Describe(ch)
	l.refused.Describe(ch)
}

// Collect implements prometheus.Collector.
func (l *Listener) Collect(ch chan<- prometheus.Metric) {
	l.mu.Lock()
	strangers, members := l.strangers.n, l.members.n
	l.mu.Unlock()
	l.open.WithLabelValues("stranger").Set(float64(strangers))
	l.open.WithLabelValues("member").Set(float64(members))
	l.open.Collect(ch)
	l.refused.Collect(ch)
}

// Accept implements net.Listener: it returns the next connection that the limits allow, a *Conn. The others are ended
// before anything is read from them.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &Conn{Conn: raw, l: l, peer: nameless, ready: ready.NewReader(raw)}
		if !l.limits.Nameless {
			c.peer = peerOf(raw)
		}
		c.left.Store(int64(l.limits.Bytes))
		if why := l.enter(c); why != "" {
			l.count(why)
			reset(raw)
			continue
		}
		return c, nil
	}
}

// enter finds a place for a newcomer; the reason why there is none, or "".
func (l *Listener) enter(c *Conn) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pace(c.peer, time.Now()) {
		return tooFast
	}
	if of := l.strangers.of[c.peer]; len(of) >= l.limits.PerPeer {
		if c.peer != nameless {
			return tooManyOfPeer
		}
		oldest := of[0] // of somebody else, for all we know: who stays without a word must not keep the others out
		l.strangers.remove(oldest)
		l.displace(oldest)
	}
	victim, ok := l.strangers.add(c, c.peer)
	if !ok {
		return crowded
	}
	l.displace(victim)
	c.timer = time.AfterFunc(l.limits.Patience, func() { c.end(tooLong) })
	return ""
}

// displace ends a connection that has lost its place already. It does so elsewhere: Close may block, and the caller holds
// the lock.
func (l *Listener) displace(victim *Conn) {
	if victim != nil {
		time.AfterFunc(0, func() { victim.end(displaced) })
	}
}

// pace counts one more connection of a peer and reports whether it comes too soon; the caller holds the lock.
func (l *Listener) pace(peer string, now time.Time) bool {
	r := l.rates[peer]
	if r == nil {
		if len(l.rates) >= maxPeers {
			l.forget(now)
		}
		r = &rate{left: float64(burstOfRate * l.limits.Rate), last: now}
		l.rates[peer] = r
	}
	return !r.take(now, float64(l.limits.Rate))
}

// forget drops the peers that have not come for so long that nothing is to be remembered of them; all of them where that
// is not enough.
func (l *Listener) forget(now time.Time) {
	for k, r := range l.rates {
		if now.Sub(r.last) > burstOfRate*time.Second {
			delete(l.rates, k)
		}
	}
	if len(l.rates) >= maxPeers {
		clear(l.rates)
	}
}

// count notes a refusal in the metrics, and in the log at most once a minute.
func (l *Listener) count(limit string) {
	l.refused.WithLabelValues(limit).Inc()
	l.mu.Lock()
	l.untold++
	n := l.untold
	if time.Since(l.told) < time.Minute {
		l.mu.Unlock()
		return
	}
	l.untold, l.told = 0, time.Now()
	l.mu.Unlock()
	l.limits.Log.Warn("connections refused by a limit", "port", l.limits.Port, "limit", limit, "count", n)
}

// Conn is a connection of a Listener.
type Conn struct {
	net.Conn
	l     *Listener
	peer  string
	ready *ready.Reader
	left  atomic.Int64 // what a stranger may still say; of a member, nobody counts

	member atomic.Bool
	ended  atomic.Bool
	timer  *time.Timer // ends a stranger's stay
	// The following are guarded by l.mu.
	placed bool
	key    string
	born   uint64 // counts up as places are given
}

// Peer tells peers apart as the limits do: two connections with the same text come from the same peer.
func (c *Conn) Peer() string { return c.peer }

// Admit makes the connection that of a member, who is told apart by key, because it was proven who speaks there. Only the
// first call counts.
func (c *Conn) Admit(key string) {
	if c.member.Load() {
		return
	}
	l := c.l
	l.mu.Lock()
	defer l.mu.Unlock()
	if !c.placed || !c.member.CompareAndSwap(false, true) {
		return
	}
	l.strangers.remove(c)
	c.timer.Stop()
	if of := l.members.of[key]; len(of) >= l.limits.PerMember {
		oldest := of[0]
		l.members.remove(oldest)
		l.displace(oldest)
	}
	victim, ok := l.members.add(c, key)
	if !ok {
		victim = c
	}
	l.displace(victim)
}

// Read implements net.Conn. A stranger who says too much is cut off.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.spent(n) {
		return 0, net.ErrClosed
	}
	return n, err
}

// ReadOnReady is Read without a buffer meanwhile, which is how gRPC reads: see package ready.
func (c *Conn) ReadOnReady(size int, pool mem.BufferPool) (*[]byte, int, error) {
	buf, n, err := c.ready.ReadOnReady(size, pool)
	if c.spent(n) {
		if buf != nil {
			pool.Put(buf)
		}
		return nil, 0, net.ErrClosed
	}
	return buf, n, err
}

// spent counts what was read, and cuts off a stranger who has said too much.
func (c *Conn) spent(n int) bool {
	if c.member.Load() || c.left.Add(int64(-n)) >= 0 || c.member.Load() {
		return false
	}
	c.end(tooMuch)
	return true
}

// Close implements net.Conn.
func (c *Conn) Close() error {
	if c.ended.Swap(true) {
		return net.ErrClosed
	}
	c.l.mu.Lock()
	if c.placed {
		if c.member.Load() {
			c.l.members.remove(c)
		} else {
			c.l.strangers.remove(c)
		}
	}
	if c.timer != nil {
		c.timer.Stop()
	}
	c.l.mu.Unlock()
	return c.Conn.Close()
}

// end closes the connection because of a limit.
func (c *Conn) end(limit string) {
	if limit == tooLong && c.member.Load() {
		return // somebody vouched for it at the last moment
	}
	if c.Close() == nil {
		c.l.count(limit)
	}
}

// ConnOf returns the connection over which a call came, where it is one of a Listener whose gRPC server has the
// credentials of Plain; nil otherwise.
func ConnOf(ctx context.Context) *Conn {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, ok := p.AuthInfo.(plainInfo)
	if !ok {
		return nil
	}
	return info.conn
}

// PeerOf tells apart where calls come from, as Conn.Peer does; empty where ConnOf is nil.
func PeerOf(ctx context.Context) string {
	if c := ConnOf(ctx); c != nil {
		return c.peer
	}
	return ""
}

// nameless is the peer that all are together who cannot be told apart by anything: one each, they would have no bound.
const nameless = "nameless"

// peerOf names the peer of a connection.
func peerOf(c net.Conn) string {
	switch a := c.RemoteAddr().(type) {
	case *net.TCPAddr:
		ip := a.AddrPort().Addr().Unmap().WithZone("")
		if ip.Is6() { // of which somebody has a /64 at least
			p, _ := ip.Prefix(64)
			return p.String()
		}
		return ip.String()
	case *net.UnixAddr:
		if pid := peerPID(c); pid > 0 {
			return "pid " + strconv.Itoa(pid)
		}
	}
	return nameless
}

// reset ends a connection that was refused, on TCP without the state that an orderly end leaves in the kernel.
func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		t.SetLinger(0)
	}
	c.Close()
}

// crowd is a bounded set of connections, by whose they are, the oldest of each first.
type crowd struct {
	max, n int
	born   uint64
	of     map[string][]*Conn
}

// add gives c a place. Where none is free, the oldest connection of whoever has the most makes room, and is returned; false
// where nobody has more than this one would have. Among equals the oldest goes: whoever has business is done soon.
func (s *crowd) add(c *Conn, key string) (victim *Conn, ok bool) {
	if s.n >= s.max {
		most := len(s.of[key]) + 1
		for k, of := range s.of {
			if k == key || len(of) < most {
				continue
			}
			if len(of) > most || victim == nil || of[0].born < victim.born {
				victim, most = of[0], len(of)
			}
		}
		if victim == nil {
			return nil, false
		}
		s.remove(victim)
	}
	s.born++
	c.key, c.placed, c.born = key, true, s.born
	s.of[key] = append(s.of[key], c)
	s.n++
	return victim, true
}

// remove takes c out; it must be in.
func (s *crowd) remove(c *Conn) {
	of := s.of[c.key]
	for i := range of {
		if of[i] == c {
			of = append(of[:i:i], of[i+1:]...)
			s.n--
			break
		}
	}
	c.placed = false
	if s.of[c.key] = of; len(of) == 0 {
		delete(s.of, c.key)
	}
}

// rate is a token bucket.
type rate struct {
	left float64
	last time.Time
}

func (r *rate) take(now time.Time, perSecond float64) bool {
	r.left = min(burstOfRate*perSecond, r.left+max(0, now.Sub(r.last).Seconds())*perSecond)
	r.last = now
	if r.left < 1 {
		return false
	}
	r.left--
	return true
}
