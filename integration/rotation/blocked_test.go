//go:build integration

package rotation

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"

	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/internal/envoy"
)

// TestFrozenAgent begins a rotation while an agent does not take what it is sent. It is live, so the new root is not activated,
// by the engine or by anybody who asks, and the agent's node is named, until the agent goes on.
func TestFrozenAgent(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 3, long)
	a, b := w.peer(w.agents[0], "web", false), w.peer(w.agents[2], "db", true)
	pair, back := w.connect(a, b), w.connect(b, a)
	old := w.active()

	frozen := w.agents[1]
	thaw := frozen.freeze()
	w.must(0, "rotate", "start", "--id=frozen", "--reason=test", "--soak=1s")
	w.await("it waits for the frozen agent alone", func(r *apiv1.Rotation) bool {
		return newRootIs("published")(r) && slices.Equal(waits(r), []string{"activate: node/node-2"})
	})
	s, code := w.status()
	if code != 3 || s.State != "Waiting" || !slices.Equal(s.blocking(), []string{"node/node-2"}) {
		t.Errorf("exit code %d, %s, waits for %v; want 3, Waiting, node/node-2", code, s.State, s.blocking())
	}
	if g, ok := s.blocker("node/node-2"); !ok || !strings.Contains(g.Why, "not "+s.Generation) {
		t.Errorf("it is said to lack %q, want generation %s", g.Why, s.Generation)
	}
	if out := w.must(3, "rotate", "status"); !strings.Contains(out, "node/node-2") {
		t.Errorf("people are not told the name:\n%s", out)
	}
	if roots := w.roots(); roots[old] != "active" || roots[s.Operation.Authority] != "published" {
		t.Errorf("the roots are %v", roots)
	}
	pair.more(t, 10)

	thaw()
	w.await("the new root is active", newRootIs("active"))
	w.connected(3)
	pair.more(t, 10)
	back.more(t, 10)
}

// stubborn is a pod whose proxy refuses every bundle with the same words, over several streams, and comes again and again; or,
// without words, takes what comes and never says anything.
type stubborn struct {
	name, words string
	streams     int
	gives       atomic.Bool // it takes what comes, from its next streams on
}

// refuse has such a pod on the node of an agent until the test is over.
func (w *world) refuse(a *agent, s *stubborn) {
	w.t.Helper()
	_, token := w.workload(a, s.name)
	c := w.client(a, s.name, token, false)
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range s.streams {
		wg.Go(func() {
			for ctx.Err() == nil {
				s.stream(ctx, c)
				select {
				case <-ctx.Done():
				case <-time.After(50 * time.Millisecond):
				}
			}
		})
	}
	w.t.Cleanup(func() { stop(); wg.Wait() })
}

// stream is one of its streams, which does not last.
func (s *stubborn) stream(ctx context.Context, c *envoy.Client) {
	if !s.gives.Load() && s.words != "" {
		var end context.CancelFunc
		ctx, end = context.WithTimeout(ctx, 300*time.Millisecond)
		defer end()
	}
	c.Watch(ctx, []string{"ROOTCA"}, func(*tlsv3.Secret) error {
		switch {
		case s.gives.Load():
			return nil
		case s.words == "":
			<-ctx.Done()
			return ctx.Err()
		}
		return errors.New(s.words)
	})
}

// TestRefusesForEver has a pod whose proxy refuses every bundle on 16 streams, and reconnects. It is named with the proxy's own
// words, and delays the rotation by the straggler limit and no more.
func TestRefusesForEver(t *testing.T) {
	t.Parallel()
	delays(t, &stubborn{name: "stubborn", words: "the bundle has more roots than this validator takes", streams: 16})
}

// TestSilentForEver has one that takes what comes on 16 streams, and acknowledges nothing.
func TestSilentForEver(t *testing.T) {
	t.Parallel()
	delays(t, &stubborn{name: "silent", streams: 16})
}

// delays has a pod that does not take any bundle, and shows for how long it stands in the way of a rotation.
func delays(t *testing.T, pod *stubborn) {
	w := newWorld(t, 2, short)
	a, b := w.peer(w.agents[0], "web", false), w.peer(w.agents[1], "db", true)
	pair := w.connect(a, b)
	w.refuse(w.agents[1], pod)

	// It is known before anything is begun.
	eventually(t, "the plan names it", func(context.Context) error {
		out, talk, code := w.signet("rotate", "plan", "-o", "json")
		var plan struct{ Forecast struct{ Missing []blocker } }
		if err := json.Unmarshal([]byte(out), &plan); err != nil {
			return err
		}
		for _, m := range plan.Forecast.Missing {
			if m.Name == "pod/shop/"+pod.name && m.Nack == pod.words && code == 3 {
				return nil
			}
		}
		return fmt.Errorf("exit code %d, %+v, %s", code, plan.Forecast.Missing, talk)
	})

	const limit = 5 * time.Second
	w.must(0, "rotate", "start", "--id=it", "--soak=1s", "--straggler="+limit.String())
	published := w.await("it is published", func(r *apiv1.Rotation) bool { return newRootIs("published")(r) || newRootIs("active")(r) })
	var named bool
	active := w.await("the new root is active all the same", func(r *apiv1.Rotation) bool {
		for _, g := range r.GetGates() {
			for _, b := range g.GetBlockers() {
				named = named || g.GetDo() == "activate" && b.GetName() == "pod/shop/"+pod.name && b.GetNack() == pod.words
			}
		}
		return newRootIs("active")(r)
	})
	if !named {
		t.Error("it was not named with its words while it stood in the way")
	}
	begun, at := active.GetOperation().GetBegun().AsTime(), active.GetNow().AsTime()
	const slack = 30 * time.Second // of a busy machine
	if took := at.Sub(begun); took < limit || took > limit+slack {
		t.Errorf("it was activated after %s, with a limit of %s", took, limit)
	} else {
		t.Logf("active after %s, with a limit of %s; first seen as published after %s", took, limit, published.GetNow().AsTime().Sub(begun))
	}
	pair.more(t, 10)
	w.await("it is done, and the old root is gone", ended("it", "done"))
	if out := w.must(0, "audit", "--since=10m", "-o", "json"); !strings.Contains(out, "pod/shop/"+pod.name+" (straggler)") {
		t.Error("the record does not say over whom the steps were taken")
	}
	pair.more(t, 10)
}
