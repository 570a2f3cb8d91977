package journal

import (
	"slices"
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

// TestPlanTimes: a removal is not said to be possible before what is signed until the activation has expired, nor to be sure before those
// are ready who can hold it up.
func TestPlanTimes(t *testing.T) {
	const longest = 10 * time.Minute
	roots := pool(t, 2)
	alive := func(t *testing.T, j Journal, now time.Time) Acks {
		acks := ready(t, j, now)
		for i := range acks.Replicas {
			acks.Replicas[i].Leaves = nil // of what is destroyed alone
			acks.Replicas[i].Intermediates[0].Longest = longest
		}
		return acks
	}
	j := journalOf(t, roots[0])
	last := func(f Forecast) Forecasted { return f.Steps[len(f.Steps)-1] }
	f := Plan(j, t0, alive(t, j, t0), Limits{})
	if s := last(f); !s.Earliest.Equal(t0.Add(DefaultSoak+longest)) || !s.Latest.Equal(t0.Add(24*time.Hour)) {
		t.Errorf("none is under way: %+v", s)
	}
	if s := last(Plan(j, t0, alive(t, j, t0), Limits{Straggler: 48 * time.Hour})); !s.Latest.Equal(t0.Add(48*time.Hour + longest)) {
		t.Errorf("with a long limit: %+v", s)
	}
	f.SetCross("its key is elsewhere", t0, alive(t, j, t0), Limits{})
	if s := last(f); f.Cross || f.NoCross == "" || !f.Steps[1].Latest.IsZero() || !s.Latest.IsZero() || s.Earliest.IsZero() {
		t.Errorf("not cross-signed: %+v", f)
	}
	f.SetCross("", t0, alive(t, j, t0), Limits{})
	if !f.Cross || f.NoCross != "" || f.Steps[1].Latest.IsZero() || last(f).Latest.IsZero() {
		t.Errorf("cross-signed after all: %+v", f)
	}
	started := must(t)(Start(j, planned("op", roots[1].by(t, roots[0])), t0))
	f = Plan(started, t0, alive(t, started, t0), Limits{})
	if len(f.Unproven) != 1 || !f.Steps[1].Earliest.Equal(t0.Add(DefaultSoak)) || !last(f).Earliest.Equal(t0.Add(DefaultSoak+longest)) {
		t.Errorf("prepared: %+v", f)
	}

	published := step(t, started, t0, ready(t, started, t0))
	active := step(t, published, t0, ready(t, published, t0))
	clone := func() Journal {
		j := active
		j.Operation, j.Authorities = active.Operation.clone(), slices.Clone(active.Authorities)
		return j
	}
	now, limit := t0.Add(10*time.Minute), t0.Add(DefaultStraggler)
	for _, tt := range []struct {
		name string
		set  func(*Operation, *Agent)
		want time.Time
	}{
		{"all hold it", func(*Operation, *Agent) {}, now},
		{"one is frozen", func(_ *Operation, a *Agent) { a.Held = Held{} }, limit},
		{"one is away", func(_ *Operation, a *Agent) { a.Held, a.Connected, a.Until = Held{}, false, now.Add(time.Minute) }, now.Add(time.Minute)},
		{"one is away for long", func(_ *Operation, a *Agent) { a.Held, a.Connected, a.Until = Held{}, false, now.Add(8*time.Hour) }, limit},
		{"its pod is frozen", func(_ *Operation, a *Agent) { a.Pods[0].Streams[0].Acked = Held{} }, limit},
		{"one is frozen, and there is a date", func(o *Operation, a *Agent) {
			a.Held, o.Automatic, o.Latest = Held{}, true, now.Add(time.Minute)
		}, now.Add(time.Minute)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := clone()
			acks := ready(t, j, now)
			tt.set(j.Operation, &acks.Agents[0])
			if s := last(Plan(j, now, acks, Limits{})); s.Do != Remove || !s.Latest.Equal(tt.want) {
				t.Errorf("%+v, want %s", s, tt.want)
			}
			if s, found := Next(j, tt.want, acks); s.Do != Remove {
				t.Errorf("it is not when it was said to be: %+v", found)
			}
		})
	}
	frozen := ready(t, active, now)
	frozen.Agents[0].Held = Held{}
	bare := clone()
	bare.Authorities[bare.find(roots[1].ID)].Cross = nil
	if s := last(Plan(bare, now, frozen, Limits{})); !s.Latest.IsZero() {
		t.Errorf("one is frozen, and nothing is cross-signed: %+v", s)
	}
}

// TestPlanEmergency names who would be waited for before anything is declared, and counts the agents of whose pods nothing is known.
func TestPlanEmergency(t *testing.T) {
	roots := pool(t, 2)
	j := journalOf(t, roots[0])
	acks := ready(t, j, t0)
	acks.Agents[0].Pods[0].Streams[0].Nack, acks.Agents[0].Pods[0].Streams[0].Acked = "no", Held{}
	acks.Agents[1].Connected, acks.Agents[1].Pods, acks.Agents[1].PodsUnknown = false, nil, true
	fire := must(t)(Taint(j, TaintRequest{Request: request("plan"), Compromised: roots[0].ID, Authority: roots[1].Authority}, t0))
	f := Plan(fire, t0, acks, Limits{})
	if len(f.Missing) != 2 || f.Missing[0].Node != "node-b" || f.Missing[1].Nack != "no" || len(f.Unproven) != 1 {
		t.Errorf("%+v, %+v", f.Missing, f.Unproven)
	}
	if f.Agents != 2 || f.Unheard != 1 || f.Pods != 1 {
		t.Errorf("%+v", f)
	}
	if !f.Steps[1].Earliest.Equal(t0) {
		t.Errorf("nobody soaks in an emergency: %+v", f.Steps)
	}
}
