//go:build cluster && linux

package nodes_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/signet-ca/signet/integration/nodes"
)

// helmVariable names the environment variable with the path of Helm; `make e2e` builds it.
const helmVariable = "SIGNET_HELM"

// inImage is where the rendering says which images it means.
var inImage = regexp.MustCompile(`/signet-ca:([^"]+)"`)

// helm: what Helm installs, Helm removes once no pod has the volume. Before, it refuses and names them, and all goes on.
func (s *suite) helm(t *testing.T) {
	if os.Getenv(helmVariable) == "" {
		t.Skip(helmVariable + " names no Helm; `make e2e` builds it")
	}
	rendering, err := exec.CommandContext(t.Context(), s.signet, "install").Output()
	tag := inImage.FindSubmatch(rendering)
	if err != nil || tag == nil {
		t.Fatalf("the images' tag is not known: %v", err)
	}
	dir := t.TempDir()
	helm := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), os.Getenv(helmVariable), append(args, "--namespace="+signetNamespace, "--kubeconfig="+s.Kubeconfig)...)
		cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+dir, "HELM_CONFIG_HOME="+dir, "HELM_DATA_HOME="+dir)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	s.Apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "`+signetNamespace+`", "labels": {"pod-security.kubernetes.io/enforce": "privileged"}}}`)
	if out, err := helm("install", "signet", "../../deploy/chart/signet", "--wait", "--timeout=5m",
		"--set=image.repository="+s.Registry+",image.tag="+string(tag[1])); err != nil {
		t.Fatalf("helm install: %v: %s", err, out)
	}
	s.namespace(t, "held")
	s.Apply(t, pod{namespace: "held", name: "holds", node: s.node(1), args: `["watch"]`}.json(s))
	s.Wait(t, "pod", "-n", "held", "holds", "--for=condition=Ready")
	s.served(t, "held", "holds")

	out, err := helm("uninstall", "signet", "--timeout=3m")
	if err == nil || !strings.Contains(out, "with the volume: held/holds") {
		t.Fatalf("helm uninstall with a pod left: %v: %s", err, out)
	}
	said := s.Must(t, "get", "pod", "-n", signetNamespace, "-l", "app.kubernetes.io/name=signet-uninstall",
		"-o", "jsonpath={.items[*].status.containerStatuses[0].state.terminated.message}")
	if !strings.Contains(said, "with the volume: held/holds") || !strings.Contains(said, "refused: 1 pod has the volume") {
		t.Errorf("the hook's status says %q", said)
	}
	s.Must(t, "get", "-n", signetNamespace, "daemonset/signet-agent", "statefulset/signet-ca", "csidriver/csi.signet.dev")
	for _, tr := range s.served(t, "held", "holds")[1:] {
		if !tr.OK {
			t.Error("the socket did not answer after the refusal")
		}
	}

	// As the manual says of those who keep it after all: without, Helm would not upgrade it again.
	if out, err = helm("rollback", "signet", "1", "--timeout=3m"); err != nil {
		t.Errorf("helm rollback: %v: %s", err, out)
	}
	if out, err = helm("status", "signet"); err != nil || !strings.Contains(out, "STATUS: deployed") {
		t.Errorf("helm status after the rollback: %v: %s", err, out)
	}

	s.Must(t, "delete", "namespace", "held", "--timeout=3m")
	if out, err = helm("uninstall", "signet", "--timeout=3m"); err != nil {
		t.Fatalf("helm uninstall: %v: %s", err, out)
	}
	nodes.Eventually(t, "all of it goes", func(ctx context.Context) error {
		left, err := s.Kubectl(ctx, "", "get", "daemonset,statefulset,job,pod,serviceaccount,clusterrole,clusterrolebinding,csidriver", "-A", "-l", "app.kubernetes.io/part-of=signet", "-o", "name")
		if err == nil && left != "" {
			err = errors.New(left)
		}
		return err
	})
	if len(s.Nodes) == 0 {
		s.Must(t, "delete", "namespace", signetNamespace, "--timeout=3m")
	}
}
