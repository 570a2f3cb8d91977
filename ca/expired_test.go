package ca_test

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/upstream"
)

// filed is a drill whose root lies in files.
type filed struct {
	*drill
	dir string
}

// newFiled has one agent and a root of its own, and begins to go over to files, whose root lives for so long.
func newFiled(t *testing.T, life time.Duration, manual bool) *filed {
	t.Helper()
	f := &filed{dir: t.TempDir()}
	files := upstream.DiskConfig{KeyFile: filepath.Join(f.dir, "tls.key"), CertificateFile: filepath.Join(f.dir, "tls.crt")}
	f.drill = &drill{t: t}
	f.put(life)
	f.drill = newDrill(t, catest.Options{Config: func(cfg *ca.Config) {
		up, err := upstream.Open(upstream.Config{Kind: "disk", Disk: files}, upstream.Parts{Sealer: cfg.Sealer})
		if err != nil {
			t.Fatal(err)
		}
		cfg.Upstream, cfg.ManualRotation = up, manual
	}}, 1)
	f.begin("to-files")
	return f
}

// put makes a root that lives for so long, from now on, and puts it into the files.
func (f *filed) put(life time.Duration) (id string) {
	f.t.Helper()
	key := newKey(f.t)
	root, err := issuance.NewRoot(spiffeTD(f.t, catest.TrustDomain), key, life, time.Now())
	if err != nil {
		f.t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		f.t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{"tls.key": {Type: "PRIVATE KEY", Bytes: der}, "tls.crt": {Type: "CERTIFICATE", Bytes: root.Raw}} {
		next := filepath.Join(f.dir, "next")
		if err := os.WriteFile(next, pem.EncodeToMemory(block), 0o600); err != nil {
			f.t.Fatal(err)
		}
		if err := os.Rename(next, filepath.Join(f.dir, name)); err != nil {
			f.t.Fatal(err)
		}
	}
	return hexOf(root.SubjectKeyId)
}

// TestCannotBegin: a rotation that is due and that nothing can be done about is told to people as long as it is so, counted once, and
// begun as soon as the upstream tells of another root.
func TestCannotBegin(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		const life = 48 * time.Hour
		f := newFiled(t, life, false)
		f.over("to-files", "done")
		f.peers[0].leave()
		old, made := f.active(), time.Now() // an hour later at the most
		time.Sleep(life / 2)
		for range 100 {
			time.Sleep(time.Minute + time.Second)
			s := f.status()
			if s.GetOperation() != nil || s.GetTroubleReason() != string(api.AuthorityRefused) || !strings.Contains(s.GetTrouble(), old) {
				t.Fatalf("%s: under way %v, trouble %q: %q", time.Since(made), s.GetOperation(), s.GetTroubleReason(), s.GetTrouble())
			}
		}
		if n := metric(t, f.CA(), "signet_ca_rotation_failures_total"); n < 2 || n > 4 {
			t.Errorf("%v failures were counted, want one an hour", n)
		}
		time.Sleep(life / 3) // the latest date is over: it need not be cross-signed any more
		fresh, put := f.put(life), time.Now()
		eventually(t, "the new root to be active", func() bool { return f.active() == fresh })
		if took := time.Since(put); took > 10*time.Minute {
			t.Errorf("it took %s until the new root was active", took)
		}
		if s := f.status(); s.GetTroubleReason() != "" {
			t.Errorf("there is still trouble: %s, %s", s.GetTroubleReason(), s.GetTrouble())
		}
	})
}

// TestRootExpiredMeanwhile starts a CA whose root expired while nobody ran: it serves, says why it issues nothing, and takes up new files
// without being started again; by itself, or by whoever begins a rotation. Agents come back with the bundle as it is published.
//
// threat: E26
func TestRootExpiredMeanwhile(t *testing.T) {
	for _, manual := range []bool{false, true} {
		t.Run(fmt.Sprint("manual ", manual), func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				const life = 48 * time.Hour
				f := newFiled(t, life, manual)
				f.over("to-files", "done")
				old := f.active()
				f.peers[0].leave()
				f.Kill()
				time.Sleep(life)
				f.Start()
				f.admin = adminOf(t, f.CA())
				why := func() string {
					resp, err := f.admin.GetStatus(t.Context(), &apiv1.GetStatusRequest{})
					if err != nil {
						return api.FromStatus(err).Error() // it is starting
					}
					return strings.Join(resp.GetNotReady(), " ") + " " + resp.GetUpstream().GetReason()
				}
				eventually(t, "words about it", func() bool { return strings.Count(why(), string(api.UpstreamFiles)) == 2 })
				if got := f.active(); got != old {
					t.Errorf("%s is active", got)
				}
				if s := f.status(); manual == (s.GetTroubleReason() == string(api.UpstreamFiles)) {
					t.Errorf("trouble %q: %q", s.GetTroubleReason(), s.GetTrouble())
				}
				fresh, put := f.put(life), time.Now()
				if manual {
					var err error
					eventually(t, "the new files to be read", func() bool {
						_, err = f.admin.StartRotation(t.Context(), &apiv1.StartRotationRequest{Operation: "back", Reason: "expired"})
						return api.ReasonOf(api.FromStatus(err)) != api.UpstreamFiles
					})
					wantReason(t, api.FromStatus(err), api.UpstreamCross)
					if _, err := f.admin.StartRotation(t.Context(), &apiv1.StartRotationRequest{Operation: "back", Reason: "expired", WithoutCross: true}); err != nil {
						t.Fatal(api.FromStatus(err))
					}
				}
				eventually(t, "readiness", func() bool { return len(f.CA().NotReady()) == 0 })
				if took := time.Since(put); f.active() != fresh || took > 5*time.Minute {
					t.Errorf("after %s %s is active", took, f.active())
				}
				if p := newPeer(t, f.Server, "node-1"); p.root() != fresh {
					t.Errorf("the agent that came back has an SVID under %s", p.root())
				}
				eventually(t, "the end of what was begun", func() bool { return f.status().GetOperation() == nil })
				if f.state(old) != "gone" {
					t.Errorf("the root that expired is %s", f.state(old))
				}
			})
		})
	}
}

// TestRolledBackRoot: a root that was rolled back is never taken again, and the plan says so before anybody begins.
func TestRolledBackRoot(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		f := newFiled(t, 48*time.Hour, false)
		gone := f.status().GetOperation().GetAuthority()
		eventually(t, "the root in the files to be active", func() bool { return f.active() == gone })
		if _, err := f.admin.RollbackRotation(t.Context(), &apiv1.RollbackRotationRequest{Operation: "to-files", Reason: "trouble"}); err != nil {
			t.Fatal(api.FromStatus(err))
		}
		f.over("to-files", "rolled-back")
		if p := f.plan(); p.GetCanMake() || !strings.Contains(p.GetCannotMake(), gone) {
			t.Errorf("a root that is gone could follow: %v, %q", p.GetCanMake(), p.GetCannotMake())
		}
		old := f.active()
		_, err := f.admin.StartRotation(t.Context(), &apiv1.StartRotationRequest{Operation: "again", Reason: "a drill"})
		wantReason(t, api.FromStatus(err), api.AuthorityRefused)
		_, err = f.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: "stolen", Compromised: old, Reason: "key on the net", Losing: 1})
		wantReason(t, api.FromStatus(err), api.AuthorityRefused)
		if f.active() != old || f.status().GetOperation() != nil {
			t.Error("what was refused changed something")
		}
		f.put(48 * time.Hour)
		eventually(t, "the new files to be read", func() bool { return f.plan().GetCanMake() })
		f.begin("again")
		f.over("again", "done")
	})
}

// TestActiveInVain has an upstream sign nothing under the root that became the active one: whoever looks is told why, and not that it ends
// by itself, for what ends is the intermediate under the old one; that root is kept, and the way back is open.
func TestActiveInVain(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		up := new(without)
		d := newDrill(t, catest.Options{Config: func(cfg *ca.Config) { up.Upstream, cfg.Upstream = cfg.Upstream, up }}, 1)
		old := d.active()
		fresh := d.begin("first").GetOperation().GetAuthority()
		up.lose(fresh)
		eventually(t, "the new root to be active", func() bool { return d.state(fresh) == "active" })
		told := func(name string) {
			t.Helper()
			var last *apiv1.Rotation
			eventually(t, "words about it", func() bool {
				last = d.status()
				for _, g := range last.GetGates() {
					for _, b := range g.GetBlockers() {
						if b.GetName() == name && b.GetUntil() == nil && strings.Contains(b.GetWhy(), string(api.UpstreamRoot)+": the key of that root is not here") {
							return true
						}
					}
				}
				return false
			})
			for _, s := range last.GetForecast().GetSteps() {
				if s.GetDo() == "remove" && s.GetLatest() != nil {
					t.Errorf("the old root goes by itself at %s", s.GetLatest().AsTime())
				}
			}
		}
		told("replica/" + catest.Replica)
		if !testing.Short() {
			d.peers[0].leave()
			time.Sleep(25 * time.Hour) // the intermediate under the old root has expired
			told("replicas")
		}
		if d.state(old) != "retiring" {
			t.Fatalf("the old root is %s", d.state(old))
		}
		up.restore()
		d.over("first", "done")
		for _, g := range d.status().GetGates() {
			t.Errorf("there is still a step to take: %v", g)
		}
	})
}
