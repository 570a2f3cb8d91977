package ca_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/audit"
)

const otherIssuer = "https://other.test"

// twoClusters makes the CA believe a second cluster too.
func twoClusters(t *testing.T) (*attestortest.Issuer, func(*ca.Config)) {
	t.Helper()
	other, err := attestortest.NewIssuer(attestortest.Config{Issuer: otherIssuer})
	if err != nil {
		t.Fatal(err)
	}
	return other, func(cfg *ca.Config) {
		first := cfg.Attestors[api.EvidenceServiceAccount]
		keys, err := attestor.StaticKeys(other.JWKS())
		if err != nil {
			t.Fatal(err)
		}
		second, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{otherIssuer: keys}})
		if err != nil {
			t.Fatal(err)
		}
		cfg.Attestors[api.EvidenceServiceAccount] = either{first, second}
	}
}

// either asks the second attestor where the first does not know the issuer.
type either struct{ first, second attestor.Attestor }

// Attest implements attestor.Attestor.
func (e either) Attest(ctx context.Context, ev attestor.Evidence, audience string, now time.Time) (attestor.Claims, error) {
	c, err := e.first.Attest(ctx, ev, audience, now)
	if api.ReasonOf(err) == api.IssuerUnknown {
		return e.second.Attest(ctx, ev, audience, now)
	}
	return c, err
}

// TestIssueRefuses asks for what must not be given; each row is one SVID that nobody may get.
func TestIssueRefuses(t *testing.T) {
	other, config := twoClusters(t)
	s := start(t, catest.Options{
		Policy: ca.PolicyFile{
			Namespaces: []string{"shop", "bank"},
			Rules:      []ca.PolicyRule{{Namespaces: []string{"bank"}, DNSNames: []string{"{serviceAccount}.{namespace}.svc"}}},
		},
		Config: config,
	})
	n := newNode(t, s, "node-1")
	l := n.session()
	workload := api.WorkloadAudience(s.TD)
	token := func(p attestortest.Pod, change ...func(*attestortest.Draft)) *apiv1.Evidence {
		return n.token(p, workload, change...)
	}
	held := newKey(t)
	if _, err := l.issue(&apiv1.IssueItem{Evidence: token(s.Pod("shop", "first", "first", "node-1")), Csr: newCSR(t, held)}); err != nil {
		t.Fatal(err)
	}

	type asked struct {
		pod  attestortest.Pod
		item *apiv1.IssueItem
	}
	tests := []struct {
		name     string
		change   func(*asked)
		want     api.Reason
		recorded bool // the caller was attested, so the refusal is in the ledger
	}{
		// Who asks is not proven.
		{"an agent's token", func(a *asked) { a.item.Evidence = n.token(n.pod, api.AgentAudience(s.TD)) }, api.TokenAudience, false},
		{"a workload's token for agents", func(a *asked) { a.item.Evidence = n.token(a.pod, api.AgentAudience(s.TD)) }, api.TokenAudience, false},
		{"a token for the API server", func(a *asked) { a.item.Evidence = n.token(a.pod, "https://kubernetes.default.svc") }, api.TokenAudience, false},
		{"a token for another trust domain", func(a *asked) { a.item.Evidence = n.token(a.pod, "signet:other.org") }, api.TokenAudience, false},
		{"a token for a longer trust domain", func(a *asked) { a.item.Evidence = n.token(a.pod, workload+".evil") }, api.TokenAudience, false},
		{"two audiences", func(a *asked) { a.item.Evidence = token(a.pod, attestortest.Audiences(workload, "vault")) }, api.TokenAudienceNotExclusive, false},
		{"expired", func(a *asked) {
			a.item.Evidence = token(a.pod, attestortest.Claim("iat", time.Now().Add(-2*time.Hour).Unix()), attestortest.Claim("nbf", time.Now().Add(-2*time.Hour).Unix()),
				attestortest.Claim("exp", time.Now().Add(-time.Second).Unix()))
		}, api.TokenExpired, false},
		{"of a year", func(a *asked) { a.item.Evidence = proto(s.Evidence(a.pod, workload, 365*24*time.Hour)) }, api.TokenTTLTooLong, false},
		{"unknown issuer", func(a *asked) { a.item.Evidence = token(a.pod, attestortest.Claim("iss", "https://evil.test")) }, api.IssuerUnknown, false},
		{"no node in the token", func(a *asked) {
			a.item.Evidence = token(a.pod, func(d *attestortest.Draft) { delete(d.Kubernetes(), "node") })
		}, api.NodeUnverifiable, false},
		{"not bound to a pod", func(a *asked) {
			a.item.Evidence = token(a.pod, func(d *attestortest.Draft) { delete(d.Kubernetes(), "pod") })
		}, api.TokenNotPodBound, false},
		{"changed after it was signed", func(a *asked) {
			last := &a.item.Evidence.Data[len(a.item.Evidence.Data)-20]
			if *last++; *last > 'Z' || *last < 'A' {
				*last = 'A'
			}
		}, api.TokenSignature, false},
		{"too large", func(a *asked) { a.item.Evidence.Data = bytes.Repeat([]byte("a"), api.MaxTokenBytes+1) }, api.TokenTooLarge, false},
		{"empty", func(a *asked) { a.item.Evidence.Data = nil }, api.TokenMissing, false},
		{"no evidence", func(a *asked) { a.item.Evidence = nil }, api.EvidenceKind, false},
		{"unknown evidence", func(a *asked) { a.item.Evidence.Kind = "x509" }, api.EvidenceKind, false},
		{"a volume's name without end", func(a *asked) { a.item.Volume = strings.Repeat("v", 257) }, api.TokenMalformed, false},

		// Who asks is proven and may not.
		{"a pod of another node", func(a *asked) { a.item.Evidence = token(s.Pod("shop", "far", "web", "node-2")) }, api.NodeMismatch, true},
		{"a node of the same name and another UID", func(a *asked) {
			a.pod.NodeUID = "00000000-0000-4000-8000-000000000000"
			s.Pods.Add(a.pod)
			a.item.Evidence = token(a.pod)
		}, api.NodeMismatch, true},
		{"a pod of another cluster", func(a *asked) {
			foreign, err := other.Token(a.pod, workload, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			a.item.Evidence.Data = []byte(foreign)
		}, api.IssuerMismatch, true},
		{"unknown pod", func(a *asked) { a.item.Evidence = token(attestortest.NewPod("shop", "ghost", "web", "node-1")) }, api.PodUnknown, true},
		{"pod that is gone", func(a *asked) { s.Pods.Remove(a.pod) }, api.PodUnknown, true},
		{"pod past its deletion", func(a *asked) {
			s.Pods.Change(a.pod, func(p *ca.Pod) { p.DeleteAt = time.Now().Add(-time.Second) })
		}, api.PodDeleted, true},
		{"pod that terminates, its first identity", func(a *asked) {
			s.Pods.Change(a.pod, func(p *ca.Pod) { p.DeleteAt = time.Now().Add(time.Hour) })
		}, api.PodDeleted, true},
		{"finished pod", func(a *asked) { s.Pods.Change(a.pod, func(p *ca.Pod) { p.Finished = true }) }, api.PodDeleted, true},
		{"pod of another name", func(a *asked) { s.Pods.Change(a.pod, func(p *ca.Pod) { p.Name = "web-2" }) }, api.PodMismatch, true},
		{"pod of another namespace", func(a *asked) { s.Pods.Change(a.pod, func(p *ca.Pod) { p.Namespace = "bank" }) }, api.PodMismatch, true},
		{"pod of another ServiceAccount", func(a *asked) { s.Pods.Change(a.pod, func(p *ca.Pod) { p.ServiceAccount = "root" }) }, api.PodMismatch, true},
		{"ServiceAccount made anew", func(a *asked) { s.Pods.Change(a.pod, func(p *ca.Pod) { p.ServiceAccountUID = "made-anew" }) }, api.PodMismatch, true},
		{"pod whose node was made anew", func(a *asked) { s.Pods.Change(a.pod, func(p *ca.Pod) { p.NodeUID = "made-anew" }) }, api.PodMismatch, true},
		{"pod of another UID", func(a *asked) { s.Pods.Change(a.pod, func(p *ca.Pod) { p.UID = "made-anew" }) }, api.PodMismatch, true},
		{"namespace not allowed", func(a *asked) { a.item.Evidence = token(s.Pod("dev", "web", "web", "node-1")) }, api.NamespaceNotAllowed, true},
		{"namespace that only begins like one", func(a *asked) { a.item.Evidence = token(s.Pod("shop2", "web", "web", "node-1")) }, api.NamespaceNotAllowed, true},
		{"ServiceAccount that would be two DNS labels", func(a *asked) { a.item.Evidence = token(s.Pod("bank", "web", "a.b", "node-1")) }, api.DNSNameRefused, true},
		{"ServiceAccount too long for a DNS label", func(a *asked) {
			a.item.Evidence = token(s.Pod("bank", "web", strings.Repeat("a", 64), "node-1"))
		}, api.DNSNameRefused, true},

		// What is asked for is wrong.
		{"no request", func(a *asked) { a.item.Csr = nil }, api.CSRMalformed, true},
		{"request too large", func(a *asked) { a.item.Csr = make([]byte, api.MaxCSRBytes+1) }, api.CSRTooLarge, true},
		{"request with something behind it", func(a *asked) { a.item.Csr = append(a.item.Csr, 0) }, api.CSRMalformed, true},
		{"request that was changed", func(a *asked) { a.item.Csr[len(a.item.Csr)-1] ^= 1 }, api.CSRSignature, true},
		{"another identity", func(a *asked) { a.item.Csr = newCSR(t, newKey(t), withURI(t, "spiffe://example.org/ns/shop/sa/db")) }, api.IDMismatch, true},
		{"another trust domain", func(a *asked) { a.item.Csr = newCSR(t, newKey(t), withURI(t, "spiffe://other.org/ns/shop/sa/web")) }, api.IDMismatch, true},
		{"an agent's identity", func(a *asked) {
			a.item.Csr = newCSR(t, newKey(t), withURI(t, "spiffe://example.org/signet/agent/"+n.pod.NodeUID))
		}, api.IDMismatch, true},
		{"a replica's identity", func(a *asked) { a.item.Csr = newCSR(t, newKey(t), withURI(t, "spiffe://example.org/signet/ca/ca-0")) }, api.IDMismatch, true},
		{"an admin's identity", func(a *asked) {
			a.item.Csr = newCSR(t, newKey(t), withURI(t, "spiffe://example.org/signet/admin/root"))
		}, api.IDMismatch, true},
		{"a DNS name", func(a *asked) {
			a.item.Csr = newCSR(t, newKey(t), func(r *x509.CertificateRequest) { r.DNSNames = []string{"db.bank.svc"} })
		}, api.CSRExtraSAN, true},
		{"two identities", func(a *asked) {
			a.item.Csr = newCSR(t, newKey(t), withURI(t, "spiffe://example.org/ns/shop/sa/web"), withURI(t, "spiffe://example.org/ns/shop/sa/db"))
		}, api.CSRURICount, true},
		{"the key of another identity", func(a *asked) { a.item.Csr = newCSR(t, held) }, api.KeyReused, true},
		{"the key of the agent", func(a *asked) { a.item.Csr = newCSR(t, n.svid.PrivateKey) }, api.KeyReused, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := s.Pod("shop", "web", "web", "node-1")
			a := asked{p, n.item(p)}
			tt.change(&a)
			before := len(ledgerOf(t, s))
			svid, err := l.issue(a.item)
			wantReason(t, err, tt.want)
			if svid != nil {
				t.Error("an SVID came with the refusal")
			}
			checkRefusal(t, err, a.item.GetEvidence().GetData())
			checkRecorded(t, ledgerOf(t, s)[before:], err, tt.recorded)
		})
	}
}

// checkRefusal wants a correlation id and a text that gives nothing away.
func checkRefusal(t *testing.T, err error, secrets ...[]byte) {
	t.Helper()
	e, ok := errors.AsType[*api.Error](err)
	if !ok || len(e.CorrelationID) != 16 {
		t.Fatalf("the refusal has no correlation id: %v", err)
	}
	if e.Detail == "" || len(e.Detail) > 300 {
		t.Errorf("the refusal's text is %q", e.Detail)
	}
	for _, secret := range secrets {
		for part := range bytes.SplitSeq(secret, []byte(".")) {
			if len(part) > 8 && strings.Contains(e.Detail, string(part[:8])) {
				t.Errorf("the refusal tells of the token: %q", e.Detail)
			}
		}
	}
}

// checkRecorded wants a refusal of an attested caller in the ledger under its correlation id, and no other.
func checkRecorded(t *testing.T, fresh []audit.Record, err error, want bool) {
	t.Helper()
	e := api.AsError(err)
	found := 0
	for _, r := range fresh {
		if r.Kind != audit.KindRefuse {
			t.Errorf("the ledger has an entry of kind %s for what was refused", r.Kind)
		}
		if r.CorrelationID == e.CorrelationID && r.Reason == string(e.Reason) && r.PodUID != "" && r.TokenID != "" {
			found++
		}
	}
	if (found == 1) != want || len(fresh) > 1 {
		t.Errorf("%d of %d new entries are the refusal's, want it recorded: %v", found, len(fresh), want)
	}
}

// TestDirectoryAway refuses everything that needs to know whether a pod lives.
func TestDirectoryAway(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	l := n.session()
	p := s.Pod("shop", "web", "web", "node-1")
	s.Pods.Fail(api.E(api.DirectoryUnavailable, "the watch is cut"))
	_, err := l.issue(n.item(p))
	wantReason(t, err, api.DirectoryUnavailable)
	_, _, err = n.attest(nil)
	wantReason(t, err, api.DirectoryUnavailable)
	_, err = n.connect(nil)
	wantReason(t, err, api.DirectoryUnavailable)
	s.Pods.Fail(nil)
	if _, err := l.issue(n.item(p)); err != nil {
		t.Errorf("the directory is back, and yet: %v", err)
	}
}

// TestReplay serves a token for one volume of one node, as often as it is asked for there, and nowhere else.
func TestReplay(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	l := n.session()
	item := n.item(s.Pod("shop", "web", "web", "node-1"))
	for range 2 {
		item.Csr = newCSR(t, newKey(t))
		if _, err := l.issue(item); err != nil {
			t.Fatalf("a renewal with the same token: %v", err)
		}
	}
	item.Csr, item.Volume = newCSR(t, newKey(t)), "another"
	_, err := l.issue(item)
	wantReason(t, err, api.TokenReplayedElsewhere)
	item.Volume = ""
	_, err = l.issue(item)
	wantReason(t, err, api.TokenReplayedElsewhere)
}

// TestTerminating renews what a pod holds until its deletion time, and nothing after it.
func TestTerminating(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	l := n.session()
	p := s.Pod("shop", "web", "web", "node-1")
	if _, err := l.issue(n.item(p)); err != nil {
		t.Fatal(err)
	}
	s.Pods.Change(p, func(p *ca.Pod) { p.DeleteAt = time.Now().Add(time.Hour) })
	if _, err := l.issue(n.item(p)); err != nil {
		t.Errorf("a pod that terminates could not renew: %v", err)
	}
	s.Pods.Change(p, func(p *ca.Pod) { p.DeleteAt = time.Now() })
	_, err := l.issue(n.item(p))
	wantReason(t, err, api.PodDeleted)
}

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
			_, err := n.connect(tt.first(n))
			wantReason(t, err, tt.want)
			checkRefusal(t, err)
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
	if err := l.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := l.end(); err != nil {
		t.Fatalf("a session that its agent ends: %v", err)
	}
	_, err = l.issue(item)
	wantReason(t, err, api.SessionRequired)
}

// TestBatch answers each request of a call on its own, in order.
func TestBatch(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	l := n.session()
	call := func(items []*apiv1.IssueItem) ([]*apiv1.IssueResult, error) {
		resp, err := l.client.Issue(t.Context(), &apiv1.IssueRequest{Items: items})
		return resp.GetResults(), api.FromStatus(err)
	}
	_, err := call(nil)
	wantReason(t, err, api.BatchSize)
	var items []*apiv1.IssueItem
	for i := range api.MaxBatch + 1 {
		p := s.Pod("shop", fmt.Sprint("web-", i), fmt.Sprint("web-", i), "node-1")
		item := n.item(p)
		if i%3 == 2 {
			s.Pods.Remove(p)
		}
		items = append(items, item)
	}
	before := len(ledgerOf(t, s))
	_, err = call(items)
	wantReason(t, err, api.BatchSize)
	if after := len(ledgerOf(t, s)); after != before {
		t.Errorf("%d entries for a batch that was refused as a whole", after-before)
	}
	results, err := call(items[:api.MaxBatch])
	if err != nil || len(results) != api.MaxBatch {
		t.Fatalf("%d results (%v), want %d", len(results), err, api.MaxBatch)
	}
	for i, r := range results {
		if i%3 == 2 {
			wantReason(t, refusal(r), api.PodUnknown)
			continue
		}
		if want := fmt.Sprintf("spiffe://example.org/ns/shop/sa/web-%d", i); r.GetSvid().GetSpiffeId() != want {
			t.Errorf("result %d is %q (%v), want %q", i, r.GetSvid().GetSpiffeId(), refusal(r), want)
		}
	}
}

// TestPanic contains a panic to the request that caused it.
func TestPanic(t *testing.T) {
	const bomb = "bomb"
	s := start(t, catest.Options{Config: func(cfg *ca.Config) {
		hook(cfg, func(_ context.Context, e attestor.Evidence) {
			if string(e.Data) == bomb {
				panic("the attestor's own fault")
			}
		})
	}})
	n := newNode(t, s, "node-1")
	l := n.session()
	good := n.item(s.Pod("shop", "web", "web", "node-1"))
	bad := &apiv1.IssueItem{Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(bomb)}}
	for range 20 { // no turn is lost either
		resp, err := l.client.Issue(t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{bad, good, bad}})
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range resp.GetResults() {
			if i == 1 {
				if r.GetSvid() == nil {
					t.Fatalf("a neighbour's panic cost an SVID: %v", refusal(r))
				}
				continue
			}
			wantReason(t, refusal(r), api.Internal)
			if text := r.GetRefusal().GetMessage(); strings.Contains(text, "fault") {
				t.Errorf("the refusal tells of the panic: %q", text)
			}
		}
	}
	_, err := l.issue(bad)
	wantReason(t, err, api.Internal)
	_, _, err = n.attest(func(r *apiv1.AttestAgentRequest) { r.Evidence = bad.GetEvidence() })
	wantReason(t, err, api.Internal)
	_, err = n.connect(helloWith(&apiv1.Hello{Protocol: api.Protocol, Evidence: bad.GetEvidence()}))
	wantReason(t, err, api.Internal)
	if _, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1"))); err != nil {
		t.Errorf("after the panics: %v", err)
	}
}

// TestOverload sends away at once whoever finds no place to wait.
func TestOverload(t *testing.T) {
	gate := newBlocker()
	s := start(t, catest.Options{Config: func(cfg *ca.Config) {
		cfg.Concurrent, cfg.Queue = 1, 1
		hook(cfg, gate.attest)
	}})
	n := newNode(t, s, "node-1")
	l := n.session()
	type answer struct {
		svid *apiv1.SVID
		err  error
	}
	answers := make(chan answer, 3)
	ask := func(item *apiv1.IssueItem) {
		svid, err := l.issue(item)
		answers <- answer{svid, err}
	}
	go ask(&apiv1.IssueItem{Evidence: gate.evidence()})
	<-gate.entered
	for range 2 { // one finds a place to wait
		go ask(n.item(s.Pod("shop", "web", "web", "node-1")))
	}
	wantReason(t, (<-answers).err, api.Overloaded)
	close(gate.release)
	for range 2 {
		if a := <-answers; a.svid == nil && api.ReasonOf(a.err) != api.TokenMalformed {
			t.Errorf("after the rush: %v", a.err)
		}
	}
}

// TestKnocking lets nobody who has no SVID yet take a place from those who have one.
func TestKnocking(t *testing.T) {
	gate := newBlocker()
	s := start(t, catest.Options{Config: func(cfg *ca.Config) {
		cfg.Concurrent, cfg.Queue = 1, 1
		hook(cfg, gate.attest)
	}})
	n := newNode(t, s, "node-1")
	l := n.session()
	const crowd = 8 * 50
	knocks := make(chan error, crowd)
	for range 8 {
		client := apiv1.NewAuthorityClient(dial(t, s, nil))
		for range crowd / 8 {
			go func() {
				r := &apiv1.AttestAgentRequest{Evidence: gate.evidence(), Protocol: api.Protocol}
				_, err := client.AttestAgent(t.Context(), r)
				knocks <- api.FromStatus(err)
			}()
		}
	}
	err := <-knocks // as long as nobody is let go, whoever has an answer was sent away
	wantReason(t, err, api.Overloaded)
	if api.AsError(err).RetryAfter <= 0 {
		t.Error("who is sent away is not told when to come back")
	}
	if _, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1"))); err != nil {
		t.Errorf("a crowd at the door cost an agent with a session its SVID: %v", err)
	}
	close(gate.release)
	for range crowd - 1 {
		if r := api.ReasonOf(<-knocks); r != api.Overloaded && r != api.TokenMalformed {
			t.Fatalf("refused with %s", r)
		}
	}
	if _, _, err := n.attest(nil); err != nil {
		t.Errorf("after the rush: %v", err)
	}
}

// blocker holds every attestation of its own evidence until it is released.
type blocker struct{ entered, release chan struct{} }

func newBlocker() *blocker {
	return &blocker{entered: make(chan struct{}, 1024), release: make(chan struct{})}
}

func (*blocker) evidence() *apiv1.Evidence {
	return &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte("slow")}
}

func (b *blocker) attest(_ context.Context, e attestor.Evidence) {
	if string(e.Data) == "slow" {
		b.entered <- struct{}{}
		<-b.release
	}
}

// TestMessageTooLarge ends a call or a session whose message is beyond what a full batch can have.
func TestMessageTooLarge(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	l := n.session()
	_, err := l.client.Issue(t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{{Csr: make([]byte, 4<<20)}}})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a request without end: %v", err)
	}
	if err := l.stream.Send(report(&apiv1.Report{BundleHash: make([]byte, 4<<20)})); err != nil {
		t.Fatal(err)
	}
	if code := status.Code(errors.Unwrap(l.end())); code != codes.ResourceExhausted {
		t.Errorf("a report without end: %v", code)
	}
	full := make([]*apiv1.IssueItem, api.MaxBatch)
	for i := range full {
		full[i] = &apiv1.IssueItem{Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: make([]byte, api.MaxTokenBytes)}, Csr: make([]byte, api.MaxCSRBytes)}
	}
	resp, err := n.session().client.Issue(t.Context(), &apiv1.IssueRequest{Items: full})
	if err != nil || len(resp.GetResults()) != len(full) {
		t.Errorf("a batch as large as may be: %d results (%v)", len(resp.GetResults()), err)
	}
}

// TestForeignCalls answers a call that is not there without a fault of ours in the log.
func TestForeignCalls(t *testing.T) {
	var log bytes.Buffer
	s := start(t, catest.Options{Log: &log})
	conn := dial(t, s, nil)
	err := conn.Invoke(t.Context(), "/signet.v1.Authority/Nothing", &apiv1.IssueRequest{}, &apiv1.IssueResponse{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("an unknown call: %v", err)
	}
	err = conn.Invoke(t.Context(), "/signet.v1.Admin/GetStatus", &apiv1.GetStatusRequest{}, &apiv1.GetStatusResponse{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("the admin service on the agents' port: %v", err)
	}
	big := &apiv1.IssueRequest{Items: []*apiv1.IssueItem{{Csr: make([]byte, 4<<20)}}}
	err = conn.Invoke(t.Context(), "/signet.v1.Authority/Issue", big, &apiv1.IssueResponse{}, grpc.MaxCallSendMsgSize(8<<20))
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a message without end: %v", err)
	}
	s.Stop()
	if strings.Contains(log.String(), "level=ERROR") {
		t.Errorf("strangers cause errors of ours:\n%s", log.String())
	}
}
