package csi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	registrationpb "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/signet-ca/signet/api"
)

const (
	handshakeTime = 5 * time.Second
	turnTime      = 2 * time.Second // until a volume is made: each takes milliseconds, and kubelet, sent away, comes back late
	graceTime     = 5 * time.Second // for calls under way when the agent ends
	maxStreams    = 256             // calls of one connection at once; kubelet makes one for each
	csiVersion    = "1.0.0"         // what kubelet asks for: any 1.x
)

func (d *Driver) nodeSocket() string {
	return filepath.Join(d.cfg.KubeletDir, "plugins", d.cfg.Name, "csi.sock")
}

func (d *Driver) registrySocket() string {
	return filepath.Join(d.cfg.KubeletDir, "plugins_registry", d.cfg.Name+"-reg.sock")
}

// serveKubelet serves one of the sockets for kubelet until ctx ends, and listens anew where the file is gone: kubelet's
// folders may be emptied under us.
func (d *Driver) serveKubelet(ctx context.Context, path string, l net.Listener, register func(*grpc.Server)) error {
	for {
		s := grpc.NewServer(
			grpc.MaxRecvMsgSize(d.cfg.MaxMessageBytes),
			grpc.MaxHeaderListSize(16<<10),
			grpc.MaxConcurrentStreams(maxStreams),
			grpc.ConnectionTimeout(handshakeTime),
			grpc.WaitForHandlers(true), // none begins to serve a socket once Run has ended
			grpc.UnaryInterceptor(d.intercept),
		)
		register(s)
		served := make(chan error, 1)
		d.serving.Go(func() { served <- s.Serve(l) })
		err := d.untilGone(ctx, path, served)
		force := time.AfterFunc(graceTime, s.Stop)
		s.GracefulStop()
		force.Stop()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		d.log.Warn("socket for kubelet was removed, listening anew", "path", path)
		if l, err = d.cfg.Listen(path); err != nil {
			return err
		}
	}
}

// untilGone waits until ctx ends, the server fails, or the file at path is another one.
func (d *Driver) untilGone(ctx context.Context, path string, served <-chan error) error {
	mine, err := os.Lstat(path)
	if err != nil {
		return nil
	}
	t := time.NewTicker(guardEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-served:
			return err
		case <-t.C:
			if now, err := os.Lstat(path); err != nil || !os.SameFile(mine, now) {
				return nil
			}
		}
	}
}

// Calls, as metrics name them.
const (
	callPublish   = "publish"
	callUnpublish = "unpublish"
	callOther     = "other"
)

func callName(method string) string {
	switch method {
	case csipb.Node_NodePublishVolume_FullMethodName:
		return callPublish
	case csipb.Node_NodeUnpublishVolume_FullMethodName:
		return callUnpublish
	}
	return callOther
}

// intercept is around every call: it counts, and makes of an error what kubelet shows in the pod's events.
func (d *Driver) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	d.mu.Lock()
	d.kubelet.last = time.Now()
	d.mu.Unlock()
	resp, err := handle(ctx, req)
	call := callName(info.FullMethod)
	if err == nil {
		d.metrics.calls.WithLabelValues(call).Inc()
		return resp, nil
	}
	if call == callOther {
		return nil, err
	}
	e := api.AsError(err)
	d.metrics.failures.WithLabelValues(call, string(e.Reason)).Inc()
	d.log.WarnContext(ctx, "call of kubelet failed", "call", call, "pod_uid", d.podOf(req), "reason", string(e.Reason), "error", err)
	return nil, forEvent(e).Err()
}

// podOf returns which pod a call is about; empty where it does not say so in due form.
func (d *Driver) podOf(req any) string {
	r, ok := req.(interface {
		GetVolumeId() string
		GetTargetPath() string
	})
	if !ok {
		return ""
	}
	t, err := d.parseTarget(r.GetVolumeId(), r.GetTargetPath())
	if err != nil {
		return ""
	}
	return t.podUID
}

// forEvent returns an error as kubelet shows it: what happened, its name in the manual, what to do. It is the same text each
// time, or each try would be an event of its own.
func forEvent(e *api.Error) *status.Status {
	told := *e
	told.Detail = fmt.Sprintf("%s (%s, %s). %s", e.Detail, e.Reason, e.Reason.Code(), advice(e.Reason))
	return api.ToStatus(&told)
}

// advice says what to do about a volume that failed. Where a reason's page speaks of other ways in, this one is meant.
func advice(r api.Reason) string {
	page := r.Page()
	switch {
	case r == api.VolumeFailed || r == api.VolumeRefused || r == api.VolumeTarget:
		return page.Do
	case r == api.SocketUnsafe:
		return "Look at the volume's folder on this node, and take away what does not belong there."
	case page.Kind == api.KindUnauthenticated:
		return "Install the CSIDriver object of this version as it is. If it is, compare the clocks, and look at kubelet's log on this node."
	case page.Kind == api.KindUnavailable, page.Kind == api.KindExhausted, page.Kind == api.KindConflict, page.Kind == api.KindDeadline, page.Kind == api.KindCanceled:
		return "Nothing: kubelet tries again by itself."
	}
	return page.Do
}

func (d *Driver) registerNode(s *grpc.Server) {
	csipb.RegisterIdentityServer(s, &identityServer{d: d})
	csipb.RegisterNodeServer(s, &nodeServer{d: d})
}

// identityServer is the CSI Identity service.
type identityServer struct {
	csipb.UnimplementedIdentityServer
	d *Driver
}

// GetPluginInfo implements csipb.IdentityServer.
func (s *identityServer) GetPluginInfo(context.Context, *csipb.GetPluginInfoRequest) (*csipb.GetPluginInfoResponse, error) {
	return &csipb.GetPluginInfoResponse{Name: s.d.cfg.Name, VendorVersion: s.d.cfg.Version}, nil
}

// GetPluginCapabilities implements csipb.IdentityServer: there is no controller and no topology.
func (s *identityServer) GetPluginCapabilities(context.Context, *csipb.GetPluginCapabilitiesRequest) (*csipb.GetPluginCapabilitiesResponse, error) {
	return &csipb.GetPluginCapabilitiesResponse{}, nil
}

// Probe implements csipb.IdentityServer. Whoever can ask is answered by a driver that is ready: its volumes are restored.
func (s *identityServer) Probe(context.Context, *csipb.ProbeRequest) (*csipb.ProbeResponse, error) {
	return &csipb.ProbeResponse{}, nil
}

// nodeServer is the CSI Node service.
type nodeServer struct {
	csipb.UnimplementedNodeServer
	d *Driver
}

// NodeGetInfo implements csipb.NodeServer. There is no bound for the scheduler: it does not count inline volumes.
func (s *nodeServer) NodeGetInfo(context.Context, *csipb.NodeGetInfoRequest) (*csipb.NodeGetInfoResponse, error) {
	return &csipb.NodeGetInfoResponse{NodeId: s.d.cfg.Node}, nil
}

// NodeGetCapabilities implements csipb.NodeServer: nothing is staged, grown, measured or given to a group.
func (s *nodeServer) NodeGetCapabilities(context.Context, *csipb.NodeGetCapabilitiesRequest) (*csipb.NodeGetCapabilitiesResponse, error) {
	return &csipb.NodeGetCapabilitiesResponse{}, nil
}

// NodePublishVolume implements csipb.NodeServer.
func (s *nodeServer) NodePublishVolume(ctx context.Context, req *csipb.NodePublishVolumeRequest) (*csipb.NodePublishVolumeResponse, error) {
	r, err := s.d.parsePublish(req)
	if err != nil {
		return nil, err
	}
	turn := time.NewTimer(turnTime)
	defer turn.Stop()
	select {
	case s.d.slots <- struct{}{}:
		defer func() { <-s.d.slots }()
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-turn.C:
		return nil, api.E(api.Overloaded, "%d volumes are being made at once already", cap(s.d.slots))
	}
	if err := s.d.publish(ctx, r); err != nil {
		return nil, err
	}
	return &csipb.NodePublishVolumeResponse{}, nil
}

// NodeUnpublishVolume implements csipb.NodeServer.
func (s *nodeServer) NodeUnpublishVolume(ctx context.Context, req *csipb.NodeUnpublishVolumeRequest) (*csipb.NodeUnpublishVolumeResponse, error) {
	t, err := s.d.parseTarget(req.GetVolumeId(), req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	if err := s.d.unpublish(ctx, req.GetVolumeId(), t); err != nil {
		return nil, err
	}
	return &csipb.NodeUnpublishVolumeResponse{}, nil
}

func (d *Driver) registerRegistration(s *grpc.Server) {
	registrationpb.RegisterRegistrationServer(s, &registration{d: d})
}

// registration is how kubelet learns of the driver: it finds this socket in its folder of plugins and asks.
type registration struct {
	registrationpb.UnimplementedRegistrationServer
	d *Driver
}

// GetInfo implements registrationpb.RegistrationServer.
func (r *registration) GetInfo(context.Context, *registrationpb.InfoRequest) (*registrationpb.PluginInfo, error) {
	return &registrationpb.PluginInfo{
		Type: registrationpb.CSIPlugin, Name: r.d.cfg.Name, Endpoint: r.d.nodeSocket(), SupportedVersions: []string{csiVersion},
	}, nil
}

// maxFailure bounds what is kept of kubelet's reason.
const maxFailure = 1 << 10

// NotifyRegistrationStatus implements registrationpb.RegistrationServer. After a refusal kubelet tries again by itself.
func (r *registration) NotifyRegistrationStatus(ctx context.Context, st *registrationpb.RegistrationStatus) (*registrationpb.RegistrationStatusResponse, error) {
	failure := st.GetError()[:min(len(st.GetError()), maxFailure)]
	r.d.mu.Lock()
	r.d.kubelet.since = time.Now()
	r.d.kubelet.registered, r.d.kubelet.failure = st.GetPluginRegistered(), failure
	r.d.mu.Unlock()
	if st.GetPluginRegistered() {
		r.d.metrics.registered.Set(1)
		r.d.log.InfoContext(ctx, "registered with kubelet", "name", r.d.cfg.Name)
	} else {
		r.d.metrics.registered.Set(0)
		r.d.log.ErrorContext(ctx, "kubelet has refused to register the volume plugin", "error", errors.New(failure))
	}
	return &registrationpb.RegistrationStatusResponse{}, nil
}
