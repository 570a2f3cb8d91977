package ca

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// wait takes a place in the line of who, and fails where there is none.
func (g *gate) wait(t *testing.T, who string, due time.Time) *waiter {
	t.Helper()
	w, err := g.line(t.Context(), who, due)
	if err != nil || w == nil {
		t.Fatalf("%s has a turn %t, error %v; want a place", who, w == nil && err == nil, err)
	}
	return w
}

// busy takes all turns of a gate.
func busy(t *testing.T, g *gate) *gate {
	t.Helper()
	for range g.concurrent {
		if w, err := g.line(t.Context(), "busy", time.Time{}); w != nil || err != nil {
			t.Fatal("a turn that is free is not given")
		}
	}
	return g
}

// isDecided is for tests in which nobody else does anything with the gate.
func (w *waiter) isDecided() bool {
	if !w.turn && w.after == 0 {
		return false
	}
	<-w.decided
	return true
}

// TestUrgencyOf takes an agent at its word, and one that says nothing as one in between.
func TestUrgencyOf(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	for _, tt := range []struct {
		name  string
		holds *timestamppb.Timestamp
		due   time.Duration
		want  urgency
	}{
		{"nothing said", nil, unsaidPatience, holdsUnsaid},
		{"no time at all", &timestamppb.Timestamp{Nanos: -1}, unsaidPatience, holdsUnsaid},
		{"nothing", &timestamppb.Timestamp{}, api.FirstPatience, holdsNothing},
		{"expired", timestamppb.New(now.Add(-time.Second)), api.FirstPatience, holdsNothing},
		{"a moment", timestamppb.New(now.Add(time.Second)), time.Second, holdsMinute},
		{"a minute", timestamppb.New(now.Add(time.Minute)), time.Minute, holdsLonger},
		{"a year", timestamppb.New(now.Add(8760 * time.Hour)), 8760 * time.Hour, holdsLonger},
	} {
		due, u := urgencyOf(&apiv1.IssueItem{HoldsUntil: tt.holds}, now)
		if due.Sub(now) != tt.due || u != tt.want {
			t.Errorf("%s: due in %v as %s, want %v as %s", tt.name, due.Sub(now), u, tt.due, tt.want)
		}
	}
}

// TestUrgentFirst serves who is due first first: always within a line, and at every second turn among all.
func TestUrgentFirst(t *testing.T) {
	now := time.Now()
	g := busy(t, newGate(1, 100))
	name := map[*waiter]string{}
	for i, minutes := range []int{50, 10, 30} {
		name[g.wait(t, "a", now.Add(time.Duration(minutes)*time.Minute))] = fmt.Sprint("a", i)
	}
	for i, minutes := range []int{40, 5, 5} {
		name[g.wait(t, "b", now.Add(time.Duration(minutes)*time.Minute))] = fmt.Sprint("b", i)
	}
	name[g.wait(t, "c", now.Add(time.Minute))] = "c0"
	var order []string
	for range len(name) {
		g.leave()
		for w, s := range name {
			if w.isDecided() {
				order = append(order, s)
				delete(name, w)
			}
		}
	}
	// By urgency c0, then by the round a, by urgency b, by the round b, and so on.
	if got, want := fmt.Sprint(order), fmt.Sprint([]string{"c0", "a1", "b1", "b2", "a2", "a0", "b0"}); got != want {
		t.Errorf("turns went to %s, want %s", got, want)
	}
	g.leave()
	g.empty(t, 1)
}

// TestGateRandom does everything that can be done with a gate in any order, and keeps books of its own: nobody is lost, nobody
// has two answers, a line is served by urgency, and has a turn within twice as many as there are lines.
//
// threat: J08, J19
func TestGateRandom(t *testing.T) {
	const names, turns, places = 10, 3, 40
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		g, now := busy(t, newGate(turns, places)), time.Now()
		held := turns
		waiting := map[string][]*waiter{}
		since := map[string]int{} // turns that others had while a line waited
		total := func() (n int) {
			for _, l := range waiting {
				n += len(l)
			}
			return n
		}
		// settled takes out who was decided since the last look.
		settled := func() (granted, sent []*waiter, of string) {
			for who, l := range waiting {
				var still []*waiter
				for _, w := range l {
					switch {
					case !w.isDecided():
						still = append(still, w)
					case w.turn:
						granted, of = append(granted, w), who
					default:
						sent = append(sent, w)
					}
				}
				if waiting[who] = still; len(still) == 0 {
					delete(waiting, who)
					delete(since, who)
				}
			}
			return granted, sent, of
		}
		for step := range 4000 {
			who := fmt.Sprint("n", min(r.IntN(names), r.IntN(names)))
			switch op := r.IntN(10); {
			case op < 5:
				due := now.Add(time.Duration(r.IntN(3600)) * time.Second)
				full := total() == places
				w, err := g.line(t.Context(), who, due)
				switch {
				case w == nil && err == nil:
					held++
				case w != nil:
					waiting[who] = append(waiting[who], w)
				case !full || api.ReasonOf(err) != api.Overloaded || api.AsError(err).RetryAfter < time.Second:
					t.Fatalf("seed %d, step %d: sent away with %d waiting: %v", seed, step, total(), err)
				}
				granted, sent, _ := settled()
				if len(granted) != 0 || len(sent) > 1 || len(sent) == 1 && (!full || w == nil || sent[0].after < time.Second) {
					t.Fatalf("seed %d, step %d: %d turns were given and %d sent away for a newcomer", seed, step, len(granted), len(sent))
				}
			case op < 6 && len(waiting[who]) > 0:
				i := r.IntN(len(waiting[who]))
				if !g.withdraw(who, waiting[who][i]) || g.withdraw(who, waiting[who][i]) {
					t.Fatalf("seed %d, step %d: who waits cannot give up once", seed, step)
				}
				if waiting[who] = append(waiting[who][:i:i], waiting[who][i+1:]...); len(waiting[who]) == 0 {
					delete(waiting, who)
					delete(since, who)
				}
			case held > 0:
				before := total()
				held--
				g.leave()
				granted, sent, of := settled()
				if len(granted) != min(1, before) || len(sent) != 0 {
					t.Fatalf("seed %d, step %d: %d of %d had the turn, %d were sent away", seed, step, len(granted), before, len(sent))
				}
				for _, w := range granted {
					held++
					for _, x := range waiting[of] {
						if x.before(w) {
							t.Fatalf("seed %d, step %d: somebody more urgent waits in the same line", seed, step)
						}
					}
					for other := range waiting {
						if since[other]++; other == of {
							since[other] = 0
						}
						if since[other] > 2*names {
							t.Fatalf("seed %d, step %d: %s waits since %d turns", seed, step, other, since[other])
						}
					}
				}
			}
			if g.lines.waiting != total() || g.free+held != turns || g.free > 0 && total() > 0 || total() > places {
				t.Fatalf("seed %d, step %d: %d wait and %d are said to, %d turns are free, %d are held", seed, step, total(), g.lines.waiting, g.free, held)
			}
		}
		for held > 0 {
			held--
			g.leave()
			granted, _, _ := settled()
			held += len(granted)
		}
		g.empty(t, turns)
	}
}

// TestGateLiar lets one of ten nodes claim that all of its requests are the most urgent there are. It gains as many turns as
// urgency may give anybody, and no more.
//
// threat: J08
func TestGateLiar(t *testing.T) {
	const names, all = 10, 20000
	began := time.Now()
	g := busy(t, newGate(1, 10000))
	come := func(who int) *waiter {
		due := time.Now().Add(30 * time.Minute)
		if who == 0 {
			due = time.Now()
		}
		return g.wait(t, fmt.Sprint("n", who), due)
	}
	var waiting [names][]*waiter
	for who := range names {
		for range 20 {
			waiting[who] = append(waiting[who], come(who))
		}
	}
	var had [names]int
	for range all {
		g.leave()
		for who := range names {
			for i, w := range waiting[who] {
				if w.isDecided() {
					had[who]++
					waiting[who][i] = come(who)
				}
			}
		}
	}
	gain := urgentTurns * (1 + time.Since(began).Seconds()/urgentTime.Seconds())
	if most := float64(all/names+1) + gain; float64(had[0]) > most {
		t.Errorf("the liar had %d of %d turns, want %.0f at most: %v", had[0], all, most, had)
	}
	for who, n := range had {
		if least := float64(all-1)/names - gain - 1; float64(n) < least {
			t.Errorf("node %d had %d turns, want %.0f at least", who, n, least)
		}
	}
	if had[0] < had[1]-int(gain) {
		t.Errorf("urgency costs turns: %v", had)
	}
}

// TestCreditComesBack gives urgency as many turns as it may have, again after a minute, and forgets who does not need it.
func TestCreditComesBack(t *testing.T) {
	s, now := newLines(), time.Now()
	next := func(at time.Time) bool {
		s.add("a", &waiter{due: now}, at)
		w := s.nextUrgent(at)
		if w == nil {
			s.next(at)
		}
		return w != nil
	}
	for i := range 2 * urgentTurns {
		if got := next(now); got != (i < urgentTurns) {
			t.Fatalf("turn %d by urgency: %t", i, got)
		}
	}
	if next(now.Add(urgentTime / urgentTurns / 2)) {
		t.Error("a turn comes back too early")
	}
	half := now.Add(urgentTime / 2)
	for i := range urgentTurns {
		if got := next(half); got != (i < urgentTurns/2) {
			t.Fatalf("half a minute later, turn %d by urgency: %t", i, got)
		}
	}
	if next(now); len(s.credits) != 1 { // a clock that was set back takes nothing and gives nothing
		t.Errorf("%d credits", len(s.credits))
	}
	s.sweep(now.Add(urgentTime))
	if len(s.credits) != 1 {
		t.Error("a credit that was used up is forgotten")
	}
	s.sweep(now.Add(3 * urgentTime))
	if len(s.credits) != 0 {
		t.Error("a credit that is whole again is remembered")
	}
}

// TestGateRoom sends away the least urgent of who has most places, and the newcomer where that is himself.
func TestGateRoom(t *testing.T) {
	now := time.Now()
	in := func(minutes int) time.Time { return now.Add(time.Duration(minutes) * time.Minute) }
	for _, tt := range []struct {
		name    string
		waiting map[string][]int // minutes until they are due, by line
		who     string
		minutes int
		sent    string // "new", or line and minutes
	}{
		{"a crowd makes room", map[string][]int{"a": {10, 30, 20}}, "b", 60, "a30"},
		{"its own least urgent", map[string][]int{"a": {10, 30, 20}}, "a", 15, "a30"},
		{"itself", map[string][]int{"a": {10, 30, 20}}, "a", 31, "new"},
		{"who is as urgent came first", map[string][]int{"a": {10, 30, 20}}, "a", 30, "new"},
		{"of two crowds the one that can wait", map[string][]int{"a": {10, 20}, "b": {10, 30}}, "c", 60, "b30"},
		{"lines that would change their lengths alone, less urgent", map[string][]int{"a": {10, 20}, "b": {5}}, "b", 40, "new"},
		{"and more urgent", map[string][]int{"a": {10, 20}, "b": {5}}, "b", 15, "a20"},
		{"lines as long as each other", map[string][]int{"a": {10}, "b": {50}}, "b", 5, "b50"},
		{"a shorter line of somebody less urgent is left alone", map[string][]int{"a": {10, 11}, "b": {50}}, "a", 12, "new"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := 0
			for _, l := range tt.waiting {
				n += len(l)
			}
			g := busy(t, newGate(1, n))
			all := map[*waiter]string{}
			for who, l := range tt.waiting {
				for _, m := range l {
					all[g.wait(t, who, in(m))] = fmt.Sprint(who, m)
				}
			}
			w, err := g.line(t.Context(), tt.who, in(tt.minutes))
			sent := ""
			if w == nil {
				sent = "new"
				if e := api.AsError(err); e.Reason != api.Overloaded || e.RetryAfter < time.Second {
					t.Errorf("sent away with %v", err)
				}
			}
			for x, s := range all {
				if x.isDecided() {
					sent += s
					if x.turn || x.after < time.Second {
						t.Errorf("who made room has a turn %t, may come back after %v", x.turn, x.after)
					}
				}
			}
			if sent != tt.sent {
				t.Errorf("sent away: %s, want %s", sent, tt.sent)
			}
		})
	}
}

// TestPace measures how fast turns are given, and has those who are sent away come back as fast as that.
func TestPace(t *testing.T) {
	now := time.Now()
	far := now.Add(24 * time.Hour)
	measured := func(rate int) *pace {
		p := &pace{}
		p.begin(now)
		for i := range rate {
			p.note(now.Add(time.Duration(i+1) * time.Second / time.Duration(rate)))
		}
		return p
	}
	at := now.Add(time.Second)
	if p := measured(100); p.now(at, 4) < 95 || p.now(at, 4) > 105 {
		t.Errorf("100 turns in a second are %v a second", p.now(at, 4))
	}
	if p := measured(1000); p.now(at.Add(4*time.Second), 60) > 20 {
		t.Errorf("after four seconds without a turn, with 60 in work, there are %v a second", p.now(at.Add(4*time.Second), 60))
	}
	if p := new(pace); p.now(now, 4) != 0 {
		t.Error("a pace that was not measured is known")
	}
	for _, tt := range []struct {
		name        string
		rate        int // 0: unknown
		before      int // who was sent away before
		due         time.Time
		least, most time.Duration
	}{
		{"unknown", 0, 4096, far, time.Second, 2 * time.Second},
		{"the first", 1000, 0, far, time.Second, 2 * time.Second},
		{"a long queue", 100, 1000, far, 9 * time.Second, 14 * time.Second},
		{"a very long queue", 10, 1000, far, maxReturn, 39 * time.Second},
		{"a long queue for who cannot wait", 100, 1000, at.Add(8 * time.Second), 2 * time.Second, 3 * time.Second},
		{"who is late", 100, 1000, now, time.Second, 2 * time.Second},
		{"no time said", 100, 1000, time.Time{}, 9 * time.Second, 14 * time.Second},
	} {
		for range 20 {
			p := new(pace)
			if tt.rate > 0 {
				p = measured(tt.rate)
			}
			for range tt.before {
				p.after(at, 1, far)
			}
			if got := p.after(at, 1, tt.due); got < tt.least || got > tt.most {
				t.Errorf("%s: comes back after %v, want %v to %v", tt.name, got, tt.least, tt.most)
				break
			}
		}
	}
}

// TestGateSendsAwayEarly has no more wait than can be served in time, and nobody whose own time is over before his turn.
func TestGateSendsAwayEarly(t *testing.T) {
	with := func(rate float64) *gate { // one waits already, and the clock of the measure stands still
		g := busy(t, newPacedGate(2, 4096))
		g.wait(t, "first", time.Now().Add(time.Hour))
		g.pace.rate, g.pace.since = rate, time.Now().Add(time.Hour)
		return g
	}
	far := time.Now().Add(time.Hour)
	g := with(100) // 500 in five seconds
	n := 1
	for ; n < 4096; n++ {
		if w, _ := g.line(t.Context(), "a", far); w == nil {
			break
		}
	}
	if n != 500 {
		t.Errorf("%d may wait where 100 a second are served", n)
	}
	if n := with(0.1).places(time.Now()); n != 2 {
		t.Errorf("%d may wait where hardly anybody is served, want as many as work at once", n)
	}
	if w, err := g.line(t.Context(), "b", far); w == nil {
		t.Errorf("a crowd keeps another from waiting: %v", err)
	}
	if n := with(0).places(time.Now()); n != 4096 {
		t.Errorf("%d may wait where it is not known how fast they are served", n)
	}

	g = with(100)
	for i := range 200 {
		g.wait(t, fmt.Sprint("n", i), far)
	}
	late, cancel := context.WithDeadline(t.Context(), time.Now())
	defer cancel()
	if w, err := g.line(late, "late", far); w != nil || api.ReasonOf(err) != api.Overloaded {
		t.Errorf("who has no time left waits: %v", err)
	}
	early, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	if w, err := g.line(early, "early", far); w == nil {
		t.Errorf("who has an hour does not wait: %v", err)
	}
}
