package main

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/internal/daemon"
	"github.com/signet-ca/signet/internal/latest"
	"github.com/signet-ca/signet/sds"
)

// sharedVolume is the place that tokens serve which come over the shared socket.
const sharedVolume = "shared"

// source is an sds.Source over an agent: it says whose a stream is by the token in its metadata, and turns what the agent
// holds into secrets, encoded once for all streams. It is the only place where the agent and Envoy meet.
type source struct {
	agent   *agent.Agent
	metrics *sdsMetrics
	log     *slog.Logger
	streams atomic.Uint64 // counts the streams of all sockets: the number by which the CA hears of one

	mu        sync.Mutex
	closed    bool
	followers map[*agent.Identity]*follower
	trust     *agent.Trust   // the newest that was seen
	encoded   *sds.Trust     // the newest that can be served; nil while there is none
	wg        sync.WaitGroup // one for each follower
}

// follower keeps the secrets of one identity in step with what the agent holds, while a stream is open for it.
type follower struct {
	material latest.Value[*sds.Material]
	streams  int // guarded by source.mu
	cancel   context.CancelFunc
	done     chan struct{} // closed when the identity was refused
	refused  error         // why; set before done is closed
}

func newSource(a *agent.Agent, log *slog.Logger) *source {
	return &source{agent: a, metrics: newMetrics(), log: log, followers: map[*agent.Identity]*follower{}}
}

// Open implements sds.Source.
func (s *source) Open(ctx context.Context, md metadata.MD) (*sds.Workload, error) {
	e, err := attestor.FromMetadata(md.Get("authorization"))
	if err != nil {
		return nil, err
	}
	id, until, err := s.agent.Admit(ctx, e, sharedVolume)
	if err != nil {
		return nil, err
	}
	if c := daemon.ConnOf(ctx); c != nil {
		c.Admit(id.Pod().UID)
	}
	f, err := s.follow(id)
	if err != nil {
		return nil, err
	}
	w := s.workload(id, f)
	w.ExpireAt = until
	return w, nil
}

// workload describes an identity to SDS, for one stream of a follower.
func (s *source) workload(id *agent.Identity, f *follower) *sds.Workload {
	number := s.streams.Add(1)
	w := &sds.Workload{
		Name:     nameOf(id),
		Material: &f.material,
		Done:     f.done,
		Err:      func() error { return f.refused },
		Release:  func() { s.leave(id, f) },
		Report:   func(r sds.Report) { id.Report(number, streamProto(number, r)) },
	}
	if svid := id.Held().Load().SVID; svid != nil {
		w.ID = svid.ID
	}
	return w
}

// nameOf names an identity's pod for logs.
func nameOf(id *agent.Identity) string { return id.Pod().Namespace + "/" + id.Pod().Name }

// follow enters a stream into the identity's follower; leave takes it out again.
func (s *source) follow(id *agent.Identity) (*follower, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, api.E(api.AgentStopping, "the agent is stopping")
	}
	f := s.followers[id]
	if f == nil {
		running, cancel := context.WithCancel(context.Background())
		f = &follower{cancel: cancel, done: make(chan struct{})}
		s.followers[id] = f
		s.wg.Go(func() { s.run(running, id, f) })
	}
	f.streams++
	return f, nil
}

func (s *source) leave(id *agent.Identity, f *follower) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.streams--; f.streams == 0 {
		s.drop(id, f)
	}
}

// drop ends a follower; the caller holds s.mu.
func (s *source) drop(id *agent.Identity, f *follower) {
	f.cancel()
	if s.followers[id] == f {
		delete(s.followers, id)
	}
}

// close ends all followers and waits for them.
func (s *source) close() {
	s.mu.Lock()
	s.closed = true
	for id, f := range s.followers {
		s.drop(id, f)
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// run follows the identity and the trust bundle until ctx ends or the identity is refused.
func (s *source) run(ctx context.Context, id *agent.Identity, f *follower) {
	var identity *sds.Identity
	var last sds.Material // that streams were given
	var of *x509svid.SVID // the newest that was seen; identity is made of it where it can be served
	for {
		held, heldChanged := id.Held().Get()
		_, trustChanged := s.agent.Trust().Get()
		if refused := held.Refused(); refused != nil {
			s.mu.Lock()
			s.drop(id, f)
			s.mu.Unlock()
			f.refused = refused
			close(f.done)
			return
		}
		switch {
		case held.SVID == nil:
			identity, of = nil, nil
		case of != held.SVID:
			of = held.SVID
			if next, err := sds.NewIdentity(held.SVID); err == nil {
				identity = next
			} else {
				s.log.Error("identity not served, keeping the last", "pod", nameOf(id), "error", err)
			}
		}
		if trust := s.encode(); trust != nil && (sds.Material{Identity: identity, Trust: trust}) != last {
			last = sds.Material{Identity: identity, Trust: trust}
			f.material.Set(new(last))
		}
		select {
		case <-ctx.Done():
			return
		case <-heldChanged:
		case <-trustChanged:
		}
	}
}

// encode returns the agent's bundle as secrets, made once for all streams of the node; nil while there is none that can be
// served.
func (s *source) encode() *sds.Trust {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.agent.Trust().Load()
	if s.trust == t {
		return s.encoded
	}
	s.trust = t
	if next, err := sds.NewTrust(t.Bundle, nil, t.Generation.Sequence()); err == nil {
		s.encoded = next
	} else {
		s.log.Error("trust bundle not served, keeping the last", "error", err)
	}
	return s.encoded
}

func streamProto(number uint64, r sds.Report) *apiv1.Stream {
	if !r.Open {
		return nil
	}
	return &apiv1.Stream{
		Id: number, Proxy: r.Proxy, Protocol: r.Protocol, Names: r.Names, WantsBundle: r.WantsBundle,
		AckedSerial: r.AckedSerial, AckedGeneration: r.AckedGeneration, AckedHash: r.AckedHash,
		PushedGeneration: r.PushedGeneration, Nack: r.Nack, Acks: r.Acks, Nacks: r.Nacks,
	}
}
