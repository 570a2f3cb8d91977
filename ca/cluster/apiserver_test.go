package cluster

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/internal/kube"
)

// apiServer keeps objects and tells of their changes, over TLS on loopback. What is right is proven on a real one; this one
// is for what a real one cannot be made to do.
type apiServer struct {
	url, kubeconfig string

	mu      sync.Mutex
	version int
	objects map[string]map[string]any // by path
	news    chan struct{}             // closed at the next change
	events  []apiEvent
	fault   func(*http.Request) int // a status to answer with, -1 never to answer; 0: what is right
	asked   map[string]int          // by method and path
}

type apiEvent struct {
	collection, kind string // collection: the path without namespace and name
	object           map[string]any
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	a := &apiServer{objects: map[string]map[string]any{}, news: make(chan struct{}), asked: map[string]int{}}
	s := httptest.NewUnstartedServer(a)
	s.EnableHTTP2 = true
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	s.StartTLS()
	t.Cleanup(s.Close)
	dir := t.TempDir()
	a.url, a.kubeconfig = s.URL, filepath.Join(dir, "kubeconfig")
	text := fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "x", "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
		"clusters": [{"name": "x", "cluster": {"server": %q, "certificate-authority": "ca.crt"}}], "users": [{"name": "x", "user": {"token": "canary"}}]}`, s.URL)
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	for name, data := range map[string][]byte{a.kubeconfig: []byte(text), filepath.Join(dir, "ca.crt"): cert} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// open makes a client that waits so long for an answer.
func (a *apiServer) open(t *testing.T, timeout time.Duration) *kube.Client {
	t.Helper()
	c, err := kube.Open(kube.Config{Kubeconfig: a.kubeconfig, UserAgent: "signet-ca/test", Timeout: timeout})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// split returns a path's collection over all namespaces, namespace and name.
func split(path string) (collection, namespace, name string) {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	root := 2 // api, v1
	if parts[0] == "apis" {
		root = 3
	}
	rest := parts[root:]
	if len(rest) >= 3 && rest[0] == "namespaces" {
		namespace, rest = rest[1], rest[2:]
	}
	if len(rest) == 2 {
		name = rest[1]
	}
	return "/" + strings.Join(append(parts[:root:root], rest[0]), "/"), namespace, name
}

// ServeHTTP implements http.Handler.
func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.asked[r.Method+" "+r.URL.Path]++
	fault := 0
	if a.fault != nil {
		fault = a.fault(r)
	}
	a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	switch {
	case fault < 0:
		<-r.Context().Done()
	case fault > 0:
		w.WriteHeader(fault)
	case r.URL.Query().Get("watch") != "":
		a.serveWatch(w, r)
	default:
		status, answer := a.answer(r)
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(answer)
	}
}

func (a *apiServer) answer(r *http.Request) (int, any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	collection, namespace, name := split(r.URL.Path)
	var in map[string]any
	if r.Method != http.MethodGet {
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			return 400, nil
		}
	}
	old := a.objects[r.URL.Path]
	switch r.Method {
	case http.MethodPost:
		path := r.URL.Path + "/" + in["metadata"].(map[string]any)["name"].(string)
		if a.objects[path] != nil {
			return 409, nil
		}
		return 201, a.put(path, in)
	case http.MethodPut, http.MethodDelete:
		if old == nil {
			return 404, nil
		}
		version := old["metadata"].(map[string]any)["resourceVersion"]
		if r.Method == http.MethodPut && in["metadata"].(map[string]any)["resourceVersion"] != version {
			return 409, nil
		}
		if r.Method == http.MethodPut {
			return 200, a.put(r.URL.Path, in)
		}
		if in["preconditions"].(map[string]any)["resourceVersion"] != version {
			return 409, nil
		}
		a.remove(r.URL.Path)
		return 200, old
	}
	if name != "" {
		if old == nil {
			return 404, nil
		}
		return 200, old
	}
	items := []any{}
	for path, o := range a.objects {
		if c, ns, _ := split(path); c == collection && (namespace == "" || ns == namespace) && matches(r, o) {
			items = append(items, o)
		}
	}
	return 200, map[string]any{"metadata": map[string]any{"resourceVersion": strconv.Itoa(a.version)}, "items": items}
}

// matches says whether an object is one that the selectors of a list or a watch are for.
func matches(r *http.Request, o map[string]any) bool {
	meta := o["metadata"].(map[string]any)
	if field := r.URL.Query().Get("fieldSelector"); field != "" && field != "metadata.name="+meta["name"].(string) {
		return false
	}
	label, value, ok := strings.Cut(r.URL.Query().Get("labelSelector"), "=")
	labels, _ := meta["labels"].(map[string]any)
	return !ok || labels[label] == value
}

// put makes or replaces an object, while a.mu is held.
func (a *apiServer) put(path string, o map[string]any) map[string]any {
	collection, namespace, name := split(path)
	a.version++
	kind, uid := "ADDED", any(fmt.Sprint("uid-", a.version))
	if old := a.objects[path]; old != nil {
		kind, uid = "MODIFIED", old["metadata"].(map[string]any)["uid"]
	}
	meta, _ := o["metadata"].(map[string]any)
	if meta == nil {
		meta = map[string]any{}
		o["metadata"] = meta
	}
	meta["name"], meta["uid"], meta["resourceVersion"] = name, uid, strconv.Itoa(a.version)
	if namespace != "" {
		meta["namespace"] = namespace
	}
	a.objects[path] = o
	a.tell(apiEvent{collection, kind, o})
	return o
}

func (a *apiServer) remove(path string) {
	collection, _, _ := split(path)
	a.version++
	o := a.objects[path]
	delete(a.objects, path)
	a.tell(apiEvent{collection, "DELETED", o})
}

func (a *apiServer) tell(e apiEvent) {
	a.events = append(a.events, e)
	close(a.news)
	a.news = make(chan struct{})
}

func (a *apiServer) serveWatch(w http.ResponseWriter, r *http.Request) {
	collection, namespace, _ := split(r.URL.Path)
	had := map[any]bool{} // what was told of, so that what no longer matches is told to be deleted
	w.(http.Flusher).Flush()
	for next := 0; ; { // from the beginning: who watches does not mind to hear of what it knows
		a.mu.Lock()
		events, news := a.events[next:], a.news
		var lines []byte
		for _, e := range events {
			meta := e.object["metadata"].(map[string]any)
			if e.collection != collection || namespace != "" && meta["namespace"] != namespace {
				continue
			}
			if !matches(r, e.object) {
				if e.kind = "DELETED"; !had[meta["uid"]] {
					continue
				}
			}
			had[meta["uid"]] = e.kind != "DELETED"
			line, err := json.Marshal(map[string]any{"type": e.kind, "object": e.object})
			if err != nil {
				panic(err)
			}
			lines = append(lines, append(line, '\n')...)
		}
		next = len(a.events)
		a.mu.Unlock()
		if _, err := w.Write(lines); err != nil {
			return
		}
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
			return
		case <-news:
		}
	}
}

// set makes an object as somebody else would, or removes it.
func (a *apiServer) set(path string, o map[string]any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if o == nil {
		a.remove(path)
	} else {
		a.put(path, o)
	}
}

func (a *apiServer) namespace(name string, asks bool) {
	labels := map[string]any{}
	if asks {
		labels[CopiesLabel] = "true"
	}
	a.set("/api/v1/namespaces/"+name, map[string]any{"metadata": map[string]any{"labels": labels}})
}

func (a *apiServer) setFault(f func(*http.Request) int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fault = f
}

// count is how often something was asked.
func (a *apiServer) count(what string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked[what]
}

// get returns an object's data, nil where there is none.
func (a *apiServer) data(path string) map[string]any {
	a.mu.Lock()
	defer a.mu.Unlock()
	if o := a.objects[path]; o != nil {
		data, _ := o["data"].(map[string]any)
		return data
	}
	return nil
}

// value is the sum of a metric over all with that label.
func value(t *testing.T, m *Metrics, name, label, want string) float64 {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(m); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if f.GetName() == name && l.GetName() == label && l.GetValue() == want {
					sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
				}
			}
		}
	}
	return sum
}
