//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// proxy is one SDS stream on a connection of its own, as Envoy opens one for each secret.
type proxy struct {
	conn   *grpc.ClientConn
	stream secret.SecretDiscoveryService_StreamSecretsClient
	name   string

	mu      sync.Mutex
	got     int       // responses
	at      time.Time // of the last one's acknowledgement
	gone    *root     // that the secret is to be rid of; nil: nobody asks
	rid     bool      // it is
	changed chan struct{}
	failed  error
}

// openProxy opens a stream and returns when the first secret is there and acknowledged.
func openProxy(ctx context.Context, socket, name string) (*proxy, error) {
	conn, err := dialUnix(socket, grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10))
	if err != nil {
		return nil, err
	}
	p := &proxy{conn: conn, name: name, changed: make(chan struct{}, 1)}
	p.stream, err = secret.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err == nil {
		err = p.stream.Send(&discovery.DiscoveryRequest{Node: &core.Node{Id: "bench"}, TypeUrl: secretType, ResourceNames: []string{name}})
	}
	if err == nil {
		err = p.next()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return p, nil
}

// next takes one response and acknowledges it.
func (p *proxy) next() error {
	r, err := p.stream.Recv()
	if err != nil {
		return err
	}
	if len(r.GetResources()) != 1 {
		return fmt.Errorf("%d secrets came", len(r.GetResources()))
	}
	err = p.stream.Send(&discovery.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{p.name}, VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetNonce()})
	p.mu.Lock()
	p.got, p.at = p.got+1, time.Now()
	gone := p.gone
	p.mu.Unlock()
	if gone != nil && err == nil {
		var in bool
		in, err = gone.in(r.GetResources()[0].GetValue())
		p.mu.Lock()
		p.rid = !in
		p.mu.Unlock()
	}
	return err
}

// follow takes what comes until the connection ends.
func (p *proxy) follow() {
	for {
		err := p.next()
		if err != nil {
			p.mu.Lock()
			p.failed = err
			p.mu.Unlock()
		}
		select {
		case p.changed <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// first asks for the first secret on so many new connections, one after the other, over the pods of Span in turn. Where Publish
// is set each of them is a pod that the node has never had, and its volume is asked for first.
type first struct {
	Span    span
	Times   int
	Publish bool
}

// firsts is how long each of them took.
type firsts struct{ Took []time.Duration }

func (f firsts) quantile(q float64) float64 {
	slices.Sort(f.Took)
	return quantile(f.Took, q)
}

func (k *kubelet) first(ctx context.Context, c *cluster, f first) (all firsts, err error) {
	// Envoy, which asks for secrets, has no collector. Ours would be a tenth of the time of the slowest in a hundred.
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	for n := range f.Times {
		i := f.Span.From + n%(f.Span.To-f.Span.From)
		begin := time.Now()
		if f.Publish {
			if err := k.publish(ctx, c, i); err != nil {
				return firsts{}, err
			}
		}
		p, err := openProxy(ctx, k.socket(i), "default")
		if err != nil {
			return firsts{}, err
		}
		all.Took = append(all.Took, time.Since(begin))
		p.conn.Close()
	}
	return all, nil
}

// streams opens so many more, over the pods in turn, which stay open. The names are subscribed to in turn.
type streams struct {
	Span  span
	Count int
	Names []string
}

func (k *kubelet) open(ctx context.Context, o streams) error {
	for n := range o.Count {
		p, err := openProxy(ctx, k.socket(o.Span.From+n%(o.Span.To-o.Span.From)), o.Names[n%len(o.Names)])
		if err != nil {
			return fmt.Errorf("stream %d: %w", len(k.proxies), err)
		}
		k.proxies = append(k.proxies, p)
		go p.follow()
	}
	return nil
}

// mark forgets what streams have had so far.
func (k *kubelet) mark() {
	for _, p := range k.proxies {
		p.mu.Lock()
		p.got = 0
		p.mu.Unlock()
	}
}

// await waits until every open stream has had a response since the mark, and returns when the last was acknowledged, in
// microseconds since 1970.
func (k *kubelet) await(ctx context.Context, seconds float64) (int64, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Duration(seconds*float64(time.Second)), errors.New("not all streams had it in time"))
	defer cancel()
	var last time.Time
	for _, p := range k.proxies {
		at, err := p.await(ctx)
		if err != nil {
			return 0, err
		}
		if last.Before(at) {
			last = at
		}
	}
	return last.UnixMicro(), nil
}

func (p *proxy) await(ctx context.Context) (time.Time, error) {
	return p.until(ctx, func() bool { return p.got > 0 })
}

// until waits until something is true of the stream, which is asked with mu held, and returns when the last response was acknowledged.
func (p *proxy) until(ctx context.Context, is func() bool) (time.Time, error) {
	for {
		p.mu.Lock()
		ok, at, failed := is(), p.at, p.failed
		p.mu.Unlock()
		if failed != nil {
			return time.Time{}, failed
		}
		if ok {
			return at, nil
		}
		select {
		case <-p.changed:
		case <-ctx.Done():
			return time.Time{}, context.Cause(ctx)
		}
	}
}
