//go:build cluster && linux

package nodes_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/integration/nodes"
)

// signetNamespace is where Signet is installed.
const signetNamespace = "signet-system"

// suite is the one cluster that all tests share, in the order in which TestCluster names them.
type suite struct {
	*nodes.Cluster
	signet string // the operator's tool

	hasEnvoy bool // the nodes have its image
	mesh     bool // the Envoys of testdata/mesh.yaml run

	ahead time.Duration // by which the clocks of the whole cluster are ahead
}

// TestCluster runs everything on one cluster: what is installed first is used by all that follows, and removed at the end.
func TestCluster(t *testing.T) {
	s := &suite{Cluster: nodes.Start(t), signet: filepath.Join(os.Getenv("SIGNET_BIN"), "signet")}
	failed := func(t *testing.T) {
		if t.Failed() {
			t.Log(s.story(context.Background()))
		}
	}
	for _, test := range []struct {
		name    string
		prepare bool // the others make no sense without it
		run     func(*suite, *testing.T)
	}{
		{"Services", true, (*suite).services},
		{"Install", true, (*suite).install},
		{"WorkloadAPI", false, (*suite).workloadAPI},
		{"Bundles", false, (*suite).bundles},
		{"Example", false, (*suite).example},
		{"Latency", false, (*suite).latency},
		// threat: G09
		{"Rights", false, (*suite).rights},
		// threat: L21, L22
		{"Operators", false, (*suite).operators},
		{"BreakGlass", false, (*suite).breakGlass},
		// threat: L19
		{"Loopback", false, (*suite).loopback},
		// threat: B21
		{"InitContainers", false, (*suite).initContainers},
		// threat: B20
		{"DebugContainer", false, (*suite).debugContainer},
		{"Refused", false, (*suite).refused},
		// threat: A01, A02, A07, A09, A10, A11, A12, A13, A15, A17, A23, B01, B05, D01
		{"Attacks", false, (*suite).attacks},
		// threat: B06
		{"Banned", false, (*suite).banned},
		{"Envoy", false, (*suite).envoy},
		{"Rotation", false, (*suite).rotation},
		// threat: B18, D16
		{"Replace", false, (*suite).replace},
		{"AgentsAway", false, (*suite).agentsAway},
		{"KillKubelet", false, (*suite).killKubelet},
		{"KillAtMoments", false, (*suite).killAtMoments},
		{"Leftovers", false, (*suite).leftovers},
		{"EmptyNotes", false, (*suite).emptyNotes},
		// threat: B08, K01, K02, K04, K10
		{"Clocks", false, (*suite).clocks},
		{"Reboot", false, (*suite).reboot},
		{"Crowd", false, (*suite).crowd},
		{"Uninstall", false, (*suite).uninstall},
		{"Helm", false, (*suite).helm},
		// threat: E23
		{"Upgrade", false, (*suite).upgrade},
		// threat: G01, K03, K08
		{"Away", false, (*suite).away}, // last: the clocks of all that runs are set
	} {
		if !t.Run(test.name, func(t *testing.T) { defer failed(t); test.run(s, t) }) && test.prepare {
			return
		}
	}
}

// story is what one has to know about a cluster in which a test failed.
func (s *suite) story(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var b strings.Builder
	b.WriteString(s.Events(ctx))
	for _, part := range []string{"signet-ca", "signet-agent"} {
		out, err := s.Kubectl(ctx, "", "logs", "-n", signetNamespace, "-l", "app.kubernetes.io/name="+part, "--all-containers", "--prefix", "--tail=40")
		fmt.Fprintf(&b, "%s\n", out)
		if err != nil {
			fmt.Fprintln(&b, err)
		}
	}
	return b.String()
}

// testLabel is on the namespaces of the tests.
const testLabel = "e2e.signet.dev/test"

// namespace makes a namespace that is gone after the test.
func (s *suite) namespace(t *testing.T, name string) {
	t.Helper()
	s.Apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "`+name+`", "labels": {"`+testLabel+`": ""}}}`)
	t.Cleanup(func() { s.deleteNamespace(t, name) })
}

func (s *suite) deleteNamespace(t *testing.T, name string) {
	t.Helper()
	s.afterwards(t, "delete", "namespace", name, "--wait=false", "--ignore-not-found")
}

// afterwards is Must for what puts things right again when a test is over.
func (s *suite) afterwards(t *testing.T, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := s.Kubectl(ctx, "", args...); err != nil {
		t.Error(err)
	}
}

// pod is what tests say of a pod; the rest is the same for all.
type pod struct {
	namespace, name, node string
	account               string // "" is the default
	args                  string // of the probe, JSON
	app                   string // label; "" is none
	more                  string // of the pod's spec, as JSON fields with a comma at the end
	volume                string // replaces the volume, JSON without braces
	noVolume              bool
	restart               string // policy; "" is Never
	beside, volumes       string // another container and more volumes, JSON
	mounts                string // more of the main container, JSON
}

// json is the object.
func (p pod) json(s *suite) string {
	volume, mount, account := "", "", ""
	if !p.noVolume {
		source := p.volume
		if source == "" {
			source = `"driver": "csi.signet.dev", "readOnly": true`
		}
		more := ""
		if p.volumes != "" {
			more = ", " + p.volumes
		}
		volume = `"volumes": [{"name": "signet", "csi": {` + source + `}}` + more + `],`
		mounts := ""
		if p.mounts != "" {
			mounts = ", " + p.mounts
		}
		mount = `"volumeMounts": [{"name": "signet", "mountPath": "/run/signet-workload", "readOnly": true}` + mounts + `],`
	}
	if p.account != "" {
		account = `"serviceAccountName": "` + p.account + `",`
	}
	args := p.args
	if args == "" {
		args = "[]"
	}
	beside := ""
	if p.beside != "" {
		beside = ", " + p.beside
	}
	restart := p.restart
	if restart == "" {
		restart = "Never"
	}
	node := ""
	if p.node != "" {
		node = `"nodeSelector": {"kubernetes.io/hostname": "` + p.node + `"},`
	}
	return fmt.Sprintf(`{"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": %q, "name": %q, "labels": {"app": %q}},
		"spec": {%s %s %s %s "restartPolicy": %q, "terminationGracePeriodSeconds": 1,
		"securityContext": {"runAsUser": 1000, "runAsNonRoot": true},
		"containers": [{"name": "main", "image": "%s/signet-probe:1", "imagePullPolicy": "IfNotPresent", %s "args": %s,
		"env": [{"name": "SPIFFE_ENDPOINT_SOCKET", "value": "unix:///run/signet-workload/agent.sock"}]}%s]}}
`, p.namespace, p.name, p.app, node, account, volume, p.more, restart, s.Registry, mount, args, beside)
}

// node is the name of one of our nodes; of an existing cluster's nothing is known.
func (s *suite) node(i int) string {
	if len(s.Nodes) == 0 {
		return ""
	}
	return s.Nodes[i].Name
}

// answer is what `probe get` prints.
type answer struct {
	Sent, Failed int
	Last         string
}

// get has the probe in a pod send requests, each on a connection of its own.
func (s *suite) get(ctx context.Context, namespace, pod string, times int, url string) (answer, error) {
	out, err := s.Kubectl(ctx, "", "exec", "-n", namespace, pod, "-c", "main", "--", "/probe", "get", fmt.Sprint(times), url)
	if err != nil {
		return answer{}, err
	}
	var a answer
	return a, json.Unmarshal([]byte(out), &a)
}

// services proves that the cluster is one: pods reach a Service by name, from beside it and from the other node.
func (s *suite) services(t *testing.T) {
	s.namespace(t, "plain")
	s.Apply(t, `{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "server", "namespace": "plain"},
		"spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]}}`+"\n---\n"+
		pod{namespace: "plain", name: "server", app: "server", node: s.node(0), noVolume: true, args: `["serve", ":8080"]`}.json(s)+"---\n"+
		pod{namespace: "plain", name: "beside", node: s.node(0), noVolume: true}.json(s)+"---\n"+
		pod{namespace: "plain", name: "across", node: s.node(1), noVolume: true}.json(s))
	s.Wait(t, "pod", "-n", "plain", "--all", "--for=condition=Ready")
	for _, from := range []string{"beside", "across"} {
		nodes.Eventually(t, from, func(ctx context.Context) error {
			a, err := s.get(ctx, "plain", from, 3, "http://server.plain.svc")
			if err == nil && a.Failed > 0 {
				err = fmt.Errorf("%+v", a)
			}
			return err
		})
	}
}

// install does what the manual tells a user to do.
func (s *suite) install(t *testing.T) {
	images := os.Getenv(nodes.ImagesVariable)
	if _, err := s.Kubectl(t.Context(), "", "get", "namespace", signetNamespace); err == nil {
		t.Fatalf("there is a namespace %s already, and what is in it is not for us to change", signetNamespace)
	}
	for _, name := range []string{"signet-ca", "signet-agent"} {
		s.ImportArchive(t, filepath.Join(images, name+".tar"))
	}
	if len(s.Nodes) > 0 {
		for _, claim := range []string{"state", "seal"} {
			s.Apply(t, s.Nodes[0].Volume(t, claim))
		}
	}
	out, err := exec.CommandContext(t.Context(), s.signet, "install", "--image-repository="+s.Registry).Output()
	if err != nil {
		t.Fatalf("signet install: %v", err)
	}
	s.Apply(t, string(out))
	if out, code := s.tool(t, "check", "--wait=3m"); code != 0 {
		t.Fatalf("signet check: exit code %d: %s", code, out)
	}
	s.Must(t, "rollout", "status", "-n", signetNamespace, "statefulset/signet-ca", "--timeout=3m")
	s.Must(t, "rollout", "status", "-n", signetNamespace, "daemonset/signet-agent", "--timeout=3m")
}

// report is what `probe svid` says: times in microseconds since 1970, but Again, which is how many it took once more, and
// Queued, how many its threads together waited for a processor until it had its first SVID.
type report struct {
	Started, SVID int64
	Again, Queued int64
	UID           int
	ID            string
	Authorities   int
	Files         []string // those that hold the same authorities

	created time.Time // of the pod, in whole seconds
}

// reports waits for the pods with that label to end and returns what they said, by the pod's name.
func (s *suite) reports(t *testing.T, namespace, app string, n int) map[string]report {
	t.Helper()
	got := make(map[string]report)
	nodes.Within(t, 3*time.Minute+time.Duration(n)*2*time.Second, "pods "+app, func(ctx context.Context) error {
		var list struct {
			Items []struct {
				Metadata struct {
					Name              string
					CreationTimestamp time.Time
				}
				Status struct {
					Phase             string
					ContainerStatuses []struct {
						State struct {
							Terminated *struct{ Message string }
						}
					}
				}
			}
		}
		if err := s.Get(ctx, &list, "pods", "-n", namespace, "-l", "app="+app); err != nil {
			return err
		}
		for _, p := range list.Items {
			if p.Status.Phase == "Failed" {
				t.Fatalf("pod %s failed: %+v", p.Metadata.Name, p.Status)
			}
			if p.Status.Phase == "Succeeded" {
				var r report
				if err := json.Unmarshal([]byte(p.Status.ContainerStatuses[0].State.Terminated.Message), &r); err != nil {
					t.Fatal(err)
				}
				r.created = p.Metadata.CreationTimestamp
				got[p.Metadata.Name] = r
			}
		}
		if len(got) < n {
			return fmt.Errorf("%d of %d have ended", len(got), n)
		}
		return nil
	})
	return got
}

// workloadAPI: a program that uses go-spiffe gets its SVID as a user that is not root.
func (s *suite) workloadAPI(t *testing.T) {
	s.namespace(t, "programs")
	s.Apply(t, pod{namespace: "programs", name: "one", app: "one", args: `["svid"]`}.json(s))
	got := s.reports(t, "programs", "one", 1)["one"]
	if got.ID != "spiffe://cluster.local/ns/programs/sa/default" || got.UID != 1000 || got.Authorities == 0 {
		t.Errorf("got %+v", got)
	}
}

// bundles has kubelet mount what a program trusts that never heard of Signet: the copy of the ConfigMap in its namespace,
// and the ClusterTrustBundle. Both hold what the Workload API says.
func (s *suite) bundles(t *testing.T) {
	s.namespace(t, "trusting")
	s.Must(t, "label", "namespace", "trusting", "signet.dev/bundle=true")
	s.Apply(t, pod{
		namespace: "trusting", name: "one", app: "one", args: `["svid", "/copy/bundle.pem", "/cluster/bundle.pem"]`,
		mounts: `{"name": "copy", "mountPath": "/copy", "readOnly": true}, {"name": "cluster", "mountPath": "/cluster", "readOnly": true}`,
		volumes: `{"name": "copy", "configMap": {"name": "signet-bundle"}},
			{"name": "cluster", "projected": {"sources": [{"clusterTrustBundle": {"name": "signet.dev:bundle:cluster.local", "path": "bundle.pem"}}]}}`,
	}.json(s))
	if got := s.reports(t, "trusting", "one", 1)["one"]; len(got.Files) != 2 {
		t.Errorf("the bundle is in %v alone", got.Files)
	}
}
