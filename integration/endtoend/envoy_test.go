//go:build integration && envoy

package endtoend

import (
	"os"
	"strings"
	"testing"
)

// TestDemoWithEnvoy is the main job on real parts: two Envoys, one over state of the world, one over delta.
//
// spiffe
func TestDemoWithEnvoy(t *testing.T) {
	if os.Getenv("SIGNET_ENVOY") == "" {
		t.Fatal("SIGNET_ENVOY is not set: run this by `make test`, which fetches Envoy first")
	}
	r := runDemo(t)
	judge(t, r)
	if !strings.Contains(r.Peers, "Envoy") {
		t.Errorf("peers are %q, want Envoys", r.Peers)
	}
	protocols := map[string]bool{}
	for _, s := range r.Sides {
		protocols[s.Protocol] = true
	}
	if len(protocols) != 2 {
		t.Errorf("protocols are %v, want state of the world and delta", protocols)
	}
}
