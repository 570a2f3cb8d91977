package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

type emergencyFlags struct {
	decisionFlags
	limitFlags
	followFlags
	id      string
	confirm uint32
	given   bool // --confirm was
}

func (a *app) rotateEmergencyCommand() *cobra.Command {
	var f emergencyFlags
	c := &cobra.Command{
		Use:   "emergency AUTHORITY",
		Short: "A root is compromised: reissue everything under it now, then remove it",
		Long: "Declare a root compromised. A new root is published and, as soon as all have it or after a minute, active; everything\n" +
			"under the compromised one is reissued in a paced wave, and then it leaves every bundle: what is still under it is\n" +
			"refused everywhere. Nothing is cross-signed. It takes the place of a rotation that is under way, and cannot be rolled\n" +
			"back. The plan is shown first; then the number of workloads is asked for that lose mTLS where they are not reissued\n" +
			"in time. In a script --confirm gives that number, or a larger one; where there are more it is refused.\n\n" +
			"The same again changes nothing: while an emergency about this root is under way it says what it is and, with --wait,\n" +
			"follows that.",
		Example: "  signet rotate emergency 7f3a91c2 --dry-run\n" +
			"  signet rotate emergency 7f3a91c2 --reason 'backup with its key lost' --wait\n" +
			"  signet rotate emergency 7f3a91c2 --confirm 412 --id incident-77 -o json",
		Args:              waitArgs(1, oneArg("the id of a root, or the beginning of it")),
		ValidArgsFunction: a.completeRoots,
	}
	f.decisionFlags.add(c)
	f.limitFlags.add(c)
	f.followFlags.add(c)
	c.Flags().StringVar(&f.id, "id", "", "`ID` of the operation: 1 to 64 of a-z, 0-9 and - (default one that is drawn)")
	c.Flags().Uint32Var(&f.confirm, "confirm", 0, "`NUMBER` of workloads that lose mTLS at most, in place of typing it")
	o := outputFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		f.given = c.Flags().Changed("confirm")
		if err := checkReason(f.reason); err != nil {
			return err
		}
		if f.id != "" && !operationShape.MatchString(f.id) {
			return usageError{fmt.Errorf("--id %.70q: 1 to 64 of a-z, 0-9 and -", f.id)}
		}
		if f.dryRun {
			v, err := once(a, func(ch *channel) (*planView, error) { return a.planEmergency(c.Context(), ch, args[0], &f) })
			if err != nil {
				return err
			}
			return a.printPlan(o, v)
		}
		return a.beginAndFollow(c.Context(), o, f.wait, func(ctx context.Context, ch *channel) (*rotationDecision, error) {
			return a.declareEmergency(ctx, ch, args[0], &f)
		})
	}
	return c
}

func (a *app) planEmergency(ctx context.Context, ch *channel, typed string, f *emergencyFlags) (*planView, error) {
	root, err := a.pickRoot(ctx, ch, typed)
	if err != nil {
		return nil, err
	}
	return a.planRotation(ctx, ch, &apiv1.PlanRotationRequest{Limits: f.limitFlags.proto(), Emergency: true, Compromised: root})
}

// declareEmergency looks first, wants the number, and declares then what it has shown. That the number is still what it was
// is the CA's to check.
func (a *app) declareEmergency(ctx context.Context, ch *channel, typed string, f *emergencyFlags) (*rotationDecision, error) {
	root, err := a.pickRoot(ctx, ch, typed)
	if err != nil {
		return nil, err
	}
	v, err := a.rotation(ctx, ch)
	if err != nil {
		return nil, err
	}
	if id := f.declared(v, root); id != "" { // the same again has nothing to confirm any more
		return newDecision("RotationEmergency", id, v), nil
	}
	plan, err := a.planRotation(ctx, ch, &apiv1.PlanRotationRequest{Limits: f.limitFlags.proto(), Emergency: true, Compromised: root})
	if err != nil {
		return nil, err
	}
	losing := plan.Forecast.Losing
	number := fmt.Sprint(losing)
	switch {
	case f.given && f.confirm < losing:
		return nil, &mistake{fmt.Errorf("%s would lose mTLS now, not %d: nothing was changed", plural(int(losing), "workload"), f.confirm), "signet rotate emergency " + root + " --dry-run"}
	case !f.given:
		if err := a.somebody("--confirm NUMBER"); err != nil {
			return nil, err
		}
		what := "declare " + short(root) + " compromised: that many workloads lose mTLS where they are not reissued in time"
		if plan.Forecast.Unheard > 0 {
			what = "declare " + short(root) + " compromised: that many workloads, and those on nodes that are not heard of, lose mTLS where they are not reissued in time"
		}
		if err := a.typed(number, what, plan.text(false)); err != nil {
			return nil, err
		}
	}
	agreed := losing
	if f.given {
		agreed = f.confirm
	}
	id := f.id
	if id == "" {
		id = a.drawOperation()
	}
	var resp *apiv1.EmergencyRotationResponse
	err = a.sending(ctx, id, "declare the emergency", func(ctx context.Context) (err error) {
		resp, err = askRotation(ctx, a, ch, ch.EmergencyRotation, &apiv1.EmergencyRotationRequest{Operation: id, Compromised: root, Reason: f.reason, Limits: f.limitFlags.proto(), Losing: agreed})
		return err
	})
	if err != nil {
		x, ok := errors.AsType[*failure](err)
		switch {
		case !ok:
		case x.err.Reason == api.LosingMore:
			x.next = "signet rotate emergency " + root + " --dry-run"
		case x.err.Reason == api.DeadlineExceeded || x.err.Reason == api.CAUnavailable && x.err.CorrelationID == "":
			x.next = "signet rotate emergency " + root + " --id " + id + " --confirm " + fmt.Sprint(agreed)
		}
		return nil, err
	}
	d := newDecision("RotationEmergency", id, newRotation(resp.GetRotation(), a.now()))
	d.Changed, d.CorrelationID, d.Losing = resp.GetChanged(), resp.GetCorrelationId(), &losing
	return d, nil
}

// declared is the emergency that this command would declare once more: the one of its id, or without an id the one that is under way
// about this root. Empty where there is none. One of another kind is no emergency, and the CA says so.
func (f *emergencyFlags) declared(v *rotationView, root string) string {
	o := v.Operation
	if f.id == "" {
		if o != nil && o.Kind == "emergency" && slices.Contains(o.Compromised, root) {
			return o.ID
		}
		return ""
	}
	if o == nil || o.ID != f.id {
		o = v.ended(f.id)
	}
	if o != nil && o.Kind == "emergency" {
		return f.id
	}
	return ""
}

// pickRoot finds the one root whose id is, or alone starts with, what was typed: the CA is told the whole of it.
func (a *app) pickRoot(ctx context.Context, ch *channel, typed string) (string, error) {
	heard := a.patient("it is to list its roots")
	l, err := a.listAuthorities(ctx, ch)
	heard()
	if err != nil {
		return "", err
	}
	var all []*authorityView
	for _, v := range slices.Concat(l.Items, l.Gone) {
		if !slices.ContainsFunc(all, func(o *authorityView) bool { return o.ID == v.ID }) {
			all = append(all, v)
		}
	}
	v, err := pickAuthority(all, typed)
	if err != nil {
		return "", err
	}
	if v.Type == "intermediate" {
		return "", &failure{err: api.E(api.NotFound, "%s is an intermediate, and not a root", v.ID),
			why:  "Who verifies an SVID trusts its root: an intermediate alone cannot be taken back. Where a replica is suspected, its root is compromised.",
			next: "signet rotate emergency " + dash(v.Parent) + " --dry-run", deaf: true}
	}
	return v.ID, nil
}

// completeRoots offers the roots.
func (a *app) completeRoots(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return complete(a, c, a.listAuthorities, func(l *authorityList) (words []string) {
		for _, v := range l.Items {
			if v.Type == "root" {
				words = append(words, v.ID)
			}
		}
		return words
	})
}

type forceFlags struct {
	decisionFlags
	confirm uint32
	given   bool
}

func (a *app) rotateForceCommand() *cobra.Command {
	var f forceFlags
	c := &cobra.Command{
		Use:   "force publish|activate|remove",
		Short: "Take the next step over exactly those who stand in its way",
		Long: "Take a step that waits, over exactly those who stand in its way: they are shown, and their number is asked for. If\n" +
			"somebody else stands there meanwhile it is refused. SVIDs that have not expired and replicas that may still sign are\n" +
			"waited for whatever is forced. It cannot be taken back; signet rotate excuse is the gentler way, and can be.",
		Example: "  signet rotate force activate --dry-run\n" +
			"  signet rotate force activate --reason 'node-7 burned down, ticket 812'\n" +
			"  signet rotate force remove --confirm 2",
		Args:      oneArg("a step: publish, activate or remove"),
		ValidArgs: []string{"publish", "activate", "remove"},
	}
	f.decisionFlags.add(c)
	c.Flags().Uint32Var(&f.confirm, "confirm", 0, "`NUMBER` of those who stand in the way, in place of typing it")
	o := outputFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		f.given = c.Flags().Changed("confirm")
		if !slices.Contains(c.ValidArgs, args[0]) {
			return usageError{fmt.Errorf("%.70q is no step: publish, activate and remove are", args[0])}
		}
		f.yes = f.given
		if err := a.checkDecision(&f.decisionFlags, "--confirm NUMBER"); err != nil {
			return err
		}
		d, err := once(a, func(ch *channel) (*rotationDecision, error) { return a.forceStep(c.Context(), ch, args[0], &f) })
		if err != nil {
			return err
		}
		return a.print(o, result{object: d, text: func(bool) []block { return d.forced(args[0]) }})
	}
	return c
}

// forceStep looks first, wants the number, and forces then the step over those whom it has shown, and nobody else.
func (a *app) forceStep(ctx context.Context, ch *channel, do string, f *forceFlags) (*rotationDecision, error) {
	v, err := a.rotation(ctx, ch)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(v.Gates, func(g *gateView) bool { return g.Step == do && g.Blocking > 0 })
	switch {
	case v.Operation == nil:
		return nil, &failure{err: api.E(api.RotationOver, "no rotation is under way"), next: "signet rotate status"}
	case i < 0 && v.past(do):
		return newDecision("RotationForce", v.Operation.ID, v), nil // that it was taken already is as good
	case i < 0:
		return nil, &failure{err: api.E(api.RotationTooLate, "operation %s does not wait to %s", v.Operation.ID, do), next: "signet rotate status"}
	}
	g := v.Gates[i]
	d := newDecision("RotationForce", v.Operation.ID, v)
	d.Changed, d.DryRun = true, true
	if !g.Forcible {
		hard := slices.IndexFunc(g.Blockers, func(b *blockerView) bool { return b.Hard && b.Pass == "" })
		why := "unexpired SVIDs would be refused everywhere"
		if hard >= 0 {
			why = g.Blockers[hard].Name + " " + g.Blockers[hard].Why
		}
		return nil, &failure{err: api.E(api.RotationBlocked, "nobody can force the step over those who stand in its way: %s", clip(why, maxFound)), next: "signet rotate status -o wide"}
	}
	if f.dryRun {
		return d, nil
	}
	switch {
	case f.given && int(f.confirm) != g.Blocking:
		return nil, &mistake{fmt.Errorf("%d stand in the way now, not %d: nothing was changed", g.Blocking, f.confirm), "signet rotate force " + do + " --dry-run"}
	case !f.given:
		if err := a.typed(fmt.Sprint(g.Blocking), stepText(do, g.Authority)+" over that many", d.forced(do)); err != nil {
			return nil, err
		}
	}
	r := &apiv1.ForceStepRequest{Operation: v.Operation.ID, Do: do, Authority: g.Authority, Reason: f.reason}
	for _, b := range g.Blockers {
		if b.Pass == "" {
			r.Names = append(r.Names, b.Name)
		}
	}
	if len(r.Names) != g.Blocking { // too many to be named
		r.Names = nil
		if r.Digest, err = hex.DecodeString(g.Digest); err != nil {
			return nil, err
		}
	}
	var resp *apiv1.ForceStepResponse
	err = a.sending(ctx, v.Operation.ID, do+" over them", func(ctx context.Context) (err error) {
		resp, err = askRotation(ctx, a, ch, ch.ForceStep, r)
		return err
	})
	if err != nil {
		return nil, err
	}
	d = newDecision("RotationForce", v.Operation.ID, newRotation(resp.GetRotation(), a.now()))
	d.Changed, d.CorrelationID = resp.GetChanged(), resp.GetCorrelationId()
	return d, nil
}

// past reports whether the operation under way has taken a step of its own root.
func (v *rotationView) past(do string) bool {
	if v.Operation.RolledBack != nil {
		return false
	}
	switch v.stateOf(v.Operation.Authority) {
	case "published":
		return do == "publish"
	case "active":
		return do == "publish" || do == "activate"
	}
	return false
}

// forced is what forcing did, or would do.
func (d *rotationDecision) forced(do string) []block {
	v := d.Rotation
	if !d.DryRun {
		state := "no rotation is under way"
		if v.Operation != nil {
			state = v.stateText()
		}
		said := do + " was taken"
		if !d.Changed {
			said = do + " was taken already"
		}
		return []block{{pairs: append([]pair{v.about(), {"Operation", d.Metadata.Name}, {"Forced", said}, {"State", state}}, known(pair{"On record", d.CorrelationID})...)}}
	}
	var over []waitee
	loses := []string{"those below refuse what is issued under the new root until they have the bundle: mTLS with them fails"}
	if do == "remove" {
		loses = []string{"those below who show an SVID under the root that goes, or know no other root, lose mTLS"}
	} else if v.Forecast != nil && v.Forecast.CrossSigned {
		loses = []string{"nothing, while they still have the old root: the new one is cross-signed"}
	}
	waited, _, _ := v.sorted()
	for _, w := range waited {
		if strings.HasPrefix(w.step, do+" ") {
			over = append(over, w)
		}
	}
	return []block{
		{pairs: []pair{v.about(), {"Operation", d.Metadata.Name}, {"Would be forced", do}, {"Loses", strings.Join(loses, "; ")}}},
		{title: "Over:", table: blockerTable(over, v.now, false, false, "")},
	}
}
