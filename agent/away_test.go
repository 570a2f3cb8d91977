package agent_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca/catest"
)

// While the CA is away an SVID is served until it expires and not a moment longer; then its workload waits, unrefused, and
// is served again when the CA is back.
//
// threat: D15
func TestCAAway(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		w := newWorkload(s, "web-1", here)
		id, _ := n.keepFresh(w)
		id.Report(1, &apiv1.Stream{Id: 1})
		first := await(t, id, time.Second, "SVID", hasSVID)
		s.Stop()
		for time.Now().Before(notAfter(first)) {
			if id.Held().Load().SVID != first.SVID {
				t.Fatalf("%s before its end the SVID is not held", time.Until(notAfter(first)))
			}
			if len(n.NotReady()) > 0 {
				t.Fatalf("not ready, though an SVID is held: %q", n.NotReady())
			}
			time.Sleep(min(time.Second, time.Until(notAfter(first))-time.Nanosecond))
			if time.Until(notAfter(first)) == time.Nanosecond {
				break
			}
		}
		if id.Held().Load().SVID == nil {
			t.Error("the SVID was dropped before its end")
		}
		time.Sleep(time.Nanosecond)
		await(t, id, time.Nanosecond, "end", lostSVID)
		if n.metric("signet_agent_expired_total") != 1 || n.metric("signet_agent_connected") != 0 || len(n.NotReady()) != 1 {
			t.Errorf("expired %v, connected %v, not ready %q", n.metric("signet_agent_expired_total"), n.metric("signet_agent_connected"), n.NotReady())
		}
		time.Sleep(3 * time.Hour)
		if h := id.Held().Load(); h.Refused() != nil {
			t.Errorf("a workload whose CA is away is refused with %v", h.Refused())
		}
		if n.admit(w) != id {
			t.Error("the same pod got a second identity")
		}
		s.Start()
		await(t, id, 2*time.Minute, "SVID", hasSVID)
		if len(n.NotReady()) != 0 || n.metric("signet_agent_connected") != 1 {
			t.Errorf("the CA is back: connected %v, not ready %q", n.metric("signet_agent_connected"), n.NotReady())
		}
	})
}

// A restart while the CA is away loses nothing where there is a cache, and gains nothing for anybody else.
//
// threat: D16
func TestRestartWhileAway(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		cache := newMemory()
		withCache := func(c *agent.Config) { c.Cache = cache }
		n := startNode(t, s, here, withCache)
		w, other := newWorkload(s, "web-1", here), newWorkload(s, "web-2", here)
		first := await(t, n.admit(w), time.Second, "SVID", hasSVID)
		n.stop()
		s.Stop()
		time.Sleep(10 * time.Minute)

		// The bundle file is not needed any more.
		n = startNode(t, s, here, withCache, func(c *agent.Config) { c.Trust = nil })
		if len(n.NotReady()) != 0 {
			t.Errorf("not ready: %q", n.NotReady())
		}
		began := time.Now()
		id := n.admit(w)
		h := id.Held().Load()
		if h.SVID == nil || serial(h) != serial(first) || time.Since(began) != 0 {
			t.Fatalf("after %s a restarted agent holds an SVID %t", time.Since(began), h.SVID != nil)
		}
		if !h.RenewAt.Equal(first.RenewAt) || h.SVID.ID != first.SVID.ID || id.Pod() != (agent.Pod{Namespace: "shop", Name: "web-1", UID: w.pod.UID}) {
			t.Errorf("restored %v of %v, renewed at %s", h.SVID.ID, id.Pod(), h.RenewAt)
		}
		if n.Trust().Load().Generation.String() != "1.1" {
			t.Errorf("restored the bundle of generation %s", n.Trust().Load().Generation)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		foreign, err := attestortest.NewIssuer(attestortest.Config{Issuer: catest.IssuerName})
		if err != nil {
			t.Fatal(err)
		}
		forged, err := foreign.Token(w.pod, api.WorkloadAudience(s.TD), tokenLife)
		if err != nil {
			t.Fatal(err)
		}
		sameName := w.pod
		sameName.UID = "00000000-0000-4000-8000-000000000000"
		for _, tt := range []struct {
			name  string
			token attestor.Evidence
			want  api.Reason
		}{
			{"forged", attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(forged)}, api.TokenSignature},
			{"expired", w.token(tokenLife, attestortest.Claim("iat", time.Now().Add(-2*time.Hour).Unix()), attestortest.Claim("exp", time.Now().Add(-time.Hour).Unix())), api.TokenExpired},
			{"of another node", newWorkload(s, "web-3", elsewhere).token(tokenLife), api.NodeMismatch},
			{"for another audience", s.Evidence(w.pod, "vault", tokenLife), api.TokenAudience},
		} {
			if _, _, err := n.Admit(ctx, tt.token, "shared"); api.ReasonOf(err) != tt.want {
				t.Errorf("a token %s is answered with %v, want %s", tt.name, err, tt.want)
			}
		}
		// Pods that the agent does not know wait; nobody gets what belongs to another pod, were it of the same name.
		stranger, _, err := n.Admit(ctx, s.Evidence(sameName, api.WorkloadAudience(s.TD), tokenLife), "shared")
		if err != nil {
			t.Fatal(err)
		}
		waiting := n.admit(other)
		time.Sleep(5 * time.Minute)
		for _, id := range []*agent.Identity{stranger, waiting} {
			if h := id.Held().Load(); h.SVID != nil || h.Refused() != nil {
				t.Errorf("pod %s got an SVID %t, was refused %v; want it to wait", id.Pod().UID, h.SVID != nil, h.Refused())
			}
		}
		s.Start()
		await(t, waiting, 2*time.Minute, "SVID", hasSVID)
		await(t, stranger, 2*time.Minute, "refusal", func(h agent.Held) bool { return h.Refused() != nil })
		await(t, id, 31*time.Minute, "renewal", another(first))
	})
}

// Without a cache nothing outlives the process.
func TestRestartWithoutCache(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		w := newWorkload(s, "web-1", here)
		await(t, n.admit(w), time.Second, "SVID", hasSVID)
		n.stop()
		n = newNode(t, s, here)
		if len(n.NotReady()) != 1 {
			t.Error("ready before it has anything")
		}
		n.start()
		await(t, n.admit(w), time.Second, "SVID", hasSVID)
	})
}

// After an outage longer than all SVIDs live, workloads do not come back in one blow.
//
// threat: K09
func TestReturnIsSpread(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		// The pods of a node come back together, with its session. So each node has one here, and there are so many nodes that
		// chance brings two fifths of them into one second less than once in 100,000 runs.
		var ids []*agent.Identity
		for i := range 20 {
			name := fmt.Sprint("node-", i)
			id, _ := startNode(t, s, name).keepFresh(newWorkload(s, fmt.Sprint("web-", i), name))
			id.Report(1, &apiv1.Stream{Id: 1})
			ids = append(ids, id)
		}
		time.Sleep(time.Minute)
		s.Stop()
		time.Sleep(svidLife)
		s.Start()
		back := time.Now()
		var after []time.Duration
		for _, id := range ids {
			h := await(t, id, 2*time.Minute, "SVID", hasSVID)
			after = append(after, h.SVID.Certificates[0].NotBefore.Sub(back))
		}
		slices.Sort(after)
		if last := time.Since(back); last > 2*time.Minute {
			t.Errorf("the last workload is back after %s", last)
		}
		busiest := 0
		for i := range after {
			j, _ := slices.BinarySearch(after, after[i]+time.Second)
			busiest = max(busiest, j-i)
		}
		if busiest > len(after)*2/5 {
			t.Errorf("%d of %d came back within one second: %v", busiest, len(after), after)
		}
	})
}
