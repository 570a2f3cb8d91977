package nodes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/integration/controlplane"
)

// The environment variables that `make e2e` sets, besides controlplane.BinaryVariable.
const (
	KubeconfigVariable = "SIGNET_KUBECONFIG" // of an existing cluster to run on; nodes are then not started
	RegistryVariable   = "SIGNET_REGISTRY"   // where an existing cluster finds the images
	PushVariable       = "SIGNET_PUSH"       // path of the program that takes them there, that of tools/push
	ImagesVariable     = "SIGNET_IMAGES"     // folder with the archives of the product's images
	SkipVariable       = "SIGNET_NODES"      // "skip" leaves the tests out where nodes cannot be started
)

// patience is how long anything here may take. It is for a machine that has much else to do.
const patience = 3 * time.Minute

// Cluster is one that runs.
type Cluster struct {
	Kubeconfig string  // of its administrator
	Nodes      []*Node // ours, none on an existing cluster
	Registry   string  // what images' names begin with

	Control *controlplane.ControlPlane // nil on an existing cluster

	Probe string // file of the program of the probe's image

	binary string
}

// Start starts a cluster that ends with the test, or finds the one that KubeconfigVariable names. TestMain has to be Main.
// The cluster has names for its Services when it returns, and the probe's image.
func Start(t *testing.T) *Cluster {
	t.Helper()
	c := &Cluster{Kubeconfig: os.Getenv(KubeconfigVariable), Registry: "localhost", binary: os.Getenv(controlplane.BinaryVariable)}
	switch {
	case c.binary == "":
		t.Skip(controlplane.BinaryVariable + " names no cluster; `make e2e` builds one")
	case c.Kubeconfig != "":
		if c.Registry = os.Getenv(RegistryVariable); c.Registry == "" {
			t.Fatalf("%s says no registry that the existing cluster finds the images in", RegistryVariable)
		}
		if c.Probe = buildProbe(t); c.Probe == "" {
			t.FailNow()
		}
		c.Import(t, c.probeImage())
	case os.Getenv(SkipVariable) == "skip":
		t.Skip("nodes are left out, as asked for")
	case os.Getuid() != 0:
		t.Fatal("nodes are started by root only; `make e2e NODES=skip` leaves them out")
	default:
		c.start(t)
	}
	return c
}

// start starts all of it.
func (c *Cluster) start(t *testing.T) {
	t.Helper()
	makeBridge(t)
	control := controlplane.Config{Address: controlAddress}.Start(t)
	c.Control, c.Kubeconfig = control, control.UserKubeconfig(t, "admin")
	for number := range 2 {
		c.Nodes = append(c.Nodes, newNode(t, control, number+1))
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { c.Probe = buildProbe(t) })
	for _, n := range c.Nodes {
		n.Boot(t)
	}
	wg.Wait()
	if c.Probe == "" {
		t.FailNow()
	}
	dns := filepath.Join(filepath.Dir(c.binary), "dns")
	c.Import(t, c.probeImage())
	c.Import(t, Image{Name: dnsImage, Entrypoint: []string{"/dns"}, Files: map[string]string{"/dns": dns}})
	c.Apply(t, dnsObjects)
	c.Wait(t, "node", "--all", "--for=condition=Ready")
	c.Wait(t, "pod", "-n", "kube-system", "-l", "app=coredns", "--for=condition=Ready")
}

func (c *Cluster) probeImage() Image {
	return Image{Name: probeImage, Entrypoint: []string{"/probe"}, Files: map[string]string{"/probe": c.Probe}}
}

// Own skips a test that has to stop nodes where they are not ours.
func (c *Cluster) Own(t testing.TB) {
	t.Helper()
	if len(c.Nodes) == 0 {
		t.Skip("it stops a node, and those of an existing cluster are not for us to stop")
	}
}

// Import puts an image into the nodes, or where an existing cluster finds it.
func (c *Cluster) Import(t testing.TB, image Image) {
	t.Helper()
	archive := filepath.Join(t.TempDir(), "image.tar")
	if err := image.write(archive); err != nil {
		t.Fatal(err)
	}
	c.ImportArchive(t, archive)
}

// ImportArchive puts the images of an archive into the nodes. For an existing cluster it pushes them to the registry, as
// whoever is logged in there.
func (c *Cluster) ImportArchive(t testing.TB, archive string) {
	t.Helper()
	if len(c.Nodes) == 0 {
		out, err := exec.CommandContext(t.Context(), os.Getenv(PushVariable), "-registry="+c.Registry, archive).CombinedOutput()
		if err != nil {
			t.Fatalf("pushing images to %s: %v: %s", c.Registry, err, out)
		}
		t.Logf("%s", bytes.TrimSpace(out))
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	errs := make([]error, len(c.Nodes))
	var wg sync.WaitGroup
	for i, n := range c.Nodes {
		wg.Go(func() { errs[i] = n.Import(ctx, archive) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// Command is a kubectl as the cluster's administrator.
func (c *Cluster) Command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, c.binary, append([]string{"kubectl", "--kubeconfig=" + c.Kubeconfig}, args...)...)
}

// Kubectl runs kubectl as the cluster's administrator, and returns what it printed. The error has what it complained of.
func (c *Cluster) Kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := c.Command(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Must is Kubectl for what has to succeed, in good time.
func (c *Cluster) Must(t testing.TB, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := c.Kubectl(ctx, "", args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Apply makes objects of their YAML, or changes those that are there.
func (c *Cluster) Apply(t testing.TB, objects string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := c.Kubectl(ctx, objects, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

// Wait is `kubectl wait` for objects that may not be there yet.
func (c *Cluster) Wait(t testing.TB, args ...string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		ctx, cancel := context.WithDeadline(t.Context(), deadline)
		_, err := c.Kubectl(ctx, "", append([]string{"wait", "--timeout=" + time.Until(deadline).Round(time.Second).String()}, args...)...)
		cancel()
		if err == nil {
			return
		}
		if !strings.Contains(err.Error(), "no matching resources found") && !strings.Contains(err.Error(), "not found") || time.Now().After(deadline) {
			t.Fatal(err)
		}
		pause(t, 200*time.Millisecond)
	}
}

// Eventually calls f until it returns nil, which has to be in good time.
func Eventually(t testing.TB, what string, f func(context.Context) error) {
	t.Helper()
	Within(t, patience, what, f)
}

// Within calls f until it returns nil, which has to be before the time is over.
func Within(t testing.TB, limit time.Duration, what string, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	var last error // that the time did not cut short
	for {
		err := f(ctx)
		if err == nil {
			return
		}
		if ctx.Err() == nil {
			last = err
		} else {
			t.Fatalf("%s: not in %v: %v", what, limit, last)
		}
		pause(t, 200*time.Millisecond)
	}
}

// pause waits between two questions to the cluster.
func pause(t testing.TB, d time.Duration) {
	select {
	case <-t.Context().Done():
	case <-time.After(d):
	}
}

// Get fills out from the object or the list that `kubectl get` with these arguments finds.
func (c *Cluster) Get(ctx context.Context, out any, args ...string) error {
	text, err := c.Kubectl(ctx, "", append([]string{"get", "-o", "json"}, args...)...)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(text), out)
}

// Events returns the cluster's events and pods, to be shown when a test failed.
func (c *Cluster) Events(ctx context.Context) string {
	var b strings.Builder
	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"},
		{"get", "events", "-A", "--sort-by=.lastTimestamp", "--field-selector=type=Warning"},
	} {
		out, err := c.Kubectl(ctx, "", args...)
		fmt.Fprintf(&b, "%s\n", out)
		if err != nil {
			fmt.Fprintln(&b, err)
		}
	}
	return b.String()
}

// buildProbe returns the path of the program of testdata/probe, or "" after the test was failed.
func buildProbe(t testing.TB) string {
	t.Helper()
	out := filepath.Join(os.TempDir(), "probe")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./testdata/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("building the probe: %v: %s", err, text)
		return ""
	}
	return out
}

// dnsObjects is what a cluster has for names.
var dnsObjects = fmt.Sprintf(`
apiVersion: v1
kind: ServiceAccount
metadata: {name: coredns, namespace: kube-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: coredns}
rules:
- {apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: coredns}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: coredns}
subjects: [{kind: ServiceAccount, name: coredns, namespace: kube-system}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: coredns, namespace: kube-system}
data:
  Corefile: |
    .:53 {
      errors
      ready
      kubernetes cluster.local
      cache 5
    }
---
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec:
  clusterIP: %s
  selector: {app: coredns}
  ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: coredns, namespace: kube-system}
spec:
  selector: {matchLabels: {app: coredns}}
  template:
    metadata: {labels: {app: coredns}}
    spec:
      nodeName: node1
      serviceAccountName: coredns
      dnsPolicy: Default
      containers:
      - name: coredns
        image: %s
        imagePullPolicy: Never
        args: [-conf, /etc/coredns/Corefile]
        readinessProbe: {httpGet: {port: 8181, path: /ready}, periodSeconds: 1}
        volumeMounts: [{name: config, mountPath: /etc/coredns}]
      volumes: [{name: config, configMap: {name: coredns}}]
`, dnsAddress, dnsImage)
