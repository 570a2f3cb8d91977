//go:build cluster && linux

package nodes_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-ca/signet/integration/nodes"
)

// The environment variables of the tests of upgrades.
const (
	previousVariable = "SIGNET_PREVIOUS" // folder of the version that was released last; `make e2e` builds it from git
	longVariable     = "E2E_LONG"        // not empty: what takes long is tested as well
)

// A build is a version of Signet.
type build struct {
	tool, chart, tag string
}

// An upgrader installs builds, one over the other.
type upgrader struct {
	*suite
	domain string // trust domain, of this one alone: agents remember the root of another on their nodes
	helm   string // the program; "": `signet install` and kubectl
	dir    string // Helm's own
}

// put installs a build over what is there, and returns what was said of it. Agents is the tag of theirs where it is another.
func (u *upgrader) put(t *testing.T, b build, agents string, wait bool) (string, error) {
	t.Helper()
	if u.helm != "" {
		args := []string{"upgrade", "--install", "signet", b.chart, "--timeout=5m",
			"--set=trustDomain=" + u.domain + ",policy.ttl=5m,image.repository=" + u.Registry + ",image.tag=" + b.tag}
		if wait {
			args = append(args, "--wait")
		}
		if agents != "" {
			args = append(args, "--set=agent.image="+u.Registry+"/signet-agent:"+agents)
		}
		return u.runHelm(t, args...)
	}
	out, err := exec.CommandContext(t.Context(), b.tool, "install", "--trust-domain="+u.domain, "--image-repository="+u.Registry, "--image-tag="+b.tag).Output()
	if err != nil {
		return string(out), err
	}
	manifests := string(out)
	if agents != "" {
		manifests = strings.ReplaceAll(manifests, "/signet-agent:"+b.tag, "/signet-agent:"+agents)
	}
	if text, err := u.Kubectl(t.Context(), manifests, "apply", "-f", "-"); err != nil {
		return text, err
	}
	if wait {
		u.rolledOut(t)
	}
	return "", nil
}

func (u *upgrader) runHelm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), u.helm, append(args, "--namespace="+signetNamespace, "--kubeconfig="+u.Kubeconfig)...)
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+u.dir, "HELM_CONFIG_HOME="+u.dir, "HELM_DATA_HOME="+u.dir)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (u *upgrader) must(t *testing.T, b build, agents string) {
	t.Helper()
	if out, err := u.put(t, b, agents, true); err != nil {
		t.Fatalf("installing %s with agents %q: %v: %s", b.tag, agents, err, out)
	}
}

func (s *suite) rolledOut(t *testing.T) {
	t.Helper()
	s.Must(t, "rollout", "status", "-n", signetNamespace, "statefulset/signet-ca", "--timeout=3m")
	s.Must(t, "rollout", "status", "-n", signetNamespace, "daemonset/signet-agent", "--timeout=3m")
}

// builds are the version that was released last and this one, with their images in the nodes.
func (s *suite) builds(t *testing.T) (previous, this build) {
	t.Helper()
	dir := os.Getenv(previousVariable)
	if dir == "" {
		t.Skip(previousVariable + " names no previous version; `make e2e` builds it where git's history goes back so far")
	}
	version, err := os.ReadFile(filepath.Join(dir, "version"))
	if err != nil {
		t.Fatal(err)
	}
	previous = build{tool: filepath.Join(dir, "bin", "signet"), chart: filepath.Join(dir, "chart"), tag: strings.TrimSpace(string(version))}
	rendering, err := exec.CommandContext(t.Context(), s.signet, "install").Output()
	tag := inImage.FindSubmatch(rendering)
	if err != nil || tag == nil {
		t.Fatalf("the images' tag is not known: %v", err)
	}
	this = build{tool: s.signet, chart: "../../deploy/chart/signet", tag: string(tag[1])}
	for _, part := range []string{"signet-ca", "signet-agent"} {
		files := map[string]string{"/usr/bin/" + part: filepath.Join(dir, "bin", part)}
		if part == "signet-ca" {
			files["/usr/bin/signet"] = previous.tool
		}
		s.ImportArchive(t, filepath.Join(os.Getenv(nodes.ImagesVariable), part+".tar"))
		s.Import(t, nodes.Image{Name: "localhost/" + part + ":" + previous.tag, Entrypoint: []string{"/usr/bin/" + part}, Files: files})
	}
	return previous, this
}

// upgrade goes from the version that was released last to this one while new connections are made all the time: first the
// CA, with the agents a version behind, then the agents. None fails. The way back is refused by the API server, and where
// somebody takes that away, by the CA, with a reason that check tells.
func (s *suite) upgrade(t *testing.T) {
	previous, this := s.builds(t)
	s.importEnvoy(t)
	u := &upgrader{suite: s, domain: "upgrade.test", helm: os.Getenv(helmVariable), dir: t.TempDir()}
	if u.helm == "" {
		s.upgradeBy(t, u, previous, this)
		return
	}
	if !t.Run("Helm", func(t *testing.T) { s.upgradeBy(t, u, previous, this) }) {
		return
	}
	t.Run("Install", func(t *testing.T) {
		if os.Getenv(longVariable) == "" {
			t.Skip("`make e2e E2E_LONG=1` does the same by `signet install`")
		}
		s.upgradeBy(t, &upgrader{suite: s, domain: "install.upgrade.test"}, previous, this)
	})
}

func (s *suite) upgradeBy(t *testing.T, u *upgrader, previous, this build) {
	u.begin(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(s.story(context.Background()))
		}
		u.end(t)
	})
	u.must(t, previous, "")
	s.Apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "mesh", "labels": {"`+testLabel+`": ""}}}`)
	s.Apply(t, strings.ReplaceAll(meshObjects, "TRUST_DOMAIN", u.domain)+"\n---\n"+
		s.envoyPod("payments", "payments", "payments", "node2", `["serve", "127.0.0.1:8080"]`)+
		s.envoyPod("checkout", "checkout", "client", "node1", "[]"))
	s.Wait(t, "pod", "-n", "mesh", "--all", "--for=condition=Ready")
	const payments = "http://127.0.0.1:15001"
	nodes.Eventually(t, "checkout to payments", func(ctx context.Context) error {
		a, err := s.get(ctx, "mesh", "checkout", 1, payments)
		if err == nil && a.Failed > 0 {
			err = fmt.Errorf("%+v", a)
		}
		return err
	})
	stop := s.load(t, "mesh", "checkout", payments)
	long := os.Getenv(longVariable) != ""
	snapshot := ""
	if long && len(s.Nodes) > 0 {
		snapshot = filepath.Join(t.TempDir(), "snapshot")
		state := u.state(t)
		u.Must(t, "scale", "-n", signetNamespace, "statefulset/signet-ca", "--replicas=0")
		u.Must(t, "wait", "-n", signetNamespace, "pod/signet-ca-0", "--for=delete", "--timeout=2m")
		copyFolder(t, state, snapshot)
		u.Must(t, "scale", "-n", signetNamespace, "statefulset/signet-ca", "--replicas=1")
	}

	if long && u.helm != "" {
		u.values(t, this)
	}

	// The agents stay behind, and are started anew: they attest themselves to the new CA, and bring pods what it issues.
	u.must(t, this, previous.tag)
	s.Must(t, "rollout", "restart", "-n", signetNamespace, "daemonset/signet-agent")
	s.rolledOut(t)
	u.connected(t, previous.tag)
	u.newPods(t, "behind")
	if out, _ := s.tool(t, "check"); !strings.Contains(out, "the CA is of version "+this.tag+" and the agents are of "+previous.tag) {
		t.Errorf("check does not say that the agents are behind: %s", out)
	}

	u.must(t, this, "")
	u.connected(t, this.tag)
	u.newPods(t, "after")
	if out, code := s.tool(t, "check"); code != 0 || !strings.Contains(out, "CA and agents are of version "+this.tag) {
		t.Errorf("check after the upgrade: exit code %d: %s", code, out)
	}

	u.downgrade(t, previous, this)
	if a := stop(); a.Failed > 0 || a.Sent == 0 {
		t.Errorf("of those who connected meanwhile some failed: %+v", a)
	} else {
		figure(t, "upgraded and back in vain: %d connections meanwhile, none failed", a.Sent)
	}
	u.forced(t, previous, this)
	if snapshot != "" {
		u.restored(t, previous, this, snapshot)
	}
	if long {
		u.skewed(t, this)
	}
}

// values: what the manual says of the values that a release was made with. Nothing is changed.
func (u *upgrader) values(t *testing.T, this build) {
	t.Helper()
	for flag, good := range map[string]bool{"--reset-then-reuse-values": true, "--reuse-values": false} {
		out, err := u.runHelm(t, "upgrade", "signet", this.chart, "--dry-run=server", flag, "--set=image.tag="+this.tag)
		if (err == nil) != good || good && !strings.Contains(out, "trustDomain: \""+u.domain+"\"") {
			t.Errorf("helm upgrade %s: %v: %.2000s", flag, err, out)
		}
	}
}

// state is the folder that is the volume of the CA's state.
func (u *upgrader) state(t *testing.T) string {
	t.Helper()
	volume := u.Must(t, "get", "persistentvolumeclaim", "-n", signetNamespace, "state-signet-ca-0", "-o", "jsonpath={.spec.volumeName}")
	return u.Must(t, "get", "persistentvolume", volume, "-o", "jsonpath={.spec.local.path}")
}

func copyFolder(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", from, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// restored goes back across the schema of the record as docs/upgrades.md says, by a snapshot, and to this version again.
func (u *upgrader) restored(t *testing.T, previous, this build, snapshot string) {
	t.Helper()
	u.Must(t, "delete", "validatingadmissionpolicybinding", "signet-downgrade")
	state := u.state(t)
	u.Must(t, "delete", "statefulset", "-n", signetNamespace, "signet-ca", "--cascade=foreground", "--timeout=2m")
	entries, err := os.ReadDir(state)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(state, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	copyFolder(t, snapshot+"/.", state)
	nodes.Eventually(t, "the older version", func(context.Context) error { // the guard acts for a moment longer
		out, err := u.put(t, previous, "", false)
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	})
	u.rolledOut(t)
	u.newPods(t, "restored")
	if image, _ := u.image(t); !strings.HasSuffix(image, ":"+previous.tag) {
		t.Errorf("the CA is %s", image)
	}
	u.must(t, this, "")
	u.connected(t, this.tag)
	u.newPods(t, "forward")
}

// begin makes a place where nothing of Signet was before.
func (u *upgrader) begin(t *testing.T) {
	u.Must(t, "delete", "namespace", signetNamespace, "--ignore-not-found", "--timeout=3m")
	// What outlives the namespace, and would say that there is a root already. Not every API server knows them.
	_, _ = u.Kubectl(t.Context(), "", "delete", "clustertrustbundle", "signet.dev:bundle:"+u.domain, "--ignore-not-found")
	if len(u.Nodes) > 0 {
		for _, claim := range []string{"state", "seal"} {
			u.Apply(t, u.Nodes[0].Volume(t, strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-"))+"-"+claim))
		}
	}
	if u.helm != "" {
		u.Apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "`+signetNamespace+`", "labels": {"pod-security.kubernetes.io/enforce": "privileged"}}}`)
	}
}

// end removes it all.
func (u *upgrader) end(t *testing.T) {
	u.afterwards(t, "delete", "namespace", "-l", testLabel, "--timeout=50s")
	remove := exec.Command(u.signet, "uninstall", "--wait=1m", "--yes", "--kubeconfig="+u.Kubeconfig)
	if u.helm != "" {
		remove = exec.Command(u.helm, "uninstall", "signet", "--no-hooks", "--timeout=1m", "--namespace="+signetNamespace, "--kubeconfig="+u.Kubeconfig)
		remove.Env = append(os.Environ(), "HELM_CACHE_HOME="+u.dir, "HELM_CONFIG_HOME="+u.dir, "HELM_DATA_HOME="+u.dir)
	}
	if out, err := remove.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// connected waits until the agents of all nodes have sessions, all of that version.
func (u *upgrader) connected(t *testing.T, version string) {
	t.Helper()
	nodes.Eventually(t, "sessions of agents of "+version, func(ctx context.Context) error {
		out, err := exec.CommandContext(ctx, u.signet, "node", "list", "-o", "json", "--kubeconfig="+u.Kubeconfig).Output()
		if err != nil {
			if exit, ok := errors.AsType[*exec.ExitError](err); ok {
				err = fmt.Errorf("%w: %s", err, exit.Stderr)
			}
			return err
		}
		var list struct {
			Items []struct {
				Connected    bool
				AgentVersion string
			}
		}
		if err := json.Unmarshal(out, &list); err != nil {
			return err
		}
		n := 0
		for _, item := range list.Items {
			if item.Connected && item.AgentVersion == version {
				n++
			}
		}
		if n != len(list.Items) || n < max(1, len(u.Nodes)) {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// newPods starts a pod on each node and waits for the SVIDs.
func (u *upgrader) newPods(t *testing.T, name string) {
	t.Helper()
	n, objects := max(1, len(u.Nodes)), ""
	for i := range n {
		p := pod{namespace: "mesh", name: fmt.Sprintf("%s-%d", name, i), app: name, args: `["svid"]`}
		if len(u.Nodes) > 0 {
			p.node = u.node(i)
		}
		objects += p.json(u.suite) + "---\n"
	}
	u.Apply(t, objects)
	for pod, r := range u.reports(t, "mesh", name, n) {
		if r.ID != "spiffe://"+u.domain+"/ns/mesh/sa/default" {
			t.Errorf("%s got %+v", pod, r)
		}
	}
}

// image is what the CA's StatefulSet runs, and the UID of its pod.
func (u *upgrader) image(t *testing.T) (image, uid string) {
	t.Helper()
	return u.Must(t, "get", "statefulset", "-n", signetNamespace, "signet-ca", "-o", "jsonpath={.spec.template.spec.containers[0].image}"),
		u.Must(t, "get", "pod", "-n", signetNamespace, "signet-ca-0", "-o", "jsonpath={.metadata.uid}")
}

// downgrade tries every way back, and the CA goes on.
func (u *upgrader) downgrade(t *testing.T, previous, this build) {
	t.Helper()
	image, uid := u.image(t)
	ways := map[string]func() (string, error){"installing": func() (string, error) { return u.put(t, previous, "", true) }}
	if u.helm != "" {
		ways["helm rollback"] = func() (string, error) { return u.runHelm(t, "rollback", "signet", "1", "--timeout=1m") }
	}
	for way, f := range ways {
		out, err := f()
		if said := fmt.Sprint(out, err); err == nil || !strings.Contains(said, "signet-downgrade") || !strings.Contains(said, "STATE_NEWER") {
			t.Errorf("%s the previous version: %v: %s", way, err, out)
		}
	}
	if now, same := u.image(t); now != image || same != uid {
		t.Errorf("the CA is %s (pod %s) now, and was %s (%s)", now, same, image, uid)
	}
	u.must(t, this, "") // what was gone back of the rest
	if out, code := u.tool(t, "check"); code != 0 {
		t.Errorf("check after a downgrade that was refused: exit code %d: %s", code, out)
	}
}

// forced takes the guard away and goes back all the same: the CA refuses, check says why, and this version goes on where it
// was.
func (u *upgrader) forced(t *testing.T, previous, this build) {
	t.Helper()
	u.Must(t, "delete", "validatingadmissionpolicybinding", "signet-downgrade")
	nodes.Eventually(t, "the downgrade", func(context.Context) error { // the guard acts for a moment longer
		out, err := u.put(t, previous, "", false)
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	})
	nodes.Eventually(t, "the older CA's refusal", func(ctx context.Context) error {
		out, err := u.Kubectl(ctx, "", "logs", "-n", signetNamespace, "signet-ca-0", "-c", "init")
		if err == nil && (!strings.Contains(out, "STATE_NEWER") || !strings.Contains(out, "the record has schema 2, this build knows 1")) {
			err = errors.New(out)
		}
		return err
	})
	nodes.Eventually(t, "what check says of it", func(context.Context) error {
		out, code := u.tool(t, "check")
		said := false
		for line := range strings.Lines(out) {
			said = said || strings.HasPrefix(line, "upgrade ") && strings.Contains(line, "BAD") && strings.Contains(line, "reads up to 1: it does not start (STATE_NEWER)")
		}
		if code != 3 || !said || !strings.Contains(out, "container init:") {
			return fmt.Errorf("exit code %d: %s", code, out)
		}
		return nil
	})
	u.must(t, this, "")
	u.connected(t, this.tag)
	u.newPods(t, "again")
	if out, code := u.tool(t, "check", "--wait=2m"); code != 0 {
		t.Errorf("check at the end: exit code %d: %s", code, out)
	}
}

// skewed rolls out agents that are too far ahead: the CA refuses them, the rollout ends at the first, and the others go on.
func (u *upgrader) skewed(t *testing.T, this build) {
	t.Helper()
	text, err := os.ReadFile("../../api/protocol.go")
	if err != nil {
		t.Fatal(err)
	}
	ahead := strings.NewReplacer("\tProtocol       = 1\n", "\tProtocol       = 3\n", "\tOldestProtocol = 1\n", "\tOldestProtocol = 2\n").Replace(string(text))
	if ahead == string(text) {
		t.Fatal("this build speaks other protocols than this test knows")
	}
	dir := t.TempDir()
	source, err := filepath.Abs("../../api/protocol.go")
	if err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {source: filepath.Join(dir, "protocol.go")}})
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{"protocol.go": ahead, "overlay.json": string(overlay)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-overlay="+filepath.Join(dir, "overlay.json"), "-o", filepath.Join(dir, "signet-agent"), "../../cmd/signet-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	u.Import(t, nodes.Image{Name: "localhost/signet-agent:ahead", Entrypoint: []string{"/usr/bin/signet-agent"}, Files: map[string]string{"/usr/bin/signet-agent": filepath.Join(dir, "signet-agent")}})

	if out, err := u.put(t, this, "ahead", false); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	const why = "the agent speaks protocol 2 to 3, this CA speaks 1: the CA has to be upgraded"
	nodes.Eventually(t, "the agent that is ahead says why", func(ctx context.Context) error {
		out, err := u.Kubectl(ctx, "", "logs", "-n", signetNamespace, "-l", "app.kubernetes.io/name=signet-agent", "--tail=50")
		if err == nil && (!strings.Contains(out, why) || !strings.Contains(out, "PROTOCOL_SKEW")) {
			err = errors.New(out)
		}
		return err
	})
	nodes.Eventually(t, "the CA's record of it", func(context.Context) error {
		if out, code := u.tool(t, "audit", "--reason=PROTOCOL_SKEW", "--since=1h", "-o", "json"); code != 0 || !strings.Contains(out, why) {
			return fmt.Errorf("exit code %d: %s", code, out)
		}
		return nil
	})
	if out, code := u.tool(t, "check"); code != 3 || !strings.Contains(out, "agents are of ahead") {
		t.Errorf("check of agents that are ahead: exit code %d: %s", code, out)
	}
	n := u.Must(t, "get", "daemonset", "-n", signetNamespace, "signet-agent", "-o", "jsonpath={.status.updatedNumberScheduled} {.status.numberReady}")
	if want := fmt.Sprintf("1 %d", len(u.Nodes)-1); len(u.Nodes) > 0 && n != want {
		t.Errorf("updated and ready: %q, want %q", n, want)
	}
	u.must(t, this, "")
	u.connected(t, this.tag)
	u.newPods(t, "same")
}
