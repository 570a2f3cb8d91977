//go:build cluster

package controlplane_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-ca/signet/deploy"
	"github.com/signet-ca/signet/integration/controlplane"
)

// kubectl runs the cluster's own kubectl as its administrator, and returns what it prints.
func kubectl(t *testing.T, c *controlplane.ControlPlane, stdin []byte, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(os.Getenv(controlplane.BinaryVariable), append([]string{"kubectl", "--kubeconfig", c.UserKubeconfig(t, "admin")}, args...)...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String(), err
}

// What `signet install` prints, and what the chart yields with other values, is what a real API server takes; the
// permissions in it are these and no others; and the CA's pod may run where PodSecurity allows the least.
func TestInstall(t *testing.T) {
	c := controlplane.Start(t)
	installed, err := deploy.Install(deploy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	out, err := kubectl(t, c, installed, "apply", "-f", "-")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out, " created\n"); n < 15 || n != strings.Count(out, "\n") {
		t.Errorf("applied:\n%s", out)
	}
	t.Run("again", func(t *testing.T) { // an upgrade to the same starts no pod anew
		if out, err := kubectl(t, c, installed, "diff", "-f", "-"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("other values", func(t *testing.T) { installOthers(t, c) })
	t.Run("permissions", func(t *testing.T) { installedPermissions(t, c) })
	t.Run("PodSecurity", func(t *testing.T) { installedPods(t, c) })
	t.Run("shared socket", func(t *testing.T) { sharedSocket(t, c) })
}

func installOthers(t *testing.T, c *controlplane.ControlPlane) {
	for _, namespace := range []string{"shop", "people"} { // of the examples, and of values that do not make it
		if _, err := kubectl(t, c, nil, "create", "namespace", namespace); err != nil {
			t.Fatal(err)
		}
	}
	paths, err := filepath.Glob("../../deploy/testdata/*.rendered.yaml")
	if err != nil || len(paths) < 3 {
		t.Fatal(paths, err)
	}
	examples, err := filepath.Glob("../../deploy/examples/*.yaml")
	if err != nil || len(examples) == 0 {
		t.Fatal(examples, err)
	}
	for _, path := range slices.Concat(paths, examples) {
		if _, err := kubectl(t, c, nil, "create", "--dry-run=server", "--validate=strict", "-f", path); err != nil && !onlyExists(err) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// onlyExists tells that all that kubectl found wrong is that objects are there already.
func onlyExists(err error) bool {
	_, text, _ := strings.Cut(err.Error(), "\n")
	for line := range strings.Lines(strings.TrimSpace(text)) {
		if !strings.Contains(line, "(AlreadyExists)") && !strings.HasPrefix(line, "Warning: ") {
			return false
		}
	}
	return true
}

// canI is `kubectl auth can-i --list` of a ServiceAccount of signet-system, without what every ServiceAccount may.
func canI(t *testing.T, c *controlplane.ControlPlane, account, namespace string) []string {
	t.Helper()
	list := func(account string) map[string]bool {
		out, err := kubectl(t, c, nil, "auth", "can-i", "--list", "--no-headers", "-n", namespace, "--as=system:serviceaccount:signet-system:"+account)
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]bool{}
		for line := range strings.Lines(out) {
			line = strings.TrimSuffix(strings.TrimSpace(line), "]")
			at := strings.LastIndex(line, "[") + 1
			verbs := strings.Fields(line[at:]) // in no order
			slices.Sort(verbs)
			found[strings.Join(strings.Fields(line[:at]), " ")+strings.Join(verbs, " ")+"]"] = true
		}
		return found
	}
	nobody := list("nobody")
	mine := list(account)
	maps.DeleteFunc(mine, func(line string, _ bool) bool { return nobody[line] })
	return slices.Sorted(maps.Keys(mine))
}

func installedPermissions(t *testing.T, c *controlplane.ControlPlane) {
	everywhere := []string{
		"clustertrustbundles.certificates.k8s.io [] [] [create get list watch]", // all but create every ServiceAccount may
		"clustertrustbundles.certificates.k8s.io [] [signet.dev:bundle:cluster.local] [get list update watch]",
		"configmaps [] [] [create]",
		"configmaps [] [signet-bundle] [delete get list update watch]",
		"namespaces [] [] [get list watch]",
		"nodes [] [] [get list watch]",
		"pods [] [] [get list watch]",
		"serviceaccounts [] [] [get list watch]",
		"signers.certificates.k8s.io [] [signet.dev/bundle] [attest]",
		"tokenreviews.authentication.k8s.io [] [] [create]",
	}
	for _, namespace := range []string{"signet-system", "shop", "kube-system"} {
		want := slices.Clone(everywhere)
		if namespace == "signet-system" {
			want = slices.Insert(want, 4, "daemonsets.apps [] [signet-agent] [get]")
		}
		if d := cmp.Diff(want, canI(t, c, "signet-ca", namespace)); d != "" {
			t.Errorf("what the CA may in %s (-want +got):\n%s", namespace, d)
		}
		if got := canI(t, c, "signet-agent", namespace); len(got) != 0 {
			t.Errorf("what the agent may in %s: %q", namespace, got)
		}
	}
}

// onTrial asks for a pod in a namespace, without making one, and returns what the API server has against it.
func onTrial(t *testing.T, c *controlplane.ControlPlane, namespace string, spec corev1.PodSpec) error {
	t.Helper()
	spec.ServiceAccountName, spec.PriorityClassName = "trial", ""
	p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "trial", Namespace: namespace}, Spec: spec}
	p.APIVersion, p.Kind = "v1", "Pod"
	data, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	_, err = kubectl(t, c, data, "create", "--dry-run=server", "-f", "-")
	return err
}

func installedPods(t *testing.T, c *controlplane.ControlPlane) {
	for _, level := range []string{"restricted", "baseline", "privileged"} {
		namespace := "level-" + level
		manifest := fmt.Sprintf(`{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": %q, "labels": {"pod-security.kubernetes.io/enforce": %q}}}
---
{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "trial", "namespace": %[1]q}}`, namespace, level)
		if _, err := kubectl(t, c, []byte(manifest), "apply", "-f", "-"); err != nil {
			t.Fatal(err)
		}
	}
	var ca appsv1.StatefulSet
	var agent appsv1.DaemonSet
	if err := c.Do(t.Context(), http.MethodGet, "/apis/apps/v1/namespaces/signet-system/statefulsets/signet-ca", nil, &ca); err != nil {
		t.Fatal(err)
	}
	if err := c.Do(t.Context(), http.MethodGet, "/apis/apps/v1/namespaces/signet-system/daemonsets/signet-agent", nil, &agent); err != nil {
		t.Fatal(err)
	}
	spec := ca.Spec.Template.Spec
	for _, claim := range ca.Spec.VolumeClaimTemplates { // as the StatefulSet's controller does
		spec.Volumes = append(spec.Volumes, corev1.Volume{Name: claim.Name, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim.Name + "-signet-ca-0"}}})
	}
	if err := onTrial(t, c, "level-restricted", spec); err != nil {
		t.Error("the CA's pod:", err)
	}
	if err := onTrial(t, c, "level-privileged", agent.Spec.Template.Spec); err != nil {
		t.Error("the agent's pod:", err)
	}
	// Of all that "baseline" forbids, the agent wants its folders of the node alone.
	err := onTrial(t, c, "level-baseline", agent.Spec.Template.Spec)
	if err == nil || !strings.Contains(err.Error(), `violates PodSecurity "baseline:latest": hostPath volumes (volumes "run", "pods", "registry", "plugin")`) {
		t.Error("the agent's pod at the level baseline:", err)
	}
	// A pod with our volume asks for nothing that "restricted" forbids, thanks to the CSIDriver's label.
	workload := corev1.PodSpec{
		SecurityContext: spec.SecurityContext,
		Containers:      []corev1.Container{{Name: "c", Image: "i", SecurityContext: spec.Containers[0].SecurityContext}},
		Volumes: []corev1.Volume{{Name: "signet", VolumeSource: corev1.VolumeSource{
			CSI: &corev1.CSIVolumeSource{Driver: "csi.signet.dev", ReadOnly: new(true)}}}},
	}
	if err := onTrial(t, c, "level-restricted", workload); err != nil {
		t.Error("a pod with the volume:", err)
	}
}

// The shared socket's folder can be mounted, read-only, and nothing else of /run/signet, by nobody but the agent.
func sharedSocket(t *testing.T, c *controlplane.ControlPlane) {
	rendering, err := os.ReadFile("../../deploy/testdata/shared-socket.rendered.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := kubectl(t, c, rendering, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	pod := func(path string, mounts ...corev1.VolumeMount) corev1.PodSpec {
		return corev1.PodSpec{
			Containers: []corev1.Container{{Name: "c", Image: "i", VolumeMounts: mounts}},
			Volumes:    []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path}}}},
		}
	}
	ro := corev1.VolumeMount{Name: "v", MountPath: "/x", ReadOnly: true}
	rw := corev1.VolumeMount{Name: "v", MountPath: "/y"}
	const denied = "ValidatingAdmissionPolicy 'signet-shared-socket'"
	// A policy is in force a moment after it was made.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := onTrial(t, c, "level-privileged", pod("/run/signet/shared", rw))
		if err != nil && strings.Contains(err.Error(), denied) {
			break
		}
		select {
		case <-ctx.Done():
			t.Fatal("a writable mount:", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
	first := pod("/run/signet/shared", ro)
	first.InitContainers = []corev1.Container{{Name: "i", Image: "i", VolumeMounts: []corev1.VolumeMount{rw}}}
	for _, tc := range []struct {
		name string
		spec corev1.PodSpec
		good bool
	}{
		{"read-only", pod("/run/signet/shared", ro), true},
		{"read-only, by its other name", pod("//var//run/signet//shared/", ro), true},
		{"another folder", pod("/run/signets", rw), true},
		{"no mount", pod("/run/signet/shared"), true},
		{"no volumes", corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}}, true},
		{"writable in one of two mounts", pod("/run/signet/shared", ro, rw), false},
		{"writable in an init container", first, false},
		{"the socket itself", pod("/run/signet/shared/agent.sock", ro), false},
		{"the agent's cache", pod("/run/signet/agent", ro), false},
		{"the folder above", pod("/var/run/signet", ro), false},
		{"the agent's cache, by a dot", pod("/run/./signet/agent", ro), false},
		{"the folder above, by dots", pod("/./var/.//run/signet", ro), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := onTrial(t, c, "level-privileged", tc.spec); (err == nil) != tc.good || err != nil && !strings.Contains(err.Error(), denied) {
				t.Error(err)
			}
		})
	}
	t.Run("a container that is added", func(t *testing.T) { addedContainer(t, c, pod("/run/signet/shared", ro), ro, rw) })
}

// addedContainer adds containers to a pod that runs, as `kubectl debug` does.
func addedContainer(t *testing.T, c *controlplane.ControlPlane, spec corev1.PodSpec, ro, rw corev1.VolumeMount) {
	const pods = "/api/v1/namespaces/level-privileged/pods"
	spec.ServiceAccountName = "trial"
	p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "runs"}, Spec: spec}
	if err := c.Do(t.Context(), http.MethodPost, pods, p, &p); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		mount corev1.VolumeMount
		good  bool
	}{{rw, false}, {ro, true}} {
		changed := p.DeepCopy()
		changed.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{
			Name: "look", Image: "i", VolumeMounts: []corev1.VolumeMount{tc.mount}}}}
		err := c.Do(t.Context(), http.MethodPut, pods+"/runs/ephemeralcontainers", changed, nil)
		if (err == nil) != tc.good || err != nil && !strings.Contains(err.Error(), "signet-shared-socket") {
			t.Errorf("read-only %v: %v", tc.mount.ReadOnly, err)
		}
	}
	// The policy stands in nobody's way afterwards.
	if err := c.Do(t.Context(), http.MethodDelete, pods+"/runs?gracePeriodSeconds=0", nil, nil); err != nil {
		t.Error(err)
	}
}
