package agent_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/catest"
)

// take returns what was reported since the last call.
func (f *fake) take() []*apiv1.Report {
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	all := f.reports
	f.reports = nil
	return all
}

func changed(reports ...*apiv1.Report) []string {
	var pods []string
	for _, r := range reports {
		for _, h := range r.GetChanged() {
			pods = append(pods, h.GetPodName())
		}
	}
	slices.Sort(pods)
	return pods
}

// The first report of a session tells all; the others what changed, once in a while; and nothing is said for nothing.
func TestReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t, replicaID)
		n := f.start(func(c *agent.Config) { c.ReportEvery = 10 * time.Second })
		first, second := f.admit(n, "web-1"), f.admit(n, "web-2")
		for _, id := range []*agent.Identity{first, second} {
			await(t, id, time.Second, "SVID", hasSVID)
		}
		time.Sleep(time.Minute)
		got := f.take()
		if len(got) == 0 || len(got) > 2 || !got[0].GetFull() || len(got) == 2 && got[1].GetFull() {
			t.Fatalf("reports %v, want one of all, then at most one", got)
		}
		if pods := slices.Compact(changed(got...)); !slices.Equal(pods, []string{"web-1", "web-2"}) {
			t.Errorf("reported %q", pods)
		}
		for _, r := range got {
			if r.GetBundleEpoch() != 1 || r.GetBundleNumber() != 1 || string(r.GetBundleHash()) != string(bundle(1, 1, f.root).Hash) {
				t.Error("a report does not tell the bundle that is held")
			}
		}
		for i := range 100 { // one that says much is heard of once in ten seconds
			first.Report(1, &apiv1.Stream{Id: 1, Acks: uint64(i)})
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(11 * time.Second)
		got = f.take()
		if len(got) < 1 || len(got) > 3 || got[0].GetFull() {
			t.Errorf("%d reports in ten seconds", len(got))
		}
		if pods := slices.Compact(changed(got...)); !slices.Equal(pods, []string{"web-1"}) {
			t.Errorf("reported %q, though only web-1 changed", pods)
		}
		if last := got[len(got)-1].GetChanged()[0].GetStreams(); len(last) != 1 || last[0].GetAcks() != 99 {
			t.Errorf("the last report does not tell the last state: %v", last)
		}
		for range 10 { // the same again is nothing new
			first.Report(1, &apiv1.Stream{Id: 1, Acks: 99})
			time.Sleep(10 * time.Second)
		}
		if got := f.take(); len(got) != 0 {
			t.Errorf("%d reports of nothing", len(got))
		}
		f.push <- bundleMessage(bundle(1, 2, f.root))
		time.Sleep(20 * time.Second)
		if got := f.take(); len(got) != 1 || got[0].GetBundleNumber() != 2 || len(got[0].GetChanged()) != 0 {
			t.Errorf("of a new bundle it was said %v", got)
		}
		// A new session knows nothing.
		f.set(func() {
			f.session = []*apiv1.SessionResponse{welcome(), bundleMessage(bundle(1, 2, f.root)), f.keySets()}
		})
		f.push <- bundleMessage(bundle(0, 1, f.root)) // ends this one
		time.Sleep(20 * time.Second)
		got = f.take()
		if len(got) != 1 || !got[0].GetFull() || !slices.Equal(changed(got...), []string{"web-1", "web-2"}) {
			t.Errorf("the new session was told %v", got)
		}
		// What is forgotten is removed.
		time.Sleep(3 * tokenLife)
		var removed []string
		for _, r := range f.take() {
			removed = append(removed, r.GetRemoved()...)
		}
		if len(removed) != 1 || !strings.Contains(removed[0], second.Pod().UID) {
			t.Errorf("removed %q, want web-2, on which no stream is open", removed)
		}
	})
}

// However much a node has to tell, and however much its workloads say, no report is too large for the CA.
func TestReportsAreBounded(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		time.Sleep(time.Second)
		const pods, streams = 120, 64
		var names []string
		for i := range 64 {
			names = append(names, fmt.Sprintf("spiffe://example.org/%03d/%s", i, strings.Repeat("a", 100)))
		}
		long := []string{"spiffe://example.org/" + strings.Repeat("a", 2000)}
		for i := range pods {
			id := n.admit(newWorkload(s, fmt.Sprint("web-", i), here))
			for j := range streams + 8 {
				st := &apiv1.Stream{Id: uint64(j), Names: names, Proxy: strings.Repeat("p", 128), Nack: strings.Repeat("n", 512), AckedHash: make([]byte, 32)}
				if j%2 == 0 {
					st.Names = long
				}
				id.Report(uint64(j), st)
				if len(st.GetNames()) != len(names) && len(st.GetNames()) != 1 {
					t.Fatal("the caller's stream was changed")
				}
			}
		}
		for _, end := range []func(){func() {}, func() { s.Kill(); s.Start() }} {
			end()
			time.Sleep(time.Minute)
			got := holdings(t, s)
			if len(got) != pods || n.metric("signet_agent_connected") != 1 {
				t.Fatalf("the CA knows of %d pods, connected %v; failures %v", len(got), n.metric("signet_agent_connected"), n.log.find(noMore, ""))
			}
			for _, h := range got {
				if len(h.GetHolding().GetStreams()) != streams || h.GetHolding().GetStreams()[0].GetId() != 8 || len(h.GetHolding().GetStreams()[1].GetNames()) == 0 {
					t.Fatalf("the CA knows of %d streams", len(h.GetHolding().GetStreams()))
				}
				if size := proto.Size(h.GetHolding()); size > 128<<10 {
					t.Fatalf("a holding of %d bytes", size)
				}
			}
		}
		if got := n.log.find(noMore, api.SessionProtocol); len(got) != 0 {
			t.Errorf("the CA ended the session: %v", got)
		}
	})
}
