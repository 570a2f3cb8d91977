package ca_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

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

// TestBatchWithOneThatHangs: what one item of a call waits for costs the others nothing, though nobody answers within the call's
// time.
func TestBatchWithOneThatHangs(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		var s *catest.Server
		s = start(t, catest.Options{Config: func(cfg *ca.Config) {
			cfg.Directory = directoryFunc(func(ctx context.Context, id ca.PodID) (ca.Pod, error) {
				if id.Name == "hung" {
					<-ctx.Done()
					return ca.Pod{}, ctx.Err()
				}
				return s.Pods.Pod(ctx, id)
			})
		}})
		n := newNode(t, s, "node-1")
		l := n.session()
		good, hung := n.item(s.Pod("shop", "web", "web", "node-1")), n.item(s.Pod("shop", "hung", "hung", "node-1"))
		for _, items := range [][]*apiv1.IssueItem{{good, hung}, {hung, good}, {hung}} {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			resp, err := l.client.Issue(ctx, &apiv1.IssueRequest{Items: items})
			cancel()
			if err != nil || len(resp.GetResults()) != len(items) {
				t.Fatalf("%d results, %v", len(resp.GetResults()), err)
			}
			for i, r := range resp.GetResults() {
				if items[i] == hung {
					wantReason(t, refusal(r), api.DeadlineExceeded)
				} else if r.GetSvid() == nil {
					t.Errorf("the neighbour of one that hangs: %v", refusal(r))
				}
			}
		}
	})
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
	s, gate := startNarrow(t)
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
	defer gate.open()
	go ask(&apiv1.IssueItem{Evidence: gate.evidence()})
	<-gate.entered
	for range 2 { // one finds a place to wait
		go ask(n.item(s.Pod("shop", "web", "web", "node-1")))
	}
	wantReason(t, (<-answers).err, api.Overloaded)
	gate.open()
	for range 2 {
		if a := <-answers; a.svid == nil && api.ReasonOf(a.err) != api.TokenMalformed {
			t.Errorf("after the rush: %v", a.err)
		}
	}
}

// TestKnocking lets nobody who has no SVID yet take a place from those who have one.
//
// threat: J08
func TestKnocking(t *testing.T) {
	s, gate := startNarrow(t)
	n := newNode(t, s, "node-1")
	l := n.session()
	const conns, crowd = 32, 32 * 16 // as many calls as each connection may have at once
	defer gate.open()
	knocks := make(chan error, crowd)
	for range conns {
		client := apiv1.NewAuthorityClient(dial(t, s, nil))
		// One handshake after the other: 32 at once may take longer than a busy CA waits for one.
		_, err := client.AttestAgent(t.Context(), &apiv1.AttestAgentRequest{}, grpc.WaitForReady(true))
		wantReason(t, api.FromStatus(err), api.ProtocolSkew)
		for range crowd / conns {
			go func() {
				r := &apiv1.AttestAgentRequest{Evidence: gate.evidence(), Protocol: api.Protocol}
				_, err := client.AttestAgent(t.Context(), r, grpc.WaitForReady(true))
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
	gate.open()
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
type blocker struct {
	entered, release chan struct{}
	open             func() // releases; more than once does nothing. Without it the CA does not end.
}

func newBlocker() *blocker {
	b := &blocker{entered: make(chan struct{}, 1024), release: make(chan struct{})}
	b.open = sync.OnceFunc(func() { close(b.release) })
	return b
}

// startNarrow starts a CA with one turn for workloads and one place to wait for it, and a blocker of that turn.
func startNarrow(t *testing.T) (*catest.Server, *blocker) {
	t.Helper()
	b := newBlocker()
	return start(t, catest.Options{Config: func(cfg *ca.Config) {
		cfg.Concurrent, cfg.Queue = 1, 1
		hook(cfg, b.attest)
	}}), b
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
//
// threat: J06
func TestMessageTooLarge(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	l := n.session()
	_, err := l.client.Issue(t.Context(), &apiv1.IssueRequest{Items: []*apiv1.IssueItem{{Csr: make([]byte, 4<<20)}}})
	wantReason(t, api.FromStatus(err), api.MessageTooLarge)
	if err := l.stream.Send(report(&apiv1.Report{BundleHash: make([]byte, 4<<20)})); err != nil {
		t.Fatal(err)
	}
	wantReason(t, l.end(), api.SessionProtocol)
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
	big := &apiv1.AttestAgentRequest{Csr: make([]byte, 4<<20)}
	err = conn.Invoke(t.Context(), "/signet.v1.Authority/AttestAgent", big, &apiv1.AttestAgentResponse{}, grpc.MaxCallSendMsgSize(8<<20))
	wantReason(t, api.FromStatus(err), api.MessageTooLarge)
	s.Stop()
	if strings.Contains(log.String(), "level=ERROR") {
		t.Errorf("strangers cause errors of ours:\n%s", log.String())
	}
}
