package ca_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"log/slog"
	"math/big"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

// buffer is a log that is read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) count(s string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Count(b.b.String(), s)
}

// TestUpstreamRefused breaks one thing of each answer to a renewal. Nothing changes but that it is counted, logged and, as
// an intermediate may exist now, on the budget; each by a reason of its own.
//
// spiffe
// threat: F01, F03, F04, F06, F07, F08, F09, F10, F12
func TestUpstreamRefused(t *testing.T) {
	type answer func(t *testing.T, u *testUpstream, good *x509.Certificate, edit func(func(*x509.Certificate)) *x509.Certificate) []*x509.Certificate
	edited := func(change func(*x509.Certificate)) answer {
		return func(_ *testing.T, _ *testUpstream, _ *x509.Certificate, edit func(func(*x509.Certificate)) *x509.Certificate) []*x509.Certificate {
			return []*x509.Certificate{edit(change)}
		}
	}
	tests := []struct {
		reason api.Reason
		answer answer
	}{
		{api.UpstreamAnswer, func(*testing.T, *testUpstream, *x509.Certificate, func(func(*x509.Certificate)) *x509.Certificate) []*x509.Certificate {
			return nil
		}},
		{api.UpstreamKey, edited(func(c *x509.Certificate) { c.PublicKey = newKey(t).Public() })},
		{api.UpstreamAuthority, edited(func(c *x509.Certificate) { c.IsCA, c.MaxPathLen, c.MaxPathLenZero = false, -1, false })},
		{api.UpstreamPathLength, func(t *testing.T, u *testUpstream, good *x509.Certificate, _ func(func(*x509.Certificate)) *x509.Certificate) []*x509.Certificate {
			return below(t, u, good, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
		}},
		{api.UpstreamTrustDomain, edited(func(c *x509.Certificate) { c.URIs = mustURIs(t, "spiffe://other.org") })},
		{api.UpstreamChain, func(t *testing.T, u *testUpstream, good *x509.Certificate, _ func(func(*x509.Certificate)) *x509.Certificate) []*x509.Certificate {
			return below(t, u, good, nil)[:1]
		}},
		{api.UpstreamRoot, func(t *testing.T, _ *testUpstream, good *x509.Certificate, _ func(func(*x509.Certificate)) *x509.Certificate) []*x509.Certificate {
			other := anotherRoot(t)
			return []*x509.Certificate{other.resign(t, good), other.root}
		}},
		{api.UpstreamLifetime, edited(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(119 * time.Minute) })}, // two SVIDs last longer
		{api.UpstreamClock, edited(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(2 * time.Minute) })},
		{api.UpstreamSubject, edited(func(c *x509.Certificate) { c.RawSubject = nil; c.Subject = pkix.Name{} })},
		{api.UpstreamConstraints, edited(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"other.org"} })},
		{api.UpstreamAlgorithm, func(t *testing.T, u *testUpstream, good *x509.Certificate, _ func(func(*x509.Certificate)) *x509.Certificate) []*x509.Certificate {
			return []*x509.Certificate{sha1Named(t, good)}
		}},
		{api.UpstreamProbe, edited(func(c *x509.Certificate) { // valid by itself, and wants policies of all below
			c.ExtraExtensions = []pkix.Extension{
				{Id: []int{2, 5, 29, 32}, Value: []byte{0x30, 7, 0x30, 5, 6, 3, 0x2a, 3, 4}},
				{Id: []int{2, 5, 29, 36}, Critical: true, Value: []byte{0x30, 3, 0x80, 1, 0}},
			}
		})},
	}
	for _, tt := range tests {
		t.Run(string(tt.reason), func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				var log buffer
				b := newBare(t, func(cfg *ca.Config) { cfg.Log = slog.New(slog.NewTextHandler(&log, nil)) })
				b.start()
				before, generation, self := b.intermediate(), b.ca.Bundle().Generation, b.ca.Self()
				if before == nil {
					t.Fatal("no intermediate")
				}
				b.upstream.set(func(_ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
					good, err := b.upstream.mint(r)
					if err != nil {
						return nil, err
					}
					return tt.answer(t, b.upstream, good[0], func(change func(*x509.Certificate)) *x509.Certificate { return b.upstream.sign(t, r, change) }), nil
				})
				time.Sleep(8*time.Hour + time.Minute)
				asked := len(b.upstream.requests()) - 1
				if asked < 1 || asked > 20 {
					t.Fatalf("the root was asked %d times, and the budget is 20", asked)
				}
				if !b.intermediate().Equal(before) || b.ca.Bundle().Generation != generation || len(b.ca.NotReady()) > 0 {
					t.Error("a refused answer changed something")
				}
				if now := b.ca.Self(); now.Leaf.Issuer.String() != self.Leaf.Issuer.String() {
					t.Error("the CA's own identity is under what it refused")
				}
				if got := len(b.store.minted()); got != asked+1 {
					t.Errorf("%d intermediates are on record, want the first and %d that may exist", got, asked)
				}
				if got := metric(t, b.ca, "signet_ca_upstream_refusals_total", "reason", string(tt.reason)); got != float64(asked) {
					t.Errorf("%v refusals were counted by that reason, of %d", got, asked)
				}
				if log.count("reason="+string(tt.reason)) < asked {
					t.Error("the log does not say the reason each time")
				}
				b.upstream.set(nil)
				time.Sleep(2 * time.Hour) // past the budget
				if b.intermediate().Equal(before) {
					t.Error("the right answer was not taken up")
				}
			})
		})
	}
}

// resign returns a certificate as this root would have signed it.
func (u *testUpstream) resign(t *testing.T, c *x509.Certificate) *x509.Certificate {
	t.Helper()
	template := *c
	template.SerialNumber, template.AuthorityKeyId = big.NewInt(7), nil
	return signedBy(t, &template, u.root, c, u)
}

// anotherRoot is a root of the same trust domain.
func anotherRoot(t *testing.T) *testUpstream {
	t.Helper()
	key := newKey(t)
	root, err := issuance.NewRoot(spiffeTD(t, "example.org"), key, 10*365*day, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &testUpstream{root: root, key: key}
}

// below returns good under an authority between it and the root.
func below(t *testing.T, u *testUpstream, good *x509.Certificate, edit func(*x509.Certificate)) []*x509.Certificate {
	t.Helper()
	middle := &testUpstream{key: newKey(t)}
	template := *good
	template.SerialNumber, template.Subject.SerialNumber, template.RawSubject = big.NewInt(8), "between", nil
	template.SubjectKeyId, template.MaxPathLen, template.MaxPathLenZero = []byte("the key between these"), 1, false
	if edit != nil {
		edit(&template)
	}
	template.PublicKey = middle.key.Public()
	middle.root = signedBy(t, &template, u.root, &template, u)
	return []*x509.Certificate{middle.resign(t, good), middle.root}
}

func signedBy(t *testing.T, template, parent, subject *x509.Certificate, by *testUpstream) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, subject.PublicKey, by.key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// sha1Named is c as if it were signed with SHA-1, which crypto/x509 does not do: its names of the algorithm are changed.
func sha1Named(t *testing.T, c *x509.Certificate) *x509.Certificate {
	t.Helper()
	with256, with1 := []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2}, []byte{6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1}
	tbs := bytes.Replace(c.RawTBSCertificate, append([]byte{0x30, 10}, with256...), append([]byte{0x30, 9}, with1...), 1)
	var raw []byte
	raw = append(raw, relength(t, tbs)...)
	raw = append(raw, append([]byte{0x30, 9}, with1...)...)
	raw = append(raw, append([]byte{3, byte(len(c.Signature) + 1), 0}, c.Signature...)...)
	signed, err := x509.ParseCertificate(append([]byte{0x30, 0x82, byte(len(raw) >> 8), byte(len(raw))}, raw...))
	if err != nil {
		t.Error(err)
	}
	return signed
}

// relength writes the length of a sequence of some hundred bytes anew.
func relength(t *testing.T, der []byte) []byte {
	if der[1] != 0x82 {
		t.Error("another form of length")
	}
	n := len(der) - 4
	return append([]byte{0x30, 0x82, byte(n >> 8), byte(n)}, der[4:]...)
}

// TestUpstreamAskedAgain makes a request that failed again as it is: what was signed without being heard of is not signed
// twice. After an answer, good or bad, there is a new key.
func TestUpstreamAskedAgain(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		b := newBare(t, nil)
		step := 0
		b.upstream.set(func(_ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			step++
			switch step {
			case 1, 2:
				return nil, errors.New("connection reset")
			case 3:
				return []*x509.Certificate{b.upstream.root}, nil // no good
			case 4:
				return nil, api.E(api.UpstreamUnavailable, "sealed")
			}
			return b.upstream.mint(r)
		})
		b.start()
		time.Sleep(10 * time.Minute)
		asked := b.upstream.requests()
		if len(asked) != 5 || b.intermediate() == nil {
			t.Fatalf("asked %d times", len(asked))
		}
		same := func(i, j int) bool { return asked[i].ID == asked[j].ID && bytes.Equal(asked[i].CSR, asked[j].CSR) }
		if !same(0, 1) || !same(1, 2) || !asked[0].NotAfter.Equal(asked[2].NotAfter) {
			t.Error("what was asked in vain is asked for by another name")
		}
		if same(2, 3) || asked[2].ID == asked[3].ID {
			t.Error("the key of a refused answer is used again")
		}
		if !same(3, 4) {
			t.Error("what was asked in vain is asked for by another name after a refused answer")
		}
		for _, r := range asked {
			csr, err := x509.ParseCertificateRequest(r.CSR)
			if err != nil || csr.CheckSignature() != nil || issuance.Fingerprint(csr.PublicKey) != r.ID {
				t.Errorf("the request is not proven, or its id is not its key's: %v", err)
			}
		}
		if len(b.store.minted()) != 2 { // the refused one and the good one
			t.Errorf("on record: %v", b.store.minted())
		}
		// An hour later it is another request.
		b.upstream.set(func(context.Context, ca.MintRequest) ([]*x509.Certificate, error) {
			return nil, errors.New("connection reset")
		})
		time.Sleep(9 * time.Hour)
		ids := map[string]bool{}
		for _, r := range b.upstream.requests()[5:] {
			ids[r.ID] = true
		}
		if n := len(ids); n < 4 || n > 8 {
			t.Errorf("in an hour without an answer there were %d keys, want one each ten minutes", n)
		}
	})
}

// TestUpstreamVainOverRestarts starts a CA again and again while its upstream is away: it is asked no more often than by one
// that stays.
func TestUpstreamVainOverRestarts(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		b := newBare(t, nil)
		away := func(context.Context, ca.MintRequest) ([]*x509.Certificate, error) {
			return nil, api.E(api.UpstreamUnavailable, "connection refused")
		}
		b.upstream.set(away)
		b.start()
		time.Sleep(10 * time.Minute)
		if missing := b.ca.NotReady(); len(missing) != 1 || !strings.Contains(missing[0], "UPSTREAM_UNAVAILABLE") {
			t.Errorf("it is not ready for %q", missing)
		}
		asked := len(b.upstream.requests())
		for range 60 {
			b.restart()
			time.Sleep(10 * time.Second)
		}
		if n := len(b.upstream.requests()) - asked; n < 5 || n > 30 {
			t.Errorf("in ten minutes and 60 starts it was asked %d times, want one or two each minute", n)
		}
		b.upstream.set(nil)
		time.Sleep(2 * time.Minute)
		if b.intermediate() == nil {
			t.Fatal("the upstream is back, and there is no intermediate")
		}
		asked = len(b.upstream.requests())
		b.restart()
		if n := len(b.upstream.requests()) - asked; n != 1 || b.intermediate() == nil {
			t.Errorf("all is well, and a start waits: asked %d times", n)
		}
	})
}

// TestUpstreamClockAhead uses what an upstream signed whose clock is ahead once it is valid, and not before.
//
// threat: K04
func TestUpstreamClockAhead(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		b := newBare(t, nil)
		b.upstream.set(func(_ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			return []*x509.Certificate{b.upstream.sign(t, r, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(40 * time.Second) })}, nil
		})
		b.start()
		time.Sleep(38 * time.Second)
		if b.intermediate() != nil {
			t.Error("it is used before it is valid")
		}
		time.Sleep(3 * time.Second)
		c := b.intermediate()
		if c == nil {
			t.Fatal("it is valid, and not used")
		}
		if len(b.upstream.requests()) != 1 || time.Now().Before(c.NotBefore) {
			t.Errorf("asked %d times, valid from %s", len(b.upstream.requests()), c.NotBefore)
		}
	})
}

// TestUpstreamAnnounces has an upstream tell of roots: they are shown, and nothing else comes of them.
//
// threat: F11
func TestUpstreamAnnounces(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		var log buffer
		b := newBare(t, func(cfg *ca.Config) { cfg.Log = slog.New(slog.NewTextHandler(&log, nil)) })
		b.upstream.roots = make(chan []*x509.Certificate)
		b.start()
		before := b.ca.Bundle()
		announced := func(want ...*x509.Certificate) {
			t.Helper()
			synctest.Wait()
			got, _ := b.ca.AnnouncedRoots()
			if len(got) != len(want) || len(want) > 0 && !got[0].Equal(want[0]) {
				t.Errorf("%d roots are announced, want %d", len(got), len(want))
			}
			if m := metric(t, b.ca, "signet_ca_upstream_roots_announced"); m != float64(len(want)) {
				t.Errorf("the metric says %v, want %d", m, len(want))
			}
			if b.ca.Bundle() != before {
				t.Error("the bundle changed")
			}
		}
		own, next := b.upstream.root, anotherRoot(t).root
		b.upstream.roots <- []*x509.Certificate{own}
		announced()
		_, changed := b.ca.AnnouncedRoots()
		b.upstream.roots <- []*x509.Certificate{own, next, nil, next}
		announced(next)
		select {
		case <-changed:
		default:
			t.Error("nobody who waits is told")
		}
		b.upstream.roots <- []*x509.Certificate{next}
		announced(next)
		if n := log.count("the upstream announces a root"); n != 1 {
			t.Errorf("it is said %d times", n)
		}
		b.upstream.roots <- []*x509.Certificate{own}
		announced()
		var many []*x509.Certificate
		for range 20 {
			many = append(many, anotherRoot(t).root)
		}
		b.upstream.roots <- many
		announced(many[:16]...)
		// A watch that breaks is begun again, with pauses.
		close(b.upstream.roots)
		time.Sleep(time.Hour)
		if n := log.count("the upstream does not tell its roots"); n < 30 || n > 150 {
			t.Errorf("in an hour it was asked %d times", n)
		}
	})
}

// TestUpstreamProbed shows that an upstream would not sign long before it is needed, and again that it would.
func TestUpstreamProbed(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		var log buffer
		b := newBare(t, func(cfg *ca.Config) {
			cfg.Log, cfg.UpstreamKind = slog.New(slog.NewTextHandler(&log, nil)), "a test's"
		})
		wantReason(t, b.mustCA().ProbeUpstream(t.Context()), api.CAUnavailable)
		b.start()
		up := func(want float64) {
			t.Helper()
			if got := metric(t, b.ca, "signet_ca_upstream_up"); got != want {
				t.Errorf("the metric says %v, want %v", got, want)
			}
		}
		up(1)
		status := func() *apiv1.UpstreamStatus {
			t.Helper()
			resp, err := b.admin.GetStatus(t.Context(), &apiv1.GetStatusRequest{})
			if err != nil {
				t.Fatal(api.FromStatus(err))
			}
			return resp.GetUpstream()
		}
		good := status()
		if !good.GetHealthy() || good.GetReason() != "" || good.GetKind() != "a test's" || good.GetSince() == nil || len(good.GetAnnounced()) > 0 {
			t.Errorf("its status: %v", good)
		}
		b.upstream.setDown(api.E(api.UpstreamFiles, "they do not fit"))
		time.Sleep(6 * time.Minute)
		up(0)
		if s := status(); s.GetHealthy() || s.GetReason() != string(api.UpstreamFiles) || s.GetDetail() != "they do not fit" || s.GetIntermediateNotAfter() == nil ||
			!s.GetSince().AsTime().After(good.GetSince().AsTime()) || !s.GetProbedAt().AsTime().After(s.GetSince().AsTime()) {
			t.Errorf("its status: %v", s)
		}
		wantReason(t, b.ca.ProbeUpstream(t.Context()), api.UpstreamFiles)
		if len(b.ca.NotReady()) > 0 || b.intermediate() == nil {
			t.Error("an upstream that is away makes the CA unready while its intermediate lives")
		}
		time.Sleep(time.Hour)
		b.upstream.setDown(nil)
		time.Sleep(6 * time.Minute)
		up(1)
		if log.count("the upstream would not sign") != 1 || log.count("the upstream would sign again") != 1 || log.count("reason=UPSTREAM_FILES") != 1 {
			t.Error("it is not said once each way")
		}
		if len(b.upstream.requests()) != 1 {
			t.Error("a probe asked for an intermediate")
		}
	})
}

// crossSigner is a testUpstream that signs roots, or answers as instead says.
type crossSigner struct {
	*testUpstream
	instead func(*crossSigner) (*x509.Certificate, error)
}

func signer(instead func(*crossSigner) (*x509.Certificate, error)) func(*testUpstream) ca.Upstream {
	return func(u *testUpstream) ca.Upstream { return &crossSigner{u, instead} }
}

// CrossSign implements ca.CrossSigner.
func (s *crossSigner) CrossSign(_ context.Context, td spiffeid.TrustDomain, _ journal.Authority, newer *x509.Certificate) (*x509.Certificate, error) {
	if s.instead != nil {
		return s.instead(s)
	}
	return issuance.CrossSign(td, s.root, s.key, newer, time.Now())
}

// TestCrossSign has one root vouch for another, on record, and takes nothing for it that is not that.
func TestCrossSign(t *testing.T) {
	next := anotherRoot(t)
	authority := func(u *testUpstream, s journal.State) journal.Authority {
		return journal.Authority{ID: hex.EncodeToString(u.root.SubjectKeyId), State: s, Certificate: u.root.Raw}
	}
	for _, tt := range []struct {
		name         string
		older, newer journal.State
		up           func(*testUpstream) ca.Upstream
		want         api.Reason
	}{
		{"good", journal.Active, journal.Prepared, signer(nil), ""},
		{"published already", journal.Active, journal.Published, signer(nil), ""},
		{"by one that retires", journal.Retiring, journal.Active, signer(nil), ""},
		{"by one that is suspected", journal.Tainted, journal.Prepared, signer(nil), api.UpstreamCross},
		{"by one that is removed", journal.Removed, journal.Prepared, signer(nil), api.UpstreamCross},
		{"by one that nobody trusts yet", journal.Published, journal.Prepared, signer(nil), api.UpstreamCross},
		{"for one that is suspected", journal.Active, journal.Tainted, signer(nil), api.UpstreamCross},
		{"an upstream that signs none", journal.Active, journal.Prepared, func(u *testUpstream) ca.Upstream { return u }, api.UpstreamCross},
		{"an upstream that is away", journal.Active, journal.Prepared, signer(func(*crossSigner) (*x509.Certificate, error) {
			return nil, api.E(api.UpstreamUnavailable, "connection refused")
		}), api.UpstreamUnavailable},
		{"nothing", journal.Active, journal.Prepared, signer(func(*crossSigner) (*x509.Certificate, error) { return nil, nil }), api.UpstreamCross},
		{"the older root", journal.Active, journal.Prepared, signer(func(s *crossSigner) (*x509.Certificate, error) { return s.root, nil }), api.UpstreamCross},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBare(t, nil)
			b.config.Upstream = tt.up(b.upstream)
			cross, err := b.mustCA().CrossSign(t.Context(), authority(b.upstream, tt.older), authority(next, tt.newer))
			if tt.want == "" && err != nil {
				t.Fatal(err)
			}
			if tt.want != "" {
				wantReason(t, err, tt.want)
				if cross != nil {
					t.Error("a cross certificate all the same")
				}
				return
			}
			if err := cross.CheckSignatureFrom(b.upstream.root); err != nil || !bytes.Equal(cross.RawSubject, next.root.RawSubject) {
				t.Errorf("another certificate: %v", err)
			}
			if e := b.ledger.all(); len(e) != 1 || e[0].Issuer != hexOf(b.upstream.root.SubjectKeyId) {
				t.Errorf("on record: %+v", e)
			}
			b.ledger.set(errors.New("no space left"), nil)
			if cross, err := b.mustCA().CrossSign(t.Context(), authority(b.upstream, tt.older), authority(next, tt.newer)); err == nil || cross != nil {
				t.Error("signed without being on record")
			}
		})
	}
}
