package ca

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/ca/journal"
)

// TestKeyUse ends a key only when nobody signs with it any more, and knows what it signed last.
func TestKeyUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, until := newKeyUse(), time.Now().Add(time.Hour)
		for range 2 {
			if !u.enter() {
				t.Fatal("a key cannot be used")
			}
		}
		u.note(until.Add(-time.Minute))
		gone := u.close()
		if u.enter() {
			t.Error("a key is used after its end")
		}
		u.leave()
		if _, ended := u.ended(); ended {
			t.Error("a key is gone while somebody signs with it")
		}
		u.note(until) // by who took it before
		u.leave()
		<-gone
		if last, ended := u.ended(); !ended || !last.Equal(until) {
			t.Errorf("gone %t, last SVID until %s", ended, last)
		}
		<-u.close() // again is no harm
	})
}

// TestAccount says of intermediates what has become of their keys: those of an earlier process are no more, and what they signed last is
// taken at its worst.
func TestAccount(t *testing.T) {
	started := time.Now().UTC()
	before := started.Add(-time.Hour)
	end := started.Add(24 * time.Hour)
	var k keyUses
	k.begin("live")
	gone := k.begin("gone")
	gone.note(started.Add(time.Minute))
	gone.close()
	k.begin("busy").enter()
	k.begin("busy").close()
	all := []Minted{
		{ID: "live", NotAfter: end, Longest: time.Hour},
		{ID: "gone", NotAfter: end, Longest: time.Hour},
		{ID: "busy", NotAfter: end, Longest: time.Hour},
		{ID: "earlier", At: before, NotAfter: end, Longest: time.Hour},
		{ID: "earlier, ends soon", At: before, NotAfter: started.Add(time.Minute), Longest: time.Hour},
		{ID: "earlier, and later by this clock", At: started.Add(time.Hour), NotAfter: end, Longest: time.Hour},
		{NotAfter: end}, // as earlier versions wrote it
		{ID: "told", NotAfter: end, Destroyed: true, Leaves: started},
	}
	want := []Minted{
		all[0],
		{ID: "gone", NotAfter: end, Longest: time.Hour, Destroyed: true, Leaves: started.Add(time.Minute)},
		all[2],
		{ID: "earlier", At: before, NotAfter: end, Longest: time.Hour, Destroyed: true, Leaves: started.Add(time.Hour)},
		{ID: "earlier, ends soon", At: before, NotAfter: started.Add(time.Minute), Longest: time.Hour, Destroyed: true, Leaves: started.Add(time.Minute)},
		{ID: "earlier, and later by this clock", At: started.Add(time.Hour), NotAfter: end, Longest: time.Hour, Destroyed: true, Leaves: end},
		{NotAfter: end, Destroyed: true, Leaves: end},
		all[7],
	}
	if diff := cmp.Diff(want, k.account(all, started)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// Its clock was three hours behind when it was started, as turns out now that all that is on record.
	stored := k.account(all, started)
	for i, leaves := range map[int]time.Time{3: started.Add(4 * time.Hour), 4: started.Add(time.Minute), 5: end, 6: end} {
		want[i].Leaves = leaves
	}
	if diff := cmp.Diff(want, k.account(stored, started.Add(3*time.Hour))); diff != "" {
		t.Errorf("once the clock is right (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(want, k.account(want, started)); diff != "" {
		t.Errorf("and back (-want +got):\n%s", diff)
	}
	k.forget(want[:3])
	if len(k.earlier) != 0 {
		t.Errorf("of those that are not on record any more it remembers %v", k.earlier)
	}
}

// TestStartedBy: when a process was started, as the clock has it that was set since.
func TestStartedBy(t *testing.T) {
	noted := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	for _, tt := range []struct {
		name    string
		wall    time.Duration // that has passed by the clock on the wall
		running time.Duration // and by the other
		least   time.Duration // by how much later than noted it is
		most    time.Duration
	}{
		{"at once", 0, 0, 0, 0},
		{"together", 100 * time.Hour, 100 * time.Hour, 0, 0},
		{"a second ahead", time.Hour + time.Second, time.Hour, 0, 0},
		{"set ahead", 4 * time.Hour, time.Hour, 3 * time.Hour, 3*time.Hour + parted},
		{"slept", 10 * time.Hour, time.Hour, 9 * time.Hour, 9*time.Hour + parted}, // which nobody can tell from that
		{"set back", time.Minute, time.Hour, 0, 0},
	} {
		if by := startedBy(noted, noted.Add(tt.wall), tt.running).Sub(noted); by < tt.least || by > tt.most {
			t.Errorf("%s: %s later, want %s to %s", tt.name, by, tt.least, tt.most)
		}
	}
}

// TestClocks believes the clock while the two go together, and not for an hour after they have parted.
func TestClocks(t *testing.T) {
	base := time.Now()
	c := clocks{last: base}
	if why := c.check(base.Add(24 * time.Hour)); why != "" {
		t.Errorf("after a day: %s", why)
	}
	// A test cannot set the wall clock alone: that it was set is what is kept.
	c = clocks{last: base, apart: time.Hour, since: base}
	if why := c.check(base.Add(59 * time.Minute)); why == "" {
		t.Error("a clock that was set an hour ahead is believed")
	}
	if why := c.check(base.Add(61 * time.Minute)); why != "" {
		t.Errorf("after an hour: %s", why)
	}
}

// TestSeenOf bounds what is written down of agents, and does not write the same anew with each SVID.
func TestSeenOf(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	one := journal.Agent{Cluster: "c", NodeUID: "n", Node: "node", Connected: true, Seen: now, Until: now.Add(time.Hour), Root: "r"}
	first := seenOf([]journal.Agent{one}, nil, time.Hour)
	if len(first) != 1 || first[0].Until.Before(one.Until) {
		t.Fatalf("written: %+v", first)
	}
	one.Seen, one.Until = now.Add(time.Minute), one.Until.Add(10*time.Minute)
	if again := seenOf([]journal.Agent{one}, first, time.Hour); !sameSeen(again[0], first[0]) {
		t.Errorf("ten minutes later it is written anew: %+v", again)
	}
	one.Until = one.Until.Add(10 * time.Minute)
	if later := seenOf([]journal.Agent{one}, first, time.Hour); later[0].Until.Before(one.Until) {
		t.Errorf("what may be held longer is not written: %+v", later)
	}
	var many []journal.Agent
	for i := range MaxAgentsSeen + 10 {
		many = append(many, journal.Agent{Cluster: "c", NodeUID: fmt.Sprintf("%06d", i), Until: now.Add(time.Duration(i) * time.Second)})
	}
	if list := seenOf(many, nil, time.Hour); len(list) != MaxAgentsSeen || list[0].NodeUID != "000010" {
		t.Errorf("%d are written, the first is %s", len(list), list[0].NodeUID)
	}
}
