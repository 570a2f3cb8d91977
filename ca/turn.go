package ca

import (
	"context"
	"slices"
	"time"

	"github.com/signet-ca/signet/api"
)

// turn is one caller's turn at a gate. It is for work: while he waits for somebody else, others have it.
type turn struct {
	gate   *gate
	asking *gate // bounds who waits for somebody else at once
	who    string
	due    time.Time // zero: he does not say
	held   bool
}

// take waits for a turn of who at g; Overloaded when too many wait. After a nil error end must be called.
func (g *gate) take(ctx context.Context, who string, asking *gate) (*turn, error) {
	return g.takeBy(ctx, who, time.Time{}, asking)
}

// takeBy is take for somebody who is due at some time.
func (g *gate) takeBy(ctx context.Context, who string, due time.Time, asking *gate) (*turn, error) {
	if err := g.enterBy(ctx, who, due); err != nil {
		return nil, err
	}
	return &turn{gate: g, asking: asking, who: who, due: due, held: true}, nil
}

// end gives the turn to the next.
func (t *turn) end() {
	if t.held {
		t.held = false
		t.gate.leave()
	}
}

// aside runs wait outside of the turn, in the same order as there is for turns, and comes back before all who have not
// begun. It fails with Overloaded where wait was not run, and with the caller's own end.
func (t *turn) aside(ctx context.Context, wait func()) error {
	t.end()
	if err := t.asking.enterBy(ctx, t.who, t.due); err != nil {
		return api.AsError(err)
	}
	func() {
		defer t.asking.leave()
		wait()
	}()
	if err := t.gate.back(ctx); err != nil {
		return api.AsError(err)
	}
	t.held = true
	return nil
}

// back waits for a turn of somebody who had one and gave it back. He is not sent away: what he waited for would be lost.
func (g *gate) back(ctx context.Context) error {
	g.mu.Lock()
	if g.free > 0 {
		g.free--
		g.mu.Unlock()
		return nil
	}
	w := &waiter{decided: make(chan struct{})}
	g.returning = append(g.returning, w)
	g.mu.Unlock()
	select {
	case <-w.decided:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if w.turn {
		return nil
	}
	g.returning = slices.DeleteFunc(g.returning, func(x *waiter) bool { return x == w })
	return ctx.Err()
}
