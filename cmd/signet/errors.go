package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
)

// The exit codes. `signet help exit-codes` tells people about them; scripts depend on them.
const (
	exitGood     = 0
	exitFailed   = 1
	exitUsage    = 2
	exitFindings = 3
	exitTimeout  = 124 // as timeout(1)

	exitInterrupted = 130 // as a shell says that SIGINT ended it
)

// A failure is an error for people: what happened and its code are in the api.Error.
type failure struct {
	err  *api.Error
	why  string // empty: the reason's page says it
	next string // a line to type, starting with "signet" where it is ours; empty: why, or explain
	deaf bool   // signet why would fail in the same way
}

// Error returns the text of the error with the reason.
func (f *failure) Error() string { return f.err.Error() }

// Unwrap returns the error with the reason.
func (f *failure) Unwrap() error { return f.err }

// A usageError is a command line that is wrong in a way that only the command itself can see.
type usageError struct{ error }

// A mistake is a usage error that has a better line to type than the help.
type mistake struct {
	error
	next string
}

// findings is the outcome of a command that worked and found something wrong.
type findings struct{ summary string }

// Error returns the summary.
func (f *findings) Error() string { return f.summary }

// exitCode tells about err on stderr and returns the code to leave with.
func (a *app) exitCode(cmd *cobra.Command, err error) int {
	if err == nil {
		return exitGood
	}
	if f, ok := errors.AsType[*findings](err); ok {
		a.say("%s", f.summary)
		return exitFindings
	}
	if i, ok := errors.AsType[*interrupted](err); ok {
		a.say("%s", i.said)
		return exitInterrupted
	}
	if m, ok := errors.AsType[*mistake](err); ok {
		a.tell("usage", m.Error(), "", m.next)
		return exitUsage
	}
	_, usage := errors.AsType[usageError](err)
	if _, known := errors.AsType[*api.Error](err); usage || !known && !a.started {
		if cmd.Name() == "help" {
			cmd = cmd.Root()
		}
		a.tell("usage", err.Error(), "", cmd.CommandPath()+" --help")
		return exitUsage
	}
	f, ok := errors.AsType[*failure](err)
	if !ok {
		f = &failure{err: asError(err)}
	}
	page := f.err.Reason.Page()
	if f.why == "" {
		f.why = page.Why
	}
	steps := []string{"signet explain " + page.Code()}
	if id := f.err.CorrelationID; isCorrelationID(id) && !f.deaf { // it comes from a peer, and goes into a line to type
		steps = append([]string{"signet why " + id}, steps...)
	}
	if f.next != "" && f.next != steps[0] {
		steps = append([]string{f.next}, steps...)
	}
	a.tell("error "+page.Code(), f.err.Detail, f.why, steps[0])
	if f.err.CorrelationID != "" {
		a.line("id", f.err.CorrelationID)
	}
	for _, more := range steps[1:] {
		a.line("more", a.asCalled(more))
	}
	if f.err.Reason == api.DeadlineExceeded {
		return exitTimeout
	}
	return exitFailed
}

// asError keeps the text of an error without a reason: it was made on this machine, for the one who reads it.
func asError(err error) *api.Error {
	e := api.AsError(err)
	if e.Reason == api.Internal {
		if _, ours := errors.AsType[*api.Error](err); !ours {
			e.Detail = err.Error()
		}
	}
	return e
}

func (a *app) tell(what, detail, why, next string) {
	p := a.pen(a.stderr)
	fmt.Fprintf(a.stderr, "%s: %s\n", p.red(what), scrub(detail))
	if why != "" {
		a.line("why", why)
	}
	a.line("next", a.asCalled(next))
}

func (a *app) line(label, text string) {
	fmt.Fprintf(a.stderr, "  %-5s %s\n", label, scrub(text))
}

// say writes one line of talk to stderr.
func (a *app) say(format string, args ...any) {
	fmt.Fprintln(a.stderr, scrub(fmt.Sprintf(format, args...)))
}

// plural returns "1 thing" or "3 things".
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	if stem, ok := strings.CutSuffix(thing, "y"); ok {
		thing = stem + "ie"
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
