package upstream

import (
	"bytes"
	"context"
	"crypto/x509"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

// A setup is how a test opens a driver.
type setup struct {
	config Config
	parts  Parts
	// change makes the upstream sign under another root, as its owner would; nil where its roots are in the record.
	change func(t *testing.T) *x509.Certificate
	cross  bool // it holds the root's own key
}

// setups says for each driver how a test opens it: DRIVER/VARIANT. A driver without one fails TestConformance: nothing is
// linked into the CA that was not seen to mint.
var setups = map[string]func(t *testing.T) setup{
	"selfsigned/p256": func(t *testing.T) setup {
		return setup{config: Config{Kind: "selfsigned"}, parts: Parts{Sealer: newSealer(t)}, cross: true}
	},
	"selfsigned/p384": func(t *testing.T) setup {
		return setup{config: Config{Kind: "selfsigned", Key: "ecdsa-p384", TTL: 24 * time.Hour}, parts: Parts{Sealer: newSealer(t)}, cross: true}
	},
	"disk/root": func(t *testing.T) setup {
		f := newFiles(t)
		f.write(t, newRoot(t))
		return setup{config: f.config(false), cross: true, change: func(t *testing.T) *x509.Certificate {
			next := newRoot(t)
			f.write(t, next)
			return next.root
		}}
	},
	"disk/intermediate": func(t *testing.T) setup {
		f := newFiles(t)
		f.write(t, newRoot(t).below(t, nil))
		return setup{config: f.config(true), change: func(t *testing.T) *x509.Certificate {
			next := newRoot(t).below(t, nil)
			f.write(t, next)
			return next.root
		}}
	},
}

// TestConformance holds every driver to what ca.Upstream, ca.Founder and ca.CrossSigner promise, as the CA checks it.
//
// spiffe
func TestConformance(t *testing.T) {
	seen := map[string]bool{}
	for name := range setups {
		kind, _, _ := strings.Cut(name, "/")
		if seen[kind] = true; !slices.Contains(Kinds(), kind) {
			t.Errorf("there is a setup for %q, which is no driver", kind)
		}
	}
	for _, kind := range Kinds() {
		if !seen[kind] {
			t.Errorf("driver %q has no setup: add one, so that it is tested", kind)
		}
	}
	for name, set := range setups {
		t.Run(name, func(t *testing.T) {
			for what, test := range map[string]func(*testing.T, setup){
				"mints": conformMint, "once": conformOnce, "lifetime": conformLifetime, "refuses": conformRefuses, "deadline": conformDeadline,
				"concurrent": conformConcurrent, "roots": conformRoots, "restart": conformRestart, "cross": conformCross,
			} {
				t.Run(what, func(t *testing.T) { test(t, set(t)) })
			}
		})
	}
}

// opened opens the upstream and its root.
func (s setup) opened(t *testing.T) (ca.Upstream, journal.Authority, *x509.Certificate) {
	t.Helper()
	up := open(t, s.config, s.parts)
	f, ok := up.(ca.Founder)
	if !ok {
		t.Fatal("the driver brings no root: its setup must") // once there is such a driver
	}
	a, err := f.Found(t.Context(), td, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := journal.New(td, a); err != nil {
		t.Fatalf("the root does not fit into a record: %v", err)
	}
	return up, a, parse(t, a)
}

func conformMint(t *testing.T, s setup) {
	up, root, cert := s.opened(t)
	if err := up.Probe(t.Context(), td, root); err != nil {
		t.Errorf("Probe: %v", err)
	}
	for _, exclude := range []bool{false, true} {
		mintAndSign(t, up, root, cert, exclude)
	}
}

// mintAndSign has up sign an intermediate, checks it as the CA does, and issues a leaf below it.
func mintAndSign(t *testing.T, up ca.Upstream, root journal.Authority, cert *x509.Certificate, exclude bool) {
	t.Helper()
	r, key := requestWithKey(t, root, exclude)
	r.NotAfter = time.Now().Add(20 * time.Hour)
	chain, err := up.Mint(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	roots := []*x509.Certificate{cert}
	checked, err := issuance.CheckIntermediate(issuance.IntermediateCheck{
		TrustDomain: td, PublicKey: key.Public(), Chain: chain, Roots: roots, Authorities: roots, MinLifetime: 19 * time.Hour,
	}, now)
	if err != nil {
		t.Fatalf("the CA would refuse the intermediate: %v", err)
	}
	if checked.NotAfter.After(r.NotAfter) {
		t.Errorf("the intermediate lives until %s, longer than was asked for (%s)", checked.NotAfter, r.NotAfter)
	}
	if slices.Contains(checked.Warnings, issuance.WarnNames) == exclude {
		t.Errorf("with ExcludeNames %t the warnings are %v", exclude, checked.Warnings)
	}
	issuer, err := issuance.NewIssuer(td, checked.Chain, checked.Root, key)
	if err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromPath(td, "/ns/shop/sa/web")
	prepared, err := issuance.Prepare(issuance.Profile{}, issuance.Request{ID: id, PublicKey: newKey(t).Public()}, issuer, now)
	if err != nil {
		t.Fatal(err)
	}
	issued, err := prepared.Sign()
	if err != nil {
		t.Fatal(err)
	}
	if err := issuance.Verify(append([]*x509.Certificate{issued.Leaf}, checked.Chain...), roots, id, now); err != nil {
		t.Errorf("a leaf below the intermediate does not verify: %v", err)
	}
}

// conformOnce asks twice for the same.
func conformOnce(t *testing.T, s setup) {
	up, root, _ := s.opened(t)
	r := request(t, root)
	first, err := up.Mint(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	again, err := up.Mint(t.Context(), r)
	if err != nil || !slices.EqualFunc(first, again, (*x509.Certificate).Equal) {
		t.Errorf("asked again, it signed another one: %v", err)
	}
	other := request(t, root)
	other.ID = r.ID
	if chain, err := up.Mint(t.Context(), other); err == nil && chain[0].Equal(first[0]) {
		t.Error("an answer was given to another request")
	}
}

func conformLifetime(t *testing.T, s setup) {
	up, root, cert := s.opened(t)
	for _, want := range []time.Duration{time.Hour, 100 * 365 * 24 * time.Hour} {
		r := request(t, root)
		r.NotAfter = time.Now().Add(want)
		chain, err := up.Mint(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		if end := chain[0].NotAfter; end.After(r.NotAfter) || end.After(cert.NotAfter) || time.Until(end) < min(want, time.Hour)-time.Minute {
			t.Errorf("asked for %s it ends at %s, and its root at %s", want, end, cert.NotAfter)
		}
	}
}

func conformRefuses(t *testing.T, s setup) {
	up, root, _ := s.opened(t)
	foreign := newRoot(t)
	other, err := issuance.NewIntermediateCSR(spiffeid.RequireTrustDomainFromString("example.com"), newKey(t), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		change func(*ca.MintRequest)
		want   []api.Reason
	}{
		{"a root that it does not have", func(r *ca.MintRequest) { r.Root = foreign.authority() }, []api.Reason{api.UpstreamRoot}},
		{"a key that is not proven", func(r *ca.MintRequest) { r.CSR[len(r.CSR)-1] ^= 1 }, []api.Reason{api.CSRSignature, api.UpstreamRefused}},
		{"no request", func(r *ca.MintRequest) { r.CSR = nil }, []api.Reason{api.CSRMalformed, api.UpstreamRefused}},
		{"another trust domain", func(r *ca.MintRequest) { r.CSR = other }, []api.Reason{api.IDMismatch, api.UpstreamRefused}},
		{"no time left", func(r *ca.MintRequest) { r.NotAfter = time.Now().Add(-time.Second) }, []api.Reason{api.ConfigInvalid, api.UpstreamRefused}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := request(t, root)
			r.CSR = bytes.Clone(r.CSR)
			tt.change(&r)
			if chain, err := up.Mint(t.Context(), r); chain != nil || !slices.Contains(tt.want, api.ReasonOf(err)) {
				t.Errorf("Mint = %d certificates, %v; want %v", len(chain), err, tt.want)
			}
		})
	}
	if err := up.Probe(t.Context(), td, foreign.authority()); api.ReasonOf(err) != api.UpstreamRoot {
		t.Errorf("Probe of a root that it does not have: %v", err)
	}
	if err := up.Probe(t.Context(), spiffeid.RequireTrustDomainFromString("example.com"), root); err == nil && s.cross { // an issuer in between may say of none
		t.Error("Probe for another trust domain has nothing to say")
	}
	if _, err := up.Mint(t.Context(), request(t, root)); err != nil {
		t.Errorf("after all that it no longer mints: %v", err)
	}
}

// conformDeadline asks with a context that has ended: an answer or an error will do, but it comes.
func conformDeadline(t *testing.T, s setup) {
	up, root, _ := s.opened(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if chain, err := up.Mint(ctx, request(t, root)); err == nil && len(chain) == 0 {
		t.Error("neither an intermediate nor an error")
	}
	_ = up.Probe(ctx, td, root)
	if err := up.WatchRoots(ctx, func([]*x509.Certificate) {}); err != nil {
		t.Errorf("WatchRoots: %v", err)
	}
}

func conformConcurrent(t *testing.T, s setup) {
	up, root, _ := s.opened(t)
	shared := request(t, root)
	var wg sync.WaitGroup
	var mu sync.Mutex
	one, each := map[string]bool{}, map[string]bool{}
	for range 8 {
		wg.Go(func() {
			chain, err := up.Mint(t.Context(), shared)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
				return
			}
			one[string(chain[0].Raw)] = true
		})
		own := request(t, root)
		wg.Go(func() {
			chain, err := up.Mint(t.Context(), own)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
				return
			}
			each[issuance.SerialString(chain[0].SerialNumber)] = true
		})
		wg.Go(func() {
			if err := up.Probe(t.Context(), td, root); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(one) != 1 || len(each) != 8 {
		t.Errorf("one request gave %d intermediates, eight gave %d", len(one), len(each))
	}
}

// conformRoots changes the root under which the upstream signs: it is told, and nothing is signed under it.
func conformRoots(t *testing.T, s setup) {
	up, root, cert := s.opened(t)
	if d, ok := up.(*disk); ok {
		d.pause = time.Millisecond
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	told := make(chan []*x509.Certificate)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := up.WatchRoots(ctx, func(roots []*x509.Certificate) {
			select {
			case told <- roots:
			case <-ctx.Done():
			}
		}); err != nil {
			t.Errorf("WatchRoots: %v", err)
		}
	})
	defer wg.Wait()
	defer cancel()
	if s.change == nil {
		select {
		case roots := <-told:
			for _, c := range roots {
				if !c.Equal(cert) {
					t.Error("it tells of a root that is nobody's")
				}
			}
		default:
		}
		return
	}
	await := func(want *x509.Certificate) {
		t.Helper()
		for {
			select {
			case roots := <-told:
				if len(roots) == 1 && roots[0].Equal(want) {
					return
				}
			case <-ctx.Done():
				t.Fatal("the root was not told")
			}
		}
	}
	await(cert)
	await(s.change(t))
	if chain, err := up.Mint(t.Context(), request(t, root)); api.ReasonOf(err) != api.UpstreamRoot || chain != nil {
		t.Errorf("under a root that it no longer has: %d certificates, %v", len(chain), err)
	}
	if err := up.Probe(t.Context(), td, root); api.ReasonOf(err) != api.UpstreamRoot {
		t.Errorf("Probe: %v", err)
	}
}

func conformRestart(t *testing.T, s setup) {
	_, root, cert := s.opened(t)
	mintAndSign(t, open(t, s.config, s.parts), root, cert, false)
}

func conformCross(t *testing.T, s setup) {
	up, root, cert := s.opened(t)
	c, ok := up.(ca.CrossSigner)
	if !ok {
		if s.cross {
			t.Error("it holds the root's key and signs no other root")
		}
		return
	}
	next := newRoot(t)
	cross, err := c.CrossSign(t.Context(), td, root, next.root)
	can := c.(ca.CrossProber)
	if !s.cross {
		if api.ReasonOf(err) != api.UpstreamRoot || cross != nil {
			t.Errorf("without the root's key: %v", err)
		}
		if err := can.CanCross(t.Context(), td, root); api.ReasonOf(err) != api.UpstreamRoot {
			t.Errorf("without the root's key it says beforehand: %v", err)
		}
		return
	}
	if err := can.CanCross(t.Context(), td, root); err != nil {
		t.Errorf("it says beforehand: %v", err)
	}
	if err := can.CanCross(t.Context(), td, next.authority()); api.ReasonOf(err) != api.UpstreamRoot {
		t.Errorf("of a root that it does not have it says beforehand: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := issuance.CheckCross(issuance.CrossCheck{TrustDomain: td, Cross: cross, Older: cert, Newer: next.root}, time.Now()); err != nil {
		t.Errorf("the CA would refuse it: %v", err)
	}
	if cross, err := c.CrossSign(t.Context(), td, next.authority(), cert); api.ReasonOf(err) != api.UpstreamRoot || cross != nil {
		t.Errorf("by a root that it does not have: %v", err)
	}
}
