package main

import (
	"cmp"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/agent/csi"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/strictyaml"
)

// config is the configuration file of signet-agent. docs/config.md is made from these comments.
type config struct {
	// "signet.dev/v1". Required.
	APIVersion string `yaml:"apiVersion"`
	// "AgentConfig". Required.
	Kind string `yaml:"kind"`
	// The trust domain, as in the CA's configuration. Required.
	TrustDomain string `yaml:"trustDomain"`
	// Allows what is only fit for development: a cache folder that could reach a disk. Default: false.
	Development bool `yaml:"development"`
	// The CA.
	CA caConfig `yaml:"ca"`
	// The agent's own projected token, audience signet-agent:TRUST-DOMAIN. Required.
	TokenFile string `yaml:"tokenFile"`
	// The name of this node, as in Kubernetes. Required for csi. Default: the environment variable NODE_NAME, which a pod gets
	// from the downward API (spec.nodeName).
	Node string `yaml:"node"`
	// A socket of its own for each pod: the agent is the CSI driver of a volume with a socket in it, which serves SDS and the
	// SPIFFE Workload API. Without this section there is none, and with `csi: {}` all is as by default.
	CSI *csiConfig `yaml:"csi"`
	// A Unix socket for every proxy of the node: it sends its own token as metadata. At least one of csi and sharedSocket is
	// required. Default: none.
	SharedSocket string `yaml:"sharedSocket"`
	// What outlives a restart.
	Cache cacheConfig `yaml:"cache"`
	// host:port of /livez, /readyz and /metrics; "none" for no such port. Default: :9081.
	HTTP string `yaml:"http"`
}

// caConfig says where the CA is and what is trusted before it has answered.
type caConfig struct {
	// host:port. The CA is known by its SPIFFE ID, not by this name. Required.
	Address string `yaml:"address"`
	// The published bundle, bundle.json or bundle.pem, for the first trust. Once there is a cache, it is read
	// only where the CA is not known by what is held, and taken where its generation is higher (bundle.pem has none). Required.
	BundleFile string `yaml:"bundleFile"`
}

// csiConfig is how kubelet reaches the agent.
type csiConfig struct {
	// kubelet's folder (--root-dir): its pods, plugins_registry and plugins/DRIVER must be at the same path for the agent.
	// Default: /var/lib/kubelet.
	KubeletDir string `yaml:"kubeletDir"`
	// The name of the CSIDriver object. Default: csi.signet.dev.
	Driver string `yaml:"driver"`
}

// cacheConfig says what outlives a restart.
type cacheConfig struct {
	// A folder of this agent alone on a tmpfs, on a machine without swap, for SVIDs, keys, tokens and volumes; "" for none.
	// Default: none.
	Dir string `yaml:"dir"`
}

// loaded is a configuration whose every part is known to be good.
type loaded struct {
	config
	td spiffeid.TrustDomain
}

func load(path string) (*loaded, error) {
	var c config
	if err := strictyaml.DecodeFile(path, &c); err != nil {
		return nil, api.Wrap(api.ConfigInvalid, err, err.Error())
	}
	switch c.HTTP {
	case "":
		c.HTTP = ":9081"
	case "none":
		c.HTTP = ""
	}
	c.Node = cmp.Or(c.Node, os.Getenv("NODE_NAME"))
	var wrong []string
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if c.APIVersion != "signet.dev/v1" || c.Kind != "AgentConfig" {
		bad("it must begin with apiVersion: signet.dev/v1 and kind: AgentConfig")
	}
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	switch {
	case err != nil:
		bad("trustDomain: %v", err)
	case td.Name() != c.TrustDomain:
		bad("trustDomain: write it as %q", td.Name())
	}
	for _, field := range []struct{ name, value string }{{"ca.address", c.CA.Address}, {"ca.bundleFile", c.CA.BundleFile}, {"tokenFile", c.TokenFile}} {
		if field.value == "" {
			bad("%s is required", field.name)
		}
	}
	for _, field := range []struct{ name, value string }{{"ca.address", c.CA.Address}, {"http", c.HTTP}} {
		if _, _, err := net.SplitHostPort(field.value); err != nil && field.value != "" {
			bad("%s: %.80q is not host:port", field.name, field.value)
		}
	}
	switch {
	case c.CSI != nil:
		c.CSI.check(c.Node, bad)
	case c.SharedSocket == "":
		bad("neither csi nor sharedSocket is there, so nobody could be served")
	}
	if len(wrong) > 0 {
		return nil, api.E(api.ConfigInvalid, "%s: %s", path, strings.Join(wrong, "; "))
	}
	return &loaded{config: c, td: td}, nil
}

// check fills in what is not there, and tells what is wrong.
func (c *csiConfig) check(node string, bad func(format string, args ...any)) {
	c.KubeletDir = cmp.Or(c.KubeletDir, csi.DefaultKubeletDir)
	c.Driver = cmp.Or(c.Driver, csi.DefaultName)
	if node == "" {
		bad("csi needs the name of the node: set node, or the environment variable NODE_NAME")
	}
	if d := c.KubeletDir; !filepath.IsAbs(d) || filepath.Clean(d) != d || d == "/" {
		bad("csi.kubeletDir: %.80q is not an absolute path as kubelet writes it", d)
	}
}
