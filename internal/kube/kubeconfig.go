package kube

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/tools/clientcmd/api/latest"
)

// maxKubeconfig bounds what is read as a kubeconfig, in bytes.
const maxKubeconfig = 1 << 20

// load returns host, trust and credentials of the API server, and nothing else.
func load(cfg Config) (*rest.Config, error) {
	if cfg.Kubeconfig == InCluster {
		if cfg.Context != "" {
			return nil, errors.New("context is for a kubeconfig file")
		}
		return inCluster()
	}
	c, err := readKubeconfig(cfg.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", cfg.Kubeconfig, err)
	}
	r, err := fromKubeconfig(c, cfg.Context, filepath.Dir(cfg.Kubeconfig))
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", cfg.Kubeconfig, err)
	}
	return r, nil
}

func inCluster() (*rest.Config, error) {
	c, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", InCluster, err)
	}
	if c.CAFile == "" { // client-go goes on with the system's roots
		return nil, errors.New(InCluster + ": the pod's ca.crt cannot be read")
	}
	c.Proxy = direct
	return c, nil
}

// direct heeds no proxy of the environment.
func direct(*http.Request) (*url.URL, error) { return nil, nil }

func readKubeconfig(path string) (*api.Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, errors.Unwrap(err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxKubeconfig+1))
	switch {
	case err != nil:
		return nil, errors.Unwrap(err)
	case len(data) == 0 || len(data) > maxKubeconfig:
		return nil, fmt.Errorf("it is empty or above %d bytes", maxKubeconfig)
	}
	c := api.NewConfig()
	if err := runtime.DecodeInto(latest.Codec, data, c); err != nil {
		return nil, errors.New("it does not parse as a kubeconfig") // the parser's words may quote a credential
	}
	return c, nil
}

// fromKubeconfig takes one context of a kubeconfig; relative paths in it are below dir.
func fromKubeconfig(c *api.Config, context, dir string) (*rest.Config, error) {
	if context == "" {
		context = c.CurrentContext
	}
	in := c.Contexts[context]
	if in == nil {
		return nil, fmt.Errorf("there is no context %.80q", context)
	}
	cluster, user := c.Clusters[in.Cluster], c.AuthInfos[in.AuthInfo]
	if cluster == nil || user == nil {
		return nil, fmt.Errorf("the cluster or the user of context %.80q is not there", context)
	}
	if err := errors.Join(checkCluster(cluster), checkUser(user)); err != nil {
		return nil, err
	}
	below := func(path string) string {
		if path == "" || filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(dir, path)
	}
	r := &rest.Config{
		Host:            cluster.Server,
		BearerToken:     user.Token,
		BearerTokenFile: below(user.TokenFile),
		Proxy:           direct,
		TLSClientConfig: rest.TLSClientConfig{
			ServerName: cluster.TLSServerName,
			CAFile:     below(cluster.CertificateAuthority),
			CAData:     cluster.CertificateAuthorityData,
			CertFile:   below(user.ClientCertificate),
			CertData:   user.ClientCertificateData,
			KeyFile:    below(user.ClientKey),
			KeyData:    user.ClientKeyData,
		},
	}
	if cluster.ProxyURL != "" {
		u, err := url.Parse(cluster.ProxyURL)
		if err != nil || u.Host == "" {
			return nil, errors.New("proxy-url is malformed")
		}
		r.Proxy = http.ProxyURL(u)
	}
	return r, nil
}

func checkCluster(c *api.Cluster) error {
	u, err := url.Parse(c.Server)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil:
		return errors.New("the cluster's server is not an https URL")
	case c.InsecureSkipTLSVerify:
		return errors.New("insecure-skip-tls-verify is set: anyone could answer for the API server")
	case c.CertificateAuthority == "" && len(c.CertificateAuthorityData) == 0:
		return errors.New("the cluster has no certificate-authority: the system's roots are not enough")
	}
	return nil
}

func checkUser(u *api.AuthInfo) error {
	switch {
	case u.Exec != nil || u.AuthProvider != nil:
		return errors.New("the user has an exec command or an auth-provider: nothing is run in a process that holds keys")
	case u.Username != "" || u.Password != "":
		return errors.New("the user has a password, which no API server takes any more")
	case u.Impersonate != "" || u.ImpersonateUID != "" || len(u.ImpersonateGroups) > 0 || len(u.ImpersonateUserExtra) > 0:
		return errors.New("the user impersonates another")
	case u.Token == "" && u.TokenFile == "" && u.ClientCertificate == "" && len(u.ClientCertificateData) == 0:
		return errors.New("the user has no token, token file or client certificate")
	}
	return nil
}
