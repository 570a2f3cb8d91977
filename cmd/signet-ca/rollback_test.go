package main

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
)

// oldStore holds a record of one generation.
type oldStore struct {
	ca.Store
	j journal.Journal
}

func (s oldStore) Load(context.Context) (journal.Journal, ca.Revision, error) { return s.j, 1, nil }

// shownPublisher shows a generation once it answers.
type shownPublisher struct {
	ca.Publisher
	generation api.Generation
	away       int // how often it does not answer
}

func (p *shownPublisher) Shown(context.Context, spiffeid.TrustDomain) (api.Generation, error) {
	if p.away--; p.away >= 0 {
		return api.Generation{}, errors.New("away")
	}
	return p.generation, nil
}

// TestRollbackGuard: an older store is refused at the start, or as soon as it can be known. That nobody can say is no reason not to
// start.
//
// threat: E05
func TestRollbackGuard(t *testing.T) {
	stored := api.Generation{Epoch: 2, Number: 5}
	for _, tt := range []struct {
		name   string
		td     string
		shown  api.Generation
		away   int
		want   api.Reason // of check; empty: it is good
		task   api.Reason // of the task
		within time.Duration
	}{
		{"nothing is shown", "example.org", api.Generation{}, 0, "", "", 0},
		{"the same", "example.org", stored, 0, "", "", 0},
		{"an earlier one", "example.org", api.Generation{Epoch: 1, Number: 9}, 0, "", "", 0},
		{"a later number", "example.org", api.Generation{Epoch: 2, Number: 6}, 0, api.StateRollback, "", 0},
		{"a later epoch", "example.org", api.Generation{Epoch: 3, Number: 1}, 0, api.StateRollback, "", 0},
		{"of another trust domain, which is told elsewhere", "example.com", api.Generation{Epoch: 3, Number: 1}, 0, "", "", 0},
		{"known later", "example.org", api.Generation{Epoch: 3, Number: 1}, 3, "", api.StateRollback, 3 * rollbackRetry},
		{"good, and known later", "example.org", stored, 3, "", "", 3 * rollbackRetry},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := journal.Journal{TrustDomain: "example.org", Epoch: stored.Epoch, Number: stored.Number}
				g := &rollbackGuard{
					td: spiffeid.RequireTrustDomainFromString(tt.td), store: oldStore{j: j}, log: slog.New(slog.DiscardHandler),
					from: &publisher{Publisher: &shownPublisher{generation: tt.shown, away: tt.away}, where: "somewhere"},
				}
				began := time.Now()
				if err := g.check(t.Context()); api.ReasonOf(err) != tt.want && !(err == nil && tt.want == "") {
					t.Fatalf("%v, want %q", err, tt.want)
				} else if err != nil {
					return
				}
				if err := g.task().Run(t.Context()); api.ReasonOf(err) != tt.task && !(err == nil && tt.task == "") {
					t.Fatalf("%v, want %q", err, tt.task)
				}
				if took := time.Since(began); took != tt.within {
					t.Errorf("known after %s, want %s", took, tt.within)
				}
			})
		})
	}
	g := &rollbackGuard{from: &publisher{}} // that shows nothing anywhere
	g.td, g.store, g.log = spiffeid.RequireTrustDomainFromString("example.org"), oldStore{}, slog.New(slog.DiscardHandler)
	if err := g.check(t.Context()); err != nil || !g.asked {
		t.Errorf("without a publisher: %v", err)
	}
}
