package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/kube"
)

// confirmed checks that what --yes says is what is meant.
func (u *uninstaller) confirmed() error {
	p := u.plan
	switch {
	case p.HelmRelease != "":
		return usageError{fmt.Errorf("the installation is Helm's, who would go on believing in it; nothing is in the way, so: helm uninstall %s -n %s", quoted(p.HelmRelease), u.f.namespace)}
	case u.f.deleteState == "":
		return nil
	case p.TrustDomain == "":
		return usageError{errors.New("--delete-state: the trust domain cannot be told from what is left of the installation; delete what is kept with kubectl")}
	case u.f.deleteState != p.TrustDomain:
		return usageError{fmt.Errorf("--delete-state %.80q: the state here is of trust domain %s, generation %s; its name confirms that it goes", u.f.deleteState, p.TrustDomain, dash(p.Generation))}
	}
	return nil
}

// do deletes what is planned. It may be ended at any moment: the same command goes on where it was.
func (u *uninstaller) do(ctx context.Context) error {
	for n, r := range u.plan.Delete {
		if err := u.delete(ctx, r); err != nil {
			return err
		}
		if r.Kind != "CSIDriver" || n+1 == len(u.plan.Delete) {
			continue
		}
		// From here on no pod gets the volume. One that came between the look and this has it, and needs the agent.
		if err := u.findPods(ctx); err != nil {
			return err
		}
		if len(u.plan.Pods) > 0 {
			u.a.say("%s", u.named())
			return &findings{summary: fmt.Sprintf("stopped: %s came meanwhile. Agents and CA still run, and no more pods get the volume. Go on: %s --wait --yes; or go back: signet install | %s",
				plural(len(u.plan.Pods), "pod"), u.a.asCalled(u.f.signet("uninstall")), u.f.kubectl("apply", "-f", "-"))}
		}
	}
	if u.f.deleteState != "" {
		if err := u.deleteState(ctx); err != nil {
			return err
		}
	}
	u.tellKept()
	return nil
}

// delete deletes one object, if it is still the one that was planned.
func (u *uninstaller) delete(ctx context.Context, r *objectRef) error {
	err := u.cluster.Delete(ctx, r.path(), r.uid)
	switch {
	case errors.Is(err, kube.ErrNotFound):
		u.a.say("gone already: %s", r)
	case errors.Is(err, kube.ErrConflict):
		return &failure{
			err:  api.Wrap(api.StateConflict, err, r.String()+" was made anew meanwhile"),
			why:  "Somebody installs Signet at the same time: a GitOps tool, perhaps.",
			next: u.f.signet("uninstall"),
		}
	case err != nil:
		return u.failed("delete "+r.String(), err)
	default:
		u.a.say("deleted: %s", r)
	}
	r.Deleted = true
	return nil
}

// caPatience is how long the CA's pods may take to go before its state does: a CA that lives puts its bundle right again.
const caPatience = 2 * time.Minute

// deleteState deletes what is kept otherwise, once the CA is gone.
func (u *uninstaller) deleteState(ctx context.Context) error {
	within, cancel := context.WithTimeout(ctx, caPatience)
	defer cancel()
	i := &checkup{a: u.a, cluster: u.cluster, kf: &u.f.kubeFlags}
	for said := false; ; said = true {
		left := 0
		if err := i.ourPods(within, caName, func(*kPod) { left++ }); err != nil && within.Err() == nil {
			return u.failed("list pods in "+u.f.namespace, err)
		}
		if within.Err() == nil && left == 0 {
			break
		}
		if !said {
			u.a.say("waiting: %s of the CA to go", plural(left, "pod"))
		}
		select {
		case <-within.Done():
			return &failure{
				err:  api.E(api.DeadlineExceeded, "the CA's pod is not gone after %s, and its state was not deleted", caPatience),
				why:  "A CA that still lives would publish its bundle again.",
				next: u.f.signet("uninstall", "--yes", "--delete-state", u.plan.TrustDomain),
			}
		case <-time.After(u.a.poll):
		}
	}
	for _, r := range u.plan.Keep {
		if err := u.delete(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// tellKept says what is still there.
func (u *uninstaller) tellKept() {
	kept := 0
	for _, r := range u.plan.Keep {
		if !r.Deleted {
			kept++
		}
	}
	if kept > 0 {
		u.a.say("kept: %s (the CA's volumes and the bundle), for an installation made anew; it is of trust domain %s", plural(kept, "object"), dash(u.plan.TrustDomain))
	}
	u.a.say("kept: namespace/%s", u.f.namespace)
	if u.operators != u.f.namespace {
		u.a.say("kept: namespace/%s, where people are bound to roles", u.operators)
	}
}
