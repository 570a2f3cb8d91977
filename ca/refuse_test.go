package ca_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

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
//
// threat: A01, A02, A04, A06, A07, A08, A09, A10, A12, A13, A15, A16, A17, A24, C02, C17, C18, C19, C20, C21, CVE-2021-27098
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
		recorded bool // the token was signed by its cluster, so its refusal says whose it is
	}{
		// Who asks is not proven, but by the token of a pod that is known where its signature is good.
		{"an agent's token", func(a *asked) { a.item.Evidence = n.token(n.pod, api.AgentAudience(s.TD)) }, api.TokenAudience, true},
		{"a workload's token for agents", func(a *asked) { a.item.Evidence = n.token(a.pod, api.AgentAudience(s.TD)) }, api.TokenAudience, true},
		{"a token for the API server", func(a *asked) { a.item.Evidence = n.token(a.pod, "https://kubernetes.default.svc") }, api.TokenAudience, true},
		{"a token for another trust domain", func(a *asked) { a.item.Evidence = n.token(a.pod, "signet:other.org") }, api.TokenAudience, true},
		{"a token for a longer trust domain", func(a *asked) { a.item.Evidence = n.token(a.pod, workload+".evil") }, api.TokenAudience, true},
		{"two audiences", func(a *asked) { a.item.Evidence = token(a.pod, attestortest.Audiences(workload, "vault")) }, api.TokenAudienceNotExclusive, true},
		{"expired", func(a *asked) {
			a.item.Evidence = token(a.pod, attestortest.Claim("iat", time.Now().Add(-2*time.Hour).Unix()), attestortest.Claim("nbf", time.Now().Add(-2*time.Hour).Unix()),
				attestortest.Claim("exp", time.Now().Add(-time.Second).Unix()))
		}, api.TokenExpired, true},
		{"of a year", func(a *asked) { a.item.Evidence = proto(s.Evidence(a.pod, workload, 365*24*time.Hour)) }, api.TokenTTLTooLong, true},
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
			checkRecorded(t, s, before, err, tt.recorded)
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

// checkRecorded wants a refusal on record under its correlation id, once and whole, and nothing else since: of the pod where
// its token was believed, of the agent that asked in any case.
func checkRecorded(t *testing.T, s *catest.Server, before int, err error, attested bool) {
	t.Helper()
	e := api.AsError(err)
	all := ledgerOf(t, s)
	for _, r := range all[before:] {
		if r.Kind != audit.KindRefuse || r.Source != audit.SourceRefusals || r.CorrelationID != e.CorrelationID {
			t.Errorf("on record for what was refused: %+v", r)
		}
	}
	found := 0
	for _, r := range all {
		if r.CorrelationID != e.CorrelationID {
			continue
		}
		found++
		if r.Reason != string(e.Reason) || r.Detail == "" || r.Method == "" || (r.PodUID != "" && r.TokenID != "") != attested ||
			!strings.HasPrefix(r.Caller, "spiffe://example.org/signet/agent/") || r.CallerNodeUID == "" {
			t.Errorf("on record of %v: %+v", err, r)
		}
	}
	if found != 1 {
		t.Errorf("the refusal is on record %d times", found)
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
//
// threat: A23
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
//
// threat: A08
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
