package demo

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/internal/envoy"
)

// errStranger is the refusal of a peer whose SVID is valid, but not that of whom we speak with.
var errStranger = errors.New("the peer's SVID is valid, but not of a workload that belongs here")

// errNobody is the refusal of a peer that shows no certificate.
var errNobody = errors.New("the peer shows no certificate")

// identity is what a TLS configuration takes from an SDS stream: at each handshake, the newest.
type identity interface {
	x509svid.Source
	x509bundle.Source
}

// verifyPeer returns a check for tls.Config.VerifyConnection, which runs for every connection, a resumed one included:
// the peer has to show a valid X509-SVID of exactly this ID. It works on both sides.
func verifyPeer(source x509bundle.Source, want spiffeid.ID) func(tls.ConnectionState) error {
	return func(s tls.ConnectionState) error {
		if len(s.PeerCertificates) == 0 {
			return errNobody
		}
		id, _, err := x509svid.Verify(s.PeerCertificates, source)
		switch {
		case err != nil:
			return err
		case id != want:
			return errStranger
		}
		return nil
	}
}

// clientTLS shows the newest SVID of source, or no certificate when anonymous, to a server that must be want.
func clientTLS(source identity, want spiffeid.ID, anonymous bool) *tls.Config {
	c := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // names are not what SPIFFE goes by: VerifyConnection checks all there is to check
		VerifyConnection:   verifyPeer(source, want),
	}
	if !anonymous {
		c.GetClientCertificate = tlsconfig.GetClientCertificate(source)
	}
	return c
}

// serverTLS shows the newest SVID of source, and accepts only want. refused is told of each refusal.
func serverTLS(source identity, want spiffeid.ID, refused func(error)) *tls.Config {
	verify := verifyPeer(source, want)
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ClientAuth:             tls.RequestClientCert, // VerifyConnection requires it, and can count who shows none
		GetCertificate:         tlsconfig.GetCertificate(source),
		SessionTicketsDisabled: true, // a full handshake each time, against the newest bundle
		VerifyConnection: func(s tls.ConnectionState) error {
			err := verify(s)
			if err != nil {
				refused(err)
			}
			return err
		},
	}
}

// source returns a workload's own view of the agent: the SVID and bundle that it is given for its token, for as long as
// ctx lives.
func (d *demo) source(ctx context.Context, workload string, delta bool) (*envoy.Source, time.Duration, error) {
	start := time.Now()
	s := envoy.NewSource(&envoy.Client{Socket: d.dir.agentSocket(), Node: workload, Delta: delta, Token: func() (string, error) {
		b, err := os.ReadFile(d.dir.tokenFile(workload))
		return string(b), err
	}})
	d.wg.Go(func() { s.Follow(ctx) })
	ready, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("%s has no SVID after %s", workload, startTimeout))
	defer cancel()
	err := s.Ready(ready)
	return s, time.Since(start), err
}

// startGo starts two Go servers in this process in the place of Envoys; everything but the proxies is the same.
func (d *demo) startGo(ctx context.Context, backend netip.AddrPort) error {
	ids := d.ids()
	d.peers = &peers{
		protocol:  map[string]string{checkout: "SDS (state of the world)", payments: "SDS (delta)"},
		firstSVID: map[string]time.Duration{},
		stop:      func() {}, // they end with the context
	}
	sources := map[string]*envoy.Source{}
	for _, w := range []string{payments, checkout} {
		s, took, err := d.source(ctx, w, w == payments)
		if err != nil {
			return err
		}
		sources[w], d.peers.firstSVID[w] = s, took
		d.say(w, "a Go server has SVID and bundle by %s after %d ms", d.peers.protocol[w], took.Milliseconds())
	}
	var stranger, nobody, done, resumed atomic.Uint64
	in, door, err := listen()
	if err != nil {
		return err
	}
	in = tls.NewListener(in, serverTLS(sources[payments], ids[checkout], func(err error) {
		switch {
		case errors.Is(err, errStranger):
			stranger.Add(1)
		case errors.Is(err, errNobody):
			nobody.Add(1)
		}
	}))
	toBackend := paymentsHandler(backend)
	if err := d.serve(payments, in, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		done.Add(1) // each connection carries one request
		if r.TLS.DidResume {
			resumed.Add(1)
		}
		toBackend.ServeHTTP(w, r)
	})); err != nil {
		return err
	}
	out, front, err := listen()
	if err != nil {
		return err
	}
	if err := d.serve(checkout, out, checkoutHandler(door, clientTLS(sources[checkout], ids[payments], false))); err != nil {
		return err
	}
	d.peers.front, d.peers.door = front, door
	d.peers.refusals = func(context.Context) (refusals, error) {
		return refusals{stranger: stranger.Load(), nobody: nobody.Load()}, nil
	}
	d.peers.handshakes = func(context.Context) (uint64, uint64, error) { return done.Load(), resumed.Load(), nil }
	return nil
}

// paymentsHandler hands requests to the backend and tells it who called, as Envoy's SANITIZE_SET does.
func paymentsHandler(backend netip.AddrPort) http.Handler {
	return &httputil.ReverseProxy{ErrorHandler: tellClient, Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: backend.String()})
		peer := r.In.TLS.PeerCertificates[0] // verifyPeer has seen to it
		r.Out.Header.Set(headerXFCC, "URI="+peer.URIs[0].String())
		r.Out.Header.Set(headerCallerCert, encodeCert(peer.Raw))
	}}
}

// checkoutHandler sends requests to payments, each on a connection of its own, and tells the client whom it reached.
func checkoutHandler(door netip.AddrPort, config *tls.Config) http.Handler {
	return &httputil.ReverseProxy{
		ErrorHandler: tellClient,
		Transport:    &http.Transport{DisableKeepAlives: true, TLSClientConfig: config, TLSHandshakeTimeout: requestTimeout},
		Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "https", Host: door.String()}) },
		ModifyResponse: func(r *http.Response) error {
			peer := r.TLS.PeerCertificates[0] // verifyPeer has seen to it
			r.Header.Set(headerUpstreamID, peer.URIs[0].String())
			r.Header.Set(headerUpstreamCert, encodeCert(peer.Raw))
			return nil
		},
	}
}

// tellClient answers with what went wrong: the client is the demo's own, and shows it.
func tellClient(w http.ResponseWriter, _ *http.Request, err error) {
	http.Error(w, err.Error(), http.StatusBadGateway)
}

// encodeCert writes a certificate as Envoy does in headers: PEM, URL-encoded.
func encodeCert(der []byte) string {
	return url.PathEscape(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
}
