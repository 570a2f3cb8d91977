package ca_test

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	apiv1 "github.com/signet-ca/signet/api/v1"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/store"
)

// TestMintBudgetOfRotation has several roots follow one another within an hour, the last in an emergency, where the budget of each is
// one intermediate: none waits for what was spent under another. Of roots that are gone nothing is left in the replica's record.
func TestMintBudgetOfRotation(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{Config: func(cfg *ca.Config) { cfg.MintBudget = 1 }}, 1)
		for i := range 4 {
			old, began, id := d.active(), time.Now(), fmt.Sprint("stolen-", i)
			if _, err := d.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: id, Compromised: old, Reason: "key on the net", Losing: 1}); err != nil {
				t.Fatal(api.FromStatus(err))
			}
			d.over(id, "done")
			if took := time.Since(began); took > 10*time.Second || d.peers[0].root() == old {
				t.Fatalf("emergency %d took %s; the peer is under %s", i, took, d.peers[0].root())
			}
		}
		d.Stop()
		st, shut, err := store.Open(t.Context(), store.Config{Path: filepath.Join(d.Dir, "signet.db")}, false)
		if err != nil {
			t.Fatal(err)
		}
		r, err := ca.ReplicaOf(t.Context(), st, "ca-0")
		if err != nil || len(r.Minted) > 2 {
			t.Errorf("the replica's record has %d intermediates: %v", len(r.Minted), err)
		}
		if err := shut(); err != nil {
			t.Error(err)
		}
	})
}
