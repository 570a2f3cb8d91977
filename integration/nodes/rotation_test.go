//go:build cluster && linux

package nodes_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/integration/nodes"
)

// ask runs the operator's tool as somebody with a role, and reads the JSON that it prints.
func (s *suite) ask(t *testing.T, kubeconfig, role string, out any, args ...string) (stderr string, code int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), s.signet, append([]string{"--timeout=1m", "--kubeconfig=" + kubeconfig, "--as-role=" + role, "-o", "json"}, args...)...)
	var stdout, talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &talk
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatal(err)
	}
	if err := json.Unmarshal(stdout.Bytes(), out); err != nil && cmd.ProcessState.ExitCode() != 1 {
		t.Fatalf("signet %s: %v: %s%s", strings.Join(args, " "), err, stdout.String(), talk.String())
	}
	return talk.String(), cmd.ProcessState.ExitCode()
}

// rotationStatus is the part of `signet rotate status -o json` that is read here.
type rotationStatus struct {
	State, Generation string
	Operation         *struct{ ID, Authority, Replaces string }
	Authorities       []struct{ ID, State string }
	Past              []struct{ ID, Outcome string }
}

func (r rotationStatus) stateOf(id string) string {
	for _, a := range r.Authorities {
		if a.ID == id {
			return a.State
		}
	}
	return ""
}

// shown are the certificates at each place where the cluster is shown the bundle: that of the agents, a copy, and the
// ClusterTrustBundle, as far as there are any.
func (s *suite) shown(ctx context.Context, namespace string) (map[string][]string, error) {
	places := map[string][]string{
		"ConfigMap":          {"configmap", "-n", signetNamespace, "signet-bundle", "-o", `jsonpath={.data.bundle\.pem}`},
		"copy":               {"configmap", "-n", namespace, "signet-bundle", "-o", `jsonpath={.data.bundle\.pem}`},
		"ClusterTrustBundle": {"clustertrustbundle", "signet.dev:bundle:" + trustDomain, "-o", "jsonpath={.spec.trustBundle}"},
	}
	found := map[string][]string{}
	for place, args := range places {
		text, err := s.Kubectl(ctx, "", append([]string{"get"}, args...)...)
		if err != nil {
			return nil, err
		}
		var certs []string
		for part := range strings.SplitSeq(text, "-----BEGIN CERTIFICATE-----") {
			if body, _, ok := strings.Cut(part, "-----END CERTIFICATE-----"); ok {
				certs = append(certs, strings.Join(strings.Fields(body), ""))
			}
		}
		slices.Sort(certs)
		found[place] = certs
	}
	return found, nil
}

// showing waits until every place shows so many roots, the same ones, and returns them.
func (s *suite) showing(t *testing.T, namespace string, n int) []string {
	t.Helper()
	var roots []string
	nodes.Eventually(t, fmt.Sprintf("%d roots wherever the bundle is shown", n), func(ctx context.Context) error {
		found, err := s.shown(ctx, namespace)
		if err != nil {
			return err
		}
		roots = found["ConfigMap"]
		for place, certs := range found {
			if len(certs) != n || !slices.Equal(certs, roots) {
				return fmt.Errorf("%s has %d", place, len(certs))
			}
		}
		return nil
	})
	return roots
}

// rotation: an operator rotates the root through the API server while two Envoys connect anew all the time, and whoever has the role
// for it declares the old one compromised. Nobody does either who may only look. All that shows the bundle follows.
func (s *suite) rotation(t *testing.T) {
	if !s.mesh {
		t.Skip("no Envoys run")
	}
	began := time.Now()
	s.namespace(t, "e2e-rotation")
	s.Must(t, "label", "namespace", "e2e-rotation", "signet.dev/bundle=true")
	viewer, operator, emergency := s.person(t, "e2e-rotation", "viewer"), s.person(t, "e2e-rotation", "operator"), s.person(t, "e2e-rotation", "emergency")
	for _, role := range []string{"viewer", "operator", "emergency"} {
		s.bindPerson(t, "e2e-rotation", role, "signet-"+role)
	}
	before := s.showing(t, "e2e-rotation", 1)

	// Who may what.
	var status rotationStatus
	nodes.Eventually(t, "a viewer looks", func(context.Context) error {
		if said, code := s.ask(t, viewer, "viewer", &status, "rotate", "status"); code != 0 {
			return errors.New(said)
		}
		return nil
	})
	for _, row := range []struct {
		who, kubeconfig string
		args            []string
		code            int
		says            string
	}{
		{"a viewer starts", viewer, []string{"rotate", "start"}, 1, "SGN-0911"},
		{"a viewer starts as an operator", viewer, []string{"--as-role=operator", "rotate", "start"}, 1, "SGN-0912"},
		{"an operator in an emergency", operator, []string{"--as-role=emergency", "rotate", "status"}, 1, "SGN-0912"},
		{"an operator takes a backup", operator, []string{"--as-role=operator", "backup", filepath.Join(t.TempDir(), "no")}, 1, "SGN-0911"},
	} {
		if out, code := s.as(t, row.kubeconfig, row.args...); code != row.code || !strings.Contains(out, row.says) {
			t.Errorf("%s: exit code %d, want %d with %q: %s", row.who, code, row.code, row.says, out)
		}
	}

	if out, code := s.as(t, viewer, "rotate", "plan"); code != 0 || !strings.Contains(out, "Cross-signed  yes") {
		t.Errorf("a viewer plans: exit code %d: %s", code, out)
	}

	// A rotation, as far as it goes in less than the life of an SVID.
	stop := s.load(t, "mesh", "checkout", "http://127.0.0.1:15001")
	var begun struct{ Rotation rotationStatus }
	if said, code := s.ask(t, operator, "operator", &begun, "rotate", "start", "--id=e2e", "--reason=e2e", "--soak=1s"); code != 0 || begun.Rotation.Operation == nil {
		t.Fatalf("an operator starts: exit code %d: %s", code, said)
	}
	old, fresh := begun.Rotation.Operation.Replaces, begun.Rotation.Operation.Authority
	nodes.Eventually(t, "the new root is active", func(context.Context) error {
		status = rotationStatus{}
		if _, code := s.ask(t, viewer, "viewer", &status, "rotate", "status"); code == 1 || status.stateOf(fresh) != "active" {
			said, _ := s.as(t, viewer, "rotate", "status")
			return fmt.Errorf("exit code %d: %s", code, said)
		}
		return nil
	})
	both := s.showing(t, "e2e-rotation", 2)
	if !slices.Contains(both, before[0]) || status.stateOf(old) != "retiring" {
		t.Errorf("the old root is %s, and is shown: %t", status.stateOf(old), slices.Contains(both, before[0]))
	}
	if a := stop(); a.Failed > 0 || a.Sent == 0 {
		t.Errorf("of those who connected meanwhile some failed: %+v", a)
	} else {
		figure(t, "a rotation: %d connections from its start until the new root was active and shown everywhere, none failed, in %v", a.Sent, time.Since(began).Round(time.Second))
	}

	// The old root is compromised: everything under it is reissued, and it goes.
	stop = s.load(t, "mesh", "checkout", "http://127.0.0.1:15001")
	declared := time.Now()
	declare := func(kubeconfig, role string) (said string, code int) {
		var plan struct{ Forecast struct{ Losing int } }
		if said, code := s.ask(t, kubeconfig, role, &plan, "rotate", "emergency", old, "--dry-run"); code != 0 && code != 3 {
			return said, code
		}
		var begun struct{ Rotation rotationStatus }
		return s.ask(t, kubeconfig, role, &begun, "rotate", "emergency", old, "--id=e2e-emergency", "--reason=e2e", fmt.Sprintf("--confirm=%d", plan.Forecast.Losing))
	}
	nodes.Eventually(t, "an operator may not declare it", func(context.Context) error {
		said, code := declare(operator, "operator")
		if code == 2 { // another pod came after the plan
			return errors.New(said)
		}
		if code != 1 || !strings.Contains(said, "SGN-0911") {
			t.Errorf("an operator declares an emergency: exit code %d: %s", code, said)
		}
		return nil
	})
	nodes.Eventually(t, "the emergency is declared", func(context.Context) error {
		if said, code := declare(emergency, "emergency"); code != 0 {
			return fmt.Errorf("exit code %d: %s", code, said)
		}
		return nil
	})
	nodes.Eventually(t, "the emergency is over", func(context.Context) error {
		status = rotationStatus{}
		if _, code := s.ask(t, viewer, "viewer", &status, "rotate", "status"); code == 1 || status.Operation != nil {
			return fmt.Errorf("exit code %d, %+v", code, status)
		}
		return nil
	})
	if n := len(status.Past); n == 0 || status.Past[n-1].ID != "e2e-emergency" || status.Past[n-1].Outcome != "done" || status.stateOf(fresh) != "active" || status.stateOf(old) != "" {
		t.Errorf("at the end: %+v", status)
	}
	during := stop()
	figure(t, "an emergency: from the command to the old root's removal %v; %d connections meanwhile, %d failed", time.Since(declared).Round(time.Millisecond), during.Sent, during.Failed)
	after := s.showing(t, "e2e-rotation", 1)
	if slices.Contains(after, before[0]) {
		t.Error("the compromised root is shown still")
	}
	if a, err := s.get(t.Context(), "mesh", "checkout", 20, "http://127.0.0.1:15001"); err != nil || a.Failed > 0 {
		t.Errorf("after the emergency: %+v, %v", a, err)
	}
	s.backup(t, emergency)
	figure(t, "rotation, emergency and backup in %v", time.Since(began).Round(time.Second))
}

// backup: who has the role takes a backup away through the API server, and one is made in the CA's pod; neither has a key in it that
// can be read.
func (s *suite) backup(t *testing.T, kubeconfig string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "backup")
	if out, code := s.as(t, kubeconfig, "--as-role=emergency", "backup", file, "--reason=e2e"); code != 0 {
		t.Fatalf("backup: exit code %d: %s", code, out)
	}
	away, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	inside, err := s.Kubectl(t.Context(), "", "exec", "-n", signetNamespace, "signet-ca-0", "-c", "ca", "--", "/usr/bin/signet-ca", "backup", "-")
	if err != nil {
		t.Fatal(err)
	}
	for where, data := range map[string][]byte{"through the API server": away, "in the pod": []byte(inside)} {
		if len(data) < 1000 || bytes.Contains(data, []byte("sealedKey")) || bytes.Contains(data, []byte("PRIVATE KEY")) {
			t.Errorf("the backup made %s has %d bytes, or is not sealed", where, len(data))
		}
	}
}
