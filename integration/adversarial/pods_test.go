package adversarial

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// TestPods asks for pods that are gone, going, done or somebody else by now. Each row is asked twice: for the first SVID of
// a pod, and for a renewal, after the pod had its first. The directory is told at once, as by the event of a watch; a
// refusal is due from then on.
//
// threat: A07, A08, A09, A10, A11, A12, A16, A17, B03
func TestPods(t *testing.T) {
	anew := func(p attestortest.Pod, change func(*attestortest.Pod)) attestortest.Pod { change(&p); return p }
	for _, c := range []struct {
		row, name string
		change    func(r *rig, p attestortest.Pod)
		first     api.Reason // of a first SVID
		renewal   api.Reason // of a renewal; empty: it passes
	}{
		{"A07", "gone", func(r *rig, p attestortest.Pod) { r.Pods.Remove(p) }, api.PodUnknown, api.PodUnknown},
		{"A07", "deleted a second ago, object still there", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.DeleteAt = time.Now().Add(-time.Second) })
		}, api.PodDeleted, api.PodDeleted},
		{"A07", "deleted now", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.DeleteAt = time.Now() })
		}, api.PodDeleted, api.PodDeleted},
		{"A08", "terminating", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.DeleteAt = time.Now().Add(30 * time.Second) })
		}, api.PodDeleted, ""},
		{"A08", "terminating, a nanosecond left", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.DeleteAt = time.Now().Add(1) })
		}, api.PodDeleted, ""},
		{"A09", "Succeeded or Failed", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.Finished = true })
		}, api.PodDeleted, api.PodDeleted},
		{"A09", "Succeeded and terminating", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.Finished, l.DeleteAt = true, time.Now().Add(time.Hour) })
		}, api.PodDeleted, api.PodDeleted},
		{"A10", "its ServiceAccount was made anew", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.ServiceAccountUID = "made-anew" })
		}, api.PodMismatch, api.PodMismatch},
		{"A11", "its ServiceAccount is another one", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.ServiceAccount = stranger })
		}, api.PodMismatch, api.PodMismatch},
		{"A12", "made anew under its name", func(r *rig, p attestortest.Pod) {
			r.Pods.Remove(p)
			r.Pods.Add(anew(p, func(p *attestortest.Pod) { p.UID = "made-anew" }))
		}, api.PodUnknown, api.PodUnknown},
		{"A12", "another name under its UID", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.Name = stranger })
		}, api.PodMismatch, api.PodMismatch},
		{"A12", "another namespace under its UID", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.Namespace = stranger })
		}, api.PodMismatch, api.PodMismatch},
		{"A12", "the UID of another cluster", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.Issuer = "https://" + stranger + ".test" })
		}, api.PodUnknown, api.PodUnknown},
		{"A17", "its node was made anew", func(r *rig, p attestortest.Pod) {
			r.Pods.Change(p, func(l *ca.Pod) { l.NodeUID = "made-anew" })
		}, api.PodMismatch, api.PodMismatch},
		{"A07", "nobody can tell", func(r *rig, _ attestortest.Pod) {
			r.Pods.Fail(api.Wrap(api.DirectoryUnavailable, errors.New(stranger), "the pods cannot be seen now"))
		}, api.DirectoryUnavailable, api.DirectoryUnavailable},
	} {
		t.Run(c.row+" "+c.name, func(t *testing.T) {
			withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
				item := func(p attestortest.Pod) *apiv1.IssueItem {
					i := r.item(r.Evidence(p, api.WorkloadAudience(r.TD), time.Hour).Data)
					i.Volume = "of " + p.Name
					return i
				}
				first, second := r.Pod("shop", "web-1", "web", here), r.Pod("shop", "web-2", "web", here)
				r.ask(variant{row: c.row, name: "the other's first", item: item(second)})
				old := item(second) // a token from before the change
				c.change(r, first)
				r.ask(variant{row: c.row, name: "first", item: item(first), want: one(c.first)})
				r.Pods.Fail(nil)
				c.change(r, second)
				var want []api.Reason
				if c.renewal != "" {
					want = one(c.renewal)
				}
				r.ask(variant{row: c.row, name: "renewal", item: item(second), want: want})
				r.ask(variant{row: c.row, name: "renewal with an older token", item: old, want: want})
				if c.row == "A08" { // what was let pass ends with the grace
					time.Sleep(30 * time.Second)
					r.ask(variant{row: c.row, name: "after the grace", item: item(second), want: one(api.PodDeleted)})
				}
			})
		})
	}
}

// TestReplay takes one token to two places. A second node is refused for its own reason before it comes to that.
//
// threat: A15, A23
func TestReplay(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		_, other := r.newAgent(r.AgentPod("node-2"))
		// A node that was made anew under the same name: its agent is another.
		twin := attestortest.NewPod(catest.AgentNS, "signet-agent-twin", catest.AgentSA, here)
		twin.NodeUID = "made-anew"
		r.Pods.Add(twin)
		_, anew := r.newAgent(twin)
		token, ours := r.token(), r.agent
		r.ask(variant{row: "A23", name: "first use", item: r.item(token)})
		r.agent = other
		r.ask(variant{row: "A15", name: "on another node", item: r.item(token), want: one(api.NodeMismatch)})
		r.ask(variant{row: "A15", name: "a fresh one on another node", item: r.item(r.token()), want: one(api.NodeMismatch)})
		r.agent = anew
		r.ask(variant{row: "A17", name: "on a node made anew", item: r.item(r.token()), want: one(api.NodeMismatch)})
		r.agent = ours
		for i, volume := range []string{"", "volume2", "Volume", "volume ", "volume\x00", "../volume"} {
			item := r.item(token)
			item.Volume = volume
			r.ask(variant{row: "A23", name: fmt.Sprintf("in another volume %d", i), item: item, want: one(api.TokenReplayedElsewhere)})
		}
		r.ask(variant{row: "A23", name: "in its own volume", item: r.item(token), harmless: "one place may come again"})
		// A refused first use in a wrong place does not take the token from its right one.
		fresh := r.token()
		r.agent = other
		r.ask(variant{row: "A23", name: "stolen before its first use", item: r.item(fresh), want: one(api.NodeMismatch)})
		r.agent = ours
		r.ask(variant{row: "A23", name: "its first use", item: r.item(fresh), harmless: "its own node"})
	})
}
