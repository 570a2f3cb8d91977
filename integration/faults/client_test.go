//go:build integration && linux && (amd64 || arm64)

package faults

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/internal/canary"
)

// client is an agent as far as the CA can tell. It remembers the serial of every certificate that reached it.
type client struct {
	tokens *attestortest.Issuer
	agent  attestortest.Pod
	pod    attestortest.Pod
	key    *ecdsa.PrivateKey // of the agent
	csr    []byte            // for it
	podCSR []byte            // for the pod's own key

	conn *grpc.ClientConn // with the agent's SVID and a session

	mu      sync.Mutex
	serials []string // lower-case hex
}

func newClient(tokens *attestortest.Issuer) (*client, error) {
	key, csr, err := newKey()
	if err != nil {
		return nil, err
	}
	_, podCSR, err := newKey()
	return &client{
		tokens: tokens,
		agent:  attestortest.NewPod("signet-system", "agent-0", "signet-agent", "node-0"),
		pod:    attestortest.NewPod("shop", "checkout-0", "checkout", "node-0"),
		key:    key,
		csr:    csr,
		podCSR: podCSR,
	}, err
}

// newKey returns a key and a request that names nothing.
func newKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := canary.NewKey()
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return key, csr, err
}

// held returns how many certificates reached it.
func (c *client) held() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.serials)
}

// keep notes a certificate that reached it.
func (c *client) keep(chain [][]byte) (*x509.Certificate, error) {
	if len(chain) == 0 {
		return nil, errors.New("an empty chain")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.serials = append(c.serials, fmt.Sprintf("%x", leaf.SerialNumber.Bytes()))
	return leaf, nil
}

func (c *client) evidence(p attestortest.Pod, audience string) (*apiv1.Evidence, error) {
	token, err := c.tokens.Token(p, audience, time.Hour)
	return &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(token)}, err
}

// dial connects. Who the CA is does not matter here: it is judged by its files.
func dial(address string, own ...tls.Certificate) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: own,
	})))
}

// open attests the agent and opens its session. The CA may be ended at any moment of it.
func (c *client) open(ctx context.Context, address string) error {
	e, err := c.evidence(c.agent, api.AgentAudience(td))
	if err != nil {
		return err
	}
	conn, err := dial(address)
	if err != nil {
		return err
	}
	defer conn.Close()
	resp, err := apiv1.NewAuthorityClient(conn).AttestAgent(ctx, &apiv1.AttestAgentRequest{Evidence: e, Csr: c.csr, Protocol: api.Protocol})
	if err != nil {
		return api.FromStatus(err)
	}
	leaf, err := c.keep(resp.GetChain())
	if err != nil {
		return err
	}
	if c.conn, err = dial(address, tls.Certificate{Certificate: resp.GetChain(), PrivateKey: c.key, Leaf: leaf}); err != nil {
		return err
	}
	stream, err := apiv1.NewAuthorityClient(c.conn).Session(ctx)
	if err != nil {
		return api.FromStatus(err)
	}
	hello := &apiv1.Hello{Protocol: api.Protocol, Version: "test", Evidence: e}
	if err := stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Hello{Hello: hello}}); err != nil {
		return err
	}
	if _, err := stream.Recv(); err != nil {
		return api.FromStatus(err)
	}
	return nil
}

func (c *client) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// issue asks for one SVID.
func (c *client) issue(ctx context.Context, e *apiv1.Evidence) error {
	resp, err := apiv1.NewAuthorityClient(c.conn).Issue(ctx, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{{Evidence: e, Csr: c.podCSR, Volume: "v"}}})
	if err != nil {
		return api.FromStatus(err)
	}
	r := resp.GetResults()[0]
	if f := r.GetRefusal(); f != nil {
		return api.E(api.Reason(f.GetReason()), "%s", f.GetMessage())
	}
	_, err = c.keep(r.GetSvid().GetChain())
	return err
}

// issueAll has several callers issue at once, n SVIDs in all, and returns why they ended early: the first error.
func (c *client) issueAll(ctx context.Context, n int) error {
	const callers = 4
	e, err := c.evidence(c.pod, api.WorkloadAudience(td))
	if err != nil {
		return err
	}
	errs := make([]error, callers)
	var wg sync.WaitGroup
	for w := range callers {
		wg.Go(func() {
			for range (n + callers - 1) / callers {
				if errs[w] = c.issue(ctx, e); errs[w] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
