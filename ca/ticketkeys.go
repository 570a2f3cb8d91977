package ca

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

// The life of a key of tickets: replaced at a long interval, and kept while a ticket under it can live, with an hour for
// replicas that have not heard of its successor.
const (
	ticketKeyLife  = 30 * 24 * time.Hour
	ticketKeyAfter = issuance.MaxTTL + time.Hour
	ticketKeyRetry = time.Minute
	ticketKeySize  = 32
)

// sealTicketContext keeps a sealed key of tickets from being taken for one of anything else.
func sealTicketContext(trustDomain, id string) string { return trustDomain + "/ticket-key/" + id }

// withTicketKey returns the record with a new first key, and without those whose tickets have all expired.
func withTicketKey(j journal.Journal, s *Sealer, now time.Time) (journal.Journal, error) {
	kept := len(j.TicketKeys)
	for i := 1; i < len(j.TicketKeys); i++ {
		if now.Sub(j.TicketKeys[i-1].At) > ticketKeyAfter { // since then there were none under i
			kept = i
			break
		}
	}
	j.TicketKeys = j.TicketKeys[:kept:kept]
	random := make([]byte, ticketKeyID+ticketKeySize)
	rand.Read(random)
	id := hex.EncodeToString(random[:ticketKeyID])
	sealed := s.Seal(random[ticketKeyID:], sealTicketContext(j.TrustDomain, id))
	return j.WithTicketKey(journal.TicketKey{ID: id, At: now.UTC().Truncate(time.Second), Sealed: sealed})
}

// ticketKeyDue reports whether a record needs a new key.
func ticketKeyDue(j journal.Journal, now time.Time) bool {
	return len(j.TicketKeys) == 0 || now.Sub(j.TicketKeys[0].At) >= ticketKeyLife
}

// openTicketKeys opens the keys of a record; SealKeyWrong where the seal key is another one.
func openTicketKeys(j journal.Journal, s *Sealer) (ticketKeys, error) {
	var keys ticketKeys
	for _, k := range j.TicketKeys {
		opened, err := s.Open(k.Sealed, sealTicketContext(j.TrustDomain, k.ID))
		if err != nil {
			return nil, err
		}
		id, err := hex.DecodeString(k.ID)
		if err != nil || len(id) != ticketKeyID || len(opened) != ticketKeySize {
			return nil, api.E(api.StateCorrupt, "a key of renewal tickets is malformed")
		}
		keys = append(keys, ticketKey{[ticketKeyID]byte(id), k.At, opened})
	}
	return keys, nil
}

// refreshTicketKeys adds a key where one is due, and installs those of the record.
func (ca *CA) refreshTicketKeys(ctx context.Context, now time.Time) error {
	j := ca.record.Load()
	var failed error
	if ticketKeyDue(j, now) {
		next, err := ca.changeRecord(ctx, func(j journal.Journal) (journal.Journal, error) {
			if !ticketKeyDue(j, now) { // another replica was first
				return j, nil
			}
			return withTicketKey(j, ca.cfg.Sealer, now)
		})
		if failed = err; err == nil {
			j = next
		}
	}
	keys, err := openTicketKeys(j, ca.cfg.Sealer)
	if err != nil {
		return err
	}
	ca.tickets.Store(&keys)
	return failed
}

// startTicketKeys is refreshTicketKeys before anything is issued. It fails only where waiting does not help.
func (ca *CA) startTicketKeys(ctx context.Context) error {
	if ca.cfg.Sealer == nil {
		return nil
	}
	err := ca.refreshTicketKeys(ctx, time.Now())
	if fatalTicketKeys(err) {
		return err
	}
	if err != nil {
		ca.log.ErrorContext(ctx, "no new key of renewal tickets", "error", err)
	}
	return nil
}

// fatalTicketKeys reports whether the process must end: what is stored is unknown, or the seal key is not that of the record.
func fatalTicketKeys(err error) bool {
	switch api.ReasonOf(err) {
	case api.StateUnknown, api.SealKeyWrong, api.StateCorrupt:
		return err != nil
	}
	return false
}

// keepTicketKeys follows the record, and replaces the key when it is due. A failure costs nothing while there is an older one.
func (ca *CA) keepTicketKeys(ctx context.Context) error {
	if ca.cfg.Sealer == nil {
		return nil
	}
	for {
		j, changed := ca.record.Get()
		err := ca.refreshTicketKeys(ctx, time.Now())
		wait := ticketKeyRetry
		switch {
		case ctx.Err() != nil:
			return nil
		case fatalTicketKeys(err):
			return err
		case err != nil:
			ca.log.ErrorContext(ctx, "no new key of renewal tickets", "error", err, "retry_in", wait.String())
		case len(j.TicketKeys) > 0: // a clock that was set is a matter of an hour
			wait = min(time.Hour, max(ticketKeyRetry, time.Until(j.TicketKeys[0].At.Add(ticketKeyLife))))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-time.After(wait):
		}
	}
}
