package ca_test

import (
	"context"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/audit"
)

// hungRing is a ledger whose ring of refusals hangs until it is released.
type hungRing struct {
	ca.Ledger
	waiting  chan struct{} // gets one for each refusal
	released chan struct{}
}

// Refuse implements ca.Ledger.
func (l hungRing) Refuse(_ context.Context, e audit.Entry) (string, error) {
	l.waiting <- struct{}{}
	<-l.released
	return e.CorrelationID, nil
}

// TestHungRing keeps no turn for a refusal that waits for its record: issuance goes on while the ring hangs.
func TestHungRing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ring := hungRing{waiting: make(chan struct{}, 1000), released: make(chan struct{})}
		s := start(t, catest.Options{Config: func(cfg *ca.Config) {
			ring.Ledger = cfg.Ledger
			cfg.Ledger, cfg.Concurrent = ring, 1
		}})
		n := newNode(t, s, "node-1")
		l := n.session()
		foreign, stranger := n.item(s.Pod("shop", "far", "web", "node-2")), n.token(s.Pod("shop", "web", "web", "node-1"), api.AgentAudience(s.TD))
		var wg sync.WaitGroup
		defer wg.Wait()
		defer close(ring.released)
		wg.Go(func() {
			_, err := l.issue(foreign)
			wantReason(t, err, api.NodeMismatch)
		})
		doors := runtime.GOMAXPROCS(0)
		for range doors {
			wg.Go(func() {
				_, _, err := n.attest(func(r *apiv1.AttestAgentRequest) { r.Evidence = stranger })
				wantReason(t, err, api.NotAnAgent)
			})
		}
		for range 1 + doors {
			<-ring.waiting
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		resp, err := l.client.Issue(ctx, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{n.item(s.Pod("shop", "web", "web", "node-1"))}})
		if err != nil || resp.GetResults()[0].GetSvid() == nil {
			t.Errorf("nothing is issued while the ring hangs: %v, %v", err, resp)
		}
		r := &apiv1.AttestAgentRequest{Evidence: n.token(n.pod, api.AgentAudience(s.TD)), Csr: newCSR(t, newKey(t)), Protocol: api.Protocol}
		if _, err := apiv1.NewAuthorityClient(dial(t, s, nil)).AttestAgent(ctx, r); err != nil {
			t.Errorf("no agent is attested while the ring hangs: %v", api.FromStatus(err))
		}
	})
}
