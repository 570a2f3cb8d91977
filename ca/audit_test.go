package ca_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	pb "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/audit"
)

// listAudit returns all that a request finds; no piece of the answer is larger than gRPC lets through.
func listAudit(t *testing.T, c *ca.CA, r *apiv1.ListAuditRequest) []*apiv1.AuditEntry {
	t.Helper()
	stream, err := adminOf(t, c).ListAudit(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	var all []*apiv1.AuditEntry
	for {
		page, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(api.FromStatus(err))
		}
		if size := pb.Size(page); size > 2<<20 {
			t.Errorf("a piece of %d bytes with %d entries", size, len(page.GetEntries()))
		}
		all = append(all, page.GetEntries()...)
	}
}

// TestListAudit finds what was issued and refused by everything that one may know of it.
func TestListAudit(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	l := n.session()
	web := s.Pod("shop", "web-0", "web", "node-1")
	svid, err := l.issue(n.item(web))
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	foreign := s.Pod("bank", "db-0", "db", "node-2")
	_, refused := l.issue(n.item(foreign))
	wantReason(t, refused, api.NodeMismatch)
	for range 9 {
		_, err := l.issue(n.item(foreign))
		if api.AsError(err).CorrelationID != api.AsError(refused).CorrelationID {
			t.Errorf("a refusal that repeats has another id: %v", err)
		}
	}
	_, unproven := l.issue(&apiv1.IssueItem{Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte("x.y.z")}, Csr: newCSR(t, newKey(t))})
	_, _, stranger := n.attest(func(r *apiv1.AttestAgentRequest) { r.Evidence.Data = []byte("x.y.z") })
	_, _, noAgent := (&node{t: t, s: s, pod: web}).attest(nil)
	wantReason(t, noAgent, api.NotAnAgent)
	serial := hexOf(leafOf(t, svid).SerialNumber.Bytes())
	id := func(err error) string { return api.AsError(err).CorrelationID }
	issued := ""
	for _, e := range listAudit(t, s.CA(), &apiv1.ListAuditRequest{}) {
		if e.GetSpiffeId() == svid.GetSpiffeId() && e.GetKind() == "issue" {
			issued = e.GetCorrelationId()
			if e.GetSource() != "ledger" || e.GetCount() != 0 || !e.GetNotAfter().AsTime().Equal(leafOf(t, svid).NotAfter) || e.GetLast() != nil {
				t.Errorf("the entry of an SVID: %v", e)
			}
		}
	}
	for _, tt := range []struct {
		name string
		r    *apiv1.ListAuditRequest
		want []string // correlation ids
	}{
		{"SPIFFE ID", &apiv1.ListAuditRequest{SpiffeId: svid.GetSpiffeId()}, []string{issued}},
		{"serial", &apiv1.ListAuditRequest{Serial: serial}, []string{issued}},
		{"namespace", &apiv1.ListAuditRequest{Namespace: "bank"}, []string{id(refused)}},
		{"pod's name", &apiv1.ListAuditRequest{Pod: "db-0"}, []string{id(refused)}},
		{"pod's UID", &apiv1.ListAuditRequest{Pod: foreign.UID}, []string{id(refused)}},
		{"reason", &apiv1.ListAuditRequest{Reason: string(api.NodeMismatch)}, []string{id(refused)}},
		{"correlation id", &apiv1.ListAuditRequest{CorrelationId: id(stranger)}, []string{id(stranger)}},
		{"kind and agent's node", &apiv1.ListAuditRequest{Kinds: []string{"refuse"}, Node: "node-1"}, []string{id(refused), id(unproven), id(noAgent)}},
		{"kind and time", &apiv1.ListAuditRequest{Kinds: []string{"refuse", "issue"}, Since: timestamppb.New(begun)},
			[]string{id(refused), id(unproven), id(stranger), id(noAgent)}},
		{"time that is past", &apiv1.ListAuditRequest{Until: timestamppb.New(begun.Add(-time.Hour))}, nil},
		{"the last", &apiv1.ListAuditRequest{Last: 2}, []string{id(stranger), id(noAgent)}},
		{"two that contradict", &apiv1.ListAuditRequest{Serial: serial, Namespace: "bank"}, nil},
		{"nobody", &apiv1.ListAuditRequest{TokenId: "\"<no>"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, e := range listAudit(t, s.CA(), tt.r) {
				got = append(got, e.GetCorrelationId())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("found %q, want %q", got, tt.want)
			}
		})
	}
	agent := "spiffe://example.org/signet/agent/" + n.pod.NodeUID
	for _, tt := range []struct {
		err                        error
		source, method, caller, by string
		count                      uint64
	}{
		{refused, "refusals", "Issue", agent, foreign.UID, 10},
		{unproven, "refusals", "Issue", agent, "", 0},
		{stranger, "sample", "AttestAgent", "", "", 0},
		{noAgent, "refusals", "AttestAgent", "", web.UID, 0},
	} {
		found := listAudit(t, s.CA(), &apiv1.ListAuditRequest{CorrelationId: id(tt.err)})
		if len(found) != 1 {
			t.Fatalf("%v: %d entries", tt.err, len(found))
		}
		e, want := found[0], api.AsError(tt.err)
		if e.GetSource() != tt.source || e.GetMethod() != tt.method || e.GetCaller() != tt.caller || e.GetPodUid() != tt.by || e.GetCount() != tt.count ||
			e.GetReason() != string(want.Reason) || e.GetDetail() != want.Detail || e.GetKind() != "refuse" {
			t.Errorf("on record of %v: %v", tt.err, e)
		}
	}
}

// manyRecords is an archive of so many large records that it must be sent in pieces.
type manyRecords int

// Records implements ca.Archive.
func (m manyRecords) Records(ctx context.Context, _ audit.Query) iter.Seq2[audit.Record, error] {
	return func(yield func(audit.Record, error) bool) {
		for i := range int(m) {
			e := audit.Entry{Kind: audit.KindIssue, DNSNames: []string{string(make([]byte, 60_000))}}
			if ctx.Err() != nil {
				yield(audit.Record{}, ctx.Err())
				return
			}
			if !yield(audit.Record{Source: audit.SourceLedger, Seq: uint64(i + 1), Entry: e}, nil) {
				return
			}
		}
		yield(audit.Record{}, &audit.CorruptError{File: "ledger-1", Seq: uint64(m) + 1, Why: "it is gone"})
	}
}

// NotReady implements ca.Archive.
func (manyRecords) NotReady() string { return "there is no room" }

// TestListAuditPieces sends what is large in pieces, tells what is good before what is damaged, and ends when nobody listens.
func TestListAuditPieces(t *testing.T) {
	const n = 200
	s := catest.New(t, catest.Options{Config: func(cfg *ca.Config) { cfg.Archive = manyRecords(n) }})
	admin := adminOf(t, s.CA())
	stream, err := admin.ListAudit(t.Context(), &apiv1.ListAuditRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got, pieces := 0, 0
	for {
		page, err := stream.Recv()
		if err != nil {
			wantReason(t, api.FromStatus(err), api.LedgerDamaged)
			break
		}
		got, pieces = got+len(page.GetEntries()), pieces+1
	}
	if got != n || pieces < 5 {
		t.Errorf("%d entries in %d pieces, want %d in some", got, pieces, n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if stream, err = admin.ListAudit(ctx, &apiv1.ListAuditRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	for err == nil {
		_, err = stream.Recv()
	}
	if r := api.ReasonOf(api.FromStatus(err)); r != api.Canceled && r != api.LedgerDamaged {
		t.Errorf("ended with %v", err)
	}
	if missing := s.CA().NotReady(); !slices.Contains(missing, "there is no room") {
		t.Errorf("what is missing: %q", missing)
	}
}

// slowRecords is an archive in which it takes long to find one record, and long to find out that there is no other.
type slowRecords struct{}

// Records implements ca.Archive.
func (slowRecords) Records(ctx context.Context, q audit.Query) iter.Seq2[audit.Record, error] {
	return func(yield func(audit.Record, error) bool) {
		for range 2 {
			select {
			case <-ctx.Done():
				yield(audit.Record{}, ctx.Err())
				return
			case <-time.After(20 * time.Second):
			}
			if q.ID != "" && !yield(audit.Record{Seq: 1, Entry: audit.Entry{CorrelationID: q.ID}}, nil) {
				return
			}
			q.ID = ""
		}
	}
}

// NotReady implements ca.Archive.
func (slowRecords) NotReady() string { return "" }

// TestListAuditPulse says every second or two that it is looked for, tells at once what is found, and is done when nobody
// listens.
func TestListAuditPulse(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{Config: func(cfg *ca.Config) { cfg.Archive = slowRecords{} }})
		stream, err := adminOf(t, s.CA()).ListAudit(t.Context(), &apiv1.ListAuditRequest{CorrelationId: "id"})
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		last, found := begun, time.Duration(0)
		for {
			page, err := stream.Recv()
			if silent := time.Since(last); silent > 3*time.Second {
				t.Errorf("nothing came for %v", silent)
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(api.FromStatus(err))
			}
			if last = time.Now(); len(page.GetEntries()) > 0 {
				found = time.Since(begun)
			}
		}
		if took := time.Since(begun); found < 20*time.Second || found > 23*time.Second || took < 40*time.Second {
			t.Errorf("found after %v, done after %v", found, took)
		}
		ctx, cancel := context.WithCancel(t.Context())
		if stream, err = adminOf(t, s.CA()).ListAudit(ctx, &apiv1.ListAuditRequest{}); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		cancel()
		synctest.Wait()
	})
}

// TestLedgerFull stops issuance alone, by a reason of its own, and goes on by itself.
//
// threat: E27
func TestLedgerFull(t *testing.T) {
	s, ledger := gated(t)
	n := newNode(t, s, "node-1")
	l := n.session()
	ledger.set(func(context.Context, audit.Entry) error {
		return fmt.Errorf("%w: no space left on device", audit.ErrFull)
	})
	_, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1")))
	wantReason(t, err, api.LedgerFull)
	checkRefusal(t, err)
	_, _, err = n.attest(nil)
	wantReason(t, err, api.LedgerFull)
	found := listAudit(t, s.CA(), &apiv1.ListAuditRequest{Reason: string(api.LedgerFull)})
	if len(found) != 2 || found[0].GetSource() != "sample" {
		t.Errorf("on record: %v", found)
	}
	// All else goes on: sessions, refusals and their record.
	if _, err := n.connect(nil); err != nil {
		t.Errorf("no session: %v", err)
	}
	before := len(ledgerOf(t, s))
	_, err = l.issue(n.item(s.Pod("shop", "web", "web", "node-2")))
	wantReason(t, err, api.NodeMismatch)
	checkRecorded(t, s, before, err, true)
	ledger.set(nil)
	if _, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1"))); err != nil {
		t.Errorf("there is room again, and yet: %v", err)
	}
}
