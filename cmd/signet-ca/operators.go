package main

import (
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/internal/daemon"
	"github.com/signet-ca/signet/internal/run"
)

// operatorsConfig says where operators come in from elsewhere, and who they are (docs/operators.md).
type operatorsConfig struct {
	// Where they connect: host:port, gRPC over TLS 1.3. A port-forward reaches 127.0.0.1:8444 in the CA's pod, and then
	// nothing else does. Default: none.
	Listen string `yaml:"listen"`
	// The namespace of the ServiceAccounts viewer, operator and emergency, which has no pods. Default: signet-operators.
	Namespace string `yaml:"namespace"`
	// Whose tokens operate this CA: whoever may make a namespace in such a cluster can give himself every role here. Required
	// where there are several issuers. Default: those of the one issuer.
	Issuers []string `yaml:"issuers"`
	// Break-glass certificates that are let in, each as `signet break-glass create` prints it: its DER in base64. Default: none.
	BreakGlass []string `yaml:"breakGlass"`
}

// expiringGlass is how long before its end the log begins to tell of a break-glass certificate.
const expiringGlass = 30 * 24 * time.Hour

func (c *config) checkOperators(bad func(string, ...any)) {
	o := c.Operators
	if o.Listen == "" && (len(o.Issuers) > 0 || len(o.BreakGlass) > 0 || o.Namespace != "") {
		bad("operators.listen is not set, so nobody would come in")
	}
	if _, _, err := net.SplitHostPort(o.Listen); err != nil && o.Listen != "" {
		bad("operators.listen %.80q is not host:port", o.Listen)
	}
	if o.Namespace != "" && !api.IsLabel(o.Namespace) {
		bad("operators.namespace %.80q is not the name of a namespace", o.Namespace)
	}
	if o.Namespace != "" && o.Namespace == c.Agents.Namespace {
		bad("operators.namespace is that of the agents: it has to be one without pods")
	}
	if o.Listen != "" && len(o.Issuers) == 0 && len(c.Issuers) > 1 {
		bad("operators.issuers is required where there are %d issuers: whoever may make a namespace in one that it names can give himself every role here", len(c.Issuers))
	}
	for i, name := range o.Issuers {
		if !slices.ContainsFunc(c.Issuers, func(is issuerConfig) bool { return is.Issuer == name }) {
			bad("operators.issuers[%d] is none of the issuers", i)
		}
	}
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return // told already
	}
	if _, err := o.glass(td); err != nil {
		bad("%s", detail(err))
	}
}

// glass are the break-glass certificates.
func (o operatorsConfig) glass(td spiffeid.TrustDomain) (all []ca.BreakGlass, err error) {
	names := map[string]bool{}
	for i, text := range o.BreakGlass {
		der, err := base64.StdEncoding.Strict().DecodeString(text)
		if err != nil {
			return nil, api.E(api.ConfigInvalid, "operators.breakGlass[%d] is not base64 of a certificate", i)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, api.E(api.ConfigInvalid, "operators.breakGlass[%d] is not a certificate", i)
		}
		b, err := ca.NewBreakGlass(c, td)
		if err != nil {
			return nil, api.E(api.ConfigInvalid, "operators.breakGlass[%d]: %s", i, detail(err))
		}
		if names[b.Name] {
			return nil, api.E(api.ConfigInvalid, "operators.breakGlass[%d] has the name %.80q, which is there already", i, b.Name)
		}
		names[b.Name] = true
		all = append(all, b)
	}
	return all, nil
}

// rule is who the operators are; the zero rule where there is no port for them.
func (l *loaded) operators(verifier attestor.Attestor, log *slog.Logger) ca.OperatorRule {
	o := l.Operators
	if o.Listen == "" {
		return ca.OperatorRule{}
	}
	r := ca.OperatorRule{Namespace: o.Namespace, Issuers: o.Issuers}
	r.Attestor, _ = verifier.(ca.PersonAttestor)
	r.BreakGlass, _ = o.glass(l.td) // load has checked them
	for _, b := range r.BreakGlass {
		switch left := time.Until(b.Certificate.NotAfter); {
		case left <= 0:
			log.Error("a break-glass certificate has expired", "name", b.Name, "not_after", b.Certificate.NotAfter)
		case left < expiringGlass:
			log.Warn("a break-glass certificate expires soon", "name", b.Name, "not_after", b.Certificate.NotAfter)
		}
	}
	return r
}

// operatorsPort opens the operators' port, if there is to be one. The caller closes the listener.
func operatorsPort(l *loaded, log *slog.Logger, authority *ca.CA) (*daemon.Listener, []run.Task, error) {
	if l.Operators.Listen == "" {
		return nil, nil, nil
	}
	raw, err := net.Listen("tcp", l.Operators.Listen)
	if err != nil {
		return nil, nil, fmt.Errorf("operators.listen: %w", err)
	}
	limited := daemon.Limit(raw, operatorsLimits(log))
	return limited, []run.Task{daemon.Serve("operators", authority.NewOperatorsServer(), limited, log)}, nil
}

// operatorsLimits are those of a port to which all come by port-forwards, from one address, and with the same right at first:
// whoever may forward a port but has no token is told apart from an operator by nothing but what he does next. So the newest
// always gets in, and has half a second at the least to say who he is. How long he may take is the time that an API server
// may need to look at his token.
func operatorsLimits(log *slog.Logger) daemon.Limits {
	return daemon.Limits{
		Port: "operators", Nameless: true, Strangers: 256, PerPeer: 256, Rate: 500, Patience: 15 * time.Second, Members: 64, Log: log,
	}
}
