//go:build linux && integration

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// config is that of the tests: the programs that `make build` made, and real Envoys where there are some.
func config(t *testing.T) Config {
	t.Helper()
	cfg := Config{Bin: os.Getenv("SIGNET_BIN"), Envoy: os.Getenv("SIGNET_ENVOY"), Seed: rand.Uint64(), Nodes: 2, Gos: 1, Pace: 60 * time.Millisecond, Log: t.Output()}
	if cfg.Bin == "" {
		t.Fatal("SIGNET_BIN is not set: run this by `make test`, which builds the programs first")
	}
	if cfg.Envoy != "" {
		cfg.Envoys = 2
	}
	return cfg
}

// TestSoak is the short form of `make soak`: two rotations under traffic, an agent held in each, a CA or an Envoy killed in
// one of them. An agent that is killed is not in it: for 35 s the CA then waits for who may come back to it. What is drawn by chance
// differs from run to run; the seed is in the log.
func TestSoak(t *testing.T) {
	cfg := config(t)
	cfg.Victims = []string{victimCA, victimEnvoy}
	cfg.Rotations, cfg.Kills, cfg.TTL, cfg.Dead = 2, 1, 20*time.Second, 300*time.Millisecond
	r, err := Run(t.Context(), cfg)
	if r != nil {
		var b strings.Builder
		if err := r.write(&b); err != nil {
			t.Error(err)
		}
		t.Logf("\n%s", b.String())
	}
	if err != nil {
		t.Error(err)
	}
}

// TestSoakCounts proves that it can fail: a root is removed while the agent of one node is held, so that what its workloads have is
// under that root when the others trust another. Each connection to or from them is counted as failed, with the words of the one who
// refused; none is excused, for nobody was killed.
func TestSoakCounts(t *testing.T) {
	cfg := config(t)
	cfg.Rotations, cfg.TTL = 1, 10*time.Minute // nothing expires meanwhile
	s := newSoak(cfg)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	err := s.begin(ctx, cancel)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s.world != nil {
			s.stop()
			s.close(false)
		}
	})
	if err := s.tally.everywhere(ctx, s.pairs); err != nil {
		t.Fatal(err)
	}
	before, err := s.published()
	if err != nil {
		t.Fatal(err)
	}
	held := s.world.nodes[1].agent.Pid()
	if err := syscall.Kill(held, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(held, syscall.SIGCONT)
	if n := s.tally.failuresSoFar(); n > 0 {
		t.Fatalf("%d failures before there is a reason for one", n)
	}
	out, err := s.signet(ctx, "rotate", "emergency", before.roots[0], "--dry-run")
	if err != nil && len(out) == 0 {
		t.Fatal(err)
	}
	var plan struct {
		Forecast struct{ Losing int }
	}
	if err := json.Unmarshal(out, &plan); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := s.command(ctx, "rotate", "emergency", before.roots[0], "--reason", "a test", "--confirm", fmt.Sprint(plan.Forecast.Losing),
		"--straggler", "2s", "--soak", "1s", "--wait="+patience.String()); err != nil {
		t.Fatal(err)
	}
	kinds := map[string]bool{}
	for _, p := range s.pairs {
		kinds[p.kind] = true
	}
	err = s.tally.await(ctx, func() bool {
		for kind := range kinds {
			if s.tally.bad[kind] < 5 {
				return false
			}
		}
		return true
	})
	if err != nil {
		t.Fatalf("the failures are not counted: %v; %s", err, s.tally)
	}
	// It is as good as before once the agent goes on: it takes what it has missed.
	if err := syscall.Kill(held, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := s.tally.everywhere(ctx, s.pairs); err != nil {
		t.Errorf("after the agent went on: %v", err)
	}
	s.cfg.Rotations = 0
	r, err := s.finish(nil)
	s.world = nil
	if err == nil || !strings.Contains(err.Error(), "TLS handshakes failed") {
		t.Errorf("it passes: %v", err)
	}
	if r.Failed == 0 || len(r.Excused) > 0 {
		t.Errorf("%d failed, %v excused", r.Failed, r.Excused)
	}
	if cfg.Envoys > 0 && r.Envoys.Refused == 0 {
		t.Error("the Envoys count nobody whom they refused")
	}
	told := strings.Join(r.Failures, "\n")
	for _, want := range []string{"x509: certificate signed by unknown authority", "of generation 1.", before.roots[0][:8]} {
		if !strings.Contains(told, want) {
			t.Errorf("%q is not in what failures say:\n%s", want, told)
		}
	}
	t.Logf("%d failures were counted, as for example:\n%s", r.Failed, told[:min(len(told), 2000)])
}
