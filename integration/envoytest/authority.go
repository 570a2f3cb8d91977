package envoytest

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/canary"
	"github.com/signet-ca/signet/internal/latest"
	"github.com/signet-ca/signet/sds"
)

// Authority is a trust domain in memory behind a real SDS server. It believes whoever connects: the token of a stream is
// the SPIFFE ID that it gets. It tells faults of a bootstrap or of sds apart from those of the agent and the CA.
type Authority struct {
	Domain spiffeid.TrustDomain
	Socket string // where it serves SDS

	t      testing.TB
	root   *x509.Certificate // that signs
	key    *ecdsa.PrivateKey
	roots  []*x509.Certificate // of the bundle, the newest last
	trust  *sds.Trust
	closed chan struct{}

	generation uint64 // of the bundle

	mu        sync.Mutex
	workloads map[spiffeid.ID]*latest.Value[*sds.Material]
	tokens    []string              // of all streams, in order
	streams   map[uint64]sds.Report // newest of each
}

// NewAuthority starts an Authority that ends with the test.
func NewAuthority(t testing.TB, td spiffeid.TrustDomain) *Authority {
	t.Helper()
	dir, err := os.MkdirTemp("", "sds") // shorter than a test's own folder: the path of a socket has little room
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a := &Authority{
		Domain: td, Socket: filepath.Join(dir, "sds"), t: t, closed: make(chan struct{}),
		workloads: map[spiffeid.ID]*latest.Value[*sds.Material]{}, streams: map[uint64]sds.Report{},
	}
	a.AddRoot()
	l, err := net.Listen("unix", a.Socket)
	if err != nil {
		t.Fatal(err)
	}
	secrets, server := sds.New(sds.Config{Source: a}), grpc.NewServer()
	secrets.Register(server)
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		secrets.Close()
		server.Stop()
		wg.Wait()
	})
	return a
}

// Bundle is the trust bundle.
func (a *Authority) Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(a.Domain, a.roots)
}

// AddRoot makes a root, by which is signed from now on. It comes into the bundle beside those that are there.
func (a *Authority) AddRoot() {
	a.t.Helper()
	a.root, a.key = nil, nil // by itself
	a.root, a.key = a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: fmt.Sprintf("%s %d", a.Domain, a.generation)}, IsCA: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{a.Domain.ID().URL()}, NotAfter: time.Now().Add(time.Hour),
	})
	a.publish(append(a.roots, a.root))
}

// RemoveRoots takes all roots but the newest out of the bundle.
func (a *Authority) RemoveRoots() {
	a.t.Helper()
	a.publish(a.roots[len(a.roots)-1:])
}

// publish makes these the bundle, and brings it to all streams.
func (a *Authority) publish(roots []*x509.Certificate) {
	a.t.Helper()
	a.roots = roots
	a.generation++
	trust, err := sds.NewTrust(a.Bundle(), nil, a.generation)
	if err != nil {
		a.t.Fatal(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.trust = trust
	for _, w := range a.workloads {
		if m := w.Load(); m != nil {
			w.Set(&sds.Material{Identity: m.Identity, Trust: trust})
		}
	}
}

// sign signs c with a new key, by itself while there is no root.
func (a *Authority) sign(c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		a.t.Fatal(err)
	}
	if c.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 150)); err != nil {
		a.t.Fatal(err)
	}
	c.NotBefore, c.BasicConstraintsValid = time.Now().Add(-time.Minute), true
	parent, signer := a.root, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

// SVID signs a new SVID that lives so long, for whoever takes none over SDS.
func (a *Authority) SVID(id spiffeid.ID, ttl time.Duration) *x509svid.SVID {
	a.t.Helper()
	cert, key := a.sign(&x509.Certificate{
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{id.URL()}, NotAfter: time.Now().Add(ttl),
	})
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{cert}, PrivateKey: key}
}

// Issue gives a workload a new SVID, which goes to all of its streams.
func (a *Authority) Issue(id spiffeid.ID) {
	a.t.Helper()
	identity, err := sds.NewIdentity(a.SVID(id, time.Hour))
	if err != nil {
		a.t.Fatal(err)
	}
	a.workload(id).Set(&sds.Material{Identity: identity, Trust: a.trust})
}

func (a *Authority) workload(id spiffeid.ID) *latest.Value[*sds.Material] {
	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.workloads[id]
	if w == nil {
		w = new(latest.Value[*sds.Material])
		a.workloads[id] = w
	}
	return w
}

// EndStreams ends all streams, as an agent does in time before their tokens expire.
func (a *Authority) EndStreams() {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.closed)
	a.closed = make(chan struct{})
}

// Tokens are those with which streams were opened, in order.
func (a *Authority) Tokens() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.tokens)
}

// Streams is the newest report of each stream there was, oldest stream first.
func (a *Authority) Streams() []sds.Report {
	a.mu.Lock()
	defer a.mu.Unlock()
	var list []sds.Report
	for _, n := range slices.Sorted(maps.Keys(a.streams)) {
		list = append(list, a.streams[n])
	}
	return list
}

// Open implements sds.Source. A token may carry a remark after the SPIFFE ID, behind a space.
func (a *Authority) Open(_ context.Context, md metadata.MD) (*sds.Workload, error) {
	token := strings.Join(md.Get("authorization"), ",")
	name, _, _ := strings.Cut(strings.TrimPrefix(token, "Bearer "), " ")
	id, err := spiffeid.FromString(name)
	if err != nil {
		return nil, api.E(api.TokenMalformed, "the token is not a SPIFFE ID")
	}
	material := a.workload(id)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tokens = append(a.tokens, token)
	return &sds.Workload{
		Name: id.Path(), ID: id, Material: material, Done: a.closed,
		Err: func() error { return api.E(api.ReauthRequired, "come again") },
		Report: func(r sds.Report) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.streams[r.Stream] = r
		},
	}, nil
}
