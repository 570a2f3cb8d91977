package workloadapi

import (
	"crypto/x509"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
)

// The first response leaves at once where there is one, and the moment that there is one where there is none yet. The
// bundle alone is there before the identity; the identity never before the bundle.
//
// spiffe
func TestFirst(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		svids, bundles := w.svids(), w.bundles()
		time.Sleep(time.Hour)
		svids.silent()
		svid := p.svid(ownID)
		p.Set(&Snapshot{SVIDs: []*x509svid.SVID{svid}})
		svids.silent()
		bundles.silent()
		p.Set(&Snapshot{Bundle: p.bundle(), Generation: 1})
		if got := bundles.next().GetBundles(); len(got) != 1 || !slices.Equal(got["spiffe://"+td], p.root.Raw) {
			t.Errorf("bundles of %v", slices.Collect(maps.Keys(got)))
		}
		svids.silent()
		p.change(func(s *Snapshot) { s.SVIDs = []*x509svid.SVID{svid} })
		parse(t, svids.next())
		bundles.silent() // nothing of it has changed
		start := time.Now()
		parse(t, w.svids().next())
		w.bundles().next()
		if took := time.Since(start); took != 0 {
			t.Errorf("a first response took %v", took)
		}
	})
}

// Every message holds all there is: what is gone from one is gone. Nothing is sent twice.
//
// spiffe, B-08
func TestFederated(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		other, third := newAuthority(t, "other.example"), newAuthority(t, "third.example")
		snap := p.give(1)
		svids, bundles := w.svids(), w.bundles()
		svids.next()
		bundles.next()
		for n, tc := range []struct {
			federated []*x509bundle.Bundle
			want      []string
			changed   bool
		}{
			{[]*x509bundle.Bundle{other.bundle(), third.bundle()}, []string{"spiffe://other.example", "spiffe://third.example"}, true},
			{[]*x509bundle.Bundle{third.bundle(), other.bundle()}, nil, false},
			{[]*x509bundle.Bundle{third.bundle()}, []string{"spiffe://third.example"}, true},
			{[]*x509bundle.Bundle{third.bundle(), x509bundle.New(other.td)}, nil, false},
			{[]*x509bundle.Bundle{x509bundle.New(third.td)}, nil, true},
		} {
			next := *snap
			next.Generation, next.Federated = uint64(n+2), tc.federated
			p.Set(&next)
			if !tc.changed {
				svids.silent()
				bundles.silent()
				continue
			}
			m := svids.next()
			parse(t, m)
			if got := slices.Sorted(maps.Keys(m.GetFederatedBundles())); !slices.Equal(got, tc.want) {
				t.Errorf("foreign bundles of %v, want %v", got, tc.want)
			}
			want := append(slices.Clone(tc.want), "spiffe://"+td)
			slices.Sort(want)
			if got := slices.Sorted(maps.Keys(bundles.next().GetBundles())); !slices.Equal(got, want) {
				t.Errorf("bundles of %v, want %v", got, want)
			}
		}
	})
}

// What changes is sent at once and once; what does not is never sent again, whatever else the Source says.
func TestChanges(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		root := p.newRoot()
		snap := p.give(1)
		svids := w.svids()
		svids.next() // the first stream
		bundles := w.bundles()
		bundles.next()

		p.Set(new(*snap))
		p.change(func(s *Snapshot) { s.Generation = 2 }) // the same roots
		svids.silent()
		bundles.silent()
		if d := p.last(1); d.Generation != 2 || d.Serial == "" {
			t.Errorf("delivery %+v, want generation 2: the client holds those roots", d)
		}

		p.change(func(s *Snapshot) { s.SVIDs = []*x509svid.SVID{p.svid(ownID)} })
		if got := parse(t, svids.next()); !got[0].Certificates[0].Equal(p.Load().SVIDs[0].Certificates[0]) {
			t.Error("not the new SVID")
		}
		bundles.silent()

		p.change(func(s *Snapshot) { s.Bundle, s.Generation = p.bundle(root), 3 })
		parse(t, svids.next())
		bundles.next()
		p.change(func(s *Snapshot) { // another order of the same roots
			s.Bundle = x509bundle.FromX509Authorities(p.td, []*x509.Certificate{root, p.root})
		})
		svids.silent()
		bundles.silent()
	})
}

// While the CA is away nothing is withdrawn; an SVID that expired is not sent to anybody, and streams wait.
func TestExpired(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		p.give(1)
		old := w.svids()
		old.next()
		time.Sleep(24*time.Hour + time.Minute)
		old.silent()
		late := w.svids() // the Source has not noticed
		late.silent()
		p.change(func(s *Snapshot) { s.SVIDs = nil })
		old.silent()
		late.silent()
		p.change(func(s *Snapshot) { s.Bundle, s.Generation = p.bundle(p.newRoot()), 2 })
		late.silent() // no response without an identity
		p.give(3)
		old.next()
		late.next()
	})
}

// A workload that has no identity and will have none is told so by the one code that says it, whatever the reason: its
// clients stop using what they hold, and come back later. So ends an identity whose pod is gone.
//
// spiffe: E-06
func TestRefused(t *testing.T) {
	for _, reason := range []api.Reason{api.PodDeleted, api.NamespaceNotAllowed, api.TokenExpired, api.EvidenceKind, api.CSRMalformed} {
		t.Run(string(reason), func(t *testing.T) {
			bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
				p.give(1)
				svids, bundles := w.svids(), w.bundles()
				svids.next()
				bundles.next()
				p.change(func(s *Snapshot) { s.Refused = &api.Error{Reason: reason, Detail: "no", CorrelationID: "c0ffee"} })
				svids.ends(codes.PermissionDenied, reason)
				bundles.ends(codes.PermissionDenied, reason)
				if e := api.AsError(api.FromStatus(svids.err)); e.CorrelationID != "c0ffee" || e.Detail != "no" {
					t.Errorf("error %+v", e)
				}
				w.svids().ends(codes.PermissionDenied, reason)
				p.give(2) // it may change
				w.svids().next()
				if p.ends()[reason] != 3 {
					t.Errorf("ends %v", p.ends())
				}
			})
		})
	}
}

// What must not reach a workload does not, and the last good thing stays, for streams that are open and for new ones.
//
// threat: D18, D19, D23
func TestLastGood(t *testing.T) {
	notCA := func(p *pod) *x509.Certificate { return p.svid(ownID).Certificates[0] }
	for _, tc := range []struct {
		name string
		bad  func(p *pod, s *Snapshot)
	}{
		{"no bundle", func(p *pod, s *Snapshot) { s.Bundle = nil }},
		{"empty bundle", func(p *pod, s *Snapshot) { s.Bundle = x509bundle.New(p.td) }},
		{"a root that is none", func(p *pod, s *Snapshot) { s.Bundle = p.bundle(notCA(p)) }},
		{"a bundle twice", func(p *pod, s *Snapshot) { s.Federated = []*x509bundle.Bundle{p.bundle()} }},
		{"a foreign root that is none", func(p *pod, s *Snapshot) {
			s.Federated = []*x509bundle.Bundle{x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString("other.example"), []*x509.Certificate{notCA(p)})}
		}},
		{"a foreign bundle that is none", func(p *pod, s *Snapshot) { s.Federated = []*x509bundle.Bundle{nil} }},
		{"more than a client takes", func(p *pod, s *Snapshot) { s.Federated = hugeBundles(p) }},
		{"no certificate", func(p *pod, s *Snapshot) { s.SVIDs = []*x509svid.SVID{{ID: s.SVIDs[0].ID}} }},
		{"nil", func(p *pod, s *Snapshot) { s.SVIDs = []*x509svid.SVID{nil} }},
		{"another key", func(p *pod, s *Snapshot) {
			svid := p.svid(ownID)
			svid.PrivateKey = newKey(p.t)
			s.SVIDs = []*x509svid.SVID{svid}
		}},
		{"another name", func(p *pod, s *Snapshot) {
			svid := p.svid(ownID)
			svid.ID = spiffeid.RequireFromString(alsID)
			s.SVIDs = []*x509svid.SVID{svid}
		}},
		{"root in the chain", func(p *pod, s *Snapshot) {
			svid := p.svid(ownID)
			svid.Certificates = append(svid.Certificates, p.root)
			s.SVIDs = []*x509svid.SVID{svid}
		}},
		{"chain out of order", func(p *pod, s *Snapshot) {
			svid := p.svid(ownID)
			svid.Certificates = append(svid.Certificates, newAuthority(p.t, td).inter)
			s.SVIDs = []*x509svid.SVID{svid}
		}},
		{"an authority", func(p *pod, s *Snapshot) {
			s.SVIDs = []*x509svid.SVID{p.svid(ownID, func(c *x509.Certificate) { c.IsCA = true })}
		}},
		{"the second is bad", func(p *pod, s *Snapshot) { s.SVIDs = []*x509svid.SVID{p.svid(ownID), nil} }},
		{"two trust domains", func(p *pod, s *Snapshot) {
			s.SVIDs = []*x509svid.SVID{p.svid(ownID), newAuthority(p.t, "other.example").svid("spiffe://other.example/x")}
		}},
		{"another trust domain than the bundle", func(p *pod, s *Snapshot) {
			s.SVIDs = []*x509svid.SVID{newAuthority(p.t, "other.example").svid("spiffe://other.example/x")}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
				p.give(1)
				svids, bundles := w.svids(), w.bundles()
				good, goodBundles := svids.next(), bundles.next()
				p.change(func(s *Snapshot) { tc.bad(p, s) })
				svids.silent()
				bundles.silent()
				if got := w.svids().next(); !proto.Equal(got, good) {
					t.Error("a new stream gets something else")
				}
				if got := w.bundles().next(); !proto.Equal(got, goodBundles) {
					t.Error("a new stream gets other bundles")
				}
				p.Set(nil)
				svids.silent()
				p.give(2)
				svids.next()
			})
		})
	}
}

// hugeBundles are more than a client takes, of one small authority.
func hugeBundles(p *pod) []*x509bundle.Bundle {
	key := newKey(p.t)
	tmpl := caTemplate("huge")
	tmpl.Subject.Organization = []string{string(slices.Repeat([]byte("x"), 64<<10))}
	root := p.sign(tmpl, nil, key.Public(), key)
	var all []*x509bundle.Bundle
	for n := range 40 {
		td := spiffeid.RequireTrustDomainFromString("huge" + string(rune('a'+n%26)) + string(rune('a'+n/26)) + ".example")
		all = append(all, x509bundle.FromX509Authorities(td, []*x509.Certificate{root}))
	}
	return all
}

// What was handed to a stream is told of it, and nothing of what was not: never more than delivered.
func TestDelivered(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		svids := w.svids()
		svids.silent() // the first stream
		bundles := w.bundles()
		bundles.silent()
		if diff := cmp.Diff([]Delivery{{Stream: 1, Call: CallSVID, Open: true}}, p.all(1)); diff != "" {
			t.Error(diff)
		}
		time.Sleep(time.Minute)
		at := time.Now()
		snap := p.give(7)
		svids.next()
		bundles.next()
		hash := api.BundleHash(snap.Bundle.X509Authorities())
		want := Delivery{Stream: 1, Call: CallSVID, Open: true, At: at, Generation: 7, Hash: hash, Serial: snap.SVIDs[0].Certificates[0].SerialNumber.Text(16)}
		if len(want.Serial)%2 == 1 {
			want.Serial = "0" + want.Serial
		}
		if diff := cmp.Diff(want, p.last(1)); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(Delivery{Stream: 2, Call: CallBundles, Open: true, At: at, Generation: 7, Hash: hash}, p.last(2)); diff != "" {
			t.Error(diff)
		}
		svids.cancel()
		synctest.Wait()
		want.Open = false
		if diff := cmp.Diff(want, p.last(1)); diff != "" {
			t.Error(diff)
		}
		p.give(8)
		synctest.Wait()
		if d := p.last(1); d.Open || d.Generation != 7 {
			t.Errorf("a stream that ended is told of again: %+v", d)
		}
		if p.ends()[""] != 1 {
			t.Errorf("ends %v", p.ends())
		}
	})
}
