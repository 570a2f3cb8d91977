package ca

import (
	"math/rand/v2"
	"time"

	"github.com/signet-ca/signet/api"
)

const (
	patience    = 5 * time.Second  // for which anybody waits for a turn at most: half of what an agent does
	paceTime    = time.Second / 2  // over which it is measured how fast turns are given
	maxReturn   = 30 * time.Second // after which whoever is sent away may come back, but for what is added so that not all come at once
	leastReturn = time.Second
	paceAge     = 10 * time.Second // after which a measure says nothing of a queue that begins anew
)

// pace is how fast turns are given while somebody waits for one. It does not know until that was so for a while.
type pace struct {
	since    time.Time // when the measure began that goes on
	turns    int       // since then
	stalled  bool      // the measure before ended with its first turn, after long
	rate     float64   // turns a second, by the last measure; 0: there was none
	measured time.Time // when that was
	promised time.Time // when there will be a place for the last of those who were sent away and shall come back
}

// begin begins a measure, for somebody waits where nobody did. A measure that is old is forgotten, with what was promised by it:
// a queue that is always short is never measured, and would go by it for ever.
func (p *pace) begin(now time.Time) {
	p.since, p.turns, p.stalled = now, 0, false
	if now.Sub(p.measured) > paceAge {
		p.rate, p.promised = 0, time.Time{}
	}
}

// note counts a turn that was given to somebody who waited. A first turn after long is the end of a stall and says nothing of
// what follows, unless the one before was one as well.
func (p *pace) note(now time.Time) {
	p.turns++
	took := now.Sub(p.since)
	switch {
	case took < paceTime:
		return
	case p.turns == 1 && took > 2*paceTime && !p.stalled:
		p.stalled = true
	default:
		p.rate, p.measured, p.stalled = float64(p.turns)/took.Seconds(), now, false
	}
	p.since, p.turns = now, 0
}

// now returns how many turns a second are given, while concurrent are held; 0 where that is not known. Where none was given
// for long, those that are held are all that can be hoped for.
func (p *pace) now(now time.Time, concurrent int) float64 {
	if took := now.Sub(p.since); p.rate > 0 && took > 2*paceTime {
		return min(p.rate, float64(p.turns+concurrent)/took.Seconds())
	}
	return p.rate
}

// after returns when somebody may come back who is sent away: each turn leaves a place, and the next goes to who was sent away
// before him, so that they come as fast as places are left and the places are never empty. It is after a quarter of what is
// left until he is due, at most, and not less than a second.
func (p *pace) after(now time.Time, concurrent int, due time.Time) time.Duration {
	return p.behind(&p.promised, 1, now, concurrent, due)
}

// behind is after for somebody who comes so many turns behind the last of those who were promised a place, which he is then.
func (p *pace) behind(promised *time.Time, turns int, now time.Time, concurrent int, due time.Time) time.Duration {
	wait := leastReturn
	if rate := p.now(now, concurrent); rate > 0 {
		wait = max(0, promised.Sub(now)) + time.Duration(min(maxReturn.Seconds(), float64(turns)/rate)*float64(time.Second))
		wait = min(wait, maxReturn)
		*promised = now.Add(wait)
	}
	most := maxReturn
	if !due.IsZero() {
		most = min(most, due.Sub(now)/4)
	}
	wait = max(leastReturn, min(wait, most))
	return wait + rand.N(wait/4+leastReturn/2)
}

// overloaded tells whoever is sent away when to come back: not all at the same moment.
func overloaded() error { return comeBack(leastReturn + rand.N(leastReturn)) }

func comeBack(after time.Duration) error {
	return &api.Error{Reason: api.Overloaded, Detail: "too many requests are waiting", RetryAfter: after}
}
