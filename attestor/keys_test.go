package attestor_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
)

// start makes a source and runs it until the test, or the returned function, ends it.
func start(t testing.TB, cfg attestor.KeySourceConfig) (*attestor.KeySource, func()) {
	t.Helper()
	s, err := attestor.NewKeySource(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	stop := sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return s, stop
}

// fresh waits until the source has read a set without error in this process.
func fresh(t testing.TB, s *attestor.KeySource) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		jwks, changed := s.Snapshot()
		if jwks != nil {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("no key set: %+v", s.Status())
		}
	}
}

// counted counts the requests to a handler that can be replaced.
type counted struct {
	n       atomic.Int64
	handler atomic.Pointer[http.HandlerFunc]
}

func (c *counted) set(h http.HandlerFunc) { c.handler.Store(&h) }

func (c *counted) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.n.Add(1)
	(*c.handler.Load())(w, r)
}

// bubble is an issuer whose key set is read in a bubble, by a source that knows nothing of it.
func bubble(t *testing.T, cfg attestor.KeySourceConfig) (cluster, *counted, *attestor.KeySource) {
	c := newCluster(t, "ES256")
	h := &counted{}
	h.set(c.Handler().ServeHTTP)
	cfg.Issuer, cfg.URL, cfg.Transport = c.Name(), c.KeysURL(), attestortest.HandlerTransport(h)
	s, _ := start(t, cfg)
	c.attestor = attestorBy(t, c.Name(), s)
	return c, h, s
}

func attestorBy(t testing.TB, issuer string, keys attestor.Keys) *attestor.ServiceAccount {
	t.Helper()
	a, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{issuer: keys}})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestKeySourceFollowsRotation(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c, h, s := bubble(t, attestor.KeySourceConfig{})
		accepted(t, c, c.token(t)) // waits for the first read
		before := c.token(t)
		jwks, changed := s.Snapshot()
		if err := c.Rotate(); err != nil {
			t.Fatal(err)
		}
		accepted(t, c, c.token(t)) // does not wait for the next minute
		if n := h.n.Load(); n != 2 {
			t.Errorf("%d reads, want 2", n)
		}
		select {
		case <-changed:
		default:
			t.Error("the change was not told")
		}
		if now, _ := s.Snapshot(); bytes.Equal(now, jwks) || s.Status().Keys != 2 {
			t.Errorf("snapshot did not follow: %s", now)
		}
		accepted(t, c, before)
		c.Forget()
		time.Sleep(70 * time.Second)
		got, err := c.attestor.Attest(t.Context(), evidence(before), audience, time.Now())
		refused(t, before, got, err, api.TokenSignature)
	})
}

func TestKeySourceReadsEachMinute(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		_, h, s := bubble(t, attestor.KeySourceConfig{})
		time.Sleep(time.Hour)
		if n := h.n.Load(); n < 54 || n > 68 {
			t.Errorf("%d reads in an hour", n)
		}
		if d := time.Since(s.Status().Read); d > 66*time.Second {
			t.Errorf("last read %v ago", d)
		}
	})
}

func TestKeySourceMissesAreBounded(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c, h, s := bubble(t, attestor.KeySourceConfig{Refresh: 24 * time.Hour})
		good := c.token(t)
		accepted(t, c, good)
		flood := func() time.Duration {
			began := time.Now()
			var wg sync.WaitGroup
			for i := range 1000 {
				wg.Go(func() {
					if _, err := s.Lookup(t.Context(), fmt.Sprint("made-up-", i), "ES256"); api.ReasonOf(err) != api.TokenSignature {
						t.Errorf("got %v, want %s", err, api.TokenSignature)
					}
				})
			}
			wg.Wait()
			return time.Since(began)
		}
		h.set(func(w http.ResponseWriter, r *http.Request) {
			pause(r, 500*time.Millisecond)
			c.Handler().ServeHTTP(w, r)
		})
		if d := flood(); d != 500*time.Millisecond || h.n.Load() != 2 {
			t.Errorf("a thousand misses: %d reads, %v; want 2 with the first one, 500ms", h.n.Load(), d)
		}
		if d := flood(); d != 0 || h.n.Load() != 2 {
			t.Errorf("a thousand more: %d reads, %v; want no further one, no wait", h.n.Load(), d)
		}
		accepted(t, c, good)
		for range 60 {
			time.Sleep(time.Second)
			flood()
		}
		if n := h.n.Load(); n > 2+13 {
			t.Errorf("%d reads in a minute of misses, want one each 5 s", n)
		}
		// An issuer that does not answer costs a caller no more than MissWait, and good tokens nothing.
		h.set(func(_ http.ResponseWriter, r *http.Request) { pause(r, time.Hour) })
		time.Sleep(5 * time.Second)
		if d := flood(); d != time.Second {
			t.Errorf("misses waited %v, want 1s", d)
		}
		began := time.Now()
		accepted(t, c, good)
		if d := time.Since(began); d != 0 {
			t.Errorf("a good token waited %v", d)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		time.Sleep(5 * time.Second)
		began = time.Now()
		if _, err := s.Lookup(ctx, "made-up", "ES256"); api.ReasonOf(err) != api.TokenSignature || time.Since(began) > 100*time.Millisecond {
			t.Errorf("got %v after %v", err, time.Since(began))
		}
	})
}

// pause blocks a handler for d or until the client is gone.
func pause(r *http.Request, d time.Duration) {
	select {
	case <-time.After(d):
	case <-r.Context().Done():
	}
}

func TestKeySourceBeforeTheFirstSet(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newCluster(t, "ES256")
		h := &counted{}
		h.set(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
		s, err := attestor.NewKeySource(attestor.KeySourceConfig{
			Issuer: c.Name(), URL: c.KeysURL(), Transport: attestortest.HandlerTransport(h),
		})
		if err != nil {
			t.Fatal(err)
		}
		token := c.token(t)
		c.attestor = attestorBy(t, c.Name(), s)
		unavailable := func(within time.Duration) {
			t.Helper()
			began := time.Now()
			got, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
			refused(t, token, got, err, api.KeysUnavailable)
			if d := time.Since(began); d > within {
				t.Errorf("refused after %v, want %v", d, within)
			}
			if e := api.AsError(err); e.RetryAfter == 0 || e.Reason.Kind() != api.KindUnavailable {
				t.Errorf("the caller is not told to try again: %+v", e)
			}
		}
		unavailable(time.Second) // Run was not called
		if jwks, _ := s.Snapshot(); jwks != nil {
			t.Errorf("a snapshot of nothing: %s", jwks)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { s.Run(ctx) })
		unavailable(time.Second)
		time.Sleep(time.Minute)
		if n := h.n.Load(); n < 5 || n > 15 {
			t.Errorf("%d reads in the first minute of failures; want a few, backing off", n)
		}
		if err := s.Run(t.Context()); err == nil {
			t.Error("a second run was not refused")
		}
		h.set(c.Handler().ServeHTTP)
		time.Sleep(time.Minute)
		accepted(t, c, token)
		cancel()
		wg.Wait()
		accepted(t, c, token) // the set outlives the run
		if _, err := s.Lookup(t.Context(), "made-up", "ES256"); api.ReasonOf(err) != api.TokenSignature {
			t.Error(err)
		}
	})
}

func TestKeySourceKeepsTheLastGoodSet(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c, h, s := bubble(t, attestor.KeySourceConfig{})
		token := c.token(t, in("exp", 24*time.Hour))
		accepted(t, c, token)
		_, changed := s.Snapshot()
		h.set(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
		for range 20 {
			time.Sleep(time.Hour)
			accepted(t, c, token)
		}
		st := s.Status()
		if st.Err == nil || st.Keys != 1 || time.Since(st.Read) < 20*time.Hour {
			t.Errorf("status hides that the issuer is away: %+v", st)
		}
		select {
		case <-changed:
			t.Error("a change was told")
		default:
		}
	})
}

func TestKeySourceConfig(t *testing.T) {
	write := func(string, []byte) error { return nil }
	base := attestor.KeySourceConfig{Issuer: "https://a.example"}
	change := func(f func(*attestor.KeySourceConfig)) attestor.KeySourceConfig {
		cfg := base
		f(&cfg)
		return cfg
	}
	url := func(u string, more ...func(*attestor.KeySourceConfig)) attestor.KeySourceConfig {
		return change(func(c *attestor.KeySourceConfig) {
			c.URL = u
			for _, f := range more {
				f(c)
			}
		})
	}
	allow := func(c *attestor.KeySourceConfig) { c.AllowHTTP = true }
	for _, r := range []struct {
		name string
		cfg  attestor.KeySourceConfig
		ok   bool
	}{
		{"https", url("https://a.example/jwks"), true},
		{"a file", change(func(c *attestor.KeySourceConfig) { c.File = "jwks.json" }), true},
		{"http on 127.0.0.1, allowed", url("http://127.0.0.1:8080/jwks", allow), true},
		{"http on ::1, allowed", url("http://[::1]/jwks", allow), true},
		{"http on localhost, allowed", url("http://localhost/jwks", allow), true},
		{"persist", url("https://a.example", func(c *attestor.KeySourceConfig) { c.Persist, c.WriteFile = "p", write }), true},
		{"no issuer", attestor.KeySourceConfig{URL: "https://a.example"}, false},
		{"neither", base, false},
		{"both", url("https://a.example", func(c *attestor.KeySourceConfig) { c.File = "x" }), false},
		{"http on 127.0.0.1", url("http://127.0.0.1/jwks"), false},
		{"http elsewhere, allowed", url("http://a.example/jwks", allow), false},
		{"http on a name like loopback", url("http://127.0.0.1.a.example/jwks", allow), false},
		{"http with a token", url("http://127.0.0.1/", allow, func(c *attestor.KeySourceConfig) { c.TokenFile = "t" }), false},
		{"file URL", url("file:///etc/passwd"), false},
		{"no scheme", url("a.example/jwks"), false},
		{"no host", url("https:///jwks"), false},
		{"user", url("https://user:secret@a.example/jwks"), false},
		{"fragment", url("https://a.example/#x"), false},
		{"control character", url("https://a.example/\x7f"), false},
		{"persist without writing", url("https://a.example", func(c *attestor.KeySourceConfig) { c.Persist = "p" }), false},
		{"writing without persist", url("https://a.example", func(c *attestor.KeySourceConfig) { c.WriteFile = write }), false},
		{"negative refresh", url("https://a.example", func(c *attestor.KeySourceConfig) { c.Refresh = -1 }), false},
		{"ca with a file", change(func(c *attestor.KeySourceConfig) { c.File, c.CAFile = "f", "ca" }), false},
		{"ca with a transport", url("https://a.example", func(c *attestor.KeySourceConfig) {
			c.CAFile, c.Transport = "ca", http.DefaultTransport
		}), false},
	} {
		t.Run(r.name, func(t *testing.T) {
			_, err := attestor.NewKeySource(r.cfg)
			if r.ok && err != nil {
				t.Fatal(err)
			}
			if !r.ok && (err == nil || api.ReasonOf(err) != api.ConfigInvalid) {
				t.Fatalf("got %v, want %s", err, api.ConfigInvalid)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error shows the password: %v", err)
			}
		})
	}
}

func TestKeySourceFile(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newCluster(t, "ES256")
		path := filepath.Join(t.TempDir(), "jwks.json")
		s, _ := start(t, attestor.KeySourceConfig{Issuer: c.Name(), File: path})
		c.attestor = attestorBy(t, c.Name(), s)
		token := c.token(t)
		got, err := c.attestor.Attest(t.Context(), evidence(token), audience, time.Now())
		refused(t, token, got, err, api.KeysUnavailable)
		if err := c.WriteJWKS(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		accepted(t, c, token)
		for _, bad := range []string{"", "{}", `{"keys":[]}`, "<html>", strings.Repeat(" ", attestor.MaxKeySetBytes) + string(c.JWKS())} {
			if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Minute)
			if s.Status().Err == nil {
				t.Errorf("%.20q was read without error", bad)
			}
			accepted(t, c, token)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		accepted(t, c, token)
		if err := c.Rotate(); err != nil {
			t.Fatal(err)
		}
		if err := c.WriteJWKS(path); err != nil {
			t.Fatal(err)
		}
		accepted(t, c, c.token(t))
	})
}

func TestKeySourcePersist(t *testing.T) {
	c := newCluster(t, "ES256")
	path := filepath.Join(t.TempDir(), "kept.json")
	var writes atomic.Int64
	var fail atomic.Bool
	away := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	cfg := attestor.KeySourceConfig{
		Issuer: c.Name(), URL: c.KeysURL(), Transport: c.Transport(), Persist: path, MissWait: time.Millisecond,
		WriteFile: func(path string, data []byte) error {
			if writes.Add(1); fail.Load() {
				return errors.New("disk full")
			}
			return os.WriteFile(path, data, 0o600)
		},
	}
	token := c.token(t)
	inBubble(t, func(t *testing.T) {
		fail.Store(true)
		s, _ := start(t, cfg)
		fresh(t, s)
		time.Sleep(10 * time.Minute)
		if writes.Load() < 5 {
			t.Errorf("a failed write was tried %d times", writes.Load())
		}
		fail.Store(false)
		time.Sleep(2 * time.Minute)
		writes.Store(0)
		time.Sleep(time.Hour)
		if n := writes.Load(); n != 0 {
			t.Errorf("written %d times without a change", n)
		}
	})
	restart := func(change func(*attestor.KeySourceConfig)) (*attestor.ServiceAccount, *attestor.KeySource) {
		cfg := cfg
		cfg.Transport = attestortest.HandlerTransport(away)
		change(&cfg)
		s, err := attestor.NewKeySource(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return attestorBy(t, c.Name(), s), s
	}
	now := time.Now()
	check := func(name string, want api.Reason, change func(*attestor.KeySourceConfig)) {
		t.Run(name, func(t *testing.T) {
			a, s := restart(change)
			got, err := a.Attest(t.Context(), evidence(token), audience, now)
			if want != "" {
				refused(t, token, got, err, want)
			} else if err != nil {
				t.Fatal(err)
			} else if st := s.Status(); st.Keys != 1 || !st.Read.IsZero() {
				t.Errorf("kept keys look as if they were read: %+v", st)
			}
		})
	}
	check("the issuer is away", "", func(*attestor.KeySourceConfig) {})
	check("another issuer", api.KeysUnavailable, func(c *attestor.KeySourceConfig) { c.Issuer = "https://b.example" })
	check("another place", api.KeysUnavailable, func(c *attestor.KeySourceConfig) { c.URL += "2" })
	for name, content := range map[string]string{
		"empty": "", "no JSON": "x", "no keys": `{"issuer":"` + c.Name() + `","source":"` + c.KeysURL() + `","jwks":{"keys":[]}}`,
		"null": "null", "large": strings.Repeat(" ", 4<<20),
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		check("file is "+name, api.KeysUnavailable, func(*attestor.KeySourceConfig) {})
	}
}

// Readers and a source that changes all the time: for the race detector.
func TestKeySourceConcurrent(t *testing.T) {
	c := newCluster(t, "ES256")
	s, _ := start(t, attestor.KeySourceConfig{Issuer: c.Name(), URL: c.KeysURL(), Transport: c.Transport(), Refresh: time.Millisecond})
	fresh(t, s)
	a := attestorBy(t, c.Name(), s)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				token, err := c.Token(c.pod, audience, ttl)
				if err == nil {
					_, err = a.Attest(t.Context(), evidence(token), audience, time.Now())
				}
				// A miss within five seconds of another is not read again at once, but the refresh comes.
				if err != nil && api.ReasonOf(err) != api.TokenSignature {
					t.Error(err)
				}
				s.Snapshot()
				s.Status()
			}
		})
	}
	wg.Go(func() {
		for range 20 {
			if err := c.Rotate(); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
}
