package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

const day = 24 * time.Hour

// TestIntermediates issues once an hour for days: each intermediate is replaced at a third of its life, no leaf outlives
// its own, each leaf verifies under the bundle, and no request fails.
//
// spiffe: X-13
func TestIntermediates(t *testing.T) {
	days := 4
	if testing.Short() {
		days = 1
	}
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{Policy: ca.PolicyFile{TTL: 2 * time.Hour}})
		p := s.Pod("shop", "web", "web", "node-1")
		first := map[string]time.Time{} // intermediate to its first leaf
		for range days * 24 {
			n := newNode(t, s, "node-1")
			svid, err := n.session().issue(n.item(p))
			if err != nil {
				t.Fatalf("at %s: %v", time.Now(), err)
			}
			leaf, intermediate := leafOf(t, svid), intermediateOf(t, svid)
			if leaf.NotAfter.After(intermediate.NotAfter) {
				t.Errorf("a leaf outlives its issuer: %s, %s", leaf.NotAfter, intermediate.NotAfter)
			}
			roots := x509bundle.FromX509Authorities(s.TD, s.CA().Bundle().Roots)
			if _, _, err := x509svid.ParseAndVerify(svid.GetChain(), roots, x509svid.WithTime(time.Now())); err != nil {
				t.Error(err)
			}
			if id := string(intermediate.SubjectKeyId); first[id].IsZero() {
				first[id] = time.Now()
				if got := time.Until(intermediate.NotAfter); got < 16*time.Hour || got > day {
					t.Errorf("an intermediate lives for %s more, want 16 h to 24 h", got)
				}
			}
			time.Sleep(time.Hour)
		}
		if n := len(first); n < 3*days || n > 3*days+1 { // every eight hours
			t.Errorf("%d intermediates in %d days, want %d", n, days, 3*days)
		}
	})
}

// TestIntermediateLifetime gives an intermediate four times the life of the longest SVID, the agents' own included.
func TestIntermediateLifetime(t *testing.T) {
	for _, tt := range []struct {
		name          string
		policy, agent time.Duration
		want          time.Duration
	}{
		{"short SVIDs", time.Hour, 0, day},
		{"long SVIDs", 12 * time.Hour, 0, 2 * day},
		{"long SVIDs of agents", time.Hour, 24 * time.Hour, 4 * day},
	} {
		t.Run(tt.name, func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				b := newBare(t, func(cfg *ca.Config) {
					var err error
					cfg.AgentTTL = tt.agent
					if cfg.Policy, err = ca.NewPolicy(ca.PolicyFile{TTL: tt.policy}, cfg.TrustDomain, false); err != nil {
						t.Fatal(err)
					}
				})
				b.start()
				if got := time.Until(b.intermediate().NotAfter); got != tt.want {
					t.Errorf("the intermediate lives for %s, want %s", got, tt.want)
				}
			})
		})
	}
}

// TestUpstreamAway loses the root for as long as an intermediate lives: nothing is lost before its end, new sessions
// included, and all is well soon after the root is back.
func TestUpstreamAway(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		var up *switched
		s := start(t, catest.Options{Config: func(cfg *ca.Config) {
			up = &switched{Upstream: cfg.Upstream}
			cfg.Upstream = up
		}})
		began := time.Now()
		up.away.Store(true)
		p := s.Pod("shop", "web", "web", "node-1")
		for time.Since(began) < 23*time.Hour {
			n := newNode(t, s, "node-1")
			svid, err := n.session().issue(n.item(p))
			if err != nil {
				t.Fatalf("%s after the root went away: %v", time.Since(began), err)
			}
			if leaf, over := leafOf(t, svid), intermediateOf(t, svid); leaf.NotAfter.After(over.NotAfter) {
				t.Error("a leaf outlives its issuer")
			}
			time.Sleep(50 * time.Minute)
		}
		time.Sleep(2 * time.Hour)
		if missing := s.CA().NotReady(); len(missing) != 1 {
			t.Errorf("without an intermediate the CA misses %q", missing)
		}
		up.away.Store(false)
		time.Sleep(2 * time.Minute)
		n := newNode(t, s, "node-1")
		if _, err := n.session().issue(n.item(p)); err != nil {
			t.Errorf("two minutes after the root came back: %v", err)
		}
	})
}

// TestUpstreamAwayAtStart has a root that is away when the CA starts. Its absence does not use up the budget.
func TestUpstreamAwayAtStart(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		b := newBare(t, nil)
		b.upstream.set(func(context.Context, ca.MintRequest) ([]*x509.Certificate, error) {
			return nil, errors.New("connection refused")
		})
		b.start()
		time.Sleep(40 * time.Minute)
		if c := b.intermediate(); c != nil || len(b.ca.NotReady()) == 0 {
			t.Fatal("there is an intermediate from nowhere")
		}
		if m := b.store.minted(); len(m) != 0 {
			t.Errorf("%d intermediates are on record of which none can exist", len(m))
		}
		b.upstream.set(nil)
		time.Sleep(2 * time.Minute)
		if missing := b.ca.NotReady(); len(missing) > 0 {
			t.Errorf("two minutes after the root came back: %v", missing)
		}
	})
}

// TestUpstreamWrong has the root answer a renewal with what is no good. Nothing changes, and nothing is served but under
// the old intermediate; the right answer is taken up as soon as it comes.
//
// spiffe
func TestUpstreamWrong(t *testing.T) {
	one := func(c *x509.Certificate) ([]*x509.Certificate, error) { return []*x509.Certificate{c}, nil }
	tests := []struct {
		name   string
		answer func(t *testing.T, u *testUpstream, ctx context.Context, r ca.MintRequest) ([]*x509.Certificate, error)
	}{
		{"an error", func(*testing.T, *testUpstream, context.Context, ca.MintRequest) ([]*x509.Certificate, error) {
			return nil, errors.New("sealed")
		}},
		{"nothing", func(*testing.T, *testUpstream, context.Context, ca.MintRequest) ([]*x509.Certificate, error) {
			return nil, nil
		}},
		{"a hole", func(*testing.T, *testUpstream, context.Context, ca.MintRequest) ([]*x509.Certificate, error) {
			return one(nil)
		}},
		{"no answer", func(_ *testing.T, _ *testUpstream, ctx context.Context, _ ca.MintRequest) ([]*x509.Certificate, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}},
		{"another key", func(t *testing.T, u *testUpstream, _ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			var err error
			if r.CSR, err = issuance.NewIntermediateCSR(r.TrustDomain, newKey(t), false); err != nil {
				return nil, err
			}
			return u.mint(r)
		}},
		{"the root itself", func(_ *testing.T, u *testUpstream, _ context.Context, _ ca.MintRequest) ([]*x509.Certificate, error) {
			return one(u.root)
		}},
		{"expired", func(t *testing.T, u *testUpstream, _ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			return one(u.sign(t, r, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }))
		}},
		{"not valid yet", func(t *testing.T, u *testUpstream, _ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			return one(u.sign(t, r, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }))
		}},
		{"too short", func(t *testing.T, u *testUpstream, _ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			return one(u.sign(t, r, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(59 * time.Minute) }))
		}},
		{"no authority", func(t *testing.T, u *testUpstream, _ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			return one(u.sign(t, r, func(c *x509.Certificate) { c.IsCA, c.MaxPathLen, c.MaxPathLenZero = false, -1, false }))
		}},
		{"may not sign", func(t *testing.T, u *testUpstream, _ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			return one(u.sign(t, r, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }))
		}},
		{"of another trust domain", func(t *testing.T, u *testUpstream, _ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			return one(u.sign(t, r, func(c *x509.Certificate) { c.URIs = mustURIs(t, "spiffe://other.org") }))
		}},
		{"with an ID that has a path", func(t *testing.T, u *testUpstream, _ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			return one(u.sign(t, r, func(c *x509.Certificate) { c.URIs = mustURIs(t, "spiffe://example.org/ns/a/sa/b") }))
		}},
		{"of another root", func(t *testing.T, _ *testUpstream, _ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			key := newKey(t)
			root, err := issuance.NewRoot(r.TrustDomain, key, day, time.Now())
			if err != nil {
				return nil, err
			}
			chain, err := (&testUpstream{root: root, key: key}).mint(r)
			return append(chain, root), err
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				b := newBare(t, nil)
				b.start()
				before, sequence := b.intermediate(), b.ca.Bundle().Generation
				if before == nil {
					t.Fatal("no intermediate")
				}
				b.upstream.set(func(ctx context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
					return tt.answer(t, b.upstream, ctx, r)
				})
				time.Sleep(9 * time.Hour)
				if n := len(b.upstream.requests()); n < 2 {
					t.Fatalf("the root was asked %d times", n)
				}
				if !b.intermediate().Equal(before) || b.ca.Bundle().Generation != sequence || len(b.ca.NotReady()) > 0 {
					t.Error("a wrong answer changed something")
				}
				b.upstream.set(nil)
				time.Sleep(2 * time.Hour) // past the budget too
				if b.intermediate().Equal(before) {
					t.Error("the right answer was not taken up")
				}
			})
		})
	}
}

// TestMintRecord has each intermediate on record, with its end, before the root is asked for it.
func TestMintRecord(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		b := newBare(t, nil)
		b.upstream.set(func(_ context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
			want := []ca.Minted{{ID: r.ID, At: time.Now(), NotAfter: r.NotAfter, Root: r.Root.ID, Longest: time.Hour}}
			if diff := cmp.Diff(want, b.store.minted()); diff != "" {
				t.Errorf("on record when the root is asked (-want +got):\n%s", diff)
			}
			entries := b.ledger.all()
			if len(entries) != 1 || entries[0].Kind != audit.KindMint || !entries[0].NotAfter.Equal(r.NotAfter) || entries[0].Issuer != r.Root.ID {
				t.Errorf("in the ledger when the root is asked: %+v", entries)
			}
			return b.upstream.mint(r)
		})
		b.start()
		if b.intermediate() == nil || len(b.store.minted()) != 1 {
			t.Fatal("no intermediate")
		}
		// What has expired is forgotten at the next mint.
		b.upstream.set(nil)
		time.Sleep(3 * day)
		if m := b.store.minted(); len(m) != 3 {
			t.Errorf("%d intermediates on record, want the 3 that have not expired: %v", len(m), m)
		}
	})
}

// TestMintReadsTheRecordAgain asks no root that is not the active one any more once the intermediate is booked: whoever removes that root
// looks at what is booked.
func TestMintReadsTheRecordAgain(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		b := newBare(t, nil)
		old := b.store.journal.ActiveAuthority().ID
		key := newKey(t)
		root, err := issuance.NewRoot(b.td, key, 365*day, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		next := journal.Authority{ID: hexOf(root.SubjectKeyId), State: journal.Active, Certificate: root.Raw}
		b.store.saved = func(j *journal.Journal) {
			if len(j.Authorities) == 1 { // somebody rotates right after the booking
				retiring := j.Authorities[0]
				retiring.State = journal.Retiring
				j.Authorities, j.Number = []journal.Authority{retiring, next}, j.Number+1
				b.upstream.root, b.upstream.key = root, key
			}
		}
		b.start()
		if booked := b.store.minted(); len(booked) != 2 || booked[0].Root != old || !booked[0].Destroyed || booked[1].Root != next.ID || booked[1].Destroyed {
			t.Errorf("on record: %+v", booked)
		}
		for _, r := range b.upstream.requests() {
			if r.Root.ID == old {
				t.Error("the root was asked that is not active any more")
			}
		}
		if c := b.intermediate(); c == nil || hexOf(c.AuthorityKeyId) != next.ID {
			t.Error("there is no intermediate under the active root")
		}
	})
}

// TestMintLedger mints nothing that is not on record.
func TestMintLedger(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		b := newBare(t, nil)
		b.ledger.set(errors.New("no space left"), nil)
		b.start()
		time.Sleep(time.Minute)
		if n := len(b.upstream.requests()); n != 0 || b.intermediate() != nil {
			t.Errorf("the root was asked %d times although nothing can be recorded", n)
		}
		close(b.ledger.failed)
		wantReason(t, <-b.ended, api.LedgerFailed)
	})
}

// TestMintBudget bounds the intermediates of an hour over restarts, and frees itself.
func TestMintBudget(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		b := newBare(t, func(cfg *ca.Config) { cfg.MintBudget = 3 })
		b.start()
		for range 2 {
			time.Sleep(time.Minute)
			b.restart()
			if b.intermediate() == nil {
				t.Fatal("no intermediate within the budget")
			}
		}
		time.Sleep(time.Minute)
		b.restart()
		time.Sleep(50 * time.Minute)
		if b.intermediate() != nil {
			t.Fatal("an intermediate beyond the budget")
		}
		if n := len(b.upstream.requests()); n != 3 {
			t.Errorf("the root was asked %d times, the budget is 3", n)
		}
		budget := func() (left, of uint32) {
			st, err := adminOf(t, b.ca).GetStatus(t.Context(), &apiv1.GetStatusRequest{})
			if err != nil {
				t.Fatal(api.FromStatus(err))
			}
			return st.GetUpstream().GetMintLeft(), st.GetUpstream().GetMintBudget()
		}
		if left, of := budget(); left != 0 || of != 3 {
			t.Errorf("%d of %d left, and none is", left, of)
		}
		time.Sleep(10 * time.Minute)
		if b.intermediate() == nil {
			t.Error("an hour later the budget is still spent")
		}
		if left, of := budget(); left != 2 || of != 3 { // but for the one that is new
			t.Errorf("%d of %d left, and two are", left, of)
		}
		time.Sleep(time.Hour)
		if left, of := budget(); left != 3 || of != 3 {
			t.Errorf("%d of %d left, an hour after the last", left, of)
		}
	})
}

// TestMintBudgetClock does not let intermediates from a future that never came use up the budget.
func TestMintBudgetClock(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		b := newBare(t, func(cfg *ca.Config) { cfg.MintBudget = 1 })
		future := time.Now().Add(365 * day)
		b.store.replica = ca.Replica{Minted: []ca.Minted{{At: future, NotAfter: future.Add(day), Root: b.store.journal.ActiveAuthority().ID}}}
		b.start()
		if b.intermediate() == nil {
			t.Error("a clock that was wrong once stops the CA for a year")
		}
	})
}

// TestClockSetBack has a CA replace what a clock that was a day ahead has made: nobody could verify it before tomorrow.
//
// threat: K04, K10
func TestClockSetBack(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{})
		time.Sleep(25 * time.Hour) // no root is older than itself
		synctest.Wait()
		now := time.Now()
		valid := func(when string, want bool) {
			t.Helper()
			leaf, err := s.CA().Self().Leaf, error(nil)
			if leaf == nil {
				leaf, err = x509.ParseCertificate(s.CA().Self().Certificate[0])
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := !now.Before(leaf.NotBefore) && now.Before(leaf.NotAfter); got != want {
				t.Errorf("%s it shows a certificate that is valid from %s to %s", when, leaf.NotBefore, leaf.NotAfter)
			}
		}
		valid("at first", true)
		if err := s.CA().RefreshSigning(t.Context(), now.Add(25*time.Hour)); err != nil {
			t.Fatal(err)
		}
		valid("a day ahead", false)
		if err := s.CA().RefreshSigning(t.Context(), now); err != nil {
			t.Fatal(err)
		}
		valid("set back", true)
		n := newNode(t, s, "node-1")
		if _, err := n.session().issue(n.item(s.Pod("shop", "web", "web", "node-1"))); err != nil {
			t.Errorf("after that it issues nothing: %v", err)
		}
	})
}

// TestStoreFails tells a write of unknown outcome, after which nothing in memory can be believed, from one that did not
// happen.
func TestStoreFails(t *testing.T) {
	t.Run("unknown outcome", func(t *testing.T) {
		catest.Bubble(t, func(t *testing.T) {
			b := newBare(t, nil)
			b.start()
			b.store.setFail(api.E(api.StateUnknown, "the commit failed"))
			time.Sleep(9 * time.Hour)
			wantReason(t, <-b.ended, api.StateUnknown)
		})
	})
	t.Run("away", func(t *testing.T) {
		catest.Bubble(t, func(t *testing.T) {
			b := newBare(t, nil)
			b.start()
			before := b.intermediate()
			b.store.setFail(errors.New("no route to host"))
			time.Sleep(9 * time.Hour)
			if len(b.upstream.requests()) != 1 || !b.intermediate().Equal(before) || len(b.ca.NotReady()) > 0 {
				t.Error("an intermediate was minted that is not on record")
			}
			b.store.setFail(nil)
			time.Sleep(2 * time.Minute)
			if b.intermediate().Equal(before) {
				t.Error("the store is back, and yet there is no new intermediate")
			}
		})
	})
}

// TestSealKeyWrong ends the CA at once: waiting does not make another key the right one.
//
// threat: E22
func TestSealKeyWrong(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		b := newBare(t, nil)
		b.upstream.set(func(context.Context, ca.MintRequest) ([]*x509.Certificate, error) {
			return nil, api.E(api.SealKeyWrong, "another key")
		})
		b.start()
		time.Sleep(time.Second)
		select {
		case err := <-b.ended:
			wantReason(t, err, api.SealKeyWrong)
		default:
			t.Fatal("the CA goes on with a seal key that is not its own")
		}
		if m := b.store.minted(); len(m) != 0 {
			t.Error("it used up the budget")
		}
	})
}

// TestRunRefuses starts over records that are not this CA's.
//
// threat: L11
func TestRunRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*bare)
		want   api.Reason
	}{
		{"no record", func(b *bare) { b.store.journal.Schema = 0 }, api.StateMissing},
		{"another trust domain", func(b *bare) { b.store.journal.TrustDomain = "other.org" }, api.StateForeign},
		{"damaged root", func(b *bare) { b.store.journal.Authorities[0].Certificate = []byte("x") }, api.StateCorrupt},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBare(t, nil)
			tt.change(b)
			c, err := ca.New(b.config)
			if err != nil {
				t.Fatal(err)
			}
			wantReason(t, c.Run(t.Context()), tt.want)
			if len(b.upstream.requests()) > 0 || len(b.store.minted()) > 0 {
				t.Error("something was minted")
			}
			_, err = adminOf(t, c).GetStatus(t.Context(), &apiv1.GetStatusRequest{})
			if tt.want != api.StateCorrupt {
				wantReason(t, api.FromStatus(err), api.CAUnavailable)
			}
		})
	}
}

// TestConfig refuses what cannot work, before anything is touched.
func TestConfig(t *testing.T) {
	for name, change := range map[string]func(*ca.Config){
		"no trust domain":      func(c *ca.Config) { c.TrustDomain = spiffeTD(t, "") },
		"no store":             func(c *ca.Config) { c.Store = nil },
		"no upstream":          func(c *ca.Config) { c.Upstream = nil },
		"no ledger":            func(c *ca.Config) { c.Ledger = nil },
		"no policy":            func(c *ca.Config) { c.Policy = nil },
		"no attestor":          func(c *ca.Config) { c.Attestors = nil },
		"no replica":           func(c *ca.Config) { c.Replica = "" },
		"replica with a slash": func(c *ca.Config) { c.Replica = "a/b" },
		"replica with dots":    func(c *ca.Config) { c.Replica = ".." },
		"negative queue":       func(c *ca.Config) { c.Queue = -1 },
		"negative concurrency": func(c *ca.Config) { c.Concurrent = -1 },
		"negative session age": func(c *ca.Config) { c.SessionAge = -1 },
		"negative budget":      func(c *ca.Config) { c.MintBudget = -1 },
		"short agent SVIDs":    func(c *ca.Config) { c.AgentTTL = time.Second },
		"long agent SVIDs":     func(c *ca.Config) { c.AgentTTL = 25 * time.Hour },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBare(t, nil)
			change(&b.config)
			_, err := ca.New(b.config)
			wantReason(t, err, api.ConfigInvalid)
		})
	}
}
