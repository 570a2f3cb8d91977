package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/audit"
)

// peer is an agent with one pod that does what an agent has to, as far as its test lets it: it keeps a session, holds the bundle that it
// is sent, says that the pod has acknowledged it, and has everything issued anew when it is told to.
type peer struct {
	t    *testing.T
	s    *catest.Server
	name string
	pod  attestortest.Pod
	n    *node
	stop context.CancelFunc
	done chan struct{}

	protocol string   // of the pod's streams
	count    int      // of them
	others   []string // more pods that it has, with a stream of the Workload API each

	mu     sync.Mutex
	opened uint64 // streams so far
	nack   string // the pod rejects bundles with these words
	link   *link
	bundle *apiv1.Bundle // that it holds
	acked  *apiv1.Bundle // by the pod
	svid   *apiv1.SVID
}

func newPeer(t *testing.T, s *catest.Server, name string, change ...func(*peer)) *peer {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	p := &peer{t: t, s: s, name: name, pod: s.Pod("shop", "web-"+name, "web", name), stop: cancel, done: make(chan struct{}), protocol: "sotw", count: 1}
	for _, f := range change {
		f(p)
	}
	p.n = &node{t: t, s: s, pod: s.AgentPod(name)}
	go func() {
		defer close(p.done)
		for ctx.Err() == nil {
			if err := p.serve(ctx); err != nil && ctx.Err() == nil {
				select {
				case <-ctx.Done():
				case <-time.After(time.Second):
				}
			}
		}
	}()
	t.Cleanup(p.leave)
	eventually(t, "a session of "+name, func() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.svid != nil })
	return p
}

// leave ends the peer without a word.
func (p *peer) leave() {
	p.stop()
	<-p.done
}

// serve is one session with everything fresh.
func (p *peer) serve(ctx context.Context) error {
	if p.s.CA().Bundle() == nil {
		return errors.New("the CA is starting")
	}
	resp, key, err := p.n.attest(nil)
	if err != nil {
		return err
	}
	p.n.svid = svidOf(p.t, resp.GetChain(), key)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client := apiv1.NewAuthorityClient(dial(p.t, p.s, p.n.svid))
	stream, err := client.Session(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(p.n.hello()); err != nil {
		return err
	}
	l := &link{t: p.t, n: p.n, client: client, stream: stream}
	for first := true; ; {
		m, err := stream.Recv()
		if err != nil {
			return api.FromStatus(err)
		}
		switch {
		case m.GetBundle() != nil && first:
			first = false
			svid, err := l.issue(p.n.item(p.pod))
			if err != nil {
				return err
			}
			p.mu.Lock()
			p.link, p.bundle, p.svid = l, m.GetBundle(), svid
			p.tell()
			p.mu.Unlock()
		case m.GetBundle() != nil:
			p.mu.Lock()
			p.bundle = m.GetBundle()
			p.tell()
			p.mu.Unlock()
		case m.GetReissue() != nil && slices.Contains(m.GetReissue().GetRootKeyIds(), p.root()):
			return nil // the next session has everything anew
		}
	}
}

// tell reports everything; the caller holds mu.
func (p *peer) tell() {
	if p.nack == "" {
		p.acked = p.bundle
	}
	b, leaf := p.bundle, leafOf(p.t, p.svid)
	h := &apiv1.Holding{Key: "web", SpiffeId: p.svid.GetSpiffeId(), Namespace: "shop", PodName: p.pod.Name, PodUid: p.pod.UID, Serial: "01",
		NotAfter: timestamppb.New(leaf.NotAfter), RootKeyId: hexOf(intermediateOf(p.t, p.svid).AuthorityKeyId)}
	for i := range p.count {
		s := &apiv1.Stream{Id: p.opened + uint64(i) + 1, Protocol: p.protocol, WantsBundle: true, PushedGeneration: sequenceOf(b), PushedHash: b.GetHash()}
		if p.protocol == "sotw" {
			s.AckedGeneration, s.AckedHash, s.Nack = sequenceOf(p.acked), p.acked.GetHash(), p.nack
		}
		h.Streams = append(h.Streams, s)
	}
	all := []*apiv1.Holding{h}
	for _, name := range p.others {
		all = append(all, &apiv1.Holding{Key: name, SpiffeId: h.SpiffeId, Namespace: "shop", PodName: name, PodUid: name, Serial: "01", NotAfter: h.NotAfter, RootKeyId: h.RootKeyId,
			Streams: []*apiv1.Stream{{Id: 1, Protocol: "workload-api", WantsBundle: true, PushedGeneration: sequenceOf(b), PushedHash: b.GetHash()}}})
	}
	p.link.stream.Send(report(&apiv1.Report{Full: true, BundleEpoch: b.GetEpoch(), BundleNumber: b.GetNumber(), BundleHash: b.GetHash(), Changed: all}))
}

// add has another pod start, which speaks the Workload API.
func (p *peer) add(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.others = append(p.others, name)
	p.tell()
}

// reject makes the pod reject what it is sent from now on; with "" it takes what it was sent.
func (p *peer) reject(words string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.nack = words
	p.tell()
}

// reopen has the pod end its streams and open them anew.
func (p *peer) reopen() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.opened += uint64(p.count)
	p.tell()
}

// again ends the session; the next one follows.
func (p *peer) again() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.link.stream.CloseSend()
}

func (p *peer) root() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.svid == nil {
		return ""
	}
	return hexOf(intermediateOf(p.t, p.svid).AuthorityKeyId)
}

func sequenceOf(b *apiv1.Bundle) uint64 {
	return api.Generation{Epoch: b.GetEpoch(), Number: b.GetNumber()}.Sequence()
}

// eventually waits in fake time, for a day: it looks every second, and after a minute every ten.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	pause := time.Second
	for waited := time.Duration(0); waited < 24*time.Hour; waited += pause {
		if is() {
			return
		}
		if waited >= time.Minute {
			pause = 10 * time.Second
		}
		time.Sleep(pause)
	}
	t.Fatalf("a day has passed without %s", what)
}

// drill is a CA, its admin service and some peers.
type drill struct {
	*catest.Server
	t     *testing.T
	admin apiv1.AdminClient
	peers []*peer
}

func newDrill(t *testing.T, o catest.Options, peers int, change ...func(*peer)) *drill {
	t.Helper()
	d := &drill{t: t, Server: start(t, o)}
	d.admin = adminOf(t, d.CA())
	for i := range peers {
		d.peers = append(d.peers, newPeer(t, d.Server, fmt.Sprint("node-", i+1), change...))
	}
	eventually(t, "reports of all", func() bool { return d.status().GetPods() == uint32(peers) })
	return d
}

func (d *drill) status() *apiv1.Rotation {
	d.t.Helper()
	resp, err := d.admin.RotationStatus(d.t.Context(), &apiv1.RotationStatusRequest{})
	if err != nil {
		d.t.Fatal(api.FromStatus(err))
	}
	return resp.GetRotation()
}

// plan is that of a rotation with every default.
func (d *drill) plan() *apiv1.PlanRotationResponse {
	d.t.Helper()
	resp, err := d.admin.PlanRotation(d.t.Context(), &apiv1.PlanRotationRequest{})
	if err != nil {
		d.t.Fatal(api.FromStatus(err))
	}
	return resp
}

func (d *drill) begin(id string) *apiv1.Rotation {
	d.t.Helper()
	resp, err := d.admin.StartRotation(d.t.Context(), &apiv1.StartRotationRequest{Operation: id, Reason: "a drill"})
	if err != nil {
		d.t.Fatal(api.FromStatus(err))
	}
	if !resp.GetChanged() || resp.GetCorrelationId() == "" {
		d.t.Errorf("begun: %v", resp)
	}
	return resp.GetRotation()
}

// state is that of the root that the operation leads to, by the record as it is.
func (d *drill) state(id string) string {
	for _, a := range d.status().GetAuthorities() {
		if a.GetId() == id {
			return a.GetState()
		}
	}
	return "gone"
}

func (d *drill) active() string {
	for _, a := range d.status().GetAuthorities() {
		if a.GetState() == "active" {
			return a.GetId()
		}
	}
	return ""
}

// over waits for the end of an operation and wants that outcome.
func (d *drill) over(id, outcome string) {
	d.t.Helper()
	var last *apiv1.RotationOperation
	eventually(d.t, "the end of "+id, func() bool {
		if past := d.status().GetPast(); len(past) > 0 {
			last = past[len(past)-1]
		}
		return last.GetId() == id
	})
	if last.GetOutcome() != outcome {
		d.t.Errorf("operation %s ended as %q, want %q", id, last.GetOutcome(), outcome)
	}
}

func (d *drill) blockers() (names []string) {
	for _, g := range d.status().GetGates() {
		for _, b := range g.GetBlockers() {
			if b.GetPass() == "" {
				names = append(names, b.GetName())
			}
		}
	}
	return names
}

// restart ends the CA without a word and starts it again.
func (d *drill) restart() {
	d.t.Helper()
	d.Kill()
	d.Start()
	d.WaitReady()
	d.admin = adminOf(d.t, d.CA())
}

// TestRotation goes from one root to another with two agents: each step comes by itself, the chains carry the new root signed by the
// old, no leaf was ever issued under a root that was not trusted, and the old one goes when nothing under it is left.
func TestRotation(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 2)
		old, generation := d.active(), d.status().GetNumber()
		r := d.begin("first")
		fresh := r.GetOperation().GetAuthority()
		if again, err := d.admin.StartRotation(t.Context(), &apiv1.StartRotationRequest{Operation: "first"}); err != nil || again.GetChanged() {
			t.Errorf("the same again: %v, %v", again, err)
		}
		eventually(t, "the new root to be active", func() bool { return d.state(fresh) == "active" })
		if d.state(old) != "retiring" {
			t.Errorf("the old root is %s", d.state(old))
		}
		n := newNode(t, d.Server, "node-9")
		p := d.Pod("shop", "late", "web", "node-9")
		eventually(t, "SVIDs under the new root", func() bool {
			svid, err := n.session().issue(n.item(p))
			if err != nil {
				t.Fatal(err)
			}
			if hexOf(intermediateOf(t, svid).AuthorityKeyId) != fresh {
				return false
			}
			last, err := x509.ParseCertificate(svid.GetChain()[len(svid.GetChain())-1])
			if err != nil || hexOf(last.SubjectKeyId) != fresh || hexOf(last.AuthorityKeyId) != old {
				t.Errorf("the chain does not end with the new root signed by the old one: %v", err)
			}
			return true
		})
		d.over("first", "done")
		if d.state(old) != "gone" || d.status().GetNumber() != generation+2 || d.status().GetOperation() != nil {
			t.Errorf("at the end: old root %s, %v", d.state(old), d.status())
		}
		for _, p := range d.peers {
			if p.root() != fresh {
				t.Errorf("%s has an SVID under %s", p.name, p.root())
			}
		}
		var steps []string
		for _, r := range ledgerOf(t, d.Server) {
			if r.Kind == audit.KindRotate {
				steps = append(steps, r.Method+" "+strings.Split(r.Detail, ",")[0])
			}
		}
		if got := strings.Join(steps, "; "); got != "StartRotation operation first: a drill; step publish; step activate; step remove" {
			t.Errorf("on record: %s", got)
		}
	})
}

// TestRotationBlocked waits for a pod that rejects the bundle, by name and with its words, and for an agent that is away, over a
// restart of the CA too; an excuse lets it go on.
func TestRotationBlocked(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 3)
		d.peers[0].reject("unknown field")
		d.peers[1].leave()
		fresh := d.begin("first").GetOperation().GetAuthority()
		want := []string{"node/node-2", "pod/shop/web-node-1", "pod/shop/web-node-2"}
		blocked := func() {
			t.Helper()
			eventually(t, "those who are waited for", func() bool {
				got := d.blockers()
				slices.Sort(got)
				return slices.Equal(slices.Compact(got), want)
			})
			if got := d.state(fresh); got != "published" {
				t.Fatalf("the new root is %s", got)
			}
		}
		time.Sleep(5 * time.Minute)
		blocked()
		for _, g := range d.status().GetGates() {
			for _, b := range g.GetBlockers() {
				if b.GetName() == "pod/shop/web-node-1" && b.GetNack() != "unknown field" {
					t.Errorf("the proxy's own words are %q", b.GetNack())
				}
			}
		}
		d.restart()
		want = want[:2] // of an agent's pods nothing is written down
		blocked()
		for _, name := range []string{"node-1", "node-2"} {
			if _, err := d.admin.ExcuseRotation(t.Context(), &apiv1.ExcuseRotationRequest{Scope: "node", Name: name, Reason: "known", Lasting: durationpb.New(time.Hour)}); err != nil {
				t.Fatal(api.FromStatus(err))
			}
		}
		eventually(t, "the new root to be active", func() bool { return d.state(fresh) == "active" })
	})
}

// TestStraggler passes over a pod that never answers once the limit is over, since the new root is signed by the old one.
func TestStraggler(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 2)
		d.peers[0].reject("no")
		began := time.Now()
		fresh := d.begin("first").GetOperation().GetAuthority()
		eventually(t, "the new root to be active", func() bool { return d.state(fresh) == "active" })
		if took := time.Since(began); took < time.Hour || took > 62*time.Minute {
			t.Errorf("it took %s, want an hour", took)
		}
	})
}

// TestAbortAndRollback ends a rotation before and after its root is active.
func TestAbortAndRollback(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 2)
		old := d.active()
		d.peers[0].reject("no")
		fresh := d.begin("first").GetOperation().GetAuthority()
		eventually(t, "the new root to be published", func() bool { return d.state(fresh) == "published" })
		_, err := d.admin.RollbackRotation(t.Context(), &apiv1.RollbackRotationRequest{Operation: "first"})
		wantReason(t, api.FromStatus(err), api.RotationTooLate)
		for _, changed := range []bool{true, false} {
			resp, err := d.admin.AbortRotation(t.Context(), &apiv1.AbortRotationRequest{Operation: "first", Reason: "not today"})
			if err != nil || resp.GetChanged() != changed {
				t.Errorf("abort: %v, %v", resp, err)
			}
		}
		if d.state(fresh) != "gone" || d.active() != old {
			t.Errorf("after abort the new root is %s", d.state(fresh))
		}
		d.peers[0].reject("")
		fresh = d.begin("second").GetOperation().GetAuthority()
		eventually(t, "the new root to be active", func() bool { return d.state(fresh) == "active" })
		if _, err := d.admin.RollbackRotation(t.Context(), &apiv1.RollbackRotationRequest{Operation: "second", Reason: "trouble"}); err != nil {
			t.Fatal(api.FromStatus(err))
		}
		if d.active() != old {
			t.Errorf("after the rollback %s is active", d.active())
		}
		d.over("second", "rolled-back")
		if d.state(fresh) != "gone" {
			t.Errorf("after the rollback the new root is %s", d.state(fresh))
		}
	})
}

// TestEmergency reissues everything under a compromised root and takes it out of the bundle, in seconds.
func TestEmergency(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 3)
		old := d.active()
		plan, err := d.admin.PlanRotation(t.Context(), &apiv1.PlanRotationRequest{Emergency: true, Compromised: old[:8]})
		if err != nil || plan.GetForecast().GetLosing() != 3 {
			t.Fatalf("the plan: %v, %v", plan, err)
		}
		if f := plan.GetForecast(); f.GetNext() != nil || len(f.GetSteps()) != 3 || f.GetSteps()[0].GetAuthority() != "" || f.GetSteps()[2].GetAuthority() != old {
			t.Errorf("the plan names a root that is never made: %v", plan)
		}
		began := time.Now()
		resp, err := d.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: "stolen", Compromised: old, Reason: "key on the net", Losing: 3})
		if err != nil || !resp.GetChanged() {
			t.Fatalf("emergency: %v, %v", resp, api.FromStatus(err))
		}
		d.over("stolen", "done")
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("it took %s", took)
		}
		if d.state(old) != "gone" {
			t.Errorf("the compromised root is %s", d.state(old))
		}
		for _, p := range d.peers {
			if p.root() == old {
				t.Errorf("%s has an SVID under the compromised root", p.name)
			}
		}
	})
}

// TestEmergencyEndsSessions ends the session of an agent that was not reissued when its root goes: what is open already is not what is
// left of a root that is distrusted.
func TestEmergencyEndsSessions(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 1)
		old := d.active()
		n := newNode(t, d.Server, "node-7")
		l := n.session()
		if _, err := d.admin.EmergencyRotation(t.Context(), &apiv1.EmergencyRotationRequest{Operation: "stolen", Compromised: old, Reason: "key on the net", Losing: 1}); err != nil {
			t.Fatal(api.FromStatus(err))
		}
		began := time.Now()
		wantReason(t, l.end(), api.AgentIdentityRequired)
		if took := time.Since(began); took < 30*time.Second || took > 5*time.Minute {
			t.Errorf("the session was ended after %s", took)
		}
		d.over("stolen", "done") // a moment later: the bundle is told first
		if d.state(old) != "gone" {
			t.Errorf("the compromised root is %s", d.state(old))
		}
	})
}

// TestRotationRestarts kills the CA in each state of a rotation: it goes on from there, with the same root.
func TestRotationRestarts(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 2)
		old := d.active()
		fresh := d.begin("first").GetOperation().GetAuthority()
		d.restart()
		eventually(t, "the new root to be published", func() bool { s := d.state(fresh); return s == "published" || s == "active" })
		d.restart()
		eventually(t, "the new root to be active", func() bool { return d.state(fresh) == "active" })
		for range 3 {
			d.restart()
			time.Sleep(10 * time.Minute)
		}
		if d.state(old) != "retiring" { // what was signed before the kill is good for an hour
			t.Errorf("the old root is %s", d.state(old))
		}
		d.over("first", "done")
		if d.active() != fresh || d.state(old) != "gone" {
			t.Errorf("at the end %s is active, the old root is %s", d.active(), d.state(old))
		}
	})
}

// TestAutomaticRotation replaces a root by itself before it expires, through the same gates, and not where that is turned off.
func TestAutomaticRotation(t *testing.T) {
	for _, manual := range []bool{false, true} {
		t.Run(fmt.Sprint("manual ", manual), func(t *testing.T) {
			catest.Bubble(t, func(t *testing.T) {
				d := newDrill(t, catest.Options{Root: 48 * time.Hour, Config: func(cfg *ca.Config) { cfg.ManualRotation = manual }}, 1)
				old := d.active()
				time.Sleep(23 * time.Hour)
				if d.active() != old || d.status().GetOperation() != nil {
					t.Errorf("half a day early: %v", d.status().GetOperation())
				}
				time.Sleep(5 * time.Hour)
				if changed := d.active() != old; changed == manual {
					t.Errorf("the root was replaced: %t", changed)
				}
				if past := d.status().GetPast(); !manual && (len(past) != 1 || !past[0].GetAutomatic()) {
					t.Errorf("past operations: %v", past)
				}
			})
		})
	}
}

// TestTwoOperators lets two begin at once: one of them does, and the other is told who was first.
func TestTwoOperators(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 1)
		d.peers[0].reject("no")
		errs := make([]error, 4)
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() {
				_, err := d.admin.StartRotation(t.Context(), &apiv1.StartRotationRequest{Operation: fmt.Sprint("by-", i), Reason: "me"})
				errs[i] = api.FromStatus(err)
			})
		}
		wg.Wait()
		began := 0
		for _, err := range errs {
			if err == nil {
				began++
			} else {
				wantReason(t, err, api.RotationUnderWay)
			}
		}
		if began != 1 {
			t.Errorf("%d of them began a rotation", began)
		}
	})
}

// TestForceStep takes a step over exactly those who are named, and over nobody else.
func TestForceStep(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 2)
		d.peers[0].reject("no")
		fresh := d.begin("first").GetOperation().GetAuthority()
		const name = "pod/shop/web-node-1"
		eventually(t, "the pod to be waited for", func() bool { return slices.Equal(d.blockers(), []string{name}) })
		force := func(f *apiv1.ForceStepRequest) error {
			f.Operation, f.Do, f.Authority, f.Reason = "first", "activate", fresh, "it will be restarted"
			_, err := d.admin.ForceStep(t.Context(), f)
			return api.FromStatus(err)
		}
		wantReason(t, force(&apiv1.ForceStepRequest{}), api.BlockersChanged)
		wantReason(t, force(&apiv1.ForceStepRequest{Names: []string{name, "node/node-2"}}), api.BlockersChanged)
		wantReason(t, force(&apiv1.ForceStepRequest{Digest: []byte("another")}), api.BlockersChanged)
		if d.state(fresh) != "published" {
			t.Fatalf("the new root is %s", d.state(fresh))
		}
		if err := force(&apiv1.ForceStepRequest{Digest: d.status().GetGates()[0].GetDigest()}); err != nil {
			t.Fatal(err)
		}
		if err := force(&apiv1.ForceStepRequest{Names: []string{name}}); err != nil { // the same again
			t.Error(err)
		}
		if got := d.status().GetOperation().GetForced(); d.state(fresh) != "active" || len(got) != 1 || got[0].GetCount() != 1 {
			t.Errorf("the new root is %s, forced: %v", d.state(fresh), got)
		}
		if !slices.ContainsFunc(ledgerOf(t, d.Server), func(r audit.Record) bool {
			return r.Method == "ForceStep" && strings.Contains(r.Detail, name) && strings.Contains(r.Detail, "restarted") && r.Caller == "uid:0"
		}) {
			t.Error("it is not on record over whom the step was taken, by whom, and why")
		}
	})
}

// TestWatchRotation sends where it stands at once and at each change to all who watch, and does not end with the operation.
func TestWatchRotation(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		d := newDrill(t, catest.Options{}, 1)
		var watches []grpc.ServerStreamingClient[apiv1.WatchRotationResponse]
		next := func(i int) *apiv1.Rotation {
			t.Helper()
			m, err := watches[i].Recv()
			if err != nil {
				t.Fatal(api.FromStatus(err))
			}
			return m.GetRotation()
		}
		for i := range 5 {
			w, err := d.admin.WatchRotation(t.Context(), &apiv1.WatchRotationRequest{})
			if err != nil {
				t.Fatal(err)
			}
			watches = append(watches, w)
			if r := next(i); r.GetOperation() != nil || r.GetAgents() != 1 {
				t.Errorf("at first: %v", r)
			}
		}
		began := time.Now()
		fresh := d.begin("first").GetOperation().GetAuthority()
		w, err := d.admin.WatchRotation(t.Context(), &apiv1.WatchRotationRequest{})
		if err != nil {
			t.Fatal(err)
		}
		watches = append(watches, w)
		if r := next(len(watches) - 1); r.GetOperation().GetId() != "first" {
			t.Errorf("who watches from then on is told of no operation at first: %v", r)
		}
		for i := range watches {
			for {
				r := next(i)
				if slices.ContainsFunc(r.GetAuthorities(), func(a *apiv1.RotationRoot) bool { return a.GetId() == fresh && a.GetState() == "active" }) {
					break
				}
			}
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("all were told after %s", took)
		}
	})
}
