package adversarial

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/latest"
	"github.com/signet-ca/signet/sds"
)

// patience is how long a real socket may take on a busy machine before a test gives up.
const patience = 30 * time.Second

// socket is a node as a proxy sees it: the agent with a real CA behind it, and SDS on a Unix socket.
type socket struct {
	*rig
	conn   *grpc.ClientConn
	client secret.SecretDiscoveryServiceClient
	count  int
}

// source says whose a stream is by its token, as the agent's process does.
type source struct {
	agent *agent.Agent
	ctx   context.Context // of the test: followers end with it
	wg    sync.WaitGroup

	mu    sync.Mutex
	known map[*agent.Identity]*latest.Value[*sds.Material]
}

// Open implements sds.Source.
func (s *source) Open(ctx context.Context, md metadata.MD) (*sds.Workload, error) {
	e, err := attestor.FromMetadata(md.Get("authorization"))
	if err != nil {
		return nil, err
	}
	id, until, err := s.agent.Admit(ctx, e, "shared")
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.known[id]
	if m == nil {
		m = new(latest.Value[*sds.Material])
		s.known[id] = m
		s.wg.Go(func() { s.follow(id, m) })
	}
	w := &sds.Workload{Name: id.Pod().Name, Material: m, ExpireAt: until}
	if svid := id.Held().Load().SVID; svid != nil {
		w.ID = svid.ID
	}
	return w, nil
}

func (s *source) follow(id *agent.Identity, m *latest.Value[*sds.Material]) {
	for {
		held, changed := id.Held().Get()
		trust, trustChanged := s.agent.Trust().Get()
		next := &sds.Material{}
		next.Trust, _ = sds.NewTrust(trust.Bundle, nil, trust.Generation.Sequence())
		if held.SVID != nil {
			next.Identity, _ = sds.NewIdentity(held.SVID)
		}
		m.Set(next)
		select {
		case <-s.ctx.Done():
			return
		case <-changed:
		case <-trustChanged:
		}
	}
}

// prover proves the agent with a fresh token each time.
type prover struct{ r *rig }

// Prove implements attestor.Prover.
func (p prover) Prove(context.Context) (attestor.Evidence, error) {
	return p.r.Evidence(p.r.agentPod, api.AgentAudience(p.r.TD), time.Hour), nil
}

func newSocket(t *testing.T) *socket {
	t.Helper()
	r := newRig(t, catest.Options{})
	b := r.CA().Bundle()
	trust, err := agent.NewTrust(b.TrustDomain, b.Generation, b.Roots)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(r.log, nil))
	a, err := agent.New(agent.Config{TrustDomain: r.TD, Dial: r.Dial, Trust: trust, Prover: prover{r}, Verifier: attestor.ByKeySets, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "sds") // a short path: a socket's has 108 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	src := &source{agent: a, ctx: ctx, known: map[*agent.Identity]*latest.Value[*sds.Material]{}}
	// Streams of a suite overlap: a client hears of an end before the server has counted it.
	server := sds.New(sds.Config{Source: src, Log: log, MaxStreamsPerWorkload: 256})
	g := grpc.NewServer(grpc.ForceServerCodecV2(api.ServerCodec()), grpc.MaxRecvMsgSize(sds.MaxRequestBytes), grpc.WaitForHandlers(true))
	server.Register(g)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := a.Run(ctx); err != nil {
			t.Errorf("the agent ended: %v", err)
		}
	})
	wg.Go(func() { g.Serve(l) })
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Close()
		g.Stop()
		cancel()
		wg.Wait()
		src.wg.Wait()
		os.RemoveAll(dir)
	})
	return &socket{rig: r, conn: conn, client: secret.NewSecretDiscoveryServiceClient(conn)}
}

// question is one request of either protocol.
type question struct {
	kind  string
	names []string
	node  *discoveryNode
}

// the protocols, by name
var protocols = []string{"sotw", "delta", "fetch"}

// open asks in one protocol and returns the names of the secrets in the first answer, or the refusal.
func (s *socket) open(protocol string, authorization []string, q question) (map[string]*tlsv3.Secret, error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	md := metadata.MD{}
	md.Set("authorization", authorization...)
	ctx = metadata.NewOutgoingContext(ctx, md)
	var packed []*anypb.Any
	var err error
	switch protocol {
	case "fetch":
		var resp *discovery.DiscoveryResponse
		resp, err = s.client.FetchSecrets(ctx, &discovery.DiscoveryRequest{TypeUrl: q.kind, ResourceNames: q.names, Node: q.node})
		packed = resp.GetResources()
	case "delta":
		stream, serr := s.client.DeltaSecrets(ctx)
		if serr != nil {
			return nil, serr
		}
		if serr := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: q.kind, ResourceNamesSubscribe: q.names, Node: q.node}); serr != nil && serr != io.EOF {
			return nil, serr
		}
		var resp *discovery.DeltaDiscoveryResponse
		resp, err = stream.Recv()
		for _, r := range resp.GetResources() {
			packed = append(packed, r.GetResource())
		}
	default:
		stream, serr := s.client.StreamSecrets(ctx)
		if serr != nil {
			return nil, serr
		}
		if serr := stream.Send(&discovery.DiscoveryRequest{TypeUrl: q.kind, ResourceNames: q.names, Node: q.node}); serr != nil && serr != io.EOF {
			return nil, serr
		}
		var resp *discovery.DiscoveryResponse
		resp, err = stream.Recv()
		packed = resp.GetResources()
	}
	if err != nil {
		return nil, err
	}
	secrets := map[string]*tlsv3.Secret{}
	for _, p := range packed {
		m := &tlsv3.Secret{}
		if err := proto.Unmarshal(p.GetValue(), m); err != nil {
			s.t.Fatal(err)
		}
		secrets[m.GetName()] = m
	}
	return secrets, nil
}

// ask judges one question: either it is refused for one of the reasons, or it is served these names and no others.
func (s *socket) ask(row, name, protocol string, authorization []string, q question, serves []string, want ...api.Reason) {
	s.t.Helper()
	s.count++
	name = row + " " + protocol + " " + name
	s.log.take()
	secrets, err := s.open(protocol, authorization, q)
	if err != nil {
		a := s.statusOf(name, err)
		if !slices.Contains(want, a.reason) {
			s.t.Errorf("%s: refused with %s (%s), want %v", name, a.reason, a.text, want)
			return
		}
		s.checkText(name, variant{item: s.item([]byte(strings.Join(authorization, " ")))}, a)
		return
	}
	if len(serves) == 0 {
		s.t.Errorf("%s: it was served %d secrets, want %v", name, len(secrets), want)
	}
	for served, m := range secrets {
		if !slices.Contains(serves, served) {
			s.t.Errorf("%s: it was served %s", name, clip(served))
		}
		s.checkSecret(name, m)
	}
}

// checkSecret fails for a certificate that is not the workload's own.
func (s *socket) checkSecret(name string, m *tlsv3.Secret) {
	s.t.Helper()
	if m.GetTlsCertificate() == nil {
		if v := m.GetValidationContext(); v == nil || v.GetCustomValidatorConfig() == nil {
			s.t.Errorf("%s: %s accepts anybody", name, m.GetName())
		}
		return
	}
	svid, err := x509svid.Parse(m.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), m.GetTlsCertificate().GetPrivateKey().GetInlineBytes())
	if err != nil || svid.ID.String() != webID {
		s.t.Errorf("%s: it was served an identity of somebody else (%v)", name, err)
	}
}
