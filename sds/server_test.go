package sds

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
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

// D11: a node that is larger than anybody needs is refused; one that is merely deep is not.
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
		{"3 MiB", structpb.NewStringValue(strings.Repeat("x", 3<<20)), api.NodeMetadataTooLarge},
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

// D12: nothing here makes gRPC decompress, so a compressed request is Unimplemented before it is read.
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
		w := newWorld(t, Config{Source: p}, grpc.WithCompressor(grpc.NewGZIPCompressor())) //nolint:staticcheck // see above
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

// D09: the streams of one workload and of all are bounded, others are not touched, and what ends is free again.
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

// D10: who does not answer is ended; who does not even ask, too. Neither waits for ever, and a slot is free again.
func TestSlowConsumer(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		c := w.stream(protocol)
		c.ask(NameDefault)
		c.next()
		for range 29 {
			time.Sleep(time.Second)
			p.set(1) // what changes meanwhile does not prolong it
		}
		c.quiet()
		time.Sleep(time.Second)
		c.ended(api.SlowConsumer)

		silent := w.stream(protocol)
		time.Sleep(30 * time.Second)
		silent.ended(api.DeadlineExceeded)
		if w.srv.streams != 0 || len(w.srv.owned) != 0 {
			t.Errorf("%d streams of %d workloads are still counted", w.srv.streams, len(w.srv.owned))
		}
	})
}

// stuck is a stream whose client has closed its window: Send blocks until gRPC ends the stream.
type stuck struct {
	grpc.ServerStream
	ctx      context.Context
	requests chan *discovery.DiscoveryRequest
	sent     chan *discovery.DiscoveryResponse // what Send was called with; room for all
	release  chan struct{}                     // lets Send return
}

func (s *stuck) Context() context.Context { return s.ctx }
func (s *stuck) Recv() (*discovery.DiscoveryRequest, error) {
	select {
	case r := <-s.requests:
		return r, nil
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

func (s *stuck) Send(r *discovery.DiscoveryResponse) error {
	s.sent <- r
	select {
	case <-s.release:
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

// run serves s until the handler returns, and then ends it as gRPC does.
func (s *stuck) run(srv *Server) (ended chan error) {
	ctx, cancel := context.WithCancel(context.Background())
	s.ctx, s.requests = ctx, make(chan *discovery.DiscoveryRequest)
	s.sent, s.release = make(chan *discovery.DiscoveryResponse, 100), make(chan struct{})
	ended = make(chan error, 1)
	go func() {
		err := service{srv}.StreamSecrets(s)
		cancel()
		ended <- err
	}()
	return ended
}

// D10: a Send that blocks does not hold the stream, and nothing is sent behind it, whatever the client answers.
func TestBlockedSend(t *testing.T) {
	for _, tt := range []struct {
		name           string
		answers, reads bool
	}{
		{"silent", false, false}, {"answers what it has not read", true, false}, {"reads late", true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPod(t)
				p.set(1)
				srv := New(Config{Source: p})
				s := &stuck{}
				ended := s.run(srv)
				req := &discovery.DiscoveryRequest{ResourceNames: []string{NameDefault}}
				s.requests <- req
				synctest.Wait()
				if tt.answers {
					req = proto.CloneOf(req)
					req.ResponseNonce = (<-s.sent).GetNonce()
				}
				for range 10 {
					time.Sleep(time.Second)
					p.set(1)
					s.requests <- req // still heard
				}
				synctest.Wait()
				if n := len(s.sent); tt.answers && n != 0 {
					t.Errorf("%d sends beside the one that is blocked", n)
				}
				if !tt.reads {
					wantReason(t, <-ended, api.SlowConsumer)
					if n := len(s.sent); n > 1 {
						t.Errorf("%d sends, want 1", n)
					}
					srv.Close()
					return
				}
				s.release <- struct{}{}
				synctest.Wait()
				if n := len(s.sent); n != 1 {
					t.Errorf("%d sends after it, want the newest", n)
				}
				srv.Close()
			})
		})
	}
}

// D14: a stream ends some time before its token does, each at another moment, and no key follows.
func TestExpiry(t *testing.T) {
	both(t, Config{MaxStreamsPerWorkload: 100}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		opened := time.Now()
		p.expire = opened.Add(time.Hour)
		ends := map[time.Duration]bool{}
		var streams []*peer
		for range 50 {
			c := w.stream(protocol)
			c.ask(NameDefault)
			c.ack(c.next())
			streams = append(streams, c)
		}
		time.Sleep(48*time.Minute - 1)
		for _, c := range streams {
			c.quiet()
		}
		for range 9*60 + 1 {
			time.Sleep(time.Second)
			synctest.Wait()
			for _, c := range streams {
				c.mu.Lock()
				if c.done {
					ends[time.Since(opened).Truncate(time.Second)] = true
				}
				c.mu.Unlock()
			}
		}
		p.set(1)
		for _, c := range streams {
			c.ended(api.ReauthRequired)
			if len(c.in) > 0 {
				t.Error("a key was pushed after the end")
			}
		}
		if len(ends) < 25 {
			t.Errorf("50 streams ended at %d moments", len(ends))
		}
		time.Sleep(3 * time.Minute)
		w.stream(protocol).ended(api.ReauthRequired) // expired on arrival
	})
}

// The Source can end the streams of a workload, for a reason of its own or none, and nothing is pushed after that.
func TestDone(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		want api.Reason
	}{
		{"pod gone", api.E(api.PodDeleted, "the pod is gone"), api.PodDeleted},
		{"no reason", nil, api.AgentStopping},
		{"a plain error", errors.New("secret detail"), api.Internal},
	} {
		t.Run(tt.name, func(t *testing.T) {
			both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
				p.set(1)
				c := w.stream(protocol)
				c.ask(NameDefault)
				c.ack(c.next())
				p.err = tt.err
				close(p.done)
				p.set(1)
				c.ended(tt.want)
				if strings.Contains(c.err.Error(), "secret detail") || len(c.in) > 0 {
					t.Errorf("got %v, %v", c.err, c.in)
				}
				_, err := w.client.FetchSecrets(t.Context(), &discovery.DiscoveryRequest{})
				wantReason(t, err, tt.want)
			})
		})
	}
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

// A panic ends its own stream with Internal, says nothing of itself to the client, and leaves the others alone.
func TestPanics(t *testing.T) {
	for _, where := range []string{"report", "opened", "closed", "pushed", "answered"} {
		t.Run(where, func(t *testing.T) {
			var armed atomic.Bool
			boom := func() {
				if armed.Load() {
					panic("kaboom")
				}
			}
			cfg := Config{}
			switch where {
			case "opened":
				cfg.Hooks.Opened = func(string) { boom() }
			case "closed":
				cfg.Hooks.Closed = func(string, api.Reason) { boom() }
			case "pushed":
				cfg.Hooks.Pushed = func(string, string) { boom() }
			case "answered":
				cfg.Hooks.Answered = func(string, bool, time.Duration) { boom() }
			}
			both(t, cfg, func(t *testing.T, protocol string, p *pod, w *world) {
				armed.Store(false)
				if where == "report" {
					p.onReport = func(r Report) {
						if r.Stream == 2 {
							boom()
						}
					}
				}
				p.set(1)
				good := w.stream(protocol)
				good.ask(NameDefault)
				good.ack(good.next())
				armed.Store(true)
				bad := w.stream(protocol)
				synctest.Wait()
				if where == "closed" {
					p.expire = time.Now().Add(-1)
					bad.send("", nil, []string{"a/b"}, nil, nil)
				} else if bad.send("", nil, []string{NameDefault}, nil, nil) == nil && where == "answered" {
					g := bad.next()
					bad.send(g.nonce, nil, nil, nil, nil)
				}
				bad.ended(api.Internal)
				if strings.Contains(bad.err.Error(), "kaboom") {
					t.Errorf("the client learns of the panic: %v", bad.err)
				}
				armed.Store(false)
				if r := p.last(2); where != "report" && r.Open {
					t.Errorf("the end was not reported: %+v", r)
				}
				p.set(1)
				good.ack(good.next())
				good.quiet()
				if w.srv.streams != 1 {
					t.Errorf("%d streams are counted, want the good one", w.srv.streams)
				}
			})
		})
	}
}

// Close ends everything with a reason, lets nobody in, and leaves no goroutine; the bubble checks that.
func TestClose(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		idle, waiting := w.stream(protocol), w.stream(protocol)
		idle.ask(NameDefault)
		idle.ack(idle.next())
		waiting.ask(NameRootCA)
		p.open = func(ctx context.Context, _ metadata.MD) error { <-ctx.Done(); return ctx.Err() }
		opening := w.stream(protocol)
		synctest.Wait()
		w.srv.Close()
		idle.ended(api.AgentStopping)
		waiting.ended(api.AgentStopping)
		opening.ended(api.AgentStopping)
		w.stream(protocol).ended(api.AgentStopping)
		w.srv.Close()
	})
}

// D20: the unary call answers with everything at once, when it is there.
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

// D06, D07: a flood of requests, refusals among them, is slowed to the configured rate; the stream lives on.
func TestFlood(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		c := w.stream(protocol)
		c.ask(NameAll)
		g := c.next()
		c.nack(g, "no")
		start, why := time.Now(), "again"
		for i := range 5000 {
			name := fmt.Sprintf("spiffe://%s/x/%d", td, i)
			if err := errors.Join(c.send(g.nonce, &why, []string{name}, nil, nil), c.send(g.nonce, &why, nil, []string{name}, nil)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(10 * time.Second)
		p.mu.Lock() // each request changes the subscription, and is reported
		handled, most := len(p.reports[1]), requestBurst+100*int(time.Since(start).Seconds()+1)
		p.mu.Unlock()
		if handled > most || handled < 1000 {
			t.Errorf("%d requests handled in %v, want at most %d", handled, time.Since(start), most)
		}
		time.Sleep(2 * time.Minute)
		c.must(c.send(g.nonce, nil, []string{NameDefault}, nil, nil))
		if g := c.next(); !slices.Equal(g.names, []string{NameDefault}) {
			t.Errorf("got %v", g.names)
		}
		if r := p.last(1); !r.Open || r.Nacks != 1 || len(r.Names) != 2 {
			t.Errorf("report %+v", r)
		}
	})
}

// D21: streams that come and go leave nothing behind.
func TestReconnectStorm(t *testing.T) {
	both(t, Config{}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		for range 300 {
			var batch []*peer
			for range 4 {
				c := w.stream(protocol)
				c.ask(NameDefault)
				batch = append(batch, c)
			}
			for _, c := range batch {
				c.cancel()
			}
		}
		synctest.Wait()
		w.srv.mu.Lock()
		defer w.srv.mu.Unlock()
		if w.srv.streams != 0 || len(w.srv.owned) != 0 {
			t.Errorf("%d streams of %d workloads are still counted", w.srv.streams, len(w.srv.owned))
		}
	})
}

// 1,000 streams, one secret each as Envoy opens them, all get a new bundle and a new identity and acknowledge both.
func TestThousandStreams(t *testing.T) {
	const pods = 100
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, td)
		all := make([]*pod, pods)
		var opened atomic.Int64
		source := sourceFunc(func(ctx context.Context, md metadata.MD) (*Workload, error) {
			return all[int(opened.Add(1)-1)%pods].Open(ctx, md)
		})
		set := func(generation uint64) {
			trust, err := NewTrust(a.bundle(a.newRoot()), nil, generation)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range all {
				p.material.Set(&Material{Identity: a.identity(ownID), Trust: trust})
			}
		}
		for i := range all {
			p := newPod(t)
			p.authority = a
			all[i] = p
		}
		set(1)
		w := newWorld(t, Config{Source: source})
		defer w.close()
		var streams []*peer
		for i := range 10 * pods {
			c := w.stream([]string{ProtocolSotW, ProtocolDelta}[i%2])
			c.ask([]string{NameDefault, NameRootCA}[i/2%2])
			c.ack(c.next())
			streams = append(streams, c)
		}
		for generation := range uint64(3) {
			set(generation + 2)
			synctest.Wait()
			for _, c := range streams {
				g := c.next()
				if err := c.send(g.nonce, nil, nil, nil, nil); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
		}
		proven := 0
		for _, p := range all {
			for _, r := range p.reports {
				last := r[len(r)-1]
				if last.Acks != 4 || last.Nacks != 0 || !last.Open {
					t.Errorf("report %+v", last)
				}
				if last.WantsBundle {
					proven++
					if last.AckedGeneration != 4 {
						t.Errorf("report %+v, want generation 4", last)
					}
				}
			}
		}
		if proven != 5*pods {
			t.Errorf("%d streams have proven the bundle, want %d", proven, 5*pods)
		}
	})
}

type sourceFunc func(context.Context, metadata.MD) (*Workload, error)

func (f sourceFunc) Open(ctx context.Context, md metadata.MD) (*Workload, error) { return f(ctx, md) }

// What is logged: ends and refusals under the correlation id that the client has, the cause, and never a key or token.
func TestLog(t *testing.T) {
	var buf syncBuffer
	cfg := Config{Log: slog.New(slog.NewTextHandler(&buf, nil))}
	bubble(t, cfg, func(t *testing.T, p *pod, w *world) {
		p.set(1)
		c := w.stream(ProtocolSotW)
		c.ask(NameDefault, elseID)
		c.nack(c.next(), "bad key")
		c.must(c.send("", nil, []string{"a/b"}, nil, nil)) // stale: ignored
		c.cancel()
		c = w.stream(ProtocolDelta)
		c.ask("a/b")
		c.ended(api.ResourceName)
		p.open = func(context.Context, metadata.MD) error {
			return api.Wrap(api.TokenSignature, errors.New("cause"), "x")
		}
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "TOKEN")
		_, err := w.client.FetchSecrets(ctx, &discovery.DiscoveryRequest{})
		wantReason(t, err, api.TokenSignature)
		synctest.Wait()
		log := buf.String()
		for _, want := range []string{
			"left out", "proxy refused a secret", `"bad key"`, "reason=RESOURCE_NAME", "code=SGN-0702", "workload=prod/payments",
			api.AsError(api.FromStatus(c.err)).CorrelationID, api.AsError(api.FromStatus(err)).CorrelationID, "cause=cause",
		} {
			if !strings.Contains(log, want) {
				t.Errorf("the log does not say %q:\n%s", want, log)
			}
		}
		for _, not := range []string{"PRIVATE KEY", "TOKEN\"", "=TOKEN\n"} {
			if strings.Contains(log, not) {
				t.Errorf("the log says %q:\n%s", not, log)
			}
		}
	})
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestClientError(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want api.Reason
	}{
		{io.EOF, ""},
		{context.Canceled, ""},
		{status.Error(codes.ResourceExhausted, "too large"), ""},
		{api.E(api.Internal, "x"), api.Internal},
		{errors.New("x"), api.Internal},
	} {
		err := clientError(tt.err)
		if (err == nil) != (tt.want == "") || err != nil && api.ReasonOf(err) != tt.want {
			t.Errorf("clientError(%v) = %v, want %q", tt.err, err, tt.want)
		}
	}
}

func TestPace(t *testing.T) {
	now := time.Unix(0, 0)
	p := newPace(10, 3, now)
	var waits []time.Duration
	for range 5 {
		waits = append(waits, p.take(now))
	}
	if want := []time.Duration{0, 0, 0, 100 * time.Millisecond, 200 * time.Millisecond}; !slices.Equal(waits, want) {
		t.Errorf("waits %v, want %v", waits, want)
	}
	now = now.Add(time.Hour)
	if d := p.take(now); d != 0 || p.left != 200*time.Millisecond {
		t.Errorf("after a pause: wait %v, %v left; want a whole burst less one", d, p.left)
	}
}
