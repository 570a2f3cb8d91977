package journal

import (
	"bytes"
	"crypto/x509"
	"slices"
	"time"

	"github.com/signet-ca/signet/api"
)

// minRootLeft is what a new root must at least have left of its life.
const minRootLeft = time.Hour

// Request says which operation somebody means, and who he is.
type Request struct {
	ID  string // 1 to 64 of a-z, 0-9 and -; of a new operation one that was never used
	By  string // as the CA knows him
	Why string
}

// StartRequest begins a rotation.
type StartRequest struct {
	Request
	Kind      Kind      // Planned or Switch
	Automatic bool      // because Due says so
	Authority Authority // the new root; its state does not matter
	Limits    Limits
}

// TaintRequest says that a root is compromised.
type TaintRequest struct {
	Request
	Compromised string // id
	// Authority is the root that takes its place; nothing where one that the record has already is to: one that retires, or that
	// was about to follow.
	Authority Authority
	Limits    Limits
}

// Start returns the record with a new operation whose root is prepared. A repetition changes nothing. RotationUnderWay where
// there is another operation, AuthorityRefused where the root cannot be taken, RotationInvalid where the request makes no sense.
// That the root before it has expired, or that its key cannot be asked any more, is no reason not to start.
func Start(j Journal, r StartRequest, now time.Time) (Journal, error) {
	now = stamp(now)
	limits := r.Limits.withDefaults(r.Kind)
	if !r.good() || r.Kind != Planned && r.Kind != Switch || !limits.good() {
		return Journal{}, api.E(api.RotationInvalid, "operation %.64q needs an id, a kind, who begins it, and limits from %s to %s", r.ID, minLimit, maxLimit)
	}
	if kind, ok := j.knows(r.ID); ok {
		if kind == Emergency {
			return Journal{}, another(r.ID)
		}
		return j, nil
	}
	if o := j.Operation; o != nil {
		return Journal{}, underWay(o)
	}
	if r.Automatic && now.Add(clockSlack).Before(j.Changed) {
		return Journal{}, api.E(api.ClockJumped, "the record was changed at %s, which is yet to come by this clock", j.Changed.Format(time.RFC3339))
	}
	next := j.begin(now)
	for i := 0; i < len(next.Authorities); { // what no operation is about any more signs nothing, and never did
		if s := next.Authorities[i].State; s == Prepared || s == Published {
			next.bury(i, false, now)
			continue
		}
		i++
	}
	active := next.ActiveAuthority()
	if err := next.admit(&r.Authority, active.ID, now); err != nil {
		return Journal{}, err
	}
	next.Authorities = append(next.Authorities, r.Authority)
	next.Operation = &Operation{ID: r.ID, Kind: r.Kind, By: r.By, Why: r.Why, Automatic: r.Automatic, Begun: now,
		Authority: r.Authority.ID, Replaces: active.ID, Limits: limits}
	if r.Automatic {
		next.Operation.Latest = scheduleOf(active).Latest
	}
	next.Changed = now
	return j.finish(next, now)
}

// Abort returns the record without the operation, and without its root, under which nothing was ever signed. A repetition
// changes nothing. RotationOver where it is not under way, RotationTooLate once its root is active: then there is Rollback.
func Abort(j Journal, r Request, now time.Time) (Journal, error) {
	now = stamp(now)
	if !r.good() {
		return Journal{}, api.E(api.RotationInvalid, "whoever aborts operation %.64q has a name", r.ID)
	}
	if done, err := j.reached(r.ID, Aborted); done || err != nil {
		return j, err
	}
	next := j.begin(now)
	i := next.find(next.Operation.Authority)
	if s := next.Authorities[i].State; s != Prepared && s != Published {
		return Journal{}, api.E(api.RotationTooLate, "authority %s is %s; it can only be rolled back", next.Operation.Authority, s)
	}
	if slices.ContainsFunc(next.Authorities, func(a Authority) bool { return a.State == Tainted }) {
		return Journal{}, api.E(api.RotationTooLate, "a root is tainted already, and only a successor can end that")
	}
	next.bury(i, false, now)
	next.Changed = now
	if slices.ContainsFunc(next.Authorities, func(a Authority) bool { return a.State == Retiring }) {
		return Journal{}, api.E(api.RotationTooLate, "another root is still retiring, and this operation ends that")
	}
	next.end(Aborted, Word{By: r.By, Why: r.Why, At: now}, now)
	return j.finish(next, now)
}

// Rollback returns the record with the root that was active before active again, which everybody still trusts. The new one
// signs nothing any more and goes once nothing under it is left. A repetition changes nothing. RotationOver where it is not
// under way, RotationTooLate where its root is not active yet, the old one is gone or has expired, or it is an emergency.
func Rollback(j Journal, r Request, now time.Time) (Journal, error) {
	now = stamp(now)
	if !r.good() {
		return Journal{}, api.E(api.RotationInvalid, "whoever rolls operation %.64q back has a name", r.ID)
	}
	if done, err := j.reached(r.ID, RolledBack); done || err != nil {
		return j, err
	}
	if j.Operation.Back != nil {
		return j, nil
	}
	next := j.begin(now)
	o := next.Operation
	i, old := next.find(o.Authority), next.find(o.Replaces)
	switch {
	case o.Kind == Emergency:
		return Journal{}, api.E(api.RotationTooLate, "an emergency cannot be rolled back: the old root is compromised")
	case next.Authorities[i].State != Active:
		return Journal{}, api.E(api.RotationTooLate, "authority %s is %s; the operation can be aborted", o.Authority, next.Authorities[i].State)
	case old < 0 || next.Authorities[old].State != Retiring:
		return Journal{}, api.E(api.RotationTooLate, "authority %s is gone", o.Replaces)
	case expired(next.Authorities[old], now.Add(minRootLeft)):
		return Journal{}, api.E(api.RotationTooLate, "authority %s expires within %s", o.Replaces, minRootLeft)
	}
	next.activate(old, now)
	o.Back = &Word{By: r.By, Why: r.Why, At: now}
	next.Changed = now
	return j.finish(next, now)
}

// Taint returns the record with an emergency about a compromised root: nothing is ever cross-signed by it, whatever is under it
// is reissued, and it goes. It takes the place of an operation that is under way. Where the root is the active one it needs a
// successor: the one in the request, or the one that retires, or that was to follow (SuccessorNeeded). One that nobody trusts any
// more is only remembered as compromised. A repetition changes nothing. NotFound where there is no such root, RotationUnderWay
// where an emergency about it is under way, AuthorityRefused where the successor cannot be taken.
func Taint(j Journal, r TaintRequest, now time.Time) (Journal, error) {
	now = stamp(now)
	limits := r.Limits.withDefaults(Emergency)
	if !r.good() || !limits.good() {
		return Journal{}, api.E(api.RotationInvalid, "emergency %.64q needs an id, who declares it, and limits from %s to %s", r.ID, minLimit, maxLimit)
	}
	if kind, ok := j.knows(r.ID); ok {
		if o := j.Operation; kind != Emergency || o != nil && o.ID == r.ID && !slices.Contains(o.Compromised, r.Compromised) {
			return Journal{}, another(r.ID)
		}
		return j, nil
	}
	next := j.begin(now)
	next.Changed = now
	next.uncross(r.Compromised)
	op := &Operation{ID: r.ID, Kind: Emergency, By: r.By, Why: r.Why, Begun: now, Limits: limits, Compromised: []string{r.Compromised}}
	i := next.find(r.Compromised)
	if i < 0 {
		return j.taintGone(next, op, now)
	}
	if o := next.Operation; o != nil && slices.Contains(o.Compromised, r.Compromised) {
		return Journal{}, underWay(o)
	}
	if o := next.Operation; o != nil {
		for _, id := range o.Compromised {
			if next.find(id) >= 0 {
				op.Compromised = append(op.Compromised, id) // an emergency within one: both go
			}
		}
	}
	switch next.Authorities[i].State {
	case Active: // until its successor is
	case Prepared: // nobody trusts it
		next.bury(i, true, now)
	default:
		next.Authorities[i].enter(Tainted, now)
	}
	if active := next.ActiveAuthority().ID; slices.Contains(op.Compromised, active) {
		op.Replaces = active
		if err := next.succeed(op, r, now); err != nil {
			return Journal{}, err
		}
	}
	next.supersede(op, now)
	return j.finish(next, now)
}

// taintGone remembers of a root that nobody trusts that it was compromised.
func (j Journal) taintGone(next Journal, op *Operation, now time.Time) (Journal, error) {
	i := next.findGone(op.Compromised[0])
	if i < 0 {
		return Journal{}, api.E(api.NotFound, "there is no authority %.64q", op.Compromised[0])
	}
	next.Gone[i].Tainted = true
	next.trimGone(now)
	op.Authority, op.Replaces = next.ActiveAuthority().ID, op.Compromised[0]
	next.Past = append(next.Past, op.past(Done, now))
	next.Past = next.Past[max(0, len(next.Past)-MaxPast):]
	return j.finish(next, now)
}

// succeed finds who follows the compromised active root: whom the request brings; or one that retires, which everybody trusts,
// so that it is active at once; or the one that was to follow anyway.
func (j *Journal) succeed(op *Operation, r TaintRequest, now time.Time) error {
	if r.Authority.ID != "" {
		if err := j.admit(&r.Authority, "", now); err != nil {
			return err
		}
		j.Authorities = append(j.Authorities, r.Authority)
		op.Authority = r.Authority.ID
		return nil
	}
	for i, a := range j.Authorities {
		if a.State == Retiring && !expired(a, now.Add(minRootLeft)) {
			op.Authority = a.ID
			held := j.Operation
			j.Operation = op // so that the active one is known to be compromised
			j.activate(i, now)
			j.Operation = held
			return nil
		}
	}
	if o := j.Operation; o != nil {
		if i := j.find(o.Authority); i >= 0 && (j.Authorities[i].State == Prepared || j.Authorities[i].State == Published) {
			op.Authority = o.Authority
			return nil
		}
	}
	return api.E(api.SuccessorNeeded, "authority %s is active, and there is no other that could take its place", op.Replaces)
}

// supersede puts an emergency in the place of the operation under way, and ends it at once where it has nothing to do.
func (j *Journal) supersede(op *Operation, now time.Time) {
	if op.Authority == "" { // the compromised one was not active
		op.Authority, op.Replaces = j.ActiveAuthority().ID, op.Compromised[0]
	}
	if j.Operation != nil {
		j.end(Superseded, Word{By: op.By, Why: op.Why, At: now}, now)
	}
	for i := 0; i < len(j.Authorities); { // what was to follow and does not
		if a := j.Authorities[i]; (a.State == Prepared || a.State == Published) && a.ID != op.Authority {
			j.bury(i, false, now)
			continue
		}
		i++
	}
	j.Operation = op
}

// uncross forgets what a compromised root has cross-signed, and by whom it was.
func (j *Journal) uncross(id string) {
	for i, a := range j.Authorities {
		if a.CrossBy == id || a.ID == id {
			j.Authorities[i].Cross, j.Authorities[i].CrossBy = nil, ""
		}
	}
}

// Refused says why an operation that begins now would not take a root; nil where it would.
func (j Journal) Refused(a Authority, now time.Time) error {
	next := j.begin(stamp(now))
	next.Authorities = slices.DeleteFunc(next.Authorities, func(old Authority) bool { return old.State == Prepared || old.State == Published })
	return next.admit(&a, a.CrossBy, stamp(now))
}

// admit checks a new root, cross-signed by nobody but by, and makes it a prepared one.
func (j Journal) admit(a *Authority, by string, now time.Time) error {
	if err := a.validate(); err != nil {
		return api.Wrap(api.AuthorityRefused, err, "the new root is not one")
	}
	c, err := x509.ParseCertificate(a.Certificate)
	if err != nil || len(a.Certificate) > maxCertificate || len(a.Cross) > maxCertificate || len(a.SealedKey) > maxSealedKey {
		return refused("it is too large")
	}
	left := 0
	for _, old := range j.Authorities {
		if old.State != Removed {
			left++
		}
		o, err := x509.ParseCertificate(old.Certificate)
		switch {
		case err != nil:
			return corrupt("authority %s: %v", old.ID, err)
		case old.ID == a.ID || bytes.Equal(o.RawSubjectPublicKeyInfo, c.RawSubjectPublicKeyInfo):
			return refused("its key is that of authority " + old.ID)
		case bytes.Equal(o.RawSubject, c.RawSubject):
			return refused("its name is that of authority " + old.ID)
		}
	}
	hash, key, _ := fingerprints(a.Certificate)
	for _, g := range j.Gone {
		if g.ID == a.ID || g.Key == key || g.Hash == hash {
			return refused("it is authority " + g.ID + " again, which is gone")
		}
	}
	if left >= MaxAuthorities {
		return api.E(api.StateFull, "the record holds %d authorities, and there is no room for one more", left)
	}
	if c.NotAfter.Sub(now) < minRootLeft || !c.NotBefore.Before(c.NotAfter) {
		return refused("it expires too soon")
	}
	if err := j.admitCross(a, c, by); err != nil {
		return err
	}
	a.Times, a.Since = Times{}, 0
	a.enter(Prepared, now)
	return nil
}

// admitCross checks that the new root was cross-signed by whom it says.
func (j Journal) admitCross(a *Authority, c *x509.Certificate, by string) error {
	if len(a.Cross) == 0 && a.CrossBy == "" {
		return nil
	}
	if by == "" || a.CrossBy != by {
		return refused("it is cross-signed by another than the active authority")
	}
	if why := checkCross(c, a.Cross, a.CrossBy); why != "" {
		return refused("its cross-signed certificate " + why)
	}
	signer, err := x509.ParseCertificate(j.Authorities[j.find(by)].Certificate)
	if err != nil {
		return corrupt("authority %s: %v", by, err)
	}
	cross, err := x509.ParseCertificate(a.Cross)
	if err != nil || cross.CheckSignatureFrom(signer) != nil {
		return refused("its cross-signed certificate is not signed by authority " + by)
	}
	if cross.NotAfter.After(signer.NotAfter) {
		return refused("its cross-signed certificate outlives authority " + by)
	}
	return nil
}

// knows reports whether an operation of that id was begun, and of which kind.
func (j Journal) knows(id string) (Kind, bool) {
	if o := j.Operation; o != nil && o.ID == id {
		return o.Kind, true
	}
	if i := slices.IndexFunc(j.Past, func(p Past) bool { return p.ID == id }); i >= 0 {
		return j.Past[i].Kind, true
	}
	return "", false
}

// another refuses an id under which something else was begun: to answer that it is done would be worse than any error.
func another(id string) error {
	return api.E(api.RotationInvalid, "operation %s is another one; use another id", id)
}

// reached reports whether an operation has ended that way; RotationOver where it ended otherwise or is not known.
func (j Journal) reached(id string, how Outcome) (bool, error) {
	if j.Operation != nil && j.Operation.ID == id {
		return false, nil
	}
	i := slices.IndexFunc(j.Past, func(p Past) bool { return p.ID == id })
	switch {
	case i < 0:
		return false, api.E(api.RotationOver, "operation %.64q is not under way", id)
	case j.Past[i].Outcome != how:
		return false, api.E(api.RotationOver, "operation %s has ended: %s", id, j.Past[i].Outcome)
	}
	return true, nil
}

func (r Request) good() bool { return opID.MatchString(r.ID) && goodBy(r.By, r.Why) }

func underWay(o *Operation) error {
	return api.E(api.RotationUnderWay, "operation %s (%s) is under way, begun by %q at %s", o.ID, o.Kind, o.By, o.Begun.Format(time.RFC3339))
}

func refused(why string) error {
	return api.E(api.AuthorityRefused, "the new root cannot be taken: %s", why)
}
