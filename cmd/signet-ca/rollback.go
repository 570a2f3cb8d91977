package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/run"
)

// shower is a publisher that can tell which bundle it shows.
type shower interface {
	Shown(ctx context.Context, td spiffeid.TrustDomain) (journal.Held, error)
}

// shown returns the published bundle, the zero Held where there is none. Its hash is zero too where its roots cannot be told.
func (p *publisher) shown(ctx context.Context, td spiffeid.TrustDomain) (journal.Held, error) {
	s, ok := p.Publisher.(shower)
	if !ok {
		return journal.Held{}, nil
	}
	return s.Shown(ctx, td)
}

// rollbackGuard refuses a store that is older than what was published of it: served, its bundle would be refused by every agent
// that holds the later one, and believed by those that are new; and a root that is compromised may be active in it.
//
// One of the same generation with other roots is refused too: an older store that went on to that number looks like this, and agents
// refuse its bundle as much. So does what somebody else wrote there while the CA was down, which would be no reason not to start. But
// whoever can do that can write the next number as well, and a CA that runs puts such a thing right within seconds; so by refusing he
// is given nothing that he does not have. A number that no CA can have come to proves nothing, and stops nobody.
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
	published, err := g.from.shown(ctx, g.td)
	if err != nil {
		g.log.WarnContext(ctx, "it is not known yet whether a later generation was published", "where", g.from.where, "error", err)
		return nil
	}
	j, _, err := g.store.Load(ctx) // afterwards, for other replicas may publish a moment after they have stored
	if err != nil {
		return err
	}
	g.asked = true
	stored, shown := j.Generation(), published.Generation
	switch {
	case j.TrustDomain != g.td.Name(): // the CA itself refuses it, for that
		return nil
	case !shown.Plausible(time.Now()):
		g.log.ErrorContext(ctx, "what is published was changed by somebody else: it claims a generation that no CA can have come to",
			"where", g.from.where, "claims", shown.String(), "state", stored.String())
		return nil
	case shown.Sequence() > stored.Sequence():
		return api.E(api.StateRollback, "the state has generation %s, and in %s generation %s is published", stored, g.from.where, shown)
	case shown != stored || published == journal.Held{Generation: shown}:
		return nil
	}
	roots, err := j.Roots()
	if err != nil {
		return err
	}
	if api.BundleHash(roots) != published.Hash {
		return api.E(api.StateRollback, "the state has generation %s, and in %s other roots are published under that number: the state is an older one that went on by itself, or somebody changed what is published",
			stored, g.from.where)
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
