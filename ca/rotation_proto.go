package ca

import (
	"crypto/sha256"
	"crypto/x509"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/journal"
)

// digestOfRotation is of what a rotation says but for the time of day.
func digestOfRotation(p *apiv1.Rotation) []byte {
	c := proto.CloneOf(p)
	c.Now = nil
	for _, s := range c.GetForecast().GetSteps() {
		s.Earliest, s.Latest = nil, nil // they move with it
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(c)
	if err != nil {
		return nil
	}
	sum := sha256.Sum256(data)
	return sum[:]
}

func gateProto(g journal.Gate) *apiv1.RotationGate {
	names := blockingNames(g.Blockers)
	p := &apiv1.RotationGate{Do: string(g.Step.Do), Authority: g.Step.Authority, Blocking: uint32(len(names)), Passed: uint32(len(g.Blockers) - len(names)),
		Forcible: true, Digest: digestOfNames(names)}
	for _, b := range g.Blockers {
		if b.Blocks() && b.Hard {
			p.Forcible = false
		}
	}
	p.Blockers = blockersProto(g.Blockers)
	return p
}

// blockersProto lists those who stand in the way first, and no more than people can read.
func blockersProto(all []journal.Blocker) []*apiv1.RotationBlocker {
	var list []*apiv1.RotationBlocker
	for _, blocking := range []bool{true, false} {
		for _, b := range all {
			if b.Blocks() == blocking && len(list) < maxBlockers {
				list = append(list, &apiv1.RotationBlocker{Kind: string(b.Kind), Name: b.Name, Cluster: b.Cluster, Node: b.Node, NodeUid: b.NodeUID,
					Namespace: b.Namespace, Pod: b.Pod, PodUid: b.PodUID, Why: b.Why, Nack: b.Nack, Until: timeProto(b.Until), Pass: string(b.Pass), Hard: b.Hard})
			}
		}
	}
	return list
}

func operationProto(o journal.Operation) *apiv1.RotationOperation {
	p := &apiv1.RotationOperation{Id: o.ID, Kind: string(o.Kind), By: o.By, Why: o.Why, Automatic: o.Automatic, Begun: timeProto(o.Begun), Authority: o.Authority,
		Replaces: o.Replaces, Compromised: o.Compromised, Latest: timeProto(o.Latest),
		Limits: &apiv1.RotationLimits{Straggler: durationpb.New(o.Straggler), Soak: durationpb.New(o.Soak)}}
	if o.Back != nil {
		p.RolledBack = &apiv1.RotationWord{By: o.Back.By, Why: o.Back.Why, At: timeProto(o.Back.At)}
	}
	for _, f := range o.Forced {
		p.Forced = append(p.Forced, &apiv1.RotationOverride{Do: string(f.Do), By: f.By, At: timeProto(f.At), Count: uint32(f.Count)})
	}
	return p
}

func pastProto(o journal.Past) *apiv1.RotationOperation {
	p := &apiv1.RotationOperation{Id: o.ID, Kind: string(o.Kind), By: o.By, Why: o.Why, Automatic: o.Automatic, Begun: timeProto(o.Begun), Ended: timeProto(o.Ended),
		Outcome: string(o.Outcome), Authority: o.Authority, Replaces: o.Replaces}
	if w := o.EndedBy; w.By != "" {
		p.EndedBy = &apiv1.RotationWord{By: w.By, Why: w.Why, At: timeProto(w.At)}
	}
	return p
}

func scheduleProto(s journal.Schedule, automatic bool) *apiv1.RotationSchedule {
	return &apiv1.RotationSchedule{Prepare: timeProto(s.Prepare), Latest: timeProto(s.Latest), Expires: timeProto(s.Expires), Automatic: automatic}
}

func forecastProto(f journal.Forecast) *apiv1.RotationForecast {
	p := &apiv1.RotationForecast{Operation: f.Operation, Kind: string(f.Kind), Active: rootProto(f.Active), Cross: f.Cross, NoCross: f.NoCross,
		Replicas: uint32(f.Replicas), Agents: uint32(f.Agents), Pods: uint32(f.Pods), Streams: uint32(f.Streams), Unheard: uint32(f.Unheard),
		Missing: blockersProto(f.Missing), MissingCount: uint32(len(f.Missing)), Unproven: blockersProto(f.Unproven), UnprovenCount: uint32(len(f.Unproven))}
	if f.Next != nil {
		p.Next = rootProto(*f.Next)
	}
	for _, s := range f.Steps {
		p.Steps = append(p.Steps, &apiv1.RotationForecastStep{Do: string(s.Do), Authority: s.Authority, Earliest: timeProto(s.Earliest), Latest: timeProto(s.Latest)})
	}
	return p
}

func rootProto(r journal.Root) *apiv1.RotationRoot {
	return &apiv1.RotationRoot{Id: r.ID, State: string(r.State), NotAfter: timeProto(r.NotAfter)}
}

func rootEnd(a journal.Authority) *timestamppb.Timestamp {
	if c, err := x509.ParseCertificate(a.Certificate); err == nil {
		return timeProto(c.NotAfter)
	}
	return nil
}
