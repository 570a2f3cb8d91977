package deploy_test

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// What docs/cluster.md shows of permissions is what is installed, to the last word.
func TestDocs(t *testing.T) {
	page, err := os.ReadFile("../docs/cluster.md")
	if err != nil {
		t.Fatal(err)
	}
	var blocks []string
	for i, part := range strings.Split(string(page), "```") {
		if block, ok := strings.CutPrefix(part, "yaml\n"); i%2 == 1 && ok && strings.HasPrefix(block, "apiVersion: ") && !strings.Contains(block, "signet.dev/v1") {
			blocks = append(blocks, block)
		}
	}
	shown := trustRules(objects(t, []byte(strings.Join(blocks, "---\n"))))
	installed := trustRules(objects(t, renderings(t)["install"]))
	delete(installed, "signet-ca-token-review") // of docs/token-review.md
	for name := range peoplesRoles {            // of docs/operators.md, as the next two
		delete(installed, name)
	}
	delete(installed, "policy signet-operators")
	delete(installed, "binding signet-operators")
	delete(installed, "policy signet-downgrade") // of docs/upgrades.md, as the next
	delete(installed, "binding signet-downgrade")
	if d := cmp.Diff(installed, shown); d != "" || len(shown) != 7 {
		t.Errorf("%d objects (-installed +shown):\n%s", len(shown), d)
	}
}

// trustRules are the rules of roles and the specifications of policies, by kind and name.
func trustRules(all []runtime.Object) map[string]any {
	m := map[string]any{}
	for _, o := range all {
		switch o := o.(type) {
		case *rbacv1.ClusterRole:
			m[o.Name] = o.Rules
		case *rbacv1.Role:
			m[o.Namespace+"/"+o.Name] = o.Rules
		case *admissionv1.ValidatingAdmissionPolicy:
			m["policy "+o.Name] = o.Spec
		case *admissionv1.ValidatingAdmissionPolicyBinding:
			m["binding "+o.Name] = o.Spec
		}
	}
	return m
}
