//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registrationpb "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/signet-ca/signet/attestor/attestortest"
)

const driver = "csi.signet.dev"

// kubelet makes the calls and the folders of kubelet 1.37 for one node, and has its pods' proxies.
type kubelet struct {
	number  int    // of the node
	dir     string // of the CA's files
	root    string // kubelet's
	node    *grpc.ClientConn
	client  csipb.NodeClient
	pods    []attestortest.Pod
	proxies []*proxy
}

func (k *kubelet) do(ctx context.Context, c *cluster, what string, arg json.RawMessage) (any, error) {
	switch what {
	case "register":
		return with(arg, func(memory string) (any, error) { return nil, k.register(ctx, filepath.Join(memory, "kubelet")) })
	case "publish":
		return with(arg, func(p span) (any, error) {
			for i := p.From; i < p.To; i++ {
				if err := k.publish(ctx, c, i); err != nil {
					return nil, err
				}
			}
			return nil, nil
		})
	case "unpublish":
		return with(arg, func(p span) (any, error) {
			for i := p.From; i < p.To; i++ {
				if err := k.unpublish(ctx, i); err != nil {
					return nil, err
				}
			}
			return nil, nil
		})
	case "first":
		return with(arg, func(f first) (any, error) { return k.first(ctx, c, f) })
	case "open":
		return with(arg, func(o streams) (any, error) { return nil, k.open(ctx, o) })
	case "mark":
		k.mark()
		return nil, nil
	case "await":
		return with(arg, func(seconds float64) (any, error) { return k.await(ctx, seconds) })
	default:
		return nil, errUnknown
	}
}

// span is of pods of one node.
type span struct{ From, To int }

func dialUnix(path string, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+path, append([]grpc.DialOption{
		grpc.WithAuthority("localhost"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}),
	}, more...)...)
}

// register waits for the agent's socket and registers its driver.
func (k *kubelet) register(ctx context.Context, root string) error {
	k.root = root
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for {
		err := k.tryRegister(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("registration: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (k *kubelet) tryRegister(ctx context.Context) error {
	conn, err := dialUnix(filepath.Join(k.root, "plugins_registry", driver+"-reg.sock"))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := registrationpb.NewRegistrationClient(conn)
	info, err := client.GetInfo(ctx, &registrationpb.InfoRequest{})
	if err != nil {
		return err
	}
	if k.node, err = dialUnix(info.GetEndpoint()); err != nil {
		return err
	}
	k.client = csipb.NewNodeClient(k.node)
	_, err = client.NotifyRegistrationStatus(ctx, &registrationpb.RegistrationStatus{PluginRegistered: true})
	return err
}

func (k *kubelet) target(i int) string {
	return filepath.Join(k.root, "pods", k.pods[i].UID, "volumes", "kubernetes.io~csi", "signet", "mount")
}

// socket is that of a pod by a short way, since the path of a Unix socket has little room.
func (k *kubelet) socket(i int) string {
	return filepath.Join(filepath.Dir(k.root), strconv.Itoa(i), "agent.sock")
}

func volumeID(uid string) string { return fmt.Sprintf("csi-%x", sha256.Sum256([]byte(uid))) }

// unpublish gives back the volume of a pod that has ended.
func (k *kubelet) unpublish(ctx context.Context, i int) error {
	_, err := k.client.NodeUnpublishVolume(ctx, &csipb.NodeUnpublishVolumeRequest{VolumeId: volumeID(k.pods[i].UID), TargetPath: k.target(i)})
	return err
}

// publish asks for the volume of a pod.
func (k *kubelet) publish(ctx context.Context, c *cluster, i int) error {
	p := k.pods[i]
	id := volumeID(p.UID)
	notes, err := json.Marshal(map[string]string{"volumeHandle": id, "driverName": driver})
	if err == nil {
		err = os.MkdirAll(filepath.Dir(k.target(i)), 0o750)
	}
	if err == nil {
		err = os.Symlink(k.target(i), filepath.Dir(k.socket(i)))
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(filepath.Dir(k.target(i)), "vol_data.json"), notes, 0o644)
	}
	if err != nil {
		return err
	}
	own := func(key string) string { return "csi.storage.k8s.io/" + key }
	token := c.nodes[k.number].items[i].GetEvidence().GetData()
	_, err = k.client.NodePublishVolume(ctx, &csipb.NodePublishVolumeRequest{
		VolumeId: id, TargetPath: k.target(i), Readonly: true,
		VolumeCapability: &csipb.VolumeCapability{
			AccessMode: &csipb.VolumeCapability_AccessMode{Mode: csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{}},
		},
		VolumeContext: map[string]string{
			own("ephemeral"): "true", own("pod.uid"): p.UID, own("pod.name"): p.Name, own("pod.namespace"): p.Namespace,
			own("serviceAccount.name"): p.ServiceAccount,
		},
		Secrets: map[string]string{own("serviceAccount.tokens"): fmt.Sprintf(`{"signet:%s":{"token":%q,"expirationTimestamp":"2040-01-02T15:04:05Z"}}`, trustDomain, token)},
	})
	return err
}
