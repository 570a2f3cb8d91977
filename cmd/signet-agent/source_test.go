package main

import (
	"bytes"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/sds"
)

// A proxy gets the SVID and the bundle of its own pod and of no other, is sent each renewal, and what it answers reaches
// the CA.
//
// spiffe
func TestServe(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		pod := r.pod("web-1")
		token := r.token(pod, 6*time.Hour)
		identity := r.open([]string{token}, sds.NameDefault)
		m, got := identity.next(time.Second)
		first := svidOf(t, got[sds.NameDefault])
		if len(got) != 1 || first.ID.String() != webID {
			t.Fatalf("%d secrets, the SVID of %s", len(got), first.ID)
		}
		identity.answer(m, "", sds.NameDefault)
		trust := r.open([]string{"Bearer " + token}, sds.NameRootCA)
		m, got = trust.next(time.Second)
		if len(got) != 1 || got[sds.NameRootCA].GetValidationContext() == nil {
			t.Fatalf("secrets %v", slices.Collect(maps.Keys(got)))
		}
		trust.answer(m, "", sds.NameRootCA)
		picky := r.open([]string{token}, webID)
		m, got = picky.next(time.Second)
		if svidOf(t, got[webID]).Certificates[0].SerialNumber.Cmp(first.Certificates[0].SerialNumber) != 0 {
			t.Error("under its SPIFFE ID the workload has another SVID")
		}
		picky.answer(m, "I do not like it", webID)
		if reason := r.open([]string{token}, "spiffe://example.org/ns/shop/sa/vault").ends(time.Second); reason != api.ResourceNotAuthorized {
			t.Errorf("asking for another's secret ends with %s", reason)
		}
		streams := r.streams("web-1")
		if len(streams) != 3 {
			t.Fatalf("the CA heard of %d streams", len(streams))
		}
		serial := first.Certificates[0].SerialNumber.Text(16)
		hash := r.CA().Bundle().Hash
		if s := streams[0]; s.GetProxy() != "envoy" || s.GetProtocol() != sds.ProtocolSotW || !slices.Equal(s.GetNames(), []string{sds.NameDefault}) ||
			s.GetWantsBundle() || strings.TrimLeft(s.GetAckedSerial(), "0") != serial || s.GetAcks() != 1 || s.GetNacks() != 0 {
			t.Errorf("of the first stream the CA heard %v", s)
		}
		if s := streams[1]; !s.GetWantsBundle() || s.GetAckedGeneration() != 1<<32|1 || s.GetPushedGeneration() != 1<<32|1 || !bytes.Equal(s.GetAckedHash(), hash[:]) {
			t.Errorf("of the second stream the CA heard %v", s)
		}
		if s := streams[2]; s.GetNacks() != 1 || s.GetNack() != "I do not like it" || s.GetAckedSerial() != "" {
			t.Errorf("of the third stream the CA heard %v", s)
		}
		m, got = identity.next(31 * time.Minute)
		second := svidOf(t, got[sds.NameDefault])
		if second.Certificates[0].SerialNumber.Cmp(first.Certificates[0].SerialNumber) == 0 || second.ID != first.ID {
			t.Error("what was sent next is no renewal")
		}
		identity.answer(m, "", sds.NameDefault)
		m, got = picky.next(time.Second)
		if svidOf(t, got[webID]).Certificates[0].SerialNumber.Cmp(second.Certificates[0].SerialNumber) != 0 {
			t.Error("who refused one SVID was not sent the next")
		}
		picky.answer(m, "", webID)
		trust.quiet(time.Minute) // its bundle has not changed
		if s := r.streams("web-1")[0]; strings.TrimLeft(s.GetAckedSerial(), "0") != second.Certificates[0].SerialNumber.Text(16) {
			t.Errorf("the CA heard that %s was acknowledged", s.GetAckedSerial())
		}
		for name, want := range map[[2]string]float64{
			{"signet_sds_streams", ""}:                     3,
			{"signet_sds_pushes_total", "trust"}:           1,
			{"signet_sds_pushes_total", "identity"}:        4,
			{"signet_sds_updates_total", "ack"}:            4,
			{"signet_sds_updates_total", "nack"}:           1,
			{"signet_sds_refusals_total", ""}:              1,
			{"signet_sds_answer_duration_seconds", ""}:     5,
			{"signet_agent_svids", ""}:                     1,
			{"signet_sds_refusals_total", "TOKEN_MISSING"}: 0,
			{"signet_agent_renewals_total", "ok"}:          2,
		} {
			if got := r.metric(name[0], name[1]); got != want {
				t.Errorf("%s %s is %v, want %v", name[0], name[1], got, want)
			}
		}
		key := strings.Split(string(got[webID].GetTlsCertificate().GetPrivateKey().GetInlineBytes()), "\n")
		for _, canary := range append(strings.Split(token, "."), key[1:3]...) {
			if strings.Contains(r.log.String(), canary) {
				t.Error("the log holds a token or a key")
			}
		}
		for _, p := range []*proxy{identity, trust, picky} {
			p.end()
		}
		time.Sleep(time.Minute) // they may come back
		if streams := r.streams("web-1"); len(streams) != 0 {
			t.Errorf("of streams that have ended the CA heard %v", streams)
		}
	})
}

// A bundle is encoded once for the node and an SVID once for its workload, and nothing follows an identity that no stream
// is open for.
func TestFollowers(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		one, two := r.pod("web-1"), r.pod("web-2")
		var all []*proxy
		for _, pod := range []attestortest.Pod{one, one, two, one} {
			p := r.open([]string{r.token(pod, tokenLife)}, sds.NameDefault, sds.NameRootCA)
			p.next(time.Second)
			all = append(all, p)
		}
		if n := r.followers(); n != 2 {
			t.Errorf("%d identities are followed for two workloads", n)
		}
		trusts, identities := map[*sds.Trust]bool{}, map[*sds.Identity]bool{}
		r.src.mu.Lock()
		for _, f := range r.src.followers {
			m := f.material.Load()
			trusts[m.Trust], identities[m.Identity] = true, true
		}
		r.src.mu.Unlock()
		if len(trusts) != 1 || len(identities) != 2 {
			t.Errorf("the bundle is there %d times, and %d SVIDs", len(trusts), len(identities))
		}
		all[0].end()
		all[3].end()
		if n := r.followers(); n != 2 {
			t.Errorf("%d identities are followed while each has a stream", n)
		}
		all[1].end()
		if n := r.followers(); n != 1 {
			t.Errorf("%d identities are followed, one has a stream", n)
		}
		all[2].end()
		if n := r.followers(); n != 0 {
			t.Errorf("%d identities are followed without a stream", n)
		}
		r.open([]string{r.token(one, tokenLife)}, sds.NameDefault).next(time.Second) // from what the agent holds
		if _, err := secret.NewSecretDiscoveryServiceClient(r.conn).FetchSecrets(
			metadata.AppendToOutgoingContext(t.Context(), "authorization", r.token(two, tokenLife)),
			&discovery.DiscoveryRequest{TypeUrl: sds.TypeURL, ResourceNames: []string{sds.NameDefault}}); err != nil {
			t.Error(err)
		}
		if n := r.followers(); n != 1 {
			t.Errorf("%d identities are followed, one has a stream; a fetch has none", n)
		}
	})
}

// Who shows no token, more than one, or one that proves nothing here, gets nothing but the reason.
//
// threat: A22
func TestNoToken(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		pod := r.pod("web-1")
		good := r.token(pod, tokenLife)
		elsewhere := r.Pod("shop", "web-2", "web", "node-2")
		for _, tt := range []struct {
			name string
			sent []string
			want api.Reason
		}{
			{"none", nil, api.TokenMissing},
			{"an empty one", []string{""}, api.TokenMissing},
			{"two", []string{good, good}, api.TokenAmbiguous},
			{"two in one", []string{good + " " + good}, api.TokenAmbiguous},
			{"too large", []string{strings.Repeat("x", api.MaxTokenBytes+1)}, api.TokenTooLarge},
			{"no token", []string{"Bearer password"}, api.TokenMalformed},
			{"for another audience", []string{string(r.Evidence(pod, "vault", tokenLife).Data)}, api.TokenAudience},
			{"of another node", []string{r.token(elsewhere, tokenLife)}, api.NodeMismatch},
		} {
			if got := r.open(tt.sent, sds.NameDefault, sds.NameRootCA).ends(time.Second); got != tt.want {
				t.Errorf("%s: the stream ends with %s, want %s", tt.name, got, tt.want)
			}
			if got := r.metric("signet_sds_refusals_total", string(tt.want)); got == 0 {
				t.Errorf("%s: no metric tells of it", tt.name)
			}
		}
		if r.followers() != 0 || r.metric("signet_agent_svids", "") != 0 {
			t.Error("something came of it")
		}
	})
}

// A stream of a workload that may not have an identity ends with that very reason, whenever it turns out.
func TestRefused(t *testing.T) {
	withRig(t, catest.Options{Policy: ca.PolicyFile{Namespaces: []string{"shop"}}}, func(t *testing.T, r *rig) {
		attic := r.Pod("attic", "web-0", "web", nodeName)
		for range 2 { // once when it turns out, once because it is known
			if got := r.open([]string{r.token(attic, tokenLife)}, sds.NameDefault).ends(2 * time.Second); got != api.NamespaceNotAllowed {
				t.Errorf("the stream ends with %s", got)
			}
		}
		if r.followers() != 0 {
			t.Error("a refused identity is followed")
		}
		// A pod that is gone: its streams last as long as its SVID.
		pod := r.pod("web-1")
		p := r.open([]string{r.token(pod, 6*time.Hour)}, sds.NameDefault)
		m, got := p.next(time.Second)
		p.answer(m, "", sds.NameDefault)
		end := svidOf(t, got[sds.NameDefault]).Certificates[0].NotAfter
		r.Pods.Remove(pod)
		p.quiet(time.Until(end) - time.Second)
		if got := p.ends(2 * time.Second); got != api.PodUnknown {
			t.Errorf("the stream ends with %s", got)
		}
		if r.followers() != 0 || r.metric("signet_agent_svids", "") != 0 {
			t.Error("an identity that has ended is followed")
		}
		for _, one := range r.streams("web-1") {
			t.Errorf("the CA heard of stream %v", one)
		}
	})
}

// The first trust may be PEM, which has no generation. No stream is served before the CA has said which one it is, so what is
// acknowledged always counts.
func TestFirstTrustWithoutGeneration(t *testing.T) {
	plain := func(c *agent.Config) {
		trust, err := agent.NewTrust(c.TrustDomain, api.Generation{}, c.Trust.Bundle.X509Authorities())
		if err != nil {
			t.Fatal(err)
		}
		c.Trust = trust
	}
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		cfg := agent.Config{TrustDomain: r.TD, Dial: r.Dial, Trust: r.agent.Trust().Load(), Prover: ownToken{}, Verifier: attestor.ByKeySets}
		plain(&cfg)
		idle, err := agent.New(cfg) // has heard of no generation
		if err != nil {
			t.Fatal(err)
		}
		src := newSource(idle, slog.New(slog.DiscardHandler))
		if got := src.encode(); got == nil || got.Generation() != 0 || src.encode() != got {
			t.Error("a bundle without a generation is not encoded, or twice")
		}
		p := r.open([]string{r.token(r.pod("web-1"), tokenLife)}, sds.NameRootCA)
		m, got := p.next(time.Second)
		if len(got) != 1 || !strings.HasPrefix(m.GetVersionInfo(), "1.1-") {
			t.Errorf("version %q", m.GetVersionInfo())
		}
		p.answer(m, "", sds.NameRootCA)
		if s := r.streams("web-1"); len(s) != 1 || s[0].GetAckedGeneration() != 1<<32|1 {
			t.Errorf("the CA heard %v", s)
		}
	}, plain)
}

// A stream ends in time before its token does, and the next one is served from memory.
//
// threat: D14
func TestReauthentication(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		pod := r.pod("web-1")
		p := r.open([]string{r.token(pod, 10*time.Minute)}, sds.NameDefault)
		m, got := p.next(time.Second)
		p.answer(m, "", sds.NameDefault)
		first := svidOf(t, got[sds.NameDefault])
		p.quiet(8*time.Minute - time.Second)
		if got := p.ends(2 * time.Minute); got != api.ReauthRequired { // 80 to 95 % of ten minutes are over
			t.Errorf("the stream ends with %s", got)
		}
		began := time.Now()
		_, got = r.open([]string{r.token(pod, tokenLife)}, sds.NameDefault).next(time.Second)
		if second := svidOf(t, got[sds.NameDefault]); second.Certificates[0].SerialNumber.Cmp(first.Certificates[0].SerialNumber) != 0 || time.Since(began) != 0 {
			t.Errorf("after %s the next stream got another SVID", time.Since(began))
		}
	})
}

// While the CA is away, streams keep what they have, and new ones are served what is held.
//
// threat: D15
func TestServeWhileAway(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		pod, other := r.pod("web-1"), r.pod("web-2")
		p := r.open([]string{r.token(pod, 3*time.Hour)}, sds.NameDefault)
		m, got := p.next(time.Second)
		p.answer(m, "", sds.NameDefault)
		end := svidOf(t, got[sds.NameDefault]).Certificates[0].NotAfter
		r.Kill()
		p.quiet(time.Until(end) / 2)
		_, got = r.open([]string{r.token(pod, 3*time.Hour)}, sds.NameDefault).next(time.Second)
		if !svidOf(t, got[sds.NameDefault]).Certificates[0].NotAfter.Equal(end) {
			t.Error("a new stream got another SVID")
		}
		waits := r.open([]string{r.token(other, 3*time.Hour)}, sds.NameDefault)
		waits.quiet(time.Until(end) + time.Minute)
		p.quiet(time.Second) // the proxy is not told that what it has has expired
		late := r.open([]string{r.token(pod, 3*time.Hour)}, sds.NameDefault)
		late.quiet(time.Minute) // nor is anybody given it
		r.Start()
		for _, one := range []*proxy{p, late, waits} {
			_, got := one.next(2 * time.Minute)
			if svid := svidOf(t, got[sds.NameDefault]); time.Until(svid.Certificates[0].NotAfter) < 50*time.Minute {
				t.Errorf("the CA is back, and the SVID ends at %s", svid.Certificates[0].NotAfter)
			}
		}
	})
}

// SIGTERM ends streams with a reason that makes proxies come back, and nobody is let in any more.
func TestStopping(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		pod := r.pod("web-1")
		p := r.open([]string{r.token(pod, tokenLife)}, sds.NameDefault)
		p.next(time.Second)
		began := time.Now()
		r.stop()
		if got := p.ends(time.Second); got != api.AgentStopping {
			t.Errorf("the stream ends with %s", got)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("it took %s", took)
		}
		if r.followers() != 0 {
			t.Error("identities are followed after the end")
		}
		if _, err := r.src.Open(t.Context(), metadata.Pairs("authorization", r.token(pod, tokenLife))); api.ReasonOf(err) != api.AgentStopping {
			t.Errorf("a late stream is answered with %v", err)
		}
	})
}
