package ca

import (
	"context"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca/journal"
)

// agree returns the version of the protocol that an agent and this CA speak with each other, of those that the agent says it
// speaks: ProtocolSkew where there is none.
func (ca *CA) agree(newest, oldest uint32) (uint32, error) {
	peer := api.ProtocolsOf(newest, oldest)
	if v := ca.protocols.Common(peer); v != 0 {
		return v, nil
	}
	behind := "CA"
	if peer.Older(ca.protocols) {
		behind = "agent"
	}
	return 0, api.E(api.ProtocolSkew, "the agent speaks protocol %s, this CA speaks %s: the %s has to be upgraded", peer, ca.protocols, behind)
}

// show publishes the bundle, and with it the schema of the record, by which an installer tells what cannot read that record.
// It returns a channel that is closed when either may have changed.
func (ca *CA) show(ctx context.Context, b *Bundle) (raised <-chan struct{}, err error) {
	j, raised := ca.record.Get()
	if j.Schema == journal.Schema {
		raised = nil // this build writes no higher one
	}
	shown := *b
	shown.RecordSchema = j.Schema
	if err := ca.cfg.Publisher.Publish(ctx, &shown); err != nil {
		return raised, err
	}
	ca.noteShown(b, time.Now())
	return raised, nil
}
