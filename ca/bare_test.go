package ca_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"math/big"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

// bare is a CA whose store, root and ledger are the test's own, to be made to fail. It serves nobody but the admin
// service, which tells what it signs with.
type bare struct {
	t        *testing.T
	td       spiffeid.TrustDomain
	store    *memoryStore
	upstream *testUpstream
	ledger   *memoryLedger
	config   ca.Config

	ca    *ca.CA
	admin apiv1.AdminClient
	ended chan error // what Run returned
	stop  context.CancelFunc
}

func newBare(t *testing.T, change func(*ca.Config)) *bare {
	t.Helper()
	b := &bare{t: t, td: spiffeid.RequireTrustDomainFromString("example.org"), ledger: newMemoryLedger()}
	key := newKey(t)
	root, err := issuance.NewRoot(b.td, key, 10*365*24*time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	j, err := journal.New(b.td, journal.Authority{ID: hex.EncodeToString(root.SubjectKeyId), Certificate: root.Raw})
	if err != nil {
		t.Fatal(err)
	}
	b.store = &memoryStore{journal: j}
	b.upstream = &testUpstream{root: root, key: key}
	policy, err := ca.NewPolicy(ca.PolicyFile{Namespaces: []string{"*"}}, b.td, false)
	if err != nil {
		t.Fatal(err)
	}
	b.config = ca.Config{
		TrustDomain: b.td, Replica: "ca-0", Store: b.store, Upstream: b.upstream, Ledger: b.ledger, Policy: policy,
		Attestors: map[string]attestor.Attestor{api.EvidenceServiceAccount: nobody{}},
	}
	if change != nil {
		change(&b.config)
	}
	return b
}

// nobody is an attestor that believes nobody.
type nobody struct{}

// Attest implements attestor.Attestor.
func (nobody) Attest(context.Context, attestor.Evidence, string, time.Time) (attestor.Claims, error) {
	return attestor.Claims{}, api.E(api.TokenSignature, "nobody is believed")
}

// start starts the CA; the test that started it in a bubble ends it.
func (b *bare) start() {
	b.t.Helper()
	c, err := ca.New(b.config)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	b.ca, b.stop, b.ended = c, cancel, ended
	b.admin = adminOf(b.t, c)
	synctest.Wait()
}

// restart ends the CA and starts another one over the same record.
func (b *bare) restart() {
	b.t.Helper()
	b.stop()
	if err := <-b.ended; err != nil {
		b.t.Fatalf("the CA ended with %v", err)
	}
	b.start()
}

// intermediate returns what the CA signs with; nil for nothing.
func (b *bare) intermediate() *x509.Certificate {
	b.t.Helper()
	resp, err := b.admin.ListAuthorities(b.t.Context(), &apiv1.ListAuthoritiesRequest{})
	if err != nil {
		b.t.Fatal(err)
	}
	for _, a := range resp.GetAuthorities() {
		if a.GetKind() == "intermediate" {
			c, err := x509.ParseCertificate(a.GetCertificate())
			if err != nil {
				b.t.Fatal(err)
			}
			return c
		}
	}
	return nil
}

// testUpstream is a root whose key the test has. Mint does as the real one does unless instead is set.
type testUpstream struct {
	root *x509.Certificate
	key  crypto.Signer

	mu      sync.Mutex
	instead func(context.Context, ca.MintRequest) ([]*x509.Certificate, error)
	asked   []ca.MintRequest
	down    error // what Probe says

	roots chan []*x509.Certificate // what WatchRoots tells; made by the test
}

// Mint implements ca.Upstream.
func (u *testUpstream) Mint(ctx context.Context, r ca.MintRequest) ([]*x509.Certificate, error) {
	u.mu.Lock()
	u.asked = append(u.asked, r)
	instead := u.instead
	u.mu.Unlock()
	if instead != nil {
		return instead(ctx, r)
	}
	return u.mint(r)
}

func (u *testUpstream) mint(r ca.MintRequest) ([]*x509.Certificate, error) {
	pub, err := issuance.ParseIntermediateCSR(r.CSR, r.TrustDomain)
	if err != nil {
		return nil, err
	}
	c, err := issuance.SignIntermediate(u.root, u.key, issuance.IntermediateRequest{
		TrustDomain: r.TrustDomain, PublicKey: pub, NotAfter: r.NotAfter, ExcludeNames: r.ExcludeNames,
	}, time.Now())
	return []*x509.Certificate{c}, err
}

// WatchRoots implements ca.Upstream: it tells what comes from roots.
func (u *testUpstream) WatchRoots(ctx context.Context, tell func([]*x509.Certificate)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case roots, ok := <-u.roots:
			if !ok {
				return errors.New("connection reset")
			}
			tell(roots)
		}
	}
}

// Probe implements ca.Upstream.
func (u *testUpstream) Probe(context.Context, spiffeid.TrustDomain, journal.Authority) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.down
}

func (u *testUpstream) setDown(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.down = err
}

func (u *testUpstream) set(f func(context.Context, ca.MintRequest) ([]*x509.Certificate, error)) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.instead = f
}

func (u *testUpstream) requests() []ca.MintRequest {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.asked)
}

// sign signs a template that is like an intermediate's but for what change makes of it.
func (u *testUpstream) sign(t *testing.T, r ca.MintRequest, change func(*x509.Certificate)) *x509.Certificate {
	good, err := u.mint(r)
	if err != nil {
		t.Error(err)
		return nil
	}
	c := *good[0]
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	change(&c)
	der, err := x509.CreateCertificate(rand.Reader, &c, u.root, c.PublicKey, u.key)
	if err != nil {
		t.Error(err)
		return nil
	}
	signed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Error(err)
	}
	return signed
}

// memoryStore is a ca.Store in memory. SaveReplica fails with fail where that is set.
type memoryStore struct {
	mu      sync.Mutex
	journal journal.Journal
	replica ca.Replica
	fail    error
	saved   func(*journal.Journal) // is called once a replica was saved, and may change the record; nil: nothing
}

// Load implements ca.Store.
func (s *memoryStore) Load(context.Context) (journal.Journal, ca.Revision, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.journal.Schema == 0 {
		return journal.Journal{}, 0, api.E(api.StateMissing, "there is no record")
	}
	return s.journal, 1, nil
}

// Swap implements ca.Store.
func (*memoryStore) Swap(context.Context, ca.Revision, journal.Journal) (ca.Revision, error) {
	return 0, api.E(api.Internal, "nothing changes the record here")
}

// Replicas implements ca.Store.
func (s *memoryStore) Replicas(context.Context) ([]ca.Replica, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.replica.Name == "" {
		return nil, nil
	}
	r := s.replica
	r.Minted = slices.Clone(r.Minted)
	return []ca.Replica{r}, nil
}

// SaveReplica implements ca.Store.
func (s *memoryStore) SaveReplica(_ context.Context, r ca.Replica) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	r.Minted = slices.Clone(r.Minted)
	s.replica = r
	if s.saved != nil {
		s.saved(&s.journal)
	}
	return nil
}

func (s *memoryStore) setFail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

func (s *memoryStore) minted() []ca.Minted {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.replica.Minted)
}

// memoryLedger is a ca.Ledger in memory that can be told to fail or to wait.
type memoryLedger struct {
	mu      sync.Mutex
	entries []audit.Entry
	fail    error
	wait    chan struct{} // Append returns when it is closed; nil: at once
	failed  chan struct{}
}

func newMemoryLedger() *memoryLedger { return &memoryLedger{failed: make(chan struct{})} }

// Append implements ca.Ledger.
func (l *memoryLedger) Append(ctx context.Context, e audit.Entry) error {
	l.mu.Lock()
	fail, wait := l.fail, l.wait
	l.mu.Unlock()
	if wait != nil {
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if fail != nil {
		return fail
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = append(l.entries, e)
	return nil
}

// Refuse implements ca.Ledger.
func (l *memoryLedger) Refuse(ctx context.Context, e audit.Entry) (string, error) {
	return e.CorrelationID, l.Append(ctx, e)
}

// Sample implements ca.Ledger.
func (l *memoryLedger) Sample(audit.Entry) {}

// Failed implements ca.Ledger.
func (l *memoryLedger) Failed() <-chan struct{} { return l.failed }

func (l *memoryLedger) set(fail error, wait chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fail, l.wait = fail, wait
}

func (l *memoryLedger) all() []audit.Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.entries)
}

// mustCA returns a CA that does not run.
func (b *bare) mustCA() *ca.CA {
	b.t.Helper()
	c, err := ca.New(b.config)
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}
