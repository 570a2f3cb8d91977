package ca

import (
	"context"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
)

// seer is a Rememberer that sees one cluster as a test says.
type seer struct {
	upTo time.Time
	now  bool
}

func (*seer) Pod(context.Context, PodID) (Pod, error) {
	return Pod{}, api.E(api.DirectoryUnavailable, "-")
}
func (*seer) Recall(PodID) (Pod, error)       { return Pod{}, api.E(api.DirectoryUnavailable, "-") }
func (s *seer) Seen(string) (time.Time, bool) { return s.upTo, s.now }
func (s *seer) see(at time.Time)              { s.upTo, s.now = at, true }
func (s *seer) lose()                         { s.now = false }

func newSeen(d *seer, started time.Time) *sights {
	return newSights(Config{Directory: d, Grace: 4 * time.Hour, Sealer: &Sealer{}, KeySets: map[string]KeySets{"a": nil}}, started)
}

var began = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func at(d time.Duration) time.Time { return began.Add(d) }

// What an absence is, moment by moment: between two steps the cluster is looked at as often as it is, and seen where it is seen
// in both.
func TestAbsence(t *testing.T) {
	type step struct {
		after time.Duration // the start
		sees  bool
		since time.Duration // of the absence; -1: there is none
		want  api.Reason    // of a refusal
	}
	const none = -1
	for _, tt := range []struct {
		name  string
		was   Sight // before a restart at began
		steps []step
	}{
		{"seen", Sight{}, []step{{0, true, none, ""}, {time.Hour, true, none, ""}}},
		{"a hiccup", Sight{}, []step{{time.Minute, true, none, ""}, {time.Minute + 14*time.Second, false, none, ""}, {time.Minute + 20*time.Second, true, none, ""}}},
		{"away", Sight{}, []step{
			{time.Minute, true, none, ""}, {time.Minute + 19*time.Second, false, none, ""}, {time.Minute + 20*time.Second, false, time.Minute, ""},
			{4*time.Hour + time.Minute - time.Second, false, time.Minute, ""},
			{4*time.Hour + time.Minute, false, none, api.GraceOver}, {100 * time.Hour, false, none, api.GraceOver},
		}},
		{"a return of seconds begins no new grace", Sight{}, []step{
			{time.Minute, true, none, ""}, {time.Hour, false, time.Minute, ""}, {3 * time.Hour, true, none, ""},
			{3*time.Hour + 20*time.Second, false, time.Minute, ""}, {4*time.Hour + time.Minute, false, none, api.GraceOver},
		}},
		{"returns that never last", Sight{}, []step{
			{time.Minute, true, none, ""}, {time.Hour, false, time.Minute, ""},
			{2 * time.Hour, true, none, ""}, {2*time.Hour + 4*time.Minute, true, none, ""}, {2*time.Hour + 5*time.Minute, false, time.Minute, ""},
			{2*time.Hour + 6*time.Minute, true, none, ""}, {2*time.Hour + 10*time.Minute, true, none, ""}, {2*time.Hour + 11*time.Minute, false, time.Minute, ""},
		}},
		{"a return of minutes does", Sight{}, []step{
			{time.Minute, true, none, ""}, {time.Hour, false, time.Minute, ""}, {3 * time.Hour, true, none, ""}, {3*time.Hour + 5*time.Minute, true, none, ""},
			{4 * time.Hour, false, 3*time.Hour + 5*time.Minute, ""}, {7 * time.Hour, false, 3*time.Hour + 5*time.Minute, ""},
		}},
		{"a slow start", Sight{Seen: at(-time.Minute)}, []step{{59 * time.Second, false, none, ""}, {time.Minute, true, none, ""}, {2 * time.Minute, false, time.Minute, ""}}},
		{"never seen", Sight{}, []step{{59 * time.Second, false, none, ""}, {time.Minute, false, none, api.DirectoryUnavailable}, {time.Hour, false, none, api.DirectoryUnavailable}}},
		{"restarted while it is away", Sight{Seen: at(-time.Hour), Since: at(-time.Hour)}, []step{
			{0, false, none, ""}, {59 * time.Second, false, none, ""}, {time.Minute, false, -time.Hour, ""}, {3*time.Hour - time.Second, false, -time.Hour, ""}, {3 * time.Hour, false, none, api.GraceOver},
		}},
		{"restarted, and away since", Sight{Seen: at(-time.Minute)}, []step{{time.Second, false, none, ""}, {time.Minute, false, -time.Minute, ""}, {4 * time.Hour, false, none, api.GraceOver}}},
		{"restarted after a day", Sight{Seen: at(-24 * time.Hour)}, []step{{time.Second, false, none, ""}, {time.Minute, false, none, api.GraceOver}, {2 * time.Minute, true, none, ""}}},
		{"restarted after a return of seconds", Sight{Seen: at(-time.Second), Since: at(-3 * time.Hour)}, []step{
			{time.Second, true, none, ""}, {time.Minute, false, -3 * time.Hour, ""}, {time.Hour, false, none, api.GraceOver},
		}},
		{"written down in the future", Sight{Seen: at(2 * time.Hour), Since: at(2 * time.Hour)}, []step{{time.Minute, false, none, api.GraceOver}, {119 * time.Minute, false, 2 * time.Hour, ""}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := &seer{}
			s := newSeen(d, began)
			s.restore(Replica{Clusters: map[string]Sight{"a": tt.was, "of nobody": {Seen: began}}})
			last, sees := time.Duration(0), false
			for _, st := range tt.steps {
				for ; last < st.after; last += lookEvery {
					if d.lose(); sees && st.sees {
						d.see(at(last))
					}
					s.look("a", at(last))
				}
				now := at(st.after)
				s.hear(nil, "", now) // it is alone
				last, sees = st.after+lookEvery, st.sees
				if d.lose(); st.sees {
					d.see(now)
				}
				since, err := s.absence("a", now)
				switch {
				case st.want != "":
					if err == nil || api.ReasonOf(err) != st.want {
						t.Fatalf("after %s: since %s (%v), want %s", st.after, since, err, st.want)
					}
				case err != nil:
					t.Fatalf("after %s: %v", st.after, err)
				case st.since == none && !since.IsZero(), st.since != none && !since.Equal(at(st.since)):
					t.Fatalf("after %s: away since %s, want %s", st.after, since.Sub(began), st.since)
				}
			}
		})
	}
}

// A clock that is set and a machine that slept make what was seen old at once. That is no absence before there was the time to
// see it again.
func TestAbsenceJump(t *testing.T) {
	for _, jump := range []time.Duration{time.Hour, 30 * 24 * time.Hour} {
		d := &seer{}
		s := newSeen(d, began)
		d.see(at(time.Minute))
		s.look("a", at(time.Minute))
		d.lose() // all is older than what may be
		after := time.Minute + jump
		for ; after < time.Minute+jump+awayAfter; after += time.Second {
			if since, err := s.absence("a", at(after)); err != nil || !since.IsZero() {
				t.Fatalf("away since %s (%v), at %s", since, err, after)
			}
		}
		d.see(at(after))
		if seen, away := s.look("a", at(after)); away || !seen.Since.IsZero() {
			t.Errorf("seen again: %+v, away %t", seen, away)
		}
		d.lose()
		s.look("a", at(after))
		if seen, away := s.look("a", at(after+awayAfter)); !away || !seen.Since.Equal(at(after)) {
			t.Errorf("not seen any more: %+v, away %t", seen, away)
		}
	}
}

// Hiccups of a watch use up no grace, however often they come, and neither begin an absence nor prolong one.
func TestAbsenceHiccups(t *testing.T) {
	d := &seer{}
	s := newSeen(d, began)
	look := func(from, to time.Duration) (last Sight) {
		t.Helper()
		for after := from; after <= to; after += lookEvery {
			if after%(4*time.Minute) < 10*time.Second { // two looks of three minutes and fifty seconds find nothing
				d.lose()
			} else {
				d.see(at(after))
			}
			var away bool
			if last, away = s.look("a", at(after)); away {
				t.Fatalf("after %s it is away: %+v", after, last)
			}
		}
		return last
	}
	if last := look(time.Minute, 5*time.Hour); !last.Since.IsZero() {
		t.Errorf("not seen since %s, after hiccups", last.Since.Sub(began))
	}
	d.lose()
	for after := 5 * time.Hour; after <= 6*time.Hour; after += lookEvery {
		s.look("a", at(after))
	}
	s.hear(nil, "", at(6*time.Hour))
	if since, err := s.absence("a", at(6*time.Hour)); err != nil || !since.Equal(at(5*time.Hour-lookEvery)) {
		t.Fatalf("away since %s (%v)", since.Sub(began), err)
	}
	if last := look(6*time.Hour+time.Minute, 6*time.Hour+7*time.Minute); !last.Since.IsZero() {
		t.Errorf("still away since %s, after a return with a hiccup", last.Since.Sub(began))
	}
}

// The grace counts from what is older: the replica's record, or the memory that answers for the cluster. A memory that is a
// little older than the record is as good.
//
// threat: G04
func TestAbsenceMemory(t *testing.T) {
	for _, tt := range []struct {
		name string
		file time.Duration // up to when the memory was complete, after the start
		was  Sight
		want time.Duration // from when the grace counts
		lost time.Duration // by when tokens count
	}{
		{"as old", -time.Minute, Sight{Seen: at(-time.Minute)}, -time.Minute, -time.Minute},
		{"a little older", -9 * time.Minute, Sight{Seen: at(-time.Minute)}, -time.Minute, -time.Minute},
		{"much older", -50 * time.Minute, Sight{Seen: at(-30 * time.Second)}, -50 * time.Minute, -30 * time.Second},
		{"much older, of an absence", -3 * time.Hour, Sight{Seen: at(-time.Hour), Since: at(-2 * time.Hour)}, -3 * time.Hour, -2 * time.Hour},
		{"newer than an absence", -time.Minute, Sight{Seen: at(-time.Minute), Since: at(-2 * time.Hour)}, -2 * time.Hour, -2 * time.Hour},
		{"without a record", -time.Hour, Sight{}, -time.Hour, -time.Hour},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSeen(&seer{upTo: at(tt.file)}, began)
			s.restore(Replica{Clusters: map[string]Sight{"a": tt.was}})
			var since time.Time
			for after := time.Duration(0); after <= 2*time.Minute; after += lookEvery {
				var err error
				s.hear(nil, "", at(after))
				if since, err = s.absence("a", at(after)); err != nil {
					t.Fatal(err)
				}
			}
			if !since.Equal(at(tt.lost)) {
				t.Errorf("away since %s, want %s", since.Sub(began), tt.lost)
			}
			for after, want := range map[time.Duration]api.Reason{tt.want + 4*time.Hour - time.Second: "", tt.want + 4*time.Hour: api.GraceOver} {
				s.hear(nil, "", at(after))
				if _, err := s.absence("a", at(after)); want == "" && err != nil || want != "" && (err == nil || api.ReasonOf(err) != want) {
					t.Errorf("after %s: %v, want %q", after, err, want)
				}
			}
		})
	}
}

// A replica that is cut off renews nothing while another one sees the cluster, whatever their clocks say, nor before it knows;
// and it sends no agents to one that is cut off as well.
//
// threat: K04
func TestAbsenceElsewhere(t *testing.T) {
	const lost, end = 2 * time.Minute, 6 * time.Minute
	seen := func(after time.Duration) Sight { return Sight{Seen: at(after)} }
	tillLost := func(after time.Duration) Sight { return seen(min(after, lost)) }
	for _, tt := range []struct {
		name   string
		issuer string                          // that it tells of
		says   func(after time.Duration) Sight // what is written down at that time
		deaf   bool                            // from the loss on the store cannot be read
		sends  bool                            // agents are sent away
		renews time.Duration                   // after which time of the loss renewals begin at the latest; 0: never
	}{
		{"sees it", "a", seen, false, true, 0},
		{"sees it, two hours ahead", "a", func(a time.Duration) Sight { return seen(a + 2*time.Hour) }, false, true, 0},
		{"sees it, two hours behind", "a", func(a time.Duration) Sight { return seen(a - 2*time.Hour) }, false, true, 0},
		{"sees it again, after a loss", "a", func(a time.Duration) Sight { return Sight{Seen: at(a), Since: at(-time.Hour)} }, false, true, 0},
		{"is cut off as well", "a", func(a time.Duration) Sight {
			if a < lost+25*time.Second {
				return tillLost(a)
			}
			return Sight{Seen: at(lost), Since: at(lost)}
		}, false, false, 45 * time.Second},
		{"is cut off as well, and not for the first time", "a", func(a time.Duration) Sight { return Sight{Seen: at(min(a, lost)), Since: at(-time.Hour)} }, false, false, time.Minute},
		{"ends at the same time", "a", tillLost, false, false, time.Minute},
		{"ended long before", "a", func(time.Duration) Sight { return seen(-time.Minute) }, false, false, 20 * time.Second},
		{"sees another cluster", "b", seen, false, false, 20 * time.Second},
		{"sees it, but cannot be heard", "a", seen, true, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := &seer{}
			s := newSeen(d, began)
			sent, renewed := false, time.Duration(0)
			for after := time.Duration(0); after < end; after += lookEvery {
				if d.lose(); after < lost {
					d.see(at(after))
				}
				if after%beatAmong == 0 && (!tt.deaf || after < lost) {
					s.hear([]Replica{{Name: "own", Clusters: map[string]Sight{"a": seen(after)}}, {Name: "other", Clusters: map[string]Sight{tt.issuer: tt.says(after)}}}, "own", at(after))
				}
				since, err := s.absence("a", at(after))
				elsewhere, _ := s.seenElsewhere("a", at(after))
				switch {
				case err != nil && api.ReasonOf(err) != api.DirectoryUnavailable:
					t.Fatal(err)
				case err == nil && !since.IsZero() && renewed == 0:
					renewed = after - lost
				}
				sent = sent || err != nil && elsewhere
				if elsewhere && err == nil && !since.IsZero() {
					t.Errorf("%s after the loss it renews, and sends agents away", after-lost)
				}
			}
			if sent != tt.sends || (renewed == 0) != (tt.renews == 0) || renewed > tt.renews {
				t.Errorf("agents were sent away: %t; renewals began %s after the loss", sent, renewed)
			}
		})
	}
}

// A replica that is alone goes by its store, too: while that cannot be read another one may have come.
func TestAbsenceDeaf(t *testing.T) {
	d := &seer{}
	s := newSeen(d, began)
	d.see(began) // the moment of the start is not before it
	s.hear(nil, "own", at(time.Second))
	s.look("a", at(time.Second))
	d.lose()
	s.look("a", at(2*time.Second))
	if since, err := s.absence("a", at(time.Minute)); err != nil || since.IsZero() {
		t.Errorf("away since %s (%v)", since, err)
	}
	if _, err := s.absence("a", at(5*time.Minute)); err == nil || api.ReasonOf(err) != api.DirectoryUnavailable {
		t.Errorf("long after the store was read: %v", err)
	}
}

// Without a grace, tickets or a directory that remembers the rule is off, and a cluster that nobody configured is never away.
func TestSightsOff(t *testing.T) {
	d := &seer{}
	for name, cfg := range map[string]Config{
		"no grace":     {Directory: d, Sealer: &Sealer{}},
		"no tickets":   {Directory: d, Grace: time.Hour},
		"no memory":    {Directory: struct{ Directory }{d}, Sealer: &Sealer{}, Grace: time.Hour},
		"no directory": {Sealer: &Sealer{}, Grace: time.Hour},
	} {
		s := newSights(cfg, began)
		if since, err := s.absence("a", at(time.Hour)); s != nil || !since.IsZero() || err != nil {
			t.Errorf("%s: %v, since %s (%v)", name, s, since, err)
		}
	}
	if since, err := newSeen(d, began).absence("b", at(time.Hour)); !since.IsZero() || err != nil {
		t.Errorf("an unknown cluster is away since %s (%v)", since, err)
	}
}

// Time that a machine slept counts, and so does time by which its clock was set back.
func TestElapsed(t *testing.T) {
	now := time.Now()
	for _, tt := range []struct {
		name string
		then time.Time
		want time.Duration
	}{
		{"both clocks", now.Add(-time.Hour), time.Hour},
		{"from a file", now.Round(0).Add(-time.Hour), time.Hour},
		{"the future", now.Add(time.Minute), -time.Minute},
	} {
		if got := elapsed(now, tt.then); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}
