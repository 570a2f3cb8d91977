package sds

import (
	"context"
	"errors"
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

// receive reads the request of a fetch.
func (s *Server) receive(ctx context.Context, m any, dec func(any) error) error {
	err := contain(func() error { return api.ReceiveOnly(ctx, m, MaxRequestBytes, dec) })
	if e, ok := errors.AsType[*api.Error](err); ok {
		return s.refuse(protocolFetch, "", e)
	}
	return err
}
