package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/signet-ca/signet/internal/kube"
)

// noPods is the ValidatingAdmissionPolicy, and its binding, that keeps pods out of the operators' namespace.
const noPods = "signet-operators"

// checkOperators looks at who may operate the CA: whoever asks, and everybody else as far as RBAC says it.
func (i *checkup) checkOperators(ctx context.Context) {
	o := i.config.ca.Operators
	if i.config.ca.TrustDomain == "" {
		return // its configuration could not be read
	}
	namespace := cmp.Or(o.Namespace, operatorsNamespace)
	if !namespaceShape.MatchString(namespace) {
		i.add("operators", resultBad, "", "the CA's configuration does not name their namespace", i.install())
		return
	}
	if o.Listen == "" {
		i.good("operators", "", "the CA has no port for them; it is operated from its own machine")
	} else {
		if !i.checkOperatorsNamespace(ctx, namespace) {
			return
		}
		i.checkGlass(o.BreakGlass)
	}
	access, what, err := i.readAccess(ctx, namespace, i.kf.namespace)
	if err != nil {
		i.cannot("operators", "", what+", which say who may operate the CA", err)
	}
	if o.Listen != "" {
		for _, role := range operatorRoles {
			i.checkRole(ctx, access, namespace, role)
		}
	}
	if access != nil {
		i.checkWide(access)
		i.checkInside(access)
	}
}

// checkRole tells who may come as a role; access is nil where it could not be read.
func (i *checkup) checkRole(ctx context.Context, access *accessReview, namespace, role string) {
	object := namespaced(namespace, "serviceaccount", role)
	found := "you may come as " + role
	switch err := i.mayComeAs(ctx, namespace, role); {
	case errors.Is(err, errMayNot):
		found = "you may not come as " + role
	case err != nil:
		i.cannot("operators", object, "create SelfSubjectAccessReviews", err)
		return
	}
	if access != nil {
		all := access.who(right{resource: "serviceaccounts", subresource: "token", name: role, verb: "create", namespace: namespace})
		if i.tellEverybody(all, object, "may have tokens of "+role) {
			return
		}
		found += after("; may have its tokens: ", names(all))
	}
	i.good("operators", object, "%s", found)
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
