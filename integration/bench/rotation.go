//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

const (
	rotationAgents = 1000
	rotationPods   = 50 // of each
	rotationTime   = 2 * time.Minute
)

// benchRotation is a planned rotation with 1,000 agents that hold 50,000 SVIDs and only say so, from its start until everybody
// has acknowledged the new bundle and the new root is active; and a decision about it.
func benchRotation(ctx context.Context, b *bench) error {
	f := b.figures
	f.declare("rotation_1000_held_seconds", "from the start of a rotation until 1,000 agents have the new bundle", "s").anySpread()
	f.declare("rotation_1000_told_seconds", "until the last agent has told that the streams of its 50 workloads have acknowledged it, which it does after a second", "s").anySpread()
	f.declare("rotation_1000_active_seconds", "until the new root is active", "s").anySpread()
	f.declare("rotation_1000_ca_cpu_seconds", "the CA's processor time for it", "s")
	f.declare("rotation_1000_ca_rss_mb", "the CA's resident memory at its peak", "MB")
	f.declare("rotation_1000_status_ms", "a look at where it stands, by everybody's last word", "ms").anySpread()
	f.declare("decision_50k_ready_ms", "one decision on the evidence of 50,000 workloads: all have acknowledged", "ms")
	f.declare("decision_50k_late_ms", "the same while all are waited for", "ms")
	if err := b.decisions(f); err != nil {
		return err
	}
	err := b.rounds(func() (bool, error) { return b.rotation(ctx) })
	b.settle(b.options.rounds)
	return errors.Join(err, ctx.Err())
}

// decisions measures what one takes.
func (b *bench) decisions(f *figures) error {
	d, err := b.child(b.dir, "decider", b.server)
	if err != nil {
		return err
	}
	defer d.end()
	for _, x := range []struct {
		late bool
		key  string
	}{{false, "decision_50k_ready_ms"}, {true, "decision_50k_late_ms"}} {
		if _, err := ask[struct{}](d, "make", fleet{rotationAgents, rotationPods, x.late}); err != nil {
			return err
		}
		if err := b.rounds(func() (bool, error) {
			win, err := open(d.pid())
			if err != nil {
				return false, err
			}
			took, err := ask[time.Duration](d, "decide", nil)
			if err != nil {
				return false, err
			}
			t, err := win.close()
			if err != nil || t.foreign > b.noise {
				return false, err
			}
			f.add(x.key, took.Seconds()*1000)
			return true, nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// rotation takes a CA of its own through one rotation, as far as it comes before SVIDs have to expire.
func (b *bench) rotation(ctx context.Context) (bool, error) {
	w, err := b.newWorld(fmt.Sprintf("rotation-%d", time.Now().UnixNano()), pods{Agents: rotationAgents})
	if err != nil {
		return false, err
	}
	defer w.close()
	if err := w.startCA(ctx); err != nil {
		return false, err
	}
	if w.people, err = dialUnix(w.dir + "/admin.sock"); err != nil {
		return false, err
	}
	admin := apiv1.NewAdminClient(w.people)
	old, err := activeRoot(ctx, admin)
	if err != nil {
		return false, err
	}
	if _, err := ask[struct{}](w.cluster, "hold", holding{w.address, rotationPods, old.GetId()}); err != nil {
		return false, err
	}
	if _, err := ask[told](w.cluster, "told", time.Time{}); err != nil {
		return false, err
	}
	for r := new(apiv1.RotationStatusResponse); r.GetRotation().GetPodsHolding() < rotationAgents*rotationPods; time.Sleep(100 * time.Millisecond) {
		if r, err = admin.RotationStatus(ctx, &apiv1.RotationStatusRequest{}); err != nil {
			return false, api.FromStatus(err)
		}
	}
	return w.rotate(ctx, admin)
}

// rotate begins a rotation and waits until the new root is active.
func (w *world) rotate(ctx context.Context, admin apiv1.AdminClient) (bool, error) {
	win, err := open(w.ca.pid(), w.cluster.pid())
	if err != nil {
		return false, err
	}
	peak := watchMemory(w.ca.pid())
	began := time.Now()
	_, err = admin.StartRotation(ctx, &apiv1.StartRotationRequest{
		Operation: "bench", Reason: "bench", Limits: &apiv1.RotationLimits{Soak: durationpb.New(time.Second)},
	})
	err = api.FromStatus(err)
	var last told
	if err == nil {
		last, err = ask[told](w.cluster, "told", began)
	}
	var next *apiv1.AuthorityInfo
	for err == nil && next == nil {
		next, err = activeSince(ctx, admin, began)
	}
	rss := peak()
	if err != nil {
		return false, errors.Join(err, whyNot(ctx, admin))
	}
	t, err := win.close()
	if err != nil {
		return false, err
	}
	looks := make([]time.Duration, 0, 5)
	for range cap(looks) {
		begin := time.Now()
		if _, err := admin.RotationStatus(ctx, &apiv1.RotationStatusRequest{}); err != nil {
			return false, api.FromStatus(err)
		}
		looks = append(looks, time.Since(begin))
	}
	if t.foreign > w.b.noise {
		return false, nil
	}
	slices.Sort(looks)
	f := w.b.figures
	f.add("rotation_1000_held_seconds", last.Held.Sub(began).Seconds())
	f.add("rotation_1000_told_seconds", last.Told.Sub(began).Seconds())
	f.add("rotation_1000_active_seconds", next.GetActiveAt().AsTime().Sub(began).Seconds())
	f.add("rotation_1000_ca_cpu_seconds", t.cpu[w.ca.pid()].Seconds())
	f.add("rotation_1000_ca_rss_mb", float64(rss)/1e6)
	f.add("rotation_1000_status_ms", quantile(looks, 0.5))
	return true, nil
}

// activeSince looks after a while whether a root has become active since then; nil where none has.
func activeSince(ctx context.Context, admin apiv1.AdminClient, then time.Time) (*apiv1.AuthorityInfo, error) {
	if time.Since(then) > rotationTime {
		return nil, errors.New("the new root is not active in time")
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(20 * time.Millisecond):
	}
	a, err := activeRoot(ctx, admin)
	if err != nil || a.GetActiveAt().AsTime().Before(then) {
		return nil, err
	}
	return a, nil
}

// watchMemory looks at a process's resident memory until the end, which returns the most that it was.
func watchMemory(pid int) (end func() int64) {
	over := make(chan struct{})
	var most int64
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			if now, err := resident(pid); err == nil { // whoever measures its time hears of its end
				most = max(most, now)
			}
			select {
			case <-over:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	return func() int64 {
		close(over)
		wg.Wait()
		return most
	}
}

// holding asks for sessions of all agents, each of which says that it holds so many SVIDs under a root.
type holding struct {
	Address string
	Pods    int
	Root    string // id
}

// hold opens the sessions.
func (c *cluster) hold(ctx context.Context, h holding) error {
	for _, n := range c.nodes {
		n.reporter = newReporter(n.number, h)
		if err := n.open(ctx, h.Address); err != nil {
			return fmt.Errorf("agent %d: %w", n.number, err)
		}
	}
	return nil
}

// told says when the last agent had a bundle, and when the last had told that all its streams have acknowledged it.
type told struct{ Held, Told time.Time }

// told waits until all agents have told of a bundle that came after some time.
func (c *cluster) told(ctx context.Context, after time.Time) (last told, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, rotationTime, errors.New("not all agents had the bundle in time"))
	defer cancel()
	for _, n := range c.nodes {
		t, err := n.reporter.await(ctx, after)
		if err != nil {
			return last, err
		}
		if last.Held.Before(t.Held) {
			last.Held = t.Held
		}
		if last.Told.Before(t.Told) {
			last.Told = t.Told
		}
	}
	return last, nil
}

// reportEvery is how often an agent reports at most.
const reportEvery = time.Second

// reporter reports as an agent does: of a new bundle at once, and a second later what its streams say of it, which have all
// acknowledged it then. Each pod has two streams, one of them with the bundle.
type reporter struct {
	holdings []*apiv1.Holding

	mu      sync.Mutex
	of      told
	changed chan struct{}
}

func newReporter(node int, h holding) *reporter {
	now := time.Now()
	r := &reporter{changed: make(chan struct{}, 1)}
	for i := range h.Pods {
		stream := func(k int, name string) *apiv1.Stream {
			return &apiv1.Stream{Id: uint64(2*i + k), Proxy: "bench", Protocol: "sotw", Names: []string{name}, WantsBundle: name != "default", AckedSerial: "0123456789abcdef"}
		}
		name := fmt.Sprintf("web-%d-%d", node, i)
		r.holdings = append(r.holdings, &apiv1.Holding{
			Key: "key-" + name, SpiffeId: fmt.Sprintf("spiffe://%s/ns/shop/sa/web-%d", trustDomain, i), Namespace: "shop", PodName: name, PodUid: "uid-" + name,
			Serial: "0123456789abcdef", NotBefore: timestamppb.New(now), NotAfter: timestamppb.New(now.Add(time.Hour)), RenewAt: timestamppb.New(now.Add(30 * time.Minute)),
			IssuerKeyId: h.Root, RootKeyId: h.Root, Streams: []*apiv1.Stream{stream(0, "default"), stream(1, "ROOTCA")},
		})
	}
	return r
}

// run reports each bundle that comes, until there are none any more or nobody hears it.
func (r *reporter) run(ctx context.Context, stream apiv1.Authority_SessionClient, bundles <-chan *apiv1.Bundle) {
	for full := true; ; full = false {
		b, ok := <-bundles
		if !ok {
			return
		}
		held := time.Now()
		first := &apiv1.Report{Full: full, BundleEpoch: b.GetEpoch(), BundleNumber: b.GetNumber(), BundleHash: b.GetHash()}
		if send(stream, first) != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(reportEvery):
		}
		for _, h := range r.holdings {
			s := h.GetStreams()[1]
			s.AckedGeneration = api.Generation{Epoch: b.GetEpoch(), Number: b.GetNumber()}.Sequence()
			s.PushedGeneration, s.AckedHash = s.AckedGeneration, b.GetHash()
		}
		second := &apiv1.Report{Changed: r.holdings, BundleEpoch: b.GetEpoch(), BundleNumber: b.GetNumber(), BundleHash: b.GetHash()}
		if send(stream, second) != nil {
			return
		}
		r.mu.Lock()
		r.of = told{held, time.Now()}
		r.mu.Unlock()
		select {
		case r.changed <- struct{}{}:
		default:
		}
	}
}

func send(stream apiv1.Authority_SessionClient, r *apiv1.Report) error {
	return stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Report{Report: r}})
}

// await waits until a bundle was told of that came after some time.
func (r *reporter) await(ctx context.Context, after time.Time) (told, error) {
	for {
		r.mu.Lock()
		t := r.of
		r.mu.Unlock()
		if t.Held.After(after) {
			return t, nil
		}
		select {
		case <-r.changed:
		case <-ctx.Done():
			return told{}, context.Cause(ctx)
		}
	}
}
