package sds

import (
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
