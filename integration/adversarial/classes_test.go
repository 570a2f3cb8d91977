package adversarial

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca/catest"
)

// workload returns the SVID of the rig's workload, as its proxy holds it.
func (r *rig) workload() *x509svid.SVID {
	r.t.Helper()
	resp, err := r.agent.Issue(r.t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{r.item(r.token())}})
	if err != nil || resp.GetResults()[0].GetSvid() == nil {
		r.t.Fatalf("no SVID: %v, %v", resp, err)
	}
	return svidOf(r.t, resp.GetResults()[0].GetSvid().GetChain(), r.key)
}

// A workload makes itself an authority: its own SVID signs one of an agent, with the name and the key id of the
// intermediate or with its own, and the true chain behind it.
//
// threat: CVE-2025-6037
func TestLeafAsAuthority(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		web := r.workload()
		id, err := api.AgentID(r.TD, r.agentPod.NodeUID)
		if err != nil {
			t.Fatal(err)
		}
		before := r.ledger.issued()
		for name, keyID := range sorted(map[string][]byte{"key id of the leaf": web.Certificates[0].SubjectKeyId, "key id of the intermediate": web.Certificates[1].SubjectKeyId}) {
			for parentName, parent := range sorted(map[string]*x509.Certificate{"leaf": web.Certificates[0], "intermediate": web.Certificates[1]}) {
				key := newKey(t)
				u, err := url.Parse(id.String())
				if err != nil {
					t.Fatal(err)
				}
				der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
					SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{u},
					KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true, AuthorityKeyId: keyID,
				}, &x509.Certificate{RawSubject: parent.RawSubject, SubjectKeyId: keyID, PublicKey: r.key.Public()}, key.Public(), r.key)
				if err != nil {
					t.Fatal(err)
				}
				forged, err := x509.ParseCertificate(der)
				if err != nil {
					t.Fatal(err)
				}
				chain := append([]*x509.Certificate{forged}, web.Certificates...)
				client := apiv1.NewAuthorityClient(r.dial(&x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}))
				_, err = client.Issue(t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{r.item(r.token())}})
				if status.Code(err) != codes.Unavailable { // the handshake failed: there is nobody to give a reason
					t.Errorf("%s, issued by %s: %v", name, parentName, err)
				}
			}
		}
		if r.ledger.issued() != before {
			t.Error("something was issued")
		}
	})
}

// An SVID of any other role is none of an agent: a workload's, with every token that it can lay hands on; nor is no SVID.
//
// threat: CVE-2020-7955, CVE-2025-44005
func TestRoles(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		evidence := wire(r.Evidence(r.agentPod, api.AgentAudience(r.TD), time.Hour))
		for name, svid := range sorted(map[string]*x509svid.SVID{"a workload": r.workload(), "nobody": nil}) {
			client := apiv1.NewAuthorityClient(r.dial(svid))
			before := r.ledger.issued()
			_, err := client.Issue(t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{r.item(r.token())}})
			if a := r.statusOf(name, err); a.reason != api.AgentIdentityRequired {
				t.Errorf("%s asks for an SVID: %v", name, err)
			}
			stream, err := client.Session(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Hello{Hello: &apiv1.Hello{Protocol: api.Protocol, Evidence: evidence}}})
			if _, err = stream.Recv(); err == nil {
				t.Errorf("%s has a session", name)
			} else if a := r.statusOf(name, err); a.reason != api.AgentIdentityRequired {
				t.Errorf("%s asks for a session: %v", name, err)
			}
			if r.ledger.issued() != before {
				t.Errorf("something was issued to %s", name)
			}
		}
	})
}

// A renewal is a first issue once more: it follows from the token that comes with it, and the SVID, the session or the key
// of somebody else adds nothing to it.
//
// threat: B01, CVE-2026-39388
func TestRenewalByAnother(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		neighbour, its := r.Pod(stranger, "db-0", "db", here), newKey(t)
		theirs := func() *apiv1.IssueItem {
			return r.item(r.Evidence(neighbour, api.WorkloadAudience(r.TD), time.Hour).Data)
		}
		db := "spiffe://example.org/ns/" + stranger + "/sa/db"
		item := theirs()
		item.Csr = newCSR(t, its)
		r.ask(variant{row: "B01", name: "the neighbour's first", item: item, is: db, key: its.Public()})
		r.ask(variant{row: "B01", name: "the workload's first", item: r.item(r.token())})
		r.ask(variant{row: "B01", name: "the neighbour's token, the workload's key", item: theirs(), want: one(api.KeyReused)})
		item = r.item(r.token())
		item.Csr = newCSR(t, its)
		r.ask(variant{row: "B01", name: "the workload's token, the neighbour's key", item: item, want: one(api.KeyReused)})
		item = r.item(r.token())
		item.Csr = request(t, r.key, extensions(san(general(6, db))))
		r.ask(variant{row: "B01", name: "the workload's token, the neighbour's name", item: item, want: one(api.IDMismatch)})

		// An agent's SVID with the token of another node's agent opens no session.
		far := r.AgentPod("node-2")
		svid, _ := r.newAgent(far)
		client := apiv1.NewAuthorityClient(r.dial(svid))
		stream, err := client.Session(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		hello := &apiv1.Hello{Protocol: api.Protocol, Evidence: wire(r.Evidence(r.agentPod, api.AgentAudience(r.TD), time.Hour))}
		stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Hello{Hello: hello}})
		if _, err := stream.Recv(); err == nil {
			t.Error("an agent has a session with the token of another")
		} else if a := r.statusOf("another's token", err); a.reason != api.NodeMismatch {
			t.Errorf("refused with %s (%s), want %s", a.reason, a.text, api.NodeMismatch)
		}
	})
}

// PEM without end is refused at once, whatever it holds: nothing here reads it.
//
// threat: C24, CVE-2024-12401
func TestPEM(t *testing.T) {
	withCSRs(t, 12, func(t *testing.T, a csrAsker) {
		start := time.Now()
		for _, line := range []string{"-----BEGIN ", "-----BEGIN A-----\n", "-----END A-----\n", "-----BEGIN A-----\nA: b\n", "----------", "\n"} {
			for _, n := range []int{api.MaxCSRBytes / len(line), 1 << 20 / len(line)} {
				a.ask("C24", clip(line), bytes.Repeat([]byte(line), n), "", api.CSRMalformed, api.CSRTooLarge)
			}
		}
		if d := time.Since(start); d > 0 { // the clock stands still while somebody works
			t.Errorf("somebody waited for %s", d)
		}
	})
}

// Pods and nodes of names that Kubernetes would never give: they are part of no SPIFFE ID, but of records and logs.
//
// threat: A18, CVE-2021-41803
func TestNamesReachNobody(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		for what, s := range sorted(impossible()) {
			for _, place := range []string{"pod", "node"} {
				pod := attestortest.NewPod("shop", "web-x", "web", here)
				if place == "pod" {
					pod.Name = "web" + s + "x"
				} else {
					pod.NodeName = here + s + "x"
				}
				r.Pods.Add(pod)
				want := []api.Reason{api.SubjectMalformed}
				r.ask(variant{row: "A18", name: place + " with " + what, item: r.item(r.Evidence(pod, api.WorkloadAudience(r.TD), time.Hour).Data), want: want})
			}
		}
	})
}
