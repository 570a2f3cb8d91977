package agent_test

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

const (
	opened   = "session opened"
	noMore   = "no session with the CA"
	attested = "agent attested"
)

// The agent's own identity is renewed before it expires, and no workload notices: nothing fails and nothing waits.
func TestOwnIdentityRenewed(t *testing.T) {
	o := catest.Options{Policy: ca.PolicyFile{TTL: 10 * time.Second}, Config: func(c *ca.Config) {
		c.AgentTTL, c.SessionAge = 10*time.Minute, 24*time.Hour
	}}
	bubble(t, o, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here, func(c *agent.Config) { c.ReportEvery = time.Minute })
		id, _ := n.keepFresh(newWorkload(s, "web-1", here))
		await(t, id, time.Second, "SVID", hasSVID)
		for range 90 {
			end := time.Unix(int64(n.metric("signet_agent_own_svid_not_after_timestamp_seconds")), 0)
			if left := time.Until(end); left < 5*time.Minute-time.Second {
				t.Errorf("own SVID with %s left was not renewed", left)
			}
			time.Sleep(20 * time.Second)
		}
		synctest.Wait() // nothing is half done
		if got := len(n.log.find(attested, "")); got < 6 || got > 12 {
			t.Errorf("attested %d times in half an hour of SVIDs for 10 minutes", got)
		}
		if got, want := len(n.log.find(opened, "")), len(n.log.find(attested, "")); got != want {
			t.Errorf("%d sessions with %d identities", got, want)
		}
		for _, name := range []string{"signet_agent_renewals_total/failed", "signet_agent_session_failures_total", "signet_agent_expired_total"} {
			if v := n.metric(name); v != 0 {
				t.Errorf("%s is %v", name, v)
			}
		}
		if got := n.metric("signet_agent_renewals_total/ok"); got < 300 {
			t.Errorf("%v renewals in half an hour of SVIDs for 10 seconds", got)
		}
	})
}

// While the agent's own identity cannot be renewed, the session that is there goes on.
func TestOwnRenewalFails(t *testing.T) {
	o := catest.Options{Config: func(c *ca.Config) { c.SessionAge = 24 * time.Hour }}
	bubble(t, o, func(t *testing.T, s *catest.Server) {
		good := ownToken(s, here)
		var broken atomic.Bool
		n := startNode(t, s, here, func(c *agent.Config) {
			c.Prover = proverFunc(func(ctx context.Context) (attestor.Evidence, error) {
				if broken.Load() {
					return attestor.Evidence{}, api.E(api.TokenMissing, "the token file cannot be read")
				}
				return good.Prove(ctx)
			})
		})
		id, _ := n.keepFresh(newWorkload(s, "web-1", here))
		first := await(t, id, time.Second, "SVID", hasSVID)
		broken.Store(true)
		time.Sleep(45 * time.Minute)
		if h := id.Held().Load(); !another(first)(h) || h.Refusal != nil {
			t.Errorf("the workload was not renewed: %v", h.Refusal)
		}
		if len(n.log.find(opened, "")) != 1 || n.metric("signet_agent_connected") != 1 {
			t.Errorf("%d sessions were opened, connected %v", len(n.log.find(opened, "")), n.metric("signet_agent_connected"))
		}
		checkBackoff(t, n.log.find("own identity not renewed, keeping it", api.TokenMissing), 15*time.Minute)
		broken.Store(false)
		time.Sleep(31 * time.Second)
		if len(n.log.find(attested, "")) != 2 || n.metric("signet_agent_connected") != 1 {
			t.Error("the token is there again, and the identity was not renewed")
		}
	})
}

// A session ends at its age and with its CA; each time there is a new one, soon.
func TestSessionReopened(t *testing.T) {
	o := catest.Options{Config: func(c *ca.Config) { c.SessionAge, c.AgentTTL = 10*time.Minute, 24*time.Hour }}
	bubble(t, o, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		id, _ := n.keepFresh(newWorkload(s, "web-1", here))
		await(t, id, time.Second, "SVID", hasSVID)
		time.Sleep(time.Hour)
		if got := len(n.log.find(opened, "")); got < 6 || got > 9 {
			t.Errorf("%d sessions in an hour of sessions for 10 minutes", got)
		}
		if n.metric("signet_agent_session_failures_total") != 0 {
			t.Errorf("%v sessions failed", n.metric("signet_agent_session_failures_total"))
		}
		if holdings(t, s)["web-1"] == nil {
			t.Error("the new session was not told what is held")
		}
		for name, stop := range map[string]func(){"stopped": s.Stop, "killed": s.Kill} {
			before := len(n.log.find(opened, ""))
			stop()
			synctest.Wait()
			if n.metric("signet_agent_connected") != 0 {
				t.Errorf("connected to a CA that was %s", name)
			}
			time.Sleep(10 * time.Second)
			s.Start()
			time.Sleep(31 * time.Second)
			if got := len(n.log.find(opened, "")); got != before+1 || n.metric("signet_agent_connected") != 1 {
				t.Errorf("the CA was %s and is back: %d new sessions", name, got-before)
			}
		}
		if len(n.log.find(attested, "")) != 1 {
			t.Error("attested anew for a new session, though the identity is good")
		}
	})
}

// An agent whose own token is wrong says why, and goes on trying.
func TestOwnTokenWrong(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		pod, stranger := s.AgentPod(here), newWorkload(s, "web-0", here)
		gone := s.AgentPod(here)
		s.Pods.Remove(gone)
		for _, tt := range []struct {
			name  string
			prove func() (attestor.Evidence, error)
			want  api.Reason
		}{
			{"for workloads", func() (attestor.Evidence, error) {
				return s.Evidence(pod, api.WorkloadAudience(s.TD), tokenLife), nil
			}, api.TokenAudience},
			{"of no agent", func() (attestor.Evidence, error) {
				return s.Evidence(stranger.pod, api.AgentAudience(s.TD), tokenLife), nil
			}, api.NotAnAgent},
			{"of a pod that is gone", func() (attestor.Evidence, error) {
				return s.Evidence(gone, api.AgentAudience(s.TD), tokenLife), nil
			}, api.PodUnknown},
			{"missing", func() (attestor.Evidence, error) {
				return attestor.Evidence{}, api.E(api.TokenMissing, "the token file cannot be read")
			}, api.TokenMissing},
			{"broken", func() (attestor.Evidence, error) { return attestor.Evidence{}, errors.New("no such thing") }, api.Internal},
		} {
			var mended atomic.Bool
			n := startNode(t, s, here, func(c *agent.Config) {
				c.Prover = proverFunc(func(context.Context) (attestor.Evidence, error) {
					if mended.Load() {
						return s.Evidence(pod, api.AgentAudience(s.TD), tokenLife), nil
					}
					return tt.prove()
				})
			})
			time.Sleep(10 * time.Minute)
			checkBackoff(t, n.log.find(noMore, tt.want), 10*time.Minute)
			if n.metric("signet_agent_connected") != 0 || n.metric("signet_agent_session_failures_total") < 20 {
				t.Errorf("own token %s: connected %v, %v failures", tt.name, n.metric("signet_agent_connected"), n.metric("signet_agent_session_failures_total"))
			}
			mended.Store(true)
			time.Sleep(31 * time.Second)
			if n.metric("signet_agent_connected") != 1 {
				t.Errorf("own token %s: it is right now, and there is no session", tt.name)
			}
			n.stop()
		}
	})
}

// The agent's own SVID expires while the CA is away: it attests anew.
func TestOwnIdentityExpired(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		cache := newMemory()
		withCache := func(c *agent.Config) { c.Cache = cache }
		n := startNode(t, s, here, withCache)
		w := newWorkload(s, "web-1", here)
		id, stopFresh := n.keepFresh(w)
		await(t, id, time.Second, "SVID", hasSVID)
		s.Stop()
		time.Sleep(3 * time.Hour)
		s.Start()
		await(t, id, 2*time.Minute, "SVID", hasSVID)
		if got := len(n.log.find(attested, "")); got != 2 {
			t.Errorf("attested %d times", got)
		}

		// The same, found out at a start.
		stopFresh()
		n.stop()
		time.Sleep(3 * time.Hour)
		n = startNode(t, s, here, withCache)
		await(t, n.admit(w), time.Minute, "SVID", hasSVID)
		if got := len(n.log.find(attested, "")); got != 1 {
			t.Errorf("attested %d times", got)
		}
	})
}

// A cached identity is that of a pod before: it is replaced at once, and used where there is no other for now.
func TestCachedOwnIdentity(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		cache := newMemory()
		withCache := func(c *agent.Config) { c.Cache = cache }
		n := startNode(t, s, here, withCache)
		time.Sleep(time.Second)
		n.stop()
		n = startNode(t, s, here, withCache)
		time.Sleep(time.Second)
		if len(n.log.find(attested, "")) != 1 || len(n.log.find(opened, "")) != 1 {
			t.Errorf("attested %d times, for %d sessions", len(n.log.find(attested, "")), len(n.log.find(opened, "")))
		}
		n.stop()
		n = startNode(t, s, here, withCache, func(c *agent.Config) {
			prove, failed := c.Prover, false
			c.Prover = proverFunc(func(ctx context.Context) (attestor.Evidence, error) {
				if !failed {
					failed = true
					return attestor.Evidence{}, api.E(api.TokenMissing, "not yet")
				}
				return prove.Prove(ctx)
			})
		})
		time.Sleep(time.Second)
		if kept := len(n.log.find("own identity not renewed, keeping it", api.TokenMissing)); kept != 1 || len(n.log.find(opened, "")) != 2 || len(n.log.find(attested, "")) != 1 {
			t.Errorf("kept %d times, attested %d times, for %d sessions", kept, len(n.log.find(attested, "")), len(n.log.find(opened, "")))
		}
		n.stop()
		// The machine was registered anew: its node has the same folder and another UID.
		n = startNode(t, s, elsewhere, withCache)
		time.Sleep(5 * time.Second)
		if len(n.log.find(noMore, "")) != 0 || len(n.log.find(attested, "")) != 1 || n.metric("signet_agent_connected") != 1 {
			t.Errorf("refused %d times, attested %d times", len(n.log.find(noMore, "")), len(n.log.find(attested, "")))
		}
		await(t, n.admit(newWorkload(s, "web-1", elsewhere)), time.Second, "SVID", hasSVID)
	})
}

// Connections that go nowhere cost the agent their time limit and no more, and SIGTERM ends it at once.
func TestConnectionsThatHang(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		var hang atomic.Bool
		n := startNode(t, s, here, func(c *agent.Config) {
			c.Dial = func(ctx context.Context) (net.Conn, error) {
				if !hang.Load() {
					return s.Dial(ctx)
				}
				conn, _ := net.Pipe() // nobody reads
				return conn, nil
			}
		})
		id, _ := n.keepFresh(newWorkload(s, "web-1", here))
		await(t, id, time.Second, "SVID", hasSVID)
		hang.Store(true)
		s.Kill()
		time.Sleep(10 * time.Minute)
		if got := len(n.log.find(noMore, "")); got < 10 {
			t.Errorf("%d tries in 10 minutes", got)
		}
		s.Start()
		hang.Store(false)
		time.Sleep(time.Minute)
		if n.metric("signet_agent_connected") != 1 {
			t.Error("the CA is back, and there is no session")
		}
		hang.Store(true)
		s.Kill()
		time.Sleep(5 * time.Minute)
		began := time.Now()
		n.stop()
		if took := time.Since(began); took > time.Second {
			t.Errorf("the agent took %s to end", took)
		}
	})
}
