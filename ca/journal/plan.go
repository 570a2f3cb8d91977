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
	// Missing are those who would stand in the way of the activation if the new bundle were brought now, since they are away or
	// rejected what they were brought last; with an operation under way those of Next.
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
	limits = limits.withDefaults(Planned)
	switch {
	case len(active.SealedKey) == 0:
		f.NoCross = "the old root's key is not in the record; its upstream has to be asked"
	case expired(active, now):
		f.NoCross = "the old root has expired"
	default:
		f.Cross = true
	}
	// What everybody holds now is what they would have to hold then. Since when they do is no matter: whoever cannot acknowledge is
	// given his time anew.
	held, err := j.held()
	if err != nil {
		return f
	}
	g := &gate{j: j, op: &Operation{Kind: Planned, Limits: Limits{Straggler: limits.Straggler}}, do: Activate, about: active, now: now, acks: acks, want: held}
	g.holders()
	f.sort(g.found)
	activate := Forecasted{Do: Activate, Earliest: now}
	if len(f.Unproven) > 0 {
		activate.Earliest = now.Add(limits.Soak)
	}
	if f.Cross {
		activate.Latest = now.Add(max(limits.Straggler, limits.Soak))
	}
	f.Steps = []Forecasted{{Do: Publish, Earliest: now, Latest: now}, activate, removal(active.ID, activate.Earliest, acks)}
	return f
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
	f.sort(found)
	if f.Next != nil && f.Next.State == Prepared {
		f.Steps = append(f.Steps, Forecasted{Do: Publish, Authority: o.Authority, Earliest: now, Latest: now})
	}
	if f.Next != nil && (f.Next.State == Prepared || f.Next.State == Published) {
		since := j.Authorities[j.find(o.Authority)].Times.Published
		if since.IsZero() {
			since = now
		}
		s := Forecasted{Do: Activate, Authority: o.Authority, Earliest: soaked(now, f.Missing)}
		if f.Cross || o.Kind == Emergency {
			s.Latest = later(since, now, o.Straggler)
		} else if o.Automatic {
			s.Latest = o.Latest
		}
		remove := removal(o.Replaces, s.Earliest, acks)
		if slices.Contains(o.Compromised, o.Replaces) {
			remove = expulsion(o.Replaces, s.Earliest, s.Earliest.Add(o.Straggler), acks)
			remove.Latest = s.Latest.Add(o.Straggler)
		}
		f.Steps = append(f.Steps, s, remove)
		return
	}
	for _, c := range j.candidates() {
		s := removal(c.Authority, now, acks)
		if a := j.Authorities[j.find(c.Authority)]; a.State == Tainted {
			s = expulsion(c.Authority, now, later(a.Times.Tainted, now, o.Straggler), acks)
		} else if !acks.ready() && !expired(a, now) { // it stays until somebody can issue under the other
			s.Latest = time.Time{}
		}
		f.Steps = append(f.Steps, s)
	}
}

// removal says when nothing under a root can be alive, if no more is signed under it from some time on.
func removal(id string, from time.Time, acks Acks) Forecasted {
	s := Forecasted{Do: Remove, Authority: id, Earliest: from, Latest: from}
	for _, r := range acks.Replicas {
		if leaves := r.Leaves[id]; leaves.After(s.Earliest) {
			s.Earliest = leaves
		}
		until := r.mayHave(id)
		if until.After(s.Latest) {
			s.Latest = until
		}
		if !r.Reachable && until.After(s.Earliest) {
			s.Earliest = until
		}
	}
	if s.Latest.Before(s.Earliest) {
		s.Latest = s.Earliest
	}
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

func rootOf(a Authority, now time.Time) Root {
	r := Root{ID: a.ID, State: a.State}
	if c, err := x509.ParseCertificate(a.Certificate); err == nil {
		r.NotAfter, r.Left = c.NotAfter, c.NotAfter.Sub(now)
	}
	return r
}
