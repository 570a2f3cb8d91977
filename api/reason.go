package api

import (
	"fmt"
	"iter"
	"slices"

	"google.golang.org/grpc/codes"
)

// A Reason says why a request was refused or failed. The set is closed: a peer, a script or an alert may match on it.
type Reason string

// A Kind is the class of a Reason. Kinds map one to one onto gRPC codes.
type Kind uint8

// The kinds.
const (
	KindInternal         Kind = iota // a fault of ours
	KindInvalid                      // the request can never be right
	KindUnauthenticated              // who asks is not proven
	KindPermissionDenied             // who asks is proven and may not
	KindNotReady                     // the state of things does not allow it now
	KindNotFound                     // there is no such thing
	KindConflict                     // somebody else was first
	KindExhausted                    // a limit is reached
	KindUnavailable                  // a part is away; try again
	KindDeadline                     // it took too long
	KindCanceled                     // the caller ended it
	KindUnimplemented                // there is no such call here
)

var kinds = [...]struct {
	name string
	code codes.Code
}{
	KindInternal:         {"internal", codes.Internal},
	KindInvalid:          {"invalid", codes.InvalidArgument},
	KindUnauthenticated:  {"unauthenticated", codes.Unauthenticated},
	KindPermissionDenied: {"permission denied", codes.PermissionDenied},
	KindNotReady:         {"not ready", codes.FailedPrecondition},
	KindNotFound:         {"not found", codes.NotFound},
	KindConflict:         {"conflict", codes.Aborted},
	KindExhausted:        {"exhausted", codes.ResourceExhausted},
	KindUnavailable:      {"unavailable", codes.Unavailable},
	KindDeadline:         {"deadline", codes.DeadlineExceeded},
	KindCanceled:         {"canceled", codes.Canceled},
	KindUnimplemented:    {"not served here", codes.Unimplemented},
}

// String returns the kind as people read it.
func (k Kind) String() string { return kinds[k].name }

// Page is what is known of one Reason.
type Page struct {
	Reason Reason
	Number int // of the SGN code
	Kind   Kind
	Title  string // what happened
	Why    string // why Signet thinks so
	Do     string // what to do about it
}

// Code returns "SGN-0106" and the like.
func (p Page) Code() string { return fmt.Sprintf("SGN-%04d", p.Number) }

// Page returns what is known of r; an unknown reason has the page of Internal.
func (r Reason) Page() Page {
	if i := index(r); i >= 0 {
		return table[i]
	}
	return table[index(Internal)]
}

// Known reports whether r is of the closed table.
func (r Reason) Known() bool { return index(r) >= 0 }

// Code returns the SGN code of r.
func (r Reason) Code() string { return r.Page().Code() }

// Kind returns the class of r.
func (r Reason) Kind() Kind { return r.Page().Kind }

// GRPC returns the gRPC code that r travels with.
func (r Reason) GRPC() codes.Code { return kinds[r.Kind()].code }

// Pages returns the whole table in the order of its numbers.
func Pages() iter.Seq[Page] { return slices.Values(table) }

func index(r Reason) int {
	return slices.IndexFunc(table, func(p Page) bool { return p.Reason == r })
}
