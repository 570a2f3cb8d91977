//go:build integration

package rotation

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	apiv1 "github.com/signet-ca/signet/api/v1"
)

// status is the part of `signet rotate status -o json` that these tests read.
type status struct {
	Kind, State, Generation string
	Operation               *operation
	Gates                   []struct {
		Step     string
		Blocking int
		Blockers []blocker
	}
	Authorities []struct{ ID, State string }
	Past        []operation
	Trouble     *struct{ Reason, Detail string }
}

type operation struct{ ID, Kind, Authority, Replaces, Outcome string }

type blocker struct{ Kind, Name, Why, Nack, Pass string }

// authorities is the part of `signet authority list -o json` that these tests read.
type authorities struct {
	Items, Announced, Gone []struct{ ID, Type, State string }
}

// signet runs the operator's tool and returns what it printed and its exit code.
func (w *world) signet(args ...string) (stdout, stderr string, code int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary(w.t, "signet"), append(args, "--socket="+w.join("admin.sock"), "--timeout=1m")...)
	var out, talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &talk
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		w.t.Fatalf("signet %s: %v\n%s", strings.Join(args, " "), err, talk.String())
	}
	return out.String(), talk.String(), cmd.ProcessState.ExitCode()
}

// must runs the tool, which has to end with that code, and returns all that it printed.
func (w *world) must(code int, args ...string) string {
	w.t.Helper()
	out, talk, got := w.signet(args...)
	if got != code {
		w.t.Errorf("signet %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), got, code, out, talk)
	}
	return out + talk
}

// status asks the tool where the rotation stands.
func (w *world) status() (status, int) {
	w.t.Helper()
	out, talk, code := w.signet("rotate", "status", "-o", "json")
	var s status
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		w.t.Fatalf("rotate status: %v\n%s%s", err, out, talk)
	}
	return s, code
}

// blocking are the names of those who stand in the way.
func (s status) blocking() (names []string) {
	for _, g := range s.Gates {
		for _, b := range g.Blockers {
			if b.Pass == "" {
				names = append(names, b.Name)
			}
		}
	}
	return names
}

func (s status) blocker(name string) (blocker, bool) {
	for _, g := range s.Gates {
		if i := slices.IndexFunc(g.Blockers, func(b blocker) bool { return b.Name == name }); i >= 0 {
			return g.Blockers[i], true
		}
	}
	return blocker{}, false
}

// roots lists what the tool says of roots: id to state, with those that are gone.
func (w *world) roots() map[string]string {
	w.t.Helper()
	out, talk, code := w.signet("authority", "list", "--gone", "-o", "json")
	var l authorities
	if err := json.Unmarshal([]byte(out), &l); err != nil || code != 0 {
		w.t.Fatalf("authority list: exit code %d: %v\n%s%s", code, err, out, talk)
	}
	roots := map[string]string{}
	for _, a := range slices.Concat(l.Items, l.Announced, l.Gone) {
		if a.Type == "root" {
			roots[a.ID] = a.State
		}
	}
	return roots
}

// active is the id of the root that is active.
func (w *world) active() string {
	w.t.Helper()
	for id, state := range w.roots() {
		if state == "active" {
			return id
		}
	}
	w.t.Fatal("no root is active")
	return ""
}

// rotation asks the CA itself, which costs less than to run the tool.
func (w *world) rotation(ctx context.Context) (*apiv1.Rotation, error) {
	resp, err := w.admin.RotationStatus(ctx, &apiv1.RotationStatusRequest{})
	return resp.GetRotation(), err
}

// await waits until the rotation is as ok wants it.
func (w *world) await(what string, ok func(*apiv1.Rotation) bool) *apiv1.Rotation {
	w.t.Helper()
	var last *apiv1.Rotation
	eventually(w.t, what, func(ctx context.Context) error {
		r, err := w.rotation(ctx)
		if err != nil {
			return err
		}
		if last = r; !ok(r) {
			return fmt.Errorf("generation %d.%d, %v, waits for %v", r.GetEpoch(), r.GetNumber(), stateOf(r), waits(r))
		}
		return nil
	})
	return last
}

// waits are the names of those who stand in the way of the steps to come.
func waits(r *apiv1.Rotation) (names []string) {
	for _, g := range r.GetGates() {
		for _, b := range g.GetBlockers() {
			if b.GetPass() == "" {
				names = append(names, g.GetDo()+": "+b.GetName())
			}
		}
	}
	return names
}

// stateOf are the states of the roots, by the beginnings of their ids.
func stateOf(r *apiv1.Rotation) map[string]string {
	states := map[string]string{}
	for _, a := range r.GetAuthorities() {
		states[a.GetId()[:8]] = a.GetState()
	}
	return states
}

// limits are those of a rotation that nobody is passed over in, but those who cannot say what they use.
func limits() *apiv1.RotationLimits { return &apiv1.RotationLimits{Soak: durationpb.New(time.Second)} }

// newRootIs tells whether the new root of what is under way is in that state.
func newRootIs(state string) func(*apiv1.Rotation) bool {
	return func(r *apiv1.Rotation) bool {
		for _, a := range r.GetAuthorities() {
			if a.GetId() == r.GetOperation().GetAuthority() {
				return a.GetState() == state
			}
		}
		return false
	}
}

// ended tells whether an operation is over, with that outcome.
func ended(id, outcome string) func(*apiv1.Rotation) bool {
	return func(r *apiv1.Rotation) bool {
		for _, p := range r.GetPast() {
			if p.GetId() == id {
				return p.GetOutcome() == outcome && r.GetOperation() == nil
			}
		}
		return false
	}
}
