package ca

import (
	"context"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// unsaidPatience is how long a workload is taken to last of which its agent does not say so, because it is of an earlier
// version: who says that he has less goes first. To know more its token would have to be read.
const unsaidPatience = 5 * time.Minute

// urgency is what a request says of how long it can wait.
type urgency string

const (
	holdsNothing urgency = "nothing" // or only what has expired
	holdsMinute  urgency = "minute"  // less than api.Pressing
	holdsLonger  urgency = "longer"
	holdsUnsaid  urgency = "unsaid"
)

// urgencyOf returns by when an item should be served, as its agent says. Nobody has proven it.
func urgencyOf(item *apiv1.IssueItem, now time.Time) (due time.Time, u urgency) {
	t := item.GetHoldsUntil()
	if t == nil || !t.IsValid() {
		return now.Add(unsaidPatience), holdsUnsaid
	}
	until := t.AsTime()
	switch left := until.Sub(now); {
	case left <= 0:
		u = holdsNothing
	case left < api.Pressing:
		u = holdsMinute
	default:
		u = holdsLonger
	}
	return api.DueBy(until, now), u
}

// itsTurn waits for a turn for one item of a node's agent, before anything of it is looked at. After a nil error its end must be
// called.
func (ca *CA) itsTurn(ctx context.Context, nodeUID string, item *apiv1.IssueItem) (*turn, error) {
	began := time.Now()
	due, u := urgencyOf(item, began)
	ca.metrics.waiting.Inc()
	t, err := ca.work.takeBy(ctx, nodeUID, due, ca.askWork)
	ca.metrics.waiting.Dec()
	switch {
	case err == nil:
		ca.metrics.waitSeconds.Observe(time.Since(began).Seconds())
	case api.ReasonOf(err) == api.Overloaded:
		ca.metrics.turnedAway.WithLabelValues(string(u)).Inc()
	}
	return t, err
}
