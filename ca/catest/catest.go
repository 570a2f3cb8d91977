// Package catest is a real CA in memory, for the tests of whoever talks to one: the real record in a bolt file, a real
// ledger, a real root, a real issuer of tokens, and gRPC over TLS, all without a socket, so that it also works in the fake
// time of a testing/synctest bubble.
package catest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/ca/upstream"
	"github.com/signet-ca/signet/internal/audit"
)

// Names that a Server uses.
const (
	TrustDomain = "example.org"
	IssuerName  = "https://kubernetes.default.svc.test"
	Replica     = "ca-0"
	AgentNS     = "signet-system"
	AgentSA     = "signet-agent"
)

// Options change what a Server is made of. The zero Options are good.
type Options struct {
	Policy ca.PolicyFile       // zero: all namespaces, one hour
	Root   time.Duration       // life of each root. Zero: ten years
	Config func(*ca.Config)    // changes the configuration last; nil: nothing
	Server []grpc.ServerOption // of the agents' port; they come last
	Log    io.Writer           // nil: discarded

	Services func(grpc.ServiceRegistrar) // registers more on the agents' port; nil: none
}

// Server is a CA that runs. Stop and Start end it and bring it back with the same record, as a restart does.
type Server struct {
	TD     spiffeid.TrustDomain
	Tokens *attestortest.Issuer
	Pods   *Directory
	Dir    string // of the store and the ledger

	t       testing.TB
	options Options
	sealer  *ca.Sealer

	mu        sync.Mutex
	ca        *ca.CA
	listener  *bufconn.Listener
	operators *bufconn.Listener
	stop      func(kill bool)
}

// New makes the root of a trust domain and starts its CA, which ends with the test.
func New(t testing.TB, o Options) *Server {
	t.Helper()
	sealer, err := ca.NewSealer(ca.NewSealKey())
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := attestortest.NewIssuer(attestortest.Config{Issuer: IssuerName})
	if err != nil {
		t.Fatal(err)
	}
	if o.Policy.Namespaces == nil {
		o.Policy.Namespaces = []string{"*"}
	}
	s := &Server{
		TD:      spiffeid.RequireTrustDomainFromString(TrustDomain),
		Tokens:  tokens,
		Pods:    NewDirectory(),
		Dir:     tempDir(t),
		t:       t,
		options: o,
		sealer:  sealer,
	}
	st, closeStore, err := store.Open(t.Context(), s.storeConfig(), true)
	if err != nil {
		t.Fatal(err)
	}
	up, err := upstream.Open(upstream.Config{TTL: o.Root}, upstream.Parts{Sealer: sealer})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Init(t.Context(), s.TD, st, up.(ca.Founder), nil, sealer); err != nil {
		t.Fatal(err)
	}
	if err := closeStore(); err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(s.Stop)
	return s
}

// tempDir returns a folder on a tmpfs where there is one: what is proven here is not the disk, and fsync is its price.
func tempDir(t testing.TB) string {
	if dir, err := os.MkdirTemp("/dev/shm", "signet-test-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	return t.TempDir()
}

func (s *Server) storeConfig() store.Config {
	return store.Config{Kind: "bolt", Path: filepath.Join(s.Dir, "signet.db")}
}

// Start starts the CA from its record.
func (s *Server) Start() {
	s.t.Helper()
	st, closeStore, err := store.Open(s.t.Context(), s.storeConfig(), false)
	if err != nil {
		s.t.Fatal(err)
	}
	ledger, err := audit.Open(filepath.Join(s.Dir, "ledger"), audit.Options{SegmentSize: audit.MinSegment, RefusalBytes: audit.MinRefusals})
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := ca.New(s.config(st, ledger))
	if err != nil {
		s.t.Fatal(err)
	}
	l, people := bufconn.Listen(256<<10), bufconn.Listen(256<<10)
	server, operators := c.NewServer(s.options.Server...), c.NewOperatorsServer()
	if s.options.Services != nil {
		s.options.Services(c.Guard(server))
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.Run(ctx); err != nil {
			s.t.Errorf("the CA ended: %v", err)
		}
	})
	wg.Go(func() { server.Serve(l) })
	wg.Go(func() { operators.Serve(people) })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ca, s.listener, s.operators = c, l, people
	var once sync.Once
	s.stop = func(kill bool) {
		once.Do(func() {
			if kill {
				server.Stop()
				operators.Stop()
			}
			cancel()
			force := time.AfterFunc(5*time.Second, func() { server.Stop(); operators.Stop() })
			defer force.Stop()
			server.GracefulStop()
			operators.GracefulStop()
			wg.Wait()
			ledger.Close()
			closeStore()
		})
	}
}

func (s *Server) config(st ca.Store, ledger *audit.Log) ca.Config {
	up, err := upstream.Open(upstream.Config{TTL: s.options.Root}, upstream.Parts{Sealer: s.sealer})
	if err != nil {
		s.t.Fatal(err)
	}
	policy, err := ca.NewPolicy(s.options.Policy, s.TD, true)
	if err != nil {
		s.t.Fatal(err)
	}
	keys, err := attestor.StaticKeys(s.Tokens.JWKS())
	if err != nil {
		s.t.Fatal(err)
	}
	verifier, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{IssuerName: keys}})
	if err != nil {
		s.t.Fatal(err)
	}
	cfg := ca.Config{
		TrustDomain: s.TD, Replica: Replica, Version: "test",
		Store: st, Upstream: up, Sealer: s.sealer, Ledger: ledger, Archive: ledger, Directory: s.Pods, Policy: policy,
		Attestors: map[string]attestor.Attestor{api.EvidenceServiceAccount: verifier},
		KeySets:   map[string]ca.KeySets{IssuerName: fixedKeys(s.Tokens.JWKS())},
		Operators: ca.OperatorRule{Attestor: verifier, Issuers: []string{IssuerName}},
	}
	if s.options.Log != nil {
		cfg.Log = slog.New(slog.NewTextHandler(s.options.Log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if s.options.Config != nil {
		s.options.Config(&cfg)
	}
	return cfg
}

// fixedKeys is a ca.KeySets that never changes.
type fixedKeys []byte

// Snapshot implements ca.KeySets.
func (k fixedKeys) Snapshot() ([]byte, <-chan struct{}) { return k, nil }

// Stop ends the CA as SIGTERM does and waits for its end; connections to it break.
func (s *Server) Stop() { s.end(false) }

// Kill ends the CA as SIGKILL does, as far as others can see it: every connection breaks without a word.
func (s *Server) Kill() { s.end(true) }

func (s *Server) end(kill bool) {
	s.mu.Lock()
	stop := s.stop
	s.listener, s.operators = nil, nil
	s.mu.Unlock()
	stop(kill)
}

// CA returns the running CA.
func (s *Server) CA() *ca.CA {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ca
}

// Dial connects to the CA as an agent does; it fails while the CA is stopped.
func (s *Server) Dial(ctx context.Context) (net.Conn, error) {
	return s.dial(ctx, func() *bufconn.Listener { return s.listener })
}

// DialOperators connects to the operators' port; it fails while the CA is stopped.
func (s *Server) DialOperators(ctx context.Context) (net.Conn, error) {
	return s.dial(ctx, func() *bufconn.Listener { return s.operators })
}

func (s *Server) dial(ctx context.Context, of func() *bufconn.Listener) (net.Conn, error) {
	s.mu.Lock()
	l := of()
	s.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("connection refused")
	}
	return l.DialContext(ctx)
}

// WaitReady waits until the CA can issue.
func (s *Server) WaitReady() {
	s.t.Helper()
	for range 6000 { // of ten milliseconds
		if len(s.CA().NotReady()) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.t.Fatalf("the CA is not ready: %v", s.CA().NotReady())
}

// AsUser are the credentials of an admin channel in memory on whose other side that user is.
func AsUser(uid int) grpc.ServerOption {
	return grpc.Creds(user{insecure.NewCredentials(), uid})
}

type user struct {
	credentials.TransportCredentials
	uid int
}

type userInfo struct {
	credentials.AuthInfo
	uid int
}

// UserID implements ca.LocalUser.
func (u userInfo) UserID() int { return u.uid }

// ServerHandshake implements credentials.TransportCredentials.
func (u user) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := u.TransportCredentials.ServerHandshake(raw)
	return conn, userInfo{info, u.uid}, err
}

// Clone implements credentials.TransportCredentials.
func (u user) Clone() credentials.TransportCredentials {
	return user{u.TransportCredentials.Clone(), u.uid}
}

// Pod makes a pod that lives.
func (s *Server) Pod(namespace, name, serviceAccount, node string) attestortest.Pod {
	p := attestortest.NewPod(namespace, name, serviceAccount, node)
	s.Pods.Add(p)
	return p
}

// AgentPod makes the pod of the agent of a node.
func (s *Server) AgentPod(node string) attestortest.Pod {
	return s.Pod(AgentNS, "signet-agent-"+node, AgentSA, node)
}

// Evidence returns a fresh token of a pod.
func (s *Server) Evidence(p attestortest.Pod, audience string, ttl time.Duration, change ...func(*attestortest.Draft)) attestor.Evidence {
	s.t.Helper()
	token, err := s.Tokens.Token(p, audience, ttl, change...)
	if err != nil {
		s.t.Fatal(err)
	}
	return attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(token)}
}

// Person returns a token as the API server gives it to a person who asks for one of a ServiceAccount.
func (s *Server) Person(namespace, serviceAccount string, ttl time.Duration, change ...func(*attestortest.Draft)) string {
	s.t.Helper()
	p := attestortest.NewPod(namespace, "", serviceAccount, "")
	token, err := s.Tokens.Token(p, api.AdminAudience(s.TD), ttl, append([]func(*attestortest.Draft){attestortest.Unbound}, change...)...)
	if err != nil {
		s.t.Fatal(err)
	}
	return token
}

// BreakGlass makes a break-glass certificate and its key; change may alter the template.
func BreakGlass(t testing.TB, td spiffeid.TrustDomain, name string, change ...func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, err := api.AdminID(td, name)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour), URIs: []*url.URL{id.URL()},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	for _, c := range change {
		c(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// Directory is a ca.Directory in memory, and remembers what it knew when it began to fail.
type Directory struct {
	mu   sync.Mutex
	pods map[string]ca.Pod
	gone map[string]bool // by UID: were removed
	ends map[string]bool // nodes that were, by UID
	err  error

	lost      time.Time         // when it began to fail
	remembers map[string]ca.Pod // what was there then
	buried    map[string]bool   // what was gone then
}

// NewDirectory returns a directory without pods.
func NewDirectory() *Directory {
	return &Directory{pods: map[string]ca.Pod{}, gone: map[string]bool{}, ends: map[string]bool{}}
}

var (
	_ ca.Rememberer  = (*Directory)(nil)
	_ ca.NodeWatcher = (*Directory)(nil)
)

// Seen implements ca.Rememberer: everything is seen while it does not fail.
func (d *Directory) Seen(string) (time.Time, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return d.lost, false
	}
	return time.Now(), true
}

// Recall implements ca.Rememberer.
func (d *Directory) Recall(id ca.PodID) (ca.Pod, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, ok := d.remembers[id.UID]
	switch {
	case d.buried[id.UID]:
		return ca.Pod{}, api.E(api.PodDeleted, "the pod is deleted")
	case !ok || p.Issuer != id.Issuer:
		return ca.Pod{}, api.E(api.DirectoryUnavailable, "the pod was not known when the cluster was last seen")
	}
	return p, nil
}

// Pod implements ca.Directory.
func (d *Directory) Pod(_ context.Context, id ca.PodID) (ca.Pod, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return ca.Pod{}, d.err
	}
	p, ok := d.pods[id.UID]
	if !ok || p.Issuer != id.Issuer {
		return ca.Pod{}, api.E(api.PodUnknown, "the pod is not known")
	}
	if d.ends[p.NodeUID] {
		return ca.Pod{}, api.E(api.PodMismatch, "the pod's node is gone")
	}
	return p, nil
}

// NodeGone implements ca.NodeWatcher: everything is seen while it does not fail.
func (d *Directory) NodeGone(n ca.NodeID) (upTo time.Time, gone bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return time.Time{}, false
	}
	return time.Now(), d.ends[n.UID]
}

// RemoveNode makes the node of a pod gone. The pods on it are there for as long as Remove is not called.
func (d *Directory) RemoveNode(p attestortest.Pod) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ends[p.NodeUID] = true
}

// FindNodes implements ca.NodeFinder: there are the nodes on which pods live.
func (d *Directory) FindNodes(nameOrUID string) []ca.NodeID {
	d.mu.Lock()
	defer d.mu.Unlock()
	var found []ca.NodeID
	for _, p := range d.pods {
		n := ca.NodeID{Issuer: p.Issuer, UID: p.NodeUID, Name: p.NodeName}
		if (n.Name == nameOrUID || n.UID == nameOrUID) && !slices.Contains(found, n) {
			found = append(found, n)
		}
	}
	return found
}

// Add makes a pod live.
func (d *Directory) Add(p attestortest.Pod) {
	d.Change(p, func(live *ca.Pod) {
		*live = ca.Pod{
			Issuer: IssuerName, Namespace: p.Namespace, Name: p.Name, UID: p.UID,
			ServiceAccount: p.ServiceAccount, ServiceAccountUID: p.ServiceAccountUID, NodeName: p.NodeName, NodeUID: p.NodeUID,
		}
	})
}

// Change changes what is known of a pod.
func (d *Directory) Change(p attestortest.Pod, f func(*ca.Pod)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	live := d.pods[p.UID]
	f(&live)
	d.pods[p.UID] = live
}

// Remove makes a pod gone.
func (d *Directory) Remove(p attestortest.Pod) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.pods, p.UID)
	d.gone[p.UID] = true
}

// Fail makes every question fail with err; nil ends it. What is added, changed or removed meanwhile is seen only then.
func (d *Directory) Fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil && d.err == nil {
		d.lost, d.remembers, d.buried = time.Now(), maps.Clone(d.pods), maps.Clone(d.gone)
	}
	d.err = err
}

// Lose makes it see nothing any more, as when the API server is away, until Fail(nil).
func (d *Directory) Lose() {
	d.Fail(api.E(api.DirectoryUnavailable, "the cluster cannot be seen now"))
}
