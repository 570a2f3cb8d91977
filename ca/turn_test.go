package ca_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// slowly is an API server that says yes to every token, after a while.
type slowly struct {
	after time.Duration
	pods  sync.Map // by token
	jwks  []byte
	read  atomic.Bool // the key set; after that it hangs
	asked atomic.Int64
}

// RoundTrip implements http.RoundTripper.
func (s *slowly) RoundTrip(r *http.Request) (*http.Response, error) {
	if s.read.Swap(true) {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(s.jwks))}, nil
}

// ReviewToken implements attestor.TokenReviewer.
func (s *slowly) ReviewToken(ctx context.Context, token []byte, audience string) (attestor.TokenReview, error) {
	s.asked.Add(1)
	select {
	case <-time.After(s.after):
	case <-ctx.Done():
		return attestor.TokenReview{}, ctx.Err()
	}
	v, _ := s.pods.Load(string(token))
	p, _ := v.(attestortest.Pod)
	return attestor.TokenReview{
		Authenticated: true, Audiences: []string{audience}, Groups: []string{"system:serviceaccounts"},
		Username: "system:serviceaccount:" + p.Namespace + ":" + p.ServiceAccount, UID: p.ServiceAccountUID,
	}, nil
}

// reviewed is a CA on two cores whose API server takes its time; f runs in fake time.
func reviewed(t *testing.T, f func(t *testing.T, s *catest.Server, slow *slowly)) {
	t.Helper()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	catest.Bubble(t, func(t *testing.T) {
		slow := &slowly{after: 500 * time.Millisecond}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		s := catest.New(t, catest.Options{Config: func(cfg *ca.Config) {
			slow.jwks, _ = cfg.KeySets[catest.IssuerName].Snapshot()
			keys, err := attestor.NewKeySource(attestor.KeySourceConfig{Issuer: catest.IssuerName, URL: "https://api.test", Transport: slow})
			if err != nil {
				t.Fatal(err)
			}
			wg.Go(func() { keys.Run(ctx) })
			a, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{
				Issuers: map[string]attestor.Keys{catest.IssuerName: keys},
				Reviews: map[string]attestor.ReviewConfig{catest.IssuerName: {Reviewer: slow}},
			})
			if err != nil {
				t.Fatal(err)
			}
			cfg.Attestors = map[string]attestor.Attestor{api.EvidenceServiceAccount: a}
		}})
		s.WaitReady()
		f(t, s, slow)
		s.Stop()
	})
}

// TestNoAgentNoReview sends tokens of pods that are no agents, which any pod can have as many of as it likes: they are
// refused and recorded before the API server is asked, or agents would wait for its slots behind them.
//
// threat: J08
func TestNoAgentNoReview(t *testing.T) {
	reviewed(t, func(t *testing.T, s *catest.Server, slow *slowly) {
		n := &node{t: t, s: s, pod: s.Pod("shop", "web", "web", "node-1")}
		for range 10 {
			_, _, err := n.attest(nil)
			wantReason(t, err, api.NotAnAgent)
		}
		entries := listAudit(t, s.CA(), &apiv1.ListAuditRequest{Namespace: "shop"})
		if asked := slow.asked.Load(); asked != 0 || len(entries) != 1 || entries[0].GetReason() != string(api.NotAnAgent) || entries[0].GetPodUid() != n.pod.UID {
			t.Errorf("asked %d times, on record: %v", asked, entries)
		}
	})
}

// TestSlowReview has a whole fleet come at once to a CA on two cores, as when a cluster starts, while its API server takes
// half a second for each token. Nobody is sent away, and it takes as long as the bound of reviews allows: the turns, which
// are for work, are not spent on waiting.
func TestSlowReview(t *testing.T) {
	const fleet = 64
	t.Run("agents", func(t *testing.T) {
		reviewed(t, func(t *testing.T, s *catest.Server, slow *slowly) {
			began := time.Now()
			var wg sync.WaitGroup
			for i := range fleet {
				n := &node{t: t, s: s, pod: s.AgentPod(fmt.Sprint("node-", i))}
				wg.Go(func() {
					_, _, err := n.attest(func(r *apiv1.AttestAgentRequest) { slow.pods.Store(string(r.GetEvidence().GetData()), n.pod) })
					if err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("%d agents took %v", fleet, took)
			}
		})
	})
	t.Run("workloads", func(t *testing.T) {
		reviewed(t, func(t *testing.T, s *catest.Server, slow *slowly) {
			n := &node{t: t, s: s, pod: s.AgentPod("node-1")}
			resp, key, err := n.attest(func(r *apiv1.AttestAgentRequest) { slow.pods.Store(string(r.GetEvidence().GetData()), n.pod) })
			if err != nil {
				t.Fatal(err)
			}
			n.svid = svidOf(t, resp.GetChain(), key)
			hello := n.hello()
			slow.pods.Store(string(hello.GetHello().GetEvidence().GetData()), n.pod)
			l, err := n.connect(hello)
			if err != nil {
				t.Fatal(err)
			}
			items := make([]*apiv1.IssueItem, fleet)
			for i := range items {
				pod := s.Pod("shop", fmt.Sprint("web-", i), fmt.Sprint("web-", i), "node-1")
				items[i] = n.item(pod)
				slow.pods.Store(string(items[i].GetEvidence().GetData()), pod)
			}
			began := time.Now()
			result, err := l.client.Issue(t.Context(), &apiv1.IssueRequest{Items: items})
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range result.GetResults() {
				if err := refusal(r); err != nil {
					t.Error(err)
				}
			}
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("%d workloads took %v", fleet, took)
			}
		})
	})
}

// TestSlowKeys lets an agent in soon, while a crowd whose tokens name keys that nobody knows waits for a key set that
// cannot be read.
//
// threat: A20, J08
func TestSlowKeys(t *testing.T) {
	reviewed(t, func(t *testing.T, s *catest.Server, slow *slowly) {
		stranger := &node{t: t, s: s, pod: s.AgentPod("node-9")}
		var wg sync.WaitGroup
		for range 64 {
			e := stranger.token(stranger.pod, api.AgentAudience(s.TD), func(d *attestortest.Draft) { d.Header["kid"] = "nobody's" })
			wg.Go(func() {
				_, _, err := stranger.attest(func(r *apiv1.AttestAgentRequest) { r.Evidence = e })
				if api.ReasonOf(err) != api.TokenSignature {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		began := time.Now()
		n := &node{t: t, s: s, pod: s.AgentPod("node-1")}
		slow.after = 0
		if _, _, err := n.attest(func(r *apiv1.AttestAgentRequest) { slow.pods.Store(string(r.GetEvidence().GetData()), n.pod) }); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 4*time.Second { // two waits for a key set, as the crowd has the same address
			t.Errorf("the agent's SVID took %v", took)
		}
		wg.Wait()
	})
}
