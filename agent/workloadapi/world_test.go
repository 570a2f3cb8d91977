package workloadapi

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"maps"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/canary"
	"github.com/signet-ca/signet/internal/latest"
)

const (
	td    = "example.org"
	ownID = "spiffe://example.org/ns/prod/sa/payments"
	alsID = "spiffe://example.org/ns/prod/sa/payments-admin"
)

// authority is a root with one intermediate, in memory.
type authority struct {
	t               testing.TB
	td              spiffeid.TrustDomain
	root, inter     *x509.Certificate
	rootKey, intKey *ecdsa.PrivateKey
	serial          int64
}

func newAuthority(t testing.TB, td string) *authority {
	t.Helper()
	a := &authority{t: t, td: spiffeid.RequireTrustDomainFromString(td), serial: 1 << 40}
	a.rootKey, a.intKey = newKey(t), newKey(t)
	a.root = a.sign(caTemplate("root of "+td), nil, a.rootKey.Public(), a.rootKey)
	a.inter = a.sign(caTemplate("intermediate of "+td), a.root, a.intKey.Public(), a.rootKey)
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

// sign signs tmpl, under a serial number and validity of its own; a nil parent makes it self-signed.
func (a *authority) sign(tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	a.t.Helper()
	a.serial++
	tmpl.SerialNumber = big.NewInt(a.serial)
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
	u, err := url.Parse(id)
	if err != nil {
		a.t.Fatal(err)
	}
	key := newKey(a.t)
	tmpl := &x509.Certificate{
		URIs: []*url.URL{u}, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, f := range change {
		f(tmpl)
	}
	leaf := a.sign(tmpl, a.inter, key.Public(), a.intKey)
	return &x509svid.SVID{ID: spiffeid.RequireFromString(id), Certificates: []*x509.Certificate{leaf, a.inter}, PrivateKey: key}
}

func (a *authority) bundle(more ...*x509.Certificate) *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(a.td, append([]*x509.Certificate{a.root}, more...))
}

// newRoot is one more root for a bundle.
func (a *authority) newRoot() *x509.Certificate {
	key := newKey(a.t)
	return a.sign(caTemplate("another root"), nil, key.Public(), key)
}

// pod is what a workload has, and what was reported of its streams.
type pod struct {
	*authority
	latest.Value[*Snapshot]

	mu         sync.Mutex
	deliveries map[uint64][]Delivery
	opened     int
	refused    map[api.Reason]int
	closed     map[api.Reason]int
}

func newPod(t testing.TB) *pod {
	return &pod{authority: newAuthority(t, td), deliveries: map[uint64][]Delivery{}, refused: map[api.Reason]int{}, closed: map[api.Reason]int{}}
}

// give sets a fresh SVID and the bundle of that generation.
func (p *pod) give(generation uint64, roots ...*x509.Certificate) *Snapshot {
	s := &Snapshot{SVIDs: []*x509svid.SVID{p.svid(ownID)}, Bundle: p.bundle(roots...), Generation: generation}
	p.Set(s)
	return s
}

// change sets what f makes of the newest snapshot.
func (p *pod) change(f func(*Snapshot)) {
	s := *p.Load()
	f(&s)
	p.Set(&s)
}

// config is cfg with p as Source and as listener.
func (p *pod) config(cfg Config) Config {
	if cfg.Source == nil {
		cfg.Source = p
	}
	cfg.Name = "prod/payments"
	if cfg.Delivered == nil {
		cfg.Delivered = func(d Delivery) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.deliveries[d.Stream] = append(p.deliveries[d.Stream], d)
		}
	}
	if cfg.Hooks.Opened == nil {
		cfg.Hooks.Opened = func(string) { p.mu.Lock(); p.opened++; p.mu.Unlock() }
	}
	cfg.Hooks.Refused = func(_ string, r api.Reason) { p.mu.Lock(); p.refused[r]++; p.mu.Unlock() }
	cfg.Hooks.Closed = func(_ string, r api.Reason) { p.mu.Lock(); p.closed[r]++; p.mu.Unlock() }
	return cfg
}

// last returns the last delivery of a stream.
func (p *pod) last(stream uint64) Delivery {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.deliveries[stream]; len(d) > 0 {
		return d[len(d)-1]
	}
	return Delivery{}
}

// all returns every delivery of a stream.
func (p *pod) all(stream uint64) []Delivery {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.deliveries[stream])
}

// told returns how many streams were told of.
func (p *pod) told() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.deliveries)
}

// opens, ends and refusals return how many streams were let in, how those that have ended did, and why others were not.
func (p *pod) opens() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.opened
}

func (p *pod) ends() map[api.Reason]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.closed)
}

func (p *pod) refusals() map[api.Reason]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.refused)
}

// world is a socket over memory and a connection to it.
type world struct {
	t    testing.TB
	srv  *Server
	lis  *bufconn.Listener
	conn *grpc.ClientConn
	api  workload.SpiffeWorkloadAPIClient
	stop func() // ends the socket and waits for it
}

// bubble runs f with a pod and its socket in fake time. A goroutine that outlives the socket fails the test.
func bubble(t *testing.T, cfg Config, f func(t *testing.T, p *pod, w *world), beside ...Service) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p := newPod(t)
		w := &world{t: t, srv: New(p.config(cfg)), lis: bufconn.Listen(64 << 10)}
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := w.srv.Serve(ctx, w.lis, beside...); err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
		w.stop = func() { cancel(); wg.Wait() }
		w.conn = w.dial()
		w.api = workload.NewSpiffeWorkloadAPIClient(w.conn)
		defer func() {
			w.conn.Close()
			w.stop()
		}()
		f(t, p, w)
	})
}

// streams returns how many streams the socket counts.
func (w *world) streams() int {
	w.srv.mu.Lock()
	defer w.srv.mu.Unlock()
	return w.srv.streams
}

func (w *world) dial(opts ...grpc.DialOption) *grpc.ClientConn {
	w.t.Helper()
	c, err := grpc.NewClient("passthrough:///workload", append(opts,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.lis.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// header is a context with the header that the specification demands.
func header(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// reader is the client's side of a call. What arrives is collected by a goroutine of its own.
type reader[T any] struct {
	t      testing.TB
	cancel func()

	mu  sync.Mutex
	in  []*T
	err error
}

func read[T any](t testing.TB, open func(ctx context.Context) (grpc.ServerStreamingClient[T], error)) *reader[T] {
	t.Helper()
	ctx, cancel := context.WithCancel(header(context.Background()))
	r := &reader[T]{t: t, cancel: cancel}
	s, err := open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			m, err := s.Recv()
			r.mu.Lock()
			if err != nil {
				r.err = err
				r.mu.Unlock()
				return
			}
			r.in = append(r.in, m)
			r.mu.Unlock()
		}
	}()
	return r
}

func (w *world) svids() *reader[workload.X509SVIDResponse] {
	return read(w.t, func(ctx context.Context) (grpc.ServerStreamingClient[workload.X509SVIDResponse], error) {
		return w.api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	})
}

func (w *world) bundles() *reader[workload.X509BundlesResponse] {
	return read(w.t, func(ctx context.Context) (grpc.ServerStreamingClient[workload.X509BundlesResponse], error) {
		return w.api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	})
}

// next returns the one message that has arrived; it takes no time to arrive.
func (r *reader[T]) next() *T {
	r.t.Helper()
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.in) != 1 || r.err != nil {
		r.t.Fatalf("%d messages and error %v, want one message", len(r.in), r.err)
	}
	m := r.in[0]
	r.in = nil
	return m
}

// silent checks that nothing has arrived and the stream is open.
func (r *reader[T]) silent() {
	r.t.Helper()
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.in) != 0 || r.err != nil {
		r.t.Fatalf("%d messages and error %v, want an open stream with none", len(r.in), r.err)
	}
}

// ends checks that the stream has ended with that code and reason.
func (r *reader[T]) ends(code codes.Code, reason api.Reason) {
	r.t.Helper()
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.t.Fatalf("the stream is open, want %s, %s", code, reason)
	}
	wantError(r.t, "stream", r.err, code, reason)
}

func wantError(t testing.TB, what string, err error, code codes.Code, reason api.Reason) {
	t.Helper()
	if status.Code(err) != code || api.ReasonOf(api.FromStatus(err)) != reason {
		t.Errorf("%s: error %v (%s), want code %s, reason %s", what, err, api.ReasonOf(api.FromStatus(err)), code, reason)
	}
}

// parse returns the SVIDs of a response as a client reads them, each checked against the bundle that came with it.
func parse(t testing.TB, m *workload.X509SVIDResponse) []*x509svid.SVID {
	t.Helper()
	var all []*x509svid.SVID
	for _, s := range m.GetSvids() {
		svid, err := x509svid.ParseRaw(s.GetX509Svid(), s.GetX509SvidKey())
		if err != nil {
			t.Fatal(err)
		}
		if svid.ID.String() != s.GetSpiffeId() {
			t.Errorf("an SVID of %s is called %s", svid.ID, s.GetSpiffeId())
		}
		bundle, err := x509bundle.ParseRaw(svid.ID.TrustDomain(), s.GetBundle())
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := x509svid.Verify(svid.Certificates, bundle); err != nil {
			t.Errorf("the SVID does not verify under its bundle: %v", err)
		}
		all = append(all, svid)
	}
	return all
}
