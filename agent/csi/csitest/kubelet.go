// Package csitest stands in the place of kubelet for tests with a real agent: it registers the agent's driver and asks for the
// volumes of pods, with the calls and the folders of kubelet 1.37 (k8s.io/kubernetes/pkg/volume/csi), and knows no more of the
// agent than kubelet does. So what is tested through it is what a pod gets.
package csitest

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
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registrationpb "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/signet-ca/signet/attestor/attestortest"
)

// Driver is the name of the driver that is registered.
const Driver = "csi.signet.dev"

// tokens is the key under which kubelet hands over a pod's tokens.
const tokens = "csi.storage.k8s.io/serviceAccount.tokens"

// again is how long to wait before the agent is asked once more whether it can be registered.
const again = 5 * time.Millisecond

// Kubelet is that of one node. Make it with New.
type Kubelet struct {
	dir, node, audience string
	endpoint            string // of the driver that is registered
}

// New makes kubelet's folders in dir, for a node of this name. audience is that of the tokens that the driver asks for.
func New(dir, node, audience string) (*Kubelet, error) {
	for _, sub := range []string{"pods", "plugins", "plugins_registry"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o750); err != nil {
			return nil, err
		}
	}
	return &Kubelet{dir: dir, node: node, audience: audience}, nil
}

// Register waits for the agent's socket of registration until ctx ends, and does what kubelet does with it.
func (k *Kubelet) Register(ctx context.Context) error {
	for {
		err := k.register(ctx)
		if err == nil || errors.Is(err, errOtherNode) {
			return err
		}
		pause := time.NewTimer(again)
		select {
		case <-ctx.Done():
			return fmt.Errorf("registration: %w", errors.Join(context.Cause(ctx), err))
		case <-pause.C:
		}
	}
}

var errOtherNode = errors.New("the driver calls the node by another name")

func (k *Kubelet) register(ctx context.Context) error {
	conn, err := dial(filepath.Join(k.dir, "plugins_registry", Driver+"-reg.sock"))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := registrationpb.NewRegistrationClient(conn)
	info, err := client.GetInfo(ctx, &registrationpb.InfoRequest{})
	if err != nil {
		return err
	}
	node, err := dial(info.GetEndpoint())
	if err != nil {
		return err
	}
	defer node.Close()
	n, err := csipb.NewNodeClient(node).NodeGetInfo(ctx, &csipb.NodeGetInfoRequest{})
	if err != nil {
		return err
	}
	if n.GetNodeId() != k.node {
		return fmt.Errorf("%w: %q", errOtherNode, n.GetNodeId())
	}
	if _, err = client.NotifyRegistrationStatus(ctx, &registrationpb.RegistrationStatus{PluginRegistered: true}); err == nil {
		k.endpoint = info.GetEndpoint()
	}
	return err
}

// Volume is one volume of a pod.
type Volume struct {
	attestortest.Pod
	Volume string // its name in the pod
}

func (k *Kubelet) parent(v Volume) string {
	return filepath.Join(k.dir, "pods", v.UID, "volumes", "kubernetes.io~csi", v.Volume)
}

// Target is the folder that the pod gets.
func (k *Kubelet) Target(v Volume) string { return filepath.Join(k.parent(v), "mount") }

func (v Volume) id() string { return fmt.Sprintf("csi-%x", sha256.Sum256([]byte(v.UID+v.Volume))) }

// Publish asks for a volume with a token; change changes the call, as the pod's author may.
func (k *Kubelet) Publish(ctx context.Context, v Volume, token string, change ...func(*csipb.NodePublishVolumeRequest)) error {
	notes, err := json.Marshal(map[string]string{"volumeHandle": v.id(), "driverName": Driver})
	if err == nil {
		err = os.MkdirAll(k.parent(v), 0o750)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(k.parent(v), "vol_data.json"), notes, 0o644)
	}
	if err != nil {
		return err
	}
	own := func(key string) string { return "csi.storage.k8s.io/" + key }
	req := &csipb.NodePublishVolumeRequest{
		VolumeId: v.id(), TargetPath: k.Target(v), Readonly: true,
		VolumeCapability: &csipb.VolumeCapability{
			AccessMode: &csipb.VolumeCapability_AccessMode{Mode: csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{}},
		},
		VolumeContext: map[string]string{
			own("ephemeral"): "true", own("pod.uid"): v.UID, own("pod.name"): v.Name, own("pod.namespace"): v.Namespace,
			own("serviceAccount.name"): v.ServiceAccount,
		},
		Secrets: map[string]string{tokens: fmt.Sprintf(`{%q:{"token":%q,"expirationTimestamp":"2040-01-02T15:04:05Z"}}`, k.audience, token)},
	}
	for _, f := range change {
		f(req)
	}
	return k.call(func(c csipb.NodeClient) error {
		_, err := c.NodePublishVolume(ctx, req)
		return err
	})
}

// Unpublish has a volume removed, and removes kubelet's own part.
func (k *Kubelet) Unpublish(ctx context.Context, v Volume) error {
	err := k.call(func(c csipb.NodeClient) error {
		_, err := c.NodeUnpublishVolume(ctx, &csipb.NodeUnpublishVolumeRequest{VolumeId: v.id(), TargetPath: k.Target(v)})
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
func (k *Kubelet) call(f func(csipb.NodeClient) error) error {
	conn, err := dial(k.endpoint)
	if err != nil {
		return err
	}
	defer conn.Close()
	return f(csipb.NewNodeClient(conn))
}

func dial(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+path, grpc.WithAuthority("localhost"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, target string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", target)
		}))
}
