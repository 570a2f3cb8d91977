//go:build cluster && linux

package nodes_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/integration/nodes"
)

// transition is what `probe watch` says: when its socket began to answer, or not to.
type transition struct {
	At int64 // in microseconds since 1970
	OK bool
}

func (s *suite) transitions(ctx context.Context, namespace, pod string) ([]transition, error) {
	out, err := s.Kubectl(ctx, "", "logs", "-n", namespace, pod)
	if err != nil {
		return nil, err
	}
	var all []transition
	for line := range strings.Lines(out) {
		var tr transition
		if err := json.Unmarshal([]byte(line), &tr); err != nil {
			return nil, err
		}
		all = append(all, tr)
	}
	return all, nil
}

// served waits until the last word of a watching pod is that its socket answers, and returns all words.
func (s *suite) served(t *testing.T, namespace, pod string) []transition {
	t.Helper()
	var all []transition
	nodes.Eventually(t, pod+"'s socket answers", func(ctx context.Context) (err error) {
		if all, err = s.transitions(ctx, namespace, pod); err == nil && (len(all) == 0 || !all[len(all)-1].OK) {
			err = errors.New("it does not")
		}
		return err
	})
	return all
}

// containerStart is when a container of a pod was last started, in whole seconds.
func (s *suite) containerStart(t *testing.T, args ...string) time.Time {
	t.Helper()
	text := s.Must(t, append([]string{"get", "-o", "jsonpath={range .items[*]}{range .status.containerStatuses[*]}{.state.running.startedAt}{\"\\n\"}{end}{end}"}, args...)...)
	var last time.Time
	for line := range strings.Lines(text) {
		at, err := time.Parse(time.RFC3339, strings.TrimSpace(line))
		if err != nil {
			t.Fatal(err)
		}
		if at.After(last) {
			last = at
		}
	}
	return last
}

// replace: while there is no CA, the agents are replaced and then an Envoy is restarted. Nobody who connects notices.
func (s *suite) replace(t *testing.T) {
	if !s.mesh {
		t.Skip("no Envoys run")
	}
	t.Cleanup(func() { s.afterwards(t, "scale", "-n", signetNamespace, "statefulset/signet-ca", "--replicas=1") })
	s.Apply(t, s.envoyPod("spare", "checkout", "client", "node1", "[]")+pod{namespace: "mesh", name: "watch", node: s.node(0), args: `["watch"]`}.json(s))
	s.Wait(t, "pod", "-n", "mesh", "spare", "watch", "--for=condition=Ready")
	s.served(t, "mesh", "watch")
	stop := s.load(t, "mesh", "checkout", "http://127.0.0.1:15001")
	s.Must(t, "scale", "-n", signetNamespace, "statefulset/signet-ca", "--replicas=0")
	s.Must(t, "wait", "-n", signetNamespace, "pod/signet-ca-0", "--for=delete", "--timeout=2m")
	s.Must(t, "rollout", "restart", "-n", signetNamespace, "daemonset/signet-agent")
	s.Must(t, "rollout", "status", "-n", signetNamespace, "daemonset/signet-agent", "--timeout=3m")
	all := s.served(t, "mesh", "watch")
	if len(all) >= 3 {
		off, on := time.UnixMicro(all[len(all)-2].At), time.UnixMicro(all[len(all)-1].At)
		figure(t, "while the agent was replaced, its socket did not answer for %v", on.Sub(off).Round(time.Millisecond))
	}
	figure(t, "agents were started at %v, the socket answered at %v", s.containerStart(t, "pods", "-n", signetNamespace, "-l", "app.kubernetes.io/name=signet-agent").Format(time.TimeOnly), all[len(all)-1].time())
	s.Must(t, "exec", "-n", "mesh", "spare", "-c", "main", "--", "/probe", "quit", "http://127.0.0.1:9901")
	quit := time.Now()
	nodes.Eventually(t, "the Envoy that was restarted", func(ctx context.Context) error {
		a, err := s.get(ctx, "mesh", "spare", 1, "http://127.0.0.1:15001")
		if err == nil && a.Failed > 0 {
			err = fmt.Errorf("%+v", a)
		}
		return err
	})
	figure(t, "an Envoy that was restarted without a CA speaks mTLS again after %v", time.Since(quit).Round(time.Millisecond))
	if a := stop(); a.Failed > 0 || a.Sent == 0 {
		t.Errorf("of those who connected meanwhile some failed: %+v", a)
	} else {
		figure(t, "%d connections meanwhile, none failed", a.Sent)
	}
	s.Must(t, "scale", "-n", signetNamespace, "statefulset/signet-ca", "--replicas=1")
	s.Must(t, "rollout", "status", "-n", signetNamespace, "statefulset/signet-ca", "--timeout=3m")
	s.Apply(t, pod{namespace: "mesh", name: "after-replace", app: "after-replace", args: `["svid"]`}.json(s))
	s.reports(t, "mesh", "after-replace", 1)
}

func (t transition) time() string { return time.UnixMicro(t.At).UTC().Format("15:04:05.000") }

// killKubelet: kubelet is killed and comes back. Who has a socket keeps it, and who comes gets one.
func (s *suite) killKubelet(t *testing.T) {
	s.Own(t)
	s.namespace(t, "kubelet")
	s.Apply(t, pod{namespace: "kubelet", name: "watch", node: "node2", args: `["watch"]`}.json(s))
	s.Wait(t, "pod", "-n", "kubelet", "watch", "--for=condition=Ready")
	s.served(t, "kubelet", "watch")
	// One that kubelet is about to start when it is killed: it may be at any step of it.
	s.Apply(t, pod{namespace: "kubelet", name: "midst", node: "node2", app: "midst", args: `["svid"]`}.json(s))
	s.Nodes[1].KillKubelet()
	s.Apply(t, pod{namespace: "kubelet", name: "meanwhile", node: "node2", app: "meanwhile", args: `["svid"]`}.json(s))
	s.Nodes[1].StartKubelet(t)
	s.reports(t, "kubelet", "midst", 1)
	s.reports(t, "kubelet", "meanwhile", 1)
	for _, tr := range s.served(t, "kubelet", "watch")[1:] {
		if !tr.OK {
			t.Error("the socket did not answer while kubelet was away")
		}
	}
	s.Must(t, "delete", "pod", "-n", "kubelet", "--all", "--timeout=2m")
}

// reboot: the node loses its power. Its pods start again, and have their sockets and SVIDs again.
func (s *suite) reboot(t *testing.T) {
	s.Own(t)
	s.namespace(t, "reboot")
	s.Apply(t, pod{namespace: "reboot", name: "watch", node: "node2", restart: "Always", args: `["watch"]`}.json(s))
	s.Wait(t, "pod", "-n", "reboot", "watch", "--for=condition=Ready")
	s.served(t, "reboot", "watch")
	s.Nodes[1].Crash()
	s.Nodes[1].Boot(t)
	nodes.Eventually(t, "the pod runs again", func(ctx context.Context) error {
		n, err := s.Kubectl(ctx, "", "get", "pod", "-n", "reboot", "watch", "-o", "jsonpath={.status.containerStatuses[0].restartCount}")
		if err == nil && n == "0" {
			err = errors.New("not yet")
		}
		return err
	})
	s.served(t, "reboot", "watch")
	s.Apply(t, pod{namespace: "reboot", name: "after", node: "node2", app: "after", args: `["svid"]`}.json(s))
	s.reports(t, "reboot", "after", 1)
	if !s.mesh {
		return
	}
	nodes.Eventually(t, "checkout to payments after the reboot", func(ctx context.Context) error {
		a, err := s.get(ctx, "mesh", "checkout", 1, "http://127.0.0.1:15001")
		if err == nil && a.Failed > 0 {
			err = fmt.Errorf("%+v", a)
		}
		return err
	})
}
