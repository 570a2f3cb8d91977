package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// A way back from a rotation: abort or rollback.
type wayBack struct {
	verb, done, outcome string // "abort", "aborted", "aborted"
	kind                string // of the answer
	check               func(*rotationView) error
	what                func(*rotationView) []pair // happens to whom
	send                func(context.Context, *channel, string, string) (*apiv1.Rotation, bool, string, error)
}

func (a *app) rotateAbortCommand() *cobra.Command {
	w := wayBack{verb: "abort", done: "aborted", outcome: "aborted", kind: "RotationAbort", check: abortable, what: abortMeans,
		send: func(ctx context.Context, ch *channel, id, reason string) (*apiv1.Rotation, bool, string, error) {
			r, err := askRotation(ctx, a, ch, ch.AbortRotation, &apiv1.AbortRotationRequest{Operation: id, Reason: reason})
			return r.GetRotation(), r.GetChanged(), r.GetCorrelationId(), err
		}}
	return a.wayBackCommand(w, &cobra.Command{
		Use:   "abort [OPERATION]",
		Short: "End a rotation whose new root is not active yet",
		Long: "Abort the rotation that is under way, as long as its new root is not active. Nothing was issued under that root, so\n" +
			"nobody loses anything: it leaves the bundle, and its key is gone. Once it is active there is signet rotate rollback.",
		Example: "  signet rotate abort --dry-run                 # what happens to whom\n" +
			"  signet rotate abort --reason 'wrong key kind'  # asks for the operation's id\n" +
			"  signet rotate abort 20261124-1a2b3c4d --yes",
	})
}

func (a *app) rotateRollbackCommand() *cobra.Command {
	w := wayBack{verb: "roll back", done: "rolled back", outcome: "rolled-back", kind: "RotationRollback", check: returnable, what: rollbackMeans,
		send: func(ctx context.Context, ch *channel, id, reason string) (*apiv1.Rotation, bool, string, error) {
			r, err := askRotation(ctx, a, ch, ch.RollbackRotation, &apiv1.RollbackRotationRequest{Operation: id, Reason: reason})
			return r.GetRotation(), r.GetChanged(), r.GetCorrelationId(), err
		}}
	return a.wayBackCommand(w, &cobra.Command{
		Use:   "rollback [OPERATION]",
		Short: "Make the root before active again, until that is removed",
		Long: "Roll the rotation back: the old root, which everybody still trusts, signs again at once. The new one signs nothing any\n" +
			"more and stays in the bundle until the last SVID under it has expired, so nobody loses anything. It cannot be done\n" +
			"once the old root is removed or about to expire, and never onto a compromised one.",
		Example: "  signet rotate rollback --dry-run               # what happens to whom\n" +
			"  signet rotate rollback --reason 'clients with an old TLS library refuse it'\n" +
			"  signet rotate rollback 20261124-1a2b3c4d --yes",
	})
}

func (a *app) wayBackCommand(w wayBack, c *cobra.Command) *cobra.Command {
	var f decisionFlags
	c.Args = cobra.MaximumNArgs(1)
	c.ValidArgsFunction = a.completeOperation
	f.add(c)
	f.addYes(c, "the operation's id")
	o := outputFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		id, err := operationArg(args)
		if err != nil {
			return err
		}
		if err := checkReason(f.reason); err != nil {
			return err
		}
		d, err := once(a, func(ch *channel) (*rotationDecision, error) { return a.goBack(c.Context(), ch, w, id, &f) })
		if err != nil {
			return err
		}
		if err := a.print(o, result{object: d, text: func(bool) []block { return []block{w.text(d)} }}); err != nil {
			return err
		}
		if o.isText() && d.Changed && !d.DryRun && d.Rotation.Operation != nil {
			a.line("look", a.asCalled("signet rotate status --watch"))
		}
		return nil
	}
	return c
}

// goBack looks first, and asks, and does then what it has shown, to the operation that it has shown.
func (a *app) goBack(ctx context.Context, ch *channel, w wayBack, id string, f *decisionFlags) (*rotationDecision, error) {
	v, err := a.rotation(ctx, ch)
	if err != nil {
		return nil, err
	}
	op := v.Operation
	if id == "" && op == nil && len(v.Past) > 0 && v.Past[len(v.Past)-1].Outcome == w.outcome {
		id = v.Past[len(v.Past)-1].ID // the same again
	}
	if op != nil && (id == "" || op.ID == id) {
		id = op.ID
	} else {
		op = nil
	}
	d := newDecision(w.kind, id, v)
	switch p := v.ended(id); {
	case op == nil && p != nil && p.Outcome == w.outcome, op != nil && w.outcome == "rolled-back" && op.RolledBack != nil:
		return d, nil // that it is so already is as good
	case op == nil && p != nil:
		return nil, &failure{err: api.E(api.RotationOver, "operation %s has ended: %s", id, p.Outcome), next: "signet rotate status"}
	case op == nil && id == "":
		return nil, &failure{err: api.E(api.RotationOver, "no rotation is under way"), next: "signet rotate status"}
	case op == nil:
		return nil, &failure{err: api.E(api.RotationOver, "operation %s is not under way", id), next: "signet rotate status"}
	}
	if err := w.check(v); err != nil {
		return nil, err
	}
	d.Changed, d.DryRun = true, true
	if f.dryRun {
		return d, nil
	}
	if !f.yes {
		if err := a.somebody("--yes"); err != nil {
			return nil, err
		}
		if err := a.typed(id, w.verb+" this rotation", []block{w.text(d)}); err != nil {
			return nil, err
		}
	}
	var r *apiv1.Rotation
	var changed bool
	var correlation string
	err = a.sending(ctx, id, w.verb, func(ctx context.Context) (err error) {
		r, changed, correlation, err = w.send(ctx, ch, id, f.reason)
		return err
	})
	if err != nil {
		return nil, err
	}
	d = newDecision(w.kind, id, newRotation(r, a.now()))
	d.Changed, d.CorrelationID = changed, correlation
	return d, nil
}

func (w wayBack) text(d *rotationDecision) block {
	v := d.Rotation
	pairs := []pair{v.about(), {"Operation", d.Metadata.Name}}
	op := v.Operation
	switch {
	case d.DryRun:
		pairs = append(pairs, pair{"Would be " + w.done, "the rotation " + v.rootsOf(op) + ", begun " + instant(op.begun, v.now) + after(" by ", op.By)})
		return block{pairs: append(pairs, w.what(v)...)}
	case !d.Changed:
		pairs = append(pairs, pair{"State", "it was " + w.done + " already"})
	case op != nil:
		pairs = append(pairs, pair{"State", w.done + "; " + v.stateText()})
		pairs = append(pairs, w.what(v)...)
	default:
		pairs = append(pairs, pair{"State", w.done + "; no rotation is under way"})
	}
	return block{pairs: append(pairs, known(pair{"On record", d.CorrelationID})...)}
}

func abortable(v *rotationView) error {
	switch o := v.Operation; v.stateOf(o.Authority) {
	case "", "prepared", "published": // of one without a state the CA knows more
		return nil
	default:
		f := &failure{err: api.E(api.RotationTooLate, "the new root of operation %s is %s", o.ID, v.stateOf(o.Authority)), next: "signet rotate rollback " + o.ID}
		if o.Kind == "emergency" || o.RolledBack != nil {
			f.next = "signet rotate status"
		}
		return f
	}
}

func returnable(v *rotationView) error {
	o := v.Operation
	switch state := v.stateOf(o.Authority); {
	case o.Kind == "emergency":
		return &failure{err: api.E(api.RotationTooLate, "operation %s is an emergency: its old root is compromised", o.ID), next: "signet rotate status"}
	case state == "prepared" || state == "published":
		return &failure{err: api.E(api.RotationTooLate, "the new root of operation %s is %s, not active", o.ID, state), next: "signet rotate abort " + o.ID}
	}
	return nil
}

func abortMeans(v *rotationView) []pair {
	o := v.Operation
	pairs := []pair{
		{"New root", short(o.Authority) + " leaves every bundle, and is never taken again; nothing was issued under it"},
		{"Old root", short(o.Replaces) + " stays active"},
		{"Pods", fmt.Sprintf("%s go on with what they have; none is reissued, none loses mTLS", plural(int(v.Progress.Pods), "pod"))},
	}
	if o.Automatic {
		pairs = append(pairs, pair{"After that", "the CA begins another one by itself in a day, or at once where its latest date is over"})
	}
	return pairs
}

func rollbackMeans(v *rotationView) []pair {
	o := v.Operation
	return []pair{
		{"Old root", short(o.Replaces) + " signs again, at once; everybody still trusts it"},
		{"New root", short(o.Authority) + " signs nothing any more; it is trusted until the last SVID under it has expired, and is removed then"},
		{"Pods", fmt.Sprintf("%s keep their SVIDs, and get one under the old root at their next renewal; none loses mTLS", plural(int(v.Progress.Pods), "pod"))},
	}
}
