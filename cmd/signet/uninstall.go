package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/kube"
)

// An uninstallPlan is what is in the way, what would go, in that order, and what stays.
type uninstallPlan struct {
	header
	Server      string         `json:"server"`
	Namespace   string         `json:"namespace"`
	TrustDomain string         `json:"trustDomain,omitempty"`
	Generation  string         `json:"generation,omitempty"` // of the published bundle, EPOCH.NUMBER
	HelmRelease string         `json:"helmRelease,omitempty"`
	Pods        []uninstallPod `json:"pods"` // that still have the volume
	Delete      []*objectRef   `json:"delete"`
	Keep        []*objectRef   `json:"keep"`
}

// An uninstallPod is a pod in the way.
type uninstallPod struct {
	Namespace  string `json:"namespace"`
	Name       string `json:"name"`
	Node       string `json:"node,omitempty"`
	Controller string `json:"controller,omitempty"` // KIND/NAME; what to scale down
	Ending     bool   `json:"ending,omitempty"`     // it is being deleted
}

// An objectRef names an object of the cluster.
type objectRef struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Namespace  string `json:"namespace,omitempty"`
	Name       string `json:"name"`
	Deleted    bool   `json:"deleted,omitempty"`

	resource, uid string
}

func (r *objectRef) path() string { return in(r.APIVersion, r.Namespace, r.resource, r.Name) }

// String is how kubectl names it.
func (r *objectRef) String() string {
	s := strings.ToLower(r.Kind) + "/" + r.Name
	if r.Namespace != "" {
		s = r.Namespace + "/" + s
	}
	return s
}

// uninstallFlags are those of one run.
type uninstallFlags struct {
	kubeFlags
	wait        time.Duration
	yes         bool
	podsOnly    bool
	deleteState string // the trust domain's name, as a confirmation
}

func (a *app) uninstallCommand() *cobra.Command {
	var f uninstallFlags
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove Signet from a cluster, once no pod has its volume any more",
		Long: "Show what is in the way of removing Signet, what would be deleted, in which order, and what stays. Nothing is\n" +
			"deleted without --yes.\n\n" +
			"It refuses, with exit code 3, while pods have the volume: without the agent kubelet cannot take a volume apart,\n" +
			"so they would hang in Terminating. --wait waits until they have gone.\n\n" +
			"The CA's state (its volumes, with the root's key) and the published bundle stay, so that an installation made\n" +
			"anew goes on with the same root. --delete-state TRUST-DOMAIN deletes them as well: nothing that was issued can\n" +
			"ever be renewed under that root. The namespaces always stay.",
		Example: "  signet uninstall                                     # what is in the way, what would go, what stays\n" +
			"  signet uninstall --wait --yes                        # wait for the last pod, then do it\n" +
			"  signet uninstall -o manifest | kubectl delete -f -   # the same in kubectl's hands\n" +
			"  signet uninstall --wait && helm uninstall signet -n signet-system",
		Args: noArgs,
	}
	f.add(c)
	o := outputFlags(c, "manifest")
	c.Flags().DurationVar(&f.wait, "wait", 0, "wait until no pod has the volume, for at most this `DURATION` (without a value 5m)")
	c.Flags().Lookup("wait").NoOptDefVal = defaultWait.String()
	c.Flags().BoolVarP(&f.yes, "yes", "y", false, "do it")
	c.Flags().BoolVar(&f.podsOnly, "pods-only", false, "only look for pods that have the volume; asks for no right but to list pods")
	c.Flags().StringVar(&f.deleteState, "delete-state", "", "with --yes: the root's key and the bundle as well, of this `TRUST-DOMAIN`")
	c.RunE = func(c *cobra.Command, _ []string) error { return a.uninstall(c.Context(), o, &f) }
	return c
}

func (f *uninstallFlags) check(o *output) error {
	switch {
	case f.wait < 0:
		return usageError{fmt.Errorf("--wait %s is negative", f.wait)}
	case f.podsOnly && (f.yes || f.deleteState != "" || o.format == "manifest"):
		return usageError{errors.New("--pods-only deletes nothing: it goes with --wait and with outputs for people and programs")}
	case f.yes && o.format == "manifest":
		return usageError{errors.New("-o manifest is for kubectl, and --yes does it here: one of them")}
	case f.deleteState != "" && !f.yes:
		return usageError{errors.New("--delete-state is only done together with --yes; without it the plan is shown: signet uninstall")}
	}
	return nil
}

func (a *app) uninstall(ctx context.Context, o *output, f *uninstallFlags) error {
	if err := f.check(o); err != nil {
		return err
	}
	cluster, err := a.openCluster(&f.kubeFlags)
	if err != nil {
		return err
	}
	defer cluster.Close()
	u := &uninstaller{a: a, cluster: cluster, f: f}
	if f.podsOnly {
		return u.lookForPods(ctx, o)
	}
	if err := u.look(ctx); err != nil {
		return err
	}
	if f.wait > 0 && len(u.plan.Pods) > 0 {
		if err := u.waitForPods(ctx, o); err != nil {
			return errors.Join(u.show(o), err)
		}
	}
	refused := u.refusal()
	if refused != nil && o.format == "manifest" {
		u.a.say("%s", u.named())
		return refused // kubectl gets nothing to delete
	}
	if !f.yes || refused != nil {
		if err := u.show(o); err != nil {
			return err
		}
		if refused == nil {
			u.tellNext()
		}
		return refused
	}
	if err := u.confirmed(); err != nil {
		return err
	}
	if o.isText() {
		if err := u.show(o); err != nil {
			return err
		}
	}
	if err := u.do(ctx); err != nil {
		return err
	}
	if o.isText() {
		return nil
	}
	return u.show(o)
}

// An uninstaller is one run.
type uninstaller struct {
	a         *app
	cluster   *kube.Operator
	f         *uninstallFlags
	now       time.Time
	driver    string
	operators string // namespace of people's ServiceAccounts
	ours      bool   // something says that this namespace has an installation
	plan      *uninstallPlan
}

// chartKinds are what the chart makes, in the order in which it goes: the driver's object first, so that from then on no pod
// gets the volume any more; then who works, then what they need. Whatever is on the list carries the chart's labels.
var chartKinds = []struct {
	apiVersion, kind, resource string
	cluster                    bool
	operators                  bool // in the operators' namespace as well
}{
	{"storage.k8s.io/v1", "CSIDriver", "csidrivers", true, false},
	{"apps/v1", "DaemonSet", "daemonsets", false, false},
	{"apps/v1", "StatefulSet", "statefulsets", false, false},
	{"policy/v1", "PodDisruptionBudget", "poddisruptionbudgets", false, false},
	{"v1", "Service", "services", false, false},
	{"networking.k8s.io/v1", "NetworkPolicy", "networkpolicies", false, false},
	{"v1", "ResourceQuota", "resourcequotas", false, false},
	{"v1", "ConfigMap", "configmaps", false, false},
	{"rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings", false, false},
	{"rbac.authorization.k8s.io/v1", "Role", "roles", false, false},
	{"rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings", true, false},
	{"rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles", true, false},
	// After the rights that they narrow down.
	{"admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings", true, false},
	{"admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy", "validatingadmissionpolicies", true, false},
	// Last, for the same command again finds by it that what is left is of this namespace.
	{"v1", "ServiceAccount", "serviceaccounts", false, true},
}

// look makes the plan.
func (u *uninstaller) look(ctx context.Context) error {
	if err := u.begin(ctx); err != nil {
		return err
	}
	i := &checkup{a: u.a, cluster: u.cluster, kf: &u.f.kubeFlags, report: new(checkReport)}
	i.readConfiguration(ctx) // what it cannot read it leaves at its default; its rows are for check
	u.driver = i.config.driver()
	td := u.describe(ctx, i.config.td)
	u.operators = cmp.Or(i.config.ca.Operators.Namespace, operatorsNamespace)
	for _, k := range chartKinds {
		namespaces := []string{u.f.namespace}
		switch {
		case k.cluster:
			namespaces = []string{""}
		case k.operators && u.operators != u.f.namespace:
			namespaces = []string{u.operators, u.f.namespace}
		}
		for _, namespace := range namespaces {
			if err := u.find(ctx, k.apiVersion, k.kind, k.resource, namespace); err != nil {
				return u.failed("list "+k.resource, err)
			}
		}
	}
	if !u.ours { // a mistyped namespace must not take another's driver away
		u.plan.Delete = []*objectRef{}
	}
	if err := u.findState(ctx, td); err != nil {
		return u.failed("find the state", err)
	}
	return u.findPods(ctx)
}

// describe names what the state is of. Where the configuration is gone already, the roots may say it.
func (u *uninstaller) describe(ctx context.Context, td spiffeid.TrustDomain) spiffeid.TrustDomain {
	if _, b, err := readPublished(ctx, u.cluster, u.f.namespace, td); err == nil { // or there is nothing to tell of it
		if b.numbered {
			u.plan.Generation = b.generation.String()
		}
		if names := b.domains(); td.IsZero() && len(names) == 1 {
			td, _ = spiffeid.TrustDomainFromString(names[0]) // zero, if it is none
		}
	}
	u.plan.TrustDomain = td.Name()
	return td
}

// find adds what of one kind is ours. Helm's objects say so.
func (u *uninstaller) find(ctx context.Context, apiVersion, kind, resource, namespace string) error {
	clusterWide := namespace == ""
	query := map[string][]string{"labelSelector": {labelPartOf + "=signet," + labelName + " in (" + caName + "," + agentName + ")"}}
	type object struct {
		Metadata kMeta `json:"metadata"`
		Subjects []struct {
			Namespace string `json:"namespace"`
		} `json:"subjects"` // of a ClusterRoleBinding
	}
	err := kube.Each(ctx, u.cluster, in(apiVersion, namespace, resource, ""), query, func(o object) error {
		m := o.Metadata
		for _, s := range o.Subjects {
			u.ours = u.ours || s.Namespace == u.f.namespace
		}
		switch {
		case kind == "CSIDriver" && m.Name != u.driver:
			return nil // of another installation
		case clusterWide && kind != "CSIDriver" && !strings.HasPrefix(m.Name, "signet"):
			return nil
		case kind == "ConfigMap" && (m.Name == bundleName || m.Labels[labelBundleCopy] != ""):
			return nil // state
		}
		u.ours = u.ours || namespace == u.f.namespace
		if release := m.Annotations["meta.helm.sh/release-name"]; release != "" {
			u.plan.HelmRelease = release
		}
		u.plan.Delete = append(u.plan.Delete, &objectRef{APIVersion: apiVersion, Kind: kind, Namespace: namespace, Name: m.Name, resource: resource, uid: m.UID})
		return nil
	})
	if errors.Is(err, kube.ErrNotFound) { // an API server that does not know the kind has none of it
		return nil
	}
	return err
}

// findState adds what a CA that is installed anew goes on with. It goes only with --delete-state, after everything else.
func (u *uninstaller) findState(ctx context.Context, td spiffeid.TrustDomain) error {
	add := func(apiVersion, kind, resource string, m kMeta) {
		u.plan.Keep = append(u.plan.Keep, &objectRef{APIVersion: apiVersion, Kind: kind, Namespace: m.Namespace, Name: m.Name, resource: resource, uid: m.UID})
	}
	err := kube.Each(ctx, u.cluster, in("v1", u.f.namespace, "persistentvolumeclaims", ""), nil, func(o kObject) error {
		// A StatefulSet names its claims TEMPLATE-NAME-ORDINAL.
		if template, _, ok := strings.Cut(o.Metadata.Name, "-"+caName+"-"); ok && (template == "state" || template == "seal") {
			add("v1", "PersistentVolumeClaim", "persistentvolumeclaims", o.Metadata)
		}
		return nil
	})
	if err != nil {
		return err
	}
	var m kObject
	switch _, err := u.cluster.Read(ctx, in("v1", u.f.namespace, "configmaps", bundleName), &m); {
	case err == nil:
		add("v1", "ConfigMap", "configmaps", m.Metadata)
	case !errors.Is(err, kube.ErrNotFound):
		return err
	}
	query := map[string][]string{"labelSelector": {labelBundleCopy + "=true"}}
	err = kube.Each(ctx, u.cluster, in("v1", "", "configmaps", ""), query, func(o kObject) error {
		if o.Metadata.Annotations[annotationCopyOf] == u.f.namespace+"/"+bundleName && o.Metadata.Namespace != u.f.namespace {
			add("v1", "ConfigMap", "configmaps", o.Metadata)
		}
		return nil
	})
	if err != nil {
		return err
	}
	// It outlives the namespace, so it may be all that is left, and all that says which trust domain it was.
	found := 0
	query = map[string][]string{"fieldSelector": {"spec.signerName=" + bundleSigner}}
	err = kube.Each(ctx, u.cluster, in(certificatesGroup+"/v1", "", "clustertrustbundles", ""), query, func(o kObject) error {
		left, ours := strings.CutPrefix(o.Metadata.Name, "signet.dev:bundle:")
		if found++; ours && td.IsZero() && found == 1 {
			u.plan.TrustDomain = left
		} else if td.IsZero() {
			u.plan.TrustDomain = "" // it may be either
		}
		if ours && (td.IsZero() || td.Name() == left) {
			add(certificatesGroup+"/v1", "ClusterTrustBundle", "clustertrustbundles", o.Metadata)
		}
		return nil
	})
	if errors.Is(err, kube.ErrNotFound) {
		return nil
	}
	return err
}

// failed says that the plan could not be made: then nothing is deleted.
func (u *uninstaller) failed(what string, err error) error {
	if errors.Is(err, kube.ErrForbidden) {
		return &failure{
			err:  api.Wrap(api.ClusterUnavailable, err, "your user may not "+what+": "+brief(err)),
			why:  "Without it nobody can tell what is in the way, and nothing was deleted.",
			next: u.f.kubectl("auth", "can-i", "--list"),
		}
	}
	return u.a.unreachable(u.cluster, err)
}

// maxShown bounds how many pods a table names; -o json names all.
const maxShown = 50

func (u *uninstaller) show(o *output) error {
	return u.a.print(o, result{
		object: u.plan, text: func(bool) []block { return u.plan.text() },
		raw: map[string]func(io.Writer) error{"manifest": u.plan.manifest},
	})
}

// text is the plan for people: first whose it is, then who is in the way, then what would go and what stays.
func (p *uninstallPlan) text() []block {
	blocks := []block{{pairs: known(
		pair{"API server", p.Server}, pair{"Namespace", p.Namespace}, pair{"Trust domain", p.TrustDomain}, pair{"Generation", p.Generation},
		pair{"Helm release", p.HelmRelease},
	)}}
	if len(p.Pods) > 0 {
		var rows [][]string
		for n, pod := range p.Pods {
			if n == maxShown {
				rows = append(rows, []string{"...", fmt.Sprintf("and %d more", len(p.Pods)-n), "-", "-"})
				break
			}
			rows = append(rows, []string{pod.Namespace, pod.Name, dash(pod.Node), dash(pod.Controller)})
		}
		blocks = append(blocks, block{title: "In the way, for they have the volume:", table: table([]column{{name: "Namespace"}, {name: "Pod"}, {name: "Node"}, {name: "Controller"}}, rows)})
	}
	for _, part := range []struct {
		title string
		refs  []*objectRef
	}{{"To be deleted, in this order:", p.Delete}, {"Kept, for an installation made anew:", p.Keep}} {
		var rows [][]string
		for _, r := range part.refs {
			rows = append(rows, []string{r.Kind, dash(r.Namespace), r.Name})
		}
		if len(rows) > 0 {
			blocks = append(blocks, block{title: part.title, table: table([]column{{name: "Kind"}, {name: "Namespace"}, {name: "Name"}}, rows)})
		}
	}
	return blocks
}

// manifest is what `kubectl delete -f -` takes: of each object no more than its name.
func (p *uninstallPlan) manifest(w io.Writer) error {
	for _, r := range p.Delete {
		namespace := ""
		if r.Namespace != "" {
			namespace = fmt.Sprintf("\n  namespace: %q", r.Namespace)
		}
		if _, err := fmt.Fprintf(w, "---\napiVersion: %s\nkind: %s\nmetadata:\n  name: %q%s\n", r.APIVersion, r.Kind, r.Name, namespace); err != nil {
			return err
		}
	}
	return nil
}

// tellNext says how to go on after a plan that nothing is in the way of.
func (u *uninstaller) tellNext() {
	switch {
	case len(u.plan.Delete) == 0:
		u.a.say("there is nothing to delete: Signet is not installed in namespace %s", u.f.namespace)
	case u.plan.HelmRelease != "":
		u.a.say("no pod has the volume; Helm made this installation: helm uninstall %s -n %s", quoted(u.plan.HelmRelease), u.f.namespace)
	default:
		u.a.say("no pod has the volume; to do it: %s", u.a.asCalled(u.f.signet("uninstall", "--yes")))
	}
}
