package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"math"
	"strings"
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

// shownPublisher shows a bundle once it answers.
type shownPublisher struct {
	ca.Publisher
	bundle journal.Held
	away   int // how often it does not answer
}

func (p *shownPublisher) Shown(context.Context, spiffeid.TrustDomain) (journal.Held, error) {
	if p.away--; p.away >= 0 {
		return journal.Held{}, errors.New("away")
	}
	return p.bundle, nil
}

// TestRollbackGuard: an older store is refused at the start, or as soon as it can be known, and so is one that went on by itself to the
// number that is published. That nobody can say is no reason not to start, nor is a number that no CA can have come to.
//
// threat: E05
func TestRollbackGuard(t *testing.T) {
	stored, top := api.Generation{Epoch: 2, Number: 5}, api.EpochAt(time.Time{})+1<<16 // bubbles begin before there were epochs
	ours, others := api.BundleHash(nil), api.BundleHash([]*x509.Certificate{{Raw: []byte("another")}})
	for _, tt := range []struct {
		name   string
		td     string
		shown  api.Generation
		hash   [32]byte // zero: nobody can say which roots
		away   int
		want   api.Reason // of check; empty: it is good
		task   api.Reason // of the task
		within time.Duration
		alarms int
	}{
		{"nothing is shown", "example.org", api.Generation{}, [32]byte{}, 0, "", "", 0, 0},
		{"the same", "example.org", stored, ours, 0, "", "", 0, 0},
		{"the same with other roots", "example.org", stored, others, 0, api.StateRollback, "", 0, 0},
		{"the same, of what kind nobody knows", "example.org", stored, [32]byte{}, 0, "", "", 0, 0},
		{"an earlier one", "example.org", api.Generation{Epoch: 1, Number: 9}, others, 0, "", "", 0, 0},
		{"a later number", "example.org", api.Generation{Epoch: 2, Number: 6}, ours, 0, api.StateRollback, "", 0, 0},
		{"a later epoch", "example.org", api.Generation{Epoch: 3, Number: 1}, others, 0, api.StateRollback, "", 0, 0},
		{"the latest there can be", "example.org", api.Generation{Epoch: top, Number: 9}, others, 0, api.StateRollback, "", 0, 0},
		{"one that cannot be", "example.org", api.Generation{Epoch: top + 1, Number: 1}, others, 0, "", "", 0, 1},
		{"the last number, with our roots", "example.org", api.FromSequence(math.MaxUint64), ours, 0, "", "", 0, 1},
		{"of another trust domain, which is told elsewhere", "example.com", api.Generation{Epoch: 3, Number: 1}, others, 0, "", "", 0, 0},
		{"known later", "example.org", api.Generation{Epoch: 3, Number: 1}, others, 3, "", api.StateRollback, 3 * rollbackRetry, 0},
		{"other roots, and known later", "example.org", stored, others, 3, "", api.StateRollback, 3 * rollbackRetry, 0},
		{"cannot be, and known later", "example.org", api.FromSequence(math.MaxUint64), others, 3, "", "", 3 * rollbackRetry, 1},
		{"good, and known later", "example.org", stored, ours, 3, "", "", 3 * rollbackRetry, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				j := journal.Journal{TrustDomain: "example.org", Epoch: stored.Epoch, Number: stored.Number}
				var log bytes.Buffer
				g := &rollbackGuard{
					td: spiffeid.RequireTrustDomainFromString(tt.td), store: oldStore{j: j},
					log:  slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelError})),
					from: &publisher{Publisher: &shownPublisher{bundle: journal.Held{Generation: tt.shown, Hash: tt.hash}, away: tt.away}, where: "somewhere"},
				}
				defer func() {
					if n := strings.Count(log.String(), "no CA can have come to"); n != tt.alarms {
						t.Errorf("%d alarms:\n%s", n, log.String())
					}
				}()
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
