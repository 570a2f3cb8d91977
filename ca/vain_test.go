package ca_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// TestUpstreamAwayForHours: a request for an intermediate that is given up leaves nothing behind, neither in memory nor in what keeps a
// root from being removed.
func TestUpstreamAwayForHours(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		up := new(without)
		d := newDrill(t, catest.Options{Config: func(cfg *ca.Config) { up.Upstream = cfg.Upstream; cfg.Upstream = up }}, 1)
		old := d.active()
		up.lose("*")
		if _, err := d.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: "stolen", Compromised: old, Reason: "key on the net", Losing: 1}); err != nil {
			t.Fatal(api.FromStatus(err))
		}
		time.Sleep(5 * time.Hour) // 30 requests
		if n := d.CA().Keys(); n > 3 {
			t.Errorf("it follows %d keys", n)
		}
		up.restore()
		d.over("stolen", "done")
		eventually(t, "an SVID under the new root", func() bool { return d.peers[0].root() != old })
	})
}

// unreadable is a store whose records of replicas can be read once, for the restores that they tell of, and then not twice.
type unreadable struct {
	ca.Store
	reads atomic.Int32
}

var errInput = errors.New("input/output error")

// Replicas implements ca.Store.
func (s *unreadable) Replicas(ctx context.Context) ([]ca.Replica, error) {
	if n := s.reads.Add(1); n == 2 || n == 3 {
		return nil, errInput
	}
	return s.Store.Replicas(ctx)
}

// TestSeenUnread: a CA that cannot read who was seen before it was started ends: it would decide without those who are away.
func TestSeenUnread(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		var cfg ca.Config
		start(t, catest.Options{Config: func(c *ca.Config) { cfg = *c }})
		cfg.Store = &unreadable{Store: cfg.Store}
		again, err := ca.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := again.Run(ctx); !errors.Is(err, errInput) {
			t.Errorf("it runs: %v", err)
		}
	})
}
