package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/internal/kube"
	"github.com/signet-ca/signet/internal/run"
)

// tokenReviewConfig says whether tokens that passed every other check are shown to their cluster's API server as well.
type tokenReviewConfig struct {
	// A kubeconfig file of that cluster, or "in-cluster" for the ServiceAccount of the CA's own pod. It may hold a token, a
	// token file or a client certificate, and must name the cluster's CA; commands and passwords in it are refused. What it
	// needs is to create tokenreviews.authentication.k8s.io. Default: none, tokens are believed by the key set alone.
	Kubeconfig string `yaml:"kubeconfig"`
	// The context of the kubeconfig. Default: its current one.
	Context string `yaml:"context"`
	// How long one review may take, up to 30s; without an answer the token is refused. Default: 5s.
	Timeout time.Duration `yaml:"timeout"`
	// How many reviews may be under way at once, up to 4096; a token beyond that is refused at once, with a delay to come
	// back after. Default: 64.
	MaxInFlight int `yaml:"maxInFlight"`
	// How many reviews a second are sent, over bursts of twice as many; one beyond that waits. Default: 200.
	QPS int `yaml:"qps"`
}

func (c tokenReviewConfig) check(i int, bad func(string, ...any)) {
	if c.Kubeconfig == "" && c != (tokenReviewConfig{}) {
		bad("issuers[%d].tokenReview has no kubeconfig, so nothing would be reviewed", i)
	}
	if c.Timeout < 0 || c.Timeout > attestor.MaxReviewTimeout {
		bad("issuers[%d].tokenReview.timeout of %s is not above 0 and at most %s", i, c.Timeout, attestor.MaxReviewTimeout)
	}
	if c.MaxInFlight < 0 || c.MaxInFlight > attestor.MaxReviewInFlight {
		bad("issuers[%d].tokenReview.maxInFlight of %d is not between 1 and %d", i, c.MaxInFlight, attestor.MaxReviewInFlight)
	}
	if c.QPS < 0 {
		bad("issuers[%d].tokenReview.qps cannot be negative", i)
	}
}

// reviewer is the API server that reviews the tokens of one issuer.
type reviewer struct {
	client    *kube.Client
	timeout   time.Duration
	log       *slog.Logger
	forbidden atomic.Pointer[string] // the permission that is missing; nil: none that is known of
}

var _ attestor.TokenReviewer = (*reviewer)(nil)

// ReviewToken implements attestor.TokenReviewer.
func (r *reviewer) ReviewToken(ctx context.Context, token []byte, audience string) (attestor.TokenReview, error) {
	answer, err := r.client.ReviewToken(ctx, token, audience)
	return attestor.TokenReview(answer), err
}

// reviewers are by the name of the issuer.
type reviewers map[string]*reviewer

// openReviewers makes a client for each issuer whose tokens are reviewed, and speaks to none.
func openReviewers(l *loaded, log *slog.Logger) (reviewers, error) {
	all := reviewers{}
	for i, is := range l.Issuers {
		c := is.TokenReview
		if c.Kubeconfig == "" {
			continue
		}
		timeout := c.Timeout
		if timeout == 0 {
			timeout = attestor.DefaultReviewTimeout
		}
		client, err := kube.Open(kube.Config{Kubeconfig: c.Kubeconfig, Context: c.Context, UserAgent: "signet-ca/" + version, Timeout: timeout, QPS: c.QPS})
		if err != nil {
			return nil, api.Wrap(api.ConfigInvalid, err, fmt.Sprintf("issuers[%d].tokenReview: %v", i, err))
		}
		all[is.Issuer] = &reviewer{client: client, timeout: timeout, log: log.With("issuer", is.Issuer)}
	}
	return all, nil
}

// configs is what the attestor is told of them.
func (all reviewers) configs(issuers []issuerConfig) map[string]attestor.ReviewConfig {
	configs := map[string]attestor.ReviewConfig{}
	for _, is := range issuers {
		if r := all[is.Issuer]; r != nil {
			configs[is.Issuer] = attestor.ReviewConfig{Reviewer: r, Timeout: r.timeout, InFlight: is.TokenReview.MaxInFlight}
		}
	}
	return configs
}

// tasks watch over the permissions of each.
func (all reviewers) tasks() []run.Task {
	var tasks []run.Task
	for _, issuer := range slices.Sorted(maps.Keys(all)) {
		tasks = append(tasks, run.Task{Name: "token review of " + issuer, Run: all[issuer].watch})
	}
	return tasks
}

// notReady names the permissions that are missing. An API server that does not answer is not among them: agents must reach
// a CA that cannot attest anybody new, for the bundle and for an answer that says why.
func (all reviewers) notReady() []string {
	var missing []string
	for _, issuer := range slices.Sorted(maps.Keys(all)) {
		if rule := all[issuer].forbidden.Load(); rule != nil {
			missing = append(missing, fmt.Sprintf("the tokens of issuer %s cannot be reviewed: %s", issuer, *rule))
		}
	}
	return missing
}

// How often it is checked that the API server lets us review tokens, while it does and while it does not.
const (
	checkGood = 5 * time.Minute
	checkBad  = 5 * time.Second
)

// watch asks at the start and from time to time whether tokens may be reviewed, and tells what changed.
func (r *reviewer) watch(ctx context.Context) error {
	defer r.client.Close()
	for last := "unasked"; ; {
		wait, now := checkGood, ""
		if err := r.check(ctx); ctx.Err() != nil {
			return nil
		} else if err != nil {
			wait, now = checkBad, err.Error()
		}
		switch {
		case now == last:
		case now == "":
			r.log.InfoContext(ctx, "tokens are reviewed")
		default:
			r.log.WarnContext(ctx, "tokens cannot be reviewed", "error", now[:min(len(now), 512)])
		}
		last = now
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// check asks once, and notes a permission that is missing.
func (r *reviewer) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	err := r.client.CheckReview(ctx)
	switch {
	case err == nil:
		r.forbidden.Store(nil)
	case errors.Is(err, kube.ErrForbidden):
		r.forbidden.Store(new(err.Error()))
	}
	return err
}
