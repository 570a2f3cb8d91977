//go:build cluster && linux

package nodes_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/integration/nodes"
)

// decided is what `signet node ban` and `allow` say with -o json.
type decided struct {
	Changed       bool
	SessionsEnded int
	Node          struct {
		Connected  bool
		SPIFFEIDs  []string
		ValidUntil time.Time
		Ban        *struct {
			By, Reason string
			ValidUntil time.Time
		}
	}
}

func (s *suite) decide(t *testing.T, args ...string) decided {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), s.signet, append([]string{"--timeout=1m", "--as-role=emergency", "--kubeconfig=" + s.Kubeconfig, "node", "-o", "json"}, args...)...).Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Fatalf("%v: %s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var d decided
	if err := json.Unmarshal(out, &d); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return d
}

// banned: a node is stolen and banned. Its agent, and whoever has what that had, is let in no more, here and after a restart
// of the CA; its pods keep what they hold, and new ones wait until the node is allowed again.
func (s *suite) banned(t *testing.T) {
	s.Own(t)
	s.namespace(t, "banned")
	s.Apply(t, pod{namespace: "banned", name: "watch", node: s.node(1), args: `["watch"]`}.json(s))
	s.Wait(t, "pod", "-n", "banned", "watch", "--for=condition=Ready")
	s.served(t, "banned", "watch")
	token := s.bound(t, "banned", "watch", []string{workloadAudience})
	agent := s.agentToken(t, s.node(1))
	f, neighbour := s.newThief(t, s.Nodes[1], s.node(1)), s.newThief(t, s.Nodes[0], s.node(0))
	f.enter(t)
	neighbour.enter(t)
	if err := f.try(t, token); err != nil {
		t.Fatal(err)
	}
	const id = "spiffe://cluster.local/ns/banned/sa/default"
	if d := s.decide(t, "ban", s.node(1), "--dry-run"); !d.Changed || d.SessionsEnded < 2 || !strings.Contains(fmt.Sprint(d.Node.SPIFFEIDs), id) {
		t.Errorf("a ban would touch %+v", d)
	}
	t.Cleanup(func() {
		s.decideAfterwards(t, "allow", s.node(1), "--yes")
	})
	ended := make(chan error, 1)
	var end time.Time
	go func() { // ends with the session, which the test's end ends
		err := f.ended()
		end = time.Now()
		ended <- err
	}()
	asked := time.Now()
	d := s.decide(t, "ban", s.node(1), "--reason=stolen", "--yes")
	if d.SessionsEnded < 2 || d.Node.Ban == nil || d.Node.Ban.Reason != "stolen" || d.Node.ValidUntil.IsZero() || d.Node.Ban.ValidUntil.Before(d.Node.ValidUntil) {
		t.Errorf("the ban: %+v", d)
	}
	if err := <-ended; refused(err) != api.NodeBanned {
		t.Errorf("the session ended with %v", err)
	}
	cutOff(t, "the session of a banned node's agent, from the command's start", asked, end)
	out := func(when string) {
		t.Helper()
		for what, err := range map[string]error{
			"an agent's token":               (&thief{s: s, pid: f.pid, ca: f.ca}).attest(t, agent),
			"an agent's token with its SVID": (&thief{s: s, pid: f.pid, ca: f.ca}).attest(t, agent, f.certificate),
			"a session":                      (&thief{s: s, pid: f.pid, ca: f.ca, certificate: f.certificate}).open(t, agent),
			"a pod's token elsewhere":        neighbour.try(t, token),
		} {
			if refused(err) != api.NodeBanned {
				t.Errorf("%s, %s: %v", what, when, err)
			}
		}
	}
	out("at once")
	s.Apply(t, pod{namespace: "banned", name: "late", node: s.node(1), args: `["watch"]`}.json(s))

	s.Must(t, "delete", "pod", "-n", signetNamespace, "signet-ca-0", "--timeout=2m")
	s.Wait(t, "pod", "-n", signetNamespace, "signet-ca-0", "--for=condition=Ready")
	if list, code := s.tool(t, "--timeout=1m", "node", "list", "--banned", "--no-headers"); code != 0 || !strings.HasPrefix(list, s.node(1)+" ") {
		t.Errorf("after a restart: exit code %d: %s", code, list)
	}
	nodes.Eventually(t, "the other node's agent has a session", func(context.Context) error {
		token := s.agentToken(t, s.node(0))
		if err := neighbour.attest(t, token); err != nil {
			return err
		}
		return neighbour.open(t, token)
	})
	out("after a restart of the CA")
	for _, tr := range s.served(t, "banned", "watch")[1:] {
		if !tr.OK {
			t.Error("the socket of a pod that held its SVID did not answer")
		}
	}
	s.Wait(t, "pod", "-n", "banned", "late", "--for=condition=Ready")
	words, err := s.transitions(t.Context(), "banned", "late")
	if err != nil {
		t.Fatal(err)
	}
	for _, tr := range words {
		if tr.OK {
			t.Error("a pod has its first SVID on a banned node")
		}
	}
	s.onRecord(t, api.NodeBanned)

	if d := s.decide(t, "allow", s.node(1), "--reason=found", "--yes"); !d.Changed {
		t.Errorf("not allowed: %+v", d)
	}
	s.Must(t, "delete", "pod", "-n", signetNamespace, s.agentPod(t, s.node(1)), "--wait=false") // or it would come back within two minutes
	s.served(t, "banned", "late")
	if err := (&thief{s: s, pid: f.pid, ca: f.ca, certificate: f.certificate}).open(t, s.agentToken(t, s.node(1))); err != nil {
		t.Errorf("what it held counts again: %v", err)
	}
	s.Must(t, "rollout", "status", "-n", signetNamespace, "daemonset/signet-agent", "--timeout=3m")
}

// decideAfterwards is decide for what puts things right again when a test is over.
func (s *suite) decideAfterwards(t *testing.T, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, s.signet, append([]string{"--timeout=1m", "--as-role=emergency", "--kubeconfig=" + s.Kubeconfig, "node"}, args...)...).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
