//go:build integration

package pods

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registrationpb "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/signet-ca/signet/attestor/attestortest"
)

const (
	driver   = "csi.signet.dev"
	audience = "signet:" + trustDomain
	tokens   = "csi.storage.k8s.io/serviceAccount.tokens"
)

// kubelet makes the calls of kubelet 1.37, and the folders (k8s.io/kubernetes/pkg/volume/csi).
type kubelet struct {
	t        *testing.T
	dir      string
	endpoint string // of the driver that is registered
}

func newKubelet(t *testing.T, dir string) *kubelet {
	t.Helper()
	for _, sub := range []string{"pods", "plugins", "plugins_registry"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	return &kubelet{t: t, dir: dir}
}

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

// register waits for the agent's socket of registration and does what kubelet does with it.
func (k *kubelet) register() {
	k.t.Helper()
	eventually(k.t, "registration", func() error {
		ctx, cancel := context.WithTimeout(k.t.Context(), patience)
		defer cancel()
		conn := dial(k.t, filepath.Join(k.dir, "plugins_registry", driver+"-reg.sock"))
		defer conn.Close()
		client := registrationpb.NewRegistrationClient(conn)
		info, err := client.GetInfo(ctx, &registrationpb.InfoRequest{})
		if err != nil {
			return err
		}
		k.endpoint = info.GetEndpoint()
		node := dial(k.t, k.endpoint)
		defer node.Close()
		n, err := csipb.NewNodeClient(node).NodeGetInfo(ctx, &csipb.NodeGetInfoRequest{})
		if err != nil {
			return err
		}
		if n.GetNodeId() != nodeName {
			k.t.Fatalf("the node is called %q", n.GetNodeId())
		}
		_, err = client.NotifyRegistrationStatus(ctx, &registrationpb.RegistrationStatus{PluginRegistered: true})
		return err
	})
}

// volume is one volume of a pod.
type volume struct {
	attestortest.Pod
	name string
}

func (k *kubelet) parent(v volume) string {
	return filepath.Join(k.dir, "pods", v.UID, "volumes", "kubernetes.io~csi", v.name)
}

func (k *kubelet) target(v volume) string { return filepath.Join(k.parent(v), "mount") }

func (v volume) id() string { return fmt.Sprintf("csi-%x", sha256.Sum256([]byte(v.UID+v.name))) }

// publish asks for a volume with a token; change changes the call, as the pod's author may.
func (k *kubelet) publish(v volume, token string, change ...func(*csipb.NodePublishVolumeRequest)) error {
	k.t.Helper()
	if err := os.MkdirAll(k.parent(v), 0o750); err != nil {
		k.t.Fatal(err)
	}
	notes, err := json.Marshal(map[string]string{"volumeHandle": v.id(), "driverName": driver})
	if err == nil {
		err = os.WriteFile(filepath.Join(k.parent(v), "vol_data.json"), notes, 0o644)
	}
	if err != nil {
		k.t.Fatal(err)
	}
	own := func(key string) string { return "csi.storage.k8s.io/" + key }
	req := &csipb.NodePublishVolumeRequest{
		VolumeId: v.id(), TargetPath: k.target(v), Readonly: true,
		VolumeCapability: &csipb.VolumeCapability{
			AccessMode: &csipb.VolumeCapability_AccessMode{Mode: csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{}},
		},
		VolumeContext: map[string]string{
			own("ephemeral"): "true", own("pod.uid"): v.UID, own("pod.name"): v.Name, own("pod.namespace"): v.Namespace,
			own("serviceAccount.name"): v.ServiceAccount,
		},
		Secrets: map[string]string{tokens: fmt.Sprintf(`{%q:{"token":%q,"expirationTimestamp":"2040-01-02T15:04:05Z"}}`, audience, token)},
	}
	for _, f := range change {
		f(req)
	}
	return k.call(func(ctx context.Context, c csipb.NodeClient) error {
		_, err := c.NodePublishVolume(ctx, req)
		return err
	})
}

// unpublish has a volume removed, and removes kubelet's own part.
func (k *kubelet) unpublish(v volume) error {
	k.t.Helper()
	err := k.call(func(ctx context.Context, c csipb.NodeClient) error {
		_, err := c.NodeUnpublishVolume(ctx, &csipb.NodeUnpublishVolumeRequest{VolumeId: v.id(), TargetPath: k.target(v)})
		return err
	})
	if err != nil {
		return err
	}
	for _, path := range []string{filepath.Join(k.parent(v), "vol_data.json"), k.parent(v)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err // something of ours is left in it
		}
	}
	return nil
}

// call makes calls over a connection of their own, as kubelet does.
func (k *kubelet) call(f func(context.Context, csipb.NodeClient) error) error {
	ctx, cancel := context.WithTimeout(k.t.Context(), patience)
	defer cancel()
	conn := dial(k.t, k.endpoint)
	defer conn.Close()
	return f(ctx, csipb.NewNodeClient(conn))
}
