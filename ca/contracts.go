package ca

import (
	"context"
	"crypto/x509"
	"iter"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

// Revision identifies one version of the stored journal. The zero Revision stands for "there is none".
type Revision uint64

// Store keeps the shared record and one small record for each replica. Drivers are in ca/store.
//
// A write has returned nil only when it is durable. An error of reason StateUnknown says that the write may or may not
// have been kept: the caller must not go on from memory. Methods are safe for concurrent use.
type Store interface {
	// Load returns the journal and its revision; StateMissing when there is none, StateNewer and StateCorrupt as
	// journal.Decode says.
	Load(ctx context.Context) (journal.Journal, Revision, error)
	// Swap replaces the journal if its revision is still old, and returns the new revision; StateConflict when it is not,
	// and nothing was changed. With the zero Revision it creates the journal where there is none.
	Swap(ctx context.Context, old Revision, j journal.Journal) (Revision, error)
	// Replicas returns what each replica saved last, sorted by name; StateCorrupt when one of them does not parse.
	Replicas(ctx context.Context) ([]Replica, error)
	// SaveReplica replaces the record of one replica; only that replica writes it.
	SaveReplica(ctx context.Context, r Replica) error
}

// SharedStore is what a Store has to be as well to which other replicas write. Where one is not, this process alone does.
type SharedStore interface {
	// Await returns nil once the record's revision is another than old, seconds after it was swapped at the latest; an error
	// where that cannot be told now, and when ctx ends.
	Await(ctx context.Context, old Revision) error
}

// Replica is what one CA replica wrote about itself.
type Replica struct {
	Name string `json:"name"`
	// Minted lists the intermediates that may exist: each is written before it is asked for, so its lifetime is known
	// even when the answer was lost. Expired ones are dropped at the next mint.
	Minted []Minted `json:"minted,omitempty"`
	// Vain is how the upstream was last asked in vain, so that a process that is started again and again does not ask each
	// time; zero once it has been asked with success.
	Vain Vain `json:"vain,omitzero"`
	// Clusters is how it sees each cluster, by issuer: its heartbeat, and what its grace is counted from over restarts.
	Clusters map[string]Sight `json:"clusters,omitempty"`

	// Signs is the id of the authority under which it has its next intermediate minted: the active one of the record that it
	// goes by.
	Signs string `json:"signs,omitempty"`
	// Beat is when it last wrote this, to whoever has to know whether it lives.
	Beat time.Time `json:"beat,omitzero"`
	// Agents are those that had a session with it, until the last SVID of their node has expired: sorted by cluster and UID, at
	// most MaxAgentsSeen.
	Agents []AgentSeen `json:"agents,omitempty"`
	// Restored is of a replica that a restore has added, in the place of those that nobody knows of; nil of any other.
	Restored *Restored `json:"restored,omitempty"`
}

// MaxAgentsSeen is how many agents the record of one replica holds. Where there are more, those are left out whose SVIDs expire first.
const MaxAgentsSeen = 10_000

// AgentSeen is what is kept of an agent, so that a rotation waits for it though it be away and the CA be started anew.
type AgentSeen struct {
	Cluster string    `json:"cluster"`
	NodeUID string    `json:"nodeUID"`
	Node    string    `json:"node,omitempty"`
	Seen    time.Time `json:"seen"`
	// Until is when the last SVID of its node has expired for certain. It may be said to be later than it is.
	Until  time.Time `json:"until"`
	Epoch  uint32    `json:"epoch,omitempty"` // of the bundle that it holds
	Number uint32    `json:"number,omitempty"`
	Hash   []byte    `json:"hash,omitempty"`
	Root   string    `json:"root,omitempty"` // id of the authority above its own SVID
}

// Sight is how a replica sees one cluster.
type Sight struct {
	// Seen is up to when it has seen everything: less than a minute old while it sees the cluster.
	Seen time.Time `json:"seen"`
	// Since is what Seen was when it lost sight; zero once it has seen the cluster again for some minutes.
	Since time.Time `json:"since,omitzero"`
}

// ReplicaOf returns what the named replica saved last; one with nothing but its name when it saved nothing.
func ReplicaOf(ctx context.Context, s Store, name string) (Replica, error) {
	all, err := s.Replicas(ctx)
	if err != nil {
		return Replica{}, err
	}
	if i := slices.IndexFunc(all, func(r Replica) bool { return r.Name == name }); i >= 0 {
		return all[i], nil
	}
	return Replica{Name: name}, nil
}

// Minted is an intermediate that may exist.
type Minted struct {
	At       time.Time `json:"at"`
	NotAfter time.Time `json:"notAfter"`
	Root     string    `json:"root"` // id of the authority that was asked
	// ID is that of the request; empty in what earlier versions wrote.
	ID string `json:"id,omitempty"`
	// Longest is how long an SVID under it can be good that is signed now; 0 in what earlier versions wrote.
	Longest time.Duration `json:"longest,omitempty"`
	// Destroyed says that its key is no more, and Leaves when the last SVID under it expires then.
	Destroyed bool      `json:"destroyed,omitempty"`
	Leaves    time.Time `json:"leaves,omitzero"`
}

// Vain is how often in a row an upstream was asked in vain.
type Vain struct {
	Times  int        `json:"times"`
	At     time.Time  `json:"at"` // the last time
	Reason api.Reason `json:"reason"`
}

// Upstream is where the root's key lives. Drivers are in ca/upstream.
//
// A driver is not believed: whatever it answers is checked by the CA, and a refused answer changes nothing. It keeps nothing
// that has to outlive the process, and retries nothing: the CA does, with a backoff that outlives it and within a budget.
// Methods are safe for concurrent use and return soon after ctx has ended. An error has the reason UpstreamUnavailable or
// one of its own where the upstream cannot be asked now, UpstreamRoot where it does not have the key of the root that is
// meant, UpstreamRefused where it declines. Its text holds nothing of a key.
type Upstream interface {
	// Mint has the root sign an intermediate for the key of a request. The answer is the intermediate first, then what leads
	// to the root, with or without it. Asked again with the same ID, it gives the same answer while it remembers it, and never
	// that to another request. After an error something may have been signed all the same: the request is made again as it is,
	// or its key is thrown away.
	Mint(ctx context.Context, r MintRequest) ([]*x509.Certificate, error)
	// WatchRoots tells which roots the upstream signs under, at once where it knows them and after each change, one call
	// after the other. It returns nil when ctx has ended, and an error where it can no longer tell; then it is called again.
	// An upstream whose roots are all in the record tells nothing. What it tells is announced, never applied: a new root is
	// taken up by a rotation.
	WatchRoots(ctx context.Context, tell func(roots []*x509.Certificate)) error
	// Probe reports whether Mint would sign under that root now, and has no effect: nothing is signed, nothing is used up.
	// An error says as well what would only show at the next start, such as files that were good when they were read.
	Probe(ctx context.Context, td spiffeid.TrustDomain, root journal.Authority) error
}

// MintRequest says which intermediate is wanted. How long the answer is waited for is the context's.
type MintRequest struct {
	// ID is the same for as long as the same is wanted: the SHA-256 of the key's SubjectPublicKeyInfo, in lower-case hex.
	ID           string
	TrustDomain  spiffeid.TrustDomain
	Root         journal.Authority // the active authority
	CSR          []byte            // PKCS #10, DER, signed by the key; made by issuance.NewIntermediateCSR
	NotAfter     time.Time         // at the latest
	ExcludeNames bool              // no DNS name or IP address may be certified below it; the CSR asks for it as well
}

// CrossSigner is an Upstream that can have an older root sign a newer one, so that those who know only the older trust
// what is issued under the newer.
type CrossSigner interface {
	Upstream
	// CrossSign returns a certificate of newer's subject and key that older signed, with a path length of 1. Errors are those
	// of Mint; UpstreamRoot where the older root's key is not here. It may be asked twice, and then gives two.
	CrossSign(ctx context.Context, td spiffeid.TrustDomain, older journal.Authority, newer *x509.Certificate) (*x509.Certificate, error)
}

// CrossProber is what a CrossSigner may be besides: one that can say beforehand whether a root would sign another, without signing
// anything.
type CrossProber interface {
	// CanCross returns nil where CrossSign by this root would sign; else its error.
	CanCross(ctx context.Context, td spiffeid.TrustDomain, older journal.Authority) error
}

// Founder is an Upstream that brings the first root of a trust domain; `signet-ca init` asks for it.
type Founder interface {
	// Found makes a root, its key sealed or upstream, or takes up the one that the upstream has. Nothing is stored by it.
	Found(ctx context.Context, td spiffeid.TrustDomain, now time.Time) (journal.Authority, error)
}

// Ledger records every decision durably before its effect leaves the CA. It is implemented by internal/audit.
type Ledger interface {
	// Append returns when the entry is durable. After an error nothing may be issued on its account. One that matches
	// audit.ErrFull passes by itself; one that matches audit.ErrFailed does not.
	Append(ctx context.Context, e audit.Entry) error
	// Refuse puts the refusal of an authenticated caller on record and returns the correlation id under which it is
	// found: that of the first where it repeats soon. The id is good whatever the error; issuance never depends on it.
	Refuse(ctx context.Context, e audit.Entry) (correlationID string, err error)
	// Sample may keep a refusal that is only counted, in memory. It costs next to nothing.
	Sample(e audit.Entry)
	// Failed is closed when the ledger can no longer be written.
	Failed() <-chan struct{}
}

// Archive is what can be asked of a ledger. It is implemented by internal/audit.
type Archive interface {
	// Records yields what is on record and matches, oldest first, and ends with the first error. It holds up nobody who
	// puts something on record.
	Records(ctx context.Context, q audit.Query) iter.Seq2[audit.Record, error]
	// NotReady says why nothing can be put on record now; empty while it can.
	NotReady() string
}

// Directory knows which pods live. Implementations are in ca/cluster.
type Directory interface {
	// Pod returns the pod with that UID in the cluster of that issuer: PodUnknown where there is none, PodDeleted where it
	// is known to have been there, PodMismatch where its ServiceAccount or its node is gone or is not the one that it was
	// made under, DirectoryUnavailable where that cannot be told now. It is called for each issuance, so it answers from
	// memory; only for a pod that it has not heard of it may ask the cluster, once and bounded.
	Pod(ctx context.Context, id PodID) (Pod, error)
}

// Rememberer is a Directory that can tell since when it has not seen a cluster, and what it knew then. What is renewed while
// an API server is away rests on it; where a Directory is none, nothing is.
type Rememberer interface {
	Directory
	// Seen returns up to when everything in the cluster of that issuer is known, the zero time where nothing ever was; and
	// whether that is now, so that Pod can tell.
	Seen(issuer string) (upTo time.Time, now bool)
	// Recall returns a pod as it was when its cluster was last seen, from memory alone: PodDeleted where it was known to be
	// gone, PodMismatch where its ServiceAccount or its node was, DirectoryUnavailable where the pod was not known.
	Recall(id PodID) (Pod, error)
}

// PodID says which pod is meant. Issuer and UID are what counts. Namespace and Name are the token's claims, by which a
// cluster can be asked about a pod that is a moment old; whoever asks compares them with those of the answer.
type PodID struct {
	Issuer, UID     string
	Namespace, Name string
}

// Pod is a pod as the cluster sees it now.
type Pod struct {
	Issuer, Namespace, Name, UID      string
	ServiceAccount, ServiceAccountUID string
	NodeName, NodeUID                 string
	DeleteAt                          time.Time // its deletionTimestamp; zero while it is not being deleted
	Finished                          bool      // Succeeded or Failed
	DaemonSet                         string    // UID of the DaemonSet that controls it; empty where none does
}

// AgentFinder is a Directory that can tell an agent's pod from others that merely run under the agents' ServiceAccount.
// Where a Directory is none, the ServiceAccount alone says who is an agent.
type AgentFinder interface {
	Directory
	// CheckAgent says whether a pod that the Directory has told of is one that the agents' DaemonSet of its cluster controls,
	// by UID and as it is now: NotAnAgent where it is not, DirectoryUnavailable where that cannot be told.
	CheckAgent(ctx context.Context, p Pod) error
}

// Publisher shows the bundle to those who need it for their first trust. Implementations are in ca/cluster.
type Publisher interface {
	// Published reports whether a bundle of td is there already, whoever put it there.
	Published(ctx context.Context, td spiffeid.TrustDomain) (bool, error)
	// Publish replaces the published bundle; one of a higher generation is never replaced (BundleRollback).
	Publish(ctx context.Context, b *Bundle) error
}

// CopyTeller is a Publisher that tells of each place where it shows the bundle. A rotation waits for each of them by name.
type CopyTeller interface {
	Publisher
	// Copies returns what each place holds, as it was read there last, with the one that agents believe first, and a channel that is
	// closed once that may have changed. It asks nobody, so it does not wait.
	Copies() ([]journal.Copy, <-chan struct{})
}

// KeySets is an issuer's key set as it changes, for agents that must check a token while the CA is away. It is
// implemented by attestor.
type KeySets interface {
	// Snapshot returns the last good JWKS (nil before the first) and a channel that is closed when there is a newer one.
	Snapshot() (jwks []byte, changed <-chan struct{})
}

// Bundle is the trust bundle at one generation. It is never changed once made.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	Generation  api.Generation
	Roots       []*x509.Certificate
	Hash        [32]byte // api.BundleHash of Roots

	// RecordSchema is the schema of the record, for whoever would replace this build by one that cannot read that record. Only
	// a Publisher is told; 0 elsewhere.
	RecordSchema int
}

// NewBundle returns the bundle that follows from a journal.
func NewBundle(j journal.Journal) (*Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(j.TrustDomain)
	if err != nil {
		return nil, err
	}
	roots, err := j.Roots()
	if err != nil {
		return nil, err
	}
	return &Bundle{TrustDomain: td, Generation: j.Generation(), Roots: roots, Hash: api.BundleHash(roots)}, nil
}
