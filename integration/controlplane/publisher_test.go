//go:build cluster

package controlplane_test

import (
	"bytes"
	"crypto/x509"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	seen "github.com/signet-ca/signet/ca/cluster"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

const bundlePath = "/api/v1/namespaces/" + system + "/configmaps/" + seen.BundleConfigMap

// lines is a log that can be looked at.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) has(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.buf.String(), s)
}

func (l *lines) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.buf.String(), s)
}

func newBundle(t testing.TB, number uint32) *ca.Bundle {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString(catest.TrustDomain)
	key, err := issuance.GenerateKey(issuance.KeyP256)
	if err != nil {
		t.Fatal(err)
	}
	root, err := issuance.NewRoot(td, key, 24*time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	roots := []*x509.Certificate{root}
	return &ca.Bundle{TrustDomain: td, Generation: api.Generation{Epoch: 1, Number: number}, Roots: roots, Hash: api.BundleHash(roots)}
}

func (w *watched) publisher(t testing.TB, log *lines) *seen.KubePublisher {
	t.Helper()
	p, err := seen.NewKubePublisher(seen.KubePublisherConfig{
		Client: w.open(t, "signet-ca"), Namespace: system, Log: slog.New(slog.NewTextHandler(log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// shows says whether the cluster shows exactly b, in both forms.
func (w *watched) shows(t testing.TB, b *ca.Bundle) bool {
	t.Helper()
	var m struct{ Data map[string]string }
	if err := w.Do(t.Context(), http.MethodGet, bundlePath, nil, &m); err != nil {
		return false
	}
	return showsData(b, m.Data)
}

// showsData says whether a ConfigMap's data are exactly b.
func showsData(b *ca.Bundle, data map[string]string) bool {
	doc, err := spiffebundle.Parse(b.TrustDomain, []byte(data[seen.BundleJSON]))
	if err != nil {
		return false
	}
	pemDoc, err := x509bundle.Parse(b.TrustDomain, []byte(data[seen.BundlePEM]))
	if err != nil {
		return false
	}
	sequence, ok := doc.SequenceNumber()
	return ok && sequence == b.Generation.Sequence() && api.BundleHash(doc.X509Authorities()) == b.Hash && api.BundleHash(pemDoc.X509Authorities()) == b.Hash
}

func (w *watched) testPublisher(t *testing.T) {
	log := &lines{}
	p := w.publisher(t, log)
	if err := w.open(t, "signet-ca").CheckRules(t.Context(), p.Rules()...); err != nil {
		t.Errorf("with the rules: %v", err)
	}
	first, second := newBundle(t, 1), newBundle(t, 2)
	if there, err := p.Published(t.Context(), first.TrustDomain); err != nil || there {
		t.Fatalf("before: %t, %v", there, err)
	}
	for _, b := range []*ca.Bundle{first, first, second, second} {
		if err := p.Publish(t.Context(), b); err != nil || !w.shows(t, b) {
			t.Fatalf("generation %s: %v", b.Generation, err)
		}
	}
	if there, err := p.Published(t.Context(), first.TrustDomain); err != nil || !there {
		t.Errorf("after: %t, %v", there, err)
	}
	if shown, err := p.Shown(t.Context(), first.TrustDomain); err != nil || (shown != journal.Held{Generation: second.Generation, Hash: second.Hash}) {
		t.Errorf("it shows generation %s (%v), want %s with its roots", shown.Generation, err, second.Generation)
	}
	if err := p.Publish(t.Context(), first); api.ReasonOf(err) != api.BundleRollback || !w.shows(t, second) {
		t.Errorf("an older one: %v", err)
	}
	// Another CA with the same right to the place.
	if err := w.publisher(t, log).Publish(t.Context(), newBundle(t, 2)); api.ReasonOf(err) != api.BundleEquivocation || !w.shows(t, second) {
		t.Errorf("another of the same generation: %v", err)
	}
	background(t, p.Run)
	w.testReverted(t, log, second)
	w.testWriters(t)
}

// testReverted changes what is published behind the CA's back.
func (w *watched) testReverted(t *testing.T, log *lines, b *ca.Bundle) {
	other := w.documents(t, newBundle(t, 2))
	for _, c := range []struct {
		name   string
		change func(data object)
		alarm  string
	}{
		{"other roots of the same generation", func(data object) { data[seen.BundleJSON], data[seen.BundlePEM] = other[0], other[1] }, string(api.BundleEquivocation)},
		{"no JSON", func(data object) { data[seen.BundleJSON] = "x" }, "changed by somebody else"},
		{"other PEM", func(data object) { data[seen.BundlePEM] = other[1] }, "changed by somebody else"},
		{"nothing", func(data object) { clear(data) }, "changed by somebody else"},
	} {
		log.mu.Lock()
		log.buf.Reset()
		log.mu.Unlock()
		w.change(t, bundlePath, func(o object) { c.change(o["data"].(object)) })
		w.becomesShown(t, c.name, b, log, c.alarm)
	}
	w.remove(t, bundlePath)
	w.becomesShown(t, "deleted", b, log, "deleted")
}

func (w *watched) becomesShown(t *testing.T, name string, b *ca.Bundle, log *lines, alarm string) {
	t.Helper()
	start := time.Now()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !w.shows(t, b) || !log.has(alarm) {
		if time.Since(start) > time.Minute {
			t.Fatalf("%s: not put right, or without an alarm", name)
		}
		<-tick.C
	}
	t.Logf("%s: put right after %v", name, time.Since(start).Round(time.Millisecond))
}

// documents are the two forms of a bundle.
func (c *cluster) documents(t testing.TB, b *ca.Bundle) [2]string {
	t.Helper()
	doc := spiffebundle.FromX509Authorities(b.TrustDomain, b.Roots)
	doc.SetSequenceNumber(b.Generation.Sequence())
	data, err := doc.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	pemDoc, err := doc.X509Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return [2]string{string(data), string(pemDoc)}
}

// testWriters has two replicas publish many generations at once: the highest is what is left, and each was told so.
func (w *watched) testWriters(t *testing.T) {
	const last = 40
	bundles := make([]*ca.Bundle, last+1)
	for i := 3; i <= last; i++ {
		bundles[i] = newBundle(t, uint32(i))
	}
	var wg sync.WaitGroup
	for range 2 {
		p := w.publisher(t, &lines{})
		wg.Go(func() {
			for _, b := range bundles[3:] {
				if err := p.Publish(t.Context(), b); err != nil && api.ReasonOf(err) != api.BundleRollback {
					t.Errorf("generation %s: %v", b.Generation, err)
				}
			}
		})
	}
	wg.Wait()
	if !w.shows(t, bundles[last]) {
		t.Error("the highest generation is not what is published")
	}
}
