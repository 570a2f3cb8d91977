//go:build linux

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	rotationTime = 10 * time.Minute        // until a rotation must be at its end
	workloadSoak = time.Second             // --soak: for those that cannot acknowledge
	longestHold  = 3 * time.Second         // of an agent that is held
	longestDead  = 1500 * time.Millisecond // of a process that is killed, until it is started again
)

// The kinds of those who are killed.
const (
	victimCA    = "signet-ca"
	victimAgent = "agent"
	victimEnvoy = "envoy"
)

// A trouble is what happens in one rotation, as it was drawn.
type trouble struct {
	slow         *node // its agent is held
	slowAt, hold time.Duration

	victim     string // empty: nobody is killed
	agent      *node
	peer       *peer
	at, deadly time.Duration // when it is killed, and for how long it is dead
}

// draw leaves to chance what happens in rotation n. The kinds of victims come like cards of a deck, so that none is left out for long.
func (s *soak) draw(n int) trouble {
	upTo := func(least, most time.Duration) time.Duration {
		return least + time.Duration(s.rng.Int64N(int64(most-least)))
	}
	nodes := s.world.nodes
	slow := s.rng.IntN(len(nodes))
	t := trouble{slow: nodes[slow], slowAt: upTo(0, 300*time.Millisecond), hold: upTo(longestHold/3, longestHold)}
	t.at, t.deadly = upTo(0, s.cfg.TTL), upTo(0, cmp.Or(s.cfg.Dead, longestDead))
	if len(s.deck) == 0 {
		s.deck = slices.Clone(s.cfg.Victims)
		s.rng.Shuffle(len(s.deck), func(i, j int) { s.deck[i], s.deck[j] = s.deck[j], s.deck[i] })
	}
	if n >= s.cfg.Kills {
		return t
	}
	t.victim, s.deck = s.deck[0], s.deck[1:]
	switch t.victim {
	case victimAgent: // never the one that is held
		t.agent = nodes[(slow+1+s.rng.IntN(len(nodes)-1))%len(nodes)]
	case victimEnvoy:
		proxies := slices.DeleteFunc(slices.Clone(s.peers), func(p *peer) bool { return p.proxy == nil })
		t.peer = proxies[s.rng.IntN(len(proxies))]
	}
	return t
}

// String says what is going to happen.
func (t trouble) String() string {
	said := fmt.Sprintf("the agent of %s is held for %.1f s", t.slow.name, t.hold.Seconds())
	switch t.victim {
	case victimCA:
		said += ", the CA"
	case victimAgent:
		said += ", the agent of " + t.agent.name
	case victimEnvoy:
		said += ", the Envoy " + t.peer.name
	default:
		return said
	}
	return said + fmt.Sprintf(" is killed after %.1f s and is dead for %.1f s", t.at.Seconds(), t.deadly.Seconds())
}

// rotations makes all of them.
func (s *soak) rotations(ctx context.Context) error {
	if err := s.tally.everywhere(ctx, s.pairs); err != nil {
		return err
	}
	s.say("every pair has made connections")
	for n := range s.cfg.Rotations {
		before, err := s.published()
		if err != nil {
			return err
		}
		t := s.draw(n)
		began := time.Now()
		if err := s.rotate(ctx, n, t); err != nil {
			return fmt.Errorf("rotation %d: %w", n+1, err)
		}
		took := time.Since(began)
		s.report.Took = append(s.report.Took, took)
		after, err := s.published()
		if err != nil {
			return err
		}
		if len(after.roots) != 1 || slices.Contains(before.roots, after.roots[0]) {
			return fmt.Errorf("rotation %d is said to be done, and the bundle of generation %s has %d roots, of which the first is %.8s; before it was %.8s",
				n+1, after.generation, len(after.roots), after.roots[0], before.roots[0])
		}
		// Whoever speaks now speaks under the new root alone.
		if err := s.tally.everywhere(ctx, s.pairs); err != nil {
			return fmt.Errorf("after rotation %d: %w", n+1, err)
		}
		s.say("rotation %d: %.8s is replaced by %.8s after %.1f s, generation %s; %s; %s", n+1, before.roots[0], after.roots[0], took.Seconds(), after.generation, t, s.tally)
	}
	return nil
}

// rotate makes one rotation, with what happens meanwhile, and returns when all are alive again.
func (s *soak) rotate(ctx context.Context, n int, t trouble) error {
	ctx, cancel := context.WithTimeoutCause(ctx, rotationTime, fmt.Errorf("it is not at its end after %s", rotationTime))
	defer cancel()
	var errs [3]error
	var wg sync.WaitGroup
	wg.Go(func() { errs[0] = s.hold(ctx, t) })
	wg.Go(func() { errs[1] = s.kill(ctx, t) })
	wg.Go(func() {
		errs[2] = s.command(ctx, "rotate", "start", "--id", fmt.Sprintf("soak-%d", n+1), "--reason", "soak", "--soak", workloadSoak.String(), "--wait="+rotationTime.String())
	})
	wg.Wait()
	return errors.Join(errs[:]...)
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// hold stops an agent for a while, as a machine that has no time for it does.
func (s *soak) hold(ctx context.Context, t trouble) error {
	if err := pause(ctx, t.slowAt); err != nil {
		return err
	}
	pid := t.slow.agent.Pid()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return fmt.Errorf("hold the agent of %s: %w", t.slow.name, err)
	}
	err := pause(ctx, t.hold)
	s.report.Held++
	return errors.Join(err, syscall.Kill(pid, syscall.SIGCONT))
}

// kill kills the victim, starts it again after a while, and returns when it serves.
func (s *soak) kill(ctx context.Context, t trouble) error {
	if t.victim == "" {
		return nil
	}
	if err := pause(ctx, t.at); err != nil {
		return err
	}
	s.report.Kills[t.victim]++
	kill, start, down := s.world.ca.Kill, func() error { return s.world.startCA(ctx) }, &s.world.down
	switch t.victim {
	case victimAgent:
		kill, start, down = t.agent.agent.Kill, func() error { return s.world.startAgent(ctx, t.agent) }, &t.agent.down
	case victimEnvoy:
		kill, start, down = t.peer.kill, func() error { return t.peer.runEnvoy(ctx) }, &t.peer.down
		s.note(ctx, t.peer) // what it has counted dies with it
	}
	down.begin()
	kill()
	if err := pause(ctx, t.deadly); err != nil {
		return err
	}
	err := start()
	down.end()
	return err
}

// command runs signet, again where it failed while the CA was dead: that is what its user would do, and by its id the same
// operation is neither begun anew nor lost.
func (s *soak) command(ctx context.Context, args ...string) error {
	for {
		began := time.Now()
		events, err := s.signet(ctx, args...)
		if err == nil || ctx.Err() != nil || !s.world.down.during(began, time.Now()) {
			return tell(err, events)
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// signet runs the command line over the CA's own socket and returns what it wrote.
func (s *soak) signet(ctx context.Context, args ...string) (stdout []byte, err error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.cfg.Bin, "signet"), append([]string{"--socket", s.world.join("admin.sock"), "-o", "json"}, args...)...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &said, 5*time.Second
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("signet %s: %w: %s", strings.Join(args[:min(len(args), 2)], " "), err, strings.TrimSpace(said.String()))
	}
	return out.Bytes(), nil
}

// tell adds to an error whom the rotation waited for last.
func tell(err error, events []byte) error {
	if err == nil {
		return nil
	}
	var last []byte
	for lines := bufio.NewReader(bytes.NewReader(events)); ; {
		line, rerr := lines.ReadBytes('\n')
		if len(bytes.TrimSpace(line)) > 0 {
			last = line
		}
		if errors.Is(rerr, io.EOF) {
			break
		}
	}
	var e struct {
		Object struct {
			Gates []struct {
				Step     string
				Blockers []struct{ Name, Why, Pass string }
			}
		}
	}
	if json.Unmarshal(last, &e) != nil {
		return err
	}
	var names []string
	for _, g := range e.Object.Gates {
		for _, b := range g.Blockers {
			if b.Pass == "" && len(names) < 10 {
				names = append(names, fmt.Sprintf("%s waits for %s: %s", g.Step, b.Name, b.Why))
			}
		}
	}
	return fmt.Errorf("%w; at last %s", err, strings.Join(names, ", "))
}
