package sds

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/metadata"
)

// A flood of requests, refusals among them, is slowed to the configured rate; the stream lives on.
//
// threat: D06, D07
func TestFlood(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		c := w.stream(protocol)
		c.ask(NameAll)
		g := c.next()
		c.nack(g, "no")
		synctest.Wait()
		p.mu.Lock()
		before := len(p.reports[1]) // one for each request, one for the response
		p.mu.Unlock()
		start, why := time.Now(), "again"
		for i := range 5000 {
			name := fmt.Sprintf("spiffe://%s/x/%d", td, i)
			if err := errors.Join(c.send(g.nonce, &why, []string{name}, nil, nil), c.send(g.nonce, &why, nil, []string{name}, nil)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(10 * time.Second)
		p.mu.Lock() // each request changes the subscription, and is reported
		// The one that overdraws the bucket is handled too: what it costs is waited for after it.
		handled, most := len(p.reports[1])-before, requestBurst+int(time.Since(start)/(10*time.Millisecond))+1
		p.mu.Unlock()
		if handled > most || handled < 1000 {
			t.Errorf("%d requests handled in %v, want at most %d", handled, time.Since(start), most)
		}
		time.Sleep(2 * time.Minute)
		c.must(c.send(g.nonce, nil, []string{NameDefault}, nil, nil))
		if g := c.next(); !slices.Equal(g.names, []string{NameDefault}) {
			t.Errorf("got %v", g.names)
		}
		if r := p.last(1); !r.Open || r.Nacks != 1 || len(r.Names) != 2 {
			t.Errorf("report %+v", r)
		}
	})
}

// Streams that come and go leave nothing behind.
//
// threat: D21
func TestReconnectStorm(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		for range 300 {
			var batch []*peer
			for range 4 {
				c := w.stream(protocol)
				c.ask(NameDefault)
				batch = append(batch, c)
			}
			for _, c := range batch {
				c.cancel()
			}
		}
		synctest.Wait()
		w.srv.mu.Lock()
		defer w.srv.mu.Unlock()
		if w.srv.streams != 0 || len(w.srv.owned) != 0 {
			t.Errorf("%d streams of %d workloads are still counted", w.srv.streams, len(w.srv.owned))
		}
	})
}

// 1,000 streams, one secret each as Envoy opens them, all get a new bundle and a new identity and acknowledge both.
func TestThousandStreams(t *testing.T) {
	const pods = 100
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, td)
		all := make([]*pod, pods)
		var opened atomic.Int64
		source := sourceFunc(func(ctx context.Context, md metadata.MD) (*Workload, error) {
			return all[int(opened.Add(1)-1)%pods].Open(ctx, md)
		})
		set := func(generation uint64) {
			trust, err := NewTrust(a.bundle(a.newRoot()), nil, generation)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range all {
				p.material.Set(&Material{Identity: a.identity(ownID), Trust: trust})
			}
		}
		for i := range all {
			p := newPod(t)
			p.authority = a
			all[i] = p
		}
		set(1)
		w := newWorld(t, Config{Source: source})
		defer w.close()
		var streams []*peer
		for i := range 10 * pods {
			c := w.stream([]string{ProtocolSotW, ProtocolDelta}[i%2])
			c.ask([]string{NameDefault, NameRootCA}[i/2%2])
			c.ack(c.next())
			streams = append(streams, c)
		}
		for generation := range uint64(3) {
			set(generation + 2)
			synctest.Wait()
			for _, c := range streams {
				g := c.next()
				if err := c.send(g.nonce, nil, nil, nil, nil); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
		}
		proven := 0
		for _, p := range all {
			for _, r := range p.reports {
				last := r[len(r)-1]
				if last.Acks != 4 || last.Nacks != 0 || !last.Open {
					t.Errorf("report %+v", last)
				}
				if last.WantsBundle {
					proven++
					if last.AckedGeneration != 4 {
						t.Errorf("report %+v, want generation 4", last)
					}
				}
			}
		}
		if proven != 5*pods {
			t.Errorf("%d streams have proven the bundle, want %d", proven, 5*pods)
		}
	})
}

type sourceFunc func(context.Context, metadata.MD) (*Workload, error)

func (f sourceFunc) Open(ctx context.Context, md metadata.MD) (*Workload, error) { return f(ctx, md) }

func TestPace(t *testing.T) {
	now := time.Unix(0, 0)
	p := newPace(10, 3, now)
	var waits []time.Duration
	for range 5 {
		waits = append(waits, p.take(now))
	}
	if want := []time.Duration{0, 0, 0, 100 * time.Millisecond, 200 * time.Millisecond}; !slices.Equal(waits, want) {
		t.Errorf("waits %v, want %v", waits, want)
	}
	now = now.Add(time.Hour)
	if d := p.take(now); d != 0 || p.left != 200*time.Millisecond {
		t.Errorf("after a pause: wait %v, %v left; want a whole burst less one", d, p.left)
	}
}
