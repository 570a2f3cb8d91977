package ca

import (
	"fmt"
	"log/slog"
)

// Format implements fmt.Formatter: a request shows neither its token nor its CSR, whatever the verb.
func (r Request) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "request with %v, a CSR of %d bytes", r.Evidence, len(r.CSR))
}

// LogValue implements slog.LogValuer.
func (r Request) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(r)) }

// MarshalText implements encoding.TextMarshaler. It is never read back.
func (r Request) MarshalText() ([]byte, error) { return fmt.Append(nil, r), nil }

// Format implements fmt.Formatter: a sealer shows nothing of its key.
func (s *Sealer) Format(f fmt.State, _ rune) { fmt.Fprint(f, "sealer") }

// LogValue implements slog.LogValuer.
func (s *Sealer) LogValue() slog.Value { return slog.StringValue("sealer") }

// MarshalText implements encoding.TextMarshaler.
func (s *Sealer) MarshalText() ([]byte, error) { return []byte("sealer"), nil }

// Format implements fmt.Formatter: whoever has a key of tickets can make them.
func (k ticketKey) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "ticket key %x", k.id) }

// Format implements fmt.Formatter: it holds the keys of the intermediate and of the replica.
func (s *signing) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "intermediate of root %s", s.root) }
