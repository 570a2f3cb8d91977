package journal

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
)

// TestAbortAndRollback: what was begun can be taken back until the new root is active, and from then until the old one is gone.
//
// threat: E19
func TestAbortAndRollback(t *testing.T) {
	prepared := func(t testing.TB) fleet {
		roots := pool(t, 2)
		return fleet{j: must(t)(Start(journalOf(t, roots[0]), planned("op", roots[1].Authority), t0)), now: t0}
	}
	removed := func(t testing.TB) fleet {
		f := retiring(t)
		f.now = f.now.Add(2 * time.Hour)
		f.j = step(t, f.j, f.now, ready(t, f.j, f.now))
		return f
	}
	rolled := func(t testing.TB) fleet {
		f := retiring(t)
		f.j = must(t)(Rollback(f.j, request("op"), f.now))
		return f
	}
	for _, tt := range []struct {
		name            string
		at              func(testing.TB) fleet
		abort, rollback api.Reason // empty: done
	}{
		{"prepared", prepared, "", api.RotationTooLate},
		{"published", func(t testing.TB) fleet { return published(t, true) }, "", api.RotationTooLate},
		{"active", retiring, api.RotationTooLate, ""},
		{"rolled back", rolled, api.RotationTooLate, ""},
		{"removed", removed, api.RotationOver, api.RotationOver},
	} {
		for word, do := range map[string]func(Journal, Request, time.Time) (Journal, error){"abort": Abort, "rollback": Rollback} {
			t.Run(tt.name+", "+word, func(t *testing.T) {
				want := tt.abort
				if word == "rollback" {
					want = tt.rollback
				}
				f := tt.at(t)
				before := f.j.ActiveAuthority().ID
				if _, err := do(f.j, request("other"), f.now); api.ReasonOf(err) != api.RotationOver {
					t.Errorf("another operation: %v", err)
				}
				j, err := do(f.j, request("op"), f.now)
				if want != "" {
					if api.ReasonOf(err) != want {
						t.Errorf("%v, want %s", err, want)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if again := must(t)(do(j, request("op"), f.now.Add(time.Minute))); !cmp.Equal(again, j) {
					t.Error("said twice, it is done twice")
				}
				if word == "abort" && (j.Operation != nil || len(j.Authorities) != 1 || j.ActiveAuthority().ID != before || len(j.Gone) != 1) {
					t.Errorf("aborted: %+v", j)
				}
				if word == "rollback" && (j.Operation == nil || j.Operation.Back == nil || j.ActiveAuthority().ID != j.Operation.Replaces ||
					stateOf(j, j.Operation.Authority) != Retiring) {
					t.Errorf("rolled back: %+v", j)
				}
			})
		}
	}
}

// TestRolledBackToItsEnd: the root that was rolled back goes when nothing under it is left.
func TestRolledBackToItsEnd(t *testing.T) {
	f := retiring(t)
	old, fresh := f.j.Operation.Replaces, f.j.Operation.Authority
	f.j = must(t)(Rollback(f.j, request("op"), f.now))
	f.acks = ready(t, f.j, f.now)
	f.acks.Replicas[0].Leaves[fresh] = f.now.Add(time.Minute)
	if s, found := Next(f.j, f.now, f.acks); s.Is() || len(found) == 0 || found[0].Kind != ByLeaves {
		t.Errorf("%v, %+v", s, found)
	}
	f.now = f.now.Add(time.Minute)
	f.j = step(t, f.j, f.now, f.acks)
	if f.j.Operation != nil || f.j.Past[0].Outcome != RolledBack || f.j.Past[0].EndedBy.By != request("op").By || f.j.ActiveAuthority().ID != old || stateOf(f.j, fresh) != Removed {
		t.Errorf("%+v", f.j)
	}
}

// TestTaint: a compromised root goes as soon as nobody has an SVID under it, or its limit is over, whatever was under way. It
// keeps no cross-signature, and does not come back.
//
// threat: E15, E18
func TestTaint(t *testing.T) {
	taint := func(id string, successor Authority) TaintRequest {
		return TaintRequest{Request: request("fire"), Compromised: id, Authority: successor}
	}
	t.Run("the only one", func(t *testing.T) {
		roots := pool(t, 3)
		a, b := roots[0], roots[1]
		j := journalOf(t, a)
		if _, err := Taint(j, taint(a.ID, Authority{}), t0); api.ReasonOf(err) != api.SuccessorNeeded {
			t.Errorf("without a successor: %v", err)
		}
		if _, err := Taint(j, taint(a.ID, b.by(t, a)), t0); api.ReasonOf(err) != api.AuthorityRefused {
			t.Errorf("a successor that is cross-signed by it: %v", err)
		}
		if _, err := Taint(j, taint(b.ID, b.Authority), t0); api.ReasonOf(err) != api.NotFound {
			t.Errorf("one that is not there: %v", err)
		}
		j = must(t)(Taint(j, taint(a.ID, b.Authority), t0))
		if again := must(t)(Taint(j, taint(a.ID, roots[2].Authority), t0)); !cmp.Equal(again, j) {
			t.Error("said twice, it is done twice")
		}
		other := taint(a.ID, roots[2].Authority)
		other.ID = "other"
		if _, err := Taint(j, other, t0); api.ReasonOf(err) != api.RotationUnderWay {
			t.Errorf("by two people at once: %v", err)
		}
		j = step(t, j, t0, ready(t, j, t0)) // publish
		acks := ready(t, j, t0)
		acks.Agents[0].Held = Held{}
		if s, found := Next(j, t0, acks); s.Is() || found[0].Name != "node/node-a" {
			t.Errorf("%v: %+v", s, found)
		}
		s, found := Next(j, t0.Add(DefaultEmergencyStraggler), acks)
		if s.Do != Activate || found[0].Pass != Urgent {
			t.Errorf("after the limit: %v, %+v", s, found)
		}
		now := t0.Add(DefaultEmergencyStraggler)
		j = must(t)(Apply(j, s, now))
		if stateOf(j, a.ID) != Tainted || j.ActiveAuthority().ID != b.ID {
			t.Fatalf("%+v", j)
		}
		acks = ready(t, j, now)
		acks.Agents[1].Pods[0].Roots = []string{a.ID}
		acks.Replicas[0].Leaves[a.ID] = now.Add(time.Hour) // which nobody waits for
		if s, found := Next(j, now, acks); s.Is() || len(found) != 1 || found[0].Name != "pod/shop/web-1" {
			t.Errorf("before all is reissued: %v, %+v", s, found)
		}
		acks.Agents[1].Pods[0].Roots = []string{b.ID}
		if s, found = Next(j, now, acks); s.Do != Remove {
			t.Errorf("once all is reissued: %+v", found)
		}
		acks.Agents[1].Pods[0].Roots = []string{a.ID}
		if s, found = Next(j, now.Add(DefaultEmergencyStraggler), acks); s.Do != Remove || found[0].Pass != Urgent {
			t.Errorf("after the limit: %+v", found)
		}
		j = must(t)(Apply(j, s, now.Add(DefaultEmergencyStraggler)))
		if j.Operation != nil || j.Past[0].Outcome != Done || len(j.Gone) != 1 || !j.Gone[0].Tainted || j.Generation().String() != "1.3" {
			t.Errorf("at the end: %+v", j)
		}
		if _, err := Start(j, planned("again", a.Authority), now); api.ReasonOf(err) != api.AuthorityRefused {
			t.Errorf("it comes back: %v", err)
		}
		b2 := roots[2]
		b2.Authority.Cross, b2.Authority.CrossBy = roots[2].by(t, a).Cross, a.ID
		if _, err := Start(j, planned("again", b2.Authority), now); api.ReasonOf(err) != api.AuthorityRefused {
			t.Errorf("it cross-signs: %v", err)
		}
	})
	t.Run("while its successor is published", func(t *testing.T) {
		f := published(t, true)
		a, b := f.j.Operation.Replaces, f.j.Operation.Authority
		j := must(t)(Taint(f.j, taint(a, Authority{}), f.now))
		if i := j.find(b); j.Operation.Authority != b || len(j.Authorities[i].Cross) != 0 || j.Past[0].Outcome != Superseded || j.Past[0].EndedBy.By == "" {
			t.Fatalf("%+v", j)
		}
		if s, found := Next(j, f.now, ready(t, j, f.now)); s.Do != Activate {
			t.Errorf("%v: %+v", s, found)
		}
		j = must(t)(Abort(j, request("fire"), f.now))
		if j.Operation != nil || len(j.Authorities) != 1 {
			t.Errorf("a false alarm: %+v", j)
		}
	})
	t.Run("the new one, after activation", func(t *testing.T) {
		f := retiring(t)
		a, b := f.j.Operation.Replaces, f.j.Operation.Authority
		j := must(t)(Taint(f.j, taint(b, Authority{}), f.now))
		if j.ActiveAuthority().ID != a || stateOf(j, b) != Tainted || j.Operation.Authority != a {
			t.Fatalf("%+v", j)
		}
		if _, err := Rollback(j, request("fire"), f.now); api.ReasonOf(err) != api.RotationTooLate {
			t.Errorf("rolled back: %v", err)
		}
		if _, err := Abort(j, request("fire"), f.now); api.ReasonOf(err) != api.RotationTooLate {
			t.Errorf("aborted: %v", err)
		}
		if j = step(t, j, f.now, ready(t, j, f.now)); j.Operation != nil || stateOf(j, b) != Removed {
			t.Errorf("%+v", j)
		}
	})
	t.Run("the old one, after activation", func(t *testing.T) {
		f := retiring(t)
		a, b := f.j.Operation.Replaces, f.j.Operation.Authority
		j := must(t)(Taint(f.j, taint(a, Authority{}), f.now))
		if i := j.find(b); stateOf(j, a) != Tainted || j.ActiveAuthority().ID != b || j.Authorities[i].CrossBy != "" {
			t.Fatalf("%+v", j)
		}
		if j = step(t, j, f.now, ready(t, j, f.now)); j.Operation != nil || stateOf(j, a) != Removed {
			t.Errorf("%+v", j)
		}
	})
	t.Run("the next one, before anybody trusts it", func(t *testing.T) {
		roots := pool(t, 2)
		j := must(t)(Start(journalOf(t, roots[0]), planned("op", roots[1].Authority), t0))
		j = must(t)(Taint(j, taint(roots[1].ID, Authority{}), t0))
		if j.Operation != nil || len(j.Authorities) != 1 || !j.Gone[0].Tainted || j.Generation().String() != "1.1" || len(j.Past) != 2 {
			t.Errorf("%+v", j)
		}
	})
	t.Run("the next one, published", func(t *testing.T) {
		f := published(t, true)
		b := f.j.Operation.Authority
		j := must(t)(Taint(f.j, taint(b, Authority{}), f.now))
		if j = step(t, j, f.now, ready(t, j, f.now)); j.Operation != nil || len(j.Authorities) != 1 || !j.Gone[0].Tainted {
			t.Errorf("%+v", j)
		}
	})
	t.Run("one that is gone", func(t *testing.T) {
		f := published(t, true)
		b := f.j.Operation.Authority
		j := must(t)(Abort(f.j, request("op"), f.now))
		j = must(t)(Taint(j, taint(b, Authority{}), f.now))
		if j.Operation != nil || !j.Gone[0].Tainted || j.Past[1].Kind != Emergency {
			t.Errorf("%+v", j)
		}
	})
	t.Run("one after the other", func(t *testing.T) {
		roots := pool(t, 3)
		a, b, c := roots[0], roots[1], roots[2]
		j := must(t)(Taint(journalOf(t, a), taint(a.ID, b.Authority), t0))
		j = step(t, j, t0, ready(t, j, t0)) // b is published, and is compromised too
		second := taint(b.ID, Authority{})
		second.ID = "second"
		if _, err := Taint(j, second, t0); api.ReasonOf(err) != api.SuccessorNeeded {
			t.Errorf("without a successor: %v", err)
		}
		second.Authority = c.Authority
		j = must(t)(Taint(j, second, t0))
		for n := 0; j.Operation != nil; n++ {
			if n > 5 {
				t.Fatalf("no end: %+v", j)
			}
			j = step(t, j, t0, ready(t, j, t0))
		}
		if j.ActiveAuthority().ID != c.ID || len(j.Authorities) != 1 || len(j.Gone) != 2 || !j.Gone[0].Tainted || !j.Gone[1].Tainted {
			t.Errorf("%+v", j)
		}
	})
}

// TestStaleStep: a step that was decided on another record is not taken: by a replica that was paused, after an abort, on
// another generation.
//
// threat: E10
func TestStaleStep(t *testing.T) {
	f := published(t, true)
	s, _ := Next(f.j, f.now, f.acks)
	aborted := must(t)(Abort(f.j, request("op"), f.now))
	if _, err := Apply(aborted, s, f.now); api.ReasonOf(err) != api.RotationOver {
		t.Errorf("after an abort: %v", err)
	}
	tainted := must(t)(Taint(f.j, TaintRequest{Request: request("fire"), Compromised: f.j.Operation.Replaces}, f.now))
	if _, err := Apply(tainted, s, f.now); api.ReasonOf(err) != api.RotationOver {
		t.Errorf("after an emergency: %v", err)
	}
	for name, change := range map[string]func(*Step){
		"another generation": func(s *Step) { s.Generation.Number-- },
		"another step":       func(s *Step) { s.Do = Remove },
		"no step":            func(s *Step) { s.Do = "destroy" },
		"another root":       func(s *Step) { s.Authority = f.j.Operation.Replaces },
		"no root":            func(s *Step) { s.Authority = "" },
	} {
		bad := s
		change(&bad)
		if _, err := Apply(f.j, bad, f.now); api.ReasonOf(err) != api.StateConflict {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestClock: with a clock that is behind the record nothing moves by itself, until somebody says so; and what somebody says is
// done all the same.
//
// threat: E20
func TestClock(t *testing.T) {
	f := published(t, true, func(r *StartRequest) { r.Automatic = true })
	s, _ := Next(f.j, f.now, f.acks)
	ago := f.now.Add(-365 * 24 * time.Hour)
	if got, _ := Next(f.j, ago, f.acks); got.Is() {
		t.Errorf("decided: %v", got)
	}
	if _, err := Apply(f.j, s, ago); api.ReasonOf(err) != api.ClockJumped {
		t.Errorf("applied: %v", err)
	}
	if _, err := Apply(f.j, s, f.now.Add(-time.Minute)); err != nil { // as clocks of two replicas differ
		t.Errorf("a minute: %v", err)
	}
	j := must(t)(Abort(f.j, request("op"), ago))
	if j.Changed != ago {
		t.Errorf("the record goes by %s", j.Changed)
	}
	ahead := must(t)(f.j.WithExcuse(Excuse{Scope: ScopeNode, Name: "n", Reason: "r", By: "b", Until: f.now.Add(48 * time.Hour)}, f.now.Add(24*time.Hour)))
	if d := Due(must(t)(Abort(ahead, request("op"), f.now.Add(24*time.Hour))), t0); d.Due {
		t.Error("due by a clock that is behind")
	}
	if _, err := Start(must(t)(Abort(ahead, request("op"), f.now.Add(24*time.Hour))),
		StartRequest{Request: request("auto"), Kind: Planned, Automatic: true, Authority: makeRoot(t, "n", 48*time.Hour).Authority}, f.now); api.ReasonOf(err) != api.ClockJumped {
		t.Errorf("begun: %v", err)
	}
}

// TestDue: a root is replaced before it expires, once, and not against somebody's word.
func TestDue(t *testing.T) {
	const day = 24 * time.Hour
	for _, tt := range []struct {
		life, prepare, latest time.Duration // the dates before its end
	}{
		{3650 * day, 90 * day, 30 * day},
		{100 * day, 50 * day, 25 * day},
		{day, day / 2, day / 4},
	} {
		r := makeRoot(t, "r", tt.life-time.Minute) // from a minute before t0
		j := journalOf(t, r)
		end := r.cert.NotAfter
		s := Due(j, t0)
		if s.Due || s.Overdue || s.Expires != end || s.Prepare != end.Add(-tt.prepare) || s.Latest != end.Add(-tt.latest) {
			t.Errorf("life of %s: %+v", tt.life, s)
		}
		if s := Due(j, s.Prepare.Add(-time.Second)); s.Due {
			t.Error("due a second early")
		}
		if s := Due(j, s.Prepare); !s.Due || s.Overdue {
			t.Errorf("not due: %+v", s)
		}
		if s := Due(j, s.Latest); !s.Overdue {
			t.Errorf("not overdue: %+v", s)
		}
		if s := Due(j, end.Add(day)); !s.Due || !s.Overdue { // I10
			t.Errorf("expired: %+v", s)
		}
	}
	r := makeRoot(t, "r", 3650*day)
	j := journalOf(t, r)
	now := Due(j, t0).Prepare
	next := makeRoot(t, "next", 7300*day)
	for _, automatic := range []bool{true, false} { // whoever began what somebody ended
		j := must(t)(Start(j, StartRequest{Request: request("op"), Kind: Planned, Automatic: automatic, Authority: next.Authority}, now))
		if Due(j, now).Due || automatic && j.Operation.Latest != Due(j, now).Latest {
			t.Error("due while it is under way")
		}
		aborted := must(t)(Abort(j, request("op"), now))
		for j.ActiveAuthority().ID != next.ID {
			j = step(t, j, now, ready(t, j, now))
		}
		j = must(t)(Rollback(j, request("op"), now))
		for j.Operation != nil {
			j = step(t, j, now, ready(t, j, now))
		}
		for what, j := range map[string]Journal{"aborted": aborted, "rolled back": j} {
			if Due(j, now.Add(day-time.Second)).Due || !Due(j, now.Add(day)).Due {
				t.Errorf("automatic %t, %s: it comes back at the wrong time", automatic, what)
			}
			if !Due(j, Due(j, now).Latest).Due {
				t.Errorf("automatic %t, %s: not due at the latest date", automatic, what)
			}
		}
	}
	if s := Due(Journal{}, now); s.Due || !s.Expires.IsZero() {
		t.Errorf("of no record: %+v", s)
	}
}

// TestExcuses: an excuse is named, reasoned and expires; there is one of a thing; and they are bounded. I9.
func TestExcuses(t *testing.T) {
	good := Excuse{Scope: ScopeNode, Name: "n", Reason: "drained", By: "uid:0", Until: t0.Add(time.Hour)}
	j := newJournal(t)
	for name, change := range map[string]func(*Excuse){
		"no name":      func(e *Excuse) { e.Name = "" },
		"no reason":    func(e *Excuse) { e.Reason = "" },
		"nobody":       func(e *Excuse) { e.By = "" },
		"no scope":     func(e *Excuse) { e.Scope = "" },
		"long":         func(e *Excuse) { e.Reason = strings.Repeat("x", MaxRotateText+1) },
		"for ever":     func(e *Excuse) { e.Until = time.Time{} },
		"over":         func(e *Excuse) { e.Until = t0 },
		"for too long": func(e *Excuse) { e.Until = t0.Add(MaxExcused + time.Second) },
		"no text":      func(e *Excuse) { e.Name = "\xff" },
	} {
		e := good
		change(&e)
		if _, err := j.WithExcuse(e, t0); api.ReasonOf(err) != api.RotationInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	j = must(t)(j.WithExcuse(good, t0))
	later := good
	later.Until = t0.Add(2 * time.Hour)
	j = must(t)(j.WithExcuse(later, t0.Add(time.Minute)))
	if len(j.Excuses) != 1 || j.Excuses[0].Until != later.Until || j.Generation().String() != "1.1" {
		t.Errorf("%+v", j.Excuses)
	}
	if none := must(t)(j.WithoutExcuse(ScopeNode, "", "n", t0)); len(none.Excuses) != 0 {
		t.Errorf("taken back: %+v", none.Excuses)
	}
	if same := must(t)(j.WithoutExcuse(ScopePod, "", "n", t0)); !cmp.Equal(same, j) {
		t.Error("one that is not there was taken back")
	}
	full := j
	for i := range MaxExcuses {
		e := good
		e.Name = string(rune(0x4e00 + i))
		next, err := full.WithExcuse(e, t0)
		if i == MaxExcuses-1 {
			if api.ReasonOf(err) != api.StateFull {
				t.Errorf("one too many: %v", err)
			}
			break
		}
		full = must(t)(next, err)
	}
	if over := must(t)(full.WithExcuse(Excuse{Scope: ScopePod, Name: "p", Reason: "r", By: "b", Until: t0.Add(5 * time.Hour)}, t0.Add(3*time.Hour))); len(over.Excuses) != 1 {
		t.Errorf("%d excuses, and all but one are over", len(over.Excuses))
	}
}
