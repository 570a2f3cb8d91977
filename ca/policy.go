package ca

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca/issuance"
)

// Bounds of an SVID's lifetime.
const (
	MinTTL            = 5 * time.Minute
	MinDevelopmentTTL = 10 * time.Second
	MaxTTL            = 24 * time.Hour
	DefaultTTL        = time.Hour
	DefaultTemplate   = "/ns/{namespace}/sa/{serviceAccount}"
)

// PolicyFile is the policy as it is written: which namespaces, which TTL, which extra DNS names, and the one template
// from which every SPIFFE ID follows. There are no entries for single workloads.
type PolicyFile struct {
	APIVersion string `yaml:"apiVersion"` // "signet.dev/v1". Default: the same.
	Kind       string `yaml:"kind"`       // "Policy". Default: the same.
	// Template is the path of a workload's SPIFFE ID. Its segments are literals, {namespace} or {serviceAccount}; both
	// must be there, each as a whole segment, so that two ServiceAccounts never share an ID. The first segment is a
	// literal and not "signet". Default: /ns/{namespace}/sa/{serviceAccount}.
	Template string `yaml:"template"`
	// TTL is the lifetime of an SVID, from 5 m (10 s with development: true) to 24 h. Default: 1h.
	TTL time.Duration `yaml:"ttl"`
	// Namespaces that may have identities; "*" stands for all. Default: none.
	Namespaces []string `yaml:"namespaces"`
	// Ed25519 allows workloads to bring Ed25519 keys. Envoy cannot use them. Default: false.
	Ed25519 bool `yaml:"ed25519"`
	// Rules are exceptions; the first that matches a workload is used for it.
	Rules []PolicyRule `yaml:"rules"`
}

// PolicyRule changes what some workloads get.
type PolicyRule struct {
	Namespaces      []string `yaml:"namespaces"`      // that the rule is for; required; "*" stands for all
	ServiceAccounts []string `yaml:"serviceAccounts"` // that the rule is for; default: all
	// TTL instead of the policy's. Default: the policy's.
	TTL time.Duration `yaml:"ttl"`
	// DNSNames are certified beside the SPIFFE ID. {namespace} and {serviceAccount} stand for a whole label each.
	// Default: none.
	DNSNames []string `yaml:"dnsNames"`
}

// Policy decides which identity a workload has. It is immutable.
type Policy struct {
	file     PolicyFile
	td       spiffeid.TrustDomain
	segments []string
}

// Decision is what the policy says of one workload.
type Decision struct {
	ID       spiffeid.ID
	TTL      time.Duration
	DNSNames []string
}

// NewPolicy validates a policy for a trust domain. All that is wrong with it is in one error of reason ConfigInvalid.
func NewPolicy(f PolicyFile, td spiffeid.TrustDomain, development bool) (*Policy, error) {
	var wrong []string
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if f.APIVersion != "" && f.APIVersion != "signet.dev/v1" {
		bad("apiVersion %q is not signet.dev/v1", f.APIVersion)
	}
	if f.Kind != "" && f.Kind != "Policy" {
		bad("kind %q is not Policy", f.Kind)
	}
	if f.Template == "" {
		f.Template = DefaultTemplate
	}
	if f.TTL == 0 {
		f.TTL = DefaultTTL
	}
	segments, err := parseTemplate(td, f.Template)
	if err != nil {
		bad("template: %v", err)
	}
	if err := checkTTL(f.TTL, development); err != nil {
		bad("ttl: %v", err)
	}
	checkNames(f.Namespaces, "namespaces", bad)
	for i, r := range f.Rules {
		where := fmt.Sprintf("rules[%d]", i)
		if len(r.Namespaces) == 0 {
			bad("%s.namespaces is empty: the rule is for nobody", where)
		}
		checkNames(r.Namespaces, where+".namespaces", bad)
		checkNames(r.ServiceAccounts, where+".serviceAccounts", bad)
		if r.TTL != 0 {
			if err := checkTTL(r.TTL, development); err != nil {
				bad("%s.ttl: %v", where, err)
			}
		}
		for _, n := range r.DNSNames {
			if err := checkDNSTemplate(n); err != nil {
				bad("%s.dnsNames: %v", where, err)
			}
		}
	}
	if len(wrong) > 0 {
		return nil, api.E(api.ConfigInvalid, "policy: %s", strings.Join(wrong, "; "))
	}
	f.Namespaces, f.Rules = slices.Clone(f.Namespaces), slices.Clone(f.Rules)
	for i, r := range f.Rules {
		f.Rules[i].Namespaces, f.Rules[i].ServiceAccounts, f.Rules[i].DNSNames =
			slices.Clone(r.Namespaces), slices.Clone(r.ServiceAccounts), slices.Clone(r.DNSNames)
	}
	return &Policy{file: f, td: td, segments: segments}, nil
}

// Decide returns the identity of an attested workload; NamespaceNotAllowed where no namespace of the policy covers it,
// DNSNameRefused where a placeholder of a DNS name would not stand for one label.
func (p *Policy) Decide(c attestor.Claims) (Decision, error) {
	if !covers(p.file.Namespaces, c.Namespace) {
		return Decision{}, api.E(api.NamespaceNotAllowed, "the policy does not allow the workload's namespace")
	}
	segs := make([]string, len(p.segments))
	for i, s := range p.segments {
		segs[i] = fill(s, c)
	}
	id, err := spiffeid.FromSegments(p.td, segs...)
	if err != nil {
		return Decision{}, api.Wrap(api.IDMalformed, err, "the workload's names do not make a SPIFFE ID")
	}
	if len(id.String()) > api.MaxIDBytes {
		return Decision{}, api.E(api.IDMalformed, "the workload's SPIFFE ID would be longer than %d bytes", api.MaxIDBytes)
	}
	d := Decision{ID: id, TTL: p.file.TTL}
	for _, r := range p.file.Rules {
		if !covers(r.Namespaces, c.Namespace) || len(r.ServiceAccounts) > 0 && !covers(r.ServiceAccounts, c.ServiceAccount) {
			continue
		}
		if r.TTL != 0 {
			d.TTL = r.TTL
		}
		for _, n := range r.DNSNames {
			name := fillLabels(n, c)
			if strings.Count(name, ".") != strings.Count(n, ".") || checkDNSTemplate(name) != nil {
				return Decision{}, api.E(api.DNSNameRefused, "the workload's names do not make the policy's DNS name")
			}
			d.DNSNames = append(d.DNSNames, name)
		}
		break
	}
	return d, nil
}

// MaxTTL is the longest lifetime that any workload can get.
func (p *Policy) MaxTTL() time.Duration {
	longest := p.file.TTL
	for _, r := range p.file.Rules {
		longest = max(longest, r.TTL)
	}
	return longest
}

// DNSNames are samples of all names that some workload can get, the placeholders filled with "x"; empty when none are
// issued.
func (p *Policy) DNSNames() []string {
	var all []string
	for _, r := range p.file.Rules {
		for _, n := range r.DNSNames {
			all = append(all, fillLabels(n, attestor.Claims{Namespace: "x", ServiceAccount: "x"}))
		}
	}
	return all
}

// Keys says which keys workloads may bring.
func (p *Policy) Keys() issuance.Keys { return issuance.Keys{Ed25519: p.file.Ed25519} }

const (
	holeNamespace      = "{namespace}"
	holeServiceAccount = "{serviceAccount}"
)

// parseTemplate returns the segments of a path template, having proven that it yields only valid paths, never one that
// is reserved, and never the same for two ServiceAccounts.
func parseTemplate(td spiffeid.TrustDomain, t string) ([]string, error) {
	rest, ok := strings.CutPrefix(t, "/")
	if !ok {
		return nil, fmt.Errorf("%.80q does not begin with /", t)
	}
	segs := strings.Split(rest, "/")
	holes := map[string]int{}
	probe := make([]string, len(segs))
	for i, s := range segs {
		switch {
		case s == holeNamespace || s == holeServiceAccount:
			holes[s]++
			probe[i] = "x"
			if i == 0 {
				return nil, fmt.Errorf("the first segment must be a literal, so that no workload can reach /%s", api.ReservedSegment)
			}
		case strings.ContainsAny(s, "{}"):
			return nil, fmt.Errorf("segment %.80q: a placeholder is %s or %s and fills its segment alone", s, holeNamespace, holeServiceAccount)
		default:
			probe[i] = s
		}
	}
	if segs[0] == api.ReservedSegment {
		return nil, fmt.Errorf("/%s is reserved for Signet's own identities", api.ReservedSegment)
	}
	if holes[holeNamespace] != 1 || holes[holeServiceAccount] != 1 {
		return nil, fmt.Errorf("it must have %s and %s once each, or two ServiceAccounts would share an identity", holeNamespace, holeServiceAccount)
	}
	if _, err := spiffeid.FromSegments(td, probe...); err != nil {
		return nil, err
	}
	return segs, nil
}

func fill(segment string, c attestor.Claims) string {
	switch segment {
	case holeNamespace:
		return c.Namespace
	case holeServiceAccount:
		return c.ServiceAccount
	}
	return segment
}

// checkDNSTemplate accepts lower-case DNS names of labels, in which a placeholder is a whole label and the last is none. A
// ServiceAccount's name may have dots; Decide refuses it then, for it would reach into the names of others.
func checkDNSTemplate(n string) error {
	labels := strings.Split(n, ".")
	if len(n) > 253 || len(labels) < 2 {
		return fmt.Errorf("%.80q is not a DNS name of at least two labels", n)
	}
	for i, l := range labels {
		if l == holeNamespace || l == holeServiceAccount {
			if i == len(labels)-1 {
				return fmt.Errorf("%.80q ends in a placeholder: a workload could choose its domain", n)
			}
			continue
		}
		if !api.IsLabel(l) {
			return fmt.Errorf("%.80q: label %.63q is not a lower-case DNS label or placeholder", n, l)
		}
	}
	return nil
}

func fillLabels(n string, c attestor.Claims) string {
	labels := strings.Split(n, ".")
	for i, l := range labels {
		labels[i] = fill(l, c)
	}
	return strings.Join(labels, ".")
}

func checkTTL(ttl time.Duration, development bool) error {
	least := MinTTL
	if development {
		least = MinDevelopmentTTL
	}
	if ttl < least || ttl > MaxTTL {
		return fmt.Errorf("%s is not between %s and %s", ttl, least, MaxTTL)
	}
	return nil
}

// checkNames accepts literal names and the single "*": patterns would make a policy that reads like one thing and means
// another.
func checkNames(names []string, where string, bad func(string, ...any)) {
	for _, n := range names {
		if n == "*" {
			continue
		}
		for l := range strings.SplitSeq(n, ".") {
			if !api.IsLabel(l) {
				bad("%s: %.80q is neither a name nor \"*\"", where, n)
				break
			}
		}
	}
}

func covers(names []string, name string) bool {
	return slices.Contains(names, "*") || slices.Contains(names, name)
}
