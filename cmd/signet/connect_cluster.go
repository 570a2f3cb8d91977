package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/kube"
)

// The way to a CA in a cluster: the API server of the kubeconfig tells the trust bundle and which pod is the CA, gives a
// token for the role that is asked for if RBAC lets it, and forwards the operators' port. What comes over that is TLS to the
// CA's own SVID, so neither the API server's proxy nor the node can read the token or answer for the CA.

// The life of an operator's token, and how much of it is left when a fresh one is asked for. The API server gives none for
// less than ten minutes.
const (
	tokenSeconds = 600
	tokenRenewal = 2 * time.Minute
)

// The roles of --as-role, each a ServiceAccount in the operators' namespace.
var operatorRoles = []string{"viewer", "operator", "emergency"}

// operatorFlags say which CA is meant and as whom, where it is not the one of the admin socket.
type operatorFlags struct {
	kubeFlags
	accounts string // --operators-namespace
	role     string // --as-role
	glass    string // --break-glass
	address  string // --address
	bundle   string // --bundle
	domain   string // --signet-trust-domain

	roleSaid func() bool // --as-role is there, be it as its default
}

func (f *operatorFlags) add(root *cobra.Command) {
	fl := root.PersistentFlags()
	f.roleSaid = func() bool { return fl.Changed("as-role") }
	fl.StringVar(&f.kubeconfig, "kubeconfig", "", "operate the CA in the cluster of the kubeconfig at `PATH` (default as kubectl, where there is no socket)")
	fl.StringVar(&f.context, "context", "", "operate the CA in the cluster of the kubeconfig's context `NAME`")
	fl.StringVar(&f.role, "as-role", operatorRoles[0], "operate the CA in a cluster as `ROLE`: "+strings.Join(operatorRoles, ", "))
	fl.StringVar(&f.namespace, "signet-namespace", defaultNamespace, "`NAMESPACE` of that CA")
	fl.StringVar(&f.accounts, "operators-namespace", operatorsNamespace, "`NAMESPACE` of the ServiceAccounts of the roles")
	fl.StringVar(&f.glass, "break-glass", "", "`FILE` of a break-glass certificate, instead of a token")
	fl.StringVar(&f.address, "address", "", "with --break-glass: `HOST:PORT` of the operators' port, without the API server")
	fl.StringVar(&f.bundle, "bundle", "", "with --address: `FILE` of the trust bundle, PEM")
	fl.StringVar(&f.domain, "signet-trust-domain", "", "trust domain `NAME` of that CA, where its roots do not say it")
	root.MarkPersistentFlagFilename("kubeconfig")
	root.MarkPersistentFlagFilename("break-glass")
	root.MarkPersistentFlagFilename("bundle")
	root.RegisterFlagCompletionFunc("as-role", cobra.FixedCompletions(operatorRoles, cobra.ShellCompDirectiveNoFileComp))
}

// given says whether any flag asks for a way other than the socket.
func (f *operatorFlags) given() bool {
	return f.kubeconfig != "" || f.context != "" || f.role != operatorRoles[0] || f.roleSaid != nil && f.roleSaid() || f.namespace != defaultNamespace ||
		f.accounts != operatorsNamespace || f.glass != "" || f.address != "" || f.bundle != "" || f.domain != ""
}

func (f *operatorFlags) check() error {
	switch {
	case !slices.Contains(operatorRoles, f.role):
		return usageError{fmt.Errorf("--as-role %q is not one of %s", f.role, strings.Join(operatorRoles, ", "))}
	case !namespaceShape.MatchString(f.namespace):
		return usageError{fmt.Errorf("%q is not the name of a namespace", f.namespace)}
	case !namespaceShape.MatchString(f.accounts):
		return usageError{fmt.Errorf("%q is not the name of a namespace", f.accounts)}
	case f.address != "" && (f.glass == "" || f.bundle == ""):
		return usageError{errors.New("--address goes with --break-glass and --bundle: without the API server there is no token, and nothing to trust")}
	case f.bundle != "" && f.address == "":
		return usageError{errors.New("--bundle goes with --address; otherwise the bundle is that of the cluster")}
	}
	return nil
}

// throughCluster says whether the CA is reached through a cluster or an address, rather than by the socket.
func (a *app) throughCluster() (bool, error) {
	socket := a.socket != "" || a.getenv(socketEnv) != ""
	if a.operators.given() {
		if a.socket != "" {
			return false, usageError{errors.New("--socket is one way to the CA, and a cluster another: one of them")}
		}
		return true, a.operators.check()
	}
	if socket {
		return false, nil
	}
	if _, err := os.Lstat(defaultSocket); err == nil {
		return false, nil
	}
	if a.getenv("KUBECONFIG") != "" {
		return true, nil
	}
	if home := a.getenv("HOME"); home != "" {
		_, err := os.Stat(filepath.Join(home, ".kube", "config"))
		return err == nil, nil
	}
	return false, nil
}

// A clusterWay is how a channel reaches its CA. It is also the channel's credential of each request.
type clusterWay struct {
	a       *app
	f       *operatorFlags
	cluster *kube.Operator // nil with an address
	ctx     context.Context
	cancel  context.CancelFunc
	glass   *tls.Certificate
	known   spiffeid.TrustDomain // zero: what the roots say

	busy chan struct{} // holds one while somebody finds out what follows

	mu     sync.Mutex // guards what follows; nobody is asked anything while it is held
	bundle *x509bundle.Bundle
	token  string
	until  time.Time // of token
	failed error     // what a request ended by, where gRPC only has a text of it
}

// openWay prepares the way to the CA that f means, and goes none of it yet.
func (a *app) openWay(f *operatorFlags) (*clusterWay, error) {
	w := &clusterWay{a: a, f: f, busy: make(chan struct{}, 1)}
	if w.f.glass != "" {
		c, err := readBreakGlass(w.f.glass)
		if err != nil {
			return nil, err
		}
		w.glass = c
		if id, err := x509svid.IDFromCert(c.Leaf); err == nil { // it is for one trust domain
			w.known = id.TrustDomain()
		}
	}
	if w.f.domain != "" {
		td, err := spiffeid.TrustDomainFromString(w.f.domain)
		if err != nil {
			return nil, usageError{fmt.Errorf("--signet-trust-domain %q is none: %w", w.f.domain, err)}
		}
		w.known = td
	}
	if w.f.address != "" {
		b, err := readBundleFile(w.f.bundle, w.known)
		if err != nil {
			return nil, err
		}
		w.bundle = b
	} else {
		cluster, err := a.openCluster(&w.f.kubeFlags)
		if err != nil {
			return nil, err
		}
		if !cluster.Verified() { // it says which CA is the right one
			defer cluster.Close()
			return nil, &failure{
				err:  api.E(api.ConfigInvalid, "the kubeconfig does not make sure who answers as the API server %s", cluster.Server()),
				why:  "Whoever does would say by which bundle the CA is known, and get what is meant for it.",
				next: w.f.kubectl("config", "view", "--minify") + "   # https, certificate-authority-data, and no insecure-skip-tls-verify",
			}
		}
		w.cluster = cluster
	}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	return w, nil
}

// close ends every connection of the way.
func (w *clusterWay) close() {
	w.cancel()
	if w.cluster != nil {
		w.cluster.Close()
	}
}

// where tells people what is being spoken to.
func (w *clusterWay) where() string {
	if w.f.address != "" {
		return w.f.address
	}
	return "pod " + w.f.namespace + "/" + caName + "-0 through " + w.cluster.Server()
}

// dial connects to the operators' port, after everything that must be known for it.
func (w *clusterWay) dial(ctx context.Context) (net.Conn, error) {
	if w.f.address != "" {
		return new(net.Dialer).DialContext(ctx, "tcp", w.f.address)
	}
	if err := w.alone(ctx); err != nil {
		return nil, err
	}
	defer w.done()
	bundle, err := w.trust(ctx)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.bundle = bundle
	w.mu.Unlock()
	if w.glass == nil {
		if _, err := w.haveToken(ctx); err != nil {
			return nil, err
		}
	}
	pod, err := w.pod(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := w.cluster.PortForward(w.ctx, w.f.namespace, pod, operatorsPort)
	switch {
	case errors.Is(err, kube.ErrForbidden):
		return nil, w.forbidden(err, "forward a port to pod "+w.f.namespace+"/"+pod, w.f.namespace)
	case err != nil:
		return nil, w.unreachable(err, "no port of pod "+w.f.namespace+"/"+pod+" can be forwarded")
	}
	return conn, nil
}

// alone waits until nobody else finds anything out. After a nil error done must be called.
func (w *clusterWay) alone(ctx context.Context) error {
	select {
	case w.busy <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *clusterWay) done() { <-w.busy }

// trust reads the bundle by which the CA is known: anew for each connection, for a root may have come or gone.
func (w *clusterWay) trust(ctx context.Context) (*x509bundle.Bundle, error) {
	_, b, err := readPublished(ctx, w.cluster, w.f.namespace, spiffeid.TrustDomain{})
	bad, isBad := errors.AsType[errBundle](err)
	switch {
	case errors.Is(err, kube.ErrNotFound):
		return nil, &failure{
			err:  api.Wrap(api.NotFound, err, "there is no ConfigMap "+w.f.namespace+"/"+bundleName+", by which the CA would be known"),
			why:  "Signet is not installed in that namespace, or its CA has not published its bundle yet.",
			next: w.f.signet("check"),
		}
	case errors.Is(err, kube.ErrForbidden):
		return nil, w.forbidden(err, "read ConfigMap "+w.f.namespace+"/"+bundleName, w.f.namespace)
	case isBad:
		return nil, &failure{err: api.Wrap(api.BundleRejected, err, "the bundle in ConfigMap "+w.f.namespace+"/"+bundleName+" cannot be used: "+bad.Error()), next: w.f.signet("check")}
	case err != nil:
		return nil, w.a.unreachable(w.cluster, err)
	}
	return bundleOf(b.roots, w.known)
}

// bundleOf is the bundle of the one trust domain that is meant by whoever knows it, or else that its roots name: those of an
// upstream may name none.
func bundleOf(roots []*x509.Certificate, known spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	names := (&publishedBundle{roots: roots}).domains()
	if known.IsZero() && len(names) == 1 {
		var err error
		if known, err = spiffeid.TrustDomainFromString(names[0]); err != nil {
			return nil, &failure{err: api.Wrap(api.BundleRejected, err, "the bundle's roots are of no trust domain")}
		}
	}
	switch {
	case known.IsZero():
		return nil, &failure{
			err:  api.E(api.BundleRejected, "the bundle's roots name %d trust domains, so it is not known which is meant", len(names)),
			why:  "Roots that an upstream has made name none.",
			next: "signet --signet-trust-domain NAME ...",
		}
	case slices.ContainsFunc(names, func(name string) bool { return name != known.Name() }):
		return nil, &failure{err: api.E(api.BundleRejected, "a root of the bundle is of another trust domain than %s", known.Name())}
	}
	return x509bundle.FromX509Authorities(known, roots), nil
}

// pod finds a pod of the CA: one that is ready, or else one that runs, for it may be just what is asked why.
func (w *clusterWay) pod(ctx context.Context) (string, error) {
	var ready, running string
	err := kube.Each(ctx, w.cluster, in("v1", w.f.namespace, "pods", ""), url.Values{"labelSelector": {labelName + "=" + caName}}, func(p kPod) error {
		switch {
		case !p.Metadata.DeletionTimestamp.IsZero():
		case p.ready():
			ready = cmp.Or(ready, p.Metadata.Name)
		case p.Status.Phase == "Running":
			running = cmp.Or(running, p.Metadata.Name)
		}
		return nil
	})
	switch name := cmp.Or(ready, running); {
	case errors.Is(err, kube.ErrForbidden):
		return "", w.forbidden(err, "list the pods of "+w.f.namespace, w.f.namespace)
	case err != nil:
		return "", w.a.unreachable(w.cluster, err)
	case name == "":
		return "", &failure{
			err:  api.E(api.CAUnavailable, "no pod of the CA runs in namespace %s", w.f.namespace),
			why:  "It is starting, cannot start, or Signet is installed in another namespace (--signet-namespace).",
			next: w.f.kubectl("-n", w.f.namespace, "get", "pods", "-l", labelName+"="+caName),
		}
	default:
		return name, nil
	}
}

// haveToken asks for a token of the role, unless there is one that lasts. The caller is alone.
func (w *clusterWay) haveToken(ctx context.Context) (string, error) {
	w.mu.Lock()
	token, until, td := w.token, w.until, w.bundle.TrustDomain()
	w.mu.Unlock()
	if token != "" && time.Until(until) > tokenRenewal {
		return token, nil
	}
	account := w.f.accounts + "/" + w.f.role
	ask := map[string]any{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
		"spec": map[string]any{"audiences": []string{api.AdminAudience(td)}, "expirationSeconds": tokenSeconds},
	}
	var answer struct {
		Status struct {
			Token   string    `json:"token"`
			Expires time.Time `json:"expirationTimestamp"`
		} `json:"status"`
	}
	err := w.cluster.Create(ctx, in("v1", w.f.accounts, "serviceaccounts", w.f.role)+"/token", ask, &answer)
	switch {
	case errors.Is(err, kube.ErrForbidden):
		return "", w.forbidden(err, "have a token for the role "+w.f.role+" (create serviceaccounts/token of "+account+")", w.f.accounts)
	case errors.Is(err, kube.ErrNotFound):
		return "", &failure{
			err:  api.Wrap(api.NotFound, err, "there is no ServiceAccount "+account),
			why:  "The installation is of a version before operators had roles, has them in another namespace (--operators-namespace), or has them turned off.",
			next: w.f.signet("check"),
		}
	case err != nil:
		return "", w.a.unreachable(w.cluster, err)
	case answer.Status.Token == "":
		return "", &failure{err: api.E(api.ClusterUnavailable, "the API server answered without a token")}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.token, w.until = answer.Status.Token, answer.Status.Expires
	return w.token, nil
}

// forbidden says what the user lacks and who can give it.
func (w *clusterWay) forbidden(err error, what, namespace string) error {
	return &failure{
		err: api.Wrap(api.ClusterForbidden, err, "your user may not "+what),
		why: "Kubernetes RBAC says who may operate Signet; the ClusterRole signet-" + w.f.role + " has what this takes, and is bound in two namespaces. A cluster administrator can bind you:",
		next: w.f.kubectl("create", "rolebinding", "signet-"+w.f.role, "-n", namespace) + " --clusterrole signet-" + w.f.role +
			" --user YOU   # in " + w.f.accounts + " and in " + w.f.namespace,
	}
}

func (w *clusterWay) unreachable(err error, what string) error {
	return &failure{err: api.Wrap(api.CAUnavailable, err, what+": "+brief(err)), next: w.f.signet("check")}
}

// tls is the client's side: the CA is known by its SPIFFE ID under the bundle, never by a name or an address.
func (w *clusterWay) tls() *tls.Config {
	c := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // instead of names, VerifyConnection
		VerifyConnection:   w.verify,
	}
	if w.glass != nil {
		c.Certificates = []tls.Certificate{*w.glass}
	}
	return c
}

func (w *clusterWay) verify(cs tls.ConnectionState) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	id, _, err := x509svid.Verify(cs.PeerCertificates, w.bundle)
	if err == nil && !api.IsReplica(id, w.bundle.TrustDomain()) {
		err = fmt.Errorf("it is %s", id)
	}
	if err != nil {
		failed := &failure{
			err:  api.Wrap(api.CAUnavailable, err, fmt.Sprintf("what answers at %s is not the CA of trust domain %s", w.where(), w.bundle.TrustDomain().Name())),
			why:  "Its certificate does not verify against the published bundle: " + clip(err.Error(), maxFound) + ".",
			next: w.f.signet("check"),
		}
		if len(cs.PeerCertificates) > 0 && time.Now().After(cs.PeerCertificates[0].NotAfter) {
			failed.why = "Its certificate has expired, or your clock is ahead. A CA that can put nothing on record renews none; its pod has another way in."
			failed.next = w.inside()
		}
		w.failed = failed
	}
	return err
}

// inside is how to ask the CA where the operators' port does not help: by its admin socket.
func (w *clusterWay) inside() string {
	if w.f.address != "" {
		return "signet --socket /proc/$(pgrep -x signet-ca)/root" + defaultSocket + " version --server   # as root on the CA's node"
	}
	return w.f.kubectl("exec", "-n", w.f.namespace, caName+"-0", "-c", "ca") + " -- signet version --server"
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (w *clusterWay) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	if w.glass != nil {
		return nil, nil
	}
	if err := w.alone(ctx); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	defer w.done()
	token, err := w.haveToken(ctx)
	if err != nil {
		w.mu.Lock()
		w.failed = err
		w.mu.Unlock()
		return nil, err
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (*clusterWay) RequireTransportSecurity() bool { return true }

// failure returns what the last request ended by, once.
func (w *clusterWay) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.failed
	w.failed = nil
	return err
}
