package sds

import (
	"strings"
	"testing"

	"github.com/signet-ca/signet/api"
)

// spiffe: ID-01, ID-02, ID-03, ID-04, ID-05, ID-06, ID-07
// threat: D02
func TestParseName(t *testing.T) {
	long := "spiffe://example.org/"
	long += strings.Repeat("a", api.MaxIDBytes-len(long))
	for _, tt := range []struct {
		name string
		ok   bool
	}{
		{"default", true}, {"ROOTCA", true}, {"ALL", true}, {"my-cert_1.pem", true}, {"a..b", true},
		{"spiffe://example.org", true}, {"spiffe://example.org/ns/a/sa/b", true}, {long, true},
		{"spiffe://10.0.0.1/a", true}, // nothing special
		{"", false}, {long + "a", false}, {strings.Repeat("a", 64<<10), false},
		{"file-cert:/etc/shadow~/etc/passwd", false}, {"file-root:system", false}, {"kubernetes://secret", false},
		{"../../etc/passwd", false}, {"..", false}, {".", false}, {"/etc/shadow", false}, {"a/b", false}, {`a\b`, false},
		{"a\x00b", false}, {"a\nb", false}, {" default", false}, {"default ", false}, {"défaut", false}, {"a~b", false},
		{"spiffe://", false}, {"spiffe:///path", false}, {"spiffe:", false}, {"SPIFFE://example.org/a", false},
		{"spiffe://Example.org/a", false}, {"spiffe://example.org/", false}, {"spiffe://example.org/a/", false},
		{"spiffe://example.org//a", false}, {"spiffe://example.org/../a", false}, {"spiffe://example.org/%61", false},
		{"spiffe://example.org:443/a", false}, {"spiffe://u@example.org/a", false}, {"spiffe://example.org/a?b", false},
		{"spiffe://example.org/a#b", false}, {"https://example.org/a", false},
		{"spiffe://" + strings.Repeat("a", 255) + "/b", true}, {"spiffe://" + strings.Repeat("a", 256) + "/b", false},
	} {
		t.Run(tt.name[:min(len(tt.name), 40)], func(t *testing.T) {
			id, err := parseName(tt.name)
			if ok := err == nil; ok != tt.ok {
				t.Fatalf("parseName: %v, want ok %v", err, tt.ok)
			}
			if err != nil && api.ReasonOf(err) != api.ResourceName {
				t.Errorf("error = %v, want %s", err, api.ResourceName)
			}
			if err != nil && len(tt.name) > 8 && strings.Contains(err.Error(), tt.name) {
				t.Errorf("the error repeats the name: %v", err)
			}
			if err == nil && !id.IsZero() && id.String() != tt.name {
				t.Errorf("%q was changed to %q", tt.name, id)
			}
		})
	}
}

// threat: L15
func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"":                      "",
		"plain words":           "plain words",
		"a\x00b\nc\x1b[31m":     "a?b?c?[31m",
		"bad \xff utf":          "bad ? utf",
		"über":                  "über",
		"rtl \u202e override":   "rtl ? override",
		strings.Repeat("a", 99): strings.Repeat("a", 20),
		"1234567890123456789é":  "1234567890123456789",
	} {
		if got := printable(in, 20); got != want {
			t.Errorf("printable(%q) = %q, want %q", in, got, want)
		}
	}
}
