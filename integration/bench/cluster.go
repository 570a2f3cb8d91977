//go:build linux

package main

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
)

// cluster is the other side of whatever is measured, in a process of its own: whoever issues tokens, agents that only ask,
// and kubelets with their proxies, that of the first node and maybe of some more.
type cluster struct {
	issuer *attestortest.Issuer
	nodes  []*node
	kubelet
	others []*kubelet // of the nodes after the first
}

// node is an agent that only asks, and the pods of its node.
type node struct {
	number int
	token  string // of the agent
	items  []*apiv1.IssueItem
	conn   *grpc.ClientConn
	client apiv1.AuthorityClient
	end    func()

	reporter *reporter // tells what the agent holds; nil where it says nothing
}

func (c *cluster) do(ctx context.Context, what string, arg json.RawMessage) (any, error) {
	switch what {
	case "make":
		return with(arg, func(p pods) (any, error) { return nil, c.make(p) })
	case "connect":
		return with(arg, func(a connect) (any, error) { return nil, c.connect(ctx, a) })
	case "issue":
		return with(arg, func(l load) (any, error) { return c.issue(ctx, l) })
	case "herd":
		return with(arg, func(seed uint64) (any, error) { return c.herd(ctx, seed) })
	case "on":
		return with(arg, func(o on) (any, error) { return c.kubelets()[o.Node].do(ctx, c, o.Do, o.Arg) })
	case "hold":
		return with(arg, func(h holding) (any, error) { return nil, c.hold(ctx, h) })
	case "told":
		return with(arg, func(after time.Time) (any, error) { return c.told(ctx, after) })
	case "watch":
		return with(arg, func(root []byte) (any, error) { return nil, c.watch(root) })
	case "withdrawn":
		return with(arg, func(seconds float64) (any, error) { return c.withdrawn(ctx, seconds) })
	default:
		return c.kubelet.do(ctx, c, what, arg)
	}
}

func with[T any](arg json.RawMessage, f func(T) (any, error)) (any, error) {
	var v T
	if err := json.Unmarshal(arg, &v); err != nil {
		return nil, err
	}
	return f(v)
}

// make makes pods, tokens and requests, and writes what CA and agent read. The workloads of one node have ServiceAccounts of
// their own.
func (c *cluster) make(p pods) (err error) {
	c.dir = p.Dir
	if c.issuer, err = attestortest.NewIssuer(attestortest.Config{Issuer: issuerName, Algorithm: "RS256"}); err != nil {
		return err
	}
	for i := range p.Kubelets {
		c.others = append(c.others, &kubelet{number: i + 1})
	}
	var all []attestortest.Pod
	for i := range p.Agents {
		n := &node{number: i}
		agent := attestortest.NewPod("signet-system", "signet-agent-"+nodeName(i), "signet-agent", nodeName(i))
		all = append(all, agent)
		if n.token, err = c.issuer.Token(agent, "signet-agent:"+trustDomain, 12*time.Hour); err != nil {
			return err
		}
		for k := range p.Workloads {
			pod := attestortest.NewPod("shop", fmt.Sprintf("web-%d-%d", i, k), fmt.Sprintf("web-%d", k), nodeName(i))
			all = append(all, pod)
			if i <= p.Kubelets {
				k := c.kubelets()[i]
				k.pods = append(k.pods, pod)
			}
			token, err := c.issuer.Token(pod, "signet:"+trustDomain, 12*time.Hour)
			if err != nil {
				return err
			}
			csr, _, err := newCSR()
			if err != nil {
				return err
			}
			n.items = append(n.items, &apiv1.IssueItem{Evidence: evidence(token), Csr: csr, Volume: "bench"})
		}
		c.nodes = append(c.nodes, n)
	}
	text, err := attestortest.Directory(issuerName, slices.Values(all))
	files := map[string][]byte{"pods.json": text, "jwks.json": c.issuer.JWKS(), "agent.token": []byte(c.nodes[0].token)}
	for _, k := range c.others {
		files[fmt.Sprintf("agent-%d.token", k.number)] = []byte(c.nodes[k.number].token)
	}
	for name, content := range files {
		if err == nil {
			err = os.WriteFile(filepath.Join(p.Dir, name), content, 0o600)
		}
	}
	return err
}

// kubelets are those of the cluster, by the number of their node.
func (c *cluster) kubelets() []*kubelet { return append([]*kubelet{&c.kubelet}, c.others...) }

// on is something that one node's kubelet is to do.
type on struct {
	Node int
	Do   string
	Arg  json.RawMessage
}

func evidence(token string) *apiv1.Evidence {
	return &apiv1.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(token)}
}

func newCSR() ([]byte, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return csr, key, err
}

// connect asks for sessions of agents.
type connect struct {
	Address string
	From    int // the first agent
	Agents  int
}

func (c *cluster) connect(ctx context.Context, a connect) error {
	for _, n := range c.nodes[a.From : a.From+a.Agents] {
		if n.conn != nil {
			continue
		}
		if err := n.open(ctx, a.Address); err != nil {
			return fmt.Errorf("agent %d: %w", n.number, err)
		}
	}
	return nil
}

// dial connects from an address of its own, as an agent on a node of its own does.
func (n *node) dial(address string, own *tls.Certificate) (*grpc.ClientConn, error) {
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13} // the CA is our own child
	if own != nil {
		config.Certificates = []tls.Certificate{*own}
	}
	from := &net.TCPAddr{IP: net.IPv4(127, 1, byte(n.number>>8), byte(n.number))}
	return grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10),
		grpc.WithStaticStreamWindowSize(512<<10), grpc.WithStaticConnWindowSize(1<<20), // as an agent's
		grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) {
			return (&net.Dialer{LocalAddr: from}).DialContext(ctx, "tcp", to)
		}))
}

// open attests the agent and opens its session, which goes on until end.
func (n *node) open(ctx context.Context, address string) error {
	csr, key, err := newCSR()
	if err != nil {
		return err
	}
	stranger, err := n.dial(address, nil)
	if err != nil {
		return err
	}
	defer stranger.Close()
	resp, err := apiv1.NewAuthorityClient(stranger).AttestAgent(ctx, &apiv1.AttestAgentRequest{Evidence: evidence(n.token), Csr: csr, Protocol: api.Protocol})
	if err != nil {
		return api.FromStatus(err)
	}
	if n.conn, err = n.dial(address, &tls.Certificate{Certificate: resp.GetChain(), PrivateKey: key}); err != nil {
		return err
	}
	n.client = apiv1.NewAuthorityClient(n.conn)
	session, cancel := context.WithCancel(ctx)
	stream, err := n.client.Session(session)
	if err == nil {
		hello := &apiv1.Hello{Protocol: api.Protocol, Version: "bench", Evidence: evidence(n.token)}
		err = stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Hello{Hello: hello}})
	}
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		cancel()
		return api.FromStatus(err)
	}
	var ended sync.WaitGroup
	bundles := make(chan *apiv1.Bundle, 16) // that are not reported yet
	if n.reporter != nil {
		ended.Go(func() { n.reporter.run(session, stream, bundles) })
	}
	ended.Go(func() {
		defer close(bundles)
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			if b := m.GetBundle(); b != nil && n.reporter != nil {
				select {
				case bundles <- b:
				case <-session.Done():
				}
			}
		}
	})
	n.end = func() { cancel(); ended.Wait(); n.conn.Close() }
	return nil
}

// load is so many clients, each an agent with a connection of its own, that ask for Batch SVIDs in each call, one call after
// the other.
type load struct {
	Clients, Batch int
	Seconds        float64
}

// loaded is what a load came to.
type loaded struct {
	SVIDs    int
	Refused  int // requests that were sent away to come back later
	Seconds  float64
	P50, P99 float64 // of a call, milliseconds
}

func (c *cluster) issue(ctx context.Context, l load) (loaded, error) {
	var total, refused atomic.Int64
	var mu sync.Mutex
	var all []time.Duration
	var failed error
	began := time.Now()
	until := began.Add(time.Duration(l.Seconds * float64(time.Second)))
	var wg sync.WaitGroup
	for _, n := range c.nodes[:l.Clients] {
		wg.Go(func() {
			var took []time.Duration
			var err error
			next := 0
			for begin := time.Now(); begin.Before(until) && err == nil; begin = time.Now() {
				r := &apiv1.IssueRequest{}
				for range l.Batch {
					r.Items = append(r.Items, n.items[next%len(n.items)])
					next++
				}
				var away int
				var later time.Duration
				away, later, err = n.ask(ctx, r)
				took = append(took, time.Since(begin))
				total.Add(int64(l.Batch - away))
				refused.Add(int64(away))
				if away > 0 {
					time.Sleep(min(later, time.Until(until))) // as it was told
				}
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
			failed = cmp.Or(failed, err)
		})
	}
	wg.Wait()
	if failed != nil {
		return loaded{}, failed
	}
	slices.Sort(all)
	return loaded{
		SVIDs: int(total.Load()), Refused: int(refused.Load()), Seconds: time.Since(began).Seconds(),
		P50: quantile(all, 0.50), P99: quantile(all, 0.99),
	}, nil
}

// ask asks for SVIDs, and says how many of them are to be asked for again, and when.
func (n *node) ask(ctx context.Context, r *apiv1.IssueRequest) (refused int, later time.Duration, err error) {
	resp, err := n.client.Issue(ctx, r)
	if err != nil {
		e := api.AsError(api.FromStatus(err))
		if e.Reason == api.Overloaded {
			return len(r.GetItems()), e.RetryAfter, nil
		}
		return 0, 0, e
	}
	for _, x := range resp.GetResults() {
		switch no := x.GetRefusal(); {
		case x.GetSvid() != nil:
		case no.GetReason() == string(api.Overloaded):
			refused, later = refused+1, max(later, no.GetRetryAfter().AsDuration())
		default:
			return 0, 0, fmt.Errorf("refused: %v", no)
		}
	}
	return refused, later, nil
}

// quantile is of sorted durations, in milliseconds.
func quantile(sorted []time.Duration, q float64) float64 {
	return float64(sorted[int(q*float64(len(sorted)-1))]) / 1e6
}
