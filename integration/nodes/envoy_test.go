//go:build cluster && linux

package nodes_test

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/signet-ca/signet/integration/nodes"
)

const trustDomain = "cluster.local"

//go:embed testdata/mesh.yaml
var meshObjects string

// envoyPod is a pod with an Envoy of that configuration beside the probe.
func (s *suite) envoyPod(name, account, config, node, args string) string {
	if len(s.Nodes) == 0 {
		node = ""
	}
	p := pod{namespace: "mesh", name: name, app: name, account: account, node: node, args: args}
	p.restart = "Always"
	p.beside = fmt.Sprintf(`{"name": "envoy", "image": "%s/envoy:1.40.0", "imagePullPolicy": "IfNotPresent",
		"args": ["-c", "/etc/envoy/%s.yaml", "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"],
		"startupProbe": {"exec": {"command": ["/probe", "get", "1", "http://127.0.0.1:9901/ready"]}, "periodSeconds": 1, "failureThreshold": 120},
		"volumeMounts": [{"name": "config", "mountPath": "/etc/envoy"}, {"name": "signet", "mountPath": "/run/signet-workload", "readOnly": true}]}`, s.Registry, config)
	p.volumes = `{"name": "config", "configMap": {"name": "envoy"}}`
	return fmt.Sprintf("{\"apiVersion\": \"v1\", \"kind\": \"ServiceAccount\", \"metadata\": {\"name\": %q, \"namespace\": \"mesh\"}}\n---\n%s---\n", account, p.json(s))
}

// envoy: two Envoys on different nodes speak mTLS by SPIFFE ID, each over the socket of its own pod, and refuse whom they
// do not expect, on either side. They stay for the tests that follow.
func (s *suite) envoy(t *testing.T) {
	s.importEnvoy(t)
	s.Apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "mesh", "labels": {"`+testLabel+`": ""}}}`)
	s.Apply(t, strings.ReplaceAll(meshObjects, "TRUST_DOMAIN", trustDomain)+"\n---\n"+
		s.envoyPod("payments", "payments", "payments", "node2", `["serve", "127.0.0.1:8080"]`)+
		s.envoyPod("checkout", "checkout", "client", "node1", "[]")+
		s.envoyPod("intruder", "intruder", "client", "node1", "[]"))
	s.Wait(t, "pod", "-n", "mesh", "--all", "--for=condition=Ready")
	const expected, mistaken = "http://127.0.0.1:15001", "http://127.0.0.1:15002"
	nodes.Eventually(t, "checkout to payments", func(ctx context.Context) error { // a Service's addresses take a moment to be everywhere
		a, err := s.get(ctx, "mesh", "checkout", 1, expected)
		if err == nil && a.Failed > 0 {
			err = fmt.Errorf("%+v", a)
		}
		return err
	})
	s.mesh = true
	a, err := s.get(t.Context(), "mesh", "checkout", 20, expected)
	if err != nil || a.Failed > 0 || !strings.Contains(a.Last, "URI=spiffe://"+trustDomain+"/ns/mesh/sa/checkout") {
		t.Errorf("checkout to payments: %+v, %v", a, err)
	}
	for _, test := range []struct{ name, pod, url string }{
		{"a server with another SPIFFE ID", "checkout", mistaken},
		{"a client with another SPIFFE ID", "intruder", expected},
	} {
		a, err := s.get(t.Context(), "mesh", test.pod, 3, test.url)
		if err != nil || a.Failed != 3 || !strings.HasPrefix(a.Last, "503 ") {
			t.Errorf("%s was not refused: %+v, %v", test.name, a, err)
		}
	}
}

// exampleImage is what the manual's example runs.
const exampleImage = "envoyproxy/envoy:distroless-v1.40-latest"

// example: what the manual shows works as it is there, with the two on different nodes.
func (s *suite) example(t *testing.T) {
	s.importEnvoy(t)
	text, err := os.ReadFile("../../deploy/examples/envoy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	objects := string(text)
	for i, name := range []string{"checkout", "payments"} {
		line := "      serviceAccountName: " + name + "\n"
		if strings.Count(objects, line) != 1 {
			t.Fatalf("the example has changed: %q is not in it once", line)
		}
		if len(s.Nodes) > 0 {
			objects = strings.Replace(objects, line, line+"      nodeSelector: {kubernetes.io/hostname: "+s.node(i)+"}\n", 1)
		}
	}
	t.Cleanup(func() { s.deleteNamespace(t, "shop") })
	s.Apply(t, objects)
	s.Must(t, "wait", "-n", "shop", "--for=condition=Available", "deployment", "--all", "--timeout=3m")
	nodes.Eventually(t, "the example", func(ctx context.Context) error {
		out, err := s.Kubectl(ctx, "", "get", "--raw", "/api/v1/namespaces/shop/services/checkout:http/proxy/")
		if err == nil && !strings.Contains(out, "payments saw spiffe://cluster.local/ns/shop/sa/checkout over TLSv1.3") {
			err = fmt.Errorf("got %q", out)
		}
		return err
	})
}

// importEnvoy puts the Envoy into the nodes, once.
func (s *suite) importEnvoy(t *testing.T) {
	t.Helper()
	if s.hasEnvoy {
		return
	}
	s.Import(t, s.envoyImage(t))
	for _, n := range s.Nodes {
		out, err := n.Command(t.Context(), "ctr", "-n", "k8s.io", "images", "tag", "localhost/envoy:1.40.0", "docker.io/"+exampleImage).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	s.hasEnvoy = true
}

// envoyImage is the Envoy that `make envoy` fetched, with the libraries that it needs.
func (s *suite) envoyImage(t *testing.T) nodes.Image {
	t.Helper()
	binary := os.Getenv("SIGNET_ENVOY")
	if binary == "" {
		t.Skip("there is no Envoy here (SIGNET_ENVOY)")
	}
	out, err := exec.CommandContext(t.Context(), "ldd", binary).Output()
	if err != nil {
		t.Fatalf("ldd: %v", err)
	}
	files := map[string]string{"/envoy": binary, "/probe": s.Probe}
	for line := range strings.Lines(string(out)) {
		for field := range strings.FieldsSeq(line) {
			if strings.HasPrefix(field, "/") {
				files[field] = field
			}
		}
	}
	return nodes.Image{Name: "localhost/envoy:1.40.0", Entrypoint: []string{"/envoy"}, Files: files}
}

// load sends requests from a pod until its function is called, which returns how they went.
func (s *suite) load(t *testing.T, namespace, pod, url string) func() answer {
	t.Helper()
	cmd := s.Command(t.Context(), "exec", "-i", "-n", namespace, pod, "-c", "main", "--", "/probe", "load", url)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() answer {
		t.Helper()
		stdin.Close()
		out, rerr := io.ReadAll(stdout)
		var a answer
		if err := cmd.Wait(); err != nil || rerr != nil {
			t.Fatalf("the load from %s: %v, %v", pod, err, rerr)
		}
		if err := json.Unmarshal(out, &a); err != nil {
			t.Fatal(err)
		}
		return a
	}
}
