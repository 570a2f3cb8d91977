package api

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The table is closed and each row says all that it must.
func TestTable(t *testing.T) {
	numbers, last := map[int]Reason{}, 0
	shape := regexp.MustCompile(`^[A-Z][A-Z0-9_]+$`)
	for p := range Pages() {
		if !shape.MatchString(string(p.Reason)) {
			t.Errorf("%q is not an upper-case reason", p.Reason)
		}
		if other, ok := numbers[p.Number]; ok {
			t.Errorf("%s and %s share number %d", p.Reason, other, p.Number)
		}
		numbers[p.Number] = p.Reason
		if p.Number <= last {
			t.Errorf("%s is out of order", p.Reason)
		}
		last = p.Number
		for _, text := range []string{p.Title, p.Why, p.Do} {
			if text == "" {
				t.Errorf("%s has an empty text", p.Reason)
			}
		}
		if !strings.HasSuffix(p.Why, ".") || !strings.HasSuffix(p.Do, ".") || strings.HasSuffix(p.Title, ".") {
			t.Errorf("%s: why and do are sentences, the title is none", p.Reason)
		}
		if got := p.Reason.Page(); got != p || !p.Reason.Known() {
			t.Errorf("%s has the page of %s", p.Reason, got.Reason)
		}
	}
	if Reason("MADE_UP").Known() || Reason("").Known() {
		t.Error("a reason that is not in the table is known")
	}
	if Reason("MADE_UP").Page().Reason != Internal {
		t.Error("an unknown reason has not the page of Internal")
	}
}

// Every reason crosses gRPC and comes back whole, and its cause stays behind.
func TestStatus(t *testing.T) {
	for p := range Pages() {
		sent := &Error{Reason: p.Reason, Detail: "it happened", CorrelationID: "c0ffee", RetryAfter: 3 * time.Second, Err: errors.New("secret cause")}
		st := ToStatus(fmt.Errorf("wrapped: %w", sent))
		if st.Code() != p.Reason.GRPC() || st.Code() == codes.OK || st.Code() == codes.Unknown {
			t.Errorf("%s travels as %s", p.Reason, st.Code())
		}
		if strings.Contains(fmt.Sprint(st.Proto()), "secret") {
			t.Errorf("%s carries its cause", p.Reason)
		}
		got, ok := errors.AsType[*Error](FromStatus(st.Err()))
		if !ok || got.Reason != p.Reason || got.Detail != sent.Detail || got.CorrelationID != "c0ffee" || got.RetryAfter != 3*time.Second {
			t.Errorf("%s came back as %+v", p.Reason, got)
		}
	}
}

func TestForeignErrors(t *testing.T) {
	for _, r := range []struct {
		name string
		err  error
		want Reason
	}{
		{"plain", errors.New("password=hunter2"), Internal},
		{"deadline", fmt.Errorf("x: %w", context.DeadlineExceeded), DeadlineExceeded},
		{"canceled", context.Canceled, Canceled},
	} {
		t.Run(r.name, func(t *testing.T) {
			if got := ReasonOf(AsError(r.err)); got != r.want {
				t.Errorf("reason %s, want %s", got, r.want)
			}
			if text := ToStatus(r.err).Message(); strings.Contains(text, "hunter2") {
				t.Errorf("the text of a foreign error left: %q", text)
			}
		})
	}
	for code, want := range map[codes.Code]Reason{
		codes.Unavailable: CAUnavailable, codes.DeadlineExceeded: DeadlineExceeded, codes.Canceled: Canceled, codes.Unimplemented: Internal,
	} {
		if got := ReasonOf(FromStatus(status.Error(code, "x"))); got != want {
			t.Errorf("a foreign status %s has reason %s, want %s", code, got, want)
		}
	}
	if FromStatus(nil) != nil || ToStatus(nil).Code() != codes.OK {
		t.Error("no error became one")
	}
}

func TestErrorKeepsItsCause(t *testing.T) {
	cause := errors.New("cause")
	for _, err := range []error{Wrap(StateUnknown, cause, "text"), E(StateUnknown, "text %v", cause)} {
		if !errors.Is(err, cause) || ReasonOf(fmt.Errorf("x: %w", err)) != StateUnknown {
			t.Errorf("%v lost its cause or its reason", err)
		}
		if want := "(STATE_OUTCOME_UNKNOWN, SGN-0808)"; !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%q does not end in %s", err, want)
		}
	}
}
