package api

import (
	"crypto/x509"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// spiffe: ID-01, ID-02, ID-03, ID-04, ID-05, ID-06, ID-07, ID-08
func TestParseWorkloadID(t *testing.T) {
	long := func(n int) string {
		const head = "spiffe://example.org/"
		return head + strings.Repeat("a", n-len(head))
	}
	for _, r := range []struct {
		name, id string
		good     bool
	}{
		{"plain", "spiffe://example.org/ns/shop/sa/web", true},
		{"all characters of a segment", "spiffe://example.org/aZ09-_.x", true},
		{"dots within a segment", "spiffe://example.org/a..b", true},
		{"all characters of a trust domain", "spiffe://a-b_c.9/x", true},
		{"trust domain like an address", "spiffe://10.0.0.1/x", true}, // ID-04: nothing special
		{"2048 bytes", long(MaxIDBytes), true},
		{"2049 bytes", long(MaxIDBytes + 1), false},
		{"trust domain of 256 bytes", "spiffe://" + strings.Repeat("a", 256) + "/x", false},
		{"empty", "", false},
		{"other scheme", "https://example.org/x", false},
		{"no trust domain", "spiffe:///x", false},
		{"no path", "spiffe://example.org", false},
		{"root path", "spiffe://example.org/", false},
		{"query", "spiffe://example.org/x?a=b", false},
		{"fragment", "spiffe://example.org/x#a", false},
		{"user", "spiffe://user@example.org/x", false},
		{"port", "spiffe://example.org:443/x", false},
		{"percent in the trust domain", "spiffe://ex%61mple.org/x", false},
		{"percent in the path", "spiffe://example.org/%61", false},
		{"empty segment", "spiffe://example.org/a//b", false},
		{"trailing slash", "spiffe://example.org/a/", false},
		{"dot", "spiffe://example.org/./a", false},
		{"dot dot", "spiffe://example.org/../a", false},
		{"space", "spiffe://example.org/a b", false},
		{"umlaut", "spiffe://example.org/ä", false},
		{"NUL", "spiffe://example.org/a\x00", false},
		{"zone", "spiffe://[fe80::1%25eth0]/x", false},
		// ID-08: they compare without case, so an upper-case spelling would be a second name of one identity. It is never
		// normalised, so it is refused.
		{"upper-case scheme", "SPIFFE://example.org/x", false},
		{"upper-case trust domain", "spiffe://Example.org/x", false},
	} {
		t.Run(r.name, func(t *testing.T) {
			id, err := ParseWorkloadID(r.id)
			if (err == nil) != r.good {
				t.Fatalf("ParseWorkloadID: %v, want good %v", err, r.good)
			}
			if err == nil && id.String() != r.id {
				t.Errorf("it became %q", id)
			}
		})
	}
	// The path compares with case.
	a, _ := ParseWorkloadID("spiffe://example.org/x")
	b, _ := ParseWorkloadID("spiffe://example.org/X")
	if a == b || a.IsZero() || b.IsZero() {
		t.Errorf("%q and %q are the same identity", a, b)
	}
}

func FuzzParseWorkloadID(f *testing.F) {
	for _, s := range []string{"spiffe://example.org/ns/a/sa/b", "spiffe://example.org", "SPIFFE://a/b", "spiffe://a/..", "spiffe://a:1/b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseWorkloadID(s)
		if err != nil {
			return
		}
		if id.String() != s || id.Path() == "" || len(s) > MaxIDBytes {
			t.Errorf("%q was accepted as %q", s, id)
		}
		for seg := range strings.SplitSeq(strings.TrimPrefix(id.Path(), "/"), "/") {
			if seg == "" || seg == "." || seg == ".." || strings.Trim(seg, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") != "" {
				t.Errorf("%q was accepted with segment %q", s, seg)
			}
		}
	})
}

func TestOwnIdentities(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	agent, err := AgentID(td, "4e756dcb")
	if err != nil || agent.String() != "spiffe://example.org/signet/agent/4e756dcb" {
		t.Fatalf("AgentID is %q, %v", agent, err)
	}
	replica, err := ReplicaID(td, "ca-0")
	if err != nil || replica.String() != "spiffe://example.org/signet/ca/ca-0" {
		t.Fatalf("ReplicaID is %q, %v", replica, err)
	}
	for _, bad := range []string{"", ".", "..", "a/b", "a%2fb", "a b"} {
		if id, err := AgentID(td, bad); err == nil {
			t.Errorf("AgentID(%q) is %q", bad, id)
		}
	}
	for _, r := range []struct {
		id       string
		node     string
		replica  bool
		reserved bool
	}{
		{"spiffe://example.org/signet/agent/n1", "n1", false, true},
		{"spiffe://example.org/signet/ca/r1", "", true, true},
		{"spiffe://example.org/signet/ca/r1/x", "", false, true},
		{"spiffe://example.org/signet/agent/n1/x", "", false, true},
		{"spiffe://example.org/signet/agent", "", false, true},
		{"spiffe://example.org/signet", "", false, true},
		{"spiffe://example.org/signets/agent/n1", "", false, false},
		{"spiffe://example.org/ns/signet/sa/agent", "", false, false},
		{"spiffe://other.org/signet/agent/n1", "", false, true},
		{"spiffe://other.org/signet/ca/r1", "", false, true},
	} {
		id := spiffeid.RequireFromString(r.id)
		if node, ok := NodeUID(id, td); node != r.node || ok != (r.node != "") {
			t.Errorf("NodeUID(%q) is %q, %v", r.id, node, ok)
		}
		if IsReplica(id, td) != r.replica || IsReserved(id) != r.reserved {
			t.Errorf("%q: replica %v, reserved %v", r.id, IsReplica(id, td), IsReserved(id))
		}
	}
}

// spiffe: B-02
func TestGeneration(t *testing.T) {
	for _, r := range []struct{ lower, higher Generation }{
		{Generation{1, 1}, Generation{1, 2}},
		{Generation{1, 1 << 31}, Generation{2, 0}},
		{Generation{0, 0}, Generation{0, 1}},
		{Generation{1, 1<<32 - 1}, Generation{2, 1}},
	} {
		if r.lower.Sequence() >= r.higher.Sequence() {
			t.Errorf("%s is not below %s", r.lower, r.higher)
		}
		if got := FromSequence(r.higher.Sequence()); got != r.higher {
			t.Errorf("%s comes back as %s", r.higher, got)
		}
	}
}

// TestPlausible: what a CA takes for one of its own numbers, and what those believe who are shown it, which is a little more.
//
// threat: E05
func TestPlausible(t *testing.T) {
	from := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, r := range []struct {
		name                  string
		at                    time.Time
		g                     Generation
		plausible, believable bool
	}{
		{"the first", from, Generation{1, 1}, true, true},
		{"none", from, Generation{}, true, true},
		{"the highest", from, Generation{1 << 16, math.MaxUint32}, true, true},
		{"one more", from, Generation{1<<16 + 1, 0}, false, true},
		{"the highest of a year later", from, Generation{1<<16 + 365*24, 1}, false, true},
		{"and one more", from, Generation{1<<16 + 365*24 + 1, 1}, false, false},
		{"the last there is", from, FromSequence(math.MaxUint64), false, false},
		{"an hour later", from.Add(time.Hour), Generation{1<<16 + 1, 0}, true, true},
		{"by a clock that is years behind", time.Unix(0, 0), Generation{7 * 365 * 24, 1}, true, true},
		{"by a clock that is mad", time.Unix(1<<40, 0), Generation{1<<20 + 1<<16, 1}, true, true},
		{"by a clock that is mad, the last", time.Unix(1<<40, 0), FromSequence(math.MaxUint64), false, false},
	} {
		if p, b := r.g.Plausible(r.at), r.g.Believable(r.at); p != r.plausible || b != r.believable {
			t.Errorf("%s (%s): plausible %t, believable %t", r.name, r.g, p, b)
		}
	}
}

func TestBundleHash(t *testing.T) {
	a, b := &x509.Certificate{Raw: []byte("a")}, &x509.Certificate{Raw: []byte("b")}
	ab, ba := BundleHash([]*x509.Certificate{a, b}), BundleHash([]*x509.Certificate{b, a})
	if ab != ba {
		t.Error("the order of roots changes the hash")
	}
	for _, other := range [][]*x509.Certificate{nil, {a}, {b}, {a, a}, {{Raw: []byte("ab")}}} {
		if BundleHash(other) == ab {
			t.Errorf("%d other roots have the same hash", len(other))
		}
	}
}
