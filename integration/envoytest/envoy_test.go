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
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/signet-ca/signet/internal/envoy"
	"github.com/signet-ca/signet/sds"
)

func writeToken(t *testing.T, path, token string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// pair is two Envoys: checkout sends to payments, which hands on to a backend that tells what it was told.
type pair struct {
	a                  *Authority
	checkout, payments spiffeid.ID
	in, out            *envoy.Envoy
	door, front        netip.AddrPort // of payments, of checkout
	token              string         // file with the token of checkout
}

func newPair(t *testing.T, ctx context.Context, paymentsDelta, checkoutDelta bool) *pair {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("envoy.test")
	p := &pair{
		a: NewAuthority(t, td), token: filepath.Join(t.TempDir(), "token"),
		checkout: spiffeid.RequireFromPath(td, "/ns/demo/sa/checkout"), payments: spiffeid.RequireFromPath(td, "/ns/demo/sa/payments"),
	}
	paymentsToken := filepath.Join(t.TempDir(), "token")
	writeToken(t, p.token, p.checkout.String())
	writeToken(t, paymentsToken, p.payments.String())
	p.in = Run(t, envoy.Proxy{Name: "payments", SDS: envoy.SDS{Socket: p.a.Socket, TokenFile: paymentsToken, Delta: paymentsDelta}, Inbound: &envoy.Inbound{
		Peers: []spiffeid.ID{p.checkout}, RequestHeaders: map[string]string{"x-peer-serial": "%DOWNSTREAM_PEER_SERIAL%"},
		Backend: Backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("x-echo-xfcc", r.Header.Get("x-forwarded-client-cert"))
			w.Header().Set("x-echo-serial", r.Header.Get("x-peer-serial"))
		})),
	}})
	var err error
	if p.door, err = p.in.Listener(ctx, envoy.ListenerInbound); err != nil {
		t.Fatal(err)
	}
	p.out = Run(t, envoy.Proxy{Name: "checkout", SDS: envoy.SDS{Socket: p.a.Socket, TokenFile: p.token, Delta: checkoutDelta}, Outbound: &envoy.Outbound{
		Peers: []spiffeid.ID{p.payments}, Upstream: p.door, ConnectionPerRequest: true,
		ResponseHeaders: map[string]string{"x-upstream-id": "%UPSTREAM_PEER_URI_SAN%", "x-upstream-cert": "%UPSTREAM_PEER_CERT%"},
	}})
	if p.front, err = p.out.Listener(ctx, envoy.ListenerOutbound); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pair) live(t *testing.T, ctx context.Context) {
	t.Helper()
	for _, e := range []*envoy.Envoy{p.in, p.out} {
		if _, err := e.Live(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

func (p *pair) counter(t *testing.T, e *envoy.Envoy, name string) uint64 {
	t.Helper()
	n, err := e.Counter(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// The bootstraps do what they say with real Envoys: both protocols, mutual TLS by SPIFFE ID, rotation under traffic
// without a lost request, nothing resumed, strangers refused and counted.
func TestTwoEnvoys(t *testing.T) {
	for _, delta := range []bool{false, true} {
		t.Run(fmt.Sprintf("payments delta %v", delta), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
			defer cancel()
			p := newPair(t, ctx, delta, !delta)
			p.a.Issue(p.checkout)
			p.a.Issue(p.payments)
			p.live(t, ctx)
			p.traffic(t)
			p.strangers(t, ctx)
			if n := p.counter(t, p.in, "listener.inbound.ssl.session_reused"); n != 0 {
				t.Errorf("%d TLS sessions were resumed", n)
			}
			for _, r := range p.a.Streams() {
				if r.Nacks > 0 {
					t.Errorf("%s refused a secret: %s", r.Proxy, r.Nack)
				}
			}
		})
	}
}

func (p *pair) traffic(t *testing.T) {
	t.Helper()
	const rotations, least = 5, 40 // requests under each certificate
	requests := uint64(0)
	serials, upstream := map[string]bool{}, map[string]bool{}
	request := func() {
		t.Helper()
		requests++
		resp, body, err := Get(t.Context(), "http://"+p.front.String())
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("request %d: %v %v %s", requests, err, resp, body)
		}
		if got := resp.Header.Get("x-echo-xfcc"); !slices.Contains(strings.Split(got, ";"), "URI="+p.checkout.String()) {
			t.Fatalf("payments saw %q", got)
		}
		if got := resp.Header.Get("x-upstream-id"); got != p.payments.String() {
			t.Fatalf("checkout saw %q", got)
		}
		serials[resp.Header.Get("x-echo-serial")] = true
		upstream[resp.Header.Get("x-upstream-cert")] = true
	}
	for n := range rotations + 1 {
		if n > 0 {
			p.a.Issue(p.checkout)
			p.a.Issue(p.payments)
		}
		// A new certificate is in use when Envoy has taken it, however many requests come before.
		eventually(t, fmt.Sprintf("certificate %d of both", n), func() bool {
			request()
			return len(serials) > n && len(upstream) > n
		})
		for range least {
			request()
		}
		if len(serials) != n+1 || len(upstream) != n+1 {
			t.Errorf("%d and %d certificates seen after %d rotations", len(serials), len(upstream), n)
		}
	}
	if n := p.counter(t, p.in, "listener.inbound.ssl.handshake"); n != requests {
		t.Errorf("%d handshakes for %d requests", n, requests)
	}
}

func (p *pair) strangers(t *testing.T, ctx context.Context) {
	t.Helper()
	intruder := spiffeid.RequireFromPath(p.a.Domain, "/ns/demo/sa/intruder")
	p.a.Issue(intruder)
	s := follow(t, &envoy.Client{Socket: p.a.Socket, Token: func() (string, error) { return intruder.String(), nil }})
	if err := s.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	for counter, config := range map[string]*tls.Config{
		"listener.inbound.ssl.fail_verify_san":     tlsconfig.MTLSClientConfig(s, s, tlsconfig.AuthorizeID(p.payments)),
		"listener.inbound.ssl.fail_verify_no_cert": tlsconfig.TLSClientConfig(s, tlsconfig.AuthorizeID(p.payments)),
	} {
		before := p.counter(t, p.in, counter)
		d := tls.Dialer{Config: config}
		conn, err := d.DialContext(ctx, "tcp", p.door.String())
		if err != nil {
			t.Fatal(err)
		}
		_, err = conn.Read(make([]byte, 1)) // in TLS 1.3 a client learns only then that it was refused
		conn.Close()
		if err == nil {
			t.Errorf("%s: there was no refusal", counter)
		}
		eventually(t, counter, func() bool { return p.counter(t, p.in, counter) == before+1 }) // after the alert is sent
	}
}

// Without a certificate there is nothing: an Envoy whose identity is late waits, and does not serve without it.
func TestEnvoyWaitsForItsCertificate(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	p := newPair(t, ctx, true, false)
	p.a.Issue(p.checkout)
	if _, err := p.out.Live(ctx); err != nil {
		t.Fatal(err)
	}
	resp, _, err := Get(ctx, "http://"+p.front.String())
	if err != nil || resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("payments has no certificate, yet: %v, %v", resp, err)
	}
	if b, err := p.in.Get(ctx, "/certs"); err != nil || strings.Contains(string(b), "serial_number") {
		t.Errorf("certificates: %s, %v", b, err)
	}
	p.a.Issue(p.payments)
	p.live(t, ctx)
	if resp, body, err := Get(ctx, "http://"+p.front.String()); err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("%v, %v: %s", resp, err, body)
	}
}

// When the server ends a stream, Envoy comes back with the token that is in the file by then, and no request fails meanwhile.
func TestEnvoyComesBackWithAFreshToken(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	p := newPair(t, ctx, true, false)
	p.a.Issue(p.checkout)
	p.a.Issue(p.payments)
	p.live(t, ctx)
	writeToken(t, p.token, p.checkout.String()+" fresh")
	fresh := "Bearer " + p.checkout.String() + " fresh"
	if slices.Contains(p.a.Tokens(), fresh) {
		t.Fatal("the token is read before it is needed")
	}
	ended := time.Now()
	p.a.EndStreams()
	back := func() bool {
		open := map[string]bool{}
		for _, r := range p.a.Streams() {
			if r.Open && r.Acks > 0 && r.Proxy == "checkout" {
				open[strings.Join(r.Names, ",")] = true
			}
		}
		return open[sds.NameDefault] && open[sds.NameRootCA] && slices.Contains(p.a.Tokens(), fresh)
	}
	for !back() {
		if resp, body, err := Get(ctx, "http://"+p.front.String()); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%v, %v: %s", resp, err, body)
		}
	}
	t.Logf("checkout came back after %v", time.Since(ended))
}
