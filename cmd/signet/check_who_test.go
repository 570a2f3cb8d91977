package main

import "testing"

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
