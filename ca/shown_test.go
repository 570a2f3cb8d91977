package ca_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
	"github.com/signet-ca/signet/internal/latest"
)

// places is a ca.CopyTeller in memory: an original, and a copy in each namespace, which shows what the original does where it may.
type places struct {
	told latest.Value[struct{}]

	mu   sync.Mutex
	last journal.Held
	all  []journal.Copy
}

func newPlaces(namespaces ...string) *places {
	p := &places{all: []journal.Copy{{Kind: "configmap", Name: "signet-system/signet-bundle"}}}
	for _, ns := range namespaces {
		p.all = append(p.all, journal.Copy{Kind: "configmap", Name: ns + "/signet-bundle", Namespace: ns})
	}
	return p
}

// Published implements ca.Publisher.
func (*places) Published(context.Context, spiffeid.TrustDomain) (bool, error) { return false, nil }

// Publish implements ca.Publisher.
func (p *places) Publish(_ context.Context, b *ca.Bundle) error {
	p.mu.Lock()
	p.last = journal.Held{Generation: b.Generation, Hash: b.Hash}
	p.mu.Unlock()
	p.write()
	return nil
}

// write writes each place that does not fail.
func (p *places) write() {
	p.mu.Lock()
	for i := range p.all {
		if c := &p.all[i]; c.Failed == "" && c.Held != p.last {
			c.Held, c.At = p.last, time.Now()
		}
	}
	p.mu.Unlock()
	p.told.Set(struct{}{})
}

// fail has a namespace's copy fail from now on; without a reason it is written at once.
func (p *places) fail(namespace string, reason api.Reason) {
	p.mu.Lock()
	for i := range p.all {
		if c := &p.all[i]; c.Namespace == namespace {
			c.Failed, c.FailedAt = string(reason), time.Now()
		}
	}
	p.mu.Unlock()
	p.write()
}

// remove is the end of a namespace.
func (p *places) remove(namespace string) {
	p.mu.Lock()
	p.all = slices.DeleteFunc(p.all, func(c journal.Copy) bool { return c.Namespace == namespace })
	p.mu.Unlock()
	p.told.Set(struct{}{})
}

// Copies implements ca.CopyTeller.
func (p *places) Copies() ([]journal.Copy, <-chan struct{}) {
	_, changed := p.told.Get()
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.all), changed
}

func placesOf(p *places) catest.Options {
	return catest.Options{Config: func(cfg *ca.Config) { cfg.Publisher = p }}
}

// TestRotationCopies waits for each place where the bundle is shown by its name, with the reason why it lacks it, and from when that one
// has it; not for one in a namespace that is gone.
func TestRotationCopies(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		p := newPlaces("bank", "shop", "taken")
		d := newDrill(t, placesOf(p), 2)
		for ns, reason := range map[string]api.Reason{"bank": api.PublishForbidden, "shop": api.PublishFailed, "taken": api.BundleForeign} {
			p.fail(ns, reason)
		}
		fresh := d.begin("first").GetOperation().GetAuthority()
		waits := func(what string, want ...string) {
			t.Helper()
			eventually(t, what, func() bool { return slices.Equal(slices.Sorted(slices.Values(d.blockers())), want) })
		}
		const bank, shop, taken, original = "configmap/bank/signet-bundle", "configmap/shop/signet-bundle", "configmap/taken/signet-bundle", "configmap/signet-system/signet-bundle"
		waits("each place", bank, shop, original, taken)
		for _, g := range d.status().GetGates() {
			for _, b := range g.GetBlockers() {
				want := map[string]string{bank: "PUBLISH_FORBIDDEN", shop: "PUBLISH_FAILED", taken: "BUNDLE_FOREIGN", original: "who has read it"}[b.GetName()]
				if want != "" && (!strings.Contains(b.GetWhy(), want) || b.GetKind() != "copy") {
					t.Errorf("%s: %s, %s; want %s", b.GetName(), b.GetKind(), b.GetWhy(), want)
				}
			}
		}
		time.Sleep(6 * time.Minute)
		waits("those that cannot be written", bank, shop, taken)
		plan, err := d.admin.PlanRotation(t.Context(), &apiv1.PlanRotationRequest{})
		if err != nil || !slices.ContainsFunc(plan.GetForecast().GetMissing(), func(b *apiv1.RotationBlocker) bool { return b.GetName() == taken }) {
			t.Errorf("the plan does not name it: %v, %v", plan, err)
		}
		p.remove("bank")
		waits("those that are left", shop, taken)
		written := time.Now()
		p.fail("shop", "")
		if _, err := d.admin.ExcuseRotation(t.Context(), &apiv1.ExcuseRotationRequest{Scope: "namespace", Name: "taken", Reason: "known", Lasting: durationpb.New(time.Hour)}); err != nil {
			t.Fatal(api.FromStatus(err))
		}
		waits("the one that was written just now", shop)
		if d.state(fresh) != "published" {
			t.Fatalf("the new root is %s", d.state(fresh))
		}
		eventually(t, "the new root to be active", func() bool { return d.state(fresh) == "active" })
		if took := time.Since(written); took < 5*time.Minute || took > 6*time.Minute {
			t.Errorf("it took %s since the last was written", took)
		}
		d.over("first", "done")
	})
}

// TestRotationCopyStraggler passes over a copy that can never be written once the limit is over, and that is on record.
func TestRotationCopyStraggler(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		p := newPlaces("taken")
		d := newDrill(t, placesOf(p), 1)
		p.fail("taken", api.BundleForeign)
		began := time.Now()
		fresh := d.begin("first").GetOperation().GetAuthority()
		eventually(t, "the new root to be active", func() bool { return d.state(fresh) == "active" })
		if took := time.Since(began); took < time.Hour || took > 62*time.Minute {
			t.Errorf("it took %s, want an hour", took)
		}
		if !slices.ContainsFunc(ledgerOf(t, d.Server), func(r audit.Record) bool {
			return strings.Contains(r.Detail, "configmap/taken/signet-bundle (straggler)")
		}) {
			t.Error("over whom the step was taken is not on record")
		}
	})
}

// TestEmergencyCopies: an emergency waits for a copy that is not there yet, for at most its limit, and not at all for one that could
// not be written for that long before: else whoever has a namespace could hold it up.
func TestEmergencyCopies(t *testing.T) {
	const soon, limit = 10 * time.Second, time.Minute
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, p *places)
		at, by time.Duration
	}{
		{"all are written", func(*testing.T, *places) {}, 0, soon},
		{"one fails since a moment", func(_ *testing.T, p *places) { p.fail("shop", api.PublishFailed) }, limit - soon, limit + soon},
		{"one fails for longer", func(_ *testing.T, p *places) {
			p.fail("shop", api.BundleForeign)
			time.Sleep(2 * limit)
		}, 0, soon},
		{"one comes late", func(t *testing.T, p *places) {
			p.fail("shop", api.PublishFailed)
			wait := time.AfterFunc(limit/2, func() { p.fail("shop", "") })
			t.Cleanup(func() { wait.Stop() })
		}, limit/2 - soon, limit/2 + soon},
	} {
		t.Run(tt.name, func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				p := newPlaces("shop")
				d := newDrill(t, placesOf(p), 2)
				tt.change(t, p)
				if _, took := d.emergency("stolen", 2); took < tt.at || took > tt.by {
					t.Errorf("it took %s, want %s to %s", took, tt.at, tt.by)
				}
			})
		})
	}
}
