//go:build cluster

package controlplane_test

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	seen "github.com/signet-ca/signet/ca/cluster"
	"github.com/signet-ca/signet/integration/controlplane"
	"github.com/signet-ca/signet/internal/kube"
)

const (
	trustBundle  = "signet.dev:bundle:" + catest.TrustDomain
	trustBundles = "/apis/certificates.k8s.io/v1/clustertrustbundles"
)

// trust is a real control plane, and a publisher in it that may do what docs/cluster.md says that it must be allowed to.
type trust struct {
	*cluster
	p       *seen.KubePublisher
	log     *lines
	metrics *seen.Metrics
}

// kinds are the collections of what docs/cluster.md would have applied.
var kinds = map[string]string{
	"Role":                             "/apis/rbac.authorization.k8s.io/v1/namespaces/" + system + "/roles",
	"ClusterRole":                      "/apis/rbac.authorization.k8s.io/v1/clusterroles",
	"ValidatingAdmissionPolicy":        "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies",
	"ValidatingAdmissionPolicyBinding": "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings",
}

// applyDocs applies the YAML of docs/cluster.md, and binds its roles to the CA's ServiceAccount.
func (c *cluster) applyDocs(t *testing.T) {
	t.Helper()
	page, err := os.ReadFile("../../docs/cluster.md")
	if err != nil {
		t.Fatal(err)
	}
	applied := 0
	for i, part := range strings.Split(string(page), "```") {
		block, ok := strings.CutPrefix(part, "yaml\n")
		if i%2 == 0 || !ok || !strings.Contains(block, "apiVersion: rbac") && !strings.Contains(block, "apiVersion: admission") {
			continue
		}
		for doc := range strings.SplitSeq(strings.ReplaceAll(block, "bundle:cluster.local", "bundle:"+catest.TrustDomain), "\n---\n") {
			var o object
			if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
				t.Fatal(err)
			}
			kind := o["kind"].(string)
			c.create(t, kinds[kind], o)
			applied++
			if !strings.HasSuffix(kind, "Role") {
				continue
			}
			name := o["metadata"].(object)["name"]
			c.create(t, strings.TrimSuffix(kinds[kind], "s")+"bindings", object{
				"metadata": object{"name": name},
				"roleRef":  object{"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
				"subjects": []object{{"kind": "ServiceAccount", "namespace": system, "name": "signet-ca"}},
			})
		}
	}
	if applied != 7 { // two roles of the directory, one to publish, two for the rest, and a policy with its binding
		t.Fatalf("docs/cluster.md has %d objects", applied)
	}
}

func newTrust(t *testing.T) *trust {
	w := &trust{cluster: newCluster(t), log: &lines{}, metrics: seen.NewMetrics()}
	w.applyDocs(t)
	w.p = w.publisher(t, w.open(t, "signet-ca"), system, w.log, w.metrics)
	return w
}

func (w *trust) publisher(t *testing.T, client *kube.Client, namespace string, log *lines, m *seen.Metrics) *seen.KubePublisher {
	t.Helper()
	p, err := seen.NewKubePublisher(seen.KubePublisherConfig{
		Client: client, Namespace: namespace, Log: slog.New(slog.NewTextHandler(log, nil)), Copies: true,
		TrustBundle: spiffeid.RequireTrustDomainFromString(catest.TrustDomain), Metrics: m,
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func copyPath(namespace string) string {
	return "/api/v1/namespaces/" + namespace + "/configmaps/" + seen.BundleConfigMap
}

// holds says whether the ConfigMap of a namespace holds exactly b; where it is a copy, that it says so.
func (w *trust) holds(t *testing.T, namespace string, b *ca.Bundle) bool {
	t.Helper()
	var m struct {
		Metadata struct{ Labels, Annotations map[string]string }
		Data     map[string]string
		Binary   map[string]string `json:"binaryData"`
		Fixed    bool              `json:"immutable"`
	}
	if err := w.Do(t.Context(), http.MethodGet, copyPath(namespace), nil, &m); err != nil {
		return false
	}
	says := m.Metadata.Annotations[seen.CopyOf] == system+"/"+seen.BundleConfigMap && m.Metadata.Labels[seen.CopyLabel] == "true"
	return says == (namespace != system) && len(m.Data) == 2 && len(m.Binary) == 0 && !m.Fixed && showsData(b, m.Data)
}

// trusts says whether the ClusterTrustBundle holds exactly b.
func (w *trust) trusts(t *testing.T, b *ca.Bundle) bool {
	t.Helper()
	var o struct {
		Metadata struct{ Annotations map[string]string }
		Spec     struct{ SignerName, TrustBundle string }
	}
	if err := w.Do(t.Context(), http.MethodGet, trustBundles+"/"+trustBundle, nil, &o); err != nil {
		return false
	}
	return o.Spec.SignerName == "signet.dev/bundle" && o.Spec.TrustBundle == w.documents(t, b)[1] &&
		o.Metadata.Annotations["signet.dev/sequence"] == fmt.Sprint(b.Generation.Sequence())
}

// becomes waits until ok.
func (w *trust) becomes(t *testing.T, what string, ok func() bool) {
	t.Helper()
	start := time.Now()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Since(start) > time.Minute {
			w.log.mu.Lock()
			defer w.log.mu.Unlock()
			t.Fatalf("%s: not within a minute; the log:\n%s", what, w.log.buf.Bytes())
		}
		<-tick.C
	}
	t.Logf("%s: after %v", what, time.Since(start).Round(time.Millisecond))
}

// metric is the sum of a metric over all whose label has that value.
func (w *trust) metric(t *testing.T, name, label, value string) float64 {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(w.metrics); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if f.GetName() == name && l.GetName() == label && l.GetValue() == value {
					sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
				}
			}
		}
	}
	return sum
}

// label sets the label of a namespace by which it asks for a copy, or takes it away.
func (w *trust) label(t *testing.T, namespace string, on bool) {
	t.Helper()
	w.change(t, "/api/v1/namespaces/"+namespace, func(o object) {
		labels := o["metadata"].(object)["labels"].(object) // each has its own name as one
		if delete(labels, seen.CopiesLabel); on {
			labels[seen.CopiesLabel] = "true"
		}
	})
}

// TestTrust shows the bundle in a real cluster as a CA would that has the documented permissions and no others.
func TestTrust(t *testing.T) {
	w := newTrust(t)
	for _, ns := range []string{"billing", "taken", "empty"} {
		w.create(t, "/api/v1/namespaces", object{"metadata": object{"name": ns}})
	}
	w.label(t, "shop", true)
	first, second := newBundle(t, 1), newBundle(t, 2)
	if there, err := w.p.Published(t.Context(), first.TrustDomain); there || err != nil {
		t.Fatalf("before: %t, %v", there, err)
	}
	background(t, w.p.Run)
	for _, b := range []*ca.Bundle{first, second} {
		if err := w.p.Publish(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		w.becomes(t, "generation "+b.Generation.String(), func() bool { return w.holds(t, system, b) && w.holds(t, "shop", b) && w.trusts(t, b) })
	}
	if n := w.metric(t, "signet_bundle_reverts_total", "kind", "copy") + w.metric(t, "signet_bundle_reverts_total", "kind", "trust_bundle"); n != 0 {
		t.Errorf("%v changes are counted as somebody else's", n)
	}
	if err := w.Do(t.Context(), http.MethodGet, copyPath("billing"), nil, nil); err == nil {
		t.Error("a namespace without the label has a copy")
	}
	t.Run("init", func(t *testing.T) { // with nothing left but the ClusterTrustBundle
		p := w.publisher(t, w.open(t, "signet-ca"), "empty", w.log, nil)
		if there, err := p.Published(t.Context(), first.TrustDomain); !there || err != nil {
			t.Errorf("%t, %v", there, err)
		}
	})
	t.Run("labels", func(t *testing.T) { w.testLabels(t, second) })
	t.Run("foreign", func(t *testing.T) { w.testForeign(t, second) })
	t.Run("changed", func(t *testing.T) { w.testChanged(t, second) })
	t.Run("policy", func(t *testing.T) { w.testPolicy(t) })
	t.Run("replicas", func(t *testing.T) { w.testReplicas(t, first, second) })
	t.Run("absent", func(t *testing.T) { w.testAbsent(t, second) })
	t.Run("restarted", func(t *testing.T) {
		w.Restart(t)
		w.change(t, copyPath("shop"), func(o object) { o["data"] = object{} })
		w.remove(t, trustBundles+"/"+trustBundle)
		w.becomes(t, "put right", func() bool { return w.holds(t, "shop", second) && w.trusts(t, second) })
	})
	t.Run("many", func(t *testing.T) { w.testMany(t) })
}

func (w *trust) testLabels(t *testing.T, b *ca.Bundle) {
	gone := func() bool { return w.Do(t.Context(), http.MethodGet, copyPath("billing"), nil, nil) != nil }
	for range 2 {
		w.label(t, "billing", true)
		w.becomes(t, "labelled", func() bool { return w.holds(t, "billing", b) })
		w.label(t, "billing", false)
		w.becomes(t, "no longer labelled", gone)
	}
	w.label(t, "billing", true)
	w.becomes(t, "labelled", func() bool { return w.holds(t, "billing", b) })
	w.remove(t, "/api/v1/namespaces/billing") // nobody empties it here: it goes on ending
	w.becomes(t, "ending", gone)
	if n := w.metric(t, "signet_bundle_reverts_total", "kind", "copy"); n != 0 {
		t.Errorf("%v changes are counted as somebody else's", n)
	}
}

// testForeign has a ConfigMap of the bundle's name be there before the CA.
func (w *trust) testForeign(t *testing.T, b *ca.Bundle) {
	w.create(t, "/api/v1/namespaces/taken/configmaps", object{"metadata": object{"name": seen.BundleConfigMap}, "data": object{"mine": "1"}})
	mine := func() bool {
		var m struct{ Data map[string]string }
		err := w.Do(t.Context(), http.MethodGet, copyPath("taken"), nil, &m)
		return err == nil && len(m.Data) == 1 && m.Data["mine"] == "1"
	}
	w.label(t, "taken", true)
	w.becomes(t, "told", func() bool {
		return w.log.has("namespace=taken") && w.metric(t, "signet_bundle_copies", "state", "foreign") == 1
	})
	w.label(t, "taken", false)
	w.becomes(t, "no longer asked for", func() bool { return w.metric(t, "signet_bundle_copies", "state", "foreign") == 0 })
	w.label(t, "taken", true)
	w.becomes(t, "asked for", func() bool { return w.metric(t, "signet_bundle_copies", "state", "foreign") == 1 })
	// What came later in the one writer's line has been done, so this would have been as well.
	w.label(t, "empty", true)
	w.becomes(t, "another namespace", func() bool { return w.holds(t, "empty", b) })
	if !mine() {
		t.Error("somebody else's ConfigMap was changed")
	}
	w.remove(t, copyPath("taken"))
	w.becomes(t, "out of the way", func() bool { return w.holds(t, "taken", b) })
}

// testChanged changes each place behind the CA's back.
func (w *trust) testChanged(t *testing.T, b *ca.Bundle) {
	same, higher := w.documents(t, newBundle(t, 2)), w.documents(t, newBundle(t, 7))
	data := func(docs [2]string) func(object) {
		return func(o object) { o["data"] = object{seen.BundleJSON: docs[0], seen.BundlePEM: docs[1]} }
	}
	fixed := func(o object) { data(same)(o); o["immutable"] = true }
	spec := func(f func(annotations, spec object)) func(object) {
		return func(o object) { f(o["metadata"].(object)["annotations"].(object), o["spec"].(object)) }
	}
	for _, tc := range []struct {
		name, kind, path string
		change           func(object) // nil: it is deleted
		reason           api.Reason
	}{
		{"other roots", "copy", copyPath("shop"), data(same), api.BundleEquivocation},
		{"a higher generation", "copy", copyPath("shop"), data(higher), ""},
		{"nothing", "copy", copyPath("shop"), func(o object) { delete(o, "data") }, ""},
		{"more", "copy", copyPath("shop"), func(o object) { o["binaryData"] = object{"x": "AAAA"} }, ""},
		{"no annotation", "copy", copyPath("shop"), func(o object) { data(same)(o); delete(o["metadata"].(object), "annotations") }, ""},
		{"immutable", "copy", copyPath("shop"), fixed, ""},
		{"deleted", "copy", copyPath("shop"), nil, ""},
		{"other roots", "trust_bundle", trustBundles + "/" + trustBundle, spec(func(_, s object) { s["trustBundle"] = same[1] }), api.BundleEquivocation},
		{"a higher generation", "trust_bundle", trustBundles + "/" + trustBundle, spec(func(a, s object) { a["signet.dev/sequence"] = "99999999999"; s["trustBundle"] = same[1] }), ""},
		{"no annotation", "trust_bundle", trustBundles + "/" + trustBundle, spec(func(a, _ object) { clear(a) }), ""},
		{"deleted", "trust_bundle", trustBundles + "/" + trustBundle, nil, ""},
		{"immutable", "bundle", copyPath(system), fixed, api.BundleEquivocation},
	} {
		t.Run(tc.kind+" "+tc.name, func(t *testing.T) {
			before := w.metric(t, "signet_bundle_reverts_total", "kind", tc.kind)
			if tc.change == nil {
				w.remove(t, tc.path)
			} else {
				w.change(t, tc.path, tc.change)
			}
			w.becomes(t, "put right", func() bool {
				return w.holds(t, system, b) && w.holds(t, "shop", b) && w.trusts(t, b) && w.metric(t, "signet_bundle_reverts_total", "kind", tc.kind) > before
			})
			if tc.reason != "" && !w.log.has(string(tc.reason)) {
				t.Errorf("the log does not say %s", tc.reason)
			}
		})
	}
}

// testPolicy asks for more than is allowed, as the CA.
func (w *trust) testPolicy(t *testing.T) {
	client := w.open(t, "signet-ca")
	n := 0
	w.becomes(t, "ConfigMaps of other names are refused", func() bool { // a policy is not heeded at once
		n++
		_, err := client.WriteConfigMap(t.Context(), kube.ConfigMap{Namespace: "shop", Name: fmt.Sprint("other-", n)})
		return errors.Is(err, kube.ErrForbidden) && strings.Contains(err.Error(), "nothing but its bundle")
	})
	pemDoc := w.documents(t, newBundle(t, 1))[1]
	for _, b := range []kube.TrustBundle{
		{Name: "everybody", PEM: pemDoc},
		{Name: trustBundle + ".more", Signer: seen.TrustBundleSigner, PEM: pemDoc},
		{Name: "example.com:other:x", Signer: "example.com/other", PEM: pemDoc},
	} {
		if _, err := client.WriteTrustBundle(t.Context(), b); !errors.Is(err, kube.ErrForbidden) {
			t.Errorf("%s: %v", b.Name, err)
		}
	}
	if _, err := client.Get(t.Context(), kube.ConfigMaps, "kube-system", "kube-root-ca.crt"); !errors.Is(err, kube.ErrForbidden) {
		t.Errorf("another ConfigMap: %v", err)
	}
}

// testReplicas adds a replica that is behind, and one that is not.
func (w *trust) testReplicas(t *testing.T, first, second *ca.Bundle) {
	behind := w.publisher(t, w.open(t, "signet-ca"), system, &lines{}, nil)
	background(t, behind.Run)
	if err := behind.Publish(t.Context(), first); api.ReasonOf(err) != api.BundleRollback {
		t.Errorf("a replica that is behind: %v", err)
	}
	before := w.metric(t, "signet_bundle_reverts_total", "kind", "copy")
	beside := w.publisher(t, w.open(t, "signet-ca"), system, &lines{}, nil)
	background(t, beside.Run)
	third := newBundle(t, 3)
	for _, p := range []*seen.KubePublisher{beside, w.p, behind} { // one has the news first
		if err := p.Publish(t.Context(), third); err != nil {
			t.Fatal(err)
		}
		w.becomes(t, "the next generation", func() bool { return w.holds(t, "shop", third) && w.holds(t, "taken", third) && w.trusts(t, third) })
	}
	if n := w.metric(t, "signet_bundle_reverts_total", "kind", "copy") - before; n != 0 {
		t.Errorf("%v writes of another replica are counted as somebody else's", n)
	}
	*second = *third
}

// testAbsent speaks to the same cluster as if it were an older one.
func (w *trust) testAbsent(t *testing.T, b *ca.Bundle) {
	target, err := url.Parse(w.URL)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	roots, err := os.ReadFile(w.CAFile)
	if err != nil || !pool.AppendCertsFromPEM(roots) {
		t.Fatal("no roots", err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig.RootCAs = pool
	t.Cleanup(transport.CloseIdleConnections)
	proxy.Transport, proxy.FlushInterval, proxy.ErrorLog = transport, -1, slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	s := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		r.URL.Path = strings.Replace(r.URL.Path, "/certificates.k8s.io/v1/", "/certificates.k8s.io/v0/", 1) // unknown to it
		proxy.ServeHTTP(rw, r)
	}))
	t.Cleanup(s.Close)
	t.Cleanup(s.CloseClientConnections)
	cert := filepath.Join(t.TempDir(), "proxy.crt")
	if err := os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	older := &controlplane.ControlPlane{URL: s.URL, CAFile: cert, Dir: t.TempDir()}
	client, err := kube.Open(kube.Config{
		Kubeconfig: older.Kubeconfig(t, "older", fmt.Sprintf(`{"tokenFile": %q}`, w.tokenFile(t, "signet-ca"))), UserAgent: "signet-ca/test", Timeout: time.Minute,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	log, one := &lines{}, &trust{cluster: w.cluster, log: w.log, metrics: seen.NewMetrics()}
	p := w.publisher(t, client, system, log, one.metrics)
	background(t, p.Run)
	if there, err := w.publisher(t, client, "kube-public", log, nil).Published(t.Context(), b.TrustDomain); there || err != nil {
		t.Errorf("init: %t, %v", there, err)
	}
	if err := p.Publish(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	w.becomes(t, "told", func() bool { return log.has("knows no ClusterTrustBundles") })
	w.remove(t, copyPath("shop"))
	w.becomes(t, "the rest goes on", func() bool {
		return w.holds(t, "shop", b) && one.metric(t, "signet_bundle_copies", "state", "current") > 0
	})
	if n := one.metric(t, "signet_bundle_write_failures_total", "kind", "trust_bundle"); n != 0 || log.count("knows no ClusterTrustBundles") != 1 {
		t.Errorf("%v failures, told %d times", n, log.count("knows no ClusterTrustBundles"))
	}
}

// testMany has more namespaces ask than can be served at once.
func (w *trust) testMany(t *testing.T) {
	const n = 100
	for i := range n {
		w.create(t, "/api/v1/namespaces", object{"metadata": object{"name": fmt.Sprint("many-", i), "labels": object{seen.CopiesLabel: "true"}}})
	}
	current := func() bool {
		return w.metric(t, "signet_bundle_copies", "state", "current") == n+3 && w.metric(t, "signet_bundle_copies", "state", "outdated") == 0
	}
	w.becomes(t, "all have copies", current)
	next := newBundle(t, 4)
	start := time.Now()
	if err := w.p.Publish(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	w.change(t, copyPath("shop"), func(o object) { o["data"] = object{} })
	w.becomes(t, "a change of one while all are behind", func() bool { return w.holds(t, "shop", next) })
	w.becomes(t, "all have the next", func() bool { return current() && w.holds(t, "many-7", next) })
	if took := time.Since(start); took < n*time.Second/50 {
		t.Errorf("%d namespaces within %v: that is a flood", n, took)
	}
	if n := w.metric(t, "signet_bundle_write_failures_total", "cause", "throttled"); n != 0 {
		t.Errorf("the API server had too much to do %v times", n)
	}
}
