package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/run"
)

// shower is a publisher that can tell which generation it shows.
type shower interface {
	Shown(ctx context.Context, td spiffeid.TrustDomain) (api.Generation, error)
}

// shown returns the generation of the published bundle, the zero Generation where there is none.
func (p *publisher) shown(ctx context.Context, td spiffeid.TrustDomain) (api.Generation, error) {
	s, ok := p.Publisher.(shower)
	if !ok {
		return api.Generation{}, nil
	}
	return s.Shown(ctx, td)
}

// rollbackGuard refuses a store that is older than what was published of it: served, its bundle would be refused by every agent
// that holds the later one, and believed by those that are new; and a root that is compromised may be active in it.
type rollbackGuard struct {
	td    spiffeid.TrustDomain
	store ca.Store
	from  *publisher
	log   *slog.Logger
	asked bool // what is published was read
}

// How soon again it is asked what is published, where that could not be read at the start.
const rollbackRetry = 10 * time.Second

// check compares what is stored with what is published: StateRollback. That what is published cannot be read is not an error: a
// CA starts while the cluster is away, and watch asks again.
func (g *rollbackGuard) check(ctx context.Context) error {
	shown, err := g.from.shown(ctx, g.td)
	if err != nil {
		g.log.WarnContext(ctx, "it is not known yet whether a later generation was published", "where", g.from.where, "error", err)
		return nil
	}
	j, _, err := g.store.Load(ctx) // afterwards, for other replicas may publish a moment after they have stored
	if err != nil {
		return err
	}
	g.asked = true
	if j.TrustDomain != g.td.Name() { // the CA itself refuses it, for that
		return nil
	}
	if shown.Sequence() > j.Generation().Sequence() {
		return api.E(api.StateRollback, "the state has generation %s, and in %s generation %s is published", j.Generation(), g.from.where, shown)
	}
	return nil
}

// task asks until the answer is known, and ends the process where the store is an old one.
func (g *rollbackGuard) task() run.Task {
	return run.Task{Name: "rollback guard", Run: func(ctx context.Context) error {
		for !g.asked {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(rollbackRetry):
			}
			if err := g.check(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("the CA was started while nobody could say what is published: %w", err)
			}
		}
		return nil
	}}
}
