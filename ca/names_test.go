package ca_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/audit"
)

// tardy is a ledger that takes a second for each entry about a step of a rotation, and keeps what it says.
type tardy struct {
	ca.Ledger

	mu    sync.Mutex
	steps []string
}

// Append implements ca.Ledger.
func (l *tardy) Append(ctx context.Context, e audit.Entry) error {
	if e.Method == "step" {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
		l.mu.Lock()
		l.steps = append(l.steps, e.Detail)
		l.mu.Unlock()
	}
	return l.Ledger.Append(ctx, e)
}

// about is what was put on record of one kind of step.
func (l *tardy) about(do string) (text string, entries int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.steps {
		if strings.HasPrefix(s, do) {
			text, entries = text+s+"\n", entries+1
		}
	}
	return text, entries
}

// TestManyNames has three nodes tell of pods without end, with names as long as there can be, which acknowledge nothing and renew nothing.
// They hold up no step, by a ledger that is slow neither, fill no ledger, and hide nobody else who is passed over.
func TestManyNames(t *testing.T) {
	const (
		bad, pods = 3, 1500
		limit     = time.Minute
	)
	for name, emergency := range map[string]bool{"planned": false, "emergency": true} {
		t.Run(name, func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				ledger := new(tardy)
				d := newDrill(t, catest.Options{Config: func(c *ca.Config) { ledger.Ledger, c.Ledger = c.Ledger, ledger }}, 1)
				old := d.active()
				long := strings.Repeat("a", 253)
				for i := range bad {
					l := newNode(t, d.Server, fmt.Sprint("bad-", i)).session()
					for from := 0; from < pods; from += 500 {
						r := &apiv1.Report{BundleEpoch: 1, BundleNumber: 1}
						for k := range 500 {
							r.Changed = append(r.Changed, &apiv1.Holding{Key: fmt.Sprint(from + k), Namespace: long, PodName: fmt.Sprint(from+k, long), PodUid: fmt.Sprint(from + k),
								Serial: "01", RootKeyId: old, Streams: []*apiv1.Stream{{Id: 1, WantsBundle: true}}})
						}
						if err := l.stream.Send(report(r)); err != nil {
							t.Fatal(err)
						}
					}
				}
				eventually(t, "reports of all", func() bool { return d.status().GetPods() == bad*pods+1 })
				d.peers[0].reject("no")
				began := time.Now()
				var err error
				if emergency {
					_, err = d.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: "op", Compromised: old, Reason: "stolen", Losing: 1 << 20})
				} else {
					_, err = d.admin.StartRotation(t.Context(), &apiv1.StartRotationRequest{Operation: "op", Reason: "a drill",
						Limits: &apiv1.RotationLimits{Straggler: durationpb.New(limit)}})
				}
				if err != nil {
					t.Fatal(api.FromStatus(err))
				}
				if emergency {
					d.over("op", "done")
				} else {
					eventually(t, "activation", func() bool { return d.active() != old })
				}
				if took := time.Since(began); took > 2*limit+time.Minute { // of an emergency: for the bundle and for the SVIDs, and the ledger's time
					t.Errorf("it took %s: %s", took, d.status().GetTrouble())
				}
				text, entries := ledger.about("activate")
				if entries < 10 || entries > 20 || len(text) > 160<<10 {
					t.Errorf("%d entries, %d bytes", entries, len(text))
				}
				for _, want := range []string{"pod/shop/web-node-1 (", "pods/bad-0/988-more (", "pods/bad-2/988-more (", "more; SHA-256 of all"} {
					if strings.Count(text, want) != 1 {
						t.Errorf("on record there are %d of %q", strings.Count(text, want), want)
					}
				}
			})
		})
	}
}
