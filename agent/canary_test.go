package agent_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// buffer is a log in memory.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// secrets gathers what must never be seen.
type secrets struct {
	mu  sync.Mutex
	all map[string]string // what it is, by the secret
}

func (s *secrets) add(what string, secret []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for form, text := range map[string]string{
		"as it is":  string(secret),
		"in base64": base64.StdEncoding.EncodeToString(secret),
		"for URLs":  base64.RawURLEncoding.EncodeToString(secret),
		"in hex":    hex.EncodeToString(secret),
		"as bytes":  strings.Trim(fmt.Sprint(secret), "[]"),
	} {
		s.all[text] = what + " " + form
	}
}

func (s *secrets) addToken(what string, e attestor.Evidence) attestor.Evidence {
	s.add(what, e.Data)
	for i, part := range strings.Split(string(e.Data), ".") {
		s.add(fmt.Sprintf("part %d of %s", i, what), []byte(part))
	}
	return e
}

func (s *secrets) addKey(t *testing.T, h agent.Held) {
	t.Helper()
	key := h.SVID.PrivateKey.(*ecdsa.PrivateKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	s.add("a key", raw)
	s.add("a PKCS#8 key", der)
	s.add("a PEM key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// No log of any level, no metric and nothing that the CA logs holds a token or a key, whatever goes wrong.
//
// threat: L01
func TestNoSecretInLogs(t *testing.T) {
	log := &buffer{}
	found := &secrets{all: map[string]string{}}
	var metrics bytes.Buffer
	o := catest.Options{Log: log, Policy: ca.PolicyFile{Namespaces: []string{"shop"}}}
	bubble(t, o, func(t *testing.T, s *catest.Server) {
		cache := newMemory()
		own := ownToken(s, here)
		debug := func(c *agent.Config) {
			c.Cache = cache
			c.Log = slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug - 10, AddSource: true}))
			c.Prover = proverFunc(func(ctx context.Context) (attestor.Evidence, error) {
				e, err := own.Prove(ctx)
				return found.addToken("the agent's token", e), err
			})
		}
		n := startNode(t, s, here, debug)
		w := newWorkload(s, "web-1", here)
		denied := &workload{s, s.Pod("attic", "web-0", "web", here)}
		id, _, err := n.Admit(t.Context(), found.addToken("a token", w.token(tokenLife)), "shared")
		if err != nil {
			t.Fatal(err)
		}
		found.addKey(t, await(t, id, time.Second, "SVID", hasSVID))
		for _, e := range []attestor.Evidence{
			denied.token(tokenLife), newWorkload(s, "web-2", elsewhere).token(tokenLife), s.Evidence(w.pod, "vault", tokenLife),
			{Kind: api.EvidenceServiceAccount, Data: []byte("eyJhbGciOiJub25lIn0.eyJub3QiOiJhIHRva2VuIGF0IGFsbCJ9.c2VjcmV0LWNhbmFyeQ")},
			{Kind: api.EvidenceServiceAccount, Data: append(w.token(tokenLife).Data, "x"...)},
		} {
			n.Admit(t.Context(), found.addToken("a token that is refused", e), "shared")
			time.Sleep(time.Minute)
		}
		time.Sleep(30 * time.Minute) // a renewal
		found.addKey(t, id.Held().Load())
		s.Pods.Remove(w.pod)
		time.Sleep(30 * time.Minute)
		s.Kill()
		time.Sleep(2 * time.Hour) // the end of everything
		s.Start()
		s.Pods.Add(w.pod)
		if id, _, err = n.Admit(t.Context(), found.addToken("a token", w.token(tokenLife)), "shared"); err != nil {
			t.Fatal(err)
		}
		found.addKey(t, await(t, id, 2*time.Minute, "SVID", hasSVID))
		synctest.Wait()
		for _, name := range cache.names() { // a restart with a cache that is damaged in every place
			cache.entries[name] = bytes.ReplaceAll(cache.get(name), []byte(`":"`), []byte(`":["`))
		}
		n.stop()
		n = startNode(t, s, here, debug)
		if id, _, err = n.Admit(t.Context(), found.addToken("a token", w.token(tokenLife)), "shared"); err != nil {
			t.Fatal(err)
		}
		found.addKey(t, await(t, id, time.Minute, "SVID", hasSVID))
		writeMetrics(t, &metrics, n.metrics)
	})
	text := log.String()
	if !strings.Contains(text, `"level":"WARN"`) || !strings.Contains(text, "identity renewed") || !strings.Contains(text, notUsed) || len(found.all) < 100 {
		t.Fatalf("the scenario is not what it should be: %d secrets, %d bytes of log", len(found.all), len(text))
	}
	for secret, what := range found.all {
		if strings.Contains(text, secret) {
			t.Errorf("the log holds %s", what)
		}
		if strings.Contains(metrics.String(), secret) {
			t.Errorf("the metrics hold %s", what)
		}
	}
}

func writeMetrics(t testing.TB, w io.Writer, r *prometheus.Registry) {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		fmt.Fprintln(w, f)
	}
}

// The metrics tell what is held and when the first of it ends, and no workload's name.
//
// threat: L16
func TestMetrics(t *testing.T) {
	bubble(t, catest.Options{Policy: ca.PolicyFile{Namespaces: []string{"*"}, Rules: []ca.PolicyRule{{
		Namespaces: []string{"brief"}, TTL: 10 * time.Minute,
	}}}}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		const first, count = "signet_agent_svid_earliest_not_after_timestamp_seconds", "signet_agent_svids"
		if n.metric(count) != 0 || n.metric(first) != 0 {
			t.Error("something is held at the start")
		}
		brief := n.admit(&workload{s, s.Pod("brief", "job-1", "job", here)})
		var ends []time.Time
		for _, id := range []*agent.Identity{n.admit(newWorkload(s, "web-1", here)), brief, n.admit(newWorkload(s, "web-2", here))} {
			ends = append(ends, notAfter(await(t, id, time.Second, "SVID", hasSVID)))
		}
		synctest.Wait() // a renewal is counted once its SVID is there
		if n.metric(count) != 3 || n.metric(first) != float64(ends[1].Unix()) {
			t.Errorf("%v are held, the first until %v, want 3 and %d", n.metric(count), n.metric(first), ends[1].Unix())
		}
		if n.metric("signet_agent_connected") != 1 || n.metric("signet_agent_bundle_sequence") != 1<<32|1 || n.metric("signet_agent_renewals_total/ok") != 3 {
			t.Error("connected, generation or renewals are wrong")
		}
		if end := n.metric("signet_agent_own_svid_not_after_timestamp_seconds"); time.Until(time.Unix(int64(end), 0)) < 50*time.Minute {
			t.Errorf("own SVID until %v", end)
		}
		var text bytes.Buffer
		writeMetrics(t, &text, n.metrics)
		for _, name := range []string{"web-1", "job", "shop", "brief", here, "spiffe://"} {
			if strings.Contains(text.String(), name) {
				t.Errorf("the metrics name %q", name)
			}
		}
		for name := range strings.SplitSeq("connected svids renewals_total expired_total session_failures_total bundles_refused_total", " ") {
			if !strings.Contains(text.String(), `"signet_agent_`+name+`"`) {
				t.Errorf("there is no metric signet_agent_%s", name)
			}
		}
	})
}
