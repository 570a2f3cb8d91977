package api

import "time"

// FirstPatience is how long a workload that holds nothing is taken to last: it goes before every renewal with more time left
// than that, and behind those with less, of which a try that fails may leave no second.
const FirstPatience = 30 * time.Second

// Pressing is when a renewal becomes so urgent that it is not gathered with others any more.
const Pressing = time.Minute

// DueBy returns by when a workload should have its SVID: when what it holds expires or, where it holds nothing that is good
// now, FirstPatience from now. An agent sends the earliest first, and the CA serves it first among those of one node.
func DueBy(holdsUntil, now time.Time) time.Time {
	if !holdsUntil.After(now) {
		return now.Add(FirstPatience)
	}
	return holdsUntil
}
