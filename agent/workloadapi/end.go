package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
)

// denied marks the error of a workload that has no identity and will have none.
type denied struct{ error }

func (d denied) Unwrap() error { return d.error }

// refuse is the end of a call that was not let in.
func (s *Server) refuse(call string, err error) error {
	reason, st := s.explain("call refused", call, 0, err)
	if f := s.cfg.Hooks.Refused; f != nil {
		f(call, reason)
	}
	return st
}

// end is the end of a stream; a nil err is the client's own.
func (s *Server) end(call string, stream uint64, err error) (st error) {
	var reason api.Reason
	if p, ok := errors.AsType[passed](err); ok {
		st = p.error
	} else if err != nil {
		reason, st = s.explain("stream ended", call, stream, err)
	}
	if f := s.cfg.Hooks.Closed; f != nil {
		f(call, reason)
	}
	return st
}

// explain makes err fit to cross the wire, and leaves its cause in the log under the same correlation id.
func (s *Server) explain(what, call string, stream uint64, err error) (api.Reason, error) {
	e := *api.AsError(err) // a copy: the Source may return one error to many
	if e.CorrelationID == "" {
		e.CorrelationID = api.NewCorrelationID()
	}
	level := slog.LevelWarn
	switch e.Reason {
	case api.Internal:
		level = slog.LevelError
	case api.AgentStopping, api.Canceled:
		level = slog.LevelDebug
	}
	if left, ok := s.mayLog(e.Reason, time.Now()); ok {
		s.log.Log(context.Background(), level, what, "call", call, "stream", stream, "reason", e.Reason, "code", e.Reason.Code(),
			"detail", e.Detail, "correlation_id", e.CorrelationID, "cause", e.Err, "left_out", left)
	}
	p := api.ToStatus(&e).Proto()
	_, final := errors.AsType[denied](err)
	p.Code = int32(endpointCode(e.Reason.Kind(), final))
	return e.Reason, status.FromProto(p).Err()
}

// endpointCode returns the code that the SPIFFE Workload Endpoint knows for it (appendix A): clients give up on
// InvalidArgument, which is for a missing header alone, and come back after PermissionDenied and Unavailable. Internal is
// a defect, and is called one.
func endpointCode(k api.Kind, final bool) codes.Code {
	switch {
	case final:
		return codes.PermissionDenied
	case k == api.KindInvalid:
		return codes.InvalidArgument
	case k == api.KindUnimplemented:
		return codes.Unimplemented
	case k == api.KindInternal:
		return codes.Internal
	}
	return codes.Unavailable
}

// quietTime is the least time between two lines about the same reason: nobody fills the log by knocking.
const quietTime = 10 * time.Second

type quiet struct {
	until time.Time
	left  int // lines that were left out since the last
}

// mayLog reports whether a line about a reason is due, and how many were left out before it.
func (s *Server) mayLog(r api.Reason, now time.Time) (left int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.quiet[r]
	if q == nil {
		q = &quiet{}
		s.quiet[r] = q
	}
	if now.Before(q.until) {
		q.left++
		return 0, false
	}
	left, q.left, q.until = q.left, 0, now.Add(quietTime)
	return left, true
}

// aside calls f in a goroutine of its own and waits: the stack that f needs ends with it, and the caller's stays small.
func aside(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- contain(f) }()
	return <-done
}

// contain turns a panic into an error with its stack, so that it ends one stream and not the agent.
func contain(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = api.Wrap(api.Internal, fmt.Errorf("panic: %v\n%s", p, debug.Stack()), "internal error")
		}
	}()
	return f()
}
