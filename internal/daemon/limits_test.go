package daemon

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// arrivals is a listener in memory to which a test brings connections from wherever it likes.
type arrivals chan net.Conn

func (a arrivals) Accept() (net.Conn, error) {
	c, ok := <-a
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (a arrivals) Close() error { close(a); return nil }

func (arrivals) Addr() net.Addr { return &net.TCPAddr{} }

// from is a connection from an address.
type from struct {
	net.Conn
	addr net.Addr
}

func (f from) RemoteAddr() net.Addr { return f.addr }

// gate is a limited listener in a bubble, and what it let in.
type gate struct {
	*Listener
	t    *testing.T
	come arrivals
	in   chan *Conn
}

func withGate(t *testing.T, limits Limits, f func(t *testing.T, g *gate)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		g := &gate{t: t, come: make(arrivals), in: make(chan *Conn, 1000)}
		limits.Port = "test"
		g.Listener = Limit(g.come, limits)
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := g.Accept()
				if err != nil {
					return
				}
				g.in <- c.(*Conn)
			}
		})
		f(t, g)
		g.Close()
		wg.Wait()
		for len(g.in) > 0 {
			(<-g.in).Close()
		}
		g.counts(0, 0)
		if g.strangers.n+g.members.n+len(g.strangers.of)+len(g.members.of) > 0 {
			t.Errorf("after the end, places are still taken: %+v, %+v", g.strangers, g.members)
		}
	})
}

// visitor is both ends of a connection.
type visitor struct {
	out net.Conn
	in  *Conn // nil: refused
}

func (v visitor) over() bool {
	v.out.SetReadDeadline(time.Now().Add(time.Nanosecond))
	_, err := v.out.Read(make([]byte, 1))
	return err == io.EOF
}

// knock comes from an address.
func (g *gate) knock(addr string) visitor {
	g.t.Helper()
	out, in := net.Pipe()
	var a net.Addr = &net.UnixAddr{Name: addr, Net: "unix"}
	if t, err := net.ResolveTCPAddr("tcp", addr); err == nil {
		a = t
	}
	g.t.Cleanup(func() { out.Close() })
	g.come <- from{in, a}
	synctest.Wait()
	select {
	case c := <-g.in:
		return visitor{out, c}
	default:
		return visitor{out, nil}
	}
}

func (g *gate) metric(name, label string) float64 {
	g.t.Helper()
	r := prometheus.NewRegistry()
	r.MustRegister(g.Listener)
	families, err := r.Gather()
	if err != nil {
		g.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && m.GetLabel()[0].GetValue() == label {
				return m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func (g *gate) counts(strangers, members int) {
	g.t.Helper()
	if s, m := g.metric("signet_connections", "stranger"), g.metric("signet_connections", "member"); int(s) != strangers || int(m) != members {
		g.t.Errorf("%v strangers and %v members, want %d and %d", s, m, strangers, members)
	}
}

func (g *gate) refusals(limit string, want int) {
	g.t.Helper()
	if n := g.metric("signet_connections_refused_total", limit); int(n) != want {
		g.t.Errorf("%s: %v refusals, want %d", limit, n, want)
	}
}

// A peer has its share and no more; what it gives back it may take again. An IPv6 peer is a /64, and a port is nobody.
func TestLimitPerPeer(t *testing.T) {
	for _, addrs := range [][3]string{
		{"192.0.2.1:1000", "192.0.2.1:2000", "192.0.2.2:1000"},
		{"[2001:db8::1]:1", "[2001:db8::ffff:1]:1", "[2001:db8:0:1::1]:1"},
		{"[::ffff:192.0.2.1]:1", "192.0.2.1:1", "[::1]:1"},
	} {
		t.Run(addrs[0], func(t *testing.T) {
			withGate(t, Limits{PerPeer: 2}, func(t *testing.T, g *gate) {
				first := g.knock(addrs[0])
				if g.knock(addrs[1]).in == nil {
					t.Error("the second connection of a peer was refused")
				}
				if v := g.knock(addrs[1]); v.in != nil || !v.over() {
					t.Error("the third connection of a peer was let in")
				}
				if g.knock(addrs[2]).in == nil {
					t.Error("another peer was refused")
				}
				g.refusals(tooManyOfPeer, 1)
				first.in.Close()
				if g.knock(addrs[0]).in == nil {
					t.Error("a place that was given back stays taken")
				}
				g.counts(3, 0)
				time.Sleep(time.Minute)
			})
		})
	}
}

// Those who cannot be told apart, processes that the agent cannot see say, have one share together; the newest has a place
// in it, so that silent ones keep nobody out. Nobody else pays for them.
//
// threat: J07
func TestLimitNameless(t *testing.T) {
	withGate(t, Limits{PerPeer: 2, Rate: 2}, func(t *testing.T, g *gate) {
		var all []visitor
		for i := range 8 {
			v := g.knock("@")
			if v.in == nil {
				t.Fatalf("connection %d of a burst of 8 was refused", i)
			}
			all = append(all, v)
		}
		for i, v := range all {
			if over := v.over(); over != (i < 6) {
				t.Errorf("connection %d of 8 has ended: %v", i, over)
			}
		}
		g.counts(2, 0)
		g.refusals(displaced, 6)
		if g.knock("@").in != nil {
			t.Error("let in beyond the rate")
		}
		g.refusals(tooFast, 1)
		if g.knock("192.0.2.1:1").in == nil {
			t.Error("a peer with a name pays for those without")
		}
		time.Sleep(time.Minute)
	})
}

// Where addresses tell nobody apart, silent ones from one keep nobody else from it out.
//
// threat: J07
func TestLimitAllNameless(t *testing.T) {
	withGate(t, Limits{PerPeer: 2, Nameless: true}, func(t *testing.T, g *gate) {
		first := g.knock("127.0.0.1:1000")
		if first.in == nil || g.knock("127.0.0.1:1001").in == nil {
			t.Fatal("refused at once")
		}
		if g.knock("127.0.0.1:1002").in == nil || !first.over() {
			t.Error("the newest has no place, or the oldest has one still")
		}
		member := g.knock("[::1]:1")
		member.in.Admit("who proved who he is")
		for range 9 {
			g.knock("127.0.0.1:1003")
		}
		if member.over() {
			t.Error("a member went")
		}
		g.counts(2, 1)
		member.in.Close()
		time.Sleep(time.Minute)
	})
}

// Whoever comes too often is sent away before anything is spent on him, and let in again when time has passed.
func TestLimitRate(t *testing.T) {
	withGate(t, Limits{Rate: 2, PerPeer: 1000}, func(t *testing.T, g *gate) {
		for i := range 8 {
			v := g.knock("192.0.2.1:1")
			if v.in == nil {
				t.Fatalf("connection %d of a burst of 8 was refused", i)
			}
			v.in.Close()
		}
		for range 100 {
			if g.knock("192.0.2.1:1").in != nil {
				t.Fatal("let in beyond the rate")
			}
		}
		if g.knock("192.0.2.2:1").in == nil {
			t.Error("another peer pays for it")
		}
		time.Sleep(time.Second)
		for i := range 3 {
			if got := g.knock("192.0.2.1:1").in != nil; got != (i < 2) {
				t.Errorf("connection %d after a second: let in %v", i, got)
			}
		}
		g.refusals(tooFast, 101)
		for i := range 3 * maxPeers { // what is remembered of peers is bounded
			g.pace("peer "+string(rune(i)), time.Now())
		}
		if len(g.rates) > maxPeers {
			t.Errorf("%d peers are remembered", len(g.rates))
		}
		time.Sleep(time.Minute)
	})
}

// threat: J07
func TestLimitCrowd(t *testing.T) {
	withGate(t, Limits{Strangers: 10, PerPeer: 10}, func(t *testing.T, g *gate) {
		var flood []visitor
		for range 10 {
			flood = append(flood, g.knock("192.0.2.1:1"))
		}
		for range 3 {
			if g.knock("192.0.2.1:1").in != nil {
				t.Fatal("a peer took more than there is")
			}
		}
		late := g.knock("192.0.2.2:1")
		if late.in == nil || !flood[0].over() || flood[1].over() {
			t.Fatal("a newcomer does not get the place of the oldest of the crowd")
		}
		g.refusals(displaced, 1)
		g.counts(10, 0)
		// A crowd from everywhere passes through: whoever has business is done before it is his turn to go.
		for i := range 9 {
			if g.knock("203.0.113."+string(rune('1'+i))+":1").in == nil {
				t.Error("a newcomer was refused")
			}
			time.Sleep(time.Millisecond)
		}
		if late.over() || !flood[9].over() && g.strangers.of["192.0.2.1"] == nil {
			t.Error("the wrong one had to go")
		}
		late.in.Admit("node-2")
		g.counts(9, 1)
		for i := range 50 {
			g.knock("198.51.100." + string(rune('0'+i%10)) + ":1")
		}
		if late.over() {
			t.Error("a crowd of strangers cost a member its connection")
		}
		late.in.Close()
		time.Sleep(time.Minute)
	})
}

// A member has few connections, of which the newest count; all members together are bounded as fairly.
func TestLimitMembers(t *testing.T) {
	withGate(t, Limits{Members: 6, PerMember: 4}, func(t *testing.T, g *gate) {
		admit := func(key string) visitor {
			t.Helper()
			v := g.knock("192.0.2.1:1")
			if v.in == nil {
				t.Fatal("refused")
			}
			v.in.Admit(key)
			v.in.Admit("another") // nobody is two
			synctest.Wait()
			return v
		}
		var a []visitor
		for range 6 {
			a = append(a, admit("a"))
		}
		for i, v := range a {
			if v.over() != (i < 2) {
				t.Errorf("connection %d of a member: over is %v", i, v.over())
			}
		}
		admit("b")
		admit("c")
		if g.counts(0, 6); a[2].over() {
			t.Error("ended without need")
		}
		if d := admit("d"); d.over() || !a[2].over() {
			t.Error("who has most keeps it")
		}
		g.refusals(displaced, 3)
		time.Sleep(time.Hour)
		if g.counts(0, 6); a[5].over() {
			t.Error("a member's stay ended")
		}
		for range 7 {
			admit("e").in.Close()
		}
		g.counts(0, 5)
		a[5].in.Admit("f")
		a[5].in.Close()
		a[5].in.Admit("f") // what is over stays over
		if a[5].in.Close() == nil {
			t.Error("a connection was closed twice")
		}
		for k := range g.members.of {
			for _, c := range g.members.of[k] {
				defer c.Close()
			}
		}
	})
}

// Strangers neither stay nor say much.
//
// threat: J02
func TestLimitStrangers(t *testing.T) {
	withGate(t, Limits{Bytes: 100, Patience: 10 * time.Second}, func(t *testing.T, g *gate) {
		slow, loud, good := g.knock("192.0.2.1:1"), g.knock("192.0.2.2:1"), g.knock("192.0.2.3:1")
		say := func(v visitor, n int) (read int) {
			go v.out.Write(make([]byte, n))
			for n > 0 {
				m, err := v.in.Read(make([]byte, 64))
				if read += m; err != nil {
					return read
				}
				n -= m
			}
			return read
		}
		if n := say(loud, 100); n != 100 || loud.over() {
			t.Errorf("%d bytes of 100 were read", n)
		}
		if n := say(loud, 1); n != 0 || !loud.over() {
			t.Errorf("%d bytes beyond the limit were read", n)
		}
		good.in.Admit("node-3")
		if n := say(good, 1000); n != 1000 {
			t.Errorf("%d bytes of a member's 1000 were read", n)
		}
		for range 9 {
			time.Sleep(time.Second)
			say(slow, 1) // a sign of life buys no time
		}
		if slow.over() {
			t.Error("ended early")
		}
		time.Sleep(2 * time.Second)
		if !slow.over() || good.over() {
			t.Error("a stranger stays, or a member does not")
		}
		g.refusals(tooMuch, 1)
		g.refusals(tooLong, 1)
		good.in.Close()
	})
}

// The log is told of a flood once a minute.
func TestLimitLog(t *testing.T) {
	var log bytes.Buffer
	withGate(t, Limits{PerPeer: 1, Rate: 10000, Log: slog.New(slog.NewTextHandler(&log, nil))}, func(t *testing.T, g *gate) {
		for range 100 {
			g.knock("192.0.2.1:1")
		}
		if n := strings.Count(log.String(), "\n"); n != 1 || strings.Contains(log.String(), "192.0.2") {
			t.Errorf("%d lines, or an address:\n%s", n, log.String())
		}
		time.Sleep(2 * time.Minute)
		g.knock("192.0.2.1:1")
		g.knock("192.0.2.1:1")
		if !strings.Contains(log.String(), "count=100") {
			t.Errorf("the log does not know how many:\n%s", log.String())
		}
		time.Sleep(time.Minute)
	})
}
