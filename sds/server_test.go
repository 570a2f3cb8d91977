package sds

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-ca/signet/api"
)

// D04: only secrets are served here.
//
// threat: D04
func TestTypeURL(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		for url, ok := range map[string]bool{
			TypeURL: true, "": true,
			"type.googleapis.com/envoy.config.listener.v3.Listener": false, "Secret": false, TypeURL + "\x00": false,
		} {
			var recv func() error
			if protocol == ProtocolSotW {
				s, err := w.client.StreamSecrets(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				s.Send(&discovery.DiscoveryRequest{TypeUrl: url, ResourceNames: []string{NameDefault}})
				recv = func() error { _, err := s.Recv(); return err }
			} else {
				s, err := w.client.DeltaSecrets(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				s.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: []string{NameDefault}})
				recv = func() error { _, err := s.Recv(); return err }
			}
			err := recv()
			if !ok {
				wantReason(t, err, api.TypeURL)
			} else if err != nil {
				t.Errorf("type %q: %v", url, err)
			}
		}
	})
}

// A node that is larger than anybody needs is refused; one that is merely deep is not.
//
// threat: D11
func TestNodeMetadata(t *testing.T) {
	deep := structpb.NewStringValue("x")
	for range 1000 {
		deep = structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{"a": deep}})
	}
	for _, tt := range []struct {
		name  string
		value *structpb.Value
		want  api.Reason
	}{
		{"1,000 deep", deep, ""},
		{"64 KiB", structpb.NewStringValue(strings.Repeat("x", MaxNodeBytes)), api.NodeMetadataTooLarge},
		{"3 MiB", structpb.NewStringValue(strings.Repeat("x", 3<<20)), api.MessageTooLarge},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
				p.set(1)
				node := &core.Node{Id: "x", Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{"a": tt.value}}}
				check := func(err error) {
					t.Helper()
					if tt.want != "" {
						wantReason(t, err, tt.want)
					} else if err != nil {
						t.Error(err)
					}
				}
				sotw, err := w.client.StreamSecrets(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				sotw.Send(&discovery.DiscoveryRequest{Node: node, ResourceNames: []string{NameDefault}})
				_, err = sotw.Recv()
				check(err)
				delta, err := w.client.DeltaSecrets(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				delta.Send(&discovery.DeltaDiscoveryRequest{Node: node, ResourceNamesSubscribe: []string{NameDefault}})
				_, err = delta.Recv()
				check(err)
				_, err = w.client.FetchSecrets(t.Context(), &discovery.DiscoveryRequest{Node: node})
				check(err)
			})
		})
	}
}

// The client's name for itself is cut, made printable, and decides nothing.
//
// threat: L15
func TestProxyName(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		p.set(1)
		s, err := w.client.StreamSecrets(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		s.Send(&discovery.DiscoveryRequest{Node: &core.Node{Id: elseID + "\n" + strings.Repeat("x", 500)}})
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if r := p.last(1); len(r.Proxy) != 128 || !strings.HasPrefix(r.Proxy, elseID+"?x") {
			t.Errorf("proxy %q", r.Proxy)
		}
	})
}

// Nothing here makes gRPC decompress, so a compressed request is Unimplemented before it is read.
//
// threat: D12
func TestNoDecompressor(t *testing.T) {
	for _, name := range []string{"gzip", "deflate", "snappy", "zstd"} {
		if encoding.GetCompressor(name) != nil {
			t.Errorf("this package links a decompressor for %s", name)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		p := newPod(t)
		p.set(1)
		// The older of gRPC's two ways to compress is not registered process-wide, so that only the client knows it.
		//lint:ignore SA1019 see above
		w := newWorld(t, Config{Source: p}, grpc.WithCompressor(grpc.NewGZIPCompressor()))
		defer w.close()
		if _, err := w.client.FetchSecrets(t.Context(), &discovery.DiscoveryRequest{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("error = %v, want Unimplemented", err)
		}
		c := w.stream(ProtocolSotW)
		c.send("", nil, []string{NameDefault}, nil, nil) // may fail already
		synctest.Wait()
		if !c.done || status.Code(c.err) != codes.Unimplemented {
			t.Errorf("error = %v, want Unimplemented", c.err)
		}
	})
}

// The streams of one workload and of all are bounded, others are not touched, and what ends is free again.
//
// threat: D09
func TestStreamLimits(t *testing.T) {
	both(t, Config{MaxStreams: 40}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		greedy := make([]*peer, 16)
		for i := range greedy {
			greedy[i] = w.stream(protocol)
			greedy[i].ask(NameDefault)
			greedy[i].next()
		}
		refused := w.stream(protocol)
		refused.ended(api.StreamLimit)
		_, err := w.client.FetchSecrets(t.Context(), &discovery.DiscoveryRequest{})
		wantReason(t, err, api.StreamLimit)

		mine := p.material
		other := newPod(t)
		other.set(1)
		p.material = other.material // the next streams are another workload's
		others := make([]*peer, 16)
		for i := range others {
			others[i] = w.stream(protocol)
			others[i].ask(NameRootCA)
			others[i].next()
		}
		p.material = mine
		greedy[0].cancel()
		synctest.Wait()
		again := w.stream(protocol)
		again.ask(NameDefault)
		again.next()
	})
	both(t, Config{MaxStreams: 3}, func(t *testing.T, protocol string, p *pod, w *world) {
		for range 3 {
			w.stream(protocol)
		}
		synctest.Wait()
		w.stream(protocol).ended(api.StreamLimit)
	})
}

// Errors of the Source: a reason goes through, anything else is Internal and stays in our log.
func TestSourceErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		open func(context.Context, metadata.MD) error
		want api.Reason
	}{
		{"reason", func(context.Context, metadata.MD) error { return api.E(api.TokenMissing, "no token") }, api.TokenMissing},
		{"wrapped", func(context.Context, metadata.MD) error {
			return fmt.Errorf("x: %w", api.E(api.TokenExpired, "expired"))
		}, api.TokenExpired},
		{"plain", func(context.Context, metadata.MD) error { return errors.New("token abc") }, api.Internal},
		{"panic", func(context.Context, metadata.MD) error { panic("token abc") }, api.Internal},
	} {
		t.Run(tt.name, func(t *testing.T) {
			both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
				p.set(1)
				p.open = tt.open
				c := w.stream(protocol)
				c.ended(tt.want)
				if strings.Contains(c.err.Error(), "abc") {
					t.Errorf("the error tells too much: %v", c.err)
				}
				_, err := w.client.FetchSecrets(t.Context(), &discovery.DiscoveryRequest{})
				wantReason(t, err, tt.want)
				p.open = nil
				c = w.stream(protocol)
				c.ask(NameDefault)
				c.next()
			})
		})
	}
}

// The Source sees the stream's metadata, and is asked before anything is read.
func TestSourceIsAskedFirst(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		asked := false
		p.open = func(_ context.Context, md metadata.MD) error {
			asked = slices.Equal(md.Get("authorization"), []string{"a token"})
			return nil
		}
		if _, err := w.client.StreamSecrets(metadata.AppendToOutgoingContext(t.Context(), "authorization", "a token")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if !asked {
			t.Error("the Source was not asked, or without the token")
		}
	})
}

type none struct{}

func (none) Open(context.Context, metadata.MD) (*Workload, error) { return nil, nil }

func TestSourceWithoutWorkload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{Source: none{}})
		defer w.close()
		w.stream(ProtocolSotW).ended(api.Internal)
	})
	defer func() {
		if recover() == nil {
			t.Error("New did not panic without a Source")
		}
	}()
	New(Config{})
}

// D20: the unary call answers with everything at once, when it is there.
//
// threat: D20
func TestFetch(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		type answer struct {
			resp *discovery.DiscoveryResponse
			err  error
		}
		fetch := func(names ...string) chan answer {
			c := make(chan answer, 1)
			go func() {
				r, err := w.client.FetchSecrets(t.Context(), &discovery.DiscoveryRequest{ResourceNames: names})
				c <- answer{r, err}
			}()
			synctest.Wait()
			return c
		}
		p.id = ""
		a, foreign := fetch(NameDefault, NameRootCA, elseID), fetch(elseID)
		p.material.Set(&Material{Trust: p.trust(1)})
		synctest.Wait()
		if len(a) > 0 || len(foreign) > 0 {
			t.Fatal("answered before the identity was there")
		}
		p.set(1)
		wantReason(t, (<-foreign).err, api.ResourceNotAuthorized)
		got := <-a
		if got.err != nil {
			t.Fatal(got.err)
		}
		var names []string
		for _, r := range got.resp.GetResources() {
			s := &tls.Secret{}
			if err := proto.Unmarshal(r.GetValue(), s); err != nil {
				t.Fatal(err)
			}
			names = append(names, s.GetName())
		}
		if !slices.Equal(names, []string{NameRootCA, NameDefault}) || got.resp.GetVersionInfo() == "" || got.resp.GetTypeUrl() != TypeURL {
			t.Errorf("got %v", names)
		}
		if wild := <-fetch(); wild.err != nil || len(wild.resp.GetResources()) != 2 {
			t.Errorf("empty names: %v", wild)
		}
		for name, want := range map[string]api.Reason{"a/b": api.ResourceName, "istio": api.ResourceNotAuthorized} {
			wantReason(t, (<-fetch(name)).err, want)
		}
		p.material.Set(nil)
		wantReason(t, (<-fetch()).err, api.DeadlineExceeded)
		p.expire = time.Now().Add(10 * time.Second)
		wantReason(t, (<-fetch()).err, api.ReauthRequired)
		p.expire = time.Time{}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := w.client.FetchSecrets(ctx, &discovery.DiscoveryRequest{}); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("error = %v", err)
		}
		synctest.Wait()
		if w.srv.streams != 0 {
			t.Errorf("%d fetches are still counted", w.srv.streams)
		}
	})
}
