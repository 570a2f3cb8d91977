package main

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/agent/csi"
	"github.com/signet-ca/signet/agent/workloadapi"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/internal/latest"
	"github.com/signet-ca/signet/sds"
)

const (
	podStreams   = 32          // SDS streams of one socket: a proxy has one for each secret
	farewellTime = time.Second // for streams to hear that their pod is gone
)

// protocolWorkloadAPI is what the CA hears a stream of the Workload API called.
const protocolWorkloadAPI = "workload-api"

// door is what a pod's socket serves while its identity stays the same: SDS and the Workload API. Who speaks is known from the
// socket, so nobody is asked for a token.
type door struct {
	pods     *pods
	id       *agent.Identity
	snapshot latest.Value[*workloadapi.Snapshot]
	open     latest.Value[int] // streams of the Workload API

	mu      sync.Mutex
	numbers map[uint64]uint64 // of those streams: by which the CA hears of them
}

func newDoor(p *pods, id *agent.Identity) *door {
	return &door{pods: p, id: id, numbers: map[uint64]uint64{}}
}

// serve serves the pod on l until ctx ends, and closes l. Where the volume is gone, the Workload API's streams are told before
// that the pod has no identity any more.
func (d *door) serve(ctx context.Context, l net.Listener) error {
	secrets := sds.New(sds.Config{
		Source: d, Log: d.pods.log, Hooks: d.pods.src.metrics.hooks(), MaxStreams: podStreams, MaxStreamsPerWorkload: podStreams,
	})
	workload := workloadapi.New(workloadapi.Config{
		Source: &d.snapshot, Name: nameOf(d.id), Log: d.pods.log, Hooks: d.pods.metrics.hooks(),
		MaxRequestBytes: sds.MaxRequestBytes, Delivered: d.delivered,
	})
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer stop()
		d.follow(ctx, ended)
		if errors.Is(context.Cause(ctx), csi.ErrUnpublished) {
			d.farewell()
		}
	})
	err := workload.Serve(serving, l, secrets)
	close(ended)
	wg.Wait()
	return err
}

// follow keeps the snapshot in step with what the agent holds, until ctx ends or the socket is served no more. Meanwhile it
// has the identity followed, so that its secrets are checked and encoded once, when they come, and not for each connection
// that finds no other.
func (d *door) follow(ctx context.Context, ended <-chan struct{}) {
	var f *follower // nil while there is nothing to follow
	defer func() { d.leave(f) }()
	for {
		held, heldChanged := d.id.Held().Get()
		trust, trustChanged := d.pods.src.agent.Trust().Get() // after what is held, which was checked under it or an earlier one
		next := &workloadapi.Snapshot{Bundle: trust.Bundle, Generation: trust.Generation.Sequence()}
		if held.SVID != nil {
			next.SVIDs = append(next.SVIDs, held.SVID)
		}
		if refused := held.Refused(); refused != nil {
			next.Refused = refused
		}
		d.snapshot.Set(next)
		var over <-chan struct{}
		if f = d.keep(f, next.Refused == nil); f != nil {
			over = f.done
		}
		select {
		case <-ctx.Done():
			return
		case <-ended:
			return
		case <-heldChanged:
		case <-trustChanged:
		case <-over:
		}
	}
}

// keep returns the follower to keep, which is f as long as it follows; nil where the identity is refused.
func (d *door) keep(f *follower, wanted bool) *follower {
	if f != nil {
		select {
		case <-f.done:
		default:
			if wanted {
				return f
			}
		}
		d.leave(f)
	}
	if !wanted {
		return nil
	}
	f, _ = d.pods.src.follow(d.id) // an error is the agent's end
	return f
}

func (d *door) leave(f *follower) {
	if f != nil {
		d.pods.src.leave(d.id, f)
	}
}

// farewell tells the streams of the Workload API that the pod is gone, and waits until they have ended, or for a second.
func (d *door) farewell() {
	d.snapshot.Set(&workloadapi.Snapshot{Refused: api.E(api.PodDeleted, "the pod's volume was removed")})
	t := time.NewTimer(farewellTime)
	defer t.Stop()
	for {
		n, changed := d.open.Get()
		if n == 0 {
			return
		}
		select {
		case <-changed:
		case <-t.C:
			return
		}
	}
}

// Open implements sds.Source.
func (d *door) Open(context.Context, metadata.MD) (*sds.Workload, error) {
	if refused := d.id.Held().Load().Refused(); refused != nil {
		return nil, refused
	}
	f, err := d.pods.src.follow(d.id)
	if err != nil {
		return nil, err
	}
	return d.pods.src.workload(d.id, f), nil
}

// delivered tells the CA of a stream of the Workload API. There is no acknowledgement, so it subscribes to no bundle as SDS
// knows it: it is unproven, and what was pushed is all that is known.
func (d *door) delivered(x workloadapi.Delivery) {
	number, first := d.number(x)
	switch {
	case !x.Open:
		d.id.Report(number, nil)
		d.count(-1)
		return
	case first:
		d.count(+1)
	}
	s := &apiv1.Stream{
		Id: number, Protocol: protocolWorkloadAPI, Names: []string{x.Call}, PushedSerial: x.Serial, PushedGeneration: x.Generation,
	}
	if !x.At.IsZero() {
		s.PushedHash = x.Hash[:]
	}
	d.id.Report(number, s)
}

// number returns the number on this node of a stream, which is forgotten with its last delivery.
func (d *door) number(x workloadapi.Delivery) (number uint64, first bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	number, ok := d.numbers[x.Stream]
	if !ok {
		number = d.pods.src.streams.Add(1)
		d.numbers[x.Stream] = number
	}
	if !x.Open {
		delete(d.numbers, x.Stream)
	}
	return number, !ok
}

func (d *door) count(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open.Set(d.open.Load() + n)
}
