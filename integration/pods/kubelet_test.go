//go:build integration

package pods

import (
	"context"
	"net"
	"path/filepath"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/signet-ca/signet/agent/csi/csitest"
	"github.com/signet-ca/signet/attestor/attestortest"
)

const (
	audience = "signet:" + trustDomain
	tokens   = "csi.storage.k8s.io/serviceAccount.tokens"
)

// kubelet is that of the node; no call of it takes longer than the test's patience.
type kubelet struct {
	t *testing.T
	k *csitest.Kubelet
}

func newKubelet(t *testing.T, dir string) *kubelet {
	t.Helper()
	k, err := csitest.New(dir, nodeName, audience)
	if err != nil {
		t.Fatal(err)
	}
	return &kubelet{t: t, k: k}
}

// dial makes a connection to a Unix socket.
func dial(t *testing.T, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+path, grpc.WithAuthority("localhost"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, target string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", target)
		}))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func (k *kubelet) patient() (context.Context, context.CancelFunc) {
	return context.WithTimeout(k.t.Context(), patience)
}

// register waits for the agent's socket of registration and does what kubelet does with it.
func (k *kubelet) register() {
	k.t.Helper()
	ctx, cancel := k.patient()
	defer cancel()
	if err := k.k.Register(ctx); err != nil {
		k.t.Fatal(err)
	}
}

// volume is one volume of a pod.
type volume struct {
	attestortest.Pod
	name string
}

func (v volume) of() csitest.Volume { return csitest.Volume{Pod: v.Pod, Volume: v.name} }

func (k *kubelet) target(v volume) string { return k.k.Target(v.of()) }

func (k *kubelet) parent(v volume) string { return filepath.Dir(k.target(v)) }

// publish asks for a volume with a token; change changes the call, as the pod's author may.
func (k *kubelet) publish(v volume, token string, change ...func(*csipb.NodePublishVolumeRequest)) error {
	ctx, cancel := k.patient()
	defer cancel()
	return k.k.Publish(ctx, v.of(), token, change...)
}

// unpublish has a volume removed, and removes kubelet's own part.
func (k *kubelet) unpublish(v volume) error {
	ctx, cancel := k.patient()
	defer cancel()
	return k.k.Unpublish(ctx, v.of())
}
