package agent_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// TestProtocolSkew: an agent that its CA does not serve, or that does not understand its CA, goes on serving what it holds
// but is not ready, so that a rollout of such agents ends at the first; it says why, and is ready again when one of the two
// was upgraded.
//
// threat: E23
func TestProtocolSkew(t *testing.T) {
	for _, tc := range []struct {
		name string
		far  func(*fake)
		says string
	}{
		{"the CA does not understand the agent", func(f *fake) {
			f.refuse = api.ToStatus(api.E(api.ProtocolSkew, "the agent speaks protocol 1, this CA speaks 7: the agent has to be upgraded")).Err()
		}, "the agent has to be upgraded"},
		{"the agent does not understand the CA", func(f *fake) {
			f.session = []*apiv1.SessionResponse{welcome(func(w *apiv1.Welcome) { w.Protocol = 7 }), nil}
		}, "the CA speaks protocol 7, this agent speaks 1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t, replicaID)
				n := f.start()
				id := f.admit(n, "web-1")
				await(t, id, time.Minute, "SVID", hasSVID)
				if missing := n.NotReady(); len(missing) > 0 {
					t.Fatalf("not ready: %q", missing)
				}
				f.set(func() { tc.far(f) })
				f.push <- bundleMessage(bundle(0, 1, f.root)) // ends the session
				until(t, 2*time.Minute, "word of it", func() bool { return len(n.NotReady()) > 0 })
				missing := strings.Join(n.NotReady(), "; ")
				if !strings.Contains(missing, tc.says) || !strings.Contains(missing, "PROTOCOL_SKEW, SGN-0605") {
					t.Errorf("it says %q", missing)
				}
				if h := id.Held().Load(); h.SVID == nil || h.Refused() != nil {
					t.Error("it does not serve what it holds")
				}
				f.set(func() { f.session, f.refuse = nil, nil })
				until(t, 2*time.Minute, "session", func() bool { return n.metric("signet_agent_connected") == 1 })

				// What is over is not told again, when the CA merely goes away.
				f.set(func() { f.session = []*apiv1.SessionResponse{nil} })
				f.push <- bundleMessage(bundle(0, 1, f.root))
				until(t, 2*time.Minute, "end of the session", func() bool { return n.metric("signet_agent_connected") == 0 })
				for range 60 {
					if missing := n.NotReady(); len(missing) > 0 {
						t.Fatalf("the CA is away, and it is not ready: %q", missing)
					}
					time.Sleep(time.Second)
				}
			})
		})
	}
}
