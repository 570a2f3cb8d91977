package kube_test

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/canary"
	"github.com/signet-ca/signet/internal/kube"
)

// bearer is the credential of the client, which no error and no other server may ever see.
const bearer = "canary-bearer-of-the-ca"

// server is an API server that does what a real one would not. Its connections are real: TLS, over loopback.
type server struct {
	*httptest.Server
	asked   atomic.Int64 // requests of any kind
	handler atomic.Pointer[http.HandlerFunc]
}

func newServer(t testing.TB, http2 bool) *server {
	t.Helper()
	s := &server{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.asked.Add(1)
		(*s.handler.Load())(w, r)
	}))
	s.EnableHTTP2 = http2
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// answer makes h answer from now on.
func (s *server) answer(h http.HandlerFunc) { s.handler.Store(&h) }

// kubeconfig writes a kubeconfig for s and returns its path. Each change replaces one string by another.
func (s *server) kubeconfig(t testing.TB, changes ...[2]string) string {
	t.Helper()
	dir := t.TempDir()
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: one
contexts:
- {name: one, context: {cluster: c, user: u}}
clusters:
- name: c
  cluster: {server: %q, certificate-authority: ca.crt}
users:
- name: u
  user: {token: %s}
`, s.URL, bearer)
	for _, c := range changes {
		text = replaceOnce(t, text, c[0], c[1])
	}
	path := filepath.Join(dir, "kubeconfig")
	for name, data := range map[string][]byte{
		path:                         []byte(text),
		filepath.Join(dir, "ca.crt"): pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}),
		filepath.Join(dir, "token"):  []byte(bearer + "-of-file"),
	} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// open makes a client of s.
func (s *server) open(t testing.TB, changes ...[2]string) *kube.Client {
	t.Helper()
	return open(t, kube.Config{Kubeconfig: s.kubeconfig(t, changes...)})
}

func open(t testing.TB, cfg kube.Config) *kube.Client {
	t.Helper()
	cfg.UserAgent = "signet-ca/test"
	if cfg.Timeout == 0 {
		cfg.Timeout = 30 * time.Second
	}
	c, err := kube.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// reviewer is what wires the client to the attestor, as signet-ca does.
type reviewer struct{ *kube.Client }

func (r reviewer) ReviewToken(ctx context.Context, token []byte, audience string) (attestor.TokenReview, error) {
	a, err := r.Client.ReviewToken(ctx, token, audience)
	return attestor.TokenReview(a), err
}

// authority is a whole CA whose cluster's tokens are reviewed by client.
type authority struct {
	*catest.Server
	conn *grpc.ClientConn
	csr  []byte
}

// newAuthority starts one. A review has timeout, or as long as may be where that is zero: what answers may take its time.
func newAuthority(t *testing.T, client *kube.Client, timeout time.Duration) authority {
	t.Helper()
	timeout = cmp.Or(timeout, attestor.MaxReviewTimeout)
	a := authority{Server: catest.New(t, catest.Options{Config: func(cfg *ca.Config) {
		jwks, _ := cfg.KeySets[catest.IssuerName].Snapshot()
		keys, err := attestor.StaticKeys(jwks)
		if err != nil {
			t.Fatal(err)
		}
		verifier, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{
			Issuers: map[string]attestor.Keys{catest.IssuerName: keys},
			Reviews: map[string]attestor.ReviewConfig{catest.IssuerName: {Reviewer: reviewer{client}, Timeout: timeout}},
		})
		if err != nil {
			t.Fatal(err)
		}
		cfg.Attestors[api.EvidenceServiceAccount] = verifier
	}})}
	a.WaitReady()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if a.csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
		t.Fatal(err)
	}
	// Who the CA is does not matter here: what counts is what it gives away.
	creds := credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})
	a.conn, err = grpc.NewClient("passthrough:///ca", grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.Dial(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.conn.Close() })
	return a
}

// attest asks for an agent's SVID over gRPC and returns the chain that came back.
func (a authority) attest(ctx context.Context, e attestor.Evidence) ([][]byte, error) {
	resp, err := apiv1.NewAuthorityClient(a.conn).AttestAgent(ctx, &apiv1.AttestAgentRequest{
		Evidence: &apiv1.Evidence{Kind: e.Kind, Data: e.Data}, Csr: a.csr, Protocol: api.Protocol,
	})
	return resp.GetChain(), api.FromStatus(err)
}

// asked reads the review that a request asks for.
func asked(r *http.Request) (authenticationv1.TokenReview, error) {
	var review authenticationv1.TokenReview
	data, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return review, err
	}
	return review, json.Unmarshal(data, &review)
}

// good is what an API server answers to review about a token of p.
func good(review authenticationv1.TokenReview, p attestortest.Pod) authenticationv1.TokenReview {
	review.Status = authenticationv1.TokenReviewStatus{
		Authenticated: true,
		Audiences:     review.Spec.Audiences,
		User: authenticationv1.UserInfo{
			Username: "system:serviceaccount:" + p.Namespace + ":" + p.ServiceAccount,
			UID:      p.ServiceAccountUID,
			Groups:   []string{"system:serviceaccounts", "system:serviceaccounts:" + p.Namespace, "system:authenticated"},
			Extra: map[string]authenticationv1.ExtraValue{
				"authentication.kubernetes.io/pod-name":  {p.Name},
				"authentication.kubernetes.io/pod-uid":   {p.UID},
				"authentication.kubernetes.io/node-name": {p.NodeName},
				"authentication.kubernetes.io/node-uid":  {p.NodeUID},
			},
		},
	}
	return review
}

// send answers with v as JSON.
func send(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}
