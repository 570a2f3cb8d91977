//go:build integration

package rotation

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"testing"

	apiv1 "github.com/signet-ca/signet/api/v1"
)

// TestAuthorityKilled kills the CA (SIGKILL) in each state that the new root passes through, and starts it again: each time it goes
// on where it was, the rotation comes to its end, and no connection fails.
//
// threat: E01
func TestAuthorityKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 2, short)
	a, b := w.peer(w.agents[0], "web", false), w.peer(w.agents[1], "db", true)
	pair, back := w.connect(a, b), w.connect(b, a)
	old := w.active()
	again := func(when string, states ...string) {
		t.Helper()
		w.ca.kill()
		w.ca.start()
		r := w.await(when+": it is there again", func(*apiv1.Rotation) bool { return true })
		for _, state := range states {
			if newRootIs(state)(r) {
				pair.more(t, 10)
				return
			}
		}
		t.Errorf("killed when the new root was %s, it goes on with %v", when, stateOf(r))
	}

	// The first step follows the beginning within moments, so that this one may come after it.
	late := &stubborn{name: "late", words: "not yet", streams: 1}
	w.refuse(w.agents[1], late)
	answered := make(chan struct{})
	go func() { // its answer may be lost with the CA
		defer close(answered)
		w.admin.StartRotation(t.Context(), &apiv1.StartRotationRequest{Operation: "killed", Limits: limits()})
	}()
	eventually(t, "it has begun", func(context.Context) error {
		log, err := os.ReadFile(w.join("ca.log"))
		if err == nil && !bytes.Contains(log, []byte("rotation: StartRotation")) {
			err = errors.New("the log does not say so")
		}
		return err
	})
	w.ca.kill()
	<-answered
	again("prepared", "prepared", "published")

	w.await("it waits for a pod", func(r *apiv1.Rotation) bool {
		return newRootIs("published")(r) && slices.Equal(waits(r), []string{"activate: pod/shop/late"})
	})
	again("published", "published")
	if s, code := w.status(); code != 3 || s.Operation == nil || s.Operation.ID != "killed" {
		t.Errorf("the operation is not what it was: exit code %d, %+v", code, s)
	}
	late.gives.Store(true)
	w.await("the new root is active", newRootIs("active"))
	again("active", "active")
	w.await("it waits for what was signed under the old root", func(r *apiv1.Rotation) bool { return len(waits(r)) > 0 })
	if roots := w.roots(); roots[old] != "retiring" {
		t.Errorf("the roots are %v", roots)
	}
	again("retiring", "active")
	w.await("it is done", ended("killed", "done"))
	fresh := w.active()
	w.ca.kill()
	w.ca.start()
	w.await("it is there again", ended("killed", "done"))
	roots := w.roots()
	if len(roots) != 2 || roots[old] != "removed" || fresh == old {
		t.Errorf("the roots are %v", roots)
	}
	if s, code := w.status(); code != 0 || s.State != "None" || len(s.Past) != 1 {
		t.Errorf("at the end: exit code %d, %+v", code, s)
	}
	w.connected(2)
	pair.more(t, 10)
	back.more(t, 10)
}
