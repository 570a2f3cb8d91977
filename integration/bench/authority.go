//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/pprof"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/ca"
	directory "github.com/signet-ca/signet/ca/cluster"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/ca/upstream"
	"github.com/signet-ca/signet/internal/audit"
	"github.com/signet-ca/signet/internal/daemon"
)

// authority is the CA of signet-ca's parts whose bundle changes when it is told to, as when another replica has written the
// record.
type authority struct {
	shared *shared
	up     ca.Founder
	td     spiffeid.TrustDomain
	file   *os.File     // of a profile that goes on
	every  atomic.Int64 // nanoseconds: all SVIDs are renewed at the multiples of it; zero: as the CA says
	extra  string       // id of the root that was added last and is still there
}

// shared is a store to which somebody else writes as well.
type shared struct {
	ca.Store

	mu      sync.Mutex
	now     ca.Revision
	changed chan struct{}
}

// Await implements ca.SharedStore.
func (s *shared) Await(ctx context.Context, old ca.Revision) error {
	for {
		s.mu.Lock()
		now, changed := s.now, s.changed
		s.mu.Unlock()
		if now != 0 && now != old {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *shared) write(ctx context.Context, change func(journal.Journal) (journal.Journal, error)) error {
	j, r, err := s.Load(ctx)
	if err == nil {
		j, err = change(j)
	}
	if err == nil {
		r, err = s.Store.Swap(ctx, r, j)
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.now = r
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
	return nil
}

// serving says where the CA of a folder is to listen.
type serving struct{ Dir, Address string }

func (a *authority) do(ctx context.Context, what string, arg json.RawMessage) (any, error) {
	switch what {
	case "serve":
		return with(arg, func(s serving) (any, error) { return nil, a.serve(ctx, s) })
	case "bundle":
		return a.bundle(ctx)
	case "renew":
		return with(arg, func(every time.Duration) (any, error) { a.every.Store(int64(every)); return nil, nil })
	case "profile":
		return with(arg, func(path string) (any, error) { return nil, a.profile(path) })
	default:
		return nil, errUnknown
	}
}

// serve starts the CA; it ends with the process.
func (a *authority) serve(ctx context.Context, s serving) error {
	a.td = spiffeid.RequireTrustDomainFromString(trustDomain)
	key, err := os.ReadFile(filepath.Join(s.Dir, "seal.key"))
	if err != nil {
		return err
	}
	sealer, err := ca.NewSealer(key)
	if err != nil {
		return err
	}
	up, err := upstream.Open(upstream.Config{Kind: "selfsigned"}, upstream.Parts{Sealer: sealer})
	if err != nil {
		return err
	}
	a.up = up.(ca.Founder)
	st, _, err := store.Open(ctx, store.Config{Kind: "bolt", Path: filepath.Join(s.Dir, "signet.db")}, false)
	if err != nil {
		return err
	}
	a.shared = &shared{Store: st, changed: make(chan struct{})}
	ledger, err := audit.Open(filepath.Join(s.Dir, "ledger"), audit.Options{})
	if err != nil {
		return err
	}
	policy, err := ca.NewPolicy(ca.PolicyFile{Namespaces: []string{"*"}}, a.td, true)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	keys, err := attestor.NewKeySource(attestor.KeySourceConfig{Issuer: issuerName, File: filepath.Join(s.Dir, "jwks.json"), Log: log})
	if err != nil {
		return err
	}
	verifier, err := attestor.NewServiceAccount(attestor.ServiceAccountConfig{Issuers: map[string]attestor.Keys{issuerName: keys}})
	if err != nil {
		return err
	}
	authority, err := ca.New(ca.Config{
		TrustDomain: a.td, Replica: "bench", Version: "bench", Store: a.shared, Upstream: up, Ledger: ledger, Archive: ledger,
		Directory: directory.NewFileDirectory(filepath.Join(s.Dir, "pods.json")), Policy: policy, Sealer: sealer,
		Attestors: map[string]attestor.Attestor{api.EvidenceServiceAccount: verifier},
		KeySets:   map[string]ca.KeySets{issuerName: keys},
		Agents:    ca.AgentRule{Namespace: "signet-system", ServiceAccount: "signet-agent"}, Log: log,
	})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", s.Address)
	if err != nil {
		return err
	}
	for name, task := range map[string]func(context.Context) error{"ca": authority.Run, "keys": keys.Run} {
		go func() {
			if err := task(ctx); err != nil && ctx.Err() == nil {
				log.Error("ended", "task", name, "error", err)
			}
		}()
	}
	go authority.NewServer(grpc.ChainUnaryInterceptor(a.together)).Serve(daemon.Limit(l, daemon.Limits{Port: "agents", Log: log}))
	for until := time.Now().Add(startTime); len(authority.NotReady()) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) {
			return errors.New("the CA is not ready")
		}
	}
	return nil
}

// together has agents renew all at once what is issued from now on: a real CA spreads that over a fifth of a lifetime.
func (a *authority) together(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	resp, err := handle(ctx, req)
	if r, ok := resp.(*apiv1.IssueResponse); ok {
		if every := time.Duration(a.every.Load()); every > 0 {
			for _, x := range r.GetResults() {
				if s := x.GetSvid(); s != nil {
					s.RenewAt = timestamppb.New(nextWave(time.Now(), every))
				}
			}
		}
	}
	return resp, err
}

// nextWave is when all are renewed that were issued now: never at once.
func nextWave(now time.Time, every time.Duration) time.Time {
	return now.Add(every / 4).Truncate(every).Add(every)
}

// bundle adds a root, or takes the last one away, and returns when that was written down, in microseconds since 1970.
func (a *authority) bundle(ctx context.Context) (at int64, err error) {
	err = a.shared.write(ctx, func(j journal.Journal) (journal.Journal, error) {
		j.Number++
		if a.extra != "" {
			for i := range j.Authorities {
				if j.Authorities[i].ID == a.extra {
					j.Authorities[i].State = journal.Removed
				}
			}
			a.extra = ""
			return j, nil
		}
		root, err := a.up.Found(ctx, a.td, time.Now())
		if err != nil {
			return j, err
		}
		root.State = journal.Published
		a.extra = root.ID
		j.Authorities = append(j.Authorities, root)
		return j, nil
	})
	return time.Now().UnixMicro(), err
}

// profile begins a profile of the processor time that goes to a file, or ends the one that goes on, without a path.
func (a *authority) profile(path string) error {
	if path == "" {
		pprof.StopCPUProfile()
		return a.file.Close()
	}
	var err error
	if a.file, err = os.Create(path); err != nil {
		return err
	}
	return pprof.StartCPUProfile(a.file)
}
