package workloadapi

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"

	"github.com/signet-ca/signet/api"
)

const (
	handshakeTime = 5 * time.Second
	keepaliveTime = time.Minute      // until a silent client is asked whether it is there; idle costs nothing else
	pingTime      = 10 * time.Second // least time between a client's own pings
	idleTime      = 5 * time.Minute  // a connection without a call ends then
	graceTime     = 2 * time.Second  // for what is on its way when a socket ends
	readBurst     = 16               // seconds
	acceptCost    = 1 << 10          // bytes that a new connection counts as
	window        = 64 << 10
	bufferBytes   = 4 << 10 // of a connection: a node has hundreds of them
)

// Service is what may be served beside the Workload API on the same socket: SDS, say (SPIFFE Workload Endpoint section 7).
type Service interface {
	// Register makes r serve it.
	Register(r grpc.ServiceRegistrar)
	// Close ends its streams and refuses new ones.
	Close()
}

// Serve serves the Workload API, and what stands beside it, on l until ctx ends; then it closes the Server and the services
// beside it, gives what is on its way two seconds, and returns nil. It returns an error when l fails. Serve closes l. It is
// called once.
func (s *Server) Serve(ctx context.Context, l net.Listener, beside ...Service) error {
	g := grpc.NewServer(
		grpc.MaxRecvMsgSize(s.cfg.MaxRequestBytes),
		grpc.MaxHeaderListSize(2*api.MaxTokenBytes), // a proxy may bring its token along, which nobody asks for
		grpc.MaxConcurrentStreams(uint32(2*s.cfg.MaxStreams)),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, MaxConnectionIdle: idleTime}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingTime, PermitWithoutStream: true}),
		grpc.StaticStreamWindowSize(window),
		grpc.StaticConnWindowSize(window),
		grpc.ReadBufferSize(bufferBytes),
		grpc.WriteBufferSize(bufferBytes),
		grpc.Creds(plain{insecure.NewCredentials()}),
	)
	s.Register(g)
	for _, b := range beside {
		b.Register(g)
	}
	limited := newListener(l, s.cfg.MaxConnections, s.cfg.ReadRate)
	var wg sync.WaitGroup
	served := make(chan error, 1)
	wg.Go(func() { served <- g.Serve(limited) })
	var err error
	select {
	case err = <-served:
	case <-ctx.Done():
	}
	s.Close()
	for _, b := range beside {
		b.Close()
	}
	limited.release() // a connection that waits for its turn to be read would hold up the end
	force := time.AfterFunc(graceTime, g.Stop)
	g.GracefulStop()
	force.Stop()
	wg.Wait()
	if ctx.Err() != nil || errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return err
}

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
			return &conn{Conn: c, l: l}, nil
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
	l    *listener
	once sync.Once
}

// Read implements net.Conn, no faster than the socket may be read.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.l.wait(n)
	return n, err
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

// plain is gRPC without TLS, as the specification has it, with calls that know over which connection they came.
type plain struct {
	credentials.TransportCredentials
}

type plainInfo struct {
	credentials.AuthInfo
	conn *conn
}

// ServerHandshake implements credentials.TransportCredentials.
func (p plain) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, info, err := p.TransportCredentials.ServerHandshake(raw)
	if own, ok := raw.(*conn); ok && err == nil {
		info = plainInfo{info, own}
	}
	return c, info, err
}

// Clone implements credentials.TransportCredentials.
func (p plain) Clone() credentials.TransportCredentials {
	return plain{p.TransportCredentials.Clone()}
}

// hangUp closes the connection over which a call came, where Serve accepted it. What gRPC has queued for a client that does
// not read stays until then, even when its stream has ended.
func hangUp(ctx context.Context) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return
	}
	if info, ok := p.AuthInfo.(plainInfo); ok {
		info.conn.Close()
	}
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
