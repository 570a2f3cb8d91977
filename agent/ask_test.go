package agent

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// stubCA answers Issue as a test wants.
type stubCA struct {
	apiv1.AuthorityClient
	issue func(context.Context, *apiv1.IssueRequest) (*apiv1.IssueResponse, error)
}

func (s stubCA) Issue(ctx context.Context, r *apiv1.IssueRequest, _ ...grpc.CallOption) (*apiv1.IssueResponse, error) {
	return s.issue(ctx, r)
}

// names are the volumes of asks, by which tests tell them apart.
func names(all []*ask) (names []string) {
	for _, x := range all {
		names = append(names, x.item.GetVolume())
	}
	return names
}

// askFor is an ask for somebody who holds an SVID for so long; 0: nothing.
func askFor(name string, holds time.Duration) *ask {
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	now, until := time.Now(), time.Time{}
	if holds > 0 {
		until = now.Add(holds)
	}
	return newAsk(ctx, &apiv1.IssueItem{Volume: name}, until, now)
}

// What is pressing goes first and in calls of its own; the rest once it has waited for others, the most urgent first.
func TestAsksOrder(t *testing.T) {
	l := &link{}
	for _, x := range []*ask{
		askFor("hour", time.Hour), askFor("minutes", 5*time.Minute), askFor("new", 0), askFor("second", time.Second),
		askFor("half", 30*time.Minute), askFor("almost", 45*time.Second), askFor("new-2", 0),
	} {
		l.put(x)
	}
	if got, want := fmt.Sprint(names(l.asks.next())), "[second new new-2 almost]"; got != want {
		t.Errorf("the first call is for %s, want %s", got, want)
	}
	if got := l.asks.next(); got != nil {
		t.Errorf("%s did not wait for others", names(got))
	}
	l.asks.gathered = true
	if got, want := fmt.Sprint(names(l.asks.next())), "[minutes half hour]"; got != want {
		t.Errorf("the second call is for %s, want %s", got, want)
	}
	l.put(askFor("later", time.Hour))
	if got := l.asks.next(); got != nil {
		t.Errorf("%s did not wait for others", names(got))
	}
}

// The first calls are small, for the most urgent, and there are as many calls as there may be; some of them are left for what is pressing.
func TestAsksBounds(t *testing.T) {
	l := &link{}
	for i := range 1000 {
		l.put(askFor(fmt.Sprint(i), time.Hour))
	}
	l.asks.gathered = true
	for i := range maxGathered {
		if n := len(l.asks.next()); n != firstItems<<i {
			t.Errorf("call %d has %d requests, want %d", i, n, firstItems<<i)
		}
	}
	if l.asks.next() != nil {
		t.Error("what can wait has every call")
	}
	for i := range maxCalls - maxGathered {
		l.put(askFor("new", 0))
		if n := len(l.asks.next()); n != 1 {
			t.Errorf("pressing call %d has %d requests", i, n)
		}
	}
	l.put(askFor("new", 0))
	if l.asks.next() != nil {
		t.Errorf("more than %d calls", maxCalls)
	}

	l = &link{}
	for _, size := range []int{maxCallSize / 2, maxCallSize / 2, 1, maxCallSize/2 + 1, maxCallSize / 2, 3 * maxCallSize, 1, 1} {
		x := askFor(fmt.Sprint(size), 0)
		x.size = size
		l.put(x)
	}
	for _, want := range []int{2, 2, 1, 1, 2} {
		if all := l.asks.next(); len(all) != want {
			t.Errorf("a call for requests of %s bytes, want %d", names(all), want)
		}
	}
}

// What ended without an answer shares no call, and never has all calls that there are.
func TestAsksAlone(t *testing.T) {
	alone := func(name string, holds time.Duration) *ask {
		x := askFor(name, holds)
		x.alone = true
		return x
	}
	l := &link{}
	for _, x := range []*ask{
		askFor("a", 5*time.Second), alone("b", 6*time.Second), askFor("c", 7*time.Second),
		askFor("d", time.Hour), alone("e", 2*time.Hour), askFor("f", 3*time.Hour),
	} {
		l.put(x)
	}
	l.asks.gathered = true
	for _, want := range []string{"[a c]", "[b]", "[d f]", "[e]", "[]"} {
		if got := fmt.Sprint(names(l.asks.next())); got != want {
			t.Errorf("a call for %s, want %s", got, want)
		}
	}

	for _, tt := range []struct {
		name  string
		holds time.Duration
		most  int
	}{{"pressing", 0, maxAlone}, {"not pressing", time.Hour, maxPatient}} {
		t.Run(tt.name, func(t *testing.T) {
			l := &link{}
			for range maxCalls {
				l.put(alone("suspect", tt.holds))
			}
			l.asks.gathered = true
			for range tt.most {
				if got := names(l.asks.next()); len(got) != 1 {
					t.Errorf("a call for %s", got)
				}
			}
			if got := l.asks.next(); got != nil {
				t.Errorf("more than %d calls: %s", tt.most, names(got))
			}
			l.put(askFor("well", tt.holds))
			if got := fmt.Sprint(names(l.asks.next())); got != "[well]" {
				t.Errorf("a call for %s, behind which what is well waits", got)
			}
			x := alone("suspect", tt.holds)
			l.asks.count(x, -1)
			if got := fmt.Sprint(names(l.asks.next())); got != "[suspect]" {
				t.Errorf("one ended, and there is a call for %s", got)
			}
		})
	}
}

// What shares no call is what a call ended for without an answer, until there is one.
func TestAsksUnanswered(t *testing.T) {
	late, gone, refused := api.E(api.DeadlineExceeded, "late"), api.E(api.CAUnavailable, "gone"), api.E(api.PodUnknown, "no")
	for _, tt := range []struct {
		name        string
		called      bool
		err         error
		alone, want bool
	}{
		{"late", true, late, false, true},
		{"late again", true, late, true, true},
		{"waited for a call in vain", false, late, false, false},
		{"waited in vain, after it was late", false, late, true, true},
		{"the CA has gone", true, gone, false, false},
		{"the CA has gone, after it was late", true, gone, true, true},
		{"refused", true, refused, true, false},
		{"answered", true, nil, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			x := askFor("x", 0)
			x.alone = tt.alone
			if tt.called {
				x.call = &call{}
			}
			if got := (&link{}).unanswered(x, tt.err); got != tt.want {
				t.Errorf("shares no call: %v, want %v", got, tt.want)
			}
		})
	}
}

// Who comes when nobody waits any more waits for others.
func TestAsksGatherAnew(t *testing.T) {
	l := &link{}
	x := askFor("gives up", time.Hour)
	l.put(x)
	l.asks.relaxed = maxGathered // so that there may be no call for x
	l.send(true)
	if !l.giveUp(x) {
		t.Fatal("it was answered")
	}
	l.asks.relaxed = 0
	l.put(askFor("later", time.Hour))
	if got := l.asks.next(); got != nil {
		t.Errorf("%s did not wait for others", names(got))
	}
}

// When the session has ended nobody is asked for any more, and who waits for a call or comes for one learns it at once.
func TestAsksAbandon(t *testing.T) {
	for name, holds := range map[string]time.Duration{"pressing": 0, "not pressing": time.Hour} {
		t.Run(name, func(t *testing.T) {
			l := &link{client: stubCA{issue: func(context.Context, *apiv1.IssueRequest) (*apiv1.IssueResponse, error) {
				t.Error("the CA was asked")
				return nil, errors.New("broken")
			}}}
			l.asks.calls = maxCalls
			waits, comes := askFor("waits", holds), askFor("comes", holds)
			l.put(waits)
			l.abandon()
			l.asks.calls = 0
			for _, x := range []*ask{waits, comes} {
				if x == comes {
					l.put(x)
				}
				select {
				case <-x.answered:
				default:
					t.Fatalf("%s still waits", names([]*ask{x}))
				}
				if !errors.Is(x.err, errNoSession) {
					t.Errorf("%s: %v", names([]*ask{x}), x.err)
				}
			}
			l.send(true)
			l.calls.Wait()
			if _, err := l.issue(t.Context(), askFor("later", holds)); !errors.Is(err, errNoSession) {
				t.Errorf("later: %v", err)
			}
		})
	}
}

// Who gives up is not waited for, and his neighbours in the call are: it ends with the last of them.
func TestAsksGiveUp(t *testing.T) {
	came, left := make(chan []string), make(chan struct{})
	l := &link{client: stubCA{issue: func(ctx context.Context, r *apiv1.IssueRequest) (*apiv1.IssueResponse, error) {
		var all []string
		for _, x := range r.GetItems() {
			all = append(all, x.GetVolume())
		}
		came <- all
		<-ctx.Done()
		left <- struct{}{}
		return nil, ctx.Err()
	}}}
	ask := func(x *ask) (cancel func(), err <-chan error) {
		ctx, cancel := context.WithCancel(t.Context())
		c := make(chan error, 1)
		if !l.enter() {
			t.Fatal("the link has ended")
		}
		go func() {
			defer l.calls.Done()
			_, err := l.issue(ctx, x)
			c <- err
		}()
		return cancel, c
	}
	a, b := askFor("a", time.Hour), askFor("b", time.Hour)
	l.put(b) // there already, so that both are in one call
	cancelA, errA := ask(a)
	if got := fmt.Sprint(<-came); got != "[a b]" && got != "[b a]" {
		t.Fatalf("called with %s", got)
	}
	cancelA()
	if err := <-errA; api.ReasonOf(err) != api.Canceled {
		t.Errorf("who gave up: %v", err)
	}
	select {
	case <-left:
		t.Error("the call ended with one of two")
	default:
	}
	if !l.giveUp(b) {
		t.Error("the other was answered")
	}
	<-left
	l.calls.Wait()

	// Who waits for a call that there may not be leaves nothing behind.
	l.asks.mu.Lock()
	l.asks.calls = maxCalls
	l.asks.mu.Unlock()
	cancelC, errC := ask(askFor("c", 0))
	cancelC()
	if err := <-errC; api.ReasonOf(err) != api.Canceled {
		t.Errorf("who gave up: %v", err)
	}
	l.calls.Wait()
	if len(l.asks.waiting) != 0 {
		t.Errorf("%s wait still", names(l.asks.waiting))
	}
}

// Each of a call has its own answer; what is wrong with a call is so for all of it.
func TestAsksAnswers(t *testing.T) {
	refused := &apiv1.IssueResult{Result: &apiv1.IssueResult_Refusal{Refusal: &apiv1.Refusal{Reason: string(api.PodUnknown)}}}
	good := &apiv1.IssueResult{Result: &apiv1.IssueResult_Svid{Svid: &apiv1.SVID{SpiffeId: "x"}}}
	for _, tt := range []struct {
		name string
		resp *apiv1.IssueResponse
		err  error
		want [2]api.Reason
	}{
		{"each its own", &apiv1.IssueResponse{Results: []*apiv1.IssueResult{refused, good}}, nil, [2]api.Reason{api.PodUnknown, ""}},
		{"too few", &apiv1.IssueResponse{Results: []*apiv1.IssueResult{good}}, nil, [2]api.Reason{api.SVIDRejected, api.SVIDRejected}},
		{"too many", &apiv1.IssueResponse{Results: []*apiv1.IssueResult{good, good, good}}, nil, [2]api.Reason{api.SVIDRejected, api.SVIDRejected}},
		{"nothing", &apiv1.IssueResponse{Results: []*apiv1.IssueResult{{}, good}}, nil, [2]api.Reason{api.SVIDRejected, ""}},
		{"refused as a whole", nil, api.ToStatus(api.E(api.BatchSize, "no")).Err(), [2]api.Reason{api.CAUnavailable, api.CAUnavailable}},
		{"sent away as a whole", nil, api.ToStatus(&api.Error{Reason: api.Overloaded, RetryAfter: time.Second}).Err(), [2]api.Reason{api.Overloaded, api.Overloaded}},
		{"broken", nil, errors.New("broken"), [2]api.Reason{api.Internal, api.Internal}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := &link{client: stubCA{issue: func(context.Context, *apiv1.IssueRequest) (*apiv1.IssueResponse, error) { return tt.resp, tt.err }}}
			all := []*ask{askFor("a", 0), askFor("b", 0)}
			for _, x := range all {
				l.put(x)
			}
			l.send(false)
			l.calls.Wait()
			for i, x := range all {
				<-x.answered
				if tt.want[i] == "" && (x.err != nil || x.svid == nil) || tt.want[i] != "" && (x.svid != nil || api.ReasonOf(x.err) != tt.want[i]) {
					t.Errorf("request %d: %v, want %s", i, x.err, tt.want[i])
				}
			}
			if l.asks.calls != 0 || l.asks.relaxed != 0 {
				t.Errorf("%d calls and %d relaxed ones are left", l.asks.calls, l.asks.relaxed)
			}
		})
	}
}
