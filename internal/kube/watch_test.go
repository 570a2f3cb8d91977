package kube_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/internal/kube"
)

// pod is one as an API server writes it, with much that nobody needs.
func pod(name, version, more string) string {
	return fmt.Sprintf(`{"kind":"Pod","apiVersion":"v1","metadata":{"name":%q,"namespace":"shop","uid":"uid-%s","resourceVersion":%q,"creationTimestamp":"2026-01-02T03:04:05Z","managedFields":[{}]%s},
"spec":{"nodeName":"node-1","serviceAccountName":"web","containers":[{}]},"status":{"phase":"Running"}}`, name, name, version, more)
}

// told is what a watch told of, in order.
type told struct {
	mu     sync.Mutex
	what   []string
	failed []string
	woken  chan struct{}
}

func (w *told) add(list *[]string, s string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*list = append(*list, s)
	select {
	case w.woken <- struct{}{}:
	default:
	}
}

// until waits until ok, which is asked at each change, and returns what was told by then.
func (w *told) until(t *testing.T, ok func(what, failed []string) bool) (what, failed []string) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		w.mu.Lock()
		what, failed = slices.Clone(w.what), slices.Clone(w.failed)
		w.mu.Unlock()
		if ok(what, failed) {
			return what, failed
		}
		select {
		case <-w.woken:
		case <-deadline:
			t.Fatalf("told of %.2000q, failures %.2000q", what, failed)
		}
	}
}

// patient is how soon a watch of these tests is stale that has to bear with a machine which does nothing else for seconds: it
// gives a stream up after three times as long.
const patient = 5 * time.Second

// follow watches the pods of s until the test ends.
func follow(t *testing.T, s *server, timeout, stale time.Duration) (*kube.Watch, *told) {
	t.Helper()
	got := &told{woken: make(chan struct{}, 1)}
	w := open(t, kube.Config{Kubeconfig: s.kubeconfig(t), Timeout: timeout}).NewWatch(kube.WatchConfig{
		Resource: kube.Pods, Stale: stale,
		Replace: func(all []kube.Object) {
			var names strings.Builder
			names.WriteString("list")
			for _, o := range all {
				names.WriteString(" " + o.Name)
			}
			got.add(&got.what, names.String())
		},
		Apply: func(o kube.Object, deleted bool) {
			got.add(&got.what, fmt.Sprintf("%s %s %t %t", o.Name, o.NodeName, deleted, !o.DeleteAt.IsZero()))
		},
		Failed: func(err error) { got.add(&got.failed, err.Error()) },
	})
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := w.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return w, got
}

// pods answers as an API server: list gives the pages, stream each stream in turn; the last stays open and silent. Probes
// are always answered.
func pods(list func(page string) string, stream func(version string, w io.Writer) bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		w.Header().Set("Content-Type", "application/json")
		switch {
		case q.Get("watch") != "":
			w.(http.Flusher).Flush()
			if stream(q.Get("resourceVersion"), w) {
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			}
		case q.Get("limit") == "1":
			io.WriteString(w, listOf("99", ""))
		default:
			io.WriteString(w, list(q.Get("continue")))
		}
	}
}

func listOf(version, next string, items ...string) string {
	return fmt.Sprintf(`{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":%q,"continue":%q},"items":[%s]}`, version, next, strings.Join(items, ","))
}

func eventOf(kind, object string) string {
	return fmt.Sprintf(`{"type":%q,"object":%s}`+"\n", kind, object)
}

// advances waits until more is seen than now.
func advances(t *testing.T, w *kube.Watch) {
	t.Helper()
	first, deadline := w.Seen(), time.After(30*time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !w.Seen().After(first) {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("nothing more is seen")
		}
	}
}

// A watch from its first list over everything that may come, to a list anew.
//
// threat: G03
func TestWatch(t *testing.T) {
	s := newServer(t, true)
	var mu sync.Mutex
	var versions []string
	s.answer(pods(func(page string) string {
		if page == "" {
			return listOf("10", "more", pod("a", "1", ""), pod("b", "2", ""))
		}
		return listOf("10", "", pod("c", "3", ""))
	}, func(version string, w io.Writer) bool {
		mu.Lock()
		versions = append(versions, version)
		n := len(versions)
		mu.Unlock()
		switch n {
		case 1:
			io.WriteString(w, eventOf("ADDED", pod("d", "11", ""))+eventOf("MODIFIED", pod("a", "12", `,"deletionTimestamp":"2026-01-02T03:05:05Z"`))+
				eventOf("DELETED", pod("b", "13", ""))+eventOf("BOOKMARK", `{"metadata":{"resourceVersion":"20"}}`))
			return false
		case 2:
			io.WriteString(w, eventOf("ERROR", `{"kind":"Status","code":410,"reason":"Expired"}`))
			return false
		}
		return true
	}))
	w, got := follow(t, s, 30*time.Second, patient)
	want := []string{"list a b c", "d node-1 false false", "a node-1 false true", "b node-1 true false", "list a b c"}
	if what, _ := got.until(t, func(what, _ []string) bool { return len(what) == len(want) }); !slices.Equal(what, want) {
		t.Errorf("told of %q, want %q", what, want)
	}
	advances(t, w)
	mu.Lock()
	defer mu.Unlock()
	if fmt.Sprint(versions) != "[10 20 10]" {
		t.Errorf("streams began at %v", versions)
	}
}

// A server that raves: each answer ends in a failure that is told, and the watch goes on.
//
// threat: G11
func TestWatchHostile(t *testing.T) {
	huge := pod("huge", "5", `,"annotations":{"x":"`+strings.Repeat("x", 9<<20)+`"}`)
	good := listOf("10", "", pod("a", "1", ""))
	for _, tc := range []struct {
		name, list, stream, want string
	}{
		{"no list", `[]`, "", "not a list"},
		{"a list of nothing", `{}`, "", "not of one version"},
		{"half a list", `{"metadata":{"resourceVersion":"1"},"items":[` + pod("a", "1", ""), "", "EOF"},
		{"items that are none", `{"metadata":{"resourceVersion":"1"},"items":[1]}`, "", "cannot unmarshal"},
		{"an item that is nobody", `{"metadata":{"resourceVersion":"1"},"items":[{}]}`, "", "not an object"},
		{"a huge item", listOf("10", "", huge), "", "above"},
		{"garbage", good, "canary", "broke off"},
		{"half an event", good, `{"type":"ADDED","object":{"metadata":`, "broke off"},
		{"a huge event", good, eventOf("ADDED", huge), "above"},
		{"an event of no object", good, eventOf("ADDED", `{}`), "something else"},
		{"an event of another type", good, eventOf("RENAMED", pod("b", "11", "")), "unknown type"},
		{"an error that is none", good, eventOf("ERROR", `"no"`), "does not parse"},
		{"an error", good, eventOf("ERROR", `{"code":500,"message":"oh"}`), "status 500"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t, true)
			s.answer(pods(func(string) string { return tc.list }, func(_ string, w io.Writer) bool {
				io.WriteString(w, tc.stream)
				return false
			}))
			w, got := follow(t, s, 30*time.Second, time.Minute)
			_, failed := got.until(t, func(_, failed []string) bool { return len(failed) >= 2 })
			if !strings.Contains(failed[0], tc.want) {
				t.Errorf("failed with %q, want %q", failed[0], tc.want)
			}
			if tc.list != good && !w.Seen().IsZero() {
				t.Error("it is seen without a list")
			}
		})
	}
}

// An open stream is not enough: while probes are not answered, nothing more is seen.
//
// threat: G01
func TestWatchHangs(t *testing.T) {
	s := newServer(t, true)
	hung := make(chan struct{})
	answer := pods(func(string) string { return listOf("10", "") }, func(string, io.Writer) bool { return true })
	s.answer(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("limit") == "1" {
			select {
			case <-hung:
				<-r.Context().Done()
				return
			default:
			}
		}
		answer(w, r)
	})
	w, got := follow(t, s, 2*time.Second, time.Second)
	got.until(t, func(what, _ []string) bool { return len(what) == 1 })
	advances(t, w)
	close(hung)
	at := time.Now()
	// The stream is given up after three times the bound, and the next one is worth nothing without a probe either.
	got.until(t, func(_, failed []string) bool { return len(failed) >= 1 })
	if seen := w.Seen(); seen.After(at.Add(time.Second)) {
		t.Errorf("seen %v after the last answer", seen.Sub(at))
	}
}

func TestGet(t *testing.T) {
	s := newServer(t, true)
	c := s.open(t)
	s.answer(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("User-Agent") != "signet-ca/test" || r.Header.Get("Authorization") != "Bearer "+bearer {
			t.Errorf("headers %v", r.Header)
		}
		switch r.URL.EscapedPath() {
		case "/api/v1/namespaces/shop/pods/a":
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, pod("a", "1", ""))
		case "/api/v1/namespaces/shop%2F..%2Fx/pods/a%3Fb":
			send(w, http.StatusNotFound, map[string]any{"kind": "Status", "code": 404})
		default:
			t.Errorf("asked for %s", r.URL.EscapedPath())
		}
	})
	o, err := c.Get(t.Context(), kube.Pods, "shop", "a")
	want := kube.Object{Namespace: "shop", Name: "a", UID: "uid-a", ResourceVersion: "1", Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), NodeName: "node-1", ServiceAccount: "web", Phase: "Running"}
	if err != nil || fmt.Sprint(o) != fmt.Sprint(want) {
		t.Errorf("got %+v, %v", o, err)
	}
	for _, name := range [][2]string{{"shop/../x", "a?b"}, {"..", "a"}, {"shop", ".."}, {"shop", ""}} {
		if _, err := c.Get(t.Context(), kube.Pods, name[0], name[1]); !errors.Is(err, kube.ErrNotFound) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// A pod tells of the one DaemonSet that controls it, and of no other owner.
func TestPodOfADaemonSet(t *testing.T) {
	const daemon = `{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "agents", "uid": "d1", "controller": true}`
	for owners, want := range map[string]string{
		`[` + daemon + `]`: "d1",
		`[{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "n1"}, ` + daemon + `]`:                                "d1",
		`[` + daemon + `, {"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "b", "uid": "d2", "controller": true}]`:  "", // the API server lets in one at most
		`[{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "agents", "uid": "d1"}]`:                                 "",
		`[{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "agents", "uid": "d1", "controller": null}]`:             "",
		`[{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "agents", "uid": "d1", "controller": true}]`:            "",
		`[{"apiVersion": "apps.example.com/v1", "kind": "DaemonSet", "name": "agents", "uid": "d1", "controller": true}]`: "",
		`[{"apiVersion": "apps", "kind": "DaemonSet", "name": "agents", "uid": "d1", "controller": true}]`:                "",
		`[]`: "", `null`: "",
	} {
		s := newServer(t, true)
		s.answer(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, pod("a", "1", `,"ownerReferences":`+owners))
		})
		o, err := open(t, kube.Config{Kubeconfig: s.kubeconfig(t), Timeout: 30 * time.Second}).Get(t.Context(), kube.Pods, "shop", "a")
		if err != nil || o.DaemonSet != want {
			t.Errorf("%s: %q, want %q: %v", owners, o.DaemonSet, want, err)
		}
	}
}
