package ca_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/internal/audit"
)

// gatedLedger lets a test hold or fail the entries of a real ledger.
type gatedLedger struct {
	ca.Ledger

	mu   sync.Mutex
	gate func(context.Context, audit.Entry) error // nil: open
}

// Append implements ca.Ledger.
func (l *gatedLedger) Append(ctx context.Context, e audit.Entry) error {
	l.mu.Lock()
	gate := l.gate
	l.mu.Unlock()
	if gate != nil {
		if err := gate(ctx, e); err != nil {
			return err
		}
	}
	return l.Ledger.Append(ctx, e)
}

func (l *gatedLedger) set(gate func(context.Context, audit.Entry) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gate = gate
}

// gated starts a CA with such a ledger.
func gated(t *testing.T) (*catest.Server, *gatedLedger) {
	t.Helper()
	var l *gatedLedger
	s := start(t, catest.Options{Config: func(cfg *ca.Config) {
		l = &gatedLedger{Ledger: cfg.Ledger}
		cfg.Ledger = l
	}})
	return s, l
}

// TestRecordBeforeAnswer holds an entry back: as long as it is not on disk, nothing leaves the CA.
func TestRecordBeforeAnswer(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s, ledger := gated(t)
		n := newNode(t, s, "node-1")
		l := n.session()
		item := n.item(s.Pod("shop", "web", "web", "node-1"))
		release := make(chan struct{})
		ledger.set(func(context.Context, audit.Entry) error {
			<-release
			return nil
		})
		before := len(ledgerOf(t, s))
		answered := make(chan *apiv1.SVID, 1)
		go func() {
			svid, err := l.issue(item)
			if err != nil {
				t.Error(err)
			}
			answered <- svid
		}()
		synctest.Wait()
		select {
		case <-answered:
			t.Fatal("an SVID left before it was on record")
		default:
		}
		if n := len(ledgerOf(t, s)); n != before {
			t.Fatalf("%d entries, want %d", n, before)
		}
		close(release)
		svid := <-answered
		records := ledgerOf(t, s)[before:]
		if len(records) != 1 || records[0].Serial != issuance.SerialString(leafOf(t, svid).SerialNumber) {
			t.Errorf("on record with the answer: %+v", records)
		}
	})
}

// TestLedgerFails issues nothing that could not be recorded, and says so.
func TestLedgerFails(t *testing.T) {
	s, ledger := gated(t)
	n := newNode(t, s, "node-1")
	l := n.session()
	before := metric(t, s.CA(), "signet_svids_issued_total")
	ledger.set(func(context.Context, audit.Entry) error { return errors.New("no space left on device") })
	svid, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1")))
	wantReason(t, err, api.LedgerFailed)
	checkRefusal(t, err)
	resp, _, err := n.attest(nil)
	wantReason(t, err, api.LedgerFailed)
	if svid != nil || resp != nil {
		t.Error("something was issued off the record")
	}
	if after := metric(t, s.CA(), "signet_svids_issued_total"); after != before {
		t.Errorf("%v SVIDs are counted as issued", after-before)
	}
	// A refusal that cannot be recorded is a refusal all the same.
	_, err = l.issue(n.item(s.Pod("shop", "web", "web", "node-2")))
	wantReason(t, err, api.NodeMismatch)
	ledger.set(nil)
	if _, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1"))); err != nil {
		t.Errorf("the ledger takes entries again, and yet: %v", err)
	}
}

// TestCallerGone does not blame the ledger for a caller who did not wait for it.
func TestCallerGone(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s, ledger := gated(t)
		n := newNode(t, s, "node-1")
		l := n.session()
		ledger.set(func(ctx context.Context, e audit.Entry) error {
			if e.Kind == audit.KindIssue {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		})
		// Not a deadline: it would end both sides at once, and then the answer may still overtake it.
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		_, err := l.client.Issue(ctx, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{n.item(s.Pod("shop", "web", "web", "node-1"))}})
		wantReason(t, api.FromStatus(err), api.Canceled)
		synctest.Wait()
		if n := metric(t, s.CA(), "signet_refusals_total", "reason", string(api.LedgerFailed)); n != 0 {
			t.Error("a caller that went away counts as a failure of the ledger")
		}
	})
}

// TestLedgerContent finds each serial that was issued exactly once, with all that is known of it and no secret.
//
// threat: L01
func TestLedgerContent(t *testing.T) {
	s := start(t, catest.Options{Policy: ca.PolicyFile{
		Namespaces: []string{"*"},
		Rules:      []ca.PolicyRule{{Namespaces: []string{"shop"}, DNSNames: []string{"{serviceAccount}.{namespace}.svc"}}},
	}})
	n := newNode(t, s, "node-1")
	l := n.session()
	serials := map[string]int{issuance.SerialString(n.svid.Certificates[0].SerialNumber): 0}
	p := s.Pod("shop", "web", "web", "node-1")
	var items []*apiv1.IssueItem
	for range api.MaxBatch {
		items = append(items, n.item(p))
	}
	resp, err := l.client.Issue(t.Context(), &apiv1.IssueRequest{Items: items})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range resp.GetResults() {
		serials[issuance.SerialString(leafOf(t, r.GetSvid()).SerialNumber)] = 0
	}
	if len(serials) != api.MaxBatch+1 {
		t.Fatalf("%d serials, want %d", len(serials), api.MaxBatch+1)
	}
	last := resp.GetResults()[0].GetSvid()
	for _, r := range ledgerOf(t, s) {
		if r.Kind == audit.KindMint {
			continue // its serial is known to the root alone
		}
		if _, ok := serials[r.Serial]; ok {
			serials[r.Serial]++
		} else if r.SPIFFEID != "spiffe://example.org/signet/ca/ca-0" {
			t.Errorf("an entry for a serial that nobody got: %+v", r)
		}
		if r.Serial != issuance.SerialString(leafOf(t, last).SerialNumber) {
			continue
		}
		want := audit.Entry{
			Kind: audit.KindIssue, SPIFFEID: last.GetSpiffeId(), Cluster: catest.IssuerName,
			Namespace: p.Namespace, ServiceAccount: p.ServiceAccount, ServiceAccountUID: p.ServiceAccountUID,
			Pod: p.Name, PodUID: p.UID, Node: p.NodeName, NodeUID: p.NodeUID, DNSNames: []string{"web.shop.svc"},
			Serial: r.Serial, NotAfter: leafOf(t, last).NotAfter, Issuer: hexOf(leafOf(t, last).AuthorityKeyId),
		}
		got := r.Entry
		if got.TokenID == "" || got.CorrelationID == "" || time.Since(got.Time) > time.Minute {
			t.Errorf("the entry lacks its token's id, its correlation id or its time: %+v", got)
		}
		got.Time, got.TokenID, got.CorrelationID = time.Time{}, "", ""
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("the entry of an SVID (-want +got):\n%s", diff)
		}
	}
	for serial, times := range serials {
		if times != 1 {
			t.Errorf("serial %s is on record %d times", serial, times)
		}
	}
	checkNoTokens(t, s, items)
}

func checkNoTokens(t *testing.T, s *catest.Server, items []*apiv1.IssueItem) {
	t.Helper()
	data := readAll(t, s.Dir)
	for _, item := range items {
		if bytes.Contains(data, item.GetEvidence().GetData()[:40]) {
			t.Fatal("a token is on disk")
		}
	}
}

// TestCorrelation finds a refusal under one id in the answer, the ledger and the log.
func TestCorrelation(t *testing.T) {
	var log bytes.Buffer
	s := start(t, catest.Options{Log: &log})
	n := newNode(t, s, "node-1")
	l := n.session()
	token := n.token(s.Pod("shop", "web", "web", "node-2"), api.WorkloadAudience(s.TD))
	_, err := l.issue(&apiv1.IssueItem{Evidence: token, Csr: newCSR(t, newKey(t))})
	wantReason(t, err, api.NodeMismatch)
	_, _, agentErr := n.attest(func(r *apiv1.AttestAgentRequest) { r.Csr = nil })
	wantReason(t, agentErr, api.CSRMalformed)
	s.Stop()
	for _, err := range []error{err, agentErr} {
		id := api.AsError(err).CorrelationID
		found := 0
		for _, r := range ledgerOf(t, s) {
			if r.CorrelationID == id {
				found++
			}
		}
		if found != 1 || !strings.Contains(log.String(), "correlation_id="+id) {
			t.Errorf("%s: %d entries in the ledger, in the log: %v", id, found, strings.Contains(log.String(), id))
		}
	}
	if strings.Contains(log.String(), string(token.GetData()[:40])) {
		t.Error("the log has a token in it")
	}
}

// TestMetrics counts what was issued and refused.
func TestMetrics(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	l := n.session()
	for range 3 {
		if _, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1"))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-2"))); err == nil {
		t.Fatal("nothing was refused")
	}
	if _, _, err := n.attest(func(r *apiv1.AttestAgentRequest) { r.Protocol = 0 }); err == nil {
		t.Fatal("nothing was refused")
	}
	roots := s.CA().Bundle().Roots
	for _, tt := range []struct {
		name   string
		labels []string
		want   float64
	}{
		{"signet_svids_issued_total", []string{"kind", "workload"}, 3},
		{"signet_svids_issued_total", []string{"kind", "agent"}, 1},
		{"signet_refusals_total", []string{"reason", "NODE_MISMATCH"}, 1},
		{"signet_refusals_total", []string{"reason", "PROTOCOL_SKEW"}, 1},
		{"signet_agent_sessions", nil, 1},
		{"signet_bundle_sequence", nil, 1<<32 | 1},
		{"signet_issue_duration_seconds", nil, 3},
		{"signet_intermediate_failures_total", nil, 0},
		{"signet_authority_not_after_timestamp_seconds", []string{"kind", "root"}, float64(roots[0].NotAfter.Unix())},
	} {
		if got := metric(t, s.CA(), tt.name, tt.labels...); got != tt.want {
			t.Errorf("%s%v is %v, want %v", tt.name, tt.labels, got, tt.want)
		}
	}
	if end := metric(t, s.CA(), "signet_authority_not_after_timestamp_seconds", "kind", "intermediate"); end < float64(time.Now().Add(23*time.Hour).Unix()) {
		t.Errorf("the intermediate ends at %v", end)
	}
	st, err := adminOf(t, s.CA()).GetStatus(t.Context(), &apiv1.GetStatusRequest{})
	if err != nil || st.GetIssued() != 3 || st.GetRefused() != 2 || st.GetAgents() != 1 {
		t.Errorf("the status says %v (%v)", st, err)
	}
}

// metric returns the sum over all series of a name that have the labels; of a histogram, its count.
func metric(t *testing.T, c *ca.CA, name string, labels ...string) float64 {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(c.Metrics()); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			have := map[string]string{}
			for _, l := range m.GetLabel() {
				have[l.GetName()] = l.GetValue()
			}
			if len(labels) == 0 || have[labels[0]] == labels[1] {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}
