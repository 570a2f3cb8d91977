package ca_test

import (
	"crypto"
	"crypto/rand"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/audit"
)

// holder is a workload that holds an SVID, as its agent has it.
type holder struct {
	n     *node
	l     *link
	pod   attestortest.Pod
	key   crypto.Signer
	svid  *apiv1.SVID
	token *apiv1.Evidence
}

// graced is a CA with a grace of four hours whose agents' sessions outlast a test.
func graced(change ...func(*ca.Config)) catest.Options {
	return catest.Options{Config: func(c *ca.Config) {
		c.Grace, c.AgentTTL, c.SessionAge = 4*time.Hour, 24*time.Hour, 24*time.Hour
		for _, f := range change {
			f(c)
		}
	}}
}

// hold gives a pod its first SVID, on a token of an hour.
func hold(t *testing.T, n *node, l *link, name string) *holder {
	t.Helper()
	h := &holder{n: n, l: l, pod: n.s.Pod("shop", name, "web", n.pod.NodeName), key: newKey(t)}
	h.token = n.token(h.pod, api.WorkloadAudience(n.s.TD))
	item := &apiv1.IssueItem{Evidence: h.token, Csr: newCSR(t, h.key), Volume: "csi"}
	svid, err := l.issue(item)
	if err != nil {
		t.Fatalf("no first SVID: %v", err)
	}
	if len(svid.GetTicket()) == 0 {
		t.Fatal("an SVID without a ticket")
	}
	h.svid = svid
	return h
}

// renewal is a good request to renew what is held, for a new key.
func (h *holder) renewal(key crypto.Signer) *apiv1.IssueItem {
	h.n.t.Helper()
	csr := newCSR(h.n.t, key)
	return &apiv1.IssueItem{Evidence: h.token, Csr: csr, Volume: "csi", Renewal: h.proof(csr, h.key)}
}

// proof is what renews the SVID of h for a request, signed by some key.
func (h *holder) proof(csr []byte, key crypto.Signer) *apiv1.Renewal {
	h.n.t.Helper()
	digest := api.RenewalDigest(h.svid.GetTicket(), csr)
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		h.n.t.Fatal(err)
	}
	return &apiv1.Renewal{Ticket: h.svid.GetTicket(), Chain: h.svid.GetChain(), Possession: signature}
}

// renew renews what is held, and holds what came.
func (h *holder) renew() error {
	h.n.t.Helper()
	key := newKey(h.n.t)
	svid, err := h.l.issue(h.renewal(key))
	if err == nil {
		h.key, h.svid = key, svid
	}
	return err
}

// The API server is away for three hours, and tokens live one: known workloads are renewed all the time, and each renewal is
// marked; a new pod waits, and whatever is not known has its reason. After its return nothing is left of it.
//
// threat: G03, G04
func TestKnownRenewal(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, graced())
		n := newNode(t, s, "node-1")
		l := n.session()
		h := hold(t, n, l, "web-0")
		time.Sleep(30 * time.Minute)
		wantOutcome(t, l2(l.issue(h.renewal(newKey(t)))), "") // while it is there the ticket is not asked for

		s.Pods.Lose()
		wantReason(t, h.renew(), api.DirectoryUnavailable) // not yet away
		lost := time.Now()
		renewed := 0
		for time.Since(lost) < 3*time.Hour {
			time.Sleep(20 * time.Minute)
			if err := h.renew(); err != nil {
				t.Fatalf("%s after the loss: %v", time.Since(lost), err)
			}
			renewed++
			wantReason(t, l2(l.issue(noRenewal(h.renewal(newKey(t))))), whenLost(time.Since(lost) < 30*time.Minute))
			stranger := s.Pod("shop", "new", "web", "node-1")
			wantReason(t, l2(l.issue(n.item(stranger))), api.DirectoryUnavailable)
		}
		if got := counted(t, s, "signet_ca_grace_renewals_total", "workload"); got != float64(renewed) {
			t.Errorf("counted %v renewals, want %d", got, renewed)
		}
		if got := counted(t, s, "signet_ca_cluster_away_seconds", catest.IssuerName); got < 10790 || got > 10830 {
			t.Errorf("away for %v seconds by the metric", got)
		}
		wantMarks(t, s, h, renewed)

		s.Pods.Fail(nil)
		wantReason(t, h.renew(), api.TokenExpired) // an expired token is worth nothing from the first moment on
		h.token = n.token(h.pod, api.WorkloadAudience(s.TD))
		if err := h.renew(); err != nil {
			t.Errorf("after its return: %v", err)
		}
		wantMarks(t, s, h, renewed)
		time.Sleep(10 * time.Second)
		if got := counted(t, s, "signet_ca_cluster_away_seconds", catest.IssuerName); got != 0 {
			t.Errorf("away for %v seconds by the metric, after its return", got)
		}
	})
}

// whenLost is how a request without a ticket is refused, while its token is good and after.
func whenLost(good bool) api.Reason {
	if good {
		return api.DirectoryUnavailable
	}
	return api.TokenExpired
}

func noRenewal(item *apiv1.IssueItem) *apiv1.IssueItem {
	item.Renewal = nil
	return item
}

func l2(_ *apiv1.SVID, err error) error { return err }

// wantOutcome is wantReason, and with an empty reason wants that nothing was refused.
func wantOutcome(t *testing.T, err error, want api.Reason) {
	t.Helper()
	if want != "" {
		wantReason(t, err, want)
	} else if err != nil {
		t.Fatalf("refused: %v", err)
	}
}

// checkOutcome is wantOutcome for a row of a table in a bubble.
func checkOutcome(t *testing.T, name string, err error, want api.Reason) {
	t.Helper()
	if err == nil && want != "" || err != nil && api.ReasonOf(err) != want {
		t.Errorf("%s: %v, want %q", name, err, want)
	}
}

// again has the key certified once more, on the token that h has now.
func (h *holder) again() {
	h.n.t.Helper()
	svid, err := h.l.issue(&apiv1.IssueItem{Evidence: h.token, Csr: newCSR(h.n.t, h.key), Volume: "csi"})
	if err != nil {
		h.n.t.Fatal(err)
	}
	h.svid = svid
}

// tokenFor is a workload's token of another life than an hour.
func (n *node) tokenFor(p attestortest.Pod, ttl time.Duration) *apiv1.Evidence {
	n.t.Helper()
	return proto(n.s.Evidence(p, api.WorkloadAudience(n.s.TD), ttl))
}

// forged is a token of a pod by another issuer of the same name.
func forged(t *testing.T, s *catest.Server, p attestortest.Pod) *apiv1.Evidence {
	t.Helper()
	foreign, err := attestortest.NewIssuer(attestortest.Config{Issuer: catest.IssuerName})
	if err != nil {
		t.Fatal(err)
	}
	token, err := foreign.Token(p, api.WorkloadAudience(s.TD), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(token)}
}

// wantMarks wants so many issuances with a mark on record, the last of them of what is held now or was before.
func wantMarks(t *testing.T, s *catest.Server, h *holder, want int) {
	t.Helper()
	marked := 0
	for _, r := range ledgerOf(t, s) {
		if r.Kind != audit.KindIssue && r.Kind != audit.KindAttestAgent || !r.Grace {
			continue
		}
		marked++
		if r.PodUID != h.pod.UID || r.Detail == "" || r.Serial == "" {
			t.Errorf("marked: %+v", r.Entry)
		}
	}
	if marked != want {
		t.Errorf("%d issuances are marked, want %d", marked, want)
	}
}

// counted is the value of a metric with that label.
func counted(t *testing.T, s *catest.Server, name, label string) float64 {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(s.CA().Metrics()); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	t.Errorf("there is no %s of %s", name, label)
	return 0
}

// Every condition of the rule, violated alone, has its own reason.
//
// threat: G03
func TestKnownRenewalRefused(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, graced())
		n := newNode(t, s, "node-1")
		l := n.session()
		h, other := hold(t, n, l, "web-0"), hold(t, n, l, "web-1")
		elsewhere := newNode(t, s, "node-2")
		far := elsewhere.session()
		deleted, finished, ends, ended := hold(t, n, l, "deleted"), hold(t, n, l, "finished"), hold(t, n, l, "ends"), hold(t, n, l, "ended")
		unseen, moved, lostNode := hold(t, n, l, "unseen"), hold(t, n, l, "moved"), hold(t, n, l, "lost-node")
		late := hold(t, n, l, "late") // its token expires before the loss
		late.token = n.tokenFor(late.pod, 10*time.Minute)
		late.again()
		expired := hold(t, n, l, "expired")
		time.Sleep(20 * time.Minute)
		s.Pods.Remove(deleted.pod)
		s.Pods.Change(finished.pod, func(p *ca.Pod) { p.Finished = true })
		s.Pods.Change(ends.pod, func(p *ca.Pod) { p.DeleteAt = time.Now().Add(time.Hour) })
		s.Pods.Change(ended.pod, func(p *ca.Pod) { p.DeleteAt = time.Now().Add(time.Second) })
		s.Pods.Change(moved.pod, func(p *ca.Pod) { p.NodeUID = "another" })
		s.Pods.Change(lostNode.pod, func(p *ca.Pod) { p.ServiceAccountUID = "another" })
		for _, x := range []*holder{h, other, ends, unseen} {
			x.token = n.token(x.pod, api.WorkloadAudience(s.TD))
			x.again()
		}
		time.Sleep(time.Minute)
		s.Pods.Lose()
		time.Sleep(30 * time.Second)
		s.Pods.Remove(unseen.pod) // nobody hears of it

		byTheOther := n.token(h.pod, api.WorkloadAudience(s.TD)) // of its stream on the shared socket
		type change = func(*apiv1.IssueItem)
		with := func(h *holder, f change) *apiv1.IssueItem {
			item := h.renewal(newKey(t))
			if f != nil {
				f(item)
			}
			return item
		}
		for _, tt := range []struct {
			name string
			item *apiv1.IssueItem
			want api.Reason // empty: renewed
		}{
			{"all is well", with(h, nil), ""},
			{"a pod that is being deleted", with(ends, nil), ""},
			{"a deletion that nobody has heard of", with(unseen, nil), ""},
			{"no ticket", with(h, func(i *apiv1.IssueItem) { i.Renewal.Ticket = nil }), api.DirectoryUnavailable},
			{"nothing shown", with(h, func(i *apiv1.IssueItem) { i.Renewal = nil }), api.DirectoryUnavailable},
			{"a ticket that was changed", with(h, func(i *apiv1.IssueItem) {
				i.Renewal.Ticket = slices.Clone(i.Renewal.Ticket)
				i.Renewal.Ticket[40]++
			}), api.TicketInvalid},
			{"a ticket without end", with(h, func(i *apiv1.IssueItem) { i.Renewal.Ticket = make([]byte, 100<<10) }), api.TicketInvalid},
			{"the ticket of another pod", with(h, func(i *apiv1.IssueItem) { i.Renewal = other.proof(i.Csr, other.key) }), api.TicketMismatch},
			{"the ticket of another pod with its own SVID", with(h, func(i *apiv1.IssueItem) { i.Renewal.Ticket = other.svid.GetTicket() }), api.TicketMismatch},
			{"the token of another pod", with(h, func(i *apiv1.IssueItem) { i.Evidence = other.token }), api.TicketMismatch},
			{"another volume", with(h, func(i *apiv1.IssueItem) { i.Volume = "shared" }), api.TicketMismatch},
			{"a token of the other door", with(h, func(i *apiv1.IssueItem) { i.Evidence, i.Volume = byTheOther, "shared" }), ""},
			{"that token by this one", with(h, func(i *apiv1.IssueItem) { i.Evidence = byTheOther }), api.TokenReplayedElsewhere},
			{"an earlier token of the pod", with(h, func(i *apiv1.IssueItem) {
				i.Evidence = n.token(h.pod, api.WorkloadAudience(s.TD), attestortest.Claim("iat", time.Now().Add(-50*time.Minute).Unix()))
			}), api.TicketMismatch},
			{"no SVID", with(h, func(i *apiv1.IssueItem) { i.Renewal.Chain = nil }), api.HeldSVIDInvalid},
			{"no intermediate", with(h, func(i *apiv1.IssueItem) { i.Renewal.Chain = i.Renewal.Chain[:1] }), api.HeldSVIDInvalid},
			{"an SVID that is none", with(h, func(i *apiv1.IssueItem) { i.Renewal.Chain = [][]byte{{0x30, 0}} }), api.HeldSVIDInvalid},
			{"a chain without end", with(h, func(i *apiv1.IssueItem) { i.Renewal.Chain = slices.Repeat(i.Renewal.Chain, 20) }), api.HeldSVIDInvalid},
			{"another SVID of the same identity", with(h, func(i *apiv1.IssueItem) { i.Renewal.Chain = other.svid.GetChain() }), api.TicketMismatch},
			{"a thief without the key", with(h, func(i *apiv1.IssueItem) { i.Renewal = h.proof(i.Csr, newKey(t)) }), api.PossessionUnproven},
			{"the new key alone", func() *apiv1.IssueItem {
				key := newKey(t)
				return with(h, func(i *apiv1.IssueItem) { i.Csr = newCSR(t, key); i.Renewal = h.proof(i.Csr, key) })
			}(), api.PossessionUnproven},
			{"a signature for another request", with(h, func(i *apiv1.IssueItem) { i.Csr = newCSR(t, newKey(t)) }), api.PossessionUnproven},
			{"no signature", with(h, func(i *apiv1.IssueItem) { i.Renewal.Possession = nil }), api.PossessionUnproven},
			{"a request that names another identity", with(h, func(i *apiv1.IssueItem) {
				i.Csr = newCSR(t, newKey(t), withURI(t, "spiffe://example.org/ns/shop/sa/db"))
				i.Renewal = h.proof(i.Csr, h.key)
			}), api.IDMismatch},
			{"a forged token", with(h, func(i *apiv1.IssueItem) { i.Evidence = forged(t, s, h.pod) }), api.TokenSignature},
			{"a token for somebody else", with(h, func(i *apiv1.IssueItem) { i.Evidence = n.token(h.pod, "vault") }), api.TokenAudience},
			{"a token that had expired before", with(late, nil), api.TokenExpired},
			{"a pod that was deleted", with(deleted, nil), api.PodDeleted},
			{"a pod that had finished", with(finished, nil), api.PodDeleted},
			{"a pod whose deletion came due", with(ended, nil), api.PodDeleted},
			{"a pod that was on another node", with(moved, nil), api.PodMismatch},
			{"a pod of another ServiceAccount", with(lostNode, nil), api.PodMismatch},
		} {
			checkOutcome(t, tt.name, l2(l.issue(tt.item)), tt.want)
		}
		checkOutcome(t, "from another node", l2(far.issue(with(h, nil))), api.NodeMismatch)
		time.Sleep(time.Until(leafOf(t, expired.svid).NotAfter))
		checkOutcome(t, "an SVID that has expired", l2(l.issue(with(expired, nil))), api.HeldSVIDInvalid)
	})
}

// The grace is bounded, is off where it is zero, and goes on over restarts of the CA.
func TestKnownGrace(t *testing.T) {
	t.Run("over", func(t *testing.T) {
		catest.Bubble(t, func(t *testing.T) {
			s := start(t, graced(func(c *ca.Config) { c.Grace = time.Hour }))
			n := newNode(t, s, "node-1")
			h := hold(t, n, n.session(), "web-0")
			s.Pods.Lose()
			lost := time.Now()
			time.Sleep(time.Hour - time.Minute)
			wantOutcome(t, h.renew(), "")
			time.Sleep(time.Until(lost.Add(time.Hour)))
			wantReason(t, h.renew(), api.GraceOver)
			s.Pods.Fail(nil)
			h.token = n.token(h.pod, api.WorkloadAudience(s.TD))
			wantOutcome(t, h.renew(), "")
		})
	})
	t.Run("off", func(t *testing.T) {
		catest.Bubble(t, func(t *testing.T) {
			s := start(t, graced(func(c *ca.Config) { c.Grace = 0 }))
			n := newNode(t, s, "node-1")
			h := hold(t, n, n.session(), "web-0")
			s.Pods.Lose()
			time.Sleep(30 * time.Minute)
			wantReason(t, h.renew(), api.DirectoryUnavailable)
			time.Sleep(29*time.Minute + 30*time.Second)
			h.token = n.tokenFor(h.pod, time.Second)
			time.Sleep(2 * time.Second)
			wantReason(t, h.renew(), api.TokenExpired)
		})
	})
	t.Run("restarted", func(t *testing.T) {
		catest.Bubble(t, func(t *testing.T) {
			s := start(t, graced())
			n := newNode(t, s, "node-1")
			h := hold(t, n, n.session(), "web-0")
			time.Sleep(10*time.Minute + 30*time.Second)
			s.Pods.Lose()
			lost := time.Now()
			for i := 0; time.Since(lost) < 4*time.Hour-20*time.Minute; i++ {
				time.Sleep(20 * time.Minute)
				if s.Stop(); i%2 == 0 {
					time.Sleep(time.Minute)
				}
				s.Start()
				s.WaitReady()
				h.l = n.resume()
				wantOutcome(t, h.renew(), "")
			}
			time.Sleep(time.Until(lost.Add(4 * time.Hour)))
			wantReason(t, h.renew(), api.GraceOver)
			s.Stop()
			s.Start()
			s.WaitReady()
			time.Sleep(time.Minute)
			if _, err := n.connect(n.helloWithTicket()); api.ReasonOf(err) != api.GraceOver {
				t.Errorf("a session after the grace: %v", err)
			}
		})
	})
	t.Run("negative", func(t *testing.T) {
		for _, grace := range []time.Duration{-1, ca.MaxGrace + 1} {
			_, err := ca.New(newBare(t, func(c *ca.Config) { c.Grace = grace }).config)
			wantReason(t, err, api.ConfigInvalid)
		}
	})
}

// helloWithTicket is what an agent says whose token kubelet cannot replace.
func (n *node) helloWithTicket() *apiv1.SessionRequest {
	return helloWith(&apiv1.Hello{Protocol: api.Protocol, Version: "test", Evidence: n.first, Ticket: n.ticket})
}

// resume opens a session by the agent's ticket, once the CA has found out that the cluster is away.
func (n *node) resume() *link {
	n.t.Helper()
	time.Sleep(70 * time.Second)
	l, err := n.connect(n.helloWithTicket())
	if err != nil {
		n.t.Fatalf("no session: %v", err)
	}
	return l
}

// renewSelf asks for a fresh SVID of the agent's over a connection with an SVID, or none.
func (n *node) renewSelf(with *x509svid.SVID, change func(*apiv1.AttestAgentRequest)) (*apiv1.AttestAgentResponse, crypto.Signer, error) {
	n.t.Helper()
	key := newKey(n.t)
	r := &apiv1.AttestAgentRequest{Evidence: n.first, Csr: newCSR(n.t, key), Protocol: api.Protocol, Renewal: &apiv1.Renewal{Ticket: n.ticket}}
	if change != nil {
		change(r)
	}
	resp, err := apiv1.NewAuthorityClient(dial(n.t, n.s, with)).AttestAgent(n.t.Context(), r)
	return resp, key, api.FromStatus(err)
}

// An agent whose own token has expired renews itself and opens sessions by its ticket, on a connection with the SVID that it
// belongs to and on no other.
//
// threat: G03
func TestKnownAgent(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		o := graced(func(c *ca.Config) { c.AgentTTL, c.SessionAge = time.Hour, time.Hour })
		s := start(t, o)
		n, thief := newNode(t, s, "node-1"), newNode(t, s, "node-2")
		deleted := newNode(t, s, "node-3")
		l := n.session()
		h := hold(t, n, l, "web-0")
		time.Sleep(30 * time.Minute)
		s.Pods.Remove(deleted.pod)
		s.Pods.Lose()
		time.Sleep(20 * time.Second)
		attest := func(n *node, with *x509svid.SVID, f func(*apiv1.AttestAgentRequest)) error {
			_, _, err := n.renewSelf(with, f)
			return err
		}
		for _, tt := range []struct {
			name string
			err  error
			want api.Reason
		}{
			{"all is well", attest(n, n.svid, nil), ""},
			{"no ticket", attest(n, n.svid, func(r *apiv1.AttestAgentRequest) { r.Renewal = nil }), api.DirectoryUnavailable},
			{"no certificate", attest(n, nil, nil), api.HeldSVIDInvalid},
			{"the certificate of another node", attest(n, thief.svid, nil), api.HeldSVIDInvalid},
			{"the ticket of another node", attest(n, n.svid, func(r *apiv1.AttestAgentRequest) { r.Renewal.Ticket = thief.ticket }), api.TicketMismatch},
			{"the ticket of a workload", attest(n, n.svid, func(r *apiv1.AttestAgentRequest) { r.Renewal.Ticket = h.svid.GetTicket() }), api.TicketMismatch},
			{"a ticket that was changed", attest(n, n.svid, func(r *apiv1.AttestAgentRequest) { r.Renewal.Ticket = make([]byte, len(n.ticket)) }), api.TicketInvalid},
			{"a ticket without end", attest(n, n.svid, func(r *apiv1.AttestAgentRequest) { r.Renewal.Ticket = make([]byte, api.MaxTicketBytes+1) }), api.TicketInvalid},
			{"token, ticket and no key", attest(thief, n.svid, nil), api.HeldSVIDInvalid},
			{"the token of a workload", attest(n, n.svid, func(r *apiv1.AttestAgentRequest) { r.Evidence = h.token }), api.TokenAudience},
			{"a pod that was deleted", attest(deleted, deleted.svid, nil), api.PodDeleted},
		} {
			checkOutcome(t, tt.name, tt.err, tt.want)
		}
		hello := func(n *node, ticket []byte, e *apiv1.Evidence) error {
			_, err := n.connect(helloWith(&apiv1.Hello{Protocol: api.Protocol, Evidence: e, Ticket: ticket}))
			return err
		}
		checkOutcome(t, "a session by the ticket", hello(n, n.ticket, n.first), "")
		checkOutcome(t, "a session without one", hello(n, nil, n.first), api.DirectoryUnavailable)
		checkOutcome(t, "a session by another's ticket", hello(n, thief.ticket, n.first), api.TicketMismatch)
		checkOutcome(t, "a session with another's token", hello(n, thief.ticket, thief.first), api.NodeMismatch)
		checkOutcome(t, "a session of a deleted pod", hello(deleted, deleted.ticket, deleted.first), api.PodDeleted)

		for range 9 { // three hours by SVIDs of one
			time.Sleep(20 * time.Minute)
			resp, key, err := n.renewSelf(n.svid, nil)
			if err != nil {
				t.Fatal(err)
			}
			n.svid, n.ticket = svidOf(t, resp.GetChain(), key), resp.GetTicket()
			h.l = n.resume()
			wantOutcome(t, h.renew(), "")
		}
		checkOutcome(t, "an SVID that has expired", attest(thief, thief.svid, nil), api.CAUnavailable) // in the handshake
		s.Pods.Fail(nil)
		checkOutcome(t, "an expired token after the return", attest(n, n.svid, nil), api.TokenExpired)
		checkOutcome(t, "a fresh one", attest(n, nil, func(r *apiv1.AttestAgentRequest) {
			r.Evidence, r.Renewal = n.token(n.pod, api.AgentAudience(s.TD)), nil
		}), "")
	})
}
