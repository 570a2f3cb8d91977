package kube_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/internal/kube"
)

// What is written is sent as it is, once, and an answer that is no success leaves no doubt why.
func TestWrite(t *testing.T) {
	s := newServer(t, true)
	c := s.open(t)
	configMap := func(version string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := c.WriteConfigMap(ctx, kube.ConfigMap{
				Namespace: "shop", Name: "a", ResourceVersion: version, Annotations: map[string]string{"x": "y"}, Data: map[string]string{"k": "v"},
			})
			return err
		}
	}
	trustBundle := func(version string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := c.WriteTrustBundle(ctx, kube.TrustBundle{Name: "s.dev:b:td", ResourceVersion: version, Signer: "s.dev/b", PEM: "pem"})
			return err
		}
	}
	remove := func(ctx context.Context) error {
		return c.Delete(ctx, kube.ConfigMaps, kube.Object{Namespace: "shop", Name: "a", UID: "u", ResourceVersion: "5"})
	}
	const answer = `{"metadata":{"name":"a","uid":"u"}}`
	for _, tc := range []struct {
		name   string
		do     func(context.Context) error
		status int
		answer string
		want   string // method, path and body
		err    error
		text   string
	}{
		{"made", configMap(""), 201, answer, `POST /api/v1/namespaces/shop/configmaps {"apiVersion":"v1","data":{"k":"v"},"kind":"ConfigMap","metadata":{"annotations":{"x":"y"},"name":"a","namespace":"shop"}}`, nil, ""},
		{"replaced", configMap("5"), 200, answer, `PUT /api/v1/namespaces/shop/configmaps/a {"apiVersion":"v1","data":{"k":"v"},"kind":"ConfigMap","metadata":{"annotations":{"x":"y"},"name":"a","namespace":"shop","resourceVersion":"5"}}`, nil, ""},
		{"trust bundle made", trustBundle(""), 201, answer, `POST /apis/certificates.k8s.io/v1/clustertrustbundles {"apiVersion":"certificates.k8s.io/v1","kind":"ClusterTrustBundle","metadata":{"name":"s.dev:b:td"},"spec":{"signerName":"s.dev/b","trustBundle":"pem"}}`, nil, ""},
		{"trust bundle replaced", trustBundle("5"), 200, answer, `PUT /apis/certificates.k8s.io/v1/clustertrustbundles/s.dev:b:td {"apiVersion":"certificates.k8s.io/v1","kind":"ClusterTrustBundle","metadata":{"name":"s.dev:b:td","resourceVersion":"5"},"spec":{"signerName":"s.dev/b","trustBundle":"pem"}}`, nil, ""},
		{"deleted", remove, 200, answer, `DELETE /api/v1/namespaces/shop/configmaps/a {"apiVersion":"v1","kind":"DeleteOptions","preconditions":{"resourceVersion":"5","uid":"u"}}`, nil, ""},
		{"there already", configMap(""), 409, `{}`, "", kube.ErrConflict, ""},
		{"changed", configMap("5"), 409, `{}`, "", kube.ErrConflict, ""},
		{"gone", configMap("5"), 404, `{}`, "", kube.ErrConflict, ""},
		{"of no kind", trustBundle(""), 404, `404 page not found`, "", kube.ErrNotFound, ""},
		{"another one is deleted", remove, 409, `{}`, "", kube.ErrConflict, ""},
		{"nothing is deleted", remove, 404, `{}`, "", kube.ErrNotFound, ""},
		{"forbidden", configMap(""), 403, `{"message":"` + strings.Repeat("x", 4096) + `"}`, "", kube.ErrForbidden, "403"},
		{"an answer that is no object", configMap(""), 201, `[]`, "", nil, "does not parse"},
		{"an answer of nobody", configMap(""), 201, `{}`, "", nil, "not an object"},
		{"half an answer", configMap(""), 201, `{"metadata":`, "", nil, "does not parse"},
		{"a huge answer", configMap(""), 201, strings.Repeat(" ", 9<<20), "", nil, "above"},
		{"elsewhere", configMap(""), 307, ``, "", nil, "redirects"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			s.answer(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				got = append(got, r.Method+" "+r.URL.Path+" "+string(body))
				w.Header().Set("Content-Type", "application/json")
				w.Header().Set("Location", "https://elsewhere.invalid/")
				w.WriteHeader(tc.status)
				io.WriteString(w, tc.answer)
			})
			err := tc.do(t.Context())
			switch {
			case tc.want != "":
				if diff := cmp.Diff([]string{tc.want}, got); err != nil || diff != "" {
					t.Errorf("%v\n%s", err, diff)
				}
			case err == nil || tc.err != nil && !errors.Is(err, tc.err) || !strings.Contains(err.Error(), tc.text) || len(err.Error()) > 512:
				t.Errorf("got %v, want %v %q", err, tc.err, tc.text)
			case len(got) != 1:
				t.Errorf("asked %d times", len(got))
			}
		})
	}
}

// Every failure has a cause of the closed set.
func TestCauseOf(t *testing.T) {
	s := newServer(t, false)
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	for _, tc := range []struct {
		want    kube.Cause
		general bool
		answer  http.HandlerFunc
	}{
		{kube.CauseForbidden, false, status(403)},
		{kube.CauseAbsent, false, status(404)},
		{kube.CauseConflict, false, status(409)},
		{kube.CauseExpired, false, status(410)},
		{kube.CauseInvalid, false, status(422)},
		{kube.CauseThrottled, true, status(429)},
		{kube.CauseServer, true, status(500)},
		{kube.CauseBroken, true, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }},
		{kube.CauseBroken, true, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
		{kube.CauseTimeout, true, func(http.ResponseWriter, *http.Request) { <-hang }},
	} {
		t.Run(string(tc.want), func(t *testing.T) {
			timeout := 30 * time.Second // what answers may take its time
			if tc.want == kube.CauseTimeout {
				timeout = 500 * time.Millisecond
			}
			c := open(t, kube.Config{Kubeconfig: s.kubeconfig(t), Timeout: timeout})
			s.answer(tc.answer)
			_, err := c.Get(t.Context(), kube.ConfigMaps, "shop", "a")
			if err == nil {
				t.Fatal("no error")
			}
			if got := kube.CauseOf(err); got != tc.want || got.General() != tc.general {
				t.Errorf("%v is %s, general %t", err, got, got.General())
			}
		})
	}
	away := open(t, kube.Config{Kubeconfig: s.kubeconfig(t, [2]string{s.URL, "https://127.0.0.1:1"})})
	if _, err := away.Get(t.Context(), kube.ConfigMaps, "shop", "a"); kube.CauseOf(err) != kube.CauseUnreachable {
		t.Errorf("%v is %s", err, kube.CauseOf(err))
	}
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		send(w, code, map[string]any{"kind": "Status", "code": code})
	}
}

// No two ConfigMaps have the same digest, however they are cut.
func TestDigest(t *testing.T) {
	seen := map[[32]byte]int{}
	for i, data := range []map[string]string{
		nil, {"": ""}, {"a": ""}, {"": "a"}, {"a": "b"}, {"ab": ""}, {"a": "b", "c": ""}, {"a": "bc"}, {"a": "", "b": ""},
	} {
		d := kube.Digest(data)
		if other, ok := seen[d]; ok {
			t.Errorf("%d and %d have the same digest", i, other)
		}
		seen[d] = i
	}
}

// A watch of one name in all namespaces: what is asked, where it is probed, and what is kept of an object.
func TestWatchNarrow(t *testing.T) {
	s := newServer(t, true)
	var mu sync.Mutex
	asked := map[string]bool{}
	const item = `{"metadata":{"name":"b","namespace":"shop","uid":"u","resourceVersion":"1","labels":{"signet.dev/x":"1","other":"2"},"annotations":{"other":"3"}},"data":{"k":"v"},"binaryData":{"l":"AAAA"},"immutable":true}`
	answer := pods(func(string) string { return listOf("10", "", item) }, func(string, io.Writer) bool { return true })
	s.answer(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		mu.Lock()
		asked[r.URL.Path+" "+q.Get("fieldSelector")+" "+q.Get("labelSelector")+" watch="+q.Get("watch")+" limit="+q.Get("limit")] = true
		mu.Unlock()
		answer(w, r)
	})
	got := make(chan []kube.Object, 1)
	w := s.open(t).NewWatch(kube.WatchConfig{
		Resource: kube.ConfigMaps, Name: "b", Labels: "x=y", Digest: true, ProbeNamespace: "home", Stale: patient,
		Replace: func(all []kube.Object) { got <- all }, Apply: func(kube.Object, bool) {},
	})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	want := []kube.Object{{
		Namespace: "shop", Name: "b", UID: "u", ResourceVersion: "1", Labels: map[string]string{"signet.dev/x": "1"},
		Digest: kube.Digest(map[string]string{"k": "v", "l": "AAAA"}), Immutable: true,
	}}
	if diff := cmp.Diff(want, <-got); diff != "" {
		t.Error(diff)
	}
	advances(t, w)
	if !w.Connected() {
		t.Error("it is not connected")
	}
	for _, q := range []string{
		"/api/v1/configmaps metadata.name=b x=y watch= limit=500", "/api/v1/configmaps metadata.name=b x=y watch=1 limit=",
		"/api/v1/namespaces/home/configmaps metadata.name=b x=y watch= limit=1",
	} {
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) { // the probe may come later than the list
			mu.Lock()
			ok, all := asked[q], maps.Clone(asked)
			mu.Unlock()
			if ok {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s was not asked: %v", q, all)
			}
		}
	}
}

// An API server that knows no such kind of object is not asked all the time.
func TestWatchAbsent(t *testing.T) {
	s := newServer(t, true)
	s.answer(func(w http.ResponseWriter, _ *http.Request) { http.NotFound(w, nil) })
	failed := make(chan error, 16)
	w := s.open(t).NewWatch(kube.WatchConfig{
		Resource: kube.ClusterTrustBundles, Stale: time.Second,
		Replace: func([]kube.Object) { t.Error("a list") }, Apply: func(kube.Object, bool) { t.Error("an object") },
		Failed: func(err error) { failed <- err },
	})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.Run(ctx) })
	if err := <-failed; !errors.Is(err, kube.ErrNotFound) {
		t.Errorf("got %v", err)
	}
	select {
	case err := <-failed:
		t.Errorf("asked again at once: %v", err)
	case <-time.After(2 * time.Second): // a watch that failed otherwise would have been opened anew three times by now
	}
	cancel()
	wg.Wait()
	if n := s.asked.Load(); n != 1 || w.Connected() || !w.Seen().IsZero() {
		t.Errorf("asked %d times", n)
	}
}

// FuzzObject reads one object of any bytes: an object or an error, and nothing of others' labels is kept.
func FuzzObject(f *testing.F) {
	s := newServer(f, false)
	c := s.open(f)
	f.Add([]byte(`{"metadata":{"name":"a","uid":"u","labels":{"signet.dev/a":"b","c":"d"},"annotations":null},"binaryData":{"a":"b"},"immutable":true}`))
	f.Add([]byte(`{"metadata":{"name":"a","uid":"u","annotations":{"signet.dev/a":1}}}`))
	f.Add([]byte(`{"metadata":{"name":"a","uid":"u"},"spec":{"signerName":"s","trustBundle":"t"}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		s.answer(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Write(body)
		})
		o, err := c.Get(t.Context(), kube.ConfigMaps, "shop", "a")
		if err == nil && (o.UID == "" || o.Name == "" || !json.Valid(body)) {
			t.Errorf("got %+v", o)
		}
		for _, m := range []map[string]string{o.Labels, o.Annotations} {
			for k := range m {
				if !strings.HasPrefix(k, kube.OurPrefix) {
					t.Errorf("%q is kept", k)
				}
			}
		}
	})
}
