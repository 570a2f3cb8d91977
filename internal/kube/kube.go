// Package kube is how Signet speaks to a Kubernetes API server, and the only package that imports client-go.
//
// What consumers need (is this token good?) they declare in words of their own; here it is asked, and the answer handed
// over as it came. The security reason for one place: client-go trusts more than a certificate authority may. Left alone
// it takes proxies from the environment, follows redirects with the caller's credentials on them, falls back to the
// system's roots where the cluster's CA file is missing, runs whatever program a kubeconfig names, retries a request ten
// times if a server asks for it, and reads answers without end. Open turns all of that off.
package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"
)

// InCluster as Config.Kubeconfig stands for the ServiceAccount of the pod that the process runs in.
const InCluster = "in-cluster"

// DefaultQPS is how many requests a second a client makes. client-go's own 5 would let a cluster of a thousand pods wait
// for minutes; an API server that shares two busy cores with its callers answers 800 reviews a second.
const DefaultQPS = 200

// Config says which API server, and as whom.
type Config struct {
	// Kubeconfig is the path of a kubeconfig file, or InCluster. Required. See Open for what may be in it.
	Kubeconfig string

	// Context of the kubeconfig. Empty: its current one.
	Context string

	// UserAgent is "program/version", as the API server's audit log shows it. Required.
	UserAgent string

	// Timeout of one request, of which every caller may ask for less by its context. Required.
	Timeout time.Duration

	// QPS is how many requests a second there may be, over bursts of twice as many; a request beyond that waits for its
	// turn, or fails at once if its turn comes after its deadline. Zero: DefaultQPS.
	QPS int
}

// Client speaks to one API server. It is safe for concurrent use.
type Client struct {
	base           string // URL of the API server
	timeout        time.Duration
	stream         *http.Client // for do: its requests have deadlines of their own
	pace           flowcontrol.RateLimiter
	http           *http.Client
	authentication *rest.RESTClient
	authorization  *rest.RESTClient
}

// Open makes a client and reads its files, but does not speak to the API server. The connection is TLS to a server that
// chains to the CA of the kubeconfig or of the pod, and to no other; the token, if there is one in a file, the CA file and
// the files of a client certificate are read again when they change.
//
// A kubeconfig's user may have a token, a token file or a client certificate. Commands (exec), authentication providers,
// passwords and impersonation are refused, and so is a cluster without a CA of its own, without https, or with
// insecure-skip-tls-verify. A proxy is one that the kubeconfig names (proxy-url); the environment is not heeded.
func Open(cfg Config) (*Client, error) {
	if cfg.UserAgent == "" || cfg.Timeout <= 0 || cfg.QPS < 0 {
		return nil, errors.New("a client needs a user agent, a timeout, and a rate that is not negative")
	}
	base, err := load(cfg)
	if err != nil {
		return nil, err
	}
	base.UserAgent, base.Timeout = cfg.UserAgent, cfg.Timeout
	base.QPS = -1 // client-go would pace as well, and talk about it on stderr
	base.ContentType, base.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON
	base.DisableCompression = true // a small answer must not become a large one
	base.WarningHandlerWithContext = rest.NoWarnings{}
	base.WrapTransport = func(next http.RoundTripper) http.RoundTripper { return bounded{next} }

	codecs, err := newCodecs()
	if err != nil {
		return nil, err
	}
	base.NegotiatedSerializer = codecs.WithoutConversion()
	qps := cmp.Or(cfg.QPS, DefaultQPS)
	c := &Client{
		base: strings.TrimRight(base.Host, "/"), timeout: cfg.Timeout,
		pace: flowcontrol.NewTokenBucketRateLimiter(float32(qps), 2*qps),
	}
	if c.http, err = rest.HTTPClientFor(base); err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", cfg.Kubeconfig, err)
	}
	c.http.CheckRedirect = noRedirects
	c.stream = &http.Client{Transport: c.http.Transport, CheckRedirect: noRedirects} // the same connections
	if c.authentication, err = restClient(base, c.http, authenticationv1.SchemeGroupVersion); err != nil {
		return nil, err
	}
	if c.authorization, err = restClient(base, c.http, authorizationv1.SchemeGroupVersion); err != nil {
		return nil, err
	}
	return c, nil
}

// post sends ask once (client-go's own retries are off) and returns the answer, which is of the same type.
func post[T runtime.Object](ctx context.Context, pace flowcontrol.RateLimiter, group *rest.RESTClient, resource string, ask T) (answer T, err error) {
	if err := pace.Wait(ctx); err != nil {
		return answer, err
	}
	got, err := group.Post().Resource(resource).MaxRetries(0).Body(ask).Do(ctx).Get()
	if err != nil {
		return answer, delay(err)
	}
	answer, ok := got.(T)
	if !ok {
		return answer, errors.New("the API server's answer is of another kind than the question")
	}
	return answer, nil
}

// Close ends idle connections. Requests that are under way go on.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func restClient(base *rest.Config, h *http.Client, gv schema.GroupVersion) (*rest.RESTClient, error) {
	cfg := rest.CopyConfig(base)
	cfg.APIPath, cfg.GroupVersion = "/apis", &gv
	return rest.RESTClientForConfigAndClient(cfg, h)
}

// newCodecs knows the few types that are spoken of here. client-go's own scheme knows all of Kubernetes.
func newCodecs() (serializer.CodecFactory, error) {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	if err := errors.Join(authenticationv1.AddToScheme(scheme), authorizationv1.AddToScheme(scheme)); err != nil {
		return serializer.CodecFactory{}, err
	}
	return serializer.NewCodecFactory(scheme), nil
}
