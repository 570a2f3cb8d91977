package journal

import (
	"crypto/x509"
	"slices"
	"time"

	"github.com/signet-ca/signet/api"
)

// Forecast is what a rotation would do, or has left to do. It is told to people before they decide; nothing is decided by it.
type Forecast struct {
	// Operation is the one under way; empty where none is: then it is about a planned one that would begin now.
	Operation  string
	Kind       Kind
	Generation api.Generation // of the bundle now
	Active     Root
	Next       *Root // the one that follows; nil where it is yet to be made
	// Cross says whether chains carry, or can carry, the new root signed by the old one; NoCross says why not.
	Cross   bool
	NoCross string
	// Who is affected: what lives now.
	Replicas, Agents, Pods, Streams int
	// Unheard are those of the agents that have had no session since the CA was started: what pods they have is not known, and neither
	// Pods nor any other count has them.
	Unheard int
	// Missing are those who would stand in the way of the activation if the new bundle were brought now, since they are away or
	// rejected what they were brought last; with an operation under way those of Next, and while its root is in no bundle both.
	Missing []Blocker
	// Unproven are those who cannot acknowledge.
	Unproven []Blocker
	Steps    []Forecasted
}

// Root is an authority as people are told of it.
type Root struct {
	ID       string
	State    State
	NotAfter time.Time
	Left     time.Duration // until then; negative where it has expired
}

// Forecasted is a step to come.
type Forecasted struct {
	Do        Do
	Authority string // id; empty where its root is yet to be made
	// Earliest is when it can be taken if everybody answers at once.
	Earliest time.Time
	// Latest is when it is taken though somebody does not; zero where it waits for ever, or until somebody excuses him.
	Latest time.Time
}

// Plan returns what a planned rotation with these limits would do, or what the operation under way has left to do.
func Plan(j Journal, now time.Time, acks Acks, limits Limits) Forecast {
	active := j.ActiveAuthority()
	f := Forecast{Kind: Planned, Generation: j.Generation(), Active: rootOf(active, now), Replicas: len(acks.Replicas)}
	f.count(now, acks)
	if j.Operation != nil {
		f.underWay(j, now, acks)
		return f
	}
	f.sort(wouldLack(j, &Operation{Kind: Planned, Limits: limits.withDefaults(Planned)}, active, now, acks))
	switch {
	case expired(active, now):
		f.SetCross("the old root has expired", now, acks, limits)
	case len(active.SealedKey) == 0:
		f.SetCross("the old root's key is not in the record; its upstream has to be asked", now, acks, limits)
	default:
		f.SetCross("", now, acks, limits)
	}
	return f
}

// SetCross says of a planned rotation that has not begun why the old root will not sign the new one, as whoever has its key says: empty
// where it will. What has been said before, and when the steps can be taken, is replaced.
func (f *Forecast) SetCross(why string, now time.Time, acks Acks, limits Limits) {
	limits = limits.withDefaults(Planned)
	f.Cross, f.NoCross = why == "", why
	activate := Forecasted{Do: Activate, Earliest: now}
	if len(f.Unproven) > 0 {
		activate.Earliest = now.Add(limits.Soak)
	}
	if f.Cross {
		activate.Latest = now.Add(max(limits.Straggler, limits.Soak))
	}
	f.Steps = []Forecasted{{Do: Publish, Earliest: now, Latest: now}, activate, removal(f.Active.ID, activate.Earliest, activate.Latest, acks)}
}

// wouldLack finds who would stand in the way of activating a root if the bundle with it were brought now: what everybody holds now is
// what they would have to hold then. Since when they do is no matter: whoever cannot acknowledge is given his time anew.
func wouldLack(j Journal, o *Operation, about Authority, now time.Time, acks Acks) []Blocker {
	held, err := j.held()
	if err != nil {
		return nil
	}
	rested := o.clone()
	rested.Soak = 0
	g := &gate{j: j, op: rested, do: Activate, about: about, now: now, acks: acks, want: held}
	g.holders()
	slices.SortFunc(g.found, compareBlockers)
	return g.found
}

// underWay says what the operation under way has left to do.
func (f *Forecast) underWay(j Journal, now time.Time, acks Acks) {
	o := j.Operation
	f.Operation, f.Kind = o.ID, o.Kind
	if i := j.find(o.Authority); i >= 0 {
		next := rootOf(j.Authorities[i], now)
		f.Next = &next
		g := &gate{j: j, op: o, now: now}
		f.Cross = g.crossed(j.Authorities[i])
	}
	switch {
	case f.Cross:
	case o.Kind == Emergency:
		f.NoCross = "nothing is cross-signed by a compromised root"
	default:
		f.NoCross = "the new root has no cross-signed certificate that is valid now"
	}
	_, found := Next(j, now, acks)
	if f.Next != nil && f.Next.State == Prepared {
		found = append(found, wouldLack(j, o, j.Authorities[j.find(o.Authority)], now, acks)...)
	}
	f.sort(found)
	if f.Next != nil && (f.Next.State == Prepared || f.Next.State == Published) {
		f.toCome(j, now, acks)
		return
	}
	for _, c := range j.candidates() {
		a := j.Authorities[j.find(c.Authority)]
		s := removal(c.Authority, now, now, acks)
		switch limit, ends := lacking(j, j.gate(c, now, acks), now); {
		case a.State == Tainted:
			s = expulsion(c.Authority, now, later(a.Times.Tainted, now, o.Straggler), acks)
		case !ends, !acks.ready() && !expired(a, now): // it stays until somebody can issue under the other
			s.Latest = time.Time{}
		case limit.After(s.Latest):
			s.Latest = limit
		}
		f.Steps = append(f.Steps, s)
	}
}

// toCome are the steps of an operation whose root is not active yet.
func (f *Forecast) toCome(j Journal, now time.Time, acks Acks) {
	o := j.Operation
	since := j.Authorities[j.find(o.Authority)].Times.Published
	s := Forecasted{Do: Activate, Authority: o.Authority, Earliest: soaked(now, f.Missing)}
	if f.Next.State == Prepared {
		f.Steps = append(f.Steps, Forecasted{Do: Publish, Authority: o.Authority, Earliest: now, Latest: now})
		since = now
		if len(f.Unproven) > 0 && o.Kind != Emergency {
			s.Earliest = now.Add(o.Soak)
		}
	}
	if f.Cross || o.Kind == Emergency {
		s.Latest = later(since, now, o.Straggler)
	}
	s.Latest = sooner(s.Latest, o.latest())
	remove := removal(o.Replaces, s.Earliest, s.Latest, acks)
	if slices.Contains(o.Compromised, o.Replaces) {
		remove = expulsion(o.Replaces, s.Earliest, s.Earliest.Add(o.Straggler), acks)
		remove.Latest = s.Latest.Add(o.Straggler)
	}
	f.Steps = append(f.Steps, s, remove)
}

// lacking says when the last of those is waited for no more who stand in the way of a removal since they lack the bundle; false where
// one of them is waited for until he has it, or somebody excuses him.
func lacking(j Journal, found []Blocker, now time.Time) (limit time.Time, ends bool) {
	o, active := j.Operation, j.ActiveAuthority()
	late := o.latest()
	g := &gate{j: j, op: o, now: now}
	// Whoever is not passed over once the limit is over never is for being late: he is late by two rotations.
	if over := active.Times.Published.Add(o.Straggler); g.crossed(active) && over.After(now) {
		late = sooner(late, over)
	}
	for _, b := range found {
		if !b.Blocks() || b.Kind != ByAgent && b.Kind != ByPod && b.Kind != ByCopy {
			continue
		}
		until := sooner(b.Until, late)
		if until.IsZero() {
			return time.Time{}, false
		}
		if until.After(limit) {
			limit = until
		}
	}
	return limit, true
}

// removal says when nothing under a root can be alive, if no more is signed under it from some time on, or at the latest from another
// one on, which is zero where it may be signed under for ever.
func removal(id string, from, latest time.Time, acks Acks) Forecasted {
	s := Forecasted{Do: Remove, Authority: id, Earliest: from, Latest: latest}
	raise := func(t *time.Time, to time.Time) {
		if !t.IsZero() && to.After(*t) {
			*t = to
		}
	}
	for _, r := range acks.Replicas {
		raise(&s.Earliest, r.Leaves[id])
		for _, i := range r.Intermediates {
			if i.Root != id || i.Destroyed || !i.NotAfter.After(from) {
				continue
			}
			// What it signs last is good for that long; one that cannot be asked may sign until its end, and so may, at worst, any.
			raise(&s.Earliest, sooner(i.NotAfter, from.Add(i.Longest)))
			raise(&s.Latest, latest.Add(i.Longest))
			raise(&s.Latest, i.NotAfter)
			if !r.Reachable {
				raise(&s.Earliest, i.NotAfter)
			}
		}
	}
	raise(&s.Latest, s.Earliest)
	return s
}

// expulsion says when a compromised root goes that signs nothing from some time on: what is under it is reissued, not waited for, and a
// replica that cannot be asked is waited for until the limit at most, such as the one in the place of those that a restore knows nothing of.
func expulsion(id string, from, limit time.Time, acks Acks) Forecasted {
	s := Forecasted{Do: Remove, Authority: id, Earliest: from, Latest: limit}
	for _, r := range acks.Replicas {
		until := r.mayHave(id)
		if until.After(limit) {
			until = limit
		}
		if !r.Reachable && until.After(s.Earliest) {
			s.Earliest = until
		}
	}
	return s
}

func (f *Forecast) count(now time.Time, acks Acks) {
	for _, a := range acks.Agents {
		if !a.live(now) {
			continue
		}
		f.Agents++
		if a.PodsUnknown {
			f.Unheard++
		}
		f.Pods += len(a.Pods)
		for _, p := range a.Pods {
			f.Streams += len(p.Streams)
		}
	}
}

// sort puts those who cannot acknowledge apart from those who could and did not.
func (f *Forecast) sort(found []Blocker) {
	for _, b := range found {
		if b.Pass == Unproven {
			f.Unproven = append(f.Unproven, b)
		} else {
			f.Missing = append(f.Missing, b)
		}
	}
}

// soaked is when those have been given their time who only wait for that.
func soaked(now time.Time, missing []Blocker) time.Time {
	for _, b := range missing {
		if (b.Kind == ByPod || b.Kind == ByCopy) && b.Until.After(now) {
			now = b.Until
		}
	}
	return now
}

func later(since, now time.Time, d time.Duration) time.Time {
	if t := since.Add(d); t.After(now) {
		return t
	}
	return now
}

// sooner is the earlier of two times, of which zero is never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// latest is when nobody is waited for any more for the sake of the date; zero where that is not so.
func (o *Operation) latest() time.Time {
	if o.Automatic {
		return o.Latest
	}
	return time.Time{}
}

func rootOf(a Authority, now time.Time) Root {
	r := Root{ID: a.ID, State: a.State}
	if c, err := x509.ParseCertificate(a.Certificate); err == nil {
		r.NotAfter, r.Left = c.NotAfter, c.NotAfter.Sub(now)
	}
	return r
}
