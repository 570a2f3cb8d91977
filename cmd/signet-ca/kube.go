package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/cluster"
	"github.com/signet-ca/signet/internal/kube"
	"github.com/signet-ca/signet/internal/run"
)

// kubeTimeout is for one request to an API server, other than a list or a watch.
const kubeTimeout = 5 * time.Second

// watchConfig says how the API server of an issuer is reached, for a directory of kind kube.
type watchConfig struct {
	// A kubeconfig file of that cluster, or "in-cluster", as for tokenReview. What it needs is to get, list and watch pods,
	// serviceaccounts and nodes, and to get the agents' DaemonSet. Required for a directory of kind kube.
	Kubeconfig string `yaml:"kubeconfig"`
	// The context of the kubeconfig. Default: its current one.
	Context string `yaml:"context"`
	// A file that keeps over restarts what was last seen of the cluster, for renewals while the API server is away; without it
	// a CA that is started anew meanwhile renews nothing. Default: none.
	Persist string `yaml:"persist"`
}

// publishKubeConfig says in which cluster's ConfigMap the bundle is shown.
type publishKubeConfig struct {
	// A kubeconfig file, or "in-cluster". What it needs is to get, list, watch and update the ConfigMap signet-bundle, and to
	// create configmaps. Default: none.
	Kubeconfig string `yaml:"kubeconfig"`
	// The context of the kubeconfig. Default: its current one.
	Context string `yaml:"context"`
	// The namespace of the ConfigMap: that of the agents, who read it there. Default: agents.namespace.
	Namespace string `yaml:"namespace"`
	// A copy of the ConfigMap in each namespace with the label signet.dev/bundle: "true". What it needs is in docs/cluster.md.
	// Default: false.
	Copies bool `yaml:"copies"`
	// The ClusterTrustBundle signet.dev:bundle:TRUST-DOMAIN, from Kubernetes 1.37 on; where there are none it is done without.
	// What it needs is in docs/cluster.md. Default: false.
	ClusterTrustBundle bool `yaml:"clusterTrustBundle"`
}

// checkKube says what is wrong with how clusters are watched and where the bundle is shown.
func (c *config) checkKube(bad func(string, ...any)) {
	for i, is := range c.Issuers {
		if w := is.Watch; c.Directory.Kind == "kube" && w.Kubeconfig == "" {
			bad("issuers[%d].watch.kubeconfig is required for a directory of kind kube", i)
		} else if c.Directory.Kind != "kube" && w != (watchConfig{}) {
			bad("issuers[%d].watch is for a directory of kind kube", i)
		}
	}
	if g := c.Directory.Grace; g < 0 || g > ca.MaxGrace {
		bad("directory.grace of %s is not between 0s and %s", g, ca.MaxGrace)
	}
	if s := c.Directory.StaleAfter; s != 0 && (s < cluster.MinStale || s > cluster.MaxStale) {
		bad("directory.staleAfter of %s is not between %s and %s", s, cluster.MinStale, cluster.MaxStale)
	}
	switch p := c.Publish; {
	case p.Kube.Kubeconfig == "" && p.Kube != (publishKubeConfig{}):
		bad("publish.kube has no kubeconfig, so nothing would be published")
	case p.Kube.Kubeconfig != "" && p.Dir != "":
		bad("publish has both dir and kube: one place is believed")
	}
	if c.Publish.Kube.ClusterTrustBundle && !cluster.TrustBundleNamed(c.TrustDomain) {
		bad("publish.kube.clusterTrustBundle: the trust domain %.80q cannot be in the name of one, which is letters, digits, dots and dashes", c.TrustDomain)
	}
}

// openKube makes a client, and speaks to nobody.
func openKube(kubeconfig, context, field string) (*kube.Client, error) {
	client, err := kube.Open(kube.Config{Kubeconfig: kubeconfig, Context: context, UserAgent: "signet-ca/" + version, Timeout: kubeTimeout})
	if err != nil {
		return nil, api.Wrap(api.ConfigInvalid, err, fmt.Sprintf("%s: %v", field, err))
	}
	return client, nil
}

// openClusters makes a directory for each issuer, if that is its kind, and speaks to none.
func openClusters(l *loaded, log *slog.Logger, m *cluster.Metrics) (cluster.Clusters, error) {
	if l.Directory.Kind != "kube" {
		return nil, nil
	}
	all := cluster.Clusters{}
	for i, is := range l.Issuers {
		client, err := openKube(is.Watch.Kubeconfig, is.Watch.Context, fmt.Sprintf("issuers[%d].watch", i))
		if err != nil {
			return nil, err
		}
		d, err := cluster.NewKubeDirectory(cluster.KubeConfig{
			Issuer: is.Issuer, Client: client, Stale: l.Directory.StaleAfter, Persist: is.Watch.Persist, Log: log, Metrics: m,
			Agents: cluster.DaemonSet{Namespace: l.Agents.Namespace, Name: l.Agents.DaemonSet},
		})
		if err != nil {
			return nil, err
		}
		all[is.Issuer] = d
	}
	return all, nil
}

// publisher is where the bundle is shown.
type publisher struct {
	ca.Publisher        // nil: nowhere
	where        string // for people
	kube         *cluster.KubePublisher
	client       *kube.Client
	forbidden    atomic.Pointer[string] // the permission that is missing; nil: none that is known of
}

func openPublisher(l *loaded, log *slog.Logger, m *cluster.Metrics) (*publisher, error) {
	c := l.Publish
	switch {
	case c.Dir != "":
		return &publisher{Publisher: cluster.NewFilePublisher(c.Dir, log, m), where: c.Dir}, nil
	case c.Kube.Kubeconfig == "":
		return &publisher{}, nil
	}
	client, err := openKube(c.Kube.Kubeconfig, c.Kube.Context, "publish.kube")
	if err != nil {
		return nil, err
	}
	namespace := c.Kube.Namespace
	if namespace == "" {
		namespace = l.Agents.Namespace
	}
	cfg := cluster.KubePublisherConfig{Client: client, Namespace: namespace, Log: log, Copies: c.Kube.Copies, Metrics: m}
	where := "ConfigMap " + namespace + "/" + cluster.BundleConfigMap
	if c.Kube.ClusterTrustBundle {
		cfg.TrustBundle = l.td
		where += " or ClusterTrustBundle " + cluster.TrustBundleName(l.td)
	}
	k, err := cluster.NewKubePublisher(cfg)
	if err != nil {
		return nil, err
	}
	return &publisher{Publisher: k, where: where, kube: k, client: client}, nil
}

// tasks keep what is published as it is.
func (p *publisher) tasks() []run.Task {
	if p.kube == nil {
		return nil
	}
	return []run.Task{{Name: "bundle in the cluster", Run: p.kube.Run}, {Name: "permission to publish", Run: p.check}}
}

// check asks from time to time whether the bundle may be published.
func (p *publisher) check(ctx context.Context) error {
	defer p.client.Close()
	for {
		wait := checkGood
		switch err := p.client.CheckRules(ctx, p.kube.Rules()...); {
		case err == nil:
			p.forbidden.Store(nil)
		case errors.Is(err, kube.ErrForbidden):
			p.forbidden.Store(new(err.Error()))
			wait = checkBad
		default:
			wait = checkBad
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// notReady names a permission that is missing.
func (p *publisher) notReady() []string {
	if rule := p.forbidden.Load(); rule != nil {
		return []string{"the bundle cannot be published: " + *rule}
	}
	return nil
}

// kubeParts are those that speak to API servers.
type kubeParts struct {
	reviews  reviewers
	clusters cluster.Clusters
	publish  *publisher
	metrics  *cluster.Metrics
	guard    *rollbackGuard
}

func (k kubeParts) tasks() []run.Task {
	return slices.Concat(k.reviews.tasks(), k.clusters.Tasks(), k.publish.tasks(), []run.Task{k.guard.task()})
}

func (k kubeParts) notReady() []string {
	return slices.Concat(k.reviews.notReady(), k.clusters.NotReady(), k.publish.notReady())
}
