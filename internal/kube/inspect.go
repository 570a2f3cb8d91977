package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/flowcontrol"
)

// OperatorConfig says which cluster a person means, as kubectl would take it.
type OperatorConfig struct {
	Kubeconfig string        // path. Empty: the files of $KUBECONFIG, then ~/.kube/config, then the pod that this runs in
	Context    string        // of the kubeconfig. Empty: its current one
	UserAgent  string        // "program/version", as the API server's audit log shows it. Required.
	Timeout    time.Duration // of one request. Zero: none but the context's
}

// Operator is a client in a person's hands: it acts as the person's own kubeconfig says, and holds no key of ours. So it
// does what kubectl does with that file, commands for credentials, proxies and impersonation among it, where Open refuses
// them. What it keeps of Open are the bounds: no redirect is followed, nothing is sent twice, every answer has an end.
type Operator struct {
	client   *Client
	verified bool
	config   *rest.Config // for upgrading

	upgradeOnce sync.Once
	upgrades    *http.Client // guarded by upgradeOnce, as is upgradeErr
	upgradeErr  error
}

// OpenOperator reads the kubeconfig and does not speak to the API server. Its error names the file and never quotes it.
func OpenOperator(cfg OperatorConfig) (*Operator, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.WarnIfAllMissing = false
	rules.ExplicitPath = cfg.Kubeconfig
	from := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: cfg.Context})
	base, err := from.ClientConfig()
	if err != nil {
		return nil, describeKubeconfig(cmp.Or(cfg.Kubeconfig, os.Getenv(clientcmd.RecommendedConfigPathEnvVar), clientcmd.RecommendedHomeFile), cfg.Context, err)
	}
	base.UserAgent, base.Timeout, base.QPS = cfg.UserAgent, 0, -1 // each request has a deadline of its own
	base.ContentType, base.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON
	base.DisableCompression = true
	base.WarningHandlerWithContext = rest.NoWarnings{}
	plain := rest.CopyConfig(base)
	wrap := base.WrapTransport // that of an auth provider
	base.WrapTransport = func(next http.RoundTripper) http.RoundTripper {
		if wrap != nil {
			next = wrap(next)
		}
		return bounded{next}
	}
	h, err := rest.HTTPClientFor(base)
	if err != nil {
		return nil, err
	}
	h.CheckRedirect = noRedirects
	server, _, err := rest.DefaultServerUrlFor(base)
	if err != nil {
		return nil, err
	}
	return &Operator{
		client: &Client{
			base: strings.TrimRight(server.String(), "/"), timeout: cfg.Timeout, http: h, stream: h,
			pace: flowcontrol.NewFakeAlwaysRateLimiter(), // its requests come one after another
		},
		verified: server.Scheme == "https" && !base.Insecure,
		config:   plain,
	}, nil
}

// describeKubeconfig drops what a parser quotes of a file that may hold credentials.
func describeKubeconfig(path, context string, err error) error {
	switch {
	case clientcmd.IsEmptyConfig(err):
		return fmt.Errorf("there is no cluster in %s, and this is not a pod", path)
	case clientcmd.IsContextNotFound(err), clientcmd.IsConfigurationInvalid(err), errors.Is(err, os.ErrNotExist), errors.Is(err, os.ErrPermission):
		return err
	case context != "" && err.Error() == fmt.Sprintf("context %q does not exist", context): // which has no type of its own
		return err
	}
	return fmt.Errorf("%s does not parse as a kubeconfig", path)
}

// Server is the URL of the API server.
func (o *Operator) Server() string { return o.client.base }

// Verified says whether the connection is TLS to a server whose certificate is checked.
func (o *Operator) Verified() bool { return o.verified }

// Close ends idle connections.
func (o *Operator) Close() {
	o.client.Close()
	o.upgradeOnce.Do(func() { o.upgradeErr = errors.New("the client is closed") })
	if o.upgrades != nil {
		o.upgrades.CloseIdleConnections()
	}
}

// Read fills into from the JSON document at path, which is at most 8 MiB, and returns the time that the API server says it
// is; zero where it says none. ErrNotFound and ErrForbidden are told apart.
func (o *Operator) Read(ctx context.Context, path string, into any) (time.Time, error) {
	return o.call(ctx, http.MethodGet, path, nil, into)
}

// Create posts in, as JSON, to path and fills out, unless that is nil, from the answer. It is sent once.
func (o *Operator) Create(ctx context.Context, path string, in, out any) error {
	_, err := o.call(ctx, http.MethodPost, path, in, out)
	return err
}

// Delete deletes the object at path if it is still the one with that UID (ErrConflict where it is another, ErrNotFound
// where there is none); what it owns goes after it.
func (o *Operator) Delete(ctx context.Context, path, uid string) error {
	if uid == "" {
		return errors.New("an object is deleted by its UID")
	}
	options := map[string]any{
		"apiVersion": "v1", "kind": "DeleteOptions",
		"preconditions": map[string]string{"uid": uid}, "propagationPolicy": "Background",
	}
	_, err := o.call(ctx, http.MethodDelete, path, options, nil)
	return err
}

func (o *Operator) call(ctx context.Context, method, path string, in, out any) (time.Time, error) {
	ctx, cancel := o.limit(ctx)
	defer cancel()
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return time.Time{}, err
		}
	}
	resp, err := o.client.do(ctx, method, path, nil, runtime.ContentTypeJSON, body)
	if err != nil {
		return time.Time{}, err
	}
	defer resp.Body.Close()
	date, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		date = time.Time{} // it says none
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxObject+1))
	switch {
	case err != nil:
		return date, fmt.Errorf("the API server's answer broke off: %w", err)
	case len(data) > maxObject:
		return date, fmt.Errorf("the API server's answer is above %d bytes", maxObject)
	case out == nil:
		return date, nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return date, errors.New("the API server's answer does not parse")
	}
	return date, nil
}

func (o *Operator) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	if o.client.timeout > 0 {
		return context.WithTimeout(ctx, o.client.timeout)
	}
	return context.WithCancel(ctx)
}

// Each reads the collection at path page by page and hands over its objects, each of which is reduced to T while it is
// read: a large cluster costs time and no memory. query may select; f may end it by an error.
func Each[T any](ctx context.Context, o *Operator, path string, query url.Values, f func(T) error) error {
	selected := url.Values{"limit": {strconv.Itoa(pageSize)}}
	maps.Copy(selected, query)
	for seen := 0; ; {
		meta, err := eachOnPage(ctx, o, path, selected, func(item T) error {
			if seen++; seen > maxObjects {
				return fmt.Errorf("there are more than %d objects", maxObjects)
			}
			return f(item)
		})
		if err != nil || meta.Continue == "" {
			return err
		}
		selected.Set("continue", meta.Continue)
	}
}

func eachOnPage[T any](ctx context.Context, o *Operator, path string, query url.Values, f func(T) error) (listMeta, error) {
	ctx, cancel := o.limit(ctx)
	defer cancel()
	resp, err := o.client.do(ctx, http.MethodGet, path, query, runtime.ContentTypeJSON, nil)
	if err != nil {
		return listMeta{}, err
	}
	defer resp.Body.Close()
	return readItemsAs(resp.Body, f)
}

// readItemsAs reads the JSON of a list, which must have items.
func readItemsAs[T any](body io.Reader, f func(T) error) (listMeta, error) {
	meta, listed, err := readItems(body, f)
	if err != nil {
		return meta, err
	}
	if !listed {
		return meta, errors.New("the API server's answer is not a list")
	}
	return meta, nil
}
