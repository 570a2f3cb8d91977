package ca_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"iter"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/audit"
)

// readRecords is an archive without an end that says how many read it.
type readRecords struct{ readers, most atomic.Int64 }

// Records implements ca.Archive.
func (r *readRecords) Records(ctx context.Context, q audit.Query) iter.Seq2[audit.Record, error] {
	return func(yield func(audit.Record, error) bool) {
		n := r.readers.Add(1)
		defer r.readers.Add(-1)
		for most := r.most.Load(); n > most && !r.most.CompareAndSwap(most, n); most = r.most.Load() {
		}
		e := audit.Entry{Kind: audit.KindIssue, DNSNames: []string{strings.Repeat("x", 60_000)}}
		for i := 0; ctx.Err() == nil && (q.Last == 0 || i < q.Last); i++ {
			if !yield(audit.Record{Source: audit.SourceLedger, Seq: uint64(i + 1), Entry: e}, nil) {
				return
			}
		}
	}
}

// NotReady implements ca.Archive.
func (*readRecords) NotReady() string { return "" }

// greedyConn connects as somebody who takes no more unread than gRPC's least.
func greedyConn(t *testing.T, s *catest.Server) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///operators", grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(1<<20),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true})),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.DialOperators(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// untaken makes a call that is answered with much, of which nothing is taken.
func untaken(ctx context.Context, t *testing.T, conn *grpc.ClientConn, call string, request any) grpc.ClientStream {
	t.Helper()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, call)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(stream.SendMsg(request), stream.CloseSend()); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	return stream
}

// endOf is how a stream ends; nil for a good end.
func endOf(stream grpc.ClientStream) error {
	for {
		if err := stream.RecvMsg(&apiv1.ListAuditResponse{}); err == io.EOF {
			return nil
		} else if err != nil {
			return api.FromStatus(err)
		}
	}
}

// TestLookTurns: two look at the record at once, whatever a viewer asks for, and whoever does not take what he asked for
// goes when another wants his turn. An operator has his turn though a viewer takes all of theirs.
func TestLookTurns(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		archive := &readRecords{}
		s := start(t, catest.Options{Config: func(cfg *ca.Config) { cfg.Archive = archive }})
		as := func(role string) context.Context {
			return metadata.AppendToOutgoingContext(t.Context(), bearerOf(s.Person(operatorsNS, role, 10*time.Minute))...)
		}
		ctx, greedy := as("viewer"), greedyConn(t, s)
		var calls []grpc.ClientStream
		for range 8 {
			calls = append(calls, untaken(ctx, t, greedy, apiv1.Admin_ListAudit_FullMethodName, &apiv1.ListAuditRequest{}))
		}
		if n := archive.readers.Load(); n != 2 {
			t.Errorf("%d read at once", n)
		}
		last := func(ctx context.Context, conn *grpc.ClientConn) error {
			stream, err := apiv1.NewAdminClient(conn).ListAudit(ctx, &apiv1.ListAuditRequest{Last: 3})
			if err != nil {
				return api.FromStatus(err)
			}
			return endOf(stream)
		}
		begun := time.Now()
		if err := last(as("operator"), operatorsConn(t, s, nil)); err != nil || time.Since(begun) > time.Second {
			t.Errorf("an operator: after %v: %v", time.Since(begun), err)
		}
		other := operatorsConn(t, s, nil)
		wantReason(t, last(as("viewer"), other), api.Overloaded)
		if waited := time.Since(begun); waited > 15*time.Second {
			t.Errorf("told so after %v", waited)
		}
		for _, c := range calls[2:] {
			wantReason(t, endOf(c), api.Overloaded)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := archive.readers.Load(); n != 2 {
			t.Errorf("nobody waits, and %d read", n)
		}
		if err := last(as("viewer"), other); err != nil {
			t.Errorf("another viewer: %v", err)
		}
		for _, c := range calls[:2] {
			if err := endOf(c); err == nil {
				t.Error("it ended well")
			}
		}
		synctest.Wait()
		if n, most := archive.readers.Load(), archive.most.Load(); n != 0 || most > 3 {
			t.Errorf("%d read still, %d at most", n, most)
		}
	})
}

// TestLookAnswers: an answer in one piece holds its turn until it was taken, or until its connection ends.
func TestLookAnswers(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{})
		l := newNode(t, s, "node-1").session()
		var all []*apiv1.Holding
		for _, key := range []string{"a", "b", "c", "d"} {
			all = append(all, &apiv1.Holding{Key: key, PodName: strings.Repeat("x", 100_000)})
		}
		if err := l.stream.Send(report(&apiv1.Report{Full: true, Changed: all})); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		ctx := metadata.AppendToOutgoingContext(t.Context(), bearerOf(s.Person(operatorsNS, "viewer", 10*time.Minute))...)
		other := apiv1.NewAdminClient(operatorsConn(t, s, nil))
		look := func() error {
			resp, err := other.ListSVIDs(ctx, &apiv1.ListSVIDsRequest{})
			if err == nil && len(resp.GetHoldings()) != len(all) {
				t.Errorf("%d holdings", len(resp.GetHoldings()))
			}
			return api.FromStatus(err)
		}
		for range 5 {
			if err := look(); err != nil {
				t.Fatal(err)
			}
			if _, err := other.ListNodes(ctx, &apiv1.ListNodesRequest{}); err != nil {
				t.Fatal(err)
			}
		}
		greedy := greedyConn(t, s)
		for range 2 {
			untaken(ctx, t, greedy, apiv1.Admin_ListSVIDs_FullMethodName, &apiv1.ListSVIDsRequest{})
		}
		wantReason(t, look(), api.Overloaded)
		if _, err := other.GetStatus(ctx, &apiv1.GetStatusRequest{}); err != nil {
			t.Errorf("what is no look: %v", err)
		}
		greedy.Close()
		synctest.Wait()
		if err := look(); err != nil {
			t.Errorf("after they went: %v", err)
		}
		greedy = greedyConn(t, s)
		one, cancel := context.WithCancel(ctx)
		untaken(one, t, greedy, apiv1.Admin_ListSVIDs_FullMethodName, &apiv1.ListSVIDsRequest{})
		untaken(ctx, t, greedy, apiv1.Admin_ListSVIDs_FullMethodName, &apiv1.ListSVIDsRequest{})
		cancel() // the call is over, and the connection is not
		synctest.Wait()
		if err := look(); err != nil {
			t.Errorf("after one call ended: %v", err)
		}
		untaken(ctx, t, greedy, apiv1.Admin_ListSVIDs_FullMethodName, &apiv1.ListSVIDsRequest{})
		time.Sleep(25 * time.Second)
		if err := look(); err != nil {
			t.Errorf("after half a minute: %v", err)
		}
	})
}
