package sds

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// maxNackBytes bounds what is kept of a client's own words when it refuses a response.
const maxNackBytes = 512

// An ask is one request of either protocol, reduced to what the rules of a session need.
type ask struct {
	nonce   string // of the response that it answers, if any
	refused bool   // it refuses that response
	because string // in the client's words

	whole     bool              // state of the world: subscribe is the whole subscription
	subscribe []string          // names to add, or all names
	drop      []string          // names to remove
	held      map[string]string // delta, first request: versions by name that the client has from an earlier stream
}

// A session holds the rules of one stream: what it may have, what it asked for, what it holds and what it owes an answer
// to. It is pure: no I/O, no goroutine, no clock. It is not safe for concurrent use.
type session struct {
	// id and td are whom the stream belongs to; zero until known. Once known they never change.
	id spiffeid.ID
	td spiffeid.TrustDomain

	// Lists, not maps: mostly they hold one, and a node has thousands of sessions.
	subs     []subscription // by name; at most MaxNames
	wild     bool           // default and ROOTCA besides
	asked    bool           // there was a request
	named    bool           // state of the world: a request named something, so an empty list now means nothing
	holdings []holding      // by name; only names that were served or claimed, so at most five or MaxNames

	nonce string    // of the last response; empty before the first
	out   *response // unanswered; nil when none is

	acks, nacks uint64
	nack        string // the last refusal; empty when good
	serial      string // of the SVID that was acknowledged last
	pushed      uint64 // highest generation that was pushed or claimed
	dirty       bool   // a report is due
	leftOut     int    // names newly found to be somebody else's since it was last looked at
}

// A subscription is one name that the client asked for.
type subscription struct {
	name    string
	id      spiffeid.ID // the name, if it is one
	foreign bool        // it belongs to somebody else
}

// A holding is what is known of the client's copy of one secret.
type holding struct {
	name    string
	sent    string // digest that was sent, and not refused, since it was asked for
	acked   stamp  // that it acknowledged; only the digest is set where it is the client's claim
	refused string // digest that it refused last, until it acknowledges another
}

// A response is a set of secrets that goes out under one nonce.
type response struct {
	nonce   string
	version string
	secrets []*encoded
}

func newSession(id spiffeid.ID) *session {
	return &session{id: id, td: id.TrustDomain(), dirty: true}
}

// An outcome is what a request meant.
type outcome uint8

const (
	subscribed   outcome = iota // nothing was answered
	acknowledged                // the outstanding response was accepted
	rejected                    // the outstanding response was refused
	ignored                     // stale or foreign nonce
)

// handle takes one request. An error ends the stream.
func (s *session) handle(a ask) (outcome, error) {
	first := !s.asked
	s.asked = true
	result := subscribed
	switch {
	case s.out != nil && a.nonce == s.out.nonce:
		result = s.answered(a)
	case a.whole && s.nonce != "" && a.nonce != s.nonce:
		// The client has not seen the last response yet. When it has, it repeats what it wants under that nonce.
		return ignored, nil
	case a.nonce != "" && a.nonce != s.nonce:
		// A delta request's subscriptions count whatever it answers; so does what a stream asks before the first response.
		result = ignored
	}
	var err error
	if a.whole {
		err = s.replace(a.subscribe)
	} else {
		err = s.change(a, first)
	}
	return result, err
}

// answered settles the outstanding response.
func (s *session) answered(a ask) outcome {
	r := s.out
	s.out, s.dirty = nil, true
	if !a.refused {
		for _, e := range r.secrets {
			h := s.holding(e.resource.Name)
			h.acked, h.refused = e.stamp, ""
			s.serial = cmp.Or(e.serial, s.serial)
		}
		s.acks++
		s.nack = ""
		return acknowledged
	}
	for _, e := range r.secrets {
		h := s.holding(e.resource.Name)
		if h.sent == e.digest {
			h.sent = h.acked.digest // what it had before is what it still has
		}
		h.refused = e.digest
	}
	s.nacks++
	s.nack = cmp.Or(printable(a.because, maxNackBytes), "no reason given")
	return rejected
}

// replace makes names the whole subscription (state of the world).
func (s *session) replace(names []string) error {
	subs, wild, err := parseNames(names)
	if err != nil {
		return err
	}
	// An empty list asks for everything until a name was asked for on this stream; from then on it asks for nothing
	// (xDS protocol, "How the client specifies what resources to return").
	if len(names) > 0 {
		s.named = true
	} else if !s.named {
		wild = true
	}
	before := s.effective()
	for i := range subs {
		if old := s.subscription(subs[i].name); old != nil {
			subs[i].foreign = old.foreign
		}
	}
	s.subs, s.wild = subs, wild
	after := s.effective()
	if slices.Equal(before, after) {
		return nil
	}
	s.dirty = true
	for _, name := range after {
		if !slices.Contains(before, name) {
			s.forget(name)
		}
	}
	return nil
}

// change adds and removes names (delta). A name that is asked for again is sent again: the client may have forgotten
// it (xDS protocol, "Subscribing to Resources").
func (s *session) change(a ask, first bool) error {
	subs, wild, err := parseNames(a.subscribe)
	if err != nil {
		return err
	}
	if first && len(a.subscribe) == 0 {
		wild = true
	}
	for _, sub := range subs {
		if old := s.subscription(sub.name); old != nil {
			*old = sub
		} else {
			s.subs = append(s.subs, sub)
		}
		s.forget(sub.name)
		s.dirty = true
	}
	if wild {
		s.wild, s.dirty = true, true
		s.forget(NameDefault)
		s.forget(NameRootCA)
	}
	s.drop(a.drop)
	if len(s.subs) > MaxNames {
		return errTooMany()
	}
	if !first {
		return nil
	}
	if len(a.held) > MaxNames {
		return errTooMany()
	}
	// What a client says to hold counts as if it had acknowledged it here: either is its own word, about itself.
	for _, name := range s.effective() {
		if d := digestOf(a.held[name]); d != "" {
			h := s.holding(name)
			h.sent, h.acked = d, stamp{digest: d}
		}
	}
	return nil
}

// drop removes names (delta). There may be many more than are subscribed to.
func (s *session) drop(names []string) {
	if len(names) == 0 {
		return
	}
	mine := make(map[string]bool, len(s.subs))
	for _, sub := range s.subs {
		mine[sub.name] = true
	}
	for _, name := range names {
		if name == wildcard && s.wild {
			s.wild, s.dirty = false, true
		}
		if mine[name] {
			delete(mine, name)
			s.dirty = true
		}
	}
	s.subs = slices.DeleteFunc(s.subs, func(sub subscription) bool { return !mine[sub.name] })
}

// next returns the response that is due, or nil. m is the newest material, nil while there is none. An error ends the
// stream.
func (s *session) next(m *Material, now time.Time) (*response, error) {
	ready, _, err := s.resolve(m, now)
	if err != nil {
		return nil, err
	}
	var due, back []*encoded
	newer := false
	for _, e := range ready {
		h := s.holding(e.resource.Name)
		if h.acked.digest == e.digest && h.acked != e.stamp {
			// The client holds these very bytes: a claim that proves true, or a new generation of the same roots.
			h.acked, s.dirty = e.stamp, true
			s.serial = cmp.Or(e.serial, s.serial)
			s.pushed = max(s.pushed, e.generation)
		}
		switch {
		case h.sent == e.digest:
		case h.refused == e.digest:
			back = append(back, e)
		default:
			due = append(due, e)
			newer = newer || h.refused != ""
		}
	}
	if s.out != nil || len(due) == 0 {
		return nil, nil
	}
	if newer {
		// A refusal does not say which secret of the response was at fault. Those that were refused beside one that has
		// changed may well be good.
		due = append(due, back...)
	}
	return s.send(due), nil
}

// send makes the response and remembers it as sent.
func (s *session) send(due []*encoded) *response {
	// Bundles first: who reads in order never has an identity before the trust to go with it.
	ordered := make([]*encoded, 0, len(due))
	for _, trust := range []bool{true, false} {
		for _, e := range due {
			if e.trust == trust {
				ordered = append(ordered, e)
			}
		}
	}
	for _, e := range ordered {
		s.holding(e.resource.Name).sent = e.digest
		s.pushed = max(s.pushed, e.generation)
	}
	s.out = &response{nonce: newNonce(), version: versionOf(ordered), secrets: ordered}
	s.nonce = s.out.nonce
	s.dirty = true
	return s.out
}

// resolve finds what the subscription means: the secrets that are ready, and how many names wait for theirs. A name
// that belongs to somebody else is left out; when nothing else is asked for, the stream has no purpose.
func (s *session) resolve(m *Material, now time.Time) (ready []*encoded, waiting int, err error) {
	if err := s.learn(m); err != nil {
		return nil, 0, err
	}
	foreign := 0
	names := s.effective()
	for _, name := range names {
		sub := s.subscription(name)
		if sub == nil { // of the wildcard
			sub = &subscription{}
		}
		if s.isForeign(name, sub.id) {
			foreign++
			if !sub.foreign {
				sub.foreign, s.dirty = true, true
				s.leftOut++
			}
			continue
		}
		if e := s.find(m, name, sub.id, now); e != nil {
			ready = append(ready, e)
		} else {
			waiting++
		}
	}
	if foreign > 0 && foreign == len(names) {
		return nil, 0, api.E(api.ResourceNotAuthorized, "the secret that was asked for belongs to somebody else")
	}
	return ready, waiting, nil
}

// learn pins whom the stream belongs to. A Source that changes its mind is a fault, and the only safe end is the
// stream's.
func (s *session) learn(m *Material) error {
	if m == nil {
		return nil
	}
	if m.Trust != nil {
		if s.td.IsZero() {
			s.td = m.Trust.td
		}
		if s.td != m.Trust.td {
			return api.Wrap(api.Internal, fmt.Errorf("trust domain %s became %s", s.td, m.Trust.td), "internal error")
		}
	}
	if m.Identity != nil {
		if s.id.IsZero() && (s.td.IsZero() || m.Identity.id.MemberOf(s.td)) {
			s.id, s.td = m.Identity.id, m.Identity.id.TrustDomain()
		}
		if s.id != m.Identity.id {
			return api.Wrap(api.Internal, fmt.Errorf("identity %s became %s", s.id, m.Identity.id), "internal error")
		}
	}
	return nil
}

// isForeign reports whether a name is known to belong to somebody else.
func (s *session) isForeign(name string, id spiffeid.ID) bool {
	switch {
	case id.IsZero():
		return name != NameDefault && name != NameRootCA && name != NameAll
	case !s.td.IsZero() && !id.MemberOf(s.td):
		return true
	case id.Path() == "" || s.id.IsZero():
		return false
	}
	return id != s.id
}

// find returns the secret for a name that is not foreign, nil while there is none.
func (s *session) find(m *Material, name string, id spiffeid.ID, now time.Time) *encoded {
	if m == nil || m.Trust == nil {
		return nil
	}
	switch {
	case name == NameRootCA:
		return m.Trust.word
	case name == NameAll:
		return m.Trust.all
	case !id.IsZero() && id.Path() == "":
		return m.Trust.uri
	case m.Identity == nil || !now.Before(m.Identity.notAfter):
		return nil // not issued, or expired and of no use to anybody
	case name == NameDefault:
		return m.Identity.word
	}
	return m.Identity.uri
}

// effective returns the names that are subscribed to, sorted.
func (s *session) effective() []string {
	names := make([]string, 0, len(s.subs)+2)
	for _, sub := range s.subs {
		names = append(names, sub.name)
	}
	if s.wild {
		names = append(names, NameDefault, NameRootCA)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// subscription returns that of a name, nil where there is none. It is good until the next is added.
func (s *session) subscription(name string) *subscription {
	for i := range s.subs {
		if s.subs[i].name == name {
			return &s.subs[i]
		}
	}
	return nil
}

// held returns what is known of the client's copy of a name, nil where nothing is. It is good until the next is added.
func (s *session) held(name string) *holding {
	for i := range s.holdings {
		if s.holdings[i].name == name {
			return &s.holdings[i]
		}
	}
	return nil
}

// holding is held, added where nothing is known.
func (s *session) holding(name string) *holding {
	if h := s.held(name); h != nil {
		return h
	}
	s.holdings = append(s.holdings, holding{name: name})
	return &s.holdings[len(s.holdings)-1]
}

// forget drops what the client had of a name. What it refused stays refused.
func (s *session) forget(name string) {
	if h := s.held(name); h != nil {
		h.sent, h.acked = "", stamp{}
	}
}

// report fills in what the session knows of its stream.
func (s *session) report(r *Report) {
	r.Names, r.WantsBundle, r.AckedGeneration, r.AckedHash = nil, false, 0, nil
	for _, name := range s.effective() {
		sub, h := s.subscription(name), s.held(name)
		if sub == nil {
			sub = &subscription{}
		}
		if sub.foreign {
			continue
		}
		r.Names = append(r.Names, name)
		if h == nil {
			h = &holding{}
		}
		if !wantsTrust(name, sub.id) {
			continue
		}
		// The least that holds for every bundle is what the stream has proven.
		if !r.WantsBundle || h.acked.generation < r.AckedGeneration {
			r.AckedGeneration, r.AckedHash = h.acked.generation, slices.Clone(h.acked.hash[:])
		}
		r.WantsBundle = true
	}
	if r.AckedGeneration == 0 {
		r.AckedHash = nil
	}
	r.AckedSerial, r.PushedGeneration = s.serial, s.pushed
	r.Nack, r.Acks, r.Nacks = s.nack, s.acks, s.nacks
}

// newNonce returns 16 hex digits that nobody can guess: an answer proves that its response was read.
func newNonce() string {
	var b [8]byte
	rand.Read(b[:]) // never fails: crypto/rand ends the process instead
	return hex.EncodeToString(b[:])
}

// versionOf names the content of a response: the version of its secret, or a hash over those of several.
func versionOf(secrets []*encoded) string {
	if len(secrets) == 1 {
		return secrets[0].resource.Version
	}
	h := sha256.New()
	for _, e := range secrets {
		fmt.Fprintf(h, "%s %s\n", e.resource.Name, e.resource.Version)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// digestOf returns the digest in a version that encode made, and nothing for any other.
func digestOf(version string) string {
	if i := len(version) - 33; i > 0 && version[i] == '-' {
		return version[i+1:]
	}
	return ""
}
