package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

func (a *app) rotateCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "rotate",
		Short: "Rotate the root: plan, start, look, and go back",
		Long: "Rotate the root. A new root is published, then SVIDs are issued under it, then the old one is removed; each step waits\n" +
			"until everybody holds what it needs, and says who does not. docs/rotation.md has what to do when one does not go on.",
		Example: "  signet rotate plan              # what would happen, to whom, how long it takes; changes nothing\n" +
			"  signet rotate start --reason 'yearly' --wait\n" +
			"  signet rotate status            # which step, how far, who is waited for and why\n" +
			"  signet rotate abort             # until the new root is active\n" +
			"  signet rotate rollback          # from then on, until the old one is removed\n" +
			"  signet rotate emergency 7f3a91c2 --dry-run   # this root is compromised",
	}
	c.AddCommand(a.rotatePlanCommand(), a.rotateStartCommand(), a.rotateStatusCommand(), a.rotateExcuseCommand(), a.rotateUnexcuseCommand(),
		a.rotateAbortCommand(), a.rotateRollbackCommand(), a.rotateForceCommand(), a.rotateEmergencyCommand())
	return c
}

// limitFlags are how long a step waits; zero is the CA's default.
type limitFlags struct{ straggler, soak time.Duration }

func (f *limitFlags) add(c *cobra.Command) {
	c.Flags().Var((*limit)(&f.straggler), "straggler", "pass over who is late after this `DURATION`, where the new root is cross-signed (default 1h, in an emergency 1m)")
	c.Flags().Var((*limit)(&f.soak), "soak", "give those who cannot acknowledge this `DURATION` (default 5m)")
}

func (f *limitFlags) proto() *apiv1.RotationLimits {
	l := &apiv1.RotationLimits{}
	if f.straggler > 0 {
		l.Straggler = durationpb.New(f.straggler)
	}
	if f.soak > 0 {
		l.Soak = durationpb.New(f.soak)
	}
	return l
}

// decisionFlags are those of the commands that ask before they do something.
type decisionFlags struct {
	reason      string
	dryRun, yes bool
}

func (f *decisionFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.reason, "reason", "", "why, in your `WORDS`; goes on record")
	c.Flags().BoolVar(&f.dryRun, "dry-run", false, "say what would happen to whom, and change nothing")
}

func (f *decisionFlags) addYes(c *cobra.Command, what string) {
	c.Flags().BoolVarP(&f.yes, "yes", "y", false, "do not ask for "+what+" once more")
}

// checkDecision refuses a reason that is too long, and what would have to be asked where nobody is to be asked.
func (a *app) checkDecision(f *decisionFlags, instead string) error {
	if err := checkReason(f.reason); err != nil {
		return err
	}
	if instead != "" && !f.yes && !f.dryRun {
		return a.somebody(instead)
	}
	return nil
}

// somebody returns an error where nobody is there to be asked.
func (a *app) somebody(instead string) error {
	if a.interactive() {
		return nil
	}
	return usageError{fmt.Errorf("nobody is here to be asked: --dry-run says what would happen, %s does it", instead)}
}

func checkReason(reason string) error {
	if len(reason) > maxReason {
		return usageError{fmt.Errorf("--reason has %d bytes, and %d are kept", len(reason), maxReason)}
	}
	return nil
}

// operationShape is what an operation may be called.
var operationShape = regexp.MustCompile(`^[0-9a-z][0-9a-z-]{0,63}$`)

// drawOperation makes an id for a new operation: its day, for people, and eight digits by chance.
func (a *app) drawOperation() string {
	var b [4]byte
	rand.Read(b[:])
	return a.now().UTC().Format("20060102") + "-" + hex.EncodeToString(b[:])
}

// operationArg is the id of an operation as it was typed, or as -o name prints it.
func operationArg(args []string) (string, error) {
	if len(args) == 0 {
		return "", nil
	}
	id := strings.TrimPrefix(args[0], "rotation.cli.signet.dev/")
	if !operationShape.MatchString(id) {
		return "", usageError{fmt.Errorf("%.70q is no id of an operation: those are 1 to 64 of a-z, 0-9 and -", args[0])}
	}
	return id, nil
}

// maxSpan is the longest time that is taken for one.
const maxSpan = 10 * 365 * 24 * time.Hour

// A span is a duration that also knows days: 7d, 1d12h, 90m.
type span time.Duration

// String returns the value; nothing for zero, which is a default that help names.
func (s *span) String() string {
	if *s == 0 {
		return ""
	}
	return time.Duration(*s).String()
}

// Type names the value in help.
func (s *span) Type() string { return "duration" }

// Set takes a duration above zero.
func (s *span) Set(text string) error {
	d, err := parseSpan(text)
	if err != nil {
		return err
	}
	*s = span(d)
	return nil
}

// A limit is a span that a step may be told to wait: the CA takes no other.
type limit span

// String returns the value; nothing for zero, which is a default that help names.
func (l *limit) String() string { return (*span)(l).String() }

// Type names the value in help.
func (l *limit) Type() string { return (*span)(l).Type() }

// Set takes a duration from a second to thirty days.
func (l *limit) Set(text string) error {
	d, err := parseSpan(text)
	if err != nil || d < time.Second || d > 30*24*time.Hour {
		return errors.New("a duration from 1s to 30d, like 10m or 4h")
	}
	*l = limit(d)
	return nil
}

func parseSpan(text string) (time.Duration, error) {
	bad := errors.New("a duration above zero, like 90m, 36h or 7d")
	rest, days := text, time.Duration(0)
	if n, after, ok := strings.Cut(text, "d"); ok {
		count, err := strconv.ParseUint(n, 10, 16)
		if err != nil {
			return 0, bad
		}
		rest, days = after, time.Duration(count)*24*time.Hour
		if rest == "" {
			rest = "0s"
		}
	}
	d, err := time.ParseDuration(rest)
	if err != nil || d < 0 || d > maxSpan || days > maxSpan || d+days <= 0 || d+days > maxSpan {
		return 0, bad
	}
	return d + days, nil
}

// sending makes a request that changes something: it says what is waited for once it takes long, and an interrupt ends the
// waiting, not what was asked for.
func (a *app) sending(ctx context.Context, id, what string, f func(context.Context) error) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	heard := a.patient("it is to " + what + ", operation " + id)
	err := f(ctx)
	heard()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return &interrupted{"whether the CA took operation " + id + " up is not known; look: " + a.asCalled("signet rotate status")}
	}
	return rotationFailed(err, id)
}

// patient says what the CA is waited for once that takes longer than patience, until the returned function is called; calling it again
// does nothing.
func (a *app) patient(what string) (heard func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTimer(patience)
		defer t.Stop()
		select {
		case <-done:
		case <-t.C:
			a.say("waiting for the CA: %s", what)
		}
	})
	return sync.OnceFunc(func() {
		close(done)
		wg.Wait()
	})
}

// typed shows a plan on stderr, and wants want typed.
func (a *app) typed(want, what string, plan []block) error {
	o := output{format: "table"}
	for i, b := range plan {
		if err := o.block(a.stderr, b, i == 0); err != nil {
			return err
		}
	}
	fmt.Fprintf(a.stderr, "\nType %s to %s: ", scrub(want), what)
	in, err := bufio.NewReader(io.LimitReader(a.stdin, 1<<10)).ReadString('\n')
	if err != nil && err != io.EOF {
		return err
	}
	if strings.TrimSpace(in) != want {
		return usageError{fmt.Errorf("that is not %s: nothing was changed", want)}
	}
	return nil
}

// askRotation is ask of a call that CAs have not had for ever.
func askRotation[Q, R any](ctx context.Context, a *app, ch *channel, call func(context.Context, Q, ...grpc.CallOption) (R, error), req Q) (R, error) {
	resp, err := ask(ctx, a, ch, call, req)
	return resp, olderCA(err)
}

// olderCA says of a call that is not served that the CA is older than this command.
func olderCA(err error) error {
	f, ok := errors.AsType[*failure](err)
	if !ok || f.err.Reason.Kind() != api.KindUnimplemented && status.Code(f.err) != codes.Unimplemented {
		return err
	}
	return &failure{err: api.Wrap(api.ProtocolSkew, f.err, "this CA knows of no rotations that are asked for"),
		why: "It is older than this command.", next: "signet version --server"}
}

// rotation asks where the rotation stands.
func (a *app) rotation(ctx context.Context, ch *channel) (*rotationView, error) {
	defer a.patient("it is to say where the rotation stands")()
	resp, err := askRotation(ctx, a, ch, ch.RotationStatus, &apiv1.RotationStatusRequest{})
	if err != nil {
		return nil, err
	}
	return newRotation(resp.GetRotation(), a.now()), nil
}

// A rotationDecision is what was decided about a rotation, or would be.
type rotationDecision struct {
	header
	TrustDomain   string        `json:"trustDomain"`
	Generation    string        `json:"generation"` // of the bundle, EPOCH.NUMBER
	Changed       bool          `json:"changed"`
	DryRun        bool          `json:"dryRun,omitempty"`
	CorrelationID string        `json:"correlationID,omitempty"` // under which it is on record
	Rotation      *rotationView `json:"rotation,omitempty"`
	Losing        *uint32       `json:"losing,omitempty"` // of an emergency: the number that was typed
}

func newDecision(kind, id string, v *rotationView) *rotationDecision {
	h := newHeader(kind, id)
	h.Metadata = &meta{Name: id} // also where a CA that is none of ours gives it no id
	return &rotationDecision{header: h, TrustDomain: v.TrustDomain, Generation: v.Generation, Rotation: v}
}

// about is what every decision begins with.
func (v *rotationView) about() pair {
	return pair{"Trust domain", v.TrustDomain + ", generation " + v.Generation}
}

// rotationFailed adds the line to type to what the CA refused.
func rotationFailed(err error, id string) error {
	f, ok := errors.AsType[*failure](err)
	if !ok {
		return err
	}
	switch f.err.Reason {
	case api.RotationUnderWay, api.RotationOver, api.RotationBlocked, api.BlockersChanged:
		f.next = "signet rotate status"
	case api.RotationTooLate:
		f.next = "signet rotate status   # abort until the new root is active, rollback after"
	case api.UpstreamCross:
		f.why = "Chains could not lead those who hold only the old root to the new one: nobody could be passed over for being late."
		f.next = "signet rotate plan, then signet rotate start --without-cross"
	case api.NotFound:
		f.next, f.deaf = "signet authority list", true
	case api.DeadlineExceeded, api.CAUnavailable:
		if id != "" && f.err.CorrelationID == "" {
			f.why = "Whether it was taken is not known. The same again, with this id, changes nothing if it was."
		}
	}
	return f
}
