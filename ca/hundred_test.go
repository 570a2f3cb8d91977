package ca_test

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/store"
)

// TestHundredRotations has a hundred roots follow one another, with the CA killed now and then and every tenth in an emergency: what
// verifiers have to look at, and what the CA keeps, is after the last what it was after the first.
//
// threat: E25
func TestHundredRotations(t *testing.T) {
	rotations := 100
	if testing.Short() {
		rotations = 12
	}
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 1)
		p := d.peers[0]
		var chain, bundle, record, replica int // at most, while it is warm
		const warm = 10
		for i := range rotations {
			id, old, number := fmt.Sprint("op-", i), d.active(), d.status().GetNumber()
			if i%10 == 9 {
				d.emergency(id, 1)
			} else {
				d.begin(id)
				if i%7 == 3 {
					d.restart()
				}
				for d.status().GetOperation() != nil {
					if n := len(d.CA().Bundle().Roots); n > 2 {
						t.Fatalf("rotation %d: a bundle of %d roots", i, n)
					}
					time.Sleep(time.Minute)
				}
				d.over(id, "done")
			}
			if d.active() == old || d.state(old) != "gone" || d.status().GetNumber() != number+2 {
				t.Fatalf("rotation %d: %v", i, d.status())
			}
			eventually(t, "an SVID under the new root", func() bool { return p.root() != old })
			p.mu.Lock()
			length := len(p.svid.GetChain())
			p.mu.Unlock()
			roots := len(d.CA().Bundle().Roots)
			j, r := d.stored()
			if i < warm {
				chain, bundle, record, replica = max(chain, length), max(bundle, roots), max(record, j), max(replica, r)
				continue
			}
			// What is kept of roots that are gone is full at 64 of them, some 330 bytes each.
			if limit := record + 2*64*400; length > chain || roots > bundle || j > limit || r > 2*replica {
				t.Fatalf("after %d rotations: a chain of %d, %d roots, a record of %d bytes, and %d of the replica; after %d it was %d, %d, %d and %d",
					i+1, length, roots, j, r, warm, chain, bundle, record, replica)
			}
		}
		t.Logf("a chain of %d, %d roots, a record of %d bytes, and %d of the replica", chain, bundle, record, replica)
	})
}

// stored is how many bytes the store holds of the record, and of the replica's.
func (d *drill) stored() (record, replica int) {
	d.t.Helper()
	d.Kill()
	st, shut, err := store.Open(d.t.Context(), store.Config{Path: filepath.Join(d.Dir, "signet.db")}, false)
	if err != nil {
		d.t.Fatal(err)
	}
	j, _, err := st.Load(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	data, err := j.Encode()
	if err != nil {
		d.t.Fatal(err)
	}
	r, err := ca.ReplicaOf(d.t.Context(), st, catest.Replica)
	if err != nil {
		d.t.Fatal(err)
	}
	if err := shut(); err != nil {
		d.t.Fatal(err)
	}
	d.Start()
	d.WaitReady()
	d.admin = adminOf(d.t, d.CA())
	return len(data), len(r.Minted)*200 + len(r.Agents)*250
}
