package agent_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"math/big"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/internal/canary"
)

const domain = "example.org"

// root is an authority that signs whatever a test wants, with one intermediate.
type root struct {
	t     testing.TB
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	inter *x509.Certificate
	ikey  *ecdsa.PrivateKey
}

func newRoot(t testing.TB) *root {
	t.Helper()
	r := &root{t: t, key: newKey(t), ikey: newKey(t)}
	r.cert = sign(t, authority(), nil, r.key.Public(), r.key)
	r.inter = sign(t, authority(), r.cert, r.ikey.Public(), r.key)
	return r
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func authority() *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{SerialNumber: cryptorand.Text()}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotAfter: time.Now().Add(1000 * time.Hour),
	}
}

func leaf(id string, change ...func(*x509.Certificate)) *x509.Certificate {
	u, err := url.Parse(id)
	if err != nil {
		panic(err)
	}
	c := &x509.Certificate{
		URIs: []*url.URL{u}, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, NotAfter: time.Now().Add(time.Hour),
	}
	for _, f := range change {
		f(c)
	}
	return c
}

func sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	serial := make([]byte, 12)
	cryptorand.Read(serial)
	template.SerialNumber = new(big.Int).SetBytes(serial)
	if template.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-time.Minute)
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(cryptorand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// svid returns a chain for a public key.
func (r *root) svid(template *x509.Certificate, pub crypto.PublicKey) [][]byte {
	return [][]byte{sign(r.t, template, r.inter, pub, r.ikey).Raw, r.inter.Raw}
}

func publicKey(t testing.TB, csr []byte) crypto.PublicKey {
	t.Helper()
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		t.Fatal(err)
	}
	return r.PublicKey
}

// bundle is what a CA sends of these roots.
func bundle(epoch, number uint32, roots ...*root) *apiv1.Bundle {
	b := &apiv1.Bundle{Epoch: epoch, Number: number}
	var certs []*x509.Certificate
	for _, r := range roots {
		b.Roots = append(b.Roots, r.cert.Raw)
		certs = append(certs, r.cert)
	}
	hash := api.BundleHash(certs)
	b.Hash = hash[:]
	return b
}

// fake is a CA that answers as a test wants. Its zero answers are those of a good one.
type fake struct {
	apiv1.UnimplementedAuthorityServer
	t      testing.TB
	td     spiffeid.TrustDomain
	root   *root
	tokens *attestortest.Issuer
	node   attestortest.Pod

	listener *bufconn.Listener
	asked    atomic.Int64 // calls of Issue

	mu      sync.Mutex // guards what follows
	issue   func(item *apiv1.IssueItem, pub crypto.PublicKey) (*apiv1.IssueResponse, error)
	call    func(*apiv1.IssueRequest) error // before issue, once for each call; nil: nothing
	attest  func(good *apiv1.AttestAgentResponse) (*apiv1.AttestAgentResponse, error)
	refuse  error                    // of every session; nil: none
	session []*apiv1.SessionResponse // sent in place of Welcome, bundle and key sets; nil entries wait for ever
	push    chan *apiv1.SessionResponse
	reports []*apiv1.Report
}

// newFake serves a fake CA whose certificate is of id, with what change makes of its TLS.
func newFake(t testing.TB, id string, change ...func(*tls.Config)) *fake {
	t.Helper()
	tokens, err := attestortest.NewIssuer(attestortest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{
		t: t, td: spiffeid.RequireTrustDomainFromString(domain), root: newRoot(t), tokens: tokens,
		node:     attestortest.NewPod("signet-system", "signet-agent", "signet-agent", here),
		listener: bufconn.Listen(64 << 10), push: make(chan *apiv1.SessionResponse),
	}
	key := newKey(t)
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert, NextProtos: []string{"h2"},
		Certificates: []tls.Certificate{{Certificate: f.root.svid(leaf(id), key.Public()), PrivateKey: key}},
	}
	config.Certificates[0].Leaf, _ = x509.ParseCertificate(config.Certificates[0].Certificate[0])
	for _, c := range change {
		c(config)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second}))
	apiv1.RegisterAuthorityServer(server, f)
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(f.listener)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})
	return f
}

func (f *fake) AttestAgent(_ context.Context, r *apiv1.AttestAgentRequest) (*apiv1.AttestAgentResponse, error) {
	id := "spiffe://" + domain + "/signet/agent/" + f.node.NodeUID
	f.mu.Lock()
	defer f.mu.Unlock()
	day := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(24 * time.Hour) }
	good := &apiv1.AttestAgentResponse{Chain: f.root.svid(leaf(id, day), publicKey(f.t, r.GetCsr())), Bundle: bundle(1, 1, f.root)}
	if f.attest != nil {
		return f.attest(good)
	}
	return good, nil
}

func (f *fake) Issue(ctx context.Context, r *apiv1.IssueRequest) (*apiv1.IssueResponse, error) {
	f.asked.Add(1)
	f.mu.Lock()
	issue, call := f.issue, f.call
	f.mu.Unlock()
	if call != nil {
		if err := call(r); err != nil {
			return nil, err
		}
	}
	all := &apiv1.IssueResponse{}
	for _, item := range r.GetItems() {
		pub := publicKey(f.t, item.GetCsr())
		if issue == nil {
			all.Results = append(all.Results, results(f.good(pub)).Results...)
			continue
		}
		resp, err := issue(item, pub)
		if resp == nil && err == nil { // never
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if err != nil {
			return nil, err
		}
		all.Results = append(all.Results, resp.GetResults()...)
	}
	return all, nil
}

const webID = "spiffe://" + domain + "/ns/shop/sa/web"

func (f *fake) good(pub crypto.PublicKey) *apiv1.SVID {
	return &apiv1.SVID{SpiffeId: webID, Chain: f.root.svid(leaf(webID), pub), RenewAt: timestamppb.New(time.Now().Add(20 * time.Minute))}
}

func results(svids ...*apiv1.SVID) *apiv1.IssueResponse {
	resp := &apiv1.IssueResponse{}
	for _, s := range svids {
		resp.Results = append(resp.Results, &apiv1.IssueResult{Result: &apiv1.IssueResult_Svid{Svid: s}})
	}
	return resp
}

func welcome(change ...func(*apiv1.Welcome)) *apiv1.SessionResponse {
	w := &apiv1.Welcome{Protocol: api.Protocol, TrustDomain: domain, Replica: "ca-0"}
	for _, f := range change {
		f(w)
	}
	return &apiv1.SessionResponse{Message: &apiv1.SessionResponse_Welcome{Welcome: w}}
}

func bundleMessage(b *apiv1.Bundle) *apiv1.SessionResponse {
	return &apiv1.SessionResponse{Message: &apiv1.SessionResponse_Bundle{Bundle: b}}
}

func (f *fake) keySets() *apiv1.SessionResponse {
	sets := []*apiv1.KeySet{{Issuer: f.tokens.Name(), Jwks: f.tokens.JWKS()}}
	return &apiv1.SessionResponse{Message: &apiv1.SessionResponse_KeySets{KeySets: &apiv1.KeySets{Sets: sets}}}
}

func (f *fake) Session(stream apiv1.Authority_SessionServer) error {
	if m, err := stream.Recv(); err != nil || m.GetHello() == nil {
		return status.Error(codes.InvalidArgument, "no hello")
	}
	f.mu.Lock()
	messages, refused := f.session, f.refuse
	f.mu.Unlock()
	if refused != nil {
		return refused
	}
	if messages == nil {
		messages = []*apiv1.SessionResponse{welcome(), bundleMessage(bundle(1, 1, f.root)), f.keySets()}
	}
	for _, m := range messages {
		if m == nil {
			<-stream.Context().Done()
			return nil
		}
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.reports = append(f.reports, m.GetReport())
			f.mu.Unlock()
		}
	}()
	for {
		select {
		case m := <-f.push:
			if err := stream.Send(m); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fake) start(change ...func(*agent.Config)) *node {
	f.t.Helper()
	trust, err := agent.NewTrust(f.td, api.Generation{Epoch: 1, Number: 1}, []*x509.Certificate{f.root.cert})
	if err != nil {
		f.t.Fatal(err)
	}
	n := &node{t: f.t, log: &records{}, metrics: prometheus.NewRegistry()}
	cfg := agent.Config{
		TrustDomain: f.td, Dial: f.listener.DialContext, Trust: trust, Verifier: attestor.ByKeySets, Log: slog.New(n.log),
		Prover: proverFunc(func(context.Context) (attestor.Evidence, error) { return f.token(f.node, api.AgentAudience(f.td)), nil }),
	}
	for _, c := range change {
		c(&cfg)
	}
	a, err := agent.New(cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	n.Agent = a
	n.metrics.MustRegister(a.Collector())
	n.start()
	return n
}

func (f *fake) token(p attestortest.Pod, audience string) attestor.Evidence {
	token, err := f.tokens.Token(p, audience, tokenLife)
	if err != nil {
		f.t.Fatal(err)
	}
	return attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(token)}
}

func (f *fake) admit(n *node, name string) *agent.Identity {
	f.t.Helper()
	id, _, err := n.Admit(f.t.Context(), f.token(attestortest.NewPod("shop", name, "web", here), api.WorkloadAudience(f.td)), "shared")
	if err != nil {
		f.t.Fatal(err)
	}
	return id
}

const replicaID = "spiffe://" + domain + "/signet/ca/ca-0"
