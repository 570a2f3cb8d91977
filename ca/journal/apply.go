package journal

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"math"
	"slices"
	"time"

	"github.com/signet-ca/signet/api"
)

// Apply returns the record after a step that Next or Force returned for it. A step that has happened already changes nothing
// and is no error. StateConflict where the record is no longer the one that the step was decided on, RotationOver where its
// operation is not under way, ClockJumped where the clock is behind the record's last change.
func Apply(j Journal, s Step, now time.Time) (Journal, error) {
	now = stamp(now)
	if j.happened(s) {
		return j, nil
	}
	if j.Operation == nil || j.Operation.ID != s.Operation {
		return Journal{}, api.E(api.RotationOver, "operation %.64q is not under way", s.Operation)
	}
	allowed := slices.ContainsFunc(j.candidates(), func(c Step) bool { return c.Do == s.Do && c.Authority == s.Authority })
	if !allowed || s.Generation != j.Generation() {
		return Journal{}, api.E(api.StateConflict, "the record has changed since it was decided to %s authority %.64q", s.Do, s.Authority)
	}
	back := now.Add(clockSlack).Before(j.Changed)
	if back && len(s.Forced) == 0 && j.Operation.Kind != Emergency {
		return Journal{}, api.E(api.ClockJumped, "the record was changed at %s, which is yet to come by this clock", j.Changed.Format(time.RFC3339))
	}
	next := j.begin(now)
	if back {
		next.Changed = now // somebody has seen to the clock
	}
	i := next.find(s.Authority)
	switch s.Do {
	case Publish:
		next.Authorities[i].enter(Published, now)
	case Activate:
		next.activate(i, now)
	case Remove:
		next.bury(i, next.Authorities[i].State == Tainted, now)
	}
	if len(s.Forced) > 0 {
		next.Operation.Forced = append(next.Operation.Forced, Override{Do: s.Do, By: s.By, At: now, Count: len(s.Forced)})
		next.Operation.Forced = next.Operation.Forced[max(0, len(next.Operation.Forced)-maxForced):]
	}
	return j.finish(next, now)
}

// happened reports whether a step was taken: a state that comes later says so too.
func (j Journal) happened(s Step) bool {
	o := j.Operation
	under := o != nil && o.ID == s.Operation
	ended := slices.IndexFunc(j.Past, func(p Past) bool { return p.ID == s.Operation })
	if !under && ended < 0 {
		return false
	}
	i, gone := j.find(s.Authority), j.findGone(s.Authority) >= 0
	if s.Do == Remove {
		return gone
	}
	if under {
		if i < 0 || s.Authority != o.Authority {
			return false
		}
		state := j.Authorities[i].State
		return state == Active || state == Retiring || s.Do == Publish && state == Published
	}
	p := j.Past[ended]
	return p.Authority == s.Authority && (p.Outcome == Done || p.Outcome == RolledBack)
}

// activate makes the authority the active one. The one before it signs nothing from now on.
func (j *Journal) activate(i int, now time.Time) {
	for k := range j.Authorities {
		if j.Authorities[k].State != Active {
			continue
		}
		if o := j.Operation; o != nil && slices.Contains(o.Compromised, j.Authorities[k].ID) {
			j.Authorities[k].enter(Tainted, now)
		} else {
			j.Authorities[k].enter(Retiring, now)
		}
	}
	j.Authorities[i].enter(Active, now)
}

func (a *Authority) enter(s State, now time.Time) {
	a.State = s
	switch s {
	case Prepared:
		a.Times.Prepared = now
	case Published:
		a.Times.Published = now
	case Active:
		a.Times.Active = now
	case Retiring:
		a.Times.Retiring = now
	case Tainted:
		a.Times.Tainted = now
	}
}

// bury takes an authority out of the record, its key with it, and keeps what it is known again by.
func (j *Journal) bury(i int, tainted bool, now time.Time) {
	g := Gone{ID: j.Authorities[i].ID, At: now, Tainted: tainted}
	g.Hash, g.Key, g.NotAfter = fingerprints(j.Authorities[i].Certificate)
	j.Authorities = slices.Delete(j.Authorities, i, i+1)
	j.Gone = append(j.Gone, g)
	j.trimGone(now)
}

// trimGone bounds what is kept of those that are gone. One that went in peace may be forgotten: no SVID under it is left, and
// should it come back it passes through every gate anew. One that was compromised is kept for as long as there is room, and one
// that has expired goes first.
func (j *Journal) trimGone(now time.Time) {
	for _, tainted := range []bool{false, true} {
		of := func(g Gone) bool { return g.Tainted == tainted }
		n := 0
		for _, g := range j.Gone {
			if of(g) {
				n++
			}
		}
		for ; n > MaxGone; n-- {
			i := slices.IndexFunc(j.Gone, func(g Gone) bool { return of(g) && !now.Before(g.NotAfter) })
			if i < 0 {
				i = slices.IndexFunc(j.Gone, of)
			}
			j.Gone = slices.Delete(j.Gone, i, i+1)
		}
	}
}

// fingerprints returns the hashes of a certificate and of its key, as Gone has them, and when it expires.
func fingerprints(der []byte) (hash, key string, notAfter time.Time) {
	sum := sha256.Sum256(der)
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return hex.EncodeToString(sum[:]), "", time.Time{}
	}
	spki := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:]), hex.EncodeToString(spki[:]), c.NotAfter
}

// begin returns a copy of the record to be changed by a rotation: of this build's schema, without what has outlived itself.
func (j Journal) begin(now time.Time) Journal {
	j.Schema = Schema
	j.Authorities, j.Gone, j.Past = slices.Clone(j.Authorities), slices.Clone(j.Gone), slices.Clone(j.Past)
	j.Operation = j.Operation.clone()
	j.Excuses = slices.DeleteFunc(slices.Clone(j.Excuses), func(e Excuse) bool { return !now.Before(e.Until) })
	for i := 0; i < len(j.Authorities); {
		if j.Authorities[i].State == Removed { // as records before schema 3 kept them
			j.bury(i, false, now)
			continue
		}
		i++
	}
	return j
}

// finish returns the changed record: an operation of which nothing is left to do has ended, and a bundle of other roots than
// before has a generation of its own, here and nowhere else.
func (j Journal) finish(next Journal, now time.Time) (Journal, error) {
	if next.Operation != nil && len(next.candidates()) == 0 {
		how, by := Done, Word{}
		if back := next.Operation.Back; back != nil {
			how, by = RolledBack, *back
		}
		next.end(how, by, now)
	}
	before, err := j.held()
	if err != nil {
		return Journal{}, err
	}
	after, err := next.held()
	if err != nil {
		return Journal{}, err
	}
	if before.Hash != after.Hash {
		if next.Number == math.MaxUint32 {
			return Journal{}, api.E(api.StateFull, "there is no generation after %s", next.Generation())
		}
		next.Number++
		for i, a := range next.Authorities {
			if k := j.find(a.ID); a.State.Trusted() && (k < 0 || !j.Authorities[k].State.Trusted()) {
				next.Authorities[i].Since = next.Generation().Sequence()
			}
		}
	}
	if now.After(next.Changed) {
		next.Changed = now
	}
	// As they are read back.
	next.Gone, next.Past, next.Excuses = nilIfEmpty(next.Gone), nilIfEmpty(next.Past), nilIfEmpty(next.Excuses)
	if err := next.Validate(); err != nil {
		return Journal{}, err
	}
	return next, nil
}

// end ends the operation under way, on somebody's word where it is not done.
func (j *Journal) end(how Outcome, by Word, now time.Time) {
	p := j.Operation.past(how, now)
	p.EndedBy = by
	j.Past = append(j.Past, p)
	j.Past = j.Past[max(0, len(j.Past)-MaxPast):]
	j.Operation = nil
}

func nilIfEmpty[T any](s []T) []T {
	if len(s) == 0 {
		return nil
	}
	return s
}

// stamp is a time as it is read back from the record.
func stamp(t time.Time) time.Time { return t.UTC().Round(0) }
