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
		grpc.HeaderTableSize(0), // there is one call on most connections: what is remembered of its header serves nobody
		grpc.ReadBufferSize(bufferBytes),
		grpc.WriteBufferSize(bufferBytes),
		grpc.Creds(plain{insecure.NewCredentials()}),
		grpc.ForceServerCodecV2(api.ServerCodec()), // what does not parse comes as an empty message: reflection is asked about nothing
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
