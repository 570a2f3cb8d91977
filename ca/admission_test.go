package ca_test

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/catest"
)

// TestLeastUrgentSentAway has a pod that holds nothing come to a CA with one place, at the same time as a renewal with half an
// hour left: whichever is first, the renewal is sent away, unread, and told when to come back.
//
// threat: J08
func TestLeastUrgentSentAway(t *testing.T) {
	s, gate := startNarrow(t)
	n := newNode(t, s, "node-1")
	l := n.session()
	defer gate.open()
	first := make(chan error, 1)
	go func() {
		_, err := l.issue(&apiv1.IssueItem{Evidence: gate.evidence()})
		first <- err
	}()
	<-gate.entered
	relaxed, urgent := n.item(s.Pod("shop", "web", "web", "node-1")), n.item(s.Pod("shop", "new", "new", "node-1"))
	relaxed.HoldsUntil = timestamppb.New(time.Now().Add(30 * time.Minute))
	urgent.HoldsUntil = &timestamppb.Timestamp{}
	relaxed.Evidence = &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte("not a token")} // which nobody finds out
	type answer struct {
		resp *apiv1.IssueResponse
		err  error
	}
	ask := func(item *apiv1.IssueItem) <-chan answer {
		c := make(chan answer, 1)
		go func() {
			resp, err := l.client.Issue(t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
			c <- answer{resp, err}
		}()
		return c
	}
	good, bad := ask(urgent), ask(relaxed)
	a := <-bad
	if a.err != nil {
		t.Fatal(a.err)
	}
	r := a.resp.GetResults()[0].GetRefusal()
	if r.GetReason() != string(api.Overloaded) || r.GetRetryAfter().AsDuration() < time.Second || r.GetCorrelationId() == "" {
		t.Errorf("the renewal was answered with %v", r)
	}
	gate.open()
	if err := <-first; api.ReasonOf(err) != api.TokenMalformed {
		t.Errorf("the first: %v", err)
	}
	if a := <-good; a.err != nil || a.resp.GetResults()[0].GetSvid() == nil {
		t.Errorf("the pod that holds nothing: %v (%v)", a.resp, a.err)
	}
	for _, tt := range []struct {
		name   string
		labels []string
		want   float64
	}{
		{"signet_ca_admission_waiting", nil, 0},
		{"signet_ca_admission_wait_seconds", nil, 2},
		{"signet_ca_admission_refused_total", []string{"holds", "longer"}, 1},
		{"signet_ca_admission_refused_total", []string{"holds", "minute"}, 0},
		{"signet_ca_admission_refused_total", []string{"holds", "nothing"}, 0},
		{"signet_ca_admission_refused_total", []string{"holds", "unsaid"}, 0},
		{"signet_refusals_total", []string{"reason", "OVERLOADED"}, 1},
	} {
		if got := metric(t, s.CA(), tt.name, tt.labels...); got != tt.want {
			t.Errorf("%s%v is %v, want %v", tt.name, tt.labels, got, tt.want)
		}
	}
}

// BenchmarkRefused is all that the CA does for a request for which it has no time, but for gRPC.
func BenchmarkRefused(b *testing.B) {
	for _, nodes := range []int{1, 256, 4096} {
		b.Run(fmt.Sprint(nodes), func(b *testing.B) {
			s := catest.New(b, catest.Options{})
			s.WaitReady()
			s.CA().Fill(b.Context(), nodes)
			item := &apiv1.IssueItem{
				Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: make([]byte, 1100)}, Csr: make([]byte, 200),
				HoldsUntil: timestamppb.New(time.Now().Add(time.Hour)),
			}
			b.ReportAllocs()
			for b.Loop() {
				if r := s.CA().IssueOne(b.Context(), "node-of-nobody-0", "node-0", item); r.GetRefusal().GetReason() != string(api.Overloaded) {
					b.Fatal(r)
				}
			}
		})
	}
}
