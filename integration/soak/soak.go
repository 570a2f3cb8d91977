//go:build linux

package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/envoy"
)

// Config says what to run.
type Config struct {
	Bin       string        // folder of signet, signet-ca and signet-agent
	Envoy     string        // path; required unless there are only pairs of Go programs
	Rotations int           // one after the other
	Kills     int           // in so many of them, from the first on
	Victims   []string      // kinds of who is killed; nil: the CA, agents and Envoys
	Seed      uint64        // of what is left to chance
	Envoys    int           // pairs of two Envoys
	Gos       int           // pairs of two Go programs
	Mixed     bool          // one pair of each mixed kind
	Nodes     int           // at least 2
	TTL       time.Duration // of SVIDs
	Pace      time.Duration // between two connections of a pair
	Keep      bool          // keep the logs even when it passes
	Dead      time.Duration // for how long who is killed is dead, at most; zero: 1.5 s
	Log       io.Writer     // progress; nil: nowhere
}

// soak is one run.
type soak struct {
	cfg    Config
	start  time.Time
	world  *world
	peers  []*peer
	pairs  []*pair
	tally  *tally
	rng    *rand.Rand
	deck   []string // kinds of victims that are yet to be drawn
	report Report
	stop   func()         // ends the traffic, and waits
	wg     sync.WaitGroup // of the traffic

	mu          sync.Mutex
	generations map[[sha]byte]string // of bundles that were published, by hash
}

// Run runs it, from the first process to the last, and returns the report; nil where it never began. The error says why it did not
// pass.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	s := newSoak(cfg)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.say("seed %d: %d rotations, SVIDs live %s", cfg.Seed, cfg.Rotations, cfg.TTL)
	if err := s.begin(ctx, cancel); err != nil {
		return nil, err
	}
	err := s.rotations(ctx)
	if cause := context.Cause(ctx); cause != nil { // says more than what failed because of it
		err = cause
	}
	return s.finish(err)
}

func newSoak(cfg Config) *soak {
	if cfg.Log == nil {
		cfg.Log = io.Discard
	}
	if cfg.Victims == nil {
		cfg.Victims = []string{victimCA, victimAgent, victimEnvoy}
	}
	if cfg.Envoys == 0 && !cfg.Mixed {
		cfg.Victims = slices.DeleteFunc(slices.Clone(cfg.Victims), func(v string) bool { return v == victimEnvoy })
	}
	s := &soak{cfg: cfg, start: time.Now(), rng: rand.New(rand.NewPCG(cfg.Seed, 0)), generations: map[[sha]byte]string{}}
	s.report.Kills = map[string]int{}
	s.tally = newTally(s.generation)
	return s
}

func (s *soak) say(format string, args ...any) {
	fmt.Fprintf(s.cfg.Log, "%7.1f s  %s\n", time.Since(s.start).Seconds(), fmt.Sprintf(format, args...))
}

// begin starts everything, and returns when each pair has made a connection.
func (s *soak) begin(ctx context.Context, died context.CancelCauseFunc) (err error) {
	if s.world, err = newWorld(ctx, s.cfg, func(err error) { died(err) }); err != nil {
		return err
	}
	run, end := context.WithCancel(ctx)
	s.stop = func() {
		end()
		s.wg.Wait()
	}
	if err = s.populate(); err == nil {
		err = s.world.start(ctx)
	}
	for _, p := range s.peers {
		if err == nil && p.proxy == nil {
			err = p.open(ctx)
		}
	}
	for _, p := range s.pairs {
		if err == nil && p.server.proxy == nil {
			err = p.server.serve(p.client.id, func(line string) { s.tally.refused(p, line) })
		}
	}
	for _, p := range s.peers {
		if err == nil && p.proxy != nil {
			err = p.runEnvoy(ctx)
		}
	}
	if err != nil {
		s.stop()
		died(err)
		logs := s.close(true)
		return fmt.Errorf("%w; the logs are in %s", errors.Join(context.Cause(ctx), err), logs)
	}
	s.wg.Go(func() { s.follow(run) })
	for _, p := range s.pairs {
		if p.client.proxy != nil {
			p.call = byEnvoy(p.client)
		} else {
			p.call = byGo(p.client, p.server)
		}
		s.wg.Go(func() { p.run(run, s.cfg.Pace, s.tally) })
	}
	return nil
}

// populate makes the pairs, whose ends are on different nodes.
func (s *soak) populate() error {
	backend, err := s.backend()
	if err != nil {
		return err
	}
	add := func(client, server string, n int) {
		for range n {
			if err == nil {
				err = s.addPair(client, server, backend)
			}
		}
	}
	mixed := 0
	if s.cfg.Mixed {
		mixed = 1
	}
	add("envoy", "envoy", s.cfg.Envoys)
	add("go", "go", s.cfg.Gos)
	add("envoy", "go", mixed)
	add("go", "envoy", mixed)
	return err
}

func (s *soak) addPair(client, server string, backend netip.AddrPort) error {
	i := len(s.pairs)
	nodes := s.world.nodes
	c, err := s.world.newPeer(fmt.Sprintf("%s-%d-client", client, i+1), nodes[i%len(nodes)])
	if err != nil {
		return err
	}
	v, err := s.world.newPeer(fmt.Sprintf("%s-%d-server", server, i+1), nodes[(i+1)%len(nodes)])
	if err != nil {
		return err
	}
	if server == "envoy" {
		at, err := v.sds(i%2 == 0)
		if err != nil {
			return err
		}
		v.proxy = &envoy.Proxy{Name: v.name, SDS: at, Inbound: &envoy.Inbound{Listen: v.listen, Peers: []spiffeid.ID{c.id}, Backend: backend}}
	}
	if client == "envoy" {
		at, err := c.sds(i%2 == 1)
		if err != nil {
			return err
		}
		c.proxy = &envoy.Proxy{Name: c.name, SDS: at, Outbound: &envoy.Outbound{Listen: c.listen, Peers: []spiffeid.ID{v.id}, Upstream: v.listen, ConnectionPerRequest: true, ResponseHeaders: map[string]string{headerWhy: "%UPSTREAM_TRANSPORT_FAILURE_REASON%"}}}
	}
	s.peers = append(s.peers, v, c)
	s.pairs = append(s.pairs, &pair{kind: client + "-" + server, client: c, server: v})
	return nil
}

// backend is the program behind every Envoy that is a server.
func (s *soak) backend() (netip.AddrPort, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return netip.AddrPort{}, err
	}
	h := &http.Server{Handler: http.HandlerFunc(hello), ReadHeaderTimeout: patience}
	s.world.wg.Go(func() { _ = h.Serve(l) })
	s.world.ends = append(s.world.ends, h.Close)
	return l.Addr().(*net.TCPAddr).AddrPort(), nil
}

// lookAgain is how often the published bundle is read.
const lookAgain = 50 * time.Millisecond

// follow keeps which bundle had which generation, until ctx ends, so that a failure can be told in those.
func (s *soak) follow(ctx context.Context) {
	t := time.NewTicker(lookAgain)
	defer t.Stop()
	for {
		if b, err := s.published(); err == nil {
			s.mu.Lock()
			s.generations[b.hash] = b.generation.String()
			s.mu.Unlock()
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

func (s *soak) generation(hash [sha]byte) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if g := s.generations[hash]; g != "" {
		return "of generation " + g
	}
	return "that was never published"
}

// A bundle is what the CA publishes.
type bundle struct {
	generation api.Generation
	roots      []string // ids
	hash       [sha]byte
}

func (s *soak) published() (*bundle, error) {
	data, err := os.ReadFile(s.world.join("bundle", "bundle.json"))
	if err != nil {
		return nil, err
	}
	b, err := spiffebundle.Parse(s.world.td, data)
	if err != nil {
		return nil, err
	}
	sequence, _ := b.SequenceNumber()
	p := &bundle{generation: api.FromSequence(sequence), hash: api.BundleHash(b.X509Authorities())}
	for _, r := range b.X509Authorities() {
		p.roots = append(p.roots, hex.EncodeToString(r.SubjectKeyId))
	}
	return p, nil
}

// close ends every process.
func (s *soak) close(keep bool) (logs string) {
	for _, p := range s.peers {
		p.kill()
		if p.source != nil {
			_ = p.source.Close()
		}
	}
	return s.world.end(keep)
}
