package journal

import (
	"math"
	"slices"
	"time"

	"github.com/signet-ca/signet/api"
)

// Restored returns the record of a backup as it goes on now: its generation is above its own, above each of seen, which are those
// that anybody is known to have shown since, and above what the restore of an hour ago came to. Nobody who ever held a bundle of
// this trust domain takes the restored one for an old one. What nobody believes of those who are shown it does not count: it is of
// somebody who wants the last number there is to be used up.
//
// What happened since the backup is not known, so nothing is taken for proven: every trusted root counts as new to everybody, and
// every wait that a step counts from the past begins anew. An operation goes on where it was, through the same gates: ended here,
// it could take a root out of the bundle that has become the active one meanwhile. No state is changed, so that no root that was
// compromised or is gone comes back. Who restores it adds a replica that cannot be asked and may have signed under each trusted
// root: what was signed since is not known either. StateFull where there is no later epoch.
func Restored(j Journal, seen []api.Generation, now time.Time) (Journal, error) {
	if err := j.Validate(); err != nil {
		return Journal{}, err
	}
	now = stamp(now)
	highest := j.Epoch
	for _, g := range seen {
		if g.Believable(now) {
			highest = max(highest, g.Epoch)
		}
	}
	if highest == math.MaxUint32 {
		return Journal{}, api.E(api.StateFull, "there is no epoch after %d", highest)
	}
	next := j.begin(now)
	// By the clock, so that two restores of one backup of which the second knows nothing of the first do not come to the same generation.
	next.Epoch = max(highest+1, api.EpochAt(now))
	for i, a := range next.Authorities {
		if !a.State.Trusted() {
			continue
		}
		next.Authorities[i].Since = next.Generation().Sequence()
		next.Authorities[i].Times.Published = now
		switch a.State {
		case Retiring:
			next.Authorities[i].Times.Retiring = now
		case Tainted:
			next.Authorities[i].Times.Tainted = now
		}
	}
	if o := next.Operation; o != nil && !o.Latest.IsZero() {
		if least := now.Add(o.Straggler); o.Latest.Before(least) { // time to come back, for those who are to be waited for
			o.Latest = least
		}
	}
	if now.After(next.Changed) {
		next.Changed = now
	}
	next.Gone, next.Past, next.Excuses = nilIfEmpty(next.Gone), nilIfEmpty(next.Past), nilIfEmpty(next.Excuses)
	return next, next.Validate()
}

// Compromised returns the ids of those roots that j trusts, or is about to, and of which known says that they were compromised.
// A backup with such a root is not to be restored: whoever has its key would be believed again.
func (j Journal) Compromised(known Journal) []string {
	var ids []string
	for _, a := range j.Authorities {
		if a.State == Tainted || a.State == Removed || j.Operation != nil && slices.Contains(j.Operation.Compromised, a.ID) {
			continue // j knows, or trusts it no more
		}
		_, key, _ := fingerprints(a.Certificate)
		tainted := slices.ContainsFunc(known.Authorities, func(k Authority) bool {
			_, other, _ := fingerprints(k.Certificate)
			return (k.ID == a.ID || other == key) && (k.State == Tainted || known.Operation != nil && slices.Contains(known.Operation.Compromised, k.ID))
		}) || slices.ContainsFunc(known.Gone, func(g Gone) bool { return g.Tainted && (g.ID == a.ID || g.Key == key) })
		if tainted {
			ids = append(ids, a.ID)
		}
	}
	return ids
}
