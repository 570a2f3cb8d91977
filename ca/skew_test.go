package ca_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/journal"
)

// TestProtocolSkew has agents of other versions ask: what both sides speak is spoken, and who is too far away is refused, and
// told which of the two has to be upgraded.
//
// threat: E23
func TestProtocolSkew(t *testing.T) {
	for _, tc := range []struct {
		name           string
		ca             api.Protocols
		newest, oldest uint32 // that the agent speaks
		want           uint32 // 0: it is refused
		says           string
	}{
		{"the build before this field", api.SpokenProtocols(), 1, 0, 1, ""},
		{"one behind", api.Protocols{Oldest: 2, Newest: 3}, 2, 1, 2, ""},
		{"one ahead", api.Protocols{Oldest: 2, Newest: 3}, 4, 3, 3, ""},
		{"the same", api.Protocols{Oldest: 2, Newest: 3}, 3, 2, 3, ""},
		{"two behind", api.Protocols{Oldest: 2, Newest: 3}, 1, 1, 0, "the agent speaks protocol 1, this CA speaks 2 to 3: the agent has to be upgraded"},
		{"two behind, of a build that tells no oldest", api.Protocols{Oldest: 2, Newest: 3}, 1, 0, 0, "the agent has to be upgraded"},
		{"two ahead", api.Protocols{Oldest: 2, Newest: 3}, 5, 4, 0, "the agent speaks protocol 4 to 5, this CA speaks 2 to 3: the CA has to be upgraded"},
		{"none", api.Protocols{Oldest: 2, Newest: 3}, 0, 0, 0, "the agent has to be upgraded"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := start(t, catest.Options{})
			n := newNode(t, s, "node-1")
			s.CA().Speak(tc.ca)
			before := len(ledgerOf(t, s))

			_, _, err := n.attest(func(r *apiv1.AttestAgentRequest) { r.Protocol, r.OldestProtocol = tc.newest, tc.oldest })
			hello := n.hello()
			hello.GetHello().Protocol, hello.GetHello().OldestProtocol = tc.newest, tc.oldest
			stream, serr := apiv1.NewAuthorityClient(dial(t, s, n.svid)).Session(t.Context())
			if serr != nil {
				t.Fatal(serr)
			}
			if err := stream.Send(hello); err != nil {
				t.Fatal(err)
			}
			first, serr := stream.Recv()
			if tc.want == 0 {
				for _, err := range []error{err, api.FromStatus(serr)} {
					wantReason(t, err, api.ProtocolSkew)
					if !strings.Contains(fmt.Sprint(err), tc.says) {
						t.Errorf("it is told %v", err)
					}
				}
				// Who has shown an SVID is known: the refusal of his session is on record.
				found := ledgerOf(t, s)[before:]
				if len(found) != 1 || found[0].Reason != string(api.ProtocolSkew) || found[0].CallerNodeUID != n.pod.NodeUID || found[0].Method != "Session" {
					t.Errorf("on record: %+v", found)
				}
				return
			}
			if err != nil || serr != nil {
				t.Fatalf("refused: %v, %v", err, serr)
			}
			if got := first.GetWelcome().GetProtocol(); got != tc.want {
				t.Errorf("they speak %d, want %d", got, tc.want)
			}
			l, err := adminOf(t, s.CA()).ListNodes(t.Context(), &apiv1.ListNodesRequest{})
			if err != nil || len(l.GetNodes()) != 1 || l.GetNodes()[0].GetProtocol() != tc.want {
				t.Errorf("the operator is told %v, %v", l.GetNodes(), err)
			}
			st, err := adminOf(t, s.CA()).GetStatus(t.Context(), &apiv1.GetStatusRequest{})
			if err != nil || (api.Protocols{Oldest: st.GetOldestProtocol(), Newest: st.GetProtocol()}) != tc.ca {
				t.Errorf("the operator is told %v, %v", st, err)
			}
		})
	}
}

// TestPublishSchema: with the bundle goes the schema of the record, at once when it rises, so that whoever replaces this CA by
// an older one can tell beforehand whether that reads the record.
//
// threat: E23
func TestPublishSchema(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		p := &published{}
		b := newBare(t, func(cfg *ca.Config) { cfg.Publisher = p })
		b.store.journal.Schema = 1 // and without a seal key it makes no key of tickets, which would raise it
		b.start()
		if got := p.all(); len(got) != 1 || got[0].RecordSchema != 1 {
			t.Fatalf("published %+v", got)
		}
		if b.ca.Bundle().RecordSchema != 0 {
			t.Error("it is told to others than the publisher")
		}
		b.store.mu.Lock()
		b.store.journal.Schema = journal.Schema
		b.store.mu.Unlock()
		if err := b.ca.Reload(t.Context()); err != nil { // as where another replica has raised it
			t.Fatal(err)
		}
		synctest.Wait()
		if got := p.all(); len(got) != 2 || got[1].RecordSchema != journal.Schema || got[1].Generation != got[0].Generation {
			t.Fatalf("published %+v", got)
		}
		if err := b.ca.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := p.all(); len(got) != 2 {
			t.Errorf("a change that raises nothing is published: %+v", got)
		}
	})
}
