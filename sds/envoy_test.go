//go:build envoy

package sds

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Real Envoys, both protocols, with and without a token: certificates and roots are rotated under load of new
// connections, none of which fails; who does not belong is refused; all of it is acknowledged.
//
// spiffe, B-08
func TestEnvoy(t *testing.T) {
	for _, apiType := range []string{"GRPC", "DELTA_GRPC"} {
		for _, door := range []string{"pod socket", "shared socket"} {
			t.Run(apiType+" "+door, func(t *testing.T) { testEnvoy(t, apiType, door == "shared socket") })
		}
	}
}

func testEnvoy(t *testing.T, apiType string, withToken bool) {
	next := newAuthority(t, td) // the root of tomorrow
	next.nextSerial += 1 << 20
	r := startRig(t, apiType, withToken, next.root)

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var calls, failures atomic.Int64
	var rounds []*atomic.Int64 // of each load
	serials := sync.Map{}
	load := func(f func() error) {
		round := &atomic.Int64{}
		rounds = append(rounds, round)
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := f(); err != nil {
					failures.Add(1)
					t.Errorf("a connection failed: %v", err)
				}
				calls.Add(1)
				round.Add(1)
			}
		})
	}
	load(func() error {
		serial, err := r.call("inbound", r.clientTLS.Load())
		serials.Store(serial, true)
		return err
	})
	load(func() error { _, err := r.call("federated", r.clientTLS.Load()); return err })
	load(func() error { return r.through("outbound") })

	trust := func(generation uint64, authorities ...*authority) *Trust {
		b := x509bundle.New(r.td)
		for _, a := range authorities {
			b.AddX509Authority(a.root)
		}
		tr, err := NewTrust(b, nil, generation)
		if err != nil {
			t.Fatal(err)
		}
		return tr
	}
	steps := []*Material{
		{r.identity(ownID), trust(1, r.authority)},
		{r.identity(ownID), trust(2, r.authority, next)},
		{next.identity(ownID), trust(2, r.authority, next)},
		{next.identity(ownID), trust(3, next)},
	}
	for i, m := range steps {
		r.material.Set(m)
		r.proven(m)
		if i == 2 {
			r.clientTLS.Store(next.svid(peerID)) // everyone holds both roots by now
			var before []int64
			for _, n := range rounds {
				before = append(before, n.Load())
			}
			r.eventually("calls with the new root alone", func() bool { // the call that was under way then, and one more of each
				for i, n := range rounds {
					if n.Load() < before[i]+2 {
						return false
					}
				}
				return true
			})
		}
		before := calls.Load()
		r.eventually("more calls", func() bool {
			_, shown := serials.Load(m.Identity.Serial())
			return shown && calls.Load() > before+20
		})
	}
	if withToken {
		before := r.reauths.Load()
		r.eventually("streams that end before their token", func() bool { return r.reauths.Load() > before+4 })
		r.proven(steps[3])
	}
	pushed := r.pushes.Load()
	r.restart()
	r.proven(steps[3])
	if n := r.pushes.Load() - pushed; n > 0 && r.protocol == ProtocolDelta {
		t.Errorf("%d secrets were sent again to an Envoy that has them", n)
	}
	cancel()
	wg.Wait()
	t.Logf("%d connections, %d failed; %d streams ended for a new token, %d refused", calls.Load(), failures.Load(), r.reauths.Load(), r.refusals.Load())
	for _, s := range r.live() {
		if len(s.Names) == 0 {
			continue // it was opened just now, and nothing has been read yet
		}
		if s.Nacks != 0 || s.Protocol != r.protocol || s.Proxy != "envoy-under-test" {
			t.Errorf("report %+v", s)
		}
	}
	r.strangers(next)
}

// strangers checks who is refused, and that it is for that reason alone.
func (r *rig) strangers(a *authority) {
	t := r.t
	other := newAuthority(t, "other.example")
	trust, err := NewTrust(x509bundle.FromX509Authorities(a.td, []*x509.Certificate{a.root}), []*x509bundle.Bundle{other.bundle()}, 4)
	if err != nil {
		t.Fatal(err)
	}
	m := &Material{Identity: a.identity(ownID), Trust: trust}
	r.material.Set(m)
	r.proven(m)
	for _, tt := range []struct {
		who                string
		svid               *x509svid.SVID
		inbound, federated bool
	}{
		{"the peer", a.svid(peerID), true, true},
		{"somebody else of the trust domain", a.svid(elseID), false, true},
		{"another trust domain", other.svid("spiffe://other.example/x"), false, true},
		{"a trust domain that nobody knows", newAuthority(t, "unknown.example").svid("spiffe://unknown.example/x"), false, false},
		{"the peer, signed by another trust domain", other.svid(peerID), false, false},
		{"another trust domain, signed by ours", a.svid("spiffe://other.example/x"), false, false},
		{"the peer, signed by a root that was removed", r.svid(peerID), false, false},
	} {
		for listener, want := range map[string]bool{"inbound": tt.inbound, "federated": tt.federated} {
			accepted := func() bool { _, err := r.call(listener, tt.svid); return err == nil }
			if want {
				// Envoy acknowledges a secret a moment before its workers use it.
				r.eventually(fmt.Sprintf("%s at %s", tt.who, listener), accepted)
			} else if accepted() {
				t.Errorf("%s was accepted at %s", tt.who, listener)
			}
		}
	}
	if err := r.through("impostor"); err == nil {
		t.Error("Envoy accepted an upstream with another ID than the one it wants")
	}
	r.clientTLS.Store(other.svid(peerID))
	if err := r.through("outbound"); err == nil {
		t.Error("Envoy accepted an upstream that another trust domain vouches for")
	}
	r.clientTLS.Store(a.svid(peerID))
	if err := r.through("outbound"); err != nil {
		t.Errorf("the right upstream: %v", err)
	}
}

// What a real Envoy refuses is known by its own words, is not pushed again, and costs nothing: the last good one serves on.
func TestEnvoyRefuses(t *testing.T) {
	for _, apiType := range []string{"GRPC", "DELTA_GRPC"} {
		t.Run(apiType, func(t *testing.T) {
			r := startRig(t, apiType, false)
			good, _ := r.material.Get()
			r.proven(good)
			key, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader) // a curve that Envoy does not take
			if err != nil {
				t.Fatal(err)
			}
			leaf := r.sign(leafTemplate(ownID), r.inter, key.Public(), r.interKey)
			bad, err := NewIdentity(&x509svid.SVID{ID: spiffeid.RequireFromString(ownID), Certificates: []*x509.Certificate{leaf, r.inter}, PrivateKey: key})
			if err != nil {
				t.Fatal(err)
			}
			r.material.Set(&Material{Identity: bad, Trust: good.Trust})
			r.eventually("a refusal", func() bool {
				return slices.ContainsFunc(r.live(), func(s Report) bool { return s.Nacks > 0 })
			})
			if serial, err := r.call("inbound", r.clientTLS.Load()); err != nil || serial != good.Identity.Serial() {
				t.Errorf("after a refusal Envoy shows %s, %v; want the last good one, %s", serial, err, good.Identity.Serial())
			}
			for _, s := range r.live() {
				if s.Nacks > 0 {
					t.Logf("refused: %s", s.Nack)
				}
				if s.Nacks > 1 || s.Nacks == 1 && (s.Nack == "" || s.AckedSerial != good.Identity.Serial()) {
					t.Errorf("report %+v", s)
				}
			}
			better := &Material{Identity: r.identity(ownID), Trust: good.Trust}
			r.material.Set(better)
			r.proven(better)
			r.eventually("the next certificate", func() bool {
				serial, err := r.call("inbound", r.clientTLS.Load())
				return err == nil && serial == better.Identity.Serial()
			})
		})
	}
}
