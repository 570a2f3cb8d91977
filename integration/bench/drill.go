//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

const (
	drillAgents = 20
	drillPods   = 50 // of each
	drillTime   = 3 * time.Minute
)

// benchDrill is a root that is compromised: from the command until each of 1,000 pods on 20 nodes has its SVID under another
// root, and until the old root is in no stream's bundle any more, all acknowledged. Each pod has two streams, as an Envoy has.
func benchDrill(ctx context.Context, b *bench) error {
	f := b.figures
	f.declare("drill_1000_seconds", "from the command until the compromised root is in no bundle of 20 agents and 2,000 streams, all acknowledged", "s").below(10).anySpread()
	f.declare("drill_1000_published_seconds", "from the command until the new root is published", "s").anySpread()
	f.declare("drill_1000_active_seconds", "until the new root is active, and everything under the other is ordered to be replaced", "s").anySpread()
	f.declare("drill_1000_reissued_seconds", "until the last of 1,000 SVIDs is replaced and its stream has acknowledged", "s").anySpread()
	f.declare("drill_1000_removed_seconds", "until the CA has removed the compromised root", "s").anySpread()
	f.declare("drill_1000_ca_cpu_seconds", "the CA's processor time for it", "s")
	w, err := b.newDrillWorld(ctx, "drill", drillAgents, drillPods)
	if err != nil {
		return err
	}
	defer w.close()
	err = b.rounds(func() (bool, error) {
		d, err := w.drill(ctx, drillAgents*drillPods)
		if err != nil || d.foreign > b.noise {
			return false, err
		}
		f.add("drill_1000_seconds", d.over.Seconds())
		f.add("drill_1000_published_seconds", d.published.Seconds())
		f.add("drill_1000_active_seconds", d.active.Seconds())
		f.add("drill_1000_reissued_seconds", d.reissued.Seconds())
		f.add("drill_1000_removed_seconds", d.removed.Seconds())
		f.add("drill_1000_ca_cpu_seconds", d.cpu[w.ca.pid()].Seconds())
		return true, nil
	})
	b.settle(b.options.rounds)
	return errors.Join(err, ctx.Err())
}

// benchReplace is the same with all pods on one node: from when the CA signs under the new root, and orders that everything is
// replaced, to the last acknowledgement of a new SVID.
func benchReplace(ctx context.Context, b *bench) error {
	const pods = 1000 // of the 1,024 volumes that a node may have
	f := b.figures
	f.declare("replace_1000_seconds", "1,000 SVIDs of one agent replaced at the CA's order, until the last stream has acknowledged", "s").below(3).anySpread()
	f.declare("replace_1000_agent_cpu_seconds", "the agent's processor time for a drill with 1,000 pods", "s")
	f.declare("replace_1000_ca_cpu_seconds", "the CA's processor time for it", "s")
	w, err := b.newDrillWorld(ctx, "replace", 1, pods)
	if err != nil {
		return err
	}
	defer w.close()
	err = b.rounds(func() (bool, error) {
		d, err := w.drill(ctx, pods)
		if err != nil || d.foreign > b.noise {
			return false, err
		}
		f.add("replace_1000_seconds", (d.reissued - d.active).Seconds())
		f.add("replace_1000_agent_cpu_seconds", d.cpu[w.agents[0].pid()].Seconds())
		f.add("replace_1000_ca_cpu_seconds", d.cpu[w.ca.pid()].Seconds())
		return true, nil
	})
	b.settle(b.options.rounds)
	return errors.Join(err, ctx.Err())
}

// newDrillWorld is one with so many agents, each with so many pods that have two streams each. The CA has the server's
// processors to itself.
func (b *bench) newDrillWorld(ctx context.Context, name string, agents, each int) (*world, error) {
	w, err := b.newWorld(name, pods{Agents: agents + 1, Workloads: each, Kubelets: agents})
	if err != nil {
		return nil, err
	}
	if err = w.startCA(ctx); err == nil {
		err = w.startAgents(ctx, agents, b.client)
	}
	b.say("%s: %d pods on %d nodes open their streams", name, agents*each, agents)
	all := span{0, each}
	for i := 1; i <= agents && err == nil; i++ {
		if err = w.askOn(i, "publish", all); err == nil {
			err = w.askOn(i, "open", streams{Span: all, Count: each, Names: []string{"default"}})
		}
		if err == nil {
			err = w.askOn(i, "open", streams{Span: all, Count: each, Names: []string{"ROOTCA"}})
		}
	}
	if err == nil {
		w.people, err = dialUnix(filepath.Join(w.dir, "admin.sock"))
	}
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// drilled is how long after the command what was done, and what that took.
type drilled struct {
	published, active, reissued, removed, over time.Duration

	cpu     map[int]time.Duration
	foreign float64
}

// drill declares that the active root is compromised, and waits until it is gone everywhere.
func (w *world) drill(ctx context.Context, workloads uint32) (drilled, error) {
	admin := apiv1.NewAdminClient(w.people)
	old, err := activeRoot(ctx, admin)
	if err != nil {
		return drilled{}, err
	}
	if _, err := ask[struct{}](w.cluster, "watch", old.GetCertificate()); err != nil {
		return drilled{}, err
	}
	pids := []int{w.ca.pid(), w.cluster.pid()}
	for _, a := range w.agents {
		pids = append(pids, a.pid())
	}
	win, err := open(pids...)
	if err != nil {
		return drilled{}, err
	}
	began := time.Now()
	_, err = admin.EmergencyRotation(ctx, &apiv1.EmergencyRotationRequest{
		Operation: fmt.Sprintf("drill-%d", began.UnixNano()), Compromised: old.GetId(), Reason: "drill", Losing: workloads,
	})
	if err != nil {
		return drilled{}, api.FromStatus(err)
	}
	last, err := ask[ridOf](w.cluster, "withdrawn", drillTime.Seconds())
	if err != nil {
		return drilled{}, errors.Join(err, whyNot(ctx, admin))
	}
	t, err := win.close()
	if err != nil {
		return drilled{}, err
	}
	roots, err := admin.ListAuthorities(ctx, &apiv1.ListAuthoritiesRequest{})
	if err != nil {
		return drilled{}, api.FromStatus(err)
	}
	i := slices.IndexFunc(roots.GetAuthorities(), signs)
	k := slices.IndexFunc(roots.GetGone(), func(g *apiv1.GoneAuthority) bool { return g.GetId() == old.GetId() })
	if i < 0 || k < 0 {
		return drilled{}, errors.New("the compromised root is not gone, or none is active")
	}
	after := func(t *timestamppb.Timestamp) time.Duration { return t.AsTime().Sub(began) }
	d := drilled{cpu: t.cpu, foreign: t.foreign, reissued: last.SVIDs.Sub(began), removed: after(roots.GetGone()[k].GetAt())}
	d.published, d.active = after(roots.GetAuthorities()[i].GetPublishedAt()), after(roots.GetAuthorities()[i].GetActiveAt())
	d.over = max(d.reissued, last.Bundles.Sub(began))
	return d, nil
}

// signs reports whether an authority is the root under which the CA signs.
func signs(a *apiv1.AuthorityInfo) bool { return a.GetKind() == "root" && a.GetState() == "active" }

// activeRoot returns the root under which the CA signs.
func activeRoot(ctx context.Context, admin apiv1.AdminClient) (*apiv1.AuthorityInfo, error) {
	roots, err := admin.ListAuthorities(ctx, &apiv1.ListAuthoritiesRequest{})
	if err != nil {
		return nil, api.FromStatus(err)
	}
	if i := slices.IndexFunc(roots.GetAuthorities(), signs); i >= 0 {
		return roots.GetAuthorities()[i], nil
	}
	return nil, errors.New("no root is active")
}

// whyNot says whom a rotation waits for.
func whyNot(ctx context.Context, admin apiv1.AdminClient) error {
	s, err := admin.RotationStatus(ctx, &apiv1.RotationStatusRequest{})
	if err != nil {
		return api.FromStatus(err)
	}
	var text strings.Builder
	for _, g := range s.GetRotation().GetGates() {
		fmt.Fprintf(&text, "%s waits for %d; ", g.GetDo(), g.GetBlocking())
		for _, x := range g.GetBlockers()[:min(3, len(g.GetBlockers()))] {
			fmt.Fprintf(&text, "%s %s; ", x.GetName(), x.GetWhy())
		}
	}
	return fmt.Errorf("the rotation: %s%s", &text, s.GetRotation().GetTrouble())
}

// root is one that secrets are to be rid of.
type root struct {
	id  []byte // its subject key id
	pem []byte
}

// in reports whether a secret, an encoded Secret of Envoy's, holds the root, or an SVID under it.
func (r *root) in(secret []byte) (bool, error) {
	if bytes.Contains(secret, r.pem) { // wherever a validator has it
		return true, nil
	}
	var s tlsv3.Secret
	if err := proto.Unmarshal(secret, &s); err != nil {
		return false, err
	}
	rest := s.GetTlsCertificate().GetCertificateChain().GetInlineBytes()
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return false, nil
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil || bytes.Equal(c.AuthorityKeyId, r.id) {
			return true, err
		}
	}
}

// watch has each stream tell from now on whether its secret is rid of a root.
func (c *cluster) watch(der []byte) error {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	gone := &root{cert.SubjectKeyId, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
	for _, k := range c.kubelets() {
		for _, p := range k.proxies {
			p.mu.Lock()
			p.gone, p.rid = gone, false
			p.mu.Unlock()
		}
	}
	return nil
}

// ridOf says when the last stream acknowledged a secret that was rid of the root.
type ridOf struct{ SVIDs, Bundles time.Time }

// withdrawn waits until each stream's secret is.
func (c *cluster) withdrawn(ctx context.Context, seconds float64) (last ridOf, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Duration(seconds*float64(time.Second)), errors.New("not all streams were rid of the root in time"))
	defer cancel()
	for _, k := range c.kubelets() {
		for _, p := range k.proxies {
			at, err := p.until(ctx, func() bool { return p.rid })
			if err != nil {
				return last, err
			}
			of := &last.SVIDs
			if p.name == "ROOTCA" {
				of = &last.Bundles
			}
			if of.Before(at) {
				*of = at
			}
		}
	}
	return last, nil
}
