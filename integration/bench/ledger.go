//go:build linux

package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/audit"
)

// ledger writes entries like those of an SVID, and nothing else.
type ledger struct{}

// appends are so many writers at once, for so long, to a ledger below Dir.
type appends struct {
	Dir     string
	Writers int
	Seconds float64
}

func (l *ledger) do(ctx context.Context, what string, arg json.RawMessage) (any, error) {
	if what != "append" {
		return nil, errUnknown
	}
	return with(arg, func(a appends) (any, error) { return l.append(ctx, a) })
}

// append returns the processor time of one entry.
func (l *ledger) append(ctx context.Context, a appends) (each time.Duration, err error) {
	dir, err := os.MkdirTemp(a.Dir, "ledger-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	log, err := audit.Open(filepath.Join(dir, "ledger"), audit.Options{})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	now := time.Now().UTC()
	entry := audit.Entry{
		Time: now, Kind: audit.KindIssue, SPIFFEID: "spiffe://" + trustDomain + "/ns/shop/sa/web-1", Cluster: issuerName,
		Namespace: "shop", ServiceAccount: "web-1", ServiceAccountUID: "0b7ffe5c-8a2c-4a3e-9d3a-1c2b3a4d5e6f", Pod: "web-1-1",
		PodUID: "0b7ffe5c-8a2c-4a3e-9d3a-1c2b3a4d5e60", Node: nodeName(1), NodeUID: "0b7ffe5c-8a2c-4a3e-9d3a-1c2b3a4d5e61",
		TokenID: "0b7ffe5c-8a2c-4a3e-9d3a-1c2b3a4d5e62", Serial: hex.EncodeToString(make([]byte, 20)), NotAfter: now.Add(time.Hour),
		Issuer: hex.EncodeToString(make([]byte, 20)), Method: "Issue", Caller: "spiffe://" + trustDomain + "/signet/agent/0b7ffe5c",
		CallerNode: nodeName(1), CallerNodeUID: "0b7ffe5c-8a2c-4a3e-9d3a-1c2b3a4d5e61",
	}
	before, err := spent(os.Getpid())
	if err != nil {
		return 0, err
	}
	var n atomic.Int64
	var wg sync.WaitGroup
	var mu sync.Mutex
	until := time.Now().Add(time.Duration(a.Seconds * float64(time.Second)))
	for range a.Writers {
		wg.Go(func() {
			e := entry
			for time.Now().Before(until) {
				e.CorrelationID = api.NewCorrelationID()
				if failed := log.Append(ctx, e); failed != nil {
					mu.Lock()
					err = failed
					mu.Unlock()
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	if err != nil {
		return 0, err
	}
	after, err := spent(os.Getpid())
	return (after - before) / time.Duration(max(1, n.Load())), err
}
