//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A Report is what a run came to.
type Report struct {
	Seed       uint64
	Rotations  int // that were to be made
	Took       []time.Duration
	Kills      map[string]int // by who was killed
	Held       int            // agents that were held
	Pairs      map[string]int // by kind
	Handshakes map[string]int // connections that led to an answer, by kind
	Excused    map[string]int // by kind
	Words      map[string]int // of those
	Failed     int
	FailedOf   map[string]int // by kind
	Failures   []string       // the first few
	Envoys     counters
	Lasted     time.Duration
	Logs       string // folder, where it did not pass
}

// counters are what the Envoys say themselves, summed over all and over their lives.
type counters struct{ Handshakes, Resumed, Refused uint64 }

// counted are the statistics of an Envoy that go into its counters. One that is killed takes with it what came after the last look.
var counted = []struct {
	name string
	into func(*counters) *uint64
}{
	{"listener.inbound.ssl.handshake", func(c *counters) *uint64 { return &c.Handshakes }},
	{"listener.inbound.ssl.session_reused", func(c *counters) *uint64 { return &c.Resumed }},
	{"listener.inbound.ssl.fail_verify_error", func(c *counters) *uint64 { return &c.Refused }},
	{"listener.inbound.ssl.fail_verify_san", func(c *counters) *uint64 { return &c.Refused }},
	{"listener.inbound.ssl.fail_verify_no_cert", func(c *counters) *uint64 { return &c.Refused }},
	{"cluster.upstream.ssl.session_reused", func(c *counters) *uint64 { return &c.Resumed }},
	{"cluster.upstream.ssl.fail_verify_error", func(c *counters) *uint64 { return &c.Refused }},
	{"cluster.upstream.ssl.fail_verify_san", func(c *counters) *uint64 { return &c.Refused }},
}

// note adds to the account what an Envoy has counted in this life.
func (s *soak) note(ctx context.Context, p *peer) {
	e := p.running()
	if e == nil {
		return
	}
	for _, c := range counted {
		if n, err := e.Counter(ctx, c.name); err == nil {
			*c.into(&s.report.Envoys) += n
		}
	}
}

// finish ends everything and returns the report, with the error that it amounts to. broke is why the rotations ended early.
func (s *soak) finish(broke error) (*Report, error) {
	s.stop()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, p := range s.peers {
		s.note(ctx, p)
	}
	r, t := &s.report, s.tally
	r.Seed, r.Rotations, r.Pairs, r.Lasted = s.cfg.Seed, s.cfg.Rotations, map[string]int{}, time.Since(s.start)
	for _, p := range s.pairs {
		r.Pairs[p.kind]++
	}
	t.mu.Lock()
	r.Handshakes, r.Excused, r.Words, r.Failed, r.FailedOf, r.Failures = t.made, t.excused, t.words, t.failed, t.bad, t.failures
	t.mu.Unlock()
	err := r.judge(broke)
	r.Logs = s.close(err != nil || s.cfg.Keep)
	return r, err
}

// judge says what is wrong with a report; nil where nothing is.
func (r *Report) judge(broke error) error {
	errs := []error{broke}
	if r.Failed > 0 {
		errs = append(errs, fmt.Errorf("%d TLS handshakes failed", r.Failed))
	}
	if r.Envoys.Refused > 0 {
		errs = append(errs, fmt.Errorf("the Envoys themselves count %d peers that they refused", r.Envoys.Refused))
	}
	if r.Envoys.Resumed > 0 {
		errs = append(errs, fmt.Errorf("the Envoys themselves count %d sessions that were resumed", r.Envoys.Resumed))
	}
	if broke == nil && len(r.Took) != r.Rotations {
		errs = append(errs, fmt.Errorf("%d rotations of %d were made", len(r.Took), r.Rotations))
	}
	for kind := range r.Pairs {
		if r.Handshakes[kind] == 0 {
			errs = append(errs, fmt.Errorf("no pair of kind %s made a connection", kind))
		}
	}
	return errors.Join(errs...)
}

// percentile is the duration within which p percent of them were.
func percentile(all []time.Duration, p int) time.Duration {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[(len(sorted)*p+99)/100-1]
}

func (r *Report) write(w io.Writer) error {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-13s%s\n", name, fmt.Sprintf(format, args...))
	}
	line("seed", "%d", r.Seed)
	line("rotations", "%d of %d in %.0f s; one took %.1f s (p50) to %.1f s (p99)", len(r.Took), r.Rotations, r.Lasted.Seconds(), percentile(r.Took, 50).Seconds(), percentile(r.Took, 99).Seconds())
	line("killed", "%d CA, %d agents, %d Envoys; %d agents were held for 1 to 3 s", r.Kills[victimCA], r.Kills[victimAgent], r.Kills[victimEnvoy], r.Held)
	made, excused := 0, 0
	for _, kind := range slices.Sorted(maps.Keys(r.Pairs)) {
		line(kind, "%d pairs, %d handshakes, %d failed, %d excused", r.Pairs[kind], r.Handshakes[kind], r.FailedOf[kind], r.Excused[kind])
		made, excused = made+r.Handshakes[kind], excused+r.Excused[kind]
	}
	for _, words := range slices.Sorted(maps.Keys(r.Words)) {
		line("excused", "%d: %s, while an Envoy that we killed was dead", r.Words[words], words)
	}
	line("Envoys", "count %d handshakes, %d resumed, %d refused", r.Envoys.Handshakes, r.Envoys.Resumed, r.Envoys.Refused)
	for _, f := range r.Failures {
		line("FAILED", "%s", f)
	}
	if r.Logs != "" {
		line("logs", "%s", r.Logs)
	}
	line("handshakes", "%d made, %d excused, %d failed", made, excused, r.Failed)
	_, err := io.WriteString(w, b.String())
	return err
}

// String is the count so far.
func (t *tally) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	made, excused := 0, 0
	for _, n := range t.made {
		made += n
	}
	for _, n := range t.excused {
		excused += n
	}
	return fmt.Sprintf("%d handshakes so far, %d excused, %d failed", made, excused, t.failed)
}

// words are those of a connection that broke, without what differs from one to the next.
func words(err error) string {
	if a, ok := errors.AsType[*answer](err); ok {
		return a.Error()
	}
	if n, ok := errors.AsType[syscall.Errno](err); ok {
		return n.Error()
	}
	return "EOF"
}
