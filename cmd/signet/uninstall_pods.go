package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/signet-ca/signet/api"
)

// lookForPods is all that uninstall does with --pods-only, before another program removes Signet: the Helm chart runs it as
// a hook. Helm shows the end of what it says, and so does its pod's status, so that the names come last and are bounded.
func (u *uninstaller) lookForPods(ctx context.Context, o *output) error {
	if err := u.begin(ctx); err != nil {
		return err
	}
	u.driver = driverName // the configuration would take another right
	if err := u.findPods(ctx); err != nil {
		return err
	}
	var err error
	if u.f.wait > 0 && len(u.plan.Pods) > 0 {
		err = u.waitForPods(ctx, o)
	}
	if err == nil {
		err = u.refusal()
	}
	if err := u.show(o); err != nil {
		return err
	}
	if err != nil {
		u.a.say("%s", u.named())
	} else {
		u.a.say("no pod has the volume")
	}
	return err
}

// begin makes a plan that has nothing in it yet.
func (u *uninstaller) begin(ctx context.Context) error {
	u.plan = &uninstallPlan{
		header: newHeader("UninstallPlan", u.f.namespace), Server: u.cluster.Server(), Namespace: u.f.namespace,
		Pods: []uninstallPod{}, Delete: []*objectRef{}, Keep: []*objectRef{},
	}
	date, err := u.cluster.Read(ctx, "/version", new(kObject))
	if err != nil {
		return u.a.unreachable(u.cluster, err)
	}
	if u.now = date; date.IsZero() {
		u.now = u.a.now()
	}
	return nil
}

// findPods names who still has the volume.
func (u *uninstaller) findPods(ctx context.Context) error {
	u.plan.Pods = u.plan.Pods[:0]
	err := volumePods(ctx, u.cluster, u.driver, func(p *kPod) {
		if p.finished(u.now) {
			return
		}
		u.plan.Pods = append(u.plan.Pods, uninstallPod{
			Namespace: p.Metadata.Namespace, Name: p.Metadata.Name, Node: p.Spec.NodeName, Controller: p.controller(),
			Ending: !p.Metadata.DeletionTimestamp.IsZero(),
		})
	})
	if err != nil {
		return u.failed("list the pods of all namespaces", err)
	}
	return nil
}

// waitForPods waits until nobody has the volume.
func (u *uninstaller) waitForPods(ctx context.Context, o *output) error {
	ctx, cancel := context.WithTimeout(ctx, u.f.wait)
	defer cancel()
	p := u.a.newWaiting(o)
	defer p.done()
	for {
		var waits []want
		for _, pod := range u.plan.Pods {
			found := "has the volume"
			if pod.Ending {
				found = "is being deleted"
			}
			waits = append(waits, want{namespaced(pod.Namespace, "pod", pod.Name), found})
		}
		p.show(waits)
		if len(waits) == 0 {
			return nil
		}
		began := time.Now()
		pause := time.NewTimer(2 * u.a.poll)
		select {
		case <-ctx.Done():
			pause.Stop()
			return &failure{
				err:  api.E(api.DeadlineExceeded, "after %s the volume is still that of %s", u.f.wait, plural(len(u.plan.Pods), "pod")),
				why:  "Nothing was deleted; it is safe to wait again.",
				next: u.again(),
			}
		case <-pause.C:
		}
		last := slices.Clone(u.plan.Pods)
		if err := u.findPods(ctx); err != nil {
			if u.plan.Pods = last; ctx.Err() == nil {
				p.show([]want{{"api-server", errorDetail(err)}})
				u.now = u.now.Add(time.Since(began))
			}
			continue
		}
		u.now = u.now.Add(time.Since(began))
	}
}

// refusal is why nothing is deleted; nil where nothing is in the way.
func (u *uninstaller) refusal() error {
	if len(u.plan.Pods) == 0 {
		return nil
	}
	have := "pods have"
	if len(u.plan.Pods) == 1 {
		have = "pod has"
	}
	return &findings{summary: fmt.Sprintf("refused: %d %s the volume, and would hang in Terminating without the agent. Delete them or take the volume out, then: %s",
		len(u.plan.Pods), have, u.a.asCalled(u.again()))}
}

// again is how to go on once the pods are gone. Who only looks for them does so for another program, which knows that.
func (u *uninstaller) again() string {
	if u.f.podsOnly {
		return u.f.signet("uninstall", "--wait", "--pods-only")
	}
	return u.f.signet("uninstall", "--wait")
}

// named lists the pods in the way in a line.
func (u *uninstaller) named() string {
	var names []string
	for _, p := range u.plan.Pods[:min(len(u.plan.Pods), maxNamed)] {
		names = append(names, p.Namespace+"/"+p.Name)
	}
	return "with the volume: " + strings.Join(names, ", ") + after(" and ", more(len(u.plan.Pods)-maxNamed))
}
