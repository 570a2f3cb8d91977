//go:build integration

package rotation

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"

	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/internal/envoy"
)

// TestAgentAway kills two agents before a rotation and starts them when it is over; one has lost its cache as well. What their
// pods have is good with everybody until it expires, the new root's SVIDs included. When the agents come back, no SVID comes before
// the bundle that it is under.
func TestAgentAway(t *testing.T) {
	if testing.Short() {
		t.Skip("it waits for SVIDs to expire")
	}
	t.Parallel()
	w := newWorld(t, 3, short)
	here := w.peer(w.agents[0], "here", false)
	away := w.peer(w.agents[1], "away", true)
	lost := w.peer(w.agents[2], "lost", false)
	pairs := []*pair{w.connect(here, away), w.connect(away, here), w.connect(here, lost), w.connect(lost, here)}
	for _, p := range pairs {
		p.more(t, 3)
	}
	old := w.active()
	w.agents[1].kill()
	w.agents[2].kill()
	w.connected(1)

	w.must(0, "rotate", "start", "--id=away", "--soak=1s", "--straggler=2s")
	fresh := w.await("the new root is active, without two agents", newRootIs("active")).GetOperation().GetAuthority()
	eventually(t, "who is there has an SVID under the new root", func(context.Context) error {
		if !here.under(fresh) {
			return errors.New("it has not")
		}
		return nil
	})
	for _, p := range pairs {
		p.more(t, 3) // those that fail are counted unless an SVID has expired
	}
	w.await("it is done", ended("away", "done"))
	if away.trusts(fresh) || lost.trusts(fresh) {
		t.Error("somebody brought the bundle to pods whose agents are away")
	}

	// What comes first when they are back, to somebody who asks for both.
	if err := os.RemoveAll(w.join("node-3.cache")); err != nil {
		t.Fatal(err)
	}
	var seen [2]*sequence
	for i, a := range w.agents[1:] {
		_, token := w.workload(a, "second-"+a.node)
		seen[i] = w.watch(w.client(a, "second", token, i == 0), fresh)
		a.start()
	}
	w.connected(3)
	for i, s := range seen {
		eventually(t, "an SVID on "+w.agents[i+1].node, func(context.Context) error { return s.settled() })
		if s.early() {
			t.Errorf("on %s an SVID came before the bundle that it is under", w.agents[i+1].node)
		}
	}
	for _, p := range []*peer{away, lost} {
		eventually(t, p.name+" has what is good now", func(context.Context) error {
			if p.expired() || !p.trusts(fresh) || p.trusts(old) {
				return errors.New("it has not")
			}
			return nil
		})
	}
	for _, p := range pairs {
		_, before := p.count()
		p.more(t, 10)
		if _, after := p.count(); after > before+1 { // one may have been under way
			t.Errorf("%s to %s: connections fail after the return", p.client.name, p.server.name)
		}
	}
	w.await("nobody is missing", func(r *apiv1.Rotation) bool { return r.GetAgents() == 3 && r.GetAgentsHolding() == 3 })
}

// sequence is what came to a stream, in order.
type sequence struct {
	root string // the new root

	mu      sync.Mutex
	trusted bool // the last bundle holds it
	waiting bool // an SVID came, and the bundle that it came with is yet to be read: they may be in one answer, in any order
	svids   int
	wrong   bool
}

// watch follows the SVID and the bundle on one stream after another, as a proxy does.
func (w *world) watch(c *envoy.Client, root string) *sequence {
	s := &sequence{root: root}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			c.Watch(ctx, []string{"default", "ROOTCA"}, s.take)
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	w.t.Cleanup(func() { stop(); wg.Wait() })
	return s
}

func (s *sequence) take(secret *tlsv3.Secret) error {
	_, bundles, err := envoy.ParseSecret(secret)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if bundles == nil {
		s.svids++
		s.wrong = s.wrong || s.waiting
		s.waiting = !s.trusted
		return nil
	}
	b, ok := bundles.Get(trustDomain)
	if !ok {
		return errors.New("no bundle of the trust domain")
	}
	s.trusted = slices.ContainsFunc(b.X509Authorities(), func(c *x509.Certificate) bool { return fmt.Sprintf("%x", c.SubjectKeyId) == s.root })
	s.wrong = s.wrong || s.waiting && !s.trusted
	s.waiting = false
	return nil
}

// settled returns nil once an SVID has come, and the bundle with it or before.
func (s *sequence) settled() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.svids == 0 || !s.trusted || s.waiting {
		return fmt.Errorf("%d SVIDs so far, the bundle has the new root: %t", s.svids, s.trusted)
	}
	return nil
}

// early tells whether an SVID came before its bundle.
func (s *sequence) early() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wrong
}
