package agent

import (
	"context"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	apiv1 "github.com/signet-ca/signet/api/v1"
)

// maxReport is the size in bytes from which a report is divided: far below what the CA reads in one message, so that a node
// with much to tell, or a workload that says much, cannot cost it the session.
const maxReport = 512 << 10

// heard is what the CA has heard on one session.
type heard struct {
	holdings map[string]*apiv1.Holding
	trust    *Trust // nil before the first report
}

// report sends all that is held once, then what changed, coalesced.
func (a *Agent) report(ctx context.Context, stream apiv1.Authority_SessionClient) error {
	var h heard
	for {
		_, changed := a.changed.Get()
		for _, r := range a.nextReports(&h) {
			if err := stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Report{Report: r}}); err != nil {
				return nil // the receiver learns why
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(a.cfg.ReportEvery):
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// nextReports returns what differs from h, the first time all there is, and brings h up to date; none where nothing does.
func (a *Agent) nextReports(h *heard) []*apiv1.Report {
	t := a.trust.Load()
	report := func() *apiv1.Report {
		return &apiv1.Report{BundleEpoch: t.Generation.Epoch, BundleNumber: t.Generation.Number, BundleHash: t.Hash[:]}
	}
	now := map[string]*apiv1.Holding{}
	for _, id := range a.list() {
		holding := id.holding()
		now[holding.GetKey()] = holding
	}
	first := report()
	first.Full = h.trust == nil
	for _, k := range slices.Sorted(maps.Keys(h.holdings)) {
		if now[k] == nil {
			first.Removed = append(first.Removed, k)
		}
	}
	reports := []*apiv1.Report{first}
	size, changed := proto.Size(first), 0
	for _, k := range slices.Sorted(maps.Keys(now)) {
		if proto.Equal(h.holdings[k], now[k]) {
			continue
		}
		changed++
		n := proto.Size(now[k])
		if size += n; size > maxReport {
			size = n
			reports = append(reports, report())
		}
		last := reports[len(reports)-1]
		last.Changed = append(last.Changed, now[k])
	}
	if h.trust == t && changed == 0 && len(first.Removed) == 0 {
		return nil
	}
	h.holdings, h.trust = now, t
	return reports
}
