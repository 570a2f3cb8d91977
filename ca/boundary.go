package ca

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// refusal is what the caller learns of an error; the cause stays in our log under the same correlation id.
func (ca *CA) refusal(ctx context.Context, err error, attrs ...any) *apiv1.Refusal {
	e := ca.logRefusal(ctx, err, attrs...)
	r := &apiv1.Refusal{Reason: string(e.Reason), Message: e.Detail, CorrelationId: e.CorrelationID}
	if e.RetryAfter > 0 {
		r.RetryAfter = durationpb.New(e.RetryAfter)
	}
	return r
}

// logRefusal leaves a refusal in the log. Of callers whom nobody knows only some are, and of those that are refused because
// there is too much to do: see quiet.
func (ca *CA) logRefusal(ctx context.Context, err error, attrs ...any) *api.Error {
	e := *api.AsError(err)
	if e.CorrelationID == "" {
		e.CorrelationID = api.NewCorrelationID()
	}
	level := slog.LevelInfo
	if e.Reason.Kind() == api.KindInternal {
		level = slog.LevelError
	}
	ca.refused.Add(1)
	if e.Reason == api.Overloaded || !ca.knows(ctx) {
		left, ok := ca.quiet.mayLog(e.Reason, time.Now())
		if !ok {
			return &e
		}
		attrs = append(attrs, "left_out", left)
	}
	attrs = append(attrs, "reason", string(e.Reason), "code", e.Reason.Code(), "correlation_id", e.CorrelationID, "detail", e.Detail)
	if e.Err != nil {
		attrs = append(attrs, "cause", e.Err.Error())
	}
	ca.log.Log(ctx, level, "refused", attrs...)
	return &e
}

// boundary contains panics, and gives every error its reason and correlation id.
func (ca *CA) boundary(ctx context.Context, method string, err error, panicked any) error {
	if panicked != nil {
		ca.log.ErrorContext(ctx, "panic", "method", callName(method), "panic", panicked, "stack", string(debug.Stack()))
		err = api.E(api.Internal, "internal error")
	}
	if err == nil || ended(err) {
		return err
	}
	if e, ok := errors.AsType[*api.Error](err); ok && (e.Reason == api.SessionEnded || e.Reason.Kind() == api.KindCanceled) {
		return api.ToStatus(e).Err() // as planned by us or by the caller: nobody was refused
	}
	e := ca.logRefusal(ctx, ca.recordCall(ctx, method, err), "method", callName(method))
	ca.metrics.refusals.WithLabelValues(string(e.Reason)).Inc()
	return api.ToStatus(e).Err()
}

// ended reports whether a call ended by what gRPC itself says of it: the other side went away, or asked for something
// that is not there. That is no refusal of ours.
func ended(err error) bool {
	if _, ok := errors.AsType[*api.Error](err); ok {
		return false
	}
	_, ok := status.FromError(err)
	return ok || errors.Is(err, context.Canceled)
}

// knows reports whether it is proven who makes the call that ctx belongs to.
func (ca *CA) knows(ctx context.Context) bool {
	if slices.Contains(admitted(ctx).roles, roleViewer) {
		return true
	}
	if _, ok := refusedCaller(ctx); ok {
		return true
	}
	c, err := ca.callerByTLS(ctx, roleAnyone, time.Now())
	return err == nil && c.node != ""
}

// quietTime is the least time between two such lines about the same reason: nobody fills the disk by knocking, and who has too
// much to do has no time to say so to each.
const quietTime = 10 * time.Second

// quiet says which refusals are logged that anybody can cause as many of as he likes. The zero value is ready.
type quiet struct {
	mu sync.Mutex
	of map[api.Reason]*quietReason
}

type quietReason struct {
	until time.Time
	left  int // lines that were left out since the last
}

// mayLog reports whether a line about a reason is due, and how many were left out before it.
func (q *quiet) mayLog(r api.Reason, now time.Time) (left int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.of == nil {
		q.of = map[api.Reason]*quietReason{}
	}
	of := q.of[r]
	if of == nil {
		of = &quietReason{}
		q.of[r] = of
	}
	if now.Before(of.until) {
		of.left++
		return 0, false
	}
	left, of.left, of.until = of.left, 0, now.Add(quietTime)
	return left, true
}
