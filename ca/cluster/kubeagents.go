package cluster

import (
	"context"
	"errors"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/kube"
)

// Whoever may make pods in the agents' namespace can have one run under their ServiceAccount, on a node of his choice. So an
// agent is a pod of the DaemonSet, by its UID: one that was deleted and made anew has another. It is read when an agent shows
// its token, and for a moment after; a watch of one object that changes once a year would be one more to be cut.

// agentSet is what is known of the agents' DaemonSet.
type agentSet struct {
	turn chan struct{} // of capacity 1: who holds it reads, or looks at what was read
	uid  string        // empty: there is none
	read time.Time     // zero: never
}

// agentsRefused is for how long a DaemonSet that was read is good enough to refuse a pod.
const agentsRefused = time.Second

// CheckAgent implements ca.AgentFinder.
func (d *KubeDirectory) CheckAgent(ctx context.Context, p ca.Pod) error {
	if d.cfg.Agents == (DaemonSet{}) {
		return nil
	}
	if p.Namespace != d.cfg.Agents.Namespace || p.DaemonSet == "" {
		return errNoAgent()
	}
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Stale)
	defer cancel()
	a := &d.agents
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return unavailable(ctx.Err())
	}
	old := age(time.Now(), a.read)
	if a.read.IsZero() || old > d.cfg.Stale || p.DaemonSet != a.uid && old > agentsRefused {
		began := time.Now()
		o, err := d.live(ctx, kube.DaemonSets, d.cfg.Agents.Namespace, d.cfg.Agents.Name)
		if err != nil && !errors.Is(err, kube.ErrNotFound) {
			return unavailable(err)
		}
		a.uid, a.read = o.UID, began
	}
	if p.DaemonSet != a.uid {
		return errNoAgent()
	}
	return nil
}

func errNoAgent() error {
	return api.E(api.NotAnAgent, "the token belongs to a pod that the agents' DaemonSet does not control")
}

// CheckAgent implements ca.AgentFinder.
func (c Clusters) CheckAgent(ctx context.Context, p ca.Pod) error {
	if d := c[p.Issuer]; d != nil {
		return d.CheckAgent(ctx, p)
	}
	return errUnknown()
}
