package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
)

// Errors of single requests.
var (
	// ErrNotFound: there is no such object; of a collection, or of an object that was to be made: no such kind of object.
	ErrNotFound = errors.New("there is no such object")
	// ErrConflict: the object was changed, made or deleted meanwhile; nothing was written.
	ErrConflict = errors.New("the object was changed meanwhile")
	// errExpired: the version that a list or a watch began from is no longer kept (410 Gone).
	errExpired = errors.New("the API server no longer keeps that version")
)

// status is an error as the API server writes it.
type status struct {
	Code    int    `json:"code"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// Error quotes the server, shortened.
func (s status) Error() string {
	return fmt.Sprintf("the API server answered with status %d: %.200s", s.Code, s.Message)
}

func failure(resp *http.Response) error {
	var s status
	data, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil || json.Unmarshal(data, &s) != nil {
		s = status{} // the status line says enough
	}
	s.Code = resp.StatusCode
	return s.err()
}

func (s status) err() error {
	switch s.Code {
	case http.StatusNotFound:
		return fmt.Errorf("%w: %w", ErrNotFound, s)
	case http.StatusConflict:
		return fmt.Errorf("%w: %w", ErrConflict, s)
	case http.StatusForbidden:
		return fmt.Errorf("%w: %w", ErrForbidden, s)
	case http.StatusGone:
		return fmt.Errorf("%w: %w", errExpired, s)
	}
	return s
}

// Cause is what an error of this package comes down to, as a word of a closed set, for metrics.
type Cause string

// All causes.
const (
	CauseForbidden   Cause = "forbidden"   // the client lacks the permission, or an admission policy says no
	CauseAbsent      Cause = "absent"      // no such object, or no such kind of object
	CauseConflict    Cause = "conflict"    // somebody else was faster
	CauseExpired     Cause = "expired"     // the version to go on from is no longer kept
	CauseInvalid     Cause = "invalid"     // the API server refused what was sent
	CauseThrottled   Cause = "throttled"   // the API server has too much to do
	CauseServer      Cause = "server"      // the API server failed
	CauseTimeout     Cause = "timeout"     // there was no answer in time
	CauseUnreachable Cause = "unreachable" // there was no connection
	CauseBroken      Cause = "broken"      // the answer broke off or is none
)

// CauseOf returns the cause of err, which is not nil.
func CauseOf(err error) Cause {
	switch {
	case errors.Is(err, ErrForbidden):
		return CauseForbidden
	case errors.Is(err, ErrConflict): // before absent: what was replaced is gone
		return CauseConflict
	case errors.Is(err, ErrNotFound):
		return CauseAbsent
	case errors.Is(err, errExpired):
		return CauseExpired
	}
	if s, ok := errors.AsType[status](err); ok {
		switch {
		case s.Code == http.StatusTooManyRequests:
			return CauseThrottled
		case s.Code/100 == 5:
			return CauseServer
		}
		return CauseInvalid
	}
	if timeout, ok := errors.AsType[net.Error](err); errors.Is(err, context.DeadlineExceeded) || ok && timeout.Timeout() {
		return CauseTimeout
	}
	if _, ok := errors.AsType[*net.OpError](err); ok {
		return CauseUnreachable
	}
	return CauseBroken
}

// General says whether the cause is the API server's state or the way to it, so that the next request would fail as well.
func (c Cause) General() bool {
	switch c {
	case CauseThrottled, CauseServer, CauseTimeout, CauseUnreachable, CauseBroken:
		return true
	}
	return false
}
