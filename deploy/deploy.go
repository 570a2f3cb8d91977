// Package deploy is how Signet gets into a cluster: a Helm chart, and the chart's default rendering as part of the operator's
// tool, so that `signet install | kubectl apply -f -` needs no Helm.
//
// There is one source, the chart. Its rendering in install/ is made with Helm's own engine by `make generate`, with marks
// in the place of a few values; Install puts values there. That is safe because it is no templating: a value is let in only
// if it consists of characters that mean nothing to YAML within the quotes that the chart puts around it, by the very
// patterns of the chart's schema. A test renders the chart with the same values and wants the same bytes.
package deploy

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
)

// Namespace is where Install puts everything that has a namespace.
const Namespace = "signet-system"

//go:embed install/*.yaml
var rendering embed.FS

// Options are the values that Install may set. An empty field is the chart's default.
type Options struct {
	TrustDomain string // as in SPIFFE IDs, and a DNS name, so that a ClusterTrustBundle can be named after it
	Issuer      string // "iss" of the cluster's ServiceAccount tokens, an https URL
	Repository  string // what the images' names begin with: HOST[:PORT][/PATH]
	Tag         string // of both images
	PullPolicy  string // Always, IfNotPresent or Never
	KubeletDir  string // kubelet's --root-dir
}

// Defaults are those of the chart. Its tag is that of a build from sources.
func Defaults() Options {
	return Options{
		TrustDomain: "cluster.local",
		Issuer:      "https://kubernetes.default.svc.cluster.local",
		Repository:  "localhost",
		Tag:         "devel",
		PullPolicy:  "IfNotPresent",
		KubeletDir:  "/var/lib/kubelet",
	}
}

// value is one that Install may set.
type value struct {
	what    string // for people
	mark    string // in the rendering
	pattern *regexp.Regexp
	max     int
	is      string // what the pattern says, for people
}

var (
	// Of SPIFFE's trust domains those after which a ClusterTrustBundle can be named.
	trustDomains = value{"trust domain", "@TRUST_DOMAIN@", regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`), 253, "a DNS name in lower case"}
	issuers      = value{"issuer", "@ISSUER@", regexp.MustCompile(`^https://[A-Za-z0-9._~:/%-]+$`), 500, "an https URL"}
	repositories = value{"image repository", "@REPOSITORY@", regexp.MustCompile(`^[a-z0-9]+([._-]+[a-z0-9]+)*(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*$`), 200, "HOST[:PORT][/PATH] in lower case"}
	tags         = value{"image tag", "@TAG@", regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`), 128, "letters, digits, dots, dashes and underscores"}
	pullPolicies = value{"image pull policy", "@PULL_POLICY@", regexp.MustCompile(`^(Always|IfNotPresent|Never)$`), 12, "Always, IfNotPresent or Never"}
	kubeletDirs  = value{"kubelet folder", "@KUBELET_DIR@", regexp.MustCompile(`^(/\.?[A-Za-z0-9_-][A-Za-z0-9._-]*)+$`), 64, "an absolute path without a slash at its end"}
)

func (v value) check(s string) error {
	if len(s) > v.max || !v.pattern.MatchString(s) {
		return fmt.Errorf("%s %.80q is not %s (at most %d characters)", v.what, s, v.is, v.max)
	}
	return nil
}

// Install returns the manifests, YAML for `kubectl apply -f -`, in an order in which each finds what it needs. The error
// names the option that is wrong.
func Install(o Options) ([]byte, error) {
	d := Defaults()
	var pairs []string
	for _, set := range []struct {
		value
		given, otherwise string
	}{
		{trustDomains, o.TrustDomain, d.TrustDomain},
		{issuers, o.Issuer, d.Issuer},
		{repositories, o.Repository, d.Repository},
		{tags, o.Tag, d.Tag},
		{pullPolicies, o.PullPolicy, d.PullPolicy},
		{kubeletDirs, o.KubeletDir, d.KubeletDir},
	} {
		if set.given == "" {
			set.given = set.otherwise
		}
		if err := set.check(set.given); err != nil {
			return nil, err
		}
		pairs = append(pairs, set.mark, set.given)
	}
	return assemble(strings.NewReplacer(pairs...))
}

// assemble puts the values in, then the digests of what results: a pod's template carries that of its configuration, so
// that another configuration means another pod.
func assemble(values *strings.Replacer) ([]byte, error) {
	entries, err := rendering.ReadDir("install") // by name, which is the order that they are applied in
	if err != nil {
		return nil, err
	}
	var texts, digests []string
	for _, e := range entries {
		data, err := rendering.ReadFile("install/" + e.Name())
		if err != nil {
			return nil, err
		}
		text := values.Replace(string(data))
		sum := sha256.Sum256([]byte(text))
		_, name, _ := strings.Cut(e.Name(), "-")
		texts = append(texts, text)
		digests = append(digests, "@SHA256:"+name+"@", hex.EncodeToString(sum[:]))
	}
	var out bytes.Buffer
	all := strings.NewReplacer(digests...)
	for _, text := range texts {
		fmt.Fprintf(&out, "---\n%s\n", strings.TrimPrefix(strings.Trim(all.Replace(text), "\n"), "---\n"))
	}
	return out.Bytes(), nil
}
