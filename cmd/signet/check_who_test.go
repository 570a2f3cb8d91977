package main

import (
	"encoding/json"
	"strings"
	"testing"
)

// Rules are read as the API server reads them.
func TestRuleGives(t *testing.T) {
	token := right{resource: "serviceaccounts", subresource: "token", name: "viewer", verb: "create", namespace: "signet-operators"}
	all := []string{"*"}
	for _, row := range []struct {
		name string
		rule rbacRule
		want bool
	}{
		{"this", rbacRule{[]string{"create"}, []string{""}, []string{"serviceaccounts/token"}, []string{"viewer"}}, true},
		{"of every name", rbacRule{[]string{"get", "create"}, []string{"apps", ""}, []string{"pods", "serviceaccounts/token"}, nil}, true},
		{"everything", rbacRule{all, all, all, nil}, true},
		{"of every resource", rbacRule{all, all, []string{"*/token"}, nil}, true},
		{"of another name", rbacRule{all, all, all, []string{"operator"}}, false},
		{"the name is no pattern", rbacRule{all, all, all, []string{"*"}}, false},
		{"another verb", rbacRule{[]string{"get"}, all, all, nil}, false},
		{"another group", rbacRule{all, []string{"apps"}, all, nil}, false},
		{"the resource without what is below", rbacRule{all, all, []string{"serviceaccounts"}, nil}, false},
		{"all below the resource is no pattern", rbacRule{all, all, []string{"serviceaccounts/*"}, nil}, false},
		{"nothing", rbacRule{}, false},
	} {
		if got := row.rule.gives(token); got != row.want {
			t.Errorf("%s: %v, want %v", row.name, got, row.want)
		}
	}
	if !(rbacRule{all, all, all, nil}).gives(right{resource: "pods", verb: "list", namespace: "x"}) {
		t.Error("everything does not give a list")
	}
}

// Whatever roles and bindings say, what is repeated of them is short, and a line to type is one.
func FuzzAccess(f *testing.F) {
	f.Add(`{"metadata":{"name":"r"},"rules":[{"verbs":["*"],"apiGroups":["*"],"resources":["*"]}]}`,
		`{"metadata":{"name":"b"},"roleRef":{"kind":"ClusterRole","name":"r"},"subjects":[{"kind":"Group","name":"system:authenticated"},{"kind":"User","name":"x"}]}`)
	f.Add(`{"metadata":{"name":"signet-viewer","namespace":"signet-system"},"rules":[{"verbs":["get"],"apiGroups":[""],"resources":["*/exec"],"resourceNames":["signet-ca-0"]}]}`,
		`{"metadata":{"name":"-;$(x)","namespace":"signet-system"},"roleRef":{"kind":"Role","name":"signet-viewer"},"subjects":[{"kind":"ServiceAccount","name":"a","namespace":"b"},{}]}`)
	f.Add(`{}`, `{"roleRef":{"kind":"ClusterRole","name":"signet-emergency"}}`)
	f.Fuzz(func(t *testing.T, role, binding string) {
		var r rbacRole
		var b rbacBinding
		if json.Unmarshal([]byte(role), &r) != nil || json.Unmarshal([]byte(binding), &b) != nil {
			return
		}
		access := &accessReview{roles: map[roleKey][]rbacRule{{r.Metadata.Namespace, r.Metadata.Name}: r.Rules}, bindings: []rbacBinding{b, b}}
		i := &checkup{a: &app{name: "signet"}, now: testNow, report: &checkReport{}, kf: &kubeFlags{namespace: defaultNamespace}}
		i.checkInside(access)
		i.checkWide(access)
		all := access.who(right{resource: "pods", subresource: "exec", name: "signet-ca-0", verb: "get", namespace: defaultNamespace})
		for n := 1; n < len(all); n++ {
			if all[n-1].who >= all[n].who {
				t.Errorf("%q before %q", all[n-1].who, all[n].who)
			}
		}
		for _, row := range i.report.Items {
			if len(row.Found) > 4*maxFound {
				t.Errorf("it says %d bytes", len(row.Found))
			}
			for word := range strings.FieldsSeq(row.Do) {
				if !safeWord.MatchString(word) && !ourFlags.MatchString(word) {
					t.Errorf("%q is in the line %q", word, row.Do)
				}
			}
		}
	})
}
