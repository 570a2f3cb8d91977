//go:build cluster

package controlplane_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/integration/controlplane"
	"github.com/signet-ca/signet/internal/kube"
)

const (
	audience = "signet:example.org"
	system   = "signet-system"
)

// cluster is a real control plane, and the attestor that a CA in it would have: keys and reviews come over TLS, by the
// token of a ServiceAccount that may create TokenReviews and nothing else.
type cluster struct {
	*controlplane.ControlPlane
	reviewer *counting
	review   *attestor.ServiceAccount
	offline  *attestor.ServiceAccount // the same without the review
	jwks     []byte
}

// counting is the reviewer of signet-ca, and counts.
type counting struct {
	*kube.Client
	asked atomic.Int64
}

func (r *counting) ReviewToken(ctx context.Context, token []byte, audience string) (attestor.TokenReview, error) {
	r.asked.Add(1)
	a, err := r.Client.ReviewToken(ctx, token, audience)
	return attestor.TokenReview(a), err
}

type object = map[string]any

func newCluster(t testing.TB) *cluster {
	c := &cluster{ControlPlane: controlplane.Start(t)}
	for _, ns := range []string{system, "shop"} {
		c.create(t, "/api/v1/namespaces", object{"metadata": object{"name": ns}})
	}
	for _, sa := range []string{"signet-ca", "nobody"} {
		c.create(t, "/api/v1/namespaces/"+system+"/serviceaccounts", object{"metadata": object{"name": sa}})
	}
	rules := "/apis/rbac.authorization.k8s.io/v1/"
	c.create(t, rules+"clusterroles", object{
		"metadata": object{"name": "signet-ca"},
		"rules":    []object{{"apiGroups": []string{"authentication.k8s.io"}, "resources": []string{"tokenreviews"}, "verbs": []string{"create"}}},
	})
	c.create(t, rules+"clusterrolebindings", object{
		"metadata": object{"name": "signet-ca"},
		"roleRef":  object{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "signet-ca"},
		"subjects": []object{{"kind": "ServiceAccount", "namespace": system, "name": "signet-ca"}},
	})
	for _, node := range []string{"node-1", "node-2"} {
		c.create(t, "/api/v1/nodes", object{"metadata": object{"name": node}})
	}
	c.reviewer = &counting{Client: c.open(t, "signet-ca")}
	keys := c.keys(t)
	c.review, c.offline = attest(t, keys, c.reviewer), attest(t, keys, nil)
	return c
}

// open makes a client that is a ServiceAccount, by a token file as in a pod.
func (c *cluster) open(t testing.TB, sa string) *kube.Client {
	t.Helper()
	user := fmt.Sprintf(`{"tokenFile": %q}`, c.tokenFile(t, sa))
	client, err := kube.Open(kube.Config{Kubeconfig: c.Kubeconfig(t, sa, user), UserAgent: "signet-ca/test", Timeout: time.Minute, QPS: 10_000})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

func (c *cluster) tokenFile(t testing.TB, sa string) string {
	t.Helper()
	path := filepath.Join(c.Dir, sa+".token")
	if err := os.WriteFile(path, c.token(t, system, sa, "", nil), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// keys are those that the API server publishes, read as signet-ca reads them.
func (c *cluster) keys(t testing.TB) attestor.Keys {
	t.Helper()
	source, err := attestor.NewKeySource(attestor.KeySourceConfig{
		Issuer: controlplane.Issuer, URL: c.URL + "/openid/v1/jwks", CAFile: c.CAFile, TokenFile: c.tokenFile(t, "signet-ca"),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- source.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	deadline := time.After(time.Minute)
	for {
		jwks, changed := source.Snapshot()
		if jwks != nil {
			c.jwks = jwks
			return source
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatal("the API server's keys could not be read")
		}
	}
}

func attest(t testing.TB, keys attestor.Keys, r *counting) *attestor.ServiceAccount {
	t.Helper()
	cfg := attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{controlplane.Issuer: keys, "kubernetes/serviceaccount": keys}}
	if r != nil {
		cfg.Reviews = map[string]attestor.ReviewConfig{}
		for issuer := range cfg.Issuers {
			cfg.Reviews[issuer] = attestor.ReviewConfig{Reviewer: r, Timeout: 20 * time.Second}
		}
	}
	a, err := attestor.NewServiceAccount(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// create posts an object and returns its UID.
func (c *cluster) create(t testing.TB, path string, o object) string {
	t.Helper()
	var made struct{ Metadata struct{ UID string } }
	if err := c.Do(t.Context(), http.MethodPost, path, o, &made); err != nil {
		t.Fatal(err)
	}
	return made.Metadata.UID
}

// remove deletes an object at once, as a node does with a pod that has ended.
func (c *cluster) remove(t testing.TB, path string) {
	t.Helper()
	if err := c.Do(t.Context(), http.MethodDelete, path, object{"gracePeriodSeconds": 0}, nil); err != nil {
		t.Fatal(err)
	}
}

// serviceAccount makes a ServiceAccount of the namespace shop.
func (c *cluster) serviceAccount(t testing.TB, name string) string {
	t.Helper()
	return c.create(t, "/api/v1/namespaces/shop/serviceaccounts", object{"metadata": object{"name": name}})
}

// pod makes a pod of the namespace shop on node-1.
func (c *cluster) pod(t testing.TB, name, sa string) string {
	t.Helper()
	return c.create(t, "/api/v1/namespaces/shop/pods", object{
		"metadata": object{"name": name},
		"spec": object{
			"serviceAccountName": sa, "nodeName": "node-1", "automountServiceAccountToken": false,
			"containers": []object{{"name": "main", "image": "none"}},
		},
	})
}

// token asks for a token, bound to an object or to none, as kubelet does. No audience stands for the API server's own.
func (c *cluster) token(t testing.TB, namespace, sa, audience string, bound object, more ...string) []byte {
	t.Helper()
	spec := object{"expirationSeconds": 3600}
	if audience != "" {
		spec["audiences"] = append([]string{audience}, more...)
	}
	if bound != nil {
		spec["boundObjectRef"] = bound
	}
	var made struct{ Status struct{ Token string } }
	path := "/api/v1/namespaces/" + namespace + "/serviceaccounts/" + sa + "/token"
	if err := c.Do(t.Context(), http.MethodPost, path, object{"spec": spec}, &made); err != nil {
		t.Fatal(err)
	}
	return []byte(made.Status.Token)
}

func toPod(name, uid string) object {
	return object{"kind": "Pod", "apiVersion": "v1", "name": name, "uid": uid}
}

func evidence(token []byte) attestor.Evidence {
	return attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: token}
}

// refused fails unless the token is refused for that reason, after so many questions to the API server.
func (c *cluster) refused(t *testing.T, token []byte, want api.Reason, asked int64) {
	t.Helper()
	c.reviewer.asked.Store(0)
	got, err := c.review.Attest(t.Context(), evidence(token), audience, time.Now())
	if api.ReasonOf(err) != want || got != (attestor.Claims{}) {
		t.Errorf("got %+v, %v, want %s", got, err, want)
	}
	if n := c.reviewer.asked.Load(); n != asked {
		t.Errorf("the API server was asked %d times, want %d", n, asked)
	}
}

// becomesRefused waits until the API server has noticed what changed: it looks at its own caches, and remembers a yes for
// ten seconds.
func (c *cluster) becomesRefused(t *testing.T, token []byte) {
	t.Helper()
	start := time.Now()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := c.review.Attest(t.Context(), evidence(token), audience, time.Now())
		if api.ReasonOf(err) == api.TokenReviewRefused {
			t.Logf("refused %v after the change: %v", time.Since(start).Round(time.Millisecond), errors.Unwrap(err))
			return
		}
		if err != nil || time.Since(start) > 2*time.Minute {
			t.Fatalf("after %v: %v, want %s", time.Since(start), err, api.TokenReviewRefused)
		}
		<-tick.C
	}
}

func (c *cluster) accepted(t *testing.T, a *attestor.ServiceAccount, token []byte) attestor.Claims {
	t.Helper()
	got, err := a.Attest(t.Context(), evidence(token), audience, time.Now())
	if err != nil {
		t.Fatalf("%v: %v", err, errors.Unwrap(err))
	}
	return got
}

// TestReview shows real tokens of a real API server to our attestor with a real review.
func TestReview(t *testing.T) {
	c := newCluster(t)
	saUID := c.serviceAccount(t, "cart")
	podUID := c.pod(t, "cart-0", "cart")
	good := c.token(t, "shop", "cart", audience, toPod("cart-0", podUID))

	t.Run("good", func(t *testing.T) {
		got := c.accepted(t, c.review, good)
		if got.Namespace != "shop" || got.ServiceAccount != "cart" || got.ServiceAccountUID != saUID || got.PodName != "cart-0" ||
			got.PodUID != podUID || got.NodeName != "node-1" || got.NodeUID == "" || got.TokenID == "" || got.Issuer != controlplane.Issuer {
			t.Errorf("got %+v", got)
		}
		answer, err := c.reviewer.ReviewToken(t.Context(), good, audience)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range []string{"pod-name", "pod-uid", "node-name", "node-uid", "credential-id"} {
			if len(answer.Extra["authentication.kubernetes.io/"+k]) != 1 {
				t.Errorf("the answer has no %s: %+v", k, answer.Extra)
			}
		}
	})
	// threat: A01, A02
	t.Run("audiences", func(t *testing.T) {
		bound := toPod("cart-0", podUID)
		c.refused(t, c.token(t, "shop", "cart", "", bound), api.TokenAudience, 0)
		c.refused(t, c.token(t, "shop", "cart", "signet-agent:example.org", bound), api.TokenAudience, 0)
		c.refused(t, c.token(t, "shop", "cart", audience, bound, controlplane.Issuer), api.TokenAudienceNotExclusive, 0)
	})
	// The API server itself tells the audiences apart, so a review without ours would have been a yes.
	t.Run("the API server checks audiences", func(t *testing.T) {
		answer, err := c.reviewer.ReviewToken(t.Context(), good, "another")
		if err != nil || answer.Authenticated {
			t.Errorf("got %+v, %v", answer, err)
		}
	})
	// threat: A13, A14
	t.Run("bindings", func(t *testing.T) {
		c.refused(t, c.token(t, "shop", "cart", audience, nil), api.TokenNotPodBound, 0)
		var node struct{ Metadata struct{ UID string } }
		if err := c.Do(t.Context(), http.MethodGet, "/api/v1/nodes/node-1", nil, &node); err != nil {
			t.Fatal(err)
		}
		toNode := object{"kind": "Node", "apiVersion": "v1", "name": "node-1", "uid": node.Metadata.UID}
		c.refused(t, c.token(t, "shop", "cart", audience, toNode), api.TokenNotPodBound, 0)
		secret := c.create(t, "/api/v1/namespaces/shop/secrets", object{"metadata": object{"name": "anchor"}})
		toSecret := object{"kind": "Secret", "apiVersion": "v1", "name": "anchor", "uid": secret}
		c.refused(t, c.token(t, "shop", "cart", audience, toSecret), api.TokenNotPodBound, 0)
	})
	// threat: A13
	t.Run("a token of a Secret", func(t *testing.T) { c.refused(t, c.legacyToken(t), api.TokenNotPodBound, 0) })
	// threat: A04
	t.Run("expired", func(t *testing.T) { c.testExpired(t) })
	t.Run("another key", func(t *testing.T) {
		forged := append([]byte{}, good...)
		forged[len(forged)-20] ^= 1 // stays base64url or not: either way it is no token of the cluster
		if _, err := c.review.Attest(t.Context(), evidence(forged), audience, time.Now()); api.ReasonOf(err).Kind() != api.KindUnauthenticated {
			t.Errorf("got %v", err)
		}
	})
	// threat: G08
	t.Run("permission", func(t *testing.T) { c.testPermission(t, good) })
	t.Run("pod deleted", func(t *testing.T) {
		uid := c.pod(t, "cart-1", "cart")
		seen, fresh := c.token(t, "shop", "cart", audience, toPod("cart-1", uid)), c.token(t, "shop", "cart", audience, toPod("cart-1", uid))
		c.accepted(t, c.review, seen)
		c.remove(t, "/api/v1/namespaces/shop/pods/cart-1")
		c.becomesRefused(t, fresh)
		c.becomesRefused(t, seen)
		c.accepted(t, c.offline, fresh) // which is why there is a review
	})
	// threat: A12
	t.Run("pod recreated under its name", func(t *testing.T) {
		uid := c.pod(t, "cart-2", "cart")
		old := c.token(t, "shop", "cart", audience, toPod("cart-2", uid))
		c.remove(t, "/api/v1/namespaces/shop/pods/cart-2")
		uid = c.pod(t, "cart-2", "cart")
		c.becomesRefused(t, old)
		c.accepted(t, c.review, c.token(t, "shop", "cart", audience, toPod("cart-2", uid)))
	})
	// threat: A10
	t.Run("ServiceAccount recreated", func(t *testing.T) {
		c.serviceAccount(t, "till")
		uid := c.pod(t, "till-0", "till")
		old := c.token(t, "shop", "till", audience, toPod("till-0", uid))
		c.remove(t, "/api/v1/namespaces/shop/serviceaccounts/till")
		c.serviceAccount(t, "till")
		c.becomesRefused(t, old)
	})
	t.Run("node recreated", func(t *testing.T) {
		c.remove(t, "/api/v1/nodes/node-1")
		c.create(t, "/api/v1/nodes", object{"metadata": object{"name": "node-1"}})
		// Kubernetes does not look: a review proves nothing about the node, and the directory of pods has to.
		before := c.accepted(t, c.review, good)
		after := c.accepted(t, c.review, c.token(t, "shop", "cart", audience, toPod("cart-0", podUID)))
		if before.NodeUID == after.NodeUID {
			t.Error("the node has the same UID")
		}
	})
	// threat: G01
	c.testAway(t, good)
}

// legacyToken returns the token of a Secret, which Kubernetes still makes for whoever asks by hand.
func (c *cluster) legacyToken(t *testing.T) []byte {
	t.Helper()
	path := "/api/v1/namespaces/shop/secrets"
	c.create(t, path, object{"metadata": object{"name": "legacy", "annotations": object{"kubernetes.io/service-account.name": "cart"}}, "type": "kubernetes.io/service-account-token"})
	deadline := time.After(time.Minute)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		var secret struct{ Data map[string][]byte }
		if err := c.Do(t.Context(), http.MethodGet, path+"/legacy", nil, &secret); err != nil {
			t.Fatal(err)
		}
		if token := secret.Data["token"]; len(token) > 0 {
			return token
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("Kubernetes makes no such token any more")
		}
	}
}

// testExpired signs tokens as the API server would have, a while ago: it takes them for a minute longer than we do.
func (c *cluster) testExpired(t *testing.T) {
	uid := c.pod(t, "cart-late", "cart")
	token := c.token(t, "shop", "cart", audience, toPod("cart-late", uid))
	late, err := resign(c.SigningKey, token, func(claims object) {
		now := time.Now().Unix()
		claims["iat"], claims["nbf"], claims["exp"] = now-620, now-620, now-20
	})
	if err != nil {
		t.Fatal(err)
	}
	answer, err := c.reviewer.ReviewToken(t.Context(), late, audience)
	if err != nil || !answer.Authenticated {
		t.Errorf("the API server has no leeway: %+v, %v", answer, err)
	}
	c.refused(t, late, api.TokenExpired, 0)
}

// testPermission asks as somebody who may not.
func (c *cluster) testPermission(t *testing.T, token []byte) {
	if err := c.reviewer.CheckReview(t.Context()); err != nil {
		t.Errorf("with the rule: %v", err)
	}
	nobody := c.open(t, "nobody")
	if err := nobody.CheckReview(t.Context()); !errors.Is(err, kube.ErrForbidden) || !strings.Contains(err.Error(), `resources: ["tokenreviews"]`) {
		t.Errorf("without the rule: %v", err)
	}
	keys, err := attestor.StaticKeys(c.jwks)
	if err != nil {
		t.Fatal(err)
	}
	_, err = attest(t, keys, &counting{Client: nobody}).Attest(t.Context(), evidence(token), audience, time.Now())
	if api.ReasonOf(err) != api.ReviewerUnavailable {
		t.Errorf("without the rule: %v", err)
	}
}

// testAway freezes the API server, lets it go on, and kills it.
func (c *cluster) testAway(t *testing.T, good []byte) {
	keys, err := attestor.StaticKeys(c.jwks)
	if err != nil {
		t.Fatal(err)
	}
	hasty, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{
		Issuers: map[string]attestor.Keys{controlplane.Issuer: keys},
		Reviews: map[string]attestor.ReviewConfig{controlplane.Issuer: {Reviewer: c.reviewer, Timeout: 500 * time.Millisecond}},
	})
	if err != nil {
		t.Fatal(err)
	}
	// A signal takes effect some time after it was sent, and until then there are answers.
	away := func(t *testing.T) {
		t.Helper()
		for start := time.Now(); ; {
			_, err := hasty.Attest(t.Context(), evidence(good), audience, time.Now())
			if api.ReasonOf(err) == api.ReviewerUnavailable {
				return
			}
			if err != nil || time.Since(start) > time.Minute {
				t.Fatalf("got %v", err)
			}
		}
	}
	t.Run("API server frozen", func(t *testing.T) {
		if err := c.Pause(); err != nil {
			t.Fatal(err)
		}
		away(t)
		if err := c.Resume(); err != nil {
			t.Fatal(err)
		}
		c.accepted(t, c.review, good)
	})
	t.Run("API server gone", func(t *testing.T) {
		if err := c.Kill(); err != nil {
			t.Fatal(err)
		}
		away(t)
		c.accepted(t, c.offline, good)
	})
}

// payload returns the claims part of a token, decoded.
func payload(token []byte) ([]byte, error) {
	parts := strings.Split(string(token), ".")
	if len(parts) != 3 {
		return nil, errors.New("not a token")
	}
	return base64.RawURLEncoding.DecodeString(parts[1])
}
