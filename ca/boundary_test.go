package ca_test

import (
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// invent calls what there is not, and returns the refusal.
func invent(t *testing.T, conn *grpc.ClientConn, path string) *api.Error {
	t.Helper()
	err := api.FromStatus(conn.Invoke(t.Context(), path, &emptypb.Empty{}, &emptypb.Empty{}))
	wantReason(t, err, api.CallUnknown)
	return api.AsError(err)
}

// TestInventedCalls makes an agent call names without end that there are not: on record they are one refusal, without the
// names, and what was refused before them is still found.
//
// threat: J08, L15
func TestInventedCalls(t *testing.T) {
	log := &said{}
	s := start(t, logging(log))
	n := newNode(t, s, "node-1")
	l := n.session()
	_, refused := l.issue(n.item(s.Pod("shop", "far", "web", "node-2")))
	wantReason(t, refused, api.NodeMismatch)
	conn := dial(t, s, n.svid)
	const word = "sesame"
	calls := 200
	if testing.Short() {
		calls = 60
	}
	first := ""
	for i := range calls {
		e := invent(t, conn, "/"+word+strings.Repeat("x", 12<<10)+"/"+time.Duration(i).String())
		if first == "" {
			first = e.CorrelationID
		}
		if e.CorrelationID != first {
			t.Fatalf("call %d has an id of its own", i)
		}
	}
	if found := listAudit(t, s.CA(), &apiv1.ListAuditRequest{CorrelationId: api.AsError(refused).CorrelationID}); len(found) != 1 {
		t.Errorf("of the refusal before is left: %v", found)
	}
	found := listAudit(t, s.CA(), &apiv1.ListAuditRequest{Reason: string(api.CallUnknown)})
	if len(found) != 1 || found[0].GetSource() != "refusals" || found[0].GetMethod() != "unknown" || found[0].GetCount() != uint64(calls) {
		t.Errorf("on record is %v", found)
	}
	if strings.Contains(log.String(), word) {
		t.Error("a name that the caller made up was logged")
	}
}

// TestStrangersKnock makes whoever has no name call what there is not: it is counted and sampled, can be listed whatever
// bytes it was, and fills no log.
//
// threat: J08, L15
func TestStrangersKnock(t *testing.T) {
	log := &said{}
	s := start(t, logging(log))
	conn := dial(t, s, nil)
	const word = "sesame"
	before := refusalsOf(t, s, api.CallUnknown)
	calls := 0
	for _, path := range []string{"/signet.v1.Authority/\xff" + word, "/" + strings.Repeat(word, 2000) + "/a"} {
		for range 100 {
			invent(t, conn, path)
			calls++
		}
	}
	if got := refusalsOf(t, s, api.CallUnknown) - before; got != float64(calls) {
		t.Errorf("%v were counted of %d", got, calls)
	}
	found := listAudit(t, s.CA(), &apiv1.ListAuditRequest{Reason: string(api.CallUnknown)})
	if len(found) == 0 {
		t.Error("no sample was kept")
	}
	for _, e := range found {
		if e.GetMethod() != "unknown" || e.GetSource() != "sample" {
			t.Errorf("kept is %v", e)
		}
	}
	text := log.String()
	if strings.Contains(text, word) {
		t.Error("a name that the caller made up was logged")
	}
	if lines := strings.Count(text, "msg=refused"); lines == 0 || lines > calls/10 {
		t.Errorf("%d calls made %d lines", calls, lines)
	}
	// Other reasons have their lines all the same, and whoever is known has one for each.
	_, _, err := (&node{t: t, s: s, pod: s.AgentPod("node-1")}).attest(func(r *apiv1.AttestAgentRequest) { r.Evidence.Data = []byte("x.y.z") })
	wantReason(t, err, api.TokenMalformed)
	if !strings.Contains(log.String(), api.AsError(err).CorrelationID) {
		t.Error("the first refusal for another reason was not logged")
	}
	n := newNode(t, s, "node-2")
	n.session()
	known := dial(t, s, n.svid)
	for range 3 {
		invent(t, known, "/a/b")
	}
	if got := strings.Count(log.String(), "msg=refused") - strings.Count(text, "msg=refused"); got != 4 {
		t.Errorf("%d lines of 4", got)
	}
}

// The operator is told what probes are told: what the process lacks beside the CA too.
func TestStatusNotReady(t *testing.T) {
	const lack = "a permission is missing"
	var lacks atomic.Pointer[[]string]
	lacks.Store(&[]string{})
	s := start(t, catest.Options{Config: func(cfg *ca.Config) { cfg.NotReady = func() []string { return *lacks.Load() } }})
	lacks.Store(&[]string{lack})
	status, err := adminOf(t, s.CA()).GetStatus(t.Context(), &apiv1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(status.GetNotReady(), []string{lack}) || !slices.Equal(s.CA().NotReady(), []string{lack}) {
		t.Errorf("the operator is told %q, probes %q", status.GetNotReady(), s.CA().NotReady())
	}
}
