package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/ca/upstream"
	"github.com/signet-ca/signet/internal/strictyaml"
)

// config is the configuration file of signet-ca. docs/config.md is made from these comments.
type config struct {
	// "signet.dev/v1". Required.
	APIVersion string `yaml:"apiVersion"`
	// "CAConfig". Required.
	Kind string `yaml:"kind"`
	// The trust domain: lower-case letters, digits, dots, dashes, underscores. It is in every SVID and is never renamed.
	// Required.
	TrustDomain string `yaml:"trustDomain"`
	// Allows what is only fit for development: SVIDs from 10 s, key sets over http on loopback, a directory of kind none.
	// Default: false.
	Development bool `yaml:"development"`
	// The name of this replica: letters, digits, dots, dashes, underscores. Default: the host's name.
	Replica string `yaml:"replica"`
	// Where agents connect: host:port, gRPC over TLS 1.3. Default: :8443.
	Listen string `yaml:"listen"`
	// The Unix socket of the operator's tool, mode 0600. Default: /run/signet-ca/admin.sock.
	AdminSocket string `yaml:"adminSocket"`
	// Where operators come in from elsewhere.
	Operators operatorsConfig `yaml:"operators"`
	// host:port of /livez, /readyz and /metrics; "none" for no such port. Default: :9080.
	HTTP string `yaml:"http"`
	// Where the shared record is kept.
	Store store.Config `yaml:"store"`
	// What seals private keys in the record.
	Seal sealConfig `yaml:"seal"`
	// The record of every decision.
	Ledger ledgerConfig `yaml:"ledger"`
	// Where the root's key lives.
	Upstream upstream.Config `yaml:"upstream"`
	// The policy file: which namespaces, which TTL, which DNS names. Required.
	PolicyFile string `yaml:"policyFile"`
	// Where the bundle is shown.
	Publish publishConfig `yaml:"publish"`
	// The clusters whose tokens are believed. At least one.
	Issuers []issuerConfig `yaml:"issuers"`
	// Which pods live.
	Directory directoryConfig `yaml:"directory"`
	// Which pods are agents.
	Agents agentsConfig `yaml:"agents"`
	// The key of intermediates: ecdsa-p256 or ecdsa-p384. Default: ecdsa-p256.
	Key string `yaml:"key"`
	// How many intermediates may be minted under one root in an hour, over restarts. Default: 20.
	MintBudget int `yaml:"mintBudget"`
	// The root is not replaced by itself before it expires; then somebody has to, with "signet rotate start". Default: false.
	ManualRotation bool `yaml:"manualRotation"`
	// How long an agent's session lasts at most. Default: 1h.
	SessionAge time.Duration `yaml:"sessionAge"`
	// How many connections the agents' port takes.
	Connections connectionsConfig `yaml:"connections"`
}

// connectionsConfig bounds the connections of the agents' port. Those beyond a bound are ended before anything is read.
type connectionsConfig struct {
	// Without an agent's certificate, as at an agent's first start. When all are taken, the address with the most gives
	// one up. Default: 128.
	Strangers int `yaml:"strangers"`
	// Of those, from one IPv4 address or one /64 of IPv6; more where many agents come through one address. Default: 32.
	PerAddress int `yaml:"perAddress"`
	// New ones from one address per second, after a burst of four times as many. Default: 50.
	PerSecond int `yaml:"perSecond"`
	// With an agent's certificate; four for each agent at most. Default: 16384, or half of the process's file descriptors
	// where that is less.
	Agents int `yaml:"agents"`
}

// sealConfig says what seals private keys in the record.
type sealConfig struct {
	// A file of 32 random bytes, mode 0600, kept apart from the store and from its backups. `signet-ca init` makes it
	// where it is missing. Required.
	KeyFile string `yaml:"keyFile"`
	// The file is a mounted Kubernetes Secret: symbolic links and the group's read bit are accepted. Default: false.
	MountedSecret bool `yaml:"mountedSecret"`
}

// ledgerConfig says where decisions are recorded.
type ledgerConfig struct {
	// A folder of this CA alone. Required.
	Dir string `yaml:"dir"`
	// The room of one segment, reserved before it is used; two are there from the start. When the disk is full, issuance
	// stops once they are. A number with KiB, MiB or GiB, from 1MiB to 16GiB. Default: 64MiB.
	SegmentSize string `yaml:"segmentSize"`
	// How long a decision is kept at least: a segment goes when all in it is older and every certificate in it has expired.
	// 0s: for ever. Default: 2160h.
	Retention time.Duration `yaml:"retention"`
	// The room of the refusals of known callers, of which the oldest are overwritten. From 256KiB to 16GiB. Default: 16MiB.
	RefusalBytes string `yaml:"refusalBytes"`
}

// publishConfig says where the bundle is shown.
type publishConfig struct {
	// A folder for bundle.json (SPIFFE format, its sequence is the generation) and bundle.pem. Default: none.
	Dir string `yaml:"dir"`
	// A ConfigMap signet-bundle with the same two documents, instead of a folder.
	Kube publishKubeConfig `yaml:"kube"`
}

// issuerConfig is a cluster whose tokens are believed.
type issuerConfig struct {
	// "iss" of its tokens, exactly. Required.
	Issuer string `yaml:"issuer"`
	// Its key set (JWKS).
	JWKS jwksConfig `yaml:"jwks"`
	// Its API server, for a live review of each token.
	TokenReview tokenReviewConfig `yaml:"tokenReview"`
	// Its API server, for a directory of kind kube.
	Watch watchConfig `yaml:"watch"`
}

// jwksConfig says where an issuer's key set is read; one of file and url.
type jwksConfig struct {
	// A file, read anew when it changes. Default: none.
	File string `yaml:"file"`
	// An https URL. Default: none.
	URL string `yaml:"url"`
	// PEM certificates that the URL's server must chain to. Default: the system's roots.
	CAFile string `yaml:"caFile"`
	// A bearer token for the URL, read anew each time. Default: none.
	TokenFile string `yaml:"tokenFile"`
	// How often it is read. Default: 1m.
	Refresh time.Duration `yaml:"refresh"`
	// A file that keeps the last good key set over restarts. Default: none.
	Persist string `yaml:"persist"`
}

// directoryConfig says how the CA knows which pods live.
type directoryConfig struct {
	// "kube": the API server of each issuer is watched. "file": a JSON file of pods. "none": it is not checked, and an identity lives as long as its token; only with
	// development: true. Required.
	Kind string `yaml:"kind"`
	// The file, for kind file. Required for kind file.
	Path string `yaml:"path"`
	// For kind kube: how long a watch may be cut before nothing new is issued, from 1s to 1m. Default: 5s.
	StaleAfter time.Duration `yaml:"staleAfter"`
	// For kind kube: for how long known workloads are renewed while the API server is away, from 0s (not at all) to 24h; see
	// docs/api-server-away.md. Default: 4h.
	Grace time.Duration `yaml:"grace"`
}

// agentsConfig says which pods are agents.
type agentsConfig struct {
	// Their namespace. Default: signet-system.
	Namespace string `yaml:"namespace"`
	// Their ServiceAccount. Default: signet-agent.
	ServiceAccount string `yaml:"serviceAccount"`
	// The DaemonSet in that namespace whose pods they are; asked for where the directory is of kind kube. Default: signet-agent.
	DaemonSet string `yaml:"daemonSet"`
	// The lifetime of an agent's own SVID. Default: 1h.
	TTL time.Duration `yaml:"ttl"`
}

// loaded is a configuration whose every part is known to be good.
type loaded struct {
	config
	td     spiffeid.TrustDomain
	policy *ca.Policy
}

// longest is for how long an SVID is valid at most.
func (l *loaded) longest() time.Duration {
	return max(l.policy.MaxTTL(), cmp.Or(l.Agents.TTL, ca.DefaultAgentTTL))
}

// load reads the configuration and the policy and reports all that is wrong with them at once.
func load(path string) (*loaded, error) {
	c := config{Ledger: ledgerConfig{Retention: defaultRetention}, Directory: directoryConfig{Grace: ca.DefaultGrace}} // where zero means something else than its absence
	if err := strictyaml.DecodeFile(path, &c); err != nil {
		return nil, api.Wrap(api.ConfigInvalid, err, err.Error())
	}
	c.setDefaults()
	l := &loaded{config: c}
	wrong := c.check()
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	switch {
	case err != nil:
		wrong = append(wrong, fmt.Sprintf("trustDomain: %v", err))
	case td.Name() != c.TrustDomain:
		wrong = append(wrong, fmt.Sprintf("trustDomain: write it as %q", td.Name()))
	default:
		l.td = td
		if _, err := api.ReplicaID(td, c.Replica); err != nil {
			wrong = append(wrong, fmt.Sprintf("replica %.80q is not one segment of a SPIFFE ID: letters, digits, dots, dashes, underscores", c.Replica))
		}
		if c.PolicyFile == "" {
			break // told already
		}
		if l.policy, err = loadPolicy(c.PolicyFile, td, c.Development); err != nil {
			wrong = append(wrong, detail(err))
		}
	}
	if len(wrong) > 0 {
		return nil, api.E(api.ConfigInvalid, "%s: %s", path, strings.Join(wrong, "; "))
	}
	return l, nil
}

// detail is what an error says, without the code that the whole message ends with.
func detail(err error) string {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e.Detail
	}
	return err.Error()
}

func loadPolicy(path string, td spiffeid.TrustDomain, development bool) (*ca.Policy, error) {
	var f ca.PolicyFile
	if err := strictyaml.DecodeFile(path, &f); err != nil {
		return nil, err
	}
	return ca.NewPolicy(f, td, development)
}

func (c *config) setDefaults() {
	if c.Replica == "" {
		c.Replica, _ = os.Hostname() // an empty one is refused by load
	}
	c.Listen = cmp.Or(c.Listen, ":8443")
	c.AdminSocket = cmp.Or(c.AdminSocket, "/run/signet-ca/admin.sock")
	c.HTTP = cmp.Or(c.HTTP, ":9080")
	c.Agents.Namespace = cmp.Or(c.Agents.Namespace, "signet-system")
	c.Agents.ServiceAccount = cmp.Or(c.Agents.ServiceAccount, "signet-agent")
	c.Agents.DaemonSet = cmp.Or(c.Agents.DaemonSet, "signet-agent")
	if c.HTTP == "none" {
		c.HTTP = ""
	}
}

func (c *config) check() []string {
	var wrong []string
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if c.APIVersion != "signet.dev/v1" || c.Kind != "CAConfig" {
		bad("it must begin with apiVersion: signet.dev/v1 and kind: CAConfig")
	}
	if c.Seal.KeyFile == "" {
		bad("seal.keyFile is required")
	} else if filepath.Dir(c.Seal.KeyFile) == c.Ledger.Dir {
		bad("seal.keyFile lies in ledger.dir: keep it apart from what is backed up")
	}
	if c.Ledger.Dir == "" {
		bad("ledger.dir is required")
	}
	if _, err := c.Ledger.options(); err != nil {
		bad("%v", err)
	}
	if c.PolicyFile == "" {
		bad("policyFile is required")
	}
	if k := issuance.KeyKind(c.Key); c.Key != "" && k != issuance.KeyP256 && k != issuance.KeyP384 {
		bad("key %.32q is not ecdsa-p256 or ecdsa-p384", c.Key)
	}
	if c.MintBudget < 0 || c.SessionAge < 0 {
		bad("mintBudget and sessionAge cannot be negative")
	}
	if n := c.Connections; min(n.Strangers, n.PerAddress, n.PerSecond, n.Agents) < 0 {
		bad("connections: no bound can be negative")
	}
	if ttl := c.Agents.TTL; ttl != 0 && (ttl < issuance.MinTTL || ttl > issuance.MaxTTL) {
		bad("agents.ttl of %s is not between %s and %s", ttl, issuance.MinTTL, issuance.MaxTTL)
	}
	for _, port := range []struct{ name, address string }{{"listen", c.Listen}, {"http", c.HTTP}} {
		if _, _, err := net.SplitHostPort(port.address); err != nil && port.address != "" {
			bad("%s %.80q is not host:port", port.name, port.address)
		}
	}
	c.checkDrivers(bad)
	c.checkClusters(bad)
	c.checkOperators(bad)
	return wrong
}

// checkClusters says what is wrong with how pods are known, and their clusters.
func (c *config) checkClusters(bad func(string, ...any)) {
	switch c.Directory.Kind {
	case "kube":
	case "file":
		if c.Directory.Path == "" {
			bad("directory.path is required for kind file")
		}
	case "none":
		if !c.Development {
			bad("directory.kind none needs development: true, for it gives identities to pods that are gone")
		}
	default:
		bad("directory.kind %.32q is not kube, file or none", c.Directory.Kind)
	}
	c.checkKube(bad)
	if len(c.Issuers) == 0 {
		bad("issuers is empty: no token could ever be believed")
	}
	seen := map[string]bool{}
	for i, is := range c.Issuers {
		if is.Issuer == "" {
			bad("issuers[%d].issuer is required", i)
		}
		if seen[is.Issuer] {
			bad("issuers[%d].issuer is there twice", i)
		}
		seen[is.Issuer] = true
		is.TokenReview.check(i, bad)
	}
}

// checkDrivers asks the drivers of store and upstream about their sections, and opens nothing.
func (c *config) checkDrivers(bad func(string, ...any)) {
	if c.Store.Kind != "" && !slices.Contains(store.Kinds(), c.Store.Kind) {
		bad("store.kind %.32q is unknown; there are %v", c.Store.Kind, store.Kinds())
	} else if c.Store.Path == "" {
		bad("store.path is required")
	}
	if sealer, err := ca.NewSealer(ca.NewSealKey()); err == nil { // any key will do to ask
		if _, err := upstream.Open(c.Upstream, upstream.Parts{Sealer: sealer}); err != nil {
			bad("%s", detail(err))
		}
	}
}
