//go:build cluster && linux

package nodes_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/integration/nodes"
	"github.com/signet-ca/signet/sds"
)

// attacks: somebody who owns the second node asks the real CA for all that tokens of the real API server can be made to say.
// He gets the identities of the pods on his node, and nothing else.
func (s *suite) attacks(t *testing.T) {
	s.Own(t)
	s.namespace(t, "attacks")
	s.namespace(t, "elsewhere")
	for _, account := range []string{"one", "two", "anew"} {
		s.Must(t, "create", "serviceaccount", "-n", "attacks", account)
	}
	var all strings.Builder
	for _, p := range []pod{
		{namespace: "attacks", name: "one", account: "one", node: s.node(0)},
		{namespace: "attacks", name: "two", account: "two", node: s.node(1)},
		{namespace: "attacks", name: "going", node: s.node(1)},
		{namespace: "attacks", name: "frozen", node: s.node(1)},
		{namespace: "attacks", name: "anew", account: "anew", node: s.node(1)},
		{namespace: "attacks", name: "done", app: "done", node: s.node(1), args: `["svid"]`},
		{namespace: "elsewhere", name: "theirs", node: s.node(1)},
		{namespace: signetNamespace, name: "mole", account: "signet-agent", node: s.node(1), noVolume: true},
	} {
		all.WriteString(p.json(s) + "---\n")
	}
	t.Cleanup(func() {
		s.afterwards(t, "delete", "pod", "-n", signetNamespace, "mole", "--wait=false", "--ignore-not-found")
	})
	fmt.Fprintf(&all, `{"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"namespace": "attacks", "name": "db"}, "spec": {"serviceName": "db",
		"selector": {"matchLabels": {"app": "db"}}, "template": {"metadata": {"labels": {"app": "db"}}, "spec": {"terminationGracePeriodSeconds": 1,
		"nodeSelector": {"kubernetes.io/hostname": %q}, "containers": [{"name": "main", "image": "%s/signet-probe:1"}]}}}}`, s.node(1), s.Registry)
	s.Apply(t, all.String())
	s.Wait(t, "pod", "-n", "attacks", "one", "two", "going", "frozen", "anew", "db-0", "--for=condition=Ready")
	s.Wait(t, "pod", "-n", "elsewhere", "theirs", "--for=condition=Ready")
	s.Wait(t, "pod", "-n", signetNamespace, "mole", "--for=condition=Ready")
	s.reports(t, "attacks", "done", 1)

	f := s.newThief(t, s.Nodes[1], s.node(1))
	f.enter(t)
	if err := f.try(t, s.bound(t, "attacks", "two", []string{workloadAudience})); err != nil {
		t.Fatalf("a pod of the thief's own node: %v", err) // or what follows proves nothing
	}
	for _, test := range []struct {
		name string
		run  func(*suite, *testing.T, *thief)
	}{
		{"tokens", (*suite).attackTokens},
		{"an editor's tokens", (*suite).attackEditor},
		{"no agent", (*suite).attackAgents},
		{"ports", (*suite).attackPorts},
		{"a pod's socket", (*suite).attackSocket},
		{"recreated", (*suite).attackRecreated},
		{"deleted", (*suite).attackDeleted},
		{"kubelet frozen", (*suite).attackFrozen},
		{"node gone", (*suite).attackNode},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(s, t, f) })
	}
	s.onRecord(t, api.NodeMismatch, api.TokenAudience, api.TokenAudienceNotExclusive, api.TokenNotPodBound, api.TokenReplayedElsewhere,
		api.PodDeleted, api.PodMismatch, api.NotAnAgent)
}

// onRecord looks for refusals with these reasons.
func (s *suite) onRecord(t *testing.T, reasons ...api.Reason) {
	t.Helper()
	for _, reason := range reasons {
		out, code := s.tool(t, "--timeout=1m", "audit", "--since=1h", "--reason="+string(reason), "--no-headers")
		if code != 0 || !strings.Contains(out, string(reason)) {
			t.Errorf("%s is not on record: exit code %d: %s", reason, code, out)
		}
	}
}

// attackTokens: tokens that are none of the pods on the thief's node, or not for the CA alone.
func (s *suite) attackTokens(t *testing.T, f *thief) {
	own := []string{workloadAudience}
	two := s.bound(t, "attacks", "two", own)
	kubeletsOwn := filepath.Join(filepath.Dir(s.Nodes[1].Dir), s.node(1)+".kubeconfig")
	if token, err := s.tryBound(t, "attacks", "one", own, "--kubeconfig="+kubeletsOwn); err == nil || !strings.Contains(err.Error(), "orbidden") {
		t.Errorf("the second node's kubelet gets a token of a pod on the first: %d bytes, %v", len(token), err)
	}
	mounted, err := filepath.Glob(filepath.Join(s.Nodes[1].Root(), "var/lib/kubelet/pods", s.uid(t, "pod", "-n", "attacks", "two"), "volumes/kubernetes.io~projected/kube-api-access-*/token"))
	if err != nil || len(mounted) != 1 {
		t.Fatalf("the pod's token for the API server: %v, %v", mounted, err)
	}
	forAPI, err := os.ReadFile(mounted[0])
	if err != nil {
		t.Fatal(err)
	}
	unbound := strings.TrimSpace(s.Must(t, "create", "token", "-n", "attacks", "two", "--audience="+workloadAudience))
	for _, row := range []struct {
		name, token string
		want        api.Reason
	}{
		{"of a pod on the other node", s.bound(t, "attacks", "one", own), api.NodeMismatch},
		{"for the API server", string(forAPI), api.TokenAudience},
		{"for agents", s.bound(t, "attacks", "two", []string{agentAudience}), api.TokenAudience},
		{"for people", s.bound(t, "attacks", "two", []string{"signet-admin:cluster.local"}), api.TokenAudience},
		{"for the CA of another trust domain", s.bound(t, "attacks", "two", []string{"signet:other.example"}), api.TokenAudience},
		{"for the CA and the API server", s.bound(t, "attacks", "two", []string{workloadAudience, "https://kubernetes.default.svc.cluster.local"}), api.TokenAudienceNotExclusive},
		{"of no pod", unbound, api.TokenNotPodBound},
		{"of a pod that has finished", s.bound(t, "attacks", "done", own), api.PodDeleted},
	} {
		if err := f.try(t, row.token); refused(err) != row.want {
			t.Errorf("%s: %v, want %s", row.name, err, row.want)
		}
	}
	if _, err := f.issue(t, f.client, two, "first"); err != nil {
		t.Error(err)
	}
	if _, err := f.issue(t, f.client, two, "second"); refused(err) != api.TokenReplayedElsewhere {
		t.Errorf("a token for another volume: %v", err)
	}
}

// attackEditor: who may edit a namespace may have tokens for its pods. He has no session of an agent; and of another namespace
// he has no tokens. In league with the thief he is who he is already: a pod of his namespace on the thief's node.
func (s *suite) attackEditor(t *testing.T, f *thief) {
	kubeconfig := "--kubeconfig=" + s.person(t, "attacks", "editor")
	s.Must(t, "create", "rolebinding", "-n", "attacks", "editor", "--clusterrole=edit", "--serviceaccount=attacks:editor")
	token := s.bound(t, "attacks", "one", []string{workloadAudience}, kubeconfig)
	if _, err := s.tryBound(t, "elsewhere", "theirs", []string{workloadAudience}, kubeconfig); err == nil || !strings.Contains(err.Error(), "orbidden") {
		t.Errorf("a token of another namespace: %v", err)
	}
	nobody := apiv1.NewAuthorityClient(f.dial(t))
	if _, err := f.issue(t, nobody, token, "mine"); refused(err) != api.AgentIdentityRequired {
		t.Errorf("by himself: %v", err)
	}
	if err := f.try(t, token); refused(err) != api.NodeMismatch {
		t.Errorf("with the thief of another node: %v", err)
	}
	forAgents := s.bound(t, "attacks", "one", []string{agentAudience}, kubeconfig)
	if err := (&thief{s: s, pid: f.pid, ca: f.ca}).attest(t, forAgents); refused(err) != api.NotAnAgent {
		t.Errorf("as an agent: %v", err)
	}
}

// attackAgents: a pod that runs as the agents do, on a node that he likes, is no agent: their DaemonSet does not control it.
func (s *suite) attackAgents(t *testing.T, f *thief) {
	mole := s.bound(t, signetNamespace, "mole", []string{agentAudience})
	if err := (&thief{s: s, pid: f.pid, ca: f.ca}).attest(t, mole); refused(err) != api.NotAnAgent {
		t.Errorf("an agent's SVID: %v", err)
	}
	if err := (&thief{s: s, pid: f.pid, ca: f.ca, certificate: f.certificate}).open(t, mole); refused(err) != api.NotAnAgent {
		t.Errorf("a session by a stolen SVID: %v", err)
	}
	// Nor is the agent of one node that of another, though both are.
	other := s.agentToken(t, s.node(0))
	if err := (&thief{s: s, pid: f.pid, ca: f.ca, certificate: f.certificate}).open(t, other); refused(err) != api.NodeMismatch {
		t.Errorf("a session for the other node: %v", err)
	}
}

// attackPorts: an SVID opens nothing but what it is for.
func (s *suite) attackPorts(t *testing.T, f *thief) {
	token := s.bound(t, "attacks", "two", []string{workloadAudience})
	workload, err := f.issue(t, f.client, token, "ports")
	if err != nil {
		t.Fatal(err)
	}
	as := apiv1.NewAuthorityClient(f.dial(t, workload))
	if _, err := f.issue(t, as, token, "ports"); refused(err) != api.AgentIdentityRequired {
		t.Errorf("a workload's SVID asks for SVIDs: %v", err)
	}
	if err := (&thief{s: s, pid: f.pid, ca: f.ca, certificate: workload}).open(t, s.agentToken(t, f.node)); refused(err) != api.AgentIdentityRequired {
		t.Errorf("a workload's SVID opens a session: %v", err)
	}
	alone := apiv1.NewAuthorityClient(f.dial(t, f.certificate))
	if _, err := f.issue(t, alone, token, "ports"); err != nil {
		t.Errorf("another connection of an agent that has a session: %v", err)
	}
	late := &thief{s: s, pid: f.pid, ca: f.ca}
	if err := late.attest(t, s.agentToken(t, f.node)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.issue(t, apiv1.NewAuthorityClient(f.dial(t, late.certificate)), token, "ports"); refused(err) != api.SessionRequired {
		t.Errorf("an agent without a session: %v", err)
	}

	pids, err := s.Nodes[0].Processes("signet-ca")
	if err != nil || len(pids) != 1 {
		t.Fatalf("processes of the CA: %v, %v", pids, err)
	}
	for who, certificate := range map[string]tls.Certificate{"an agent": f.certificate, "a workload": workload} {
		conn, err := grpc.NewClient("passthrough:///operators", grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dialIn(ctx, pids[0], "127.0.0.1:8444") }),
			grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{certificate}})))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, look := apiv1.NewAdminClient(conn).GetStatus(ctx, &apiv1.GetStatusRequest{})
		_, ban := apiv1.NewAdminClient(conn).BanNode(ctx, &apiv1.BanNodeRequest{Node: s.node(0)})
		_, open := apiv1.NewAuthorityClient(conn).Issue(ctx, &apiv1.IssueRequest{})
		_, admin := apiv1.NewAdminClient(f.dial(t, certificate)).GetStatus(ctx, &apiv1.GetStatusRequest{})
		for what, row := range map[string]struct {
			err  error
			want api.Reason
		}{
			"looks": {look, api.OperatorRequired}, "bans a node": {ban, api.OperatorRequired},
			"asks for an SVID at the operators' port": {open, api.CallUnknown}, "looks at the agents' port": {admin, api.CallUnknown},
		} {
			if got := refused(api.FromStatus(row.err)); row.err == nil || got != row.want {
				t.Errorf("%s %s: %v, want %s", who, what, row.err, row.want)
			}
		}
	}
}

// attackSocket: on its own socket a pod gets its own secrets, whatever it asks for.
func (s *suite) attackSocket(t *testing.T, _ *thief) {
	folder, err := os.Open(filepath.Join(s.volumeFolder(s.uid(t, "pod", "-n", "attacks", "two")), "mount"))
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	socket := fmt.Sprintf("unix:///proc/self/fd/%d/agent.sock", folder.Fd()) // the whole path is longer than that of a socket may be
	conn, err := grpc.NewClient(socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const theirs = "spiffe://cluster.local/ns/attacks/sa/going"
	ask := func(names ...string) (*discovery.DiscoveryResponse, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := secret.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
		if err != nil {
			return nil, err
		}
		_ = stream.Send(&discovery.DiscoveryRequest{TypeUrl: sds.TypeURL, ResourceNames: names}) // an error is told by Recv
		return stream.Recv()
	}
	if resp, err := ask(sds.NameDefault); err != nil || len(resp.GetResources()) != 1 {
		t.Fatalf("its own: %v, %v", resp.GetResources(), err)
	}
	for _, name := range []string{theirs, "spiffe://cluster.local/ns/attacks/sa/one", "spiffe://cluster.local/ns/attacks/sa/twox"} {
		if resp, err := ask(name); err == nil || api.ReasonOf(api.FromStatus(err)) != api.ResourceNotAuthorized {
			t.Errorf("%s: %v, %v", name, resp.GetResources(), err)
		}
		if resp, err := ask(name, sds.NameDefault); err != nil || len(resp.GetResources()) != 1 {
			t.Errorf("%s beside its own: %d resources, %v", name, len(resp.GetResources()), err)
		}
	}
}

// attackRecreated: what was made anew under the same name is somebody else.
func (s *suite) attackRecreated(t *testing.T, f *thief) {
	own := []string{workloadAudience}
	old := s.bound(t, "attacks", "anew", own)
	if err := f.try(t, old); err != nil {
		t.Fatal(err)
	}
	s.Must(t, "delete", "serviceaccount", "-n", "attacks", "anew")
	s.Must(t, "create", "serviceaccount", "-n", "attacks", "anew")
	made := time.Now()
	cutOff(t, "the token of a ServiceAccount that was made anew", made, f.until(t, old, api.PodMismatch, api.TokenReviewRefused))
	cutOff(t, "a token of the new ServiceAccount for the old one's pod", made, f.until(t, s.bound(t, "attacks", "anew", own), api.PodMismatch))

	old = s.bound(t, "attacks", "db-0", own)
	if err := f.try(t, old); err != nil {
		t.Fatal(err)
	}
	was := s.uid(t, "pod", "-n", "attacks", "db-0")
	s.Must(t, "delete", "pod", "-n", "attacks", "db-0", "--wait=false")
	nodes.Eventually(t, "db-0 made anew", func(ctx context.Context) error {
		now, err := s.Kubectl(ctx, "", "get", "pod", "-n", "attacks", "db-0", "-o", "jsonpath={.metadata.uid}")
		if err == nil && now == was {
			err = errors.New("it is the old one")
		}
		return err
	})
	made = time.Now()
	cutOff(t, "the token of a StatefulSet's pod that was made anew", made, f.until(t, old, api.PodDeleted, api.TokenReviewRefused))
	s.Wait(t, "pod", "-n", "attacks", "db-0", "--for=condition=Ready")
	if err := f.try(t, s.bound(t, "attacks", "db-0", own)); err != nil {
		t.Errorf("the new pod: %v", err)
	}
}

// attackDeleted: the API server takes the token of a pod for good until 60 s after its deletion time, and keeps its answer for
// ten more. The CA does not.
func (s *suite) attackDeleted(t *testing.T, f *thief) {
	token := s.bound(t, "attacks", "going", []string{workloadAudience})
	if err := f.try(t, token); err != nil {
		t.Fatal(err)
	}
	hold := func(finalizers string) []string {
		return []string{"patch", "pod", "-n", "attacks", "going", "--type=merge", "-p", `{"metadata": {"finalizers": ` + finalizers + `}}`}
	}
	s.Must(t, hold(`["e2e.signet.dev/hold"]`)...) // so that the object stays
	t.Cleanup(func() { s.afterwards(t, hold("null")...) })
	at := s.goes(t, "attacks", "going", 1)
	cutOff(t, "the token of a deleted pod", at, f.until(t, token, api.PodDeleted))
	if time.Since(at) < 30*time.Second && !s.vouches(t, token) {
		t.Error("the API server refuses it as well, so nothing was proven")
	}
	if err := f.try(t, token); refused(err) != api.PodDeleted {
		t.Errorf("once more: %v", err)
	}
}

// attackFrozen: kubelet does nothing any more, so the pod is there and runs for all that the API server knows.
func (s *suite) attackFrozen(t *testing.T, f *thief) {
	token := s.bound(t, "attacks", "frozen", []string{workloadAudience})
	if err := f.try(t, token); err != nil {
		t.Fatal(err)
	}
	thaw := halt(t, f.pid)
	at := s.goes(t, "attacks", "frozen", 5)
	cutOff(t, "the token of a deleted pod whose kubelet is frozen", at, f.until(t, token, api.PodDeleted))
	if time.Since(at) < 30*time.Second && !s.vouches(t, token) {
		t.Error("the API server refuses it as well, so nothing was proven")
	}
	if phase := s.Must(t, "get", "pod", "-n", "attacks", "frozen", "-o", "jsonpath={.status.phase}"); phase != "Running" {
		t.Errorf("the pod is %s for the API server", phase)
	}
	thaw()
	s.Must(t, "wait", "-n", "attacks", "pod/frozen", "--for=delete", "--timeout=3m")
}

// attackNode: a node is gone, and then another is there under its name. It has no machine: who says to be its agent is the
// thief, which makes no difference to the CA.
func (s *suite) attackNode(t *testing.T, f *thief) {
	const name = "node9"
	make9 := func() {
		s.Apply(t, `{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "`+name+`", "labels": {"kubernetes.io/hostname": "`+name+`"}}}`)
		s.Must(t, "patch", "node", name, "--subresource=status", "--type=merge", "-p",
			`{"status": {"capacity": {"cpu": "4", "memory": "8Gi", "pods": "10"}, "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "10"}}}`)
	}
	gone := func(namespace string) []string {
		return []string{"delete", "pod", "-n", namespace, "--field-selector=spec.nodeName=" + name, "--force", "--grace-period=0", "--wait=false", "--ignore-not-found"}
	}
	t.Cleanup(func() {
		s.afterwards(t, "delete", "node", name, "--ignore-not-found")
		s.afterwards(t, gone("attacks")...)
		s.afterwards(t, gone(signetNamespace)...)
		s.afterwards(t, "rollout", "status", "-n", signetNamespace, "daemonset/signet-agent", "--timeout=50s")
	})
	make9()
	s.Apply(t, pod{namespace: "attacks", name: "far", noVolume: true, more: `"nodeName": "` + name + `",`}.json(s))
	far := &thief{s: s, node: name, pid: f.pid, ca: f.ca}
	agent := s.agentToken(t, name)
	if err := far.attest(t, agent); err != nil {
		t.Fatal(err)
	}
	if err := far.open(t, agent); err != nil {
		t.Fatal(err)
	}
	token := s.bound(t, "attacks", "far", []string{workloadAudience})
	if err := far.try(t, token); err != nil {
		t.Fatal(err)
	}
	s.Must(t, "delete", "node", name, "--wait=false")
	cutOff(t, "the token of a pod whose node is gone", time.Now(), far.until(t, token, api.PodMismatch, api.PodDeleted, api.TokenReviewRefused))
	make9()
	for what, err := range map[string]error{"a pod": far.try(t, token), "the agent": (&thief{s: s, pid: f.pid, ca: f.ca}).attest(t, agent)} {
		switch refused(err) {
		case api.PodMismatch, api.PodDeleted, api.TokenReviewRefused:
		default:
			t.Errorf("%s of a node that was made anew: %v", what, err)
		}
	}
}
