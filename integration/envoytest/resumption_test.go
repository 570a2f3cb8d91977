package envoytest

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// ticketHolder is a client that keeps the TLS session which it was given first, and tries to resume it on every connection from
// then on. It shows its SVID where a whole handshake is made all the same.
type ticketHolder struct {
	svid    *x509svid.SVID
	version uint16
	kept    *tls.ClientSessionState
}

// Get implements tls.ClientSessionCache.
func (h *ticketHolder) Get(string) (*tls.ClientSessionState, bool) { return h.kept, h.kept != nil }

// Put implements tls.ClientSessionCache.
func (h *ticketHolder) Put(_ string, s *tls.ClientSessionState) {
	if h.kept == nil {
		h.kept = s
	}
}

// call makes one connection and one request, and reports whether the session was resumed. An error is that of a refusal.
func (h *ticketHolder) call(ctx context.Context, address string) (resumed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	d := tls.Dialer{Config: &tls.Config{
		MinVersion: h.version, MaxVersion: h.version, ServerName: "payments", ClientSessionCache: h,
		InsecureSkipVerify:   true, // it is the server's check that is looked at
		GetClientCertificate: tlsconfig.GetClientCertificate(h.svid),
	}}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return false, err
	}
	resumed = conn.(*tls.Conn).ConnectionState().DidResume
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://payments/", nil)
	if err != nil {
		return resumed, err
	}
	req.Close = true
	if err := req.Write(conn); err != nil {
		return resumed, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), req) // in TLS 1.3 a client learns only now that it was refused
	if err != nil {
		return resumed, err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return resumed, errors.New(resp.Status)
	}
	return resumed, nil
}

// versions are those of TLS that a SPIFFE peer may speak.
var versions = []struct {
	name    string
	version uint16
}{{"TLS 1.2", tls.VersionTLS12}, {"TLS 1.3", tls.VersionTLS13}}

// TestGoServerResumes keeps the session of a client whose root is removed, with a Go server: go-spiffe's configuration alone resumes
// it, since crypto/tls does not call VerifyPeerCertificate then; without tickets, or with a check in VerifyConnection, it is refused.
//
// threat: J13, CVE-2025-68121
func TestGoServerResumes(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("go.test")
	checkout, payments := spiffeid.RequireFromPath(td, "/ns/demo/sa/checkout"), spiffeid.RequireFromPath(td, "/ns/demo/sa/payments")
	for _, tt := range []struct {
		name    string
		change  func(*tls.Config, x509bundle.Source)
		resumes bool // while its root is in the bundle
		refuses bool // once it is not
	}{
		{"as go-spiffe makes it", func(*tls.Config, x509bundle.Source) {}, true, false},
		{"without tickets", func(c *tls.Config, _ x509bundle.Source) { c.SessionTicketsDisabled = true }, false, true},
		{"with a check of every connection", func(c *tls.Config, bundle x509bundle.Source) {
			c.VerifyConnection = func(s tls.ConnectionState) error {
				_, _, err := x509svid.Verify(s.PeerCertificates, bundle)
				return err
			}
		}, true, true},
	} {
		for _, v := range versions {
			t.Run(tt.name+", "+v.name, func(t *testing.T) {
				a := NewAuthority(t, td)
				own := a.SVID(payments, time.Hour)
				bundle := a.Bundle()
				config := tlsconfig.MTLSServerConfig(own, bundle, tlsconfig.AuthorizeID(checkout))
				tt.change(config, bundle)
				address := serveTLS(t, config)
				h := &ticketHolder{svid: a.SVID(checkout, time.Hour), version: v.version}
				if _, err := h.call(t.Context(), address); err != nil {
					t.Fatal(err)
				}
				if resumed, err := h.call(t.Context(), address); err != nil || resumed != tt.resumes {
					t.Fatalf("before: resumed %v, %v", resumed, err)
				}
				a.AddRoot()
				a.RemoveRoots()
				bundle.SetX509Authorities(a.Bundle().X509Authorities())
				resumed, err := h.call(t.Context(), address)
				if refused := err != nil; refused != tt.refuses {
					t.Errorf("after its root was removed: resumed %v, %v", resumed, err)
				}
				if _, err := (&ticketHolder{svid: h.svid, version: v.version}).call(t.Context(), address); err == nil {
					t.Error("a whole handshake under the removed root succeeds")
				}
			})
		}
	}
}

// serveTLS answers every request over TLS until the test ends.
func serveTLS(t *testing.T, config *tls.Config) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), ReadHeaderTimeout: patience, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(tls.NewListener(l, config))
	}()
	t.Cleanup(func() { _ = s.Close(); <-done })
	return l.Addr().String()
}
