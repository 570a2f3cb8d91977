package sds

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// D03: a request without names means the own certificate and bundle, and no more.
//
// threat: D03
func TestWildcard(t *testing.T) {
	for _, names := range [][]string{nil, {"*"}} {
		both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
			p.set(1)
			c := w.stream(protocol)
			c.ask(names...)
			g := c.next()
			want := []string{NameRootCA, NameDefault}
			if !slices.Equal(g.names, want) {
				t.Fatalf("got %v, want %v", g.names, want)
			}
			c.ack(g)
			c.quiet()
			m := p.set(1)
			if g = c.next(); !slices.Equal(g.names, []string{NameDefault}) {
				t.Fatalf("got %v, want what changed", g.names)
			}
			c.ack(g)
			if r := p.last(1); !r.WantsBundle || r.AckedSerial != m.Identity.Serial() {
				t.Errorf("report %+v", r)
			}
		})
	}
}

// A subscription that had names and has none is no wildcard.
func TestUnsubscribedFromAll(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		c := w.stream(protocol)
		c.ask(NameDefault)
		g := c.next()
		c.must(c.send(g.nonce, nil, nil, []string{NameDefault}, nil))
		p.set(2)
		c.quiet()
		if r := p.last(1); len(r.Names) > 0 || r.WantsBundle {
			t.Errorf("report %+v, want no names", r)
		}
		c.must(c.send(g.nonce, nil, []string{NameRootCA}, nil, nil))
		if g := c.next(); !slices.Equal(g.names, []string{NameRootCA}) {
			t.Errorf("got %v", g.names)
		}
	})
}

// Delta: a client that comes back says what it holds, is not sent it again, and has proven it.
func TestInitialVersions(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		m := p.set(4)
		c := w.stream(ProtocolDelta)
		c.ask(NameDefault, NameRootCA)
		g := c.next()
		c.ack(g)
		c.cancel()

		c = w.stream(ProtocolDelta)
		c.must(c.send("", nil, []string{NameDefault, NameRootCA}, nil, g.versions))
		c.quiet()
		r, hash := p.last(2), m.Trust.Hash()
		want := Report{
			Stream: 2, Proxy: "envoy-1", Protocol: ProtocolDelta, Names: []string{NameRootCA, NameDefault}, WantsBundle: true, Open: true,
			AckedSerial: m.Identity.Serial(), AckedGeneration: 4, AckedHash: hash[:], PushedGeneration: 4,
		}
		if d := cmp.Diff(want, r); d != "" {
			t.Errorf("report (-want +got):\n%s", d)
		}
		p.material.Set(&Material{Identity: p.identity(ownID), Trust: m.Trust})
		if g := c.next(); !slices.Equal(g.names, []string{NameDefault}) {
			t.Errorf("got %v, want what changed", g.names)
		}
		c.cancel()

		// An old version, a foreign version and a claim for what was not asked are worth nothing.
		c = w.stream(ProtocolDelta)
		held := map[string]string{NameDefault: g.versions[NameDefault], NameRootCA: "7", NameAll: g.versions[NameRootCA]}
		c.must(c.send("", nil, []string{NameDefault, NameRootCA}, nil, held))
		if g := c.next(); !slices.Equal(g.names, []string{NameRootCA, NameDefault}) {
			t.Errorf("got %v, want both", g.names)
		}
	})
}

// Delta: a name that is asked for again is sent again, as the protocol wants; so is one that was dropped meanwhile.
func TestDeltaAskedAgain(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		p.set(1)
		c := w.stream(ProtocolDelta)
		c.ask(NameDefault)
		c.ack(c.next())
		c.ask(NameDefault)
		g := c.next()
		c.must(c.send(g.nonce, nil, nil, []string{NameDefault}, nil))
		p.set(1)
		c.quiet()
		c.ask(NameDefault)
		c.ack(c.next())
		c.must(c.send("", nil, nil, []string{"never-asked", "../.."}, nil))
		c.quiet()
	})
}

// Delta: a subscription counts whatever nonce it comes with.
//
// threat: D05
func TestDeltaForeignNonce(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		p.set(1)
		c := w.stream(ProtocolDelta)
		c.must(c.send("deadbeef", nil, []string{NameDefault}, nil, nil))
		g := c.next()
		c.must(c.send("deadbeef", nil, nil, nil, nil))
		if r := p.last(1); r.Acks != 0 {
			t.Errorf("a foreign nonce was taken for an acknowledgement: %+v", r)
		}
		c.must(c.send("deadbeef", nil, []string{NameRootCA}, nil, nil))
		c.quiet() // one response at a time
		c.ack(g)
		if g := c.next(); !slices.Equal(g.names, []string{NameRootCA}) {
			t.Errorf("got %v", g.names)
		}
	})
}

// D05: SotW requests with a nonce that is not the last one mean nothing, and answer nothing.
//
// threat: D05
func TestSotWNonces(t *testing.T) {
	ignored := 0
	cfg := Config{Hooks: Hooks{Ignored: func(string) { ignored++ }}}
	bubble(t, cfg, func(t *testing.T, p *pod, w *world) {
		p.set(1)
		c := w.stream(ProtocolSotW)
		c.must(c.send("of-another-stream", nil, []string{NameDefault}, nil, nil)) // first: the subscription counts
		old := c.next()
		c.ack(old)
		p.set(1)
		last := c.next()
		why := "stale refusal"
		for _, nonce := range []string{"", "of-another-stream", old.nonce} {
			before := p.last(1)
			ignored = 0
			c.must(c.send(nonce, nil, []string{NameRootCA}, nil, nil))
			c.must(c.send(nonce, &why, nil, nil, nil))
			c.quiet()
			if d := cmp.Diff(before, p.last(1)); d != "" || ignored != 2 {
				t.Errorf("nonce %q: ignored %d of 2 requests, report (-before +after):\n%s", nonce, ignored, d)
			}
		}
		c.ack(last) // repeats the names that were ignored before
		if g := c.next(); !slices.Equal(g.names, []string{NameRootCA}) {
			t.Errorf("got %v", g.names)
		}
	})
}
