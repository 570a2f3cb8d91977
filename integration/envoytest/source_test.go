package envoytest

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/internal/envoy"
	"github.com/signet-ca/signet/sds"
)

// follow keeps a Source fresh until the test ends.
func follow(t *testing.T, c *envoy.Client) *envoy.Source {
	t.Helper()
	s := envoy.NewSource(c)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { s.Follow(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return s
}

// patience is how long something real may take on a busy machine before a test gives up.
const patience = time.Minute

// eventually waits until ok, which something in another goroutine brings about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// A Source holds what the server pushed last, acknowledges it, and comes back with a fresh token when a stream ends.
func TestSource(t *testing.T) {
	for _, delta := range []bool{false, true} {
		t.Run(fmt.Sprintf("delta %v", delta), func(t *testing.T) {
			a := NewAuthority(t, spiffeid.RequireTrustDomainFromString("source.test"))
			id := spiffeid.RequireFromPath(a.Domain, "/ns/a/sa/b")
			opened := 0
			s := follow(t, &envoy.Client{Socket: a.Socket, Node: "me", Delta: delta, Token: func() (string, error) {
				opened++
				return fmt.Sprintf("%s %d", id, opened), nil
			}})
			if _, err := s.GetX509SVID(); err == nil {
				t.Error("there is an SVID before any was issued")
			}
			a.Issue(id)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if err := s.Ready(ctx); err != nil {
				t.Fatal(err)
			}
			for n := 1; n <= 3; n++ {
				eventually(t, fmt.Sprintf("SVID %d", n), func() bool { return s.Updates() == n })
				svid, err := s.GetX509SVID()
				if err != nil || svid.ID != id {
					t.Fatalf("%v, %v", svid, err)
				}
				if _, _, err := x509svid.Verify(svid.Certificates, s); err != nil {
					t.Error(err)
				}
				a.Issue(id)
			}
			eventually(t, "the last SVID", func() bool { return s.Updates() == 4 })
			a.EndStreams()
			eventually(t, "a second stream", func() bool { return s.Updates() == 5 })
			// Who comes in vain has taken a token, too, so it need not be the second one.
			if got, first := a.Tokens(), fmt.Sprintf("Bearer %s ", id); len(got) != 2 || got[0] == got[1] || !strings.HasPrefix(got[0], first) || !strings.HasPrefix(got[1], first) {
				t.Errorf("tokens %q, want two different ones", got)
			}
			eventually(t, "all to be acknowledged", func() bool {
				r := a.Streams()
				return len(r) == 2 && r[1].AckedSerial != "" && r[1].AckedGeneration == 1
			})
			for _, r := range a.Streams() {
				if r.Nacks != 0 || r.Proxy != "me" {
					t.Errorf("%+v", r)
				}
			}
		})
	}
}

// What apply refuses is a NACK, and the stream goes on.
func TestClientRefuses(t *testing.T) {
	for _, delta := range []bool{false, true} {
		t.Run(fmt.Sprintf("delta %v", delta), func(t *testing.T) {
			a := NewAuthority(t, spiffeid.RequireTrustDomainFromString("source.test"))
			id := spiffeid.RequireFromPath(a.Domain, "/ns/a/sa/b")
			a.Issue(id)
			ctx, cancel := context.WithCancel(t.Context())
			c := &envoy.Client{Socket: a.Socket, Delta: delta, Token: func() (string, error) { return id.String(), nil }}
			n := 0
			err := c.Watch(ctx, []string{sds.NameDefault}, func(*tlsv3.Secret) error {
				if n++; n == 1 {
					a.Issue(id)
					return fmt.Errorf("not this one")
				}
				cancel()
				return nil
			})
			if status.Code(err) != codes.Canceled || n != 2 {
				t.Errorf("%d secrets, then %v", n, err)
			}
			// The server reports what it was told after it has handed over what comes next.
			eventually(t, "the refusal to be reported", func() bool {
				r := a.Streams()
				return len(r) == 1 && r[0].Nacks > 0
			})
			if r := a.Streams(); r[0].Nacks != 1 {
				t.Errorf("%+v", r)
			}
		})
	}
}

// A Source that never got anything says why.
func TestSourceSaysWhatIsWrong(t *testing.T) {
	a := NewAuthority(t, spiffeid.RequireTrustDomainFromString("source.test"))
	s := follow(t, &envoy.Client{Socket: a.Socket, Token: func() (string, error) { return "no ID", nil }})
	var err error
	for patience := 200 * time.Millisecond; patience < 30*time.Second; patience *= 2 { // a busy machine needs longer to be told
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		err = s.Ready(ctx)
		cancel()
		if err != nil && strings.Contains(err.Error(), codes.Unauthenticated.String()) {
			return
		}
	}
	t.Errorf("error %v", err)
}
