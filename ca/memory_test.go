package ca

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
)

// threat: A23
func TestBindToken(t *testing.T) {
	m, end := newMemory(), time.Now().Add(time.Hour)
	for _, tt := range []struct {
		issuer, jti, node, volume string
		ok                        bool
	}{
		{"a", "1", "n1", "v1", true},
		{"a", "1", "n1", "v1", true},
		{"a", "1", "n1", "v2", false},
		{"a", "1", "n2", "v1", false},
		{"a", "1", "n1", "", false},
		{"b", "1", "n2", "v2", true}, // another cluster counts for itself
		{"a", "2", "n2", "v2", true},
		{"a", "1", "n1", "v1", true},
	} {
		err := m.bindToken(tt.issuer, tt.jti, tt.node, tt.volume, end)
		if (err == nil) != tt.ok || !tt.ok && api.ReasonOf(err) != api.TokenReplayedElsewhere {
			t.Errorf("%+v: %v", tt, err)
		}
	}
}

// threat: C19
func TestBindKey(t *testing.T) {
	m, now := newMemory(), time.Now()
	one, two := spiffeid.RequireFromString("spiffe://td/one"), spiffeid.RequireFromString("spiffe://td/two")
	key := [32]byte{1}
	if err := m.bindKey(key, one, now, now.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	// A shorter SVID of the same identity does not end what the longer one holds.
	if err := m.bindKey(key, one, now, now.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := m.bindKey(key, two, now.Add(59*time.Minute), now.Add(2*time.Hour)); api.ReasonOf(err) != api.KeyReused {
		t.Errorf("another identity: %v", err)
	}
	if err := m.bindKey(key, two, now.Add(time.Hour), now.Add(2*time.Hour)); err != nil {
		t.Errorf("after the SVID's end: %v", err)
	}
	if err := m.bindKey(key, one, now.Add(time.Hour), now.Add(2*time.Hour)); api.ReasonOf(err) != api.KeyReused {
		t.Errorf("the first identity again: %v", err)
	}
	if err := m.bindKey([32]byte{2}, two, now, now.Add(time.Hour)); err != nil {
		t.Errorf("another key: %v", err)
	}
}

// TestSweep forgets what has ended, and nothing else.
func TestSweep(t *testing.T) {
	m, now := newMemory(), time.Now()
	id := spiffeid.RequireFromString("spiffe://td/one")
	for i := range 100 {
		end := now.Add(time.Duration(i) * time.Minute)
		if err := m.bindToken("a", string(rune('A'+i)), "n", "v", end); err != nil {
			t.Fatal(err)
		}
		if err := m.bindKey([32]byte{byte(i)}, id, now, end); err != nil {
			t.Fatal(err)
		}
		m.notePod("a", string(rune('A'+i)), end)
	}
	m.sweep(now.Add(49 * time.Minute))
	if len(m.tokens) != 50 || len(m.keys) != 50 || len(m.pods) != 50 {
		t.Errorf("%d tokens, %d keys, %d pods are left of 100, want 50", len(m.tokens), len(m.keys), len(m.pods))
	}
	last := string(rune('A' + 99))
	if !m.holds("a", last, now.Add(98*time.Minute)) || m.holds("a", last, now.Add(99*time.Minute)) || m.holds("b", last, now) {
		t.Error("a pod holds an SVID until its end, in its own cluster")
	}
	m.sweep(now.Add(100 * time.Minute))
	if len(m.tokens)+len(m.keys)+len(m.pods) != 0 {
		t.Error("something is kept for ever")
	}
}
