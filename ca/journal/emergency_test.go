package journal

import (
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
)

// TestEmergencyGate: an emergency waits for what can be heard of, for at most its limit, and not at all for what nobody would ever
// hear of: that a pod of the Workload API, or a reader of a copy, uses the bundle that it was brought.
func TestEmergencyGate(t *testing.T) {
	const node, pod, copied = "node/node-a", "pod/shop/web-0", "ConfigMap/signet-bundle"
	workload := func(f *fleet, s Stream) {
		s.WorkloadAPI = true
		f.acks.Agents[0].Pods[0].Streams[0] = s
	}
	away := func(f *fleet, since time.Duration) {
		a := &f.acks.Agents[0]
		a.Connected, a.Held, a.Seen = false, Held{}, f.now.Add(-since)
		a.Pods[0].Streams[0].Acked = Held{}
	}
	for _, tt := range []struct {
		name   string
		change func(f *fleet)
		want   map[string]Pass // of each that is not ready; "" where it is waited for
	}{
		{"everybody has it", func(*fleet) {}, map[string]Pass{}},
		{"the Workload API was brought it just now", func(f *fleet) {
			workload(f, Stream{Pushed: heldOf(t, f.j), PushedAt: f.now})
		}, map[string]Pass{pod: Unproven}},
		{"the Workload API was not", func(f *fleet) { workload(f, Stream{}) }, map[string]Pass{pod: ""}},
		{"a copy shows it since now", func(f *fleet) { f.acks.Copies[0].At = f.now }, map[string]Pass{}},
		{"a copy does not", func(f *fleet) { f.acks.Copies[0].Held = Held{} }, map[string]Pass{copied: ""}},
		{"a copy does not, after the limit", func(f *fleet) {
			f.acks.Copies[0].Held = Held{}
			f.now = f.now.Add(DefaultEmergencyStraggler)
		}, map[string]Pass{copied: Urgent}},
		{"rejected", func(f *fleet) {
			f.acks.Agents[0].Pods[0].Streams[0] = Stream{Bundle: true, Nack: "no"}
		}, map[string]Pass{pod: ""}},
		{"rejected, after the limit", func(f *fleet) {
			f.acks.Agents[0].Pods[0].Streams[0] = Stream{Bundle: true, Nack: "no"}
			f.now = f.now.Add(DefaultEmergencyStraggler)
		}, map[string]Pass{pod: Urgent}},
		{"away since a moment", func(f *fleet) { away(f, DefaultEmergencyStraggler-time.Second) }, map[string]Pass{node: "", pod: ""}},
		{"away for longer than the limit already", func(f *fleet) { away(f, DefaultEmergencyStraggler) }, map[string]Pass{node: Urgent, pod: Urgent}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			roots := pool(t, 2)
			j := must(t)(Taint(journalOf(t, roots[0]), TaintRequest{Request: request("fire"), Compromised: roots[0].ID, Authority: roots[1].Authority}, t0))
			j = step(t, j, t0, ready(t, j, t0))
			f := fleet{j, t0, ready(t, j, t0)}
			tt.change(&f)
			s, found := Next(f.j, f.now, f.acks)
			blocked := false
			for _, b := range found {
				want, ok := tt.want[b.Name]
				if !ok && b.Kind == ByCopy && b.Pass == Unproven { // it never is more than that
					continue
				}
				if blocked = blocked || b.Blocks(); !ok || b.Pass != want {
					t.Errorf("%s passes as %q, want %q", b.Name, b.Pass, want)
				}
				delete(tt.want, b.Name)
			}
			if len(tt.want) > 0 {
				t.Errorf("ready: %v", tt.want)
			}
			if (s.Do == Activate) == blocked {
				t.Errorf("step %v, blocked: %t", s, blocked)
			}
		})
	}
}

// TestEmergencyAway: SVIDs under the compromised root of an agent that has long been away cannot be reissued, and hold up nothing.
func TestEmergencyAway(t *testing.T) {
	roots := pool(t, 2)
	j := must(t)(Taint(journalOf(t, roots[0]), TaintRequest{Request: request("fire"), Compromised: roots[0].ID, Authority: roots[1].Authority}, t0))
	for range 2 {
		j = step(t, j, t0, ready(t, j, t0))
	}
	for _, tt := range []struct {
		away time.Duration // 0: it is there
		want bool
	}{{0, false}, {time.Second, false}, {DefaultEmergencyStraggler, true}} {
		acks := ready(t, j, t0)
		a := &acks.Agents[0]
		a.Root, a.Pods[0].Roots = roots[0].ID, []string{roots[0].ID}
		a.Connected, a.Seen = tt.away == 0, t0.Add(-tt.away)
		s, found := Next(j, t0, acks)
		if (s.Do == Remove) != tt.want || len(found) != 2 || found[0].Blocks() == tt.want || found[1].Blocks() == tt.want {
			t.Errorf("away for %s: %v, %+v", tt.away, s, found)
		}
	}
}

// TestEmergencySigner: a compromised root stays in the bundle while nobody can issue under another one, whatever the limit says.
func TestEmergencySigner(t *testing.T) {
	roots := pool(t, 2)
	j := must(t)(Taint(journalOf(t, roots[0]), TaintRequest{Request: request("fire"), Compromised: roots[0].ID, Authority: roots[1].Authority}, t0))
	for range 2 {
		j = step(t, j, t0, ready(t, j, t0))
	}
	now := t0.Add(time.Hour)
	for _, tt := range []struct {
		ready [2]bool
		want  bool
	}{{[2]bool{false, false}, false}, {[2]bool{true, false}, true}, {[2]bool{false, true}, true}} {
		acks := ready(t, j, now)
		for i := range acks.Replicas {
			acks.Replicas[i].Ready = tt.ready[i]
		}
		s, found := Next(j, now, acks)
		if (s.Do == Remove) != tt.want {
			t.Errorf("ready %v: %v, %+v", tt.ready, s, found)
		}
		if tt.want {
			continue
		}
		if s, err := Force(j, now, acks, []string{"replicas"}, "uid:0"); err != nil || s.Do != Remove {
			t.Errorf("forced: %v, %v", s, err)
		}
	}
}

// TestIDsOfOperations: an id under which something else was begun is refused; what was begun under it itself is not begun again.
func TestIDsOfOperations(t *testing.T) {
	roots := pool(t, 4)
	a, b := roots[0], roots[1]
	j := must(t)(Start(journalOf(t, a), planned("one", b.by(t, a)), t0))
	j = step(t, j, t0, ready(t, j, t0))
	j = step(t, j, t0, ready(t, j, t0))
	taint := func(id, compromised string) error {
		_, err := Taint(j, TaintRequest{Request: request(id), Compromised: compromised, Authority: roots[2].Authority}, t0)
		return err
	}
	wantReason := func(err error, want api.Reason) {
		t.Helper()
		if (err == nil) != (want == "") || err != nil && api.ReasonOf(err) != want {
			t.Errorf("%v, want %q", err, want)
		}
	}
	wantReason(taint("one", b.ID), api.RotationInvalid)
	j = must(t)(Taint(j, TaintRequest{Request: request("fire"), Compromised: b.ID, Authority: roots[2].Authority}, t0))
	wantReason(taint("fire", b.ID), "")
	wantReason(taint("fire", a.ID), api.RotationInvalid) // that it is another root has to be heard
	wantReason(taint("one", a.ID), api.RotationInvalid)
	_, err := Start(j, planned("fire", roots[3].Authority), t0)
	wantReason(err, api.RotationInvalid)
	_, err = Start(j, planned("one", roots[3].Authority), t0)
	wantReason(err, "")
}

// TestEmergencyAhead: an emergency that was declared by a clock which was ahead, and was set right since, does not wait until its times
// have come. Whoever refuses is passed over at once, and what is under the compromised root goes.
func TestEmergencyAhead(t *testing.T) {
	for _, tt := range []struct {
		name  string
		ahead time.Duration
		over  bool
	}{
		{"by no more than two clocks differ", clockSlack, false},
		{"by an hour", time.Hour, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			roots, wrong := pool(t, 2), t0.Add(tt.ahead)
			j := must(t)(Taint(journalOf(t, roots[0]), TaintRequest{Request: request("fire"), Compromised: roots[0].ID, Authority: roots[1].Authority}, wrong))
			j = step(t, j, wrong, ready(t, j, wrong)) // published
			refuses := func(j Journal) Acks {
				acks := ready(t, j, t0)
				acks.Agents[0].Pods[0].Streams[0] = Stream{Bundle: true, Nack: "no"}
				acks.Agents[0].Pods[0].Roots = []string{roots[0].ID}
				return acks
			}
			s, found := Next(j, t0, refuses(j))
			if (s.Do == Activate) != tt.over {
				t.Fatalf("%v: %+v", s, found)
			}
			j = step(t, j, wrong, ready(t, j, wrong))
			if s, found := Next(j, t0, refuses(j)); (s.Do == Remove) != tt.over {
				t.Errorf("%v: %+v", s, found)
			}
		})
	}
}
