package cluster

import (
	"cmp"
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/kube"
)

// KubeDirectory and Clusters remember.
var (
	_ ca.Rememberer = (*KubeDirectory)(nil)
	_ ca.Rememberer = Clusters(nil)
)

// awayAPI is an API server with two pods, which can go away.
type awayAPI struct {
	*apiServer
	away   atomic.Bool
	answer atomic.Int32 // while it is away; 0: that it has an error
}

const (
	pathWeb  = "/api/v1/namespaces/shop/pods/web-0"
	pathGone = "/api/v1/namespaces/shop/pods/gone-0"
)

func newAwayAPI(t *testing.T) *awayAPI {
	t.Helper()
	a := &awayAPI{apiServer: newAPIServer(t)}
	a.setFault(func(r *http.Request) int {
		switch {
		case strings.Contains(r.URL.Path, "accessreviews"):
			return http.StatusServiceUnavailable
		case a.away.Load():
			return cmp.Or(int(a.answer.Load()), http.StatusInternalServerError)
		}
		return 0
	})
	pod := func() map[string]any {
		return map[string]any{"spec": map[string]any{"nodeName": "n1", "serviceAccountName": "web"}, "status": map[string]any{"phase": "Running"}}
	}
	a.set("/api/v1/nodes/n1", map[string]any{})
	a.set("/api/v1/namespaces/shop/serviceaccounts/web", map[string]any{})
	a.set(pathWeb, pod())
	a.set(pathGone, pod())
	return a
}

func (a *awayAPI) uid(path string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.objects[path]["metadata"].(map[string]any)["uid"].(string)
}

// follow runs a directory until stop is called.
func (a *awayAPI) follow(t *testing.T, persist string) (d *KubeDirectory, stop func()) {
	t.Helper()
	d, err := NewKubeDirectory(KubeConfig{Issuer: issuer, Client: a.open(t, time.Minute), Stale: MinStale, Log: slog.New(slog.DiscardHandler), Persist: persist})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := d.Run(ctx); err != nil {
			t.Errorf("the directory ended: %v", err)
		}
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return d, stop
}

// until waits for a condition.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(time.Minute); !holds(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("it never came to be that %s", what)
		}
	}
}

func sees(d ca.Rememberer) bool {
	_, now := d.Seen(issuer)
	return now
}

// A directory that has lost its cluster says so, and remembers what it knew then, over a restart too; what it was never told
// of it does not know.
func TestRemember(t *testing.T) {
	a := newAwayAPI(t)
	persist := filepath.Join(t.TempDir(), "cluster.json")
	d, stop := a.follow(t, persist)
	if upTo, now := d.Seen(issuer); !upTo.IsZero() && !now {
		t.Error("a cluster was seen before it was asked")
	}
	until(t, "it is seen", func() bool { return sees(d) })
	webUID, goneUID := a.uid(pathWeb), a.uid(pathGone)
	a.set(pathGone, nil)
	until(t, "a pod is gone", func() bool {
		_, err := d.Recall(ca.PodID{Issuer: issuer, UID: goneUID})
		return api.ReasonOf(err) == api.PodDeleted && err != nil
	})
	a.away.Store(true)
	until(t, "it is lost", func() bool { return !sees(d) })
	check := func(d ca.Rememberer, gone api.Reason) {
		t.Helper()
		upTo, now := d.Seen(issuer)
		if upTo.IsZero() || now {
			t.Errorf("seen up to %s, now %t", upTo, now)
		}
		p, err := d.Recall(ca.PodID{Issuer: issuer, UID: webUID})
		if err != nil || p.Name != "web-0" || p.ServiceAccountUID == "" || p.NodeUID == "" {
			t.Errorf("remembered %+v (%v)", p, err)
		}
		for _, tt := range []struct {
			id   ca.PodID
			want api.Reason
		}{
			{ca.PodID{Issuer: issuer, UID: goneUID}, gone},
			{ca.PodID{Issuer: issuer, UID: "never", Namespace: "shop", Name: "web-0"}, api.DirectoryUnavailable},
		} {
			if p, err := d.Recall(tt.id); api.ReasonOf(err) != tt.want || err == nil || p != (ca.Pod{}) {
				t.Errorf("%+v: %+v (%v), want %s", tt.id, p, err, tt.want)
			}
		}
		if _, err := d.Pod(t.Context(), ca.PodID{Issuer: issuer, UID: webUID}); api.ReasonOf(err) != api.DirectoryUnavailable {
			t.Errorf("a pod that cannot be seen: %v", err)
		}
	}
	check(d, api.PodDeleted)
	check(Clusters{issuer: d}, api.PodDeleted)
	lost, _ := d.Seen(issuer)
	stop()

	again, stop := a.follow(t, persist)
	check(again, api.DirectoryUnavailable)
	if upTo, _ := again.Seen(issuer); upTo.After(lost) || lost.Sub(upTo) > 2*time.Minute {
		t.Errorf("after a restart seen up to %s, before up to %s", upTo, lost)
	}
	stop()
	// A CA that ends without ever having seen the cluster does not forget what it was told.
	again, stop = a.follow(t, persist)
	check(again, api.DirectoryUnavailable)
	a.away.Store(false)
	until(t, "it is seen again", func() bool { return sees(again) })
	if _, err := again.Pod(t.Context(), ca.PodID{Issuer: issuer, UID: webUID}); err != nil {
		t.Errorf("after the return: %v", err)
	}
	stop()

	a.away.Store(true)
	for name, content := range map[string]string{
		"none": "", "damaged": "{", "of another version": `{"version":9,"issuer":"` + issuer + `","seen":"2026-01-01T00:00:00Z"}`,
		"of another cluster": `{"version":1,"issuer":"https://other","seen":"2026-01-01T00:00:00Z"}`, "without a time": `{"version":1,"issuer":"` + issuer + `"}`,
	} {
		path := filepath.Join(t.TempDir(), "memory.json")
		if content != "" {
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		d, stop := a.follow(t, path)
		if upTo, now := d.Seen(issuer); !upTo.IsZero() || now {
			t.Errorf("a file that is %s: seen up to %s, now %t", name, upTo, now)
		}
		if _, err := d.Recall(ca.PodID{Issuer: issuer, UID: webUID}); api.ReasonOf(err) != api.DirectoryUnavailable {
			t.Errorf("a file that is %s: %v", name, err)
		}
		stop()
	}
	if upTo, now := (Clusters{}).Seen(issuer); !upTo.IsZero() || now {
		t.Error("no cluster is seen")
	}
	if _, err := (Clusters{}).Recall(ca.PodID{Issuer: issuer, UID: webUID}); api.ReasonOf(err) != api.PodUnknown {
		t.Errorf("of no cluster: %v", err)
	}
}

// The file holds a deletion within seconds, whether or not all is seen then: a process that is killed after that must not
// bring the pod back. It runs in fake time, without an API server: what was told is what streams would have told.
//
// threat: G04
func TestRememberSoon(t *testing.T) {
	for _, tt := range []struct {
		name string
		tell func(*KubeDirectory)
		want api.Reason
	}{
		{"deleted", func(d *KubeDirectory) { d.applyPod(webPod(), true) }, api.DirectoryUnavailable}, // nobody knows it any more
		{"not listed any more", func(d *KubeDirectory) { d.replacePods(nil) }, api.DirectoryUnavailable},
		{"its ServiceAccount deleted", func(d *KubeDirectory) { d.applyAccount(kube.Object{Namespace: "shop", Name: "web"}, true) }, api.PodMismatch},
		{"its node deleted", func(d *KubeDirectory) { d.applyNode(kube.Object{Name: "n1"}, true) }, api.PodMismatch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				first := toldDirectory(t)
				first.cfg.Persist, first.restored = filepath.Join(t.TempDir(), "cluster.json"), time.Now()
				reopen := func() *KubeDirectory {
					d, err := NewKubeDirectory(first.cfg)
					if err != nil {
						t.Fatal(err)
					}
					return d
				}
				first.watches = reopen().watches // which have not begun
				if _, err := first.save(); err != nil {
					t.Fatal(err)
				}
				d := reopen()
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() { ended <- d.remember(ctx) }()
				defer func() {
					cancel()
					if err := <-ended; err != nil {
						t.Error(err)
					}
				}()
				id := ca.PodID{Issuer: issuer, UID: "u1"}
				for range 2 { // the second change comes a moment after the first was written
					d.applyPod(kube.Object{UID: "other", Namespace: "shop", Name: "other"}, true)
					time.Sleep(memorySoon)
				}
				if _, err := reopen().Recall(id); err != nil {
					t.Fatalf("before: %v", err)
				}
				tt.tell(d)
				time.Sleep(memorySoon + 2*memoryTick)
				if _, err := reopen().Recall(id); err == nil || api.ReasonOf(err) != tt.want {
					t.Errorf("a process that was killed then remembers: %v, want %s", err, tt.want)
				}
			})
		})
	}
}

// When the file is written: the first time at once, later by what has changed, and never without anything new.
func TestMemoryDue(t *testing.T) {
	held := memoryMark{changes: 5, ends: 2, upTo: 1}
	now := time.Now()
	for _, tt := range []struct {
		name  string
		is    memoryMark
		sees  bool
		ended bool
		took  time.Duration
		after time.Duration // the least time after a write; -1: never
	}{
		{"nothing seen", memoryMark{changes: 9, ends: 9}, false, true, 0, -1},
		{"nothing new", held, true, true, 0, -1},
		{"the end", memoryMark{5, 2, 2}, true, true, 0, 0},
		{"time has passed", memoryMark{5, 2, 2}, true, false, 0, memoryRefresh},
		{"sight is lost", memoryMark{5, 2, 2}, false, false, 0, memorySoon},
		{"a new pod", memoryMark{6, 2, 2}, true, false, 0, memoryInterval},
		{"a deletion", memoryMark{6, 3, 2}, true, false, 0, memorySoon},
		{"a deletion, and writes are slow", memoryMark{6, 3, 2}, true, false, time.Second, 20 * time.Second},
		{"a deletion, and writes are very slow", memoryMark{6, 3, 2}, true, false, time.Minute, memoryInterval},
	} {
		s := saving{held: held, tried: now, took: tt.took}
		if tt.after < 0 {
			if s.due(tt.is, tt.sees, tt.ended, now.Add(time.Hour)) {
				t.Errorf("%s: it is written", tt.name)
			}
			continue
		}
		if !s.due(tt.is, tt.sees, tt.ended, now.Add(tt.after)) {
			t.Errorf("%s: it is not written after %s", tt.name, tt.after)
		}
		if tt.after > 0 && s.due(tt.is, tt.sees, tt.ended, now.Add(tt.after-1)) {
			t.Errorf("%s: it is written before %s", tt.name, tt.after)
		}
		if s.tried = (time.Time{}); !s.due(tt.is, tt.sees, tt.ended, now) {
			t.Errorf("%s: it is not written at first", tt.name)
		}
	}
}

// An API server that lets the CA see nothing any more is not seen: what was known is remembered, as when it does not answer.
func TestRememberRefused(t *testing.T) {
	for _, code := range []int32{http.StatusUnauthorized, http.StatusForbidden} {
		a := newAwayAPI(t)
		a.answer.Store(code)
		d, stop := a.follow(t, "")
		until(t, "it is seen", func() bool { return sees(d) })
		id := ca.PodID{Issuer: issuer, UID: a.uid(pathWeb)}
		a.away.Store(true)
		until(t, "it is lost", func() bool { return !sees(d) })
		if upTo, _ := d.Seen(issuer); upTo.IsZero() {
			t.Errorf("%d: it was never seen", code)
		}
		if p, err := d.Recall(id); err != nil || p.Name != "web-0" {
			t.Errorf("%d: remembered %+v (%v)", code, p, err)
		}
		if _, err := d.Pod(t.Context(), id); err == nil || api.ReasonOf(err) != api.DirectoryUnavailable {
			t.Errorf("%d: a pod that cannot be seen: %v", code, err)
		}
		stop()
	}
}

// Whose ServiceAccount or node was gone at the end is refused as it would have been then.
func TestRecallMismatch(t *testing.T) {
	for _, tt := range []struct {
		name string
		tell func(*KubeDirectory)
		want api.Reason // empty: remembered
	}{
		{"all is there", func(*KubeDirectory) {}, ""},
		{"the node is gone", func(d *KubeDirectory) { d.applyNode(kube.Object{Name: "n1"}, true) }, api.PodMismatch},
		{"the ServiceAccount is gone", func(d *KubeDirectory) { d.replaceAccounts(nil) }, api.PodMismatch},
		{"the ServiceAccount was made anew", func(d *KubeDirectory) {
			o := webPod()
			o.Name, o.UID, o.Created = "web", "s2", made.Add(clockSkew+time.Second)
			d.applyAccount(o, false)
		}, api.PodMismatch},
		{"it has no node yet", func(d *KubeDirectory) { o := webPod(); o.NodeName = ""; d.applyPod(o, false) }, api.DirectoryUnavailable},
		{"it is gone", func(d *KubeDirectory) { d.applyPod(webPod(), true) }, api.PodDeleted},
	} {
		t.Run(tt.name, func(t *testing.T) {
			told := toldDirectory(t)
			tt.tell(told)
			fresh, err := NewKubeDirectory(told.cfg) // whose watches have not begun
			if err != nil {
				t.Fatal(err)
			}
			told.watches, told.restored = fresh.watches, made
			p, err := told.Recall(ca.PodID{Issuer: issuer, UID: "u1"})
			if tt.want == "" && (err != nil || p.NodeUID != "n1-uid") || tt.want != "" && (err == nil || api.ReasonOf(err) != tt.want) {
				t.Errorf("%+v (%v), want %q", p, err, tt.want)
			}
		})
	}
}

func FuzzMemory(f *testing.F) {
	f.Add([]byte(`{"version":1,"issuer":"` + issuer + `","seen":"2026-01-01T00:00:00Z","pods":[{"u":"a","m":1}],"accounts":[{"u":"b"}],"nodes":[{"u":"c","n":"n1"}]}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseMemory(data, issuer)
		if err != nil {
			return
		}
		again, err := json.Marshal(m)
		if err != nil {
			return // a year that JSON cannot say
		}
		if _, err := parseMemory(again, issuer); err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
	})
}
