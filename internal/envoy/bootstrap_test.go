package envoy

import (
	"flag"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
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
