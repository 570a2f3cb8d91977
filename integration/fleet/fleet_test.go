package fleet

import (
	"context"
	"flag"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

const (
	tokenLife    = time.Hour
	tokenRefresh = tokenLife * 8 / 10 // as kubelet does
)

// kubelet keeps the token of a pod fresh, as kubelet does for a projected volume.
type kubelet struct {
	server   *catest.Server
	pod      attestortest.Pod
	audience string

	mu    sync.Mutex
	token attestor.Evidence
}

// Prove implements attestor.Prover for the agent's own token.
func (k *kubelet) Prove(context.Context) (attestor.Evidence, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.token, nil
}

func (k *kubelet) refresh() attestor.Evidence {
	e := k.server.Evidence(k.pod, k.audience, tokenLife)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.token = e
	return e
}

// node is one agent with one workload.
type node struct {
	agent    *agent.Agent
	workload *kubelet
	own      *kubelet

	mu      sync.Mutex
	renewed []time.Duration // part of the SVID's life at which each renewal came, as a duration of that life
	serials map[string]bool
	gaps    int // times that an SVID had expired before its successor was there
}

func newNode(t *testing.T, s *catest.Server, i int, change func(*agent.Config)) *node {
	name := fmt.Sprintf("node-%03d", i)
	n := &node{serials: map[string]bool{}}
	n.own = &kubelet{server: s, pod: s.AgentPod(name), audience: api.AgentAudience(s.TD)}
	n.own.refresh()
	n.workload = &kubelet{server: s, pod: s.Pod("shop", "web-"+name, "web", name), audience: api.WorkloadAudience(s.TD)}
	cfg := agent.Config{
		TrustDomain: s.TD, Dial: s.Dial, Trust: firstTrust(t, s), Prover: n.own, Verifier: attestor.ByKeySets,
		Keepalive: time.Hour, ReportEvery: time.Minute, // months of idle connections are not what is tested
	}
	if change != nil {
		change(&cfg)
	}
	a, err := agent.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.agent = a
	return n
}

func firstTrust(t *testing.T, s *catest.Server) *agent.Trust {
	b := s.CA().Bundle()
	trust, err := agent.NewTrust(b.TrustDomain, b.Generation, b.Roots)
	if err != nil {
		t.Fatal(err)
	}
	return trust
}

// live refreshes tokens and admits the workload with each, as a proxy does whose stream ends with its token, and watches
// what is held.
func (n *node) live(ctx context.Context, t *testing.T) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { n.agent.Run(ctx) })
	var id *agent.Identity
	for ctx.Err() == nil {
		n.own.refresh()
		e := n.workload.refresh()
		got, _, err := n.agent.Admit(ctx, e, "shared")
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			t.Errorf("the workload was not admitted: %v", err)
			return
		}
		if id == nil {
			id = got
			wg.Go(func() { n.watch(ctx, id) })
		} else if id != got {
			t.Error("the same pod got a second identity")
		}
		select {
		case <-ctx.Done():
		case <-time.After(tokenRefresh):
		}
	}
}

func (n *node) watch(ctx context.Context, id *agent.Identity) {
	var last agent.Held
	for {
		h, changed := id.Held().Get()
		n.observe(last, h)
		if h.SVID != nil {
			last = h
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

func (n *node) observe(last, h agent.Held) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if last.SVID == nil {
		return
	}
	old := last.SVID.Certificates[0]
	if h.SVID == nil || !time.Now().Before(old.NotAfter) {
		n.gaps++
		return
	}
	leaf := h.SVID.Certificates[0]
	if leaf.SerialNumber.Cmp(old.SerialNumber) == 0 {
		return
	}
	n.serials[leaf.SerialNumber.String()] = true
	n.renewed = append(n.renewed, time.Hour-time.Until(old.NotAfter))
}

// How long TestFleet lets its agents live. Thirty days take minutes, nearly all of it elliptic curves; agent.TestMonth lives
// through them in seconds without.
var fleetDays = flag.Int("days", 2, "fake days of TestFleet")

// TestFleet lets fifty agents live with hourly SVIDs, everything real but time and the network: nothing expires, and renewals
// are spread evenly.
func TestFleet(t *testing.T) {
	const agents = 50
	days := *fleetDays
	synctest.Test(t, func(t *testing.T) {
		s := catest.New(t, catest.Options{
			Config: func(c *ca.Config) {
				c.SessionAge, c.AgentTTL = 24*time.Hour, 24*time.Hour // handshakes are not what is measured here,
			},
			Server: []grpc.ServerOption{grpc.KeepaliveParams(keepalive.ServerParameters{Time: 24 * time.Hour})}, // nor are pings
		})
		s.WaitReady()
		ctx, cancel := context.WithCancel(t.Context())
		nodes := make([]*node, agents)
		var wg sync.WaitGroup
		for i := range nodes {
			nodes[i] = newNode(t, s, i, nil)
			wg.Go(func() { nodes[i].live(ctx, t) })
		}
		time.Sleep(time.Duration(days) * 24 * time.Hour)
		cancel()
		wg.Wait()
		judge(t, nodes, days)
	})
}

func judge(t *testing.T, nodes []*node, days int) {
	const buckets = 8
	var spread [buckets]int
	total := 0
	for i, n := range nodes {
		if n.gaps > 0 {
			t.Errorf("node %d: %d SVIDs expired before their successor was there", i, n.gaps)
		}
		if len(n.serials) < days*24*3/2 {
			t.Errorf("node %d: %d renewals in %d days of hourly SVIDs, want at least %d", i, len(n.serials), days, days*24*3/2)
		}
		for _, at := range n.renewed {
			// Renewal is drawn evenly from 30 to 50 % of the life.
			part := at.Seconds() / time.Hour.Seconds()
			b := int((part - 0.3) / 0.2 * buckets)
			if part < 0.299 || part > 0.501 {
				t.Fatalf("node %d renewed at %.3f of the life, want 0.3 to 0.5", i, part)
			}
			spread[min(max(b, 0), buckets-1)]++
			total++
		}
	}
	want := total / buckets
	for b, n := range spread {
		if n < want*80/100 || n > want*120/100 {
			t.Errorf("renewals are not spread evenly: bucket %d has %d of %d, want about %d: %v", b, n, total, want, spread)
		}
	}
	t.Logf("%d renewals in %d days by %d agents, spread %v, 0 expired", total, days, len(nodes), spread)
}
