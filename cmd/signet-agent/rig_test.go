package main

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/sds"
)

const (
	nodeName  = "node-1"
	webID     = "spiffe://example.org/ns/shop/sa/web"
	tokenLife = time.Hour
)

// rig is what the process is made of, in a bubble: a real CA, the agent, the adapter, and SDS over a connection in memory.
type rig struct {
	*catest.Server
	t      *testing.T
	agent  *agent.Agent
	src    *source
	conn   *grpc.ClientConn
	log    *lines
	stop   func() // ends SDS as SIGTERM does
	metric func(name, label string) float64
}

// lines is a log in memory.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

type ownToken struct {
	s   *catest.Server
	pod attestortest.Pod
}

func (o ownToken) Prove(context.Context) (attestor.Evidence, error) {
	return o.s.Evidence(o.pod, api.AgentAudience(o.s.TD), tokenLife), nil
}

func withRig(t *testing.T, o catest.Options, f func(t *testing.T, r *rig), change ...func(*agent.Config)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := catest.New(t, o)
		s.WaitReady()
		r := &rig{Server: s, t: t, log: &lines{}}
		log := slog.New(slog.NewTextHandler(r.log, nil))
		b := s.CA().Bundle()
		trust, err := agent.NewTrust(b.TrustDomain, b.Generation, b.Roots)
		if err != nil {
			t.Fatal(err)
		}
		cfg := agent.Config{TrustDomain: s.TD, Dial: s.Dial, Trust: trust, Prover: ownToken{s, s.AgentPod(nodeName)}, Verifier: attestor.ByKeySets, Log: log}
		for _, c := range change {
			c(&cfg)
		}
		if r.agent, err = agent.New(cfg); err != nil {
			t.Fatal(err)
		}
		r.src = newSource(r.agent, log)
		l := bufconn.Listen(256 << 10)
		var wg sync.WaitGroup
		agentCtx, stopAgent := context.WithCancel(t.Context())
		sdsCtx, stopSDS := context.WithCancel(t.Context())
		wg.Go(func() { r.agent.Run(agentCtx) })
		served := make(chan struct{})
		wg.Go(func() {
			defer close(served)
			if err := serveSDS(r.src, l, log).Run(sdsCtx); err != nil {
				t.Error(err)
			}
		})
		r.stop = func() {
			stopSDS()
			<-served
		}
		r.conn, err = grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		registry := prometheus.NewRegistry()
		registry.MustRegister(r.agent.Collector(), r.src.metrics)
		r.metric = func(name, label string) float64 { return gather(t, registry, name, label) }
		f(t, r)
		r.conn.Close()
		r.stop()
		stopAgent()
		wg.Wait()
	})
}

// gather returns the sum of a metric's values with that label's value, or of all where it is empty.
func gather(t *testing.T, r *prometheus.Registry, name, label string) float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (label == "" || m.GetLabel()[0].GetValue() == label) {
				sum += m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}

func (r *rig) pod(name string) attestortest.Pod { return r.Pod("shop", name, "web", nodeName) }

func (r *rig) token(p attestortest.Pod, ttl time.Duration) string {
	return string(r.Evidence(p, api.WorkloadAudience(r.TD), ttl).Data)
}

// proxy is one SDS stream, as Envoy has one for each secret.
type proxy struct {
	t      *testing.T
	stream secret.SecretDiscoveryService_StreamSecretsClient
	end    context.CancelFunc
	got    chan *discovery.DiscoveryResponse
	err    chan error
}

// open opens a stream with these authorization values and asks for names.
func (r *rig) open(authorization []string, names ...string) *proxy {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	md := metadata.MD{}
	md.Set("authorization", authorization...)
	stream, err := secret.NewSecretDiscoveryServiceClient(r.conn).StreamSecrets(metadata.NewOutgoingContext(ctx, md))
	if err != nil {
		r.t.Fatal(err)
	}
	p := &proxy{t: r.t, stream: stream, end: cancel, got: make(chan *discovery.DiscoveryResponse), err: make(chan error, 1)}
	stream.Send(&discovery.DiscoveryRequest{Node: &core.Node{Id: "envoy"}, TypeUrl: sds.TypeURL, ResourceNames: names})
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				p.err <- api.FromStatus(err)
				return
			}
			select {
			case p.got <- m:
			case <-ctx.Done():
			}
		}
	}()
	r.t.Cleanup(cancel)
	return p
}

// next returns the secrets of the next response, by name.
func (p *proxy) next(within time.Duration) (*discovery.DiscoveryResponse, map[string]*tls.Secret) {
	p.t.Helper()
	select {
	case m := <-p.got:
		all := map[string]*tls.Secret{}
		for _, a := range m.GetResources() {
			s := &tls.Secret{}
			if err := proto.Unmarshal(a.GetValue(), s); err != nil {
				p.t.Fatal(err)
			}
			all[s.GetName()] = s
		}
		return m, all
	case err := <-p.err:
		p.t.Fatalf("the stream ended: %v", err)
	case <-time.After(within):
		p.t.Fatalf("nothing came within %s", within)
	}
	return nil, nil
}

func (p *proxy) quiet(during time.Duration) {
	p.t.Helper()
	select {
	case m := <-p.got:
		p.t.Fatalf("it was sent %v", m.GetVersionInfo())
	case err := <-p.err:
		p.t.Fatalf("the stream ended: %v", err)
	case <-time.After(during):
	}
}

// ends waits for the stream's end and returns its reason.
func (p *proxy) ends(within time.Duration) api.Reason {
	p.t.Helper()
	timeout := time.After(within)
	for {
		select {
		case <-p.got:
		case err := <-p.err:
			return api.ReasonOf(err)
		case <-timeout:
			p.t.Fatalf("the stream did not end within %s", within)
		}
	}
}

func (p *proxy) answer(m *discovery.DiscoveryResponse, refused string, names ...string) {
	p.t.Helper()
	r := &discovery.DiscoveryRequest{TypeUrl: sds.TypeURL, ResourceNames: names, VersionInfo: m.GetVersionInfo(), ResponseNonce: m.GetNonce()}
	if refused != "" {
		r.ErrorDetail = &rpcstatus.Status{Message: refused}
	}
	if err := p.stream.Send(r); err != nil {
		p.t.Fatal(err)
	}
}

func svidOf(t *testing.T, s *tls.Secret) *x509svid.SVID {
	t.Helper()
	svid, err := x509svid.Parse(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), s.GetTlsCertificate().GetPrivateKey().GetInlineBytes())
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

// followers tells how many identities are followed.
func (r *rig) followers() int {
	synctest.Wait()
	r.src.mu.Lock()
	defer r.src.mu.Unlock()
	return len(r.src.followers)
}

// streams returns what the CA heard of a pod's streams.
func (r *rig) streams(pod string) []*apiv1.Stream {
	r.t.Helper()
	time.Sleep(2 * time.Second)
	l := bufconn.Listen(64 << 10)
	server := r.CA().NewAdminServer(catest.AsUser(0))
	go server.Serve(l)
	defer server.Stop()
	conn, err := grpc.NewClient("passthrough:///admin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close()
	resp, err := apiv1.NewAdminClient(conn).ListSVIDs(r.t.Context(), &apiv1.ListSVIDsRequest{})
	if err != nil {
		r.t.Fatal(err)
	}
	for _, h := range resp.GetHoldings() {
		if h.GetHolding().GetPodName() == pod {
			return h.GetHolding().GetStreams()
		}
	}
	return nil
}
