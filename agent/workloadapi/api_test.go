package workloadapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/signet-ca/signet/api"
)

// calls makes every call of the Workload API and returns how each ended, or nil where something came.
func (w *world) calls(ctx context.Context) map[string]error {
	first := func(s grpc.ClientStream, err error) error {
		if err != nil {
			return err
		}
		return s.RecvMsg(&emptypb.Empty{}) // any message reads as one without known fields
	}
	return map[string]error{
		"FetchX509SVID":    first(w.api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})),
		"FetchX509Bundles": first(w.api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})),
		"FetchJWTSVID": func() error {
			_, err := w.api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
			return err
		}(),
		"FetchJWTBundles": first(w.api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})),
		"ValidateJWTSVID": func() error {
			_, err := w.api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "x.y.z"})
			return err
		}(),
		"FetchWITSVID":    first(w.api.FetchWITSVID(ctx, &workload.WITSVIDRequest{})),
		"FetchWITBundles": first(w.api.FetchWITBundles(ctx, &workload.WITBundlesRequest{})),
	}
}

// Every call without the header, exactly as the specification has it, is refused before anything else: also one that is
// not served, and one for which there is nothing yet.
//
// spiffe: E-02
// threat: D13
func TestHeader(t *testing.T) {
	for _, tc := range []struct {
		name   string
		header []string
	}{
		{"none", nil},
		{"another value", []string{"workload.spiffe.io", "1"}},
		{"upper case", []string{"workload.spiffe.io", "True"}},
		{"empty", []string{"workload.spiffe.io", ""}},
		{"twice", []string{"workload.spiffe.io", "true", "workload.spiffe.io", "true"}},
		{"true and false", []string{"workload.spiffe.io", "true", "workload.spiffe.io", "false"}},
		{"that of another API", []string{"broker.spiffe.io", "true"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
				for call, err := range w.calls(metadata.AppendToOutgoingContext(context.Background(), tc.header...)) {
					wantError(t, call, err, codes.InvalidArgument, api.HeaderMissing)
				}
				if p.opens() != 0 || p.refusals()[api.HeaderMissing] != 7 {
					t.Errorf("%d streams were opened, refusals %v", p.opens(), p.refusals())
				}
			})
		})
	}
}

// What is not served says so: profiles that come later, calls and services that nobody knows. Health is none of them.
//
// spiffe: E-06
func TestNotServed(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		p.give(1)
		got := w.calls(header(context.Background()))
		for _, call := range []string{"FetchX509SVID", "FetchX509Bundles"} {
			if err := got[call]; err != nil {
				t.Errorf("%s: %v", call, err)
			}
			delete(got, call)
		}
		for call, err := range got {
			wantError(t, call, err, codes.Unimplemented, api.ProfileNotServed)
		}
		if msg := status.Convert(got["FetchJWTSVID"]).Message(); msg != "JWT-SVIDs come with a later version; X.509-SVIDs are served" {
			t.Errorf("message %q", msg)
		}
		for _, method := range []string{"/SpiffeWorkloadAPI/FetchEverything", "/spiffe.broker.API/Fetch"} {
			if err := w.conn.Invoke(header(context.Background()), method, &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != codes.Unimplemented {
				t.Errorf("%s: %v", method, err)
			}
		}
		_, err := healthpb.NewHealthClient(w.conn).Check(context.Background(), &healthpb.HealthCheckRequest{})
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("health: %v", err)
		}
	})
}

// beside is another service of the same socket.
type beside struct{ closed chan struct{} }

func (b beside) Register(r grpc.ServiceRegistrar) {
	r.RegisterService(&grpc.ServiceDesc{ServiceName: "test.Beside"}, nil)
}
func (b beside) Close() { close(b.closed) }

// Reflection lists the Workload API as it is specified, nothing added, and what stands beside it.
//
// spiffe: E-07, E-08
func TestReflection(t *testing.T) {
	b := beside{make(chan struct{})}
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		s, err := reflectionpb.NewServerReflectionClient(w.conn).ServerReflectionInfo(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		ask := func(r *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
			if err := s.Send(r); err != nil {
				t.Fatal(err)
			}
			resp, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			return resp
		}
		var names []string
		for _, svc := range ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}).GetListServicesResponse().GetService() {
			names = append(names, svc.GetName())
		}
		if want := []string{"SpiffeWorkloadAPI", "grpc.reflection.v1.ServerReflection", "test.Beside"}; !slices.Equal(names, want) {
			t.Errorf("services %v, want %v", names, want)
		}
		files := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{
			FileContainingSymbol: "SpiffeWorkloadAPI"}}).GetFileDescriptorResponse().GetFileDescriptorProto()
		fd := &descriptorpb.FileDescriptorProto{}
		if len(files) == 0 {
			t.Fatal("no description of the Workload API")
		}
		if err := proto.Unmarshal(files[0], fd); err != nil {
			t.Fatal(err)
		}
		var specified, served []string
		for _, m := range fd.GetService()[0].GetMethod() {
			specified = append(specified, m.GetName())
		}
		d := w.srv.service()
		for _, m := range d.Methods {
			served = append(served, m.MethodName)
		}
		for _, m := range d.Streams {
			served = append(served, m.StreamName)
		}
		slices.Sort(specified)
		slices.Sort(served)
		if diff := cmp.Diff(specified, served); diff != "" {
			t.Errorf("calls (-specified +served):\n%s", diff)
		}
		s.CloseSend()
		w.conn.Close()
		w.stop()
		<-b.closed // the service beside it ends with the socket
	}, b)
}

// An SVID goes out complete: leaf first, DER, its key as PKCS#8, the bundle of its own trust domain; no hint and no
// revocation list.
//
// spiffe, E-05
func TestResponse(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		svid func(p *pod) *x509svid.SVID
	}{
		{"ECDSA", func(p *pod) *x509svid.SVID { return p.svid(ownID) }},
		{"RSA", func(p *pod) *x509svid.SVID {
			s := p.svid(ownID)
			leaf := *s.Certificates[0]
			leaf.SignatureAlgorithm = x509.UnknownSignatureAlgorithm
			s.Certificates[0] = p.sign(&leaf, p.inter, rsaKey.Public(), p.intKey)
			s.PrivateKey = rsaKey
			return s
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
				svid := tc.svid(p)
				p.Set(&Snapshot{SVIDs: []*x509svid.SVID{svid}, Bundle: p.bundle(), Generation: 1})
				m := w.svids().next()
				parse(t, m)
				s := m.GetSvids()[0]
				want := append(slices.Clone(svid.Certificates[0].Raw), svid.Certificates[1].Raw...)
				if !slices.Equal(s.GetX509Svid(), want) || s.GetSpiffeId() != ownID || !slices.Equal(s.GetBundle(), p.root.Raw) {
					t.Error("chain, name or bundle differ")
				}
				key, err := x509.ParsePKCS8PrivateKey(s.GetX509SvidKey())
				if err != nil {
					t.Fatal(err)
				}
				switch key := key.(type) {
				case *ecdsa.PrivateKey:
					if !key.Equal(svid.PrivateKey) {
						t.Error("another key")
					}
				case *rsa.PrivateKey:
					if !key.Equal(svid.PrivateKey) {
						t.Error("another key")
					}
				}
				if s.GetHint() != "" || len(m.GetCrl()) != 0 || len(m.GetFederatedBundles()) != 0 || len(m.GetSvids()) != 1 {
					t.Errorf("hint %q, %d CRLs, %d foreign bundles, %d SVIDs", s.GetHint(), len(m.GetCrl()), len(m.GetFederatedBundles()), len(m.GetSvids()))
				}
			})
		})
	}
}

// The default identity comes first, and the order stays as it is.
//
// spiffe
func TestOrder(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		r := w.svids()
		for n := range uint64(8) {
			p.Set(&Snapshot{SVIDs: []*x509svid.SVID{p.svid(ownID), p.svid(alsID)}, Bundle: p.bundle(), Generation: n})
			svids := parse(t, r.next())
			if len(svids) != 2 || svids[0].ID.String() != ownID || svids[1].ID.String() != alsID {
				t.Fatalf("got %v", svids)
			}
		}
	})
}
