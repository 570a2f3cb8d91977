//go:build integration

package limits

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/canary"
	"github.com/signet-ca/signet/internal/daemon"
)

// longEnough is what a busy machine may take for what takes no time.
const longEnough = 60 * time.Second

// port is the agents' port of a real CA on a real socket, as signet-ca serves it.
type port struct {
	*catest.Server
	t    *testing.T
	addr string
}

func newPort(t *testing.T, l daemon.Limits) *port {
	t.Helper()
	s := catest.New(t, catest.Options{})
	s.WaitReady()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Port = "agents"
	server := s.CA().NewServer()
	grpc_health_v1.RegisterHealthServer(s.CA().Guard(server), health.NewServer())
	var wg sync.WaitGroup
	wg.Go(func() { server.Serve(daemon.Limit(listener, l)) })
	t.Cleanup(func() { server.Stop(); wg.Wait() })
	return &port{s, t, listener.Addr().String()}
}

// from dials from one of the addresses of this machine that nobody else uses.
func from(host int, addr string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, byte(host>>8), byte(host))}, Timeout: longEnough}
	return d.Dial("tcp", addr)
}

const ownHost = 1 // who behaves comes from 127.0.0.1, and floods from elsewhere

// node is a bare agent.
type node struct {
	p      *port
	name   string
	cert   *tls.Certificate
	client apiv1.AuthorityClient
}

func (p *port) config(cert *tls.Certificate) *tls.Config {
	c := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13} // who the CA is, is not tested here
	if cert != nil {
		c.Certificates = []tls.Certificate{*cert}
	}
	return c
}

func (p *port) dial(cert *tls.Certificate) *grpc.ClientConn {
	p.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+p.addr, grpc.WithTransportCredentials(credentials.NewTLS(p.config(cert))),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return from(ownHost, p.addr) }))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return conn
}

// attest obtains the SVID of a node's agent.
func (p *port) attest(name string) (*node, error) {
	key, csr := newCSR(p.t)
	e := p.Evidence(p.AgentPod(name), api.AgentAudience(p.TD), time.Hour)
	conn := p.dial(nil)
	defer conn.Close()
	resp, err := apiv1.NewAuthorityClient(conn).AttestAgent(p.t.Context(), &apiv1.AttestAgentRequest{
		Evidence: &apiv1.Evidence{Kind: e.Kind, Data: e.Data}, Csr: csr, Protocol: api.Protocol,
	})
	if err != nil {
		return nil, api.FromStatus(err)
	}
	return &node{p: p, name: name, cert: &tls.Certificate{Certificate: resp.GetChain(), PrivateKey: key}}, nil
}

// agent is a node's agent with a session.
func (p *port) agent(name string) *node {
	p.t.Helper()
	n, err := p.attest(name)
	if err != nil {
		p.t.Fatal(err)
	}
	n.client = apiv1.NewAuthorityClient(p.dial(n.cert))
	stream, err := n.client.Session(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	e := p.Evidence(p.AgentPod(name), api.AgentAudience(p.TD), time.Hour)
	hello := &apiv1.Hello{Protocol: api.Protocol, Version: "test", Evidence: &apiv1.Evidence{Kind: e.Kind, Data: e.Data}}
	if err := stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Hello{Hello: hello}}); err != nil {
		p.t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		p.t.Fatal(api.FromStatus(err))
	}
	return n
}

func newCSR(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := canary.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, csr
}

func (n *node) item(p attestortest.Pod) *apiv1.IssueItem {
	n.p.t.Helper()
	_, csr := newCSR(n.p.t)
	e := n.p.Evidence(p, api.WorkloadAudience(n.p.TD), time.Hour)
	return &apiv1.IssueItem{Evidence: &apiv1.Evidence{Kind: e.Kind, Data: e.Data}, Csr: csr, Volume: "volume"}
}

// issue asks for the SVID of a pod of the node, which must be had, and returns how long it took.
func (n *node) issue() time.Duration {
	n.p.t.Helper()
	item := n.item(n.p.Pod("shop", "web-"+n.name, "web-"+n.name, n.name))
	ctx, cancel := context.WithTimeout(n.p.t.Context(), longEnough)
	defer cancel()
	began := time.Now()
	resp, err := n.client.Issue(ctx, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
	if err != nil || resp.GetResults()[0].GetSvid() == nil {
		n.p.t.Errorf("no SVID: %v %v", err, resp.GetResults())
	}
	return time.Since(began)
}

// raw speaks HTTP/2 as it likes. Its peer's frames are read into the air, and the last words kept.
type raw struct {
	*http2.Framer
	conn net.Conn
	over chan struct{} // closed when the other side has ended it

	mu      sync.Mutex
	goAway  http2.ErrCode
	headers map[string]string // the last that came
	resets  int
}

func (p *port) raw(host int, cert *tls.Certificate) (*raw, error) {
	c, err := from(host, p.addr)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(longEnough))
	secured := tls.Client(c, p.config(cert))
	if err := secured.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	return begin(p.t, secured)
}

// begin sends the preface.
func begin(t *testing.T, c net.Conn) (*raw, error) {
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		return nil, err
	}
	r := &raw{Framer: http2.NewFramer(c, c), conn: c, over: make(chan struct{}), headers: map[string]string{}}
	r.SetMaxReadFrameSize(1 << 20)
	r.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	t.Cleanup(func() { c.Close(); <-r.over })
	if err := r.WriteSettings(); err != nil {
		close(r.over)
		return nil, err
	}
	go r.listen()
	return r, nil
}

func (r *raw) listen() {
	defer close(r.over)
	for {
		f, err := r.ReadFrame()
		if err != nil {
			return
		}
		r.mu.Lock()
		switch f := f.(type) {
		case *http2.GoAwayFrame:
			r.goAway = f.ErrCode
		case *http2.RSTStreamFrame:
			r.resets++
		case *http2.MetaHeadersFrame:
			for _, h := range f.Fields {
				r.headers[h.Name] = h.Value
			}
		}
		r.mu.Unlock()
	}
}

// said returns what the other side said of a header; it waits until it did, or has ended the call or the connection.
func (r *raw) said(t *testing.T, name string) string {
	t.Helper()
	for began := time.Now(); time.Since(began) < longEnough; {
		r.mu.Lock()
		v, ok := r.headers[name]
		reset := r.resets > 0
		r.mu.Unlock()
		if ok || reset {
			return v
		}
		select {
		case <-r.over:
			return ""
		case <-time.After(time.Millisecond):
		}
	}
	t.Fatalf("no word of %s", name)
	return ""
}

// ended waits for the end of the connection.
func (r *raw) ended(t *testing.T) {
	t.Helper()
	select {
	case <-r.over:
	case <-time.After(longEnough):
		t.Fatal("the connection was not ended")
	}
}

// call returns the header block of a call.
func call(path string, more ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, h := range slices.Concat([][2]string{{":method", "POST"}, {":scheme", "https"}, {":path", path}, {":authority", "ca"},
		{"content-type", "application/grpc"}, {"te", "trailers"}}, pairs(more)) {
		e.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
	}
	return b.Bytes()
}

func pairs(all []string) (p [][2]string) {
	for i := 0; i+1 < len(all); i += 2 {
		p = append(p, [2]string{all[i], all[i+1]})
	}
	return p
}

func (r *raw) open(stream uint32, block []byte) error {
	return r.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block, EndHeaders: true})
}

// quantiles of durations, for reports.
func quantiles(all []time.Duration) string {
	slices.Sort(all)
	at := func(q float64) time.Duration { return all[int(q*float64(len(all)-1))].Round(10 * time.Microsecond) }
	return fmt.Sprintf("p50 %v, p90 %v, p99 %v of %d", at(.5), at(.9), at(.99), len(all))
}

func median(all []time.Duration) time.Duration {
	return slices.Sorted(slices.Values(all))[len(all)/2]
}

// plain dials a gRPC server on a Unix socket.
func plain(t *testing.T, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func pkcs8(t *testing.T, key crypto.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}
