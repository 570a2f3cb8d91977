package journal

import (
	"crypto/sha256"
	"slices"
	"time"

	"github.com/signet-ca/signet/api"
)

// Acks is the evidence on which a step is taken, gathered from all replicas. What is not in it has proven nothing: it is up
// to whoever gathers it to list everybody who may still hold something, whether or not he can be asked now.
type Acks struct {
	// Replicas are all that ever saved a record. Where there is none, no step that needs evidence is taken.
	Replicas []Replica
	// Agents are those that have a session, and those that have none while an SVID of their node may be unexpired.
	Agents []Agent
	// Copies are the places beside the agents where the bundle is shown.
	Copies []Copy
	// Clock is why the CA's clock is not to be believed now; empty while it is. A CA that sees its two clocks part says so.
	Clock string
}

// Held is a bundle that somebody has: by its generation and by api.BundleHash of its roots. The zero Held is none.
type Held struct {
	Generation api.Generation
	Hash       [sha256.Size]byte
}

// Replica is a CA replica, by its own record.
type Replica struct {
	Name string
	// Reachable says that its record is fresh. What one that is not reachable would do is taken at its worst.
	Reachable bool
	// Signs is the id of the authority under which it has its next intermediate minted: the active one of the record that it
	// goes by. A replica books a mint in its own record, reads the shared one again, and only then asks for it: so one that
	// slept through a step cannot come by an intermediate that is not in Intermediates.
	Signs string
	// Ready says that it can issue under the active root now.
	Ready bool
	// Vain is why it gets no intermediate under the active root: a reason, and words. Empty where it has one, or has not tried.
	Vain string
	// Intermediates are all that it may have: each is booked before it is asked for.
	Intermediates []Intermediate
	// Leaves is when the last leaf expires that it signed, by id of the root above; complete where every intermediate under
	// that root is destroyed.
	Leaves map[string]time.Time
}

// Intermediate is one that a replica may have.
type Intermediate struct {
	Root      string // id of the authority above it
	NotAfter  time.Time
	Longest   time.Duration // how long an SVID under it can be good that is signed now; 0 where that is not known
	Destroyed bool          // it says that its key is no more
}

// Agent is the agent of one node, and what it serves there.
type Agent struct {
	Cluster string // issuer of its tokens
	Node    string // the node's name, for people
	NodeUID string
	// Connected says that it has a session now.
	Connected bool
	Seen      time.Time // when it was last heard of; of one without a session until when it may have had one
	// Until is when the last SVID of its node expires, as issued. An agent without a session is live until then.
	Until time.Time
	Held  Held   // the lowest bundle that it may go by: what it has kept
	Root  string // id of the authority above its own SVID
	Pods  []Pod
	// PodsUnknown says that Pods are not all: it has had no session since the CA was started, and of pods nothing is written down.
	PodsUnknown bool
}

// Pod is a pod that an agent serves.
type Pod struct {
	Namespace, Name, UID string
	Roots                []string // ids of the authorities above the SVIDs that it was given last
	Streams              []Stream
}

// Stream is one over which a pod is served. One that ended is listed until a later one of the same pod has acknowledged the
// bundle, so that a pod that reconnects for ever is not one that has nothing to acknowledge.
type Stream struct {
	// WorkloadAPI says that it knows no acknowledgement: Pushed is all there is.
	WorkloadAPI bool
	Bundle      bool // it subscribed to the bundle, so that it has to acknowledge it
	Acked       Held
	Pushed      Held
	PushedAt    time.Time
	Nack        string // its last rejection in its own words; empty where the last answer was good
}

// Copy is a place where the bundle is shown to those who read it by themselves, and who tell nobody that they did.
type Copy struct {
	Kind string // "configmap", "clustertrustbundle", "file"
	Name string // of a ConfigMap "NAMESPACE/NAME"
	// Namespace is that whose pods read it, and whoever excuses them excuses it; empty where anybody may.
	Namespace string
	Held      Held
	At        time.Time // since when it is that bundle
	// Failed is the reason for which it could not be written last, and FailedAt since when it cannot; empty where nothing is wrong.
	Failed   string
	FailedAt time.Time
}

// live reports whether an agent can still harm or be harmed: it is there, or its pods may have SVIDs and verify others'.
func (a Agent) live(now time.Time) bool { return a.Connected || now.Before(a.Until) }

// ready reports whether anybody can issue under the active root now.
func (a Acks) ready() bool {
	return slices.ContainsFunc(a.Replicas, func(r Replica) bool { return r.Ready })
}

// mayHave is until when a replica may have an intermediate under a root; the zero time where it has none.
func (r Replica) mayHave(root string) (until time.Time) {
	for _, i := range r.Intermediates {
		if i.Root == root && !i.Destroyed && i.NotAfter.After(until) {
			until = i.NotAfter
		}
	}
	return until
}
