//go:build cluster && linux

package nodes_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-ca/signet/integration/nodes"
)

var update = flag.Bool("update", false, "write golden files anew")

// tool runs the operator's tool on this cluster and returns what it printed, and its exit code.
func (s *suite) tool(t *testing.T, args ...string) (string, int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), s.signet, append(args, "--kubeconfig="+s.Kubeconfig)...)
	out, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return string(out), exit.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(out), 0
}

var bracketed = regexp.MustCompile(`\[[^\]]*\]`)

// rights: what the ServiceAccounts of Signet may do is what testdata/rights.txt says, and nothing more. After a change that
// is meant, `make e2e E2EFLAGS=-update` writes it anew.
func (s *suite) rights(t *testing.T) {
	s.Own(t) // an existing cluster may allow more to everybody
	var b strings.Builder
	for _, account := range []string{"signet-ca", "signet-agent"} {
		for _, namespace := range []string{signetNamespace, "default"} {
			fmt.Fprintf(&b, "%s in %s\n", account, namespace)
			out := s.Must(t, "auth", "can-i", "--list", "-n", namespace, "--as=system:serviceaccount:"+signetNamespace+":"+account,
				"--as-group=system:serviceaccounts", "--as-group=system:serviceaccounts:"+signetNamespace, "--as-group=system:authenticated")
			var lines []string
			for line := range strings.Lines(out) {
				// The API server lists what is in brackets in no order.
				lines = append(lines, bracketed.ReplaceAllStringFunc(strings.Join(strings.Fields(line), " "), func(list string) string {
					parts := strings.Fields(strings.Trim(list, "[]"))
					slices.Sort(parts)
					return "[" + strings.Join(parts, " ") + "]"
				}))
			}
			slices.Sort(lines[1:]) // the first has the columns' names
			for _, line := range lines {
				fmt.Fprintf(&b, "\t%s\n", line)
			}
		}
	}
	golden := "testdata/rights.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), b.String()); d != "" {
		t.Error(d)
	}
}

// uninstall: it refuses while pods have the volume, and names them; when they have gone, nothing that runs is left.
func (s *suite) uninstall(t *testing.T) {
	s.Must(t, "delete", "namespace", "-l", testLabel, "--timeout=3m")
	s.Must(t, "delete", "namespace", "shop", "--ignore-not-found", "--timeout=3m")
	s.namespace(t, "left")
	s.Apply(t, pod{namespace: "left", name: "over"}.json(s))
	s.Wait(t, "pod", "-n", "left", "over", "--for=condition=Ready")
	out, code := s.tool(t, "uninstall", "--yes")
	if code != 3 || !strings.Contains(out, "over") {
		t.Fatalf("with a pod left: exit code %d: %s", code, out)
	}
	s.Must(t, "delete", "namespace", "left", "--timeout=3m")
	if out, code = s.tool(t, "uninstall", "--wait=3m", "--yes"); code != 0 {
		t.Fatalf("exit code %d: %s", code, out)
	}
	nodes.Eventually(t, "its pods go", func(ctx context.Context) error {
		pods, err := s.Kubectl(ctx, "", "get", "pods", "-n", signetNamespace, "-o", "name")
		if err == nil && pods != "" {
			err = errors.New(pods)
		}
		return err
	})
	if len(s.Nodes) == 0 {
		s.Must(t, "delete", "namespace", signetNamespace, "--timeout=3m") // with the CA's state, which was of these tests alone
	}
	for _, n := range s.Nodes {
		left, err := filepath.Glob(filepath.Join(n.Dir, "kubelet", "plugins_registry", "*"))
		if err != nil || len(left) > 0 {
			t.Errorf("%s still has %v, %v", n.Name, left, err)
		}
	}
}
