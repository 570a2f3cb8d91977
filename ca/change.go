package ca

import (
	"context"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca/journal"
)

// changeTries is how often a change of the record is made anew because somebody else was first.
const changeTries = 8

// changeRecord changes the shared record by compare-and-swap and installs what was stored; change is called with the
// record as it is stored, again where another writer was first, and one that returns its argument's equal is written all
// the same. After an error of reason StateUnknown the process ends: what is stored is known only once it is read anew.
func (ca *CA) changeRecord(ctx context.Context, change func(journal.Journal) (journal.Journal, error)) (journal.Journal, error) {
	ca.changing.Lock() // so that of two changes here the later one is installed last
	defer ca.changing.Unlock()
	for try := 1; ; try++ {
		j, revision, err := ca.cfg.Store.Load(ctx)
		if err != nil {
			return journal.Journal{}, err
		}
		next, err := change(j)
		if err != nil {
			return journal.Journal{}, err
		}
		bundle, err := ca.bundleOf(next) // others may have changed it as well
		if err != nil {
			return journal.Journal{}, err
		}
		revision, err = ca.cfg.Store.Swap(ctx, revision, next)
		switch {
		case err == nil:
			ca.install(next, bundle, revision)
			return next, nil
		case api.ReasonOf(err) == api.StateUnknown:
			select {
			case ca.broken <- err:
			default: // the process is ending already
			}
			return journal.Journal{}, err
		case api.ReasonOf(err) != api.StateConflict || try == changeTries:
			return journal.Journal{}, err
		}
	}
}

// How soon after a failure the record of others is asked for again: at first, and at most.
const (
	followRetry    = time.Second
	followMaxRetry = 30 * time.Second
)

// followRecord installs what other replicas have stored, so that a ban ends sessions here that was decided elsewhere. A
// record that cannot be read is no reason to end: what was read last is decided by, and it is tried again.
func (ca *CA) followRecord(ctx context.Context) error {
	shared, ok := ca.cfg.Store.(SharedStore)
	if !ok {
		return nil
	}
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval, retry.Multiplier, retry.RandomizationFactor = followRetry, followMaxRetry, 2, 0
	for {
		err := shared.Await(ctx, ca.installed())
		if err == nil {
			err = ca.reload(ctx)
		}
		if err == nil {
			retry.Reset()
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		wait := retry.NextBackOff()
		ca.log.ErrorContext(ctx, "the record of other replicas cannot be read; what was read last is decided by", "error", err, "again_in", wait.String())
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// installed is the revision of the record by which is decided.
func (ca *CA) installed() Revision {
	ca.changing.Lock()
	defer ca.changing.Unlock()
	return ca.revision
}
