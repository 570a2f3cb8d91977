//go:build linux

package main

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/upstream"
)

// decider decides about a rotation whose new root is published, on the evidence of so many agents, with nothing around it.
type decider struct {
	j    journal.Journal
	acks journal.Acks
	now  time.Time
}

// fleet is of so many agents with so many pods each, which have two streams each. Of Late nobody holds the new bundle.
type fleet struct {
	Agents, Pods int
	Late         bool
}

func (d *decider) do(ctx context.Context, what string, arg json.RawMessage) (any, error) {
	switch what {
	case "make":
		return with(arg, func(f fleet) (any, error) { return nil, d.make(ctx, f) })
	case "decide":
		return d.decide()
	default:
		return nil, errUnknown
	}
}

// make makes a record and the evidence.
func (d *decider) make(ctx context.Context, f fleet) error {
	td := spiffeid.RequireTrustDomainFromString(trustDomain)
	sealer, err := ca.NewSealer([]byte(rand.Text() + rand.Text())[:ca.SealKeyBytes])
	if err != nil {
		return err
	}
	up, err := upstream.Open(upstream.Config{Kind: "selfsigned"}, upstream.Parts{Sealer: sealer})
	if err != nil {
		return err
	}
	d.now = time.Now()
	old, err := up.(ca.Founder).Found(ctx, td, d.now)
	if err != nil {
		return err
	}
	if d.j, err = journal.New(td, old); err != nil {
		return err
	}
	before := d.held()
	next, err := up.(ca.Founder).Found(ctx, td, d.now)
	if err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(next.Certificate)
	if err != nil {
		return err
	}
	cross, err := up.(ca.CrossSigner).CrossSign(ctx, td, d.j.ActiveAuthority(), cert)
	if err != nil {
		return err
	}
	next.Cross, next.CrossBy = cross.Raw, old.ID
	d.j, err = journal.Start(d.j, journal.StartRequest{
		Request: journal.Request{ID: "bench", By: "bench", Why: "bench"}, Kind: journal.Planned, Authority: next,
	}, d.now)
	if err != nil {
		return err
	}
	step, _ := journal.Next(d.j, d.now, journal.Acks{})
	if d.j, err = journal.Apply(d.j, step, d.now); err != nil {
		return err
	}
	has := d.held()
	if f.Late {
		has = before
	}
	d.acks = fleetAcks(f, has, old.ID, d.now)
	return nil
}

// held is the record's bundle as whoever has it reports it.
func (d *decider) held() journal.Held {
	roots, err := d.j.Roots()
	if err != nil {
		return journal.Held{}
	}
	return journal.Held{Generation: d.j.Generation(), Hash: api.BundleHash(roots)}
}

// fleetAcks is what a fleet has said that holds a bundle, and SVIDs under a root.
func fleetAcks(f fleet, has journal.Held, root string, now time.Time) journal.Acks {
	acks := journal.Acks{Replicas: []journal.Replica{{Name: "bench", Reachable: true, Signs: root}}}
	for i := range f.Agents {
		a := journal.Agent{
			Cluster: issuerName, Node: nodeName(i), NodeUID: fmt.Sprintf("node-uid-%d", i), Connected: true, Seen: now, Until: now.Add(time.Hour),
			Held: has, Root: root,
		}
		for k := range f.Pods {
			a.Pods = append(a.Pods, journal.Pod{
				Namespace: "shop", Name: fmt.Sprintf("web-%d-%d", i, k), UID: fmt.Sprintf("pod-uid-%d-%d", i, k), Roots: []string{root},
				Streams: []journal.Stream{{}, {Bundle: true, Acked: has, Pushed: has, PushedAt: now}},
			})
		}
		acks.Agents = append(acks.Agents, a)
	}
	return acks
}

// decide decides once, and returns how long that took.
func (d *decider) decide() (time.Duration, error) {
	began := time.Now()
	step, found := journal.Next(d.j, d.now, d.acks)
	took := time.Since(began)
	if step.Is() == (len(found) > 0) {
		return 0, errors.New("what was decided is not what follows from the evidence")
	}
	return took, nil
}
