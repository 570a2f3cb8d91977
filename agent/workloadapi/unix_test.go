package workloadapi

import (
	"context"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/latest"
	"github.com/signet-ca/signet/sds"
)

// patience is how long something may take to become true on a busy machine.
const patience = time.Minute

// serveUnix serves a pod on a real Unix socket, whose name is in the environment and nowhere else, until stop.
func serveUnix(t *testing.T, p *pod) (stop func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "spiffe.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+path)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := New(p.config(Config{})).Serve(ctx, l); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

// watcher is a workload that follows its identity as go-spiffe lets it.
type watcher struct {
	updates chan *workloadapi.X509Context
	errors  chan error
}

func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w.updates <- c }
func (w watcher) OnX509ContextWatchError(err error) {
	select {
	case w.errors <- err:
	default:
	}
}

func await[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("%s did not come", what)
		panic("unreachable")
	}
}

// A program that knows nothing but the variable, with a client that others wrote, gets its identity over a Unix socket
// without TLS and without a credential, and follows the rotation of its SVID and of the bundle.
//
// spiffe: E-01, E-03, E-04, E-05, A-02, A-07, A-09
func TestGoSPIFFE(t *testing.T) {
	p := newPod(t)
	serveUnix(t, p)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { p.give(1) }) // it may well come after the program has asked
	defer wg.Wait()

	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	verify := func(svid *x509svid.SVID, bundles x509bundle.Source) {
		t.Helper()
		if id, _, err := x509svid.Verify(svid.Certificates, bundles); err != nil || id.String() != ownID {
			t.Errorf("%v, %v", id, err)
		}
	}
	verify(svid, source)

	client, err := workloadapi.New(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	w := watcher{make(chan *workloadapi.X509Context, 8), make(chan error, 8)}
	watching, stopWatching := context.WithCancel(ctx)
	wg.Go(func() { client.WatchX509Context(watching, w) })
	defer stopWatching()
	first := await(t, "the first context", w.updates)
	verify(first.DefaultSVID(), first.Bundles)

	next := p.svid(ownID)
	p.change(func(s *Snapshot) { s.SVIDs = []*x509svid.SVID{next} })
	second := await(t, "the new SVID", w.updates)
	if !second.DefaultSVID().Certificates[0].Equal(next.Certificates[0]) {
		t.Error("the new SVID is not the one that was set")
	}
	root := p.newRoot()
	other := newAuthority(t, "other.example")
	p.change(func(s *Snapshot) {
		s.Bundle, s.Generation, s.Federated = p.bundle(root), 2, []*x509bundle.Bundle{other.bundle()}
	})
	third := await(t, "the new bundle", w.updates)
	if b, ok := third.Bundles.Get(p.td); !ok || !b.HasX509Authority(root) || !b.HasX509Authority(p.root) || len(b.X509Authorities()) != 2 {
		t.Error("the bundle is not the one that was set")
	}
	if !third.Bundles.Has(other.td) {
		t.Error("the foreign bundle is missing")
	}
	verify(third.DefaultSVID(), third.Bundles)
	p.change(func(s *Snapshot) { s.Federated = nil })
	if last := await(t, "the context without the foreign bundle", w.updates); last.Bundles.Has(other.td) {
		t.Error("the foreign bundle is still there")
	}

	for { // the source has followed too; its channel tells of one update at a time
		b, err := source.GetX509BundleForTrustDomain(p.td)
		svid, serr := source.GetX509SVID()
		if err == nil && serr == nil && b.HasX509Authority(root) && svid.Certificates[0].Equal(next.Certificates[0]) {
			break
		}
		if err := source.WaitUntilUpdated(ctx); err != nil {
			t.Fatal(err)
		}
	}
	bundles, err := workloadapi.FetchX509Bundles(ctx)
	if err != nil || bundles.Len() != 1 || !bundles.Has(p.td) {
		t.Errorf("bundles %v, %v", bundles, err)
	}
}

// What clients of go-spiffe make of each end: a refusal is told as it is and the client comes back, so a workload that
// gets its identity later needs no restart; a profile that is not served is told at once.
//
// spiffe: E-06
func TestGoSPIFFEErrors(t *testing.T) {
	p := newPod(t)
	stop := serveUnix(t, p)
	p.Set(&Snapshot{Refused: api.E(api.NamespaceNotAllowed, "no rule of the policy covers the namespace")})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	client, err := workloadapi.New(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()

	_, err = client.FetchX509SVID(ctx)
	wantError(t, "no identity", err, codes.PermissionDenied, api.NamespaceNotAllowed)
	_, err = client.FetchX509Bundles(ctx)
	wantError(t, "no identity", err, codes.PermissionDenied, api.NamespaceNotAllowed)
	_, err = client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "a"})
	wantError(t, "JWT", err, codes.Unimplemented, api.ProfileNotServed)
	_, err = client.FetchJWTBundles(ctx)
	wantError(t, "JWT bundles", err, codes.Unimplemented, api.ProfileNotServed)
	_, err = client.ValidateJWTSVID(ctx, "x.y.z", "a")
	wantError(t, "JWT validation", err, codes.Unimplemented, api.ProfileNotServed)

	w := watcher{make(chan *workloadapi.X509Context, 8), make(chan error, 8)}
	var wg sync.WaitGroup
	watching, stopWatching := context.WithCancel(ctx)
	wg.Go(func() { client.WatchX509Context(watching, w) })
	defer wg.Wait()
	defer stopWatching()
	wantError(t, "watch", await(t, "the refusal", w.errors), codes.PermissionDenied, api.NamespaceNotAllowed)
	p.give(1)
	got := await(t, "the identity", w.updates)
	if got.DefaultSVID().ID.String() != ownID {
		t.Errorf("got %v", got.DefaultSVID().ID)
	}
	stop()
	err = await(t, "the end of the socket", w.errors)
	for status.Code(err) == codes.PermissionDenied { // it may have come back more than once before there was an identity
		err = await(t, "the end of the socket", w.errors)
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("at the end of the socket: %v", err)
	}
	var reasons []api.Reason
	p.mu.Lock()
	for r := range p.closed {
		reasons = append(reasons, r)
	}
	p.mu.Unlock()
	if !slices.Contains(reasons, api.AgentStopping) {
		t.Errorf("streams ended with %v", reasons)
	}
}

// envoys is the Source of an SDS server for the same pod.
type envoys struct {
	material latest.Value[*sds.Material]
}

func (e *envoys) Open(context.Context, metadata.MD) (*sds.Workload, error) {
	return &sds.Workload{Name: "prod/payments", Material: &e.material}, nil
}

// A proxy and a program share the pod's socket: SDS needs no header, the Workload API does, and both end with the socket.
//
// spiffe: E-07
func TestBesideSDS(t *testing.T) {
	e := &envoys{}
	bubble(t, Config{MaxRequestBytes: sds.MaxRequestBytes}, func(t *testing.T, p *pod, w *world) {
		snap := p.give(1)
		identity, err := sds.NewIdentity(snap.SVIDs[0])
		if err != nil {
			t.Fatal(err)
		}
		trust, err := sds.NewTrust(snap.Bundle, nil, 1)
		if err != nil {
			t.Fatal(err)
		}
		e.material.Set(&sds.Material{Identity: identity, Trust: trust})
		program := w.svids()
		program.next()
		proxy, err := secret.NewSecretDiscoveryServiceClient(w.conn).StreamSecrets(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := proxy.Send(&discovery.DiscoveryRequest{TypeUrl: sds.TypeURL, ResourceNames: []string{sds.NameDefault, sds.NameRootCA}}); err != nil {
			t.Fatal(err)
		}
		if got, err := proxy.Recv(); err != nil || len(got.GetResources()) != 2 {
			t.Fatalf("secrets %v, %v", got, err)
		}
		w.stop()
		program.ends(codes.Unavailable, api.AgentStopping)
		_, err = proxy.Recv()
		wantError(t, "SDS", err, codes.Unavailable, api.AgentStopping)
	}, sds.New(sds.Config{Source: e}))
}
