//go:build cluster && linux

package nodes_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-ca/signet/integration/nodes"
)

// create makes a pod and returns its UID, by which kubelet's folders are called.
func (s *suite) create(t *testing.T, p pod) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	uid, err := s.Kubectl(ctx, p.json(s), "create", "-f", "-", "-o", "jsonpath={.metadata.uid}")
	if err != nil {
		t.Fatal(err)
	}
	return uid
}

// seen waits for a file to be there, and returns at once then.
func seen(t *testing.T, path string) {
	t.Helper()
	for end := time.Now().Add(3 * time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := os.Lstat(path); err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s is not there", path)
		}
	}
}

// remains waits until neither kubelet nor the agent of the second node has anything of a pod's volume. The pod's own folder is
// kubelet's: it may keep it for minutes because of a container that it was killed over.
func (s *suite) remains(t *testing.T, uid string) {
	t.Helper()
	n := s.Nodes[1]
	nodes.Eventually(t, "nothing remains of the volume", func(context.Context) error {
		if _, err := os.Lstat(s.volumeFolder(uid)); !os.IsNotExist(err) {
			return errors.New("its folder is there")
		}
		records, err := filepath.Glob(filepath.Join(n.Root(), "run/signet/agent/volumes/*"))
		if err != nil {
			return err
		}
		for _, path := range records {
			data, err := os.ReadFile(path)
			if err == nil && bytes.Contains(data, []byte(uid)) {
				return errors.New("the agent remembers it")
			}
			if err != nil && !os.IsNotExist(err) {
				return err
			}
		}
		return nil
	})
}

// agentOf is the process of the agent on one of our nodes.
func (s *suite) agentOf(t *testing.T, n *nodes.Node) *os.Process {
	t.Helper()
	var found *os.Process
	nodes.Eventually(t, "the agent's process on "+n.Name, func(context.Context) error {
		pids, err := n.Processes("signet-agent")
		if err == nil && len(pids) != 1 {
			err = fmt.Errorf("there are %d", len(pids))
		}
		if err == nil {
			found, err = os.FindProcess(pids[0])
		}
		return err
	})
	return found
}

// killAtMoments kills kubelet at each step of a volume's way into a pod and out of it. The agent is stopped where kubelet
// has to be within a call. Each time the pod has its SVID after kubelet's return, and nothing of its volume remains when it goes.
func (s *suite) killAtMoments(t *testing.T) {
	s.Own(t)
	s.namespace(t, "moments")
	n := s.Nodes[1]
	freeze := func(agent *os.Process) (thaw func()) {
		if err := agent.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		thaw = func() { _ = agent.Signal(syscall.SIGCONT) }
		t.Cleanup(thaw)
		return thaw
	}
	vanished := s.vanish(t)
	const never, before, then = 0, 1, 2
	for _, moment := range []struct {
		name   string
		freeze int    // when the agent stops to answer, before all of it or once the file is there
		file   string // below the pod's folder: kubelet is killed once it is there
	}{
		{"before any call", never, "."},
		{"within the first call", before, "volumes/kubernetes.io~csi/signet"},              // which asks what the agent can do
		{"within the publication", then, "volumes/kubernetes.io~csi/signet/vol_data.json"}, // which kubelet writes right before it
		{"after the answer", never, "volumes/kubernetes.io~csi/signet/mount/agent.sock"},
		{"while the container is made", never, "containers/main"},
	} {
		name := strings.ReplaceAll(moment.name, " ", "-")
		thaw, agent := func() {}, s.agentOf(t, n)
		if moment.freeze == before {
			thaw = freeze(agent)
		}
		uid := s.create(t, pod{namespace: "moments", name: name, node: "node2", restart: "Always", args: `["watch"]`})
		seen(t, filepath.Join(s.podFolder(uid), moment.file))
		if moment.freeze == then {
			thaw = freeze(agent)
		}
		n.KillKubelet()
		thaw()
		n.StartKubelet(t)
		s.served(t, "moments", name)

		// And on the way out: kubelet waits for the agent, is killed, and asks anew.
		if moment.freeze != never {
			thaw = freeze(s.agentOf(t, n))
			s.Must(t, "delete", "pod", "-n", "moments", name, "--wait=false")
			n.KillKubelet()
			thaw()
			n.StartKubelet(t)
		}
		s.Must(t, "delete", "pod", "-n", "moments", name, "--ignore-not-found", "--timeout=3m")
		s.remains(t, uid)
	}
	s.remains(t, vanished) // the agent sweeps once a minute
	logs := s.Must(t, "logs", "-n", signetNamespace, "-l", "app.kubernetes.io/name=signet-agent", "--tail=-1")
	if !strings.Contains(logs, "pod_gone") && !strings.Contains(logs, "its folder is gone") { // the second if it started anew meanwhile
		t.Error("no agent says that it swept the volume of the pod that vanished")
	}
}

// vanish takes a pod with the volume from the second node without a word, its folder included: kubelet is away and has
// nothing to ask the agent by when it is back. It returns the pod's UID.
func (s *suite) vanish(t *testing.T) string {
	t.Helper()
	n := s.Nodes[1]
	uid := s.create(t, pod{namespace: "moments", name: "vanished", node: "node2", args: `["watch"]`})
	s.Wait(t, "pod", "-n", "moments", "vanished", "--for=condition=Ready")
	n.KillKubelet()
	s.Must(t, "delete", "pod", "-n", "moments", "vanished", "--force", "--grace-period=0", "--timeout=3m")
	out, err := n.Command(t.Context(), "sh", "-c", `awk -v p="$0" 'index($2, p) { print $2 }' /proc/self/mounts | xargs -r umount && rm -rf "$0"`,
		"/var/lib/kubelet/pods/"+uid).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	n.StartKubelet(t)
	return uid
}

// leftovers: a pod is deleted by force while kubelet is away, and the agent ends as well. The pod's folder and its socket are
// left then. kubelet has notes of it, and has the agent take it apart once both are back.
func (s *suite) leftovers(t *testing.T) {
	s.Own(t)
	s.namespace(t, "leftovers")
	n := s.Nodes[1]
	uid := s.create(t, pod{namespace: "leftovers", name: "forced", node: "node2", args: `["watch"]`})
	s.Wait(t, "pod", "-n", "leftovers", "forced", "--for=condition=Ready")
	agent := s.agentOf(t, n)
	n.KillKubelet()
	s.Must(t, "delete", "pod", "-n", "leftovers", "forced", "--force", "--grace-period=0", "--timeout=3m")
	if err := agent.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(s.volumeFolder(uid), "mount", "agent.sock")); err != nil {
		t.Fatalf("the socket of a pod that was deleted by force: %v", err)
	}
	n.StartKubelet(t)
	s.remains(t, uid)
	s.Must(t, "rollout", "status", "-n", signetNamespace, "daemonset/signet-agent", "--timeout=3m")
}
