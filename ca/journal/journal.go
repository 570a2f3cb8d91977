// Package journal is the record that all replicas of one CA share: which authorities there are, in which state, the
// generation of the bundle that follows from them, the rotation that is under way, which nodes are banned, and the keys of
// renewal tickets.
//
// It is pure: values in, values out, no I/O and no clock, so that every state it can be in can be enumerated in a test.
// Whoever changes a journal does so by compare-and-swap through ca.Store.
//
// A rotation is an Operation in the record. Start and Taint begin one, Abort and Rollback end it otherwise than it was meant;
// Next says which step can be taken, or who stands in its way, and Apply takes it. Only what Next returned for the very record
// that is stored may be applied: the gates are there, and Apply, which sees no evidence, holds to the order of the states. Each
// of them may be done twice: what has happened already is recognised by the operation's id and changes nothing.
package journal

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// Schema is the version of the record that this build writes. It knows every lower one; a higher one is refused, because
// reading it could drop a field that matters.
const Schema = 3

// Bounds of what a record holds beside its authorities, so that it stays below maxBytes.
const (
	MaxBans       = 1000
	MaxBanText    = 256 // bytes of Ban.By and of Ban.Reason
	MaxTicketKeys = 4

	maxCluster  = 1024      // bytes of Ban.Cluster
	maxName     = 253       // bytes of Ban.NodeUID and of Ban.Node
	maxBanBytes = 512 << 10 // of all bans as they are stored, so that there is always room to rotate
)

// maxBytes bounds a record before it is parsed; a record with a hundred authorities has some 200 KiB.
const maxBytes = 1 << 20

// State is where an authority stands in its life.
type State string

// The states, in the order in which an authority passes through them.
const (
	Prepared  State = "prepared"  // its key exists; nobody trusts it
	Published State = "published" // in the bundle; signs nothing
	Active    State = "active"    // in the bundle; intermediates come from it; exactly one
	Retiring  State = "retiring"  // in the bundle until the last leaf under it has expired; signs nothing
	Tainted   State = "tainted"   // compromised: in the bundle only until everything under it has been reissued
	Removed   State = "removed"   // trusted by nobody; kept so that its key id is never used again
)

var states = []State{Prepared, Published, Active, Retiring, Tainted, Removed}

// Trusted reports whether an authority in this state is part of the bundle.
func (s State) Trusted() bool {
	return s == Published || s == Active || s == Retiring || s == Tainted
}

// Authority is one root.
type Authority struct {
	ID          string `json:"id"` // subject key id, lower-case hex
	State       State  `json:"state"`
	Certificate []byte `json:"certificate"`         // X.509 DER
	SealedKey   []byte `json:"sealedKey,omitempty"` // by ca.Sealer; empty where the key lives upstream

	// Upstream is the name that the configuration gives to where the key lives; empty: there is only one. Since schema 3.
	Upstream string `json:"upstream,omitempty"`
	// Cross is this root signed by the one before it, X.509 DER: it goes into every chain, so that whoever still holds only
	// the old root verifies what comes from this one. Empty where the old key could not be asked. Since schema 3.
	Cross []byte `json:"cross,omitempty"`
	// CrossBy is the id of the authority that signed Cross. Never that of a compromised one.
	CrossBy string `json:"crossBy,omitempty"`
	// Since is the generation, as spiffe_sequence, of the first bundle that holds it: who has a later one holds it too. 0 for the
	// first root, and where that was before records kept it.
	Since uint64 `json:"since,omitempty"`
	Times Times  `json:"times,omitzero"`
}

// Times says when an authority came into each state for the last time; zero where it never was, or where that was before
// records kept it.
type Times struct {
	Prepared  time.Time `json:"prepared,omitzero"`
	Published time.Time `json:"published,omitzero"`
	Active    time.Time `json:"active,omitzero"`
	Retiring  time.Time `json:"retiring,omitzero"`
	Tainted   time.Time `json:"tainted,omitzero"`
}

// Journal is the record. The zero Journal is not valid; New makes one.
type Journal struct {
	Schema      int         `json:"schema"`
	TrustDomain string      `json:"trustDomain"`
	Epoch       uint32      `json:"epoch"`  // raised by a restore
	Number      uint32      `json:"number"` // raised by each change of the bundle
	Authorities []Authority `json:"authorities"`
	// TicketKeys are what renewal tickets are authenticated under, newest first: new tickets under the first, older ones
	// are good until their tickets have expired. A record of schema 1 has none; whoever needs one adds it.
	TicketKeys []TicketKey `json:"ticketKeys,omitempty"` // schema 2
	// Bans are the nodes whose agents are refused, by cluster, then UID.
	Bans []Ban `json:"bans,omitempty"` // schema 2

	// Operation is the rotation under way; nil while there is none. Since schema 3, as all that follows.
	Operation *Operation `json:"operation,omitempty"`
	// Past are the last operations that ended, the latest last.
	Past []Past `json:"past,omitempty"`
	// Excuses are whom a step does not wait for.
	Excuses []Excuse `json:"excuses,omitempty"`
	// Gone are authorities that nobody trusts any more, by what is needed to know them again.
	Gone []Gone `json:"gone,omitempty"`
	// Changed is when a rotation last changed the record.
	Changed time.Time `json:"changed,omitzero"`
}

// New returns the journal of a new trust domain whose only authority is root, active, at generation 1.1.
func New(td spiffeid.TrustDomain, root Authority) (Journal, error) {
	root.State = Active
	j := Journal{Schema: Schema, TrustDomain: td.Name(), Epoch: 1, Number: 1, Authorities: []Authority{root}}
	return j, j.Validate()
}

// Generation returns the generation of the bundle.
func (j Journal) Generation() api.Generation {
	return api.Generation{Epoch: j.Epoch, Number: j.Number}
}

// ActiveAuthority returns the one authority under which intermediates are minted.
func (j Journal) ActiveAuthority() Authority {
	i := slices.IndexFunc(j.Authorities, func(a Authority) bool { return a.State == Active })
	if i < 0 {
		return Authority{}
	}
	return j.Authorities[i]
}

// Has reports whether the record holds an authority of that id that is not removed.
func (j Journal) Has(id string) bool {
	i := j.find(id)
	return i >= 0 && j.Authorities[i].State != Removed
}

// Roots returns the certificates of the bundle in the order of the record.
func (j Journal) Roots() ([]*x509.Certificate, error) {
	var roots []*x509.Certificate
	for _, a := range j.Authorities {
		if !a.State.Trusted() {
			continue
		}
		c, err := x509.ParseCertificate(a.Certificate)
		if err != nil {
			return nil, corrupt("authority %s: %v", a.ID, err)
		}
		roots = append(roots, c)
	}
	return roots, nil
}

// Validate checks what must hold of every record: a known schema, a trust domain, a generation, exactly one active
// authority, and for each authority a known state, a certificate of a CA, and the id that follows from it. The error has
// the reason StateCorrupt or StateNewer.
func (j Journal) Validate() error {
	if j.Schema > Schema {
		return api.E(api.StateNewer, "the record has schema %d, this build knows %d", j.Schema, Schema)
	}
	if j.Schema < 1 {
		return corrupt("schema %d", j.Schema)
	}
	if td, err := spiffeid.TrustDomainFromString(j.TrustDomain); err != nil || td.Name() != j.TrustDomain {
		return corrupt("trust domain %.64q", j.TrustDomain)
	}
	if j.Epoch == 0 || j.Number == 0 {
		return corrupt("generation %s", j.Generation())
	}
	active, seen := 0, map[string]bool{}
	for _, a := range j.Authorities {
		if err := a.validate(); err != nil {
			return err
		}
		if seen[a.ID] {
			return corrupt("authority %s is there twice", a.ID)
		}
		seen[a.ID] = true
		if a.State == Active {
			active++
		}
	}
	if active != 1 {
		return corrupt("%d active authorities, want exactly 1", active)
	}
	if err := j.validateRest(); err != nil {
		return err
	}
	return j.validateRotation()
}

func (a Authority) validate() error {
	if !slices.Contains(states, a.State) {
		return corrupt("authority %.64q has unknown state %.32q", a.ID, a.State)
	}
	c, err := x509.ParseCertificate(a.Certificate)
	if err != nil {
		return corrupt("authority %.64q: %v", a.ID, err)
	}
	if !c.IsCA {
		return corrupt("authority %.64q is not a CA", a.ID)
	}
	if id := hex.EncodeToString(c.SubjectKeyId); id != a.ID || id == "" {
		return corrupt("authority %.64q has subject key id %q", a.ID, id)
	}
	return nil
}

// Encode returns the record as it is stored: nothing that Decode would refuse.
func (j Journal) Encode() ([]byte, error) {
	if err := j.Validate(); err != nil {
		return nil, err
	}
	data, err := json.Marshal(j)
	if err != nil {
		return nil, corrupt("%v", err)
	}
	if len(data) > maxBytes {
		return nil, corrupt("record of %d bytes", len(data))
	}
	return data, nil
}

// Decode parses and validates a stored record. A record of a newer schema is StateNewer, whatever else it holds; anything
// else that is not a valid record is StateCorrupt.
func Decode(data []byte) (Journal, error) {
	if len(data) > maxBytes {
		return Journal{}, corrupt("record of %d bytes", len(data))
	}
	var head struct {
		Schema int `json:"schema"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return Journal{}, corrupt("%v", err)
	}
	if head.Schema > Schema {
		return Journal{}, Journal{Schema: head.Schema}.Validate()
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var j Journal
	if err := dec.Decode(&j); err != nil {
		return Journal{}, corrupt("%v", err)
	}
	if dec.More() {
		return Journal{}, corrupt("something follows the record")
	}
	return j, j.Validate()
}

func corrupt(format string, args ...any) error {
	return api.E(api.StateCorrupt, "the record is damaged: %s", fmt.Sprintf(format, args...))
}
