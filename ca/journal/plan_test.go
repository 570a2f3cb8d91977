package journal

import (
	"testing"
	"time"
)

// TestPlan: people are told who is affected, who is missing and when what can happen, and it is what then happens.
func TestPlan(t *testing.T) {
	dos := func(f Forecast) (all []Do) {
		for _, s := range f.Steps {
			all = append(all, s.Do)
		}
		return all
	}
	roots := pool(t, 2)
	j := journalOf(t, roots[0])
	acks := ready(t, j, t0)
	acks.Agents[0].Pods[0].Streams[0].Nack, acks.Agents[0].Pods[0].Streams[0].Acked = "no", Held{}
	f := Plan(j, t0, acks, Limits{})
	if f.Operation != "" || !f.Cross || f.Next != nil || f.Replicas != 2 || f.Agents != 2 || f.Pods != 2 || f.Streams != 2 ||
		len(f.Missing) != 1 || f.Missing[0].Nack != "no" || len(f.Unproven) != 1 || f.Active.ID != roots[0].ID || f.Active.Left <= 0 {
		t.Errorf("%+v", f)
	}
	want := []Forecasted{
		{Publish, "", t0, t0},
		{Activate, "", t0.Add(DefaultSoak), t0.Add(DefaultStraggler)},
		{Remove, roots[0].ID, t0.Add(time.Hour), t0.Add(24 * time.Hour)}, // the last leaf; a replica that sleeps
	}
	if len(f.Steps) != len(want) {
		t.Fatalf("%+v", f.Steps)
	}
	for i := range want {
		if f.Steps[i] != want[i] {
			t.Errorf("%+v, want %+v", f.Steps[i], want[i])
		}
	}
	if far := makeRoot(t, "upstream", 48*time.Hour); true {
		far.SealedKey = nil
		if f := Plan(journalOf(t, far), t0, acks, Limits{}); f.Cross || f.NoCross == "" || !f.Steps[1].Latest.IsZero() {
			t.Errorf("of a root elsewhere: %+v", f)
		}
		if f := Plan(journalOf(t, makeRoot(t, "old", time.Minute)), t0.Add(time.Hour), acks, Limits{}); f.Cross || f.NoCross == "" {
			t.Errorf("of a root that has expired: %+v", f)
		}
	}
	j = must(t)(Start(j, planned("op", roots[1].by(t, roots[0])), t0))
	if f := Plan(j, t0, acks, Limits{}); f.Operation != "op" || !f.Cross || f.Next.State != Prepared || len(dos(f)) != 3 {
		t.Errorf("prepared: %+v", f)
	}
	j = step(t, j, t0, acks)
	now := t0.Add(10 * time.Minute)
	f = Plan(j, now, ready(t, j, t0.Add(time.Hour)), Limits{})
	if d := dos(f); len(d) != 2 || d[0] != Activate || f.Steps[0].Latest != t0.Add(DefaultStraggler) {
		t.Errorf("published: %+v", f)
	}
	j = step(t, j, now, ready(t, j, now))
	acks = ready(t, j, now)
	acks.Replicas[0].Leaves[roots[0].ID] = now.Add(time.Hour)
	f = Plan(j, now, acks, Limits{})
	if d := dos(f); len(d) != 1 || d[0] != Remove || f.Steps[0].Earliest != now.Add(time.Hour) || len(f.Missing) != 1 || !f.Missing[0].Hard {
		t.Errorf("active: %+v", f)
	}
	if s, _ := Next(j, f.Steps[0].Earliest, acks); s.Do != Remove {
		t.Error("it is not when it was said to be")
	}
	fire := must(t)(Taint(j, TaintRequest{Request: request("fire"), Compromised: roots[1].ID}, now))
	f = Plan(fire, now, ready(t, fire, now), Limits{})
	if f.Kind != Emergency || f.Cross || f.NoCross == "" || len(f.Steps) != 1 || f.Steps[0].Latest != now.Add(DefaultEmergencyStraggler) {
		t.Errorf("emergency: %+v", f)
	}
}

// TestPlanRested: that somebody who cannot acknowledge has the bundle since a moment ago is nothing that stands in the way of a rotation
// to come, which gives him his time anyway.
func TestPlanRested(t *testing.T) {
	j := journalOf(t, pool(t, 1)[0])
	acks := ready(t, j, t0)
	acks.Copies[0].At = t0
	acks.Agents[0].Pods[0].Streams[0] = Stream{WorkloadAPI: true, Pushed: heldOf(t, j), PushedAt: t0}
	f := Plan(j, t0, acks, Limits{})
	if len(f.Missing) != 0 || len(f.Unproven) != 2 || f.Steps[1].Earliest != t0.Add(DefaultSoak) {
		t.Errorf("%+v", f)
	}
	acks.Copies[0].Held, acks.Agents[0].Pods[0].Streams[0].Pushed = Held{}, Held{}
	if f := Plan(j, t0, acks, Limits{}); len(f.Missing) != 2 || len(f.Unproven) != 0 {
		t.Errorf("what is not brought: %+v", f)
	}
}

// TestPlanExpelled: what an emergency is said to take, with a replica that nobody can ask, such as the one in the place of those that a
// restore knows nothing of, is what it then takes: its limit, and not the life of what that replica may have signed.
func TestPlanExpelled(t *testing.T) {
	roots := pool(t, 2)
	now, limit := t0.Add(time.Hour), DefaultEmergencyStraggler
	for _, tt := range []struct {
		name string
		lost time.Duration // until its intermediate expires; 0: there is none
		late time.Duration // by how much the removal is later than the activation, if everybody answers
	}{{"nobody is lost", 0, 0}, {"a replica is lost", 24 * time.Hour, limit}, {"one whose intermediate expires before", limit / 2, limit / 2}} {
		t.Run(tt.name, func(t *testing.T) {
			evidence := func(j Journal) Acks {
				acks := ready(t, j, now)
				for i := range acks.Replicas {
					acks.Replicas[i].Leaves[roots[0].ID] = now.Add(12 * time.Hour)
				}
				if tt.lost > 0 {
					acks.Replicas = append(acks.Replicas, Replica{Name: "before-restore-7", Intermediates: []Intermediate{
						{Root: roots[0].ID, NotAfter: now.Add(tt.lost)}, {Root: roots[1].ID, NotAfter: now.Add(48 * time.Hour)}}})
				}
				return acks
			}
			j := must(t)(Taint(journalOf(t, roots[0]), TaintRequest{Request: request("fire"), Compromised: roots[0].ID, Authority: roots[1].Authority}, now))
			for range 2 { // prepared, published
				f := Plan(j, now, evidence(j), Limits{})
				activate, remove := f.Steps[len(f.Steps)-2], f.Steps[len(f.Steps)-1]
				if !activate.Latest.Equal(now.Add(limit)) || !remove.Earliest.Equal(now.Add(tt.late)) || !remove.Latest.Equal(now.Add(2*limit)) {
					t.Errorf("%+v", f.Steps)
				}
				j = step(t, j, now, evidence(j))
			}
			f := Plan(j, now, evidence(j), Limits{})
			if len(f.Steps) != 1 || !f.Steps[0].Earliest.Equal(now.Add(tt.late)) || !f.Steps[0].Latest.Equal(now.Add(limit)) {
				t.Errorf("tainted: %+v", f.Steps)
			}
			before, at := f.Steps[0].Earliest.Add(-time.Second), f.Steps[0].Earliest
			if s, found := Next(j, before, evidence(j)); s.Is() && tt.late > 0 {
				t.Errorf("it is earlier than it was said to be: %v, %+v", s, found)
			}
			if s, found := Next(j, at, evidence(j)); s.Do != Remove {
				t.Errorf("it is not when it was said to be: %+v", found)
			}
		})
	}
}
