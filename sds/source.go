package sds

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/internal/latest"
)

// Source says which workload speaks on a stream.
type Source interface {
	// Open is called once for each stream or fetch, before anything is read from it. ctx carries the gRPC peer and ends
	// when Open returns: what must live as long as the stream is ended by Workload.Release. md is what the client sent as
	// metadata, which may hold a token.
	//
	// Open may be called from many goroutines at once. It may block while it finds out who speaks, as long as it heeds
	// ctx; it does not wait for the identity itself: a Workload may come first and its Material later. An *api.Error ends
	// the stream with its reason, any other error with Internal.
	Open(ctx context.Context, md metadata.MD) (*Workload, error)
}

// Workload is whom a stream belongs to, as the Source found out. A Server does not change it.
type Workload struct {
	Name string // for logs: the pod's namespace/name

	// ID is what attestation yields for this workload. Zero: not known yet. Until it is known, a SPIFFE ID that somebody
	// asks for can be told neither as own nor as foreign, and its stream waits.
	ID spiffeid.ID

	// Material holds the newest identity and trust of the workload: nil until there is trust. Required, and the same
	// pointer for every stream of one workload: they are counted by it.
	Material *latest.Value[*Material]

	// ExpireAt is when the evidence for this stream, a token, loses its worth. The stream ends with REAUTH_REQUIRED some
	// time before: at a point drawn at random from the last 5 to 20 percent of what was left when it opened, so that a
	// node's proxies do not all come back at once. Zero: never.
	ExpireAt time.Time

	// Release is called once when the stream or fetch has ended, or was not let in after all. Nil: nothing.
	Release func()

	// Done ends the stream when it is closed: the workload is gone, say. Nil: never.
	Done <-chan struct{}
	// Err says why, once Done is closed; its error is treated as one of Open. Nil, or a nil error: AGENT_STOPPING.
	Err func() error

	// Report tells of the stream when it opens, when its subscription changes, on each push and each answer, and when it
	// closes. It is not called twice at once for a stream, and must not block. Nil: nobody listens. Fetches, which
	// acknowledge nothing, are not reported.
	Report func(Report)
}

// Material is what a workload has: immutable once it is set in a latest.Value.
type Material struct {
	Identity *Identity // nil until issued
	Trust    *Trust    // nil: nothing is pushed, not even the identity
}

// Report is what is known of one stream.
type Report struct {
	Stream      uint64   // unique within its Server, counts up
	Proxy       string   // what the client calls itself: never trusted, printable, at most 128 bytes
	Protocol    string   // ProtocolSotW or ProtocolDelta
	Names       []string // subscribed, sorted, without those that belong to somebody else; not to be changed
	WantsBundle bool     // it subscribed to a bundle, so its acknowledgement counts
	Open        bool     // false in the last report

	AckedSerial      string // of the SVID that it acknowledged last; lower-case hex
	AckedGeneration  uint64 // lowest spiffe_sequence that it acknowledged among its bundles; 0 until all are
	AckedHash        []byte // api.BundleHash of that bundle
	PushedGeneration uint64 // highest spiffe_sequence that was pushed to it, or that it said to hold

	Nack  string // its last refusal in its own words: printable, at most 512 bytes; empty when good
	Acks  uint64
	Nacks uint64
}
