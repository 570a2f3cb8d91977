package ca_test

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"
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
	catest.Bubble(t, func(t *testing.T) {
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

// TestRefusalNames puts on record of a refusal who asked and for what, as far as that is known.
func TestRefusalNames(t *testing.T) {
	s := start(t, catest.Options{Policy: ca.PolicyFile{Namespaces: []string{"shop"}}})
	n := newNode(t, s, "node-1")
	l := n.session()
	web := s.Pod("shop", "web", "web", "node-1")
	item := n.item(web)
	key := newKey(t)
	item.Csr = newCSR(t, key)
	issued, err := l.issue(item)
	if err != nil {
		t.Fatal(err)
	}
	id := issued.GetSpiffeId()
	agent := "spiffe://example.org/signet/agent/" + n.pod.NodeUID
	itemOf := func(e *apiv1.Evidence) *apiv1.IssueItem {
		return &apiv1.IssueItem{Evidence: e, Csr: newCSR(t, newKey(t)), Volume: "v"}
	}
	far := s.Pod("shop", "far", "web", "node-2")
	gone := s.Pod("shop", "gone", "web", "node-1")
	s.Pods.Change(gone, func(p *ca.Pod) { p.Finished = true })
	dev := s.Pod("dev", "web", "web", "node-2")
	other := &apiv1.IssueItem{Evidence: item.GetEvidence(), Csr: newCSR(t, newKey(t)), Volume: "elsewhere"}
	workload := apiv1.NewAuthorityClient(dial(t, s, svidOf(t, issued.GetChain(), key)))
	stranger := os.Geteuid() + 1000
	user := apiv1.NewAdminClient(adminConn(t, s.CA(), catest.AsUser(stranger)))
	for _, tt := range []struct {
		name   string
		ask    func() error
		reason api.Reason
		want   audit.Entry // of it: SPIFFEID, PodUID, Caller
		source string
	}{
		{"a workload that calls like an agent", func() error {
			_, err := workload.Issue(t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
			return api.FromStatus(err)
		}, api.AgentIdentityRequired, audit.Entry{Caller: id}, audit.SourceRefusals},
		{"a user who may not", func() error {
			_, err := user.GetStatus(t.Context(), &apiv1.GetStatusRequest{})
			return api.FromStatus(err)
		}, api.AdminForbidden, audit.Entry{Caller: fmt.Sprint("uid:", stranger)}, audit.SourceRefusals},
		{"a pod's token for somebody else", func() error {
			_, err := l.issue(itemOf(n.token(web, "vault")))
			return err
		}, api.TokenAudience, audit.Entry{PodUID: web.UID, Caller: agent}, audit.SourceRefusals},
		{"the same of another pod", func() error {
			_, err := l.issue(itemOf(n.token(far, "vault")))
			return err
		}, api.TokenAudience, audit.Entry{PodUID: far.UID, Caller: agent}, audit.SourceRefusals},
		{"a pod's token for somebody else, from nobody", func() error {
			_, _, err := n.attest(func(r *apiv1.AttestAgentRequest) { r.Evidence = n.token(far, "vault") })
			return err
		}, api.TokenAudience, audit.Entry{PodUID: far.UID}, audit.SourceSample},
		{"a pod of another node", func() error { _, err := l.issue(n.item(far)); return err },
			api.NodeMismatch, audit.Entry{SPIFFEID: id, PodUID: far.UID, Caller: agent}, audit.SourceRefusals},
		{"a pod that is gone", func() error { _, err := l.issue(n.item(gone)); return err },
			api.PodDeleted, audit.Entry{SPIFFEID: id, PodUID: gone.UID, Caller: agent}, audit.SourceRefusals},
		{"a token that was used elsewhere", func() error { _, err := l.issue(other); return err },
			api.TokenReplayedElsewhere, audit.Entry{SPIFFEID: id, PodUID: web.UID, Caller: agent}, audit.SourceRefusals},
		// The reason is that of the first check, though the policy was asked before.
		{"a pod of another node that may have no identity", func() error { _, err := l.issue(n.item(dev)); return err },
			api.NodeMismatch, audit.Entry{PodUID: dev.UID, Caller: agent}, audit.SourceRefusals},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.ask()
			wantReason(t, err, tt.reason)
			found := listAudit(t, s.CA(), &apiv1.ListAuditRequest{CorrelationId: api.AsError(err).CorrelationID})
			if len(found) != 1 {
				t.Fatalf("%d entries", len(found))
			}
			e := found[0]
			if e.GetSpiffeId() != tt.want.SPIFFEID || e.GetPodUid() != tt.want.PodUID || e.GetCaller() != tt.want.Caller || e.GetSource() != tt.source {
				t.Errorf("on record: %v, want %+v in %s", e, tt.want, tt.source)
			}
		})
	}
}
