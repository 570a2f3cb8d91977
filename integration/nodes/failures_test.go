//go:build cluster && linux

package nodes_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-ca/signet/integration/nodes"
)

// mounted is the volume as a container of a pod has it, JSON fields.
const mounted = `"env": [{"name": "SPIFFE_ENDPOINT_SOCKET", "value": "unix:///run/signet-workload/agent.sock"}],
	"volumeMounts": [{"name": "signet", "mountPath": "/run/signet-workload", "readOnly": true}]`

// initContainers get the SVID of their pod, as its other containers do.
func (s *suite) initContainers(t *testing.T) {
	s.namespace(t, "init")
	s.Apply(t, pod{namespace: "init", name: "pod", app: "pod", args: `["svid"]`, more: fmt.Sprintf(
		`"initContainers": [{"name": "init", "image": "%s/signet-probe:1", "args": ["svid"], %s}],`, s.Registry, mounted)}.json(s))
	s.reports(t, "init", "pod", 1)
}

// refused: a volume that asks for more than it may is not published, its pod's author is told why, and of the attempts
// nothing is left that would keep the pod from going.
func (s *suite) refused(t *testing.T) {
	s.namespace(t, "refused")
	tests := []struct{ name, volume, why string }{
		{"writable", `"driver": "csi.signet.dev"`, "not readOnly"},
		{"attributes", `"driver": "csi.signet.dev", "readOnly": true, "volumeAttributes": {"csi.storage.k8s.io/serviceAccount.tokens": "{}"}`, "as an attribute of the volume"},
		{"secret", `"driver": "csi.signet.dev", "readOnly": true, "nodePublishSecretRef": {"name": "own"}`, "nodePublishSecretRef"},
	}
	s.Apply(t, `{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "own", "namespace": "refused"}, "stringData": {"own": "value"}}`)
	for _, test := range tests {
		s.Apply(t, pod{namespace: "refused", name: test.name, node: s.node(1), args: `["svid"]`, volume: test.volume}.json(s))
	}
	for _, test := range tests {
		nodes.Eventually(t, test.name+" is refused", func(ctx context.Context) error {
			events, err := s.Kubectl(ctx, "", "get", "events", "-n", "refused", "-o", "jsonpath={range .items[*]}{.message}{\"\\n\"}{end}",
				"--field-selector", "reason=FailedMount,involvedObject.name="+test.name)
			if err == nil && !strings.Contains(events, test.why) {
				err = fmt.Errorf("no event says so: %s", events)
			}
			return err
		})
		uid := s.Must(t, "get", "pod", "-n", "refused", test.name, "-o", "jsonpath={.metadata.uid}")
		if len(s.Nodes) > 0 {
			folder := s.volumeFolder(uid) // which kubelet goes on trying, so that it may be in the midst of it
			nodes.Eventually(t, "nothing is left of "+test.name, func(context.Context) error {
				if _, err := os.Lstat(filepath.Join(folder, "mount")); !os.IsNotExist(err) {
					return fmt.Errorf("%s is there: %w", folder, err)
				}
				return nil
			})
		}
	}
	s.Must(t, "delete", "pod", "-n", "refused", "--all", "--timeout=3m")
}

// volumeFolder is where kubelet keeps the volume of a pod on the second node.
func (s *suite) volumeFolder(uid string) string {
	return filepath.Join(s.podFolder(uid), "volumes", "kubernetes.io~csi", "signet")
}

// podFolder is what kubelet keeps of a pod on the second node.
func (s *suite) podFolder(uid string) string {
	return filepath.Join(s.Nodes[1].Dir, "kubelet", "pods", uid)
}

// agentsAway: pods that come before the agents wait for them, and pods that go meanwhile go when they are back.
func (s *suite) agentsAway(t *testing.T) {
	s.namespace(t, "away")
	s.Apply(t, pod{namespace: "away", name: "late"}.json(s))
	s.Wait(t, "pod", "-n", "away", "late", "--for=condition=Ready")
	// With nowhere to run they are removed as on a cluster that has none yet; what is installed stays.
	patch := func(selector string) []string {
		return []string{"patch", "daemonset", "-n", signetNamespace, "signet-agent", "--type=merge", "-p", `{"spec": {"template": {"spec": {"nodeSelector": ` + selector + `}}}}`}
	}
	t.Cleanup(func() { s.afterwards(t, patch("null")...) })
	s.Must(t, patch(`{"signet.dev/none": "here"}`)...)
	s.Must(t, "wait", "-n", signetNamespace, "pod", "-l", "app.kubernetes.io/name=signet-agent", "--for=delete", "--timeout=2m")
	s.Apply(t, pod{namespace: "away", name: "early", app: "early", args: `["svid"]`}.json(s))
	s.Must(t, "delete", "pod", "-n", "away", "late", "--wait=false")
	nodes.Eventually(t, "the pod waits for its volume", func(ctx context.Context) error {
		events, err := s.Kubectl(ctx, "", "get", "events", "-n", "away", "--field-selector", "reason=FailedMount,involvedObject.name=early", "-o", "name")
		if err == nil && events == "" {
			err = errors.New("no event says so")
		}
		return err
	})
	s.Must(t, patch("null")...)
	s.Must(t, "rollout", "status", "-n", signetNamespace, "daemonset/signet-agent", "--timeout=3m")
	s.reports(t, "away", "early", 1)
	s.Must(t, "wait", "-n", "away", "pod/late", "--for=delete", "--timeout=3m")
}

// emptyNotes: kubelet lost its notes about a volume, as when power fails while it writes them. The pod goes on, and can go.
func (s *suite) emptyNotes(t *testing.T) {
	s.Own(t)
	s.namespace(t, "notes")
	s.Apply(t, pod{namespace: "notes", name: "watch", node: "node2", args: `["watch"]`}.json(s))
	s.Wait(t, "pod", "-n", "notes", "watch", "--for=condition=Ready")
	s.served(t, "notes", "watch")
	uid := s.Must(t, "get", "pod", "-n", "notes", "watch", "-o", "jsonpath={.metadata.uid}")
	s.Nodes[1].KillKubelet()
	if err := os.Truncate(filepath.Join(s.volumeFolder(uid), "vol_data.json"), 0); err != nil {
		t.Fatal(err)
	}
	s.Nodes[1].StartKubelet(t)
	s.served(t, "notes", "watch")
	s.Must(t, "delete", "pod", "-n", "notes", "watch", "--timeout=3m")
}
