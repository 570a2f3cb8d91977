package workloadapi

import (
	"crypto/sha256"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Source says what the one workload behind a socket may have. A *latest.Value[*Snapshot] is one.
type Source interface {
	// Get returns what the workload has now, and a channel that is closed when there is something newer. It does not
	// block, may be called from many goroutines at once, and returns the same pointer until there is something newer. Nil:
	// nothing is known yet.
	Get() (*Snapshot, <-chan struct{})
}

// Snapshot is what a workload has at one moment. It is not changed once a Source has returned it.
//
// What cannot be served (an SVID that is none, a bundle without authorities) is logged and the last good thing is kept. The
// Source answers for the rest: that the SVIDs verify under the bundle, and that a generation never goes down.
type Snapshot struct {
	// SVIDs are the workload's identities, the default one first (SPIFFE Workload API section 5.3); all of them belong to
	// the trust domain of Bundle. Empty: on their way, or expired; streams wait.
	SVIDs []*x509svid.SVID

	// Bundle is the trust bundle of the own trust domain, Generation its spiffe_sequence. Nil: there is no trust yet, and
	// nothing is sent, not even the identity.
	Bundle     *x509bundle.Bundle
	Generation uint64

	// Federated are the bundles of other trust domains, each at most once. One without authorities is left out, so that its
	// identities are refused: that is what an empty bundle means.
	Federated []*x509bundle.Bundle

	// Refused, when it is set, says that the workload has no identity and will have none without a change elsewhere: the CA
	// refused it for good, or its pod is gone. Every stream ends with it, as PermissionDenied, whatever else is held: that
	// tells clients to stop using what they have (SPIFFE Workload API section 5.2.1). A CA that is away is no such reason.
	Refused error
}

// The calls that are served, as they are called in deliveries and hooks.
const (
	CallSVID       = "FetchX509SVID"
	CallBundles    = "FetchX509Bundles"
	callReflection = "ServerReflectionInfo"
)

// Delivery is what is known of one stream: what was handed to it last. There is no acknowledgement in the Workload API, so
// whoever rests a decision on it waits a while on top, and never takes it for one.
type Delivery struct {
	Stream uint64 // unique within its Server, counts up
	Call   string // CallSVID or CallBundles
	Open   bool   // false in the last one

	At         time.Time         // of the last delivery; zero before the first, as is what follows
	Serial     string            // of the default SVID; lower-case hex, two digits a byte; empty on CallBundles
	Generation uint64            // spiffe_sequence of the own bundle
	Hash       [sha256.Size]byte // api.BundleHash of the own bundle
}
