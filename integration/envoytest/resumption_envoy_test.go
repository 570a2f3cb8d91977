//go:build envoy

package envoytest

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/signet-ca/signet/internal/daemon/daemontest"
	"github.com/signet-ca/signet/internal/envoy"
)

// What a bootstrap of ours says about sessions, and what it would be without.
const (
	noTickets     = "          disable_stateless_session_resumption: true\n"
	noSessionIDs  = "          disable_stateful_session_resumption: true\n"
	noSessionKeys = "        max_session_keys: 0 # every connection is a full handshake, checked against the current bundle\n"
	onlyTLS13     = "{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}"
	alsoTLS12     = "{tls_minimum_protocol_version: TLSv1_2, tls_maximum_protocol_version: TLSv1_3}"
)

// without returns a text from which these lines are taken, each of which must be there once.
func without(t *testing.T, text string, lines ...string) string {
	t.Helper()
	for _, l := range lines {
		if strings.Count(text, l) != 1 {
			t.Fatalf("%q is there %d times", l, strings.Count(text, l))
		}
		text = strings.Replace(text, l, "", 1)
	}
	return text
}

// runText starts an Envoy on a bootstrap that is not as Bootstrap makes it, until the test ends.
func runText(t *testing.T, p envoy.Proxy, change func(string) string) {
	t.Helper()
	text, err := envoy.Bootstrap(p)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "envoy.yaml")
	if err := os.WriteFile(file, []byte(change(strings.ReplaceAll(string(text), onlyTLS13, alsoTLS12))), 0o600); err != nil {
		t.Fatal(err)
	}
	log := new(buffer)
	e, err := envoy.Start(envoy.Command{Name: "envoy " + p.Name, Path: Binary(t), Log: log,
		Args: []string{"-c", file, "--disable-hot-restart", "--concurrency", "1", "--log-level", "info"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Kill()
		if t.Failed() {
			t.Logf("log of Envoy %s:\n%s", p.Name, log)
		}
	})
}

// freeAddress is an address that nobody else takes before it is bound.
func freeAddress(t *testing.T) netip.AddrPort {
	t.Helper()
	a, err := daemontest.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return netip.MustParseAddrPort(a)
}

// acknowledged waits until every open stream for the bundle has acknowledged the newest.
func (a *Authority) acknowledged(t *testing.T) {
	t.Helper()
	eventually(t, "an acknowledged bundle", func() bool {
		some := false
		for _, r := range a.Streams() {
			if r.Open && r.WantsBundle {
				if some = true; r.AckedGeneration != a.generation {
					return false
				}
			}
		}
		return some
	})
}

// TestEnvoyServerResumes keeps the session of a client whose root is removed, with a real Envoy as the server. As we write it, there
// is no session to keep. Without that Envoy resumes, as long as its bundle is the same: with another bundle it makes a whole
// handshake, even with ticket keys that stay the same, for the bundle is part of what it gives a session for. (Session ids, which TLS 1.2 has besides, Go does not try as a client.)
//
// threat: J13
func TestEnvoyServerResumes(t *testing.T) {
	key := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("0123456789", 8)))
	ticketKeys := "          session_ticket_keys: {keys: [{inline_bytes: " + key + "}]}\n"
	for _, tt := range []struct {
		name    string
		change  func(*testing.T, string) string
		resumes bool // while nothing changes
	}{
		{"as we write it", func(_ *testing.T, s string) string { return s }, false},
		{"as Envoy is without it", func(t *testing.T, s string) string { return without(t, s, noTickets, noSessionIDs) }, true},
		{"with ticket keys", func(t *testing.T, s string) string {
			return strings.Replace(without(t, s, noSessionIDs), noTickets, ticketKeys, 1)
		}, true},
	} {
		for _, v := range versions {
			t.Run(tt.name+", "+v.name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
				defer cancel()
				p := newServer(t, tt.change)
				p.await(t, ctx, v.version)
				a, h := p.a, &ticketHolder{svid: p.a.SVID(p.checkout, time.Hour), version: v.version}
				if _, err := h.call(ctx, p.door); err != nil {
					t.Fatal(err)
				}
				if (h.kept != nil) != tt.resumes {
					t.Errorf("it has a session: %v", h.kept != nil)
				}
				if resumed, err := h.call(ctx, p.door); err != nil || resumed != tt.resumes {
					t.Errorf("while nothing changes: resumed %v, %v", resumed, err)
				}
				a.AddRoot()
				a.Issue(p.payments)
				a.acknowledged(t)
				if _, err := h.call(ctx, p.door); err != nil {
					t.Errorf("while both roots are trusted: %v", err)
				}
				a.RemoveRoots()
				a.acknowledged(t)
				if resumed, err := h.call(ctx, p.door); err == nil || resumed {
					t.Errorf("after its root was removed: resumed %v, %v", resumed, err)
				}
				// It is the certificate that is refused: others are let in.
				if _, err := (&ticketHolder{svid: a.SVID(p.checkout, time.Hour), version: v.version}).call(ctx, p.door); err != nil {
					t.Errorf("under the new root: %v", err)
				}
			})
		}
	}
}

// TestEnvoyServerResumesExpired keeps the session of a client whose SVID expires. As we write it, it is refused; without that, Envoy
// lets it in for as long as its ticket is good.
func TestEnvoyServerResumesExpired(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*testing.T, string) string
		lets   bool
	}{
		{"as we write it", func(_ *testing.T, s string) string { return s }, false},
		{"as Envoy is without it", func(t *testing.T, s string) string { return without(t, s, noTickets, noSessionIDs) }, true},
	} {
		for _, v := range versions {
			t.Run(tt.name+", "+v.name, func(t *testing.T) {
				t.Parallel() // they wait for the end of a certificate
				ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
				defer cancel()
				p := newServer(t, tt.change)
				p.await(t, ctx, v.version)
				h := &ticketHolder{svid: p.a.SVID(p.checkout, 5*time.Second), version: v.version}
				if _, err := h.call(ctx, p.door); err != nil {
					t.Skipf("the certificate expired before it was shown: %v", err)
				}
				expired := time.NewTimer(time.Until(h.svid.Certificates[0].NotAfter) + time.Second)
				<-expired.C
				if resumed, err := h.call(ctx, p.door); (err == nil) != tt.lets || resumed != tt.lets {
					t.Errorf("with an SVID that has expired: resumed %v, %v", resumed, err)
				}
			})
		}
	}
}

// server is an Envoy with the name payments, which lets checkout in.
type server struct {
	a        *Authority
	checkout spiffeid.ID
	payments spiffeid.ID
	door     string
}

// newServer starts one on a bootstrap that was changed. It may still wait for its certificate.
func newServer(t *testing.T, change func(*testing.T, string) string) *server {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("envoy.test")
	p := &server{a: NewAuthority(t, td), checkout: spiffeid.RequireFromPath(td, "/ns/demo/sa/checkout"), payments: spiffeid.RequireFromPath(td, "/ns/demo/sa/payments")}
	p.a.Issue(p.payments)
	token, door := filepath.Join(t.TempDir(), "token"), freeAddress(t)
	writeToken(t, token, p.payments.String())
	runText(t, envoy.Proxy{Name: "payments", SDS: envoy.SDS{Socket: p.a.Socket, TokenFile: token}, Inbound: &envoy.Inbound{
		Listen: door, Peers: []spiffeid.ID{p.checkout}, Backend: Backend(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})),
	}}, func(s string) string { return change(t, s) })
	p.door = door.String()
	return p
}

// await waits until it answers.
func (p *server) await(t *testing.T, ctx context.Context, version uint16) {
	t.Helper()
	svid := p.a.SVID(p.checkout, time.Hour)
	eventually(t, "the first answer", func() bool {
		_, err := (&ticketHolder{svid: svid, version: version}).call(ctx, p.door)
		return err == nil
	})
}

// TestEnvoyClientResumes has a real Envoy as the client of a server that gives out sessions, and whose root is removed. As we write
// it, it resumes none; without that it does, and forgets them with the bundle under which it got them.
//
// threat: J13
func TestEnvoyClientResumes(t *testing.T) {
	for _, tt := range []struct {
		name    string
		change  func(*testing.T, string) string
		resumes bool // while nothing changes
	}{
		{"as we write it", func(_ *testing.T, s string) string { return s }, false},
		{"as Envoy is without it", func(t *testing.T, s string) string { return without(t, s, noSessionKeys) }, true},
	} {
		for _, v := range versions {
			t.Run(tt.name+", "+v.name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
				defer cancel()
				td := spiffeid.RequireTrustDomainFromString("envoy.test")
				checkout, payments := spiffeid.RequireFromPath(td, "/ns/demo/sa/checkout"), spiffeid.RequireFromPath(td, "/ns/demo/sa/payments")
				a := NewAuthority(t, td)
				a.Issue(checkout)
				token := filepath.Join(t.TempDir(), "token")
				writeToken(t, token, checkout.String())
				var resumed atomic.Int64
				config := tlsconfig.MTLSServerConfig(a.SVID(payments, time.Hour), a.Bundle(), tlsconfig.AuthorizeID(checkout))
				config.MinVersion, config.MaxVersion = v.version, v.version
				config.VerifyConnection = func(s tls.ConnectionState) error {
					if s.DidResume {
						resumed.Add(1)
					}
					return nil
				}
				front := freeAddress(t)
				runText(t, envoy.Proxy{Name: "checkout", SDS: envoy.SDS{Socket: a.Socket, TokenFile: token}, Outbound: &envoy.Outbound{
					Listen: front, Peers: []spiffeid.ID{payments}, Upstream: netip.MustParseAddrPort(serveTLS(t, config)), ConnectionPerRequest: true,
				}}, func(s string) string { return tt.change(t, s) })
				call := func() int {
					resp, _, err := Get(ctx, "http://"+front.String())
					if err != nil {
						return 0
					}
					return resp.StatusCode
				}
				eventually(t, "the first answer", func() bool { return call() == http.StatusOK })
				if tt.resumes {
					eventually(t, "a resumed session", func() bool { return call() == http.StatusOK && resumed.Load() > 0 })
				} else {
					for range 5 {
						call()
					}
				}
				if n := resumed.Swap(0); (n > 0) != tt.resumes {
					t.Errorf("while nothing changes: %d sessions were resumed", n)
				}
				a.AddRoot()
				a.acknowledged(t)
				if status := call(); status != http.StatusOK {
					t.Errorf("while both roots are trusted: status %d", status)
				}
				a.RemoveRoots()
				a.acknowledged(t)
				resumed.Store(0)
				for range 5 {
					if status := call(); status != http.StatusServiceUnavailable {
						t.Errorf("after the server's root was removed: status %d", status)
					}
				}
				if n := resumed.Load(); n > 0 {
					t.Errorf("after the server's root was removed %d sessions were resumed", n)
				}
			})
		}
	}
}
