//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// benchIssuance is the whole of an SVID: gRPC over mTLS, the token's attestation, policy, ledger with its syncs on a real
// disk, signature and its check, by a CA that has no processor to spare.
func benchIssuance(ctx context.Context, b *bench) error {
	clients, batches := []int{1, 8, 64, 256}, []int{1, 50}
	if b.short {
		clients, batches = []int{64}, []int{1}
	}
	f := b.figures
	f.declare("issue_grpc_of_ceiling", "SVIDs over gRPC, 64 clients, one CSR a call, of the ceiling's on the same processors", "share").atLeast(0.60)
	f.declare("server_cpu_over_crypto", "the CA's processor time for an SVID, 64 clients, one CSR a call, over the bare cryptography's", "ratio").below(1.6)
	f.declare("ceiling_svids", "the ceiling: token, CSR, signature and its check, nothing else", "SVIDs a second")
	f.declare("ceiling_own_share", "what the check of our own signature is of the ceiling's time", "share")
	f.declare("ledger_of_svid", "processor time of an entry of the ledger, 64 writers, of the CA's for an SVID", "share").below(0.10).anySpread()
	type kind struct{ clients, batch int }
	var kinds []kind
	for _, batch := range batches {
		for _, n := range clients {
			kinds = append(kinds, kind{n, batch})
			name := fmt.Sprintf("issue_%dx%d", n, batch)
			what := fmt.Sprintf("%d clients, %d CSRs a call", n, batch)
			f.declare(name+"_of_ceiling", what+", of the ceiling", "share")
			f.declare(name+"_of_ceiling_unchecked", what+", of a ceiling that does not check its own signature", "share")
			f.declare(name+"_svids", what, "SVIDs a second")
			f.declare(name+"_cpu_us", what+", the CA's processor time for one", "microseconds")
			f.declare(name+"_p50_ms", what+", a call", "ms")
			f.declare(name+"_p99_ms", what+", a call", "ms").anySpread()
			if crowd(n, batch) {
				f.declare(name+"_refused", what+", of the requests, those that were sent away to come back later", "share").anySpread()
			}
		}
	}
	w, err := b.newWorld("issuance", pods{Agents: clients[len(clients)-1], Workloads: 8})
	if err != nil {
		return err
	}
	defer w.close()
	top, err := w.startWarm(ctx, clients[len(clients)-1], min(64, clients[len(clients)-1]))
	if err != nil {
		return err
	}
	defer top.end()
	for _, k := range kinds {
		b.stage("%d clients, %d CSRs a call", k.clients, k.batch)
		if err := b.rounds(func() (quiet bool, err error) { return w.issueRound(top, k.clients, k.batch) }); err != nil {
			return err
		}
	}
	b.settle(b.options.rounds)
	return ctx.Err()
}

// crowd tells the loads that are more than a CA lets wait: 4,096 requests.
func crowd(clients, batch int) bool { return clients*batch > 4096 }

// startWarm starts a CA with so many agents, of which some have asked it already, and a ceiling beside it, which the caller ends.
func (w *world) startWarm(ctx context.Context, agents, clients int) (top *process, err error) {
	if err := w.startCA(ctx); err != nil {
		return nil, err
	}
	if _, err := ask[struct{}](w.cluster, "connect", connect{Address: w.address, Agents: agents}); err != nil {
		return nil, err
	}
	if _, err := ask[loaded](w.cluster, "issue", load{Clients: clients, Batch: 1, Seconds: 1}); err != nil {
		return nil, err
	}
	return w.b.child(w.dir, "ceiling", w.b.server)
}

// issueRound measures one kind of load between two halves of the ceiling's.
func (w *world) issueRound(top *process, clients, batch int) (quiet bool, err error) {
	before, quiet1, err := w.b.ceiling(top, 0.25)
	if err != nil {
		return false, err
	}
	win, err := open(w.ca.pid(), w.cluster.pid(), top.pid())
	if err != nil {
		return false, err
	}
	l, err := ask[loaded](w.cluster, "issue", load{Clients: clients, Batch: batch, Seconds: 1})
	if err != nil {
		return false, err
	}
	t, err := win.close()
	if err != nil {
		return false, err
	}
	after, quiet2, err := w.b.ceiling(top, 0.25)
	noise := w.b.noise
	if clients*batch == 1 {
		noise += 0.15 // the kernel's own threads sync the ledger once for each SVID: they work for us, and in nobody's clock
	}
	if err != nil || !quiet1 || !quiet2 || t.foreign > noise {
		return false, err
	}
	var entry time.Duration
	if clients == 64 && batch == 1 {
		var quiet3 bool
		if entry, quiet3, err = w.b.ledgerEntry(w); err != nil || !quiet3 {
			return false, err
		}
	}
	rate, unchecked := (before.Rate+after.Rate)/2, (before.RateWithout+after.RateWithout)/2
	crypto := (before.CPU + after.CPU) / 2
	svids := float64(l.SVIDs) / l.Seconds
	each := t.cpu[w.ca.pid()].Seconds() / float64(l.SVIDs)
	f, name := w.b.figures, fmt.Sprintf("issue_%dx%d", clients, batch)
	f.add(name+"_of_ceiling", svids/rate)
	f.add(name+"_of_ceiling_unchecked", svids/unchecked)
	f.add(name+"_svids", svids)
	f.add(name+"_cpu_us", each*1e6)
	f.add(name+"_p50_ms", l.P50)
	f.add(name+"_p99_ms", l.P99)
	if crowd(clients, batch) {
		f.add(name+"_refused", float64(l.Refused)/float64(l.Refused+l.SVIDs))
	}
	if clients == 64 && batch == 1 {
		f.add("ledger_of_svid", entry.Seconds()/each)
		f.add("issue_grpc_of_ceiling", svids/rate)
		f.add("server_cpu_over_crypto", each/crypto)
		f.add("ceiling_svids", rate)
		f.add("ceiling_own_share", 1-rate/unchecked)
	}
	return true, nil
}

// ceiling asks for the ceiling of this moment.
func (b *bench) ceiling(top *process, seconds float64) (bare, bool, error) {
	win, err := open(top.pid())
	if err != nil {
		return bare{}, false, err
	}
	c, err := ask[bare](top, "loop", seconds)
	if err != nil {
		return bare{}, false, err
	}
	t, err := win.close()
	return c, t.foreign <= b.noise, err
}

// ledgerEntry is the processor time, kernel's included, that a process spends on one entry while 64 wait at any moment.
func (b *bench) ledgerEntry(w *world) (entry time.Duration, quiet bool, err error) {
	l, err := b.child(w.dir, "ledger", b.server)
	if err != nil {
		return 0, false, err
	}
	defer l.end()
	win, err := open(l.pid(), w.ca.pid(), w.cluster.pid())
	if err != nil {
		return 0, false, err
	}
	if entry, err = ask[time.Duration](l, "append", appends{Dir: w.dir, Writers: 64, Seconds: 0.5}); err != nil {
		return 0, false, err
	}
	t, err := win.close()
	return entry, t.foreign <= b.noise, err
}

// profile writes where a CA of signet-ca's parts spends its time while 64 clients ask for one SVID a call.
func profile(ctx context.Context, o options) error {
	b, err := newBench(o)
	if err != nil {
		return err
	}
	defer b.close()
	path, err := filepath.Abs(o.profile)
	if err != nil {
		return err
	}
	w, err := b.newWorld("profile", pods{Agents: 64, Workloads: 8})
	if err != nil {
		return err
	}
	defer w.close()
	if w.ca, err = b.child(w.dir, "ca", b.server); err != nil {
		return err
	}
	if _, err := ask[struct{}](w.ca, "serve", serving{w.dir, w.address}); err != nil {
		return err
	}
	if _, err := ask[struct{}](w.cluster, "connect", connect{Address: w.address, Agents: 64}); err != nil {
		return err
	}
	if _, err := ask[struct{}](w.ca, "profile", path); err != nil {
		return err
	}
	if _, err := ask[loaded](w.cluster, "issue", load{Clients: 64, Batch: 1, Seconds: 8}); err != nil {
		return err
	}
	_, err = ask[struct{}](w.ca, "profile", "")
	return errors.Join(err, ctx.Err())
}
