package api

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// ErrorDomain is the domain of the ErrorInfo that carries a Reason across gRPC.
const ErrorDomain = "signet-ca"

// Error is a refusal or a failure with a Reason of the closed table. Its text never holds a token, a key, CSR bytes or
// the name of somebody else's identity: it may be shown to whoever caused it.
type Error struct {
	Reason        Reason
	Detail        string        // what happened, for the one who asked; lower case, no full stop
	CorrelationID string        // found again in the ledger and the log; empty until it crosses the boundary
	RetryAfter    time.Duration // zero: the caller's own backoff
	Err           error         // cause, for our own log only: never crosses the wire
}

// E makes an Error. Format and args make Detail; an argument that is an error becomes the cause for our own log, and its
// text is part of Detail only where the format says so.
func E(r Reason, format string, args ...any) *Error {
	e := &Error{Reason: r, Detail: fmt.Sprintf(format, args...)}
	for _, a := range args {
		if err, ok := a.(error); ok {
			e.Err = err
		}
	}
	return e
}

// Wrap makes an Error with a cause that is kept for our own log and never shown to the caller.
func Wrap(r Reason, cause error, detail string) *Error {
	return &Error{Reason: r, Detail: detail, Err: cause}
}

// Error returns "detail (REASON, SGN-nnnn)".
func (e *Error) Error() string {
	return fmt.Sprintf("%s (%s, %s)", e.Detail, e.Reason, e.Reason.Code())
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// ReasonOf returns the Reason of err, and Internal for an error that carries none.
func ReasonOf(err error) Reason {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Reason
	}
	return Internal
}

// AsError returns err as an *Error. An error without a Reason becomes Internal, and its text stays behind.
func AsError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return Wrap(DeadlineExceeded, err, "the deadline passed")
	case errors.Is(err, context.Canceled):
		return Wrap(Canceled, err, "the caller went away")
	}
	return Wrap(Internal, err, "internal error")
}

// NewCorrelationID returns 16 random hex digits.
func NewCorrelationID() string {
	var b [8]byte
	rand.Read(b[:]) // never fails: crypto/rand ends the process instead
	return hex.EncodeToString(b[:])
}

// ToStatus is the one mapping from errors to gRPC: code and message of the Reason, ErrorInfo with reason, SGN number and
// correlation id, RetryInfo where there is a delay. The cause is left behind.
func ToStatus(err error) *status.Status {
	if err == nil {
		return status.New(codes.OK, "")
	}
	e := AsError(err)
	st := status.New(e.Reason.GRPC(), e.Detail)
	info := &errdetails.ErrorInfo{Reason: string(e.Reason), Domain: ErrorDomain, Metadata: map[string]string{"code": e.Reason.Code()}}
	if e.CorrelationID != "" {
		info.Metadata["correlation_id"] = e.CorrelationID
	}
	with, werr := st.WithDetails(info)
	if werr == nil && e.RetryAfter > 0 {
		with, werr = with.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)})
	}
	if werr != nil {
		return st
	}
	return with
}

// FromStatus is the inverse of ToStatus for an error that came from a gRPC call. A status that carries no reason of ours
// (a broken connection, a foreign server) becomes Unavailable's or Internal's reason, with its text.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	e := &Error{Detail: st.Message(), Err: err}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == ErrorDomain {
				e.Reason, e.CorrelationID = Reason(d.GetReason()), d.GetMetadata()["correlation_id"]
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = d.GetRetryDelay().AsDuration()
		}
	}
	if e.Reason.Known() {
		return e
	}
	switch st.Code() {
	case codes.Unavailable:
		e.Reason = CAUnavailable
	case codes.DeadlineExceeded:
		e.Reason = DeadlineExceeded
	case codes.Canceled:
		e.Reason = Canceled
	default:
		e.Reason = Internal
	}
	return e
}
