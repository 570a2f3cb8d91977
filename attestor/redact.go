package attestor

import (
	"fmt"
	"log/slog"
)

// Format implements fmt.Formatter: whatever the verb, what is shown of evidence is its kind and its size.
func (e Evidence) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "evidence of kind %.32q, %d bytes", e.Kind, len(e.Data))
}

// LogValue implements slog.LogValuer.
func (e Evidence) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(e)) }

// MarshalText implements encoding.TextMarshaler, so that evidence in a struct that is written as JSON is not in it. It is
// never read back.
func (e Evidence) MarshalText() ([]byte, error) { return fmt.Append(nil, e), nil }

// Format implements fmt.Formatter: nothing of a token is shown.
func (c *compact) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "a token of %d signed bytes", len(c.signed))
}
