package ca_test

import (
	"slices"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// TestNodeGone: an agent that is away is not waited for once its node is gone, and so it is over a kill of the CA. One with a session
// is, whatever the cluster says; and so is one that is away while its node is there, or the cluster is not seen, or where another replica
// may have its session.
//
// threat: E13
func TestNodeGone(t *testing.T) {
	const pod, node = "pod/shop/web-node-1", "node/node-1"
	for _, tt := range []struct {
		name string
		do   func(d *drill, st ca.Store)
		want string // who is waited for, hours before his SVIDs expire; empty: nobody
	}{
		{"away", func(d *drill, _ ca.Store) { d.peers[0].leave() }, pod},
		{"away since a moment, and the node is gone", func(d *drill, _ ca.Store) {
			d.loseNode()
			time.Sleep(30 * time.Second)
			d.peers[0].leave() // as one whose machine is registered anew, and who is about to come back
		}, pod},
		{"away, and the node is gone", func(d *drill, _ ca.Store) { d.peers[0].leave(); d.loseNode() }, ""},
		{"the node is gone, and then it is away", func(d *drill, _ ca.Store) {
			d.loseNode()
			time.Sleep(time.Minute)
			d.peers[0].leave()
		}, ""},
		{"the node is gone, and it has a session", func(d *drill, _ ca.Store) { d.loseNode() }, pod},
		{"the node is gone, and the cluster is not seen", func(d *drill, _ ca.Store) { d.peers[0].leave(); d.loseNode(); d.Pods.Lose() }, pod},
		{"another node is gone", func(d *drill, _ ca.Store) {
			d.peers[0].leave()
			d.Pods.RemoveNode(d.Pod("shop", "late", "web", "node-7"))
		}, pod},
		{"away, and the CA is killed", func(d *drill, _ ca.Store) { d.peers[0].leave(); d.restart() }, node},
		{"the node is gone, and the CA is killed", func(d *drill, _ ca.Store) { d.peers[0].leave(); d.loseNode(); d.restart() }, ""},
		{"the node is gone for another replica as well", func(d *drill, st ca.Store) {
			r := ca.Replica{Name: "ca-9", Signs: d.active(), Beat: time.Now().UTC(), Agents: []ca.AgentSeen{
				{Cluster: catest.IssuerName, NodeUID: d.peers[0].pod.NodeUID, Node: "node-1", Seen: time.Now().UTC(), Until: time.Now().Add(4 * time.Hour).UTC()}}}
			if err := st.SaveReplica(d.t.Context(), r); err != nil {
				d.t.Fatal(err)
			}
			d.peers[0].leave()
			d.loseNode()
		}, pod},
	} {
		t.Run(tt.name, func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				var st ca.Store
				d := newDrill(t, catest.Options{Policy: ca.PolicyFile{TTL: 4 * time.Hour}, Config: func(cfg *ca.Config) { cfg.AgentTTL = 4 * time.Hour; st = cfg.Store }}, 2)
				d.peers[0].reject("no")
				fresh := d.begin("first").GetOperation().GetAuthority()
				eventually(t, "the pod to be waited for", func() bool { return slices.Equal(d.blockers(), []string{pod}) })
				tt.do(d, st)
				if tt.name != "away since a moment, and the node is gone" {
					time.Sleep(30 * time.Second)
				}
				time.Sleep(10 * time.Second)
				switch got := d.blockers(); {
				case tt.want == "" && d.state(fresh) != "active":
					t.Errorf("the new root is %s; in its way: %q", d.state(fresh), got)
				case tt.want != "" && (d.state(fresh) != "published" || !slices.Contains(got, tt.want)):
					t.Errorf("the new root is %s; in its way: %q, want %s", d.state(fresh), got, tt.want)
				}
			})
		})
	}
}

// loseNode has the cluster delete the node of the first peer.
func (d *drill) loseNode() { d.Pods.RemoveNode(d.peers[0].pod) }

// TestNodeGoneEmergency: an emergency takes seconds though a node went a moment before, and waits for one that is merely away.
func TestNodeGoneEmergency(t *testing.T) {
	for _, tt := range []struct {
		name    string
		gone    bool
		at, end time.Duration // it takes
	}{{"away", false, 20 * time.Second, 2 * time.Minute}, {"gone", true, 0, 10 * time.Second}} {
		t.Run(tt.name, func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				d := newDrill(t, catest.Options{}, 2)
				d.peers[0].leave()
				if tt.gone {
					d.loseNode()
				}
				time.Sleep(20 * time.Second)
				old, began := d.active(), time.Now()
				if _, err := d.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: "stolen", Compromised: old, Reason: "key on the net", Losing: 2}); err != nil {
					t.Fatal(api.FromStatus(err))
				}
				d.over("stolen", "done")
				if took := time.Since(began); took < tt.at || took > tt.end {
					t.Errorf("it took %s, want %s to %s", took, tt.at, tt.end)
				}
			})
		})
	}
}
