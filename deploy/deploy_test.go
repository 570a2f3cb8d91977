package deploy_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"

	"github.com/signet-ca/signet/deploy"
)

// renderings are all that is on record: what `signet install` prints, and what the chart yields with other values.
func renderings(t *testing.T) map[string][]byte {
	t.Helper()
	installed, err := deploy.Install(deploy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	all := recorded(t, ".rendered.yaml")
	all["install"] = installed
	return all
}

// recorded are the files of testdata with that suffix, by what is before it.
func recorded(t *testing.T, suffix string) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob("testdata/*" + suffix)
	if err != nil || len(paths) < 3 {
		t.Fatal(paths, err)
	}
	all := map[string][]byte{}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimSuffix(filepath.Base(path), suffix)] = data
	}
	return all
}

// objects decodes a rendering as an API server does that refuses unknown fields.
func objects(t *testing.T, text []byte) []runtime.Object {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, appsv1.AddToScheme, batchv1.AddToScheme, rbacv1.AddToScheme, storagev1.AddToScheme, policyv1.AddToScheme, networkingv1.AddToScheme, admissionv1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	var all []runtime.Object
	for doc := range bytes.SplitSeq(text, []byte("---\n")) {
		if len(bytes.TrimSpace(doc)) == 0 {
			continue
		}
		o, _, err := decoder.Decode(doc, nil, nil)
		if err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		all = append(all, o)
	}
	return all
}

// of returns those of one type.
func of[T runtime.Object](all []runtime.Object) []T {
	var found []T
	for _, o := range all {
		if typed, ok := o.(T); ok {
			found = append(found, typed)
		}
	}
	return found
}

func one[T runtime.Object](t *testing.T, all []runtime.Object) T {
	t.Helper()
	found := of[T](all)
	if len(found) != 1 {
		t.Fatalf("%d of %T", len(found), *new(T))
	}
	return found[0]
}

func forEach(t *testing.T, f func(t *testing.T, all []runtime.Object)) {
	for name, text := range renderings(t) {
		t.Run(name, func(t *testing.T) { f(t, objects(t, text)) })
	}
}

// No pod of ours gets more from its node than what it cannot do without.
//
// threat: B19, N05, N06
func TestSecurityContexts(t *testing.T) {
	forEach(t, func(t *testing.T, all []runtime.Object) {
		ca, agent := one[*appsv1.StatefulSet](t, all), one[*appsv1.DaemonSet](t, all)
		checkPod(t, "the CA", ca.Spec.Template.Spec)
		checkPod(t, "the agent", agent.Spec.Template.Spec)

		if c := ca.Spec.Template.Spec.SecurityContext; c.RunAsNonRoot == nil || !*c.RunAsNonRoot || *c.RunAsUser != 65532 {
			t.Error("the CA may be root")
		}
		if got := hostPaths(ca.Spec.Template.Spec); len(got) != 0 {
			t.Errorf("the CA has the node's %v", got)
		}
		dir := kubeletDir(t, all)
		want := []string{dir + "/plugins/csi.signet.dev", dir + "/plugins_registry", dir + "/pods", "/run/signet"}
		slices.Sort(want)
		if d := cmp.Diff(want, hostPaths(agent.Spec.Template.Spec)); d != "" {
			t.Errorf("folders of the node in the agent (-want +got):\n%s", d)
		}
		for _, m := range agent.Spec.Template.Spec.Containers[0].VolumeMounts {
			if m.MountPropagation != nil && *m.MountPropagation != corev1.MountPropagationNone {
				t.Errorf("%s propagates mounts", m.Name)
			}
		}
	})
}

func checkPod(t *testing.T, who string, s corev1.PodSpec) {
	t.Helper()
	if s.HostPID || s.HostIPC || s.HostNetwork || s.ShareProcessNamespace != nil {
		t.Errorf("%s shares a namespace of the node", who)
	}
	if s.AutomountServiceAccountToken == nil || *s.AutomountServiceAccountToken {
		t.Errorf("%s has a token in each of its containers", who)
	}
	if c := s.SecurityContext; c == nil || c.SeccompProfile == nil || c.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("%s has no seccomp profile", who)
	}
	for _, c := range slices.Concat(s.InitContainers, s.Containers) {
		sc := c.SecurityContext
		switch {
		case sc == nil || sc.Capabilities == nil || !slices.Equal(sc.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(sc.Capabilities.Add) > 0:
			t.Errorf("%s: container %s keeps capabilities", who, c.Name)
		case sc.Privileged != nil || sc.AllowPrivilegeEscalation == nil || *sc.AllowPrivilegeEscalation:
			t.Errorf("%s: container %s may gain privileges", who, c.Name)
		case sc.ReadOnlyRootFilesystem == nil || !*sc.ReadOnlyRootFilesystem:
			t.Errorf("%s: container %s can write to its root", who, c.Name)
		case sc.SeccompProfile != nil || sc.RunAsUser != nil || sc.RunAsNonRoot != nil:
			t.Errorf("%s: container %s overrides what its pod says", who, c.Name)
		}
		for _, p := range c.Ports {
			if p.HostPort != 0 {
				t.Errorf("%s: container %s listens on the node's port %d", who, c.Name, p.HostPort)
			}
		}
	}
}

func hostPaths(s corev1.PodSpec) []string {
	var paths []string
	for _, v := range s.Volumes {
		if v.HostPath != nil {
			paths = append(paths, v.HostPath.Path)
		}
	}
	slices.Sort(paths)
	return paths
}

// kubeletDir is what the agent's own configuration says.
func kubeletDir(t *testing.T, all []runtime.Object) string {
	t.Helper()
	for _, c := range of[*corev1.ConfigMap](all) {
		if _, after, ok := strings.Cut(c.Data["agent.yaml"], `kubeletDir: "`); ok {
			dir, _, _ := strings.Cut(after, `"`)
			return dir
		}
	}
	t.Fatal("no kubeletDir in agent.yaml")
	return ""
}

// A token that gets out is worth as little as can be: each has the one audience that it is for, and only the CA has one
// for the API server.
func TestTokens(t *testing.T) {
	forEach(t, func(t *testing.T, all []runtime.Object) {
		for _, a := range of[*corev1.ServiceAccount](all) {
			if a.AutomountServiceAccountToken == nil || *a.AutomountServiceAccountToken {
				t.Errorf("ServiceAccount %s gives its token to every pod", a.Name)
			}
		}
		driver := one[*storagev1.CSIDriver](t, all)
		td := strings.TrimPrefix(driver.Spec.TokenRequests[0].Audience, "signet:")
		for who, tc := range map[string]struct {
			spec corev1.PodSpec
			want []string
		}{
			"the CA":    {one[*appsv1.StatefulSet](t, all).Spec.Template.Spec, []string{""}},
			"the agent": {one[*appsv1.DaemonSet](t, all).Spec.Template.Spec, []string{"signet-agent:" + td}},
		} {
			var got []string
			for _, v := range tc.spec.Volumes {
				if v.Projected == nil {
					continue
				}
				for _, s := range v.Projected.Sources {
					if s.ServiceAccountToken != nil {
						got = append(got, s.ServiceAccountToken.Audience)
					}
				}
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("audiences of %s's tokens (-want +got):\n%s", who, d)
			}
		}
	})
}

// What kubelet needs to hand us a token for each pod, where the pod's author cannot put another.
func TestCSIDriver(t *testing.T) {
	forEach(t, func(t *testing.T, all []runtime.Object) {
		d := one[*storagev1.CSIDriver](t, all)
		if d.Name != "csi.signet.dev" || d.Labels["security.kubernetes.io/csi-ephemeral-volume-profile"] != "restricted" || len(d.Spec.TokenRequests) != 1 {
			t.Fatalf("%+v", d)
		}
		want := storagev1.CSIDriverSpec{
			AttachRequired: new(false), PodInfoOnMount: new(true), RequiresRepublish: new(true), FSGroupPolicy: new(storagev1.NoneFSGroupPolicy),
			SELinuxMount: new(false), StorageCapacity: new(false), ServiceAccountTokenInSecrets: new(true),
			VolumeLifecycleModes: []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecycleEphemeral},
			TokenRequests:        []storagev1.TokenRequest{{Audience: d.Spec.TokenRequests[0].Audience, ExpirationSeconds: new(int64(3600))}},
		}
		if diff := cmp.Diff(want, d.Spec); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// The agent has no permissions, and the CA none that reaches Secrets, pods' processes, or everything.
//
// threat: G09
func TestPermissions(t *testing.T) {
	forEach(t, func(t *testing.T, all []runtime.Object) {
		var rules []rbacv1.PolicyRule
		for _, r := range of[*rbacv1.ClusterRole](all) {
			if peoplesRoles[r.Name] == nil {
				rules = append(rules, r.Rules...)
			}
		}
		for _, r := range of[*rbacv1.Role](all) {
			rules = append(rules, r.Rules...)
		}
		if len(rules) < 4 {
			t.Fatalf("%d rules", len(rules))
		}
		for _, r := range rules {
			for _, word := range slices.Concat(r.APIGroups, r.Resources, r.Verbs) {
				if strings.ContainsAny(word, "*/") || slices.Contains([]string{"secrets", "escalate", "bind", "impersonate", "patch", "deletecollection"}, word) {
					t.Errorf("%q in rule %v", word, r)
				}
			}
			writes := slices.ContainsFunc(r.Verbs, func(v string) bool { return v == "update" || v == "delete" })
			if writes && len(r.ResourceNames) == 0 {
				t.Errorf("rule %v may change what is not named", r)
			}
		}
		subjects := map[string]bool{}
		for _, b := range of[*rbacv1.ClusterRoleBinding](all) {
			for _, s := range b.Subjects {
				subjects[s.Kind+" "+s.Namespace+"/"+s.Name] = true
			}
		}
		for _, b := range of[*rbacv1.RoleBinding](all) {
			for _, s := range b.Subjects {
				subjects[s.Kind+" "+s.Namespace+"/"+s.Name] = true
			}
		}
		if d := cmp.Diff(map[string]bool{"ServiceAccount signet-system/signet-ca": true}, subjects); d != "" {
			t.Errorf("who has permissions (-want +got):\n%s", d)
		}
	})
}

// peoplesRoles are the roles of people, and whose tokens each may ask for.
var peoplesRoles = map[string][]string{
	"signet-viewer": {"viewer"}, "signet-operator": {"viewer", "operator"}, "signet-emergency": {"viewer", "operator", "emergency"},
}

// A role of people is the way to the CA, the tokens that it stands for, and nothing else; nobody has it from the start. In
// the namespace of their ServiceAccounts no pod can run.
func TestOperators(t *testing.T) {
	forEach(t, func(t *testing.T, all []runtime.Object) {
		enabled := bytes.Contains([]byte(configOf(t, all, "signet-ca")["ca.yaml"]), []byte("listen: 127.0.0.1:8444"))
		found := map[string][]string{}
		for _, r := range of[*rbacv1.ClusterRole](all) {
			if peoplesRoles[r.Name] == nil {
				continue
			}
			found[r.Name] = r.Rules[0].ResourceNames
			want := []rbacv1.PolicyRule{
				{APIGroups: []string{""}, Resources: []string{"serviceaccounts/token"}, ResourceNames: peoplesRoles[r.Name], Verbs: []string{"create"}},
				{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "list"}},
				{APIGroups: []string{""}, Resources: []string{"pods/portforward"}, ResourceNames: []string{"signet-ca-0"}, Verbs: []string{"get", "create"}},
				{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{"signet-bundle"}, Verbs: []string{"get"}},
			}
			if d := cmp.Diff(want, r.Rules); d != "" {
				t.Errorf("%s (-want +got):\n%s", r.Name, d)
			}
		}
		if !enabled {
			if len(found) != 0 {
				t.Error(found)
			}
			return
		}
		if d := cmp.Diff(peoplesRoles, found); d != "" {
			t.Error(d)
		}
		accounts := map[string]string{}
		for _, a := range of[*corev1.ServiceAccount](all) {
			if a.Namespace != "signet-system" {
				accounts[a.Name] = a.Namespace
			}
		}
		var namespace string
		for _, p := range of[*admissionv1.ValidatingAdmissionPolicy](all) {
			if p.Name == "signet-operators" {
				namespace = p.Spec.MatchConstraints.NamespaceSelector.MatchLabels["kubernetes.io/metadata.name"]
				if p.Spec.Validations[0].Expression != "false" || *p.Spec.FailurePolicy != admissionv1.Fail || len(p.Spec.MatchConditions) > 0 {
					t.Errorf("%+v", p.Spec)
				}
			}
		}
		for _, b := range of[*admissionv1.ValidatingAdmissionPolicyBinding](all) {
			if b.Name == "signet-operators" && (b.Spec.PolicyName != b.Name || !slices.Equal(b.Spec.ValidationActions, []admissionv1.ValidationAction{admissionv1.Deny})) {
				t.Errorf("%+v", b.Spec)
			}
		}
		for _, n := range of[*corev1.Namespace](all) {
			if n.Name == namespace && n.Annotations["helm.sh/resource-policy"] != "keep" {
				t.Errorf("Helm deletes namespace %s, and people's bindings with it", n.Name)
			}
		}
		want := map[string]string{"viewer": namespace, "operator": namespace, "emergency": namespace}
		if d := cmp.Diff(want, accounts); d != "" || namespace == "" || namespace == "signet-system" {
			t.Error(namespace, d)
		}
	})
}

// Where a container's memory ends is said to Go, so that it collects in time.
func TestMemoryLimit(t *testing.T) {
	forEach(t, func(t *testing.T, all []runtime.Object) {
		containers := []corev1.Container{one[*appsv1.StatefulSet](t, all).Spec.Template.Spec.Containers[0]}
		for _, d := range of[*appsv1.DaemonSet](all) {
			containers = append(containers, d.Spec.Template.Spec.Containers[0])
		}
		for _, c := range containers {
			said := slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool {
				return e.Name == "GOMEMLIMIT" && e.ValueFrom.ResourceFieldRef.Resource == "limits.memory" && e.ValueFrom.ResourceFieldRef.Divisor.IsZero()
			})
			if limited := !c.Resources.Limits.Memory().IsZero(); said != limited {
				t.Errorf("container %s has a limit: %v, and says so: %v", c.Name, limited, said)
			}
		}
	})
}

// configOf is the data of a ConfigMap.
func configOf(t *testing.T, all []runtime.Object, name string) map[string]string {
	t.Helper()
	for _, c := range of[*corev1.ConfigMap](all) {
		if c.Name == name {
			return c.Data
		}
	}
	t.Fatalf("no ConfigMap %s", name)
	return nil
}

// Helm's hook before it uninstalls: all of it is hooks, in the order in which each needs the one before; it may do nothing
// but list pods, meets PodSecurity "restricted", and leaves the names of pods in its own pod's status. For kubectl, to which
// a hook is an object as any other, there is none.
func TestUninstallGuard(t *testing.T) {
	for name, text := range renderings(t) {
		if bytes.Contains(text, []byte("helm.sh/hook")) {
			t.Errorf("%s has hooks in what kubectl makes", name)
		}
	}
	hooks := recorded(t, ".hooks.yaml")
	if hooks["bare"] != nil {
		t.Error("it is there although it is off")
	}
	for name, text := range hooks {
		t.Run(name, func(t *testing.T) {
			all := objects(t, text)
			last := -100
			for _, o := range all {
				a := o.(metav1.Object).GetAnnotations()
				weight, err := strconv.Atoi(a["helm.sh/hook-weight"])
				if a["helm.sh/hook"] != "pre-delete" || a["helm.sh/hook-delete-policy"] != "before-hook-creation,hook-succeeded" || err != nil || weight <= last {
					t.Errorf("%T has the annotations %v", o, a)
				}
				last = weight
			}
			job, role, binding := one[*batchv1.Job](t, all), one[*rbacv1.ClusterRole](t, all), one[*rbacv1.ClusterRoleBinding](t, all)
			account := one[*corev1.ServiceAccount](t, all)
			spec := job.Spec.Template.Spec
			checkPod(t, "the guard", spec)
			if c := spec.SecurityContext; c.RunAsNonRoot == nil || !*c.RunAsNonRoot || len(hostPaths(spec)) > 0 {
				t.Error("PodSecurity \"restricted\" would refuse it")
			}
			if d := cmp.Diff([]rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list"}}}, role.Rules); d != "" {
				t.Errorf("what it may do (-want +got):\n%s", d)
			}
			subjects := []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: job.Namespace, Name: account.Name}}
			if d := cmp.Diff(subjects, binding.Subjects); d != "" || binding.RoleRef.Name != role.Name || spec.ServiceAccountName != account.Name || *account.AutomountServiceAccountToken {
				t.Errorf("who may (-want +got):\n%s", d)
			}
			c := spec.Containers[0]
			wait := map[bool]string{true: "--wait=4m", false: "--wait=0s"}[name == "all"]
			if d := cmp.Diff([]string{"uninstall", "--pods-only", wait, "--namespace=" + job.Namespace}, c.Args); d != "" || c.Command[0] != "/usr/bin/signet" {
				t.Errorf("what it runs (-want +got):\n%s", d)
			}
			if c.TerminationMessagePolicy != corev1.TerminationMessageFallbackToLogsOnError || *job.Spec.BackoffLimit != 0 || spec.RestartPolicy != corev1.RestartPolicyNever {
				t.Error("it does not fail at once with the names in its status")
			}
			if _, ours := job.Spec.Template.Labels["app.kubernetes.io/name"]; !ours || job.Annotations["helm.sh/hook-output-log-policy"] != "hook-failed" {
				t.Error("Helm does not print what it says")
			}
		})
	}
}

// What is off is not there.
func TestOptional(t *testing.T) {
	all := renderings(t)
	for _, tc := range []struct {
		rendering              string
		shared, budget, policy bool
		guard                  bool
		namespaces, claims     int
	}{
		{rendering: "install", budget: true, policy: true, guard: true, namespaces: 2, claims: 2},
		{rendering: "bare", claims: 2},
		{rendering: "shared-socket", shared: true, budget: true, policy: true, guard: true, namespaces: 1, claims: 2},
		{rendering: "all", shared: true, budget: true, policy: true, guard: true, claims: 1},
	} {
		t.Run(tc.rendering, func(t *testing.T) {
			objs := objects(t, all[tc.rendering])
			shared := slices.ContainsFunc(of[*admissionv1.ValidatingAdmissionPolicy](objs), func(p *admissionv1.ValidatingAdmissionPolicy) bool {
				return p.Name == "signet-shared-socket"
			})
			served := bytes.Contains(all[tc.rendering], []byte("sharedSocket: /run/signet/shared/agent.sock"))
			if shared != tc.shared || served != tc.shared {
				t.Errorf("shared socket: policy %v, socket %v", shared, served)
			}
			guard := slices.ContainsFunc(of[*admissionv1.ValidatingAdmissionPolicyBinding](objs), func(b *admissionv1.ValidatingAdmissionPolicyBinding) bool {
				return b.Name == "signet-downgrade" && b.Spec.PolicyName == b.Name && b.Spec.ParamRef.Namespace == "signet-system"
			})
			if guard != tc.guard {
				t.Error("the guard against downgrades:", guard)
			}
			if got := len(of[*policyv1.PodDisruptionBudget](objs)) == 1; got != tc.budget {
				t.Error("PodDisruptionBudget:", got)
			}
			if got := len(of[*networkingv1.NetworkPolicy](objs)) == 2; got != tc.policy {
				t.Error("NetworkPolicies:", got)
			}
			if got := len(of[*corev1.Namespace](objs)); got != tc.namespaces {
				t.Error("namespaces:", got)
			}
			if got := len(one[*appsv1.StatefulSet](t, objs).Spec.VolumeClaimTemplates); got != tc.claims {
				t.Errorf("%d volumes of the CA", got)
			}
		})
	}
}

// Kubernetes objects come in an order in which each finds what it needs: a namespace first, pods last.
func TestInstallOrder(t *testing.T) {
	all := objects(t, renderings(t)["install"])
	if _, ok := all[0].(*corev1.Namespace); !ok {
		t.Errorf("%T comes first", all[0])
	}
	if _, ok := all[len(all)-1].(*appsv1.DaemonSet); !ok {
		t.Errorf("%T comes last", all[len(all)-1])
	}
}

// The defaults of signet install are those of the chart.
func TestDefaults(t *testing.T) {
	values, err := os.ReadFile("chart/signet/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	d := deploy.Defaults()
	for _, line := range []string{
		"\ntrustDomain: " + d.TrustDomain, "\nissuer: " + d.Issuer, "\n  repository: " + d.Repository, "\n  pullPolicy: " + d.PullPolicy, "\n  kubeletDir: " + d.KubeletDir,
	} {
		if !bytes.Contains(values, []byte(line+"\n")) {
			t.Errorf("values.yaml does not say %q", line)
		}
	}
	chart, err := os.ReadFile("chart/signet/Chart.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(chart, []byte("\nappVersion: "+d.Tag+"\n")) {
		t.Errorf("Chart.yaml's appVersion is not %s", d.Tag)
	}
	if lines := bytes.Count(values, []byte("\n")); lines >= 250 {
		t.Errorf("values.yaml has %d lines: too many to be read", lines)
	}
	if left, err := deploy.Install(d); err != nil || bytes.Contains(left, []byte("@")) {
		t.Errorf("a mark is left over, or: %v", err)
	}
}

// An example is something to copy, so it holds what we ask of others: the volume read-only, TLS 1.3 alone, a peer that is
// named, and no token in the pod.
func TestExamples(t *testing.T) {
	paths, err := filepath.Glob("examples/*.yaml")
	if err != nil || len(paths) == 0 {
		t.Fatal(paths, err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all := objects(t, text)
		for _, d := range of[*appsv1.Deployment](all) {
			checkWorkload(t, d.Name, d.Spec.Template.Spec)
		}
		for _, a := range of[*corev1.ServiceAccount](all) {
			if a.AutomountServiceAccountToken == nil || *a.AutomountServiceAccountToken {
				t.Errorf("%s: ServiceAccount %s gives its token to its pods", path, a.Name)
			}
		}
		for _, m := range of[*corev1.ConfigMap](all) {
			for _, part := range []string{
				"{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}", "{san_type: URI, matcher: {exact: spiffe://cluster.local/ns/shop/sa/",
				"pipe: {path: /run/signet-workload/agent.sock}", "validation_context_sds_secret_config: {name: ROOTCA, ",
			} {
				if strings.Count(m.Data["envoy.yaml"], part) != 1 {
					t.Errorf("%s: %s is not once in ConfigMap %s", path, part, m.Name)
				}
			}
		}
	}
}

func checkWorkload(t *testing.T, name string, s corev1.PodSpec) {
	t.Helper()
	if s.SecurityContext == nil || s.SecurityContext.RunAsNonRoot == nil || !*s.SecurityContext.RunAsNonRoot {
		t.Errorf("%s may be root", name)
	}
	volumes := slices.DeleteFunc(slices.Clone(s.Volumes), func(v corev1.Volume) bool { return v.CSI == nil })
	if len(volumes) != 1 || volumes[0].CSI.Driver != "csi.signet.dev" || volumes[0].CSI.ReadOnly == nil || !*volumes[0].CSI.ReadOnly {
		t.Fatalf("%s has the volumes %+v", name, volumes)
	}
	mounted := slices.ContainsFunc(s.Containers[0].VolumeMounts, func(m corev1.VolumeMount) bool {
		return m.Name == volumes[0].Name && m.MountPath == "/run/signet-workload" && m.ReadOnly
	})
	if !mounted {
		t.Errorf("%s does not mount it", name)
	}
}
