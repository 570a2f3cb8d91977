//go:build cluster

package controlplane_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	seen "github.com/signet-ca/signet/ca/cluster"
	"github.com/signet-ca/signet/integration/controlplane"
	"github.com/signet-ca/signet/internal/canary"
)

// stale is the directory's bound here: less than the default, so that the tests of it are short.
const stale = 2 * time.Second

// watched is a real control plane and a whole CA that sees it by its watches alone: its attestor has no live review, so
// what is refused about pods is refused by the directory.
type watched struct {
	*cluster
	directory *seen.KubeDirectory
	conn      *grpc.ClientConn
	dial      func(context.Context) (net.Conn, error)
}

// emptyKeys is a ca.KeySets of which agents learn nothing.
type emptyKeys struct{}

// Snapshot implements ca.KeySets.
func (emptyKeys) Snapshot() ([]byte, <-chan struct{}) { return []byte("{}"), nil }

// held is an agent's SVID with its ticket, and the token on which it was issued.
type held struct {
	token, ticket []byte
	certificate   tls.Certificate
}

// hold gets an agent its SVID.
func (w *watched) hold(t *testing.T, token []byte) *held {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := apiv1.NewAuthorityClient(w.conn).AttestAgent(t.Context(), &apiv1.AttestAgentRequest{
		Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: token}, Csr: csr, Protocol: api.Protocol,
	})
	if err != nil {
		t.Fatal(err)
	}
	return &held{token, resp.GetTicket(), tls.Certificate{Certificate: resp.GetChain(), PrivateKey: key}}
}

// renew renews it by its ticket, until the reason is that one.
func (w *watched) renew(t *testing.T, h *held, want api.Reason) time.Duration {
	t.Helper()
	creds := credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{h.certificate}})
	conn, err := grpc.NewClient("passthrough:///ca", grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.dial(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := apiv1.NewAuthorityClient(conn).AttestAgent(t.Context(), &apiv1.AttestAgentRequest{
			Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: h.token}, Csr: csr, Protocol: api.Protocol,
			Renewal: &apiv1.Renewal{Ticket: h.ticket},
		})
		if err = api.FromStatus(err); err == nil && want == "" || err != nil && api.ReasonOf(err) == want {
			return time.Since(start)
		}
		if time.Since(start) > time.Minute {
			t.Fatalf("after %v: %v, want %q", time.Since(start), err, want)
		}
		<-tick.C
	}
}

func newWatched(t *testing.T) *watched {
	w := &watched{cluster: newCluster(t)}
	w.allow(t, "signet-ca")
	w.create(t, "/api/v1/namespaces/"+system+"/serviceaccounts", object{"metadata": object{"name": catest.AgentSA}})
	var err error
	w.directory, err = seen.NewKubeDirectory(seen.KubeConfig{
		Issuer: controlplane.Issuer, Client: w.open(t, "signet-ca"), Stale: stale, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.directory.Pod(t.Context(), ca.PodID{Issuer: controlplane.Issuer, UID: "x"})
	if api.ReasonOf(err) != api.DirectoryUnavailable {
		t.Errorf("before the first list: %v", err)
	}
	background(t, w.directory.Run)
	w.connect(t)
	return w
}

// background runs f until the test ends.
func background(t testing.TB, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := f(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
}

// allow gives a ServiceAccount the rules of docs/cluster.md.
func (c *cluster) allow(t testing.TB, sa string) {
	const rules = "/apis/rbac.authorization.k8s.io/v1/"
	read := []string{"get", "list", "watch"}
	c.create(t, rules+"clusterroles", object{
		"metadata": object{"name": "signet-ca-directory"},
		"rules":    []object{{"apiGroups": []string{""}, "resources": []string{"pods", "serviceaccounts", "nodes"}, "verbs": read}},
	})
	c.create(t, rules+"namespaces/"+system+"/roles", object{
		"metadata": object{"name": "signet-ca-publish"},
		"rules": []object{
			{"apiGroups": []string{""}, "resources": []string{"configmaps"}, "verbs": []string{"create"}},
			{"apiGroups": []string{""}, "resources": []string{"configmaps"}, "resourceNames": []string{"signet-bundle"}, "verbs": append(read, "update")},
		},
	})
	subjects := []object{{"kind": "ServiceAccount", "namespace": system, "name": sa}}
	c.create(t, rules+"clusterrolebindings", object{
		"metadata": object{"name": "signet-ca-directory"}, "subjects": subjects,
		"roleRef": object{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "signet-ca-directory"},
	})
	c.create(t, rules+"namespaces/"+system+"/rolebindings", object{
		"metadata": object{"name": "signet-ca-publish"}, "subjects": subjects,
		"roleRef": object{"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "signet-ca-publish"},
	})
}

// connect starts the CA.
func (w *watched) connect(t *testing.T) {
	s := catest.New(t, catest.Options{Config: func(cfg *ca.Config) {
		cfg.Attestors[api.EvidenceServiceAccount] = w.offline
		cfg.Directory = seen.Clusters{controlplane.Issuer: w.directory}
		cfg.Grace = time.Hour
		cfg.KeySets[controlplane.Issuer] = emptyKeys{}
	}})
	s.WaitReady()
	w.dial = s.Dial
	// Who the CA is does not matter here: what counts is what it gives away.
	creds := credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})
	var err error
	w.conn, err = grpc.NewClient("passthrough:///ca", grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.Dial(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.conn.Close() })
}

// ask asks the CA for an SVID by that token, over gRPC, and returns why not.
func (w *watched) ask(ctx context.Context, token []byte) error {
	key, err := canary.NewKey() // each identity needs one of its own
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	_, err = apiv1.NewAuthorityClient(w.conn).AttestAgent(ctx, &apiv1.AttestAgentRequest{
		Evidence: &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: token}, Csr: csr, Protocol: api.Protocol,
	})
	return api.FromStatus(err)
}

// becomes asks until the reason is that one (empty: until there is an SVID), and returns how long that took.
func (w *watched) becomes(t *testing.T, token []byte, want api.Reason) time.Duration {
	t.Helper()
	start := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := w.ask(t.Context(), token)
		if err == nil && want == "" || err != nil && api.ReasonOf(err) == want {
			return time.Since(start)
		}
		if time.Since(start) > time.Minute {
			t.Fatalf("after %v: %v, want %q", time.Since(start), err, want)
		}
		<-tick.C
	}
}

// refusedSince asks until the reason is that one, and fails if an SVID was still given later than the 5 s after from that are
// promised. What counts is when the last one was asked for that was given: that an answer was late, or that the directory
// could not tell for a moment, gave nothing away.
func (w *watched) refusedSince(t *testing.T, from time.Time, token []byte, want api.Reason) {
	t.Helper()
	start := time.Now()
	given := from
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		began := time.Now()
		err := w.ask(t.Context(), token)
		if err == nil {
			given = began
		} else if api.ReasonOf(err) == want {
			break
		}
		if time.Since(start) > time.Minute {
			t.Fatalf("after %v: %v, want %q", time.Since(start), err, want)
		}
		<-tick.C
	}
	took := given.Sub(from)
	t.Logf("given for %v", took.Round(time.Millisecond))
	if took > 4*time.Second {
		t.Errorf("given for %v", took)
	}
}

// untilKnown calls ask until the directory can tell: on a busy machine its watches may be late, and then it says so.
func untilKnown(ask func() error) error {
	for start := time.Now(); ; <-time.After(5 * time.Millisecond) {
		err := ask()
		if err == nil || api.ReasonOf(err) != api.DirectoryUnavailable || time.Since(start) > time.Minute {
			return err
		}
	}
}

// told is ask once the directory can tell.
func (w *watched) told(t testing.TB, token []byte) error {
	return untilKnown(func() error { return w.ask(t.Context(), token) })
}

// agent makes a pod of the agent's ServiceAccount on a node, and a token of it.
func (w *watched) agent(t testing.TB, name, node string) []byte {
	t.Helper()
	uid := w.podOn(t, system, name, catest.AgentSA, node)
	return w.agentToken(t, name, uid)
}

func (w *watched) agentToken(t testing.TB, name, uid string) []byte {
	t.Helper()
	return w.token(t, system, catest.AgentSA, "signet-agent:"+catest.TrustDomain, toPod(name, uid))
}

func (c *cluster) podOn(t testing.TB, namespace, name, sa, node string) string {
	t.Helper()
	return c.create(t, "/api/v1/namespaces/"+namespace+"/pods", object{
		"metadata": object{"name": name},
		"spec": object{
			"serviceAccountName": sa, "nodeName": node, "automountServiceAccountToken": false,
			"containers": []object{{"name": "main", "image": "none"}},
		},
	})
}

const systemPods = "/api/v1/namespaces/" + system + "/pods/"

// TestDirectory lets a CA see a real cluster: who is there gets an SVID at once, and who is not is refused for its reason.
//
// threat: B03
func TestDirectory(t *testing.T) {
	w := newWatched(t)
	good := w.agent(t, "agent-good", "node-1")
	w.becomes(t, good, "") // the first list

	t.Run("a pod a moment old", func(t *testing.T) {
		for i := range 20 {
			if err := w.told(t, w.agent(t, fmt.Sprint("agent-new-", i), "node-1")); err != nil {
				t.Errorf("%v: %v", err, errors.Unwrap(err))
			}
		}
	})
	// threat: A07
	t.Run("deleted", func(t *testing.T) {
		token := w.agent(t, "agent-gone", "node-1")
		w.becomes(t, token, "")
		w.remove(t, systemPods+"agent-gone")
		w.refusedSince(t, time.Now(), token, api.PodDeleted)
	})
	// threat: A07, A08
	t.Run("deleted in time", func(t *testing.T) {
		token := w.agent(t, "agent-going", "node-1")
		w.becomes(t, token, "")
		if err := w.Do(t.Context(), http.MethodDelete, systemPods+"agent-going", object{"gracePeriodSeconds": 4}, nil); err != nil {
			t.Fatal(err)
		}
		var pod struct {
			Metadata struct{ DeletionTimestamp time.Time }
		}
		if err := w.Do(t.Context(), http.MethodGet, systemPods+"agent-going", nil, &pod); err != nil {
			t.Fatal(err)
		}
		at := pod.Metadata.DeletionTimestamp
		if at.IsZero() {
			t.Fatal("it is not being deleted")
		}
		w.refusedSince(t, at, token, api.PodDeleted)
		// Nobody removes the object: there is no kubelet. That it is still there is no reason to go on.
		if err := w.Do(t.Context(), http.MethodGet, systemPods+"agent-going", nil, nil); err != nil {
			t.Fatal(err)
		}
	})
	// threat: A09
	t.Run("finished", func(t *testing.T) {
		for _, phase := range []string{"Succeeded", "Failed"} {
			name := "agent-" + strings.ToLower(phase)
			token := w.agent(t, name, "node-1")
			w.becomes(t, token, "")
			w.change(t, systemPods+name+"/status", func(o object) { o["status"].(object)["phase"] = phase })
			w.refusedSince(t, time.Now(), token, api.PodDeleted)
		}
	})
	// threat: A12
	t.Run("recreated under its name", func(t *testing.T) {
		old := w.agent(t, "agent-twin", "node-1")
		w.becomes(t, old, "")
		w.remove(t, systemPods+"agent-twin")
		next := w.agent(t, "agent-twin", "node-1")
		w.refusedSince(t, time.Now(), old, api.PodDeleted)
		w.becomes(t, next, "")
	})
	t.Run("never there", func(t *testing.T) {
		for _, id := range []ca.PodID{
			{Issuer: controlplane.Issuer, UID: "never", Namespace: system, Name: "agent-good"},
			{Issuer: controlplane.Issuer, UID: "never", Namespace: "..", Name: "../../nodes"},
		} {
			err := untilKnown(func() error { _, err := w.directory.Pod(t.Context(), id); return err })
			if api.ReasonOf(err) != api.PodUnknown {
				t.Errorf("got %v", err)
			}
		}
	})
	// threat: A17
	t.Run("node recreated", func(t *testing.T) {
		old := w.agent(t, "agent-moved", "node-2")
		w.becomes(t, old, "")
		w.remove(t, "/api/v1/nodes/node-2")
		w.refusedSince(t, time.Now(), old, api.PodMismatch)
		w.create(t, "/api/v1/nodes", object{"metadata": object{"name": "node-2"}})
		w.becomes(t, w.agent(t, "agent-after", "node-2"), "")
		if err := w.told(t, old); api.ReasonOf(err) != api.PodMismatch {
			t.Errorf("got %v", err)
		}
	})
	// threat: G08
	t.Run("permissions", func(t *testing.T) { w.testRules(t) })
	t.Run("frozen", func(t *testing.T) { w.testFrozen(t, good) })
	t.Run("restarted", func(t *testing.T) { w.testRestarted(t, good) })
	// threat: A10, A11
	t.Run("ServiceAccount recreated", func(t *testing.T) { w.testAccount(t) })
	t.Run("memory", func(t *testing.T) { w.testMemory(t) })
	t.Run("bundle", func(t *testing.T) { w.testPublisher(t) })
	// threat: G01
	t.Run("gone", func(t *testing.T) {
		token := w.agent(t, "agent-last", "node-1")
		if err := w.Kill(); err != nil {
			t.Fatal(err)
		}
		took := w.becomes(t, token, api.DirectoryUnavailable)
		t.Logf("took %v", took.Round(time.Millisecond))
	})
}

// change reads an object, changes it and writes it back.
func (c *cluster) change(t testing.TB, path string, f func(object)) {
	t.Helper()
	var o object
	if err := c.Do(t.Context(), http.MethodGet, path, nil, &o); err != nil {
		t.Fatal(err)
	}
	f(o)
	if err := c.Do(t.Context(), http.MethodPut, path, o, nil); err != nil {
		t.Fatal(err)
	}
}

// testRules asks as somebody who may not see the cluster.
func (w *watched) testRules(t *testing.T) {
	if err := w.open(t, "signet-ca").CheckRules(t.Context(), w.directory.Rules()...); err != nil {
		t.Errorf("with the rules: %v", err)
	}
	d, err := seen.NewKubeDirectory(seen.KubeConfig{
		Issuer: controlplane.Issuer, Client: w.open(t, "nobody"), Stale: stale, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	background(t, d.Run)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for start := time.Now(); !strings.Contains(d.NotReady(), `resources: ["pods"]`); <-tick.C {
		if time.Since(start) > time.Minute {
			t.Fatalf("without the rules: %q", d.NotReady())
		}
	}
	if _, err := d.Pod(t.Context(), ca.PodID{Issuer: controlplane.Issuer, UID: "x"}); api.ReasonOf(err) != api.DirectoryUnavailable {
		t.Errorf("without the rules: %v", err)
	}
}

// testFrozen stops the API server: the streams stay open and say nothing. What is known is renewed by its ticket then, and
// what was seen to be gone is not.
func (w *watched) testFrozen(t *testing.T, good []byte) {
	known := w.hold(t, good)
	goneToken := w.agent(t, "agent-gone-before", "node-1")
	w.becomes(t, goneToken, "")
	gone := w.hold(t, goneToken)
	w.remove(t, systemPods+"agent-gone-before")
	w.becomes(t, goneToken, api.PodDeleted)
	if err := w.Pause(); err != nil {
		t.Fatal(err)
	}
	took := w.becomes(t, good, api.DirectoryUnavailable)
	t.Logf("noticed after %v", took.Round(time.Millisecond))
	t.Logf("renewed by its ticket after %v", w.renew(t, known, "").Round(time.Millisecond))
	w.renew(t, gone, api.PodDeleted)
	if err := w.ask(t.Context(), good); api.ReasonOf(err) != api.DirectoryUnavailable || err == nil {
		t.Errorf("without its ticket: %v", err)
	}
	if err := w.Resume(); err != nil {
		t.Fatal(err)
	}
	t.Logf("back after %v", w.becomes(t, good, "").Round(time.Millisecond))
}

// testRestarted has the API server die and come back. Its watch cache is new then, so the version from which the
// streams go on is one that it may no longer keep.
func (w *watched) testRestarted(t *testing.T, good []byte) {
	gone := w.agent(t, "agent-between", "node-1")
	w.becomes(t, gone, "")
	w.Restart(t)
	w.remove(t, systemPods+"agent-between")
	start := time.Now()
	w.becomes(t, gone, api.PodDeleted)
	w.becomes(t, good, "")
	t.Logf("all is seen %v after it is ready again", time.Since(start).Round(time.Millisecond))
}

// testAccount makes the agents' ServiceAccount anew: its old tokens are worth nothing, and the pods that were made under
// the old one get nothing by tokens of the new one either.
func (w *watched) testAccount(t *testing.T) {
	uid := w.podOn(t, system, "agent-heir", catest.AgentSA, "node-1")
	old := w.agentToken(t, "agent-heir", uid)
	w.becomes(t, old, "")
	<-time.After(4 * time.Second) // whole seconds are all that Kubernetes keeps, and clocks of its servers may differ
	path := "/api/v1/namespaces/" + system + "/serviceaccounts"
	w.remove(t, path+"/"+catest.AgentSA)
	w.refusedSince(t, time.Now(), old, api.PodMismatch)
	w.create(t, path, object{"metadata": object{"name": catest.AgentSA}})
	heir := w.agentToken(t, "agent-heir", uid)
	w.becomes(t, w.agent(t, "agent-fresh", "node-1"), "") // so the new one is seen
	for name, token := range map[string][]byte{"old": old, "new": heir} {
		if err := w.told(t, token); api.ReasonOf(err) != api.PodMismatch {
			t.Errorf("by the %s token: %v", name, err)
		}
	}
}

// testMemory measures what a pod costs.
func (w *watched) testMemory(t *testing.T) {
	const n = 2000
	var last string
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range n {
		last = fmt.Sprint("crowd-", i)
		w.podOn(t, system, last, catest.AgentSA, "node-1")
	}
	var pod struct{ Metadata struct{ UID string } }
	if err := w.Do(t.Context(), http.MethodGet, systemPods+last, nil, &pod); err != nil {
		t.Fatal(err)
	}
	w.becomes(t, w.agentToken(t, last, pod.Metadata.UID), "")
	runtime.GC()
	runtime.ReadMemStats(&after)
	t.Logf("%d bytes of heap for each of %d pods", (int64(after.HeapAlloc)-int64(before.HeapAlloc))/n, n)
}
