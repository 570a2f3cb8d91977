//go:build linux

package csi

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	registrationpb "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/canary"
)

const audience = "signet:example.org"

// kubelet does with folders and calls what kubelet 1.37 does with an inline volume (k8s.io/kubernetes/pkg/volume/csi and
// pkg/kubelet/pluginmanager), in its order, down to what it removes after which error.
type kubelet struct {
	t        testing.TB
	dir      string
	endpoint string          // of the driver that is registered
	setUp    map[string]bool // by target: a later SetUp is a remount
}

func newKubelet(t testing.TB, dir string) *kubelet {
	t.Helper()
	for _, sub := range []string{"pods", "plugins", "plugins_registry"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	return &kubelet{t: t, dir: dir, setUp: map[string]bool{}}
}

// podVolume is a pod with one volume of ours.
type podVolume struct {
	Pod
	volume string
}

func testPod(n int) podVolume {
	return podVolume{Pod{
		UID:       fmt.Sprintf("%08x-4d2e-4f8e-9c1a-0123456789ab", n),
		Namespace: "shop", Name: fmt.Sprintf("checkout-%d", n), ServiceAccount: "checkout",
	}, "signet"}
}

func (k *kubelet) parent(p podVolume) string {
	return filepath.Join(k.dir, "pods", p.UID, "volumes", "kubernetes.io~csi", p.volume)
}
func (k *kubelet) target(p podVolume) string { return filepath.Join(k.parent(p), "mount") }
func (k *kubelet) sock(p podVolume) string   { return filepath.Join(k.target(p), SocketName) }

func (p podVolume) id() string { return fmt.Sprintf("csi-%x", sha256.Sum256([]byte(p.UID+p.volume))) }

// token makes what stands for a token of this pod: its claims, and a number that tells tokens apart.
func (p podVolume) token(n int) string {
	claims, _ := json.Marshal(p.Pod)
	return fmt.Sprintf("%s.%s.%d", canary.Marker, base64.RawURLEncoding.EncodeToString(claims), n)
}

func tokensJSON(audienceTokens ...string) string {
	var parts []string
	for i := 0; i < len(audienceTokens); i += 2 {
		parts = append(parts, fmt.Sprintf(`%q:{"token":%q,"expirationTimestamp":"2030-01-02T15:04:05Z"}`, audienceTokens[i], audienceTokens[i+1]))
	}
	return "{" + strings.Join(parts, ",") + "}"
}

// request is the call that kubelet makes for a pod.
func (k *kubelet) request(p podVolume, token string) *csipb.NodePublishVolumeRequest {
	return &csipb.NodePublishVolumeRequest{
		VolumeId: p.id(), TargetPath: k.target(p), Readonly: true,
		VolumeCapability: &csipb.VolumeCapability{
			AccessMode: &csipb.VolumeCapability_AccessMode{Mode: csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{}},
		},
		VolumeContext: map[string]string{
			keyEphemeral: "true", keyPodUID: p.UID, keyPodName: p.Name, keyNamespace: p.Namespace, keyAccount: p.ServiceAccount,
		},
		Secrets: map[string]string{keyTokens: tokensJSON(audience, token)},
	}
}

func dial(t testing.TB, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+path, grpc.WithAuthority("localhost"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second}, MinConnectTimeout: time.Minute}),
		grpc.WithContextDialer(func(ctx context.Context, target string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", target)
		}))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// register is kubelet's watcher of plugins, once: it waits for the driver's socket, asks, looks at the driver and tells it.
func (k *kubelet) register() {
	k.t.Helper()
	var reg string
	eventually(k.t, "a socket of registration", func() error {
		all, err := os.ReadDir(filepath.Join(k.dir, "plugins_registry"))
		if err != nil {
			return err
		}
		for _, e := range all {
			if !strings.HasPrefix(e.Name(), ".") && e.Type() == fs.ModeSocket {
				reg = filepath.Join(k.dir, "plugins_registry", e.Name())
				return nil
			}
		}
		return errors.New("none")
	})
	conn := dial(k.t, reg)
	defer conn.Close()
	client := registrationpb.NewRegistrationClient(conn)
	info, err := client.GetInfo(k.t.Context(), &registrationpb.InfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		k.t.Fatal(err)
	}
	if info.GetType() != "CSIPlugin" || info.GetName() != DefaultName || !slices.Equal(info.GetSupportedVersions(), []string{"1.0.0"}) {
		k.t.Fatalf("plugin %v", info)
	}
	k.endpoint = info.GetEndpoint()
	k.node(func(c csipb.NodeClient) {
		if n, err := c.NodeGetInfo(k.t.Context(), &csipb.NodeGetInfoRequest{}); err != nil || n.GetNodeId() != "node-1" {
			k.t.Fatalf("NodeGetInfo: %v, %v", n, err)
		}
	})
	if _, err := client.NotifyRegistrationStatus(k.t.Context(), &registrationpb.RegistrationStatus{PluginRegistered: true}); err != nil {
		k.t.Fatal(err)
	}
}

// node makes calls over a connection of their own, as kubelet does.
func (k *kubelet) node(f func(csipb.NodeClient)) {
	conn := dial(k.t, k.endpoint)
	defer conn.Close()
	f(csipb.NewNodeClient(conn))
}

// publish is csiMountMgr.SetUpAt.
func (k *kubelet) publish(p podVolume, req *csipb.NodePublishVolumeRequest) error {
	if err := os.MkdirAll(k.parent(p), 0o750); err != nil {
		k.t.Fatal(err)
	}
	remount := k.setUp[k.target(p)]
	var err error
	k.node(func(c csipb.NodeClient) {
		if _, err = c.NodeGetCapabilities(k.t.Context(), &csipb.NodeGetCapabilitiesRequest{}); err != nil {
			return
		}
		if werr := k.writeNotes(p); werr != nil {
			k.t.Fatal(werr)
		}
		_, err = c.NodePublishVolume(k.t.Context(), req)
	})
	switch {
	case err == nil:
		k.setUp[k.target(p)] = true
	case final(err) && !remount:
		if rerr := k.removeMountDir(p); rerr != nil {
			k.t.Errorf("kubelet cannot clean up after %v: %v", err, rerr)
		}
	}
	return err
}

// writeNotes is saveVolumeData, which kubelet does before each call.
func (k *kubelet) writeNotes(p podVolume) error {
	if err := os.MkdirAll(k.parent(p), 0o750); err != nil {
		return err
	}
	notes, err := json.Marshal(map[string]string{"specVolID": p.volume, "volumeHandle": p.id(), "driverName": DefaultName, "volumeLifecycleMode": "Ephemeral"})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(k.parent(p), volumeData), notes, 0o644)
}

// final is isFinalError of csi_client.go.
func final(err error) bool {
	switch status.Code(err) {
	case codes.Canceled, codes.DeadlineExceeded, codes.Unavailable, codes.ResourceExhausted, codes.Aborted:
		return false
	}
	return true
}

// removeMountDir is that of csi_mounter.go, for a folder that is no mount point.
func (k *kubelet) removeMountDir(p podVolume) error {
	for _, path := range []string{k.target(p), filepath.Join(k.parent(p), volumeData), k.parent(p)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// unpublish is csiMountMgr.TearDownAt, with the id that its notes say.
func (k *kubelet) unpublish(p podVolume) error {
	data, err := os.ReadFile(filepath.Join(k.parent(p), volumeData))
	if err != nil {
		return err
	}
	var notes map[string]string
	if err := json.Unmarshal(data, &notes); err != nil {
		return err
	}
	if notes["volumeHandle"] == "" {
		return errors.New("missing volume id")
	}
	k.node(func(c csipb.NodeClient) {
		_, err = c.NodeUnpublishVolume(k.t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: notes["volumeHandle"], TargetPath: k.target(p)})
	})
	if err != nil {
		return err
	}
	delete(k.setUp, k.target(p))
	return k.removeMountDir(p)
}

// deletePod ends a pod as kubelet does: its volume, then what is left of its folder, which must be nothing but folders.
func (k *kubelet) deletePod(p podVolume) error {
	if err := k.unpublish(p); err != nil {
		return err
	}
	return k.removeOrphan(p)
}

// removeOrphan is removeOrphanedPodVolumeDirs: it removes folders, and fails over anything else.
func (k *kubelet) removeOrphan(p podVolume) error {
	for dir := k.parent(p); dir != filepath.Join(k.dir, "pods"); dir = filepath.Dir(dir) {
		if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
		}
	}
	return nil
}

// wantError checks what kubelet would show in the pod's events: code, reason and advice, and no secret.
func wantError(t *testing.T, err error, reason api.Reason) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %s", reason)
	}
	if got := api.ReasonOf(api.FromStatus(err)); got != reason || status.Code(err) != reason.GRPC() {
		t.Fatalf("error %v (%s), want %s", err, got, reason)
	}
	msg := status.Convert(err).Message()
	if !strings.Contains(msg, reason.Code()) || !strings.HasSuffix(msg, advice(reason)) || advice(reason) == "" {
		t.Errorf("message %q says neither its name nor what to do", msg)
	}
	if strings.Contains(msg, canary.Marker) {
		t.Error("the message holds a token")
	}
}

func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		pause := time.NewTimer(5 * time.Millisecond)
		<-pause.C
	}
}

// tree returns all that lies below a folder, with kinds; no link is followed.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		info, err := e.Info()
		if err != nil {
			return err
		}
		text := info.Mode().String()
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += " " + string(data)
		}
		all[rel] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func sameTree(t *testing.T, before, after map[string]string) {
	t.Helper()
	if !maps.Equal(before, after) {
		t.Errorf("before: %v\nafter: %v", slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
	}
}
