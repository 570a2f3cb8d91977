package agent_test

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
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

// withAdmin lets f speak to the CA as its operator.
func withAdmin(t testing.TB, s *catest.Server, f func(apiv1.AdminClient)) {
	t.Helper()
	l := bufconn.Listen(64 << 10)
	server := s.CA().NewAdminServer(catest.AsUser(0))
	go server.Serve(l)
	defer server.Stop()
	conn, err := grpc.NewClient("passthrough:///admin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	f(apiv1.NewAdminClient(conn))
}

// until waits for something that comes without a value to follow.
func until(t testing.TB, within time.Duration, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(within); !is(); time.Sleep(50 * time.Millisecond) {
		if !time.Now().Before(end) {
			t.Fatalf("no %s within %s", what, within)
		}
	}
}

// TestBanned bans a node under its agent: what is held is served until it expires, the operator of the node is told once,
// the CA is asked about once a minute, restarted agents included, and all comes back by itself when the node is allowed.
//
// threat: B06
func TestBanned(t *testing.T) {
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		var dials atomic.Int32
		counted := func(c *agent.Config) {
			dial := c.Dial
			c.Dial = func(ctx context.Context) (net.Conn, error) { dials.Add(1); return dial(ctx) }
		}
		n := startNode(t, s, here, counted)
		id, _ := n.keepFresh(newWorkload(s, "web-1", here))
		first := await(t, id, time.Second, "SVID", hasSVID)

		withAdmin(t, s, func(c apiv1.AdminClient) {
			if _, err := c.BanNode(t.Context(), &apiv1.BanNodeRequest{Node: here}); err != nil {
				t.Fatal(api.FromStatus(err))
			}
		})
		until(t, 5*time.Second, "end of the session", func() bool { return n.metric("signet_agent_connected") == 0 })
		until(t, 5*time.Second, "word of the ban", func() bool { return n.metric("signet_agent_banned") == 1 })
		if missing := strings.Join(n.NotReady(), "; "); !strings.Contains(missing, "NODE_BANNED, SGN-0221") {
			t.Errorf("the agent misses %q", missing)
		}
		// A pod that comes now waits: it is not for its sake that it gets nothing.
		late, _ := n.keepFresh(newWorkload(s, "late-1", here))

		dials.Store(0)
		time.Sleep(time.Until(notAfter(first)) - time.Minute)
		if h := id.Held().Load(); h.SVID == nil || serial(h) != serial(first) {
			t.Errorf("a minute before its end the SVID is not served any more: %v", h.Refusal)
		}
		if h := late.Held().Load(); h.SVID != nil || h.Refused() != nil {
			t.Errorf("a new pod: %v", h.Refused())
		}
		if asked := dials.Load(); asked < 20 || asked > 70 {
			t.Errorf("the CA was asked %d times in an hour", asked)
		}
		await(t, id, 2*time.Minute, "end of the SVID", lostSVID)
		told := n.log.find("this node is banned: what is held is served until it expires, and nothing is renewed", api.NodeBanned)
		if len(told) != 1 || told[0].level != slog.LevelError || len(n.log.find(noMore, api.NodeBanned)) != 0 {
			t.Errorf("told of the ban %d times, and %d times more", len(told), len(n.log.find(noMore, api.NodeBanned)))
		}

		n.stop()
		n = startNode(t, s, here, counted)
		until(t, 5*time.Second, "word of the ban after a restart", func() bool { return n.metric("signet_agent_banned") == 1 })
		dials.Store(0)
		time.Sleep(30 * time.Minute)
		if asked := dials.Load(); asked < 10 || asked > 40 {
			t.Errorf("a restarted agent asked the CA %d times in half an hour", asked)
		}
		withAdmin(t, s, func(c apiv1.AdminClient) {
			if _, err := c.AllowNode(t.Context(), &apiv1.AllowNodeRequest{Node: here}); err != nil {
				t.Fatal(api.FromStatus(err))
			}
		})
		until(t, 3*time.Minute, "session", func() bool { return n.metric("signet_agent_connected") == 1 })
		if n.metric("signet_agent_banned") != 0 || len(n.NotReady()) > 0 || len(n.log.find("this node is not banned any more", "")) != 1 {
			t.Errorf("allowed, the agent misses %q", n.NotReady())
		}
		id, _ = n.keepFresh(newWorkload(s, "web-3", here))
		await(t, id, time.Minute, "SVID", hasSVID)
	})
}
