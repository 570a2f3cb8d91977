//go:build cluster && linux

package nodes_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
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

// operators: people reach the CA through the API server and a kubelet, as the role that RBAC lets them have, and the ledger
// has the id of the token.
func (s *suite) operators(t *testing.T) {
	s.namespace(t, "e2e-people")
	viewer, operator, nobody := s.person(t, "e2e-people", "viewer"), s.person(t, "e2e-people", "operator"), s.person(t, "e2e-people", "nobody")
	s.bindPerson(t, "e2e-people", "viewer", "signet-viewer")
	s.bindPerson(t, "e2e-people", "operator", "signet-operator")

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
		{"a viewer asks who may", viewer, []string{"check"}, 3, ""}, // he may not see it all
	} {
		if out, code := s.as(t, row.kubeconfig, row.args...); code != row.code || !strings.Contains(out, row.says) {
			t.Errorf("%s: exit code %d, want %d with %q: %s", row.who, code, row.code, row.says, out)
		}
	}
	out, code := s.as(t, viewer, "audit", "--since=1h", "-o", "json")
	known := regexp.MustCompile(`sa:signet-operators/(viewer|operator) jti:[0-9a-f-]{36}`).FindAllStringSubmatch(out, -1)
	seen := map[string]bool{}
	for _, m := range known {
		seen[m[1]] = true
	}
	if code != 0 || !seen["viewer"] || !seen["operator"] {
		t.Errorf("the ledger knows %v: exit code %d: %.2000s", seen, code, out)
	}
	if out, err := s.Kubectl(t.Context(), "", "run", "mole", "-n", "signet-operators", "--image=none"); err == nil || !strings.Contains(err.Error(), "orbidden") {
		t.Errorf("a pod beside the operators' ServiceAccounts: %v, %s", err, out)
	}
}
