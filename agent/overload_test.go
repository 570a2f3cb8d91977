package agent_test

import (
	"crypto"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// What is due at the same moment is renewed in few calls, the most urgent first, and the CA is told how long what is held lasts.
func TestRenewedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pods = 100
		f := newFake(t, replicaID)
		var mu sync.Mutex
		var calls [][]*apiv1.IssueItem
		f.call = func(r *apiv1.IssueRequest) error {
			mu.Lock()
			defer mu.Unlock()
			calls = append(calls, r.GetItems())
			return nil
		}
		began := time.Now()
		f.issue = func(_ *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error) {
			s := f.good(pub)
			s.RenewAt = timestamppb.New(began.Add(20 * time.Minute))
			return results(s), nil
		}
		n := f.start()
		var all []*agent.Identity
		for i := range pods {
			all = append(all, f.admit(n, fmt.Sprint("web-", i)))
		}
		var first []agent.Held
		for _, id := range all {
			first = append(first, await(t, id, time.Minute, "SVID", hasSVID))
		}
		mu.Lock()
		for _, items := range calls {
			for _, x := range items {
				if x.GetHoldsUntil() == nil || x.GetHoldsUntil().AsTime().Unix() != 0 {
					t.Errorf("for a pod that holds nothing the CA is told %v", x.GetHoldsUntil())
				}
			}
		}
		calls = nil
		mu.Unlock()
		for i, id := range all {
			await(t, id, 21*time.Minute, "renewal", another(first[i]))
		}
		mu.Lock()
		defer mu.Unlock()
		got := 0
		for _, items := range calls {
			var last time.Time
			for _, x := range items {
				until := x.GetHoldsUntil().AsTime()
				if until.Before(last) || until.Before(began.Add(59*time.Minute)) || until.After(began.Add(61*time.Minute)) {
					t.Errorf("the CA is told that what is held lasts until %s, after %s", until, last)
				}
				last = until
			}
			got += len(items)
		}
		if got != pods || len(calls) > 10 {
			t.Errorf("%d requests in %d calls, want %d in few", got, len(calls), pods)
		}
	})
}

// Who is sent away comes back when the CA says, for that one identity, as often as it is sent away; never at once, and never so
// late that what is held would end for it.
//
// threat: D18
func TestSentAway(t *testing.T) {
	for _, tt := range []struct {
		name        string
		after       time.Duration
		held        bool // an SVID, which is good for 40 minutes still
		least, most time.Duration
	}{
		{"as the CA says", 7 * time.Second, false, 7 * time.Second, 8 * time.Second},
		{"at once", time.Nanosecond, false, 125 * time.Millisecond, 30 * time.Second}, // of its own backoff
		{"never", 10000 * time.Hour, false, 5 * time.Minute, 6 * time.Minute},
		{"never, for an SVID", 10000 * time.Hour, true, time.Second / 4, 5 * time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, replicaID)
				var mu sync.Mutex
				var asked []time.Time
				sick := ""
				f.issue = func(x *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error) {
					mu.Lock()
					defer mu.Unlock()
					if sick == "" && !tt.held {
						sick = string(x.GetEvidence().GetData())
					}
					if string(x.GetEvidence().GetData()) != sick {
						return results(f.good(pub)), nil
					}
					asked = append(asked, time.Now())
					return &apiv1.IssueResponse{Results: []*apiv1.IssueResult{{Result: &apiv1.IssueResult_Refusal{
						Refusal: &apiv1.Refusal{Reason: string(api.Overloaded), RetryAfter: durationpb.New(tt.after)}}}}}, nil
				}
				n := f.start()
				id := f.admit(n, "sick")
				if tt.held {
					await(t, id, time.Minute, "SVID", hasSVID)
					f.set(func() {
						old := f.issue
						f.issue = func(x *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error) {
							mu.Lock()
							sick = string(x.GetEvidence().GetData())
							mu.Unlock()
							return old(x, pub)
						}
					})
					h := id.Held().Load()
					time.Sleep(time.Until(notAfter(h)) - time.Second)
					mu.Lock()
					defer mu.Unlock()
					if id.Held().Load().SVID == nil || len(asked) < 12 || time.Since(asked[len(asked)-1]) > time.Minute {
						t.Errorf("asked %d times, last %s before the SVID's end", len(asked), notAfter(h).Sub(asked[len(asked)-1]))
					}
					checkGaps(t, asked, tt.least, tt.most)
					return
				}
				await(t, id, time.Minute, "refusal", func(h agent.Held) bool { return h.Refusal != nil })
				if h := id.Held().Load(); h.Refused() != nil {
					t.Errorf("the workload is told %v, want it to wait", h.Refused())
				}
				await(t, f.admit(n, "well"), time.Minute, "SVID", hasSVID)
				time.Sleep(5 * tt.most)
				mu.Lock()
				defer mu.Unlock()
				if len(asked) < 4 {
					t.Errorf("asked %d times in %v", len(asked), 5*tt.most)
				}
				checkGaps(t, asked, tt.least, tt.most)
			})
		})
	}
}

// checkGaps wants each of these times so long after the one before.
func checkGaps(t *testing.T, at []time.Time, least, most time.Duration) {
	t.Helper()
	for i := range at[min(1, len(at)):] {
		if gap := at[i+1].Sub(at[i]); gap < least || gap > most+time.Second {
			t.Errorf("try %d came %v after the one before, want %v to %v", i+2, gap, least, most)
		}
	}
}
