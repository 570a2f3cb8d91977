package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

var (
	fakeOld = strings.Repeat("71", 20) // the root that is active at first
	fakeNew = strings.Repeat("73", 20)
)

const fakeOperation = "20261124-0a1b2c3d"

// A rotationFake is the rotation of a fakeAdmin, all of it guarded by its mu. States that take hours are scenes of their own.
type rotationFake struct {
	operation string // id; empty: fakeOperation
	reason    string
	excuses   []*apiv1.RotationExcuse
	plays     int   // changes of what a watcher sees
	told      []int // messages that each watcher was sent, in the order in which they came
}

func before(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(testNow.Add(-d)) }
func hence(d time.Duration) *timestamppb.Timestamp  { return timestamppb.New(testNow.Add(d)) }

// waitTold returns once the watcher of that number, from 1 on, was sent n messages.
func (f *fakeAdmin) waitTold(watcher, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.rot.told) < watcher || f.rot.told[watcher-1] < n {
		f.looked.Wait()
	}
}

// turn changes the scene as a decision does. The caller holds mu.
func (f *fakeAdmin) turn(scene string) {
	f.scene = scene
	f.rot.plays++
	f.looked.Broadcast()
}

// rotation is where it stands in a scene. The caller holds mu.
func (f *fakeAdmin) rotation(scene string) *apiv1.Rotation {
	id := f.rot.operation
	if id == "" {
		id = fakeOperation
	}
	op := &apiv1.RotationOperation{Id: id, Kind: "planned", By: "uid:0", Why: f.rot.reason, Begun: before(40 * time.Minute), Authority: fakeNew,
		Replaces: fakeOld, Limits: &apiv1.RotationLimits{Straggler: durationpb.New(time.Hour), Soak: durationpb.New(5 * time.Minute)}}
	root := func(id, state string, left time.Duration) *apiv1.RotationRoot {
		return &apiv1.RotationRoot{Id: id, State: state, NotAfter: hence(left)}
	}
	const year = 365 * 24 * time.Hour
	r := &apiv1.Rotation{TrustDomain: "example.org", Replica: "ca-0", Epoch: 1, Number: 6, Now: hence(0), Operation: op, Agents: 3, AgentsHolding: 3,
		Pods: 17, PodsHolding: 17, Replicas: []*apiv1.RotationReplica{{Name: "ca-0", Reachable: true, Signs: fakeOld, Intermediates: 1}},
		Excuses:  slices.Clone(f.rot.excuses),
		Past:     []*apiv1.RotationOperation{{Id: "yearly-2025", Kind: "planned", By: "uid:0", Why: "yearly", Begun: before(year), Ended: before(year - 2*time.Hour), Outcome: "done", Authority: fakeOld, Replaces: strings.Repeat("70", 20)}},
		Schedule: &apiv1.RotationSchedule{Prepare: hence(275 * 24 * time.Hour), Latest: hence(335 * 24 * time.Hour), Expires: hence(year), Automatic: true}}
	over := func(outcome string) {
		past := op
		past.Ended, past.Outcome = hence(0), outcome
		if outcome != "done" {
			past.EndedBy = &apiv1.RotationWord{By: "uid:7", Why: "wrong key", At: hence(0)}
		}
		r.Operation, r.Past = nil, append(r.Past, past)
		r.Authorities = []*apiv1.RotationRoot{root(fakeOld, "active", year)}
	}
	r.Forecast = &apiv1.RotationForecast{Operation: id, Kind: "planned", Cross: true, Replicas: 1, Agents: 3, Pods: 17, Streams: 21}
	step := func(do, authority string, earliest, latest time.Duration) *apiv1.RotationForecastStep {
		return &apiv1.RotationForecastStep{Do: do, Authority: authority, Earliest: hence(earliest), Latest: hence(latest)}
	}
	publish, activate, remove := step("publish", fakeNew, 0, 0), step("activate", fakeNew, 5*time.Minute, time.Hour), step("remove", fakeOld, 65*time.Minute, 25*time.Hour)
	switch scene {
	case "publishing":
		op.Begun = hence(0)
		r.Number, r.Authorities = 5, []*apiv1.RotationRoot{root(fakeOld, "active", year), root(fakeNew, "prepared", 10*year)}
		r.Gates = []*apiv1.RotationGate{{Do: "publish", Authority: fakeNew}}
		r.Forecast.Steps = []*apiv1.RotationForecastStep{publish, activate, remove}
	case "blocked", "many", "hostile":
		r.Authorities = []*apiv1.RotationRoot{root(fakeOld, "active", year), root(fakeNew, "published", 10*year)}
		r.AgentsHolding, r.PodsHolding = 1, 14
		r.Gates = []*apiv1.RotationGate{f.blockedGate(scene)}
		r.Forecast.Steps = []*apiv1.RotationForecastStep{activate, remove}
	case "nocross":
		r.Authorities = []*apiv1.RotationRoot{root(fakeOld, "active", year), root(fakeNew, "published", 10*year)}
		r.Gates = []*apiv1.RotationGate{f.blockedGate("blocked")}
		activate.Latest = nil
		r.Forecast.Cross, r.Forecast.NoCross = false, "the old root has expired"
		r.Forecast.Steps = []*apiv1.RotationForecastStep{activate, remove}
	case "draining", "backing":
		gone := fakeOld
		r.Number, r.Authorities = 6, []*apiv1.RotationRoot{root(fakeOld, "retiring", year), root(fakeNew, "active", 10*year)}
		if scene == "backing" {
			gone = fakeNew
			r.Authorities[0].State, r.Authorities[1].State = "active", "retiring"
			op.RolledBack = &apiv1.RotationWord{By: "uid:0", Why: "clients refuse it", At: hence(0)}
		}
		op.Forced = []*apiv1.RotationOverride{{Do: "activate", By: "uid:0", At: before(time.Minute), Count: 2}}
		r.Gates = []*apiv1.RotationGate{{Do: "remove", Authority: gone, Blocking: 1, Blockers: []*apiv1.RotationBlocker{
			{Kind: "leaves", Name: "leaves/ca-0", Why: "SVIDs that it signed under the old root have not expired", Until: hence(41 * time.Minute), Hard: true}}}}
		remove.Authority, remove.Earliest = gone, hence(41*time.Minute)
		r.Forecast.Steps = []*apiv1.RotationForecastStep{remove}
	case "emergency":
		op.Kind, op.Compromised, r.PodsCompromised = "emergency", []string{fakeOld}, 12
		r.Authorities = []*apiv1.RotationRoot{root(fakeOld, "tainted", year), root(fakeNew, "active", 10*year)}
		r.Forecast.Kind, r.Forecast.Cross, r.Forecast.NoCross = "emergency", false, "nothing is cross-signed by a compromised root"
		r.Gates = []*apiv1.RotationGate{{Do: "remove", Authority: fakeOld, Blocking: 1, Forcible: true, Digest: []byte{1, 2}, Blockers: []*apiv1.RotationBlocker{
			{Kind: "pod", Name: "pod/shop/web-1", Namespace: "shop", Pod: "web-1", Node: "node-a", Why: "has an SVID under the compromised root"}}}}
		r.Forecast.Steps = []*apiv1.RotationForecastStep{step("remove", fakeOld, 0, time.Minute)}
	case "troubled":
		r.Authorities = []*apiv1.RotationRoot{root(fakeOld, "active", year), root(fakeNew, "prepared", 10*year)}
		r.TroubleReason, r.Trouble = string(api.UpstreamUnavailable), "the store did not answer for 41s"
	case "done", "aborted":
		over(scene)
	case "superseded":
		over(scene)
	case "over": // another one ended, and this one is not remembered
		over("done")
		r.Past = r.Past[:1]
	default:
		r.Number, r.Operation, r.Forecast = 5, nil, nil
		r.Authorities = []*apiv1.RotationRoot{root(fakeOld, "active", year)}
	}
	return r
}

// blockedGate is an activation that two stand in the way of, in the scene "many" 600; two more are passed over.
func (f *fakeAdmin) blockedGate(scene string) *apiv1.RotationGate {
	away := &apiv1.RotationBlocker{Kind: "agent", Name: "node/node-b", Cluster: nodeCluster, Node: "node-b", NodeUid: "22222222-2222-4222-8222-222222222222",
		Why: "has been away since 2026-11-24T11:48:00Z, and holds generation 1.5, not 1.6", Until: hence(48 * time.Minute)}
	nack := &apiv1.RotationBlocker{Kind: "pod", Name: "pod/shop/web-1", Cluster: nodeCluster, Node: "node-a", Namespace: "shop", Pod: "web-1", PodUid: "uid-of-web-1",
		Why: "rejected the bundle; it acknowledged generation 1.5, not 1.6", Nack: "Failed to load trusted CA certificates from inline"}
	late := &apiv1.RotationBlocker{Kind: "agent", Name: "node/node-c", Cluster: nodeCluster, Node: "node-c", Why: "holds generation 1.5, not 1.6", Pass: "straggler"}
	quiet := &apiv1.RotationBlocker{Kind: "pod", Name: "pod/bank/ledger-0", Node: "node-a", Namespace: "bank", Pod: "ledger-0",
		Why: "the Workload API tells nobody whether the bundle is used", Pass: "unproven"}
	if scene == "hostile" {
		nack.Nack, nack.Name, nack.Why = "no\x07\n\x1b[1Aforged line", "pod/shop/\x1b]0;owned\a", "\x1b[2J\u202e"
		nack.Pod, away.Node = "$(reboot)", "--help;x"
	}
	g := &apiv1.RotationGate{Do: "activate", Authority: fakeNew, Forcible: true, Digest: []byte{0xd1}, Blockers: []*apiv1.RotationBlocker{away, nack, late, quiet}}
	if scene == "many" {
		g.Blockers = nil
		for i := range 500 {
			g.Blockers = append(g.Blockers, &apiv1.RotationBlocker{Kind: "agent", Name: fmt.Sprintf("node/n%03d", i), Node: fmt.Sprintf("n%03d", i), Why: "holds generation 1.5, not 1.6"})
		}
		g.Blocking = 600
		return g
	}
	for _, b := range g.Blockers {
		for _, e := range f.rot.excuses {
			if e.GetScope() == "node" && e.GetName() == b.GetNode() || e.GetScope() == "pod" && e.GetName() == b.GetNamespace()+"/"+b.GetPod() {
				b.Pass = "excused"
			}
		}
		if b.GetPass() == "" {
			g.Blocking++
		} else {
			g.Passed++
		}
	}
	return g
}

// PlanRotation forecasts a rotation whose bundle one agent would not get at once.
func (f *fakeAdmin) PlanRotation(ctx context.Context, r *apiv1.PlanRotationRequest) (*apiv1.PlanRotationResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	st := f.rotation(scene)
	resp := &apiv1.PlanRotationResponse{TrustDomain: "example.org", Epoch: 1, Number: st.GetNumber(), Now: hence(0), CanMake: true, Forecast: st.GetForecast()}
	if resp.Forecast == nil {
		resp.Forecast = &apiv1.RotationForecast{Kind: "planned", Cross: true, Replicas: 1, Agents: 3, Pods: 17, Streams: 21,
			Steps: []*apiv1.RotationForecastStep{{Do: "publish", Earliest: hence(0), Latest: hence(0)}, {Do: "activate", Earliest: hence(5 * time.Minute), Latest: hence(time.Hour)},
				{Do: "remove", Authority: fakeOld, Earliest: hence(65 * time.Minute), Latest: hence(25 * time.Hour)}}}
	}
	fc := resp.Forecast
	fc.Active = &apiv1.RotationRoot{Id: fakeOld, State: "active", NotAfter: hence(365 * 24 * time.Hour)}
	g := f.blockedGate("blocked")
	switch scene {
	case "unready":
		fc.Missing, fc.MissingCount, fc.Unproven, fc.UnprovenCount = g.Blockers[:1], 2, g.Blockers[3:], 1
		resp.CanMake, resp.CannotMake = false, "the upstream has one root only"
		fc.Cross, fc.NoCross = false, "the old root's key is not in the record"
		fc.Steps[1].Latest = nil
	case "draining":
		soaks := &apiv1.RotationBlocker{Kind: "copy", Name: "configmap/shop/signet-bundle", Namespace: "shop", Why: "it shows the bundle, but not who has read it", Until: hence(3 * time.Minute)}
		fc.Missing, fc.MissingCount = append([]*apiv1.RotationBlocker{soaks}, st.GetGates()[0].GetBlockers()...), 2
	case "hostile":
		fc.Missing, fc.MissingCount = f.blockedGate(scene).Blockers, 4
		resp.CannotMake = "\x1b[31mno"
	}
	if r.GetEmergency() {
		if scene == "restarted" {
			fc.Unheard = 2
			fc.Missing, fc.MissingCount = g.Blockers[:2], 2
		}
		fc.Kind, fc.Cross, fc.NoCross, fc.Losing = "emergency", false, "nothing is cross-signed by a compromised root", 12
		for i, s := range fc.Steps {
			s.Earliest, s.Latest = hence(0), hence(time.Duration(i)*time.Minute)
		}
	}
	return resp, nil
}

// StartRotation begins one in the scene "shop", and is refused in "nocross" unless it may do without.
func (f *fakeAdmin) StartRotation(ctx context.Context, r *apiv1.StartRotationRequest) (*apiv1.StartRotationResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch st := f.rotation(scene); {
	case st.GetOperation().GetId() == r.GetOperation():
		return &apiv1.StartRotationResponse{Rotation: st}, nil
	case st.GetOperation() != nil:
		return nil, api.ToStatus(api.E(api.RotationUnderWay, "operation %s (planned) is under way, begun by %q", st.GetOperation().GetId(), "uid:0")).Err()
	case scene == "unready" && !r.GetWithoutCross():
		return nil, api.ToStatus(api.E(api.UpstreamCross, "the old root's key is not in the record")).Err()
	}
	f.rot.operation, f.rot.reason = r.GetOperation(), r.GetReason()
	f.turn("publishing")
	return &apiv1.StartRotationResponse{Rotation: f.rotation(f.scene), Changed: true, CorrelationId: "00112233445566cc"}, nil
}

// RotationStatus tells where it stands.
func (f *fakeAdmin) RotationStatus(ctx context.Context, _ *apiv1.RotationStatusRequest) (*apiv1.RotationStatusResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return &apiv1.RotationStatusResponse{Rotation: f.rotation(scene)}, nil
}

// WatchRotation tells that at once, and at each change of the scene.
func (f *fakeAdmin) WatchRotation(_ *apiv1.WatchRotationRequest, s grpc.ServerStreamingServer[apiv1.WatchRotationResponse]) error {
	ctx := s.Context()
	defer context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.looked.Broadcast()
	})()
	f.mu.Lock()
	own := len(f.rot.told)
	f.rot.told = append(f.rot.told, 0)
	f.mu.Unlock()
	for last := -1; ; {
		f.mu.Lock()
		for f.rot.plays == last && ctx.Err() == nil {
			f.looked.Wait()
		}
		last = f.rot.plays
		f.mu.Unlock()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		scene, err := f.on(ctx)
		if err != nil {
			return err
		}
		f.mu.Lock()
		r := f.rotation(scene)
		f.mu.Unlock()
		if err := s.Send(&apiv1.WatchRotationResponse{Rotation: r}); err != nil {
			return err
		}
		f.mu.Lock()
		f.rot.told[own]++
		f.looked.Broadcast()
		f.mu.Unlock()
	}
}

// ExcuseRotation remembers an excuse.
func (f *fakeAdmin) ExcuseRotation(ctx context.Context, r *apiv1.ExcuseRotationRequest) (*apiv1.ExcuseRotationResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rot.excuses = append(f.rot.excuses, &apiv1.RotationExcuse{Scope: r.GetScope(), Cluster: r.GetCluster(), Name: r.GetName(), Reason: r.GetReason(), By: "uid:0",
		At: hence(0), Until: hence(r.GetLasting().AsDuration())})
	return &apiv1.ExcuseRotationResponse{Rotation: f.rotation(scene), Changed: true, CorrelationId: "00112233445566dd"}, nil
}

// UnexcuseRotation forgets one.
func (f *fakeAdmin) UnexcuseRotation(ctx context.Context, r *apiv1.UnexcuseRotationRequest) (*apiv1.UnexcuseRotationResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	before := len(f.rot.excuses)
	f.rot.excuses = slices.DeleteFunc(f.rot.excuses, func(e *apiv1.RotationExcuse) bool {
		return e.GetScope() == r.GetScope() && e.GetName() == r.GetName() && e.GetCluster() == r.GetCluster()
	})
	return &apiv1.UnexcuseRotationResponse{Rotation: f.rotation(scene), Changed: len(f.rot.excuses) < before}, nil
}

// AbortRotation ends one whose root is not active.
func (f *fakeAdmin) AbortRotation(ctx context.Context, r *apiv1.AbortRotationRequest) (*apiv1.AbortRotationResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.GetOperation() != f.rotation(scene).GetOperation().GetId() {
		return nil, api.ToStatus(api.E(api.RotationOver, "operation %s is not under way", r.GetOperation())).Err()
	}
	f.turn("aborted")
	return &apiv1.AbortRotationResponse{Rotation: f.rotation(f.scene), Changed: true, CorrelationId: "00112233445566ee"}, nil
}

// RollbackRotation makes the old root active again.
func (f *fakeAdmin) RollbackRotation(ctx context.Context, r *apiv1.RollbackRotationRequest) (*apiv1.RollbackRotationResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if scene != "draining" || r.GetOperation() != f.rotation(scene).GetOperation().GetId() {
		return nil, api.ToStatus(api.E(api.RotationTooLate, "authority %s is gone", fakeOld)).Err()
	}
	f.turn("backing")
	return &apiv1.RollbackRotationResponse{Rotation: f.rotation(f.scene), Changed: true, CorrelationId: "00112233445566ff"}, nil
}

// EmergencyRotation wants the number that PlanRotation told; in the scene "moved" it is another one by then.
func (f *fakeAdmin) EmergencyRotation(ctx context.Context, r *apiv1.EmergencyRotationRequest) (*apiv1.EmergencyRotationResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if scene == "moved" || r.GetLosing() < 12 || r.GetCompromised() != fakeOld {
		return nil, api.ToStatus(api.E(api.LosingMore, "13 workloads would lose mTLS now, not %d", r.GetLosing())).Err()
	}
	f.rot.operation, f.rot.reason = r.GetOperation(), r.GetReason()
	f.turn("emergency")
	return &apiv1.EmergencyRotationResponse{Rotation: f.rotation(f.scene), Changed: true, CorrelationId: "0011223344556677"}, nil
}

// ForceStep takes the names, or the digest, of the gate that waits.
func (f *fakeAdmin) ForceStep(ctx context.Context, r *apiv1.ForceStepRequest) (*apiv1.ForceStepResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	g := f.rotation(scene).GetGates()[0]
	var names []string
	for _, b := range g.GetBlockers() {
		if b.GetPass() == "" {
			names = append(names, b.GetName())
		}
	}
	byDigest := len(r.GetNames()) == 0 && hex.EncodeToString(r.GetDigest()) == hex.EncodeToString(g.GetDigest())
	if r.GetDo() != g.GetDo() || r.GetAuthority() != g.GetAuthority() || !byDigest && !slices.Equal(names, r.GetNames()) {
		return nil, api.ToStatus(api.E(api.BlockersChanged, "those named are not those who stand in the way now")).Err()
	}
	f.turn("draining")
	return &apiv1.ForceStepResponse{Rotation: f.rotation(f.scene), Changed: true, CorrelationId: "0011223344556688"}, nil
}
