package main

import (
	"bytes"
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/signet-ca/signet/agent/csi"
	"github.com/signet-ca/signet/agent/workloadapi"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/internal/latest"
	"github.com/signet-ca/signet/sds"
)

// podRig is a volume of a pod, as the volume plugin has it: its socket is served again a moment after its end.
type podRig struct {
	*rig
	pods   *pods
	volume csi.Volume
	w      csi.Workload
	conn   *grpc.ClientConn
	end    func(cause error)
}

// publish publishes a volume of a pod with a token.
func (r *rig) publish(p *pods, pod attestortest.Pod, token string) *podRig {
	r.t.Helper()
	x := &podRig{rig: r, pods: p, volume: csi.Volume{Name: "signet", Pod: csi.Pod{
		UID: pod.UID, Namespace: pod.Namespace, Name: pod.Name, ServiceAccount: pod.ServiceAccount,
	}}}
	var err error
	if x.w, err = p.Offer(r.t.Context(), x.volume, []byte(token)); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	var socket latest.Value[*bufconn.Listener]
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			l := bufconn.Listen(256 << 10)
			socket.Set(l)
			if err := x.w.Serve(ctx, l); err != nil {
				r.t.Error(err)
			}
			if c, err := l.Dial(); err == nil {
				c.Close()
				r.t.Error("the socket is still open")
			}
		}
	})
	x.end = func(cause error) {
		cancel(cause)
		wg.Wait()
		x.w.Close()
		synctest.Wait() // the clients have read how their streams ended
		x.conn.Close()
	}
	x.conn, err = grpc.NewClient("passthrough:///pod", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			l, changed := socket.Get()
			if l == nil {
				<-changed
				l = socket.Load()
			}
			return l.DialContext(ctx)
		}))
	if err != nil {
		r.t.Fatal(err)
	}
	return x
}

// client is a stream of the Workload API.
type client struct {
	got chan *x509svid.SVID
	err chan error
	end context.CancelFunc
}

func (x *podRig) watch() *client {
	x.t.Helper()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true"))
	stream, err := workload.NewSpiffeWorkloadAPIClient(x.conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{}, grpc.WaitForReady(true))
	if err != nil {
		x.t.Fatal(err)
	}
	p := &client{make(chan *x509svid.SVID, 100), make(chan error, 1), cancel}
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				p.err <- err
				return
			}
			svid, err := x509svid.ParseRaw(m.GetSvids()[0].GetX509Svid(), m.GetSvids()[0].GetX509SvidKey())
			if err != nil {
				p.err <- err
				return
			}
			p.got <- svid
		}
	}()
	return p
}

func (c *client) next(t *testing.T, within time.Duration) *x509svid.SVID {
	t.Helper()
	select {
	case s := <-c.got:
		return s
	case err := <-c.err:
		t.Fatalf("the stream ended: %v", err)
	case <-time.After(within):
		t.Fatalf("nothing came within %s", within)
	}
	return nil
}

func (c *client) ends(t *testing.T, within time.Duration) error {
	t.Helper()
	for {
		select {
		case <-c.got:
		case err := <-c.err:
			return err
		case <-time.After(within):
			t.Fatalf("the stream did not end within %s", within)
		}
	}
}

func serialOf(s *x509svid.SVID) string { return s.Certificates[0].SerialNumber.Text(16) }

// A pod has SDS and the Workload API on one socket, without a token, is sent each renewal, and the CA hears of each stream
// under a number of its own: what was acknowledged over SDS, and what was pushed over the Workload API.
//
// spiffe
func TestPodSocket(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		p := newPods(r.src, nodeName, r.src.log)
		pod := r.pod("web-1")
		x := r.publish(p, pod, r.token(pod, 6*time.Hour))
		api1, api2 := x.watch(), x.watch()
		first := api1.next(t, time.Second)
		if api2.next(t, time.Second); first.ID.String() != webID {
			t.Errorf("the pod is %s", first.ID)
		}
		shared := r.open([]string{r.token(pod, tokenLife)}, sds.NameDefault)
		m, got := shared.next(time.Second)
		if serialOf(svidOf(t, got[sds.NameDefault])) != serialOf(first) {
			t.Error("on the shared socket the pod has another SVID")
		}
		shared.answer(m, "", sds.NameDefault)
		own := r.conn
		r.conn = x.conn
		envoy := r.open(nil, sds.NameDefault, sds.NameRootCA)
		r.conn = own
		m, got = envoy.next(time.Second)
		if serialOf(svidOf(t, got[sds.NameDefault])) != serialOf(first) {
			t.Error("SDS and the Workload API differ")
		}
		envoy.answer(m, "", sds.NameDefault, sds.NameRootCA)
		streams := r.streams("web-1")
		if len(streams) != 4 {
			t.Fatalf("the CA heard of %d streams, want 4", len(streams))
		}
		hash := r.CA().Bundle().Hash
		numbers, protocols := map[uint64]bool{}, map[string]int{}
		for _, s := range streams {
			numbers[s.GetId()] = true
			protocols[s.GetProtocol()]++
			if s.GetProtocol() != protocolWorkloadAPI {
				continue
			}
			if s.GetWantsBundle() || s.GetAckedSerial() != "" || s.GetAckedGeneration() != 0 || strings.TrimLeft(s.GetPushedSerial(), "0") != serialOf(first) ||
				s.GetPushedGeneration() != 1<<32|1 || !bytes.Equal(s.GetPushedHash(), hash[:]) || s.GetNames()[0] != workloadapi.CallSVID {
				t.Errorf("of the Workload API the CA heard %v", s)
			}
		}
		if len(numbers) != 4 || protocols[protocolWorkloadAPI] != 2 || protocols[sds.ProtocolSotW] != 2 {
			t.Errorf("numbers %v, protocols %v", numbers, protocols)
		}
		api2.end()
		if streams := r.streams("web-1"); len(streams) != 3 {
			t.Errorf("one stream has ended, and the CA heard of %d", len(streams))
		}
		second := api1.next(t, 31*time.Minute)
		if serialOf(second) == serialOf(first) || second.ID != first.ID {
			t.Error("what came next is no renewal")
		}
		shared.end()
		envoy.end()
		x.end(csi.ErrUnpublished)
		if err := api1.ends(t, time.Second); status.Code(err) != codes.PermissionDenied || api.ReasonOf(api.FromStatus(err)) != api.PodDeleted {
			t.Errorf("a stream of a pod that is gone ends with %v", err)
		}
		if r.followers() != 0 || len(r.streams("web-1")) != 0 || r.metric("signet_agent_svids", "") != 0 {
			t.Error("something is left of a pod that is gone")
		}
	})
}

// Streams of a pod that may have no identity end with that, whenever it turns out, and its volume is none the worse for it.
// Where only the agent ends, they end as those who should come back.
func TestPodRefused(t *testing.T) {
	withRig(t, catest.Options{Policy: ca.PolicyFile{Namespaces: []string{"shop"}}}, func(t *testing.T, r *rig) {
		p := newPods(r.src, nodeName, r.src.log)
		attic := r.Pod("attic", "web-0", "web", nodeName)
		x := r.publish(p, attic, r.token(attic, tokenLife))
		for range 2 { // when it turns out, and because it is known
			err := x.watch().ends(t, 2*time.Second)
			if status.Code(err) != codes.PermissionDenied || api.ReasonOf(api.FromStatus(err)) != api.NamespaceNotAllowed {
				t.Errorf("the stream ends with %v", err)
			}
		}
		_, err := secret.NewSecretDiscoveryServiceClient(x.conn).FetchSecrets(t.Context(), &discovery.DiscoveryRequest{TypeUrl: sds.TypeURL})
		if api.ReasonOf(api.FromStatus(err)) != api.NamespaceNotAllowed {
			t.Errorf("SDS answers %v", err)
		}
		if err := x.w.Offer(t.Context(), []byte(r.token(attic, tokenLife+time.Minute))); err != nil {
			t.Errorf("kubelet's next token: %v", err)
		}
		x.end(csi.ErrUnpublished)

		pod := r.pod("web-1")
		x = r.publish(p, pod, r.token(pod, tokenLife))
		stream := x.watch()
		stream.next(t, time.Second)
		x.end(context.Canceled)
		if err := stream.ends(t, 5*time.Second); status.Code(err) != codes.Unavailable || api.ReasonOf(api.FromStatus(err)) != api.AgentStopping {
			t.Errorf("a stream of an agent that ends ends with %v", err)
		}
	})
}

// A ServiceAccount that was made anew is another identity: the streams of its pods end, and come back to it.
func TestServiceAccountMadeAnew(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		p := newPods(r.src, nodeName, r.src.log)
		pod := r.pod("web-1")
		x := r.publish(p, pod, r.token(pod, tokenLife))
		stream := x.watch()
		first := stream.next(t, time.Second)
		anew := pod
		anew.ServiceAccountUID = "anew"
		r.Pods.Add(anew)
		if err := x.w.Offer(t.Context(), []byte(r.token(anew, tokenLife))); err != nil {
			t.Fatal(err)
		}
		if err := stream.ends(t, 5*time.Second); api.ReasonOf(api.FromStatus(err)) != api.AgentStopping {
			t.Errorf("the stream ends with %v", err)
		}
		time.Sleep(5 * time.Second) // until the old connection has ended
		if second := x.watch().next(t, time.Second); serialOf(second) == serialOf(first) {
			t.Error("the new ServiceAccount has the old one's SVID")
		}
		if n := r.metric("signet_agent_svids", ""); n != 1 {
			t.Errorf("%v SVIDs are held for one pod", n)
		}
		x.end(csi.ErrUnpublished)
	})
}

// The secrets of a pod with a socket are encoded before a stream asks for them, and stay so between streams; of an identity
// that is refused nothing is kept.
func TestPodEncodedBefore(t *testing.T) {
	withRig(t, catest.Options{Policy: ca.PolicyFile{Namespaces: []string{"shop"}}}, func(t *testing.T, r *rig) {
		p := newPods(r.src, nodeName, r.src.log)
		pod := r.pod("web-1")
		x := r.publish(p, pod, r.token(pod, tokenLife))
		encoded := func() *sds.Identity {
			t.Helper()
			time.Sleep(time.Second) // the bubble's: all that goes on has come to its end
			r.src.mu.Lock()
			defer r.src.mu.Unlock()
			if len(r.src.followers) != 1 {
				t.Fatalf("%d identities are followed", len(r.src.followers))
			}
			for _, f := range r.src.followers {
				return f.material.Load().Identity
			}
			return nil
		}
		first := encoded()
		if first == nil {
			t.Fatal("there is an SVID, and nobody has encoded it")
		}
		own := r.conn
		r.conn = x.conn
		envoy := r.open(nil, sds.NameDefault)
		r.conn = own
		m, _ := envoy.next(time.Second)
		envoy.answer(m, "", sds.NameDefault)
		envoy.end()
		if encoded() != first {
			t.Error("the SVID was encoded anew for a stream")
		}
		time.Sleep(31 * time.Minute)
		if encoded().Serial() == first.Serial() {
			t.Error("a renewal was not encoded")
		}
		x.end(csi.ErrUnpublished)

		attic := r.Pod("attic", "web-0", "web", nodeName)
		x = r.publish(p, attic, r.token(attic, tokenLife))
		time.Sleep(5 * time.Second)
		if n := r.followers(); n != 0 {
			t.Errorf("%d identities are followed, and the only one is refused", n)
		}
		x.end(csi.ErrUnpublished)
	})
}
