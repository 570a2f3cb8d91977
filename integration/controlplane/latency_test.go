//go:build cluster

package controlplane_test

import (
	"crypto/rand"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/attestor"
)

// TestLatency tells what a review costs; nothing is asserted about it. Each token of a fresh row is new to the API server,
// which answers faster about one that it saw in the last ten seconds.
func TestLatency(t *testing.T) {
	c := newCluster(t)
	c.serviceAccount(t, "cart")
	first := c.token(t, "shop", "cart", audience, toPod("cart-0", c.pod(t, "cart-0", "cart")))
	n := 1000
	if testing.Short() {
		n = 50
	}
	fresh := func() [][]byte {
		tokens := make([][]byte, n)
		for i := range tokens {
			var err error
			tokens[i], err = resign(c.SigningKey, first, func(claims object) { claims["jti"] = rand.Text() })
			if err != nil {
				t.Fatal(err)
			}
		}
		return tokens
	}
	same := slices.Repeat([][]byte{first}, n)
	for _, row := range []struct {
		name     string
		attestor *attestor.ServiceAccount
		tokens   [][]byte
		callers  int
	}{
		{"offline, one caller", c.offline, fresh(), 1},
		{"reviewed, one caller, fresh tokens", c.review, fresh(), 1},
		{"reviewed, one caller, one token", c.review, same, 1},
		{"offline, 16 callers", c.offline, fresh(), 16},
		{"reviewed, 16 callers, fresh tokens", c.review, fresh(), 16},
		{"reviewed, 16 callers, one token", c.review, same, 16},
	} {
		t.Run(row.name, func(t *testing.T) {
			c.accepted(t, row.attestor, first) // connections and caches are warm
			took := make([]time.Duration, n)
			var wg sync.WaitGroup
			start := time.Now()
			for caller := range row.callers {
				wg.Go(func() {
					for i := caller; i < n; i += row.callers {
						began := time.Now()
						if _, err := row.attestor.Attest(t.Context(), evidence(row.tokens[i]), audience, began); err != nil {
							t.Error(err)
						}
						took[i] = time.Since(began)
					}
				})
			}
			wg.Wait()
			all := time.Since(start)
			slices.Sort(took)
			at := func(q float64) time.Duration { return took[int(q*float64(n-1))].Round(time.Microsecond) }
			t.Logf("min %v, p50 %v, p90 %v, p99 %v, max %v; %.0f/s", at(0), at(.5), at(.9), at(.99), at(1), float64(n)/all.Seconds())
		})
	}
}
