//go:build cluster && linux

package nodes_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/signet-ca/signet/integration/controlplane"
	"github.com/signet-ca/signet/integration/nodes"
)

// as runs the operator's tool with a kubeconfig of a person and returns what it printed, and its exit code.
func (s *suite) as(t *testing.T, kubeconfig string, args ...string) (string, int) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), s.signet, append([]string{"--timeout=1m", "--kubeconfig=" + kubeconfig}, args...)...).CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return string(out), exit.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(out), 0
}

// person makes somebody who may do nothing yet, and returns his kubeconfig. It is a ServiceAccount, for those can be made on
// any cluster.
func (s *suite) person(t *testing.T, namespace, name string) string {
	t.Helper()
	s.Must(t, "create", "serviceaccount", "-n", namespace, name)
	token := strings.TrimSpace(s.Must(t, "create", "token", "-n", namespace, name, "--duration=1h"))
	var config map[string]any
	if err := json.Unmarshal([]byte(s.Must(t, "config", "view", "--raw", "--minify", "--flatten", "-o", "json")), &config); err != nil {
		t.Fatal(err)
	}
	users := config["users"].([]any)
	users[0].(map[string]any)["user"] = map[string]any{"token": token}
	data, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// bindPerson gives somebody a role as docs/operators.md says, in both namespaces.
func (s *suite) bindPerson(t *testing.T, namespace, name, role string) {
	t.Helper()
	for _, where := range []string{"signet-operators", signetNamespace} {
		binding := "e2e-" + name
		s.Must(t, "create", "rolebinding", "-n", where, binding, "--clusterrole="+role, "--serviceaccount="+namespace+":"+name)
		t.Cleanup(func() { s.afterwards(t, "delete", "rolebinding", "-n", where, binding, "--ignore-not-found") })
	}
}

// operators: people reach the CA through the API server and a kubelet, as the role that RBAC lets them have; the ledger has
// the id of the token, the API server's audit log whose it was, and `signet check` says who else could.
func (s *suite) operators(t *testing.T) {
	s.namespace(t, "e2e-people")
	viewer, operator, emergency := s.person(t, "e2e-people", "viewer"), s.person(t, "e2e-people", "operator"), s.person(t, "e2e-people", "emergency")
	nobody := s.person(t, "e2e-people", "nobody")
	for _, role := range []string{"viewer", "operator", "emergency"} {
		s.bindPerson(t, "e2e-people", role, "signet-"+role)
	}

	// Several at once, each by a connection of its own through the node.
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if out, code := s.as(t, viewer, "authority", "list"); code != 0 || !strings.Contains(out, "intermediate") {
				t.Errorf("a viewer looks: exit code %d: %s", code, out)
			}
		})
	}
	wg.Wait()
	node := strings.Fields(s.Must(t, "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}"))[0]
	for _, row := range []struct {
		who, kubeconfig string
		args            []string
		code            int
		says            string
	}{
		{"an operator looks", operator, []string{"--as-role=operator", "authority", "list"}, 0, "intermediate"},
		{"a viewer as an operator", viewer, []string{"--as-role=operator", "authority", "list"}, 1, "SGN-0912"},
		{"an operator in an emergency", operator, []string{"--as-role=emergency", "authority", "list"}, 1, "SGN-0912"},
		{"nobody", nobody, []string{"authority", "list"}, 1, "SGN-0912"},
		{"a viewer bans", viewer, []string{"node", "ban", node, "--dry-run"}, 1, "SGN-0911"},
		{"an operator bans", operator, []string{"--as-role=operator", "node", "ban", node, "--dry-run"}, 1, "SGN-0911"},
		{"who may in an emergency bans", emergency, []string{"--as-role=emergency", "node", "ban", node, "--dry-run"}, 0, node},
		{"a viewer asks who may", viewer, []string{"check"}, 3, ""}, // he may not see it all
	} {
		if out, code := s.as(t, row.kubeconfig, row.args...); code != row.code || !strings.Contains(out, row.says) {
			t.Errorf("%s: exit code %d, want %d with %q: %s", row.who, code, row.code, row.says, out)
		}
	}
	s.whoItWas(t, viewer)
	s.whoMay(t)

	// Who could do nothing can, once he is bound.
	s.bindPerson(t, "e2e-people", "nobody", "signet-operator")
	nodes.Eventually(t, "who was bound comes as an operator", func(context.Context) error {
		if out, code := s.as(t, nobody, "--as-role=operator", "authority", "list"); code != 0 {
			return errors.New(out)
		}
		return nil
	})
	if out, err := s.Kubectl(t.Context(), "", "run", "mole", "-n", "signet-operators", "--image=none"); err == nil || !strings.Contains(err.Error(), "orbidden") {
		t.Errorf("a pod beside the operators' ServiceAccounts: %v, %s", err, out)
	}
}

// whoItWas goes from the entries of the ledger to the people, by what docs/operators.md tells.
func (s *suite) whoItWas(t *testing.T, viewer string) {
	t.Helper()
	out, code := s.as(t, viewer, "audit", "--since=1h", "-o", "json")
	ids := map[string]string{} // of credentials, and the role they were for
	for _, m := range regexp.MustCompile(`sa:signet-operators/(viewer|operator|emergency) jti:([0-9a-f-]{36})`).FindAllStringSubmatch(out, -1) {
		ids[m[2]] = m[1]
	}
	roles := slices.Compact(slices.Sorted(maps.Values(ids)))
	if want := []string{"emergency", "operator", "viewer"}; code != 0 || !slices.Equal(roles, want) {
		t.Fatalf("the ledger knows %v: exit code %d: %.2000s", roles, code, out)
	}
	if s.Control == nil {
		return // an existing cluster keeps its audit log for itself
	}
	nodes.Eventually(t, "the API server's audit log has everybody", func(context.Context) error {
		whose, err := issued(s.Control.AuditLog())
		if err != nil {
			return err
		}
		came := map[string]bool{}
		for id, role := range ids {
			who := whose["JTI="+id]
			switch {
			case who == "system:serviceaccount:e2e-people:"+role:
				came[role] = true
			case who == "admin" && role == "viewer": // the suite's own `signet check`
			default:
				return fmt.Errorf("the credential %s, used as %s, was given to %q", id, role, who)
			}
		}
		if len(came) != len(roles) {
			return fmt.Errorf("of the people came %v", came)
		}
		return nil
	})
}

// issued reads an audit log: who was given which credential.
func issued(log string) (map[string]string, error) {
	data, err := os.ReadFile(log)
	if err != nil {
		return nil, err
	}
	whose := map[string]string{}
	for line := range strings.Lines(string(data)) {
		var event struct {
			User        struct{ Username string }
			Annotations map[string]string
		}
		if json.Unmarshal([]byte(line), &event) == nil { // the last one may be half written
			whose[event.Annotations["authentication.kubernetes.io/issued-credential-id"]] = event.User.Username
		}
	}
	return whose, nil
}

// whoMay: `signet check` says who may come as what, and who has every role in the CA's pod; and he has.
func (s *suite) whoMay(t *testing.T) {
	t.Helper()
	inside := s.person(t, "e2e-people", "inside")
	s.Must(t, "create", "role", "-n", signetNamespace, "e2e-inside", "--verb=create,get", "--resource=pods,pods/exec", "--resource-name=signet-ca-0")
	t.Cleanup(func() { s.afterwards(t, "delete", "role", "-n", signetNamespace, "e2e-inside", "--ignore-not-found") })
	s.Must(t, "create", "rolebinding", "-n", signetNamespace, "e2e-inside", "--role=e2e-inside", "--serviceaccount=e2e-people:inside")
	t.Cleanup(func() {
		s.afterwards(t, "delete", "rolebinding", "-n", signetNamespace, "e2e-inside", "--ignore-not-found")
	})
	out, _ := s.tool(t, "check", "-o", "json")
	var report struct {
		Items []struct {
			Metadata              struct{ Name string }
			Result, Object, Found string
		}
	}
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&report); err != nil { // its summary may follow
		t.Fatalf("%v: %s", err, out)
	}
	found := map[string]string{}
	for _, i := range report.Items {
		if i.Metadata.Name == "operators" {
			found[i.Object] = i.Result + ": " + i.Found
		}
	}
	for object, want := range map[string][]string{ // whom it names, and at the end whom not
		"signet-operators/serviceaccount/viewer":    {"e2e-people/viewer", "e2e-people/operator", "e2e-people/emergency", "group system:masters", "e2e-people/inside"},
		"signet-operators/serviceaccount/operator":  {"e2e-people/operator", "e2e-people/emergency", "group system:masters", "e2e-people/viewer"},
		"signet-operators/serviceaccount/emergency": {"e2e-people/emergency", "group system:masters", "e2e-people/operator"},
		"signet-system/pod/signet-ca-0":             {"e2e-people/inside", "group system:masters", "e2e-people/viewer"},
	} {
		for n, name := range want {
			if strings.Contains(found[object], name) != (n < len(want)-1) || !strings.HasPrefix(found[object], "good: ") {
				t.Errorf("%s: %q, and %s", object, found[object], name)
			}
		}
	}
	for name, want := range map[string]string{"viewer": "yes", "nobody": "no"} { // which is an exit code of 1
		out, err := s.Kubectl(t.Context(), "", "auth", "can-i", "create", "serviceaccounts/viewer", "--subresource", "token", "-n", "signet-operators", "--as", "system:serviceaccount:e2e-people:"+name)
		if strings.TrimSpace(out) != want {
			t.Errorf("%s may have a token of viewer: %q, %v", name, out, err)
		}
	}
	nodes.Eventually(t, "who may exec has every role", func(ctx context.Context) error {
		cmd := exec.CommandContext(ctx, os.Getenv(controlplane.BinaryVariable), "kubectl", "--kubeconfig="+inside,
			"exec", "-n", signetNamespace, "signet-ca-0", "-c", "ca", "--", "signet", "version", "--server")
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		for _, word := range []string{"viewer", "operator", "emergency", "uid:65532"} {
			if !strings.Contains(string(out), word) {
				t.Errorf("%s is not in: %s", word, out)
			}
		}
		return nil
	})
}
