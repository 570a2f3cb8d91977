package ca

import (
	"context"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/internal/audit"
)

// Limits of the agents' port. They hold before anything is parsed.
const (
	maxMessage     = 64*(api.MaxTokenBytes+api.MaxCSRBytes) + 64<<10 // a full batch
	maxHeaderBytes = 16 << 10
	maxRPCs        = 16        // at once on one connection, one of them a session
	streamWindow   = 128 << 10 // what a call may send ahead of its handler
	connWindow     = 512 << 10
	bufferSize     = 8 << 10         // of each connection
	idleTime       = 5 * time.Minute // of a connection without calls
	handshakeTime  = 5 * time.Second
)

// NewServer returns the gRPC server of the agents' port, with Authority registered on it. Serve and stop it with a
// listener of the caller's.
func (ca *CA) NewServer(extra ...grpc.ServerOption) *grpc.Server {
	opts := slices.Concat([]grpc.ServerOption{
		grpc.Creds(transport{credentials.NewTLS(ca.ServerTLS()), ca}),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaderBytes),
	}, portOptions(), interceptors{ca, portAgents}.options(), extra)
	s := grpc.NewServer(opts...)
	apiv1.RegisterAuthorityServer(guarded{s, ca, portAgents}, &authority{ca: ca})
	return s
}

// portOptions are the bounds of every port that is reached over a network.
func portOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ConnectionTimeout(handshakeTime),
		grpc.MaxConcurrentStreams(maxRPCs),
		grpc.StaticStreamWindowSize(streamWindow), // gRPC would let it grow to 16 MiB for whoever sends fast
		grpc.StaticConnWindowSize(connWindow),
		grpc.ReadBufferSize(bufferSize),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: false}),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTime, Time: 5 * time.Minute, Timeout: 20 * time.Second}),
		grpc.WaitForHandlers(true), // the ledger is closed after the last of them
	}
}

// authority serves node agents.
type authority struct {
	apiv1.UnimplementedAuthorityServer
	ca *CA
}

// AttestAgent implements the call of that name.
func (a *authority) AttestAgent(ctx context.Context, r *apiv1.AttestAgentRequest) (*apiv1.AttestAgentResponse, error) {
	if _, err := a.ca.agree(r.GetProtocol(), r.GetOldestProtocol()); err != nil {
		return nil, err
	}
	if n := len(r.GetRenewal().GetTicket()); n > api.MaxTicketBytes {
		return nil, api.E(api.TicketInvalid, "the ticket has %d bytes, at most %d are read", n, api.MaxTicketBytes)
	}
	var entry audit.Entry
	issued, err := a.attestInTurn(ctx, r, &entry)
	a.ca.metrics.count("agent", err)
	if err != nil && entry.Cluster != "" {
		err = a.ca.recordRefusal(ctx, "AttestAgent", asker{}, entry, err) // its turn is others' by now
	}
	if err != nil {
		return nil, err
	}
	a.ca.log.InfoContext(ctx, "agent attested", "spiffe_id", issued.ID.String(), "not_after", issued.Leaf.NotAfter)
	return &apiv1.AttestAgentResponse{
		Chain:   issued.Chain,
		RenewAt: timestamppb.New(issued.RenewAt),
		Bundle:  bundleProto(a.ca.bundle.Load()),
		Ticket:  issued.ticket,
	}, nil
}

// attestInTurn waits for a turn and attests. What the record is to say of a refusal is in e then; nothing where nobody is
// known.
func (a *authority) attestInTurn(ctx context.Context, r *apiv1.AttestAgentRequest, e *audit.Entry) (*granted, error) {
	turn, err := a.ca.door.take(ctx, whence(ctx), a.ca.askDoor)
	if err != nil {
		return nil, err
	}
	defer turn.end()
	ctx = attestor.WithAside(ctx, turn.aside)
	evidence := attestor.Evidence{Kind: r.GetEvidence().GetKind(), Data: r.GetEvidence().GetData()}
	return a.ca.attestAgent(ctx, evidence, r.GetCsr(), r.GetRenewal().GetTicket(), time.Now(), e)
}

// Issue implements the call of that name: each item has its own result, so one refusal costs its neighbours nothing, and
// neither does one that waits for somebody who does not answer: its time ends before the call's.
func (a *authority) Issue(ctx context.Context, r *apiv1.IssueRequest) (*apiv1.IssueResponse, error) {
	who := admitted(ctx).asker
	items := r.GetItems()
	if len(items) == 0 || len(items) > api.MaxBatch {
		return nil, api.E(api.BatchSize, "%d requests in one call, want 1 to %d", len(items), api.MaxBatch)
	}
	ctx, cancel := itemTime(ctx)
	defer cancel()
	results := make([]*apiv1.IssueResult, len(items))
	var wg sync.WaitGroup
	for i, item := range items {
		if len(items) == 1 {
			results[i] = a.issueItem(ctx, who, item)
			break
		}
		wg.Go(func() { results[i] = a.issueItem(ctx, who, item) })
	}
	wg.Wait()
	return &apiv1.IssueResponse{Results: results}, nil
}

// answerTime is what is left of a call for its answer when the time of its items ends: a tenth, and no more than that.
const answerTime = time.Second

// itemTime returns the context of the items of a call. A call whose own time is over is lost with all SVIDs that it would have
// brought, and its agent asks for all of them again.
func itemTime(ctx context.Context) (context.Context, context.CancelFunc) {
	end, ok := ctx.Deadline()
	if !ok {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, end.Add(-min(answerTime, time.Until(end)/10)))
}

func (a *authority) issueItem(ctx context.Context, who asker, item *apiv1.IssueItem) (result *apiv1.IssueResult) {
	var err error
	var entry audit.Entry // what is known of the token; who asks is known in any case
	defer func() {        // the turn is others' by now: a record that hangs holds up nobody else
		if p := recover(); p != nil {
			a.ca.log.ErrorContext(ctx, "panic", "panic", p, "stack", string(debug.Stack()))
			err = api.E(api.Internal, "internal error")
		}
		a.ca.metrics.count("workload", err)
		if err != nil {
			err = a.ca.recordRefusal(ctx, "Issue", who, entry, err)
			result = &apiv1.IssueResult{Result: &apiv1.IssueResult_Refusal{Refusal: a.ca.refusal(ctx, err, "node", who.nodeName)}}
		}
	}()
	turn, terr := a.ca.itsTurn(ctx, who.nodeUID, item)
	if err = terr; err != nil {
		return nil
	}
	defer turn.end()
	ctx = attestor.WithAside(ctx, turn.aside)
	start := time.Now()
	e := attestor.Evidence{Kind: item.GetEvidence().GetKind(), Data: item.GetEvidence().GetData()}
	request := Request{Evidence: e, CSR: item.GetCsr(), Volume: item.GetVolume(), Renewal: renewalOf(item.GetRenewal())}
	issued, ierr := a.ca.issue(ctx, who, request, start, &entry)
	if err = ierr; err != nil {
		return nil
	}
	a.ca.metrics.issueSeconds.Observe(time.Since(start).Seconds())
	return &apiv1.IssueResult{Result: &apiv1.IssueResult_Svid{Svid: &apiv1.SVID{
		SpiffeId: issued.ID.String(),
		Chain:    issued.Chain,
		RenewAt:  timestamppb.New(issued.RenewAt),
		Ticket:   issued.ticket,
	}}}
}

// renewalOf is what a workload's agent shows beside the token.
func renewalOf(r *apiv1.Renewal) *Renewal {
	if r == nil {
		return nil
	}
	return &Renewal{Ticket: r.GetTicket(), Chain: r.GetChain(), Possession: r.GetPossession()}
}
