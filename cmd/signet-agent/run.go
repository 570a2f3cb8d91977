package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/agent/csi"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/internal/daemon"
	"github.com/signet-ca/signet/internal/run"
	"github.com/signet-ca/signet/sds"
)

// serve wires the agent and runs it until ctx ends.
func serve(ctx context.Context, l *loaded, log *slog.Logger) error {
	cfg, err := agentConfig(l, log)
	if err != nil {
		return err
	}
	a, err := agent.New(cfg)
	if err != nil {
		return err
	}
	src := newSource(a, log)
	defer src.close()
	counted := []prometheus.Collector{a.Collector(), src.metrics}
	ready := []func() []string{a.NotReady}
	tasks := []run.Task{{Name: "agent", Run: a.Run}}
	if l.CSI != nil {
		p := newPods(src, l.Node, log)
		driver, err := csi.New(csiConfigOf(l, p, log))
		if err != nil {
			return err
		}
		counted = append(counted, p.metrics, driver.Collector())
		ready = append(ready, driver.NotReady)
		tasks = append(tasks, run.Task{Name: "volumes of pods", Run: driver.Run})
	}
	if l.SharedSocket != "" {
		listener, err := daemon.ListenUnix(l.SharedSocket, 0o666) // anybody may connect: who has no token gets nothing
		if err != nil {
			return err
		}
		defer listener.Close()
		limited := daemon.Limit(listener, daemon.SharedSocket(log))
		counted = append(counted, limited)
		tasks = append(tasks, serveSDS(src, limited, log))
	}
	notReady := func() (missing []string) {
		for _, f := range ready {
			missing = append(missing, f()...)
		}
		return missing
	}
	tasks = append(tasks, daemon.HTTP{Address: l.HTTP, NotReady: notReady, Collectors: counted, Log: log}.Task())
	log.InfoContext(ctx, "starting", "version", version, "trust_domain", l.td.Name(), "ca", l.CA.Address, "development", l.Development)
	err = run.All(ctx, tasks...)
	log.InfoContext(context.WithoutCancel(ctx), "stopped", "error", err)
	return err
}

// csiConfigOf returns the configuration of the volume plugin. Its sockets for kubelet are for kubelet's user alone.
func csiConfigOf(l *loaded, p *pods, log *slog.Logger) csi.Config {
	cfg := csi.Config{
		Name: l.CSI.Driver, Node: l.Node, Version: version, KubeletDir: l.CSI.KubeletDir, Audience: api.WorkloadAudience(l.td),
		Identities: p,
		Listen:     func(path string) (net.Listener, error) { return daemon.ListenUnix(path, 0o600) },
		Bind: func(path string) (*net.UnixListener, error) {
			return net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		},
		Log: log,
	}
	if l.Cache.Dir != "" {
		cfg.StateDir = filepath.Join(l.Cache.Dir, "volumes") // beside what the cache holds, on the same tmpfs
	}
	return cfg
}

// serveSDS serves SDS on the shared socket. Proxies are told apart before their tokens are believed: by the process, where
// the kernel says it.
func serveSDS(src *source, l net.Listener, log *slog.Logger) run.Task {
	secrets := sds.New(sds.Config{Source: src, Log: log, Hooks: src.metrics.hooks(), Peer: daemon.PeerOf})
	server := grpc.NewServer(append(sds.ServerOptions(), grpc.Creds(daemon.Plain()))...)
	secrets.Register(server)
	serve := daemon.Serve("sds", server, l, log)
	return run.Task{Name: serve.Name, Run: func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, secrets.Close)
		defer stop()
		defer src.close()
		return serve.Run(ctx)
	}}
}

func agentConfig(l *loaded, log *slog.Logger) (agent.Config, error) {
	cfg := agent.Config{
		TrustDomain: l.td,
		Dial: func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", l.CA.Address)
		},
		Prover:   attestor.TokenFile{Path: l.TokenFile},
		Verifier: attestor.ByKeySets,
		Version:  version,
		Log:      log,
	}
	if l.Cache.Dir != "" {
		cache, warning, err := agent.OpenDirCache(l.Cache.Dir, l.Development)
		if err != nil {
			return cfg, err
		}
		if warning != nil {
			log.Warn("the cache is fit for development only", "error", warning)
		}
		cfg.Cache = cache
	}
	cfg.Published = func() (*agent.Trust, error) {
		data, err := readBundle(l.CA.BundleFile)
		if err != nil {
			return nil, err
		}
		return agent.ParseTrust(l.td, data)
	}
	data, err := readBundle(l.CA.BundleFile)
	if err != nil {
		if cfg.Cache == nil {
			return cfg, api.Wrap(api.ConfigInvalid, err, fmt.Sprintf("ca.bundleFile cannot be read: %v", err))
		}
		log.Warn("the bundle file cannot be read; the cache may hold a bundle", "error", err)
		return cfg, nil
	}
	if cfg.Trust, err = agent.ParseTrust(l.td, data); err != nil {
		return cfg, api.Wrap(api.ConfigInvalid, err, fmt.Sprintf("ca.bundleFile does not hold a trust bundle of %s: %v", l.td, err))
	}
	return cfg, nil
}

// maxBundle bounds the published bundle before it is parsed.
const maxBundle = 1 << 20

func readBundle(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBundle+1))
	if err == nil && len(data) > maxBundle {
		err = errors.New("it is larger than 1 MiB")
	}
	return data, err
}
