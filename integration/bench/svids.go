//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// wave is how often all SVIDs of the agent are renewed while their way to the streams is measured.
const wave = 8 * time.Second

// benchSVIDs is new SVIDs of all pods of a node at once on their way to 100, 1,000 and 10,000 streams: from the moment at which
// they fall due, over a key, a request, the CA and its answer for each pod, to the last acknowledgement. There are twenty
// streams to a pod.
func benchSVIDs(ctx context.Context, b *bench) error {
	const each = 20
	sizes := []int{100, 1000, 10000}
	key := func(n int) string { return fmt.Sprintf("fanout_svid_%d_ms", n) }
	for _, n := range sizes {
		b.figures.declare(key(n), fmt.Sprintf("new SVIDs of %d pods to %d streams, from when they are due to the last acknowledgement", n/each, n), "ms").anySpread()
	}
	w, err := b.newFanoutWorld(ctx, "svids", sizes[len(sizes)-1]/each)
	if err != nil {
		return err
	}
	defer w.close()
	if _, err := ask[struct{}](w.ca, "renew", wave); err != nil {
		return err
	}
	there := 0
	for _, n := range sizes {
		b.stage("new SVIDs to %d streams", n)
		s := span{there, n / each}
		if err := w.publishAndSee(s); err != nil {
			return err
		}
		if _, err := ask[struct{}](w.cluster, "open", streams{Span: s, Count: n - there*each, Names: []string{"default"}}); err != nil {
			return err
		}
		there = n / each
		if err := b.rounds(func() (bool, error) { return w.wave(ctx, key(n)) }); err != nil {
			return err
		}
	}
	b.settle(b.options.rounds)
	return ctx.Err()
}

// wave waits for the next time that all SVIDs are renewed, and measures that.
func (w *world) wave(ctx context.Context, key string) (bool, error) {
	due := nextWave(time.Now(), wave)
	select {
	case <-ctx.Done():
		return false, ctx.Err()
	case <-time.After(time.Until(due) - wave/8):
	}
	if _, err := ask[struct{}](w.cluster, "mark", nil); err != nil {
		return false, err
	}
	win, err := open(w.ca.pid(), w.agent.pid(), w.cluster.pid())
	if err != nil {
		return false, err
	}
	last, err := ask[int64](w.cluster, "await", 60.0)
	if err != nil {
		return false, err
	}
	t, err := win.close()
	if err != nil {
		return false, err
	}
	took := time.UnixMicro(last).Sub(due)
	if took < 0 || took > wave*3/4 {
		return false, errors.New("the SVIDs were not renewed when they were due")
	}
	if t.foreign > w.b.noise {
		return false, nil
	}
	w.b.figures.add(key, took.Seconds()*1000)
	return true, nil
}
