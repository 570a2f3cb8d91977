package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/kube"
)

// A configuration is what of the two configuration files the checks go by. Each field is its zero value where its file
// could not be read.
type configuration struct {
	ca    caFile
	agent agentFile
	td    spiffeid.TrustDomain // of the CA's file, or else of what else says it

	changed time.Time // when the CA's was last; zero where that is not known
}

type caFile struct {
	TrustDomain string `json:"trustDomain"`
	Publish     struct {
		Kube *struct {
			Kubeconfig         string `json:"kubeconfig"`
			Copies             bool   `json:"copies"`
			ClusterTrustBundle bool   `json:"clusterTrustBundle"`
		} `json:"kube"`
	} `json:"publish"`
	Operators struct {
		Listen     string   `json:"listen"`
		Namespace  string   `json:"namespace"`
		BreakGlass []string `json:"breakGlass"`
	} `json:"operators"`
	Issuers []struct {
		TokenReview struct {
			Kubeconfig string `json:"kubeconfig"`
		} `json:"tokenReview"`
		Watch struct {
			Kubeconfig string `json:"kubeconfig"`
		} `json:"watch"`
	} `json:"issuers"`
}

type agentFile struct {
	TrustDomain  string `json:"trustDomain"`
	SharedSocket string `json:"sharedSocket"`
	CSI          struct {
		Driver string `json:"driver"`
	} `json:"csi"`
}

// driver is the name of the volume plugin.
func (c configuration) driver() string {
	if c.agent.CSI.Driver != "" {
		return c.agent.CSI.Driver
	}
	return driverName
}

// readConfiguration reads the ConfigMaps of both programs. Whether they are right the programs say themselves, and do not
// get ready; here it counts that they are there and speak of one trust domain.
func (i *checkup) readConfiguration(ctx context.Context) {
	said := true
	for _, f := range []struct {
		name, key string
		into      any
	}{{caName, "ca.yaml", &i.config.ca}, {agentName, "agent.yaml", &i.config.agent}} {
		object := namespaced(i.kf.namespace, "configmap", f.name)
		var m struct {
			Metadata struct {
				ManagedFields []struct {
					Time   time.Time      `json:"time"`
					Fields map[string]any `json:"fieldsV1"`
				} `json:"managedFields"`
			} `json:"metadata"`
			Data map[string]string `json:"data"`
		}
		err := i.get(ctx, in("v1", i.kf.namespace, "configmaps", f.name), &m)
		for _, by := range m.Metadata.ManagedFields {
			if by.Fields["f:data"] != nil && f.name == caName && by.Time.After(i.config.changed) {
				i.config.changed = by.Time
			}
		}
		switch {
		case errors.Is(err, kube.ErrNotFound):
			i.add("configuration", resultBad, object, "it is not there", i.install())
		case err != nil:
			i.cannot("configuration", object, "read ConfigMaps in "+i.kf.namespace, err)
		case !readYAML(m.Data[f.key], f.into):
			i.add("configuration", resultBad, object, f.key+" is missing or does not parse", i.kf.kubectl("-n", i.kf.namespace, "get", "configmap", f.name, "-o", "yaml"))
		default:
			continue
		}
		said = false
	}
	if ca, agent := i.config.ca.TrustDomain, i.config.agent.TrustDomain; said && ca != agent {
		i.add("configuration", resultBad, "", fmt.Sprintf("the CA's trust domain is %.80q, and the agents' is %.80q", ca, agent), i.install())
		said = false
	}
	td, err := spiffeid.TrustDomainFromString(i.config.ca.TrustDomain)
	if err == nil && strings.Contains(i.config.ca.TrustDomain, ":") { // the library would take a whole ID
		err = errors.New("it is an ID")
	}
	switch {
	case err == nil:
		i.config.td, i.report.TrustDomain = td, td.Name()
		if said {
			i.good("configuration", "", "both programs have one, of trust domain %s", td.Name())
		}
	case said:
		i.add("configuration", resultBad, "", fmt.Sprintf("%.80q is no trust domain", i.config.ca.TrustDomain), i.install())
	}
}

// readYAML fills into from one document, of which it may know only a part.
func readYAML(text string, into any) bool {
	return text != "" && yaml.Unmarshal([]byte(text), into) == nil
}

// install is what puts right what is missing.
func (i *checkup) install() string {
	return "signet install | " + i.kf.kubectl("apply", "-f", "-") + "   # or helm upgrade, with your values"
}

type csiDriver struct {
	Metadata kMeta `json:"metadata"`
	Spec     struct {
		AttachRequired       *bool    `json:"attachRequired"`
		PodInfoOnMount       bool     `json:"podInfoOnMount"`
		VolumeLifecycleModes []string `json:"volumeLifecycleModes"`
		FSGroupPolicy        string   `json:"fsGroupPolicy"`
		RequiresRepublish    bool     `json:"requiresRepublish"`
		TokenInSecrets       bool     `json:"serviceAccountTokenInSecrets"`
		SELinuxMount         bool     `json:"seLinuxMount"`
		TokenRequests        []struct {
			Audience string `json:"audience"`
		} `json:"tokenRequests"`
	} `json:"spec"`
}

// differences are what of the driver's object is not as the agent expects it, each with why it matters.
func (d *csiDriver) differences(td spiffeid.TrustDomain, minor int) (wrong []string) {
	s := &d.Spec
	expect := func(ok bool, what string) {
		if !ok {
			wrong = append(wrong, what)
		}
	}
	expect(s.AttachRequired != nil && !*s.AttachRequired, "attachRequired is not false: every volume would wait for an attacher")
	expect(s.PodInfoOnMount, "podInfoOnMount is not true: the agent would not know whose a volume is")
	expect(len(s.VolumeLifecycleModes) == 1 && s.VolumeLifecycleModes[0] == "Ephemeral", "volumeLifecycleModes is not [Ephemeral]")
	expect(s.FSGroupPolicy == "None", "fsGroupPolicy is not None: kubelet would change who owns the socket")
	expect(s.RequiresRepublish, "requiresRepublish is not true: no pod would get a fresh token")
	expect(!s.SELinuxMount, "seLinuxMount is not false")
	if minor == 0 || minor >= minorSecrets {
		expect(s.TokenInSecrets, "serviceAccountTokenInSecrets is not true: the agent reads tokens nowhere else")
	}
	var audiences []string
	for _, r := range s.TokenRequests {
		audiences = append(audiences, r.Audience)
	}
	if !td.IsZero() && !slices.Contains(audiences, api.WorkloadAudience(td)) {
		wrong = append(wrong, fmt.Sprintf("tokenRequests has not the audience %q, but %.200q: every token would be refused as %s", api.WorkloadAudience(td), audiences, api.TokenAudience))
	}
	return wrong
}

// checkDriver compares the CSIDriver object with what the agent expects of it.
func (i *checkup) checkDriver(ctx context.Context) {
	object := "csidriver/" + i.config.driver()
	var d csiDriver
	err := i.get(ctx, in("storage.k8s.io/v1", "", "csidrivers", i.config.driver()), &d)
	if errors.Is(err, kube.ErrNotFound) {
		i.add("csi-driver", resultBad, object, "there is no such object: no pod with the volume starts", i.install())
		return
	}
	if err != nil {
		i.cannot("csi-driver", object, "read CSIDrivers", err)
		return
	}
	if wrong := d.differences(i.config.td, i.minor); len(wrong) > 0 {
		do := i.install()
		if i.minor != 0 && i.minor < minorSecrets {
			do = fmt.Sprintf("upgrade to Kubernetes 1.%d or later, then: %s", minorSecrets, do)
		}
		i.add("csi-driver", resultBad, object, strings.Join(wrong, "; "), do)
		return
	}
	i.good("csi-driver", object, "it is as the agent expects it")
	i.profile(ctx, &d)
}

// profile tells of OpenShift, whose admission lets a namespace use inline CSI volumes by a label of the driver; PodSecurity
// itself allows them in every profile.
func (i *checkup) profile(ctx context.Context, d *csiDriver) {
	label := d.Metadata.Labels[labelProfile]
	var closed []string
	for namespace, level := range i.policy {
		if level == "restricted" && label != "restricted" || level == "baseline" && label != "restricted" && label != "baseline" {
			closed = append(closed, namespace)
		}
	}
	slices.Sort(closed)
	object := "csidriver/" + i.config.driver()
	switch err := i.get(ctx, "/apis/security.openshift.io", new(kObject)); {
	case errors.Is(err, kube.ErrNotFound):
		i.good("inline-volumes", object, "PodSecurity lets pods of every level have the volume")
	case err != nil:
		i.cannot("inline-volumes", object, "say whether it is OpenShift", err)
	case label == "restricted":
		i.good("inline-volumes", object, "OpenShift lets pods of every level have the volume")
	default:
		where := "namespaces with a PodSecurity level below privileged"
		if len(closed) > 0 {
			where = clip(strings.Join(closed[:min(len(closed), maxNamed)], ", "), maxFound) + after(" and ", more(len(closed)-maxNamed))
		}
		i.add("inline-volumes", resultBad, object, "OpenShift refuses pods with the volume in "+where+": the driver's label "+labelProfile+" is not restricted",
			i.kf.kubectl("label", "csidriver", i.config.driver())+" "+labelProfile+"=restricted --overwrite")
	}
}

// more says that there are n more; nothing where there are none.
func more(n int) string {
	if n <= 0 {
		return ""
	}
	return fmt.Sprintf("%d more", n)
}

// A rollout is what of a StatefulSet's or DaemonSet's status is looked at.
type rollout struct {
	Metadata kMeta `json:"metadata"`
	Spec     struct {
		Replicas *int `json:"replicas"`
		Template struct {
			Spec struct {
				NodeSelector map[string]string `json:"nodeSelector"`
				Affinity     map[string]any    `json:"affinity"`
			} `json:"spec"`
		} `json:"template"`
		Claims []kObject `json:"volumeClaimTemplates"`
	} `json:"spec"`
	Status struct {
		ObservedGeneration int64 `json:"observedGeneration"`
		Desired            int   `json:"desiredNumberScheduled"` // of a DaemonSet, as what follows
		Ready              int   `json:"numberReady"`
		Updated            int   `json:"updatedNumberScheduled"`
		ReadyReplicas      int   `json:"readyReplicas"` // of a StatefulSet, as what follows
		UpdatedReplicas    int   `json:"updatedReplicas"`
	} `json:"status"`
}

// numbers of pods: wanted, ready and of the newest template.
func (r *rollout) numbers(kind string) (desired, ready, updated int) {
	if kind == "daemonset" {
		return r.Status.Desired, r.Status.Ready, r.Status.Updated
	}
	desired = 1
	if r.Spec.Replicas != nil {
		desired = *r.Spec.Replicas
	}
	return desired, r.Status.ReadyReplicas, r.Status.UpdatedReplicas
}

// checkAuthority looks at the CA's StatefulSet.
func (i *checkup) checkAuthority(ctx context.Context) {
	var old time.Time // since when the CA runs that was not started anew after its configuration was changed
	i.checkRollout(ctx, "ca", "statefulset", caName, "without the CA no pod gets an identity, and those that have one keep it until it expires", func(p *kPod) {
		for _, c := range p.Status.Containers {
			if c.Name == "ca" && c.State.Running != nil && i.config.changed.After(c.State.Running.StartedAt) {
				old = c.State.Running.StartedAt
			}
		}
	})
	if !old.IsZero() {
		i.add("ca", resultWarning, namespaced(i.kf.namespace, "configmap", caName),
			"it was changed at "+stamp(i.config.changed)+", and the CA runs since "+stamp(old)+" with what it said then: a break-glass certificate that was taken out, say, is let in still",
			i.kf.kubectl("-n", i.kf.namespace, "rollout", "restart", "statefulset", caName))
	}
}

// checkAgents looks at the agents' DaemonSet, and keeps its pods for checkNodes.
func (i *checkup) checkAgents(ctx context.Context) {
	i.agents = map[string]*kPod{}
	i.checkRollout(ctx, "agents", "daemonset", agentName, "no pod with the volume can start", func(p *kPod) {
		if old := i.agents[p.Spec.NodeName]; p.Spec.NodeName != "" && (old == nil || !old.ready()) {
			i.agents[p.Spec.NodeName] = p
		}
	})
}

// checkRollout compares what a workload should run with what runs, and tells of each pod that is not ready.
func (i *checkup) checkRollout(ctx context.Context, check, kind, name, otherwise string, each func(*kPod)) {
	object := namespaced(i.kf.namespace, kind, name)
	var r rollout
	err := i.get(ctx, in("apps/v1", i.kf.namespace, kind+"s", name), &r)
	switch {
	case errors.Is(err, kube.ErrNotFound):
		i.add(check, resultBad, object, "it is not there: "+otherwise, i.install())
		return
	case err != nil:
		i.cannot(check, object, "read "+kind+"s in "+i.kf.namespace, err)
		return
	}
	all := 0
	var troubled []*kPod
	err = i.ourPods(ctx, name, func(p *kPod) {
		if all++; each != nil {
			each(p)
		}
		if !p.ready() && p.Metadata.DeletionTimestamp.IsZero() {
			troubled = append(troubled, p)
		}
	})
	if err != nil {
		i.cannot(check, object, "list pods in "+i.kf.namespace, err)
	}
	desired, ready, updated := r.numbers(kind)
	do := i.kf.kubectl("-n", i.kf.namespace, "describe", kind, name)
	switch {
	case kind == "statefulset" && desired == 0:
		i.add(check, resultBad, object, "it is scaled to 0: "+otherwise, i.kf.kubectl("-n", i.kf.namespace, "scale", kind, name)+" --replicas=1")
	case desired == 0:
		i.add(check, resultWarning, object, "no node is to have one: "+otherwise, do)
	case r.Status.ObservedGeneration < r.Metadata.Generation || updated < desired || ready < desired:
		found := fmt.Sprintf("%d of %s ready, %d of the newest template", ready, plural(desired, "pod"), updated)
		if all == 0 && err == nil { // nothing that could say why but the workload itself
			found += after(": ", i.newestWarning(ctx, i.kf.namespace, r.Metadata.UID))
		}
		i.add(check, resultBad, object, found, do)
	default:
		i.good(check, object, "%d of %s ready", ready, plural(desired, "pod"))
	}
	for n, p := range troubled {
		if n == maxNamed {
			i.add(check, resultBad, "", fmt.Sprintf("and %s more are not ready", plural(len(troubled)-n, "pod")), i.kf.kubectl("-n", i.kf.namespace, "get", "pods"))
			break
		}
		found, do := i.podTrouble(ctx, p)
		i.add(check, resultBad, namespaced(p.Metadata.Namespace, "pod", p.Metadata.Name), found+after(" (node ", p.Spec.NodeName)+closing(p.Spec.NodeName), do)
	}
}

// ourPods calls f for each pod of our namespace with that name as its label.
func (i *checkup) ourPods(ctx context.Context, name string, f func(*kPod)) error {
	query := map[string][]string{"labelSelector": {labelName + "=" + name}}
	return kube.Each(ctx, i.cluster, in("v1", i.kf.namespace, "pods", ""), query, func(p kPod) error {
		f(&p)
		return nil
	})
}

// checkState looks at the volumes that hold the CA's record and its seal key.
func (i *checkup) checkState(ctx context.Context) {
	type claim struct {
		Metadata kMeta `json:"metadata"`
		Spec     struct {
			StorageClassName *string `json:"storageClassName"`
		} `json:"spec"`
		Status struct {
			Phase string `json:"phase"`
		} `json:"status"`
	}
	var r rollout
	if err := i.get(ctx, in("apps/v1", i.kf.namespace, "statefulsets", caName), &r); err != nil {
		return // checkAuthority has told
	}
	desired, _, _ := r.numbers("statefulset")
	bound := 0
	for _, c := range r.Spec.Claims {
		for n := range min(desired, maxNamed) {
			name := fmt.Sprintf("%s-%s-%d", c.Metadata.Name, caName, n)
			object := namespaced(i.kf.namespace, "persistentvolumeclaim", name)
			do := i.kf.kubectl("-n", i.kf.namespace, "describe", "persistentvolumeclaim", name)
			var pvc claim
			switch err := i.get(ctx, in("v1", i.kf.namespace, "persistentvolumeclaims", name), &pvc); {
			case errors.Is(err, kube.ErrNotFound):
				i.add("state", resultBad, object, "there is no such claim", do)
			case err != nil:
				i.cannot("state", object, "read PersistentVolumeClaims in "+i.kf.namespace, err)
			case !pvc.Metadata.DeletionTimestamp.IsZero():
				i.add("state", resultBad, object, "it is being deleted, and goes once the CA's pod does: the root's key would go with it", "make a backup of the CA's volumes before its pod is deleted")
			case pvc.Status.Phase != "Bound":
				found := clip(pvc.Status.Phase, 32) + after(": ", i.newestWarning(ctx, i.kf.namespace, pvc.Metadata.UID))
				if pvc.Spec.StorageClassName == nil {
					found += "; it names no storage class, and the cluster has no default one"
				}
				i.add("state", resultBad, object, found, do)
			default:
				bound++
			}
		}
	}
	if bound > 0 && bound == min(desired, maxNamed)*len(r.Spec.Claims) {
		i.good("state", "", "%s of the CA bound", plural(bound, "volume claim"))
	}
}

// checkService looks at how agents find the CA.
func (i *checkup) checkService(ctx context.Context) {
	object := namespaced(i.kf.namespace, "service", caName)
	var s struct {
		Spec struct {
			Selector map[string]string `json:"selector"`
			Ports    []struct {
				Name string `json:"name"`
				Port int    `json:"port"`
			} `json:"ports"`
		} `json:"spec"`
	}
	switch err := i.get(ctx, in("v1", i.kf.namespace, "services", caName), &s); {
	case errors.Is(err, kube.ErrNotFound):
		i.add("service", resultBad, object, "it is not there: no agent finds the CA", i.install())
		return
	case err != nil:
		i.cannot("service", object, "read Services in "+i.kf.namespace, err)
		return
	}
	port := false
	for _, p := range s.Spec.Ports {
		port = port || p.Port == 8443
	}
	if !port {
		i.add("service", resultBad, object, "it has no port 8443, where agents look for the CA", i.install())
		return
	}
	type slice struct {
		Endpoints []struct {
			Conditions struct {
				Ready *bool `json:"ready"`
			} `json:"conditions"`
		} `json:"endpoints"`
	}
	ready, all := 0, 0
	query := map[string][]string{"labelSelector": {"kubernetes.io/service-name=" + caName}}
	err := kube.Each(ctx, i.cluster, in("discovery.k8s.io/v1", i.kf.namespace, "endpointslices", ""), query, func(s slice) error {
		for _, e := range s.Endpoints {
			if all++; e.Conditions.Ready == nil || *e.Conditions.Ready { // nil: not known, which counts as ready
				ready++
			}
		}
		return nil
	})
	switch {
	case err != nil:
		i.cannot("service", object, "list EndpointSlices in "+i.kf.namespace, err)
	case ready == 0 && all == 0:
		i.add("service", resultBad, object, "no pod is behind it", i.kf.kubectl("-n", i.kf.namespace, "get", "endpointslices,pods"))
	case ready == 0:
		i.add("service", resultBad, object, fmt.Sprintf("none of the %s behind it is ready", plural(all, "pod")), i.kf.kubectl("-n", i.kf.namespace, "get", "endpointslices,pods"))
	default:
		i.good("service", object, "%d of %s ready", ready, plural(all, "endpoint"))
	}
}
