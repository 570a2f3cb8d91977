//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

const (
	herdAgents = 256
	herdSize   = 10_000
	herdTTL    = time.Hour // as the policy says
)

// benchHerd is the end of an outage: 10,000 workloads on 256 nodes are due at one moment, with 1 to 50 % of their lifetimes
// left, and their agents ask as an agent does: the most urgent first, in batches, again when the CA says.
func benchHerd(ctx context.Context, b *bench) error {
	f := b.figures
	f.declare("herd_10k_seconds", "10,000 workloads due at once, with 1 to 50 % of their hour left, until the last has its SVID", "s")
	f.declare("herd_rate_of_ceiling", "SVIDs of its best second, of the ceiling's on the same processors", "share")
	f.declare("herd_mean_of_ceiling", "SVIDs of all its seconds, of the ceiling's", "share")
	f.declare("herd_urgent_p99_ms", "until the most urgent tenth has its SVIDs, p99", "ms").anySpread()
	f.declare("herd_rest_p99_ms", "the same of the others", "ms").anySpread()
	f.declare("herd_order", "of any two of them, how often the more urgent one has its SVID first (by chance: 0.5)", "share")
	f.declare("herd_refusals", "requests that were sent away to come back later", "").anySpread()
	f.declare("herd_expired", "of them expired", "").anySpread()
	w, err := b.newWorld("herd", pods{Agents: herdAgents, Workloads: (herdSize + herdAgents - 1) / herdAgents})
	if err != nil {
		return err
	}
	defer w.close()
	top, err := w.startWarm(ctx, herdAgents, herdAgents)
	if err != nil {
		return err
	}
	defer top.end()
	err = b.rounds(func() (bool, error) { return w.herdRound(ctx, top) })
	b.settle(b.options.rounds)
	return errors.Join(err, ctx.Err())
}

func (w *world) herdRound(ctx context.Context, top *process) (quiet bool, err error) {
	before, quiet1, err := w.b.ceiling(top, 0.25)
	if err != nil {
		return false, err
	}
	win, err := open(w.ca.pid(), w.cluster.pid(), top.pid())
	if err != nil {
		return false, err
	}
	stop := w.watchRate(ctx)
	h, err := ask[stampede](w.cluster, "herd", rand.Uint64())
	peak, rerr := stop()
	if err = errors.Join(err, rerr); err != nil {
		return false, err
	}
	t, err := win.close()
	if err != nil {
		return false, err
	}
	after, quiet2, err := w.b.ceiling(top, 0.25)
	if err != nil || !quiet1 || !quiet2 || t.foreign > w.b.noise {
		return false, err
	}
	f := w.b.figures
	f.add("herd_10k_seconds", h.Seconds)
	f.add("herd_rate_of_ceiling", peak/((before.Rate+after.Rate)/2))
	f.add("herd_mean_of_ceiling", herdSize/h.Seconds/((before.Rate+after.Rate)/2))
	f.add("herd_urgent_p99_ms", h.Urgent)
	f.add("herd_rest_p99_ms", h.Rest)
	f.add("herd_order", h.Order)
	f.add("herd_refusals", float64(h.Refusals))
	f.add("herd_expired", float64(h.Expired))
	return true, nil
}

// herdWindow is the time of which the best is looked for.
const herdWindow = time.Second

// watchRate asks the CA how many SVIDs it has issued, until stop, which returns how many a second they were in the best window.
func (w *world) watchRate(ctx context.Context) (stop func() (float64, error)) {
	ctx, cancel := context.WithCancel(ctx)
	var best float64
	var failed error
	var wg sync.WaitGroup
	wg.Go(func() {
		type sample struct {
			at time.Time
			n  float64
		}
		var all []sample
		for ctx.Err() == nil {
			n, err := issuedSVIDs(ctx, w.caHTTP)
			if err != nil {
				if ctx.Err() == nil {
					failed = err
				}
				return
			}
			now := sample{time.Now(), n}
			all = append(all, now)
			for len(all) > 1 && now.at.Sub(all[1].at) >= herdWindow {
				all = all[1:]
			}
			if took := now.at.Sub(all[0].at); took >= herdWindow {
				best = max(best, (now.n-all[0].n)/took.Seconds())
			}
			select {
			case <-ctx.Done():
			case <-time.After(herdWindow / 10):
			}
		}
	})
	return func() (float64, error) {
		cancel()
		wg.Wait()
		return best, failed
	}
}

// issuedSVIDs asks a CA for the number of SVIDs that it has issued to workloads.
func issuedSVIDs(ctx context.Context, address string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	const name = `signet_svids_issued_total{kind="workload"} `
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, name); ok {
			return strconv.ParseFloat(strings.TrimSpace(v), 64)
		}
	}
	return 0, errors.New("the CA has no metric " + name)
}

// stampede is what a herd came to.
type stampede struct {
	Seconds      float64
	Urgent, Rest float64 // p99, milliseconds
	Order        float64
	Refusals     int
	Expired      int
}

// due is one workload of a herd.
type due struct {
	item    *apiv1.IssueItem
	left    time.Duration // from the herd's beginning
	at      time.Duration // when it may be asked for
	flying  bool
	served  time.Duration // 0: not yet
	refused int
}

func (d *due) pressing() bool { return d.left < api.Pressing }

// herd has the whole herd ask at once.
func (c *cluster) herd(ctx context.Context, seed uint64) (stampede, error) {
	r := rand.New(rand.NewPCG(seed, 0))
	began := time.Now()
	var all []*due
	of := make([][]*due, len(c.nodes))
	for i := range herdSize {
		n := c.nodes[i%len(c.nodes)]
		d := &due{item: n.items[i/len(c.nodes)], left: time.Duration((0.01 + 0.49*r.Float64()) * float64(herdTTL))}
		d.item.HoldsUntil = timestamppb.New(began.Add(d.left))
		all, of[i%len(of)] = append(all, d), append(of[i%len(of)], d)
	}
	var wg sync.WaitGroup
	failed := make([]error, len(of))
	for i, mine := range of {
		slices.SortFunc(mine, func(a, b *due) int { return int(a.left - b.left) })
		wg.Go(func() { failed[i] = c.nodes[i].renew(ctx, mine, began) })
	}
	wg.Wait()
	if err := errors.Join(failed...); err != nil {
		return stampede{}, err
	}
	return measureHerd(r, all), nil
}

// What an agent does: see agent/ask.go.
const (
	herdGather  = 10 * time.Millisecond
	herdBatch   = 4 // of the first call, and twice as many in each further one
	herdRelaxed = 4
)

// renew asks for all of these, which are in the order of their urgency, until each is there.
func (n *node) renew(ctx context.Context, mine []*due, began time.Time) error {
	type answer struct {
		to  []*due
		err error
	}
	answers := make(chan answer)
	var failed error
	relaxed, calls, missing := 0, 0, len(mine)
	for missing > 0 && failed == nil || calls > 0 {
		next := time.Minute
		for batch := nextBatch(mine, time.Since(began), relaxed, &next); batch != nil && failed == nil; batch = nextBatch(mine, time.Since(began), relaxed, &next) {
			if calls++; !batch[0].pressing() {
				relaxed++
			}
			go func() { answers <- answer{batch, n.askFor(ctx, batch, began)} }()
		}
		select {
		case a := <-answers:
			if calls--; !a.to[0].pressing() {
				relaxed--
			}
			failed = errors.Join(failed, a.err)
			for _, d := range a.to {
				if d.flying = false; d.served > 0 {
					missing--
				}
			}
		case <-time.After(max(next, herdGather)):
		}
	}
	return failed
}

// nextBatch returns what goes into the next call, nil where nothing may be asked for; the least of next and when something may.
func nextBatch(mine []*due, now time.Duration, relaxed int, next *time.Duration) (batch []*due) {
	most := 4 * herdBatch
	for _, d := range mine {
		switch {
		case d.served > 0 || d.flying:
		case d.at > now:
			*next = min(*next, d.at-now)
		case !d.pressing() && relaxed == herdRelaxed, len(batch) > 0 && batch[0].pressing() != d.pressing(), len(batch) == most:
			return batch
		default:
			if !d.pressing() {
				most = herdBatch << relaxed
			}
			d.flying = true
			batch = append(batch, d)
		}
	}
	return batch
}

// askFor makes one call and notes what came of it.
func (n *node) askFor(ctx context.Context, batch []*due, began time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r := &apiv1.IssueRequest{}
	for _, d := range batch {
		r.Items = append(r.Items, d.item)
	}
	resp, err := n.client.Issue(ctx, r)
	if err != nil {
		return api.FromStatus(err)
	}
	now := time.Since(began)
	for i, x := range resp.GetResults() {
		switch d := batch[i]; {
		case x.GetSvid() != nil:
			d.served = now
		case x.GetRefusal().GetReason() == string(api.Overloaded):
			d.refused++
			d.at = now + max(x.GetRefusal().GetRetryAfter().AsDuration(), 100*time.Millisecond)
		default:
			return fmt.Errorf("refused: %v", x.GetRefusal())
		}
	}
	return nil
}

// measureHerd works out the figures of a herd that was served.
func measureHerd(r *rand.Rand, all []*due) (h stampede) {
	slices.SortFunc(all, func(a, b *due) int { return int(a.left - b.left) })
	took := func(of []*due) (took []time.Duration) {
		for _, d := range of {
			took = append(took, d.served)
		}
		slices.Sort(took)
		return took
	}
	times := took(all)
	h.Seconds = times[len(times)-1].Seconds()
	h.Urgent, h.Rest = quantile(took(all[:len(all)/10]), 0.99), quantile(took(all[len(all)/10:]), 0.99)
	for _, d := range all {
		h.Refusals += d.refused
		if d.served > d.left {
			h.Expired++
		}
	}
	const pairs = 100_000
	for range pairs {
		i, k := r.IntN(len(all)), r.IntN(len(all))
		a, b := all[min(i, k)], all[max(i, k)]
		switch {
		case a.served < b.served:
			h.Order += 1. / pairs
		case a.served == b.served:
			h.Order += 0.5 / pairs
		}
	}
	return h
}
