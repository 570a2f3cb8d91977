package sds

import (
	"context"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/api"
)

// A stream on which nothing happens has one goroutine, and its workload one more: each costs a stack for as long as it lives.
func TestIdleStreams(t *testing.T) {
	const streams = 16
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		var all []*peer
		for range streams {
			c := w.stream(protocol)
			c.ask(NameDefault, NameRootCA)
			c.ack(c.next())
			all = append(all, c)
		}
		for generation := range uint64(3) {
			p.set(generation + 2)
			for _, c := range all {
				c.ack(c.next())
			}
		}
		if n := goroutinesIn("sds.(*stream["); n != streams {
			t.Errorf("%d goroutines for %d streams", n, streams)
		}
		if n := goroutinesIn("sds.(*Server).follow("); n != 1 {
			t.Errorf("%d goroutines for one workload", n)
		}
		for _, c := range all {
			c.cancel()
		}
		synctest.Wait()
		if n := goroutinesIn("sds.(*Server).follow(") + goroutinesIn("sds.(*stream["); n != 0 || len(w.srv.flocks) != 0 {
			t.Errorf("%d goroutines and %d flocks after the last stream", n, len(w.srv.flocks))
		}
	})
}

// goroutinesIn counts the goroutines that are somewhere in a function.
func goroutinesIn(function string) (n int) {
	stacks := make([]byte, 64<<20)
	for g := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
		if strings.Contains(g, function) {
			n++
		}
	}
	return n
}

// A client whose window is closed holds up no other stream of its workload.
//
// threat: D10
func TestSlowNeighbour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPod(t)
		p.set(1)
		srv := New(Config{Source: p})
		streams := make([]*stuck, 8) // the first never reads
		var ended []chan error
		for i := range streams {
			streams[i] = &stuck{}
			ended = append(ended, streams[i].run(srv))
			streams[i].requests <- &discovery.DiscoveryRequest{ResourceNames: []string{NameDefault}}
		}
		for range 5 {
			synctest.Wait()
			for i, s := range streams[1:] {
				if len(s.sent) != 1 {
					t.Fatalf("stream %d was sent %d responses, want 1", i+1, len(s.sent))
				}
				s.release <- struct{}{}
				s.requests <- &discovery.DiscoveryRequest{ResourceNames: []string{NameDefault}, ResponseNonce: (<-s.sent).GetNonce()}
			}
			time.Sleep(time.Second)
			p.set(1)
		}
		if len(streams[0].sent) != 1 {
			t.Errorf("%d responses are on their way to who reads none", len(streams[0].sent))
		}
		wantReason(t, <-ended[0], api.SlowConsumer)
		srv.Close()
		for _, e := range ended[1:] {
			wantReason(t, <-e, api.AgentStopping)
		}
	})
}

// Whatever ends a stream at one and the same moment, it ends once, is reported once and gives its place back once.
func TestEndsOnce(t *testing.T) {
	var opened, closed atomic.Int64
	cfg := Config{Hooks: Hooks{
		Opened: func(string) { opened.Add(1) },
		Closed: func(string, api.Reason) { closed.Add(1) },
	}}
	both(t, cfg, func(t *testing.T, protocol string, p *pod, w *world) {
		opened.Store(0)
		closed.Store(0)
		released := 0
		p.onRelease = func() { released++ }
		ends := map[uint64]int{}
		p.onReport = func(r Report) {
			if !r.Open {
				ends[r.Stream]++
			}
		}
		m, other := p.set(1), &Material{Identity: p.identity(ownID), Trust: p.trust(2)}
		const rounds = 20
		for range rounds {
			p.done = make(chan struct{})
			p.material.Set(m)
			c := w.stream(protocol)
			c.ask(NameDefault)
			c.next()
			var wg sync.WaitGroup
			for _, end := range []func(){c.cancel, func() { close(p.done) }, func() { p.material.Set(other) }} {
				wg.Go(func() {
					time.Sleep(defaultAnswerTimeout) // when it is cut off
					end()
				})
			}
			wg.Wait()
			synctest.Wait()
		}
		if opened.Load() != rounds || closed.Load() != rounds || released != rounds || len(ends) != rounds {
			t.Errorf("%d opened, %d closed, %d released, %d reported; want %d each", opened.Load(), closed.Load(), released, len(ends), rounds)
		}
		for stream, n := range ends {
			if n != 1 {
				t.Errorf("the end of stream %d was reported %d times", stream, n)
			}
		}
		if w.srv.streams != 0 || len(w.srv.owned) != 0 || len(w.srv.flocks) != 0 {
			t.Errorf("%d streams, %d workloads and %d flocks are left", w.srv.streams, len(w.srv.owned), len(w.srv.flocks))
		}
	})
}

// What ends one stream of a workload ends that one alone, where the Source tells its streams apart.
func TestDoneOfOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPod(t)
		p.set(1)
		var dones []chan struct{}
		w := newWorld(t, Config{Source: sourceFunc(func(ctx context.Context, md metadata.MD) (*Workload, error) {
			x, err := p.Open(ctx, md)
			done := make(chan struct{})
			dones, x.Done = append(dones, done), done
			return x, err
		})})
		defer w.close()
		var all []*peer
		for range 3 {
			c := w.stream(ProtocolSotW)
			c.ask(NameDefault)
			c.ack(c.next())
			all = append(all, c)
		}
		close(dones[1])
		all[1].ended(api.AgentStopping)
		p.set(2)
		for _, c := range []*peer{all[0], all[2]} {
			c.ack(c.next())
			c.quiet()
		}
	})
}

// A stream that is ended while it waits hears why, even where there was nothing on it yet.
func TestEndOfSilentStream(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		c := w.stream(protocol)
		c.quiet()
		p.err = api.E(api.PodDeleted, "the pod is gone")
		close(p.done)
		c.ended(api.PodDeleted)
	})
}
