package demo

import (
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/internal/canary"
)

// authority is a root with a key in memory.
type authority struct {
	td   spiffeid.TrustDomain
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(t *testing.T, td string) *authority {
	t.Helper()
	a := &authority{td: spiffeid.RequireTrustDomainFromString(td)}
	a.cert, a.key = a.issue(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: td}, IsCA: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{a.td.ID().URL()}, NotAfter: time.Now().Add(time.Hour),
	})
	return a
}

// issue signs c, by itself when there is no certificate yet.
func (a *authority) issue(t *testing.T, c *x509.Certificate) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if c.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 150)); err != nil {
		t.Fatal(err)
	}
	c.NotBefore, c.BasicConstraintsValid = time.Now().Add(-time.Hour), true
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// leaf is what a good X509-SVID is made of; changes break it.
func leaf(id string, changes ...func(*x509.Certificate)) *x509.Certificate {
	c := &x509.Certificate{
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs: []*url.URL{spiffeid.RequireFromString(id).URL()}, NotAfter: time.Now().Add(time.Hour),
	}
	for _, change := range changes {
		change(c)
	}
	return c
}

// holder is an identity whose SVID can be replaced. It shows what it has, valid or not.
type holder struct {
	x509bundle.Source
	mu   sync.Mutex
	svid *x509svid.SVID
}

func (h *holder) GetX509SVID() (*x509svid.SVID, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.svid, nil
}

func (h *holder) show(cert *x509.Certificate, key crypto.Signer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.svid = &x509svid.SVID{Certificates: []*x509.Certificate{cert}, PrivateKey: key}
}

func (a *authority) holder(t *testing.T, c *x509.Certificate) *holder {
	t.Helper()
	h := &holder{Source: x509bundle.FromX509Authorities(a.td, []*x509.Certificate{a.cert})}
	h.show(a.issue(t, c))
	return h
}

// handshake returns what each side says, after both have heard of the other's verdict.
func handshake(t *testing.T, client, server *tls.Config) (clientErr, serverErr error) {
	t.Helper()
	l, _, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		var b net.Conn
		if b, serverErr = l.Accept(); serverErr != nil {
			return
		}
		defer b.Close()
		b.SetDeadline(time.Now().Add(30 * time.Second))
		s := tls.Server(b, server)
		if serverErr = s.Handshake(); serverErr == nil {
			_, serverErr = s.Write([]byte("x"))
		}
	})
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a.SetDeadline(time.Now().Add(30 * time.Second))
	c := tls.Client(a, client)
	if clientErr = c.Handshake(); clientErr == nil {
		_, clientErr = c.Read(make([]byte, 1))
	}
	a.Close()
	wg.Wait()
	return clientErr, serverErr
}

const (
	checkoutID = "spiffe://demo.signet/ns/demo/sa/checkout"
	paymentsID = "spiffe://demo.signet/ns/demo/sa/payments"
)

// Each side lets in exactly the one that it speaks with.
//
// spiffe
func TestVerifyPeer(t *testing.T) {
	a, other := newAuthority(t, trustDomain), newAuthority(t, trustDomain)
	tests := map[string]struct {
		issuer *authority
		cert   *x509.Certificate // nil: none is shown
		want   error             // nil: any error
		good   bool
	}{
		"the right one":  {a, leaf(checkoutID), nil, true},
		"a stranger":     {a, leaf("spiffe://demo.signet/ns/demo/sa/intruder"), errStranger, false},
		"a namesake":     {other, leaf(checkoutID), nil, false},
		"no certificate": {a, nil, errNobody, false},
		"expired":        {a, leaf(checkoutID, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), nil, false},
		"no SPIFFE ID":   {a, leaf(checkoutID, func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"checkout"} }), nil, false},
		"two SPIFFE IDs": {a, leaf(checkoutID, func(c *x509.Certificate) { c.URIs = append(c.URIs, spiffeid.RequireFromString(paymentsID).URL()) }), nil, false},
		"no path":        {a, leaf("spiffe://demo.signet"), nil, false},
		"another scheme": {a, leaf(checkoutID, func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "https", Host: "demo.signet", Path: "/ns/demo/sa/checkout"}}
		}), nil, false},
		"may sign":           {a, leaf(checkoutID, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), nil, false},
		"an authority":       {a, leaf(checkoutID, func(c *x509.Certificate) { c.IsCA = true }), nil, false},
		"of another's realm": {newAuthority(t, "other.signet"), leaf("spiffe://other.signet/ns/demo/sa/checkout"), nil, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			payments := a.holder(t, leaf(paymentsID))
			caller, anonymous := payments, tt.cert == nil
			if !anonymous {
				caller = tt.issuer.holder(t, tt.cert)
				caller.Source = payments.Source // what it thinks of the server is not the question
			}
			var told []error
			server := serverTLS(payments, spiffeid.RequireFromString(checkoutID), func(err error) { told = append(told, err) })
			clientErr, serverErr := handshake(t, clientTLS(caller, spiffeid.RequireFromString(paymentsID), anonymous), server)
			if tt.good {
				if clientErr != nil || serverErr != nil || len(told) != 0 {
					t.Errorf("client: %v; server: %v; told %v", clientErr, serverErr, told)
				}
				return
			}
			if clientErr == nil || serverErr == nil || len(told) != 1 || tt.want != nil && !errors.Is(told[0], tt.want) {
				t.Errorf("client: %v; server: %v; told %v, want %v", clientErr, serverErr, told, tt.want)
			}
			if anonymous {
				return // a server always shows one
			}
			// The same on the other side: a client that wants checkout, and meets this one.
			clientErr, serverErr = handshake(t, clientTLS(payments, spiffeid.RequireFromString(checkoutID), false),
				serverTLS(caller, spiffeid.RequireFromString(paymentsID), func(error) {}))
			if clientErr == nil || serverErr == nil || tt.want != nil && !errors.Is(clientErr, tt.want) {
				t.Errorf("turned round: client: %v; server: %v", clientErr, serverErr)
			}
		})
	}
}

// The Go peers under traffic: each request has a full handshake, sees the certificates that are the newest, and a swap
// costs nothing.
func TestGoPeersRotate(t *testing.T) {
	a := newAuthority(t, trustDomain)
	in, out := a.holder(t, leaf(paymentsID)), a.holder(t, leaf(checkoutID))
	serve := func(h http.Handler, config *tls.Config) netip.AddrPort {
		s := httptest.NewUnstartedServer(h)
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		if config != nil {
			s.Listener = tls.NewListener(s.Listener, config)
		}
		s.Start()
		t.Cleanup(s.Close)
		return s.Listener.Addr().(*net.TCPAddr).AddrPort()
	}
	var resumed, refused atomic.Int64
	toBackend := paymentsHandler(serve(http.HandlerFunc(backend), nil))
	door := serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS.DidResume {
			resumed.Add(1)
		}
		toBackend.ServeHTTP(w, r)
	}), serverTLS(in, spiffeid.RequireFromString(checkoutID), func(error) { refused.Add(1) }))
	config := clientTLS(out, spiffeid.RequireFromString(paymentsID), false)
	config.ClientSessionCache = tls.NewLRUClientSessionCache(4) // the server offers nothing to put in
	front := serve(checkoutHandler(door, config), nil)
	tr := newTraffic(front, checkoutID, paymentsID)
	for i := range 40 {
		if i%10 == 5 {
			in.show(a.issue(t, leaf(paymentsID)))
			out.show(a.issue(t, leaf(checkoutID)))
		}
		tr.count(tr.request())
	}
	c := tr.now.Load()
	if c.requests != 40 || c.failed != 0 || c.checkout.certificates != 5 || c.payments.certificates != 5 || resumed.Load() != 0 || refused.Load() != 0 {
		t.Errorf("%d requests, %d failed %v, %d and %d certificates, %d resumed, %d refused",
			c.requests, c.failed, c.failures, c.checkout.certificates, c.payments.certificates, resumed.Load(), refused.Load())
	}
	if c.checkout.leastLife <= 0 || c.checkout.leastLife > time.Hour {
		t.Errorf("least life left %v", c.checkout.leastLife)
	}
	// Its identity is gone: a failure, and not a wrong success.
	out.show(a.issue(t, leaf("spiffe://demo.signet/ns/demo/sa/intruder")))
	tr2 := newTraffic(front, "spiffe://demo.signet/ns/demo/sa/intruder", paymentsID)
	if _, err := tr2.request(); err == nil || refused.Load() != 1 {
		t.Errorf("a stranger called: error %v, refused %d", err, refused.Load())
	}
}
