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
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// spiffe
func TestFirstSVID(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := newNode(t, s, here)
		if got := n.NotReady(); len(got) != 1 {
			t.Errorf("an agent that does not run is not ready for %q", got)
		}
		n.start()
		time.Sleep(time.Second) // the key sets are there
		w := newWorkload(s, "web-1", here)
		token := w.token(tokenLife)
		began := time.Now()
		id, until, err := n.Admit(t.Context(), token, "shared")
		if err != nil || time.Since(began) != 0 {
			t.Fatalf("Admit took %s, error %v; want it at once", time.Since(began), err)
		}
		if !until.Equal(began.Add(tokenLife).Truncate(time.Second)) {
			t.Errorf("admitted until %s, the token ends at %s", until, began.Add(tokenLife))
		}
		if got := id.Pod(); got != (agent.Pod{Namespace: "shop", Name: "web-1", UID: w.pod.UID}) {
			t.Errorf("the identity is of pod %v", got)
		}
		h := await(t, id, time.Second, "SVID", hasSVID)
		if got, want := h.SVID.ID.String(), "spiffe://example.org/ns/shop/sa/web"; got != want {
			t.Errorf("SVID of %s, want %s", got, want)
		}
		if trust := n.Trust().Load(); trust.Generation != (api.Generation{Epoch: 1, Number: 1}) {
			t.Errorf("bundle of generation %s", trust.Generation)
		}
		if missing := n.NotReady(); len(missing) > 0 {
			t.Errorf("not ready: %q", missing)
		}
		if again := n.admit(w); again != id {
			t.Error("the same pod got a second identity")
		}

		// What proxies say of it reaches the CA, not more often than once a second.
		time.Sleep(2 * time.Second)
		got := holdings(t, s)["web-1"]
		if got.GetNode() != here || got.GetHolding().GetSpiffeId() != h.SVID.ID.String() || len(got.GetHolding().GetStreams()) != 0 {
			t.Errorf("the CA was told %v", got)
		}
		if !got.GetHolding().GetRenewAt().AsTime().Equal(h.RenewAt) || got.GetHolding().GetNotAfter().AsTime() != notAfter(h) {
			t.Errorf("the CA was told of renewal at %s and end at %s", got.GetHolding().GetRenewAt().AsTime(), got.GetHolding().GetNotAfter().AsTime())
		}
		id.Report(7, &apiv1.Stream{Id: 7, Acks: 1, AckedSerial: got.GetHolding().GetSerial(), WantsBundle: true, AckedGeneration: 1<<32 | 1})
		id.Report(8, &apiv1.Stream{Id: 8, Nacks: 1, Nack: "no"})
		time.Sleep(2 * time.Second)
		streams := holdings(t, s)["web-1"].GetHolding().GetStreams()
		if len(streams) != 2 || streams[0].GetAcks() != 1 || streams[0].GetAckedGeneration() != 1<<32|1 || streams[1].GetNack() != "no" {
			t.Errorf("the CA was told of streams %v", streams)
		}
		id.Report(7, nil)
		time.Sleep(time.Minute) // for its client may come back
		if streams := holdings(t, s)["web-1"].GetHolding().GetStreams(); len(streams) != 1 || streams[0].GetId() != 8 {
			t.Errorf("after stream 7 ended the CA was told of %v", streams)
		}
	})
}

// An SVID is never there before the bundle that it verifies under: whoever sees it can use it.
//
// threat: D17
func TestBundleBeforeSVID(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		// The first trust of this agent came without a generation, as PEM.
		plain, err := agent.NewTrust(s.TD, api.Generation{}, s.CA().Bundle().Roots)
		if err != nil {
			t.Fatal(err)
		}
		n := startNode(t, s, here, func(c *agent.Config) { c.Trust = plain })
		id := n.admit(newWorkload(s, "web-1", here))
		await(t, id, time.Second, "SVID", func(h agent.Held) bool {
			if h.SVID != nil && n.Trust().Load().Generation.Sequence() == 0 {
				t.Error("there is an SVID, and the bundle has not come yet")
			}
			return hasSVID(h)
		})
	})
}

func TestAdmitRefuses(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		w := newWorkload(s, "web-1", here)
		foreign, err := attestortest.NewIssuer(attestortest.Config{Issuer: catest.IssuerName})
		if err != nil {
			t.Fatal(err)
		}
		forged, err := foreign.Token(w.pod, api.WorkloadAudience(s.TD), tokenLife)
		if err != nil {
			t.Fatal(err)
		}
		old := w.token(time.Minute)
		time.Sleep(time.Minute)
		for _, tt := range []struct {
			name  string
			token attestor.Evidence
			want  api.Reason
		}{
			{"of another node", newWorkload(s, "web-2", elsewhere).token(tokenLife), api.NodeMismatch},
			{"for another audience", s.Evidence(w.pod, "vault", tokenLife), api.TokenAudience},
			{"of an agent", s.Evidence(w.pod, api.AgentAudience(s.TD), tokenLife), api.TokenAudience},
			{"for another trust domain", s.Evidence(w.pod, "signet:other.example", tokenLife), api.TokenAudience},
			{"for two audiences", w.token(tokenLife, attestortest.Audiences(api.WorkloadAudience(s.TD), "vault")), api.TokenAudienceNotExclusive},
			{"expired", old, api.TokenExpired},
			{"too long", w.token(25 * time.Hour), api.TokenTTLTooLong},
			{"of another issuer", w.token(tokenLife, attestortest.Claim("iss", "https://elsewhere.test")), api.IssuerUnknown},
			{"forged", attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(forged)}, api.TokenSignature},
			{"no token at all", attestor.Evidence{Kind: api.EvidenceServiceAccount}, api.TokenMissing},
			{"of another kind", attestor.Evidence{Kind: "tpm", Data: []byte("x")}, api.EvidenceKind},
		} {
			id, until, err := n.Admit(t.Context(), tt.token, "shared")
			if id != nil || !until.IsZero() || api.ReasonOf(err) != tt.want {
				t.Errorf("a token %s: identity %v until %v, error %v; want %s", tt.name, id, until, err, tt.want)
			}
		}
		if got := n.metric("signet_agent_svids"); got != 0 {
			t.Errorf("%v SVIDs are held for tokens that were refused", got)
		}
	})
}

// Admit waits for the first key sets, and no longer than its caller.
func TestAdmitWaitsForKeySets(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := newNode(t, s, here)
		w := newWorkload(s, "web-1", here)
		s.Stop()
		n.start()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		if _, _, err := n.Admit(ctx, w.token(tokenLife), "shared"); api.ReasonOf(err) != api.KeysUnavailable || time.Since(began) != time.Minute {
			t.Errorf("after %s: %v, want %s after a minute", time.Since(began), err, api.KeysUnavailable)
		}
		s.Start()
		await(t, n.admit(w), time.Minute, "SVID", hasSVID)
	})
}

// A workload that the policy does not allow gets that very reason, at once and later; it is tried again by backoff alone,
// which is jittered and bounded, and nobody else waits for it.
func TestRefusedByPolicy(t *testing.T) {
	o := catest.Options{Policy: ca.PolicyFile{Namespaces: []string{"shop"}}}
	bubble(t, o, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		bad := &workload{s, s.Pod("attic", "web-0", "web", here)}
		if refused := n.refusal(bad); refused.Reason != api.NamespaceNotAllowed || refused.CorrelationID == "" {
			t.Errorf("refused with %v", refused)
		}
		if _, _, err := n.Admit(t.Context(), bad.token(tokenLife), "shared"); api.ReasonOf(err) != api.NamespaceNotAllowed {
			t.Errorf("the next stream is told %v", err)
		}
		for i := range 20 { // fresh tokens do not make it try sooner
			time.Sleep(30 * time.Second)
			n.Admit(t.Context(), bad.token(tokenLife), "shared")
			good := n.admit(newWorkload(s, fmt.Sprint("web-", i), here))
			began := time.Now()
			await(t, good, time.Second, "SVID", hasSVID)
			if d := time.Since(began); d > 100*time.Millisecond {
				t.Errorf("another workload waited %s", d)
			}
		}
		tries := n.log.find("identity not renewed, keeping what is held", api.NamespaceNotAllowed)
		checkBackoff(t, tries, 10*time.Minute)
	})
}

// checkBackoff proves that tries in a time are spaced by 125 ms to 30 s, growing and with jitter.
func checkBackoff(t *testing.T, tries []record, in time.Duration) {
	t.Helper()
	if len(tries) < int(in/(30*time.Second)) || len(tries) > int(in/(10*time.Second))+12 {
		t.Fatalf("%d tries in %s", len(tries), in)
	}
	var waits []time.Duration
	for i, r := range tries[1:] {
		d := r.at.Sub(tries[i].at)
		if d < 125*time.Millisecond || d > 30*time.Second+time.Second {
			t.Errorf("%s between tries %d and %d", d, i, i+1)
		}
		waits = append(waits, d)
	}
	late := waits[len(waits)/2:]
	if slices.Max(waits[:3]) > 2*time.Second || slices.Min(late) < 9*time.Second {
		t.Errorf("the backoff does not grow: %v", waits)
	}
	slices.Sort(late)
	if len(slices.Compact(late)) < len(late)*3/4 {
		t.Errorf("the backoff has no jitter: %v", waits)
	}
}
