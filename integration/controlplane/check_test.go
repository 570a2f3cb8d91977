//go:build cluster

package controlplane_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	seen "github.com/signet-ca/signet/ca/cluster"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/integration/controlplane"
)

// operator is a person with `signet` in hand, and a cluster without nodes: all of an installation is there that the API
// server itself makes of it, and nothing runs.
type operator struct {
	*cluster
	binary     string
	kubeconfig string // of the administrator
}

func newOperator(t *testing.T) *operator {
	o := &operator{cluster: &cluster{ControlPlane: controlplane.Start(t)}}
	if dir := os.Getenv("SIGNET_BIN"); dir != "" {
		o.binary = filepath.Join(dir, "signet")
	} else {
		o.binary = filepath.Join(t.TempDir(), "signet")
		if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", o.binary, "../../cmd/signet").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	o.kubeconfig = o.Kubeconfig(t, "operator", fmt.Sprintf(`{"client-certificate": %q, "client-key": %q}`,
		filepath.Join(o.Dir, "admin.crt"), filepath.Join(o.Dir, "admin.key")))
	return o
}

// run runs a command line of signet, and wants it to end with that code.
func (o *operator) run(t *testing.T, code int, args ...string) (stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, o.binary, args...)
	var out, talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &talk
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatal(err)
	} else if got := map[bool]int{true: 0}[err == nil]; ok && exit.ExitCode() != code || !ok && got != code {
		t.Fatalf("signet %s: %v, want exit code %d\n%s%s", strings.Join(args, " "), err, code, &out, &talk)
	}
	return out.String(), talk.String()
}

// row is what check says of one thing.
type row struct {
	Metadata              struct{ Name string }
	Result, Object, Found string
	Do                    string
}

// check runs it and returns its rows.
func (o *operator) check(t *testing.T, code int, kubeconfig string) []row {
	t.Helper()
	stdout, _ := o.run(t, code, "check", "--kubeconfig", kubeconfig, "--timeout", "30s", "-o", "json")
	var r struct{ Items []row }
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatalf("%v in %s", err, stdout)
	}
	return r.Items
}

// says fails unless some row of a check has that result and these words.
func says(t *testing.T, rows []row, check, result, found string) {
	t.Helper()
	var all []row
	for _, r := range rows {
		if r.Metadata.Name != check {
			continue
		}
		if all = append(all, r); r.Result == result && strings.Contains(r.Found, found) && (result == "good" || r.Do != "") {
			return
		}
	}
	t.Errorf("%s is not %s with %q: %+v", check, result, found, all)
}

// collection is where objects of a kind are made.
func collection(o object) string {
	plural := strings.ToLower(o["kind"].(string)) + "s"
	if stem, ok := strings.CutSuffix(plural, "ys"); ok {
		plural = stem + "ies"
	}
	path := "/apis/" + o["apiVersion"].(string)
	if o["apiVersion"] == "v1" {
		path = "/api/v1"
	}
	if ns, ok := o["metadata"].(object)["namespace"]; ok {
		path += "/namespaces/" + ns.(string)
	}
	return path + "/" + plural
}

// install applies what `signet install` prints, each object changed by change.
func (o *operator) install(t *testing.T, change func(object)) (paths []string) {
	t.Helper()
	manifests, _ := o.run(t, 0, "install")
	docs := yaml.NewYAMLOrJSONDecoder(strings.NewReader(manifests), 4096)
	for {
		var obj object
		if err := docs.Decode(&obj); errors.Is(err, io.EOF) {
			return paths
		} else if err != nil {
			t.Fatal(err)
		}
		if obj == nil {
			continue
		}
		change(obj)
		o.create(t, collection(obj), obj)
		paths = append(paths, collection(obj)+"/"+obj["metadata"].(object)["name"].(string))
	}
}

// publish publishes a bundle as the CA does, by the rights that the installation gives it.
func (o *operator) publish(t *testing.T) {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	client := o.open(t, "signet-ca")
	p, err := seen.NewKubePublisher(seen.KubePublisherConfig{Client: client, Namespace: system, Log: slog.New(slog.DiscardHandler), Metrics: seen.NewMetrics()})
	if err != nil {
		t.Fatal(err)
	}
	key, err := issuance.GenerateKey(issuance.KeyP256)
	if err != nil {
		t.Fatal(err)
	}
	root, err := issuance.NewRoot(td, key, 10*365*24*time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	b := &ca.Bundle{TrustDomain: td, Generation: api.Generation{Epoch: 1, Number: 1}}
	b.Roots = append(b.Roots, root)
	b.Hash = api.BundleHash(b.Roots)
	deadline := time.Now().Add(time.Minute) // the authorizer learns of a new role a moment after it was made
	for err = p.Publish(t.Context(), b); err != nil && time.Now().Before(deadline); err = p.Publish(t.Context(), b) {
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A broken installation on a real control plane is told as broken, one that is put right as right, and it is removed whole.
func TestCheck(t *testing.T) {
	o := newOperator(t)
	says(t, o.check(t, 3, o.kubeconfig), "installed", "bad", "not installed")

	var driver object
	paths := o.install(t, func(obj object) {
		if obj["kind"] != "CSIDriver" {
			return
		}
		driver = object{"apiVersion": obj["apiVersion"], "kind": obj["kind"], "metadata": obj["metadata"], "spec": map[string]any{}}
		spec := obj["spec"].(object)
		maps.Copy(driver["spec"].(object), spec)
		spec["tokenRequests"] = []object{{"audience": "signet:other.example"}}
		spec["requiresRepublish"] = false
	})
	for n, drivers := range [][]object{{}, {{"name": "csi.signet.dev", "nodeID": "node-2"}}} {
		name := fmt.Sprintf("node-%d", n+1)
		o.create(t, "/api/v1/nodes", object{"metadata": object{"name": name}})
		o.create(t, "/apis/storage.k8s.io/v1/csinodes", object{"metadata": object{"name": name}, "spec": object{"drivers": drivers}})
	}
	o.create(t, "/api/v1/namespaces", object{"metadata": object{"name": "shop", "labels": object{"signet.dev/bundle": "true"}}})
	o.create(t, "/api/v1/namespaces/shop/serviceaccounts", object{"metadata": object{"name": "web"}})
	const web = "/api/v1/namespaces/shop/pods/web"
	o.create(t, "/api/v1/namespaces/shop/pods", object{"metadata": object{"name": "web"}, "spec": object{
		"serviceAccountName": "web", "nodeName": "node-1", "containers": []object{{"name": "web", "image": "web"}},
		"volumes": []object{{"name": "id", "csi": object{"driver": "csi.signet.dev"}}},
	}})

	broken := o.check(t, 3, o.kubeconfig)
	for _, want := range [][3]string{
		{"version", "good", "has all that is needed"},
		{"namespace", "good", ""},
		{"csi-driver", "bad", `has not the audience "signet:cluster.local"`},
		{"csi-driver", "bad", "requiresRepublish is not true"},
		{"ca", "bad", "0 of 1 pod ready"},
		{"state", "bad", "no such claim"},
		{"service", "bad", "no pod is behind it"},
		{"nodes", "warning", "node itself is not ready"},
		{"bundle", "bad", "not published its bundle"},
		{"permissions", "good", ""},
		{"shared-socket", "good", "off"},
		{"read-only", "bad", "not readOnly"},
	} {
		says(t, broken, want[0], want[1], want[2])
	}

	o.publish(t)
	o.remove(t, collection(driver)+"/csi.signet.dev")
	o.create(t, collection(driver), driver)
	o.remove(t, "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/signet-ca-token-review")
	deadline := time.Now().Add(time.Minute) // for the authorizer to learn of it
	mended := o.check(t, 3, o.kubeconfig)
	for !slices.ContainsFunc(mended, func(r row) bool { return r.Metadata.Name == "permissions" && r.Result == "bad" }) && time.Now().Before(deadline) {
		mended = o.check(t, 3, o.kubeconfig)
	}
	for _, want := range [][3]string{
		{"csi-driver", "good", ""},
		{"bundle", "good", "generation 1.1 with 1 root"},
		{"roots", "good", "y left"},
		{"copies", "bad", "no copy"},
		{"trust-bundle", "bad", "there is none"},
		{"permissions", "bad", "create tokenreviews.authentication.k8s.io"},
	} {
		says(t, mended, want[0], want[1], want[2])
	}
	for _, args := range [][]string{{"check", "--wait=3s", "-o", "name"}, {"uninstall", "--wait=3s", "--yes"}} {
		if _, talk := o.run(t, 124, append(args, "--kubeconfig", o.kubeconfig)...); !strings.Contains(talk, "waiting: ") {
			t.Errorf("signet %s does not say what it waits for: %s", args[0], talk)
		}
	}

	// Somebody without rights sees nothing, and is not told that all is good.
	o.create(t, "/api/v1/namespaces/shop/serviceaccounts", object{"metadata": object{"name": "nobody"}})
	token := filepath.Join(o.Dir, "nobody.token")
	if err := os.WriteFile(token, o.token(t, "shop", "nobody", "", nil), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, r := range o.check(t, 3, o.Kubeconfig(t, "nobody", fmt.Sprintf(`{"tokenFile": %q}`, token))) {
		if !slices.Contains([]string{"api-server", "version", "clock", "inline-volumes"}, r.Metadata.Name) && r.Result != "unknown" {
			t.Errorf("%s is %s to somebody without rights: %s", r.Metadata.Name, r.Result, r.Found)
		}
	}

	o.uninstalls(t, paths, web)
}

// uninstalls removes what was installed, once the last pod with the volume is gone.
func (o *operator) uninstalls(t *testing.T, installed []string, pod string) {
	if _, talk := o.run(t, 3, "uninstall", "--yes", "--kubeconfig", o.kubeconfig); !strings.Contains(talk, "1 pod has the volume") {
		t.Errorf("it says %s", talk)
	}
	o.remove(t, pod)
	_, talk := o.run(t, 0, "uninstall", "--wait=1m", "--yes", "--kubeconfig", o.kubeconfig)
	for _, path := range installed {
		err := o.Do(t.Context(), http.MethodGet, path, nil, nil)
		if kept := strings.HasSuffix(path, "/namespaces/"+system); kept != (err == nil) {
			t.Errorf("%s: %v\n%s", path, err, talk)
		}
	}
	bundle := "/api/v1/namespaces/" + system + "/configmaps/" + seen.BundleConfigMap
	if err := o.Do(t.Context(), http.MethodGet, bundle, nil, nil); err != nil {
		t.Errorf("the bundle did not stay: %v", err)
	}
	says(t, o.check(t, 3, o.kubeconfig), "installed", "bad", "not installed")
	if _, talk := o.run(t, 0, "uninstall", "--yes", "--delete-state", "cluster.local", "--kubeconfig", o.kubeconfig); !strings.Contains(talk, "deleted: "+system+"/configmap/signet-bundle") {
		t.Errorf("the state went not: %s", talk)
	}
	if err := o.Do(t.Context(), http.MethodGet, bundle, nil, nil); err == nil {
		t.Error("the bundle stayed")
	}
}
