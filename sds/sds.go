// Package sds serves X509-SVIDs and trust bundles to Envoy over its Secret Discovery Service: state of the world
// (StreamSecrets), incremental (DeltaSecrets) and unary (FetchSecrets).
//
// It is written over the protocol's messages alone, never over the caches that come with them: those find secrets by
// the node id, which the client chooses, so that one workload could ask as another. Here a stream belongs to the
// Workload that its Source says, before a byte is read from it, and nothing that a client says later can change that.
// Names in a request only choose among that workload's own secrets:
//
//	default             the workload's certificate and key
//	spiffe://TD/PATH    the same, under the workload's own SPIFFE ID
//	ROOTCA              the trust bundle of its own trust domain
//	spiffe://TD         the same, under the trust domain's ID
//	ALL                 the trust bundles of every trust domain that is known
//
// A trust bundle is always a configuration of Envoy's SPIFFE validator, so that the roots of one trust domain cannot
// vouch for an identity of another. A request without names, or with the name *, means default and ROOTCA, and no more.
//
// Four rules hold on every stream. An identity is never pushed before there is trust to push. At most one response is
// unanswered, so what changes meanwhile is merged and no key can arrive after a newer one. What a client holds is not
// sent to it again, and what it refused is not sent again until there is something newer. Nonces are random: whoever
// acknowledges a bundle here has read it, and a rotation of roots may rest on that. (A delta client that comes back and
// names the very version it holds is believed too: it speaks of itself alone, as it does in an acknowledgement.)
package sds

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/latest"
)

// Limits that do not depend on the installation.
const (
	MaxNames     = 64       // names that one stream may subscribe to
	MaxNodeBytes = 64 << 10 // of the node's description in a request, encoded

	// MaxRequestBytes is the length of the largest request that is read, and a fitting grpc.MaxRecvMsgSize for a server that
	// serves nothing larger: a request with the most and longest names, versions for them and a node is below 512 KiB, and a
	// node that is too large for MaxNodeBytes mostly still arrives to be told so by its own reason.
	MaxRequestBytes = 1 << 20
)

const (
	defaultMaxStreams            = 4096
	defaultMaxStreamsPerWorkload = 16
	defaultAnswerTimeout         = 30 * time.Second
	defaultRequestRate           = 100
	requestBurst                 = 256
	defaultMaxOpening            = 256
	defaultOpenRate              = 100
	openBurst                    = 256
	maxPeers                     = 4096 // whose pace is remembered
)

// Config says what a Server serves and what it bounds.
type Config struct {
	Source Source // required

	// Log receives ends of streams, refusals and faults; never a key. Nil: nothing is logged.
	Log *slog.Logger

	// MaxStreams bounds the streams and fetches of all workloads together. Zero: 4096.
	MaxStreams int
	// MaxStreamsPerWorkload bounds those of one workload. Envoy opens one for each secret. Zero: 16.
	MaxStreamsPerWorkload int
	// AnswerTimeout is how long a client may take to read and answer a response, to send its first request, and to wait
	// for a fetch. Whoever takes longer is cut off: a stream that reads nothing proves nothing. Zero: 30 s.
	AnswerTimeout time.Duration
	// RequestRate bounds the requests that are read from one stream, per second, after a first burst of 256. What comes
	// faster waits in the client's own flow control. Zero: 100.
	RequestRate int

	// MaxOpening bounds the streams and fetches of which the Source has not said yet whose they are. When all places are
	// taken, the peer with the most gives one up to a peer with fewer. Zero: 256.
	MaxOpening int
	// Peer tells apart who opens streams before it is known whose they are: a process, say. Streams whose peers have the
	// same text count together; those with an empty text are not told apart, and OpenRate is not for them. Nil: all empty.
	Peer func(ctx context.Context) string
	// OpenRate bounds the streams and fetches of one peer, per second, after a first burst of 256: whoever comes faster is
	// refused before his token is looked at. Zero: 100.
	OpenRate int

	// Hooks are called as things happen. The zero Hooks are none.
	Hooks Hooks
}

// Hooks observe a Server, for metrics. Each may be nil, may be called from many goroutines at once, and must not block.
type Hooks struct {
	Opened   func(protocol string)                               // a stream or fetch was let in
	Closed   func(protocol string, reason api.Reason)            // it ended; reason is empty when the client ended it
	Refused  func(protocol string, reason api.Reason)            // it was not let in: a limit, or the Source
	Pushed   func(protocol, kind string)                         // one secret went out; kind is "identity" or "trust"
	Answered func(protocol string, acked bool, in time.Duration) // a response was acknowledged or refused
	LeftOut  func(workload string)                               // a name that belongs to somebody else was left out
	Ignored  func(protocol string)                               // a request with a stale or foreign nonce
}

// The protocols, as they are called in reports and hooks.
const (
	ProtocolSotW  = "sotw"
	ProtocolDelta = "delta"
	protocolFetch = "fetch"
)

// Server serves SDS. It is safe for concurrent use and may be registered with many gRPC servers, one for each socket.
//
// It registers no decompressor and refuses a compressed request, and one above MaxRequestBytes; whoever makes the gRPC
// server sets its streams per connection and its keepalive, which a Server cannot reach.
type Server struct {
	cfg     Config
	log     *slog.Logger
	ids     atomic.Uint64
	closing context.Context // ended by Close
	close   context.CancelFunc

	wg sync.WaitGroup // every handler and every goroutine that one started

	mu      sync.Mutex // guards what follows
	streams int
	owned   map[*latest.Value[*Material]]int // streams of each workload
	flocks  map[flockKey]*flock
	opening opening

	quietUntil time.Time // until then no fetch without a request is logged
	leftOut    int       // that were not, since the last that was
}

// New returns a Server. It panics without a Source.
func New(cfg Config) *Server {
	if cfg.Source == nil {
		panic("sds: Config.Source is required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.MaxStreams = or(cfg.MaxStreams, defaultMaxStreams)
	cfg.MaxStreamsPerWorkload = or(cfg.MaxStreamsPerWorkload, defaultMaxStreamsPerWorkload)
	cfg.AnswerTimeout = or(cfg.AnswerTimeout, defaultAnswerTimeout)
	cfg.RequestRate = or(cfg.RequestRate, defaultRequestRate)
	cfg.MaxOpening = or(cfg.MaxOpening, defaultMaxOpening)
	cfg.OpenRate = or(cfg.OpenRate, defaultOpenRate)
	if cfg.Peer == nil {
		cfg.Peer = func(context.Context) string { return "" }
	}
	s := &Server{cfg: cfg, log: cfg.Log, owned: map[*latest.Value[*Material]]int{}, flocks: map[flockKey]*flock{}}
	s.opening = opening{of: map[string][]*opener{}, paces: map[string]*pace{}}
	s.closing, s.close = context.WithCancel(context.Background())
	return s
}

// or returns v, or d where v is not above zero.
func or[T int | time.Duration](v, d T) T {
	if v > 0 {
		return v
	}
	return d
}

// Register makes r serve SDS from s.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	secret.RegisterSecretDiscoveryServiceServer(guarded{r, s}, service{s})
}

// Close ends every stream with AGENT_STOPPING, refuses new ones, and returns when all of them and all they started have
// ended. A proxy keeps its secrets and comes back. Call it before grpc.Server.GracefulStop, which waits for streams.
func (s *Server) Close() {
	s.mu.Lock()
	s.close() // under the lock: nobody enters after it
	s.mu.Unlock()
	s.wg.Wait()
}

// service is the face of a Server towards gRPC.
type service struct{ *Server }

// StreamSecrets implements the state-of-the-world protocol.
func (s service) StreamSecrets(wire grpc.BidiStreamingServer[discovery.DiscoveryRequest, discovery.DiscoveryResponse]) error {
	return serve(s.Server, wire, &sotw)
}

// DeltaSecrets implements the incremental protocol.
func (s service) DeltaSecrets(wire grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]) error {
	return serve(s.Server, wire, &delta)
}

// FetchSecrets answers once, when everything that was asked for and may be had is ready.
func (s service) FetchSecrets(ctx context.Context, req *discovery.DiscoveryRequest) (resp *discovery.DiscoveryResponse, err error) {
	err = s.shield(protocolFetch, func() (err error) {
		resp, err = fetch(ctx, s.Server, req)
		return err
	})
	return resp, err
}

// shield contains what panics outside of a stream's own life, in a hook say.
func (s *Server) shield(protocol string, f func() error) error {
	err := contain(f)
	if e, ok := errors.AsType[*api.Error](err); ok {
		return api.ToStatus(s.explain(s.log.With("protocol", protocol), "stream ended", e)).Err()
	}
	return err
}
