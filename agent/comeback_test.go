package agent_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/catest"
)

// wire is a network between an agent and its CA that can be cut.
type wire struct {
	s *catest.Server

	mu    sync.Mutex
	is    bool // cut
	conns []net.Conn
}

func (w *wire) dial(ctx context.Context) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.is {
		return nil, errors.New("the network is cut")
	}
	conn, err := w.s.Dial(ctx)
	if err == nil {
		w.conns = append(w.conns, conn)
	}
	return conn, err
}

func (w *wire) cut(is bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.is = is
	for _, c := range w.conns {
		c.Close()
	}
	w.conns = nil
}

// compromised has a root replaced in an emergency, and waits until it is gone.
func compromised(t *testing.T, admin apiv1.AdminClient, root string) {
	t.Helper()
	plan, err := admin.PlanRotation(t.Context(), &apiv1.PlanRotationRequest{Emergency: true, Compromised: root})
	if err != nil {
		t.Fatal(api.FromStatus(err))
	}
	r := &apiv1.EmergencyRotationRequest{Operation: "stolen", Compromised: root, Reason: "key on the net", Losing: plan.GetForecast().GetLosing()}
	if _, err := admin.EmergencyRotation(t.Context(), r); err != nil {
		t.Fatal(api.FromStatus(err))
	}
	if got := outcome(t, admin, "stolen", 10*time.Minute); got != "done" {
		t.Fatalf("it ended as %s", got)
	}
}

// isUnder reports whether an identity holds an SVID under a root.
func isUnder(h agent.Held, root string) bool {
	return h.SVID != nil && hex.EncodeToString(h.SVID.Certificates[1].AuthorityKeyId) == root
}

// TestBackAfterEmergency: an agent that was cut off while the root was removed under which it knew the CA takes the published bundle,
// and everything on its node is issued anew, long before it would have been due.
//
// threat: E16
func TestBackAfterEmergency(t *testing.T) {
	for _, tc := range []struct {
		name    string
		restart bool
	}{
		{"as it runs", false},
		{"restarted", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
				w, cache, file := &wire{s: s}, newMemory(), new(atomic.Bool) // file: the published bundle reaches the node
				change := func(c *agent.Config) {
					c.Dial, c.Cache = w.dial, cache
					c.Published = func() (*agent.Trust, error) {
						if file.Load() {
							return firstTrust(t, s), nil
						}
						return nil, errors.New("no such file")
					}
				}
				admin, old := adminOf(t, s), hex.EncodeToString(s.CA().Bundle().Roots[0].SubjectKeyId)
				n := startNode(t, s, here, change)
				pod := newWorkload(s, "web", here)
				id, _ := n.keepFresh(pod)
				await(t, id, time.Minute, "SVID", hasSVID)
				time.Sleep(5 * time.Second) // it reports
				w.cut(true)
				time.Sleep(5 * time.Second)
				compromised(t, admin, old)
				w.cut(false)
				time.Sleep(5 * time.Minute)
				if n.metric("signet_agent_connected") == 1 {
					t.Fatal("it believes a CA under a root that it has never heard of")
				}
				file.Store(true)
				if tc.restart {
					n.stop()
					n = startNode(t, s, here, change)
					id = n.admit(pod)
				}
				await(t, id, 2*time.Minute, "SVID under the new root", func(h agent.Held) bool { return h.SVID != nil && !isUnder(h, old) })
				if g := n.Trust().Load(); g.Generation != s.CA().Bundle().Generation || len(g.Bundle.X509Authorities()) != 1 {
					t.Errorf("it holds the bundle %s of %d roots", g.Generation, len(g.Bundle.X509Authorities()))
				}
			})
		})
	}
}

// TestPublishedIsOlder: what is published does not replace what is held unless it is of a higher generation, whoever answers.
func TestPublishedIsOlder(t *testing.T) {
	for _, tc := range []struct {
		name      string
		published func() (*agent.Trust, error)
	}{
		{"of the same generation", func() (*agent.Trust, error) {
			return agent.NewTrust(spiffeid.RequireTrustDomainFromString(domain), api.Generation{Epoch: 1, Number: 1}, []*x509.Certificate{newRoot(t).cert})
		}},
		{"without one", func() (*agent.Trust, error) {
			return agent.NewTrust(spiffeid.RequireTrustDomainFromString(domain), api.Generation{}, []*x509.Certificate{newRoot(t).cert})
		}},
		{"of a generation that nobody can have come to", func() (*agent.Trust, error) {
			return agent.NewTrust(spiffeid.RequireTrustDomainFromString(domain), api.FromSequence(1<<63), []*x509.Certificate{newRoot(t).cert})
		}},
		{"unreadable", func() (*agent.Trust, error) { return nil, errors.New("no such file") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
				other := catest.New(t, catest.Options{})
				other.WaitReady()
				n := startNode(t, s, here, func(c *agent.Config) { c.Dial, c.Published = other.Dial, tc.published })
				want := n.Trust().Load()
				time.Sleep(10 * time.Minute)
				if n.metric("signet_agent_connected") != 0 || n.Trust().Load() != want {
					t.Errorf("connected %v, holds %s", n.metric("signet_agent_connected"), n.Trust().Load().Generation)
				}
			})
		})
	}
}

// TestBackAfterRemoval: an agent that has the new root already, and is away while the old one is removed, comes back at once, though its
// own SVID is under the old one, and replaces what it holds under it.
//
// threat: E16
func TestBackAfterRemoval(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		w := &wire{s: s}
		admin, old := adminOf(t, s), hex.EncodeToString(s.CA().Bundle().Roots[0].SubjectKeyId)
		n := startNode(t, s, here, func(c *agent.Config) { c.Dial = w.dial })
		id, _ := n.keepFresh(newWorkload(s, "web", here))
		await(t, id, time.Minute, "SVID", hasSVID)
		time.Sleep(5 * time.Second)
		if _, err := admin.StartRotation(t.Context(), &apiv1.StartRotationRequest{Operation: "planned", Reason: "yearly"}); err != nil {
			t.Fatal(api.FromStatus(err))
		}
		until(t, time.Minute, "both roots", func() bool { return len(n.Trust().Load().Bundle.X509Authorities()) == 2 })
		w.cut(true)
		time.Sleep(5 * time.Second)
		compromised(t, admin, old)
		if !isUnder(id.Held().Load(), old) {
			t.Fatal("it was not away: its SVID was replaced")
		}
		w.cut(false)
		await(t, id, 2*time.Minute, "SVID under the new root", func(h agent.Held) bool { return h.SVID != nil && !isUnder(h, old) })
		if refused := id.Held().Load().Refusal; refused != nil {
			t.Errorf("refused: %v", refused)
		}
	})
}

// TestSignedBeforeOrder: what was signed under a compromised root and arrives after the order is asked for again soon, and ever more
// rarely where the CA goes on signing under it.
func TestSignedBeforeOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, replicaID)
		n := f.start()
		until(t, time.Minute, "session", func() bool { return n.metric("signet_agent_connected") == 1 })
		order := &apiv1.Reissue{RootKeyIds: []string{hex.EncodeToString(f.root.cert.SubjectKeyId)}, Within: durationpb.New(2 * time.Second)}
		f.push <- &apiv1.SessionResponse{Message: &apiv1.SessionResponse_Reissue{Reissue: order}}
		synctest.Wait()
		id := f.admit(n, "web-1")
		await(t, id, time.Minute, "SVID", hasSVID)
		began := f.asked.Load()
		time.Sleep(20 * time.Second)
		if f.asked.Load() == began {
			t.Error("what is under a compromised root is kept until it is due")
		}
		time.Sleep(40 * time.Minute)
		if asked := f.asked.Load() - began; asked > 60 {
			t.Errorf("asked %d times in 40 minutes", asked)
		}

		// Once it signs under another one all is as ever.
		next := newRoot(t)
		f.push <- bundleMessage(bundle(1, 2, f.root, next))
		f.set(func() {
			f.issue = func(_ *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error) {
				return results(&apiv1.SVID{Chain: next.svid(leaf(webID), pub), SpiffeId: webID}), nil
			}
		})
		await(t, id, time.Hour, "SVID under the other root", func(h agent.Held) bool { return isUnder(h, hex.EncodeToString(next.cert.SubjectKeyId)) })
		began = f.asked.Load()
		time.Sleep(10 * time.Minute)
		if f.asked.Load() != began {
			t.Error("what is under a good root is asked for again")
		}
	})
}

// TestRestoredStreams: after a restart of the agent the CA hears of a stream that ended for each pod, until one of that pod has come, of
// whichever kind, or does not come.
func TestRestoredStreams(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		cache := newMemory()
		change := func(c *agent.Config) { c.Cache = cache }
		n := startNode(t, s, here, change)
		pods := []*workload{newWorkload(s, "envoy", here), newWorkload(s, "go", here), newWorkload(s, "gone", here)}
		for _, p := range pods {
			await(t, n.admit(p), time.Minute, "SVID", hasSVID)
		}
		n.stop()
		n = startNode(t, s, here, change)
		told := func() string {
			time.Sleep(3 * time.Second)
			all, held := "", holdings(t, s)
			for _, p := range pods {
				for _, s := range held[p.pod.Name].GetHolding().GetStreams() {
					all += fmt.Sprintf("%s %d %t; ", p.pod.Name, s.GetId(), s.GetEnded())
				}
			}
			return all
		}
		if got := told(); got != "envoy 0 true; go 0 true; gone 0 true; " {
			t.Errorf("restarted: the CA hears of %q", got)
		}
		n.admit(pods[0]).Report(1, &apiv1.Stream{Id: 1, WantsBundle: true})
		n.admit(pods[1]).Report(1, &apiv1.Stream{Id: 1, Protocol: "workload-api"})
		if got := told(); got != "envoy 1 false; go 1 false; gone 0 true; " {
			t.Errorf("two are back: the CA hears of %q", got)
		}
		time.Sleep(time.Minute)
		if got := told(); got != "envoy 1 false; go 1 false; " {
			t.Errorf("a minute later the CA hears of %q", got)
		}
	})
}
