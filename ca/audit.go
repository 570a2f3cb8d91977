package ca

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/internal/audit"
)

// refuseTime bounds how long a refusal waits for its record: on a disk that hangs it leaves without.
const refuseTime = 2 * time.Second

// unrecorded is the refusal of what could not be put on record. Where there was no room, that passes by itself.
func unrecorded(err error, detail string) error {
	if errors.Is(err, audit.ErrFull) {
		return api.Wrap(api.LedgerFull, err, detail)
	}
	return api.Wrap(api.LedgerFailed, err, detail)
}

// recordRefusal puts a refusal on record and returns it with the correlation id under which it is found there. E holds
// what is known of the token and of the caller, who is the agent that asked; where nothing is known of any, and where the
// CA could not do its part, it is only counted, for that could be repeated at will. A token that was refused says on record
// whose it is, but nobody is known by it: whoever finds one could repeat it.
func (ca *CA) recordRefusal(ctx context.Context, method string, who asker, e audit.Entry, cause error) error {
	refusal := *api.AsError(cause)
	if e.CorrelationID == "" {
		e.CorrelationID = api.NewCorrelationID()
	}
	refusal.CorrelationID = e.CorrelationID
	if refusal.Reason.Kind() == api.KindCanceled {
		return &refusal
	}
	e.Kind, e.Reason, e.Detail, e.Method = audit.KindRefuse, string(refusal.Reason), refusal.Detail, method
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	if who.nodeUID != "" {
		e.CallerNode, e.CallerNodeUID = who.nodeName, who.nodeUID
		if id, err := api.AgentID(ca.cfg.TrustDomain, who.nodeUID); err == nil {
			e.Caller = id.String()
		}
	}
	known := e.PodUID != "" || e.Caller != "" || e.CallerNodeUID != ""
	if c, ok := attestor.ClaimedBy(cause); ok && e.PodUID == "" {
		e.Cluster, e.Namespace, e.ServiceAccount, e.ServiceAccountUID = c.Issuer, c.Namespace, c.ServiceAccount, c.ServiceAccountUID
		e.Pod, e.PodUID, e.Node, e.NodeUID, e.TokenID = c.PodName, c.PodUID, c.NodeName, c.NodeUID, c.TokenID
	}
	switch {
	case !known, refusal.Reason.Kind() == api.KindExhausted,
		refusal.Reason == api.LedgerFull, refusal.Reason == api.LedgerFailed:
		ca.cfg.Ledger.Sample(e)
		return &refusal
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), refuseTime)
	defer cancel()
	id, err := ca.cfg.Ledger.Refuse(ctx, e)
	if err != nil {
		ca.log.DebugContext(ctx, "refusal not recorded", "correlation_id", e.CorrelationID, "reason", e.Reason, "error", err)
	}
	refusal.CorrelationID = id
	return &refusal
}

// recordCall is recordRefusal for a whole call that was refused before anything was recorded about it: who made it is known
// by its connection, if at all: an agent, another SVID of ours that was verified, or a user of this machine.
func (ca *CA) recordCall(ctx context.Context, method string, cause error) error {
	if api.AsError(cause).CorrelationID != "" {
		return cause
	}
	var who asker
	var e audit.Entry
	if user, ok := localUser(ctx); ok {
		e.Caller = fmt.Sprint("uid:", user.UserID())
	} else if refused, ok := refusedCaller(ctx); ok {
		e.Caller, e.TokenID = refused.name, refused.token.TokenID
		e.Cluster, e.Namespace, e.ServiceAccount, e.ServiceAccountUID = refused.token.Issuer, refused.token.Namespace, refused.token.ServiceAccount, refused.token.ServiceAccountUID
	} else if by := admitted(ctx); by.name != "" {
		e.Caller, e.TokenID = by.name, by.token.TokenID
	} else if c, err := ca.callerByTLS(ctx, roleAnyone, time.Now()); err == nil {
		who.nodeUID, e.Caller = c.node, c.id
	}
	return ca.recordRefusal(ctx, callName(method), who, e, cause)
}

// MaxAuditLast is the most of ListAuditRequest.last: so many are remembered while the record is read. All may be asked for,
// and then none is.
const MaxAuditLast = 100_000

// Bounds of one piece of the answer of ListAudit, which has to stay below gRPC's own 4 MiB.
const (
	pageEntries = 256
	pageBytes   = 1 << 20
)

// auditPulse is how often something of the answer is sent, though nothing be found: who waits knows that it is looked for.
const auditPulse = time.Second

// auditStream is an answer of ListAudit that is sent in pieces. Its methods are for several goroutines.
type auditStream struct {
	grpc.ServerStreamingServer[apiv1.ListAuditResponse]

	mu   sync.Mutex
	page *apiv1.ListAuditResponse
	size int
	sent bool // since the last pulse
	look *look
}

// add puts an entry into the piece that goes next, and sends it when it is large.
func (s *auditStream) add(e *apiv1.AuditEntry) (sent bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.page.Entries = append(s.page.Entries, e)
	if s.size += proto.Size(e); len(s.page.Entries) < pageEntries && s.size < pageBytes {
		return false, nil
	}
	return true, s.send()
}

// flush sends what there is.
func (s *auditStream) flush() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.page.Entries) == 0 {
		return nil
	}
	return s.send()
}

// send sends the piece; the caller holds mu.
func (s *auditStream) send() error {
	page := s.page
	s.page, s.size, s.sent = &apiv1.ListAuditResponse{}, 0, true
	s.look.sending()
	defer s.look.sent()
	return s.Send(page)
}

// keepAlive sends what there is, if only that it is looked for, until done is closed.
func (s *auditStream) keepAlive(done <-chan struct{}) {
	pulse := time.NewTicker(auditPulse)
	defer pulse.Stop()
	for {
		select {
		case <-done:
			return
		case <-pulse.C:
		}
		if !s.mu.TryLock() {
			continue // something is being sent
		}
		var err error
		if !s.sent {
			err = s.send()
		}
		s.sent = false
		s.mu.Unlock()
		if err != nil {
			return // the next who sends is told
		}
	}
}

// ListAudit implements the call of that name.
func (a *admin) ListAudit(r *apiv1.ListAuditRequest, stream grpc.ServerStreamingServer[apiv1.ListAuditResponse]) error {
	if a.ca.cfg.Archive == nil {
		return api.E(api.NotFound, "this CA keeps no record that can be read")
	}
	if r.GetLast() > MaxAuditLast {
		return api.E(api.MessageTooLarge, "the newest %d entries at most are picked out: ask for fewer, for all, or since a time", MaxAuditLast)
	}
	look, err := a.ca.look(stream.Context())
	if err != nil {
		return err
	}
	defer look.end()
	out := &auditStream{ServerStreamingServer: stream, page: &apiv1.ListAuditResponse{}, look: look}
	var wg sync.WaitGroup
	defer wg.Wait()
	done := make(chan struct{})
	defer close(done)
	wg.Go(func() { out.keepAlive(done) })
	ctx := stream.Context()
	for rec, err := range a.ca.cfg.Archive.Records(ctx, queryOf(r)) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			// What was found so far is true and is told; that there is more is the error.
			return errors.Join(out.flush(), api.Wrap(api.LedgerDamaged, err, "the ledger cannot be read any further; run signet-ca ledger verify"))
		}
		sent, err := out.add(auditProto(&rec))
		if err != nil {
			return err
		}
		if sent {
			select {
			case <-a.ca.stopping:
				return api.E(api.CAUnavailable, "the CA is stopping")
			default:
			}
		}
	}
	return out.flush()
}

// queryOf is what a request asks for.
func queryOf(r *apiv1.ListAuditRequest) audit.Query {
	q := audit.Query{Last: int(r.GetLast()), ID: r.GetCorrelationId(), Match: func(rec *audit.Record) bool { return matches(r, rec) }}
	if t := r.GetSince(); t != nil {
		q.Since = t.AsTime()
	}
	if t := r.GetUntil(); t != nil {
		q.Until = t.AsTime()
	}
	for _, v := range []string{r.GetSpiffeId(), r.GetNamespace(), r.GetSerial(), r.GetReason(), r.GetCorrelationId(), r.GetTokenId(), r.GetPod(), r.GetNode()} {
		if v != "" {
			q.Values = append(q.Values, v)
		}
	}
	return q
}

func matches(r *apiv1.ListAuditRequest, rec *audit.Record) bool {
	is := func(want string, have ...string) bool { return want == "" || slices.Contains(have, want) }
	return is(r.GetSpiffeId(), rec.SPIFFEID) && is(r.GetNamespace(), rec.Namespace) && is(r.GetPod(), rec.Pod, rec.PodUID) &&
		is(r.GetNode(), rec.Node, rec.NodeUID, rec.CallerNode, rec.CallerNodeUID) && is(r.GetSerial(), rec.Serial) &&
		is(r.GetReason(), rec.Reason) && is(r.GetCorrelationId(), rec.CorrelationID) && is(r.GetTokenId(), rec.TokenID) &&
		(len(r.GetKinds()) == 0 || slices.Contains(r.GetKinds(), string(rec.Kind)))
}

func auditProto(r *audit.Record) *apiv1.AuditEntry {
	return &apiv1.AuditEntry{
		Source: r.Source, Seq: r.Seq, Time: timeProto(r.Time), Kind: string(r.Kind), CorrelationId: r.CorrelationID, SpiffeId: r.SPIFFEID,
		Cluster: r.Cluster, Namespace: r.Namespace, ServiceAccount: r.ServiceAccount, ServiceAccountUid: r.ServiceAccountUID,
		Pod: r.Pod, PodUid: r.PodUID, Node: r.Node, NodeUid: r.NodeUID, TokenId: r.TokenID, DnsNames: r.DNSNames,
		Serial: r.Serial, NotAfter: timeProto(r.NotAfter), Issuer: r.Issuer, Reason: r.Reason, Detail: r.Detail, Method: r.Method,
		Caller: r.Caller, CallerNode: r.CallerNode, Count: r.Count, Last: timeProto(r.Last), Grace: r.Grace,
	}
}

func timeProto(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
