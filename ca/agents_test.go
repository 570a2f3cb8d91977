package ca_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// TestAttestAgentRefuses asks for an agent's SVID with what does not prove one.
func TestAttestAgentRefuses(t *testing.T) {
	s := start(t, catest.Options{})
	agent := api.AgentAudience(s.TD)
	tests := []struct {
		name   string
		change func(t *testing.T, n *node, r *apiv1.AttestAgentRequest)
		want   api.Reason
	}{
		{"protocol of the past", func(_ *testing.T, _ *node, r *apiv1.AttestAgentRequest) { r.Protocol = 0 }, api.ProtocolSkew},
		{"protocol of the future", func(_ *testing.T, _ *node, r *apiv1.AttestAgentRequest) { r.Protocol = api.Protocol + 1 }, api.ProtocolSkew},
		{"a workload's token", func(_ *testing.T, n *node, r *apiv1.AttestAgentRequest) {
			r.Evidence = n.token(s.Pod("shop", "web", "web", "node-1"), api.WorkloadAudience(s.TD))
		}, api.TokenAudience},
		{"the agent's token for workloads", func(_ *testing.T, n *node, r *apiv1.AttestAgentRequest) {
			r.Evidence = n.token(n.pod, api.WorkloadAudience(s.TD))
		}, api.TokenAudience},
		{"a pod that is no agent", func(_ *testing.T, n *node, r *apiv1.AttestAgentRequest) {
			r.Evidence = n.token(s.Pod("shop", "web", "web", "node-1"), agent)
		}, api.NotAnAgent},
		{"another ServiceAccount of the agents' namespace", func(_ *testing.T, n *node, r *apiv1.AttestAgentRequest) {
			r.Evidence = n.token(s.Pod(catest.AgentNS, "ca-0", "signet-ca", "node-1"), agent)
		}, api.NotAnAgent},
		{"the agents' ServiceAccount elsewhere", func(_ *testing.T, n *node, r *apiv1.AttestAgentRequest) {
			r.Evidence = n.token(s.Pod("shop", "web", catest.AgentSA, "node-1"), agent)
		}, api.NotAnAgent},
		{"no node in the token", func(_ *testing.T, n *node, r *apiv1.AttestAgentRequest) {
			r.Evidence = n.token(n.pod, agent, func(d *attestortest.Draft) { delete(d.Kubernetes(), "node") })
		}, api.NodeUnverifiable},
		{"unknown pod", func(_ *testing.T, n *node, r *apiv1.AttestAgentRequest) { s.Pods.Remove(n.pod) }, api.PodUnknown},
		{"finished pod", func(_ *testing.T, n *node, r *apiv1.AttestAgentRequest) {
			s.Pods.Change(n.pod, func(p *ca.Pod) { p.Finished = true })
		}, api.PodDeleted},
		{"pod that moved", func(_ *testing.T, n *node, r *apiv1.AttestAgentRequest) {
			s.Pods.Change(n.pod, func(p *ca.Pod) { p.NodeUID = "made-anew" })
		}, api.PodMismatch},
		{"no evidence", func(_ *testing.T, n *node, r *apiv1.AttestAgentRequest) { r.Evidence = nil }, api.EvidenceKind},
		{"no request", func(_ *testing.T, n *node, r *apiv1.AttestAgentRequest) { r.Csr = nil }, api.CSRMalformed},
		{"another node's identity", func(t *testing.T, n *node, r *apiv1.AttestAgentRequest) {
			r.Csr = newCSR(t, newKey(t), withURI(t, "spiffe://example.org/signet/agent/another"))
		}, api.IDMismatch},
		{"a workload's identity", func(t *testing.T, n *node, r *apiv1.AttestAgentRequest) {
			r.Csr = newCSR(t, newKey(t), withURI(t, "spiffe://example.org/ns/shop/sa/web"))
		}, api.IDMismatch},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := &node{t: t, s: s, pod: s.AgentPod("node-1")}
			var sent *apiv1.AttestAgentRequest
			resp, _, err := n.attest(func(r *apiv1.AttestAgentRequest) {
				tt.change(t, n, r)
				sent = r
			})
			wantReason(t, err, tt.want)
			checkRefusal(t, err, sent.GetEvidence().GetData())
			if resp != nil {
				t.Error("something came with the refusal")
			}
		})
	}
}

// TestAgentKeyReuse refuses an agent the key of another node's agent.
//
// threat: C18
func TestAgentKeyReuse(t *testing.T) {
	s := start(t, catest.Options{})
	first := newNode(t, s, "node-1")
	second := &node{t: t, s: s, pod: s.AgentPod("node-2")}
	_, _, err := second.attest(func(r *apiv1.AttestAgentRequest) { r.Csr = newCSR(t, first.svid.PrivateKey) })
	wantReason(t, err, api.KeyReused)
	if _, _, err := first.attest(func(r *apiv1.AttestAgentRequest) { r.Csr = newCSR(t, first.svid.PrivateKey) }); err != nil {
		t.Errorf("the same agent could not keep its key: %v", err)
	}
}

// TestSessionRefuses opens sessions that must not come about.
func TestSessionRefuses(t *testing.T) {
	s := start(t, catest.Options{})
	agent := api.AgentAudience(s.TD)
	good := func(n *node, change func(*apiv1.Hello)) *apiv1.SessionRequest {
		m := n.hello()
		change(m.GetHello())
		return m
	}
	tests := []struct {
		name  string
		first func(n *node) *apiv1.SessionRequest
		want  api.Reason
	}{
		{"the token of another node", func(n *node) *apiv1.SessionRequest {
			return good(n, func(h *apiv1.Hello) { h.Evidence = n.token(s.AgentPod("node-2"), agent) })
		}, api.NodeMismatch},
		{"a workload's token", func(n *node) *apiv1.SessionRequest {
			return good(n, func(h *apiv1.Hello) {
				h.Evidence = n.token(s.Pod("shop", "w", "w", "node-1"), api.WorkloadAudience(s.TD))
			})
		}, api.TokenAudience},
		{"a pod that is no agent", func(n *node) *apiv1.SessionRequest {
			return good(n, func(h *apiv1.Hello) { h.Evidence = n.token(s.Pod("shop", "w", "w", "node-1"), agent) })
		}, api.NotAnAgent},
		{"no evidence", func(n *node) *apiv1.SessionRequest {
			return good(n, func(h *apiv1.Hello) { h.Evidence = nil })
		}, api.EvidenceKind},
		{"pod that is gone", func(n *node) *apiv1.SessionRequest {
			s.Pods.Remove(n.pod)
			return n.hello()
		}, api.PodUnknown},
		{"pod past its deletion", func(n *node) *apiv1.SessionRequest {
			s.Pods.Change(n.pod, func(p *ca.Pod) { p.DeleteAt = time.Now() })
			return n.hello()
		}, api.PodDeleted},
		{"protocol of the past", func(n *node) *apiv1.SessionRequest {
			return good(n, func(h *apiv1.Hello) { h.Protocol = 0 })
		}, api.ProtocolSkew},
		{"protocol of the future", func(n *node) *apiv1.SessionRequest {
			return good(n, func(h *apiv1.Hello) { h.Protocol = api.Protocol + 1 })
		}, api.ProtocolSkew},
		{"a report before Hello", func(n *node) *apiv1.SessionRequest { return report(&apiv1.Report{Full: true}) }, api.SessionProtocol},
		{"an empty message", func(n *node) *apiv1.SessionRequest { return &apiv1.SessionRequest{} }, api.SessionProtocol},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, s, "node-1")
			before := len(ledgerOf(t, s))
			_, err := n.connect(tt.first(n))
			wantReason(t, err, tt.want)
			checkRefusal(t, err)
			attested := tt.want == api.TokenAudience || tt.want == api.NodeMismatch || tt.want == api.NotAnAgent || tt.want == api.PodUnknown || tt.want == api.PodDeleted
			checkRecorded(t, s, before, err, attested)
			if st, err := adminOf(t, s.CA()).GetStatus(t.Context(), &apiv1.GetStatusRequest{}); err != nil || st.GetAgents() != 0 {
				t.Errorf("%d sessions, want none (%v)", st.GetAgents(), err)
			}
		})
	}
	t.Run("nothing at all", func(t *testing.T) {
		n := newNode(t, s, "node-1")
		stream, err := apiv1.NewAuthorityClient(dial(t, s, n.svid)).Session(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		wantReason(t, (&link{t: t, stream: stream}).end(), api.SessionProtocol)
	})
}

// TestSessionProtocol ends a session that goes on wrongly.
func TestSessionProtocol(t *testing.T) {
	s := start(t, catest.Options{})
	streams := func(n int) []*apiv1.Stream { return make([]*apiv1.Stream, n) }
	many := func(n int) []*apiv1.Holding {
		all := make([]*apiv1.Holding, n)
		for i := range all {
			all[i] = &apiv1.Holding{Key: fmt.Sprint(i)}
		}
		return all
	}
	tests := []struct {
		name string
		sent []*apiv1.SessionRequest
		want api.Reason // empty: it goes on
	}{
		{"a second Hello", []*apiv1.SessionRequest{helloWith(&apiv1.Hello{Protocol: api.Protocol})}, api.SessionProtocol},
		{"an empty message", []*apiv1.SessionRequest{{}}, api.SessionProtocol},
		{"as many holdings as a node may have", []*apiv1.SessionRequest{report(&apiv1.Report{Changed: many(4096)})}, ""},
		{"more holdings than a node may have", []*apiv1.SessionRequest{report(&apiv1.Report{Changed: many(4097)})}, api.SessionProtocol},
		{"more holdings, little by little", []*apiv1.SessionRequest{
			report(&apiv1.Report{Full: true, Changed: many(4096)}), report(&apiv1.Report{Changed: []*apiv1.Holding{{Key: "x"}}}),
		}, api.SessionProtocol},
		{"as many streams as a holding may have", []*apiv1.SessionRequest{report(&apiv1.Report{Changed: []*apiv1.Holding{{Key: "x", Streams: streams(64)}}})}, ""},
		{"more streams than a holding may have", []*apiv1.SessionRequest{report(&apiv1.Report{Changed: []*apiv1.Holding{{Key: "x", Streams: streams(65)}}})}, api.SessionProtocol},
		{"holdings that are too large", []*apiv1.SessionRequest{
			report(&apiv1.Report{Changed: []*apiv1.Holding{{Key: "x", PodName: strings.Repeat("x", 1<<20)}}}),
		}, api.SessionProtocol},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newNode(t, s, "node-1").session()
			for _, m := range tt.sent {
				if err := l.stream.Send(m); err != nil {
					break // the reason comes with the next read
				}
			}
			if err := l.stream.CloseSend(); err != nil {
				t.Fatal(err)
			}
			err := l.end()
			if tt.want == "" {
				if err != nil {
					t.Errorf("the session ended with %v, want a good end", err)
				}
				return
			}
			wantReason(t, err, tt.want)
		})
	}
}

// TestWithoutAgentIdentity calls what needs an agent's SVID without one.
//
// threat: CVE-2020-7955, CVE-2025-44005
func TestWithoutAgentIdentity(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	key := newKey(t)
	item := n.item(s.Pod("shop", "web", "web", "node-1"))
	item.Csr = newCSR(t, key)
	web, err := n.session().issue(item)
	if err != nil {
		t.Fatal(err)
	}
	workload := *n
	workload.svid = svidOf(t, web.GetChain(), key)
	nobody := *n
	nobody.svid = nil
	for name, who := range map[string]*node{"no client certificate": &nobody, "a workload's SVID": &workload} {
		t.Run(name, func(t *testing.T) {
			client := apiv1.NewAuthorityClient(dial(t, s, who.svid))
			_, err := client.Issue(t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
			wantReason(t, api.FromStatus(err), api.AgentIdentityRequired)
			checkRefusal(t, api.FromStatus(err))
			_, err = who.connect(n.hello())
			wantReason(t, err, api.AgentIdentityRequired)
		})
	}
}

// TestNoSession refuses an agent that has its SVID and no session, also after its session has ended.
func TestNoSession(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	item := n.item(s.Pod("shop", "web", "web", "node-1"))
	client := apiv1.NewAuthorityClient(dial(t, s, n.svid))
	_, err := client.Issue(t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
	wantReason(t, api.FromStatus(err), api.SessionRequired)
	// Another node's session is of no use.
	other := newNode(t, s, "node-2").session()
	_, err = client.Issue(t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
	wantReason(t, api.FromStatus(err), api.SessionRequired)
	_, err = other.issue(item)
	wantReason(t, err, api.NodeMismatch)

	l := n.session()
	if _, err := l.issue(item); err != nil {
		t.Fatal(err)
	}
	// So is a session of the same node that was opened with another certificate: whoever got one for a forged node UID
	// cannot ride on it.
	again := newNode(t, s, "node-1")
	_, err = apiv1.NewAuthorityClient(dial(t, s, again.svid)).Issue(t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
	wantReason(t, api.FromStatus(err), api.SessionRequired)
	if err := l.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := l.end(); err != nil {
		t.Fatalf("a session that its agent ends: %v", err)
	}
	_, err = l.issue(item)
	wantReason(t, err, api.SessionRequired)
}

// strictDirectory is a ca.AgentFinder for which only these pods are agents, by name.
type strictDirectory struct {
	*catest.Directory
	agents map[string]bool
}

// CheckAgent implements ca.AgentFinder.
func (d strictDirectory) CheckAgent(_ context.Context, p ca.Pod) error {
	if !d.agents[p.Name] {
		return api.E(api.NotAnAgent, "the token belongs to a pod that the agents' DaemonSet does not control")
	}
	return nil
}

// TestAgentOfTheDaemonSet refuses a pod that runs under the agents' ServiceAccount and is none of theirs: it gets no SVID, and
// no session with another's.
//
// threat: B05
func TestAgentOfTheDaemonSet(t *testing.T) {
	s := start(t, catest.Options{Config: func(cfg *ca.Config) {
		cfg.Directory = strictDirectory{cfg.Directory.(*catest.Directory), map[string]bool{"signet-agent-node-1": true}}
	}})
	n := newNode(t, s, "node-1")
	n.session()

	stray := &node{t: t, s: s, pod: s.Pod(catest.AgentNS, "mole", catest.AgentSA, "node-1")}
	_, _, err := stray.attest(nil)
	wantReason(t, err, api.NotAnAgent)
	stray.svid = n.svid
	_, err = stray.connect(nil)
	wantReason(t, err, api.NotAnAgent)
	n.session()
}
