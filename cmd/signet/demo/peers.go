package demo

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/envoy"
)

// cachedEnvoy is where the source tree keeps an Envoy for its tests, beside the folder of the binaries or in the working
// directory.
const cachedEnvoy = ".cache/envoy/1.40.0/envoy"

// peers are the two workloads, whatever they are made of: checkout takes plain HTTP and sends it by mutual TLS to
// payments, which hands it to the backend.
type peers struct {
	front     netip.AddrPort           // checkout, plain HTTP
	door      netip.AddrPort           // payments, mutual TLS
	protocol  map[string]string        // of the SDS streams, by workload
	firstSVID map[string]time.Duration // from start to certificate, by workload

	refusals   func(context.Context) (refusals, error)
	handshakes func(context.Context) (done, resumed uint64, err error)
	stop       func() // returns when nothing of them is left
}

// refusals is how often payments has refused a connection, and why.
type refusals struct {
	stranger uint64 // a valid SVID of somebody who has no business there
	nobody   uint64 // no certificate at all
}

// startPeers starts the backend and both workloads, and returns when both have their certificates.
func (d *demo) startPeers(ctx context.Context) error {
	l, addr, err := listen()
	if err != nil {
		return err
	}
	if err := d.serve("backend", l, http.HandlerFunc(backend)); err != nil {
		return err
	}
	if d.envoy == "" {
		return d.startGo(ctx, addr)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 2*startTimeout, fmt.Errorf("no certificate after %s", 2*startTimeout))
	defer cancel()
	return d.startEnvoys(ctx, d.envoy, addr)
}

// findEnvoy returns the path of an Envoy that runs, and "" after having said so where there is none. One that was asked
// for must run. It sets report.Peers.
func (d *demo) findEnvoy(ctx context.Context) (path string, err error) {
	d.report.Peers = "Go"
	if d.cfg.NoEnvoy {
		return "", nil
	}
	wanted := d.cfg.Envoy
	if wanted == "" {
		wanted = os.Getenv(EnvoyEnv)
	}
	candidates := []string{cachedEnvoy}
	if self, err := os.Executable(); err == nil {
		candidates = append(candidates, filepath.Join(filepath.Dir(self), "..", cachedEnvoy))
	}
	path, err = envoy.Find(wanted, candidates...)
	if err == nil {
		var version string
		if version, err = envoy.Version(ctx, path); err == nil {
			d.report.Peers = "Envoy " + version
			return path, nil
		}
	}
	switch {
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case wanted != "":
		return "", api.E(api.ProgramMissing, "the Envoy that was asked for does not run: %v; --no-envoy shows it with Go programs", err)
	case errors.Is(err, exec.ErrNotFound):
		d.say("envoy", "not found (--envoy PATH or $%s names one): Go programs take its place", EnvoyEnv)
	default:
		d.say("envoy", "does not run (%v): Go programs take its place", err)
	}
	return "", nil
}

// startEnvoys starts one Envoy for each workload: payments over the incremental SDS protocol, checkout over that of the
// state of the world.
func (d *demo) startEnvoys(ctx context.Context, path string, backend netip.AddrPort) error {
	ids := d.ids()
	sds := func(workload string, delta bool) envoy.SDS {
		return envoy.SDS{Socket: d.dir.agentSocket(), TokenFile: d.dir.tokenFile(workload), Delta: delta}
	}
	var running []*envoy.Envoy
	d.peers = &peers{
		protocol:  map[string]string{checkout: "SDS (state of the world)", payments: "SDS (delta)"},
		firstSVID: map[string]time.Duration{},
		stop: func() {
			for _, e := range running {
				e.Kill()
			}
		},
	}
	run := func(p envoy.Proxy, listener string) (*envoy.Envoy, netip.AddrPort, error) {
		log, err := d.dir.log("envoy-" + p.Name)
		if err != nil {
			return nil, netip.AddrPort{}, err
		}
		d.logs = append(d.logs, log)
		e, err := envoy.Config{Binary: path, Dir: d.dir.path, Proxy: p, Log: log}.Run(ctx)
		if err != nil {
			return nil, netip.AddrPort{}, err
		}
		running = append(running, e)
		d.mourn(e)
		addr, err := e.Listener(ctx, listener)
		return e, addr, err
	}
	in, door, err := run(envoy.Proxy{Name: payments, SDS: sds(payments, true), Inbound: &envoy.Inbound{
		Peers: []spiffeid.ID{ids[checkout]}, Backend: backend, RequestHeaders: map[string]string{headerCallerCert: "%DOWNSTREAM_PEER_CERT%"},
	}}, envoy.ListenerInbound)
	if err != nil {
		return err
	}
	out, front, err := run(envoy.Proxy{Name: checkout, SDS: sds(checkout, false), Outbound: &envoy.Outbound{
		Peers: []spiffeid.ID{ids[payments]}, Upstream: door, ConnectionPerRequest: true,
		ResponseHeaders: map[string]string{headerUpstreamID: "%UPSTREAM_PEER_URI_SAN%", headerUpstreamCert: "%UPSTREAM_PEER_CERT%"},
	}}, envoy.ListenerOutbound)
	if err != nil {
		return err
	}
	for _, e := range []*envoy.Envoy{in, out} {
		live, err := e.Live(ctx)
		if err != nil {
			return err
		}
		d.peers.firstSVID[e.Name()] = live.Sub(e.Started)
		d.say(e.Name(), "%s has certificate and bundle by %s %d ms after its start (process %d)",
			d.report.Peers, d.peers.protocol[e.Name()], live.Sub(e.Started).Milliseconds(), e.Pid())
	}
	d.peers.front, d.peers.door = front, door
	d.peers.refusals = func(ctx context.Context) (refusals, error) { return envoyRefusals(ctx, in) }
	d.peers.handshakes = func(ctx context.Context) (done, resumed uint64, err error) { return envoyHandshakes(ctx, in) }
	return nil
}

// envoyRefusals reads what the Envoy of payments has counted.
func envoyRefusals(ctx context.Context, in *envoy.Envoy) (r refusals, err error) {
	var errs [2]error
	r.stranger, errs[0] = in.Counter(ctx, "listener.inbound.ssl.fail_verify_san")
	r.nobody, errs[1] = in.Counter(ctx, "listener.inbound.ssl.fail_verify_no_cert")
	return r, errors.Join(errs[:]...)
}

// envoyHandshakes reads what the Envoy of payments has counted.
func envoyHandshakes(ctx context.Context, in *envoy.Envoy) (done, resumed uint64, err error) {
	var errs [2]error
	done, errs[0] = in.Counter(ctx, "listener.inbound.ssl.handshake")
	resumed, errs[1] = in.Counter(ctx, "listener.inbound.ssl.session_reused")
	return done, resumed, errors.Join(errs[:]...)
}

// mourn ends the demo when an Envoy ends by itself.
func (d *demo) mourn(e *envoy.Envoy) {
	d.wg.Go(func() {
		<-e.Done() // at the latest when the peers are stopped; the demo is over then, and this cause is not the first
		d.cancel(fmt.Errorf("%s: %w", e.Name(), errors.Join(e.Err(), errors.New("it ended by itself"))))
	})
}
