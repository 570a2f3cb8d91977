package sds

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
)

// vocabulary is what a fuzzed client may say as a name: all that is served, and much that is not.
var vocabulary = []string{
	NameDefault, NameRootCA, NameAll, ownID, "spiffe://" + td, wildcard, elseID, "spiffe://other.example",
	"spiffe://other.example/ns/a", ownID + "/x", "istio", "", "file-cert:/etc/shadow", "a\x00", "spiffe://" + td + "/",
}

// served is the part of it that a stream of ownID may have.
var served = vocabulary[:5]

// script reads a conversation from fuzzed bytes.
type script struct{ b []byte }

func (s *script) byte() byte {
	if len(s.b) == 0 {
		return 0
	}
	c := s.b[0]
	s.b = s.b[1:]
	return c
}

func (s *script) names() []string {
	var names []string
	for range s.byte() % 5 {
		names = append(names, vocabulary[int(s.byte())%len(vocabulary)])
	}
	return names
}

func (s *script) bytes() []byte {
	n := min(int(s.byte()), len(s.b))
	b := s.b[:n]
	s.b = s.b[n:]
	return b
}

// observer is a client that holds one session to the rules, by what goes in and what comes out.
type observer struct {
	t        *testing.T
	session  *session
	whole    bool // speaks SotW
	material *Material

	held    map[string]string // digest by name of what it accepted
	owed    map[string]bool   // names that it asked for, perhaps again, and has not been sent since
	refused map[string]string // digest by name of what it refused last
	nonces  map[string]bool
	last    *response
	open    bool // last is unanswered
}

// request hands over one request and notes what it changes.
func (o *observer) request(a ask) error {
	first, before := !o.session.asked, o.session.effective()
	result, err := o.session.handle(a)
	if err != nil {
		return err
	}
	if o.open && a.nonce == o.last.nonce {
		o.answered(a.refused)
		if result != acknowledged && result != rejected {
			o.t.Fatalf("an answer meant %d", result)
		}
	} else if result == acknowledged || result == rejected {
		o.t.Fatal("an answer to nothing was taken for one")
	}
	for _, n := range o.session.effective() {
		wild := slices.Contains(a.subscribe, wildcard) && (n == NameDefault || n == NameRootCA)
		if !slices.Contains(before, n) || !o.whole && (wild || slices.Contains(a.subscribe, n)) {
			o.owed[n] = true
		}
		if d := digestOf(a.held[n]); first && d != "" {
			o.held[n], o.owed[n] = d, false
		}
	}
	return nil
}

func (o *observer) answered(refused bool) {
	o.open = false
	for _, e := range o.last.secrets {
		name := e.resource.GetName()
		if refused {
			o.refused[name] = e.digest
		} else {
			o.held[name] = e.digest
			delete(o.refused, name)
		}
	}
}

// settle takes what is due, which is at most one response, and looks at the report.
func (o *observer) settle(now time.Time) error {
	r, err := o.session.next(o.material, now)
	if err != nil {
		return err
	}
	if r != nil {
		o.response(r)
	}
	if r, err := o.session.next(o.material, now); r != nil || err != nil {
		o.t.Fatalf("there is more without a reason: %v, %v", r, err)
	}
	var rep Report
	o.session.report(&rep)
	if len(rep.Names) > MaxNames+2 || len(rep.Nack) > maxNackBytes || len(o.session.holdings) > 2*MaxNames {
		o.t.Fatalf("what is kept grows: %d names, %d holdings, report %+v", len(rep.Names), len(o.session.holdings), rep)
	}
	if g := rep.AckedGeneration; g != 0 && (!rep.WantsBundle || g > rep.PushedGeneration || len(rep.AckedHash) != 32) {
		o.t.Fatalf("report %+v", rep)
	}
	return nil
}

// response checks one response against the rules.
func (o *observer) response(r *response) {
	switch {
	case o.open:
		o.t.Fatal("a second response while one is unanswered")
	case r.nonce == "" || o.nonces[r.nonce]:
		o.t.Fatalf("the nonce %q came twice", r.nonce)
	case len(r.secrets) == 0:
		o.t.Fatal("an empty response")
	case o.material == nil || o.material.Trust == nil:
		o.t.Fatal("a push without trust")
	}
	o.nonces[r.nonce] = true
	wanted, news, identity := o.session.effective(), false, false
	for _, e := range r.secrets {
		name := e.resource.GetName()
		switch {
		case !slices.Contains(served, name):
			o.t.Fatalf("%q was pushed, which is somebody else's", name)
		case !slices.Contains(wanted, name):
			o.t.Fatalf("%q was pushed, which nobody asked for", name)
		case identity && e.trust:
			o.t.Fatal("an identity before a bundle")
		case len(e.resource.GetResource().GetValue()) == 0:
			o.t.Fatalf("%q is empty", name)
		case o.held[name] == e.digest && !o.owed[name]:
			o.t.Fatalf("%q was pushed to a client that has these bytes", name)
		}
		if o.owed[name] {
			delete(o.held, name) // it asked, perhaps again: what it has is not known until it accepts
		}
		o.owed[name] = false
		identity = identity || !e.trust
		news = news || o.refused[name] != e.digest
	}
	if !news {
		o.t.Fatal("what was refused was pushed again")
	}
	o.last, o.open = r, true
}

// raw decodes b as a request from the wire; where it has a nonce, it gets that of the last response.
func (o *observer) raw(b []byte) error {
	var a ask
	var err error
	if o.whole {
		r := &discovery.DiscoveryRequest{}
		if proto.Unmarshal(b, r) != nil {
			return nil
		}
		if err := checkNode(r.GetNode()); err != nil {
			return err
		}
		a, err = sotw.decode(r)
	} else {
		r := &discovery.DeltaDiscoveryRequest{}
		if proto.Unmarshal(b, r) != nil {
			return nil
		}
		if err := checkNode(r.GetNode()); err != nil {
			return err
		}
		a, err = delta.decode(r)
	}
	if err != nil {
		return err
	}
	if a.nonce != "" && o.last != nil {
		a.nonce = o.last.nonce
	}
	return o.request(a)
}

// FuzzSequence drives the rules of a stream with whole conversations of both protocols: requests in any order, raw ones
// too, answers that fit and that do not, and changes of what there is to serve.
//
// threat: D05
func FuzzSequence(f *testing.F) {
	a := newAuthority(f, td)
	identities := []*Identity{a.identity(ownID), a.identity(ownID), a.identity(ownID), nil}
	trusts := []*Trust{a.trust(1), a.trust(2), a.trust(3, newAuthority(f, "other.example").bundle()), nil}
	now := time.Now()

	f.Add([]byte{0, 0, 1, 0, 0, 3, 1, 0, 5, 1, 0, 3, 1, 0})                            // SotW: subscribe, ACK, new identity, ACK
	f.Add([]byte{1, 0, 2, 0, 1, 0, 4, 2, 'n', 'o', 0, 5, 1, 1, 3, 0})                  // delta: two names, NACK, both new, ACK
	f.Add([]byte{0, 0, 0, 0, 3, 0, 3, 0, 0, 2, 0, 6})                                  // SotW: wildcard, then a foreign name
	f.Add([]byte{7, 0, 2, 0, 6, 0, 5, 0, 0, 3, 0, 5, 1, 2})                            // delta, nothing known yet: own and foreign name
	f.Add([]byte{1, 1, 2, 0, 1, 2, 0, 1, 5, 1, 1, 2, 9, 1, 0, 0})                      // delta: a client that comes back
	f.Add(append([]byte{0, 6, 9, 26, 7}, "default"...))                                // SotW: raw
	f.Add([]byte{1, 0, 1, 0, 0, 0, 1, 0, 0, 3, 0, 0, 1, 0, 0, 3, 0, 0, 0, 1, 0, 3, 0}) // delta: asked again, dropped
	f.Fuzz(func(t *testing.T, b []byte) {
		in := &script{b: b}
		flags := in.byte()
		o := &observer{
			t: t, whole: flags&1 == 0, session: newSession(identities[0].ID()),
			held: map[string]string{}, owed: map[string]bool{}, refused: map[string]string{}, nonces: map[string]bool{},
		}
		if flags&2 != 0 { // who it is comes later
			o.session = newSession(spiffeid.ID{})
		}
		if flags&4 == 0 {
			o.material = &Material{Identity: identities[0], Trust: trusts[0]}
		}
		for len(in.b) > 0 {
			nonce := ""
			if o.last != nil {
				nonce = o.last.nonce
			}
			ask := ask{whole: o.whole}
			var err error
			switch in.byte() % 7 {
			case 0: // a request without a nonce
				ask.subscribe, ask.drop = in.names(), in.names()
				err = o.request(ask)
			case 1: // with what it holds, as it says
				ask.held = map[string]string{}
				for _, n := range in.names() {
					ask.held[n] = trusts[0].word.resource.GetVersion()
				}
				ask.subscribe = in.names()
				if o.whole {
					ask.held = nil
				}
				err = o.request(ask)
			case 2: // with a nonce that is not the last
				ask.nonce, ask.refused, ask.subscribe = fmt.Sprint(in.byte()), in.byte()&1 == 0, in.names()
				err = o.request(ask)
			case 3: // an acknowledgement
				ask.nonce, ask.subscribe = nonce, in.names()
				err = o.request(ask)
			case 4: // a refusal
				ask.nonce, ask.refused, ask.because, ask.subscribe = nonce, true, string(in.bytes()), in.names()
				err = o.request(ask)
			case 5: // something else to serve
				o.material = &Material{Identity: identities[in.byte()%4], Trust: trusts[in.byte()%4]}
			case 6:
				err = o.raw(in.bytes())
			}
			if err == nil {
				err = o.settle(now)
			}
			if err == nil {
				continue
			}
			switch r := api.ReasonOf(err); r {
			case api.ResourceName, api.TooManyResources, api.ResourceNotAuthorized, api.TypeURL, api.NodeMetadataTooLarge:
				return // the end of this stream
			default:
				t.Fatalf("the stream ended with %s: %v", r, err)
			}
		}
	})
}

// FuzzNames holds the parser of names against what must be true of everything that it lets through.
//
// threat: D02
func FuzzNames(f *testing.F) {
	for _, n := range vocabulary {
		f.Add(n)
	}
	f.Fuzz(func(t *testing.T, name string) {
		id, err := parseName(name)
		if err != nil {
			if api.ReasonOf(err) != api.ResourceName {
				t.Fatalf("error = %v", err)
			}
			return
		}
		if len(name) == 0 || len(name) > api.MaxIDBytes || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
			t.Fatalf("%q was let through", name)
		}
		if id.IsZero() && (name[0] == '.' || strings.ContainsAny(name, "/:~\\%")) || !id.IsZero() && id.String() != name {
			t.Fatalf("%q became %q", name, id)
		}
	})
}
