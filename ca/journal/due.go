package journal

import (
	"crypto/x509"
	"time"
)

// When a root is replaced before it expires: half of its life before that at most, so that a short-lived one gets its time too.
const (
	prepareBefore = 90 * 24 * time.Hour
	latestBefore  = 30 * 24 * time.Hour
	abortedPause  = 24 * time.Hour // after somebody ended a rotation
)

// Schedule is when the active root is replaced by itself.
type Schedule struct {
	Prepare time.Time // from when on a rotation begins
	Latest  time.Time // from when on it waits for nobody, unless most agents are away
	Expires time.Time
	Due     bool // begin one now
	Overdue bool // Latest is over
}

// Due returns when the active root is replaced, and whether that is now. It is not while an operation is under way, while the
// clock is behind the record's last change, and not for a day after somebody aborted one or rolled it back, unless the latest
// date is over. What it begins goes through the same gates as what people begin.
func Due(j Journal, now time.Time) Schedule {
	s := scheduleOf(j.ActiveAuthority())
	if s.Expires.IsZero() {
		return s
	}
	s.Overdue = !now.Before(s.Latest)
	s.Due = !now.Before(s.Prepare) && j.Operation == nil && !now.Add(clockSlack).Before(j.Changed)
	if n := len(j.Past); s.Due && !s.Overdue && n > 0 {
		last := j.Past[n-1]
		s.Due = last.Outcome != Aborted && last.Outcome != RolledBack || now.Sub(last.Ended) >= abortedPause
	}
	return s
}

func scheduleOf(a Authority) Schedule {
	c, err := x509.ParseCertificate(a.Certificate)
	if err != nil {
		return Schedule{}
	}
	life := c.NotAfter.Sub(c.NotBefore)
	return Schedule{
		Prepare: c.NotAfter.Add(-min(life/2, prepareBefore)),
		Latest:  c.NotAfter.Add(-min(life/4, latestBefore)),
		Expires: c.NotAfter,
	}
}
