package agent

import (
	"context"
	"crypto/x509"
	"math/big"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca/issuance"
)

// month is a CA that signs nothing, so that a month of renewals takes seconds: what is tested is when they come. The moment
// of each is drawn as the real one draws it. integration/fleet lives through shorter times with everything real.
type month struct {
	id spiffeid.ID

	mu      sync.Mutex
	serial  int64
	renewed []float64 // at which part of the SVID's life each renewal came
	late    int       // of them, those that an outage delayed
	refused int
}

// outages has the CA away from one identity now and then, for less than half of an SVID's life each time.
type outages struct {
	rand       *rand.Rand
	start, end time.Time
	delayed    bool // the renewal that is due was tried in vain
}

func (o *outages) away(now time.Time) bool {
	for !now.Before(o.end) { // the next one begins within a day
		o.start = o.end.Add(time.Duration(o.rand.Int64N(int64(24 * time.Hour))))
		o.end = o.start.Add(time.Duration(o.rand.Int64N(int64(29 * time.Minute))))
	}
	return !now.Before(o.start)
}

func (m *month) renew(o *outages) func(context.Context, *Identity, proof) error {
	return func(_ context.Context, id *Identity, p proof) error {
		now := time.Now()
		m.mu.Lock()
		defer m.mu.Unlock()
		if !now.Before(p.end) {
			m.refused++
			return api.E(api.TokenExpired, "the token has expired")
		}
		if o.away(now) {
			o.delayed = true
			return api.E(api.CAUnavailable, "the CA is away")
		}
		if old := id.held.Load(); old.SVID != nil {
			if o.delayed {
				m.late++
			} else {
				m.renewed = append(m.renewed, now.Sub(old.SVID.Certificates[0].NotBefore).Hours())
			}
		}
		o.delayed = false
		m.serial++
		leaf := &x509.Certificate{SerialNumber: big.NewInt(m.serial), NotBefore: now, NotAfter: now.Add(time.Hour)}
		h := Held{
			SVID:    &x509svid.SVID{ID: m.id, Certificates: []*x509.Certificate{leaf}},
			RenewAt: now.Add(issuance.Profile{}.DrawRenewal(time.Hour)),
		}
		id.set(func(Held) Held { return h })
		return nil
	}
}

// TestMonth lets fifty agents with a pod each live for thirty days with hourly SVIDs and a CA that is away every day for
// up to half of their life: nothing expires, and renewals are spread evenly.
func TestMonth(t *testing.T) {
	const agents = 25 // a keeper looks at the clock 4,000 times a day
	days, tolerance := 30, 7
	if testing.Short() {
		days, tolerance = 3, 22
	}
	synctest.Test(t, func(t *testing.T) {
		m := &month{id: spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/web")}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		all := make([]*Agent, agents)
		for i := range all {
			a := newTestAgent(t, noProver{})
			all[i] = a
			id := newIdentity(podKey{}, Pod{Namespace: "shop", Name: "web"}, a)
			o := &outages{rand: rand.New(rand.NewPCG(uint64(i), 0)), end: time.Now()}
			id.offer(attestor.Evidence{}, time.Now().Add(time.Hour), "")
			wg.Go(func() { a.keep(ctx, id, m.renew(o)) })
			wg.Go(func() { // a proxy's stream ends with its token, and comes back with a fresh one
				for ctx.Err() == nil {
					time.Sleep(48 * time.Minute)
					id.offer(attestor.Evidence{}, time.Now().Add(time.Hour), "")
				}
			})
		}
		time.Sleep(time.Duration(days) * 24 * time.Hour)
		cancel()
		wg.Wait()
		for i, a := range all {
			var expired dto.Metric
			if err := a.metrics.expired.Write(&expired); err != nil || expired.GetCounter().GetValue() != 0 {
				t.Errorf("agent %d: %v SVIDs expired before their successor was there, %v", i, expired.GetCounter().GetValue(), err)
			}
		}
		m.judge(t, agents*days, tolerance)
	})
}

// judge allows each bucket of the spread so many per cent more or less than its share: five times what chance makes of it.
func (m *month) judge(t *testing.T, workloadDays, tolerance int) {
	const buckets = 8
	var spread [buckets]int
	for _, part := range m.renewed {
		if part < 0.3 || part > 0.5+1e-6 {
			t.Fatalf("a renewal came at %.4f of the life though nothing delayed it, want 0.3 to 0.5", part)
		}
		spread[min(int((part-0.3)/0.2*buckets), buckets-1)]++
	}
	total := len(m.renewed)
	if total < workloadDays*50 || m.late < workloadDays/4 || m.refused != 0 {
		t.Errorf("%d renewals in time, %d late, %d with an expired token, in %d days of workloads", total, m.late, m.refused, workloadDays)
	}
	for b, n := range spread {
		if want := total / buckets; n < want*(100-tolerance)/100 || n > want*(100+tolerance)/100 {
			t.Errorf("renewals are not spread evenly: bucket %d has %d of %d: %v", b, n, total, spread)
		}
	}
	t.Logf("%d renewals in time, spread %v; %d delayed by outages; 0 expired", total, spread, m.late)
}
