package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/signet-ca/signet/internal/kube"
)

// Who may have a right is what RBAC's objects say: every binding that reaches a namespace, and the rules behind it. Other
// authorizers, such as those of a cloud, tell nobody whom they let in; and whoever may impersonate, bind or escalate can
// give himself what he lacks. docs/operators.md says so.

const rbacGroup = "rbac.authorization.k8s.io/v1"

type rbacRule struct {
	Verbs         []string `json:"verbs"`
	APIGroups     []string `json:"apiGroups"`
	Resources     []string `json:"resources"`
	ResourceNames []string `json:"resourceNames"`
}

type rbacRole struct {
	Metadata kMeta      `json:"metadata"`
	Rules    []rbacRule `json:"rules"`
}

type rbacBinding struct {
	Metadata kMeta `json:"metadata"`
	RoleRef  struct {
		Kind string `json:"kind"`
		Name string `json:"name"`
	} `json:"roleRef"`
	Subjects []rbacSubject `json:"subjects"`
}

type rbacSubject struct {
	Kind      string `json:"kind"`
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
}

// gives says whether a rule has a right, as the API server reads rules.
func (u rbacRule) gives(r right) bool {
	resource := r.resource
	if r.subresource != "" {
		resource += "/" + r.subresource
	}
	is := func(all []string, names ...string) bool {
		return slices.ContainsFunc(all, func(s string) bool { return s == "*" || slices.Contains(names, s) })
	}
	ofAny := []string{resource}
	if r.subresource != "" {
		ofAny = append(ofAny, "*/"+r.subresource)
	}
	return is(u.Verbs, r.verb) && is(u.APIGroups, r.group) && is(u.Resources, ofAny...) &&
		(len(u.ResourceNames) == 0 || r.name != "" && slices.Contains(u.ResourceNames, r.name))
}

// A subject is somebody whom RBAC gives a right.
type subject struct {
	who string
	by  roleKey // the binding
	all bool    // it is no group of people, but everybody or every pod
}

// everybody are the groups that nobody has to be put into.
var everybody = []string{"system:authenticated", "system:unauthenticated", "system:serviceaccounts"}

// roleKey names a role or a binding: the namespace is "" for that of a cluster.
type roleKey struct{ namespace, name string }

// binding is how the binding of that name is called in rows, and the line that shows it.
func (k roleKey) binding(f *kubeFlags) (object, line string) {
	if k.namespace == "" {
		return "clusterrolebinding/" + clip(k.name, 64), f.kubectl("get", "clusterrolebinding", k.name, "-o", "yaml")
	}
	return namespaced(k.namespace, "rolebinding", clip(k.name, 64)), f.kubectl("-n", k.namespace, "get", "rolebinding", k.name, "-o", "yaml")
}

// An accessReview is what RBAC says about some namespaces.
type accessReview struct {
	roles    map[roleKey][]rbacRule
	bindings []rbacBinding // of the cluster have no namespace
}

// readAccess reads the roles and bindings that reach the namespaces. The error comes with what could not be read.
func (i *checkup) readAccess(ctx context.Context, namespaces ...string) (*accessReview, string, error) {
	v := &accessReview{roles: map[roleKey][]rbacRule{}}
	addRole := func(r rbacRole) error {
		v.roles[roleKey{r.Metadata.Namespace, r.Metadata.Name}] = r.Rules
		return nil
	}
	addBinding := func(b rbacBinding) error {
		v.bindings = append(v.bindings, b)
		return nil
	}
	if err := kube.Each(ctx, i.cluster, in(rbacGroup, "", "clusterroles", ""), nil, addRole); err != nil {
		return nil, "list ClusterRoles", err
	}
	if err := kube.Each(ctx, i.cluster, in(rbacGroup, "", "clusterrolebindings", ""), nil, addBinding); err != nil {
		return nil, "list ClusterRoleBindings", err
	}
	for _, namespace := range namespaces {
		if err := kube.Each(ctx, i.cluster, in(rbacGroup, namespace, "roles", ""), nil, addRole); err != nil {
			return nil, "list Roles in " + namespace, err
		}
		if err := kube.Each(ctx, i.cluster, in(rbacGroup, namespace, "rolebindings", ""), nil, addBinding); err != nil {
			return nil, "list RoleBindings in " + namespace, err
		}
	}
	return v, "", nil
}

// who returns everybody who has one of the rights, sorted, each once.
func (v *accessReview) who(rights ...right) []subject {
	found := map[string]subject{}
	for _, b := range v.bindings {
		key := roleKey{name: b.RoleRef.Name}
		if b.RoleRef.Kind == "Role" {
			key.namespace = b.Metadata.Namespace
		}
		gives := func(r right) bool {
			return (b.Metadata.Namespace == "" || b.Metadata.Namespace == r.namespace) &&
				slices.ContainsFunc(v.roles[key], func(u rbacRule) bool { return u.gives(r) })
		}
		if !slices.ContainsFunc(rights, gives) {
			continue
		}
		for _, s := range b.Subjects {
			one := s.subject(roleKey{b.Metadata.Namespace, b.Metadata.Name})
			if _, ok := found[one.who]; !ok {
				found[one.who] = one
			}
		}
	}
	return slices.SortedFunc(maps.Values(found), func(a, b subject) int { return strings.Compare(a.who, b.who) })
}

func (s rbacSubject) subject(by roleKey) subject {
	kind := strings.ToLower(s.Kind)
	return subject{
		who: clip(kind, 16) + " " + clip(strings.TrimPrefix(s.Namespace+"/"+s.Name, "/"), 64), by: by,
		all: kind == "group" && slices.Contains(everybody, s.Name),
	}
}

// names lists some of them and counts the rest.
func names(all []subject) string {
	var some []string
	for _, s := range all[:min(len(all), maxNamed)] {
		some = append(some, s.who)
	}
	return strings.Join(some, ", ") + after(" and ", more(len(all)-maxNamed))
}

// tellEverybody reports those who are everybody, if there are any.
func (i *checkup) tellEverybody(all []subject, object, may string) bool {
	n := slices.IndexFunc(all, func(s subject) bool { return s.all })
	if n < 0 {
		return false
	}
	binding, line := all[n].by.binding(i.kf)
	i.add("operators", resultBad, object, fmt.Sprintf("%s %s, by %s", all[n].who, may, binding), line).settled = true
	return true
}

// checkWide tells of our roles bound in the whole cluster: then they also give tokens of any ServiceAccount anywhere that is
// called like one of the three.
func (i *checkup) checkWide(access *accessReview) {
	for _, b := range access.bindings {
		role, ours := strings.CutPrefix(b.RoleRef.Name, "signet-")
		if b.Metadata.Namespace != "" || !ours || b.RoleRef.Kind != "ClusterRole" || !slices.Contains(operatorRoles, role) {
			continue
		}
		object, line := roleKey{name: b.Metadata.Name}.binding(i.kf)
		i.add("operators", resultWarning, object, "it binds "+b.RoleRef.Name+" in the whole cluster: with it come tokens of the ServiceAccounts of that name in every namespace. Bind it in two",
			line).settled = true
	}
}

// minorUpgradeCreates is the Kubernetes 1.x from which a WebSocket to exec takes the right to create, and not that to get alone
// (AuthorizePodWebsocketUpgradeCreatePermission, on by default).
const minorUpgradeCreates = 35

// checkInside tells who may run something in the CA's pod: he has every role, at the admin socket, and the ledger does not
// know his name.
func (i *checkup) checkInside(access *accessReview) {
	object := namespaced(i.kf.namespace, "pod", caName+"-0")
	pod := right{resource: "pods", name: caName + "-0", namespace: i.kf.namespace}
	with := func(subresource, verb string) right {
		r := pod
		r.subresource, r.verb = subresource, verb
		return r
	}
	rights := []right{with("exec", "create"), with("ephemeralcontainers", "update"), with("ephemeralcontainers", "patch")}
	if i.minor < minorUpgradeCreates { // or not known
		rights = append(rights, with("exec", "get"))
	}
	all := access.who(rights...)
	switch {
	case i.tellEverybody(all, object, "may exec into it, and has every role there"):
	case len(all) == 0:
		i.good("operators", object, "nobody may exec into it, as far as RBAC says")
	default:
		i.good("operators", object, "may exec into it, and has every role there: %s", names(all))
	}
}
