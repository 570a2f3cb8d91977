package ca

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// atPace lets the gate know of a pace, as if it had been measured. While nobody has a turn or begins to wait it does not change.
func (g *gate) atPace(rate float64) {
	g.pace.rate, g.pace.measured, g.pace.since = rate, time.Now().Add(time.Hour), time.Now().Add(time.Hour)
}

// within is a context that ends then.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// TestPaceAfterStall takes the first turn after a stall for no measure, and forgets what is old where a queue begins anew.
func TestPaceAfterStall(t *testing.T) {
	now := time.Now()
	at := func(s float64) time.Time { return now.Add(time.Duration(s * float64(time.Second))) }
	p := new(pace)
	p.begin(now)
	p.note(at(5))
	if p.rate != 0 {
		t.Errorf("after one stall %v turns a second are measured", p.rate)
	}
	for i := range 100 {
		p.note(at(5 + float64(i+1)/100))
	}
	if p.rate < 95 || p.rate > 105 {
		t.Errorf("100 turns in the second after a stall are %v a second", p.rate)
	}
	p.note(at(11))
	p.note(at(16))
	if p.rate < 0.19 || p.rate > 0.21 {
		t.Errorf("one turn in five seconds, again and again, is %v a second", p.rate)
	}
	p.after(at(16), 1, time.Time{})
	p.begin(at(16 + 9))
	if p.rate == 0 || p.promised.IsZero() {
		t.Error("a measure of nine seconds ago is forgotten")
	}
	p.begin(at(16 + 11))
	if wait := p.after(at(16+11), 1, time.Time{}); p.now(at(16+11), 1) != 0 || wait > 2*leastReturn {
		t.Errorf("eleven seconds later it says %v a second and has one come back after %v", p.now(at(16+11), 1), wait)
	}
}

// TestGateShortQueue sends nobody away before whom no more wait than are in work, however slow it seems.
func TestGateShortQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const concurrent = 8
		g := busy(t, newPacedGate(concurrent, 4096))
		g.atPace(0.01)
		for i := range concurrent {
			if w, err := g.line(within(t, 2*time.Second), fmt.Sprint(i), time.Time{}); w == nil {
				t.Fatalf("%d wait and %d are in work: %v", i, concurrent, err)
			}
		}
		if w, _ := g.line(within(t, 2*time.Second), "one more", time.Time{}); w != nil {
			t.Error("who will not have his turn in time waits")
		}
	})
}

// TestGateRecovers has work stall once, and come in bursts for which there is time ever after: nobody is sent away.
//
// threat: J08
func TestGateRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const concurrent = 8
		g := newPacedGate(concurrent, 4096)
		burst := func(takes time.Duration) {
			for i := range 10 * concurrent {
				if _, err := g.line(within(t, 2*time.Second), fmt.Sprint(i), time.Now().Add(time.Hour)); err != nil {
					t.Fatalf("request %d of a burst, at %v a second: %v", i, g.pace.rate, err)
				}
			}
			time.Sleep(takes)
			for range 10 * concurrent {
				g.leave()
			}
			g.empty(t, concurrent)
		}
		burst(5 * time.Second)
		for range 40 {
			burst(100 * time.Millisecond)
			time.Sleep(time.Second)
		}
	})
}

// TestGateMostUrgentWaits takes whoever comes in time by urgency, though by the round he would not.
//
// threat: J08
func TestGateMostUrgentWaits(t *testing.T) {
	for _, tt := range []struct {
		name   string
		before int // more urgent ones of other nodes
		own    int // of his own
		spent  float64
		due    bool
		waits  bool
	}{
		{"the most urgent", 0, 0, 0, true, true},
		{"one of some", 50, 20, 0, true, true},
		{"one of many", 120, 40, 0, true, false},
		{"one of more than are looked at", 130, 0, 0, true, false},
		{"the last of a node that is out of such turns", 0, 0, 1, true, false},
		{"one of more than his node has such turns", 0, 61, 0, true, false},
		{"who does not say", 0, 0, 0, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const pace, left = 100, 3 * time.Second
				now := time.Now()
				g := busy(t, newPacedGate(2, 4096))
				g.atPace(pace)
				for i := range tt.before {
					g.wait(t, fmt.Sprint("urgent", i), now.Add(left/2))
				}
				for range tt.own {
					g.wait(t, "late", now.Add(left/2))
				}
				for i := g.lines.waiting; i < 480; i++ {
					g.wait(t, fmt.Sprint("n", i), now.Add(time.Hour))
				}
				g.lines.credits["late"] = credit{turns: tt.spent, at: now}
				due := time.Time{}
				if tt.due {
					due = now.Add(left)
				}
				w, err := g.line(within(t, left), "late", due)
				if (w != nil) != tt.waits {
					t.Fatalf("waits: %t (%v), want %t", w != nil, err, tt.waits)
				}
				if w == nil {
					return
				}
				for n := 0; !w.isDecided(); n++ {
					if n == 3*pace {
						t.Fatalf("%d turns later he still waits", n)
					}
					g.leave()
				}
				if !w.turn {
					t.Error("he was sent away")
				}
			})
		})
	}
}

// TestGateRefusedCrowd has one node refused as often as it likes: it waits for as long as anybody may have to, and nobody else does.
//
// threat: J08
func TestGateRefusedCrowd(t *testing.T) {
	for _, rate := range []float64{6.4, 100, 3000} {
		t.Run(fmt.Sprint(rate), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := busy(t, newPacedGate(2, 8))
				g.atPace(rate)
				for range 8 {
					g.wait(t, "stolen", time.Now())
				}
				var told time.Duration
				for range 90_000 {
					told = g.after("stolen", time.Time{}, time.Now())
				}
				// A minute of what it has in a minute, which is a hundredth of all.
				if most := time.Until(g.pace.promised); most > urgentTime/100+time.Second/6 {
					t.Errorf("it has everybody wait for %v", most)
				}
				if told < maxReturn {
					t.Errorf("it may come back after %v", told)
				}
				if honest := g.after("honest", time.Time{}, time.Now()); honest > 2*leastReturn {
					t.Errorf("another node waits for %v", honest)
				}
				g.atPace(rate)
				for range 100 { // and for an hour
					time.Sleep(36 * time.Second)
					for range 64 * 47 {
						g.after("stolen", time.Time{}, time.Now())
					}
				}
				if honest := g.after("honest", time.Time{}, time.Now()); honest > 2*leastReturn {
					t.Errorf("an hour later another node waits for %v", honest)
				}
			})
		})
	}
}

// TestGateRefusedNodes remembers no more of those who are sent away than it must, and has them come back all the same.
func TestGateRefusedNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := busy(t, newPacedGate(2, 8))
		g.atPace(100)
		for i := range maxCredits + 1000 {
			if wait := g.after(fmt.Sprint(i), time.Time{}, time.Now()); wait < leastReturn || wait > 2*maxReturn {
				t.Fatalf("node %d may come back after %v", i, wait)
			}
		}
		if n := len(g.lines.credits); n != maxCredits {
			t.Errorf("%d nodes are remembered, want %d", n, maxCredits)
		}
		g.lines.sweep(time.Now().Add(2 * urgentTime))
		if n := len(g.lines.credits); n != 0 {
			t.Errorf("%d are remembered two minutes later", n)
		}
	})
}

// TestGateLiarAtSlowPace gives one of fifty nodes that claims to be the most urgent always a hundredth of all turns more, where
// few turns are given as well.
//
// threat: J08
func TestGateLiarAtSlowPace(t *testing.T) {
	for _, tt := range []struct {
		pace time.Duration // of one turn
		most int           // of a minute's turns
	}{
		{time.Second, 2 + 3},
		{time.Second * 10 / 64, 8 + 12},
		{time.Second / 100, 120 + 122},
	} {
		t.Run(tt.pace.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const nodes = 50
				g := busy(t, newGate(1, 4096))
				g.atPace(float64(time.Second) / float64(tt.pace))
				come := func(who int) *waiter {
					due := time.Now().Add(time.Hour)
					if who == 0 {
						due = time.Now()
					}
					return g.wait(t, fmt.Sprint("n", who), due)
				}
				var waiting [nodes]*waiter
				for who := range nodes {
					g.lines.credits[fmt.Sprint("n", who)] = credit{turns: 1, at: time.Now()}
					if who == 0 {
						delete(g.lines.credits, "n0")
					}
					waiting[who] = come(who)
				}
				liar := 0
				for range int(time.Minute / tt.pace) {
					time.Sleep(tt.pace)
					g.leave()
					for who, w := range waiting {
						if w.isDecided() {
							waiting[who] = come(who)
							if who == 0 {
								liar++
							}
						}
					}
				}
				if liar > tt.most {
					t.Errorf("the liar had %d of %d turns, want %d at most", liar, int(time.Minute/tt.pace), tt.most)
				}
			})
		})
	}
}

// TestCreditFollowsPace gives a turn by urgency to a line that waits since before it could have one, and none to one that
// cannot have it any more.
func TestCreditFollowsPace(t *testing.T) {
	now := time.Now()
	s := newLines()
	s.credits["a"] = credit{turns: 1, at: now}
	s.add("a", &waiter{due: now}, now)
	if w := s.nextUrgent(now); w != nil {
		t.Error("a line out of such turns has one")
	}
	if w := s.nextUrgent(now.Add(time.Second)); w == nil {
		t.Error("it does not have the turn that came back while it waited")
	}
	s.credits["b"] = credit{turns: 0.5, at: now}
	s.add("b", &waiter{due: now}, now)
	s.grant(1)
	if w := s.nextUrgent(now); w != nil {
		t.Error("half a turn is given")
	}
	if w := s.nextUrgent(now.Add(urgentTime)); w == nil || s.waiting+s.broke.Len()+len(s.urgent.list) != 0 {
		t.Error("a whole one is not given a minute later")
	}
}
