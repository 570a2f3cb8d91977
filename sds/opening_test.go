package sds

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/api"
)

// door is a Source behind which nobody is told apart until it is opened: as at an agent's first start, without a key set.
type door struct {
	*pod
	open chan struct{}
}

func (d *door) Open(ctx context.Context, md metadata.MD) (*Workload, error) {
	select {
	case <-d.open:
	case <-ctx.Done():
		return nil, api.E(api.KeysUnavailable, "nobody can be told apart yet")
	}
	return d.pod.Open(ctx, md)
}

// who names the peer by what the client says: in a test only.
func who(ctx context.Context) string {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("peer"); len(v) == 1 {
		return v[0]
	}
	return ""
}

func atDoor(t *testing.T, cfg Config, f func(d *door, w *world, fetch func(peer string) <-chan error)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		d := &door{newPod(t), make(chan struct{})}
		d.set(1)
		cfg.Source, cfg.Peer = d, who
		w := newWorld(t, cfg)
		defer w.close()
		fetch := func(peer string) <-chan error {
			done := make(chan error, 1)
			go func() {
				ctx := metadata.AppendToOutgoingContext(context.Background(), "peer", peer)
				_, err := w.client.FetchSecrets(ctx, &discovery.DiscoveryRequest{})
				done <- err
			}()
			synctest.Wait()
			return done
		}
		f(d, w, fetch)
		synctest.Wait()
		w.srv.mu.Lock()
		defer w.srv.mu.Unlock()
		if w.srv.opening.n != 0 || len(w.srv.opening.of) != 0 || w.srv.streams != 0 {
			t.Errorf("%d streams of %d peers are still at the door, %d are counted", w.srv.opening.n, len(w.srv.opening.of), w.srv.streams)
		}
	})
}

// Junk that cannot be told from tokens yet waits apart from the streams of workloads, and behind itself.
func TestCrowdAtTheDoor(t *testing.T) {
	atDoor(t, Config{MaxOpening: 10, MaxStreams: 20, MaxStreamsPerWorkload: 20}, func(d *door, w *world, fetch func(string) <-chan error) {
		var junk []<-chan error
		for i := range 30 {
			done := fetch("crowd")
			if i < 10 {
				junk = append(junk, done)
				continue
			}
			err := <-done
			wantReason(t, err, api.StreamLimit)
			if api.AsError(api.FromStatus(err)).RetryAfter <= 0 {
				t.Error("who is sent away is not told when to come back")
			}
		}
		neighbour := []<-chan error{fetch("neighbour"), fetch("neighbour"), fetch("another")}
		for i, done := range junk {
			select {
			case err := <-done:
				if wantReason(t, err, api.StreamLimit); i < 7 {
					t.Errorf("stream %d of the crowd had to go, want the newest", i)
				}
			default:
				if i >= 7 {
					t.Errorf("stream %d of the crowd kept its place", i)
				}
			}
		}
		close(d.open)
		for _, done := range append(neighbour, junk[:7]...) {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}

// Whoever opens streams faster than anybody needs is refused before his token is looked at; his neighbours are not.
func TestOpenRate(t *testing.T) {
	opened := 0
	atDoor(t, Config{OpenRate: 10}, func(d *door, w *world, fetch func(string) <-chan error) {
		d.pod.open = func(context.Context, metadata.MD) error { opened++; return nil }
		close(d.open)
		for range 1000 {
			if err := <-fetch("fast"); err != nil {
				wantReason(t, err, api.StreamLimit)
			}
		}
		if opened != openBurst {
			t.Errorf("%d tokens were looked at, want %d", opened, openBurst)
		}
		if err := <-fetch("neighbour"); err != nil {
			t.Error(err)
		}
		for range 2 * openBurst { // who is not told apart pays for nobody
			if err := <-fetch(""); err != nil {
				t.Fatal(err)
			}
		}
		opened = 0
		time.Sleep(time.Second)
		for range 100 {
			<-fetch("fast")
		}
		if opened != 10 {
			t.Errorf("%d tokens were looked at in a second, want 10", opened)
		}
		w.srv.mu.Lock()
		defer w.srv.mu.Unlock()
		for i := range 3 * maxPeers {
			w.srv.paceOf(fmt.Sprint(i)).allow(time.Now())
		}
		if n := len(w.srv.opening.paces); n > maxPeers {
			t.Errorf("%d peers are remembered", n)
		}
	})
}
