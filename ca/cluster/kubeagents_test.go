package cluster

import (
	"context"
	"log/slog"
	"net/http"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/kube"
)

// KubeDirectory and Clusters are each a ca.AgentFinder.
var (
	_ ca.AgentFinder = (*KubeDirectory)(nil)
	_ ca.AgentFinder = Clusters(nil)
)

// agentPath is the DaemonSet of the agents.
const agentPath = "/apis/apps/v1/namespaces/signet-system/daemonsets/signet-agent"

// TestCheckAgent lets in who is a pod of the agents' DaemonSet by UID, as it is now, and asks the cluster no more often than
// it must.
//
// threat: B05
func TestCheckAgent(t *testing.T) {
	a := newAPIServer(t)
	d := toldDirectory(t)
	d.cfg.Client, d.cfg.Agents, d.cfg.Stale = a.open(t, time.Minute), DaemonSet{"signet-system", "signet-agent"}, time.Minute
	pod := func(change func(*kube.Object)) {
		o := kube.Object{Namespace: "signet-system", Name: "signet-agent-x", UID: "agent", Created: made, NodeName: "n1", ServiceAccount: "signet-agent", Phase: "Running"}
		change(&o)
		d.applyPod(o, false)
	}
	d.applyAccount(kube.Object{Namespace: "signet-system", Name: "signet-agent", UID: "s2", Created: made}, false)
	check := func(want api.Reason, reads int) {
		t.Helper()
		before := a.count("GET " + agentPath)
		p, err := Clusters{issuer: d}.Pod(t.Context(), ca.PodID{Issuer: issuer, UID: "agent"})
		if err == nil {
			err = Clusters{issuer: d}.CheckAgent(t.Context(), p)
		}
		if got := api.ReasonOf(err); err == nil && want != "" || err != nil && got != want {
			t.Errorf("got %v, want %q", err, want)
		}
		if n := a.count("GET "+agentPath) - before; n != reads {
			t.Errorf("the cluster was asked %d times, want %d", n, reads)
		}
	}
	later := func() { d.agents.read = d.agents.read.Add(-2 * agentsRefused) }

	pod(func(*kube.Object) {})
	check(api.NotAnAgent, 0) // nobody's
	pod(func(o *kube.Object) { o.DaemonSet = "uid-of-another" })
	check(api.NotAnAgent, 1) // there is none
	check(api.NotAnAgent, 0)

	a.set(agentPath, map[string]any{})
	uid := a.objects[agentPath]["metadata"].(map[string]any)["uid"].(string)
	later()
	check(api.NotAnAgent, 1)
	pod(func(o *kube.Object) { o.DaemonSet = uid })
	check("", 0)
	later()
	check("", 0) // still good
	d.agents.read = d.agents.read.Add(-2 * time.Minute)
	check("", 1)

	// Made anew: another one.
	a.set(agentPath, nil)
	a.set(agentPath, map[string]any{})
	uid = a.objects[agentPath]["metadata"].(map[string]any)["uid"].(string)
	pod(func(o *kube.Object) { o.DaemonSet = uid })
	later()
	check("", 1)

	// What cannot be told now is no refusal.
	pod(func(o *kube.Object) { o.DaemonSet = "uid-of-another" })
	later()
	a.setFault(func(*http.Request) int { return http.StatusInternalServerError })
	check(api.DirectoryUnavailable, 1)
	a.setFault(func(*http.Request) int { return -1 })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	p, err := d.Pod(t.Context(), ca.PodID{Issuer: issuer, UID: "agent"})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.CheckAgent(ctx, p); api.ReasonOf(err) != api.DirectoryUnavailable {
		t.Errorf("an API server that does not answer: %v", err)
	}
	a.setFault(nil)

	if err := (Clusters{}).CheckAgent(t.Context(), p); api.ReasonOf(err) != api.PodUnknown {
		t.Errorf("of no cluster: %v", err)
	}
	p.Namespace, p.DaemonSet = "shop", uid
	if err := d.CheckAgent(t.Context(), p); api.ReasonOf(err) != api.NotAnAgent {
		t.Errorf("of another namespace: %v", err)
	}
	rules := d.Rules()
	if last := rules[len(rules)-1]; last != (kube.Rule{Group: "apps", Resource: "daemonsets", Verb: "get", Namespace: "signet-system", Name: "signet-agent"}) {
		t.Errorf("the permission for it: %+v", last)
	}
	without, err := NewKubeDirectory(KubeConfig{Issuer: issuer, Client: new(kube.Client), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := without.CheckAgent(t.Context(), ca.Pod{}); err != nil {
		t.Errorf("where nobody says which DaemonSet: %v", err)
	}
}
