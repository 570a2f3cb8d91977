package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// maxSilence is how long a stream of the CA may say nothing: three of its ten-second signs of life.
const maxSilence = 30 * time.Second

// defaultFollow is how long --wait has patience: a rotation takes at least as long as the longest SVID.
const defaultFollow = 24 * time.Hour

// errSilent is why a stream was given up.
var errSilent = errors.New("the CA says nothing")

// interrupted is the outcome of a command that an interrupt ended before what it waited for.
type interrupted struct{ said string }

// Error returns what became of what was waited for.
func (i *interrupted) Error() string { return i.said }

// A follow is what to watch, and how long.
type follow struct {
	id   string        // operation; empty: the one that is under way
	wait time.Duration // give up after; zero: never, and an interrupt is how one leaves
}

// A follower shows one rotation until it is over.
type follower struct {
	a *app
	o *output
	follow
	events  *eventWriter
	seen    bool   // something was shown
	last    string // line or fingerprint
	painted int    // lines to paint over
	over    error  // outcome
}

// follow shows a rotation until it is over, is left, or takes too long. The first answer must succeed. A CA that is away
// later is waited for.
func (a *app) follow(ctx context.Context, o *output, what follow) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	return once1(a, func(ch *channel) error { return a.followOn(ctx, ch, o, what) })
}

// once1 is once without an answer.
func once1(a *app, f func(*channel) error) error {
	_, err := once(a, func(ch *channel) (struct{}, error) { return struct{}{}, f(ch) })
	return err
}

// followOn is follow over a channel that is there, until ctx ends.
func (a *app) followOn(left context.Context, ch *channel, o *output, what follow) error {
	ctx := left
	if what.wait > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(left, what.wait)
		defer cancel()
	}
	f := &follower{a: a, o: o, follow: what, events: newEventWriter(a, o)}
	for away := false; ; {
		over, err := f.stream(ctx, ch, func() {
			if away {
				away = false
				a.say("the CA answers again")
			}
		})
		switch {
		case over:
			return f.over
		case left.Err() != nil:
			return f.left()
		case ctx.Err() != nil:
			return f.late()
		case !f.seen && what.id == "" || err != nil && !passing(err): // who began it has had an answer
			return err
		case !away:
			away = true
			f.painted = 0 // what is said now is below
			a.say("waiting for the CA at %s: %v", ch.where(), err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(a.poll):
		}
	}
}

// stream shows what one stream tells; over: the rotation is.
func (f *follower) stream(ctx context.Context, ch *channel, heard func()) (over bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := f.a.silence
	first := silence
	if f.a.timeout > 0 {
		first = f.a.timeout
	}
	timer := time.AfterFunc(first, func() { cancel(errSilent) })
	defer timer.Stop()
	answered := func() {}
	if !f.seen {
		answered = f.a.patient("it is to say where the rotation stands")
		defer answered()
	}
	s, err := ch.WatchRotation(ctx, &apiv1.WatchRotationRequest{})
	for err == nil {
		var m *apiv1.WatchRotationResponse
		if m, err = s.Recv(); err != nil {
			break
		}
		timer.Reset(silence)
		answered()
		heard()
		if over, err := f.show(newRotation(m.GetRotation(), f.a.now())); over || err != nil {
			return over, err
		}
	}
	switch {
	case errors.Is(context.Cause(ctx), errSilent) && !f.seen:
		return false, f.a.callFailed(ch, context.DeadlineExceeded)
	case errors.Is(context.Cause(ctx), errSilent):
		return false, api.E(api.CAUnavailable, "it has said nothing for %s", silence)
	case errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled && ctx.Err() == nil: // by the CA, which is ending
		return false, api.E(api.CAUnavailable, "it ended the stream")
	}
	return false, olderCA(f.a.callFailed(ch, err))
}

// show shows where the rotation stands, and reports whether it is over.
func (f *follower) show(v *rotationView) (over bool, err error) {
	if f.id == "" && v.Operation != nil {
		f.id = v.Operation.ID
	}
	line := v.line()
	switch {
	case f.id == "":
		over = true
	case v.Operation == nil || v.Operation.ID != f.id:
		over = true
		line, f.over = v.outcome(f.id)
	}
	again := f.seen
	f.seen = true
	switch {
	case !f.o.isText():
		return over, f.event(v, again)
	case f.repaints():
		return over, f.paint(v)
	case line == f.last:
		return over, nil
	}
	f.last = line
	_, err = fmt.Fprintf(sink{f.a.stdout, "stdout"}, "%s  %s\n", v.Now, scrub(line))
	return over, err
}

// outcome is how an operation ended: a line, and what the exit code follows from.
func (v *rotationView) outcome(id string) (string, error) {
	p := v.ended(id)
	if p == nil {
		line := id + ": over, and the record does not tell any more how it ended"
		return line, &findings{summary: "operation " + line}
	}
	line := id + ": " + p.Outcome + after(" at ", p.Ended)
	if p.Outcome == "done" {
		return line, nil
	}
	return line, &findings{summary: "operation " + line}
}

// left is what an interrupt means: nothing to the rotation.
func (f *follower) left() error {
	id := ""
	if f.id != "" {
		id = " " + f.id
	}
	said := "operation" + id + " goes on without this terminal; look again: " + f.a.asCalled("signet rotate status --watch")
	if f.wait > 0 {
		return &interrupted{said}
	}
	f.a.say("%s", said)
	return nil
}

// late is that --wait is over.
func (f *follower) late() error {
	return &failure{
		err:  api.E(api.DeadlineExceeded, "operation %s is not over after %s", dash(f.id), f.wait),
		why:  "It goes on; whom it waits for is said above. It is safe to wait again.",
		next: "signet rotate status --watch",
	}
}

// repaints reports whether what was shown is painted over.
func (f *follower) repaints() bool {
	return f.o.isText() && f.a.tty(f.a.stdout) && f.a.getenv("TERM") != "dumb"
}

// paint shows it in the place of what was shown before, as far as the screen reaches.
func (f *follower) paint(v *rotationView) error {
	var buf bytes.Buffer
	for i, b := range v.text(f.o.format == "wide") {
		if err := f.o.block(&buf, b, i == 0); err != nil {
			return err
		}
	}
	width, height := screen(f.a.stdout)
	lines := strings.Split(strings.TrimRight(buf.String(), "\n"), "\n")
	if most := max(2, height-2); len(lines) > most {
		lines = append(lines[:most-1], fmt.Sprintf("and %d more lines: %s", len(lines)-most+1, f.a.asCalled("signet rotate status")))
	}
	var out bytes.Buffer
	if f.painted > 0 {
		fmt.Fprintf(&out, "\x1b[%dA\x1b[J", f.painted)
	}
	p := f.a.pen(f.a.stdout)
	for _, l := range lines {
		if r := []rune(l); len(r) >= width {
			l = string(r[:width-2]) + "…"
		}
		out.Write(p.words([]byte(l)))
		out.WriteByte('\n')
	}
	f.painted = len(lines)
	_, err := sink{f.a.stdout, "stdout"}.Write(out.Bytes())
	return err
}

// screen is how many columns and lines a terminal has; of one that does not say, what is common.
func screen(w io.Writer) (width, height int) {
	if f, ok := w.(*os.File); ok {
		if w, h, err := term.GetSize(int(f.Fd())); err == nil && w > 10 && h > 4 {
			return w, h
		}
	}
	return 120, 50
}

// event prints it for machines, when more than times changed.
func (f *follower) event(v *rotationView, again bool) error {
	quiet := *v
	quiet.Now, quiet.Forecast, quiet.Steps = "", nil, nil
	print := fingerprint(quiet)
	kind := eventAdded
	if again {
		kind = eventModified
	}
	if print == f.last {
		return nil
	}
	f.last = print
	return f.events.events(kind, []item{{key: f.id, object: v, table: func(bool) *metav1.Table { return nil }}})
}
