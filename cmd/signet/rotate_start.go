package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// followFlags add --wait to a command that begins an operation.
type followFlags struct{ wait time.Duration }

func (f *followFlags) add(c *cobra.Command) {
	c.Flags().Var((*span)(&f.wait), "wait", "follow it until it is over, for at most this `DURATION` (without a value 24h)")
	c.Flags().Lookup("wait").NoOptDefVal = defaultFollow.String()
}

// waitArgs is args of a command with --wait that takes n arguments: one more that is a duration was meant for that flag.
func waitArgs(n int, args cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, in []string) error {
		if len(in) == n+1 && c.Flags().Changed("wait") {
			if _, err := parseSpan(in[n]); err == nil {
				return fmt.Errorf("the duration of --wait follows an equals sign: --wait=%s", in[n])
			}
		}
		return args(c, in)
	}
}

type startFlags struct {
	limitFlags
	followFlags
	id, reason           string
	withoutCross, dryRun bool
}

func (a *app) rotateStartCommand() *cobra.Command {
	var f startFlags
	c := &cobra.Command{
		Use:   "start",
		Short: "Begin a rotation to a new root",
		Long: "Begin a rotation. It goes on by itself from step to step, with this terminal or without it: nothing is lost with it.\n" +
			"Until the new root is active it can be aborted, and from then until the old one is removed rolled back.\n\n" +
			"The same again changes nothing: with the same --id, or without one while a rotation is under way, it says what it is\n" +
			"and, with --wait, follows that. Whether there is a new upstream to go to says the CA's configuration.",
		Example: "  signet rotate plan                            # first: what will happen, and who would be waited for\n" +
			"  signet rotate start --reason 'yearly' --wait\n" +
			"  signet rotate start --id 2026-yearly --reason 'yearly' --wait=4h -o json\n" +
			"  signet rotate start --straggler 10m           # pass over who is late after ten minutes",
		Args: waitArgs(0, noArgs),
	}
	f.limitFlags.add(c)
	f.followFlags.add(c)
	c.Flags().StringVar(&f.id, "id", "", "`ID` of the operation: 1 to 64 of a-z, 0-9 and - (default one that is drawn)")
	c.Flags().StringVar(&f.reason, "reason", "", "why, in your `WORDS`; goes on record")
	c.Flags().BoolVar(&f.withoutCross, "without-cross", false, "begin although the new root cannot be cross-signed: then nobody is passed over for being late")
	c.Flags().BoolVar(&f.dryRun, "dry-run", false, "say what would happen, as plan does, and change nothing")
	o := outputFlags(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := checkReason(f.reason); err != nil {
			return err
		}
		if f.id != "" && !operationShape.MatchString(f.id) {
			return usageError{fmt.Errorf("--id %.70q: 1 to 64 of a-z, 0-9 and -", f.id)}
		}
		if f.dryRun {
			v, err := once(a, func(ch *channel) (*planView, error) {
				return a.planRotation(c.Context(), ch, &apiv1.PlanRotationRequest{Limits: f.limitFlags.proto()})
			})
			if err != nil {
				return err
			}
			return a.printPlan(o, v)
		}
		return a.beginAndFollow(c.Context(), o, f.wait, func(ctx context.Context, ch *channel) (*rotationDecision, error) {
			return a.startRotation(ctx, ch, &f)
		})
	}
	return c
}

// beginAndFollow begins an operation, says what it is and how to go on, and follows it where wait says so.
func (a *app) beginAndFollow(ctx context.Context, o *output, wait time.Duration, begin func(context.Context, *channel) (*rotationDecision, error)) error {
	return once1(a, func(ch *channel) error {
		d, err := begin(ctx, ch)
		if err != nil {
			return err
		}
		if wait > 0 {
			var stop context.CancelFunc
			ctx, stop = signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
			defer stop()
		}
		if wait == 0 || o.isText() { // else a stream of events of one kind
			if err := a.print(o, result{object: d, text: d.begun}); err != nil {
				return err
			}
		}
		if o.isText() {
			a.howToGoOn(d)
		}
		if wait == 0 {
			return nil
		}
		return a.followOn(ctx, ch, o, follow{id: d.Metadata.Name, wait: wait})
	})
}

func (a *app) startRotation(ctx context.Context, ch *channel, f *startFlags) (*rotationDecision, error) {
	id := f.id
	if id == "" {
		v, err := a.rotation(ctx, ch)
		if err != nil {
			return nil, err
		}
		if op := v.Operation; op != nil {
			return a.joined(v)
		}
		id = a.drawOperation()
	}
	var resp *apiv1.StartRotationResponse
	err := a.sending(ctx, id, "make or ask for the new root", func(ctx context.Context) (err error) {
		resp, err = askRotation(ctx, a, ch, ch.StartRotation, &apiv1.StartRotationRequest{Operation: id, Reason: f.reason, Limits: f.limitFlags.proto(), WithoutCross: f.withoutCross})
		return err
	})
	if err != nil {
		if x, ok := errors.AsType[*failure](err); ok && (x.err.Reason == api.DeadlineExceeded || x.err.Reason == api.CAUnavailable && x.err.CorrelationID == "") {
			x.next = "signet rotate start --id " + id
		}
		return nil, err
	}
	d := newDecision("RotationStart", id, newRotation(resp.GetRotation(), a.now()))
	d.Changed, d.CorrelationID = resp.GetChanged(), resp.GetCorrelationId()
	return d, nil
}

// joined is the answer to one who begins what is begun: a rotation that was begun and goes on as he wants it.
func (a *app) joined(v *rotationView) (*rotationDecision, error) {
	op := v.Operation
	if op.Kind == "emergency" || op.RolledBack != nil {
		what := "an emergency"
		if op.RolledBack != nil {
			what = "being rolled back"
		}
		return nil, &failure{err: api.E(api.RotationUnderWay, "operation %s is under way, and is %s", op.ID, what), next: "signet rotate status"}
	}
	return newDecision("RotationStart", op.ID, v), nil
}

// begun is the answer to a command that began an operation.
func (d *rotationDecision) begun(bool) []block {
	v := d.Rotation
	o := v.Operation
	if o == nil || o.ID != d.Metadata.Name {
		line, _ := v.outcome(d.Metadata.Name)
		return []block{{pairs: known(v.about(), pair{"Operation", line}, pair{"On record", d.CorrelationID})}}
	}
	state := instant(o.begun, v.now) + after(" by ", o.By) + after(": ", o.Reason)
	if !d.Changed {
		state += "; it was begun already, and nothing was changed"
	}
	return []block{{pairs: known(
		v.about(),
		pair{"Operation", o.ID + " (" + o.Kind + ")"},
		pair{"Begun", state},
		pair{"Compromised", strings.Join(shorts(o.Compromised), ", ")},
		pair{"Roots", v.rootsOf(o)},
		pair{"State", v.stateText()},
		pair{"Progress", v.Progress.String()},
		pair{"Cross-signed", v.Forecast.crossText()},
		pair{"On record", d.CorrelationID},
	)}, {table: v.stepTable()}}
}

// howToGoOn says what to type next about an operation that was begun.
func (a *app) howToGoOn(d *rotationDecision) {
	o := d.Rotation.Operation
	if o == nil || !operationShape.MatchString(o.ID) {
		return
	}
	a.line("look", a.asCalled("signet rotate status --watch"))
	if o.Kind == "emergency" {
		return // there is no way back
	}
	switch d.Rotation.stateOf(o.Authority) {
	case "prepared", "published":
		a.line("abort", a.asCalled("signet rotate abort "+o.ID)+"      # until the new root is active")
		fallthrough
	default:
		a.line("back", a.asCalled("signet rotate rollback "+o.ID)+"   # from then on, until the old one is removed")
	}
}
