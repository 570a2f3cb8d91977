package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/internal/kube"
)

// shown is a publisher beside an API server that a test can make misbehave.
type shown struct {
	*apiServer
	p       *KubePublisher
	metrics *Metrics

	mu  sync.Mutex
	log bytes.Buffer
}

// Write implements io.Writer, for the log.
func (s *shown) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(p)
}

func (s *shown) logged(text string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Count(s.log.String(), text)
}

const home = "signet-system"

func copyIn(namespace string) string {
	return "/api/v1/namespaces/" + namespace + "/configmaps/" + BundleConfigMap
}

func newShown(t *testing.T) *shown {
	t.Helper()
	return newHasty(t, 30*time.Second) // on a busy machine an answer may take seconds
}

// newHasty is newShown with a publisher that waits so long for an answer.
func newHasty(t *testing.T, timeout time.Duration) *shown {
	t.Helper()
	s := &shown{apiServer: newAPIServer(t), metrics: NewMetrics()}
	s.namespace(home, false)
	s.namespace("shop", true)
	s.p = s.publisher(t, timeout)
	return s
}

// publisher makes a publisher beside that API server.
func (s *shown) publisher(t *testing.T, timeout time.Duration) *KubePublisher {
	t.Helper()
	p, err := NewKubePublisher(KubePublisherConfig{
		Client: s.open(t, timeout), Namespace: home, Log: slog.New(slog.NewTextHandler(s, nil)), Copies: true, TrustBundle: td, Metrics: s.metrics,
	})
	if err != nil {
		t.Fatal(err)
	}
	p.copies.gap = time.Millisecond
	return p
}

// run runs the publisher until the test ends.
func (s *shown) run(t *testing.T) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.p.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
}

// becomes waits until ok.
func (s *shown) becomes(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(5 * time.Minute) // some wait for hundreds of requests
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			s.mu.Lock()
			defer s.mu.Unlock()
			t.Fatalf("%s: not within five minutes; the log:\n%s", what, s.log.Bytes())
		}
	}
}

// copied says whether a ConfigMap holds exactly b.
func (s *shown) copied(t *testing.T, namespace string, b *ca.Bundle) bool {
	t.Helper()
	want, err := documents(b)
	if err != nil {
		t.Fatal(err)
	}
	got := s.data(copyIn(namespace))
	return len(got) == 2 && got[BundleJSON] == want[BundleJSON] && got[BundlePEM] == want[BundlePEM]
}

// writes tells requests that write ConfigMaps from others.
func writes(r *http.Request) bool {
	return r.Method != http.MethodGet && strings.Contains(r.URL.Path, "/configmaps")
}

func TestCopies(t *testing.T) {
	one := newRoots(t, issuance.KeyP256)
	b := newBundle(api.Generation{Epoch: 1, Number: 2}, one...)
	start := func(t *testing.T, s *shown) *shown {
		t.Helper()
		s.run(t)
		if err := s.p.Publish(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		s.becomes(t, "the first copy", func() bool { return s.copied(t, "shop", b) })
		return s
	}
	// An API server in trouble is left alone more and more, whatever there is to do.
	for name, status := range map[string]int{"throttles": 429, "fails": 503, "hangs": -1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			timeout := 30 * time.Second
			if status < 0 { // that is waited for
				timeout = 2 * time.Second
			}
			s := start(t, newHasty(t, timeout))
			s.setFault(func(r *http.Request) int {
				if writes(r) {
					return status
				}
				return 0
			})
			for i := range 200 {
				s.namespace(fmt.Sprint("many-", i), true)
			}
			tried := func() (n int) {
				s.apiServer.mu.Lock()
				defer s.apiServer.mu.Unlock()
				for what, times := range s.asked {
					if strings.HasPrefix(what, "POST /api/v1/namespaces/many-") {
						n += times
					}
				}
				return n
			}
			s.becomes(t, "tried twice", func() bool { return tried() >= 2 })
			if n := tried(); n > 4 {
				t.Errorf("tried %d times at once", n)
			}
			s.setFault(nil)
			s.becomes(t, "all have copies", func() bool { return value(t, s.metrics, "signet_bundle_copies", "state", "current") == 201 })
			if n := value(t, s.metrics, "signet_bundle_reverts_total", "kind", "copy"); n != 0 {
				t.Errorf("%v changes are counted as somebody else's", n)
			}
		})
	}
	// A namespace that refuses keeps none of the others waiting, and is told of once.
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		s := start(t, newShown(t))
		s.setFault(func(r *http.Request) int {
			if writes(r) && strings.Contains(r.URL.Path, "/full/") {
				return 403
			}
			return 0
		})
		s.namespace("full", true)
		s.namespace("other", true)
		s.becomes(t, "another namespace", func() bool { return s.copied(t, "other", b) })
		s.becomes(t, "told", func() bool { return s.logged("cannot be written") == 1 })
		if n := s.count("POST /api/v1/namespaces/full/configmaps"); n < 3 || n > 5 {
			t.Errorf("tried %d times", n)
		}
	})
	// Until it is known who asks for copies, none looks unwanted; and what a list lacks is not gone for that alone.
	t.Run("half seen", func(t *testing.T) {
		t.Parallel()
		s := newShown(t)
		data, err := documents(b)
		if err != nil {
			t.Fatal(err)
		}
		for _, ns := range []string{"shop", "left"} {
			s.set(copyIn(ns), map[string]any{"metadata": map[string]any{"annotations": map[string]any{CopyOf: home + "/" + BundleConfigMap}}, "data": toAny(data)})
		}
		s.namespace("left", false)
		s.setFault(func(r *http.Request) int {
			if r.URL.Path == "/api/v1/namespaces" {
				return 503
			}
			return 0
		})
		s.run(t)
		if err := s.p.Publish(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		s.becomes(t, "ConfigMaps are seen", func() bool { return value(t, s.metrics, "signet_watch_objects", "part", "copies") >= 2 })
		s.becomes(t, "namespaces are asked for again", func() bool { return s.count("GET /api/v1/namespaces") >= 3 })
		if !s.copied(t, "shop", b) || !s.copied(t, "left", b) {
			t.Error("a copy is gone before anybody knows who asks for them")
		}
		s.setFault(nil)
		s.becomes(t, "the one that nobody asks for goes", func() bool { return s.data(copyIn("left")) == nil })
		s.becomes(t, "it is asked about", func() bool {
			s.p.copies.replaceNamespaces(nil) // a list that lacks one; the watch may tell of it again before anybody has looked
			return s.count("GET /api/v1/namespaces/shop") >= 1
		})
		if !s.copied(t, "shop", b) {
			t.Error("a copy is gone for a list that lacked its namespace")
		}
	})
	// What another CA shows as the original is not to be undone elsewhere.
	t.Run("another CA", func(t *testing.T) {
		t.Parallel()
		s := newShown(t)
		s.run(t)
		data, err := documents(newBundle(b.Generation, newRoots(t, issuance.KeyP256)...))
		if err != nil {
			t.Fatal(err)
		}
		s.set(copyIn(home), map[string]any{"data": toAny(data)})
		if err := s.p.Publish(t.Context(), b); api.ReasonOf(err) != api.BundleEquivocation {
			t.Fatalf("got %v", err)
		}
		s.becomes(t, "all is seen", func() bool { return value(t, s.metrics, "signet_watch_connected", "part", "copies") == 2 })
		if s.data(copyIn("shop")) != nil || s.count("POST /api/v1/namespaces/shop/configmaps") != 0 {
			t.Error("a copy was made of what nobody believes")
		}
		if n := value(t, s.metrics, "signet_bundle_write_failures_total", "cause", string(api.BundleEquivocation)); n != 1 {
			t.Errorf("%v failures are counted", n)
		}
	})
}

func toAny(data map[string]string) map[string]any {
	m := map[string]any{}
	for k, v := range data {
		m[k] = v
	}
	return m
}

// A copy that claims a higher generation is put right only if the original says that it is wrong.
func TestCopiesHigher(t *testing.T) {
	roots := newRoots(t, issuance.KeyP256)
	b, higher := newBundle(api.Generation{Epoch: 1, Number: 2}, roots...), newBundle(api.Generation{Epoch: 1, Number: 3}, roots...)
	s := newShown(t)
	if err := s.p.Publish(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	data, err := documents(higher)
	if err != nil {
		t.Fatal(err)
	}
	claims := map[string]any{"metadata": map[string]any{"annotations": map[string]any{CopyOf: home + "/" + BundleConfigMap}}, "data": toAny(data)}
	s.set(copyIn("shop"), claims)
	s.p.copies.labels = map[string]bool{"shop": true}
	s.p.copies.note(kube.Object{Namespace: "shop", UID: "x", Annotations: map[string]string{CopyOf: home + "/" + BundleConfigMap}})
	s.set(copyIn(home), maps.Clone(claims)) // another replica was faster
	if err := s.p.copies.settle(t.Context(), "shop"); !errors.Is(err, errReplaced) || !s.copied(t, "shop", higher) {
		t.Errorf("a newer bundle: %v", err)
	}
	s.set(copyIn(home), nil)
	s.p.last = nil
	if err := s.p.Publish(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if err := s.p.copies.settle(t.Context(), "shop"); err != nil || !s.copied(t, "shop", b) {
		t.Errorf("a forged one: %v", err)
	}
	if n := value(t, s.metrics, "signet_bundle_reverts_total", "kind", "copy"); n != 1 {
		t.Errorf("%v reverts", n)
	}
}

// What is urgent comes first, and nothing before its time.
func TestCopiesNext(t *testing.T) {
	now := time.Now()
	c := &copies{wake: make(chan struct{}, 1), due: map[string]dueCopy{}}
	for i := range 50 {
		c.add(fmt.Sprint("behind-", i), now, false)
	}
	c.add("changed", now, true)
	c.add("changed", now, false) // stays what it was
	c.add("later", now.Add(time.Minute), true)
	if got, _ := c.next(now); got != "changed" {
		t.Errorf("first %q", got)
	}
	for range 50 {
		if got, _ := c.next(now); !strings.HasPrefix(got, "behind-") {
			t.Errorf("then %q", got)
		}
	}
	if got, wait := c.next(now); got != "" || wait != time.Minute {
		t.Errorf("last %q, %v", got, wait)
	}
	if got, _ := c.next(now.Add(time.Minute)); got != "later" {
		t.Errorf("in the end %q", got)
	}
}

func TestBackoff(t *testing.T) {
	for fails, want := range map[int]time.Duration{1: time.Second, 2: 2 * time.Second, 6: 32 * time.Second, 7: time.Minute, 1000: time.Minute, math.MaxInt: time.Minute} {
		for range 100 {
			if got := backoff(fails, time.Minute); got < want/2 || got > want {
				t.Fatalf("after %d failures %v, want up to %v", fails, got, want)
			}
		}
	}
}

// The ClusterTrustBundle of an API server that knows none is done without, and is there as soon as it does.
func TestTrustBundleAbsent(t *testing.T) {
	t.Parallel()
	b := newBundle(api.Generation{Epoch: 1, Number: 1}, newRoots(t, issuance.KeyP256)...)
	s := newShown(t)
	const path = "/apis/certificates.k8s.io/v1/clustertrustbundles"
	s.setFault(func(r *http.Request) int {
		if strings.HasPrefix(r.URL.Path, path) {
			return 404
		}
		return 0
	})
	if there, err := s.p.Published(t.Context(), td); there || err != nil {
		t.Errorf("published: %t, %v", there, err)
	}
	s.run(t)
	if err := s.p.Publish(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	s.becomes(t, "told", func() bool { return s.logged("knows no ClusterTrustBundles") > 0 })
	s.becomes(t, "copies are made", func() bool { return s.copied(t, "shop", b) })
	if n := value(t, s.metrics, "signet_bundle_write_failures_total", "kind", "trust_bundle"); n != 0 {
		t.Errorf("%v failures", n)
	}
	// Not later: an answer that is on its way now would be news after the watch has told of the kind.
	if n := s.logged("knows no ClusterTrustBundles"); n != 1 {
		t.Errorf("told %d times", n)
	}
	s.setFault(nil)
	s.p.trust.look(0) // as its watch does after a minute at most
	s.becomes(t, "it is there", func() bool {
		s.apiServer.mu.Lock()
		defer s.apiServer.mu.Unlock()
		return s.objects[path+"/"+TrustBundleName(td)] != nil
	})
}

func TestTrustBundleNamed(t *testing.T) {
	for name, want := range map[string]bool{
		"example.org": true, "a": true, "a-b.c1": true, "1": true, "a_b": false, "-a": false, "a-": false, "a..b": false, ".a": false, "": false,
		strings.Repeat("a", 253): true, strings.Repeat("a", 254): false, "a\n": false, "A": false,
	} {
		if got := TrustBundleNamed(name); got != want {
			t.Errorf("%.40q: %t", name, got)
		}
	}
}

// An age counts the time for which the machine slept.
func TestAge(t *testing.T) {
	now := time.Now()
	if got := age(now, now.Add(-time.Second)); got != time.Second {
		t.Errorf("got %v", got)
	}
	slept := now.Round(0).Add(time.Hour) // the wall clock alone went on
	if got := age(slept, now); got != time.Hour {
		t.Errorf("got %v", got)
	}
}

// What somebody changed while the API server takes no writes is put right seconds after it does again: for the ConfigMap
// that agents believe that is tried over and over, with growing pauses.
func TestRestoreAgain(t *testing.T) {
	t.Parallel()
	b := newBundle(api.Generation{Epoch: 1, Number: 1}, newRoots(t, issuance.KeyP256)...)
	s := newShown(t)
	s.run(t)
	if err := s.p.Publish(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	s.becomes(t, "it is seen", func() bool { return value(t, s.metrics, "signet_watch_connected", "part", "bundle") == 1 })
	s.setFault(func(r *http.Request) int {
		if r.Method == http.MethodPut {
			return 503
		}
		return 0
	})
	s.set(copyIn(home), map[string]any{"data": map[string]any{BundleJSON: "x"}})
	failures := func() float64 { return value(t, s.metrics, "signet_bundle_write_failures_total", "kind", kindBundle) }
	s.becomes(t, "tried again", func() bool { return failures() >= 2 })
	if n := failures(); n > 4 {
		t.Errorf("tried %v times at once", n)
	}
	s.setFault(nil)
	s.becomes(t, "it is put right", func() bool { return s.copied(t, home, b) })
	if n := value(t, s.metrics, "signet_bundle_reverts_total", "kind", kindBundle); n < 1 {
		t.Errorf("%v reverts", n)
	}
}
