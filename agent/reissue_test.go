package agent_test

import (
	"context"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca/catest"
)

// adminOf connects to the admin service of a CA.
func adminOf(t *testing.T, s *catest.Server) apiv1.AdminClient {
	t.Helper()
	l := bufconn.Listen(64 << 10)
	server := s.CA().NewAdminServer(catest.AsUser(0))
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(l)
	}()
	conn, err := grpc.NewClient("passthrough:///admin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		<-done
	})
	return apiv1.NewAdminClient(conn)
}

// outcome waits, in fake time, until an operation is over.
func outcome(t *testing.T, admin apiv1.AdminClient, id string, within time.Duration) string {
	t.Helper()
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		resp, err := admin.RotationStatus(t.Context(), &apiv1.RotationStatusRequest{})
		if err != nil {
			t.Fatal(api.FromStatus(err))
		}
		for _, o := range resp.GetRotation().GetPast() {
			if o.GetId() == id {
				return o.GetOutcome()
			}
		}
	}
	t.Fatalf("operation %s is not over after %s", id, within)
	return ""
}

// TestReissue has everything issued anew on the CA's order, long before it was due: the identities of pods and the agent's own. Nobody
// is without an SVID meanwhile.
func TestReissue(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		admin := adminOf(t, s)
		old := fmt.Sprintf("%x", s.CA().Bundle().Roots[0].SubjectKeyId)
		var all []*agent.Identity
		var nodes []*node
		for i := range 2 {
			n := startNode(t, s, fmt.Sprint("node-", i+1))
			nodes = append(nodes, n)
			for k := range 3 {
				id, _ := n.keepFresh(newWorkload(s, fmt.Sprintf("web-%d-%d", i+1, k), fmt.Sprint("node-", i+1)))
				await(t, id, time.Minute, "SVID", hasSVID)
				all = append(all, id)
			}
		}
		time.Sleep(5 * time.Second) // they report
		began := time.Now()
		compromised(t, admin, old)
		if took := time.Since(began); took > 20*time.Second { // an agent reports once a second
			t.Errorf("it took %s", took)
		}
		for _, id := range all {
			h := id.Held().Load()
			if h.SVID == nil || fmt.Sprintf("%x", h.SVID.Certificates[1].AuthorityKeyId) == old {
				t.Errorf("%s has no SVID, or one under the compromised root", id.Pod().Name)
			}
		}
		for _, n := range nodes {
			if len(n.Trust().Load().Bundle.X509Authorities()) != 1 || len(n.log.find("identity expired", "")) > 0 {
				t.Error("the compromised root is still trusted, or something has expired")
			}
		}
	})
}

// TestEndedStream keeps a stream that ended without an answer to its bundle in what the CA hears, until a later one has acknowledged it:
// a proxy that rejects bundles and reconnects for ever is waited for.
func TestEndedStream(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		n := startNode(t, s, here)
		id, _ := n.keepFresh(newWorkload(s, "web", here))
		await(t, id, time.Minute, "SVID", hasSVID)
		streams := func() (all []string) {
			time.Sleep(3 * time.Second)
			for _, s := range holdings(t, s)["web"].GetHolding().GetStreams() {
				all = append(all, fmt.Sprint(s.GetId(), " ", s.GetEnded()))
			}
			return all
		}
		const one, two = 1<<32 | 1, 1<<32 | 2
		for _, step := range []struct {
			what   string
			stream uint64
			report *apiv1.Stream
			want   []string
		}{
			{"one that has acknowledged", 1, &apiv1.Stream{Id: 1, WantsBundle: true, AckedGeneration: one, PushedGeneration: one}, []string{"1 false"}},
			{"ends, and its client may come back", 1, nil, []string{"1 true"}},
			{"which it does", 5, &apiv1.Stream{Id: 5, WantsBundle: true, AckedGeneration: one, PushedGeneration: one}, []string{"5 false"}},
			{"ends", 5, nil, []string{"5 true"}},
			{"and that was all", 9, nil, nil},
			{"one that rejects", 2, &apiv1.Stream{Id: 2, WantsBundle: true, PushedGeneration: two, AckedGeneration: one, Nack: "no"}, []string{"2 false"}},
			{"ends", 2, nil, []string{"2 true"}},
			{"one that asks for no bundle", 3, &apiv1.Stream{Id: 3, PushedGeneration: two}, []string{"3 false", "2 true"}},
			{"one that has not answered", 4, &apiv1.Stream{Id: 4, WantsBundle: true, PushedGeneration: two}, []string{"3 false", "4 false", "2 true"}},
			{"one that acknowledges", 4, &apiv1.Stream{Id: 4, WantsBundle: true, PushedGeneration: two, AckedGeneration: two}, []string{"3 false", "4 false"}},
		} {
			id.Report(step.stream, step.report)
			if step.stream == 9 {
				time.Sleep(time.Minute)
			}
			if got := streams(); !slices.Equal(got, step.want) {
				t.Errorf("%s: the CA hears of %q, want %q", step.what, got, step.want)
			}
		}
	})
}
