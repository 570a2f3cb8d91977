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

// show publishes the bundle, and with it the schema of the record, which it returns: by that an installer tells what cannot read that
// record.
func (ca *CA) show(ctx context.Context, b *Bundle) (schema int, err error) {
	shown := *b
	shown.RecordSchema = ca.record.Load().Schema
	if err := ca.cfg.Publisher.Publish(ctx, &shown); err != nil {
		return shown.RecordSchema, err
	}
	ca.noteShown(b, time.Now())
	return shown.RecordSchema, nil
}

// restShown waits until another bundle or another schema than what was shown is there, but no longer than wait.
func (ca *CA) restShown(ctx context.Context, changed <-chan struct{}, schema int, wait time.Duration) {
	over := time.After(wait)
	for {
		j, recorded := ca.record.Get()
		if j.Schema != schema {
			return
		}
		if schema == journal.Schema {
			recorded = nil // this build writes no higher one
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
			return
		case <-over:
			return
		case <-recorded: // and may be as it was in that
		}
	}
}
