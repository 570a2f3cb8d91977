package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
)

// TestThroughCluster operates a real CA through a kubeconfig: as each role, and says who lacks what.
func TestThroughCluster(t *testing.T) {
	c := newOperated(t, catest.Options{})
	for _, role := range operatorRoles {
		out, talk, code := c.as(t, "--as-role", role, "version", "--server")
		if code != exitGood || !strings.Contains(out, catest.TrustDomain) || !strings.Contains(out, "sa:signet-operators/"+role+" jti:") {
			t.Errorf("as %s: exit code %d: %s%s", role, code, out, talk)
		}
	}
	out, talk, code := c.as(t, "authority", "list")
	if code != exitGood || !strings.Contains(out, "intermediate") {
		t.Errorf("exit code %d: %s%s", code, out, talk)
	}
	if want := append(slices.Clone(operatorRoles), "viewer"); !slices.Equal(c.tokens, want) {
		t.Errorf("tokens were asked for as %q, want %q", c.tokens, want)
	}
	const (
		sys    = "/api/v1/namespaces/signet-system"
		viewer = "/api/v1/namespaces/signet-operators/serviceaccounts/viewer/token"
	)
	other := catest.New(t, catest.Options{})
	other.WaitReady()
	for _, row := range []struct {
		name   string
		change func()
		args   []string
		want   api.Reason
		says   []string
	}{
		{"no token for the role", func() { c.refuse[viewer] = 403 }, nil, api.ClusterForbidden,
			[]string{"token for the role viewer", "create rolebinding signet-viewer -n signet-operators --clusterrole signet-viewer"}},
		{"another role is not allowed either", func() { c.refuse[strings.Replace(viewer, "viewer", "emergency", 1)] = 403 }, []string{"--as-role=emergency"}, api.ClusterForbidden,
			[]string{"--clusterrole signet-emergency"}},
		{"no roles", func() { c.refuse[viewer] = 404 }, nil, api.NotFound, []string{"no ServiceAccount signet-operators/viewer"}},
		{"no way to the pod", func() { c.refuse[sys+"/pods/signet-ca-0/portforward"] = 403 }, nil, api.ClusterForbidden, []string{"forward a port to pod signet-system/signet-ca-0", "-n signet-system"}},
		{"no port of the pod", func() { c.refuse[sys+"/pods/signet-ca-0/portforward"] = 500 }, nil, api.CAUnavailable, []string{"no port of pod"}},
		{"pods may not be seen", func() { c.refuse[sys+"/pods"] = 403 }, nil, api.ClusterForbidden, []string{"list the pods"}},
		{"no pod", func() { c.pods = "" }, nil, api.CAUnavailable, []string{"no pod of the CA runs", "get pods"}},
		{"only one that ends", func() {
			c.pods = strings.Replace(readyPod, `"metadata":{`, `"metadata":{"deletionTimestamp":"2026-11-24T11:00:00Z",`, 1)
		}, nil, api.CAUnavailable, []string{"no pod of the CA runs"}},
		{"no bundle", func() { c.refuse[sys+"/configmaps/signet-bundle"] = 404 }, nil, api.NotFound, []string{"signet-bundle"}},
		{"another namespace", func() {}, []string{"--signet-namespace=other"}, api.NotFound, []string{"other/signet-bundle"}},
		{"the API server is down", func() { c.refuse[sys+"/configmaps/signet-bundle"] = 500 }, nil, api.ClusterUnavailable, []string{"cannot be asked"}},
		{"not the CA of the bundle", func() { c.bundle = other }, nil, api.CAUnavailable, []string{"is not the CA of trust domain " + catest.TrustDomain}},
	} {
		t.Run(row.name, func(t *testing.T) {
			c.set(row.change)
			defer c.set(func() { c.refuse, c.pods, c.bundle = map[string]int{}, readyPod, c.ca })
			out, talk, code := c.as(t, append(row.args, "authority", "list")...)
			if code != exitFailed || out != "" || !strings.Contains(talk, row.want.Page().Code()) {
				t.Errorf("exit code %d: %s%s", code, out, talk)
			}
			for _, s := range row.says {
				if !strings.Contains(talk, s) {
					t.Errorf("%q is not in: %s", s, talk)
				}
			}
		})
	}
	t.Run("a pod that is not ready", func(t *testing.T) {
		c.set(func() { c.pods = strings.Replace(readyPod, "True", "False", 1) })
		defer c.set(func() { c.pods = readyPod })
		if out, talk, code := c.as(t, "authority", "list"); code != exitGood {
			t.Errorf("exit code %d: %s%s", code, out, talk)
		}
	})
}

// viewer returns the tool of somebody who looks, on his way to the CA.
func (c *operatedCluster) viewer(t *testing.T) (*app, *channel) {
	t.Helper()
	a, _, _ := newTestApp(nil)
	a.timeout = time.Minute
	a.operators = operatorFlags{kubeFlags: kubeFlags{kubeconfig: c.kubeconfig, namespace: defaultNamespace}, accounts: operatorsNamespace, role: "viewer"}
	ch, err := a.connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ch.Close() })
	return a, ch
}

// TestThroughClusterRole: what a role may not do it is told by the CA; a token that ends soon is replaced.
func TestThroughClusterRole(t *testing.T) {
	c := newOperated(t, catest.Options{})
	a, ch := c.viewer(t)
	_, err := ask(t.Context(), a, ch, ch.BanNode, &apiv1.BanNodeRequest{Node: "x"})
	f, ok := errors.AsType[*failure](err)
	if !ok || f.err.Reason != api.RoleRequired || f.next != "signet --as-role emergency ..." {
		t.Errorf("%v", err)
	}
	c.set(func() { c.life = time.Minute })
	ch.way.mu.Lock()
	ch.way.until = time.Now().Add(tokenRenewal)
	ch.way.mu.Unlock()
	if _, err := ask(t.Context(), a, ch, ch.GetStatus, &apiv1.GetStatusRequest{}); err != nil {
		t.Error(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.tokens) != 2 {
		t.Errorf("%d tokens were asked for, want 2", len(c.tokens))
	}
}

// TestThroughClusterUnverified: whoever answers as the API server says which CA is the right one, so it has to be known who
// that is.
func TestThroughClusterUnverified(t *testing.T) {
	c := newOperated(t, catest.Options{})
	good, err := os.ReadFile(c.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	bad := regexp.MustCompile(`"certificate-authority-data":"[^"]*"`).ReplaceAll(good, []byte(`"insecure-skip-tls-verify":true`))
	if err := os.WriteFile(c.kubeconfig, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	out, talk, code := c.as(t, "authority", "list")
	if code != exitFailed || out != "" || !strings.Contains(talk, api.ConfigInvalid.Page().Code()) || !strings.Contains(talk, "certificate-authority-data") {
		t.Errorf("exit code %d: %s%s", code, out, talk)
	}
	if len(c.tokens) != 0 {
		t.Errorf("tokens were asked for: %q", c.tokens)
	}
}

// TestThroughClusterAnew: what may have changed is asked for at each connection, and nobody waits for it longer than he
// wants to.
func TestThroughClusterAnew(t *testing.T) {
	c := newOperated(t, catest.Options{})
	a, ch := c.viewer(t)
	if _, err := ask(t.Context(), a, ch, ch.GetStatus, &apiv1.GetStatusRequest{}); err != nil {
		t.Fatal(err)
	}
	other := catest.New(t, catest.Options{})
	other.WaitReady()
	c.set(func() { c.bundle = other })
	conn, err := ch.way.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	ch.way.mu.Lock()
	has := ch.way.bundle.HasX509Authority(other.CA().Bundle().Roots[0])
	ch.way.mu.Unlock()
	if !has {
		t.Error("another connection believes in the roots of the first")
	}
	if err := ch.way.alone(t.Context()); err != nil { // as while the API server is asked and does not answer
		t.Fatal(err)
	}
	defer ch.way.done()
	a.timeout = time.Second
	_, err = ask(t.Context(), a, ch, ch.GetStatus, &apiv1.GetStatusRequest{})
	if f, ok := errors.AsType[*failure](err); !ok || f.err.Reason != api.DeadlineExceeded {
		t.Errorf("%v", err)
	}
	err = a.streamAudit(t.Context(), ch, &apiv1.ListAuditRequest{}, new(tally), func(*auditEntry) error { return nil })
	if f, ok := errors.AsType[*failure](err); !ok || f.err.Reason != api.DeadlineExceeded || !strings.Contains(f.why, "pod signet-system/signet-ca-0") {
		t.Errorf("%+v", f)
	}
}

// TestThroughClusterWithoutSVID: a CA that has nothing to show of itself is asked in its pod.
func TestThroughClusterWithoutSVID(t *testing.T) {
	c := newOperated(t, catest.Options{})
	c.set(func() { c.mute = true })
	out, talk, code := c.as(t, "authority", "list")
	if code != exitFailed || out != "" || !strings.Contains(talk, api.CAUnavailable.Page().Code()) ||
		!strings.Contains(talk, "kubectl --kubeconfig "+c.kubeconfig+" exec -n signet-system signet-ca-0 -c ca -- signet version --server") {
		t.Errorf("exit code %d: %s%s", code, out, talk)
	}
	w := &clusterWay{f: &operatorFlags{address: "127.0.0.1:1"}, bundle: x509bundle.New(spiffeid.RequireTrustDomainFromString("ours.test"))}
	if err := w.verify(tls.ConnectionState{PeerCertificates: []*x509.Certificate{{NotAfter: time.Now().Add(-time.Second)}}}); err == nil {
		t.Error("a certificate that has expired is believed")
	}
	if f, ok := errors.AsType[*failure](w.failure()); !ok || !strings.Contains(f.why, "has expired") || !strings.Contains(f.next, "--socket /proc/") {
		t.Errorf("%+v", f)
	}
}

// TestBundleOf: roots that name no trust domain, as those of an upstream, are of the one that somebody knows; nobody's word
// makes a root another's.
func TestBundleOf(t *testing.T) {
	ours := spiffeid.RequireTrustDomainFromString("ours.test")
	root := func(ids ...string) *x509.Certificate {
		c := &x509.Certificate{Raw: []byte(strings.Join(ids, " "))}
		for _, id := range ids {
			c.URIs = append(c.URIs, spiffeid.RequireFromString(id).URL())
		}
		return c
	}
	for name, row := range map[string]struct {
		roots []*x509.Certificate
		known spiffeid.TrustDomain
		want  string // empty: refused
	}{
		"that name it":           {[]*x509.Certificate{root("spiffe://ours.test")}, spiffeid.TrustDomain{}, "ours.test"},
		"that name what is said": {[]*x509.Certificate{root("spiffe://ours.test"), root()}, ours, "ours.test"},
		"that name none":         {[]*x509.Certificate{root()}, spiffeid.TrustDomain{}, ""},
		"that name none, known":  {[]*x509.Certificate{root()}, ours, "ours.test"},
		"that name two":          {[]*x509.Certificate{root("spiffe://ours.test"), root("spiffe://other.test")}, spiffeid.TrustDomain{}, ""},
		"that name two, known":   {[]*x509.Certificate{root("spiffe://ours.test"), root("spiffe://other.test")}, ours, ""},
		"that name another":      {[]*x509.Certificate{root("spiffe://other.test")}, ours, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := bundleOf(row.roots, row.known)
			switch {
			case row.want == "" && api.ReasonOf(err) != api.BundleRejected:
				t.Errorf("%v, %v", b, err)
			case row.want != "" && (err != nil || b.TrustDomain().Name() != row.want || len(b.X509Authorities()) != len(row.roots)):
				t.Errorf("%v, %v", b, err)
			}
		})
	}
}

// TestBreakGlass makes a certificate, and gets in with it through a cluster that gives no token, and without one.
func TestBreakGlass(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "safe-1.pem")
	a, stdout, stderr := newTestApp(nil)
	a.now = time.Now
	create := []string{"signet", "break-glass", "create", "safe-1", "--trust-domain", catest.TrustDomain, "--file", file}
	if code := a.main(create); code != exitGood {
		t.Fatal(stderr)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info.Mode(), err)
	}
	line, _ := strings.CutPrefix(strings.TrimSpace(stdout.String()), "operators: {breakGlass: [")
	der, err := base64.StdEncoding.DecodeString(strings.TrimSuffix(line, "]}"))
	if err != nil {
		t.Fatalf("%q", stdout)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	glass, err := ca.NewBreakGlass(certificate, spiffeid.RequireTrustDomainFromString(catest.TrustDomain))
	if err != nil {
		t.Fatal(err)
	}
	if code := a.main(create); code != exitFailed || !strings.Contains(stderr.String(), "is there already") {
		t.Errorf("again: exit code %d: %s", code, stderr)
	}

	c := newOperated(t, catest.Options{Config: func(cfg *ca.Config) { cfg.Operators.BreakGlass = []ca.BreakGlass{glass} }})
	for _, role := range operatorRoles {
		c.refuse["/api/v1/namespaces/signet-operators/serviceaccounts/"+role+"/token"] = 500
	}
	if out, talk, code := c.as(t, "--break-glass", file, "authority", "list"); code != exitGood {
		t.Errorf("through the cluster: exit code %d: %s%s", code, out, talk)
	}
	var roots []byte
	for _, r := range c.ca.CA().Bundle().Roots {
		roots = append(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Raw})...)
	}
	bundle := filepath.Join(dir, "bundle.pem")
	if err := os.WriteFile(bundle, roots, 0o600); err != nil {
		t.Fatal(err)
	}
	direct := []string{"signet", "--timeout=1m", "--break-glass", file, "--address", c.listen(t), "--bundle", bundle, "authority", "list"}
	run := func(args ...string) (string, int) {
		a, _, stderr := newTestApp(nil)
		code := a.main(args)
		return stderr.String(), code
	}
	if talk, code := run(direct...); code != exitGood {
		t.Errorf("without the cluster: exit code %d: %s", code, talk)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if talk, code := run(direct...); code != exitFailed || !strings.Contains(talk, api.FileUnsafe.Page().Code()) {
		t.Errorf("a file for all to read: exit code %d: %s", code, talk)
	}
}

// TestOperatorFlags refuses what cannot be meant, before anybody is asked.
func TestOperatorFlags(t *testing.T) {
	for _, args := range [][]string{
		{"--socket", "/x", "--kubeconfig", "/y"},
		{"--as-role", "root"},
		{"--signet-namespace", "No"},
		{"--context", "x", "--operators-namespace", "../x"},
		{"--address", "127.0.0.1:1"},
		{"--address", "127.0.0.1:1", "--break-glass", "x"},
		{"--bundle", "x"},
		{"--signet-trust-domain", "Not/One"},
	} {
		a, _, stderr := newTestApp(nil)
		if code := a.main(append(append([]string{"signet"}, args...), "authority", "list")); code != exitUsage {
			t.Errorf("%q: exit code %d: %s", args, code, stderr)
		}
	}
}

// TestThroughClusterByDefault: where no flag says which way, a socket of this machine is the first, then a kubeconfig.
func TestThroughClusterByDefault(t *testing.T) {
	if _, err := os.Lstat(defaultSocket); err == nil {
		t.Skip("this machine has a CA")
	}
	home := t.TempDir()
	for name, row := range map[string]struct {
		env  map[string]string
		want bool
	}{
		"nothing":                 {nil, false},
		"a kubeconfig":            {map[string]string{"KUBECONFIG": "/x"}, true},
		"a kubeconfig, a socket":  {map[string]string{"KUBECONFIG": "/x", socketEnv: "/y"}, false},
		"an empty home":           {map[string]string{"HOME": home}, false},
		"a home with a kubconfig": {map[string]string{"HOME": filepath.Join(home, "with")}, true},
	} {
		if err := os.MkdirAll(filepath.Join(home, "with", ".kube"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(home, "with", ".kube", "config"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		a, _, _ := newTestApp(row.env)
		a.root() // the flags' defaults
		if got, err := a.throughCluster(); got != row.want || err != nil {
			t.Errorf("%s: %t, %v", name, got, err)
		}
	}
}
