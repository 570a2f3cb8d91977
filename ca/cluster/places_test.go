package cluster

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

// Both publishers tell of each place where they show the bundle.
var (
	_ ca.CopyTeller = (*KubePublisher)(nil)
	_ ca.CopyTeller = (*FilePublisher)(nil)
)

const (
	originalPlace = "configmap/" + home + "/" + BundleConfigMap
	unseenPlace   = "configmap/*/" + BundleConfigMap
)

var trustPlace = "clustertrustbundle/" + TrustBundleName(td)

func copyPlace(namespace string) string { return "configmap/" + namespace + "/" + BundleConfigMap }

// at returns what is told of a place.
func at(p ca.CopyTeller, place string) (journal.Copy, bool) {
	all, _ := p.Copies()
	i := slices.IndexFunc(all, func(c journal.Copy) bool { return c.Kind+"/"+c.Name == place })
	if i < 0 {
		return journal.Copy{}, false
	}
	return all[i], true
}

// shows says whether a place is said to hold b, or nothing where b is nil, and to have failed for that reason.
func shows(p ca.CopyTeller, place string, b *ca.Bundle, failed api.Reason) bool {
	c, ok := at(p, place)
	want := journal.Held{}
	if b != nil {
		want = heldOf(b)
	}
	return ok && c.Held == want && c.Failed == string(failed) && (failed == "") == c.FailedAt.IsZero()
}

func told(p ca.CopyTeller) (names []string) {
	all, _ := p.Copies()
	for _, c := range all {
		names = append(names, c.Kind+"/"+c.Name)
	}
	return names
}

// TestPlaces tells of each place by what is there, not by what should be: as it is written, as it cannot be, as it is somebody else's, and
// no more of what nobody asks for.
func TestPlaces(t *testing.T) {
	t.Parallel()
	s := newShown(t)
	roots := newRoots(t, issuance.KeyP256, issuance.KeyP256)
	first := newBundle(api.Generation{Epoch: 1, Number: 2}, roots[0])
	second := newBundle(api.Generation{Epoch: 1, Number: 3}, roots...)
	if got, want := told(s.p), []string{originalPlace, trustPlace, unseenPlace}; !slices.Equal(got, want) {
		t.Errorf("before anything is seen it tells of %v, want %v", got, want)
	}
	if !shows(s.p, originalPlace, nil, "") || !shows(s.p, trustPlace, nil, "") || !shows(s.p, unseenPlace, nil, "") {
		t.Error("something is told to be there before anybody has looked")
	}
	s.namespace("full", true)
	s.namespace("gone", true)
	s.namespace("taken", true)
	s.set(copyIn("taken"), map[string]any{"data": map[string]any{"mine": "1"}})
	s.run(t)
	if err := s.p.Publish(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	all := []string{originalPlace, trustPlace, copyPlace("full"), copyPlace("gone"), copyPlace("shop"), copyPlace("taken")}
	s.becomes(t, "all are told of", func() bool { return slices.Equal(told(s.p), all) })
	for _, place := range all[:5] {
		s.becomes(t, place+" shows it", func() bool { return shows(s.p, place, first, "") })
	}
	s.becomes(t, "somebody else's is told of", func() bool { return shows(s.p, copyPlace("taken"), nil, api.BundleForeign) })
	if c, _ := at(s.p, copyPlace("shop")); c.Namespace != "shop" {
		t.Errorf("the copy's namespace is %q", c.Namespace)
	}

	before, _ := at(s.p, originalPlace)
	if err := s.p.Publish(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if after, _ := at(s.p, originalPlace); after != before {
		t.Errorf("the same again: %+v, was %+v", after, before)
	}

	// What cannot be written holds what it held.
	s.setFault(func(r *http.Request) int {
		if r.Method != http.MethodGet && (strings.Contains(r.URL.Path, "/full/") || strings.Contains(r.URL.Path, "clustertrustbundles")) {
			return 403
		}
		return 0
	})
	_, changed := s.p.Copies()
	if err := s.p.Publish(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	case <-time.After(time.Minute):
		t.Error("nobody is told that something changed")
	}
	for _, place := range []string{originalPlace, copyPlace("shop"), copyPlace("gone")} {
		s.becomes(t, place+" shows the next", func() bool { return shows(s.p, place, second, "") })
	}
	for _, place := range []string{trustPlace, copyPlace("full")} {
		s.becomes(t, place+" does not", func() bool { return shows(s.p, place, first, api.PublishForbidden) })
	}

	// In a namespace that was made after the bundle nobody can have another one; in one that only asks since then he can.
	now := time.Now()
	for ns, made := range map[string]time.Time{"old": now.Add(-time.Hour), "young": now.Add(time.Hour)} {
		s.set("/api/v1/namespaces/"+ns, map[string]any{"metadata": map[string]any{
			"labels": map[string]any{CopiesLabel: "true"}, "creationTimestamp": made.UTC().Format(time.RFC3339)}})
		s.becomes(t, ns+" shows it", func() bool { return shows(s.p, copyPlace(ns), second, "") })
		if c, _ := at(s.p, copyPlace(ns)); c.At.Before(now) != (ns == "young") {
			t.Errorf("%s shows it since %s, and it is %s", ns, c.At, now)
		}
		s.set("/api/v1/namespaces/"+ns, nil)
	}

	// A namespace that ends is nobody's concern; nor is one that asks no longer.
	s.set("/api/v1/namespaces/gone", nil)
	s.namespace("taken", false)
	s.becomes(t, "they are told of no more", func() bool {
		return slices.Equal(told(s.p), []string{originalPlace, trustPlace, copyPlace("full"), copyPlace("shop")})
	})

	t.Run("restarted", func(t *testing.T) {
		// The next process knows nothing but what is there.
		next := newBeside(t, s)
		next.run(t)
		if err := next.p.Publish(t.Context(), second); err != nil {
			t.Fatal(err)
		}
		for place, b := range map[string]*ca.Bundle{originalPlace: second, copyPlace("shop"): second} {
			next.becomes(t, place+" is read", func() bool { return shows(next.p, place, b, "") })
		}
		for _, place := range []string{trustPlace, copyPlace("full")} {
			next.becomes(t, place+" is read", func() bool { return shows(next.p, place, first, api.PublishForbidden) })
		}
	})

	s.setFault(nil)
	s.namespace("taken", true)
	s.set(copyIn("taken"), nil)
	s.becomes(t, "what is out of the way is replaced", func() bool { return shows(s.p, copyPlace("taken"), second, "") })
}

// newBeside is another publisher at the same API server.
func newBeside(t *testing.T, s *shown) *shown {
	t.Helper()
	next := &shown{apiServer: s.apiServer, metrics: NewMetrics()}
	next.p = next.publisher(t, 30*time.Second)
	return next
}

// TestPlacesUnseen tells why it is not known who asks for copies, and names no ClusterTrustBundle where the API server knows none.
func TestPlacesUnseen(t *testing.T) {
	t.Parallel()
	b := newBundle(api.Generation{Epoch: 1, Number: 1}, newRoots(t, issuance.KeyP256)...)
	s := newShown(t)
	s.setFault(func(r *http.Request) int {
		switch {
		case r.URL.Path == "/api/v1/namespaces":
			return 403
		case strings.Contains(r.URL.Path, "clustertrustbundles"):
			return 404
		}
		return 0
	})
	s.run(t)
	if err := s.p.Publish(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	s.becomes(t, "who asks is not known", func() bool {
		return shows(s.p, unseenPlace, nil, api.PublishForbidden) && slices.Equal(told(s.p), []string{originalPlace, unseenPlace})
	})
	if !shows(s.p, originalPlace, b, "") {
		t.Error("the original is not told of")
	}
}

// TestPlacesAnother tells of an original that another CA shows what is there, and why it is left alone.
func TestPlacesAnother(t *testing.T) {
	t.Parallel()
	s := newShown(t)
	b := newBundle(api.Generation{Epoch: 1, Number: 2}, newRoots(t, issuance.KeyP256)...)
	other := newBundle(b.Generation, newRoots(t, issuance.KeyP256)...)
	data, err := documents(other)
	if err != nil {
		t.Fatal(err)
	}
	s.set(copyIn(home), map[string]any{"data": toAny(data)})
	if err := s.p.Publish(t.Context(), b); api.ReasonOf(err) != api.BundleEquivocation || !shows(s.p, originalPlace, other, api.BundleEquivocation) {
		c, _ := at(s.p, originalPlace)
		t.Errorf("published: %v; told: %+v", err, c)
	}
	s.set(copyIn(home), nil)
	s.setFault(func(r *http.Request) int {
		if writes(r) {
			return 500
		}
		return 0
	})
	if err := s.p.Publish(t.Context(), b); err == nil || !shows(s.p, originalPlace, nil, api.PublishFailed) {
		c, _ := at(s.p, originalPlace)
		t.Errorf("published: %v; told: %+v", err, c)
	}
}

// TestPlacesFile tells of each file by what is in it.
func TestPlacesFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "bundle")
	p := newFiles(dir)
	roots := newRoots(t, issuance.KeyP256, issuance.KeyP256)
	first, second := newBundle(api.Generation{Epoch: 1, Number: 2}, roots[0]), newBundle(api.Generation{Epoch: 1, Number: 3}, roots...)
	const doc, pem = "file/" + BundleJSON, "file/" + BundlePEM
	both := func(what string, doc1, pem1 bool) {
		t.Helper()
		if !doc1 || !pem1 {
			all, _ := p.Copies()
			t.Errorf("%s: %+v", what, all)
		}
	}
	both("nothing is there", shows(p, doc, nil, ""), shows(p, pem, nil, ""))
	_, changed := p.Copies()
	publish(t, p, first)
	select {
	case <-changed:
	default:
		t.Error("nobody is told that something changed")
	}
	both("published", shows(p, doc, first, ""), shows(p, pem, first, ""))
	before, _ := at(p, doc)
	publish(t, p, first)
	if after, _ := at(p, doc); after != before {
		t.Errorf("the same again: %+v, was %+v", after, before)
	}
	if err := os.Remove(filepath.Join(dir, BundlePEM)); err != nil {
		t.Fatal(err)
	}
	both("one is removed", shows(p, doc, first, ""), shows(p, pem, nil, ""))
	publish(t, p, first)
	both("and made anew", shows(p, doc, first, ""), shows(p, pem, first, ""))
	if err := os.Remove(filepath.Join(dir, BundlePEM)); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, BundlePEM), 0o700); err != nil { // in the way, whoever runs the test
		t.Fatal(err)
	}
	both("one cannot be read", shows(p, doc, first, ""), shows(p, pem, nil, api.PublishFailed))
	if err := p.Publish(t.Context(), second); err == nil {
		t.Fatal("written over a folder")
	}
	both("one cannot be written", shows(p, doc, second, ""), shows(p, pem, nil, api.PublishFailed))

	// The next process reads what is there; of a bundle.pem alone nobody can tell the generation.
	if err := os.Remove(filepath.Join(dir, BundlePEM)); err != nil {
		t.Fatal(err)
	}
	publish(t, p, second)
	p = newFiles(dir)
	if c, _ := at(p, doc); c.Held.Generation != second.Generation {
		t.Errorf("after a restart: %+v", c)
	}
	both("after a restart", true, shows(p, pem, nil, ""))
	publish(t, p, second)
	both("after a restart, published", shows(p, doc, second, ""), shows(p, pem, second, ""))
	if err := p.Publish(t.Context(), first); api.ReasonOf(err) != api.BundleRollback {
		t.Fatalf("an older one: %v", err)
	}
	if c, _ := at(p, doc); c.Held.Generation != second.Generation || c.Failed != string(api.BundleRollback) {
		t.Errorf("of an older one: %+v", c)
	}
}

func TestFailedBy(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want api.Reason
	}{
		{nil, ""}, {os.ErrPermission, api.PublishForbidden}, {errors.New("disk"), api.PublishFailed}, {errReplaced, api.PublishFailed},
		{api.E(api.BundleRollback, "older"), api.BundleRollback},
	} {
		if got := failedBy(tt.err); got != tt.want {
			t.Errorf("%v: %s, want %s", tt.err, got, tt.want)
		}
	}
}
