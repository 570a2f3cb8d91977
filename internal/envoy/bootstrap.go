package envoy

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Names of the listeners of a Proxy, for Admin.Listener, and their prefixes in Envoy's statistics.
const (
	ListenerInbound  = "inbound"
	ListenerOutbound = "outbound"
)

// Proxy is what one Envoy is to do. At least one of Inbound and Outbound is set.
type Proxy struct {
	Name     string // Envoy's node id; required
	SDS      SDS
	Inbound  *Inbound
	Outbound *Outbound
}

// SDS is where an Envoy takes its certificate (the secret "default") and its trust bundle ("ROOTCA") from.
type SDS struct {
	Socket    string // path of the agent's Unix socket; required
	TokenFile string // file with the ServiceAccount token, without a newline at its end; read whenever a stream opens; required
	Delta     bool   // the incremental protocol (DELTA_GRPC) instead of state of the world (GRPC)
}

// Inbound takes mTLS connections and hands plain HTTP on to a backend.
type Inbound struct {
	Listen         netip.AddrPort // zero: a free port of 127.0.0.1
	Peers          []spiffeid.ID  // who may connect; at least one
	Backend        netip.AddrPort // required
	RequestHeaders map[string]string
	// RequestHeaders are set on what goes to the backend: name to Envoy's format string. x-forwarded-client-cert with
	// the URI of the peer is always there, and never what the caller wrote.
}

// Outbound takes plain HTTP and sends it on by mTLS.
type Outbound struct {
	Listen               netip.AddrPort // zero: a free port of 127.0.0.1
	Peers                []spiffeid.ID  // whom to accept as the upstream; at least one
	Upstream             netip.AddrPort // required
	ConnectionPerRequest bool           // a new TLS connection, with a full handshake, for each request
	ResponseHeaders      map[string]string
	// ResponseHeaders are set on what goes back to the caller: name to Envoy's format string.
}

//go:embed bootstrap.yaml.tmpl
var bootstrapText string

// Bootstrap writes the bootstrap of p as YAML, commented for people.
func Bootstrap(p Proxy) ([]byte, error) {
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("bootstrap of proxy %q: %w", p.Name, err)
	}
	if p.Inbound != nil {
		in := *p.Inbound
		in.Listen = loopback(in.Listen)
		p.Inbound = &in
	}
	if p.Outbound != nil {
		out := *p.Outbound
		out.Listen = loopback(out.Listen)
		p.Outbound = &out
	}
	var anchored bool // whether the anchor &signet is written already: the SDS configuration is spelled out once
	t, err := template.New("bootstrap").Funcs(template.FuncMap{
		"q":       quote,
		"first":   func() bool { first := !anchored; anchored = true; return first },
		"tls":     func(p Proxy, peers []spiffeid.ID) any { return tlsContext{p.SDS, peers} },
		"headers": headers,
		"endpoint": func(name string, addr netip.AddrPort) any {
			return struct {
				Name string
				Addr netip.AddrPort
			}{name, addr}
		},
	}).Parse(bootstrapText)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := t.Execute(&b, p); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

type tlsContext struct {
	SDS   SDS
	Peers []spiffeid.ID
}

func (p Proxy) check() error {
	switch {
	case p.Name == "" || strings.ContainsFunc(p.Name, func(r rune) bool { return !unicode.IsPrint(r) }):
		return errors.New("the name is empty or cannot be printed") // it is part of a comment as well
	case p.SDS.Socket == "" || p.SDS.TokenFile == "":
		return errors.New("sds needs a socket and a token file")
	case p.Inbound == nil && p.Outbound == nil:
		return errors.New("neither inbound nor outbound is set")
	case p.Inbound != nil && (!known(p.Inbound.Peers) || !p.Inbound.Backend.IsValid()):
		return errors.New("inbound needs peers and a backend")
	case p.Outbound != nil && (!known(p.Outbound.Peers) || !p.Outbound.Upstream.IsValid()):
		return errors.New("outbound needs peers and an upstream")
	}
	return nil
}

// known reports whether peers names somebody, and nobody without a name: to Envoy an empty list is anybody.
func known(peers []spiffeid.ID) bool {
	return len(peers) > 0 && !slices.ContainsFunc(peers, spiffeid.ID.IsZero)
}

func loopback(a netip.AddrPort) netip.AddrPort {
	if a.IsValid() {
		return a
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), a.Port())
}

// quote returns s as a double-quoted scalar of YAML, in ASCII: Go's escapes are YAML's too (YAML 1.2.2 section 5.7). What is
// not UTF-8 is refused: it has no such form.
func quote(s string) (string, error) {
	if !utf8.ValidString(s) {
		return "", fmt.Errorf("%q is not UTF-8", s)
	}
	return strconv.QuoteToASCII(s), nil
}

// headers returns Envoy's list of headers to add for h, sorted by name, on one line; empty for none.
func headers(h map[string]string) (string, error) {
	if len(h) == 0 {
		return "", nil
	}
	list := make([]string, 0, len(h))
	for _, name := range slices.Sorted(maps.Keys(h)) {
		key, err := quote(name)
		if err != nil {
			return "", err
		}
		value, err := quote(h[name])
		if err != nil {
			return "", err
		}
		list = append(list, fmt.Sprintf("{header: {key: %s, value: %s}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}", key, value))
	}
	return "[" + strings.Join(list, ", ") + "]", nil
}
