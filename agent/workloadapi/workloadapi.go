// Package workloadapi serves the SPIFFE Workload API to the one workload behind a socket.
//
// Who speaks is known from which socket it is, before a byte is read: a Server has a Source for exactly one identity, asks
// nobody for a credential (SPIFFE Workload Endpoint section 5) and looks at nothing that a client sends but the header
// that the specification demands: no request is ever parsed. So there is no call by which one workload could ask for what is another's.
//
// X.509-SVIDs and their bundles are served; the calls of other kinds of SVID say that they are not. The four codes of the
// specification are the only ones that clients act upon, so refusals travel under them, whatever code their reason has
// elsewhere: InvalidArgument without the header, PermissionDenied where there is no identity and none will come,
// Unimplemented, and Unavailable for all that may be tried again. The reason itself is in the status's details.
//
// Four rules hold on every stream. An identity is never sent before there is trust to send with it. Every message is
// complete. What a client was sent is not sent to it again. A client that reads slowly skips versions, and one that does
// not read is cut off. The Workload API has no acknowledgement: what was handed to a stream is reported as delivered,
// never as more.
package workloadapi

import (
	"cmp"
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-ca/signet/api"
)

const (
	defaultMaxStreams      = 32
	defaultMaxConnections  = 32
	defaultMaxRequestBytes = 16 << 10
	defaultReadRate        = 64 << 10
	defaultTimeout         = 30 * time.Second
)

// Config says what a Server serves and what it bounds.
type Config struct {
	Source Source // required
	Name   string // of the workload, for logs: the pod's namespace/name

	// Log receives ends of streams, refusals (each kind at most every ten seconds) and faults; never a key. Nil: nothing
	// is logged.
	Log *slog.Logger

	// MaxStreams bounds the calls of the Workload API and of reflection that are open at once. Zero: 32.
	MaxStreams int
	// Timeout is how long a client may take to make room for a response, and all that it may take for reflection. Whoever
	// takes longer is cut off. Zero: 30 s.
	Timeout time.Duration

	// MaxConnections bounds the connections that Serve keeps open; one more is closed at once. Zero: 32.
	MaxConnections int
	// MaxRequestBytes bounds one message from a client. The Workload API needs little; services beside it may need more.
	// Zero: 16 KiB.
	MaxRequestBytes int
	// ReadRate bounds what Serve reads from all connections together, in bytes a second after a first burst of 16
	// seconds' worth. What comes faster waits in the client, so that a flood of whatever kind costs the agent little.
	// Zero: 64 KiB.
	ReadRate int

	// Delivered tells of a stream when it opens, at each delivery, and when it ends. It is called from one goroutine at a
	// time for each stream and must not block. Nil: nobody listens.
	Delivered func(Delivery)
	// Hooks are called as things happen. The zero Hooks are none.
	Hooks Hooks
}

// Hooks observe a Server, for metrics. Each may be nil, may be called from many goroutines at once, and must not block.
type Hooks struct {
	Opened  func(call string)                    // a stream was let in
	Closed  func(call string, reason api.Reason) // it ended; reason is empty when the client ended it
	Refused func(call string, reason api.Reason) // a call was not let in: no header, not served, a limit
	Pushed  func(call string)                    // one message was delivered
}

// Server serves the Workload API for one workload. It is safe for concurrent use.
type Server struct {
	cfg     Config
	log     *slog.Logger
	ids     atomic.Uint64
	closing context.Context // ended by Close
	close   context.CancelFunc
	wg      sync.WaitGroup // every call and every goroutine that one started

	mu      sync.Mutex // guards what follows
	streams int
	quiet   map[api.Reason]*quiet

	currentMu sync.Mutex // guards what follows; held while the Source is asked
	seen      *Snapshot  // the last that was made into held
	held      material
}

// New returns a Server. It panics without a Source.
func New(cfg Config) *Server {
	if cfg.Source == nil {
		panic("workloadapi: Config.Source is required")
	}
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	cfg.MaxStreams = cmp.Or(max(cfg.MaxStreams, 0), defaultMaxStreams)
	cfg.MaxConnections = cmp.Or(max(cfg.MaxConnections, 0), defaultMaxConnections)
	cfg.MaxRequestBytes = cmp.Or(max(cfg.MaxRequestBytes, 0), defaultMaxRequestBytes)
	cfg.ReadRate = cmp.Or(max(cfg.ReadRate, 0), defaultReadRate)
	cfg.Timeout = cmp.Or(max(cfg.Timeout, 0), defaultTimeout)
	s := &Server{cfg: cfg, log: cfg.Log.With("workload", cfg.Name), quiet: map[api.Reason]*quiet{}}
	s.closing, s.close = context.WithCancel(context.Background())
	return s
}

// Close ends every stream with AGENT_STOPPING (Unavailable), refuses new ones, and returns when all of them and all they
// started have ended. Clients keep what they have and come back. Call it before grpc.Server.GracefulStop, which waits for
// streams; Serve does.
func (s *Server) Close() {
	s.mu.Lock()
	s.close() // under the lock: nobody enters after it
	s.mu.Unlock()
	s.wg.Wait()
}

// enter counts one call against the socket.
func (s *Server) enter() (leave func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		return nil, errStopping()
	}
	if s.streams >= s.cfg.MaxStreams {
		return nil, api.E(api.StreamLimit, "the workload has reached its limit of %d streams", s.cfg.MaxStreams)
	}
	s.streams++
	s.wg.Add(1)
	return func() {
		s.mu.Lock()
		s.streams--
		s.mu.Unlock()
		s.wg.Done()
	}, nil
}

func errStopping() error {
	return api.E(api.AgentStopping, "the agent is stopping, or no longer serves this workload here")
}
