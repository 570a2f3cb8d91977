package journal

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
)

// TestCopiesGate judges each place where the bundle is shown by itself: it soaks from when it came to show the bundle, what fails is named
// with its reason, and whoever excuses a namespace excuses its copy.
func TestCopiesGate(t *testing.T) {
	const (
		original = "configmap/signet-system/signet-bundle"
		shop     = "configmap/shop/signet-bundle"
		trust    = "clustertrustbundle/signet.dev:bundle:example.org"
	)
	type fate struct {
		pass Pass
		why  string // a part of it
	}
	shows := fate{Unproven, "not who has read it"}
	for _, tt := range []struct {
		name      string
		cross     bool
		emergency bool
		change    func(f *fleet, original, shop, trust *Copy)
		want      map[string]fate
	}{
		{name: "all show it", want: map[string]fate{original: shows, shop: shows, trust: shows}},
		{name: "one since a moment", change: func(f *fleet, _, c, _ *Copy) { c.At = f.now.Add(-time.Minute) },
			want: map[string]fate{original: shows, shop: {"", "not who has read it"}, trust: shows}},
		{name: "one shows the bundle before", change: func(f *fleet, _, _, c *Copy) { c.Held.Generation.Number-- },
			want: map[string]fate{original: shows, shop: shows, trust: {"", "shows generation 1.1, not 1.2"}}},
		{name: "one cannot be written", change: func(f *fleet, _, c, _ *Copy) {
			*c = Copy{Kind: c.Kind, Name: c.Name, Namespace: c.Namespace, Failed: string(api.BundleForeign), FailedAt: f.now.Add(-time.Hour)}
		}, want: map[string]fate{original: shows, shop: {"", "shows none so far; it cannot be written: BUNDLE_FOREIGN"}, trust: shows}},
		{name: "one shows it, and could not be written since", change: func(_ *fleet, _, _, c *Copy) { c.Failed = string(api.PublishFailed) },
			want: map[string]fate{original: shows, shop: shows, trust: shows}},
		{name: "its namespace is excused", change: func(f *fleet, o, c, _ *Copy) {
			o.Held, c.Held = Held{}, Held{}
			var err error
			for _, ns := range []string{"shop", "signet-system"} {
				if f.j, err = f.j.WithExcuse(Excuse{Scope: ScopeNamespace, Name: ns, By: "uid:0", Reason: "taken", Until: f.now.Add(time.Hour)}, f.now); err != nil {
					panic(err)
				}
			}
		}, want: map[string]fate{original: {"", "none"}, shop: {Excused, "none"}, trust: shows}},
		{name: "after the limit, cross-signed", cross: true, change: func(f *fleet, _, c, _ *Copy) {
			c.Held = Held{}
			f.now = f.now.Add(DefaultStraggler)
		}, want: map[string]fate{original: shows, shop: {Straggler, "none"}, trust: shows}},
		{name: "a day later, not cross-signed", change: func(f *fleet, _, c, _ *Copy) {
			c.Held = Held{}
			f.now = f.now.Add(24 * time.Hour)
		}, want: map[string]fate{original: shows, shop: {"", "none"}, trust: shows}},
		{name: "an emergency, one is yet to be written", emergency: true, change: func(f *fleet, o, c, _ *Copy) {
			o.At, c.Held = f.now, Held{}
		}, want: map[string]fate{original: shows, shop: {"", "none"}, trust: shows}},
		{name: "an emergency, one cannot be written since a moment", emergency: true, change: func(f *fleet, _, c, _ *Copy) {
			c.Held, c.Failed, c.FailedAt = Held{}, string(api.PublishFailed), f.now
		}, want: map[string]fate{original: shows, shop: {"", "none"}, trust: shows}},
		{name: "an emergency, one could not be written long before", emergency: true, change: func(f *fleet, _, c, _ *Copy) {
			c.Held, c.Failed, c.FailedAt = Held{}, string(api.BundleForeign), f.now.Add(-DefaultEmergencyStraggler)
		}, want: map[string]fate{original: shows, shop: {Urgent, "BUNDLE_FOREIGN"}, trust: shows}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := published(t, tt.cross)
			if tt.emergency {
				roots := pool(t, 2)
				j := must(t)(Taint(journalOf(t, roots[0]), TaintRequest{Request: request("fire"), Compromised: roots[0].ID, Authority: roots[1].Authority}, t0))
				j = step(t, j, t0, ready(t, j, t0))
				f = fleet{j, t0, ready(t, j, t0)}
			}
			h, at := heldOf(t, f.j), f.now.Add(-DefaultSoak)
			f.acks.Copies = []Copy{
				{Kind: "configmap", Name: "signet-system/signet-bundle", Held: h, At: at},
				{Kind: "clustertrustbundle", Name: "signet.dev:bundle:example.org", Held: h, At: at},
				{Kind: "configmap", Name: "shop/signet-bundle", Namespace: "shop", Held: h, At: at},
			}
			if tt.change != nil {
				tt.change(&f, &f.acks.Copies[0], &f.acks.Copies[2], &f.acks.Copies[1])
			}
			s, found := Next(f.j, f.now, f.acks)
			blocked := false
			for _, b := range found {
				want, ok := tt.want[b.Name]
				if !ok || b.Kind != ByCopy || b.Pass != want.pass || !strings.Contains(b.Why, want.why) {
					t.Errorf("%s passes as %q, %q; want %+v", b.Name, b.Pass, b.Why, want)
				}
				blocked = blocked || want.pass == ""
				delete(tt.want, b.Name)
			}
			if len(tt.want) > 0 {
				t.Errorf("nobody tells of %v", tt.want)
			}
			if s.Is() == blocked {
				t.Errorf("step %v", s)
			}
		})
	}
}

// TestManyCopies names no more copies than people can read, and first those that fail; all are judged, and a step is forced over all.
func TestManyCopies(t *testing.T) {
	f := published(t, false)
	h := heldOf(t, f.j)
	f.acks.Copies = nil
	for i := range 1000 {
		c := Copy{Kind: "configmap", Name: fmt.Sprintf("ns-%03d/signet-bundle", i), Namespace: fmt.Sprintf("ns-%03d", i), Held: h, At: f.now.Add(-DefaultSoak)}
		switch {
		case i >= 990:
			c.Held, c.Failed, c.FailedAt = Held{}, string(api.PublishForbidden), f.now
		case i%2 == 0:
			c.At = f.now.Add(-time.Duration(i) * time.Millisecond)
		}
		f.acks.Copies = append(f.acks.Copies, c)
	}
	s, found := Next(f.j, f.now, f.acks)
	var blocking, passed, failing []string
	for _, b := range found {
		switch {
		case !b.Blocks():
			passed = append(passed, b.Name)
		default:
			blocking = append(blocking, b.Name)
		}
		if strings.Contains(b.Why, string(api.PublishForbidden)) {
			failing = append(failing, b.Name)
		}
		if strings.HasSuffix(b.Name, "-more") && b.Blocks() && !b.Until.Equal(f.now.Add(-44*time.Millisecond).Add(DefaultSoak)) {
			t.Errorf("the others are ready %s, want that of the last of them", b.Until)
		}
	}
	if s.Is() || len(blocking) != maxCopies+1 || len(passed) != maxCopies+1 || len(failing) != 10 {
		t.Errorf("%v: %d stand in the way, %d do not, %d fail", s, len(blocking), len(passed), len(failing))
	}
	if !slices.Contains(blocking, "copies/473-more") || !slices.Contains(passed, "copies/463-more") {
		t.Errorf("of the others: %s, %s", blocking, passed)
	}
	slices.Sort(blocking)
	forced, err := Force(f.j, f.now, f.acks, blocking, "uid:0")
	if err != nil || !cmp.Equal(forced.Forced, blocking) {
		t.Errorf("forced over %d: %v", len(forced.Forced), err)
	}
	f.acks.Copies = append(f.acks.Copies, Copy{Kind: "configmap", Name: "new/signet-bundle"})
	if _, err := Force(f.j, f.now, f.acks, blocking, "uid:0"); api.ReasonOf(err) != api.BlockersChanged {
		t.Errorf("over one more than was agreed to: %v", err)
	}
}
