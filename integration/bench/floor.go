//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-ca/signet/agent/workloadapi"
	"github.com/signet-ca/signet/internal/latest"
	"github.com/signet-ca/signet/sds"
)

// floor is the least that a stream costs with gRPC, in a process of its own: the agent's listener and server with its options,
// and a handler that has one request answered and then waits for the end of its stream. There are no fan-outs to it.
type floor struct {
	stop context.CancelFunc
	wg   sync.WaitGroup
	err  error // of the server; set when wg is done
}

func (f *floor) do(_ context.Context, what string, arg json.RawMessage) (any, error) {
	if what != "serve" || f.stop != nil {
		return nil, errUnknown
	}
	return with(arg, func(path string) (any, error) { return nil, f.serve(path) })
}

func (f *floor) serve(path string) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	const unbounded = 1 << 20 // all come over one socket here
	server := workloadapi.New(workloadapi.Config{
		Source: new(latest.Value[*workloadapi.Snapshot]), MaxRequestBytes: sds.MaxRequestBytes, MaxConnections: unbounded, ReadRate: unbounded << 10,
	})
	ctx, stop := context.WithCancel(context.Background())
	f.stop = stop
	f.wg.Go(func() { f.err = server.Serve(ctx, l, parked{closing: ctx}) })
	return nil
}

// Close implements io.Closer.
func (f *floor) Close() error {
	if f.stop != nil {
		f.stop()
		f.wg.Wait()
	}
	return f.err
}

// parked is the service of a floor.
type parked struct {
	secret.UnimplementedSecretDiscoveryServiceServer
	closing context.Context
}

// Register implements workloadapi.Service.
func (p parked) Register(r grpc.ServiceRegistrar) {
	secret.RegisterSecretDiscoveryServiceServer(r, p)
}

// Close implements workloadapi.Service.
func (parked) Close() {}

// StreamSecrets answers in a goroutine that ends, so that the handler's own stack is what gRPC needs of it.
func (p parked) StreamSecrets(wire secret.SecretDiscoveryService_StreamSecretsServer) error {
	answered := make(chan error)
	go func() {
		_, err := wire.Recv()
		if err == nil {
			err = wire.Send(&discovery.DiscoveryResponse{Nonce: "1", TypeUrl: secretType, Resources: []*anypb.Any{{TypeUrl: secretType, Value: make([]byte, 1<<10)}}})
		}
		if err == nil {
			_, err = wire.Recv() // the acknowledgement
		}
		answered <- err
	}()
	if err := <-answered; err != nil {
		return err
	}
	select {
	case <-wire.Context().Done():
	case <-p.closing.Done():
	}
	return nil
}

// callers are the clients of a floor.
type callers struct{ proxies []*proxy }

// calls are so many more streams to a socket.
type calls struct {
	Path  string
	Count int
}

func (c *callers) do(ctx context.Context, what string, arg json.RawMessage) (any, error) {
	if what != "open" {
		return nil, errUnknown
	}
	return with(arg, func(o calls) (any, error) {
		for range o.Count {
			p, err := openProxy(ctx, o.Path, "ROOTCA")
			if err != nil {
				return nil, err
			}
			c.proxies = append(c.proxies, p)
			go p.follow()
		}
		return nil, nil
	})
}

// floor returns how much memory a further stream takes there, from 1,000 to 10,000, as the agent's are counted.
func (b *bench) floor() (each float64, err error) {
	dir, err := shortFolder()
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	server, err := b.child(dir, "floor", b.server)
	if err != nil {
		return 0, err
	}
	defer server.end()
	clients, err := b.child(dir, "callers", b.client)
	if err != nil {
		return 0, err
	}
	defer clients.end()
	path := filepath.Join(dir, "floor.sock")
	if _, err := ask[struct{}](server, "serve", path); err != nil {
		return 0, err
	}
	var rss [2]int64
	for i, n := range []int{1000, 9000} {
		_, failed := ask[struct{}](clients, "open", calls{path, n})
		var at error
		rss[i], at = resident(server.pid())
		if err := errors.Join(failed, at); err != nil {
			return 0, err
		}
	}
	return float64(rss[1]-rss[0]) / 9000, nil
}
