package demo

import (
	"maps"
	"net/netip"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/signet-ca/signet/attestor/attestortest"
)

// What the demo's world is called.
const (
	trustDomain = "demo.signet"
	issuerName  = "https://kubernetes.default.svc.demo"
	namespace   = "demo"
	nodeName    = "this-machine"
)

// svidTTL is the shortest that a CA in development mode accepts: renewals come every few seconds.
const svidTTL = 10 * time.Second

// The shapes of the configuration files; what each field means is documented with the programs.
type (
	caConfig struct {
		APIVersion  string         `yaml:"apiVersion"`
		Kind        string         `yaml:"kind"`
		TrustDomain string         `yaml:"trustDomain"`
		Development bool           `yaml:"development"`
		Listen      string         `yaml:"listen"`
		AdminSocket string         `yaml:"adminSocket"`
		HTTP        string         `yaml:"http"`
		Store       kindPath       `yaml:"store"`
		Seal        map[string]any `yaml:"seal"`
		Ledger      map[string]any `yaml:"ledger"`
		Upstream    map[string]any `yaml:"upstream"`
		PolicyFile  string         `yaml:"policyFile"`
		Publish     map[string]any `yaml:"publish"`
		Issuers     []issuerConfig `yaml:"issuers"`
		Directory   kindPath       `yaml:"directory"`
		Agents      map[string]any `yaml:"agents"`
	}
	kindPath struct {
		Kind string `yaml:"kind"`
		Path string `yaml:"path"`
	}
	issuerConfig struct {
		Issuer string         `yaml:"issuer"`
		JWKS   map[string]any `yaml:"jwks"`
	}
	policyConfig struct {
		APIVersion string   `yaml:"apiVersion"`
		Kind       string   `yaml:"kind"`
		Template   string   `yaml:"template"`
		TTL        string   `yaml:"ttl"`
		Namespaces []string `yaml:"namespaces"`
	}
	agentConfig struct {
		APIVersion   string         `yaml:"apiVersion"`
		Kind         string         `yaml:"kind"`
		TrustDomain  string         `yaml:"trustDomain"`
		Development  bool           `yaml:"development"`
		CA           map[string]any `yaml:"ca"`
		TokenFile    string         `yaml:"tokenFile"`
		SharedSocket string         `yaml:"sharedSocket"`
		Cache        map[string]any `yaml:"cache"`
		HTTP         string         `yaml:"http"`
	}
)

const apiVersion = "signet.dev/v1"

// writeCA writes the configuration of the CA; listen has port 0 until the CA has once chosen one.
func (f *folder) writeCA(listen string, keys netip.AddrPort) error {
	return writeYAML(f.join("ca.yaml"), caConfig{
		APIVersion: apiVersion, Kind: "CAConfig", TrustDomain: trustDomain, Development: true,
		Listen: listen, AdminSocket: f.join("admin.sock"), HTTP: "127.0.0.1:0",
		Store:    kindPath{"bolt", f.join("signet.db")},
		Seal:     map[string]any{"keyFile": f.join("seal.key")},
		Ledger:   map[string]any{"dir": f.join("ledger"), "segmentSize": "1MiB"},
		Upstream: map[string]any{"kind": "selfsigned"}, PolicyFile: f.join("policy.yaml"),
		Publish:   map[string]any{"dir": f.join("bundle")},
		Issuers:   []issuerConfig{{issuerName, map[string]any{"url": "http://" + keys.String() + attestortest.KeysPath}}},
		Directory: kindPath{"file", f.join("pods.json")},
		Agents:    map[string]any{"namespace": "signet-system", "serviceAccount": "signet-agent"},
	})
}

func (f *folder) writePolicy() error {
	return writeYAML(f.join("policy.yaml"), policyConfig{
		APIVersion: apiVersion, Kind: "Policy", Template: "/ns/{namespace}/sa/{serviceAccount}", TTL: svidTTL.String(), Namespaces: []string{"*"},
	})
}

func (f *folder) writeAgent(ca string) error {
	return writeYAML(f.join("agent.yaml"), agentConfig{
		APIVersion: apiVersion, Kind: "AgentConfig", TrustDomain: trustDomain, Development: true,
		CA:        map[string]any{"address": ca, "bundleFile": f.join("bundle", "bundle.json")},
		TokenFile: f.join("agent.token"), SharedSocket: f.agentSocket(), Cache: map[string]any{"dir": f.join("cache")}, HTTP: "127.0.0.1:0",
	})
}

// agentSocket is where the agent serves SDS.
func (f *folder) agentSocket() string { return f.join("agent.sock") }

// tokenFile is where the token of a workload lies.
func (f *folder) tokenFile(workload string) string { return f.join(workload + ".token") }

// writePods writes which pods live, in the shape of the CA's file directory.
func (f *folder) writePods(pods map[string]attestortest.Pod) error {
	b, err := attestortest.Directory(issuerName, maps.Values(pods))
	if err != nil {
		return err
	}
	return writeFile(f.join("pods.json"), b)
}

func writeYAML(path string, v any) error {
	b, err := yaml.Marshal(v)
	if err != nil {
		return err
	}
	return writeFile(path, b)
}
