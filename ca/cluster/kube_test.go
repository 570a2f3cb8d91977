package cluster

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/kube"
)

// KubeDirectory and Clusters are each a ca.Directory, and KubePublisher a ca.Publisher.
var (
	_ ca.Directory = (*KubeDirectory)(nil)
	_ ca.Directory = Clusters(nil)
	_ ca.Publisher = (*KubePublisher)(nil)
)

var made = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// toldDirectory is a directory that was told of one pod and what belongs to it. It has no watches that could be cut, and no
// API server: what it does not remember it cannot tell.
func toldDirectory(t *testing.T) *KubeDirectory {
	t.Helper()
	d, err := NewKubeDirectory(KubeConfig{Issuer: issuer, Client: new(kube.Client), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Pod(t.Context(), ca.PodID{Issuer: issuer, UID: "u1"}); api.ReasonOf(err) != api.DirectoryUnavailable {
		t.Errorf("before its watches have begun: %v", err)
	}
	d.watches = nil
	d.replaceNodes([]kube.Object{{Name: "n1", UID: "n1-uid"}, {Name: "n2", UID: "n2-uid"}})
	d.replaceAccounts([]kube.Object{{Namespace: "shop", Name: "web", UID: "s1", Created: made}})
	d.replacePods([]kube.Object{webPod()})
	return d
}

func webPod() kube.Object {
	return kube.Object{Namespace: "shop", Name: "web-0", UID: "u1", Created: made, NodeName: "n1", ServiceAccount: "web", Phase: "Running"}
}

func TestKubeDirectory(t *testing.T) {
	good := ca.Pod{
		Issuer: issuer, Namespace: "shop", Name: "web-0", UID: "u1", ServiceAccount: "web", ServiceAccountUID: "s1", NodeName: "n1", NodeUID: "n1-uid",
	}
	with := func(f func(*ca.Pod)) ca.Pod { p := good; f(&p); return p }
	pod := func(f func(*kube.Object)) kube.Object { o := webPod(); f(&o); return o }
	for _, tc := range []struct {
		name   string
		tell   func(*KubeDirectory)
		want   ca.Pod
		reason api.Reason
	}{
		{"there", func(*KubeDirectory) {}, good, ""},
		{"going", func(d *KubeDirectory) {
			d.applyPod(pod(func(o *kube.Object) { o.DeleteAt = made.Add(time.Minute) }), false)
		}, with(func(p *ca.Pod) { p.DeleteAt = time.Unix(made.Unix()+60, 0) }), ""},
		{"finished", func(d *KubeDirectory) { d.applyPod(pod(func(o *kube.Object) { o.Phase = "Failed" }), false) }, with(func(p *ca.Pod) { p.Finished = true }), ""},
		// threat: A07
		{"deleted", func(d *KubeDirectory) { d.applyPod(webPod(), true) }, ca.Pod{}, api.PodDeleted},
		{"missing from a list anew", func(d *KubeDirectory) { d.replacePods(nil) }, ca.Pod{}, api.PodDeleted},
		{"deleted, and told of once more", func(d *KubeDirectory) { d.applyPod(webPod(), true); d.applyPod(webPod(), false) }, ca.Pod{}, api.PodDeleted},
		// threat: A10
		{"ServiceAccount made anew", func(d *KubeDirectory) {
			d.applyAccount(kube.Object{Namespace: "shop", Name: "web", UID: "s2", Created: made.Add(clockSkew)}, false)
		}, with(func(p *ca.Pod) { p.ServiceAccountUID = "s2" }), ""},
		// threat: A11
		{"ServiceAccount made anew after the pod", func(d *KubeDirectory) {
			d.applyAccount(kube.Object{Namespace: "shop", Name: "web", UID: "s2", Created: made.Add(clockSkew + time.Second)}, false)
		}, ca.Pod{}, api.PodMismatch},
		// threat: A17
		{"node made anew", func(d *KubeDirectory) { d.applyNode(kube.Object{Name: "n1", UID: "n1-anew"}, false) }, with(func(p *ca.Pod) { p.NodeUID = "n1-anew" }), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := toldDirectory(t)
			tc.tell(d)
			got, err := Clusters{issuer: d}.Pod(t.Context(), ca.PodID{Issuer: issuer, UID: "u1"})
			if diff := cmp.Diff(tc.want, got); diff != "" || (err != nil) != (tc.reason != "") || err != nil && api.ReasonOf(err) != tc.reason {
				t.Errorf("got %v, want %q\n%s", err, tc.reason, diff)
			}
		})
	}
	for _, id := range []ca.PodID{{Issuer: issuer, UID: "u2"}, {Issuer: "https://other", UID: "u1"}, {}} {
		for _, dir := range []ca.Directory{toldDirectory(t), Clusters{issuer: toldDirectory(t)}} {
			if _, err := dir.Pod(t.Context(), id); api.ReasonOf(err) != api.PodUnknown {
				t.Errorf("%+v: %v", id, err)
			}
		}
	}
}

// What a directory remembers of those who are gone or never were has an end.
func TestKubeDirectoryBounds(t *testing.T) {
	d := toldDirectory(t)
	now := time.Now()
	for i := range 3 * maxMisses {
		d.miss(fmt.Sprint("never-", i), now)
	}
	if n := len(d.misses); n != maxMisses {
		t.Errorf("%d misses are remembered", n)
	}
	d.miss("later", now.Add(missTime))
	if n := len(d.misses); n != 1 {
		t.Errorf("%d misses are remembered after their time", n)
	}
	for i := range 2*maxGone + 7 {
		d.applyPod(kube.Object{UID: fmt.Sprint("gone-", i)}, true)
	}
	if n := len(d.gone); n != maxGone {
		t.Errorf("%d deleted pods are remembered", n)
	}
	if _, err := d.Pod(t.Context(), ca.PodID{Issuer: issuer, UID: fmt.Sprint("gone-", 2*maxGone+6)}); api.ReasonOf(err) != api.PodDeleted {
		t.Errorf("the last one: %v", err)
	}
}
