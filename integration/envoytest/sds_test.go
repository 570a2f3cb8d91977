//go:build envoy

package envoytest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-ca/signet/internal/envoy"
)

// authority is a trust domain in memory, and the smallest SDS server that real Envoys accept: the token of a stream is
// the SPIFFE ID that it gets. It tells faults of the bootstraps apart from faults of Signet.
type authority struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	socket string
	td     spiffeid.TrustDomain
	root   *x509.Certificate
	key    *ecdsa.PrivateKey

	mu      sync.Mutex
	version int
	changed chan struct{}
	acks    map[string]int // by "protocol secret"
	nacks   []string
}

func newAuthority(t *testing.T, td spiffeid.TrustDomain) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{
		socket: filepath.Join(t.TempDir(), "sds"), td: td, root: root, key: key,
		version: 1, changed: make(chan struct{}), acks: map[string]int{},
	}
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	secretv3.RegisterSecretDiscoveryServiceServer(srv, a)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	t.Cleanup(func() { srv.Stop(); wg.Wait() })
	return a
}

// rotate gives every stream a new SVID.
func (a *authority) rotate() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.version++
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *authority) state() (int, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.version, a.changed
}

func (a *authority) answered(what string, failure string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if failure != "" {
		a.nacks = append(a.nacks, what+": "+failure)
		return
	}
	a.acks[what]++
}

func (a *authority) secret(name string, id spiffeid.ID) (*anypb.Any, error) {
	rootPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.root.Raw})
	if name != "default" {
		validator, err := anypb.New(&tlsv3.SPIFFECertValidatorConfig{TrustDomains: []*tlsv3.SPIFFECertValidatorConfig_TrustDomain{{
			Name: a.td.Name(), TrustBundle: inline(rootPEM),
		}}})
		if err != nil {
			return nil, err
		}
		return anypb.New(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: "envoy.tls.cert_validator.spiffe", TypedConfig: validator},
		}}})
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 150))
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{id.URL()},
	}, a.root, &key.PublicKey, a.key)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return anypb.New(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		PrivateKey:       inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})),
	}}})
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// caller reads the SPIFFE ID from the token of a stream.
func caller(ctx context.Context) (spiffeid.ID, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	if len(values) != 1 || len(values[0]) < 8 || values[0][:7] != "Bearer " {
		return spiffeid.ID{}, status.Errorf(codes.Unauthenticated, "authorization: %q", values)
	}
	return spiffeid.FromString(values[0][7:])
}

func (a *authority) StreamSecrets(s secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	id, err := caller(s.Context())
	if err != nil {
		return err
	}
	var names []string
	send := func() error {
		v, _ := a.state()
		resp := &discoveryv3.DiscoveryResponse{TypeUrl: envoy.SecretType, VersionInfo: fmt.Sprint(v), Nonce: fmt.Sprint(v)}
		for _, n := range names {
			secret, err := a.secret(n, id)
			if err != nil {
				return err
			}
			resp.Resources = append(resp.Resources, secret)
		}
		return s.Send(resp)
	}
	return a.serve(s, send, func() proto.Message { return new(discoveryv3.DiscoveryRequest) }, func(m proto.Message) bool {
		req := m.(*discoveryv3.DiscoveryRequest)
		if req.GetResponseNonce() != "" {
			a.answered("state "+fmt.Sprint(req.GetResourceNames()), req.GetErrorDetail().GetMessage())
		}
		ask := !slices.Equal(names, req.GetResourceNames())
		names = req.GetResourceNames()
		return ask
	})
}

func (a *authority) DeltaSecrets(s secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	id, err := caller(s.Context())
	if err != nil {
		return err
	}
	var names []string
	send := func() error {
		v, _ := a.state()
		resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: envoy.SecretType, Nonce: fmt.Sprint(v)}
		for _, n := range names {
			secret, err := a.secret(n, id)
			if err != nil {
				return err
			}
			resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: n, Version: fmt.Sprint(v), Resource: secret})
		}
		return s.Send(resp)
	}
	return a.serve(s, send, func() proto.Message { return new(discoveryv3.DeltaDiscoveryRequest) }, func(m proto.Message) bool {
		req := m.(*discoveryv3.DeltaDiscoveryRequest)
		if req.GetResponseNonce() != "" {
			a.answered("delta "+fmt.Sprint(names), req.GetErrorDetail().GetMessage())
		}
		names = append(names, req.GetResourceNamesSubscribe()...)
		return len(req.GetResourceNamesSubscribe()) > 0
	})
}

// serve answers a stream: when handle says so, and whenever the version changes.
func (a *authority) serve(s grpc.ServerStream, send func() error, fresh func() proto.Message, handle func(proto.Message) bool) error {
	requests := make(chan proto.Message)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	wg.Go(func() {
		defer close(requests)
		for {
			m := fresh()
			if err := s.RecvMsg(m); err != nil {
				return
			}
			select {
			case requests <- m:
			case <-ctx.Done():
				return
			}
		}
	})
	for {
		_, changed := a.state()
		select {
		case m, ok := <-requests:
			if !ok {
				return nil
			}
			if !handle(m) {
				continue
			}
		case <-changed:
		}
		if err := send(); err != nil {
			return err
		}
	}
}
