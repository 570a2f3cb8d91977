package envoy

import (
	"flag"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"
)

var update = flag.Bool("update", false, "write golden files anew")

func proxies() map[string]Proxy {
	td := spiffeid.RequireTrustDomainFromString("demo.signet")
	checkout := spiffeid.RequireFromPath(td, "/ns/demo/sa/checkout")
	payments := spiffeid.RequireFromPath(td, "/ns/demo/sa/payments")
	sds := SDS{Socket: "/run/signet/agent.sock", TokenFile: "/run/signet/token"}
	delta := sds
	delta.Delta = true
	return map[string]Proxy{
		"inbound": {Name: "payments", SDS: delta, Inbound: &Inbound{
			Peers: []spiffeid.ID{checkout}, Backend: netip.MustParseAddrPort("127.0.0.1:8080"),
			RequestHeaders: map[string]string{"x-peer-serial": "%DOWNSTREAM_PEER_SERIAL%", "x-tls": "%DOWNSTREAM_TLS_VERSION%"},
		}},
		"outbound": {Name: "checkout", SDS: sds, Outbound: &Outbound{
			Peers: []spiffeid.ID{payments}, Upstream: netip.MustParseAddrPort("127.0.0.1:8443"), ConnectionPerRequest: true,
			ResponseHeaders: map[string]string{"x-upstream-id": "%UPSTREAM_PEER_URI_SAN%"},
		}},
		"both": {Name: `odd "name": {x`, SDS: delta, Inbound: &Inbound{
			Listen: netip.MustParseAddrPort("[::1]:15006"), Peers: []spiffeid.ID{checkout, payments}, Backend: netip.MustParseAddrPort("127.0.0.1:8080"),
		}, Outbound: &Outbound{
			Listen: netip.MustParseAddrPort("127.0.0.1:15001"), Peers: []spiffeid.ID{payments}, Upstream: netip.MustParseAddrPort("[::1]:8443"),
		}},
	}
}

func TestBootstrap(t *testing.T) {
	for name, p := range proxies() {
		t.Run(name, func(t *testing.T) {
			got, err := Bootstrap(p)
			if err != nil {
				t.Fatal(err)
			}
			golden := "testdata/" + name + ".yaml"
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), string(got)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestBootstrapRefusesWhatWouldNotBeSafe(t *testing.T) {
	good := func() Proxy { return proxies()["both"] }
	tests := map[string]func(*Proxy){
		"no name":                      func(p *Proxy) { p.Name = "" },
		"name that leaves its comment": func(p *Proxy) { p.Name = "a\nadmin: {}" },
		"name with a line separator":   func(p *Proxy) { p.Name = "a\u2028admin: {}" },
		"no socket":                    func(p *Proxy) { p.SDS.Socket = "" },
		"no token":                     func(p *Proxy) { p.SDS.TokenFile = "" },
		"nothing to do":                func(p *Proxy) { p.Inbound, p.Outbound = nil, nil },
		"inbound for anybody":          func(p *Proxy) { p.Inbound.Peers = nil },
		"outbound to anybody":          func(p *Proxy) { p.Outbound.Peers = nil },
		"a peer that is no one":        func(p *Proxy) { p.Outbound.Peers = []spiffeid.ID{{}} },
		"no backend":                   func(p *Proxy) { p.Inbound.Backend = netip.AddrPort{} },
		"no upstream":                  func(p *Proxy) { p.Outbound.Upstream = netip.AddrPort{} },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			p := good()
			change(&p)
			if b, err := Bootstrap(p); err == nil {
				t.Errorf("got\n%s", b)
			}
		})
	}
}

// Whatever is in a value, it is the same value to whoever reads the YAML.
func FuzzBootstrap(f *testing.F) {
	f.Add("payments", "/run/a.sock", "/run/token", "x-a", "%DOWNSTREAM_PEER_SERIAL%")
	f.Add(`a"`, "a: b\n- c", "*signet", "&x", "#\u2028\x00\xff")
	f.Fuzz(func(t *testing.T, name, socket, token, header, value string) {
		p := proxies()["inbound"]
		p.Name, p.SDS.Socket, p.SDS.TokenFile = name, socket, token
		p.Inbound.RequestHeaders = map[string]string{header: value}
		text, err := Bootstrap(p)
		if err != nil {
			return
		}
		var doc any
		if err := yaml.Unmarshal(text, &doc); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		chain := at(t, doc, "static_resources", "listeners", 0, "filter_chains", 0)
		tls := at(t, chain, "transport_socket", "typed_config")
		sds := at(t, tls, "common_tls_context", "tls_certificate_sds_secret_configs", 0, "sds_config")
		sent := at(t, chain, "filters", 0, "typed_config", "route_config", "request_headers_to_add", 0, "header")
		google := at(t, sds, "api_config_source", "grpc_services", 0, "google_grpc")
		got := []any{
			at(t, doc, "node", "id"), at(t, google, "target_uri"),
			at(t, google, "call_credentials", 0, "from_plugin", "typed_config", "secret_data", "filename"),
			at(t, sent, "key"), at(t, sent, "value"), at(t, tls, "require_client_certificate"),
		}
		want := []any{name, "unix:" + socket, token, header, value, true}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	})
}

// at follows path, of keys and indexes, into what YAML was decoded to.
func at(t *testing.T, v any, path ...any) any {
	t.Helper()
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[p]
		case int:
			l, _ := v.([]any)
			if p >= len(l) {
				t.Fatalf("%v ends at %v", path, p)
			}
			v = l[p]
		}
	}
	return v
}
