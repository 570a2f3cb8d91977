package agent_test

import (
	"context"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/audit"
)

// cluster is an API server with its kubelets: while it is away nobody gets a fresh token, and the CA sees nothing.
type cluster struct {
	s *catest.Server

	mu     sync.Mutex
	away   bool
	tokens map[string]attestor.Evidence // by pod UID
	since  map[string]time.Time
}

func newCluster(s *catest.Server) *cluster {
	return &cluster{s: s, tokens: map[string]attestor.Evidence{}, since: map[string]time.Time{}}
}

func (c *cluster) lose() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away = true
	c.s.Pods.Lose()
}

func (c *cluster) back() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away = false
	c.s.Pods.Fail(nil)
}

// token is the token that a pod has now: kubelet replaces it at 80 % of its life, if it can.
func (c *cluster) token(p attestortest.Pod, audience string) attestor.Evidence {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, had := c.since[p.UID]
	if !had || !c.away && time.Since(at) >= tokenLife*8/10 {
		c.tokens[p.UID], c.since[p.UID] = c.s.Evidence(p, audience, tokenLife), time.Now()
	}
	return c.tokens[p.UID]
}

// kubelet runs the agent of a node with what kubelet gives it.
func (c *cluster) kubelet(t *testing.T, pod attestortest.Pod, cache agent.Cache) *node {
	t.Helper()
	return startNode(t, c.s, here, func(cfg *agent.Config) {
		cfg.Cache = cache
		cfg.Prover = proverFunc(func(context.Context) (attestor.Evidence, error) {
			return c.token(pod, api.AgentAudience(c.s.TD)), nil
		})
	})
}

// volume is a pod with a volume: kubelet brings its token every few minutes, fresh or not at all.
type volume struct {
	c   *cluster
	n   *node
	pod attestortest.Pod
	id  *agent.Identity
}

func (c *cluster) volume(n *node, name string) *volume {
	n.t.Helper()
	v := &volume{c: c, n: n, pod: c.s.Pod("shop", name, "web", here)}
	v.publish(n.Offer)
	return v
}

func (v *volume) publish(to func(context.Context, attestor.Evidence, agent.Owner, string) (*agent.Identity, error)) {
	v.n.t.Helper()
	of := agent.Owner{Pod: agent.Pod{Namespace: v.pod.Namespace, Name: v.pod.Name, UID: v.pod.UID}, ServiceAccount: v.pod.ServiceAccount, Node: here}
	id, err := to(v.n.t.Context(), v.c.token(v.pod, api.WorkloadAudience(v.c.s.TD)), of, "csi")
	if err != nil {
		v.n.t.Fatalf("kubelet's token is refused: %v", err)
	}
	if v.id != nil && v.id == id {
		id.Release()
	}
	v.id = id
}

func graced(c *ca.Config) { c.Grace = 4 * time.Hour }

// The API server is away for three hours, with tokens and SVIDs of one: nothing that was known is ever without an SVID, over
// restarts of agent and CA; a new pod waits; and half a minute after its return everything is as ever.
//
// threat: G03
func TestAPIServerAway(t *testing.T) {
	bubble(t, catest.Options{Config: graced}, func(t *testing.T, s *catest.Server) {
		c, cache := newCluster(s), newMemory()
		own := s.AgentPod(here)
		n := c.kubelet(t, own, cache)
		v := c.volume(n, "volume")
		proxy := newWorkload(s, "proxy", here) // without a volume, over the shared socket
		admit := func() *agent.Identity {
			t.Helper()
			id, until, err := n.Admit(t.Context(), c.token(proxy.pod, api.WorkloadAudience(s.TD)), "shared")
			if err != nil {
				t.Fatalf("the proxy is not admitted: %v", err)
			}
			if left := time.Until(until); left <= 0 || left > tokenLife {
				t.Fatalf("admitted for %s", left)
			}
			return id
		}
		shared := admit()
		await(t, v.id, time.Minute, "SVID", hasSVID)
		await(t, shared, time.Minute, "SVID", hasSVID)
		time.Sleep(10 * time.Minute)
		c.lose()
		lost := time.Now()
		time.Sleep(time.Minute)
		stranger := newWorkload(s, "new", here) // a token of moments ago
		waiting, _, err := n.Admit(t.Context(), stranger.token(12*time.Hour), "shared")
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for i := 0; time.Since(lost) < 3*time.Hour; i++ {
			time.Sleep(5 * time.Minute)
			switch i {
			case 20: // tokens have long expired
				n.stop()
				n = c.kubelet(t, own, cache)
				v.n = n
				v.publish(n.Resume)
				waiting, _, err = n.Admit(t.Context(), stranger.token(12*time.Hour), "shared")
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute) // the CA tells which cluster is away
			case 25:
				s.Stop()
				s.Start()
				s.WaitReady()
				time.Sleep(2 * time.Minute) // it has not seen the cluster since it was started
			}
			shared = admit()
			for _, id := range []*agent.Identity{v.id, shared} {
				h := id.Held().Load()
				if h.SVID == nil {
					t.Fatalf("%s after the loss %s has no SVID: %v", time.Since(lost), id.Pod().Name, h.Refusal)
				}
				seen[serial(h)] = true
			}
			if h := waiting.Held().Load(); h.SVID != nil || h.Refused() != nil || h.Refusal == nil || h.Refusal.Reason != api.DirectoryUnavailable {
				t.Fatalf("a new pod has an SVID %t, its refusal is %v", h.SVID != nil, h.Refusal)
			}
		}
		if len(seen) < 12 {
			t.Errorf("%d SVIDs in three hours", len(seen))
		}
		if got := n.metric("signet_agent_expired_total"); got != 0 {
			t.Errorf("%v SVIDs expired", got)
		}
		marked := marks(t, s)
		if marked[audit.KindIssue] < 10 || marked[audit.KindAttestAgent] < 3 {
			t.Errorf("marked on record: %v", marked)
		}

		c.back()
		back := time.Now()
		await(t, waiting, 31*time.Second, "SVID", hasSVID)
		v.publish(n.Offer) // kubelet has fresh tokens again
		admit()
		time.Sleep(time.Minute)
		marked = marks(t, s)
		last := map[*agent.Identity]agent.Held{v.id: v.id.Held().Load(), shared: shared.Held().Load()}
		for id, was := range last {
			await(t, id, svidLife, "renewal", another(was))
		}
		if again := marks(t, s); again[audit.KindIssue] != marked[audit.KindIssue] || again[audit.KindAttestAgent] != marked[audit.KindAttestAgent] {
			t.Errorf("%s after the return: marked %v, before %v", time.Since(back), again, marked)
		}
	})
}

// An agent whose pod was replaced a moment before the API server goes away is renewed as the pod that it is now: what it took
// over from the one before says another pod.
//
// threat: G03
func TestAPIServerAwayAfterRollout(t *testing.T) {
	bubble(t, catest.Options{Config: graced}, func(t *testing.T, s *catest.Server) {
		c, cache := newCluster(s), newMemory()
		before, after := s.AgentPod(here), s.AgentPod(here)
		if before.UID == after.UID {
			t.Fatal("both are one pod")
		}
		n := c.kubelet(t, before, cache)
		v := c.volume(n, "volume")
		await(t, v.id, time.Minute, "SVID", hasSVID)
		time.Sleep(5 * time.Minute)
		n.stop()
		s.Pods.Remove(before)
		n = c.kubelet(t, after, cache)
		v.n = n
		v.publish(n.Resume)
		time.Sleep(time.Minute)
		c.lose()
		for lost := time.Now(); time.Since(lost) < 3*time.Hour; time.Sleep(5 * time.Minute) {
			if h := v.id.Held().Load(); h.SVID == nil {
				t.Fatalf("%s after the loss its pod has no SVID: %v", time.Since(lost), h.Refusal)
			}
		}
		if marked := marks(t, s); marked[audit.KindAttestAgent] < 3 {
			t.Errorf("marked on record: %v", marked)
		}
		for _, text := range []string{"no session with the CA", "own identity not renewed, keeping it"} {
			for _, e := range n.log.find(text, api.TicketMismatch) {
				t.Errorf("it showed a ticket that is not its own: %v", e)
			}
		}
	})
}

// marks counts what was issued by the rule of known renewals.
func marks(t *testing.T, s *catest.Server) map[audit.Kind]int {
	t.Helper()
	n := map[audit.Kind]int{}
	for r, err := range audit.Scan(filepath.Join(s.Dir, "ledger")) {
		if err != nil {
			t.Fatal(err)
		}
		if r.Grace {
			n[r.Kind]++
		}
	}
	return n
}

// Where the rule is off, or its grace over, what is held is served until it expires, and is there again after the return.
//
// threat: K03
func TestAPIServerAwayTooLong(t *testing.T) {
	for name, grace := range map[string]time.Duration{"off": 0, "over": time.Hour} {
		t.Run(name, func(t *testing.T) {
			bubble(t, catest.Options{Config: func(c *ca.Config) { c.Grace = grace }}, func(t *testing.T, s *catest.Server) {
				c := newCluster(s)
				n := c.kubelet(t, s.AgentPod(here), nil)
				v := c.volume(n, "volume")
				v.id.Report(1, &apiv1.Stream{Id: 1})
				await(t, v.id, time.Minute, "SVID", hasSVID)
				time.Sleep(time.Minute)
				c.lose()
				lost := time.Now()
				end := await(t, v.id, 10*time.Hour, "end", lostSVID)
				if held := time.Since(lost); held > grace+svidLife || held < grace {
					t.Errorf("an SVID was there for %s", held)
				}
				if end.Refused() != nil {
					t.Errorf("its pod is refused with %v", end.Refused())
				}
				time.Sleep(time.Hour)
				c.back()
				v.publish(n.Offer)
				await(t, v.id, 2*time.Minute, "SVID", hasSVID)
			})
		})
	}
}

// A token that has expired opens nothing on the shared socket that is not held already, and nothing at all while the cluster is
// there.
func TestAdmitLate(t *testing.T) {
	bubble(t, catest.Options{Config: graced}, func(t *testing.T, s *catest.Server) {
		c := newCluster(s)
		n := c.kubelet(t, s.AgentPod(here), nil)
		w, other := newWorkload(s, "web-1", here), newWorkload(s, "web-2", here)
		brief := w.token(20 * time.Minute)
		earlier := w.token(5 * time.Minute)
		await(t, n.admit(w), time.Minute, "SVID", hasSVID)
		late, far := other.token(20*time.Minute), newWorkload(s, "web-3", elsewhere).token(20*time.Minute)
		time.Sleep(10 * time.Minute)
		reasonOf := func(e attestor.Evidence) api.Reason {
			_, _, err := n.Admit(t.Context(), e, "shared")
			if err == nil {
				return ""
			}
			return api.ReasonOf(err)
		}
		if got := reasonOf(earlier); got != api.TokenExpired {
			t.Errorf("an expired token while the cluster is there: %q", got)
		}
		c.lose()
		time.Sleep(time.Minute)
		if got := reasonOf(brief); got != "" {
			t.Errorf("a token that is good: %q", got)
		}
		time.Sleep(20 * time.Minute)
		for _, tt := range []struct {
			name  string
			token attestor.Evidence
			want  api.Reason
		}{
			{"expired since", brief, ""},
			{"expired before", earlier, api.TokenExpired},
			{"expired, of a pod that holds nothing", late, api.TokenExpired},
			{"expired, of another node", far, api.NodeMismatch},
			{"expired, for another audience", s.Evidence(w.pod, "vault", time.Second), api.TokenAudience},
		} {
			if got := reasonOf(tt.token); got != tt.want {
				t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
			}
		}
		c.back()
		time.Sleep(time.Minute)
		if got := reasonOf(brief); got != api.TokenExpired {
			t.Errorf("after the return: %q", got)
		}
	})
}
