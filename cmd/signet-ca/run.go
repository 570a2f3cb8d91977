package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/cluster"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/ca/upstream"
	"github.com/signet-ca/signet/internal/audit"
	"github.com/signet-ca/signet/internal/daemon"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/internal/run"
)

// serve wires the CA and runs it until ctx ends. Everything that was opened is closed in reverse order.
func serve(ctx context.Context, l *loaded, log *slog.Logger) (err error) {
	kept := spare()
	defer runtime.KeepAlive(kept)
	s, closeStore, err := store.Open(ctx, l.Store, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeStore()) }()
	sealer, err := readSealer(l.Seal)
	if err != nil {
		return err
	}
	up, err := upstream.Open(l.Upstream, upstream.Parts{Sealer: sealer, DNSNames: l.policy.DNSNames(), Longest: l.longest()})
	if err != nil {
		return err
	}
	ledger, err := openLedger(ctx, l.Ledger, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ledger.Close()) }()
	reviews, err := openReviewers(l, log)
	if err != nil {
		return err
	}
	verifier, sources, err := attestors(l, log, reviews)
	if err != nil {
		return err
	}
	metrics := cluster.NewMetrics()
	clusters, err := openClusters(l, log, metrics)
	if err != nil {
		return err
	}
	publish, err := openPublisher(l, log, metrics)
	if err != nil {
		return err
	}
	guard := &rollbackGuard{td: l.td, store: s, from: publish, log: log}
	if err := guard.check(ctx); err != nil {
		return err
	}
	watched := kubeParts{reviews, clusters, publish, metrics, guard}
	authority, err := newCA(l, log, s, up, sealer, ledger, verifier, sources, watched)
	if err != nil {
		return err
	}
	return listen(ctx, l, log, authority, ledger, sources, watched)
}

func newCA(l *loaded, log *slog.Logger, s ca.Store, up ca.Upstream, sealer *ca.Sealer, ledger *audit.Log, verifier attestor.Attestor,
	sources map[string]*attestor.KeySource, watched kubeParts) (*ca.CA, error) {
	cfg := ca.Config{
		TrustDomain: l.td,
		Replica:     l.Replica,
		Version:     version,
		Store:       s,
		Upstream:    up,
		Ledger:      ledger,
		Archive:     ledger,
		Policy:      l.policy,
		Attestors:   map[string]attestor.Attestor{api.EvidenceServiceAccount: verifier},
		KeySets:     map[string]ca.KeySets{},
		Agents:      ca.AgentRule{Namespace: l.Agents.Namespace, ServiceAccount: l.Agents.ServiceAccount},
		AgentTTL:    l.Agents.TTL,
		Keys:        issuance.KeyKind(l.Key),
		MintBudget:  l.MintBudget,
		Sealer:      sealer,
		Grace:       l.Directory.Grace,
		SessionAge:  l.SessionAge,
		Operators:   l.operators(verifier, log),
		NotReady:    watched.notReady,
		Log:         log,
		Metrics:     ca.NewMetrics(),
	}
	cfg.ManualRotation = l.ManualRotation
	cfg.UpstreamKind = cmp.Or(l.Upstream.Kind, "selfsigned")
	cfg.Backup = func(ctx context.Context) (*ca.Backup, error) {
		held, err := store.Snap(ctx, s)
		if err != nil {
			return nil, err
		}
		return sealBackup(held, l.td, sealer)
	}
	for issuer, source := range sources {
		cfg.KeySets[issuer] = source
	}
	for _, is := range l.Issuers {
		cfg.Asking += max(1, cmp.Or(is.TokenReview.MaxInFlight, attestor.DefaultReviewInFlight)/2)
	}
	cfg.Publisher = watched.publish.Publisher
	switch l.Directory.Kind {
	case "file":
		cfg.Directory = cluster.NewFileDirectory(l.Directory.Path)
	case "kube":
		cfg.Directory = watched.clusters
	}
	return ca.New(cfg)
}

// listen opens the ports and runs all tasks: the agents' port, the admin socket, the operators' port, health and metrics.
func listen(ctx context.Context, l *loaded, log *slog.Logger, authority *ca.CA, ledger *audit.Log, sources map[string]*attestor.KeySource, watched kubeParts) error {
	agents, err := net.Listen("tcp", l.Listen)
	if err != nil {
		return err
	}
	defer agents.Close()
	admin, err := daemon.ListenUnix(l.AdminSocket, 0o600)
	if err != nil {
		return err
	}
	defer admin.Close()
	limited := daemon.Limit(agents, daemon.Limits{
		Port: "agents", Strangers: l.Connections.Strangers, PerPeer: l.Connections.PerAddress, Rate: l.Connections.PerSecond,
		Members: l.Connections.Agents, Log: log,
	})
	people, peopleTasks, err := operatorsPort(l, log, authority)
	if err != nil {
		return err
	}
	collectors := []prometheus.Collector{authority.Metrics(), ledger, limited, watched.metrics}
	if people != nil {
		defer people.Close()
		collectors = append(collectors, people)
	}
	server := authority.NewServer()
	healthServer := health.NewServer()
	grpc_health_v1.RegisterHealthServer(authority.Guard(server), healthServer)
	tasks := []run.Task{
		{Name: "ca", Run: authority.Run},
		{Name: "health", Run: func(ctx context.Context) error { return keepHealth(ctx, healthServer, authority.NotReady) }},
		daemon.Serve("grpc", server, limited, log),
		daemon.Serve("admin", authority.NewAdminServer(grpc.Creds(daemon.LocalUsers())), admin, log),
		daemon.HTTP{Address: l.HTTP, NotReady: authority.NotReady, Collectors: collectors, Log: log}.Task(),
	}
	tasks = slices.Concat(tasks, peopleTasks, watched.tasks())
	for issuer, source := range sources {
		tasks = append(tasks, run.Task{Name: "key set of " + issuer, Run: source.Run})
	}
	log.InfoContext(ctx, "starting", "version", version, "trust_domain", l.td.Name(), "replica", l.Replica, "development", l.Development)
	err = run.All(ctx, tasks...)
	log.InfoContext(context.WithoutCancel(ctx), "stopped", "error", err)
	return err
}

// keepHealth brings gRPC health in line with readiness, which has too many causes to be told by each.
func keepHealth(ctx context.Context, h *health.Server, notReady func() []string) error {
	for {
		status := grpc_health_v1.HealthCheckResponse_NOT_SERVING
		if len(notReady()) == 0 {
			status = grpc_health_v1.HealthCheckResponse_SERVING
		}
		h.SetServingStatus("", status)
		select {
		case <-ctx.Done():
			h.Shutdown()
			return nil
		case <-time.After(time.Second):
		}
	}
}

// attestors returns the one attestor of all issuers, and the key sets that it checks by.
func attestors(l *loaded, log *slog.Logger, reviews reviewers) (attestor.Attestor, map[string]*attestor.KeySource, error) {
	sources, keys := map[string]*attestor.KeySource{}, map[string]attestor.Keys{}
	for _, is := range l.Issuers {
		cfg := attestor.KeySourceConfig{
			Issuer: is.Issuer, File: is.JWKS.File, URL: is.JWKS.URL, CAFile: is.JWKS.CAFile, TokenFile: is.JWKS.TokenFile,
			Refresh: is.JWKS.Refresh, Persist: is.JWKS.Persist, AllowHTTP: l.Development, Log: log,
		}
		if cfg.Persist != "" {
			cfg.WriteFile = func(path string, data []byte) error { return durable.WriteFile(path, data, 0o600) }
		}
		source, err := attestor.NewKeySource(cfg)
		if err != nil {
			return nil, nil, err
		}
		sources[is.Issuer], keys[is.Issuer] = source, source
	}
	verifier, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: keys, Reviews: reviews.configs(l.Issuers)})
	return verifier, sources, err
}

// maxSealKey bounds what is read as a seal key, so that one in another encoding is told from one without end.
const maxSealKey = 4 << 10

// readSealer reads the seal key; SealKeyMissing where there is none, FileUnsafe where others could read it.
func readSealer(c sealConfig) (*ca.Sealer, error) {
	key, err := durable.Reading{FollowLinks: c.MountedSecret, GroupRead: c.MountedSecret}.ReadPrivate(c.KeyFile, maxSealKey)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, api.E(api.SealKeyMissing, "there is no seal key at %s", c.KeyFile)
	case errors.Is(err, durable.ErrUnsafe):
		return nil, api.Wrap(api.FileUnsafe, err, fmt.Sprintf("the seal key: %v", err))
	case err != nil:
		return nil, err
	}
	return ca.NewSealer(key)
}
