package ca

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

const (
	watchPause   = 250 * time.Millisecond // between two answers to one who watches
	watchEvery   = 10 * time.Second       // though nothing changed
	watchTime    = 15 * time.Minute       // for which a call watches; then it is made again
	watchLook    = time.Second            // between two looks at what ends by itself
	maxBlockers  = 500                    // that are listed of one step
	maxForceName = 2048                   // that a step is forced over by name
)

// PlanRotation implements the call of that name.
func (a *admin) PlanRotation(ctx context.Context, r *apiv1.PlanRotationRequest) (*apiv1.PlanRotationResponse, error) {
	if _, err := a.bundle(); err != nil {
		return nil, err
	}
	limits, err := limitsOf(r.GetLimits())
	if err != nil {
		return nil, err
	}
	if err := a.ca.reload(ctx); err != nil {
		return nil, err
	}
	j, now := a.ca.record.Load(), time.Now()
	f, losing, err := a.ca.forecast(ctx, j, r.GetEmergency(), r.GetCompromised(), limits, now)
	if err != nil {
		return nil, err
	}
	resp := &apiv1.PlanRotationResponse{TrustDomain: j.TrustDomain, Epoch: j.Epoch, Number: j.Number, Now: timestamppb.New(now), Forecast: forecastProto(f)}
	resp.Forecast.Losing = uint32(losing)
	if _, err := a.ca.newRoot(ctx, j); err != nil {
		resp.CannotMake = api.AsError(err).Detail
	} else {
		resp.CanMake = true
	}
	return resp, nil
}

// StartRotation implements the call of that name.
func (a *admin) StartRotation(ctx context.Context, r *apiv1.StartRotationRequest) (*apiv1.StartRotationResponse, error) {
	limits, err := limitsOf(r.GetLimits())
	if err != nil {
		return nil, err
	}
	e, by, err := a.decision(ctx, "StartRotation", r.GetOperation(), r.GetReason())
	if err != nil {
		return nil, err
	}
	changed, err := a.ca.begin(ctx, e, journal.StartRequest{Request: by, Limits: limits}, r.GetWithoutCross())
	if err != nil {
		return nil, err
	}
	resp := &apiv1.StartRotationResponse{Changed: changed}
	resp.Rotation, resp.CorrelationId, err = a.after(ctx, changed, e)
	return resp, err
}

// RotationStatus implements the call of that name.
func (a *admin) RotationStatus(ctx context.Context, _ *apiv1.RotationStatusRequest) (*apiv1.RotationStatusResponse, error) {
	if _, err := a.bundle(); err != nil {
		return nil, err
	}
	rotation, err := a.ca.rotation(ctx)
	if err != nil {
		return nil, err
	}
	return looked(ctx, a.ca, func() *apiv1.RotationStatusResponse { return &apiv1.RotationStatusResponse{Rotation: rotation} })
}

// WatchRotation implements the call of that name. It looks when something has changed, and while a rotation is under way each second
// for what ends by itself; it sends what differs in more than the time of day.
func (a *admin) WatchRotation(_ *apiv1.WatchRotationRequest, stream grpc.ServerStreamingServer[apiv1.WatchRotationResponse]) error {
	ca, ctx := a.ca, stream.Context()
	if _, err := a.bundle(); err != nil {
		return err
	}
	select {
	case ca.watchers <- struct{}{}:
		defer func() { <-ca.watchers }()
	default:
		return overloaded()
	}
	end := time.NewTimer(watchTime)
	defer end.Stop()
	var last []byte
	var sent time.Time
	for {
		rotation, recordChanged, evidenceChanged, err := ca.watched.look(ctx, ca)
		if err != nil {
			return err
		}
		if sum := digestOfRotation(rotation); string(sum) != string(last) || time.Since(sent) >= watchEvery {
			if err := stream.Send(&apiv1.WatchRotationResponse{Rotation: rotation}); err != nil {
				return err
			}
			last, sent = sum, time.Now()
		}
		look := watchLook
		if rotation.GetOperation() == nil {
			evidenceChanged, look = nil, watchEvery
		}
		select {
		case <-recordChanged:
		case <-evidenceChanged:
		case <-time.After(look):
		case <-ctx.Done():
			return ctx.Err()
		case <-ca.stopping:
			return api.E(api.CAUnavailable, "the CA is stopping")
		case <-end.C:
			return nil
		}
		select {
		case <-time.After(watchPause):
		case <-ctx.Done():
			return ctx.Err()
		case <-ca.stopping:
			return api.E(api.CAUnavailable, "the CA is stopping")
		}
	}
}

// watched is where the rotation stood a moment ago, for all who watch it: a look goes through the whole fleet, and they may be many. The
// zero value is ready.
type watched struct {
	mu               sync.Mutex
	at               time.Time // zero: never
	rotation         *apiv1.Rotation
	record, evidence <-chan struct{} // closed once it may stand elsewhere
}

// look returns where the rotation stands, not older than the pause between two answers nor than the record, and what is closed when
// that has changed. It must not be changed.
func (w *watched) look(ctx context.Context, ca *CA) (r *apiv1.Rotation, record, evidence <-chan struct{}, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	stale := w.at.IsZero()
	select {
	case <-w.record: // whoever has just begun an operation and watches it must find it
		stale = true
	default:
	}
	if now := time.Now(); stale || now.Sub(w.at).Abs() >= watchPause {
		_, record = ca.record.Get() // before it is looked
		_, evidence = ca.evidence.Get()
		if r, err = ca.rotation(ctx); err != nil {
			return nil, nil, nil, err
		}
		w.at, w.rotation, w.record, w.evidence = now, r, record, evidence
	}
	return w.rotation, w.record, w.evidence, nil
}

// ExcuseRotation implements the call of that name.
func (a *admin) ExcuseRotation(ctx context.Context, r *apiv1.ExcuseRotationRequest) (*apiv1.ExcuseRotationResponse, error) {
	e, by, err := a.decision(ctx, "ExcuseRotation", "", r.GetReason())
	if err != nil {
		return nil, err
	}
	e.Detail = fmt.Sprintf("%s %.520q for %s: %s", word(r.GetScope(), 16), r.GetName(), r.GetLasting().AsDuration(), r.GetReason())
	x := journal.Excuse{Scope: journal.Scope(r.GetScope()), Cluster: r.GetCluster(), Name: r.GetName(), Reason: r.GetReason(), By: by.By}
	changed, err := a.ca.operate(ctx, e, func(j journal.Journal, now time.Time) (journal.Journal, error) {
		x.Until = now.Add(r.GetLasting().AsDuration())
		return j.WithExcuse(x, now)
	})
	if err != nil {
		return nil, err
	}
	resp := &apiv1.ExcuseRotationResponse{Changed: changed}
	resp.Rotation, resp.CorrelationId, err = a.after(ctx, changed, e)
	return resp, err
}

// UnexcuseRotation implements the call of that name.
func (a *admin) UnexcuseRotation(ctx context.Context, r *apiv1.UnexcuseRotationRequest) (*apiv1.UnexcuseRotationResponse, error) {
	e, _, err := a.decision(ctx, "UnexcuseRotation", "", r.GetReason())
	if err != nil {
		return nil, err
	}
	e.Detail = fmt.Sprintf("%s %.520q: %s", word(r.GetScope(), 16), r.GetName(), r.GetReason())
	changed, err := a.ca.operate(ctx, e, func(j journal.Journal, now time.Time) (journal.Journal, error) {
		return j.WithoutExcuse(journal.Scope(r.GetScope()), r.GetCluster(), r.GetName(), now)
	})
	if err != nil {
		return nil, err
	}
	resp := &apiv1.UnexcuseRotationResponse{Changed: changed}
	resp.Rotation, resp.CorrelationId, err = a.after(ctx, changed, e)
	return resp, err
}

// AbortRotation implements the call of that name.
func (a *admin) AbortRotation(ctx context.Context, r *apiv1.AbortRotationRequest) (*apiv1.AbortRotationResponse, error) {
	e, by, err := a.decision(ctx, "AbortRotation", r.GetOperation(), r.GetReason())
	if err != nil {
		return nil, err
	}
	roles := admitted(ctx).roles
	changed, err := a.ca.operate(ctx, e, func(j journal.Journal, now time.Time) (journal.Journal, error) {
		if o := j.Operation; o != nil && o.ID == by.ID && o.Kind == journal.Emergency && !slices.Contains(roles, roleEmergency) {
			return journal.Journal{}, api.E(api.RoleRequired, "to take back what was said of a compromised root takes the role that says it, %q, and the caller's are %q",
				roleEmergency.short(), shortRoles(roles))
		}
		return journal.Abort(j, by, now)
	})
	if err != nil {
		return nil, err
	}
	resp := &apiv1.AbortRotationResponse{Changed: changed}
	resp.Rotation, resp.CorrelationId, err = a.after(ctx, changed, e)
	return resp, err
}

// RollbackRotation implements the call of that name.
func (a *admin) RollbackRotation(ctx context.Context, r *apiv1.RollbackRotationRequest) (*apiv1.RollbackRotationResponse, error) {
	e, by, err := a.decision(ctx, "RollbackRotation", r.GetOperation(), r.GetReason())
	if err != nil {
		return nil, err
	}
	changed, err := a.ca.rollback(ctx, e, by)
	if err != nil {
		return nil, err
	}
	resp := &apiv1.RollbackRotationResponse{Changed: changed}
	resp.Rotation, resp.CorrelationId, err = a.after(ctx, changed, e)
	return resp, err
}

// EmergencyRotation implements the call of that name.
func (a *admin) EmergencyRotation(ctx context.Context, r *apiv1.EmergencyRotationRequest) (*apiv1.EmergencyRotationResponse, error) {
	limits, err := limitsOf(r.GetLimits())
	if err != nil {
		return nil, err
	}
	e, by, err := a.decision(ctx, "EmergencyRotation", r.GetOperation(), r.GetReason())
	if err != nil {
		return nil, err
	}
	e.Detail += fmt.Sprintf("; told that %d pods lose mTLS where they are not reissued", r.GetLosing())
	changed, err := a.ca.taint(ctx, e, journal.TaintRequest{Request: by, Compromised: r.GetCompromised(), Limits: limits}, int(r.GetLosing()))
	if err != nil {
		return nil, err
	}
	resp := &apiv1.EmergencyRotationResponse{Changed: changed}
	resp.Rotation, resp.CorrelationId, err = a.after(ctx, changed, e)
	return resp, err
}

// ForceStep implements the call of that name.
func (a *admin) ForceStep(ctx context.Context, r *apiv1.ForceStepRequest) (*apiv1.ForceStepResponse, error) {
	if len(r.GetNames()) > maxForceName {
		return nil, api.E(api.MessageTooLarge, "more than %d names; say the digest of the step instead", maxForceName)
	}
	e, by, err := a.decision(ctx, "ForceStep", r.GetOperation(), r.GetReason())
	if err != nil {
		return nil, err
	}
	meant := journal.Step{Operation: r.GetOperation(), Do: journal.Do(r.GetDo()), Authority: r.GetAuthority()}
	done := false
	_, id, err := a.ca.takeStep(ctx, admitted(ctx), func(j journal.Journal, now time.Time, acks journal.Acks) (journal.Step, string, error) {
		gates := journal.Gates(j, now, acks)
		i := slices.IndexFunc(gates, func(g journal.Gate) bool {
			return g.Step.Operation == meant.Operation && g.Step.Do == meant.Do && g.Step.Authority == meant.Authority
		})
		if i < 0 {
			if _, err := journal.Apply(j, meant, now); err != nil {
				return journal.Step{}, "", err
			}
			done = true // it was taken before
			return journal.Step{}, "", nil
		}
		names := r.GetNames()
		if len(r.GetDigest()) > 0 {
			if names = blockingNames(gates[i].Blockers); string(digestOfNames(names)) != string(r.GetDigest()) {
				return journal.Step{}, "", api.E(api.BlockersChanged, "those who stand in the way are not those whose digest was said")
			}
		}
		if len(names) == 0 && len(blockingNames(gates[i].Blockers)) == 0 {
			s := gates[i].Step // nobody is in its way
			s.Passed = gates[i].Blockers
			return s, r.GetReason(), nil
		}
		s, err := journal.Force(j, now, acks, names, by.By)
		if err == nil && (s.Do != meant.Do || s.Authority != meant.Authority) {
			err = api.E(api.BlockersChanged, "those named are not those who stand in the way now")
		}
		return s, r.GetReason(), err
	})
	if done {
		err = nil
	}
	if err != nil {
		return nil, err
	}
	e.CorrelationID = id
	resp := &apiv1.ForceStepResponse{Changed: !done}
	resp.Rotation, resp.CorrelationId, err = a.after(ctx, !done, e)
	return resp, err
}

// decision checks what all decisions have in common, and begins the entry about it.
func (a *admin) decision(ctx context.Context, method, operation, reason string) (audit.Entry, journal.Request, error) {
	if _, err := a.bundle(); err != nil {
		return audit.Entry{}, journal.Request{}, err
	}
	if len(reason) > journal.MaxRotateText {
		return audit.Entry{}, journal.Request{}, api.E(api.MessageTooLarge, "the reason is longer than %d bytes", journal.MaxRotateText)
	}
	who := admitted(ctx)
	e := rotateEntry(method, who, time.Now())
	e.Detail = reason
	if operation != "" {
		e.Detail = strings.TrimSuffix(fmt.Sprintf("operation %.64s: %s", word(operation, 64), reason), ": ")
	}
	return e, journal.Request{ID: operation, By: cut(who.name, journal.MaxRotateText), Why: reason}, nil
}

// after is where the rotation stands after a decision.
func (a *admin) after(ctx context.Context, changed bool, e audit.Entry) (*apiv1.Rotation, string, error) {
	rotation, err := a.ca.rotation(ctx)
	if err != nil || !changed {
		return rotation, "", err
	}
	return rotation, e.CorrelationID, nil
}

// rotation is where the rotation stands now.
func (ca *CA) rotation(ctx context.Context) (*apiv1.Rotation, error) {
	j, now := ca.record.Load(), time.Now()
	acks, err := ca.gather(ctx, j, now)
	if err != nil {
		return nil, err
	}
	p := &apiv1.Rotation{
		TrustDomain: j.TrustDomain, Replica: ca.cfg.Replica, Epoch: j.Epoch, Number: j.Number, Now: timestamppb.New(now),
		Schedule: scheduleProto(journal.Due(j, now), !ca.cfg.ManualRotation),
	}
	if j.Operation != nil {
		p.Operation = operationProto(*j.Operation)
		p.Forecast = forecastProto(journal.Plan(j, now, acks, journal.Limits{}))
	}
	for _, g := range journal.Gates(j, now, acks) {
		p.Gates = append(p.Gates, gateProto(g))
	}
	for _, a := range j.Authorities {
		p.Authorities = append(p.Authorities, &apiv1.RotationRoot{Id: a.ID, State: string(a.State), NotAfter: rootEnd(a)})
	}
	for _, r := range acks.Replicas {
		alive := 0
		for _, i := range r.Intermediates {
			if !i.Destroyed && now.Before(i.NotAfter) {
				alive++
			}
		}
		p.Replicas = append(p.Replicas, &apiv1.RotationReplica{Name: r.Name, Reachable: r.Reachable, Signs: r.Signs, Intermediates: uint32(alive)})
	}
	for _, x := range j.Excuses {
		if now.Before(x.Until) {
			p.Excuses = append(p.Excuses, &apiv1.RotationExcuse{Scope: string(x.Scope), Cluster: x.Cluster, Name: x.Name, Reason: x.Reason, By: x.By,
				At: timestamppb.New(x.At), Until: timestamppb.New(x.Until)})
		}
	}
	for _, o := range j.Past {
		p.Past = append(p.Past, pastProto(o))
	}
	ca.countProgress(p, j, acks)
	if e := ca.trouble.Load(); e != nil {
		p.TroubleReason, p.Trouble = string(e.Reason), e.Detail
	}
	return p, nil
}

// countProgress counts who has what the rotation is about.
func (ca *CA) countProgress(p *apiv1.Rotation, j journal.Journal, acks journal.Acks) {
	roots, err := j.Roots()
	if err != nil {
		return
	}
	want := journal.Held{Generation: j.Generation(), Hash: api.BundleHash(roots)}
	tainted := map[string]bool{}
	for _, a := range j.Authorities {
		tainted[a.ID] = a.State == journal.Tainted
	}
	for _, a := range acks.Agents {
		p.Agents++
		if a.Held == want {
			p.AgentsHolding++
		}
		for _, pod := range a.Pods {
			p.Pods++
			behind := func(s journal.Stream) bool {
				return s.WorkloadAPI && s.Pushed != want || !s.WorkloadAPI && s.Bundle && s.Acked != want
			}
			if a.Held == want && !slices.ContainsFunc(pod.Streams, behind) {
				p.PodsHolding++
			}
			if slices.ContainsFunc(pod.Roots, func(id string) bool { return tainted[id] }) {
				p.PodsCompromised++
			}
		}
	}
}

func limitsOf(l *apiv1.RotationLimits) (journal.Limits, error) {
	for _, d := range []*durationpb.Duration{l.GetStraggler(), l.GetSoak()} {
		if d != nil && (!d.IsValid() || d.AsDuration() <= 0) {
			return journal.Limits{}, api.E(api.RotationInvalid, "a limit is longer than nothing")
		}
	}
	return journal.Limits{Straggler: l.GetStraggler().AsDuration(), Soak: l.GetSoak().AsDuration()}, nil
}

func blockingNames(all []journal.Blocker) []string {
	var names []string
	for _, b := range all {
		if b.Blocks() {
			names = append(names, b.Name)
		}
	}
	slices.Sort(names)
	return names
}

func digestOfNames(sorted []string) []byte {
	sum := sha256.Sum256([]byte(strings.Join(sorted, "\n")))
	return sum[:]
}
