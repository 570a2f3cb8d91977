package ca_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/audit"
)

// operatorsNS is where the three ServiceAccounts are.
const operatorsNS = "signet-operators"

// operatorsConn connects to the operators' port, with a client certificate unless it is nil. Who the server is,
// TestOperatorsTLS asks.
func operatorsConn(t *testing.T, s *catest.Server, certificate *tls.Certificate) *grpc.ClientConn {
	t.Helper()
	config := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}
	if certificate != nil {
		config.Certificates = []tls.Certificate{*certificate}
	}
	return operatorsConnBy(t, s, credentials.NewTLS(config))
}

func operatorsConnBy(t *testing.T, s *catest.Server, by credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///operators", grpc.WithTransportCredentials(by),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.DialOperators(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// breakGlass is the rule that takes these certificates.
func breakGlass(t *testing.T, certificates ...tls.Certificate) (rule []ca.BreakGlass) {
	t.Helper()
	for _, c := range certificates {
		b, err := ca.NewBreakGlass(c.Leaf, spiffeTD(t, catest.TrustDomain))
		if err != nil {
			t.Fatal(err)
		}
		rule = append(rule, b)
	}
	return rule
}

func tlsOf(svid *x509svid.SVID) *tls.Certificate {
	c := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, x := range svid.Certificates {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	return c
}

// statusBy asks for the status with the metadata given as pairs.
func statusBy(t *testing.T, conn *grpc.ClientConn, pairs ...string) (*apiv1.GetStatusResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), pairs...), 30*time.Second)
	defer cancel()
	resp, err := apiv1.NewAdminClient(conn).GetStatus(ctx, &apiv1.GetStatusRequest{})
	return resp, api.FromStatus(err)
}

func bearerOf(token string) []string { return []string{"authorization", "Bearer " + token} }

// TestOperatorTokens tries every token that is not an operator's at the operators' port.
//
// threat: A01, A02, A22, A24, L21, L22
func TestOperatorTokens(t *testing.T) {
	s := start(t, catest.Options{})
	conn := operatorsConn(t, s, nil)
	foreign, err := attestortest.NewIssuer(attestortest.Config{Issuer: "https://elsewhere.test"})
	if err != nil {
		t.Fatal(err)
	}
	forged, err := attestortest.NewIssuer(attestortest.Config{Issuer: catest.IssuerName})
	if err != nil {
		t.Fatal(err)
	}
	by := func(i *attestortest.Issuer) string {
		token, err := i.Token(attestortest.NewPod(operatorsNS, "", "emergency", ""), api.AdminAudience(s.TD), 10*time.Minute, attestortest.Unbound)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	person := func(change ...func(*attestortest.Draft)) string {
		return s.Person(operatorsNS, "emergency", 10*time.Minute, change...)
	}
	bound := func(to string) func(*attestortest.Draft) {
		return func(d *attestortest.Draft) {
			d.Kubernetes()[to] = map[string]any{"name": "x", "uid": "5d1f1dbb-9a3c-4c1d-b1a5-0a2ab3a5e9c1"}
		}
	}
	pod := s.Pod(operatorsNS, "emergency-0", "emergency", "node-1")
	for _, row := range []struct {
		name     string
		metadata []string
		want     api.Reason
	}{
		{"none", nil, api.TokenMissing},
		{"in another header", []string{"x-signet-token", person()}, api.TokenMissing},
		{"in the header of proxies", []string{"proxy-authorization", "Bearer " + person()}, api.TokenMissing},
		{"two", append(bearerOf(person()), bearerOf(person())...), api.TokenAmbiguous},
		{"without its scheme", []string{"authorization", person()}, api.TokenMalformed},
		{"of another scheme", []string{"authorization", "Basic " + person()}, api.TokenMalformed},
		{"empty", []string{"authorization", "Bearer "}, api.TokenMalformed},
		{"oversized", bearerOf(strings.Repeat("a", api.MaxTokenBytes+1)), api.TokenTooLarge},
		{"no token", bearerOf("a.b.c"), api.TokenMalformed},
		{"expired", bearerOf(s.Person(operatorsNS, "emergency", -time.Second, attestortest.Claim("iat", time.Now().Add(-10*time.Minute).Unix()))), api.TokenExpired},
		{"from the future", bearerOf(person(attestortest.Claim("nbf", time.Now().Add(time.Hour).Unix()))), api.TokenNotYetValid},
		{"of more than 15 minutes", bearerOf(s.Person(operatorsNS, "emergency", 15*time.Minute+time.Second)), api.TokenTTLTooLong},
		{"of an hour, of which little is left", bearerOf(person(attestortest.Claim("iat", time.Now().Add(-50*time.Minute).Unix()))), api.TokenTTLTooLong},
		{"bound to a pod", bearerOf(person(bound("pod"))), api.TokenBound},
		{"bound to a node", bearerOf(person(bound("node"))), api.TokenBound},
		{"bound to a secret", bearerOf(person(bound("secret"))), api.TokenBound},
		{"bound to what comes later", bearerOf(person(bound("gizmo"))), api.TokenBound},
		{"from a Secret of old", bearerOf(person(attestortest.Without("kubernetes.io"), attestortest.Claim("kubernetes.io/serviceaccount/namespace", operatorsNS))), api.TokenBound},
		{"of a pod, as its kubelet gets it", bearerOf(string(s.Evidence(pod, api.AdminAudience(s.TD), 10*time.Minute).Data)), api.TokenBound},
		{"a workload's", bearerOf(string(s.Evidence(pod, api.WorkloadAudience(s.TD), 10*time.Minute).Data)), api.TokenBound},
		{"for workloads", bearerOf(person(attestortest.Audiences(api.WorkloadAudience(s.TD)))), api.TokenAudience},
		{"for agents", bearerOf(person(attestortest.Audiences(api.AgentAudience(s.TD)))), api.TokenAudience},
		{"for the API server", bearerOf(person(attestortest.Audiences("https://kubernetes.default.svc"))), api.TokenAudience},
		{"for another trust domain", bearerOf(person(attestortest.Audiences("signet-admin:other.org"))), api.TokenAudience},
		{"for two", bearerOf(person(attestortest.Audiences(api.AdminAudience(s.TD), "https://kubernetes.default.svc"))), api.TokenAudienceNotExclusive},
		{"for none", bearerOf(person(attestortest.Without("aud"))), api.TokenAudience},
		{"of an unknown ServiceAccount", bearerOf(s.Person(operatorsNS, "default", 10*time.Minute)), api.OperatorRequired},
		{"of that name in another namespace", bearerOf(s.Person("shop", "emergency", 10*time.Minute)), api.OperatorRequired},
		{"of an agent", bearerOf(s.Person(catest.AgentNS, catest.AgentSA, 10*time.Minute)), api.OperatorRequired},
		{"whose subject is another", bearerOf(person(attestortest.Claim("sub", "system:serviceaccount:shop:web"))), api.SubjectMalformed},
		{"of another issuer", bearerOf(by(foreign)), api.IssuerUnknown},
		{"signed by another key", bearerOf(by(forged)), api.TokenSignature},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := statusBy(t, conn, row.metadata...)
			wantReason(t, err, row.want)
		})
	}
	t.Run("far above any bound", func(t *testing.T) { // gRPC ends it, before any word of ours
		if _, err := statusBy(t, conn, bearerOf(strings.Repeat("a", 64<<10))...); err == nil {
			t.Error("it was let in")
		}
	})
	resp, err := statusBy(t, conn, bearerOf(person())...)
	if err != nil || !strings.HasPrefix(resp.GetCaller(), "sa:signet-operators/emergency jti:") {
		t.Errorf("a good token: %v, %q", err, resp.GetCaller())
	}
}

// TestOperatorRoles: which ServiceAccount a token is of says what may be done with it.
func TestOperatorRoles(t *testing.T) {
	s := start(t, catest.Options{})
	conn := operatorsConn(t, s, nil)
	for _, row := range []struct {
		account string
		roles   []string
		ban     api.Reason // of a call for emergency responders; empty: its handler is asked
	}{
		{"viewer", []string{"viewer"}, api.RoleRequired},
		{"operator", []string{"viewer", "operator"}, api.RoleRequired},
		{"emergency", []string{"viewer", "operator", "emergency"}, ""},
	} {
		t.Run(row.account, func(t *testing.T) {
			token := bearerOf(s.Person(operatorsNS, row.account, 15*time.Minute))
			resp, err := statusBy(t, conn, token...)
			if err != nil || !cmp.Equal(resp.GetRoles(), row.roles) {
				t.Errorf("%v, roles %q", err, resp.GetRoles())
			}
			ctx := metadata.AppendToOutgoingContext(t.Context(), token...)
			_, err = apiv1.NewAdminClient(conn).BanNode(ctx, &apiv1.BanNodeRequest{Node: "nobody"})
			switch got := api.ReasonOf(api.FromStatus(err)); {
			case row.ban != "" && got != row.ban:
				t.Errorf("ban: %v", err)
			case row.ban == "" && (got == api.RoleRequired || got == api.OperatorRequired):
				t.Errorf("ban: %v", err)
			}
		})
	}
}

// TestOperatorCertificates tries client certificates at the operators' port. With one that opens nothing, a good token
// opens nothing either.
//
// threat: L21
func TestOperatorCertificates(t *testing.T) {
	td := spiffeTD(t, catest.TrustDomain)
	glass := catest.BreakGlass(t, td, "safe-1")
	expired := catest.BreakGlass(t, td, "safe-2", func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	})
	s := start(t, catest.Options{Config: func(cfg *ca.Config) {
		cfg.Operators.BreakGlass = breakGlass(t, glass, expired)
	}})
	n := newNode(t, s, "node-1")
	key := newKey(t)
	item := n.item(s.Pod("shop", "web", "web", "node-1"))
	item.Csr = newCSR(t, key)
	issued, err := n.session().issue(item)
	if err != nil {
		t.Fatal(err)
	}
	again, err := x509.CreateCertificate(rand.Reader, glass.Leaf, glass.Leaf, glass.Leaf.PublicKey, glass.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	token := bearerOf(s.Person(operatorsNS, "emergency", 10*time.Minute))
	self := s.CA().Self()
	for _, row := range []struct {
		name        string
		certificate tls.Certificate
		want        api.Reason // empty: let in
	}{
		{"an agent's SVID", *tlsOf(n.svid), api.OperatorRequired},
		{"a workload's SVID", *tlsOf(svidOf(t, issued.GetChain(), key)), api.OperatorRequired},
		{"the CA's own SVID", *self, api.OperatorRequired},
		{"another of that name", catest.BreakGlass(t, td, "safe-1"), api.OperatorRequired},
		{"another by the same key", tls.Certificate{Certificate: [][]byte{again}, PrivateKey: glass.PrivateKey}, api.OperatorRequired},
		{"one that has expired", expired, api.OperatorRequired},
		{"break-glass", glass, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			resp, err := statusBy(t, operatorsConn(t, s, &row.certificate), token...)
			if row.want != "" {
				wantReason(t, err, row.want)
				return
			}
			if err != nil || resp.GetCaller() != "break-glass:safe-1" || len(resp.GetRoles()) != 3 {
				t.Errorf("%v, %v", err, resp)
			}
		})
	}
	t.Run("without its key", func(t *testing.T) {
		stolen := tls.Certificate{Certificate: glass.Certificate, PrivateKey: foreignSigner{key, glass.Leaf.PublicKey}}
		if _, err := statusBy(t, operatorsConn(t, s, &stolen)); err == nil {
			t.Error("it was let in")
		}
	})
	t.Run("at the agents' port", func(t *testing.T) {
		conn := dialTLS(t, s, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{glass}})
		if _, err := statusBy(t, conn, token...); err == nil {
			t.Error("it was let in")
		}
	})
	t.Run("without TLS", func(t *testing.T) {
		if _, err := statusBy(t, operatorsConnBy(t, s, insecure.NewCredentials()), token...); err == nil {
			t.Error("it was let in")
		}
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		by := credentials.NewTLS(&tls.Config{MaxVersion: tls.VersionTLS12, InsecureSkipVerify: true})
		if _, err := statusBy(t, operatorsConnBy(t, s, by), token...); err == nil {
			t.Error("it was let in")
		}
	})
}

// foreignSigner signs by another key than the one it says it has.
type foreignSigner struct {
	crypto.Signer
	public crypto.PublicKey
}

// Public implements crypto.Signer.
func (f foreignSigner) Public() crypto.PublicKey { return f.public }

// TestNewBreakGlass refuses certificates that could open more than they should.
func TestNewBreakGlass(t *testing.T) {
	td := spiffeTD(t, catest.TrustDomain)
	for _, row := range []struct {
		name   string
		change func(*x509.Certificate)
		says   string // empty: good
	}{
		{"good", func(*x509.Certificate) {}, ""},
		{"without a SPIFFE ID", func(c *x509.Certificate) { c.URIs = nil }, "no SPIFFE ID"},
		{"of an agent", func(c *x509.Certificate) { c.URIs = mustURIs(t, "spiffe://example.org/signet/agent/n") }, "/signet/admin/NAME"},
		{"of another trust domain", func(c *x509.Certificate) { c.URIs = mustURIs(t, "spiffe://other.org/signet/admin/n") }, "/signet/admin/NAME"},
		{"with two names", func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, "no SPIFFE ID"},
		{"of an authority", func(c *x509.Certificate) { c.IsCA = true }, "authority"},
		{"for servers", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, "client authentication"},
		{"for more", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, "client authentication"},
		{"with a DNS name", func(c *x509.Certificate) { c.DNSNames = []string{"ca"} }, "other names"},
		{"for ever", func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(ca.MaxBreakGlassTTL + time.Second) }, "two years"},
	} {
		t.Run(row.name, func(t *testing.T) {
			b, err := ca.NewBreakGlass(catest.BreakGlass(t, td, "safe", row.change).Leaf, td)
			if row.says == "" {
				if err != nil || b.Name != "safe" {
					t.Error(b.Name, err)
				}
				return
			}
			wantReason(t, err, api.ConfigInvalid)
			if !strings.Contains(err.Error(), row.says) {
				t.Error(err)
			}
		})
	}
	t.Run("signed by another", func(t *testing.T) {
		mine, other := catest.BreakGlass(t, td, "safe"), catest.BreakGlass(t, td, "safe")
		der, err := x509.CreateCertificate(rand.Reader, mine.Leaf, other.Leaf, mine.Leaf.PublicKey, other.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ca.NewBreakGlass(c, td); err == nil {
			t.Error("it was taken")
		}
	})
}

// countedPersons counts how often tokens are looked at.
type countedPersons struct {
	ca.PersonAttestor

	mu sync.Mutex
	n  int
}

// AttestPerson implements ca.PersonAttestor.
func (c *countedPersons) AttestPerson(ctx context.Context, e attestor.Evidence, audience string, now time.Time) (attestor.Claims, error) {
	c.mu.Lock()
	c.n++
	c.mu.Unlock()
	return c.PersonAttestor.AttestPerson(ctx, e, audience, now)
}

func (c *countedPersons) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// TestOperatorTokenMemory: a token that was good is believed for half a minute, and never beyond its end.
func TestOperatorTokenMemory(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		var counted *countedPersons
		s := start(t, catest.Options{Config: func(cfg *ca.Config) {
			counted = &countedPersons{PersonAttestor: cfg.Operators.Attestor}
			cfg.Operators.Attestor = counted
		}})
		conn := operatorsConn(t, s, nil)
		token := bearerOf(s.Person(operatorsNS, "viewer", 45*time.Second))
		for range 3 {
			if _, err := statusBy(t, conn, token...); err != nil {
				t.Fatal(err)
			}
		}
		if n := counted.count(); n != 1 {
			t.Errorf("three calls: it was looked at %d times", n)
		}
		time.Sleep(31 * time.Second)
		if _, err := statusBy(t, conn, token...); err != nil || counted.count() != 2 {
			t.Errorf("after half a minute: %v, looked at %d times", err, counted.count())
		}
		time.Sleep(15 * time.Second)
		synctest.Wait()
		_, err := statusBy(t, conn, token...)
		wantReason(t, err, api.TokenExpired)
	})
}

// slowPersons takes its time for tokens that are none.
type slowPersons struct{ ca.PersonAttestor }

// AttestPerson implements ca.PersonAttestor.
func (p slowPersons) AttestPerson(ctx context.Context, e attestor.Evidence, audience string, now time.Time) (attestor.Claims, error) {
	if string(e.Data) != "bogus" {
		return p.PersonAttestor.AttestPerson(ctx, e, audience, now)
	}
	time.Sleep(time.Second)
	return attestor.Claims{}, api.E(api.TokenMalformed, "it is none")
}

// TestOperatorsInACrowd: all come from one address, and yet who brings a crowd of tokens that are none waits behind himself.
func TestOperatorsInACrowd(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{Config: func(cfg *ca.Config) { cfg.Operators.Attestor = slowPersons{cfg.Operators.Attestor} }})
		var wg sync.WaitGroup
		for range 8 + runtime.GOMAXPROCS(0) { // 16 calls each take all turns and all places to wait
			conn := operatorsConn(t, s, nil)
			for range 16 {
				wg.Go(func() {
					if _, err := statusBy(t, conn, bearerOf("bogus")...); err == nil {
						t.Error("it was let in")
					}
				})
			}
		}
		synctest.Wait()
		if _, err := statusBy(t, operatorsConn(t, s, nil), bearerOf(s.Person(operatorsNS, "viewer", 10*time.Minute))...); err != nil {
			t.Errorf("an operator: %v", err)
		}
		wg.Wait()
	})
}

// TestOperatorsOnRecord: a token's first call is on record with its credential id, each call of a break-glass certificate
// is, and so is who was refused.
func TestOperatorsOnRecord(t *testing.T) {
	td := spiffeTD(t, catest.TrustDomain)
	glass := catest.BreakGlass(t, td, "safe-1")
	s := start(t, catest.Options{Config: func(cfg *ca.Config) {
		cfg.Operators.BreakGlass = breakGlass(t, glass)
	}})
	const jti, iss = "0b8b9a5c-6c2b-4f53-8f0c-1b2f7a3f0d11", " iss:" + catest.IssuerName
	conn := operatorsConn(t, s, nil)
	viewer := bearerOf(s.Person(operatorsNS, "viewer", 10*time.Minute, attestortest.Claim("jti", jti)))
	stranger := bearerOf(s.Person("shop", "viewer", 10*time.Minute, attestortest.Claim("jti", "1c8b9a5c-6c2b-4f53-8f0c-1b2f7a3f0d11")))
	for range 2 {
		if _, err := statusBy(t, conn, viewer...); err != nil {
			t.Fatal(err)
		}
		if _, err := statusBy(t, operatorsConn(t, s, &glass)); err != nil {
			t.Fatal(err)
		}
		_, err := statusBy(t, conn, stranger...)
		wantReason(t, err, api.OperatorRequired)
	}
	_, err := apiv1.NewAdminClient(conn).BanNode(metadata.AppendToOutgoingContext(t.Context(), viewer...), &apiv1.BanNodeRequest{Node: "x"})
	wantReason(t, api.FromStatus(err), api.RoleRequired)
	pod := s.Pod("shop", "web-0", "web", "node-1")
	const taken = "2d8b9a5c-6c2b-4f53-8f0c-1b2f7a3f0d11"
	_, err = statusBy(t, conn, bearerOf(string(s.Evidence(pod, api.AdminAudience(s.TD), time.Hour, attestortest.Claim("jti", taken)).Data))...)
	wantReason(t, err, api.TokenBound)
	s.Stop()
	got := map[string]int{}
	for _, r := range ledgerOf(t, s) {
		if r.Reason == string(api.TokenBound) && (r.PodUID != pod.UID || r.Pod != "web-0" || r.NodeUID != pod.NodeUID || r.TokenID != taken) {
			t.Errorf("a pod's token: %+v", r.Entry)
		}
		if r.Caller != "" {
			of := string(r.Kind) + " " + r.Caller + " " + r.Method + " " + r.Reason
			if r.Count > 0 { // a refusal that is there again, which says how often it was
				got[of] = int(r.Count)
			} else {
				got[of]++
			}
		}
	}
	want := map[string]int{
		"operator sa:signet-operators/viewer jti:" + jti + iss + " GetStatus ":                                                1,
		"operator break-glass:safe-1 GetStatus ":                                                                              2,
		"refuse sa:shop/viewer jti:1c8b9a5c-6c2b-4f53-8f0c-1b2f7a3f0d11" + iss + " GetStatus " + string(api.OperatorRequired): 2,
		"refuse sa:shop/web jti:" + taken + iss + " GetStatus " + string(api.TokenBound):                                      1,
		"refuse sa:signet-operators/viewer jti:" + jti + iss + " BanNode " + string(api.RoleRequired):                         1,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestOperatorsWithoutLedger: where nothing can be put on record an operator may look for the cause, and change nothing.
func TestOperatorsWithoutLedger(t *testing.T) {
	s, ledger := gated(t)
	ledger.set(func(context.Context, audit.Entry) error { return errors.New("no") })
	conn := operatorsConn(t, s, nil)
	token := bearerOf(s.Person(operatorsNS, "emergency", 10*time.Minute))
	if _, err := statusBy(t, conn, token...); err != nil {
		t.Error(err)
	}
	_, err := apiv1.NewAdminClient(conn).BanNode(metadata.AppendToOutgoingContext(t.Context(), token...), &apiv1.BanNodeRequest{Node: "x"})
	wantReason(t, api.FromStatus(err), api.LedgerFailed)
}

// TestOperatorsOnAHungDisk: who looks is let in though the disk does not answer, for he may have come because of it.
func TestOperatorsOnAHungDisk(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s, ledger := gated(t)
		hung := make(chan struct{})
		ledger.set(func(context.Context, audit.Entry) error {
			<-hung
			return nil
		})
		conn := operatorsConn(t, s, nil)
		for range 3 { // the first hangs, and the others are behind it
			begun := time.Now()
			if _, err := statusBy(t, conn, bearerOf(s.Person(operatorsNS, "viewer", 10*time.Minute))...); err != nil || time.Since(begun) > 3*time.Second {
				t.Errorf("after %v: %v", time.Since(begun), err)
			}
		}
		close(hung)
		synctest.Wait()
	})
}

// TestOperatorIssuers: a configuration can say whose tokens operate the CA.
func TestOperatorIssuers(t *testing.T) {
	for name, issuers := range map[string][]string{"all": nil, "this one": {catest.IssuerName}, "another": {"https://elsewhere.test"}, "none": {}} {
		t.Run(name, func(t *testing.T) {
			s := start(t, catest.Options{Config: func(cfg *ca.Config) { cfg.Operators.Issuers = issuers }})
			_, err := statusBy(t, operatorsConn(t, s, nil), bearerOf(s.Person(operatorsNS, "viewer", time.Minute))...)
			if name == "all" || name == "this one" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantReason(t, err, api.OperatorRequired)
		})
	}
}

// TestOperatorsOfTwoClusters: the same ServiceAccount and the same jti of another cluster are somebody else, on record too.
// Where a CA has several clusters, whose people operate it has to be said.
func TestOperatorsOfTwoClusters(t *testing.T) {
	const elsewhere = "https://elsewhere.test"
	other, err := attestortest.NewIssuer(attestortest.Config{Issuer: elsewhere})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := attestor.StaticKeys(other.JWKS())
	if err != nil {
		t.Fatal(err)
	}
	var config ca.Config
	s := start(t, catest.Options{Config: func(cfg *ca.Config) {
		b, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{elsewhere: keys}})
		if err != nil {
			t.Fatal(err)
		}
		cfg.Operators.Attestor = eitherPerson{cfg.Operators.Attestor, b}
		cfg.KeySets = map[string]ca.KeySets{catest.IssuerName: cfg.KeySets[catest.IssuerName], elsewhere: cfg.KeySets[catest.IssuerName]}
		cfg.Operators.Issuers = []string{catest.IssuerName, elsewhere}
		config = *cfg
	}})
	jti := attestortest.Claim("jti", "0b8b9a5c-6c2b-4f53-8f0c-1b2f7a3f0d11")
	token, err := other.Token(attestortest.NewPod(operatorsNS, "", "viewer", ""), api.AdminAudience(s.TD), 10*time.Minute, attestortest.Unbound, jti)
	if err != nil {
		t.Fatal(err)
	}
	conn := operatorsConn(t, s, nil)
	for _, token := range []string{token, s.Person(operatorsNS, "viewer", 10*time.Minute, jti)} {
		if _, err := statusBy(t, conn, bearerOf(token)...); err != nil {
			t.Fatal(err)
		}
	}
	s.Stop()
	var clusters []string
	for _, r := range ledgerOf(t, s) {
		if r.Kind == audit.KindOperator && strings.HasSuffix(r.Caller, " iss:"+r.Cluster) {
			clusters = append(clusters, r.Cluster)
		}
	}
	if want := []string{elsewhere, catest.IssuerName}; !cmp.Equal(clusters, want) {
		t.Errorf("on record are operators of %q, want %q", clusters, want)
	}
	config.Operators.Issuers = nil
	_, err = ca.New(config)
	wantReason(t, err, api.ConfigInvalid)
}

// eitherPerson believes what one of two believes.
type eitherPerson struct{ a, b ca.PersonAttestor }

// AttestPerson implements ca.PersonAttestor.
func (x eitherPerson) AttestPerson(ctx context.Context, e attestor.Evidence, audience string, now time.Time) (attestor.Claims, error) {
	if c, err := x.a.AttestPerson(ctx, e, audience, now); api.ReasonOf(err) != api.IssuerUnknown {
		return c, err
	}
	return x.b.AttestPerson(ctx, e, audience, now)
}

// TestOperatorsTLS: the operators' port shows this replica's own identity, and gives out no session tickets.
func TestOperatorsTLS(t *testing.T) {
	s := start(t, catest.Options{})
	c := s.CA().OperatorsTLS()
	if c.MinVersion != tls.VersionTLS13 || !c.SessionTicketsDisabled || c.ClientAuth != tls.RequestClientCert {
		t.Errorf("%+v", c)
	}
	raw, err := s.DialOperators(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err := conn.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if id, err := x509svid.IDFromCert(conn.ConnectionState().PeerCertificates[0]); err != nil || !api.IsReplica(id, s.TD) {
		t.Error(id, err)
	}
}
