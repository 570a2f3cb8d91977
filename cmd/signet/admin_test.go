package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// testNow is what commands under test take for the current time, so that tables with ages are the same each time.
var testNow = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

// serveAdmin serves any Admin service at a Unix socket, as a CA does, until the returned function is called.
func serveAdmin(socket string, srv apiv1.AdminServer) (stop func(), err error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	s := grpc.NewServer()
	apiv1.RegisterAdminServer(s, srv)
	var wg sync.WaitGroup
	wg.Go(func() { s.Serve(l) })
	return func() {
		s.Stop()
		wg.Wait()
	}, nil
}

// A fakeAdmin answers from fixed data. What it answers depends on its scene, which scripts change while it runs.
type fakeAdmin struct {
	apiv1.UnimplementedAdminServer
	root, inter *x509.Certificate

	mu     sync.Mutex
	looked *sync.Cond            // on mu; each listing that was answered
	scene  string                // guarded by mu
	looks  int                   // listings answered; guarded by mu
	bans   map[string]*apiv1.Ban // by UID; guarded by mu
	rot    rotationFake
}

func newFakeAdmin(tb testing.TB) *fakeAdmin {
	tb.Helper()
	f := &fakeAdmin{scene: "shop"}
	f.looked = sync.NewCond(&f.mu)
	rootKey, interKey := fixedKey(1), fixedKey(2)
	f.root = fixedAuthority(tb, "signet root 7f3a", rootKey, nil, rootKey, 365*24*time.Hour)
	f.inter = fixedAuthority(tb, "signet intermediate c41e", interKey, f.root, rootKey, 24*time.Hour)
	return f
}

// fixedKey is the same Ed25519 key each time, so that certificates under it are, too.
func fixedKey(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

func fixedAuthority(tb testing.TB, name string, key ed25519.PrivateKey, parent *x509.Certificate, parentKey ed25519.PrivateKey, life time.Duration) *x509.Certificate {
	tb.Helper()
	c := &x509.Certificate{
		SerialNumber:          big.NewInt(int64(key[0])),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             testNow.Add(-time.Hour),
		NotAfter:              testNow.Add(life),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
		SubjectKeyId:          bytes.Repeat([]byte{0x70 + key[0]}, 20),
	}
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(nil, c, parent, key.Public(), parentKey)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}

func (f *fakeAdmin) play(scene string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.turn(scene)
}

// waitLooks returns once n more listings were answered. A watcher asks again only when it has printed, so after two
// more looks the first of them is on its stdout.
func (f *fakeAdmin) waitLooks(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for until := f.looks + n; f.looks < until; {
		f.looked.Wait()
	}
}

// on returns the scene, and the error of a scene that is one.
func (f *fakeAdmin) on(ctx context.Context) (string, error) {
	f.mu.Lock()
	scene := f.scene
	f.looks++
	f.looked.Broadcast()
	f.mu.Unlock()
	switch scene {
	case "forbidden":
		return scene, api.ToStatus(api.E(api.AdminForbidden, "user 1000 may not ask")).Err()
	case "starting":
		e := api.E(api.CAUnavailable, "the CA is starting")
		e.CorrelationID = "0123456789abcdef"
		return scene, api.ToStatus(e).Err()
	case "broken":
		return scene, api.ToStatus(api.E(api.Internal, "it broke \x1b[31mhere")).Err()
	case "hanging":
		<-ctx.Done()
		return scene, ctx.Err()
	}
	return scene, nil
}

// GetStatus tells about a CA that is ready, but for the scene "unready".
func (f *fakeAdmin) GetStatus(ctx context.Context, _ *apiv1.GetStatusRequest) (*apiv1.GetStatusResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	st := &apiv1.GetStatusResponse{TrustDomain: "example.org", Replica: "ca-0", Version: "v0.1.0", Epoch: 1, Number: 5,
		StartedAt: timestamppb.New(testNow.Add(-time.Hour)), Agents: 3, Issued: 17, Refused: 2}
	switch scene {
	case "unready", "announcing":
		st.Upstream = &apiv1.UpstreamStatus{Kind: "disk", Reason: string(api.UpstreamFiles), Detail: "they do not fit", Since: before(time.Hour), ProbedAt: before(time.Minute),
			IntermediateNotAfter: hence(15 * time.Hour)}
		if scene == "announcing" {
			st.Upstream = &apiv1.UpstreamStatus{Kind: "disk", Healthy: true, ProbedAt: before(time.Minute), Announced: []string{fakeNew}, IntermediateNotAfter: hence(15 * time.Hour)}
		}
	case "empty":
		st.Upstream = &apiv1.UpstreamStatus{Kind: "disk"}
	case "signing":
		st.Upstream = &apiv1.UpstreamStatus{Kind: "selfsigned", Healthy: true, ProbedAt: before(time.Minute), Since: before(time.Hour), IntermediateNotAfter: hence(20 * time.Hour),
			MintBudget: 20, MintLeft: 19}
	}
	if scene == "unready" {
		st.NotReady = []string{"upstream vault", "ledger"}
	}
	return st, nil
}

// GetBundle returns one root, none in the scene "empty", and a wrong hash in the scene "forged".
func (f *fakeAdmin) GetBundle(ctx context.Context, _ *apiv1.GetBundleRequest) (*apiv1.GetBundleResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	roots := []*x509.Certificate{f.root}
	if scene == "empty" {
		roots = nil
	}
	hash := api.BundleHash(roots)
	if scene == "forged" {
		hash[0] ^= 1
	}
	b := &apiv1.Bundle{Epoch: 1, Number: 5, Hash: hash[:]}
	for _, c := range roots {
		b.Roots = append(b.Roots, c.Raw)
	}
	return &apiv1.GetBundleResponse{TrustDomain: "example.org", Bundle: b}, nil
}

// ListAuthorities returns a root and an intermediate; in the scene "rotating" a second root stands beside them, and in
// "draining" one that the first has cross-signed, one that was announced and two that are gone.
func (f *fakeAdmin) ListAuthorities(ctx context.Context, _ *apiv1.ListAuthoritiesRequest) (*apiv1.ListAuthoritiesResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	resp := &apiv1.ListAuthoritiesResponse{TrustDomain: "example.org"}
	if scene == "empty" {
		return resp, nil
	}
	info := func(c *x509.Certificate, kind, state, replica string) {
		resp.Authorities = append(resp.Authorities, &apiv1.AuthorityInfo{
			Id: hex.EncodeToString(c.SubjectKeyId), Kind: kind, State: state, Subject: c.Subject.String(),
			Parent: hex.EncodeToString(f.root.SubjectKeyId), Replica: replica, Key: "Ed25519",
			NotBefore: timestamppb.New(c.NotBefore), NotAfter: timestamppb.New(c.NotAfter), Certificate: c.Raw,
		})
	}
	info(f.root, "root", "active", "")
	info(f.inter, "intermediate", "active", "ca-0")
	switch scene {
	case "hostile":
		for _, in := range resp.Authorities {
			in.Upstream, in.CrossBy, in.State = "\x1b[31mvault", "\x1b[2J", "active\r\nforged"
		}
	case "draining":
		old := resp.Authorities[0]
		old.State, old.Upstream, old.KeySealed, old.Since = "retiring", "sealed", true, oldGeneration
		old.PreparedAt, old.PublishedAt, old.ActiveAt, old.RetiringAt = before(9000*time.Hour), before(8999*time.Hour), before(8998*time.Hour), before(time.Hour)
		next := proto.CloneOf(old)
		next.Id, next.State, next.Since, next.Subject = fakeNew, "active", newGeneration, "CN=signet root 9d01"
		next.Parent, next.CrossBy, next.CrossNotAfter, next.CrossCertificate = fakeNew, old.Id, old.NotAfter, f.inter.Raw
		next.PreparedAt, next.PublishedAt, next.ActiveAt, next.RetiringAt = before(3*time.Hour), before(2*time.Hour), before(time.Hour), nil
		resp.Authorities = []*apiv1.AuthorityInfo{old, next, resp.Authorities[1]}
		announced := proto.CloneOf(next)
		announced.Id, announced.State, announced.Since, announced.CrossBy = "75"+strings.Repeat("bb", 19), "announced", 0, ""
		announced.PreparedAt, announced.PublishedAt, announced.ActiveAt = nil, nil, nil
		resp.Announced = []*apiv1.AuthorityInfo{announced}
		resp.Gone = []*apiv1.GoneAuthority{
			{Id: strings.Repeat("6f", 20), Hash: strings.Repeat("ab", 32), At: before(9000 * time.Hour), NotAfter: before(time.Hour), Tainted: true},
			{Id: strings.Repeat("70", 20), Hash: strings.Repeat("cd", 32), At: before(8000 * time.Hour), NotAfter: old.NotAfter}}
	case "rotating":
		info(f.root, "root", "prepared", "")
		second := resp.Authorities[2]
		second.Id = "71" + strings.Repeat("aa", 19)
		second.Parent = second.Id
	}
	return resp, nil
}

// ListSVIDs filters as the CA does.
func (f *fakeAdmin) ListSVIDs(ctx context.Context, req *apiv1.ListSVIDsRequest) (*apiv1.ListSVIDsResponse, error) {
	scene, err := f.on(ctx)
	if err != nil {
		return nil, err
	}
	resp := &apiv1.ListSVIDsResponse{}
	for _, h := range f.holdings(scene) {
		if ns := req.GetNamespace(); ns != "" && h.GetHolding().GetNamespace() != ns {
			continue
		}
		if id := req.GetSpiffeId(); id != "" && h.GetHolding().GetSpiffeId() != id {
			continue
		}
		resp.Holdings = append(resp.Holdings, h)
	}
	return resp, nil
}

// The generations of the bundle that streams have.
const (
	oldGeneration = 1<<32 | 4
	newGeneration = 1<<32 | 5
)

func (f *fakeAdmin) holdings(scene string) []*apiv1.NodeHolding {
	switch scene {
	case "empty":
		return nil
	case "hostile":
		h := f.holding("shop", "evil-0", "node-a", 3, 40*time.Minute)
		h.Holding.SpiffeId = "spiffe://example.org/\x1b]0;owned\a"
		h.Holding.PodName = "evil\r\nshop   web-1"
		h.Holding.LastError = "\x1b[2J"
		h.Holding.Streams = []*apiv1.Stream{{Id: 1, Proxy: "\x1b[31mred\u202e", Protocol: "sotw", Names: []string{"default\tx"},
			Nack: "no\x07\n\x1b[1Aforged line"}}
		return []*apiv1.NodeHolding{h}
	}
	web, cart, idle := f.holding("shop", "web-1", "node-a", 0xa1, 41*time.Minute), f.holding("shop", "cart-0", "node-b", 0xb2, 52*time.Minute),
		f.holding("bank", "ledger-0", "node-b", 0xc3, 20*time.Minute)
	web.Holding.Streams = []*apiv1.Stream{
		{Id: 7, Proxy: "envoy-web", Protocol: "delta", Names: []string{"default", "ROOTCA"}, WantsBundle: true, AckedSerial: web.Holding.Serial,
			AckedGeneration: newGeneration, PushedGeneration: newGeneration, Acks: 4, AckedHash: []byte{0xab}},
		{Id: 8, Proxy: "envoy-admin", Protocol: "sotw", Names: []string{"ROOTCA"}, WantsBundle: true, AckedGeneration: oldGeneration,
			PushedGeneration: newGeneration, Acks: 1},
	}
	cart.Holding.Streams = []*apiv1.Stream{{Id: 9, Proxy: "envoy-cart", Protocol: "sotw", Names: []string{"default"},
		AckedSerial: cart.Holding.Serial, Acks: 2}}
	switch scene {
	case "trouble":
		cart.Holding.NotAfter = timestamppb.New(testNow.Add(-3 * time.Minute))
		cart.Holding.RenewAt = timestamppb.New(testNow.Add(-33 * time.Minute))
		cart.Holding.LastError = "POD_DELETED"
		web.Holding.Streams[1].Nack = "bad certificate"
		web.Holding.Streams[1].Nacks = 1
	case "renewed":
		web.Holding.Serial = "d4" + web.Holding.Serial[2:]
		return []*apiv1.NodeHolding{web, idle}
	}
	return []*apiv1.NodeHolding{idle, cart, web}
}

func (f *fakeAdmin) holding(ns, pod, node string, serial byte, left time.Duration) *apiv1.NodeHolding {
	name, _, _ := strings.Cut(pod, "-")
	return &apiv1.NodeHolding{
		Node: node, NodeUid: "uid-of-" + node, ReportedAt: timestamppb.New(testNow),
		Holding: &apiv1.Holding{
			Key: ns + "/" + pod + "/0", SpiffeId: fmt.Sprintf("spiffe://example.org/ns/%s/sa/%s", ns, name), Namespace: ns, PodName: pod,
			PodUid: "uid-of-" + pod, Serial: strings.Repeat(hex.EncodeToString([]byte{serial}), 20),
			NotBefore: timestamppb.New(testNow.Add(left - time.Hour)), NotAfter: timestamppb.New(testNow.Add(left)),
			RenewAt: timestamppb.New(testNow.Add(left - 10*time.Minute)), IssuerKeyId: hex.EncodeToString(f.inter.SubjectKeyId),
		},
	}
}
