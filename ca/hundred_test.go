package ca_test

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/store"
)

// A work is what a verifier has to do for one SVID: what its time and its memory follow from, and nothing that depends on the machine.
type work struct {
	chain, roots int
	candidates   int // certificates that are tried as the issuer of another, until all are: as many signatures are checked at most
}

// workOf is the work for a chain, which must verify.
func workOf(t testing.TB, td spiffeid.TrustDomain, chain, roots []*x509.Certificate) work {
	t.Helper()
	if _, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(td, roots), x509svid.WithTime(time.Now())); err != nil {
		t.Fatal(err)
	}
	w := work{chain: len(chain), roots: len(roots)}
	pool := slices.Concat(chain[1:], roots)
	var try func(path []*x509.Certificate)
	try = func(path []*x509.Certificate) {
		child := path[len(path)-1]
		for _, parent := range pool {
			if bytes.Equal(child.RawIssuer, parent.RawSubject) && !slices.ContainsFunc(path, parent.Equal) {
				w.candidates++
				try(append(slices.Clone(path), parent))
			}
		}
	}
	try(chain[:1])
	return w
}

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
		var works []work
		var sizes []int // bytes of chain and roots
		const warm = 10
		for i := range rotations {
			id, old, number := fmt.Sprint("op-", i), d.active(), d.status().GetNumber()
			if i%10 == 4 {
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
			certs, err := x509.ParseCertificates(slices.Concat(p.svid.GetChain()...))
			p.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
			length, roots := len(certs), len(d.CA().Bundle().Roots)
			if i == 0 || i == 9 || i == rotations-1 {
				works = append(works, workOf(t, d.TD, certs, d.CA().Bundle().Roots))
				size := 0
				for _, c := range slices.Concat(certs, d.CA().Bundle().Roots) {
					size += len(c.Raw)
				}
				sizes = append(sizes, size)
			}
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
		if works[1] != works[0] || works[2] != works[0] || slices.Max(sizes)-slices.Min(sizes) > 128 { // signatures and serial numbers differ by a few bytes
			t.Errorf("what a verifier has to do after 1, 10 and %d rotations: %+v, of %d bytes", rotations, works, sizes)
		}
		t.Logf("a verifier's work: %+v, of %d bytes", works[0], sizes)
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

// BenchmarkVerifyRotated prints what it takes a peer to verify the CA's own SVID after 1, 10 and 100 rotations, which come as fast as
// they can.
func BenchmarkVerifyRotated(b *testing.B) {
	s := catest.New(b, catest.Options{})
	s.WaitReady()
	admin := adminOf(b, s.CA())
	watch, err := admin.WatchRotation(b.Context(), &apiv1.WatchRotationRequest{})
	if err != nil {
		b.Fatal(err)
	}
	for i := 1; i <= 100; i++ {
		id := fmt.Sprint("op-", i)
		if _, err := admin.StartRotation(b.Context(), &apiv1.StartRotationRequest{Operation: id, Reason: "benchmark"}); err != nil {
			b.Fatal(err)
		}
		for over := false; !over; {
			m, err := watch.Recv()
			if err != nil {
				b.Fatal(err)
			}
			past := m.GetRotation().GetPast()
			over = len(past) > 0 && past[len(past)-1].GetId() == id
		}
		if i != 1 && i != 10 && i != 100 {
			continue
		}
		chain, _ := shows(b, s)
		bundle := s.CA().Bundle()
		b.Run(fmt.Sprint("after=", i), func(b *testing.B) {
			roots := x509bundle.FromX509Authorities(s.TD, bundle.Roots)
			for b.Loop() {
				if _, _, err := x509svid.Verify(chain, roots); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
