package sds

import (
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/latest"
)

// D20: both protocols on one connection. Each secret goes under the name that was asked for.
//
// threat: D20
func TestNames(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		other := newAuthority(t, "other.example")
		m := &Material{Identity: p.identity(ownID), Trust: p.trust(3, other.bundle())}
		p.material.Set(m)
		for _, name := range []string{NameDefault, ownID, NameRootCA, "spiffe://" + td, NameAll} {
			c := w.stream(protocol)
			c.ask(name)
			g := c.next()
			if !slices.Equal(g.names, []string{name}) {
				t.Fatalf("asked for %q, got %v", name, g.names)
			}
			s := g.secrets[name]
			if name == NameDefault || name == ownID {
				svid, err := x509svid.Parse(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), s.GetTlsCertificate().GetPrivateKey().GetInlineBytes())
				if err != nil || svid.ID.String() != ownID {
					t.Errorf("%s: %v, %v", name, svid, err)
				}
			} else if d := validator(t, s); len(d) != map[bool]int{false: 1, true: 2}[name == NameAll] {
				t.Errorf("%s holds %d trust domains", name, len(d))
			}
			c.ack(g)
			c.quiet()
			c.cancel()
		}
	})
}

// D17, within the agent: never an identity before there is trust, and bundles first in a response.
//
// threat: D17
func TestBundleBeforeIdentity(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		c := w.stream(protocol)
		c.ask(NameDefault, ownID, NameRootCA, NameAll)
		c.quiet()
		identity := p.identity(ownID)
		p.material.Set(&Material{Identity: identity})
		c.quiet()
		p.material.Set(&Material{Identity: identity, Trust: p.trust(1)})
		if g := c.next(); !slices.Equal(g.names, []string{NameAll, NameRootCA, NameDefault, ownID}) {
			t.Errorf("order %v, want the bundles first", g.names)
		}
	})
}

// A name that is not ready keeps the stream open and is pushed when it is; what is ready goes out at once.
func TestPendingIdentity(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.id = ""
		c := w.stream(protocol)
		c.ask(NameDefault, NameRootCA, ownID, "spiffe://"+td)
		c.quiet()
		trust := p.trust(1)
		p.material.Set(&Material{Trust: trust})
		g := c.next()
		if !slices.Equal(g.names, []string{NameRootCA, "spiffe://" + td}) {
			t.Fatalf("got %v, want the bundle alone", g.names)
		}
		c.ack(g)
		time.Sleep(time.Hour)
		c.quiet()
		p.material.Set(&Material{Identity: p.identity(ownID), Trust: trust})
		if g = c.next(); !slices.Equal(g.names, []string{NameDefault, ownID}) {
			t.Fatalf("got %v, want the identity alone", g.names)
		}
	})
}

// D01: somebody else's secret is never sent, alone or among others, whenever it is asked for.
//
// threat: D01
func TestForeignNames(t *testing.T) {
	const other = "spiffe://other.example"
	for _, tt := range []struct {
		name  string
		ask   []string
		known bool // the workload's ID is known from the start
		want  []string
		end   bool
	}{
		{"alone", []string{elseID}, true, nil, true},
		{"several", []string{elseID, other + "/x", other, "istio"}, true, nil, true},
		{"longer than own", []string{ownID + "/x"}, true, nil, true},
		{"prefix of own", []string{ownID[:len(ownID)-1]}, true, nil, true},
		{"own path in another case", []string{"spiffe://" + td + strings.ToUpper(ownID[len("spiffe://"+td):])}, true, nil, true},
		{"reserved", []string{"spiffe://" + td + "/signet/ca/0"}, true, nil, true},
		{"among others", []string{elseID, NameDefault, other}, true, []string{NameDefault}, false},
		{"alone, ID not known yet", []string{elseID}, false, nil, true},
		{"among others, ID not known yet", []string{elseID, NameDefault}, false, []string{NameDefault}, false},
		{"own, ID not known yet", []string{ownID}, false, []string{ownID}, false},
		{"another domain's bundle", []string{other}, false, nil, true},
		{"a word", []string{"istio"}, false, nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			leftOut := 0
			cfg := Config{Hooks: Hooks{LeftOut: func(string) { leftOut++ }}}
			both(t, cfg, func(t *testing.T, protocol string, p *pod, w *world) {
				if !tt.known {
					p.id = ""
				}
				leftOut = 0
				c := w.stream(protocol)
				c.ask(tt.ask...)
				if !tt.end {
					c.quiet()
				}
				p.material.Set(&Material{Identity: p.identity(ownID), Trust: p.trust(1)})
				if tt.end {
					c.ended(api.ResourceNotAuthorized)
					if strings.Contains(c.err.Error(), "vault") || len(c.in) > 0 {
						t.Errorf("the client learns too much: %v, %v", c.err, c.in)
					}
					return
				}
				g := c.next()
				if !slices.Equal(g.names, tt.want) {
					t.Errorf("got %v, want %v", g.names, tt.want)
				}
				if want := len(tt.ask) - len(tt.want); leftOut != want {
					t.Errorf("%d names recorded as left out, want %d", leftOut, want)
				}
				if r := p.last(1); !slices.Equal(r.Names, tt.want) {
					t.Errorf("report names %v, want %v", r.Names, tt.want)
				}
			})
		})
	}
}

// Dropping the last own name leaves a stream with a foreign one alone.
//
// threat: D01
func TestForeignNameRemains(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		c := w.stream(protocol)
		c.ask(NameDefault, elseID)
		g := c.next()
		c.must(c.send(g.nonce, nil, nil, []string{NameDefault}, nil))
		c.ended(api.ResourceNotAuthorized)
	})
}

// What can never be right ends the stream with its reason.
//
// threat: D02, D08
func TestMalformedNames(t *testing.T) {
	many := make([]string, MaxNames+1)
	for i := range many {
		many[i] = "name-" + strings.Repeat("x", i)
	}
	for _, tt := range []struct {
		name string
		ask  []string
		want api.Reason
	}{
		{"file-cert", []string{"file-cert:/etc/shadow~/etc/passwd"}, api.ResourceName},
		{"path", []string{"../../etc/passwd"}, api.ResourceName},
		{"NUL", []string{"default\x00"}, api.ResourceName},
		{"64 KiB", []string{strings.Repeat("a", 64<<10)}, api.ResourceName},
		{"empty", []string{""}, api.ResourceName},
		{"beside a good one", []string{NameDefault, "a/b"}, api.ResourceName},
		{"one too many", many, api.TooManyResources},
		{"10,000", slices.Repeat(many, 154), api.TooManyResources},
	} {
		t.Run(tt.name, func(t *testing.T) {
			both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
				p.set(1)
				c := w.stream(protocol)
				c.ask(tt.ask...)
				c.ended(tt.want)
				if len(c.in) > 0 {
					t.Errorf("secrets came: %v", c.in)
				}
			})
		})
	}
}

// D08: duplicates are one name.
//
// threat: D08
func TestDuplicateNames(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		c := w.stream(protocol)
		c.ask(slices.Repeat([]string{NameDefault, NameRootCA}, 1000)...)
		if g := c.next(); !slices.Equal(g.names, []string{NameRootCA, NameDefault}) {
			t.Errorf("got %v", g.names)
		}
	})
}

// A refused version is not sent again, what the client had before counts on, and the next version is tried.
//
// threat: D06
func TestNack(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		first := p.set(1)
		c := w.stream(protocol)
		c.ask(NameDefault)
		c.ack(c.next())
		second := &Material{Identity: p.identity(ownID), Trust: first.Trust}
		p.material.Set(second)
		g := c.next()
		text := "bad\ncertificate " + strings.Repeat("x", 1000)
		c.nack(g, text)
		c.quiet()
		want := Report{
			Stream: 1, Proxy: "envoy-1", Protocol: protocol, Names: []string{NameDefault}, Open: true,
			AckedSerial: first.Identity.Serial(), Nack: printable(text, 512), Acks: 1, Nacks: 1,
		}
		if d := cmp.Diff(want, p.last(1)); d != "" {
			t.Errorf("report (-want +got):\n%s", d)
		}
		for range 50 { // a flood
			c.nack(g, "again")
			p.material.Set(&Material{Identity: second.Identity, Trust: first.Trust})
		}
		c.quiet()
		if d := cmp.Diff(want, p.last(1)); d != "" {
			t.Errorf("report after a flood (-want +got):\n%s", d)
		}
		p.material.Set(first) // what it has already
		c.quiet()
		third := p.set(1)
		c.ack(c.next())
		if r := p.last(1); r.AckedSerial != third.Identity.Serial() || r.Nack != "" || r.Acks != 2 || r.Nacks != 1 {
			t.Errorf("report %+v", r)
		}
		p.material.Set(second) // newest wins, even if it was refused before something else was accepted
		c.next()
	})
}

// A refusal does not say which of two secrets was bad, so the good one comes again when the other one is mended.
func TestNackOfSeveral(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		m := p.set(1)
		c := w.stream(protocol)
		c.ask(NameDefault, NameRootCA)
		c.nack(c.next(), "no")
		c.quiet()
		p.material.Set(&Material{Identity: p.identity(ownID), Trust: m.Trust})
		g := c.next()
		if !slices.Equal(g.names, []string{NameRootCA, NameDefault}) {
			t.Fatalf("got %v, want both again", g.names)
		}
		c.ack(g)
		if r := p.last(1); r.AckedGeneration != 1 || r.Nack != "" {
			t.Errorf("report %+v", r)
		}
	})
}

// Equal content is not sent twice, whatever the Source sets.
//
// threat: D22
func TestEqualContent(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		svid := p.svid(ownID)
		set := func(generation uint64, roots ...*x509.Certificate) *Trust {
			identity, err := NewIdentity(svid)
			if err != nil {
				t.Fatal(err)
			}
			trust, err := NewTrust(p.bundle(roots...), nil, generation)
			if err != nil {
				t.Fatal(err)
			}
			p.material.Set(&Material{Identity: identity, Trust: trust})
			return trust
		}
		set(5)
		c := w.stream(protocol)
		c.ask(NameDefault, NameRootCA)
		c.ack(c.next())
		for range 10 {
			set(5)
			c.quiet()
		}
		// A new generation of the same roots is proven by the acknowledgement of those roots.
		trust := set(6)
		c.quiet()
		hash := trust.Hash()
		if r := p.last(1); r.AckedGeneration != 6 || r.PushedGeneration != 6 || !slices.Equal(r.AckedHash, hash[:]) || r.Acks != 1 {
			t.Errorf("report %+v, want generation 6 proven without a push", r)
		}
		kept := p.last(1)
		root := p.newRoot()
		set(7, root)
		g := c.next()
		if !slices.Equal(g.names, []string{NameRootCA}) {
			t.Fatalf("got %v, want what changed alone", g.names)
		}
		set(8, root) // meanwhile
		c.ack(g)
		c.quiet()
		if r := p.last(1); r.AckedGeneration != 8 {
			t.Errorf("report %+v, want generation 8", r)
		}
		if !slices.Equal(kept.AckedHash, hash[:]) {
			t.Error("a report that was given out changed")
		}
	})
}

// What is reported is what was acknowledged on this stream, the least of it where there are several bundles.
func TestAcknowledgements(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		first := p.set(1)
		c := w.stream(protocol)
		synctest.Wait()
		if d := cmp.Diff(Report{Stream: 1, Protocol: protocol, Open: true}, p.last(1)); d != "" {
			t.Errorf("opened (-want +got):\n%s", d)
		}
		c.ask(NameDefault, NameRootCA)
		g := c.next()
		want := Report{
			Stream: 1, Proxy: "envoy-1", Protocol: protocol, Names: []string{NameRootCA, NameDefault}, WantsBundle: true,
			Open: true, PushedGeneration: 1,
		}
		if d := cmp.Diff(want, p.last(1)); d != "" {
			t.Errorf("pushed (-want +got):\n%s", d)
		}
		c.ack(g)
		hash := first.Trust.Hash()
		want.AckedSerial, want.AckedGeneration, want.AckedHash, want.Acks = first.Identity.Serial(), 1, hash[:], 1
		if d := cmp.Diff(want, p.last(1)); d != "" {
			t.Errorf("acknowledged (-want +got):\n%s", d)
		}
		// One more bundle, not acknowledged yet: the stream has proven nothing for it.
		c.must(c.send(g.nonce, nil, []string{NameAll}, nil, nil))
		g = c.next()
		if r := p.last(1); r.AckedGeneration != 0 || r.AckedHash != nil {
			t.Errorf("report %+v, want no generation proven", r)
		}
		c.ack(g)
		if d := cmp.Diff(append([]string{NameAll}, want.Names...), p.last(1).Names); d != "" || p.last(1).AckedGeneration != 1 {
			t.Errorf("report %+v: %s", p.last(1), d)
		}
		c.cancel()
		synctest.Wait()
		if r := p.last(1); r.Open || r.AckedGeneration != 1 {
			t.Errorf("closed: %+v", r)
		}
	})
}

// Changes while a response is unanswered are merged: the client gets the newest only, and never an old key after it.
func TestCoalescing(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		c := w.stream(protocol)
		c.ask(NameDefault)
		g := c.next()
		var last *Material
		for range 20 {
			last = p.set(1)
			c.quiet()
		}
		c.ack(g)
		g = c.next()
		if !strings.HasPrefix(g.version, last.Identity.Serial()+"-") {
			t.Errorf("version %s, want that of the newest, %s", g.version, last.Identity.Serial())
		}
		c.ack(g)
		c.quiet()
	})
}

// An expired identity is of no use and is not pushed; its successor is.
func TestExpiredIdentity(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		old := p.identity(ownID, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Minute) })
		p.material.Set(&Material{Identity: old, Trust: p.trust(1)})
		time.Sleep(time.Minute)
		c := w.stream(protocol)
		c.ask(NameDefault)
		c.quiet()
		p.set(1)
		c.next()
	})
}

// A Source that changes its mind about whose stream it is ends the stream: no key of anybody else goes out.
func TestIdentityNeverChanges(t *testing.T) {
	for name, change := range map[string]func(*pod) *Material{
		"identity":     func(p *pod) *Material { return &Material{Identity: p.identity(elseID), Trust: p.trust(1)} },
		"trust domain": func(p *pod) *Material { return &Material{Trust: newAuthority(p.t, "other.example").trust(1)} },
	} {
		t.Run(name, func(t *testing.T) {
			both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
				p.id = ""
				p.set(1)
				c := w.stream(protocol)
				c.ask(NameDefault)
				c.ack(c.next())
				p.material.Set(change(p))
				c.ended(api.Internal)
				if strings.Contains(c.err.Error(), "spiffe://") {
					t.Errorf("the error tells names: %v", c.err)
				}
			})
		})
	}
}

// An empty Value keeps a stream open without anything on it.
func TestNoMaterial(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.material = &latest.Value[*Material]{}
		c := w.stream(protocol)
		c.ask()
		time.Sleep(24 * time.Hour)
		c.quiet()
	})
}

// The bundles of other trust domains come and go in ALL, and only there.
func TestFederatedChange(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		other := newAuthority(t, "other.example")
		set := func(bundles ...*x509bundle.Bundle) { p.material.Set(&Material{Trust: p.trust(1, bundles...)}) }
		set()
		c := w.stream(protocol)
		c.ask(NameAll, NameRootCA)
		c.ack(c.next())
		set(other.bundle())
		g := c.next()
		if !slices.Equal(g.names, []string{NameAll}) || len(validator(t, g.secrets[NameAll])) != 2 {
			t.Errorf("got %v", g.names)
		}
		c.ack(g)
		set(x509bundle.New(other.td)) // all revoked
		if g = c.next(); len(validator(t, g.secrets[NameAll])) != 1 {
			t.Error("an empty bundle must take its trust domain out")
		}
	})
}
