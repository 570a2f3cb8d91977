package ca_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/audit"
)

// showcase is a ca.Publisher that shows nothing anywhere, and fails while it is told to.
type showcase struct{ down atomic.Bool }

// Published implements ca.Publisher.
func (*showcase) Published(context.Context, spiffeid.TrustDomain) (bool, error) { return false, nil }

// Publish implements ca.Publisher.
func (s *showcase) Publish(context.Context, *ca.Bundle) error {
	if s.down.Load() {
		return errors.New("the API server is away")
	}
	return nil
}

// emergency declares one about the active root, and returns that root and how long it took until it was gone.
func (d *drill) emergency(id string, losing uint32) (old string, took time.Duration) {
	d.t.Helper()
	old, began := d.active(), time.Now()
	if _, err := d.admin.EmergencyRotation(d.t.Context(), &apiv1.EmergencyRotationRequest{Operation: id, Compromised: old, Reason: "key on the net", Losing: losing}); err != nil {
		d.t.Fatal(api.FromStatus(err))
	}
	d.over(id, "done")
	took = time.Since(began)
	for _, p := range d.peers {
		eventually(d.t, "an SVID of "+p.name+" under the new root", func() bool { return p.root() != old })
	}
	if d.state(old) != "gone" {
		d.t.Errorf("the compromised root is %s", d.state(old))
	}
	return old, took
}

// TestEmergencySpeed: within seconds everything is reissued and the compromised root in no bundle, though pods of the Workload API and
// readers of copies prove nothing; whoever could answer and does not is waited for until the limit, and so is a copy that does not come.
func TestEmergencySpeed(t *testing.T) {
	const soon, limit = 10 * time.Second, time.Minute
	for _, tt := range []struct {
		name     string
		protocol string
		change   func(d *drill, s *showcase)
		at       time.Duration // at least
		by       time.Duration
	}{
		{"all answer", "sotw", func(*drill, *showcase) {}, 0, soon},
		{"the Workload API", "workload-api", func(*drill, *showcase) {}, 0, soon},
		{"a pod rejects the bundle", "sotw", func(d *drill, _ *showcase) { d.peers[0].reject("no") }, limit, limit + soon},
		{"a copy does not come", "sotw", func(_ *drill, s *showcase) { s.down.Store(true) }, limit, limit + soon},
		{"an agent left a moment ago", "sotw", func(d *drill, _ *showcase) {
			newPeer(d.t, d.Server, "node-9").leave()
		}, limit - soon, 2*limit + soon}, // for its bundle, then for its SVIDs
		{"an agent is away since yesterday's upgrade", "sotw", func(d *drill, _ *showcase) {
			newPeer(d.t, d.Server, "node-9").leave()
			time.Sleep(2 * limit)
		}, 0, soon},
	} {
		t.Run(tt.name, func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				shown := new(showcase)
				d := newDrill(t, catest.Options{Config: func(cfg *ca.Config) { cfg.Publisher = shown }}, 3, func(p *peer) { p.protocol = tt.protocol })
				tt.change(d, shown)
				if _, took := d.emergency("stolen", 4); took < tt.at || took > tt.by {
					t.Errorf("it took %s, want %s to %s", took, tt.at, tt.by)
				}
			})
		})
	}
}

// TestEmergencyAgreed: an emergency that would hit more workloads than was agreed to is refused with the number that it is now;
// fewer are no reason, nor are a few more among many.
func TestEmergencyAgreed(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 1)
		n := newNode(t, d.Server, "node-7")
		l := n.session()
		told := 0
		hold := func(pods int) {
			t.Helper()
			b := d.CA().Bundle()
			var h []*apiv1.Holding
			for ; told < pods; told++ {
				h = append(h, &apiv1.Holding{Key: fmt.Sprint(told), Namespace: "shop", PodName: fmt.Sprint("pod-", told), PodUid: fmt.Sprint("uid-", told),
					Serial: "01", RootKeyId: d.active()})
			}
			if err := l.stream.Send(report(&apiv1.Report{BundleEpoch: b.Generation.Epoch, BundleNumber: b.Generation.Number, BundleHash: b.Hash[:], Changed: h})); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the report", func() bool { return d.status().GetPods() == uint32(pods+1) })
		}
		declare := func(id string, losing uint32) error {
			_, err := d.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: id, Compromised: d.active(), Reason: "key on the net", Losing: losing})
			return api.FromStatus(err)
		}
		hold(12)
		for _, losing := range []uint32{0, 1, 12} {
			err := declare("few", losing)
			wantReason(t, err, api.LosingMore)
			if !strings.Contains(api.AsError(err).Detail, "13 workloads") {
				t.Errorf("it does not say how many: %v", err)
			}
		}
		hold(105 - 1)
		wantReason(t, declare("many", 99), api.LosingMore)
		if o := d.status().GetOperation(); o != nil {
			t.Fatalf("one that was refused is under way: %v", o)
		}
		if err := declare("many", 100); err != nil {
			t.Error(err)
		}
		if err := declare("many", 0); err != nil { // the same again
			t.Error(err)
		}
		if !slices.ContainsFunc(ledgerOf(t, d.Server), func(r audit.Record) bool {
			return r.Method == "EmergencyRotation" && strings.Contains(r.Detail, "100 pods")
		}) {
			t.Error("what was agreed to is not on record")
		}
	})
}
