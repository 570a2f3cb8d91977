// Package attestor proves and verifies what a workload or a node is.
//
// Evidence is what the CA believes; the agent that carries it is never believed. There is one file for each kind of
// evidence, with both halves in it: the Prover that collects it and the Attestor that checks it. Everything in Claims was
// read from evidence whose signature, audience and time were checked; nothing in it comes from the caller's own words.
package attestor

import (
	"context"
	"time"
)

// Evidence is a proof and its kind, as it crosses the wire.
type Evidence struct {
	Kind string // api.EvidenceServiceAccount
	Data []byte // secret: never logged, never part of an error
}

// Claims are the attested facts about a pod: the workload that asks, or the agent of a node.
type Claims struct {
	Kind               string // of the evidence they came from
	Issuer             string // "iss": tells clusters apart
	Namespace          string // DNS label, at most 63 bytes
	ServiceAccount     string // DNS subdomain, at most 253 bytes
	ServiceAccountUID  string
	PodName            string
	PodUID             string
	NodeName           string
	NodeUID            string
	TokenID            string // "jti", or a hash of the token where the issuer writes none
	IssuedAt, ExpireAt time.Time
}

// Attestor verifies one kind of evidence. It is safe for concurrent use, bounds its input before it spends on it, and
// answers with an *api.Error whose text holds no part of the evidence.
type Attestor interface {
	// Attest checks evidence for exactly one audience at one time and returns what it proves. With an error there are no
	// claims: what refused evidence only says is told by ClaimedBy, for the record. Where it has to wait for
	// somebody else, it does so as ctx says (WithAside).
	Attest(ctx context.Context, e Evidence, audience string, now time.Time) (Claims, error)
}

// Prover collects evidence of what the calling process is.
type Prover interface {
	// Prove returns fresh evidence; it reads its source anew each time.
	Prove(ctx context.Context) (Evidence, error)
}

type (
	asideKey   struct{}
	refusalKey struct{}
)

// WithRefusal returns a context for Attest that has it call refuse with the claims of evidence that is good by itself,
// before it asks somebody else about it, if it does. An error is the answer, and nobody is asked: whose claims are worth
// nothing to the caller may not cost others the time of an API server. The claims are not yet reviewed.
func WithRefusal(ctx context.Context, refuse func(Claims) error) context.Context {
	return context.WithValue(ctx, refusalKey{}, refuse)
}

// refusal calls what WithRefusal has put into ctx.
func refusal(ctx context.Context, c Claims) error {
	if refuse, ok := ctx.Value(refusalKey{}).(func(Claims) error); ok {
		return refuse(c)
	}
	return nil
}

// WithAside returns a context for Attest that has it run, by aside, whatever waits for somebody else: an API server that
// reviews a token, a key set that is read anew. So the caller can let others have his place meanwhile: what he bounds is
// work, and this is none. aside runs wait once and before it returns, or says by an *api.Error why it did not, or why the
// caller cannot go on.
func WithAside(ctx context.Context, aside func(ctx context.Context, wait func()) error) context.Context {
	return context.WithValue(ctx, asideKey{}, aside)
}

// waitAside runs wait as ctx says; at once where it says nothing.
func waitAside(ctx context.Context, wait func()) error {
	if aside, ok := ctx.Value(asideKey{}).(func(context.Context, func()) error); ok {
		return aside(ctx, wait)
	}
	wait()
	return nil
}
