//go:build envoy

package envoytest

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/signet-ca/signet/internal/envoy"
)

func token(t *testing.T, id spiffeid.ID) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, []byte(id.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// The bootstraps do what they say with real Envoys: both protocols, mutual TLS by SPIFFE ID, rotation under traffic
// without a lost request, strangers refused and counted.
func TestTwoEnvoys(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("envoy.test")
	checkout := spiffeid.RequireFromPath(td, "/ns/demo/sa/checkout")
	payments := spiffeid.RequireFromPath(td, "/ns/demo/sa/payments")
	for _, delta := range []bool{false, true} {
		t.Run(fmt.Sprintf("payments delta %v", delta), func(t *testing.T) {
			a := newAuthority(t, td)
			backend := Backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("x-echo-xfcc", r.Header.Get("x-forwarded-client-cert"))
				w.Header().Set("x-echo-serial", r.Header.Get("x-peer-serial"))
			}))
			in := Run(t, envoy.Proxy{Name: "payments", SDS: envoy.SDS{Socket: a.socket, TokenFile: token(t, payments), Delta: delta}, Inbound: &envoy.Inbound{
				Peers: []spiffeid.ID{checkout}, Backend: backend, RequestHeaders: map[string]string{"x-peer-serial": "%DOWNSTREAM_PEER_SERIAL%"},
			}})
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			addr, err := in.Listener(ctx, envoy.ListenerInbound)
			if err != nil {
				t.Fatal(err)
			}
			out := Run(t, envoy.Proxy{Name: "checkout", SDS: envoy.SDS{Socket: a.socket, TokenFile: token(t, checkout), Delta: !delta}, Outbound: &envoy.Outbound{
				Peers: []spiffeid.ID{payments}, Upstream: addr, ConnectionPerRequest: true,
				ResponseHeaders: map[string]string{"x-upstream-id": "%UPSTREAM_PEER_URI_SAN%", "x-upstream-cert": "%UPSTREAM_PEER_CERT%"},
			}})
			for _, e := range []*envoy.Envoy{in, out} {
				if _, err := e.Live(ctx); err != nil {
					t.Fatal(err)
				}
				t.Logf("live after %v", time.Since(e.Started))
			}
			front, err := out.Listener(ctx, envoy.ListenerOutbound)
			if err != nil {
				t.Fatal(err)
			}
			traffic(t, a, front, checkout, payments)
			strangers(t, a, in, addr, payments)
			if n, _ := out.Counter(ctx, "cluster.upstream.ssl.session_reused"); n != 0 {
				t.Errorf("%d TLS sessions were resumed", n)
			}
			if len(a.nacks) > 0 {
				t.Errorf("refused: %v", a.nacks)
			}
			t.Logf("acknowledged: %v", a.acks)
		})
	}
}

func traffic(t *testing.T, a *authority, front netip.AddrPort, checkout, payments spiffeid.ID) {
	t.Helper()
	serials, upstream := map[string]bool{}, map[string]bool{}
	for i := range 200 {
		if i%40 == 20 {
			a.rotate()
		}
		resp, body, err := Get(t.Context(), "http://"+front.String())
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("request %d: %v %v %s", i, err, resp, body)
		}
		if got := resp.Header.Get("x-echo-xfcc"); !strings.Contains(got, "URI="+checkout.String()) {
			t.Fatalf("payments saw %q", got)
		}
		if got := resp.Header.Get("x-upstream-id"); got != payments.String() {
			t.Fatalf("checkout saw %q", got)
		}
		serials[resp.Header.Get("x-echo-serial")] = true
		upstream[resp.Header.Get("x-upstream-cert")] = true
	}
	if len(serials) < 4 || len(upstream) < 4 {
		t.Errorf("%d and %d serials seen over 5 rotations", len(serials), len(upstream))
	}
}

func strangers(t *testing.T, a *authority, in *envoy.Envoy, addr netip.AddrPort, payments spiffeid.ID) {
	t.Helper()
	intruder := spiffeid.RequireFromPath(a.td, "/ns/demo/sa/intruder")
	for _, delta := range []bool{false, true} {
		s := envoy.NewSource(&envoy.Client{Socket: a.socket, Node: "intruder", Delta: delta, Token: func() (string, error) { return intruder.String(), nil }})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		done := make(chan error, 1)
		go func() { done <- s.Follow(ctx) }()
		if err := s.Ready(ctx); err != nil {
			t.Fatal(err)
		}
		before, _ := in.Counter(ctx, "listener.inbound.ssl.fail_verify_san")
		err := handshake(ctx, addr, tlsconfig.MTLSClientConfig(s, s, tlsconfig.AuthorizeID(payments)))
		after, _ := in.Counter(ctx, "listener.inbound.ssl.fail_verify_san")
		t.Logf("intruder: %v, %d", err, after-before)
		if err == nil || after != before+1 {
			t.Errorf("intruder: error %v, counted %d", err, after-before)
		}
		before, _ = in.Counter(ctx, "listener.inbound.ssl.fail_verify_no_cert")
		err = handshake(ctx, addr, tlsconfig.TLSClientConfig(s, tlsconfig.AuthorizeID(payments)))
		after, _ = in.Counter(ctx, "listener.inbound.ssl.fail_verify_no_cert")
		t.Logf("nobody: %v, %d", err, after-before)
		if err == nil || after != before+1 {
			t.Errorf("client without certificate: error %v, counted %d", err, after-before)
		}
		cancel()
		<-done
	}
}

// handshake connects and reads: in TLS 1.3 the client learns only then that it was refused.
func handshake(ctx context.Context, addr netip.AddrPort, cfg *tls.Config) error {
	d := tls.Dialer{Config: cfg}
	conn, err := d.DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}
