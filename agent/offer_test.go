package agent_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca/catest"
)

// ownerOf is what kubelet says of a pod.
func ownerOf(p attestortest.Pod) agent.Owner {
	return agent.Owner{Pod: agent.Pod{Namespace: p.Namespace, Name: p.Name, UID: p.UID}, ServiceAccount: p.ServiceAccount, Node: p.NodeName}
}

// offer offers a workload's token as kubelet does, at once.
func (n *node) offer(w *workload, e attestor.Evidence) *agent.Identity {
	n.t.Helper()
	began := time.Now()
	id, err := n.Offer(n.t.Context(), e, ownerOf(w.pod), "csi")
	if err != nil {
		n.t.Fatalf("not taken: %v", err)
	}
	if took := time.Since(began); took != 0 {
		n.t.Errorf("the offer took %s", took)
	}
	return id
}

// What kubelet delivers must be of the very pod that it says, whether there are key sets or not.
func TestOfferCompares(t *testing.T) {
	for _, tt := range []struct {
		name   string
		owner  func(*agent.Owner)
		token  func(*attestortest.Draft)
		life   time.Duration // zero: tokenLife
		bare   api.Reason    // without key sets; empty: taken
		keyed  api.Reason    // with them
		resume api.Reason    // with them, after a restart
	}{
		{name: "good"},
		{name: "another UID", owner: func(o *agent.Owner) { o.UID = "x" }, bare: api.PodMismatch, keyed: api.PodMismatch, resume: api.PodMismatch},
		{name: "another pod", owner: func(o *agent.Owner) { o.Name = "x" }, bare: api.PodMismatch, keyed: api.PodMismatch, resume: api.PodMismatch},
		{name: "another namespace", owner: func(o *agent.Owner) { o.Namespace = "x" }, bare: api.PodMismatch, keyed: api.PodMismatch, resume: api.PodMismatch},
		{name: "another ServiceAccount", owner: func(o *agent.Owner) { o.ServiceAccount = "x" }, bare: api.PodMismatch, keyed: api.PodMismatch, resume: api.PodMismatch},
		{name: "another node", owner: func(o *agent.Owner) { o.Node = elsewhere }, bare: api.NodeMismatch, keyed: api.NodeMismatch, resume: api.NodeMismatch},
		// Without a session the agent does not know its node's UID; the CA does.
		{name: "another node of that name", token: func(d *attestortest.Draft) {
			d.Kubernetes()["node"] = map[string]any{"name": here, "uid": "another"}
		}, keyed: api.NodeMismatch, resume: api.NodeMismatch},
		{name: "another audience", token: attestortest.Audiences("vault"), bare: api.TokenAudience, keyed: api.TokenAudience, resume: api.TokenAudience},
		{name: "a further audience", token: attestortest.Audiences("signet:example.org", "vault"),
			bare: api.TokenAudienceNotExclusive, keyed: api.TokenAudienceNotExclusive, resume: api.TokenAudienceNotExclusive},
		{name: "without an end", token: attestortest.Without("exp"), bare: api.TokenMalformed, keyed: api.TokenMalformed, resume: api.TokenMalformed},
		{name: "without an issuer", token: attestortest.Without("iss"), bare: api.TokenMalformed, keyed: api.TokenMalformed, resume: api.TokenMalformed},
		{name: "expired", life: time.Second, keyed: api.TokenExpired}, // it was taken over before it had
		{name: "for ever", token: attestortest.Claim("exp", int64(1)<<32), keyed: api.TokenTTLTooLong, resume: api.TokenTTLTooLong},
		// Neither of these is refuted: the key sets may be older than the key.
		{name: "unknown issuer", token: attestortest.Claim("iss", "https://elsewhere.test")},
		{name: "unknown key", token: attestortest.Header("kid", "another")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
				w := newWorkload(s, "web-1", here)
				owner := ownerOf(w.pod)
				if tt.owner != nil {
					tt.owner(&owner)
				}
				var change []func(*attestortest.Draft)
				if tt.token != nil {
					change = append(change, tt.token)
				}
				e := w.token(cmp.Or(tt.life, tokenLife), change...)
				bare := newNode(t, s, here)
				keyed := startNode(t, s, here)
				time.Sleep(time.Second)
				for _, try := range []struct {
					name  string
					offer func(context.Context, attestor.Evidence, agent.Owner, string) (*agent.Identity, error)
					want  api.Reason
				}{{"without key sets", bare.Offer, tt.bare}, {"with key sets", keyed.Offer, tt.keyed}, {"after a restart", keyed.Resume, tt.resume}} {
					began := time.Now()
					id, err := try.offer(t.Context(), e, owner, "csi")
					if time.Since(began) != 0 {
						t.Errorf("%s it took %s", try.name, time.Since(began))
					}
					if (err == nil) != (try.want == "") || err != nil && api.ReasonOf(err) != try.want {
						t.Errorf("%s: %v, want %q", try.name, err, try.want)
					}
					if err == nil && id.Pod() != owner.Pod {
						t.Errorf("%s: the identity of %v", try.name, id.Pod())
					}
				}
			})
		})
	}
}

// A pod that came while the CA was away waits, is never refused for that, and gets its identity as soon as there is a session.
func TestOfferWhileAway(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		var came time.Time
		n := startNode(t, s, here, func(c *agent.Config) {
			dial := c.Dial
			c.Dial = func(ctx context.Context) (net.Conn, error) {
				came = time.Now()
				return dial(ctx)
			}
		})
		time.Sleep(time.Second)
		s.Kill()
		w := newWorkload(s, "web-1", here)
		id := n.offer(w, w.token(30*time.Minute))
		for range 120 { // beyond the end of the token
			time.Sleep(time.Minute)
			if h := id.Held().Load(); h.Refused() != nil || h.SVID != nil {
				t.Fatalf("after a while it is refused: %v", h.Refused())
			}
		}
		if h := id.Held().Load(); api.ReasonOf(h.Refusal) != api.TokenExpired {
			t.Errorf("the CA would hear of %v", h.Refusal)
		}
		n.offer(w, w.token(tokenLife))
		s.Start()
		await(t, id, time.Minute, "SVID", hasSVID)
		if took := time.Since(came); took > time.Second {
			t.Errorf("it came %s after the session", took)
		}
	})
}

// An identity that is held for a pod is served to it after a restart, without the CA, without key sets and with a token that
// has expired; it renews when kubelet has brought the next.
//
// threat: D16
func TestResume(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		cache := newMemory()
		w := newWorkload(s, "web-1", here)
		n := startNode(t, s, here, func(c *agent.Config) { c.Cache = cache })
		token := w.token(10 * time.Minute)
		first := await(t, n.offer(w, token), time.Second, "SVID", hasSVID)
		n.stop()
		s.Kill()
		cache.Delete("keysets")
		time.Sleep(11 * time.Minute)
		n = startNode(t, s, here, func(c *agent.Config) { c.Cache = cache })
		id, err := n.Resume(t.Context(), token, ownerOf(w.pod), "csi")
		if err != nil {
			t.Fatal(err)
		}
		if h := id.Held().Load(); h.SVID == nil || serial(h) != serial(first) {
			t.Fatalf("it holds %v", h)
		}
		// Another pod of that name is another pod.
		again := newWorkload(s, "web-1", here)
		if other := n.offer(again, again.token(tokenLife)); other == id || other.Held().Load().SVID != nil {
			t.Error("another pod of the same name is given what is held")
		}
		s.Start()
		n.offer(w, w.token(tokenLife))
		await(t, id, time.Hour, "renewal", another(first))
	})
}

// Everything of a pod goes with its last volume, also what a renewal under way would bring, unless a stream is open.
func TestRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache := newMemory()
		f := newFake(t, replicaID)
		n := f.start(func(c *agent.Config) { c.Cache = cache })
		pod := attestortest.NewPod("shop", "web-1", "web", here)
		offer := func() *agent.Identity {
			t.Helper()
			id, err := n.Offer(t.Context(), f.token(pod, api.WorkloadAudience(f.td)), ownerOf(pod), "csi")
			if err != nil {
				t.Fatal(err)
			}
			return id
		}
		held := func() int {
			count := 0
			for _, name := range cache.names() {
				if bytes.HasPrefix([]byte(name), []byte("pod-")) {
					count++
				}
			}
			return count
		}
		id := offer()
		if again := offer(); again != id {
			t.Fatal("the second volume of a pod is another identity")
		}
		await(t, id, time.Second, "SVID", hasSVID)
		synctest.Wait()
		id.Release()
		if held() != 1 || n.metric("signet_agent_svids") != 1 || n.metric("signet_agent_first_svid_duration_seconds") != 0 {
			t.Errorf("with one volume of two, %d entries are left", held())
		}
		id.Report(7, &apiv1.Stream{Id: 7})
		id.Release()
		if held() != 1 {
			t.Error("dropped under an open stream")
		}
		if next := offer(); next != id {
			t.Error("it is another identity, though a stream has it")
		}
		id.Release()
		if held() != 1 {
			t.Error("dropped under an open stream")
		}
		id.Report(7, nil) // it ends
		if held() != 0 || n.metric("signet_agent_svids") != 0 {
			t.Errorf("without a volume %d entries are left", held())
		}

		// The CA answers when the pod is gone.
		answer := make(chan struct{})
		f.set(func() {
			f.issue = func(_ *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error) {
				<-answer
				return results(f.good(pub)), nil
			}
		})
		id = offer()
		time.Sleep(time.Second)
		id.Release()
		close(answer)
		time.Sleep(time.Minute)
		if held() != 0 || n.metric("signet_agent_svids") != 0 {
			t.Errorf("an answer that came too late is kept: %d entries", held())
		}
	})
}

// What claims to live for ever does not keep out the next token, once the CA has refused it.
func TestOfferAfterALie(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := newNode(t, s, here) // without key sets
		w := newWorkload(s, "web-1", here)
		id := n.offer(w, w.token(tokenLife, attestortest.Claim("exp", int64(1)<<32)))
		n.start()
		h := await(t, id, time.Minute, "refusal", func(h agent.Held) bool { return h.Refused() != nil })
		if api.ReasonOf(h.Refused()) != api.TokenTTLTooLong {
			t.Errorf("it is refused for %v", h.Refused())
		}
		n.offer(w, w.token(tokenLife))
		await(t, id, time.Second, "SVID", hasSVID)
	})
}
