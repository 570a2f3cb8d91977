package workloadapi

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/api"
)

// The end of a socket ends its streams with a reason that lets clients come back, reflection too, and waits for them.
//
// spiffe: E-06
func TestStop(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		p.give(1)
		svids, bundles, waiting := w.svids(), w.bundles(), w.reflect()
		svids.next()
		bundles.next()
		waiting.silent()
		start := time.Now()
		w.stop()
		svids.ends(codes.Unavailable, api.AgentStopping)
		bundles.ends(codes.Unavailable, api.AgentStopping)
		waiting.ends(codes.Unavailable, api.AgentStopping)
		if took := time.Since(start); took > graceTime {
			t.Errorf("took %v", took)
		}
		if p.ends()[api.AgentStopping] != 3 || p.last(1).Open || w.streams() != 0 {
			t.Errorf("ends %v, last delivery %+v, %d streams", p.ends(), p.last(1), w.streams())
		}
	})
}

// reflect opens a stream of reflection on which nothing is asked.
func (w *world) reflect() *reader[reflectionpb.ServerReflectionResponse] {
	return read(w.t, func(ctx context.Context) (grpc.ServerStreamingClient[reflectionpb.ServerReflectionResponse], error) {
		return reflectionpb.NewServerReflectionClient(w.conn).ServerReflectionInfo(ctx)
	})
}

// A closed Server, still registered, refuses.
func TestClosed(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		p.give(1)
		w.srv.Close()
		w.srv.Close()
		w.svids().ends(codes.Unavailable, api.AgentStopping)
		w.reflect().ends(codes.Unavailable, api.AgentStopping)
	})
}

// The streams of a socket are bounded over all its connections and over what they are for; who leaves makes room.
func TestStreamLimit(t *testing.T) {
	bubble(t, Config{MaxStreams: 4}, func(t *testing.T, p *pod, w *world) {
		p.give(1)
		second := w.dial()
		defer second.Close()
		other := &world{t: t, conn: second, api: workload.NewSpiffeWorkloadAPIClient(second)}
		first := w.svids()
		first.next()
		other.svids().next()
		other.bundles().next()
		w.reflect().silent()
		for _, x := range []*world{w, other} {
			x.svids().ends(codes.Unavailable, api.StreamLimit)
			x.bundles().ends(codes.Unavailable, api.StreamLimit)
			x.reflect().ends(codes.Unavailable, api.StreamLimit)
		}
		first.cancel()
		synctest.Wait()
		w.svids().next()
		if p.refusals()[api.StreamLimit] != 6 {
			t.Errorf("refusals %v", p.refusals())
		}
	})
}

// The connections of a socket are bounded, and one that does nothing does not stay.
func TestConnectionLimit(t *testing.T) {
	bubble(t, Config{MaxConnections: 2}, func(t *testing.T, p *pod, w *world) {
		p.give(1)
		good := w.svids()
		good.next()
		silent, err := w.lis.DialContext(t.Context()) // takes the second place and says nothing
		if err != nil {
			t.Fatal(err)
		}
		third := w.dial()
		defer third.Close()
		_, err = workload.NewSpiffeWorkloadAPIClient(third).FetchX509SVID(header(t.Context()), &workload.X509SVIDRequest{})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("a connection too many: %v", err)
		}
		time.Sleep(handshakeTime + time.Minute)
		if _, err := io.Copy(io.Discard, silent); err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("the silent connection: %v", err)
		}
		silent.Close()
		w2 := &world{t: t, conn: third, api: workload.NewSpiffeWorkloadAPIClient(third)}
		w2.svids().next()
		good.silent()
	})
}

// A connection without calls ends after some time, one with a stream does not.
func TestIdle(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		p.give(1)
		once := w.dial()
		defer once.Close()
		s, err := workload.NewSpiffeWorkloadAPIClient(once).FetchX509Bundles(header(t.Context()), &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		kept := w.svids()
		kept.next()
		time.Sleep(3 * time.Hour)
		kept.silent()
		p.give(2)
		kept.next()
	})
}

// Reflection is not for staying.
func TestReflectionEnds(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		r := w.reflect()
		time.Sleep(29 * time.Second)
		r.silent()
		time.Sleep(2 * time.Second)
		r.ends(codes.Unavailable, api.DeadlineExceeded)
		if w.streams() != 0 || p.told() != 0 {
			t.Errorf("%d streams are left, %d were told of", w.streams(), p.told())
		}
	})
}

// A client that reads nothing is cut off; until then it costs what fits into its window and one message, whatever
// happens meanwhile, and others get all there is.
func TestSlowReader(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		big := p.newRoot()
		grow := func(n uint64) { // each version is larger than any window
			p.Set(&Snapshot{Bundle: p.bundle(big), Generation: n, Federated: hugeBundles(p)[:8]})
		}
		grow(1)
		r := w.raw(0)
		done := r.pump()
		r.call(1, pathBundles)
		r.data(1, 0, 0, 0, 0, 0) // one empty message
		synctest.Wait()          // the first stream
		good := w.bundles()
		good.next()
		for n := range uint64(29) {
			time.Sleep(time.Second)
			grow(n + 2)
			good.next()
		}
		synctest.Wait()
		if sent := len(p.all(1)); sent > 2 || p.ends()[api.SlowConsumer] != 0 {
			t.Errorf("%d deliveries to a client that reads nothing, ends %v", sent-1, p.ends())
		}
		for n := range uint64(60) {
			time.Sleep(time.Second)
			grow(n + 100)
			good.next()
		}
		if p.ends()[api.SlowConsumer] != 1 || w.streams() != 1 {
			t.Errorf("ends %v, %d streams", p.ends(), w.streams())
		}
		if d := p.last(1); d.Open || len(p.all(1)) > 3 {
			t.Errorf("%d deliveries, the last %+v", len(p.all(1)), d)
		}
		<-done // its connection has ended: what was queued for it is gone
	})
}

// A client that is stopped, and so answers nothing, loses its place.
func TestSilentClient(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		p.give(1)
		r := w.raw(64 << 10)
		r.call(1, pathSVID)
		synctest.Wait()
		if d := p.last(1); !d.Open || d.At.IsZero() {
			t.Fatalf("delivery %+v", d)
		}
		time.Sleep(2 * keepaliveTime)
		if d := p.last(1); d.Open || w.streams() != 0 {
			t.Errorf("delivery %+v, %d streams", d, w.streams())
		}
		r.c.Close()
	})
}

// A client that opens its window late gets the newest, not what was there in between.
func TestSkips(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		huge := hugeBundles(p)[:8]
		set := func(n uint64) { p.Set(&Snapshot{Bundle: p.bundle(p.newRoot()), Generation: n, Federated: huge}) }
		set(1)
		r := w.raw(0)
		done := r.pump()
		r.call(1, pathBundles)
		r.data(1, 0, 0, 0, 0, 0)
		synctest.Wait()
		for n := range uint64(20) {
			set(n + 2)
			synctest.Wait()
		}
		r.open(1 << 24)
		synctest.Wait()
		var got []uint64
		for _, d := range p.all(1) {
			if !d.At.IsZero() {
				got = append(got, d.Generation)
			}
		}
		if len(got) > 3 || got[len(got)-1] != 21 || !slices.IsSorted(got) {
			t.Errorf("generations %v were delivered, want few and 21 last", got)
		}
		r.c.Close()
		<-done
	})
}

// No request is read, whatever is in it: not one that is too large, malformed or missing, and none that is compressed.
//
// spiffe: E-05
// threat: D12
func TestRequests(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		p.give(1)
		for _, path := range []string{pathSVID, pathBundles, "/SpiffeWorkloadAPI/FetchJWTSVID"} {
			for _, request := range [][]byte{nil, []byte("what nobody knows"), {0xff, 0xff}, make([]byte, 48<<10), make([]byte, 4<<20)} {
				ctx, cancel := context.WithCancel(header(t.Context()))
				s, err := w.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, path, grpc.ForceCodecV2(rawCodec{}))
				if err != nil {
					t.Fatal(err)
				}
				if request != nil { // what does not fit into the window stays with the client
					if err := s.SendMsg(request); err != nil && !errors.Is(err, io.EOF) {
						t.Errorf("%s: %v", path, err)
					}
				}
				want := codes.OK
				if strings.Contains(path, "JWT") {
					want = codes.Unimplemented
				}
				if err := s.RecvMsg(nil); status.Code(err) != want {
					t.Errorf("%s with %d bytes: %v", path, len(request), err)
				}
				cancel()
				synctest.Wait()
			}
		}
		r := w.raw(64 << 10)
		done := r.pump()
		for n, path := range []string{pathSVID, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"} {
			r.call(uint32(2*n+1), path, "grpc-encoding", "gzip")
			r.data(uint32(2*n+1), 1, 0, 0, 0, 1, 0)
		}
		synctest.Wait()
		r.c.Close()
		if ends := <-done; ends[1] != "12" || ends[3] != "12" {
			t.Errorf("compressed requests ended with %v, want 12: Unimplemented", ends)
		}
		if p.opens() != 10 || w.streams() != 0 {
			t.Errorf("%d streams were opened, %d are left", p.opens(), w.streams())
		}
	})
}

// What reflection is asked for is bounded, and bytes that are no question end the call.
func TestReflectionRequests(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		for _, request := range [][]byte{{0xff, 0xff}, make([]byte, 17<<10), {}} {
			s, err := w.conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true},
				"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", grpc.ForceCodecV2(rawCodec{}))
			if err != nil {
				t.Fatal(err)
			}
			if err := s.SendMsg(request); err != nil {
				t.Fatal(err)
			}
			want := codes.InvalidArgument
			if len(request) > 1<<10 {
				want = codes.ResourceExhausted
			}
			if err := s.RecvMsg(nil); status.Code(err) != want {
				t.Errorf("%d bytes: %v", len(request), err)
			}
		}
		synctest.Wait()
		if w.streams() != 0 {
			t.Errorf("%d streams are left", w.streams())
		}
	})
}

// Streams that come and go leave nothing behind.
//
// threat: D21
func TestChurn(t *testing.T) {
	bubble(t, Config{}, func(t *testing.T, p *pod, w *world) {
		p.give(1)
		first := w.svids()
		first.next()
		first.cancel()
		synctest.Wait()
		before := runtime.NumGoroutine()
		for range 400 {
			batch := []*reader[workload.X509SVIDResponse]{w.svids(), w.svids(), w.svids()}
			for _, r := range batch {
				r.next()
			}
			for _, r := range batch {
				r.cancel()
			}
			synctest.Wait()
		}
		for range 100 { // and connections
			c := w.dial()
			x := &world{t: t, conn: c, api: workload.NewSpiffeWorkloadAPIClient(c)}
			x.svids().next()
			c.Close()
			synctest.Wait()
		}
		time.Sleep(time.Second) // connections end
		synctest.Wait()
		if w.streams() != 0 || p.opens() != 1301 || p.ends()[""] != 1301 {
			t.Errorf("%d streams are left of %d, ends %v", w.streams(), p.opens(), p.ends())
		}
		after := runtime.NumGoroutine()
		for range 60 { // one that has done its work is counted until it is gone
			if after <= before+2 {
				break
			}
			time.Sleep(time.Second)
			synctest.Wait()
			after = runtime.NumGoroutine()
		}
		if after > before+2 {
			t.Errorf("%d goroutines, %d before", after, before)
		}
	})
}

// A flood of whatever kind is read no faster than the socket may be, and the log hears little of it.
func TestFlood(t *testing.T) {
	var logged strings.Builder
	bubble(t, Config{ReadRate: 1 << 10, Log: slog.New(slog.NewTextHandler(&logged, nil))}, func(t *testing.T, p *pod, w *world) {
		p.give(1)
		start := time.Now()
		const calls = 3000
		for range calls {
			s, err := w.api.FetchX509SVID(t.Context(), &workload.X509SVIDRequest{}) // without the header
			if err != nil {
				t.Fatal(err)
			}
			if _, err = s.Recv(); status.Code(err) != codes.InvalidArgument {
				t.Fatal(err)
			}
		}
		took := time.Since(start)
		if took < 10*time.Second || took > 10*time.Minute {
			t.Errorf("%d calls took %v", calls, took)
		}
		if lines := strings.Count(logged.String(), "\n"); lines > 2+int(took/quietTime) {
			t.Errorf("%d lines in %v", lines, took)
		}
		r := w.svids() // it goes on
		time.Sleep(time.Minute)
		r.next()
	})
}

// A panic, wherever it comes from, ends one stream and leaves its place.
func TestPanics(t *testing.T) {
	for _, tc := range []struct {
		name string
		cfg  Config
		set  func(*pod)
	}{
		{"source", Config{Source: panicking{}}, func(*pod) {}},
		{"delivered", Config{Delivered: func(Delivery) { panic("oh") }}, func(p *pod) { p.give(1) }},
		{"hook", Config{Hooks: Hooks{Opened: func(string) { panic("oh") }}}, func(p *pod) { p.give(1) }},
		{"hook at a push", Config{Hooks: Hooks{Pushed: func(string) { panic("oh") }}}, func(p *pod) { p.give(1) }},
		{"refusal without a reason", Config{}, func(p *pod) { p.Set(&Snapshot{Refused: errors.New("secret cause")}) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, tc.cfg, func(t *testing.T, p *pod, w *world) {
				tc.set(p)
				for range 100 {
					s, err := w.api.FetchX509SVID(header(t.Context()), &workload.X509SVIDRequest{})
					if err != nil {
						t.Fatal(err)
					}
					for err == nil {
						_, err = s.Recv()
					}
					if e := api.FromStatus(err); api.ReasonOf(e) != api.Internal || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "oh") {
						t.Fatalf("error %v", err)
					}
				}
				synctest.Wait()
				if w.streams() != 0 {
					t.Errorf("%d streams are left", w.streams())
				}
			})
		})
	}
	defer func() {
		if recover() == nil {
			t.Error("a Server without a Source was made")
		}
	}()
	New(Config{})
}

type panicking struct{}

func (panicking) Get() (*Snapshot, <-chan struct{}) { panic("oh") }

// A listener that fails ends Serve with its error.
func TestListenerFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{Source: &newPod(t).Value})
		broken := errors.New("broken")
		if err := s.Serve(t.Context(), failing{broken}); !errors.Is(err, broken) {
			t.Errorf("error %v", err)
		}
	})
}

type failing struct{ err error }

func (f failing) Accept() (net.Conn, error) { return nil, f.err }
func (f failing) Close() error              { return nil }
func (f failing) Addr() net.Addr            { return &net.UnixAddr{Name: "failing", Net: "unix"} }
