package ca

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/peer"

	"github.com/signet-ca/signet/api"
)

func (g *gate) empty(t *testing.T, turns int) {
	t.Helper()
	l := &g.lines
	if g.free != turns || l.waiting != 0 || len(l.of)+l.round.Len()+len(l.urgent.list)+len(l.crowded.list)+l.broke.Len()+len(g.returning) != 0 {
		t.Errorf("%d of %d turns are free, %d wait in %d lines, %d in the round", g.free, turns, l.waiting, len(l.of), l.round.Len())
	}
}

// TestGate lets two work and three wait; who gives up waiting frees his place.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(2, 3)
		for range 2 {
			if err := g.enter(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		waiting := make(chan error, 3)
		for i := range 3 {
			c := t.Context()
			if i == 0 {
				c = ctx
			}
			go func() { waiting <- g.enter(c, "a") }()
		}
		synctest.Wait()
		err := g.enter(t.Context(), "a")
		if api.ReasonOf(err) != api.Overloaded || api.AsError(err).RetryAfter <= 0 {
			t.Fatalf("the sixth: %v", err)
		}
		cancel()
		if err := <-waiting; err != context.Canceled {
			t.Fatalf("who gave up: %v", err)
		}
		g.leave()
		g.leave()
		for range 2 {
			if err := <-waiting; err != nil {
				t.Error(err)
			}
		}
		g.leave()
		g.leave()
		g.empty(t, 2)
	})
}

// TestGateFair lets a crowd wait behind itself: turns go round, and a newcomer finds a place where the crowd has many.
//
// threat: J08, J19
func TestGateFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1, 100)
		var mu sync.Mutex
		var order []string
		sent := map[string]int{}
		ask := func(who string) {
			go func() {
				err := g.enter(t.Context(), who)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					if api.ReasonOf(err) != api.Overloaded {
						t.Error(err)
					}
					sent[who]++
					return
				}
				order = append(order, who)
			}()
			synctest.Wait()
		}
		ask("first")
		for range 1000 {
			ask("crowd")
		}
		for i := range 10 {
			ask(fmt.Sprint("other-", i%5))
		}
		if sent["crowd"] != 910 || len(sent) != 1 {
			t.Errorf("sent away: %v, want 910 of the crowd and nobody else", sent)
		}
		for range 101 {
			g.leave()
			synctest.Wait()
		}
		g.empty(t, 1)
		if i := slices.Index(order[1:], "other-4"); i != 5 {
			t.Errorf("the fifth of the others had turn %d: %v", i, order[:20])
		}
		for i := range 5 {
			n := 0
			for _, who := range order[:13] {
				if who == fmt.Sprint("other-", i) {
					n++
				}
			}
			if n != 2 {
				t.Errorf("other-%d had %d of 2 turns when the crowd had 3: %v", i, n, order[:13])
			}
		}
	})
}

// TestGateMany keeps its books under callers who come, give up and are sent away all at once.
func TestGateMany(t *testing.T) {
	g, asking := newGate(3, 20), newGate(2, 5)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			for j := range 200 {
				ctx, cancel := context.WithCancel(t.Context())
				if j%3 == 0 {
					go cancel()
				}
				if turn, err := g.take(ctx, fmt.Sprint(i%7), asking); err == nil {
					if j%2 == 0 {
						turn.aside(ctx, runtime.Gosched)
					}
					turn.end()
				}
				cancel()
			}
		})
	}
	wg.Wait()
	g.empty(t, 3)
	asking.empty(t, 2)
}

// TestGateAside gives a turn back for as long as its owner waits for somebody else. He comes back before those who have not
// begun, and is not sent away; whoever cannot come back or cannot wait leaves nothing behind.
func TestGateAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, asking := newGate(1, 10), newGate(1, 1)
		var order []string
		first, err := g.take(t.Context(), "first", asking)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			go func() {
				if err := g.enter(t.Context(), "other"); err != nil {
					t.Error(err)
				}
				order = append(order, fmt.Sprint("other-", i))
			}()
			synctest.Wait()
		}
		come := make(chan struct{})
		go func() {
			if err := first.aside(t.Context(), func() { <-come }); err != nil {
				t.Error(err)
			}
			order = append(order, "first")
		}()
		synctest.Wait()
		if !slices.Equal(order, []string{"other-0"}) {
			t.Errorf("while the first waits: %v", order)
		}
		// One may wait at once, and one for that.
		ctx, cancel := context.WithCancel(t.Context())
		gone := make(chan error, 2)
		for range 2 {
			x := &turn{gate: newGate(0, 0), asking: asking, who: "first", held: true}
			go func() { gone <- x.aside(ctx, func() { t.Error("ran though there was no room") }) }()
			synctest.Wait()
		}
		if err := <-gone; api.ReasonOf(err) != api.Overloaded {
			t.Errorf("who finds no place to wait: %v, want %s", err, api.Overloaded)
		}
		cancel()
		if err := <-gone; api.ReasonOf(err) != api.Canceled {
			t.Errorf("who gave up: %v, want %s", err, api.Canceled)
		}
		close(come)
		synctest.Wait()
		for range 3 {
			g.leave()
			synctest.Wait()
		}
		if want := []string{"other-0", "first", "other-1", "other-2"}; !slices.Equal(order, want) {
			t.Errorf("turns went to %v, want %v", order, want)
		}

		first.held = true // other-2's, to be given back by one who cannot come back
		ctx, cancel = context.WithCancel(t.Context())
		err = first.aside(ctx, func() {
			if err := g.enter(t.Context(), "other"); err != nil {
				t.Error(err)
			}
			cancel()
		})
		if api.ReasonOf(err) != api.Canceled || first.held {
			t.Errorf("who went away: %v, and has a turn: %v", err, first.held)
		}
		first.end()
		g.leave()
		g.empty(t, 1)
		asking.empty(t, 1)
	})
}

// TestWhence tells peers apart by their address alone.
func TestWhence(t *testing.T) {
	at := func(a net.Addr) context.Context { return peer.NewContext(t.Context(), &peer.Peer{Addr: a}) }
	ip := net.ParseIP("192.0.2.1")
	if a, b := whence(at(&net.TCPAddr{IP: ip, Port: 1})), whence(at(&net.TCPAddr{IP: ip, Port: 2})); a != b || a != "192.0.2.1" {
		t.Errorf("two connections of one peer are %q and %q", a, b)
	}
	if whence(t.Context()) != "" || whence(at(&net.UnixAddr{Name: "@"})) != "@" {
		t.Error("who has no address has a port")
	}
}

// TestOverloadedSpread does not have everybody come back at the same moment.
func TestOverloadedSpread(t *testing.T) {
	var all []time.Duration
	for range 100 {
		all = append(all, api.AsError(api.FromStatus(api.ToStatus(overloaded()).Err())).RetryAfter)
	}
	if lo, hi := slices.Min(all), slices.Max(all); lo < time.Second || hi > 2*time.Second || hi-lo < 500*time.Millisecond {
		t.Errorf("they come back after %s to %s", lo, hi)
	}
}
