package cluster

import (
	"log/slog"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/kube"
)

var (
	_ ca.NodeFinder = (*KubeDirectory)(nil)
	_ ca.NodeFinder = Clusters(nil)
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
