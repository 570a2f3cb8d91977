package ca_test

import (
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/issuance"
)

// handshake speaks TLS to the agents' port and returns the connection.
func handshake(t *testing.T, s *catest.Server, config *tls.Config) (*tls.Conn, error) {
	t.Helper()
	raw, err := s.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	config.InsecureSkipVerify = true // who the server is, its own test asks
	c := tls.Client(raw, config)
	return c, c.HandshakeContext(t.Context())
}

// TestServerTLS speaks TLS 1.3 and nothing older, with a hybrid key exchange, HTTP/2, and the replica's own identity.
//
// spiffe
// threat: J10, J17
func TestServerTLS(t *testing.T) {
	s := start(t, catest.Options{})
	if _, err := handshake(t, s, &tls.Config{MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}}); err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("TLS 1.2: %v", err)
	}
	c, err := handshake(t, s, &tls.Config{NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	state := c.ConnectionState()
	if state.Version != tls.VersionTLS13 || state.NegotiatedProtocol != "h2" || state.CurveID != tls.X25519MLKEM768 {
		t.Errorf("version %x, protocol %q, key exchange %s", state.Version, state.NegotiatedProtocol, state.CurveID)
	}
	id := spiffeid.RequireFromString("spiffe://example.org/signet/ca/ca-0")
	if err := issuance.Verify(state.PeerCertificates, s.CA().Bundle().Roots, id, time.Now()); err != nil {
		t.Errorf("the server's identity: %v", err)
	}
	leaf := state.PeerCertificates[0]
	if len(leaf.DNSNames)+len(leaf.IPAddresses) > 0 || leaf.NotAfter.After(state.PeerCertificates[1].NotAfter) {
		t.Error("the server's certificate has names or outlives its issuer")
	}
}

// TestNoResumption gives out no session tickets: a resumed session would skip the check against the bundle.
//
// threat: J13, CVE-2025-68121
func TestNoResumption(t *testing.T) {
	s := start(t, catest.Options{})
	cache := &countingCache{}
	for range 2 {
		c, err := handshake(t, s, &tls.Config{NextProtos: []string{"h2"}, ServerName: "ca", ClientSessionCache: cache})
		if err != nil {
			t.Fatal(err)
		}
		if c.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		// Tickets come before the first data, which is the server's SETTINGS, after the client's preface.
		if _, err := c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 9)); err != nil {
			t.Fatal(err)
		}
	}
	if cache.puts > 0 {
		t.Errorf("%d session tickets", cache.puts)
	}
}

type countingCache struct{ puts int }

// Get implements tls.ClientSessionCache.
func (*countingCache) Get(string) (*tls.ClientSessionState, bool) { return nil, false }

// Put implements tls.ClientSessionCache.
func (c *countingCache) Put(_ string, s *tls.ClientSessionState) {
	if s != nil {
		c.puts++
	}
}

// TestClientCertificates ends a handshake with a certificate that does not verify against the bundle now.
//
// spiffe
// threat: CVE-2025-6037
func TestClientCertificates(t *testing.T) {
	s := start(t, catest.Options{})
	n := newNode(t, s, "node-1")
	agentID := n.svid.ID
	ours := spiffeid.RequireTrustDomainFromString(catest.TrustDomain)
	other := spiffeid.RequireTrustDomainFromString("other.org")
	self := func(change func(*x509.Certificate)) *x509svid.SVID {
		key := newKey(t)
		c, err := issuance.NewRoot(ours, key, time.Hour, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		template := *c
		change(&template)
		der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		signed, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return &x509svid.SVID{ID: agentID, Certificates: []*x509.Certificate{signed}, PrivateKey: key}
	}
	for name, svid := range map[string]*x509svid.SVID{
		"agent of another trust domain":              foreignSVID(t, other, spiffeid.RequireFromString("spiffe://other.org"+agentID.Path())),
		"our agent by a root that calls itself ours": foreignSVID(t, ours, agentID),
		"our agent by itself": self(func(c *x509.Certificate) {
			c.IsCA, c.MaxPathLen, c.URIs, c.KeyUsage = false, -1, mustURIs(t, agentID.String()), x509.KeyUsageDigitalSignature
		}),
		"two identities":                     self(func(c *x509.Certificate) { c.URIs = mustURIs(t, agentID.String(), agentID.String()+"x") }),
		"no identity":                        self(func(c *x509.Certificate) { c.URIs = nil }),
		"an authority":                       self(func(*x509.Certificate) {}),
		"our agent without its intermediate": {ID: agentID, Certificates: n.svid.Certificates[:1], PrivateKey: n.svid.PrivateKey},
	} {
		t.Run(name, func(t *testing.T) {
			who := *n
			who.t, who.svid = t, svid
			before := refusalsOf(t, s, api.AgentIdentityRequired)
			_, err := who.connect(n.hello())
			wantReason(t, err, api.CAUnavailable) // the handshake failed: there is nobody to give a reason
			if !strings.Contains(err.Error(), "tls:") && !strings.Contains(err.Error(), "closed") {
				t.Errorf("refused for another reason than its certificate: %v", err)
			}
			// Once, or again for each time that gRPC has connected anew by itself since.
			if refusalsOf(t, s, api.AgentIdentityRequired) == before {
				t.Error("the refusal is not counted")
			}
		})
	}
	t.Run("our agent with another key", func(t *testing.T) {
		who := *n
		who.t, who.svid = t, &x509svid.SVID{ID: agentID, Certificates: n.svid.Certificates, PrivateKey: newKey(t)}
		if _, err := who.connect(n.hello()); err == nil {
			t.Fatal("a certificate without its key")
		}
	})
}

// TestExpiredAgent refuses an agent whose SVID has expired: a new connection in the handshake, an old one at each call.
//
// threat: J14
func TestExpiredAgent(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		// The session lasts as long as the SVID; without one, an idle connection ends before.
		s := start(t, catest.Options{Config: func(cfg *ca.Config) { cfg.SessionAge = 2 * time.Hour }})
		n := newNode(t, s, "node-1")
		l := n.session()
		time.Sleep(time.Hour + time.Second)
		_, err := n.connect(nil)
		wantReason(t, err, api.CAUnavailable)
		_, err = l.issue(n.item(s.Pod("shop", "web", "web", "node-1")))
		wantReason(t, err, api.AgentIdentityRequired)
		stream, err := l.client.Session(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		wantReason(t, (&link{t: t, stream: stream}).end(), api.AgentIdentityRequired)
	})
}

// TestHandshakeTimeout ends a connection that says nothing.
//
// threat: J01
func TestHandshakeTimeout(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{})
		c, err := s.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		began := time.Now()
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Fatal("the server speaks first")
		}
		if d := time.Since(began); d > 6*time.Second {
			t.Errorf("the connection was held for %s", d)
		}
	})
}

// TestBeforeIdentity has nobody answer before there is an identity to answer with.
func TestBeforeIdentity(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		config := newBare(t, nil).mustCA().ServerTLS()
		client, server := net.Pipe()
		defer client.Close()
		go func() {
			defer server.Close()
			tls.Server(server, config).HandshakeContext(t.Context())
		}()
		if err := tls.Client(client, &tls.Config{InsecureSkipVerify: true}).HandshakeContext(t.Context()); err == nil {
			t.Error("a handshake with a CA that has no identity")
		}
	})
}

// foreignSVID makes an SVID under a root that the CA does not trust.
func foreignSVID(t *testing.T, td spiffeid.TrustDomain, id spiffeid.ID) *x509svid.SVID {
	t.Helper()
	rootKey, overKey, key := newKey(t), newKey(t), newKey(t)
	root, err := issuance.NewRoot(td, rootKey, day, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	over, err := issuance.SignIntermediate(root, rootKey, issuance.IntermediateRequest{
		TrustDomain: td, PublicKey: overKey.Public(), NotAfter: time.Now().Add(12 * time.Hour),
	}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return leafUnder(t, td, over, overKey, root, id, key)
}

func leafUnder(t *testing.T, td spiffeid.TrustDomain, over *x509.Certificate, overKey crypto.Signer, root *x509.Certificate, id spiffeid.ID, key crypto.Signer) *x509svid.SVID {
	t.Helper()
	issuer, err := issuance.NewIssuer(td, []*x509.Certificate{over}, root, overKey)
	if err != nil {
		t.Fatal(err)
	}
	p, err := issuance.Prepare(issuance.Profile{}, issuance.Request{ID: id, PublicKey: key.Public()}, issuer, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	issued, err := p.Sign()
	if err != nil {
		t.Fatal(err)
	}
	return svidOf(t, issued.Chain, key)
}
