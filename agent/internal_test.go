package agent

import (
	"context"
	"errors"
	"net"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
)

type noProver struct{ err any }

func (p noProver) Prove(context.Context) (attestor.Evidence, error) {
	if err, ok := p.err.(error); ok {
		return attestor.Evidence{}, err
	}
	panic(p.err)
}

func newTestAgent(t *testing.T, p attestor.Prover) *Agent {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	a, err := New(Config{
		TrustDomain: td, Prover: p,
		Dial:     func(context.Context) (net.Conn, error) { return nil, errors.New("connection refused") },
		Trust:    &Trust{Bundle: x509bundle.New(td)},
		Verifier: func(KeySets) (attestor.Attestor, error) { return nil, errors.New("none") },
	})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func claims(pod string) attestor.Claims {
	return attestor.Claims{Issuer: "https://issuer.test", Namespace: "shop", PodName: pod, PodUID: "uid-" + pod, ExpireAt: time.Now().Add(time.Hour)}
}

func TestConfig(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	good := func() Config {
		return Config{
			TrustDomain: td, Prover: noProver{}, Trust: &Trust{Bundle: x509bundle.New(td)},
			Dial:     func(context.Context) (net.Conn, error) { return nil, nil },
			Verifier: func(KeySets) (attestor.Attestor, error) { return nil, nil },
		}
	}
	if _, err := New(good()); err != nil {
		t.Fatal(err)
	}
	for name, forget := range map[string]func(*Config){
		"trust domain": func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} },
		"dial":         func(c *Config) { c.Dial = nil },
		"prover":       func(c *Config) { c.Prover = nil },
		"verifier":     func(c *Config) { c.Verifier = nil },
		"trust":        func(c *Config) { c.Trust = nil },
	} {
		c := good()
		forget(&c)
		if a, err := New(c); a != nil || api.ReasonOf(err) != api.ConfigInvalid {
			t.Errorf("without %s: error %v, want %s", name, err, api.ConfigInvalid)
		}
	}
}

// A node holds a bounded number of identities, whoever asks.
func TestIdentityLimit(t *testing.T) {
	a := newTestAgent(t, noProver{errors.New("none")})
	for i := range maxIdentities {
		if _, err := a.identity(claims(strconv.Itoa(i)), attestor.Evidence{}, ""); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.identity(claims("0"), attestor.Evidence{}, ""); err != nil {
		t.Errorf("one that is there already: %v", err)
	}
	if _, err := a.identity(claims("one more"), attestor.Evidence{}, ""); api.ReasonOf(err) != api.Overloaded {
		t.Errorf("one more: %v, want %s", err, api.Overloaded)
	}
}

// An identity is forgotten only while nobody has come for it: whoever holds it knows that it is kept.
func TestForgetComesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestAgent(t, noProver{errors.New("none")})
		id, err := a.identity(claims("web"), attestor.Evidence{}, "")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if !id.idle(time.Now()) {
			t.Fatal("not idle, though nobody uses it and its token has expired")
		}
		// Between the look and the act there is a new stream.
		if again, err := a.identity(claims("web"), attestor.Evidence{}, ""); again != id || err != nil {
			t.Fatalf("the same pod got another identity, error %v", err)
		}
		if a.forget(id) || len(a.list()) != 1 {
			t.Error("forgotten in spite of it")
		}
		time.Sleep(time.Hour)
		if !a.forget(id) || len(a.list()) != 0 {
			t.Error("not forgotten")
		}
	})
}

// A failure with a token that was replaced meanwhile is not the new token's.
func TestFailureOfAnOlderToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestAgent(t, noProver{errors.New("none")})
		id, err := a.identity(claims("web"), attestor.Evidence{}, "")
		if err != nil {
			t.Fatal(err)
		}
		older, _ := id.newest(time.Now())
		time.Sleep(time.Minute)
		if _, err := a.identity(claims("web"), attestor.Evidence{}, ""); err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			reason  api.Reason
			refused bool
		}{{api.TokenExpired, false}, {api.TokenSignature, false}, {api.PodDeleted, true}} {
			a.failed(id, older, api.E(tt.reason, "no"), time.Minute)
			if h := id.held.Load(); (h.Refused() != nil) != tt.refused || !tt.refused && time.Until(h.RenewAt) > 0 {
				t.Errorf("%s: refused %v, next try in %s", tt.reason, h.Refused(), time.Until(h.RenewAt))
			}
		}
	})
}

// However the session ends, Run ends with it, and so does everything that it started.
func TestRunEndsWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestAgent(t, noProver{"a prover that panics"})
		if _, err := a.identity(claims("web"), attestor.Evidence{}, ""); err != nil {
			t.Fatal(err)
		}
		if err := a.Run(t.Context()); err == nil {
			t.Error("the panic was lost")
		}
	})
}

// Expiry is a matter of the wall clock: no wait is longer than maxSleep of a clock that may stand still.
//
// threat: K03, K08
func TestWaitsAreShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestAgent(t, noProver{errors.New("none")})
		id, err := a.identity(claims("web"), attestor.Evidence{}, "")
		if err != nil {
			t.Fatal(err)
		}
		id.held.Set(Held{RenewAt: time.Now().Add(time.Hour)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			a.keep(ctx, id, a.renew)
		}()
		time.Sleep(time.Second)
		// As if the machine had been suspended for an hour: what was in an hour is past, and no timer has run.
		id.held.Set(Held{RenewAt: time.Now()})
		time.Sleep(maxSleep + a.cfg.IssueTimeout)
		if h := id.held.Load(); api.ReasonOf(h.Refusal) != api.CAUnavailable {
			t.Errorf("%v later nothing was tried: %v", maxSleep, h.Refusal)
		}
		cancel()
		<-done
	})
}

// What is due is so by the clock that is nearer to it.
//
// threat: K04
func TestUntil(t *testing.T) {
	now := time.Now()
	for _, tt := range []struct {
		name string
		at   time.Time
		want time.Duration
	}{
		{"both clocks", now.Add(time.Hour), time.Hour},
		{"the wall clock alone, as from a file", now.Round(0).Add(time.Hour), time.Hour},
		{"passed", now.Add(-time.Hour), -time.Hour},
	} {
		if got := until(tt.at, now); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

func TestBackoffIsBounded(t *testing.T) {
	a := newTestAgent(t, noProver{errors.New("none")})
	b := a.newBackoff()
	for i := range 1000 {
		d := b.NextBackOff()
		if d < a.cfg.MinBackoff/2 || d > a.cfg.MaxBackoff+1 {
			t.Errorf("delay %d is %s", i, d)
		}
		if i > 20 && d < a.cfg.MaxBackoff/4 {
			t.Errorf("delay %d is only %s", i, d)
		}
	}
}
