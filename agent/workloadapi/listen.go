package workloadapi

import (
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/mem"

	"github.com/signet-ca/signet/internal/ready"
)

const (
	readBurst  = 16      // seconds' worth
	acceptCost = 1 << 10 // bytes that a new connection counts as
)

// listener bounds the connections of a socket and what is read from them. The socket is one workload's, so there is nobody
// to be fair to: a flood delays nobody but itself.
type listener struct {
	net.Listener
	max  int
	done chan struct{} // closed when nobody waits any longer
	once sync.Once

	mu   sync.Mutex // guards what follows
	open int
	rate pace
}

func newListener(l net.Listener, connections, rate int) *listener {
	return &listener{Listener: l, max: connections, done: make(chan struct{}), rate: newPace(rate, readBurst*rate, time.Now())}
}

// Accept returns the next connection that there is room for; others are closed before anything is read from them.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.wait(acceptCost)
		l.mu.Lock()
		room := l.open < l.max
		if room {
			l.open++
		}
		l.mu.Unlock()
		if room {
			return &conn{Conn: c, l: l, ready: ready.NewReader(c)}, nil
		}
		c.Close()
	}
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.release()
	return l.Listener.Close()
}

func (l *listener) release() { l.once.Do(func() { close(l.done) }) }

// wait waits until n bytes may have been read.
func (l *listener) wait(n int) {
	l.mu.Lock()
	d := l.rate.take(n, time.Now())
	l.mu.Unlock()
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-l.done:
	}
}

// conn is a connection of a listener.
type conn struct {
	net.Conn
	l     *listener
	ready *ready.Reader
	once  sync.Once
}

// Read implements net.Conn, no faster than the socket may be read.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.l.wait(n)
	return n, err
}

// ReadOnReady is Read without a buffer meanwhile, which is how gRPC reads: see package ready.
func (c *conn) ReadOnReady(size int, pool mem.BufferPool) (*[]byte, int, error) {
	buf, n, err := c.ready.ReadOnReady(size, pool)
	c.l.wait(n)
	return buf, n, err
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.once.Do(func() {
		c.l.mu.Lock()
		c.l.open--
		c.l.mu.Unlock()
	})
	return c.Conn.Close()
}

// A pace bounds how much may be had: at once up to a burst, then at a rate. It is a token bucket without a goroutine.
type pace struct {
	rate, burst, left float64
	last              time.Time
}

func newPace(perSecond, burst int, now time.Time) pace {
	return pace{rate: float64(perSecond), burst: float64(burst), left: float64(burst), last: now}
}

// take spends n and returns how long to wait until they are paid for.
func (p *pace) take(n int, now time.Time) time.Duration {
	p.left = min(p.burst, p.left+max(0, now.Sub(p.last).Seconds())*p.rate) - float64(n)
	p.last = now
	return max(0, time.Duration(-p.left/p.rate*float64(time.Second)))
}
