package main

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/ca/catest"
)

// lookAt runs check against c and returns what it says, with the exit code.
func lookAt(t *testing.T, c *fakeCluster, args ...string) (r checkReport, code int, talk string) {
	t.Helper()
	path, err := c.kubeconfig(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	a, stdout, stderr := newTestApp(nil)
	code = a.main(append([]string{"signet", "check", "--kubeconfig", path, "-o", "json"}, args...))
	if stdout.Len() > 0 {
		if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
			t.Fatalf("%v in %s", err, stdout)
		}
	}
	return r, code, stderr.String()
}

// rows returns those of one check.
func (r *checkReport) rows(check string) (rows []*checkRow) {
	for _, row := range r.Items {
		if row.Metadata.Name == check {
			rows = append(rows, row)
		}
	}
	return rows
}

func TestCheckGood(t *testing.T) {
	c := newCluster(t)
	defer c.Close()
	r, code, talk := lookAt(t, c)
	for _, row := range r.Items {
		if row.Result != resultGood {
			t.Errorf("%s %s is %s: %s", row.Metadata.Name, row.Object, row.Result, row.Found)
		}
	}
	if code != exitGood || talk != "" || r.TrustDomain != "cluster.local" || r.Generation != "1.4" || r.Result != resultGood {
		t.Errorf("exit code %d, %q, %s %s %s", code, talk, r.TrustDomain, r.Generation, r.Result)
	}
	for _, check := range []string{
		"api-server", "version", "clock", "namespace", "configuration", "csi-driver", "ca", "state", "service", "agents", "nodes", "upgrade",
		"bundle", "roots", "copies", "trust-bundle", "permissions", "operators", "shared-socket", "inline-volumes", "pods", "read-only",
	} {
		if len(r.rows(check)) == 0 {
			t.Errorf("nothing is said of %s", check)
		}
	}
}

// Each row breaks one thing of an installation that is good; the check that is for it must say so.
func TestCheckBroken(t *testing.T) {
	const web, agent2 = "/api/v1/namespaces/shop/pods/web-1", sys + "/pods/signet-agent-2"
	forbidden := func(path string) func(*testing.T, *fakeCluster) {
		return func(_ *testing.T, c *fakeCluster) {
			c.answer(path, func(w http.ResponseWriter) { c.fail(w, 403, "no") })
		}
	}
	spec := func(value any, field string) func(*testing.T, *fakeCluster) {
		return func(_ *testing.T, c *fakeCluster) { c.set(pathDriver, value, "spec", field) }
	}
	agentYAML := func(more string) func(*testing.T, *fakeCluster) {
		return func(_ *testing.T, c *fakeCluster) {
			c.set(sys+"/configmaps/signet-agent", "trustDomain: cluster.local\n"+more, "data", "agent.yaml")
		}
	}
	const policy = `{apiVersion: admissionregistration.k8s.io/v1, kind: ValidatingAdmissionPolicy, metadata: {name: signet-shared-socket}, spec: {failurePolicy: %s}}`
	const binding = `{apiVersion: admissionregistration.k8s.io/v1, kind: ValidatingAdmissionPolicyBinding, metadata: {name: signet-shared-socket}, spec: {policyName: signet-shared-socket, validationActions: [%s]}}`
	tests := []struct {
		name   string
		change func(*testing.T, *fakeCluster)
		check  string
		result string
		found  string // some row says so
		do     string // and this to do
	}{
		{"too old for node claims", func(_ *testing.T, c *fakeCluster) { c.minor = "29" }, "version", resultBad, "NODE_UNVERIFIABLE", "1.30"},
		{"too old for tokens in secrets", func(_ *testing.T, c *fakeCluster) { c.minor = "34+" }, "version", resultWarning, "serviceAccountTokenInSecrets came with 1.35", "1.35"},
		{"a version from elsewhere", func(_ *testing.T, c *fakeCluster) { c.minor = "x" }, "version", resultUnknown, "not known here", "kubectl"},
		{"clock", func(_ *testing.T, c *fakeCluster) { c.now = testNow.Add(30 * time.Second) }, "clock", resultWarning, "30s apart", "timedatectl"},
		{"clock far off", func(_ *testing.T, c *fakeCluster) { c.now = testNow.Add(-2 * time.Minute) }, "clock", resultBad, "1m59s apart", "timedatectl"},
		{"no clock", func(_ *testing.T, c *fakeCluster) { c.now = time.Time{} }, "clock", resultUnknown, "does not say", ""},
		{"not installed", func(_ *testing.T, c *fakeCluster) { c.play("empty") }, "installed", resultBad, "not installed", "signet install | kubectl --kubeconfig"},
		{"namespace locked", func(_ *testing.T, c *fakeCluster) {
			c.set(strings.TrimSuffix(sys, "/"), "restricted", "metadata", "labels", labelEnforce)
		}, "namespace", resultBad, "enforces restricted", "=privileged"},
		{"namespaces forbidden", forbidden("/api/v1/namespaces"), "namespace", resultUnknown, "may not list namespaces", "auth can-i"},
		{"no configuration", func(_ *testing.T, c *fakeCluster) { c.remove(sys + "/configmaps/signet-ca") }, "configuration", resultBad, "not there", "signet install"},
		{"two trust domains", func(_ *testing.T, c *fakeCluster) {
			c.set(sys+"/configmaps/signet-agent", "trustDomain: other.example", "data", "agent.yaml")
		}, "configuration", resultBad, "other.example", "signet install"},
		{"no YAML", func(_ *testing.T, c *fakeCluster) {
			c.set(sys+"/configmaps/signet-ca", "\t{", "data", "ca.yaml")
		}, "configuration", resultBad, "does not parse", "get configmap signet-ca"},

		{"no driver", func(_ *testing.T, c *fakeCluster) { c.remove(pathDriver) }, "csi-driver", resultBad, "no such object", "signet install"},
		{"attachRequired", spec(true, "attachRequired"), "csi-driver", resultBad, "attachRequired", "signet install"},
		{"attachRequired by default", spec(nil, "attachRequired"), "csi-driver", resultBad, "attachRequired", "signet install"},
		{"podInfoOnMount", spec(false, "podInfoOnMount"), "csi-driver", resultBad, "podInfoOnMount", ""},
		{"requiresRepublish", spec(nil, "requiresRepublish"), "csi-driver", resultBad, "requiresRepublish", ""},
		{"fsGroupPolicy", spec("File", "fsGroupPolicy"), "csi-driver", resultBad, "fsGroupPolicy", ""},
		{"lifecycle", spec([]any{"Persistent", "Ephemeral"}, "volumeLifecycleModes"), "csi-driver", resultBad, "[Ephemeral]", ""},
		{"tokens elsewhere", spec(nil, "serviceAccountTokenInSecrets"), "csi-driver", resultBad, "serviceAccountTokenInSecrets", ""},
		{"another audience", spec([]any{object{"audience": "signet:other.example"}}, "tokenRequests"), "csi-driver", resultBad, "TOKEN_AUDIENCE", ""},
		{"no tokens", spec(nil, "tokenRequests"), "csi-driver", resultBad, `"signet:cluster.local"`, ""},
		{"driver forbidden", forbidden(pathDriver), "csi-driver", resultUnknown, "may not read CSIDrivers", "auth can-i"},
		{"OpenShift", func(_ *testing.T, c *fakeCluster) {
			c.answer("/apis/security.openshift.io", func(w http.ResponseWriter) { c.send(w, 200, object{"kind": "APIGroup"}) })
			c.set("/api/v1/namespaces/shop", "restricted", "metadata", "labels", labelEnforce)
			c.set(pathDriver, nil, "metadata", "labels", labelProfile)
		}, "inline-volumes", resultBad, "in shop", "=restricted"},

		{"no CA", func(_ *testing.T, c *fakeCluster) { c.remove(pathStatefulSet) }, "ca", resultBad, "not there", "signet install"},
		{"CA scaled away", func(_ *testing.T, c *fakeCluster) { c.set(pathStatefulSet, 0, "spec", "replicas") }, "ca", resultBad, "scaled to 0", "--replicas=1"},
		{"CA crashes", func(_ *testing.T, c *fakeCluster) {
			c.set(pathStatefulSet, 0, "status", "readyReplicas")
			c.set(sys+"/pods/signet-ca-0", object{"phase": "Pending", "initContainerStatuses": []any{object{
				"name": "init", "state": object{"waiting": object{"reason": "CrashLoopBackOff", "message": "back-off 10s"}},
				"lastState": object{"terminated": object{"exitCode": 1, "reason": "Error", "message": "starting\nerror SGN-0812: a bundle is already published\n"}},
			}}}, "status")
		}, "ca", resultBad, "CrashLoopBackOff: back-off 10s; before, it ended with exit code 1, Error: error SGN-0812: a bundle is already published", "logs signet-ca-0 -c init --previous"},
		{"CA has no node", func(_ *testing.T, c *fakeCluster) {
			c.set(sys+"/pods/signet-ca-0", object{"phase": "Pending", "conditions": []any{object{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}}}, "status")
		}, "ca", resultBad, "Unschedulable: 0/2 nodes", "describe pod"},
		{"an old template", func(_ *testing.T, c *fakeCluster) { c.set(pathStatefulSet, 0, "status", "updatedReplicas") }, "ca", resultBad, "0 of the newest template", "describe statefulset"},
		{"not observed", func(_ *testing.T, c *fakeCluster) {
			c.set(pathDaemonSet, 5, "metadata", "generation")
		}, "agents", resultBad, "2 of 2 pods ready", "describe daemonset"},
		{"no pod may be made", func(_ *testing.T, c *fakeCluster) {
			c.remove(sys + "/pods/signet-agent-1")
			c.remove(agent2)
			c.set(pathDaemonSet, 0, "status", "numberReady")
			c.event(pathDaemonSet, "FailedCreate", "violates PodSecurity")
		}, "agents", resultBad, "FailedCreate: violates PodSecurity", "describe"},
		{"evicted", func(_ *testing.T, c *fakeCluster) {
			c.set(agent2, object{"phase": "Failed", "reason": "Evicted", "message": "disk"}, "status")
		}, "agents", resultBad, "Evicted: disk", "describe"},
		{"killed", func(_ *testing.T, c *fakeCluster) {
			c.set(agent2, []any{object{"name": "agent", "state": object{"running": object{}}, "lastState": object{"terminated": object{"exitCode": 137, "signal": 9, "reason": "OOMKilled"}}}}, "status", "containerStatuses")
			c.set(agent2, []any{}, "status", "conditions")
		}, "agents", resultBad, "signal 9, OOMKilled", "--previous"},
		{"probe fails", func(_ *testing.T, c *fakeCluster) {
			c.set(agent2, []any{}, "status", "conditions")
			c.event(agent2, "Unhealthy", "Readiness probe failed: 503")
		}, "agents", resultBad, "Unhealthy: Readiness probe failed: 503", "describe"},
		{"no event", func(_ *testing.T, c *fakeCluster) {
			c.set(agent2, []any{}, "status", "conditions")
			c.set(agent2, []any{object{"name": "agent", "state": object{"running": object{}}}}, "status", "containerStatuses")
		}, "agents", resultBad, "runs and is not ready", "logs signet-agent-2 -c agent"},
		{"claim pending", func(_ *testing.T, c *fakeCluster) {
			c.set(sys+"/persistentvolumeclaims/state-signet-ca-0", "Pending", "status", "phase")
			c.event(sys+"/persistentvolumeclaims/state-signet-ca-0", "ProvisioningFailed", "no volume plugin")
		}, "state", resultBad, "ProvisioningFailed: no volume plugin; it names no storage class", "describe"},
		{"claim gone", func(_ *testing.T, c *fakeCluster) { c.remove(sys + "/persistentvolumeclaims/seal-signet-ca-0") }, "state", resultBad, "no such claim", ""},
		{"claim going", func(_ *testing.T, c *fakeCluster) {
			c.set(sys+"/persistentvolumeclaims/seal-signet-ca-0", "2026-11-24T11:00:00Z", "metadata", "deletionTimestamp")
		}, "state", resultBad, "root's key would go", "backup"},
		{"no service", func(_ *testing.T, c *fakeCluster) { c.remove(sys + "/services/signet-ca") }, "service", resultBad, "not there", ""},
		{"another port", func(_ *testing.T, c *fakeCluster) {
			c.set(sys+"/services/signet-ca", []any{object{"port": 443}}, "spec", "ports")
		}, "service", resultBad, "no port 8443", ""},
		{"no endpoint", func(_ *testing.T, c *fakeCluster) { c.remove(pathSlices + "signet-ca-1") }, "service", resultBad, "no pod is behind it", ""},
		{"endpoint not ready", func(_ *testing.T, c *fakeCluster) {
			c.set(pathSlices+"signet-ca-1", []any{object{"conditions": object{"ready": false}}}, "endpoints")
		}, "service", resultBad, "none of the 1 pod behind it is ready", ""},

		{"node without an agent", func(_ *testing.T, c *fakeCluster) { c.remove(agent2) }, "nodes", resultBad, "no agent", ""},
		{"node with an agent that is not ready", func(_ *testing.T, c *fakeCluster) {
			c.set(agent2, []any{}, "status", "conditions")
		}, "nodes", resultBad, "agent is not ready", "logs signet-agent-2"},
		{"not registered", func(_ *testing.T, c *fakeCluster) {
			c.set("/apis/storage.k8s.io/v1/csinodes/node-2", []any{}, "spec", "drivers")
		}, "nodes", resultBad, "--root-dir", "logs"},
		{"node down", func(_ *testing.T, c *fakeCluster) {
			c.set("/api/v1/nodes/node-2", []any{}, "status", "conditions")
		}, "nodes", resultWarning, "node itself", "describe node node-2"},

		{"no bundle", func(_ *testing.T, c *fakeCluster) { c.remove(pathBundle) }, "bundle", resultBad, "not published", "logs statefulset/signet-ca"},
		{"no JSON", func(_ *testing.T, c *fakeCluster) { c.set(pathBundle, "{", "data", bundleJSON) }, "bundle", resultBad, "bundle.json is missing or does not parse", ""},
		{"no PEM", func(_ *testing.T, c *fakeCluster) { c.set(pathBundle, nil, "data", bundlePEM) }, "bundle", resultBad, "bundle.pem is missing", ""},
		{"no roots", func(_ *testing.T, c *fakeCluster) {
			c.set(pathBundle, `{"keys":[],"spiffe_sequence":1}`, "data", bundleJSON)
		}, "bundle", resultBad, "bundle.json and bundle.pem hold different roots", ""},
		{"root of another", func(t *testing.T, c *fakeCluster) {
			root, _ := selfSigned(t, "spiffe://cluster.local", testNow.AddDate(5, 0, 0))
			c.set(pathBundle, pemOf(root), "data", bundlePEM)
		}, "bundle", resultBad, "different roots", ""},
		{"roots end soon", func(t *testing.T, c *fakeCluster) { c.publish(t, 100*24*time.Hour) }, "roots", resultWarning, "root 71717171 expires in 100d", "authority list"},
		{"roots end at once", func(t *testing.T, c *fakeCluster) { c.publish(t, 24*time.Hour) }, "roots", resultBad, "expires in 24h", ""},
		{"roots ended", func(t *testing.T, c *fakeCluster) { c.publish(t, -time.Hour) }, "roots", resultBad, "expired 60m ago", ""},
		{"no copy", func(_ *testing.T, c *fakeCluster) { c.remove("/api/v1/namespaces/shop/configmaps/signet-bundle") }, "copies", resultBad, "no copy", ""},
		{"old copy", func(_ *testing.T, c *fakeCluster) {
			c.set("/api/v1/namespaces/shop/configmaps/signet-bundle", "x", "data", bundlePEM)
		}, "copies", resultBad, "outdated", ""},
		{"foreign copy", func(_ *testing.T, c *fakeCluster) {
			c.set("/api/v1/namespaces/shop/configmaps/signet-bundle", nil, "metadata", "annotations")
		}, "copies", resultBad, "no copy of ours", ""},
		{"copies are off", func(_ *testing.T, c *fakeCluster) {
			c.remove("/api/v1/namespaces/shop/configmaps/signet-bundle")
			c.set(sys+"/configmaps/signet-ca", "trustDomain: cluster.local", "data", "ca.yaml")
		}, "copies", resultWarning, "told to make no copies", "copies: true"},
		{"no trust bundle", func(_ *testing.T, c *fakeCluster) {
			c.answer("/apis/certificates.k8s.io/v1", func(w http.ResponseWriter) {
				c.send(w, 200, object{"resources": []any{object{"name": "clustertrustbundles"}}})
			})
		}, "trust-bundle", resultBad, "there is none", "logs"},
		{"another trust bundle", func(t *testing.T, c *fakeCluster) {
			root, _ := selfSigned(t, "spiffe://cluster.local", testNow.AddDate(5, 0, 0))
			c.mu.Lock()
			defer c.mu.Unlock()
			c.add(object{"apiVersion": "certificates.k8s.io/v1", "kind": "ClusterTrustBundle", "metadata": object{"name": "signet.dev:bundle:cluster.local"},
				"spec": object{"signerName": "signet.dev/bundle", "trustBundle": pemOf(root)}})
		}, "trust-bundle", resultBad, "not those of the published bundle", ""},
		{"a right is missing", func(_ *testing.T, c *fakeCluster) {
			c.may = func(a map[string]string) bool { return a["resource"] == "pods" && a["verb"] == "get" }
		}, "permissions", resultBad, "may not create tokenreviews.authentication.k8s.io, list pods", "signet install"},
		{"too many rights", func(_ *testing.T, c *fakeCluster) {
			c.may = func(map[string]string) bool { return true }
		}, "permissions", resultWarning, "get nodes/proxy", "clusterrolebindings"},
		{"no role of operators", func(_ *testing.T, c *fakeCluster) { c.remove(people + "/serviceaccounts/emergency") }, "operators", resultBad, "nobody can come as emergency", "signet install"},
		{"a pod among operators", func(_ *testing.T, c *fakeCluster) {
			c.put("apiVersion: v1\nkind: Pod\nmetadata: {namespace: signet-operators, name: mole}\n")
		}, "operators", resultBad, "mole", "get pods"},
		{"no policy against pods", func(_ *testing.T, c *fakeCluster) {
			c.remove("/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/signet-operators")
		}, "operators", resultWarning, "nothing keeps pods out", "signet install"},
		{"a policy that only warns", func(_ *testing.T, c *fakeCluster) {
			c.set("/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings/signet-operators", []any{"Warn"}, "spec", "validationActions")
		}, "operators", resultWarning, "does not deny", "signet install"},
		{"everybody an operator", func(_ *testing.T, c *fakeCluster) {
			c.put("{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {namespace: signet-operators, name: all}, " +
				"roleRef: {kind: ClusterRole, name: signet-viewer}, subjects: [{kind: Group, name: 'system:authenticated'}]}")
		}, "operators", resultBad, "group system:authenticated may have tokens of viewer, by signet-operators/rolebinding/all", "-n signet-operators get rolebinding all"},
		{"every pod may exec", func(_ *testing.T, c *fakeCluster) {
			c.minor = "34"
			c.put("{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: debugger}, rules: [{apiGroups: [''], resources: ['pods/*', '*/exec'], verbs: [get]}]}")
			c.put("{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: debuggers}, " +
				"roleRef: {kind: ClusterRole, name: debugger}, subjects: [{kind: Group, name: 'system:serviceaccounts'}]}")
		}, "operators", resultBad, "has every role there, by clusterrolebinding/debuggers", "get clusterrolebinding debuggers"},
		{"a role in the whole cluster", func(_ *testing.T, c *fakeCluster) {
			c.put("{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: wide}, " +
				"roleRef: {kind: ClusterRole, name: signet-operator}, subjects: [{kind: User, name: alice}]}")
		}, "operators", resultWarning, "it binds signet-operator in the whole cluster", "get clusterrolebinding wide"},
		{"no look at bindings", forbidden("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"), "operators", resultUnknown, "list ClusterRoleBindings, which say who", ""},
		{"no reviews of oneself", forbidden("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"), "operators", resultUnknown, "SelfSubjectAccessReviews", ""},
		{"no reviews", forbidden("/apis/authorization.k8s.io/v1/subjectaccessreviews"), "permissions", resultUnknown, "SubjectAccessReviews", ""},

		{"shared socket alone", agentYAML("sharedSocket: /run/signet/shared/agent.sock"), "shared-socket", resultBad, "collects its neighbours' tokens", "agent.sharedSocket"},
		{"shared socket, lax", func(t *testing.T, c *fakeCluster) {
			agentYAML("sharedSocket: /x")(t, c)
			c.put(policy, "Ignore")
		}, "shared-socket", resultBad, "failurePolicy is Ignore", ""},
		{"shared socket, only warned", func(t *testing.T, c *fakeCluster) {
			agentYAML("sharedSocket: /x")(t, c)
			c.put(policy, "Fail")
			c.put(binding, "Warn")
		}, "shared-socket", resultBad, "does not deny", ""},

		{"the upstream does not sign", func(_ *testing.T, c *fakeCluster) { c.admin.play("unready") }, "upstream", resultBad, "disk WOULD NOT SIGN since 2026-11-24T11:00:00Z: SGN-", "signet explain SGN-"},
		{"the upstream was not asked", func(_ *testing.T, c *fakeCluster) { c.admin.play("empty") }, "upstream", resultUnknown, "disk was not asked yet", "signet check"},
		{"the upstream has another root", func(_ *testing.T, c *fakeCluster) { c.admin.play("announcing") }, "upstream", resultWarning, "no rotation has taken up: 73737373", "signet rotate plan --kubeconfig"},
		{"the CA is older", func(_ *testing.T, c *fakeCluster) { c.admin.play("shop") }, "upstream", resultWarning, "earlier version", "signet version --server"},
		{"the CA does not answer", func(_ *testing.T, c *fakeCluster) { c.admin.play("starting") }, "upstream", resultUnknown, "asked in vain: the CA is starting", "exec -n signet-system signet-ca-0"},
		{"no port forwarded", forbidden(sys + "/pods/signet-ca-0/portforward"), "upstream", resultUnknown, "may not forward a port", "create rolebinding signet-viewer"},
		{"no viewer", func(_ *testing.T, c *fakeCluster) {
			was := c.may
			c.may = func(a map[string]string) bool { return was(a) && a["user"] != "" }
		}, "upstream", resultWarning, "not asked: you may not come as viewer", "-n signet-operators --clusterrole signet-viewer"},
		{"no port for operators", func(_ *testing.T, c *fakeCluster) {
			c.set(sys+"/configmaps/signet-ca", "trustDomain: cluster.local", "data", "ca.yaml")
		}, "upstream", resultWarning, "not asked: it has no port for operators", "signet version --server"},

		{"pod waits", func(_ *testing.T, c *fakeCluster) { c.waits(web, "no such driver") }, "pods", resultBad, "FailedMount: no such driver (node node-1)", "-n shop describe pod web-1"},
		{"pod does not go", func(_ *testing.T, c *fakeCluster) {
			c.set(web, "2026-11-24T11:00:00Z", "metadata", "deletionTimestamp")
		}, "pods", resultBad, "should be gone since 60m", "describe"},
		{"writable", func(_ *testing.T, c *fakeCluster) {
			c.set(web, []any{object{"name": "id", "csi": object{"driver": driverName}}}, "spec", "volumes")
		}, "read-only", resultBad, "not readOnly", "readOnly: true"},
		{"pods forbidden", forbidden("/api/v1/pods"), "pods", resultUnknown, "may not list the pods", "auth can-i"},
		{"pods broken off", func(_ *testing.T, c *fakeCluster) {
			c.answer("/api/v1/pods", func(w http.ResponseWriter) {
				w.Header().Set("Content-Type", "application/json")
				w.Write([]byte(`{"items":[{"metadata":{"name":"x"}}`))
			})
		}, "pods", resultUnknown, "in vain", "signet check"},
		{"pods without end", func(_ *testing.T, c *fakeCluster) {
			c.answer("/api/v1/pods", func(w http.ResponseWriter) {
				w.Header().Set("Content-Type", "application/json")
				w.Write([]byte(`{"items":[{"metadata":{"name":"` + strings.Repeat("x", 9<<20) + `"}}]}`))
			})
		}, "pods", resultUnknown, "above", ""},
		{"elsewhere", func(_ *testing.T, c *fakeCluster) {
			c.answer("/api/v1/pods", func(w http.ResponseWriter) {
				w.Header().Set("Location", "https://elsewhere.example")
				w.WriteHeader(302)
			})
		}, "pods", resultUnknown, "redirects", ""},
		{"of other types", func(_ *testing.T, c *fakeCluster) {
			c.answer("/api/v1/nodes", func(w http.ResponseWriter) { c.send(w, 200, object{"items": []any{"x", 1}}) })
		}, "nodes", resultUnknown, "in vain", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t)
			defer c.Close()
			tt.change(t, c)
			r, code, _ := lookAt(t, c)
			said := false
			for _, row := range r.rows(tt.check) {
				said = said || row.Result == tt.result && strings.Contains(row.Found, tt.found) && strings.Contains(row.Do, tt.do)
			}
			if !said {
				data, _ := json.MarshalIndent(r.rows(tt.check), "", " ")
				t.Errorf("no row of %s is %s and says %q, do %q:\n%s", tt.check, tt.result, tt.found, tt.do, data)
			}
			if code != exitFindings && tt.result != resultWarning {
				t.Errorf("exit code %d, want %d", code, exitFindings)
			}
			for _, row := range r.Items {
				if row.Result != resultGood && row.Do == "" {
					t.Errorf("%s is %s, and nothing is said to do", row.Metadata.Name, row.Result)
				}
			}
		})
	}
}

// What is young, finished or of others is not stuck.
func TestCheckNotStuck(t *testing.T) {
	const web = "/api/v1/namespaces/shop/pods/web-1"
	for name, change := range map[string]func(*fakeCluster){
		"young": func(c *fakeCluster) {
			c.waits(web, "x")
			c.set(web, testNow.Add(-10*time.Second).Format(time.RFC3339), "metadata", "creationTimestamp")
		},
		"being deleted in time": func(c *fakeCluster) {
			c.set(web, testNow.Add(10*time.Second).Format(time.RFC3339), "metadata", "deletionTimestamp")
		},
		"finished":   func(c *fakeCluster) { c.set(web, object{"phase": "Succeeded"}, "status") },
		"no node":    func(c *fakeCluster) { c.waits(web, "x"); c.set(web, nil, "spec", "nodeName") },
		"of another": func(c *fakeCluster) { c.waits(c.pod("shop", "db", "node-1", "db", "csi.example"), "x") },
		"pulls its image": func(c *fakeCluster) {
			c.waits(web, "x")
			c.set(web, []any{object{"type": "PodReadyToStartContainers", "status": "True"}}, "status", "conditions")
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			defer c.Close()
			change(c)
			r, code, _ := lookAt(t, c)
			for _, row := range r.rows("pods") {
				if row.Result != resultGood {
					t.Errorf("%s: %s", row.Object, row.Found)
				}
			}
			if code != exitGood {
				t.Errorf("exit code %d", code)
			}
		})
	}
}

// A thousand of the same thing are named in part and counted.
func TestCheckMany(t *testing.T) {
	c := newCluster(t)
	defer c.Close()
	for range 3 {
		c.waits(c.pod("shop", "web-"+strings.Repeat("x", len(c.objects)), "node-1", "web", driverName), "x")
	}
	for n := range 40 {
		p := c.pod("shop", "w"+strings.Repeat("y", n), "node-1", "web", driverName)
		c.waits(p, strings.Repeat("long ", 1000))
		c.set(p, []any{object{"name": "id", "csi": object{"driver": driverName}}}, "spec", "volumes")
	}
	r, _, _ := lookAt(t, c)
	for check, want := range map[string]string{"pods": "and 33 pods more are stuck", "read-only": "and 30 pods more"} {
		rows := r.rows(check)
		if len(rows) != maxNamed+1 || rows[maxNamed].Found != want {
			t.Errorf("%s: %d rows, the last %q", check, len(rows), rows[len(rows)-1].Found)
		}
		for _, row := range rows {
			if len(row.Found) > 3*maxFound {
				t.Errorf("%s says %d bytes", check, len(row.Found))
			}
		}
	}
}

// --wait ends when the last thing is good, and tells what it waited for.
func TestCheckWait(t *testing.T) {
	c := newCluster(t)
	defer c.Close()
	c.remove(pathBundle)
	looks := 0
	c.answer("/version", func(w http.ResponseWriter) {
		switch looks++; looks {
		case 1:
			c.fail(w, 503, "starting")
			return
		case 4: // the lock is held: not publish
			delete(c.answers, pathBundle)
		}
		c.send(w, 200, object{"major": "1", "minor": "37", "gitVersion": "v1.37.2"})
	})
	c.mu.Lock()
	data := c.objects["/api/v1/namespaces/shop/configmaps/signet-bundle"]["data"]
	c.add(object{"apiVersion": "v1", "kind": "ConfigMap", "metadata": object{"name": bundleName, "namespace": "signet-system"}, "data": data})
	c.mu.Unlock()
	c.answer(pathBundle, func(w http.ResponseWriter) { c.fail(w, 404, "not yet") })
	r, code, talk := lookAt(t, c, "--wait=1m")
	if code != exitGood || r.Result != resultGood || looks != 4 {
		t.Fatalf("exit code %d, %s after %d looks:\n%s", code, r.Result, looks, talk)
	}
	var states []string
	for line := range strings.Lines(talk) {
		var l struct{ State, What, Found string }
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatalf("%v in %q", err, line)
		}
		states = append(states, l.State+" "+l.What)
	}
	want := "waiting api-server, waiting bundle signet-system/configmap/signet-bundle, good api-server, good bundle signet-system/configmap/signet-bundle"
	if got := strings.Join(states, ", "); got != want {
		t.Errorf("told %s", got)
	}
}

// What waiting cannot change is not waited for.
func TestCheckWaitSettled(t *testing.T) {
	c := newCluster(t)
	defer c.Close()
	c.play("forbidden")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, code, talk := lookAt(t, c, "--wait=10m"); code != exitFindings || ctx.Err() != nil {
		t.Errorf("exit code %d: %s", code, talk)
	}
}

func TestKubectlLine(t *testing.T) {
	k := &kubeFlags{kubeconfig: "/a b/it's", context: "prod", namespace: "id"}
	if got, want := k.kubectl("-n", "shop", "delete", "pod", "x;reboot", "-l", "$(reboot)", "--token=x"),
		`kubectl --kubeconfig '/a b/it'\''s' --context prod -n shop delete pod NAME -l NAME NAME`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got, want := k.signet("check", "--wait"), `signet check --kubeconfig '/a b/it'\''s' --context prod --wait -n id`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// people is the namespace of the operators' ServiceAccounts.
const people = "/api/v1/namespaces/signet-operators"

// check says as which role one may come, who else may, who may exec, and which break-glass certificate ends.
func TestCheckOperators(t *testing.T) {
	c := newCluster(t)
	defer c.Close()
	const rbac = "apiVersion: rbac.authorization.k8s.io/v1\n"
	for _, text := range []string{`kind: RoleBinding
metadata: {namespace: signet-operators, name: on-call}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: signet-operator}
subjects: [{kind: Group, name: sre}, {kind: ServiceAccount, namespace: ci, name: bot}]
`, `kind: RoleBinding
metadata: {namespace: shop, name: elsewhere}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: signet-emergency}
subjects: [{kind: User, name: shopkeeper}]
`, `kind: ClusterRole
metadata: {name: cluster-admin}
rules: [{apiGroups: ["*"], resources: ["*"], verbs: ["*"]}, {nonResourceURLs: ["*"], verbs: ["*"]}]
`, `kind: ClusterRoleBinding
metadata: {name: cluster-admin}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}
subjects: [{kind: Group, name: "system:masters"}]
`, `kind: Role
metadata: {namespace: signet-system, name: debug}
rules: [{apiGroups: [""], resources: [pods/ephemeralcontainers], verbs: [patch]}]
`, `kind: RoleBinding
metadata: {namespace: signet-system, name: debug}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: debug}
subjects: [{kind: User, name: dora}]
`} {
		c.put("%s", rbac+text)
	}
	c.mu.Lock()
	was := c.may
	c.may = func(a map[string]string) bool { return was(a) || a["user"] == "" && a["name"] != "emergency" }
	c.mu.Unlock()
	soon := catest.BreakGlass(t, spiffeid.RequireTrustDomainFromString("cluster.local"), "safe-1", func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = testNow.Add(-time.Hour), testNow.Add(30*24*time.Hour)
	})
	c.set(sys+"/configmaps/signet-ca", "trustDomain: cluster.local\noperators: {listen: \"127.0.0.1:8444\", breakGlass: ["+
		base64.StdEncoding.EncodeToString(soon.Certificate[0])+"]}\n", "data", "ca.yaml")
	r, _, _ := lookAt(t, c)
	got := map[string]string{}
	for _, row := range append(r.rows("operators"), r.rows("break-glass")...) {
		got[row.Object] += row.Result + ": " + row.Found
	}
	const object, inside = "signet-operators/serviceaccount/", "signet-system/pod/signet-ca-0"
	for of, want := range map[string]string{
		object + "viewer":            "good: you may come as viewer; may have its tokens: group sre, group system:masters, serviceaccount ci/bot",
		object + "operator":          "good: you may come as operator; may have its tokens: group sre, group system:masters, serviceaccount ci/bot",
		object + "emergency":         "good: you may not come as emergency; may have its tokens: group system:masters",
		inside:                       "good: may exec into it, and has every role there: group system:masters, user dora",
		"namespace/signet-operators": "good: it has no pods, and a policy keeps it so",
		"":                           "warning: spiffe://cluster.local/signet/admin/safe-1 expires in 30d",
	} {
		if got[of] != want {
			t.Errorf("%s: %q, want %q", of, got[of], want)
		}
	}
}
