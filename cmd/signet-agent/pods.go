package main

import (
	"context"
	"log/slog"
	"net"
	"sync"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/agent/csi"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
)

// podVolume is the place that tokens serve which kubelet delivers: one for all volumes of a pod, for which kubelet brings the
// same token.
const podVolume = "csi"

// pods is a csi.Identities over an agent: kubelet says whose a volume is, and the agent compares its token with that.
type pods struct {
	src     *source
	node    string // name of the own one
	metrics *podMetrics
	log     *slog.Logger
}

func newPods(src *source, node string, log *slog.Logger) *pods {
	return &pods{src: src, node: node, metrics: newPodMetrics(), log: log}
}

// Offer implements csi.Identities.
func (p *pods) Offer(ctx context.Context, v csi.Volume, token []byte) (csi.Workload, error) {
	return p.take(ctx, v, token, p.src.agent.Offer)
}

// Restore implements csi.Identities.
func (p *pods) Restore(ctx context.Context, v csi.Volume, token []byte) (csi.Workload, error) {
	return p.take(ctx, v, token, p.src.agent.Resume)
}

type offer = func(context.Context, attestor.Evidence, agent.Owner, string) (*agent.Identity, error)

func (p *pods) take(ctx context.Context, v csi.Volume, token []byte, to offer) (csi.Workload, error) {
	s := &podSocket{pods: p, owner: agent.Owner{
		Pod:            agent.Pod{Namespace: v.Pod.Namespace, Name: v.Pod.Name, UID: v.Pod.UID},
		ServiceAccount: v.Pod.ServiceAccount, Node: p.node,
	}}
	var err error
	if s.identity, err = to(ctx, evidence(token), s.owner, podVolume); err != nil {
		return nil, err
	}
	return s, nil
}

func evidence(token []byte) attestor.Evidence {
	return attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: token}
}

// podSocket is a csi.Workload: the pod behind one volume's socket.
type podSocket struct {
	pods  *pods
	owner agent.Owner

	mu       sync.Mutex // guards what follows
	identity *agent.Identity
	end      context.CancelFunc // ends Serve; nil before the first
}

// Offer implements csi.Workload. Where the pod's ServiceAccount was made anew, the token is of another identity: then the
// socket's streams end, and come back to that one.
func (s *podSocket) Offer(ctx context.Context, token []byte) error {
	id, err := s.pods.src.agent.Offer(ctx, evidence(token), s.owner, podVolume)
	if err != nil {
		return err
	}
	s.mu.Lock()
	old := s.identity
	s.identity = id
	if id != old && s.end != nil {
		s.end()
	}
	s.mu.Unlock()
	old.Release() // id was offered once more
	return nil
}

// Serve implements csi.Workload.
func (s *podSocket) Serve(ctx context.Context, l net.Listener) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	s.mu.Lock()
	id := s.identity
	s.end = end
	s.mu.Unlock()
	return newDoor(s.pods, id).serve(ctx, l)
}

// Close implements csi.Workload.
func (s *podSocket) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.identity.Release()
}
