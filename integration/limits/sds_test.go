//go:build integration

package limits

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/internal/daemon"
	"github.com/signet-ca/signet/internal/latest"
	"github.com/signet-ca/signet/internal/run"
	"github.com/signet-ca/signet/sds"
)

// socket is the shared socket of a node, served as signet-agent does: a pod is known by its real token. What its pods have
// comes from the test.
type socket struct {
	t        *testing.T
	path     string
	issuer   *attestortest.Issuer
	verifier attestor.Attestor

	mu   sync.Mutex
	pods map[string]*latest.Value[*sds.Material] // by UID
}

// newSocket serves one; the Source of cfg is the socket itself.
func newSocket(t *testing.T, limits daemon.Limits, cfg sds.Config) *socket {
	t.Helper()
	issuer, err := attestortest.NewIssuer(attestortest.Config{Algorithm: "RS256"})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := attestor.StaticKeys(issuer.JWKS())
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{issuer.Name(): keys}})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "limits") // t.TempDir is too long a name for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &socket{t: t, path: filepath.Join(dir, "s"), issuer: issuer, verifier: verifier, pods: map[string]*latest.Value[*sds.Material]{}}
	l, err := daemon.ListenUnix(s.path, 0o666)
	if err != nil {
		t.Fatal(err)
	}
	limited := daemon.Limit(l, limits)
	cfg.Source = s
	secrets := sds.New(cfg)
	server := grpc.NewServer(append(sds.ServerOptions(), grpc.Creds(daemon.Plain()))...)
	secrets.Register(server)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	serve := daemon.Serve("sds", server, limited, slog.New(slog.DiscardHandler))
	wg.Go(func() { run.All(ctx, serve) })
	t.Cleanup(func() {
		secrets.Close()
		cancel()
		wg.Wait()
	})
	return s
}

// Open implements sds.Source.
func (s *socket) Open(ctx context.Context, md metadata.MD) (*sds.Workload, error) {
	e, err := attestor.FromMetadata(md.Get("authorization"))
	if err != nil {
		return nil, err
	}
	c, err := s.verifier.Attest(ctx, e, api.WorkloadAudience(spiffeid.RequireTrustDomainFromString("example.org")), time.Now())
	if err != nil {
		return nil, err
	}
	daemon.ConnOf(ctx).Admit(c.PodUID)
	return &sds.Workload{Name: c.PodName, Material: s.material(c.PodUID), ExpireAt: c.ExpireAt}, nil
}

func (s *socket) material(uid string) *latest.Value[*sds.Material] {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.pods[uid]
	if v == nil {
		v = &latest.Value[*sds.Material]{}
		s.pods[uid] = v
	}
	return v
}

// maker makes what pods have.
type maker struct {
	p    *port
	root *x509bundle.Bundle
}

func newMaker(t *testing.T) *maker {
	t.Helper()
	p := newPort(t, daemon.Limits{})
	m := &maker{p: p}
	b := p.CA().Bundle()
	m.root = x509bundle.FromX509Authorities(b.TrustDomain, b.Roots)
	return m
}

// next is an identity that nobody has yet, and the bundle.
func (m *maker) next(t *testing.T) *sds.Material {
	t.Helper()
	got, err := m.p.attest("node-2") // any SVID will do
	if err != nil {
		t.Fatal(err)
	}
	svid, err := x509svid.ParseRaw(slices.Concat(got.cert.Certificate...), pkcs8(t, got.cert.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	identity, err := sds.NewIdentity(svid)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := sds.NewTrust(m.root, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	return &sds.Material{Identity: identity, Trust: trust}
}

func (s *socket) token(name string) (pod attestortest.Pod, header string) {
	s.t.Helper()
	pod = attestortest.NewPod("shop", name, name, "node-1")
	token, err := s.issuer.Token(pod, api.WorkloadAudience(spiffeid.RequireTrustDomainFromString("example.org")), time.Hour)
	if err != nil {
		s.t.Fatal(err)
	}
	return pod, "Bearer " + token
}

// stream opens a stream and asks for the own certificate.
func stream(ctx context.Context, conn *grpc.ClientConn, header string) (secret.SecretDiscoveryService_StreamSecretsClient, error) {
	st, err := secret.NewSecretDiscoveryServiceClient(conn).StreamSecrets(metadata.AppendToOutgoingContext(ctx, "authorization", header))
	if err != nil {
		return nil, err
	}
	err = st.Send(&discovery.DiscoveryRequest{Node: &core.Node{Id: "envoy"}, TypeUrl: sds.TypeURL, ResourceNames: []string{sds.NameDefault}})
	if err == io.EOF { // Recv says why
		err = nil
	}
	return st, err
}

func answer(st secret.SecretDiscoveryService_StreamSecretsClient, r *discovery.DiscoveryResponse, nack string) error {
	req := &discovery.DiscoveryRequest{TypeUrl: sds.TypeURL, ResourceNames: []string{sds.NameDefault}, ResponseNonce: r.GetNonce(), VersionInfo: r.GetVersionInfo()}
	if nack != "" {
		req.ErrorDetail = &rpcstatus.Status{Code: 13, Message: nack}
	}
	return st.Send(req)
}

// count returns what may leak: goroutines, file descriptors, and bytes of heap that are reachable.
func count(t *testing.T) (goroutines, files int, heap uint64) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("there is no /proc/self/fd here: ", err)
	}
	var all []uint64
	for range 9 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		all = append(all, m.HeapAlloc)
	}
	slices.Sort(all)
	return runtime.NumGoroutine(), len(entries), all[len(all)/2]
}

// TestReconnects has proxies come and go 10,000 times, each over a connection of its own with a token and an answered
// secret. Goroutines and file descriptors are then exactly where they were, and the heap within 2 %.
//
// threat: D21
func TestReconnects(t *testing.T) {
	// All proxies here are one process, which signet-agent would not let come so often. They hear of an end before the server
	// has counted it, so those that have gone may take places for a while.
	s := newSocket(t, daemon.Limits{Port: "sds", Strangers: 512, PerPeer: 512, Rate: 1 << 20, Bytes: 128 << 10, PerMember: 512}, sds.Config{MaxStreamsPerWorkload: 512})
	pod, header := s.token("web")
	s.material(pod.UID).Set(newMaker(t).next(t))
	once := func() error {
		conn := plain(t, s.path)
		defer conn.Close()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		st, err := stream(ctx, conn, header)
		if err != nil {
			return err
		}
		r, err := st.Recv()
		if err != nil {
			return err
		}
		return answer(st, r, "")
	}
	storm := func(times int) {
		var wg sync.WaitGroup
		var failed atomic.Int64
		for range 8 {
			wg.Go(func() {
				for range times / 8 {
					if err := once(); err != nil && failed.Add(1) == 1 {
						t.Error(api.FromStatus(err))
					}
				}
			})
		}
		wg.Wait()
		if n := failed.Load(); n > 0 {
			t.Errorf("%d of %d reconnects failed", n, times)
		}
	}
	times := 10000
	if testing.Short() {
		times = 1000
	}
	storm(1000) // what is made once and kept, in pools and maps, is there after this
	var goroutines, files int
	var heap uint64
	rest(t, &goroutines, &files, &heap)
	began := time.Now()
	storm(times)
	took := time.Since(began)
	var g, f int
	var h uint64
	settle(t, func() string {
		if g, f, h = count(t); g != goroutines || f != files || float64(h) > 1.02*float64(heap) {
			return fmt.Sprintf("%d goroutines, %d files, %d bytes; before %d, %d, %d", g, f, h, goroutines, files, heap)
		}
		return ""
	})
	t.Logf("%d reconnects in %v: %d goroutines and %d files as before, heap %+.2f %% of %d KiB", times, took.Round(time.Millisecond),
		g, f, 100*(float64(h)/float64(heap)-1), heap>>10)
}

// rest waits until what may leak is the same three times in a row.
func rest(t *testing.T, goroutines, files *int, heap *uint64) {
	t.Helper()
	same := 0
	settle(t, func() string {
		g, f, h := count(t)
		if g == *goroutines && f == *files {
			same++
		} else {
			same = 0
		}
		*goroutines, *files, *heap = g, f, h
		if same < 3 {
			return "no rest"
		}
		return ""
	})
}

// TestNothingElse finds nothing on the ports that pods reach but what they are for: no profile, no heap, no level of the
// log, no reflection.
//
// threat: D24
func TestNothingElse(t *testing.T) {
	s := newSocket(t, daemon.SharedSocket(nil), sds.Config{Peer: daemon.PeerOf})
	conn := plain(t, s.path)
	defer conn.Close()
	for _, method := range []string{
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
		"/grpc.channelz.v1.Channelz/GetTopChannels", "/envoy.service.status.v3.ClientStatusDiscoveryService/FetchClientStatus",
		"/signet.v1.Admin/GetStatus", "/signet.v1.Authority/Issue", "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources",
	} {
		if err := conn.Invoke(t.Context(), method, &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v, want Unimplemented", method, err)
		}
	}
	h := daemon.HTTP{Address: freePort(t), NotReady: func() []string { return nil }, Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { h.Task().Run(ctx) })
	defer wg.Wait()
	defer cancel()
	get := func(method, path string) (int, error) {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+h.Address+path, nil)
		if err != nil {
			return 0, err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		return resp.StatusCode, nil
	}
	settle(t, func() string {
		if code, err := get("GET", "/livez"); err != nil || code != http.StatusOK {
			return fmt.Sprint(code, err)
		}
		return ""
	})
	for _, path := range []string{"/", "/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/profile", "/debug/vars", "/debug/requests", "/heap", "/log", "/loglevel", "/quitquitquit", "/config", "/metrics/../debug/pprof/heap"} {
		if code, err := get("GET", path); err != nil || code != http.StatusNotFound {
			t.Errorf("GET %s: %d %v, want 404", path, code, err)
		}
	}
	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS"} {
		if code, err := get(method, "/livez"); err != nil || code != http.StatusMethodNotAllowed {
			t.Errorf("%s /livez: %d %v, want 405", method, code, err)
		}
	}
}
