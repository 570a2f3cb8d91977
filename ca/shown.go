package ca

import (
	"context"
	"time"

	"github.com/signet-ca/signet/ca/journal"
)

// Where the bundle is shown to those who read it by themselves. A Publisher of several places tells of each; of one that does not, that
// it published is the evidence.

// copiesPause is between two looks at a rotation because of what a publisher tells: a thousand copies are written within 40 s.
const copiesPause = 250 * time.Millisecond

// copies returns what each place shows, and a channel that is closed once that may have changed; nil where the Publisher tells nothing.
func (ca *CA) copies() ([]journal.Copy, <-chan struct{}) {
	if p, ok := ca.cfg.Publisher.(CopyTeller); ok {
		all, changed := p.Copies()
		for i := range all {
			all[i].Name = word(all[i].Name, 2*maxNameTold)
		}
		return all, changed
	}
	if ca.cfg.Publisher == nil {
		return nil, nil
	}
	shown := ca.shown.Load()
	shown.Kind, shown.Name = "bundle", "published"
	return []journal.Copy{shown}, nil
}

// followCopies has a rotation looked at again where a place shows something else than before.
func (ca *CA) followCopies(ctx context.Context) error {
	for {
		_, changed := ca.copies()
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			ca.evidence.Set(struct{}{})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(copiesPause):
		}
	}
}

// noteShown keeps that the bundle is published, and since when.
func (ca *CA) noteShown(b *Bundle, now time.Time) {
	is := journal.Held{Generation: b.Generation, Hash: b.Hash}
	if ca.shown.Load().Held != is {
		ca.shown.Set(journal.Copy{Held: is, At: now})
		ca.evidence.Set(struct{}{})
	}
}
