package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/kube"
)

// The documents of a published bundle.
const (
	bundleJSON = "bundle.json"
	bundlePEM  = "bundle.pem"
)

// What a ClusterTrustBundle of ours is known by.
const (
	certificatesGroup = "certificates.k8s.io"
	bundleSigner      = "signet.dev/bundle"
)

// trustBundleName is that of the trust domain's ClusterTrustBundle.
func trustBundleName(td spiffeid.TrustDomain) string { return "signet.dev:bundle:" + td.Name() }

type configMap struct {
	Metadata kMeta             `json:"metadata"`
	Data     map[string]string `json:"data"`
}

// A publishedBundle is what a ConfigMap holds.
type publishedBundle struct {
	generation api.Generation
	numbered   bool // it says its generation
	roots      []*x509.Certificate
}

// parsePublished reads both documents, which must hold the same roots.
func parsePublished(td spiffeid.TrustDomain, data map[string]string) (*publishedBundle, error) {
	doc, err := spiffebundle.Parse(td, []byte(data[bundleJSON]))
	if err != nil {
		return nil, errors.New(bundleJSON + " is missing or does not parse")
	}
	b := &publishedBundle{roots: doc.X509Authorities()}
	if sequence, ok := doc.SequenceNumber(); ok {
		b.generation, b.numbered = api.FromSequence(sequence), true
	}
	pem, err := x509bundle.Parse(td, []byte(data[bundlePEM]))
	switch {
	case err != nil || data[bundlePEM] == "":
		return nil, errors.New(bundlePEM + " is missing or does not parse")
	case api.BundleHash(pem.X509Authorities()) != api.BundleHash(b.roots):
		return nil, errors.New(bundleJSON + " and " + bundlePEM + " hold different roots")
	case len(b.roots) == 0:
		return nil, errors.New("it holds no root")
	}
	return b, nil
}

// domains are the trust domains that roots name in their own certificates; a root of an upstream may name none.
func (b *publishedBundle) domains() []string {
	seen := map[string]bool{}
	var all []string
	for _, root := range b.roots {
		for _, u := range root.URIs {
			if u.Scheme == "spiffe" && !seen[u.Host] {
				seen[u.Host] = true
				all = append(all, u.Host)
			}
		}
	}
	return all
}

// readPublished reads the bundle that agents believe. Where the trust domain is not known from elsewhere, its roots may say it.
func readPublished(ctx context.Context, cluster *kube.Operator, namespace string, td spiffeid.TrustDomain) (configMap, *publishedBundle, error) {
	var m configMap
	if _, err := cluster.Read(ctx, in("v1", namespace, "configmaps", bundleName), &m); err != nil {
		return m, nil, err
	}
	if td.IsZero() {
		td = spiffeid.RequireTrustDomainFromString("unknown") // which is in no document
	}
	b, err := parsePublished(td, m.Data)
	if err != nil {
		return m, nil, errBundle{err}
	}
	return m, b, nil
}

// errBundle is an error of the bundle, rather than of the way to it.
type errBundle struct{ error }

// checkBundle looks at the bundle, and at how long its roots last.
func (i *checkup) checkBundle(ctx context.Context) {
	object := namespaced(i.kf.namespace, "configmap", bundleName)
	do := i.kf.kubectl("-n", i.kf.namespace, "logs", "statefulset/"+caName, "--all-containers")
	m, b, err := readPublished(ctx, i.cluster, i.kf.namespace, i.config.td)
	bad, isBad := errors.AsType[errBundle](err)
	switch {
	case errors.Is(err, kube.ErrNotFound):
		i.add("bundle", resultBad, object, "the CA has not published its bundle, and agents wait for it", do)
		return
	case isBad:
		i.add("bundle", resultBad, object, bad.Error()+": agents that start now trust nothing, and the CA did not put it right", do)
		return
	case err != nil:
		i.cannot("bundle", object, "read ConfigMaps in "+i.kf.namespace, err)
		return
	}
	i.bundle = m.Data
	for _, name := range b.domains() {
		if !i.config.td.IsZero() && name != i.config.td.Name() {
			i.add("bundle", resultBad, object, fmt.Sprintf("a root is of trust domain %.80q, and the configuration is of %q", name, i.config.td.Name()), do)
			return
		}
	}
	if !b.numbered {
		i.add("bundle", resultBad, object, "it has no generation (spiffe_sequence): the CA did not write it", do)
	} else {
		i.report.Generation = b.generation.String()
		i.good("bundle", object, "generation %s with %s", b.generation, plural(len(b.roots), "root"))
	}
	i.checkRoots(b.roots)
}

// checkRoots tells in time which root will end. A root is told of when a fifth of its life, but at most half a year, is
// left: moving to another takes as long as the longest laggard needs.
func (i *checkup) checkRoots(roots []*x509.Certificate) {
	type end struct{ result, found string }
	var ends []end
	var soonest time.Duration
	usable := 0
	for _, root := range roots {
		left := root.NotAfter.Sub(i.now)
		early := min(root.NotAfter.Sub(root.NotBefore)/5, 180*24*time.Hour)
		name := "root " + short(fmt.Sprintf("%x", root.SubjectKeyId))
		switch {
		case left <= 0:
			ends = append(ends, end{resultWarning, name + " has expired " + duration.HumanDuration(-left) + " ago, and is still in the bundle"})
			continue
		case root.NotBefore.After(i.now):
			ends = append(ends, end{resultWarning, name + " is not valid before " + stamp(root.NotBefore) + ": is a clock wrong?"})
			continue
		case left < early/6:
			ends = append(ends, end{resultBad, name + " expires in " + duration.HumanDuration(left) + ", " + stamp(root.NotAfter)})
		case left < early:
			ends = append(ends, end{resultWarning, name + " expires in " + duration.HumanDuration(left) + ", " + stamp(root.NotAfter)})
		}
		if usable++; usable == 1 || left < soonest {
			soonest = left
		}
	}
	const do = "signet authority list   # at the CA; a new root must be published long before the old one ends"
	for n, e := range ends {
		if usable == 0 {
			e.result = resultBad // nobody can trust anybody
		}
		if n == maxNamed {
			i.add("roots", e.result, "", fmt.Sprintf("and %s more", plural(len(ends)-n, "root")), do).settled = true
			break
		}
		i.add("roots", e.result, "", e.found, do).settled = true
	}
	if len(ends) == 0 {
		i.good("roots", "", "the first to expire has %s left", duration.HumanDuration(soonest))
	}
}

// checkCopies looks at the copies of the bundle that namespaces have asked for.
func (i *checkup) checkCopies(ctx context.Context) {
	if i.bundle == nil || i.policy == nil {
		return // checkBundle or checkNamespaces have told
	}
	current := 0
	var rows []*checkRow
	for _, namespace := range i.copies {
		object := namespaced(namespace, "configmap", bundleName)
		var m configMap
		err := i.get(ctx, in("v1", namespace, "configmaps", bundleName), &m)
		switch {
		case errors.Is(err, kube.ErrNotFound) && (i.config.ca.Publish.Kube == nil || !i.config.ca.Publish.Kube.Copies):
			rows = append(rows, &checkRow{Result: resultWarning, Object: object, Found: "the namespace has the label " + labelCopy + "=true, and the CA is told to make no copies",
				Do: "in ca.yaml: publish.kube.copies: true"})
		case errors.Is(err, kube.ErrNotFound):
			rows = append(rows, &checkRow{Result: resultBad, Object: object, Found: "the namespace has the label " + labelCopy + "=true, and there is no copy of the bundle",
				Do: i.kf.kubectl("-n", i.kf.namespace, "logs", "statefulset/"+caName)})
		case err != nil:
			i.cannot("copies", object, "read ConfigMaps in "+namespace, err)
			return
		case m.Metadata.Annotations[annotationCopyOf] != i.kf.namespace+"/"+bundleName:
			rows = append(rows, &checkRow{Result: resultBad, Object: object, Found: "a ConfigMap of this name is there that is no copy of ours: the CA leaves it alone",
				Do: i.kf.kubectl("-n", namespace, "get", "configmap", bundleName, "-o", "yaml") + "   # whose is it? Rename it, or remove the label"})
		case m.Data[bundleJSON] != i.bundle[bundleJSON] || m.Data[bundlePEM] != i.bundle[bundlePEM]:
			rows = append(rows, &checkRow{Result: resultBad, Object: object, Found: "the copy is not what is published: it is outdated, or somebody changed it",
				Do: i.kf.kubectl("-n", i.kf.namespace, "logs", "statefulset/"+caName)})
		default:
			current++
		}
	}
	for n, row := range rows {
		if n == maxNamed {
			i.add("copies", resultBad, "", fmt.Sprintf("and %s more", plural(len(rows)-n, "namespace")), i.kf.kubectl("get", "configmaps", "-A", "-l", labelBundleCopy))
			break
		}
		i.add("copies", row.Result, row.Object, row.Found, row.Do)
	}
	switch {
	case len(i.copies) == 0:
		i.good("copies", "", "no namespace asks for one")
	case len(rows) == 0:
		i.good("copies", "", "%s of the bundle, all current", counted(current, "copy", "copies"))
	}
}

func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// What copies of the bundle are known by.
const (
	annotationCopyOf = "signet.dev/copy-of" // NAMESPACE/NAME of the original
	labelBundleCopy  = "signet.dev/bundle-copy"
)

// checkTrustBundle compares the ClusterTrustBundle, where there is one, with the bundle.
func (i *checkup) checkTrustBundle(ctx context.Context) {
	if i.bundle == nil || i.config.td.IsZero() {
		return
	}
	name := trustBundleName(i.config.td)
	object := "clustertrustbundle/" + name
	var b struct {
		Spec struct {
			SignerName  string `json:"signerName"`
			TrustBundle string `json:"trustBundle"`
		} `json:"spec"`
	}
	err := i.get(ctx, in("certificates.k8s.io/v1", "", "clustertrustbundles", name), &b)
	do := i.kf.kubectl("-n", i.kf.namespace, "logs", "statefulset/"+caName)
	if errors.Is(err, kube.ErrNotFound) {
		i.noTrustBundle(ctx, object, do)
		return
	}
	if err != nil {
		i.cannot("trust-bundle", object, "read ClusterTrustBundles", err)
		return
	}
	shown, err := x509bundle.Parse(i.config.td, []byte(b.Spec.TrustBundle))
	ours, parseErr := x509bundle.Parse(i.config.td, []byte(i.bundle[bundlePEM]))
	switch {
	case err != nil || parseErr != nil:
		i.add("trust-bundle", resultBad, object, "it does not parse", do)
	case b.Spec.SignerName != bundleSigner:
		i.add("trust-bundle", resultBad, object, fmt.Sprintf("it is of the signer %.80q, which is not ours", b.Spec.SignerName), do)
	case !sameRoots(shown.X509Authorities(), ours.X509Authorities()):
		i.add("trust-bundle", resultBad, object, "its roots are not those of the published bundle: it is outdated, or somebody changed it", do)
	default:
		i.good("trust-bundle", object, "it holds the published roots")
	}
}

// noTrustBundle says what it means that there is none: the CA may not be told to keep one, or the API server not know any.
func (i *checkup) noTrustBundle(ctx context.Context, object, do string) {
	if k := i.config.ca.Publish.Kube; k == nil || !k.ClusterTrustBundle {
		i.good("trust-bundle", object, "there is none, and the CA is told to keep none")
		return
	}
	var kinds struct {
		Resources []struct {
			Name string `json:"name"`
		} `json:"resources"`
	}
	err := i.get(ctx, "/apis/"+certificatesGroup+"/v1", &kinds)
	if err != nil && !errors.Is(err, kube.ErrNotFound) {
		i.cannot("trust-bundle", object, "say which kinds of objects it knows", err)
		return
	}
	for _, k := range kinds.Resources {
		if k.Name == "clustertrustbundles" {
			i.add("trust-bundle", resultBad, object, "the CA is told to keep one, and there is none", do)
			return
		}
	}
	i.good("trust-bundle", object, "this API server knows no ClusterTrustBundles (certificates.k8s.io/v1), and agents need none")
}

// sameRoots compares sets: an API server may give certificates back in another order.
func sameRoots(x, y []*x509.Certificate) bool {
	set := func(roots []*x509.Certificate) map[string]bool {
		all := map[string]bool{}
		for _, c := range roots {
			all[string(c.Raw)] = true
		}
		return all
	}
	return maps.Equal(set(x), set(y))
}

// A right is one that a ServiceAccount needs, or must not have.
type right struct {
	group, resource, subresource, name, verb string
	namespace                                string // "": of all
}

func (r right) String() string {
	if r.verb == "*" {
		return "do everything to everything"
	}
	s := r.verb + " " + r.resource
	if r.subresource != "" {
		s += "/" + r.subresource
	}
	if r.group != "" {
		s += "." + r.group
	}
	if r.name != "" {
		s += " " + r.name
	}
	if r.namespace != "" {
		return s + " in " + r.namespace
	}
	return s
}

// needs are the rights of the CA's ServiceAccount, by its configuration. The agent's has none.
func (i *checkup) needs() []right {
	var all []right
	inCluster := func(kubeconfig string) bool { return kubeconfig == kube.InCluster }
	for _, issuer := range i.config.ca.Issuers {
		if inCluster(issuer.TokenReview.Kubeconfig) {
			all = append(all, right{group: "authentication.k8s.io", resource: "tokenreviews", verb: "create"})
		}
		if inCluster(issuer.Watch.Kubeconfig) {
			for _, resource := range []string{"pods", "serviceaccounts", "nodes"} {
				for _, verb := range []string{"get", "list", "watch"} {
					all = append(all, right{resource: resource, verb: verb})
				}
			}
		}
	}
	k := i.config.ca.Publish.Kube
	if k == nil || !inCluster(k.Kubeconfig) {
		return all
	}
	everywhere := i.kf.namespace
	if k.Copies {
		everywhere = ""
		for _, verb := range []string{"list", "watch"} {
			all = append(all, right{resource: "namespaces", verb: verb})
		}
	}
	all = append(all, right{resource: "configmaps", verb: "create", namespace: everywhere})
	for _, verb := range []string{"get", "list", "watch", "update"} {
		all = append(all, right{resource: "configmaps", name: bundleName, verb: verb, namespace: everywhere})
	}
	if k.ClusterTrustBundle && !i.config.td.IsZero() {
		all = append(all, right{group: certificatesGroup, resource: "clustertrustbundles", verb: "create"},
			right{group: certificatesGroup, resource: "signers", name: bundleSigner, verb: "attest"})
		for _, verb := range []string{"get", "update"} {
			all = append(all, right{group: certificatesGroup, resource: "clustertrustbundles", name: trustBundleName(i.config.td), verb: verb})
		}
	}
	return all
}

// tooMuch is what neither ServiceAccount may ever do: it would make who owns a node, or the CA, owner of the cluster.
var tooMuch = []right{
	{group: "*", resource: "*", verb: "*"},
	{resource: "secrets", verb: "list"},
	{resource: "pods", verb: "create"},
	{resource: "nodes", subresource: "proxy", verb: "get"},
	{resource: "serviceaccounts", subresource: "token", verb: "create"},
}

// checkPermissions asks the API server what our ServiceAccounts may do.
func (i *checkup) checkPermissions(ctx context.Context) {
	for _, account := range []struct {
		name  string
		needs []right
	}{{caName, i.needs()}, {agentName, nil}} {
		object := namespaced(i.kf.namespace, "serviceaccount", account.name)
		missing, err := i.rights(ctx, account.name, account.needs, false)
		if err != nil {
			i.cannot("permissions", object, "create SubjectAccessReviews", err)
			return
		}
		surplus, err := i.rights(ctx, account.name, tooMuch, true)
		if err != nil {
			i.cannot("permissions", object, "create SubjectAccessReviews", err)
			return
		}
		if len(missing) > 0 {
			i.add("permissions", resultBad, object, "it may not "+strings.Join(missing, ", "), i.install())
		}
		if len(surplus) > 0 {
			i.add("permissions", resultWarning, object, "it may "+strings.Join(surplus, ", ")+", which it does not need",
				i.kf.kubectl("get", "clusterrolebindings,rolebindings", "-A", "-o", "wide")+" | grep "+account.name).settled = true
		}
		if len(missing)+len(surplus) == 0 {
			i.good("permissions", object, "it has what it needs and nothing that is dangerous")
		}
	}
}

// rights returns which of all the account has, or has not.
func (i *checkup) rights(ctx context.Context, account string, all []right, has bool) ([]string, error) {
	var found []string
	for _, r := range all {
		allowed, err := i.review(ctx, "SubjectAccessReview", map[string]any{
			"user":               "system:serviceaccount:" + i.kf.namespace + ":" + account,
			"groups":             []string{"system:serviceaccounts", "system:serviceaccounts:" + i.kf.namespace, "system:authenticated"},
			"resourceAttributes": r.attributes(),
		})
		if err != nil {
			return nil, err
		}
		if allowed == has {
			found = append(found, r.String())
		}
	}
	return found, nil
}

// attributes are what a review asks about.
func (r right) attributes() map[string]string {
	m := map[string]string{"verb": r.verb, "group": r.group, "resource": r.resource, "subresource": r.subresource, "name": r.name, "namespace": r.namespace}
	maps.DeleteFunc(m, func(_, v string) bool { return v == "" })
	return m
}

// review posts one review of the kind authorization.k8s.io has, and returns its answer.
func (i *checkup) review(ctx context.Context, kind string, spec map[string]any) (allowed bool, err error) {
	ask := map[string]any{"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec}
	var answer struct {
		Status *struct {
			Allowed bool `json:"allowed"`
			Denied  bool `json:"denied"`
		} `json:"status"`
	}
	if err := i.cluster.Create(ctx, "/apis/authorization.k8s.io/v1/"+strings.ToLower(kind)+"s", ask, &answer); err != nil {
		return false, err
	}
	if answer.Status == nil {
		return false, errors.New("the answer is no " + kind)
	}
	return answer.Status.Allowed && !answer.Status.Denied, nil
}

// sharedSocketPolicy is the name of the ValidatingAdmissionPolicy, and of its binding, that the shared socket needs.
const sharedSocketPolicy = "signet-shared-socket"

// checkSharedSocket looks whether a shared socket is guarded: a pod that can write its folder collects its neighbours' tokens.
func (i *checkup) checkSharedSocket(ctx context.Context) {
	if i.config.agent.TrustDomain == "" {
		return // the agent's configuration could not be read
	}
	if i.config.agent.SharedSocket == "" {
		i.good("shared-socket", "", "it is off")
		return
	}
	const group = "admissionregistration.k8s.io/v1"
	for _, kind := range []string{"validatingadmissionpolicy", "validatingadmissionpolicybinding"} {
		object := kind + "/" + sharedSocketPolicy
		resource := strings.Replace(kind, "policy", "policies", 1)
		if kind != "validatingadmissionpolicy" {
			resource = kind + "s"
		}
		var o struct {
			Spec struct {
				FailurePolicy     string   `json:"failurePolicy"`
				PolicyName        string   `json:"policyName"`
				ValidationActions []string `json:"validationActions"`
			} `json:"spec"`
		}
		switch err := i.get(ctx, in(group, "", resource, sharedSocketPolicy), &o); {
		case errors.Is(err, kube.ErrNotFound):
			i.add("shared-socket", resultBad, object, "the shared socket is on, and this is not there: a pod that mounts its folder in a writable way collects its neighbours' tokens",
				"helm upgrade, with agent.sharedSocket: true in your values, which brings it; or set sharedSocket to false")
			return
		case err != nil:
			i.cannot("shared-socket", object, "read "+resource, err)
			return
		case kind == "validatingadmissionpolicy" && o.Spec.FailurePolicy == "Ignore":
			i.add("shared-socket", resultBad, object, "its failurePolicy is Ignore: what it cannot judge is let in", i.install())
			return
		case kind != "validatingadmissionpolicy" && (o.Spec.PolicyName != sharedSocketPolicy || len(o.Spec.ValidationActions) != 1 || o.Spec.ValidationActions[0] != "Deny"):
			i.add("shared-socket", resultBad, object, "it does not deny what the policy "+sharedSocketPolicy+" forbids", i.install())
			return
		}
	}
	i.good("shared-socket", "", "it is on, and its admission policy with it")
}
