package agent_test

import (
	"bytes"
	"crypto"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// A request that the CA does not come to an end with takes its neighbours along once, and not again.
func TestUnansweredAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, replicaID)
		began := time.Now()
		var mu sync.Mutex
		var sick []byte
		f.issue = func(x *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error) {
			mu.Lock()
			defer mu.Unlock()
			if sick == nil {
				sick = x.GetEvidence().GetData()
			}
			s := f.good(pub)
			s.RenewAt = timestamppb.New(began.Add(20 * time.Minute)) // all at once, then half of what is left
			return results(s), nil
		}
		// All that failed come back within the time for which they wait for others.
		n := f.start(func(c *agent.Config) { c.MinBackoff, c.MaxBackoff = time.Millisecond, 5*time.Millisecond })
		all := []*agent.Identity{f.admit(n, "sick")}
		first := []agent.Held{await(t, all[0], time.Minute, "SVID", hasSVID)}
		for i := range 20 {
			all = append(all, f.admit(n, fmt.Sprint("web-", i)))
			first = append(first, await(t, all[i+1], time.Minute, "SVID", hasSVID))
		}
		var calls []int // with the sick one: how many are in them
		f.set(func() {
			f.call = func(r *apiv1.IssueRequest) error {
				mu.Lock()
				defer mu.Unlock()
				if slices.ContainsFunc(r.GetItems(), func(x *apiv1.IssueItem) bool { return bytes.Equal(x.GetEvidence().GetData(), sick) }) {
					calls = append(calls, len(r.GetItems()))
				}
				return nil
			}
			well := f.issue
			f.issue = func(x *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error) {
				if bytes.Equal(x.GetEvidence().GetData(), sick) {
					return nil, nil // never
				}
				return well(x, pub)
			}
		})
		time.Sleep(time.Until(began.Add(20*time.Minute + time.Second)))
		for i, id := range all[1:] {
			await(t, id, 15*time.Second, "renewal", another(first[i+1]))
		}
		time.Sleep(time.Minute)
		mu.Lock()
		defer mu.Unlock()
		if len(calls) < 4 || calls[0] < 2 {
			t.Fatalf("the calls with it were for %d, want several, the first of them with neighbours", calls)
		}
		for _, n := range calls[1:] {
			if n != 1 {
				t.Errorf("the calls with it were for %d, want none but the first with neighbours", calls)
			}
		}
		if all[0].Held().Load().SVID == nil {
			t.Error("what it held is gone")
		}
	})
}

// However often the CA has failed, the tries come the closer the nearer the end of what is held is.
func TestTriesBeforeTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, replicaID)
		n := f.start()
		id := f.admit(n, "web")
		end := notAfter(await(t, id, time.Minute, "SVID", hasSVID))
		var mu sync.Mutex
		var asked []time.Time
		f.set(func() {
			f.issue = func(*apiv1.IssueItem, crypto.PublicKey) (*apiv1.IssueResponse, error) {
				mu.Lock()
				defer mu.Unlock()
				asked = append(asked, time.Now())
				return nil, status.Error(codes.Unavailable, "away")
			}
		})
		await(t, id, 2*time.Hour, "end", lostSVID)
		mu.Lock()
		defer mu.Unlock()
		if len(asked) < 20 {
			t.Fatalf("asked %d times", len(asked))
		}
		for i, at := range asked {
			next := end
			if i+1 < len(asked) {
				next = asked[i+1]
			}
			if gap, most := next.Sub(at), max(250*time.Millisecond, end.Sub(at)/2)+50*time.Millisecond; gap > most && at.Before(end) {
				t.Errorf("try %d came %s before the end and %s before the next, want at most %s", i, end.Sub(at), gap, most)
			}
		}
	})
}

// A CA that sends an agent away for no time at all is asked as seldom as one that says nothing of it.
func TestSentAwayForNothing(t *testing.T) {
	for _, after := range []time.Duration{time.Nanosecond, time.Second - time.Nanosecond} {
		t.Run(after.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, replicaID)
				f.issue = func(*apiv1.IssueItem, crypto.PublicKey) (*apiv1.IssueResponse, error) {
					return &apiv1.IssueResponse{Results: []*apiv1.IssueResult{{Result: &apiv1.IssueResult_Refusal{
						Refusal: &apiv1.Refusal{Reason: string(api.Overloaded), RetryAfter: durationpb.New(after)}}}}}, nil
				}
				n := f.start()
				f.admit(n, "web")
				time.Sleep(10 * time.Minute)
				if got := f.asked.Load(); got < 10 || got > 100 { // with 30 s at most and 20 on average
					t.Errorf("asked %d times in ten minutes", got)
				}
			})
		})
	}
}

// A ticket that no CA reads is not sent to one: neither that of a workload nor the agent's own.
func TestTicketTooLarge(t *testing.T) {
	const dropped = "the CA's ticket is too large, doing without"
	for _, tt := range []struct {
		name string
		size int
		kept bool
	}{{"as large as may be", api.MaxTicketBytes, true}, {"larger", api.MaxTicketBytes + 1, false}} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, replicaID)
				f.attest = func(good *apiv1.AttestAgentResponse) (*apiv1.AttestAgentResponse, error) {
					good.Ticket = make([]byte, tt.size)
					return good, nil
				}
				f.issue = func(_ *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error) {
					s := f.good(pub)
					s.Ticket = make([]byte, tt.size)
					return results(s), nil
				}
				cache := newMemory()
				n := f.start(func(c *agent.Config) { c.Cache = cache })
				await(t, f.admit(n, "web"), time.Minute, "SVID", hasSVID)
				synctest.Wait()
				tickets := 0
				for _, entry := range cache.All() {
					tickets += bytes.Count(entry, []byte(`"ticket"`))
				}
				if said := len(n.log.find(dropped, "")); tt.kept && (tickets != 2 || said != 0) || !tt.kept && (tickets != 0 || said != 2) {
					t.Errorf("%d tickets are kept, and it is said of %d that they are not", tickets, said)
				}
			})
		})
	}
}

// When a session ends, whoever waits for a call of it waits for the next session instead.
func TestNotAskedAfterTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, replicaID)
		f.issue = func(*apiv1.IssueItem, crypto.PublicKey) (*apiv1.IssueResponse, error) { return nil, nil } // never
		n := f.start()
		var all []*agent.Identity
		for i := range 15 {
			all = append(all, f.admit(n, fmt.Sprint("web-", i)))
			synctest.Wait()
		}
		calls := f.asked.Load()
		f.push <- bundleMessage(bundle(0, 9, f.root)) // which ends it
		synctest.Wait()
		told := 0
		for _, id := range all {
			if e := id.Held().Load().Refusal; e != nil && e.Reason == api.CAUnavailable {
				told++
			}
		}
		if calls != 12 || told != 3 || f.asked.Load() != calls {
			t.Errorf("of %d with %d calls, %d know that there is no session; %d calls then", len(all), calls, told, f.asked.Load())
		}
		f.set(func() { f.issue = nil })
		for _, id := range all {
			await(t, id, time.Minute, "SVID", hasSVID)
		}
	})
}
