package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/signet-ca/signet/internal/kube"
)

// noPods is the ValidatingAdmissionPolicy, and its binding, that keeps pods out of the operators' namespace.
const noPods = "signet-operators"

// checkOperators looks at who may operate the CA, as far as RBAC says it: whoever asks, and who is bound to our roles. What
// else gives somebody tokens in that namespace nobody can list.
func (i *checkup) checkOperators(ctx context.Context) {
	o := i.config.ca.Operators
	switch {
	case i.config.ca.TrustDomain == "":
		return // its configuration could not be read
	case o.Listen == "":
		i.good("operators", "", "the CA has no port for them; it is operated from its own machine")
		return
	}
	namespace := cmp.Or(o.Namespace, operatorsNamespace)
	if !namespaceShape.MatchString(namespace) {
		i.add("operators", resultBad, "", "the CA's configuration does not name their namespace", i.install())
		return
	}
	if !i.checkOperatorsNamespace(ctx, namespace) {
		return
	}
	i.checkGlass(o.BreakGlass)
	bound := i.boundTo(ctx, namespace)
	for _, role := range operatorRoles {
		object := namespaced(namespace, "serviceaccount", role)
		found := []string{}
		switch err := i.mayComeAs(ctx, namespace, role); {
		case errors.Is(err, errMayNot):
			found = append(found, "you may not come as "+role)
		case err != nil:
			i.cannot("operators", object, "create SelfSubjectAccessReviews", err)
			continue
		default:
			found = append(found, "you may come as "+role)
		}
		if whose := bound[role]; len(whose) > 0 {
			found = append(found, "bound: "+strings.Join(whose, ", "))
		}
		i.good("operators", object, "%s", strings.Join(found, "; "))
	}
}

// checkOperatorsNamespace looks whether the roles are there, and no pods.
func (i *checkup) checkOperatorsNamespace(ctx context.Context, namespace string) bool {
	for _, role := range operatorRoles {
		object := namespaced(namespace, "serviceaccount", role)
		switch err := i.get(ctx, in("v1", namespace, "serviceaccounts", role), new(kObject)); {
		case errors.Is(err, kube.ErrNotFound):
			i.add("operators", resultBad, object, "it is not there, so nobody can come as "+role, i.install())
			return false
		case err != nil:
			i.cannot("operators", object, "read ServiceAccounts in "+namespace, err)
			return false
		}
	}
	object := "namespace/" + namespace
	var names []string
	err := kube.Each(ctx, i.cluster, in("v1", namespace, "pods", ""), nil, func(p kObject) error {
		names = append(names, p.Metadata.Name)
		return nil
	})
	lacks, policyErr := i.admissionLacks(ctx, noPods)
	switch {
	case err != nil:
		i.cannot("operators", object, "list the pods of "+namespace, err)
	case len(names) > 0:
		i.add("operators", resultBad, object, plural(len(names), "pod")+" in the namespace of the operators' ServiceAccounts: "+clip(strings.Join(names, ", "), maxFound),
			i.kf.kubectl("-n", namespace, "get", "pods"))
	case policyErr != nil:
		i.cannot("operators", object, "read validatingadmissionpolicies", policyErr)
	case lacks != "":
		i.add("operators", resultWarning, object, "nothing keeps pods out of it: "+lacks, i.install()).settled = true
	default:
		i.good("operators", object, "it has no pods, and a policy keeps it so")
	}
	return true
}

// admissionLacks says why a ValidatingAdmissionPolicy and its binding of the same name do not deny; "" where they do.
func (i *checkup) admissionLacks(ctx context.Context, name string) (string, error) {
	const group = "admissionregistration.k8s.io/v1"
	var policy, binding struct {
		Spec struct {
			FailurePolicy     string   `json:"failurePolicy"`
			PolicyName        string   `json:"policyName"`
			ValidationActions []string `json:"validationActions"`
		} `json:"spec"`
	}
	for resource, into := range map[string]any{"validatingadmissionpolicies": &policy, "validatingadmissionpolicybindings": &binding} {
		switch err := i.get(ctx, in(group, "", resource, name), into); {
		case errors.Is(err, kube.ErrNotFound):
			return "of " + resource + " there is no " + name, nil
		case err != nil:
			return "", err
		}
	}
	switch {
	case policy.Spec.FailurePolicy == "Ignore":
		return "the ValidatingAdmissionPolicy " + name + " lets in what it cannot judge", nil
	case binding.Spec.PolicyName != name || !slices.Contains(binding.Spec.ValidationActions, "Deny"):
		return "the ValidatingAdmissionPolicyBinding " + name + " does not deny", nil
	}
	return "", nil
}

// checkGlass tells in time which break-glass certificate will end.
func (i *checkup) checkGlass(all []string) {
	for _, text := range all {
		der, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			continue // the CA says so, and does not start
		}
		c, err := x509.ParseCertificate(der)
		if err != nil || len(c.URIs) != 1 {
			continue
		}
		name := clip(c.URIs[0].String(), maxFound)
		switch left := c.NotAfter.Sub(i.now); {
		case left <= 0:
			i.add("break-glass", resultWarning, "", name+" has expired", "signet break-glass create --help").settled = true
		case left < 60*24*time.Hour:
			i.add("break-glass", resultWarning, "", name+" expires in "+duration.HumanDuration(left), "signet break-glass create --help").settled = true
		default:
			i.good("break-glass", "", "%s is let in, until %s", name, c.NotAfter.UTC().Format(time.DateOnly))
		}
	}
}

// errMayNot says that the user lacks a right.
var errMayNot = errors.New("not allowed")

// mayComeAs asks the API server whether this user has what operating as a role takes.
func (i *checkup) mayComeAs(ctx context.Context, namespace, role string) error {
	for _, r := range []right{
		{resource: "serviceaccounts", subresource: "token", name: role, verb: "create", namespace: namespace},
		{resource: "pods", verb: "list", namespace: i.kf.namespace},
		{resource: "pods", subresource: "portforward", name: caName + "-0", verb: "create", namespace: i.kf.namespace},
		{resource: "pods", subresource: "portforward", name: caName + "-0", verb: "get", namespace: i.kf.namespace},
		{resource: "configmaps", name: bundleName, verb: "get", namespace: i.kf.namespace},
	} {
		ok, err := i.review(ctx, "SelfSubjectAccessReview", map[string]any{"resourceAttributes": r.attributes()})
		if err != nil {
			return err
		}
		if !ok {
			return errMayNot
		}
	}
	return nil
}

// boundTo returns who is bound to our roles in the operators' namespace, by role; nothing where that may not be seen.
func (i *checkup) boundTo(ctx context.Context, namespace string) map[string][]string {
	type binding struct {
		RoleRef struct {
			Kind string `json:"kind"`
			Name string `json:"name"`
		} `json:"roleRef"`
		Subjects []struct {
			Kind      string `json:"kind"`
			Name      string `json:"name"`
			Namespace string `json:"namespace"`
		} `json:"subjects"`
	}
	bound := map[string]map[string]bool{}
	err := kube.Each(ctx, i.cluster, in("rbac.authorization.k8s.io/v1", namespace, "rolebindings", ""), nil, func(b binding) error {
		role, ours := strings.CutPrefix(b.RoleRef.Name, "signet-")
		at := slices.Index(operatorRoles, role)
		if !ours || b.RoleRef.Kind != "ClusterRole" || at < 0 {
			return nil
		}
		for _, s := range b.Subjects {
			who := strings.ToLower(s.Kind) + " " + clip(strings.TrimPrefix(s.Namespace+"/"+s.Name, "/"), 64)
			for _, r := range operatorRoles[:at+1] { // whoever may have the larger may have the smaller
				if bound[r] == nil {
					bound[r] = map[string]bool{}
				}
				bound[r][who] = true
			}
		}
		return nil
	})
	if err != nil {
		return nil
	}
	all := map[string][]string{}
	for role, whose := range bound {
		all[role] = slices.Sorted(maps.Keys(whose))
	}
	return all
}
