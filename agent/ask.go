package agent

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// What is due at the same moment, as after an outage, goes to the CA in as few calls as it takes, the most urgent first. What
// is pressing waits for nothing and nobody: it does not share a call with what is not, for an answer comes when all of a
// call's are there, and there is always a call left for it. A request whose last call ended without an answer shares no call
// either: were it the one that the CA does not come to an end with, it would take its neighbours along each time.

const (
	maxCalls    = 12                    // at once; the CA allows 16 on a connection, and the session is one of them
	maxGathered = 4                     // of these with what is not pressing
	maxAlone    = 8                     // of these with what is pressing and shares no call
	maxPatient  = 3                     // of maxGathered with what shares no call
	firstItems  = 4                     // in the first call of several at once, in each further one twice as many
	gatherTime  = 10 * time.Millisecond // for which a renewal that is not pressing waits for others
	maxCallSize = 1 << 20               // bytes of the items of a call that has several; the CA takes twice as much
)

// ask is one request for an SVID.
type ask struct {
	item     *apiv1.IssueItem
	size     int
	due      time.Time // see api.DueBy
	pressing bool
	alone    bool      // shares no call
	end      time.Time // of whoever asks
	call     *call     // nil while it waits for one

	answered chan struct{} // closed when what follows is known
	svid     *apiv1.SVID
	err      error
}

// call is one call of Issue.
type call struct {
	wanted int // asks whose answer somebody waits for
	cancel context.CancelFunc
}

// asks are those of one connection.
type asks struct {
	mu       sync.Mutex
	waiting  []*ask // what is pressing first, then what is due first
	gathered bool   // what is not pressing has waited for others
	calls    int    // at the CA now
	relaxed  int    // of these with what is not pressing
	alone    int    // of the others with what shares no call
	patient  int    // of relaxed likewise
	over     bool   // the session has ended: there will be no calls any more
}

// newAsk makes a request within ctx, which has a deadline, for somebody who holds an SVID until then; the zero time where he holds none.
func newAsk(ctx context.Context, item *apiv1.IssueItem, holdsUntil, now time.Time) *ask {
	end, _ := ctx.Deadline()
	return &ask{
		item: item, size: proto.Size(item), due: api.DueBy(holdsUntil, now), pressing: holdsUntil.Sub(now) < api.Pressing, end: end,
		answered: make(chan struct{}),
	}
}

// issue obtains one SVID. What the CA says of the request is the workload's, and returned as its *api.Error; what fails with
// the call is between agent and CA, and no workload is refused for it. The caller has entered the link.
func (l *link) issue(ctx context.Context, x *ask) (*apiv1.SVID, error) {
	l.put(x)
	if x.pressing {
		l.send(false)
	} else {
		gather := time.NewTimer(gatherTime)
		defer gather.Stop()
		select {
		case <-gather.C:
			l.send(true)
		case <-x.answered:
		case <-ctx.Done():
		}
	}
	select {
	case <-x.answered:
	case <-ctx.Done():
		if l.giveUp(x) {
			return nil, api.AsError(ctx.Err())
		}
	}
	return x.svid, x.err
}

// put has x wait for a call. The first that is not pressing begins to wait for others.
func (l *link) put(x *ask) {
	l.asks.mu.Lock()
	defer l.asks.mu.Unlock()
	if l.asks.over {
		x.err = errNoSession
		close(x.answered)
		return
	}
	if n := len(l.asks.waiting); !x.pressing && (n == 0 || l.asks.waiting[n-1].pressing) {
		l.asks.gathered = false
	}
	i, _ := slices.BinarySearchFunc(l.asks.waiting, x, func(a, x *ask) int {
		if a.pressing != x.pressing && x.pressing || a.pressing == x.pressing && x.due.Before(a.due) {
			return 1
		}
		return -1
	})
	l.asks.waiting = slices.Insert(l.asks.waiting, i, x)
}

// giveUp lets go of x, and of its call where nobody else waits for that; false where it was answered meanwhile.
func (l *link) giveUp(x *ask) bool {
	l.asks.mu.Lock()
	defer l.asks.mu.Unlock()
	select {
	case <-x.answered:
		return false
	default:
	}
	if x.call == nil {
		l.asks.waiting = slices.DeleteFunc(l.asks.waiting, func(a *ask) bool { return a == x })
	} else if x.call.wanted--; x.call.wanted == 0 {
		x.call.cancel()
	}
	return true
}

// abandon answers whoever waits for a call when the session has ended, and whoever comes yet: the CA would refuse them all.
// What it was asked already it may answer still.
func (l *link) abandon() {
	l.asks.mu.Lock()
	defer l.asks.mu.Unlock()
	l.asks.over = true
	for _, x := range l.asks.waiting {
		x.err = errNoSession
		close(x.answered)
	}
	l.asks.waiting = nil
}

// unanswered reports whether x, to which err came, shall share no call when it is asked again: the time of its call was over.
// Where it came to no call, or the CA has gone, that is as it was.
func (l *link) unanswered(x *ask, err error) bool {
	l.asks.mu.Lock()
	defer l.asks.mu.Unlock()
	switch {
	case err == nil:
		return false
	case x.call == nil || api.ReasonOf(err) == api.CAUnavailable:
		return x.alone
	}
	return api.ReasonOf(err) == api.DeadlineExceeded
}

// send makes as many calls as may be made. Gathered says that what is not pressing has waited for others.
func (l *link) send(gathered bool) {
	l.asks.mu.Lock()
	defer l.asks.mu.Unlock()
	l.asks.gathered = l.asks.gathered || gathered
	for all := l.asks.next(); all != nil; all = l.asks.next() {
		// A call ends with the last who wants an answer of it; that he may wait for long enough is seen to when his ends.
		ctx, cancel := context.WithDeadline(context.Background(), slices.MaxFunc(all, func(a, b *ask) int { return a.end.Compare(b.end) }).end)
		c := &call{wanted: len(all), cancel: cancel}
		for _, x := range all {
			x.call = c
		}
		l.calls.Go(func() {
			defer cancel()
			l.call(ctx, all)
			l.send(false)
		})
	}
}

// next takes out what goes into one call, and counts the call; nil where there is nothing, or may be no call. The caller holds
// mu.
func (s *asks) next() []*ask {
	at := slices.IndexFunc(s.waiting, s.may)
	if at < 0 {
		return nil
	}
	first := s.waiting[at]
	most := min(api.MaxBatch, firstItems<<s.relaxed)
	switch {
	case first.alone:
		most = 1
	case first.pressing:
		most = 4 * firstItems
	}
	all, left := []*ask{first}, slices.Clone(s.waiting[:at])
	size := first.size
	for i, x := range s.waiting[at+1:] {
		if len(all) == most || x.pressing != first.pressing || !x.alone && size+x.size > maxCallSize {
			left = append(left, s.waiting[at+1+i:]...)
			break
		}
		if x.alone {
			left = append(left, x)
			continue
		}
		all, size = append(all, x), size+x.size
	}
	s.waiting = left
	s.count(first, 1)
	return all
}

// may reports whether there may be a call for x now. Some calls are always left for what has been answered so far. The caller
// holds mu.
func (s *asks) may(x *ask) bool {
	switch {
	case s.calls >= maxCalls:
		return false
	case x.pressing:
		return !x.alone || s.alone < maxAlone
	}
	return s.gathered && s.relaxed < maxGathered && (!x.alone || s.patient < maxPatient)
}

// count adds n to the calls that are like that of x. The caller holds mu.
func (s *asks) count(x *ask, n int) {
	s.calls += n
	if !x.pressing {
		s.relaxed += n
	}
	switch {
	case x.alone && x.pressing:
		s.alone += n
	case x.alone:
		s.patient += n
	}
}

// call makes one call and answers all who are in it.
func (l *link) call(ctx context.Context, all []*ask) {
	r := &apiv1.IssueRequest{}
	for _, x := range all {
		r.Items = append(r.Items, x.item)
	}
	resp, err := l.client.Issue(ctx, r)
	switch {
	case err != nil:
		e := api.AsError(api.FromStatus(err))
		if err = e; final(e) {
			err = api.Wrap(api.CAUnavailable, e, "the CA refused the agent's call")
		}
	case len(resp.GetResults()) != len(all):
		err = api.E(api.SVIDRejected, "the CA answered %d requests with %d results", len(all), len(resp.GetResults()))
	}
	l.asks.mu.Lock()
	defer l.asks.mu.Unlock()
	l.asks.count(all[0], -1)
	for i, x := range all {
		if x.err = err; err == nil {
			x.svid, x.err = svidOf(resp.GetResults()[i])
		}
		close(x.answered)
	}
}

// svidOf is what the CA says of one request.
func svidOf(r *apiv1.IssueResult) (*apiv1.SVID, error) {
	switch {
	case r.GetSvid() != nil:
		return r.GetSvid(), nil
	case r.GetRefusal() != nil:
		reason := api.Reason(r.GetRefusal().GetReason())
		if reason == api.NodeBanned { // the session's end comes after it; no workload is refused for it
			return nil, api.E(api.CAUnavailable, "the node is banned")
		}
		if !reason.Known() {
			return nil, api.E(api.Internal, "the CA refused with a reason that this agent does not know")
		}
		return nil, &api.Error{Reason: reason, Detail: r.GetRefusal().GetMessage(), CorrelationID: r.GetRefusal().GetCorrelationId(),
			RetryAfter: r.GetRefusal().GetRetryAfter().AsDuration()}
	}
	return nil, api.E(api.SVIDRejected, "the CA's result is empty")
}
