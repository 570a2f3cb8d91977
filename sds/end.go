package sds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"time"

	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
)

// refuse is the end of a stream that never was one.
func (s *Server) refuse(protocol, workload string, err error) error {
	e := s.explain(s.log.With("workload", workload, "protocol", protocol), "stream refused", err)
	if f := s.cfg.Hooks.Refused; f != nil {
		f(protocol, e.Reason)
	}
	return api.ToStatus(e).Err()
}

// end is the end of a stream; a nil err is the client's own.
func (s *Server) end(protocol string, log *slog.Logger, err error) error {
	var reason api.Reason
	var st error
	if err != nil {
		e := s.explain(log, "stream ended", err)
		reason, st = e.Reason, api.ToStatus(e).Err()
	}
	if f := s.cfg.Hooks.Closed; f != nil {
		f(protocol, reason)
	}
	return st
}

// explain makes err fit to cross the wire, and leaves its cause in the log under the same correlation id.
func (s *Server) explain(log *slog.Logger, what string, err error) *api.Error {
	e := *api.AsError(err) // a copy: the Source may return one error to many
	if e.CorrelationID == "" {
		e.CorrelationID = api.NewCorrelationID()
	}
	level := slog.LevelWarn
	switch e.Reason {
	case api.Internal:
		level = slog.LevelError
	case api.ReauthRequired, api.AgentStopping, api.Canceled:
		level = slog.LevelDebug
	}
	log.Log(context.Background(), level, what, "reason", e.Reason, "code", e.Reason.Code(), "detail", e.Detail,
		"correlation_id", e.CorrelationID, "cause", e.Err)
	return &e
}

// clientError sorts what ended reading or sending: nil when the client went away, which it may.
func clientError(err error) error {
	if _, ok := errors.AsType[*api.Error](err); ok {
		return err
	}
	if errors.Is(err, io.EOF) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return nil // gRPC has told the client already, if it is still there
	}
	return err
}

// expiry returns the time before at when a stream ends, zero for never: see Workload.ExpireAt.
func expiry(at, now time.Time) time.Time {
	if at.IsZero() {
		return time.Time{}
	}
	left := at.Sub(now)
	return now.Add(left - time.Duration((0.05+0.15*rand.Float64())*float64(left)))
}

// aside calls f in a goroutine of its own and waits: the stack that f needs ends with it, and the caller's stays small.
func aside[T any](f func() (T, error)) (v T, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		v, err = f()
	}()
	<-done
	return v, err
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

// call calls a hook that may be nil.
func call[T any](f func(T), v T) {
	if f != nil {
		f(v)
	}
}
