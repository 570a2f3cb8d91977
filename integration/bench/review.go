//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/integration/controlplane"
	"github.com/signet-ca/signet/internal/kube"
)

// reviewer attests tokens as a CA does that has each of them reviewed by its cluster's API server.
type reviewer struct {
	client *kube.Client
	at     *attestor.ServiceAccount
}

// asking is kube.Client as an attestor.TokenReviewer.
type asking struct{ *kube.Client }

// ReviewToken implements attestor.TokenReviewer.
func (a asking) ReviewToken(ctx context.Context, token []byte, audience string) (attestor.TokenReview, error) {
	r, err := a.Client.ReviewToken(ctx, token, audience)
	return attestor.TokenReview(r), err
}

// reviews are tokens that are shown one after the other by so many callers at once.
type reviews struct {
	Tokens  []string
	Callers int
}

func (r *reviewer) do(ctx context.Context, what string, arg json.RawMessage) (any, error) {
	switch what {
	case "open":
		return with(arg, func(c reached) (any, error) { return nil, r.open(c) })
	case "review":
		return with(arg, func(v reviews) (any, error) { return r.review(ctx, v) })
	default:
		return nil, errUnknown
	}
}

// Close closes its connections.
func (r *reviewer) Close() error {
	if r.client != nil {
		r.client.Close()
	}
	return nil
}

func (r *reviewer) open(c reached) error {
	keys, err := attestor.StaticKeys(c.JWKS)
	if err != nil {
		return err
	}
	r.client, err = kube.Open(kube.Config{Kubeconfig: c.Kubeconfig, UserAgent: "signet-ca/bench", Timeout: time.Minute, QPS: 100_000})
	if err != nil {
		return err
	}
	r.at, err = attestor.NewServiceAccount(attestor.ServiceAccountConfig{
		Issuers: map[string]attestor.Keys{controlplane.Issuer: keys},
		Reviews: map[string]attestor.ReviewConfig{controlplane.Issuer: {Reviewer: asking{r.client}, Timeout: 30 * time.Second}},
	})
	return err
}

func (r *reviewer) review(ctx context.Context, v reviews) (loaded, error) {
	took := make([]time.Duration, len(v.Tokens))
	failures := make([]error, v.Callers)
	began := time.Now()
	var wg sync.WaitGroup
	for c := range v.Callers {
		wg.Go(func() {
			for i := c; i < len(v.Tokens) && failures[c] == nil; i += v.Callers {
				begin := time.Now()
				e := attestor.Evidence{Kind: api.EvidenceServiceAccount, Data: []byte(v.Tokens[i])}
				_, failures[c] = r.at.Attest(ctx, e, "signet:"+trustDomain, begin)
				took[i] = time.Since(begin)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(failures...); err != nil {
		return loaded{}, err
	}
	l := loaded{SVIDs: len(took), Seconds: time.Since(began).Seconds()}
	slices.Sort(took)
	l.P50, l.P99 = quantile(took, 0.50), quantile(took, 0.99)
	return l, nil
}

// benchReview is a token that a real API server is asked about as well, by TokenReview. It is new to the API server, or one
// that it saw in the last ten seconds, for which it remembers its answer.
func benchReview(ctx context.Context, b *bench) error {
	const callers, each = 16, 200
	f := b.figures
	keys := []string{"review_new_p50_ms", "review_new_p99_ms", "review_new_tokens", "review_known_p50_ms", "review_known_tokens"}
	f.declare(keys[0], "a token attested with a review, new to the API server, one at a time, p50", "ms")
	f.declare(keys[1], "a token attested with a review, new to the API server, one at a time, p99", "ms").anySpread()
	f.declare(keys[2], "tokens attested with a review, new to the API server, 16 at once", "tokens a second")
	f.declare(keys[3], "a token that the API server saw less than ten seconds ago, one at a time, p50", "ms")
	f.declare(keys[4], "tokens that the API server saw less than ten seconds ago, 16 at once", "tokens a second")
	if os.Getenv(controlplane.BinaryVariable) == "" {
		f.refuse("there is no real API server here, which scripts/cluster.sh builds (make bench REVIEW=required)", keys...)
		return nil
	}
	dir, err := os.MkdirTemp(b.dir, "review-")
	if err != nil {
		return err
	}
	plane, err := b.child(dir, "apiserver", b.client)
	if err != nil {
		return err
	}
	defer plane.end()
	r, err := b.child(dir, "reviewer", b.server)
	if err != nil {
		return err
	}
	defer r.end()
	b.say("review: the control plane starts")
	c, err := ask[reached](plane, "start", dir)
	if err != nil {
		return err
	}
	if _, err := ask[struct{}](r, "open", c); err != nil {
		return err
	}
	rows := []struct {
		callers int
		known   bool
		values  func(loaded)
	}{
		{1, false, func(l loaded) { f.add(keys[0], l.P50); f.add(keys[1], l.P99) }},
		{1, true, func(l loaded) { f.add(keys[3], l.P50) }},
		{callers, false, func(l loaded) { f.add(keys[2], float64(l.SVIDs)/l.Seconds) }},
		{callers, true, func(l loaded) { f.add(keys[4], float64(l.SVIDs)/l.Seconds) }},
	}
	err = b.rounds(func() (bool, error) {
		var fresh []string
		for _, row := range rows {
			if !row.known {
				if fresh, err = ask[[]string](plane, "tokens", each); err != nil {
					return false, err
				}
			}
			win, err := open(append([]int{plane.pid(), r.pid()}, c.PIDs...)...)
			if err != nil {
				return false, err
			}
			l, err := ask[loaded](r, "review", reviews{fresh, row.callers})
			if err != nil {
				return false, err
			}
			t, err := win.close()
			if err != nil || t.foreign > b.noise {
				return false, err
			}
			row.values(l)
		}
		return true, nil
	})
	b.settle(b.options.rounds)
	return errors.Join(err, ctx.Err())
}
