package sds

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/canary"
	"github.com/signet-ca/signet/internal/latest"
)

const (
	td     = "example.org"
	ownID  = "spiffe://example.org/ns/prod/sa/payments"
	elseID = "spiffe://example.org/ns/prod/sa/vault"
)

// authority is a root with one intermediate, in memory.
type authority struct {
	t          testing.TB
	td         spiffeid.TrustDomain
	root       *x509.Certificate
	inter      *x509.Certificate
	rootKey    *ecdsa.PrivateKey
	interKey   *ecdsa.PrivateKey
	nextSerial int64
}

func newAuthority(t testing.TB, td string) *authority {
	t.Helper()
	a := &authority{t: t, td: spiffeid.RequireTrustDomainFromString(td), nextSerial: 1 << 40}
	a.rootKey, a.interKey = newKey(t), newKey(t)
	a.root = a.sign(caTemplate("root of "+td), nil, a.rootKey.Public(), a.rootKey)
	a.inter = a.sign(caTemplate("intermediate of "+td), a.root, a.interKey.Public(), a.rootKey)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func caTemplate(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
}

func leafTemplate(id string) *x509.Certificate {
	u, err := url.Parse(id)
	if err != nil {
		panic(err)
	}
	return &x509.Certificate{
		URIs: []*url.URL{u}, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

// sign signs tmpl, under a serial number and validity of its own; a nil parent makes it self-signed.
func (a *authority) sign(tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	a.t.Helper()
	a.nextSerial++
	tmpl.SerialNumber = big.NewInt(a.nextSerial)
	tmpl.NotBefore = time.Now().Add(-time.Minute)
	if tmpl.NotAfter.IsZero() {
		tmpl.NotAfter = time.Now().Add(24 * time.Hour)
	}
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

// svid issues an SVID; change may change its template before it is signed.
func (a *authority) svid(id string, change ...func(*x509.Certificate)) *x509svid.SVID {
	a.t.Helper()
	key, tmpl := newKey(a.t), leafTemplate(id)
	for _, f := range change {
		f(tmpl)
	}
	leaf := a.sign(tmpl, a.inter, key.Public(), a.interKey)
	return &x509svid.SVID{ID: spiffeid.RequireFromString(id), Certificates: []*x509.Certificate{leaf, a.inter}, PrivateKey: key}
}

func (a *authority) identity(id string, change ...func(*x509.Certificate)) *Identity {
	a.t.Helper()
	i, err := NewIdentity(a.svid(id, change...))
	if err != nil {
		a.t.Fatal(err)
	}
	return i
}

func (a *authority) bundle(more ...*x509.Certificate) *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(a.td, append([]*x509.Certificate{a.root}, more...))
}

func (a *authority) trust(generation uint64, others ...*x509bundle.Bundle) *Trust {
	a.t.Helper()
	t, err := NewTrust(a.bundle(), others, generation)
	if err != nil {
		a.t.Fatal(err)
	}
	return t
}

// newRoot is one more root for a bundle.
func (a *authority) newRoot() *x509.Certificate {
	key := newKey(a.t)
	return a.sign(caTemplate("another root"), nil, key.Public(), key)
}

// pod is a Source with one workload.
type pod struct {
	*authority
	id        string // what the Source says; empty: not known yet
	material  *latest.Value[*Material]
	expire    time.Time
	done      chan struct{}
	err       error
	open      func(context.Context, metadata.MD) error // may refuse
	onReport  func(Report)
	onRelease func()

	mu      sync.Mutex
	reports map[uint64][]Report
}

func newPod(t testing.TB) *pod {
	return &pod{
		authority: newAuthority(t, td), id: ownID, material: &latest.Value[*Material]{},
		done: make(chan struct{}), reports: map[uint64][]Report{},
	}
}

// set makes what the workload has: a fresh identity and trust of that generation.
func (p *pod) set(generation uint64) *Material {
	m := &Material{Identity: p.identity(ownID), Trust: p.trust(generation)}
	p.material.Set(m)
	return m
}

func (p *pod) Open(ctx context.Context, md metadata.MD) (*Workload, error) {
	if p.open != nil {
		if err := p.open(ctx, md); err != nil {
			return nil, err
		}
	}
	w := &Workload{
		Name: "prod/payments", Material: p.material, ExpireAt: p.expire, Done: p.done,
		Err: func() error { return p.err }, Release: p.onRelease,
		Report: func(r Report) {
			if p.onReport != nil {
				p.onReport(r)
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			p.reports[r.Stream] = append(p.reports[r.Stream], r)
		},
	}
	if p.id != "" {
		w.ID = spiffeid.RequireFromString(p.id)
	}
	return w, nil
}

// last returns the last report of a stream.
func (p *pod) last(stream uint64) Report {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.reports[stream]
	if len(r) == 0 {
		return Report{}
	}
	return r[len(r)-1]
}

// world is a gRPC server with SDS and a connection to it, over memory.
type world struct {
	t      testing.TB
	srv    *Server
	client secret.SecretDiscoveryServiceClient
	close  func()
}

func newWorld(t testing.TB, cfg Config, dial ...grpc.DialOption) *world {
	t.Helper()
	w := &world{t: t, srv: New(cfg)}
	lis := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	w.srv.Register(g)
	var wg sync.WaitGroup
	wg.Go(func() { g.Serve(lis) })
	conn, err := grpc.NewClient("passthrough:///sds", append(dial,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	w.client = secret.NewSecretDiscoveryServiceClient(conn)
	w.close = func() {
		w.srv.Close()
		conn.Close()
		g.Stop()
		wg.Wait()
	}
	return w
}

// bubble runs f with a pod and its server in fake time. A goroutine that outlives the server fails the test.
func bubble(t *testing.T, cfg Config, f func(t *testing.T, p *pod, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		p := newPod(t)
		cfg.Source = p
		w := newWorld(t, cfg)
		defer w.close()
		f(t, p, w)
	})
}

// got is one response of either protocol.
type got struct {
	nonce, version string
	names          []string // in order
	secrets        map[string]*tls.Secret
	versions       map[string]string // by name; delta only
}

// peer is the client's side of a stream of either protocol. What arrives is collected by a goroutine of its own.
type peer struct {
	t        testing.TB
	protocol string
	names    []string // what SotW repeats
	send     func(nonce string, nack *string, add, drop []string, held map[string]string) error
	cancel   func()

	mu   sync.Mutex
	in   []got
	err  error
	done bool
}

func (w *world) stream(protocol string) *peer {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	p := &peer{t: w.t, protocol: protocol, cancel: cancel}
	node := &core.Node{Id: "envoy-1"}
	var recv func() (got, error)
	if protocol == ProtocolSotW {
		s, err := w.client.StreamSecrets(ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		p.send = func(nonce string, nack *string, add, drop []string, _ map[string]string) error {
			p.names = slices.DeleteFunc(p.names, func(n string) bool { return slices.Contains(drop, n) })
			p.names = append(p.names, add...)
			return s.Send(&discovery.DiscoveryRequest{Node: node, ResourceNames: p.names, TypeUrl: TypeURL, ResponseNonce: nonce, ErrorDetail: detail(nack)})
		}
		recv = func() (got, error) {
			r, err := s.Recv()
			if err != nil {
				return got{}, err
			}
			g := got{nonce: r.GetNonce(), version: r.GetVersionInfo(), secrets: map[string]*tls.Secret{}}
			for _, a := range r.GetResources() {
				g.add(w.t, a.GetTypeUrl(), a.GetValue())
			}
			return g, nil
		}
	} else {
		s, err := w.client.DeltaSecrets(ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		p.send = func(nonce string, nack *string, add, drop []string, held map[string]string) error {
			return s.Send(&discovery.DeltaDiscoveryRequest{Node: node, TypeUrl: TypeURL, ResponseNonce: nonce, ErrorDetail: detail(nack),
				ResourceNamesSubscribe: add, ResourceNamesUnsubscribe: drop, InitialResourceVersions: held})
		}
		recv = func() (got, error) {
			r, err := s.Recv()
			if err != nil {
				return got{}, err
			}
			g := got{nonce: r.GetNonce(), secrets: map[string]*tls.Secret{}, versions: map[string]string{}}
			for _, res := range r.GetResources() {
				if name := g.add(w.t, res.GetResource().GetTypeUrl(), res.GetResource().GetValue()); name != res.GetName() {
					w.t.Errorf("resource %q holds the secret %q", res.GetName(), name)
				}
				g.versions[res.GetName()] = res.GetVersion()
				g.version = res.GetVersion()
			}
			return g, nil
		}
	}
	go func() {
		for {
			g, err := recv()
			p.mu.Lock()
			if err != nil {
				p.err, p.done = err, true
				p.mu.Unlock()
				return
			}
			p.in = append(p.in, g)
			p.mu.Unlock()
		}
	}()
	return p
}

func detail(nack *string) *rpcstatus.Status {
	if nack == nil {
		return nil
	}
	return &rpcstatus.Status{Code: 13, Message: *nack}
}

func (g *got) add(t testing.TB, kind string, value []byte) string {
	s := &tls.Secret{}
	if err := proto.Unmarshal(value, s); err != nil || kind != TypeURL {
		t.Errorf("resource of type %q: %v", kind, err)
	}
	g.names = append(g.names, s.GetName())
	g.secrets[s.GetName()] = s
	return s.GetName()
}

func (p *peer) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
	synctest.Wait()
}

// ask subscribes to names, without answering anything. To be used in a bubble, as all that follows.
func (p *peer) ask(names ...string) { p.t.Helper(); p.must(p.send("", nil, names, nil, nil)) }

func (p *peer) ack(g got)               { p.t.Helper(); p.must(p.send(g.nonce, nil, nil, nil, nil)) }
func (p *peer) nack(g got, text string) { p.t.Helper(); p.must(p.send(g.nonce, &text, nil, nil, nil)) }

// next returns the one response that has come since it was called last.
func (p *peer) next() got {
	p.t.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.in) != 1 {
		p.t.Fatalf("%d responses came, want 1 (stream: %v)", len(p.in), p.err)
	}
	g := p.in[0]
	p.in = nil
	return g
}

// quiet checks that nothing has come and that the stream is still open.
func (p *peer) quiet() {
	p.t.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.in) > 0 || p.done {
		p.t.Fatalf("%d responses came and the stream's end is %v, want an open stream and nothing", len(p.in), p.err)
	}
}

// ended checks that the stream was ended for a reason.
func (p *peer) ended(want api.Reason) {
	p.t.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.done {
		p.t.Fatalf("the stream is open, want it ended with %s", want)
	}
	wantReason(p.t, p.err, want)
}

func wantReason(t testing.TB, err error, want api.Reason) {
	t.Helper()
	if e := api.FromStatus(err); err == nil || api.ReasonOf(e) != want {
		t.Fatalf("error = %v, want %s", err, want)
	}
	if e := api.AsError(api.FromStatus(err)); e.CorrelationID == "" {
		t.Errorf("error %v has no correlation id", err)
	}
}

// both runs f for each streaming protocol.
func both(t *testing.T, cfg Config, f func(t *testing.T, protocol string, p *pod, w *world)) {
	t.Helper()
	for _, protocol := range []string{ProtocolSotW, ProtocolDelta} {
		t.Run(protocol, func(t *testing.T) {
			bubble(t, cfg, func(t *testing.T, p *pod, w *world) { f(t, protocol, p, w) })
		})
	}
}
