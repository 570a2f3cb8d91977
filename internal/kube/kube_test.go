package kube_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/canary"
	"github.com/signet-ca/signet/internal/kube"
)

func replaceOnce(t testing.TB, text, from, to string) string {
	t.Helper()
	if strings.Count(text, from) != 1 {
		t.Fatalf("%q is not there once in %s", from, text)
	}
	return strings.Replace(text, from, to, 1)
}

// What is sent, and that it is enough.
func TestReviewRequest(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, http2)
			a := newAuthority(t, s.open(t), 0)
			pod := a.AgentPod("node-1")
			e := a.Evidence(pod, "signet-agent:"+catest.TrustDomain, time.Hour)
			s.answer(func(w http.ResponseWriter, r *http.Request) {
				review, err := asked(r)
				if err != nil || review.Spec.Token != string(e.Data) || len(review.Spec.Audiences) != 1 || review.Spec.Audiences[0] != "signet-agent:"+catest.TrustDomain {
					t.Errorf("asked about %q, %v", review.Spec.Audiences, err)
				}
				if r.Method != http.MethodPost || r.URL.Path != "/apis/authentication.k8s.io/v1/tokenreviews" {
					t.Errorf("%s %s", r.Method, r.URL)
				}
				for k, want := range map[string]string{"Authorization": "Bearer " + bearer, "User-Agent": "signet-ca/test", "Accept": "application/json", "Accept-Encoding": ""} {
					if got := r.Header.Get(k); got != want {
						t.Errorf("%s is %q, want %q", k, got, want)
					}
				}
				send(w, http.StatusCreated, good(review, pod))
			})
			chain, err := a.attest(t.Context(), e)
			if err != nil || len(chain) == 0 {
				t.Errorf("got %d certificates, %v", len(chain), err)
			}
			if n := s.asked.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

// A server that lies, raves, stalls or is another than it should be: each row is one SVID that nobody may get. All run over
// real gRPC and real TLS, and each is asked exactly once, but for the one that never gets to read a request.
func TestReviewHostile(t *testing.T) {
	s := newServer(t, true)
	other := newServer(t, true)
	other.answer(func(http.ResponseWriter, *http.Request) { t.Error("another server was asked") })
	a := newAuthority(t, s.open(t), 0)
	pod := a.AgentPod("node-1")
	say := func(status int, kind, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", kind)
			w.WriteHeader(status)
			io.WriteString(w, body)
		}
	}
	status := func(code int, reason metav1.StatusReason, after int32) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if after > 0 {
				w.Header().Set("Retry-After", "3")
			}
			st := metav1.Status{Status: metav1.StatusFailure, Code: int32(code), Reason: reason, Message: "canary of the server"}
			st.Kind, st.APIVersion = "Status", "v1"
			send(w, code, st)
		}
	}
	change := func(f func(*authenticationv1.TokenReview)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			review, err := asked(r)
			if err != nil {
				t.Error(err)
			}
			review = good(review, pod)
			f(&review)
			send(w, http.StatusCreated, review)
		}
	}
	redirect := func(code int, to string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, code) }
	}
	for _, tc := range []struct {
		name   string
		answer http.HandlerFunc
		want   api.Reason
	}{
		{"no", change(func(r *authenticationv1.TokenReview) { r.Status = authenticationv1.TokenReviewStatus{} }), api.TokenReviewRefused},
		{"no, and why", change(func(r *authenticationv1.TokenReview) {
			r.Status.Authenticated, r.Status.Error = false, "canary of the server"
		}), api.TokenReviewRefused},
		{"yes, and an error", change(func(r *authenticationv1.TokenReview) { r.Status.Error = "canary of the server" }), api.TokenReviewRefused},
		{"success that says nothing", say(200, "application/json", `{"kind":"Status","apiVersion":"v1","status":"Success"}`), api.ReviewerUnavailable},
		{"a review without a status", say(201, "application/json", `{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1"}`), api.TokenReviewRefused},
		// threat: A03
		{"without audiences", change(func(r *authenticationv1.TokenReview) { r.Status.Audiences = nil }), api.ReviewerNotAudienceAware},
		// threat: A01
		{"for the API server", change(func(r *authenticationv1.TokenReview) {
			r.Status.Audiences = []string{"https://kubernetes.default.svc"}
		}), api.ReviewerNotAudienceAware},
		// threat: A19
		{"an OIDC user named like it", change(func(r *authenticationv1.TokenReview) { r.Status.User.Groups = []string{"system:authenticated"} }), api.NotAServiceAccount},
		{"another ServiceAccount", change(func(r *authenticationv1.TokenReview) { r.Status.User.Username += "x" }), api.TokenReviewMismatch},
		{"another pod", change(func(r *authenticationv1.TokenReview) {
			*r = good(*r, attestortest.NewPod(pod.Namespace, pod.Name, pod.ServiceAccount, pod.NodeName))
		}), api.TokenReviewMismatch},
		{"about another token", change(func(r *authenticationv1.TokenReview) { r.Spec.Token = "another" }), api.ReviewerUnavailable},

		// threat: G01
		{"500", status(500, metav1.StatusReasonInternalError, 0), api.ReviewerUnavailable},
		{"503 that wants a retry", status(503, metav1.StatusReasonServiceUnavailable, 3), api.ReviewerUnavailable},
		{"504", status(504, metav1.StatusReasonTimeout, 0), api.ReviewerUnavailable},
		{"a gateway's page", say(502, "text/html", "<h1>canary of the server</h1>"), api.ReviewerUnavailable},
		// threat: G02
		{"429 that wants a retry", status(429, metav1.StatusReasonTooManyRequests, 3), api.ReviewerUnavailable},
		{"401 for the CA", status(401, metav1.StatusReasonUnauthorized, 0), api.ReviewerUnavailable},
		{"403 for the CA", status(403, metav1.StatusReasonForbidden, 0), api.ReviewerUnavailable},
		{"404", status(404, metav1.StatusReasonNotFound, 0), api.ReviewerUnavailable},

		{"nothing", say(200, "application/json", ""), api.ReviewerUnavailable},
		{"no content", say(204, "application/json", ""), api.ReviewerUnavailable},
		{"no JSON", say(200, "application/json", "canary of the server"), api.ReviewerUnavailable},
		{"half a review", say(200, "application/json", `{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1","status":{"authenticated":true`), api.ReviewerUnavailable},
		{"of other types", say(200, "application/json", `{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1","status":{"authenticated":"true"}}`), api.ReviewerUnavailable},
		{"another kind", say(200, "application/json", `{"kind":"SelfSubjectAccessReview","apiVersion":"authorization.k8s.io/v1","status":{"allowed":true}}`), api.ReviewerUnavailable},
		{"a version of old", say(200, "application/json", `{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1beta1","status":{"authenticated":true}}`), api.ReviewerUnavailable},
		{"YAML", say(200, "application/yaml", "kind: TokenReview\napiVersion: authentication.k8s.io/v1\nstatus: {authenticated: true}\n"), api.ReviewerUnavailable},
		{"without a content type", say(200, "", `{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1"}`), api.ReviewerUnavailable},
		{"10 MiB", change(func(r *authenticationv1.TokenReview) { r.Status.User.UID = strings.Repeat("x", 10<<20) }), api.ReviewerUnavailable},
		{"10 MiB of error", say(500, "application/json", strings.Repeat("canary of the server ", 10<<20/20)), api.ReviewerUnavailable},
		{"without end", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			for r.Context().Err() == nil {
				if _, err := w.Write(bytes.Repeat([]byte(" "), 64<<10)); err != nil {
					return
				}
			}
		}, api.ReviewerUnavailable},
		{"deep", say(200, "application/json", `{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1","x":`+strings.Repeat("[", 100_000)), api.ReviewerUnavailable},

		{"301", redirect(301, other.URL), api.ReviewerUnavailable},
		{"302", redirect(302, other.URL), api.ReviewerUnavailable},
		{"307, which would carry the token along", redirect(307, other.URL), api.ReviewerUnavailable},
		{"308, to itself", redirect(308, "/elsewhere"), api.ReviewerUnavailable},
		{"300", say(300, "application/json", "{}"), api.ReviewerUnavailable},
		{"breaks off", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, api.ReviewerUnavailable},
		{"breaks off in the middle", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, `{"kind":"TokenReview",`)
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, api.ReviewerUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s.answer(tc.answer)
			s.asked.Store(0)
			chain, err := a.attest(t.Context(), a.Evidence(pod, "signet-agent:"+catest.TrustDomain, time.Hour))
			refused(t, chain, err, tc.want)
			if n := s.asked.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
	// After all this, the CA still works.
	s.answer(change(func(*authenticationv1.TokenReview) {}))
	if _, err := a.attest(t.Context(), a.Evidence(pod, "signet-agent:"+catest.TrustDomain, time.Hour)); err != nil {
		t.Errorf("a good answer afterwards: %v", err)
	}
}

func refused(t *testing.T, chain [][]byte, err error, want api.Reason) {
	t.Helper()
	if api.ReasonOf(err) != want || len(chain) != 0 {
		t.Fatalf("got %v and %d certificates, want %s", err, len(chain), want)
	}
	for _, canary := range []string{"canary", bearer, "127.0.0.1", "kubeconfig"} {
		if strings.Contains(err.Error(), canary) {
			t.Errorf("the caller sees %q", err)
		}
	}
}

// A server that takes the request and says nothing costs its deadline.
//
// threat: G01
func TestReviewHangs(t *testing.T) {
	s := newServer(t, true)
	a := newAuthority(t, s.open(t), 200*time.Millisecond)
	pod := a.AgentPod("node-1")
	for name, answer := range map[string]http.HandlerFunc{
		"before it answers": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"after its headers": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusCreated)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		},
		"drop by drop": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			for {
				select {
				case <-r.Context().Done():
					return
				case <-time.After(10 * time.Millisecond):
					io.WriteString(w, " ")
					w.(http.Flusher).Flush()
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s.answer(answer)
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			chain, err := a.attest(ctx, a.Evidence(pod, "signet-agent:"+catest.TrustDomain, time.Hour))
			refused(t, chain, err, api.ReviewerUnavailable)
		})
	}
}

// Whoever answers in place of the API server does not get to see a token.
//
// threat: G07
func TestReviewForeignServer(t *testing.T) {
	s := newServer(t, false)
	s.answer(func(http.ResponseWriter, *http.Request) { t.Error("it read a request") })
	for name, changes := range map[string][][2]string{
		"of another CA":    {{"certificate-authority: ca.crt", "certificate-authority: " + strangerCA(t)}},
		"of another name":  {{"certificate-authority: ca.crt", "certificate-authority: ca.crt, tls-server-name: elsewhere.example"}},
		"that nobody runs": {{s.URL, "https://127.0.0.1:1"}},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAuthority(t, s.open(t, changes...), 0)
			chain, err := a.attest(t.Context(), a.Evidence(a.AgentPod("node-1"), "signet-agent:"+catest.TrustDomain, time.Hour))
			refused(t, chain, err, api.ReviewerUnavailable)
			if n := s.asked.Load(); n != 0 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

// strangerCA writes the certificate of a CA that issued nothing.
func strangerCA(t *testing.T) string {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "stranger.crt")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Garbage never reaches the API server, seen from its side of the wire.
//
// threat: A01, A02, A04, A13
func TestReviewSparesTheServer(t *testing.T) {
	s := newServer(t, true)
	s.answer(func(http.ResponseWriter, *http.Request) {})
	a := newAuthority(t, s.open(t), 0)
	pod, audience := a.AgentPod("node-1"), "signet-agent:"+catest.TrustDomain
	for want, change := range map[api.Reason]func(*attestortest.Draft){
		api.TokenAudience:             attestortest.Audiences("https://kubernetes.default.svc"),
		api.TokenAudienceNotExclusive: attestortest.Audiences(audience, "https://kubernetes.default.svc"),
		api.TokenExpired: func(d *attestortest.Draft) {
			d.Claims["iat"], d.Claims["nbf"], d.Claims["exp"] = time.Now().Unix()-60, time.Now().Unix()-60, time.Now().Unix()-1
		},
		api.TokenSignature: func(d *attestortest.Draft) {
			sign := d.Sign
			d.Sign = func(b []byte) ([]byte, error) { return sign(append(b, 'x')) }
		},
		api.IssuerUnknown:    attestortest.Claim("iss", "https://elsewhere.example"),
		api.TokenNotPodBound: func(d *attestortest.Draft) { delete(d.Kubernetes(), "pod") },
		api.TokenMalformed:   attestortest.Without("exp"),
	} {
		chain, err := a.attest(t.Context(), a.Evidence(pod, audience, time.Hour, change))
		refused(t, chain, err, want)
	}
	if n := s.asked.Load(); n != 0 {
		t.Errorf("the API server was asked %d times", n)
	}
}

// Requests beyond the rate wait, and one whose turn comes too late fails without being sent.
func TestRate(t *testing.T) {
	s := newServer(t, false)
	s.answer(func(w http.ResponseWriter, r *http.Request) {
		review, _ := asked(r)
		send(w, http.StatusCreated, good(review, attestortest.Pod{}))
	})
	c := open(t, kube.Config{Kubeconfig: s.kubeconfig(t), QPS: 1})
	var late int
	ctx, cancel := context.WithTimeout(t.Context(), 900*time.Millisecond)
	defer cancel()
	for range 10 {
		if _, err := c.ReviewToken(ctx, []byte("a.b.c"), "x"); err != nil {
			late++
		}
	}
	if n := s.asked.Load(); n > 3 || int(n)+late < 10 {
		t.Errorf("%d requests went out and %d did not", n, late)
	}
}

func TestReviewNeedsAnAudience(t *testing.T) {
	s := newServer(t, false)
	if _, err := s.open(t).ReviewToken(t.Context(), []byte("a.b.c"), ""); err == nil || s.asked.Load() != 0 {
		t.Errorf("got %v, asked %d times", err, s.asked.Load())
	}
}

// threat: G08
func TestCheckReview(t *testing.T) {
	s := newServer(t, false)
	c := s.open(t)
	for _, tc := range []struct {
		name      string
		status    authorizationv1.SubjectAccessReviewStatus
		code      int
		ok        bool
		forbidden bool
	}{
		{"allowed", authorizationv1.SubjectAccessReviewStatus{Allowed: true}, 201, true, false},
		{"not allowed", authorizationv1.SubjectAccessReviewStatus{}, 201, false, true},
		{"denied", authorizationv1.SubjectAccessReviewStatus{Allowed: true, Denied: true}, 201, false, true},
		{"not answered", authorizationv1.SubjectAccessReviewStatus{}, 500, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s.answer(func(w http.ResponseWriter, r *http.Request) {
				var review authorizationv1.SelfSubjectAccessReview
				if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
					t.Error(err)
				}
				if a := review.Spec.ResourceAttributes; a == nil || *a != (authorizationv1.ResourceAttributes{Verb: "create", Group: "authentication.k8s.io", Version: "v1", Resource: "tokenreviews"}) {
					t.Errorf("asked for %+v", a)
				}
				review.Status = tc.status
				send(w, tc.code, review)
			})
			err := c.CheckReview(t.Context())
			if (err == nil) != tc.ok || errors.Is(err, kube.ErrForbidden) != tc.forbidden {
				t.Errorf("got %v", err)
			}
			if tc.forbidden && !strings.Contains(err.Error(), `{apiGroups: ["authentication.k8s.io"], resources: ["tokenreviews"], verbs: ["create"]}`) {
				t.Errorf("it does not name the rule: %v", err)
			}
		})
	}
}

func TestOpen(t *testing.T) {
	s := newServer(t, false)
	s.answer(func(w http.ResponseWriter, r *http.Request) {
		review, _ := asked(r)
		review = good(review, attestortest.Pod{})
		review.Status.User.Username = r.Header.Get("Authorization")
		send(w, http.StatusCreated, review)
	})
	a, err := s.open(t, [2]string{"token: " + bearer, "tokenFile: token"}).ReviewToken(t.Context(), []byte("a.b.c"), "x")
	if err != nil || a.Username != "Bearer "+bearer+"-of-file" {
		t.Errorf("with a token file beside the kubeconfig: %q, %v", a.Username, err)
	}
	const cluster, user = "certificate-authority: ca.crt", "token: " + bearer
	for _, tc := range []struct {
		name, from, to, want string
	}{
		{"no context", "current-context: one", "", "no context"},
		{"another context", "current-context: one", "current-context: two", `no context "two"`},
		{"no cluster", "cluster: c,", "cluster: d,", "not there"},
		{"no user", "user: u}", "user: v}", "not there"},
		{"http", s.URL, "http://127.0.0.1:8080", "https"},
		{"no server", s.URL, "", "https"},
		{"a user in the URL", s.URL, "https://user@127.0.0.1:1", "https"},
		{"no CA", ", " + cluster, "", "certificate-authority"},
		{"a CA that is not there", cluster, "certificate-authority: nowhere.crt", "nowhere.crt"},
		{"a CA that is none", cluster, "certificate-authority: token", "kubeconfig"},
		{"insecure", cluster, "insecure-skip-tls-verify: true", "insecure-skip-tls-verify"},
		{"a proxy that is none", cluster, cluster + ", proxy-url: x", "proxy-url"},
		{"nobody", "{" + user + "}", "{}", "no token"},
		{"a program", user, "exec: {apiVersion: client.authentication.k8s.io/v1, command: /bin/true, interactiveMode: Never}", "exec"},
		{"a provider", user, "auth-provider: {name: oidc}", "auth-provider"},
		{"a password", user, "username: a, password: b", "password"},
		{"another's name", user, user + ", as: admin", "impersonates"},
		{"another's groups", user, user + ", as-groups: [admin]", "impersonates"},
		{"no kubeconfig", "kind: Config", "kind: Secret", "does not parse"},
		{"no YAML", "kind: Config", "kind: [", "does not parse"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := kube.Open(kube.Config{Kubeconfig: s.kubeconfig(t, [2]string{tc.from, tc.to}), UserAgent: "x", Timeout: time.Second})
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), bearer) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for name, cfg := range map[string]kube.Config{
		"no file":                   {Kubeconfig: filepath.Join(t.TempDir(), "nowhere")},
		"a folder":                  {Kubeconfig: t.TempDir()},
		"outside of a cluster":      {Kubeconfig: kube.InCluster},
		"a context inside of one":   {Kubeconfig: kube.InCluster, Context: "one"},
		"a context that is missing": {Kubeconfig: s.kubeconfig(t), Context: "two"},
		"a negative rate":           {Kubeconfig: s.kubeconfig(t), QPS: -1},
	} {
		t.Run(name, func(t *testing.T) {
			cfg.UserAgent, cfg.Timeout = "x", time.Second
			if _, err := kube.Open(cfg); err == nil {
				t.Error("it opened")
			}
		})
	}
}

// FuzzAnswer answers a review with any bytes. Whatever they are, there is an answer or an error, and no error says whose
// token it was.
func FuzzAnswer(f *testing.F) {
	s := newServer(f, false)
	c := s.open(f)
	f.Add(201, []byte(`{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1","status":{"authenticated":true,"user":{"extra":{"a":["b"]}}}}`))
	f.Add(200, []byte(`{"kind":"Status","apiVersion":"v1","status":"Failure","details":{"retryAfterSeconds":9223372036}}`))
	f.Add(429, []byte(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"TooManyRequests","details":{"retryAfterSeconds":-1}}`))
	f.Add(500, []byte("[[[[["))
	f.Add(307, []byte(""))
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		s.answer(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(200 + max(status, -status)%400)
			w.Write(body)
		})
		a, err := c.ReviewToken(t.Context(), []byte("canary.of.token"), "x")
		if err != nil && (strings.Contains(err.Error(), bearer) || strings.Contains(err.Error(), "canary.of.token")) {
			t.Errorf("got %v", err)
		}
		if err != nil && a.Authenticated {
			t.Errorf("a yes beside %v", err)
		}
	})
}
