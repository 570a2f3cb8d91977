// Package csi gives each pod a socket of its own: a CSI node plugin whose volume is a folder with a socket in it.
//
// kubelet asks for the volume, says which pod it is for and brings the pod's token. The plugin makes the folder and listens
// in it; nothing is mounted. So who speaks on a socket is known from which socket it is, and what serves it needs no
// privilege beyond kubelet's folder of pods.
//
// Whoever owns that folder owns the node, which is why the package has this shape: it parses nothing that a workload sends
// (what serves a socket is handed in), it believes no token (Identities does), and below kubelet's folder it goes from one
// open folder to the next, never along a link or onto another mount, so that no name can lead it elsewhere. What it did not
// make it does not remove.
package csi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/run"
)

const (
	// DefaultName is the name of the driver, and of the CSIDriver object.
	DefaultName = "csi.signet.dev"
	// DefaultKubeletDir is where kubelet has its folders unless it is told otherwise.
	DefaultKubeletDir = "/var/lib/kubelet"
	// SocketName is the name of the socket in a pod's volume.
	SocketName = "agent.sock"
)

// Modes of what a pod sees. Its processes have any user, so all may enter the folder and connect; the pod's volume is
// read-only, so none can replace the socket. On the node itself kubelet's folders above (0750) keep all but root away.
const (
	folderMode = 0o755
	socketMode = 0o666
)

// TokenPlace is where in kubelet's call the pod's token comes. Both places can be written by the pod's author where kubelet
// does not write itself, so exactly one is read and a token in the other is refused.
type TokenPlace int

const (
	// InSecrets goes with serviceAccountTokenInSecrets: true in the CSIDriver object (Kubernetes 1.35 and later).
	InSecrets TokenPlace = iota
	// InVolumeContext goes with a CSIDriver object without it; there a token can reach the logs of others.
	InVolumeContext
)

// Config is what a Driver is made of. Fields without a default are required.
type Config struct {
	Name       string // of the driver. Zero: DefaultName
	Node       string // name of the node, told to kubelet
	Version    string // of the build, told to kubelet. Zero: "devel"
	KubeletDir string // kubelet's --root-dir, at the same path for kubelet and for this process. Zero: DefaultKubeletDir
	Audience   string // api.WorkloadAudience
	TokenIn    TokenPlace

	// StateDir is where volumes and their tokens are remembered for the next start: made where it is missing, 0700. It must
	// be on a tmpfs, which the caller sees to. Empty: after a restart sockets come back only when kubelet asks again.
	StateDir string

	Identities Identities

	// Listen listens on a socket for kubelet at a path; it lets nobody but root connect. Closing removes the socket.
	Listen func(path string) (net.Listener, error)
	// Bind listens on a pod's socket at a path that is not there yet.
	Bind func(path string) (*net.UnixListener, error)

	MaxVolumes      int // of the node. Zero: 1024
	MaxPublishes    int // at once; more wait for two seconds and are told to come back. Zero: 16
	MaxMessageBytes int // of one call from kubelet. Zero: 256 KiB

	Log     *slog.Logger // nil: discarded
	Metrics *Metrics     // nil: NewMetrics
}

// A Pod is whose a volume is, in kubelet's words.
type Pod struct {
	UID            string // 1 to 64 letters, digits and hyphens
	Namespace      string // DNS label
	Name           string // DNS subdomain
	ServiceAccount string // DNS subdomain
}

// A Volume is one pod's place for its socket. Its fields are well formed, and not yet proven by anything.
type Volume struct {
	ID   string // "csi-" and 64 hex digits; the same as long as the pod lives
	Name string // in the pod's specification; DNS label
	Pod  Pod
}

// Identities knows whose a token is. Its methods never wait for the CA or for key sets: where a token cannot be checked
// yet, its claims are compared all the same, and it is believed only once it was checked. They are called from several
// goroutines, for one volume at a time.
type Identities interface {
	// Offer takes over a new volume with its token and starts to fetch the identity. It refuses, with an *api.Error, a token
	// that is not this very pod's: UID, name, namespace and ServiceAccount of its claims are those of the volume, and the
	// node is this one.
	Offer(ctx context.Context, v Volume, token []byte) (Workload, error)
	// Restore is Offer for a volume that was taken over before a restart. That the token has expired since is no reason to
	// refuse: what is held for the pod is served, and kubelet brings a fresh token within two minutes.
	Restore(ctx context.Context, v Volume, token []byte) (Workload, error)
}

// A Workload is the pod behind one volume's socket.
type Workload interface {
	// Offer hands over the next token, as Identities.Offer does.
	Offer(ctx context.Context, token []byte) error
	// Serve serves the pod on its socket until ctx ends; then it ends its streams, within seconds, and returns. It closes l.
	// The cause of ctx is ErrUnpublished where the volume is gone, and not only the agent ends. It is called again a second
	// after it has returned before its time.
	Serve(ctx context.Context, l net.Listener) error
	// Close lets go of it: the volume is gone. It is not called when only the agent ends.
	Close()
}

// ErrUnpublished is why a socket is served no more whose volume is gone: its pod is.
var ErrUnpublished = errors.New("the volume is gone")

// Driver is the plugin. It is made by New and works while Run does.
type Driver struct {
	cfg     Config
	log     *slog.Logger
	metrics *Metrics
	pods    pods
	slots   chan struct{}     // one for each Publish under way
	step    func(name string) // told of each step as it was done; a test ends the process there

	mu        sync.Mutex // guards what follows
	running   context.Context
	volumes   map[target]*volume // all that are published
	byID      map[string]target  // where the volume of that id is
	busy      map[target]*holder // under work; see acquire
	leftovers map[target]time.Time
	kubelet   contact
	serving   sync.WaitGroup // one for each volume
}

// contact is when kubelet was heard of.
type contact struct {
	since      time.Time // it registered us
	last       time.Time // it called
	registered bool
	failure    string // why it did not register us
}

// New returns a Driver. The error has the reason ConfigInvalid; FileUnsafe where StateDir is open to others; SocketUnsafe
// where the system cannot open folders without following links (Linux 5.6 can).
func New(cfg Config) (*Driver, error) {
	cfg.Name = cmp.Or(cfg.Name, DefaultName)
	cfg.Version = cmp.Or(cfg.Version, "devel")
	cfg.KubeletDir = cmp.Or(cfg.KubeletDir, DefaultKubeletDir)
	cfg.MaxVolumes = cmp.Or(cfg.MaxVolumes, 1024)
	cfg.MaxPublishes = cmp.Or(cfg.MaxPublishes, 16)
	cfg.MaxMessageBytes = cmp.Or(cfg.MaxMessageBytes, 256<<10)
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics()
	}
	switch {
	case cfg.Node == "" || cfg.Audience == "":
		return nil, api.E(api.ConfigInvalid, "the volume plugin needs the name of the node and the audience of tokens")
	case cfg.Identities == nil || cfg.Listen == nil || cfg.Bind == nil:
		return nil, api.E(api.ConfigInvalid, "the volume plugin needs identities and ways to listen")
	case len(cfg.Name) > 63 || !api.IsSubdomain(cfg.Name):
		return nil, api.E(api.ConfigInvalid, "the name of the volume plugin is not a DNS name of at most 63 bytes")
	case !filepath.IsAbs(cfg.KubeletDir) || filepath.Clean(cfg.KubeletDir) != cfg.KubeletDir || cfg.KubeletDir == "/":
		return nil, api.E(api.ConfigInvalid, "kubelet's folder must be an absolute path as kubelet writes it, and not /")
	case cfg.TokenIn != InSecrets && cfg.TokenIn != InVolumeContext:
		return nil, api.E(api.ConfigInvalid, "tokens come in secrets or in the volume context")
	}
	if err := checkSystem(); err != nil {
		return nil, err
	}
	if cfg.StateDir != "" {
		err := durable.MkdirPrivate(cfg.StateDir)
		if err == nil {
			err = durable.RemoveTemporary(cfg.StateDir)
		}
		if err != nil {
			return nil, api.Wrap(api.FileUnsafe, err, fmt.Sprintf("the folder of remembered volumes: %v", err))
		}
	}
	return &Driver{
		cfg: cfg, log: cfg.Log, metrics: cfg.Metrics,
		pods:    pods{filepath.Join(cfg.KubeletDir, "pods")},
		slots:   make(chan struct{}, cfg.MaxPublishes),
		step:    func(string) {},
		volumes: map[target]*volume{}, byID: map[string]target{}, busy: map[target]*holder{}, leftovers: map[target]time.Time{},
	}, nil
}

// How often the sockets are looked at, and what pods have left behind.
const (
	guardEvery = time.Second
	sweepEvery = time.Minute
)

// Run listens again on the sockets of all volumes that are remembered, then answers kubelet, and keeps the sockets in place
// until ctx ends. Folders and sockets stay then, for the next Run to take over. It is called once.
func (d *Driver) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	d.mu.Lock()
	d.running = ctx
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.running = nil
		d.mu.Unlock()
		cancel()
		d.serving.Wait()
	}()
	d.restore(ctx)
	d.sweep(time.Now())
	node, err := d.cfg.Listen(d.nodeSocket())
	if err != nil {
		return err
	}
	registry, err := d.cfg.Listen(d.registrySocket()) // last: kubelet calls from here on
	if err != nil {
		node.Close()
		return err
	}
	return run.All(ctx,
		run.Task{Name: "volumes", Run: func(ctx context.Context) error {
			return d.serveKubelet(ctx, d.nodeSocket(), node, d.registerNode)
		}},
		run.Task{Name: "registration with kubelet", Run: func(ctx context.Context) error {
			return d.serveKubelet(ctx, d.registrySocket(), registry, d.registerRegistration)
		}},
		run.Task{Name: "sockets of pods", Run: d.keep},
	)
}

// keep looks after the sockets, and after what pods left behind.
func (d *Driver) keep(ctx context.Context) error {
	guard, sweep := time.NewTicker(guardEvery), time.NewTicker(sweepEvery)
	defer guard.Stop()
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-guard.C:
			for _, t := range d.targets() {
				d.tend(t)
			}
		case <-sweep.C:
			d.sweep(time.Now())
		}
	}
}

// NotReady names what is missing before pods can get their volumes; empty when nothing is.
func (d *Driver) NotReady() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.kubelet.registered:
		return nil
	case d.kubelet.failure != "":
		return []string{"kubelet has refused to register the volume plugin: " + d.kubelet.failure}
	}
	return []string{"kubelet has not registered the volume plugin"}
}

// targets returns where the volumes are.
func (d *Driver) targets() []target {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]target, 0, len(d.volumes))
	for t := range d.volumes {
		all = append(all, t)
	}
	return all
}

// holder is who has acquired a target.
type holder struct {
	call bool          // of kubelet; or else our own upkeep, which is soon done
	done chan struct{} // closed when it is released
}

// acquire reserves a target for a call of kubelet. While another call has it, the caller is told to come back (CSI
// specification, ABORTED: an operation is pending); our own upkeep is waited for, as kubelet shows every error to people.
// While it is held, nobody else changes the volume there.
func (d *Driver) acquire(ctx context.Context, t target) (release func(), err error) {
	for {
		release, other, err := d.tryAcquire(t, true)
		switch {
		case err != nil || other == nil:
			return release, err
		case other.call:
			return nil, api.E(api.StateConflict, "an earlier call for this volume has not ended")
		}
		select {
		case <-other.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// tryAcquire reserves a target, or says who has it. The error is that the end has come.
func (d *Driver) tryAcquire(t target, call bool) (release func(), other *holder, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.running == nil || d.running.Err() != nil {
		return nil, nil, api.E(api.AgentStopping, "the agent is stopping")
	}
	if other := d.busy[t]; other != nil {
		return nil, other, nil
	}
	h := &holder{call, make(chan struct{})}
	d.busy[t] = h
	return func() {
		d.mu.Lock()
		delete(d.busy, t)
		d.mu.Unlock()
		close(h.done)
	}, nil, nil
}

// upkeep reserves a target for what nobody asked for; ok is false where it can wait.
func (d *Driver) upkeep(t target) (release func(), ok bool) {
	release, other, err := d.tryAcquire(t, false)
	return release, other == nil && err == nil
}
