package main

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/deploy"
	"github.com/signet-ca/signet/internal/canary"
)

// object is what a cluster holds under a path, as JSON has it.
type object = map[string]any

// A fakeCluster is an API server that holds objects by their paths, and answers what a real one would have answered to
// reads, reviews and deletions. What it holds of our own objects is what `signet install` prints.
type fakeCluster struct {
	*httptest.Server
	over  chan struct{}  // closed before the server is
	ports sync.WaitGroup // that are forwarded

	mu      sync.Mutex
	objects map[string]object                    // by path
	answers map[string]func(http.ResponseWriter) // by path, instead of the objects
	may     func(attributes map[string]string) bool
	now     time.Time
	minor   string
	deleted []string
	admin   *fakeAdmin        // what the CA's pod says of itself
	svid    tls.Certificate   // of the CA, under the published root
	onLoss  map[string]func() // by path: what else happens when it is deleted; the lock is held
}

// resourceOf says how objects of a kind are called in paths.
var resourceOf = map[string]string{
	"ConfigMap": "configmaps", "Namespace": "namespaces", "NetworkPolicy": "networkpolicies", "ClusterRole": "clusterroles",
	"ClusterRoleBinding": "clusterrolebindings", "Role": "roles", "RoleBinding": "rolebindings", "ServiceAccount": "serviceaccounts",
	"CSIDriver": "csidrivers", "Service": "services", "PodDisruptionBudget": "poddisruptionbudgets", "StatefulSet": "statefulsets",
	"DaemonSet": "daemonsets", "ResourceQuota": "resourcequotas", "Pod": "pods", "Node": "nodes", "CSINode": "csinodes", "PersistentVolumeClaim": "persistentvolumeclaims",
	"EndpointSlice": "endpointslices", "Event": "events", "ClusterTrustBundle": "clustertrustbundles",
	"ValidatingAdmissionPolicy": "validatingadmissionpolicies", "ValidatingAdmissionPolicyBinding": "validatingadmissionpolicybindings",
}

// Close ends the server.
func (c *fakeCluster) Close() {
	close(c.over)
	c.Server.Close()
	c.ports.Wait()
}

// put adds an object given as YAML and returns its path. A status and what else a real one has is the caller's.
func (c *fakeCluster) put(text string, args ...any) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var o object
	if !readYAML(fmt.Sprintf(text, args...), &o) {
		panic("no YAML: " + text)
	}
	return c.add(o)
}

func (c *fakeCluster) add(o object) string {
	m := o["metadata"].(object)
	namespace, _ := m["namespace"].(string)
	path := in(o["apiVersion"].(string), namespace, resourceOf[o["kind"].(string)], m["name"].(string))
	if m["uid"] == nil {
		m["uid"] = "uid-of-" + path
	}
	if m["creationTimestamp"] == nil {
		m["creationTimestamp"] = testNow.Add(-time.Hour).Format(time.RFC3339)
	}
	c.objects[path] = o
	return path
}

// set changes one field of an object; the words are the way to it.
func (c *fakeCluster) set(path string, value any, way ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := c.objects[path]
	for _, w := range way[:len(way)-1] {
		next, ok := at[w].(object)
		if !ok {
			next = object{}
			at[w] = next
		}
		at = next
	}
	if last := way[len(way)-1]; value == nil {
		delete(at, last)
	} else {
		at[last] = value
	}
}

func (c *fakeCluster) remove(path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.objects, path)
}

// answer makes a path answer so from now on.
func (c *fakeCluster) answer(path string, f func(http.ResponseWriter)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answers[path] = f
}

// Paths of what tests change.
const (
	sys             = "/api/v1/namespaces/signet-system"
	pathDriver      = "/apis/storage.k8s.io/v1/csidrivers/csi.signet.dev"
	pathStatefulSet = "/apis/apps/v1/namespaces/signet-system/statefulsets/signet-ca"
	pathDaemonSet   = "/apis/apps/v1/namespaces/signet-system/daemonsets/signet-agent"
	pathBundle      = sys + "/configmaps/signet-bundle"
	pathSlices      = "/apis/discovery.k8s.io/v1/namespaces/signet-system/endpointslices/"
)

// newCluster starts a cluster of two nodes with an installation that is as it should be.
func newCluster(t testing.TB) *fakeCluster {
	c := &fakeCluster{
		over: make(chan struct{}), objects: map[string]object{}, answers: map[string]func(http.ResponseWriter){}, now: testNow, minor: "37", onLoss: map[string]func(){},
	}
	needed := map[string]bool{
		"tokenreviews": true, "pods": true, "serviceaccounts": true, "nodes": true, "configmaps": true, "namespaces": true,
		"clustertrustbundles": true, "signers": true,
	}
	c.admin = newFakeAdmin(t)
	c.admin.play("signing")
	viewers := []string{"serviceaccounts/token viewer", "pods ", "pods/portforward signet-ca-0", "configmaps signet-bundle"}
	c.may = func(a map[string]string) bool { // what RBAC gives to the CA alone, and a viewer to whoever asks
		if resource := strings.TrimSuffix(a["resource"]+"/"+a["subresource"], "/"); a["user"] == "" && slices.Contains(viewers, resource+" "+a["name"]) {
			return true
		}
		return strings.HasSuffix(a["user"], ":signet-ca") && needed[a["resource"]] && a["subresource"] == "" && (a["resource"] != "pods" || a["verb"] != "create")
	}
	manifests, err := deploy.Install(deploy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	docs := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(manifests), 4096)
	for {
		var o object
		if err := docs.Decode(&o); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if o != nil {
			c.add(o)
		}
	}
	c.run(t)
	c.Server = httptest.NewUnstartedServer(http.HandlerFunc(c.serve))
	c.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	c.StartTLS()
	return c
}

// run adds what controllers, kubelets and the CA make of the installation.
func (c *fakeCluster) run(t testing.TB) {
	c.set(pathStatefulSet, object{"readyReplicas": 1, "updatedReplicas": 1}, "status")
	c.set(pathDaemonSet, object{"desiredNumberScheduled": 2, "numberReady": 2, "updatedNumberScheduled": 2}, "status")
	for _, claim := range []string{"state", "seal"} {
		c.put(`{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: %s-signet-ca-0, namespace: signet-system}, status: {phase: Bound}}`, claim)
	}
	c.pod("signet-system", "signet-ca-0", "node-1", "signet-ca", "")
	c.put(`{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: signet-ca-1, namespace: signet-system, labels: {kubernetes.io/service-name: signet-ca}},
		endpoints: [{conditions: {ready: true}}]}`)
	for n := 1; n <= 2; n++ {
		c.put(`{apiVersion: v1, kind: Node, metadata: {name: node-%d}, status: {conditions: [{type: Ready, status: "True"}]}}`, n)
		c.put(`{apiVersion: storage.k8s.io/v1, kind: CSINode, metadata: {name: node-%d}, spec: {drivers: [{name: csi.signet.dev}]}}`, n)
		c.pod("signet-system", fmt.Sprintf("signet-agent-%d", n), fmt.Sprintf("node-%d", n), "signet-agent", "")
	}
	c.put(`{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {signet.dev/bundle: "true"}}}`)
	c.pod("shop", "web-1", "node-1", "web", "csi.signet.dev")
	c.publish(t, 10*365*24*time.Hour)
}

// publish shows a bundle of one root with that much life left, and a copy in namespace shop.
func (c *fakeCluster) publish(t testing.TB, left time.Duration) {
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	der, key := selfSigned(t, "spiffe://cluster.local", testNow.Add(left))
	svid := replicaSVID(t, der, key)
	doc := spiffebundle.FromX509Authorities(td, []*x509.Certificate{der})
	doc.SetSequenceNumber(api.Generation{Epoch: 1, Number: 4}.Sequence())
	text, err := doc.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	data := object{bundleJSON: string(text), bundlePEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der.Raw}))}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.svid = svid
	for _, namespace := range []string{"signet-system", "shop"} {
		m := object{"name": bundleName, "namespace": namespace, "labels": object{labelPartOf: "signet"}}
		if namespace == "shop" {
			m["labels"].(object)[labelBundleCopy] = "true"
			m["annotations"] = object{annotationCopyOf: "signet-system/signet-bundle"}
		}
		c.add(object{"apiVersion": "v1", "kind": "ConfigMap", "metadata": m, "data": maps.Clone(data)})
	}
}

// selfSigned makes a root whose life began twenty years before its end, so that it is valid by the true clock too, mostly.
func selfSigned(t testing.TB, id string, end time.Time) (*x509.Certificate, crypto.Signer) {
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), SubjectKeyId: bytes.Repeat([]byte{0x71}, 20), NotBefore: end.AddDate(-20, 0, 0), NotAfter: end,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{u},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return root, key
}

// replicaSVID is that of the CA's replica, for as long as its root lives.
func replicaSVID(t testing.TB, root *x509.Certificate, rootKey crypto.Signer) tls.Certificate {
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: root.NotBefore, NotAfter: root.NotAfter, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		URIs: []*url.URL{spiffeid.RequireFromString("spiffe://cluster.local/signet/ca/signet-ca-0").URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, root, key.Public(), rootKey)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// forward serves the operators' port of the CA's pod, once.
func (c *fakeCluster) forward(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	svid := c.svid
	c.mu.Unlock()
	c.ports.Add(1)
	defer c.ports.Done()
	l := bufconn.Listen(1 << 16)
	s := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&svid)))
	apiv1.RegisterAdminServer(s, c.admin)
	var serving sync.WaitGroup
	serving.Go(func() { s.Serve(l) })
	defer serving.Wait()
	defer s.Stop()
	pod, err := l.DialContext(r.Context())
	if err != nil {
		w.WriteHeader(500)
		return
	}
	defer pod.Close()
	forwardTo(w, r, pod)
}

// pod adds a pod that is ready; with a driver it has a volume of it.
func (c *fakeCluster) pod(namespace, name, node, label, driver string) string {
	volumes := ""
	if driver != "" {
		volumes = fmt.Sprintf(`{name: id, csi: {driver: %s, readOnly: true}}`, driver)
	}
	return c.put(`{apiVersion: v1, kind: Pod, metadata: {name: %s, namespace: %s, labels: {app.kubernetes.io/name: %s, pod-template-hash: abc},
		ownerReferences: [{kind: ReplicaSet, name: %s-abc, controller: true}]},
		spec: {nodeName: %s, volumes: [%s]},
		status: {phase: Running, conditions: [{type: Ready, status: "True"}], containerStatuses: [{name: main, ready: true, state: {running: {}}}]}}`,
		name, namespace, label, label, node, volumes)
}

// waits makes a pod wait for its containers since a quarter of an hour, and an event say why.
func (c *fakeCluster) waits(path, message string) {
	c.set(path, object{
		"phase": "Pending", "conditions": []any{object{"type": "PodScheduled", "status": "True"}, object{"type": "PodReadyToStartContainers", "status": "False"}},
		"containerStatuses": []any{object{"name": "main", "state": object{"waiting": object{"reason": "ContainerCreating"}}}},
	}, "status")
	c.event(path, "FailedMount", message)
}

// event adds a warning about the object at path.
func (c *fakeCluster) event(path, reason, message string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.objects[path]["metadata"].(object)
	c.add(object{
		"apiVersion": "v1", "kind": "Event", "metadata": object{"name": m["name"].(string) + "." + reason, "namespace": m["namespace"]},
		"involvedObject": object{"uid": m["uid"]}, "type": "Warning", "reason": reason, "message": message,
		"lastTimestamp": testNow.Add(-time.Minute).Format(time.RFC3339),
	})
}

func (c *fakeCluster) serve(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	if path := r.URL.Path; path == sys+"/pods/signet-ca-0/portforward" && c.answers[path] == nil {
		c.mu.Unlock()
		c.forward(w, r)
		return
	}
	defer c.mu.Unlock()
	if !c.now.IsZero() {
		w.Header().Set("Date", c.now.UTC().Format(http.TimeFormat))
	} else {
		w.Header()["Date"] = nil
	}
	path := r.URL.Path
	switch f := c.answers[path]; {
	case f != nil:
		f(w)
	case path == "/version":
		c.send(w, 200, object{"major": "1", "minor": c.minor, "gitVersion": "v1." + c.minor + ".2"})
	case r.Method == http.MethodPost && strings.HasSuffix(path, "subjectaccessreviews"):
		c.review(w, r)
	case r.Method == http.MethodPost && path == people+"/serviceaccounts/viewer/token":
		c.send(w, 201, object{"status": object{"token": "of-a-viewer", "expirationTimestamp": time.Now().Add(10 * time.Minute)}})
	case r.Method == http.MethodDelete:
		c.delete(w, r)
	case r.Method != http.MethodGet:
		c.fail(w, http.StatusMethodNotAllowed, "only reads")
	case c.objects[path] != nil:
		c.send(w, 200, c.objects[path])
	case slices.Contains(slices.Collect(maps.Values(resourceOf)), path[strings.LastIndex(path, "/")+1:]):
		c.send(w, 200, object{"kind": "List", "metadata": object{"resourceVersion": "1"}, "items": c.list(path, r)})
	default:
		c.fail(w, http.StatusNotFound, "not found")
	}
}

// list returns the objects of a collection, of one namespace or of all, that the selectors of the request select.
func (c *fakeCluster) list(path string, r *http.Request) []object {
	cut := strings.LastIndex(path, "/")
	group, resource := path[:cut], path[cut:]
	items := []object{}
	for _, p := range slices.Sorted(maps.Keys(c.objects)) {
		o := c.objects[p]
		m := o["metadata"].(object)
		of := p[:strings.LastIndex(p, "/")]
		inAll := m["namespace"] != nil && of == fmt.Sprintf("%s/namespaces/%s%s", group, m["namespace"], resource)
		if (of == path || inAll) && selects(r.URL.Query().Get("labelSelector"), m["labels"]) && selectsField(r.URL.Query().Get("fieldSelector"), o) {
			items = append(items, o)
		}
	}
	return items
}

// selects knows "k=v" and "k in (v,w)", with commas between.
func selects(selector string, labels any) bool {
	l, _ := labels.(object)
	head, set, both := strings.Cut(selector, " in (")
	if both {
		key := head[strings.LastIndex(head, ",")+1:]
		if v, _ := l[key].(string); !slices.Contains(strings.Split(strings.TrimSuffix(set, ")"), ","), v) {
			return false
		}
		selector = strings.TrimSuffix(strings.TrimSuffix(head, key), ",")
	}
	for term := range strings.SplitSeq(selector, ",") {
		if k, v, ok := strings.Cut(term, "="); ok && l[k] != v {
			return false
		}
	}
	return true
}

func selectsField(selector string, o object) bool {
	want, ok := strings.CutPrefix(selector, "involvedObject.uid=")
	if !ok {
		return true
	}
	about, _ := o["involvedObject"].(object)
	return about != nil && about["uid"] == want
}

func (c *fakeCluster) review(w http.ResponseWriter, r *http.Request) {
	var ask struct {
		Spec struct {
			User               string
			ResourceAttributes map[string]string
		}
	}
	if err := json.NewDecoder(r.Body).Decode(&ask); err != nil {
		c.fail(w, 400, err.Error())
		return
	}
	a := ask.Spec.ResourceAttributes
	a["user"] = ask.Spec.User
	c.send(w, 201, object{"status": object{"allowed": c.may(a)}})
}

func (c *fakeCluster) delete(w http.ResponseWriter, r *http.Request) {
	var options struct {
		Preconditions struct{ UID string }
	}
	o := c.objects[r.URL.Path]
	switch err := json.NewDecoder(r.Body).Decode(&options); {
	case err != nil:
		c.fail(w, 400, err.Error())
		return
	case o == nil:
		c.fail(w, 404, "not found")
		return
	case o["metadata"].(object)["uid"] != options.Preconditions.UID:
		c.fail(w, 409, "another UID")
		return
	}
	c.deleted = append(c.deleted, r.URL.Path)
	delete(c.objects, r.URL.Path)
	switch r.URL.Path { // what controllers make of it
	case pathStatefulSet:
		delete(c.objects, sys+"/pods/signet-ca-0")
	case pathDaemonSet:
		delete(c.objects, sys+"/pods/signet-agent-1")
		delete(c.objects, sys+"/pods/signet-agent-2")
	}
	if f := c.onLoss[r.URL.Path]; f != nil {
		f()
	}
	c.send(w, 200, object{"kind": "Status", "status": "Success"})
}

func (c *fakeCluster) send(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(v)
}

func (c *fakeCluster) fail(w http.ResponseWriter, code int, message string) {
	c.send(w, code, object{"kind": "Status", "code": code, "message": message})
}

// kubeconfig writes one for the cluster into dir and returns its path.
func (c *fakeCluster) kubeconfig(dir string) (string, error) {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate().Raw})
	text, err := json.Marshal(object{
		"apiVersion": "v1", "kind": "Config", "current-context": "one",
		"contexts": []any{object{"name": "one", "context": object{"cluster": "c", "user": "u"}}},
		"clusters": []any{object{"name": "c", "cluster": object{"server": c.URL, "certificate-authority-data": ca}}},
		"users":    []any{object{"name": "u", "user": object{"token": "of-the-operator"}}},
	})
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "kubeconfig")
	return path, os.WriteFile(path, text, 0o600)
}

// cmdCluster is `cluster SCENE`: start one, and let KUBECONFIG name it.
func cmdCluster(ts *testscript.TestScript, _ bool, args []string) {
	c := newCluster(worldOf(ts).tb)
	ts.Defer(c.Close)
	c.play(args[0])
	path, err := c.kubeconfig(ts.MkAbs("."))
	ts.Check(err)
	ts.Setenv("KUBECONFIG", path)
	ts.Setenv("API", c.URL)
}

// play sets a scene of the scripts.
func (c *fakeCluster) play(scene string) {
	switch scene {
	case "good":
	case "free": // no pod has the volume
		c.remove("/api/v1/namespaces/shop/pods/web-1")
	case "broken":
		c.set(pathDriver, []any{object{"audience": "signet:other.example"}}, "spec", "tokenRequests")
		c.waits("/api/v1/namespaces/shop/pods/web-1", "driver name csi.signet.dev not found\x1b[2J in the list of registered CSI drivers")
		c.set(pathDaemonSet, 1, "status", "numberReady")
		c.set(sys+"/pods/signet-agent-2", []any{object{"type": "Ready", "status": "False"}}, "status", "conditions")
		c.set(sys+"/pods/signet-agent-2", []any{object{"name": "agent", "state": object{"waiting": object{"reason": "ImagePullBackOff", "message": "no such image"}}}}, "status", "containerStatuses")
	case "empty":
		c.mu.Lock()
		defer c.mu.Unlock()
		clear(c.objects)
	case "helm":
		c.remove("/api/v1/namespaces/shop/pods/web-1")
		c.set(pathDaemonSet, object{"meta.helm.sh/release-name": "identity"}, "metadata", "annotations")
	case "forbidden":
		c.answer("/api/v1/pods", func(w http.ResponseWriter) { c.fail(w, 403, "pods is forbidden") })
	case "down":
		c.answer("/version", func(w http.ResponseWriter) { c.fail(w, 503, "etcd is away") })
	case "silent":
		c.Config.Handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-c.over }) // no word either when the client gives up
	default:
		panic("no such scene")
	}
}
