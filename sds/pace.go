package sds

import "time"

// A pace bounds how fast something may happen: at once for a burst, then at a rate. It is a token bucket without a
// goroutine.
type pace struct {
	each time.Duration // the time that one takes at the rate
	full time.Duration // the time that a whole burst is worth
	left time.Duration // what may be spent, as of last
	last time.Time
}

// newPace starts with a whole burst. perSecond and burst are at least 1.
func newPace(perSecond, burst int, now time.Time) *pace {
	each := time.Second / time.Duration(perSecond)
	full := each * time.Duration(burst)
	return &pace{each: each, full: full, left: full, last: now}
}

// allow spends one and reports true, or reports false and spends nothing where there is none left.
func (p *pace) allow(now time.Time) bool {
	if p.left = min(p.full, p.left+max(0, now.Sub(p.last))); p.left < p.each {
		p.last = now
		return false
	}
	p.left, p.last = p.left-p.each, now
	return true
}

// take spends one and returns how long to wait before the next.
func (p *pace) take(now time.Time) time.Duration {
	p.left = min(p.full, p.left+max(0, now.Sub(p.last))) - p.each
	p.last = now
	return max(0, -p.left)
}
