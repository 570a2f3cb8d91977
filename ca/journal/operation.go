package journal

import (
	"cmp"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/signet-ca/signet/api"
)

// Bounds of what the record keeps of rotations.
const (
	MaxAuthorities = 8  // of which none is removed
	MaxPast        = 16 // operations that ended
	MaxGone        = 64 // authorities that went in peace, and as many that were compromised
	MaxExcuses     = 64
	MaxExcused     = 30 * 24 * time.Hour // how long an excuse may last
	MaxRotateText  = 256                 // bytes of By, of Why and of Excuse.Reason

	maxCertificate = 16 << 10 // bytes of an authority's certificate, and of its cross-signed one
	maxSealedKey   = 16 << 10
	maxForced      = 8
)

// The limits of an operation that names none.
const (
	DefaultStraggler          = time.Hour
	DefaultEmergencyStraggler = time.Minute
	DefaultSoak               = 5 * time.Minute

	minLimit = time.Second
	maxLimit = 30 * 24 * time.Hour
)

// Kind says what an operation is for.
type Kind string

// The kinds.
const (
	Planned   Kind = "planned"   // a new root in place of one that is sound
	Switch    Kind = "switch"    // the same, and the new root's key lives elsewhere
	Emergency Kind = "emergency" // a root is compromised: everything under it is reissued now, then it goes
)

// Outcome says how an operation ended.
type Outcome string

// The outcomes.
const (
	Done       Outcome = "done"
	Aborted    Outcome = "aborted"     // before its authority was active
	RolledBack Outcome = "rolled-back" // after
	Superseded Outcome = "superseded"  // by an emergency
)

// Operation is a rotation under way. There is one at a time.
type Operation struct {
	ID        string    `json:"id"` // drawn by whoever begins it; by it a repetition is recognised
	Kind      Kind      `json:"kind"`
	By        string    `json:"by"` // who began it, as the CA knew him
	Why       string    `json:"why,omitempty"`
	Automatic bool      `json:"automatic,omitempty"` // begun because Due said so
	Begun     time.Time `json:"begun"`
	// Authority is the id of the one that is, or will be, active at the end, unless it is rolled back.
	Authority string `json:"authority"`
	// Replaces is the id of the one that was active at the beginning.
	Replaces string `json:"replaces"`
	// Compromised are the ids of the roots that an emergency is about.
	Compromised []string `json:"compromised,omitempty"`
	Limits
	// Latest is from when an automatic rotation waits for nobody, unless most agents are away.
	Latest time.Time `json:"latest,omitzero"`
	// Back is who rolled it back; nil while nobody did.
	Back *Word `json:"back,omitempty"`
	// Forced are the steps that somebody took over those who stood in the way.
	Forced []Override `json:"forced,omitempty"`
}

// Limits is how long a step waits. A zero field stands for its default.
type Limits struct {
	// Straggler is from when on, counted from the publication, a live agent or pod without the new bundle is a warning, where
	// the new root is cross-signed by the old one. In an emergency: whether or not it is, and also how long the reissue may
	// take before the compromised root goes. Default: 1 h, in an emergency 1 min.
	Straggler time.Duration `json:"straggler,omitempty"`
	// Soak is how long is waited for those who cannot acknowledge, counted from when the new bundle was brought to them: streams
	// of the Workload API, ConfigMaps, files. Default: 5 min. An emergency waits until it was brought to them, and no longer.
	Soak time.Duration `json:"soak,omitempty"`
}

// Word is who said something, and when.
type Word struct {
	By  string    `json:"by"`
	Why string    `json:"why,omitempty"`
	At  time.Time `json:"at"`
}

// Override is a step that somebody took over those who stood in the way. Their names are in the ledger.
type Override struct {
	Do    Do        `json:"do"`
	By    string    `json:"by"`
	At    time.Time `json:"at"`
	Count int       `json:"count"` // of those who stood in the way
}

// Past is an operation that ended.
type Past struct {
	ID        string    `json:"id"`
	Kind      Kind      `json:"kind"`
	By        string    `json:"by"`
	Why       string    `json:"why,omitempty"`
	Automatic bool      `json:"automatic,omitempty"`
	Begun     time.Time `json:"begun"`
	Ended     time.Time `json:"ended"`
	Outcome   Outcome   `json:"outcome"`
	Authority string    `json:"authority"`
	Replaces  string    `json:"replaces"`
	// EndedBy is who ended it before it was done: who aborted it, rolled it back, or declared the emergency that took its place. Zero
	// where nobody did.
	EndedBy Word `json:"endedBy,omitzero"`
}

// Gone is what is kept of an authority that nobody trusts any more: enough to know it again, should somebody bring it back.
type Gone struct {
	ID       string    `json:"id"`
	Hash     string    `json:"hash"` // SHA-256 of its certificate, lower-case hex
	Key      string    `json:"key"`  // SHA-256 of its SubjectPublicKeyInfo, lower-case hex
	At       time.Time `json:"at"`
	NotAfter time.Time `json:"notAfter"`
	Tainted  bool      `json:"tainted,omitempty"` // it was compromised
}

// Scope says of what an excuse speaks.
type Scope string

// The scopes.
const (
	ScopeNode      Scope = "node"      // the agent of a node and all pods there, by the node's name or UID
	ScopeNamespace Scope = "namespace" // all pods of a namespace, and its copy of the bundle
	ScopePod       Scope = "pod"       // one pod, by NAMESPACE/NAME or UID
)

// Excuse says that no step waits for somebody, for a while. It outlives reconnects, restarts and the operation.
type Excuse struct {
	Scope   Scope     `json:"scope"`
	Cluster string    `json:"cluster,omitempty"` // issuer; empty: any
	Name    string    `json:"name"`
	Reason  string    `json:"reason"`
	By      string    `json:"by"`
	At      time.Time `json:"at"`
	Until   time.Time `json:"until"`
}

// opID is what an operation may be called: it comes from a command line, and goes to logs and to file names.
var opID = regexp.MustCompile(`^[0-9a-z][0-9a-z-]{0,63}$`)

func goodText(text string, limit int) bool { return len(text) <= limit && utf8.ValidString(text) }

func (l Limits) withDefaults(k Kind) Limits {
	straggler := DefaultStraggler
	if k == Emergency {
		straggler = DefaultEmergencyStraggler
	}
	return Limits{Straggler: cmp.Or(l.Straggler, straggler), Soak: cmp.Or(l.Soak, DefaultSoak)}
}

func (l Limits) good() bool {
	return l.Straggler >= minLimit && l.Straggler <= maxLimit && l.Soak >= minLimit && l.Soak <= maxLimit
}

// clone returns a copy that shares nothing that is changed.
func (o *Operation) clone() *Operation {
	if o == nil {
		return nil
	}
	c := *o
	c.Compromised, c.Forced = slices.Clone(o.Compromised), slices.Clone(o.Forced)
	return &c
}

func (o *Operation) past(how Outcome, now time.Time) Past {
	return Past{ID: o.ID, Kind: o.Kind, By: o.By, Why: o.Why, Automatic: o.Automatic, Begun: o.Begun, Ended: now, Outcome: how,
		Authority: o.Authority, Replaces: o.Replaces}
}

// compareExcuses orders the record's excuses; two of the same person or thing are one.
func compareExcuses(a, b Excuse) int {
	return cmp.Or(strings.Compare(string(a.Scope), string(b.Scope)), strings.Compare(a.Cluster, b.Cluster), strings.Compare(a.Name, b.Name))
}

// WithExcuse returns the record with this excuse, in place of one of the same scope, cluster and name. RotationInvalid where
// it has no name, reason or author or lasts longer than MaxExcused, StateFull where there is no room for it.
func (j Journal) WithExcuse(e Excuse, now time.Time) (Journal, error) {
	now = stamp(now)
	e.At, e.Until = now, stamp(e.Until)
	if err := e.validate(); err != nil {
		return Journal{}, api.E(api.RotationInvalid, "an excuse needs a scope, a name, a reason and who gives it")
	}
	if !e.Until.After(now) || e.Until.Sub(now) > MaxExcused {
		return Journal{}, api.E(api.RotationInvalid, "an excuse lasts until some time in the next %s", MaxExcused)
	}
	next := j.begin(now)
	i, ok := slices.BinarySearchFunc(next.Excuses, e, compareExcuses)
	if ok {
		next.Excuses[i] = e
	} else {
		next.Excuses = slices.Insert(next.Excuses, i, e)
	}
	if len(next.Excuses) > MaxExcuses {
		return Journal{}, api.E(api.StateFull, "the record holds %d excuses, and there is no room for one more", MaxExcuses)
	}
	return j.finish(next, now)
}

// WithoutExcuse returns the record without an excuse; as it is where there is none.
func (j Journal) WithoutExcuse(scope Scope, cluster, name string, now time.Time) (Journal, error) {
	now = stamp(now)
	next := j.begin(now)
	i, ok := slices.BinarySearchFunc(next.Excuses, Excuse{Scope: scope, Cluster: cluster, Name: name}, compareExcuses)
	if !ok {
		return j, nil
	}
	next.Excuses = slices.Delete(next.Excuses, i, i+1)
	return j.finish(next, now)
}
