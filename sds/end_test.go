package sds

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
)

// Who does not answer is ended; who does not even ask, too. Neither waits for ever, and a slot is free again.
//
// threat: D10
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
func (s *stuck) RecvMsg(m any) error {
	select {
	case r := <-s.requests:
		proto.Merge(m.(proto.Message), r)
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

func (s *stuck) Recv() (*discovery.DiscoveryRequest, error) {
	m := &discovery.DiscoveryRequest{}
	return m, s.RecvMsg(m)
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

// A Send that blocks does not hold the stream, and nothing is sent behind it, whatever the client answers.
//
// threat: D10
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

// The Source is told once of the end of whatever it opened, let in or not, and may even fail at it.
func TestRelease(t *testing.T) {
	both(t, Config{MaxStreamsPerWorkload: 1}, func(t *testing.T, protocol string, p *pod, w *world) {
		p.set(1)
		released := 0
		p.onRelease = func() { released++; panic("kaboom") }
		check := func(what string, want int) {
			t.Helper()
			synctest.Wait()
			if released != want {
				t.Errorf("%s: released %d times, want %d", what, released, want)
			}
		}
		c := w.stream(protocol)
		c.ask(NameDefault)
		c.next()
		check("open", 0)
		w.stream(protocol).ended(api.StreamLimit)
		check("one too many", 1)
		c.cancel()
		check("ended", 2)
		if _, err := w.client.FetchSecrets(t.Context(), &discovery.DiscoveryRequest{}); err != nil {
			t.Error(err)
		}
		check("fetched", 3)
		p.expire = time.Now()
		w.stream(protocol).ended(api.ReauthRequired)
		check("expired on arrival", 4)
		if w.srv.streams != 0 {
			t.Errorf("%d streams are still counted", w.srv.streams)
		}
	})
}

// D14: a stream ends some time before its token does, each at another moment, and no key follows.
//
// threat: D14
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

// What is logged: ends and refusals under the correlation id that the client has, the cause, and never a key or token.
//
// threat: L01
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
