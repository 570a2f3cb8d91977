package api

import (
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of what is read from a peer before anything is spent on it.
const (
	MaxTokenBytes = 16 << 10 // a ServiceAccount token
	MaxCSRBytes   = 16 << 10 // a PKCS#10 request, DER
	MaxBatch      = 64       // CSRs in one Issue call
)

// EvidenceServiceAccount is the kind of evidence that is a Kubernetes ServiceAccount token bound to a pod.
const EvidenceServiceAccount = "k8s-serviceaccount"

// WorkloadAudience is the only audience of a token that attests a workload of td.
func WorkloadAudience(td spiffeid.TrustDomain) string { return "signet:" + td.Name() }

// AgentAudience is the only audience of a token that attests an agent of td. It differs from WorkloadAudience so that a
// workload's token can never attest a node.
func AgentAudience(td spiffeid.TrustDomain) string { return "signet-agent:" + td.Name() }

// AdminAudience is the only audience of a token by which a person operates the CA of td. Only the API server's TokenRequest
// makes one, for whoever RBAC lets ask for it.
func AdminAudience(td spiffeid.TrustDomain) string { return "signet-admin:" + td.Name() }

// MaxAdminTTL is the longest life of a token for AdminAudience.
const MaxAdminTTL = 15 * time.Minute

// ReservedSegment is the first path segment of Signet's own identities. No template may yield it.
const ReservedSegment = "signet"

// ReplicaID is the identity of one CA replica, /signet/ca/REPLICA.
func ReplicaID(td spiffeid.TrustDomain, replica string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, ReservedSegment, "ca", replica)
}

// AgentID is the identity of the agent of one node, /signet/agent/NODE-UID.
func AgentID(td spiffeid.TrustDomain, nodeUID string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, ReservedSegment, "agent", nodeUID)
}

// IsReplica reports whether id is a CA replica of td.
func IsReplica(id spiffeid.ID, td spiffeid.TrustDomain) bool {
	_, ok := own(id, td, "ca")
	return ok
}

// NodeUID returns the node of an agent's identity in td; ok is false when id is anything else.
func NodeUID(id spiffeid.ID, td spiffeid.TrustDomain) (uid string, ok bool) {
	return own(id, td, "agent")
}

// AdminID is the identity of a person's break-glass certificate, /signet/admin/NAME.
func AdminID(td spiffeid.TrustDomain, name string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, ReservedSegment, "admin", name)
}

// AdminName returns the name in a break-glass identity of td; ok is false when id is anything else.
func AdminName(id spiffeid.ID, td spiffeid.TrustDomain) (name string, ok bool) {
	return own(id, td, "admin")
}

// IsReserved reports whether id belongs to Signet itself.
func IsReserved(id spiffeid.ID) bool {
	p := id.Path()
	return p == "/"+ReservedSegment || strings.HasPrefix(p, "/"+ReservedSegment+"/")
}

func own(id spiffeid.ID, td spiffeid.TrustDomain, role string) (string, bool) {
	if !id.MemberOf(td) {
		return "", false
	}
	name, ok := strings.CutPrefix(id.Path(), "/"+ReservedSegment+"/"+role+"/")
	if !ok || name == "" || strings.Contains(name, "/") {
		return "", false
	}
	return name, true
}

// The longest SPIFFE ID, and the longest trust domain in one, that Signet writes or accepts (SPIFFE-ID section 2.3).
const (
	MaxIDBytes          = 2048
	MaxTrustDomainBytes = 255
)

// ParseWorkloadID parses s as the ID of a workload: what go-spiffe accepts, not longer than MaxIDBytes, with a path
// (SPIFFE X509-SVID section 5.2). It never normalises: s must be the canonical form.
func ParseWorkloadID(s string) (spiffeid.ID, error) {
	if len(s) > MaxIDBytes {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID of %d bytes is longer than %d", len(s), MaxIDBytes)
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, err
	}
	if n := len(id.TrustDomain().Name()); n > MaxTrustDomainBytes {
		return spiffeid.ID{}, fmt.Errorf("trust domain of %d bytes is longer than %d", n, MaxTrustDomainBytes)
	}
	if id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %q names a trust domain, not a workload", s)
	}
	if id.String() != s {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID is not in canonical form, want %q", id.String())
	}
	return id, nil
}

// A Generation numbers the contents of a trust bundle. Later is larger, epoch first; a restored backup raises the epoch.
type Generation struct{ Epoch, Number uint32 }

// Sequence is the generation as spiffe_sequence (SPIFFE Trust Domain and Bundle section 4.1.2): epoch<<32 | number.
func (g Generation) Sequence() uint64 { return uint64(g.Epoch)<<32 | uint64(g.Number) }

// FromSequence is the inverse of Generation.Sequence.
func FromSequence(s uint64) Generation { return Generation{Epoch: uint32(s >> 32), Number: uint32(s)} }

// String is "epoch.number".
func (g Generation) String() string { return fmt.Sprintf("%d.%d", g.Epoch, g.Number) }

// epochsFrom is when epochs began to be counted in hours, and maxClockEpoch bounds them: so spiffe_sequence stays below 2^53, which is
// what readers of JSON count up to, for more than a century.
var epochsFrom = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

const maxClockEpoch = 1 << 20

// EpochAt is the least epoch of what is restored from a backup at that time, in hours.
func EpochAt(now time.Time) uint32 {
	return uint32(min(max(0, now.Sub(epochsFrom)/time.Hour), maxClockEpoch))
}

// Plausible reports whether a bundle can have this generation at that time, give or take seven years of its clock. One that cannot is
// of nobody who counts as Signet does: whoever held it would take every bundle that comes for an old one. A CA takes no such number for
// one of its own, wherever it reads it.
func (g Generation) Plausible(now time.Time) bool {
	return g.Epoch <= EpochAt(now)+1<<16
}

// Believable reports whether somebody who is shown a bundle of this generation at that time is to believe the number. It goes a year
// further than Plausible: what is restored goes above whatever is plausible, and has to be believed by those whose clocks differ.
func (g Generation) Believable(now time.Time) bool {
	return g.Plausible(now.AddDate(1, 0, 0))
}

// BundleHash identifies the contents of a bundle: SHA-256 over the SHA-256 of each root's DER, sorted. The order of roots
// does not matter, so two bundles with the same roots are the same bundle.
func BundleHash(roots []*x509.Certificate) [sha256.Size]byte {
	sums := make([][sha256.Size]byte, len(roots))
	for i, c := range roots {
		sums[i] = sha256.Sum256(c.Raw)
	}
	slices.SortFunc(sums, func(a, b [sha256.Size]byte) int { return slices.Compare(a[:], b[:]) })
	h := sha256.New()
	for _, s := range sums {
		h.Write(s[:])
	}
	return [sha256.Size]byte(h.Sum(nil))
}
