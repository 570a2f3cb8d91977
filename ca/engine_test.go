package ca_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/journal"
)

// without is an upstream that has lost the keys of some roots.
type without struct {
	ca.Upstream

	mu   sync.Mutex
	lost []string // ids; "*" for all, "!" and an id for all others
}

func (u *without) lose(id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.lost = append(u.lost, id)
}

func (u *without) restore() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.lost = nil
}

func (u *without) has(id string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	others := func(lost string) bool { return strings.HasPrefix(lost, "!") && lost != "!"+id }
	if slices.Contains(u.lost, id) || slices.ContainsFunc(u.lost, others) {
		return api.E(api.UpstreamRoot, "the key of that root is not here")
	}
	if slices.Contains(u.lost, "*") {
		return api.E(api.UpstreamUnavailable, "connection refused")
	}
	return nil
}

// Mint implements ca.Upstream.
func (u *without) Mint(ctx context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
	if err := u.has(r.Root.ID); err != nil {
		return nil, err
	}
	return u.Upstream.Mint(ctx, r)
}

// Probe implements ca.Upstream.
func (u *without) Probe(ctx context.Context, td spiffeid.TrustDomain, a journal.Authority) error {
	if err := u.has(a.ID); err != nil {
		return err
	}
	return u.Upstream.Probe(ctx, td, a)
}

// Found implements ca.Founder.
func (u *without) Found(ctx context.Context, td spiffeid.TrustDomain, now time.Time) (journal.Authority, error) {
	return u.Upstream.(ca.Founder).Found(ctx, td, now)
}

// CrossSign implements ca.CrossSigner.
func (u *without) CrossSign(ctx context.Context, td spiffeid.TrustDomain, older journal.Authority, newer *x509.Certificate) (*x509.Certificate, error) {
	return u.Upstream.(ca.CrossSigner).CrossSign(ctx, td, older, newer)
}

// TestRestartForgetsNobody kills the CA while a pod that rejects the bundle is waited for: until its agent is back it is the agent that
// is waited for, though that holds the bundle. An agent that never comes back is waited for until its SVIDs have expired.
//
// threat: E13
func TestRestartForgetsNobody(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 2)
		d.peers[0].reject("no")
		fresh := d.begin("first").GetOperation().GetAuthority()
		blocked := func(name string) {
			t.Helper()
			eventually(t, "who is waited for: "+name, func() bool { return slices.Equal(d.blockers(), []string{name}) })
		}
		blocked("pod/shop/web-node-1")
		d.restart()
		if got := d.state(fresh); got != "published" {
			t.Fatalf("after the kill the new root is %s", got)
		}
		blocked("pod/shop/web-node-1")
		d.peers[0].leave()
		d.restart()
		blocked("node/node-1")
		left := time.Now()
		eventually(t, "the new root to be active", func() bool { return d.state(fresh) == "active" })
		if took := time.Since(left); took < 30*time.Minute || took > 2*time.Hour {
			t.Errorf("an agent that is gone was waited for for %s", took)
		}
	})
}

// TestReconnectingPod rejects the bundle on sixteen streams, which it opens anew all the time: one pod is waited for, by name, and no
// longer than the limit.
//
// threat: E13
func TestReconnectingPod(t *testing.T) {
	for _, protocol := range []string{"sotw", "workload-api"} {
		t.Run(protocol, func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				d := newDrill(t, catest.Options{}, 2, func(p *peer) { p.protocol, p.count = protocol, 16 })
				d.peers[0].reject("no")
				began := time.Now()
				fresh := d.begin("first").GetOperation().GetAuthority()
				for named := false; d.state(fresh) != "active"; time.Sleep(20 * time.Second) {
					d.peers[0].reopen()
					if took := time.Since(began); took > 65*time.Minute {
						t.Fatalf("it is waited for for %s: %q", took, d.blockers())
					}
					names := slices.DeleteFunc(d.blockers(), func(name string) bool { return name != "pod/shop/web-node-1" })
					if named = named || len(names) > 0; len(names) > 1 || !named && time.Since(began) > time.Minute {
						t.Errorf("sixteen streams are %q", names)
					}
				}
				limit := time.Hour
				if protocol == "workload-api" { // which rejects nothing; the soak is that of the pod, not of each stream
					limit = journal.DefaultSoak
				}
				if took := time.Since(began); took < limit || took > limit+3*time.Minute {
					t.Errorf("it took %s, want %s", took, limit)
				}
			})
		})
	}
}

// TestSoakOverSessions: a pod that speaks the Workload API is given its soak once, though its agent opens a session every two minutes.
func TestSoakOverSessions(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 1, func(p *peer) { p.protocol = "workload-api" })
		began := time.Now()
		fresh := d.begin("first").GetOperation().GetAuthority()
		for d.state(fresh) != "active" {
			time.Sleep(2 * time.Minute)
			d.peers[0].again()
			if took := time.Since(began); took > journal.DefaultSoak+5*time.Minute {
				t.Fatalf("it is waited for for %s: %q", took, d.blockers())
			}
		}
		if took := time.Since(began); took < journal.DefaultSoak {
			t.Errorf("it took %s", took)
		}
	})
}

// TestSoakOfNewPods: a pod that starts when its agent has had the new bundle for a while never had an older one. Where there is a new pod
// every minute, somebody would always be in his soak.
func TestSoakOfNewPods(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 1, func(p *peer) { p.protocol = "workload-api" })
		began := time.Now()
		fresh := d.begin("first").GetOperation().GetAuthority()
		for n := 0; d.state(fresh) != "active"; n++ {
			time.Sleep(time.Minute)
			d.peers[0].add(fmt.Sprint("job-", n))
			if took := time.Since(began); took > journal.DefaultSoak+3*time.Minute {
				t.Fatalf("it is waited for for %s: %q", took, d.blockers())
			}
		}
		if took := time.Since(began); took < journal.DefaultSoak {
			t.Errorf("it took %s", took)
		}
	})
}

// TestEmergencyWithoutSigner: a compromised root stays until somebody can issue under its successor, though the limit is over. Who
// wants it out at any price forces it.
func TestEmergencyWithoutSigner(t *testing.T) {
	for _, force := range []bool{false, true} {
		t.Run(fmt.Sprint("force ", force), func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				up := new(without)
				d := newDrill(t, catest.Options{Config: func(cfg *ca.Config) { up.Upstream = cfg.Upstream; cfg.Upstream = up }}, 1)
				old := d.active()
				up.lose("*")
				if _, err := d.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: "stolen", Compromised: old, Reason: "key on the net", Losing: 1}); err != nil {
					t.Fatal(api.FromStatus(err))
				}
				time.Sleep(20 * time.Minute)
				if d.state(old) != "tainted" || !slices.Equal(d.blockers(), []string{"replicas"}) {
					t.Fatalf("the only root under which anybody can issue is %s; in its way: %q", d.state(old), d.blockers())
				}
				if force {
					gate := d.status().GetGates()[0]
					if _, err := d.admin.ForceStep(t.Context(), &apiv1.ForceStepRequest{Operation: "stolen", Do: "remove", Authority: old, Digest: gate.GetDigest(), Reason: "out with him"}); err != nil {
						t.Fatal(api.FromStatus(err))
					}
					if d.state(old) != "gone" {
						t.Errorf("forced, it is %s", d.state(old))
					}
				}
				up.restore()
				d.over("stolen", "done")
				eventually(t, "an SVID under the new root", func() bool { return d.peers[0].root() != old })
			})
		})
	}
}

// TestPlannedWithoutSigner: where nothing can be issued under the new root, the old one stays, and so does the way back, even when the
// last intermediate under it and the last SVID have expired.
func TestPlannedWithoutSigner(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		up := new(without)
		d := newDrill(t, catest.Options{Config: func(cfg *ca.Config) { up.Upstream = cfg.Upstream; cfg.Upstream = up }}, 0) // agents would redial an expired CA for hours
		old := d.active()
		up.lose("!" + old) // before there is another: with nobody to wait for it is active, and signed under, at once
		fresh := d.begin("planned").GetOperation().GetAuthority()
		eventually(t, "the new root to be active", func() bool { return d.state(fresh) == "active" })
		time.Sleep(26 * time.Hour)
		if d.state(old) != "retiring" || !slices.Contains(d.blockers(), "replicas") {
			t.Fatalf("the only root under which anybody could issue is %s; in its way: %q", d.state(old), d.blockers())
		}
		up.restore()
		d.over("planned", "done")
		newPeer(t, d.Server, "node-9") // everything is issued
	})
}

// TestEmergencyAfterSwitch: where the root that retires has its key in an upstream that is not configured any more, an emergency about
// the new one needs a third, and a rollback is refused.
func TestEmergencyAfterSwitch(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		up := new(without)
		d := newDrill(t, catest.Options{Config: func(cfg *ca.Config) { up.Upstream = cfg.Upstream; cfg.Upstream = up }}, 2)
		old := d.active()
		fresh := d.begin("switch").GetOperation().GetAuthority()
		eventually(t, "the new root to be active", func() bool { return d.state(fresh) == "active" })
		up.lose(old)
		_, err := d.admin.RollbackRotation(t.Context(), &apiv1.RollbackRotationRequest{Operation: "switch", Reason: "trouble"})
		wantReason(t, api.FromStatus(err), api.UpstreamRoot)
		began := time.Now()
		if _, err := d.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: "stolen", Compromised: fresh, Reason: "key on the net", Losing: 2}); err != nil {
			t.Fatal(api.FromStatus(err))
		}
		eventually(t, "the compromised root to be gone", func() bool { return d.state(fresh) == "gone" })
		if took := time.Since(began); took > time.Minute {
			t.Errorf("it took %s", took)
		}
		if a := d.active(); a == old || a == fresh {
			t.Errorf("root %s is active, whose key is not there", a)
		}
		newPeer(t, d.Server, "node-9") // everything is issued
	})
}

// TestEmergencyIsNoOther: an id under which something else was begun is no repetition, and who may not declare an emergency does not
// take one back.
func TestEmergencyIsNoOther(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 1)
		d.peers[0].reject("no")
		old, operator := d.active(), apiv1.NewAdminClient(operatorsConn(t, d.Server, nil))
		d.begin("incident")
		declare := func(id, root string) error {
			_, err := d.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: id, Compromised: root, Reason: "key on the net", Losing: 1})
			return api.FromStatus(err)
		}
		wantReason(t, declare("incident", old), api.RotationInvalid)
		wantReason(t, declare("stolen", ""), api.RotationInvalid)
		if err := declare("stolen", old); err != nil {
			t.Fatal(err)
		}
		if err := declare("stolen", old[:12]); err != nil { // the same again
			t.Error(err)
		}
		_, err := d.admin.StartRotation(t.Context(), &apiv1.StartRotationRequest{Operation: "stolen", Reason: "yearly"})
		wantReason(t, api.FromStatus(err), api.RotationInvalid)
		ctx := metadata.AppendToOutgoingContext(t.Context(), bearerOf(d.Person(operatorsNS, "operator", 10*time.Minute))...)
		_, err = operator.AbortRotation(ctx, &apiv1.AbortRotationRequest{Operation: "stolen", Reason: "never mind"})
		wantReason(t, api.FromStatus(err), api.RoleRequired)
		if o := d.status().GetOperation(); o.GetId() != "stolen" {
			t.Fatalf("under way: %v", o)
		}
		if _, err := d.admin.AbortRotation(t.Context(), &apiv1.AbortRotationRequest{Operation: "stolen", Reason: "a mistake"}); err != nil {
			t.Error(api.FromStatus(err))
		}
	})
}

// TestOtherReplica: a replica whose record is in the store is waited for while it may have an intermediate, though it does not live any
// more, and no longer; and one that shares the store says all the time that it lives, and what it signs under.
//
// threat: E09
func TestOtherReplica(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		st := &sharedStore{changed: make(chan struct{})}
		d := newDrill(t, catest.Options{Config: func(cfg *ca.Config) { st.Store, cfg.Store = cfg.Store, st }}, 1)
		old := d.active()
		for range 5 {
			time.Sleep(7 * time.Minute)
			r, err := ca.ReplicaOf(t.Context(), st, catest.Replica)
			if err != nil || time.Since(r.Beat) > 30*time.Second || r.Signs != old || len(r.Minted) != 1 || !r.Minted[0].NotAfter.After(time.Now()) {
				t.Fatalf("what the replica says of itself at %s: %+v, %v", time.Now(), r, err)
			}
		}
		end := time.Now().Add(5 * time.Hour).UTC()
		dead := ca.Replica{Name: "ca-9", Signs: old, Beat: time.Now().UTC(), Minted: []ca.Minted{{At: time.Now().UTC(), NotAfter: end, Root: old, ID: "x", Longest: time.Hour}}}
		if err := st.SaveReplica(t.Context(), dead); err != nil {
			t.Fatal(err)
		}
		d.begin("first")
		eventually(t, "the dead replica alone to be waited for", func() bool { return slices.Equal(d.blockers(), []string{"replica/ca-9"}) })
		if i := slices.IndexFunc(d.status().GetReplicas(), func(r *apiv1.RotationReplica) bool { return r.GetName() == "ca-9" }); i < 0 || d.status().GetReplicas()[i].GetReachable() {
			t.Errorf("replicas: %v", d.status().GetReplicas())
		}
		d.over("first", "done")
		if late := time.Since(end); late < 0 || late > time.Minute || d.state(old) != "gone" {
			t.Errorf("the old root is %s, %s after the last intermediate of the dead replica", d.state(old), late)
		}
	})
}

// TestForeignBundle alarms, once a session, where an agent holds what this CA never had; issuance goes on.
//
// threat: E05
func TestForeignBundle(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{})
		b := s.CA().Bundle()
		for _, tt := range []struct {
			name   string
			g      api.Generation
			hash   []byte
			alarms float64
		}{
			{"the bundle that there is", b.Generation, b.Hash[:], 0},
			{"an earlier one", api.Generation{Epoch: b.Generation.Epoch}, make([]byte, 32), 0},
			{"none", api.Generation{}, nil, 0},
			{"a later one", api.Generation{Epoch: b.Generation.Epoch, Number: b.Generation.Number + 1}, b.Hash[:], 1},
			{"another one", b.Generation, make([]byte, 32), 1},
		} {
			before := metric(t, s.CA(), "signet_ca_foreign_bundles_total")
			l := newNode(t, s, "node-1").session()
			for range 2 {
				l.stream.Send(report(&apiv1.Report{Full: true, BundleEpoch: tt.g.Epoch, BundleNumber: tt.g.Number, BundleHash: tt.hash}))
				synctest.Wait()
			}
			if got := metric(t, s.CA(), "signet_ca_foreign_bundles_total") - before; got != tt.alarms {
				t.Errorf("%s: %v alarms, want %v", tt.name, got, tt.alarms)
			}
			if _, err := l.issue(l.n.item(s.Pod("shop", "web", "web", "node-1"))); err != nil {
				t.Errorf("%s: not issued: %v", tt.name, err)
			}
		}
	})
}
