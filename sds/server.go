package sds

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/signet-ca/signet/api"
)

const (
	handshakeTime = 5 * time.Second
	keepaliveTime = 30 * time.Second
)

// ServerOptions are the limits of a gRPC server that serves SDS to proxies and nothing else. They hold before anything is
// read; who may connect, and how the server knows them, is for the caller to add.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(api.ServerCodec()),
		grpc.MaxRecvMsgSize(MaxRequestBytes),
		grpc.MaxHeaderListSize(2 * api.MaxTokenBytes),
		grpc.MaxConcurrentStreams(64),
		grpc.StaticStreamWindowSize(64 << 10), // gRPC would let it grow to 16 MiB for whoever sends fast
		grpc.StaticConnWindowSize(256 << 10),
		grpc.HeaderTableSize(0), // Envoy opens one stream on a connection: what is remembered of its header serves nobody
		grpc.ReadBufferSize(8 << 10),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime}),
	}
}

// guarded registers unary calls so that a message which is none is refused like all else: gRPC reads it before any handler
// runs, and answers what is wrong with it itself.
type guarded struct {
	grpc.ServiceRegistrar
	srv *Server
}

// RegisterService implements grpc.ServiceRegistrar.
func (g guarded) RegisterService(desc *grpc.ServiceDesc, impl any) {
	d := *desc
	d.Methods = slices.Clone(d.Methods)
	for i := range d.Methods {
		m := &d.Methods[i]
		next := m.Handler
		m.Handler = func(impl any, ctx context.Context, dec func(any) error, inner grpc.UnaryServerInterceptor) (any, error) {
			return next(impl, ctx, func(m any) error { return g.srv.receive(ctx, m, dec) }, inner)
		}
	}
	g.ServiceRegistrar.RegisterService(&d, impl)
}

// quietTime is the least time between two lines about fetches that came with no request. Nobody knows yet who sends them,
// and nobody fills the log by knocking.
const quietTime = 10 * time.Second

// receive reads the request of a fetch.
func (s *Server) receive(ctx context.Context, m any, dec func(any) error) error {
	err := contain(func() error { return api.ReceiveOnly(ctx, m, MaxRequestBytes, dec) })
	e, ok := errors.AsType[*api.Error](err)
	if !ok {
		return err
	}
	log := slog.New(slog.DiscardHandler)
	if left, ok := s.mayLog(time.Now()); ok {
		log = s.log.With("protocol", protocolFetch, "left_out", left)
	}
	e = s.explain(log, "stream refused", e)
	if f := s.cfg.Hooks.Refused; f != nil {
		f(protocolFetch, e.Reason)
	}
	return api.ToStatus(e).Err()
}

// mayLog reports whether a line about such a fetch is due, and how many were left out before it.
func (s *Server) mayLog(now time.Time) (left int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Before(s.quietUntil) {
		s.leftOut++
		return 0, false
	}
	left, s.leftOut, s.quietUntil = s.leftOut, 0, now.Add(quietTime)
	return left, true
}
