//go:build cluster && linux

package nodes_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/integration/nodes"
)

// agentSays waits for a line like this in the log of a node's agent.
func (s *suite) agentSays(t *testing.T, n *nodes.Node, like string) string {
	t.Helper()
	var found string
	nodes.Eventually(t, fmt.Sprintf("the agent on %s says %s", n.Name, like), func(context.Context) error {
		log, err := n.Log(signetNamespace, "signet-agent-")
		if err != nil {
			return err
		}
		if found = regexp.MustCompile(".*" + like + ".*").FindString(log); found == "" {
			return errors.New("not yet")
		}
		return nil
	})
	return found
}

// clocks: the clock of one node's agent is wrong, and then the CA's. Nobody who has an identity loses it, who cannot have one
// is told why, and once the clock is right all is as before.
func (s *suite) clocks(t *testing.T) {
	s.Own(t)
	s.namespace(t, "clocks")
	n := s.Nodes[1]
	watch := func(name string) string {
		return pod{namespace: "clocks", name: name, node: n.Name, args: `["watch"]`}.json(s)
	}
	s.Apply(t, watch("before"))
	s.Wait(t, "pod", "-n", "clocks", "before", "--for=condition=Ready")
	s.served(t, "clocks", "before")
	agent := s.agentOf(t, n).Pid
	t.Cleanup(func() { nodes.SetClocks(t, 0, agent) })
	for _, row := range []struct {
		name string
		off  time.Duration
		says string // to the new pod; empty: nothing, it has its identity
		log  string // the agent; a clock that is ahead has it renew its own identity at once
	}{
		{"ahead-minutes", 5 * time.Minute, "", ""},
		{"behind-minutes", -5 * time.Minute, string(api.TokenNotYetValid), ""},
		{"ahead-day", 25 * time.Hour, string(api.TokenExpired), string(api.ClockSkew)},
		{"behind-day", -25 * time.Hour, string(api.TokenNotYetValid), ""},
	} {
		nodes.SetClocks(t, row.off, agent)
		s.Apply(t, watch(row.name))
		if row.says != "" {
			s.mountFails(t, "clocks", row.name, row.says)
		} else {
			s.Wait(t, "pod", "-n", "clocks", row.name, "--for=condition=Ready")
			s.served(t, "clocks", row.name)
		}
		if row.log != "" {
			t.Log(s.agentSays(t, n, row.log+`.*this node's clock says`))
		}
		nodes.SetClocks(t, 0, agent)
		right := time.Now()
		s.Wait(t, "pod", "-n", "clocks", row.name, "--for=condition=Ready")
		s.served(t, "clocks", row.name)
		s.served(t, "clocks", "before")
		figure(t, "agent's clock off by %v: all is served %v after it was right", row.off, time.Since(right).Round(100*time.Millisecond))
	}
	if again := s.agentOf(t, n).Pid; again != agent {
		t.Error("the agent has ended")
	}

	// The CA's: nothing that it shows or issues is valid for anybody else, and no token of theirs for it.
	ca := s.caProcess(t)
	t.Cleanup(func() { nodes.SetClocks(t, 0, ca) })
	nodes.SetClocks(t, 25*time.Hour, ca)
	s.Apply(t, watch("ahead-ca"))
	s.agentSays(t, n, "identity not renewed.*clocks/ahead-ca")
	nodes.SetClocks(t, 0, ca)
	right := time.Now()
	s.Wait(t, "pod", "-n", "clocks", "ahead-ca", "--for=condition=Ready")
	s.served(t, "clocks", "ahead-ca")
	figure(t, "the CA's clock 25 h ahead: a new pod is served %v after it was right", time.Since(right).Round(100*time.Millisecond))
	if again := s.caProcess(t); again != ca {
		t.Error("the CA has ended")
	}
	s.served(t, "clocks", "before")
}

// mountFails waits for an event that says why a pod's volume is not mounted.
func (s *suite) mountFails(t *testing.T, namespace, pod, why string) {
	t.Helper()
	nodes.Eventually(t, pod+" is told of "+why, func(ctx context.Context) error {
		events, err := s.Kubectl(ctx, "", "get", "events", "-n", namespace, "-o", "jsonpath={range .items[*]}{.message}{\"\\n\"}{end}",
			"--field-selector", "reason=FailedMount,involvedObject.name="+pod)
		if err == nil && !strings.Contains(events, why) {
			err = fmt.Errorf("no event says so: %s", events)
		}
		return err
	})
}

// caProcess is the CA's process.
func (s *suite) caProcess(t *testing.T) int {
	t.Helper()
	var found int
	nodes.Eventually(t, "the CA's process", func(context.Context) error {
		pids, err := s.Nodes[0].Processes("signet-ca")
		if err == nil && len(pids) != 1 {
			err = fmt.Errorf("there are %d", len(pids))
		}
		if err == nil {
			found = pids[0]
		}
		return err
	})
	return found
}
