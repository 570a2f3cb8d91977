//go:build linux

package main

import (
	"context"
	"errors"
	"time"
)

// identities is how many pods the agent has whose memory and speed are measured.
const identities = 100

// benchSDS is the first secret that a proxy gets on a new connection to its pod's socket: of an identity that is there, and of
// a pod that the node has never had, for which CSI's call, the whole way to the CA and the answer are needed.
func benchSDS(ctx context.Context, b *bench) error {
	f := b.figures
	times, spare := 1000, 4 // rounds that may be noisy: each has pods of its own
	if b.short {
		times = 200
	}
	f.declare("sds_warm_p99_ms", "first secret on a new connection, identity present, p99", "ms").below(2).anySpread()
	f.declare("sds_warm_p50_ms", "first secret on a new connection, identity present, p50", "ms")
	f.declare("sds_warm_cpu_of_svid", "agent's processor time for that, over an SVID's bare cryptography", "ratio")
	f.declare("sds_cold_p99_ms", "from the volume of a new pod to its first secret, the whole way to the CA and back, p99", "ms").below(25).anySpread()
	f.declare("sds_cold_p50_ms", "from the volume of a new pod to its first secret, p50", "ms")
	f.declare("sds_cold_cpu_of_svid", "agent's and CA's processor time for that, over an SVID's bare cryptography", "ratio")
	w, err := b.newWorld("sds", pods{Agents: 1, Workloads: identities + (b.options.rounds+spare)*times})
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
	top, err := b.child(w.dir, "ceiling", b.server)
	if err != nil {
		return err
	}
	defer top.end()
	if err := w.publishAndSee(span{0, identities}); err != nil {
		return err
	}
	next := span{identities, identities}
	err = b.rounds(func() (bool, error) {
		if next = (span{next.To, next.To + times}); next.To > identities+(b.options.rounds+spare)*times {
			return false, nil
		}
		return w.sdsRound(top, next, times)
	})
	b.settle(b.options.rounds)
	return errors.Join(err, ctx.Err())
}

// sdsRound measures with pods that the node has not had before, and takes them away again.
func (w *world) sdsRound(top *process, fresh span, times int) (bool, error) {
	f := w.b.figures
	svid, quiet, err := w.b.ceiling(top, 0.25)
	if err != nil {
		return false, err
	}
	warm, t, err := w.firsts(first{Span: span{0, identities}, Times: times})
	if err != nil {
		return false, err
	}
	quiet = quiet && t.foreign <= w.b.noise
	var cold firsts
	var spent time.Duration
	const part = 500 // of the 1,024 volumes that a node may have
	for from := fresh.From; from < fresh.To; from += part {
		s := span{from, min(from+part, fresh.To)}
		more, u, err := w.firsts(first{Span: s, Times: s.To - s.From, Publish: true})
		if err != nil {
			return false, err
		}
		if _, err := ask[struct{}](w.cluster, "unpublish", s); err != nil {
			return false, err
		}
		cold.Took = append(cold.Took, more.Took...)
		spent += u.cpu[w.agent.pid()] + u.cpu[w.ca.pid()]
		quiet = quiet && u.foreign <= w.b.noise
	}
	if !quiet {
		return false, nil
	}
	each := float64(times) * svid.CPU
	f.add("sds_warm_p99_ms", warm.quantile(0.99))
	f.add("sds_warm_p50_ms", warm.quantile(0.50))
	f.add("sds_warm_cpu_of_svid", t.cpu[w.agent.pid()].Seconds()/each)
	f.add("sds_cold_p99_ms", cold.quantile(0.99))
	f.add("sds_cold_p50_ms", cold.quantile(0.50))
	f.add("sds_cold_cpu_of_svid", spent.Seconds()/each)
	return true, nil
}

// firsts asks for first secrets, and says what that took.
func (w *world) firsts(what first) (firsts, taken, error) {
	win, err := open(w.ca.pid(), w.agent.pid(), w.cluster.pid())
	if err != nil {
		return firsts{}, taken{}, err
	}
	got, err := ask[firsts](w.cluster, "first", what)
	if err != nil {
		return firsts{}, taken{}, err
	}
	t, err := win.close()
	return got, t, err
}

// benchFanout is a new bundle on its way to 100, 1,000 and 10,000 streams of one agent, and what they and its identities cost
// it in memory and when nobody wants anything.
func benchFanout(ctx context.Context, b *bench) error {
	const podsOfAll = 500
	f := b.figures
	f.declare("fanout_10k_ms", "new bundle to 10,000 streams, all acknowledged", "ms").below(2000).anySpread()
	f.declare("fanout_100_ms", "new bundle to 100 streams, all acknowledged", "ms").anySpread()
	f.declare("fanout_1000_ms", "new bundle to 1,000 streams, all acknowledged", "ms").anySpread()
	f.declare("agent_rss_100_mb", "agent's resident memory with 100 identities", "MB").below(40)
	f.declare("bytes_per_identity", "agent's memory for each further identity, from 100 to 500", "bytes").once()
	f.declare("bytes_per_stream", "agent's memory for each further stream on a connection of its own, from 1,000 to 10,000, after fan-outs to them", "bytes").below(24576).once()
	f.declare("bytes_per_stream_floor", "a bare gRPC server's, with the agent's options and a handler that waits, without fan-outs", "bytes").once()
	f.declare("bytes_per_stream_of_floor", "the agent's over that", "ratio").once()
	f.declare("agent_idle_cores", "agent's processor time with 100 identities and no stream", "processors").anySpread()
	f.declare("agent_idle_1000_cores", "agent's processor time with 100 identities and 1,000 idle streams", "processors").anySpread()
	b.stage("what gRPC takes for a stream")
	b.say("%s%s", f.bench, b.now)
	floor, err := b.floor()
	if err != nil {
		return err
	}
	w, err := b.newFanoutWorld(ctx, "fanout", podsOfAll)
	if err != nil {
		return err
	}
	defer w.close()
	if err := w.publishAndSee(span{0, identities}); err != nil {
		return err
	}
	b.stage("an idle agent")
	if err := b.rounds(func() (bool, error) {
		return w.idle(ctx, w.agent, 3*time.Second, "agent_idle_cores", "agent_rss_100_mb")
	}); err != nil {
		return err
	}
	for _, n := range []struct {
		streams int
		key     string
	}{{100, "fanout_100_ms"}, {1000, "fanout_1000_ms"}} {
		if err := w.fanoutTo(n.streams, identities, n.key); err != nil {
			return err
		}
	}
	b.stage("an idle agent with 1,000 streams")
	if err := b.rounds(func() (bool, error) { return w.idle(ctx, w.agent, 3*time.Second, "agent_idle_1000_cores", "") }); err != nil {
		return err
	}
	var rss [3]int64
	for i, step := range []func() error{
		func() error { return nil },
		func() error { return w.publishAndSee(span{identities, podsOfAll}) },
		func() error { return w.fanoutTo(10000, podsOfAll, "fanout_10k_ms") },
	} {
		if err := step(); err != nil {
			return err
		}
		if rss[i], err = resident(w.agent.pid()); err != nil {
			return err
		}
	}
	f.add("bytes_per_identity", float64(rss[1]-rss[0])/(podsOfAll-identities))
	each := float64(rss[2]-rss[1]) / 9000
	f.add("bytes_per_stream", each)
	f.add("bytes_per_stream_floor", floor)
	f.add("bytes_per_stream_of_floor", each/floor)
	b.settle(b.options.rounds)
	return ctx.Err()
}

// newFanoutWorld is one whose CA does as it is told.
func (b *bench) newFanoutWorld(ctx context.Context, name string, workloads int) (*world, error) {
	w, err := b.newWorld(name, pods{Agents: 1, Workloads: workloads})
	if err != nil {
		return nil, err
	}
	if w.ca, err = b.child(w.dir, "ca", b.server); err == nil {
		_, err = ask[struct{}](w.ca, "serve", serving{w.dir, w.address})
	}
	if err == nil {
		err = w.startAgent(ctx)
	}
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// fanoutTo opens streams until there are so many, over the first pods in turn, and measures a new bundle's way to them.
func (w *world) fanoutTo(n, pods int, key string) error {
	w.b.stage("a new bundle to %d streams", n)
	if _, err := ask[struct{}](w.cluster, "open", streams{Span: span{0, pods}, Count: n - w.streams, Names: []string{"ROOTCA"}}); err != nil {
		return err
	}
	w.streams = n
	return w.b.rounds(func() (bool, error) { return w.fanout(key) })
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
		b.say("idle: %d of %d agents are there", i+step, agents)
	}
	err = b.rounds(func() (bool, error) { return w.idle(ctx, w.ca, 10*time.Second, "idle_5000_cores", "ca_rss_5000_mb") })
	b.settle(b.options.rounds)
	return errors.Join(err, ctx.Err())
}
