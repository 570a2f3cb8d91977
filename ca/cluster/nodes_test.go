package cluster

import (
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/kube"
)

var (
	_ ca.NodeFinder  = (*KubeDirectory)(nil)
	_ ca.NodeFinder  = Clusters(nil)
	_ ca.NodeWatcher = (*KubeDirectory)(nil)
	_ ca.NodeWatcher = Clusters(nil)
)

// TestFindNodes knows nodes by name and by UID, as they are now, in each cluster.
func TestFindNodes(t *testing.T) {
	first, second := toldDirectory(t), toldDirectory(t)
	second.cfg.Issuer = "https://second"
	second.replaceNodes([]kube.Object{{Name: "n1", UID: "n1-of-second"}})
	all := Clusters{issuer: first, "https://second": second}
	n1, n2, far := ca.NodeID{Issuer: issuer, UID: "n1-uid", Name: "n1"}, ca.NodeID{Issuer: issuer, UID: "n2-uid", Name: "n2"},
		ca.NodeID{Issuer: "https://second", UID: "n1-of-second", Name: "n1"}
	find := func(what string, want ...ca.NodeID) {
		t.Helper()
		if diff := cmp.Diff(want, all.FindNodes(what)); diff != "" {
			t.Errorf("%q (-want +got):\n%s", what, diff)
		}
	}
	in := []ca.NodeID{n1, far}
	if issuer > "https://second" {
		in = []ca.NodeID{far, n1}
	}
	find("n1", in...)
	find("n1-of-second", far)
	find("n2", n2)
	find("n3")
	find("")
	first.applyNode(kube.Object{Name: "n2", UID: "n2-uid"}, true)
	find("n2")
	first.applyNode(kube.Object{Name: "n2", UID: "n2-anew"}, false)
	find("n2", ca.NodeID{Issuer: issuer, UID: "n2-anew", Name: "n2"})
	find("n2-uid")

	blind, err := NewKubeDirectory(KubeConfig{Issuer: issuer, Client: new(kube.Client), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	blind.replaceNodes([]kube.Object{{Name: "n1", UID: "n1-uid"}})
	if got := blind.FindNodes("n1"); got != nil {
		t.Errorf("a directory whose watches are cut knows %v", got)
	}
}

// TestNodeGone: that a node is gone is told while its cluster is seen in full, up to when that is, and of a node made anew under its name
// as well; never of one that is there, and never by a cluster that is away or shows no nodes at all.
func TestNodeGone(t *testing.T) {
	const pathN1, pathN2 = "/api/v1/nodes/n1", "/api/v1/nodes/n2"
	a := newAwayAPI(t)
	a.set(pathN2, map[string]any{})
	d, _ := a.follow(t, "")
	all := Clusters{issuer: d}
	n1, n2 := ca.NodeID{Issuer: issuer, UID: a.uid(pathN1), Name: "n1"}, ca.NodeID{Issuer: issuer, UID: a.uid(pathN2), Name: "n2"}
	nameless := ca.NodeID{Issuer: issuer, UID: n2.UID}
	gone := func(n ca.NodeID) bool { _, gone := all.NodeGone(n); return gone }
	until(t, "it is seen", func() bool { return sees(d) })
	for _, n := range []ca.NodeID{n1, n2, nameless, {Issuer: issuer}, {Issuer: "https://other", UID: "x", Name: "x"}} {
		if gone(n) {
			t.Errorf("%+v is gone", n)
		}
	}
	a.set(pathN2, nil)
	until(t, "the node is gone", func() bool { return gone(n2) && gone(nameless) })
	deleted := time.Now()
	until(t, "it is known up to a moment after that", func() bool { upTo, gone := all.NodeGone(n2); return gone && upTo.After(deleted) })
	a.set(pathN2, map[string]any{})
	anew := ca.NodeID{Issuer: issuer, UID: a.uid(pathN2), Name: "n2"}
	until(t, "there is another of its name", func() bool { return len(d.FindNodes("n2")) == 1 && d.FindNodes("n2")[0] == anew })
	until(t, "it is not the one that is gone", func() bool { return gone(n2) && gone(nameless) })
	if gone(anew) || gone(n1) {
		t.Errorf("gone: the one that follows %t; the other %t", gone(anew), gone(n1))
	}
	a.away.Store(true)
	until(t, "it is lost", func() bool { return !sees(d) })
	if gone(n2) {
		t.Error("a cluster that is away tells that a node is gone")
	}
	a.away.Store(false)
	until(t, "it is seen again", func() bool { return gone(n2) })
	a.set(pathN1, nil)
	a.set(pathN2, nil)
	until(t, "there are no nodes", func() bool { return sees(d) && d.FindNodes("n1") == nil && d.FindNodes("n2") == nil })
	if gone(n1) || gone(n2) {
		t.Error("a cluster without nodes tells that they are gone")
	}
}
