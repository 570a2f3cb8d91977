package journal

import (
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/api"
)

// TestRestored restores every record that a walk through small fleets comes upon. Each is valid and later than whatever was shown;
// nothing in it is in another state than before, so that what was tainted or gone stays so; nothing is believed of what was
// proven before the backup; and once it is proven anew the operation goes on to its end.
//
// threat: E05, E24
func TestRestored(t *testing.T) {
	limit := 2000
	if testing.Short() {
		limit = 400
	}
	found := map[State]int{}
	for name, r := range map[string]rules{
		"planned":     {cross: true, roots: 3, hours: 4, calm: true},
		"rolled back": {roots: 2, hours: 3, back: true},
		"excused":     {roots: 2, hours: 3, excuse: true, calm: true},
		"emergency":   {cross: true, roots: 3, hours: 2, taint: true, calm: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWalk(t, r)
			w.run(limit)
			for _, j := range w.journals {
				for _, a := range j.Authorities {
					found[a.State]++
				}
				checkRestored(t, j)
			}
		})
	}
	for _, s := range []State{Prepared, Published, Active, Retiring, Tainted} {
		if found[s] == 0 {
			t.Errorf("no record had an authority that is %s", s)
		}
	}
}

func checkRestored(t *testing.T, j Journal) {
	t.Helper()
	now := t0.Add(48 * time.Hour)
	later := api.Generation{Epoch: j.Epoch + 7, Number: j.Number + 100}
	before := must(t)(decodeEncoded(j))
	got, err := Restored(j, []api.Generation{{}, later, {Epoch: 1, Number: math.MaxUint32}}, now)
	if err != nil {
		t.Fatal(err)
	}
	if !cmp.Equal(j, before) {
		t.Fatal("the record of the backup was changed")
	}
	if again := must(t)(decodeEncoded(got)); !cmp.Equal(again, got) {
		t.Fatalf("read back it is another:\n%s", cmp.Diff(got, again))
	}
	if got.Generation().Sequence() <= later.Sequence() || got.Epoch <= later.Epoch {
		t.Fatalf("generation %s, and %s was shown", got.Generation(), later)
	}
	for _, a := range j.Authorities {
		i := got.find(a.ID)
		switch {
		case a.State == Removed:
			if i >= 0 || got.findGone(a.ID) < 0 {
				t.Fatalf("authority %s was removed and is back", a.ID)
			}
		case i < 0 || got.Authorities[i].State != a.State:
			t.Fatalf("authority %s is no longer %s", a.ID, a.State)
		case a.State.Trusted() && got.Authorities[i].Since != got.Generation().Sequence():
			t.Fatalf("authority %s counts as held by those with generation %s", a.ID, api.FromSequence(got.Authorities[i].Since))
		}
	}
	if len(got.Authorities) > len(j.Authorities) || len(got.Gone) < len(j.Gone) {
		t.Fatal("there are authorities that were not there")
	}
	if got.Operation == nil {
		if j.Operation != nil {
			t.Fatal("the operation is lost")
		}
		return
	}
	// All of them hold what was shown last before, and had it for long. What was compromised or rolled back goes by other evidence
	// than who holds the bundle.
	s, _ := Next(got, now, ready(t, j, now))
	if s.Do == Activate || s.Do == Remove && got.Operation.Back == nil && stateOf(got, s.Authority) != Tainted {
		t.Fatalf("%v, on evidence from before the restore", s)
	}
	for range 8 { // all of them hold what is shown now
		s, blockers := Next(got, now, ready(t, got, now))
		if !s.Is() {
			if got.Operation != nil {
				t.Fatalf("it does not go on: %+v", blockers)
			}
			return
		}
		got, now = must(t)(Apply(got, s, now)), now.Add(time.Hour)
	}
	t.Fatal("it does not come to an end")
}

func decodeEncoded(j Journal) (Journal, error) {
	data, err := j.Encode()
	if err != nil {
		return Journal{}, err
	}
	return Decode(data)
}

// TestRestoredEpoch: two restores of one backup, of which nobody knows, come to two generations, and there is an end.
func TestRestoredEpoch(t *testing.T) {
	j := journalOf(t, pool(t, 1)[0])
	day := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	believed := api.EpochAt(day.AddDate(1, 0, 0)) + 1<<16
	for _, tt := range []struct {
		name string
		seen []api.Generation
		now  time.Time
		want uint32
	}{
		{"by the clock", nil, day, 24},
		{"an hour later", nil, day.Add(time.Hour), 25},
		{"by what was shown", []api.Generation{{Epoch: 30, Number: 2}, {Epoch: 29, Number: 9}}, day, 31},
		{"by the highest that anybody believes", []api.Generation{{Epoch: believed, Number: 2}}, day, believed + 1},
		{"by no more than that", []api.Generation{{Epoch: believed + 1, Number: 1}, {Epoch: math.MaxUint32, Number: math.MaxUint32}, {Epoch: 30, Number: 2}}, day, 31},
		{"the clock is back", nil, time.Date(2025, 12, 31, 23, 0, 0, 0, time.UTC), 2},
		{"the clock is mad", nil, time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC), 1 << 20},
	} {
		got, err := Restored(j, tt.seen, tt.now)
		if err != nil || got.Epoch != tt.want || got.Number != j.Number || got.Generation().Sequence() >= 1<<53 {
			t.Errorf("%s: generation %s (%v), want epoch %d", tt.name, got.Generation(), err, tt.want)
		}
	}
	last := j
	last.Epoch = math.MaxUint32
	_, err := Restored(last, nil, day)
	if api.ReasonOf(err) != api.StateFull {
		t.Errorf("after the last epoch: %v", err)
	}
	if _, err := Restored(Journal{}, nil, day); api.ReasonOf(err) != api.StateCorrupt {
		t.Errorf("no record: %v", err)
	}
}

// TestRestoredLatest: an automatic rotation whose latest date was over when the backup was made waits anew for those who come back.
func TestRestoredLatest(t *testing.T) {
	f := published(t, true, func(r *StartRequest) { r.Automatic = true })
	active := f.j.ActiveAuthority()
	now := scheduleOf(active).Latest.Add(time.Minute)
	got := must(t)(Restored(f.j, nil, now))
	acks := ready(t, got, now)
	for i := range acks.Agents {
		acks.Agents[i].Held = Held{}
	}
	if s, _ := Next(got, now, acks); s.Is() {
		t.Errorf("%v, while no agent has the bundle", s)
	}
	acks = ready(t, got, now.Add(2*time.Hour))
	for i := range acks.Agents {
		acks.Agents[i].Held = Held{}
	}
	if s, blockers := Next(got, now.Add(2*time.Hour), acks); s.Do != Activate {
		t.Errorf("%v, two hours later: %+v", s, blockers)
	}
}

// TestCompromised finds the roots that a backup still trusts and that were compromised since.
//
// threat: E05
func TestCompromised(t *testing.T) {
	roots := pool(t, 3)
	backup := journalOf(t, roots[0])
	backup = must(t)(Start(backup, planned("op", roots[1].Authority), t0))
	tainted := must(t)(Taint(backup, TaintRequest{Request: request("fire"), Compromised: roots[0].ID, Authority: roots[2].Authority}, t0))
	if got := backup.Compromised(tainted); !slices.Equal(got, []string{roots[0].ID}) {
		t.Errorf("while it is active still: %v", got)
	}
	if got := tainted.Compromised(tainted); got != nil {
		t.Errorf("a backup that knows: %v", got)
	}
	now, gone := t0, tainted
	for gone.Operation != nil {
		gone, now = step(t, gone, now, ready(t, gone, now)), now.Add(time.Hour)
	}
	if got := backup.Compromised(gone); !slices.Equal(got, []string{roots[0].ID}) {
		t.Errorf("once it is gone: %v", got)
	}
	if got := backup.Compromised(backup); got != nil {
		t.Errorf("nothing happened: %v", got)
	}
}
