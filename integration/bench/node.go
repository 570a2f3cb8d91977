//go:build linux

package main

import (
	"context"
	"fmt"
	"time"
)

// identities is how many pods the agent has whose memory and speed are measured.
const identities = 100

// benchSDS is the first secret that a proxy gets on a new connection to its pod's socket: of an identity that is there, and of
// a pod that the node has never had, for which CSI's call, the whole way to the CA and the answer are needed.
func benchSDS(ctx context.Context, b *bench) error {
	f := b.figures
	times := 1000
	if b.short {
		times = 300
	}
	f.declare("sds_warm_p99_ms", "first secret on a new connection, identity present", "ms").below(2).anySpread()
	f.declare("sds_warm_p50_ms", "the same", "ms")
	f.declare("sds_cold_p99_ms", "from Publish of a new pod to its first secret", "ms").below(25).anySpread()
	f.declare("sds_cold_p50_ms", "the same", "ms")
	cold := times / b.options.rounds
	w, err := b.newWorld("sds", pods{Agents: 1, Workloads: identities + patience*times})
	if err != nil {
		return err
	}
	defer w.close()
	if err := w.startCA(ctx); err != nil {
		return err
	}
	if err := w.startAgent(ctx); err != nil {
		return err
	}
	if _, err := ask[struct{}](w.cluster, "publish", span{0, identities}); err != nil {
		return err
	}
	if _, err := ask[firsts](w.cluster, "first", first{Span: span{0, identities}, Times: identities}); err != nil { // each is there
		return err
	}
	next := identities
	err = b.rounds(func() (bool, error) {
		win, err := open(w.ca.pid(), w.agent.pid(), w.cluster.pid())
		if err != nil {
			return false, err
		}
		warm, err := ask[firsts](w.cluster, "first", first{Span: span{0, identities}, Times: times})
		if err != nil {
			return false, err
		}
		fresh, err := ask[firsts](w.cluster, "first", first{Span: span{next, next + cold}, Times: cold, Publish: true})
		if err != nil {
			return false, err
		}
		next += cold
		t, err := win.close()
		if err != nil || t.foreign > b.noise {
			return false, err
		}
		f.add("sds_warm_p99_ms", warm.P99)
		f.add("sds_warm_p50_ms", warm.P50)
		f.add("sds_cold_p99_ms", fresh.P99)
		f.add("sds_cold_p50_ms", fresh.P50)
		return true, nil
	})
	b.settle(b.options.rounds)
	return err
}

// benchFanout is a new bundle on its way to 100, 1,000 and 10,000 streams of one agent, and what they cost it in memory.
func benchFanout(ctx context.Context, b *bench) error {
	if b.short {
		return nil
	}
	f := b.figures
	f.declare("fanout_10k_ms", "new bundle to 10,000 streams, all acknowledged", "ms").below(2000)
	for _, n := range []int{100, 1000} {
		f.declare(fmt.Sprintf("fanout_%d_ms", n), fmt.Sprintf("new bundle to %d streams, all acknowledged", n), "ms").anySpread()
	}
	f.declare("agent_rss_100_mb", "agent's resident memory with 100 identities", "MB").below(40)
	f.declare("bytes_per_stream", "agent's memory for each further stream on a connection of its own", "bytes").below(24576)
	f.declare("agent_idle_cores", "agent's processor time with 100 identities and nobody asking", "processors").anySpread()
	const podsOfAll = 500 // 20 streams each
	w, err := b.newWorld("fanout", pods{Agents: 1, Workloads: podsOfAll})
	if err != nil {
		return err
	}
	defer w.close()
	if w.ca, err = b.child(w.dir, "ca", b.server); err != nil {
		return err
	}
	if _, err := ask[struct{}](w.ca, "serve", serving{w.dir, w.address}); err != nil {
		return err
	}
	if err := w.startAgent(ctx); err != nil {
		return err
	}
	if err := w.publishAndSee(span{0, identities}); err != nil {
		return err
	}
	err = b.rounds(func() (bool, error) {
		return w.idle(ctx, w.agent, 3*time.Second, "agent_idle_cores", "agent_rss_100_mb")
	})
	if err != nil {
		return err
	}
	if err := w.publishAndSee(span{identities, podsOfAll}); err != nil {
		return err
	}
	before, err := resident(w.agent.pid())
	if err != nil {
		return err
	}
	open := 0
	for _, n := range []struct {
		streams int
		key     string
	}{{100, "fanout_100_ms"}, {1000, "fanout_1000_ms"}, {10000, "fanout_10k_ms"}} {
		b.say("fanout to %d", n.streams)
		if _, err := ask[struct{}](w.cluster, "open", streams{Span: span{0, podsOfAll}, Count: n.streams - open, Names: []string{"ROOTCA"}}); err != nil {
			return err
		}
		open = n.streams
		if err := b.rounds(func() (bool, error) { return w.fanout(n.key) }); err != nil {
			return err
		}
	}
	after, err := resident(w.agent.pid())
	if err != nil {
		return err
	}
	for range b.options.rounds { // there is one such figure in a run
		f.add("bytes_per_stream", float64(after-before)/float64(open))
	}
	b.settle(b.options.rounds)
	return ctx.Err()
}

// publishAndSee asks for the volumes of pods and waits until each has its SVID.
func (w *world) publishAndSee(s span) error {
	if _, err := ask[struct{}](w.cluster, "publish", s); err != nil {
		return err
	}
	_, err := ask[firsts](w.cluster, "first", first{Span: s, Times: s.To - s.From})
	return err
}

// fanout changes the bundle and waits until all streams have acknowledged it.
func (w *world) fanout(key string) (bool, error) {
	if _, err := ask[struct{}](w.cluster, "mark", nil); err != nil {
		return false, err
	}
	win, err := open(w.ca.pid(), w.agent.pid(), w.cluster.pid())
	if err != nil {
		return false, err
	}
	at, err := ask[int64](w.ca, "bundle", nil)
	if err != nil {
		return false, err
	}
	last, err := ask[int64](w.cluster, "await", 60.0)
	if err != nil {
		return false, err
	}
	t, err := win.close()
	if err != nil || t.foreign > w.b.noise {
		return false, err
	}
	w.b.figures.add(key, float64(last-at)/1000)
	return true, nil
}

// idle measures a program that nobody asks for anything.
func (w *world) idle(ctx context.Context, p *process, d time.Duration, cores, memory string) (bool, error) {
	win, err := open(p.pid(), w.cluster.pid())
	if err != nil {
		return false, err
	}
	select {
	case <-ctx.Done():
		return false, ctx.Err()
	case <-time.After(d):
	}
	t, err := win.close()
	if err != nil || t.foreign > w.b.noise {
		return false, err
	}
	w.b.figures.add(cores, t.cpu[p.pid()].Seconds()/t.elapsed.Seconds())
	if memory == "" {
		return true, nil
	}
	bytes, err := resident(p.pid())
	w.b.figures.add(memory, float64(bytes)/1e6)
	return true, err
}

// benchIdle is what 5,000 agents cost the CA that are there and want nothing.
func benchIdle(ctx context.Context, b *bench) error {
	if b.short {
		return nil
	}
	const agents = 5000
	b.figures.declare("idle_5000_cores", "the CA's processor time with 5,000 idle agents", "processors").below(0.02).anySpread()
	b.figures.declare("ca_rss_5000_mb", "the CA's resident memory with them", "MB")
	w, err := b.newWorld("idle", pods{Agents: agents})
	if err != nil {
		return err
	}
	defer w.close()
	if err := w.startCA(ctx); err != nil {
		return err
	}
	const step = 500
	for i := 0; i < agents; i += step {
		if _, err := ask[struct{}](w.cluster, "connect", connect{Address: w.address, From: i, Agents: step}); err != nil {
			return err
		}
		b.say("%d of %d agents are there", i+step, agents)
	}
	err = b.rounds(func() (bool, error) { return w.idle(ctx, w.ca, 10*time.Second, "idle_5000_cores", "ca_rss_5000_mb") })
	b.settle(b.options.rounds)
	return err
}
