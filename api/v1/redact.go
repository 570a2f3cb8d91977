// Package apiv1 is what crosses the wire, generated from signet.proto; by hand is only what keeps the secrets in it from
// being shown.
package apiv1

import (
	"fmt"
	"log/slog"
)

// What carries a token shows nothing of it, whatever the verb and the handler: the generated String would print it.

func redacted(f fmt.State, what string) { fmt.Fprint(f, what, " (not shown)") }

// Format implements fmt.Formatter.
func (x *Evidence) Format(f fmt.State, _ rune) { redacted(f, "Evidence") }

// Format implements fmt.Formatter.
func (x *AttestAgentRequest) Format(f fmt.State, _ rune) { redacted(f, "AttestAgentRequest") }

// Format implements fmt.Formatter.
func (x *IssueRequest) Format(f fmt.State, _ rune) { redacted(f, "IssueRequest") }

// Format implements fmt.Formatter.
func (x *IssueItem) Format(f fmt.State, _ rune) { redacted(f, "IssueItem") }

// Format implements fmt.Formatter.
func (x *SessionRequest) Format(f fmt.State, _ rune) { redacted(f, "SessionRequest") }

// Format implements fmt.Formatter.
func (x *Hello) Format(f fmt.State, _ rune) { redacted(f, "Hello") }

// LogValue implements slog.LogValuer.
func (x *Evidence) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(x)) }

// LogValue implements slog.LogValuer.
func (x *AttestAgentRequest) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(x)) }

// LogValue implements slog.LogValuer.
func (x *IssueRequest) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(x)) }

// LogValue implements slog.LogValuer.
func (x *IssueItem) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(x)) }

// LogValue implements slog.LogValuer.
func (x *SessionRequest) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(x)) }

// LogValue implements slog.LogValuer.
func (x *Hello) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(x)) }
