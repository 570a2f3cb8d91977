package ca

import (
	"context"

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
		_, err = ca.cfg.Store.Swap(ctx, revision, next)
		switch {
		case err == nil:
			ca.install(next)
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
