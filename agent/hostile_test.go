package agent_test

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
)

// Whatever a CA answers but one good SVID for our key is refused, and costs the workload no more than time.
//
// spiffe, ID-01
// threat: D18, D19
func TestHostileSVIDs(t *testing.T) {
	other := func(id string, change ...func(*x509.Certificate)) func(*fake, crypto.PublicKey) *apiv1.IssueResponse {
		return func(f *fake, pub crypto.PublicKey) *apiv1.IssueResponse {
			return results(&apiv1.SVID{SpiffeId: id, Chain: f.root.svid(leaf(id, change...), pub)})
		}
	}
	chain := func(change func(f *fake, chain [][]byte) [][]byte) func(*fake, crypto.PublicKey) *apiv1.IssueResponse {
		return func(f *fake, pub crypto.PublicKey) *apiv1.IssueResponse {
			s := f.good(pub)
			s.Chain = change(f, s.Chain)
			return results(s)
		}
	}
	refusal := func(r string) func(*fake, crypto.PublicKey) *apiv1.IssueResponse {
		return func(*fake, crypto.PublicKey) *apiv1.IssueResponse {
			return &apiv1.IssueResponse{Results: []*apiv1.IssueResult{{Result: &apiv1.IssueResult_Refusal{Refusal: &apiv1.Refusal{Reason: r}}}}}
		}
	}
	for _, tt := range []struct {
		name   string
		answer func(*fake, crypto.PublicKey) *apiv1.IssueResponse
		want   api.Reason // zero: SVIDRejected
	}{
		{"for another key", func(f *fake, _ crypto.PublicKey) *apiv1.IssueResponse { return results(f.good(newKey(f.t).Public())) }, ""},
		{"another ID than it said", func(f *fake, pub crypto.PublicKey) *apiv1.IssueResponse {
			s := f.good(pub)
			s.SpiffeId = "spiffe://" + domain + "/ns/shop/sa/vault"
			return results(s)
		}, ""},
		{"no ID said", func(f *fake, pub crypto.PublicKey) *apiv1.IssueResponse {
			s := f.good(pub)
			s.SpiffeId = ""
			return results(s)
		}, ""},
		{"of another trust domain", other("spiffe://other.example/ns/shop/sa/web"), ""},
		{"reserved for replicas", other(replicaID), ""},
		{"reserved for agents", other("spiffe://" + domain + "/signet/agent/x"), ""},
		{"without a path", other("spiffe://" + domain), ""},
		{"with a query", other(webID + "?x=y"), ""},
		{"of another scheme", other("https://" + domain + "/ns/shop/sa/web"), ""},
		{"two URIs", other(webID, func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), ""},
		{"no URI", other(webID, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"web"} }), ""},
		{"an authority", other(webID, func(c *x509.Certificate) { c.IsCA = true }), ""},
		{"may sign certificates", other(webID, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), ""},
		{"may not sign handshakes", other(webID, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), ""},
		{"expired", other(webID, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), api.ClockSkew},
		{"not yet valid", other(webID, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), api.ClockSkew},
		{"under another root", func(f *fake, pub crypto.PublicKey) *apiv1.IssueResponse {
			s := f.good(pub)
			s.Chain = newRoot(f.t).svid(leaf(webID), pub)
			return results(s)
		}, ""},
		{"no chain", chain(func(*fake, [][]byte) [][]byte { return nil }), ""},
		{"an empty certificate", chain(func(*fake, [][]byte) [][]byte { return [][]byte{{}} }), ""},
		{"no intermediate", chain(func(_ *fake, c [][]byte) [][]byte { return c[:1] }), ""},
		{"out of order", chain(func(_ *fake, c [][]byte) [][]byte { return [][]byte{c[1], c[0]} }), ""},
		{"with its root", chain(func(f *fake, c [][]byte) [][]byte { return append(c, f.root.cert.Raw) }), ""},
		{"with a stranger's intermediate", chain(func(f *fake, c [][]byte) [][]byte { return append(c, newRoot(f.t).inter.Raw) }), ""},
		{"endless", chain(func(f *fake, c [][]byte) [][]byte {
			for range 100 {
				c = append(c, f.root.inter.Raw)
			}
			return c
		}), ""},
		{"not DER", chain(func(_ *fake, c [][]byte) [][]byte { return [][]byte{[]byte("-----BEGIN CERTIFICATE-----")} }), ""},
		{"trailing bytes", chain(func(_ *fake, c [][]byte) [][]byte { return append(c, []byte{0}) }), ""},
		{"no result", func(*fake, crypto.PublicKey) *apiv1.IssueResponse { return &apiv1.IssueResponse{} }, ""},
		{"two results", func(f *fake, pub crypto.PublicKey) *apiv1.IssueResponse { return results(f.good(pub), f.good(pub)) }, ""},
		{"an empty result", func(*fake, crypto.PublicKey) *apiv1.IssueResponse {
			return &apiv1.IssueResponse{Results: []*apiv1.IssueResult{{}}}
		}, ""},
		{"refused for an unknown reason", refusal("PHASE_OF_THE_MOON"), api.Internal},
		{"refused for no reason", refusal(""), api.Internal},
		{"refused as overloaded", refusal(string(api.Overloaded)), api.Overloaded},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, replicaID)
				f.issue = func(_ *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error) {
					return tt.answer(f, pub), nil
				}
				n := f.start()
				id := f.admit(n, "web-1")
				want := tt.want
				if want == "" {
					want = api.SVIDRejected
				}
				h := await(t, id, 2*time.Second, "failure", func(h agent.Held) bool { return h.Refusal != nil || h.SVID != nil })
				if h.SVID != nil || api.ReasonOf(h.Refusal) != want || h.Refused() != nil {
					t.Fatalf("holds an SVID %t, failure %v, refused %v; want %s and that it waits", h.SVID != nil, h.Refusal, h.Refused(), want)
				}
				f.set(func() { f.issue = nil })
				first := await(t, id, 31*time.Second, "SVID", hasSVID)

				// The same answer later costs a good SVID nothing.
				f.set(func() {
					f.issue = func(_ *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error) {
						return tt.answer(f, pub), nil
					}
				})
				h = await(t, id, 21*time.Minute, "failure", func(h agent.Held) bool { return h.Refusal != nil })
				if h.SVID != first.SVID || api.ReasonOf(h.Refusal) != want {
					t.Errorf("holds the SVID %t, failure %v; want it kept", h.SVID == first.SVID, h.Refusal)
				}
			})
		})
	}
}

// A renewal time that makes no sense is replaced by half of the time that is left.
func TestHostileRenewalTimes(t *testing.T) {
	for name, at := range map[string]func() *timestamppb.Timestamp{
		"none":         func() *timestamppb.Timestamp { return nil },
		"past":         func() *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(-time.Hour)) },
		"now":          func() *timestamppb.Timestamp { return timestamppb.Now() },
		"after expiry": func() *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(2 * time.Hour)) },
		"invalid":      func() *timestamppb.Timestamp { return &timestamppb.Timestamp{Seconds: 1 << 60} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, replicaID)
				f.issue = func(_ *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error) {
					s := f.good(pub)
					s.RenewAt = at()
					return results(s), nil
				}
				h := await(t, f.admit(f.start(), "web-1"), 2*time.Second, "SVID", hasSVID)
				if left := time.Until(h.RenewAt); left < 29*time.Minute || left > 31*time.Minute {
					t.Errorf("renewed in %s, want half an hour", left)
				}
			})
		})
	}
}

// An error of the call is between agent and CA: no workload is refused for it.
func TestCallErrorsRefuseNobody(t *testing.T) {
	for _, err := range []error{
		api.ToStatus(api.E(api.AgentIdentityRequired, "the agent's SVID has expired")).Err(),
		api.ToStatus(api.E(api.BatchSize, "1 request in one call")).Err(),
		api.ToStatus(api.E(api.NotAnAgent, "no agent")).Err(),
		api.ToStatus(api.E(api.SessionRequired, "no session")).Err(),
		api.ToStatus(&api.Error{Reason: api.Overloaded, Detail: "busy", RetryAfter: 1000 * time.Hour}).Err(),
		status.Error(codes.Unauthenticated, "who are you"),
		status.Error(codes.PermissionDenied, "a proxy says no"),
		status.Error(codes.Unimplemented, "unknown method"),
	} {
		t.Run(status.Code(err).String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, replicaID)
				f.issue = func(*apiv1.IssueItem, crypto.PublicKey) (*apiv1.IssueResponse, error) { return nil, err }
				id := f.admit(f.start(), "web-1")
				h := await(t, id, 2*time.Second, "failure", func(h agent.Held) bool { return h.Refusal != nil })
				if h.Refused() != nil {
					t.Errorf("the workload is refused with %v", h.Refused())
				}
				f.set(func() { f.issue = nil })
				await(t, id, 6*time.Minute, "SVID", hasSVID) // whatever delay the CA asked for
			})
		})
	}
}

// An SVID is not held beyond its end because an answer is on its way.
func TestExpiryDuringACall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, replicaID)
		n := f.start(func(c *agent.Config) { c.IssueTimeout = 10 * time.Minute })
		id := f.admit(n, "web-1")
		first := await(t, id, time.Second, "SVID", hasSVID)
		f.set(func() {
			f.issue = func(*apiv1.IssueItem, crypto.PublicKey) (*apiv1.IssueResponse, error) { return nil, nil }
		})
		await(t, id, svidLife+time.Second, "end", lostSVID)
		if !time.Now().Equal(notAfter(first)) {
			t.Errorf("held until %s, it expired at %s", time.Now(), notAfter(first))
		}
	})
}

// The CA is known by its SPIFFE ID and by nothing else, over TLS 1.3 and nothing less.
//
// spiffe, B-08
func TestServersThatAreNoCA(t *testing.T) {
	stranger := func(template func() *x509.Certificate) func(*tls.Config) {
		return func(c *tls.Config) {
			key := newKey(t)
			c.Certificates = []tls.Certificate{{Certificate: newRoot(t).svid(template(), key.Public()), PrivateKey: key}}
		}
	}
	for _, tt := range []struct {
		name, id string
		change   func(*tls.Config)
	}{
		{"a workload", webID, nil},
		{"an agent", "spiffe://" + domain + "/signet/agent/x", nil},
		{"an administrator", "spiffe://" + domain + "/signet/admin/x", nil},
		{"below a replica", replicaID + "/x", nil},
		{"no replica's name", "spiffe://" + domain + "/signet/ca", nil},
		{"no path", "spiffe://" + domain, nil},
		{"a replica of another trust domain", "spiffe://other.example/signet/ca/ca-0", nil},
		{"a replica under another root", replicaID, stranger(func() *x509.Certificate { return leaf(replicaID) })},
		{"a web server", replicaID, stranger(func() *x509.Certificate {
			return leaf(replicaID, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"ca"} })
		})},
		{"TLS 1.2", replicaID, func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, tt.id)
				if tt.change != nil {
					f = newFake(t, tt.id, tt.change)
				}
				var proven atomic.Bool
				n := f.start(func(c *agent.Config) {
					own := c.Prover
					c.Prover = proverFunc(func(ctx context.Context) (attestor.Evidence, error) {
						proven.Store(true)
						return own.Prove(ctx)
					})
				})
				time.Sleep(time.Minute)
				if n.metric("signet_agent_connected") != 0 || len(n.log.find(attested, "")) != 0 {
					t.Error("it was believed")
				}
				if len(n.log.find(noMore, api.CAUnavailable)) == 0 || !proven.Load() {
					t.Error("it was not tried, or the log does not say so")
				}
			})
		})
	}
}

// What AttestAgent answers is checked as any SVID, and must be an agent's.
func TestHostileAttestation(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer func(*fake, *apiv1.AttestAgentResponse)
		want   api.Reason
	}{
		{"a workload's identity", func(f *fake, r *apiv1.AttestAgentResponse) {
			r.Chain = f.root.svid(leaf(webID), newKey(f.t).Public())
		}, api.SVIDRejected},
		{"no identity", func(_ *fake, r *apiv1.AttestAgentResponse) { r.Chain = nil }, api.SVIDRejected},
		{"under another root", func(f *fake, r *apiv1.AttestAgentResponse) {
			c, _ := x509.ParseCertificate(r.Chain[0])
			r.Chain = newRoot(f.t).svid(leaf(c.URIs[0].String()), c.PublicKey)
		}, api.SVIDRejected},
		{"an older bundle", func(f *fake, r *apiv1.AttestAgentResponse) { r.Bundle = bundle(1, 0, f.root) }, api.BundleRollback},
		{"another bundle", func(f *fake, r *apiv1.AttestAgentResponse) { r.Bundle = bundle(1, 1, f.root, newRoot(f.t)) }, api.BundleEquivocation},
		{"no bundle", func(_ *fake, r *apiv1.AttestAgentResponse) { r.Bundle = nil }, api.BundleRejected},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, replicaID)
				f.attest = func(good *apiv1.AttestAgentResponse) (*apiv1.AttestAgentResponse, error) {
					tt.answer(f, good)
					return good, nil
				}
				n := f.start()
				time.Sleep(time.Minute)
				if got := n.log.find(noMore, tt.want); len(got) == 0 || n.metric("signet_agent_connected") != 0 {
					t.Errorf("connected %v, failures for %s: %d", n.metric("signet_agent_connected"), tt.want, len(got))
				}
				if g := n.Trust().Load().Generation.String(); g != "1.1" {
					t.Errorf("the bundle is now of generation %s", g)
				}
				f.set(func() { f.attest = nil })
				time.Sleep(31 * time.Second)
				if n.metric("signet_agent_connected") != 1 {
					t.Error("the CA is good again, and there is no session")
				}
			})
		})
	}
}

// A session that does not begin as it must is none.
func TestHostileSessions(t *testing.T) {
	for _, tt := range []struct {
		name     string
		messages func(*fake) []*apiv1.SessionResponse
		want     api.Reason
	}{
		{"silence", func(*fake) []*apiv1.SessionResponse { return []*apiv1.SessionResponse{nil} }, api.DeadlineExceeded},
		{"silence after Welcome", func(*fake) []*apiv1.SessionResponse { return []*apiv1.SessionResponse{welcome(), nil} }, api.DeadlineExceeded},
		{"bundle first", func(f *fake) []*apiv1.SessionResponse {
			return []*apiv1.SessionResponse{bundleMessage(bundle(1, 1, f.root)), nil}
		}, api.SessionProtocol},
		{"key sets before the bundle", func(f *fake) []*apiv1.SessionResponse {
			return []*apiv1.SessionResponse{welcome(), f.keySets(), nil}
		}, api.SessionProtocol},
		{"another protocol", func(*fake) []*apiv1.SessionResponse {
			return []*apiv1.SessionResponse{welcome(func(w *apiv1.Welcome) { w.Protocol++ }), nil}
		}, api.ProtocolSkew},
		{"another trust domain", func(*fake) []*apiv1.SessionResponse {
			return []*apiv1.SessionResponse{welcome(func(w *apiv1.Welcome) { w.TrustDomain = "other.example" }), nil}
		}, api.SessionProtocol},
		{"older bundle", func(f *fake) []*apiv1.SessionResponse {
			return []*apiv1.SessionResponse{welcome(), bundleMessage(bundle(0, 7, f.root)), nil}
		}, api.BundleRollback},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, replicaID)
				f.session = tt.messages(f)
				n := f.start()
				time.Sleep(time.Minute)
				if got := n.log.find(noMore, tt.want); len(got) < 2 || n.metric("signet_agent_connected") != 0 {
					t.Errorf("connected %v, failures for %s: %d", n.metric("signet_agent_connected"), tt.want, len(got))
				}
				f.set(func() { f.session = nil })
				time.Sleep(41 * time.Second)
				if n.metric("signet_agent_connected") != 1 {
					t.Error("the CA is good again, and there is no session")
				}
			})
		})
	}
}

// A bundle is taken over only if it follows from the one that is held; anything else changes nothing and is an alarm.
//
// spiffe: B-02, X-05
// threat: D23, H01, H02
func TestBundles(t *testing.T) {
	for _, tt := range []struct {
		name    string
		pushed  func(f *fake, second *root) *apiv1.Bundle
		refused api.Reason // zero: it is held afterwards
	}{
		{"the same", func(f *fake, second *root) *apiv1.Bundle { return bundle(1, 5, f.root, second) }, ""},
		{"the same, in another order", func(f *fake, second *root) *apiv1.Bundle { return bundle(1, 5, second, f.root) }, ""},
		{"the next", func(f *fake, second *root) *apiv1.Bundle { return bundle(1, 6, second) }, ""},
		{"the next epoch", func(f *fake, second *root) *apiv1.Bundle { return bundle(2, 1, f.root) }, ""},
		{"an older one", func(f *fake, second *root) *apiv1.Bundle { return bundle(1, 4, f.root, second) }, api.BundleRollback},
		{"an older epoch", func(f *fake, second *root) *apiv1.Bundle { return bundle(0, 9, f.root, second) }, api.BundleRollback},
		{"fewer roots", func(f *fake, second *root) *apiv1.Bundle { return bundle(1, 5, f.root) }, api.BundleEquivocation},
		{"other roots", func(f *fake, second *root) *apiv1.Bundle { return bundle(1, 5, f.root, newRoot(f.t)) }, api.BundleEquivocation},
		{"no roots", func(f *fake, second *root) *apiv1.Bundle { return bundle(1, 6) }, api.BundleRejected},
		{"a hash of others", func(f *fake, second *root) *apiv1.Bundle {
			b := bundle(1, 6, f.root)
			b.Hash = bundle(1, 6, second).Hash
			return b
		}, api.BundleRejected},
		{"no hash", func(f *fake, second *root) *apiv1.Bundle {
			b := bundle(1, 6, f.root)
			b.Hash = nil
			return b
		}, api.BundleRejected},
		{"no certificate", func(f *fake, second *root) *apiv1.Bundle {
			b := bundle(1, 6, f.root)
			b.Roots[0] = []byte("x")
			return b
		}, api.BundleRejected},
		{"a leaf", func(f *fake, second *root) *apiv1.Bundle {
			return bundle(1, 6, &root{cert: sign(f.t, leaf(webID), f.root.inter, newKey(f.t).Public(), f.root.ikey)})
		}, api.BundleRejected},
		{"65 roots", func(f *fake, second *root) *apiv1.Bundle {
			var roots []*root
			for range 65 {
				roots = append(roots, f.root)
			}
			return bundle(1, 6, roots...)
		}, api.BundleRejected},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, replicaID)
				second := newRoot(t)
				f.session = []*apiv1.SessionResponse{welcome(), bundleMessage(bundle(1, 5, f.root, second)), f.keySets()}
				cache := newMemory()
				n := f.start(func(c *agent.Config) { c.Cache = cache })
				id := f.admit(n, "web-1")
				await(t, id, time.Second, "SVID", hasSVID)
				held, kept := n.Trust().Load(), string(cache.get("trust"))
				if held.Generation.String() != "1.5" {
					t.Fatalf("the bundle is of generation %s", held.Generation)
				}
				pushed := tt.pushed(f, second)
				f.push <- bundleMessage(pushed)
				synctest.Wait()
				got := n.Trust().Load()
				if tt.refused != "" {
					if got != held || string(cache.get("trust")) != kept || n.metric("signet_agent_bundle_sequence") != 1<<32|5 {
						t.Error("what is held or cached has changed")
					}
					if n.metric("signet_agent_bundles_refused_total") != 1 || len(n.log.find("trust bundle refused, keeping the one that is held", tt.refused)) != 1 {
						t.Errorf("%v refused, alarms %v", n.metric("signet_agent_bundles_refused_total"), n.log.find("trust bundle refused, keeping the one that is held", ""))
					}
					if len(n.log.find(noMore, tt.refused)) != 1 || id.Held().Load().SVID == nil {
						t.Error("the session went on, or the SVID was dropped")
					}
					return
				}
				if got.Generation != (api.Generation{Epoch: pushed.Epoch, Number: pushed.Number}) || string(got.Hash[:]) != string(pushed.Hash) {
					t.Errorf("the bundle is of generation %s", got.Generation)
				}
				if n.metric("signet_agent_bundles_refused_total") != 0 || n.metric("signet_agent_connected") != 1 {
					t.Error("a good bundle cost the session")
				}
				if n.metric("signet_agent_bundle_sequence") != float64(got.Generation.Sequence()) {
					t.Errorf("the metric says generation %v", n.metric("signet_agent_bundle_sequence"))
				}
				time.Sleep(2 * time.Second)
				reports := f.take()
				last := reports[len(reports)-1]
				if last.GetBundleEpoch() != pushed.Epoch || last.GetBundleNumber() != pushed.Number || string(last.GetBundleHash()) != string(pushed.Hash) {
					t.Errorf("the CA was told of generation %d.%d", last.GetBundleEpoch(), last.GetBundleNumber())
				}
			})
		})
	}
}

// Key sets that cannot be used cost neither the session nor the last good ones.
func TestDamagedKeySets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, replicaID)
		n := f.start()
		await(t, f.admit(n, "web-1"), time.Second, "SVID", hasSVID)
		for _, sets := range [][]*apiv1.KeySet{nil, {{Issuer: f.tokens.Name(), Jwks: []byte("{")}}, {{Issuer: "", Jwks: f.tokens.JWKS()}}} {
			f.push <- &apiv1.SessionResponse{Message: &apiv1.SessionResponse_KeySets{KeySets: &apiv1.KeySets{Sets: sets}}}
			synctest.Wait()
			await(t, f.admit(n, "web-2"), time.Second, "SVID", hasSVID)
		}
		f.push <- &apiv1.SessionResponse{} // of a kind that a later CA may send
		synctest.Wait()
		if n.metric("signet_agent_connected") != 1 || len(n.log.find(opened, "")) != 1 {
			t.Error("the session ended")
		}
		if got := len(n.log.find("the CA sent key sets that cannot be used, keeping the last good ones", "")); got != 3 {
			t.Errorf("said so %d times, want 3", got)
		}
		// A rotation of the issuer's keys reaches Admit.
		if err := f.tokens.Rotate(); err != nil {
			t.Fatal(err)
		}
		f.push <- f.keySets()
		synctest.Wait()
		await(t, f.admit(n, "web-3"), time.Second, "SVID", hasSVID)
	})
}
