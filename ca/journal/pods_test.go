package journal

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestFewPods: what an agent says of its pods is judged pod by pod, and named up to a bound, those first who stand in the way. The others
// are counted, by why they pass. Whoever has taken a node neither hides anybody by it nor fills the ledger.
func TestFewPods(t *testing.T) {
	f := published(t, true)
	now := t0.Add(2 * time.Minute)
	for _, tt := range []struct {
		name    string
		late    int // pods that have not acknowledged
		excused int // of them, by their namespace
		soaking int // pods that cannot acknowledge, and have the bundle since a moment ago
		named   int // of the node's pods
		more    map[string]Pass
	}{
		{"few", 500, 400, 12, maxPods, nil},
		{"one more than are named", maxPods + 1, 0, 0, maxPods, map[string]Pass{"pods/node-a/1-more": ""}},
		{"all excused but the last", 4000, 3999, 0, maxPods, map[string]Pass{"pods/node-a/3488-more": Excused}},
		{"some of each", 1000, 400, 20, maxPods, map[string]Pass{"pods/node-a/108-more": "", "pods/node-a/400-more": Excused}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := f.j
			j.Excuses = []Excuse{{Scope: ScopeNamespace, Name: "old", Until: now.Add(time.Hour), By: "uid:0", Reason: "ends", At: t0}}
			acks := ready(t, j, now)
			acks.Agents = acks.Agents[:1]
			a := &acks.Agents[0]
			a.Cluster, a.Node, a.NodeUID, a.Pods = "cluster", "node-a", "uid-a", nil
			for i := range tt.late {
				ns := "shop"
				if i < tt.excused {
					ns = "old"
				}
				a.Pods = append(a.Pods, Pod{Namespace: ns, Name: fmt.Sprint("web-", i), UID: fmt.Sprint("uid-", i), Streams: []Stream{{Bundle: true}}})
			}
			for i := range tt.soaking {
				a.Pods = append(a.Pods, Pod{Namespace: "shop", Name: fmt.Sprint("api-", i), UID: fmt.Sprint("uid-api-", i),
					Streams: []Stream{{WorkloadAPI: true, Pushed: heldOf(t, j), PushedAt: now.Add(-time.Second)}}})
			}
			_, found := Next(j, now, acks)
			named, blocking, more := 0, 0, map[string]Pass{}
			for _, b := range found {
				switch {
				case strings.HasPrefix(b.Name, "pods/"):
					more[b.Name] = b.Pass
					if b.Kind != ByPod || b.NodeUID != "uid-a" || b.Why == "" || b.Hard || !b.Until.IsZero() {
						t.Errorf("%+v", b)
					}
				case b.Kind == ByPod:
					named++
					if b.Blocks() {
						blocking++
					}
				}
			}
			if named != tt.named || len(more) != len(tt.more) {
				t.Errorf("%d are named, and %v", named, more)
			}
			for name, pass := range tt.more {
				if got, ok := more[name]; !ok || got != pass {
					t.Errorf("%s: there are %v", name, more)
				}
			}
			if want := min(maxPods, tt.late-tt.excused+tt.soaking); blocking != want {
				t.Errorf("%d of the named stand in the way, want %d", blocking, want)
			}
			// Somebody can take the step over all of them, by the names that he was shown.
			var names []string
			for _, b := range found {
				if b.Blocks() {
					names = append(names, b.Name)
				}
			}
			if s, err := Force(j, now, acks, names, "uid:0"); err != nil || s.Do != Activate || len(s.Passed) != len(found) {
				t.Errorf("forced: %v, %v", s, err)
			}
			for i := range a.Pods { // and where nobody of them is late none is named
				a.Pods[i].Streams = []Stream{{Bundle: true, Acked: heldOf(t, j)}}
			}
			if _, found := Next(j, now, acks); slices.ContainsFunc(found, func(b Blocker) bool { return b.Kind == ByPod }) {
				t.Error("pods that have acknowledged are named")
			}
		})
	}
}
