//go:build cluster

package controlplane_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/deploy"
	"github.com/signet-ca/signet/integration/controlplane"
	"github.com/signet-ca/signet/internal/kube"
)

const (
	people    = "/api/v1/namespaces/signet-operators"
	bindings  = "/apis/rbac.authorization.k8s.io/v1/namespaces/"
	adminOnly = "signet-admin:example.org"
)

// people have certificates of their own, and rights as docs/operators.md binds them.
type persons struct {
	*cluster
	by   map[string]*kube.Operator
	conn *grpc.ClientConn // to the operators' port of a CA that believes the cluster's tokens
}

// person is a user of the cluster.
func (p *persons) person(t *testing.T, name string) {
	t.Helper()
	if err := p.Certify(name, name, nil, netip.AddrFrom4([4]byte{127, 0, 0, 1})); err != nil {
		t.Fatal(err)
	}
	o, err := kube.OpenOperator(kube.OperatorConfig{Kubeconfig: p.UserKubeconfig(t, name), UserAgent: "signet/test", Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	p.by[name] = o
}

func (p *persons) bind(t *testing.T, namespace, role, user string) {
	t.Helper()
	p.create(t, bindings+namespace+"/rolebindings", object{
		"metadata": object{"name": role + "-" + user},
		"roleRef":  object{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
		"subjects": []object{{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}},
	})
}

// request asks for a token as a person; to is what it is bound to.
func (p *persons) request(t *testing.T, who, account string, seconds int, to object, audiences ...string) (string, error) {
	t.Helper()
	spec := object{"expirationSeconds": seconds}
	if len(audiences) > 0 {
		spec["audiences"] = audiences
	}
	if to != nil {
		spec["boundObjectRef"] = to
	}
	var answer struct{ Status struct{ Token string } }
	path := "/api/v1/namespaces/" + strings.Replace(account, "/", "/serviceaccounts/", 1) + "/token"
	err := p.by[who].Create(t.Context(), path, object{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}, &answer)
	return answer.Status.Token, err
}

// status is what the CA says to somebody with that token.
func (p *persons) status(t *testing.T, token string) (*apiv1.GetStatusResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token), time.Minute)
	defer cancel()
	r, err := apiv1.NewAdminClient(p.conn).GetStatus(ctx, &apiv1.GetStatusRequest{})
	return r, api.FromStatus(err)
}

func newPersons(t *testing.T) *persons {
	t.Helper()
	p := &persons{cluster: newCluster(t), by: map[string]*kube.Operator{}}
	// What is installed of operators; the rest of it is TestInstall's.
	installed, err := deploy.Install(deploy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for doc := range strings.SplitSeq(string(installed), "---\n") {
		if strings.Contains(doc, "signet-operators") && !strings.Contains(doc, "kind: ConfigMap") {
			if _, err := kubectl(t, p.ControlPlane, []byte(doc), "apply", "-f", "-"); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, name := range []string{"alice", "bob", "carol", "ed", "mallory"} {
		p.person(t, name)
	}
	for user, role := range map[string]string{"alice": "signet-viewer", "bob": "signet-operator", "carol": "signet-emergency"} {
		p.bind(t, "signet-operators", role, user)
		p.bind(t, system, role, user)
	}
	// What the built-in role edit has of this, which only a controller that does not run here would put together.
	p.create(t, "/apis/rbac.authorization.k8s.io/v1/clusterroles", object{
		"metadata": object{"name": "editor"},
		"rules":    []object{{"apiGroups": []string{""}, "resources": []string{"serviceaccounts/token", "pods"}, "verbs": []string{"create"}}},
	})
	p.bind(t, "shop", "editor", "ed")
	s := catest.New(t, catest.Options{Config: func(cfg *ca.Config) {
		cfg.Operators.Attestor, cfg.Operators.Issuers = p.review, []string{controlplane.Issuer}
	}})
	s.WaitReady()
	p.conn, err = grpc.NewClient("passthrough:///operators",
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})), // who the CA is, is not asked here
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.DialOperators(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.conn.Close() })
	return p
}

// TestOperators: RBAC says who operates the CA. Real tokens of a real API server, reviewed by it; and nothing that somebody
// else can have of it opens the operators' port.
//
// threat: L21, L22
func TestOperators(t *testing.T) {
	p := newPersons(t)
	t.Run("who may come as what", p.testRoles)
	t.Run("tokens that are no operator's", p.testTokens)
	t.Run("no pods among operators", func(t *testing.T) {
		pod := object{
			"metadata": object{"name": "mole"},
			"spec": object{
				"serviceAccountName": "emergency",
				"securityContext":    object{"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": object{"type": "RuntimeDefault"}},
				"containers": []object{{"name": "x", "image": "x", "securityContext": object{
					"allowPrivilegeEscalation": false, "capabilities": object{"drop": []string{"ALL"}}}}},
			},
		}
		deadline := time.Now().Add(time.Minute) // the API server reads policies a moment after they are made
		for {
			err := p.Do(t.Context(), http.MethodPost, people+"/pods?dryRun=All", pod, nil)
			if err != nil && strings.Contains(err.Error(), "no pod runs beside") {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("a pod in the operators' namespace: %v", err)
			}
			pause(t)
		}
	})
	t.Run("who it was", p.testAudit)
	t.Run("a ServiceAccount that is gone", func(t *testing.T) {
		// The API server knows of it a moment later, and the CA does not ask twice about one token within half a minute.
		tokens := make([]string, 100)
		for i := range tokens {
			var err error
			if tokens[i], err = p.request(t, "alice", "signet-operators/viewer", 600, nil, adminOnly); err != nil {
				t.Fatal(err)
			}
		}
		p.remove(t, people+"/serviceaccounts/viewer")
		var err error
		for _, token := range tokens {
			if _, err = p.status(t, token); err != nil {
				break
			}
			pause(t)
		}
		if api.ReasonOf(err) != api.TokenReviewRefused {
			t.Errorf("%v, want %s", err, api.TokenReviewRefused)
		}
	})
}

func (p *persons) testRoles(t *testing.T) {
	roles := []string{"viewer", "operator", "emergency"}
	for user, may := range map[string]int{"alice": 1, "bob": 2, "carol": 3, "ed": 0, "mallory": 0} {
		for n, role := range roles {
			token, err := p.request(t, user, "signet-operators/"+role, 600, nil, adminOnly)
			if n >= may {
				if !errors.Is(err, kube.ErrForbidden) {
					t.Errorf("%s as %s: %v, want to be forbidden", user, role, err)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s as %s: %v", user, role, err)
				continue
			}
			if r, err := p.status(t, token); err != nil || len(r.GetRoles()) != n+1 || r.GetRoles()[n] != role {
				t.Errorf("%s as %s: %v, %q", user, role, err, r.GetRoles())
			}
		}
	}
}

func (p *persons) testTokens(t *testing.T) {
	p.serviceAccount(t, "emergency")
	pod := p.pod(t, "emergency-0", "emergency")
	secret := p.create(t, people+"/secrets", object{"metadata": object{"name": "kept"}})
	var node struct{ Metadata struct{ UID string } }
	if err := p.Do(t.Context(), http.MethodGet, "/api/v1/nodes/node-1", nil, &node); err != nil {
		t.Fatal(err)
	}
	const role = "signet-operators/emergency"
	for _, row := range []struct {
		name, who, account string
		seconds            int
		to                 object
		audiences          []string
		want               api.Reason
	}{
		{"bound to a secret", "carol", role, 600, object{"apiVersion": "v1", "kind": "Secret", "name": "kept", "uid": secret}, []string{adminOnly}, api.TokenBound},
		{"bound to a node", "carol", role, 600, object{"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": node.Metadata.UID}, []string{adminOnly}, api.TokenBound},
		{"bound to a pod, by who may edit its namespace", "ed", "shop/emergency", 600, object{"apiVersion": "v1", "kind": "Pod", "name": "emergency-0", "uid": pod}, []string{adminOnly}, api.TokenBound},
		{"of that name in another namespace", "ed", "shop/emergency", 600, nil, []string{adminOnly}, api.OperatorRequired},
		{"of an hour", "carol", role, 3600, nil, []string{adminOnly}, api.TokenTTLTooLong},
		{"of 15 minutes and a second", "carol", role, 901, nil, []string{adminOnly}, api.TokenTTLTooLong},
		{"for the API server", "carol", role, 600, nil, nil, api.TokenAudience},
		{"for two", "carol", role, 600, nil, []string{adminOnly, controlplane.Issuer}, api.TokenAudienceNotExclusive},
		{"for workloads", "carol", role, 600, nil, []string{audience}, api.TokenAudience},
		{"of another trust domain", "carol", role, 600, nil, []string{"signet-admin:other.org"}, api.TokenAudience},
	} {
		t.Run(row.name, func(t *testing.T) {
			token, err := p.request(t, row.who, row.account, row.seconds, row.to, row.audiences...)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.status(t, token); api.ReasonOf(err) != row.want {
				t.Errorf("%v, want %s", err, row.want)
			}
		})
	}
}

// pause waits a little before something is looked at again.
func pause(t *testing.T) {
	t.Helper()
	select {
	case <-t.Context().Done():
	case <-time.After(100 * time.Millisecond):
	}
}

// testAudit finds the person behind an entry of the ledger in the API server's audit log, as docs/operators.md tells.
func (p *persons) testAudit(t *testing.T) {
	token, err := p.request(t, "bob", "signet-operators/operator", 600, nil, adminOnly)
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.status(t, token)
	if err != nil {
		t.Fatal(err)
	}
	_, id, ok := strings.Cut(r.GetCaller(), "sa:signet-operators/operator jti:")
	id, _, _ = strings.Cut(id, " ") // of its issuer
	if !ok {
		t.Fatalf("the caller is %q", r.GetCaller())
	}
	var who string
	deadline := time.Now().Add(time.Minute)
	for who == "" && time.Now().Before(deadline) { // the log is written soon after the answer
		f, err := os.Open(p.AuditLog())
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var event struct {
				User        struct{ Username string }
				Annotations map[string]string
			}
			if json.Unmarshal(lines.Bytes(), &event) == nil && event.Annotations["authentication.kubernetes.io/issued-credential-id"] == "JTI="+id {
				who = event.User.Username
			}
		}
		if err := errors.Join(lines.Err(), f.Close()); err != nil {
			t.Fatal(err)
		}
		if who == "" {
			pause(t)
		}
	}
	if who != "bob" {
		t.Errorf("the audit log says %q of JTI=%s, want bob", who, id)
	}
}
