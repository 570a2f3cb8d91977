package ca_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/catest"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/internal/audit"
)

// TestBanBetween bans a node while what it asked for is under way: it gets nothing that comes after the ban's answer.
//
// threat: B06
func TestBanBetween(t *testing.T) {
	t.Run("while its SVID is put on record", func(t *testing.T) {
		catest.Bubble(t, func(t *testing.T) {
			s, ledger := gated(t)
			n := newNode(t, s, "node-1")
			l := n.session()
			held, release := make(chan struct{}), make(chan struct{})
			ledger.set(func(_ context.Context, e audit.Entry) error {
				if e.Kind == audit.KindIssue {
					close(held)
					<-release
				}
				return nil
			})
			item := n.item(s.Pod("shop", "web", "web", "node-1"))
			answer := make(chan error, 1)
			go func() {
				_, err := l.issue(item)
				answer <- err
			}()
			<-held
			banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: "node-1"})
			close(release)
			wantReason(t, <-answer, api.NodeBanned)
		})
	})
	for _, tt := range []struct {
		name string
		ask  func(*node) error
	}{
		{"while its session is opened", func(n *node) error { _, err := n.connect(nil); return err }},
		{"while it is attested", func(n *node) error { _, _, err := n.attest(nil); return err }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var armed atomic.Bool
			var s *catest.Server
			s = start(t, catest.Options{Config: func(cfg *ca.Config) {
				cfg.Directory = directoryFunc(func(ctx context.Context, id ca.PodID) (ca.Pod, error) {
					if armed.Swap(false) {
						banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: attestortest.NewPod("", "", "", "node-1").NodeUID})
					}
					return s.Pods.Pod(ctx, id)
				})
			}})
			n := newNode(t, s, "node-1")
			n.session()
			armed.Store(true)
			wantReason(t, tt.ask(n), api.NodeBanned)
			if found := listAudit(t, s.CA(), &apiv1.ListAuditRequest{Kinds: []string{"attest-agent"}}); len(found) != 1 {
				t.Errorf("on record as issued: %v", found)
			}
		})
	}
}

// directoryFunc is a ca.Directory.
type directoryFunc func(context.Context, ca.PodID) (ca.Pod, error)

// Pod implements ca.Directory.
func (f directoryFunc) Pod(ctx context.Context, id ca.PodID) (ca.Pod, error) { return f(ctx, id) }

// swapped is a store with something before each change of the record.
type swapped struct {
	ca.Store
	before func(ctx context.Context, old ca.Revision) error
}

// Swap implements ca.Store.
func (s *swapped) Swap(ctx context.Context, old ca.Revision, j journal.Journal) (ca.Revision, error) {
	if s.before != nil {
		if err := s.before(ctx, old); err != nil {
			return 0, err
		}
	}
	return s.Store.Swap(ctx, old, j)
}

// startSwapped starts a CA over such a store.
func startSwapped(t *testing.T) (*catest.Server, *swapped) {
	t.Helper()
	st := &swapped{}
	return start(t, catest.Options{Config: func(cfg *ca.Config) {
		st.Store = cfg.Store
		cfg.Store = st
	}}), st
}

// otherBan bans a node as another replica does.
func otherBan(ctx context.Context, st ca.Store, uid string) error {
	j, revision, err := st.Load(ctx)
	if err != nil {
		return err
	}
	j, err = j.WithBan(journal.Ban{Cluster: catest.IssuerName, NodeUID: uid, Node: "by-another", At: time.Now(), By: "another replica"})
	if err != nil {
		return err
	}
	_, err = st.Swap(ctx, revision, j)
	return err
}

// TestBanConflict bans while others change the record: no ban is lost, each is on record once, and a record that changes
// for ever is no reason to try for ever.
func TestBanConflict(t *testing.T) {
	s, st := startSwapped(t)
	newNode(t, s, "node-1").session()
	others := 0
	st.before = func(ctx context.Context, _ ca.Revision) error {
		if others++; others > 3 {
			return nil
		}
		return otherBan(ctx, st.Store, "other-"+string('0'+rune(others)))
	}
	if !banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: "node-1"}).GetChanged() {
		t.Error("nothing was changed")
	}
	if n := len(listNodes(t, s.CA())); n != 4 {
		t.Errorf("%d nodes are banned, want 4", n)
	}
	entries := listAudit(t, s.CA(), &apiv1.ListAuditRequest{Kinds: []string{"ban-node"}})
	if len(entries) != 1 {
		t.Errorf("on record: %v", entries)
	}
	n := newNode(t, s, "node-2")
	l := n.session()
	st.before = func(context.Context, ca.Revision) error { return api.E(api.StateConflict, "another was first") }
	_, err := adminOf(t, s.CA()).BanNode(t.Context(), &apiv1.BanNodeRequest{Node: "node-2"})
	wantReason(t, api.FromStatus(err), api.StateConflict)
	if _, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-2"))); err != nil {
		t.Errorf("a node that was not banned: %v", err)
	}
}

// TestBanOfAnotherReplica takes over what another replica stored: sessions end when the record is read anew.
func TestBanOfAnotherReplica(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s, st := startSwapped(t)
		n := newNode(t, s, "node-1")
		l := n.session()
		if err := otherBan(t.Context(), st.Store, n.pod.NodeUID); err != nil {
			t.Fatal(err)
		}
		if _, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1"))); err != nil {
			t.Errorf("before it is known here: %v", err)
		}
		if err := s.CA().Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantReason(t, l.end(), api.NodeBanned)
		if again := banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: n.pod.NodeUID}); again.GetChanged() || again.GetNode().GetBan().GetBy() != "another replica" {
			t.Errorf("banned once more: %v", again)
		}
		j, revision, err := st.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.Swap(t.Context(), revision, j.WithoutBan(catest.IssuerName, n.pod.NodeUID)); err != nil {
			t.Fatal(err)
		}
		if err := s.CA().Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.session()
	})
}

// TestBanNotStored does nothing by halves: what could not be put on record or stored is not in force, and a write of
// unknown outcome ends the process, which reads what is there.
func TestBanNotStored(t *testing.T) {
	t.Run("no room in the ledger", func(t *testing.T) {
		s, ledger := gated(t)
		n := newNode(t, s, "node-1")
		l := n.session()
		ledger.set(func(_ context.Context, e audit.Entry) error {
			if e.Kind == audit.KindBanNode {
				return audit.ErrFull
			}
			return nil
		})
		_, err := adminOf(t, s.CA()).BanNode(t.Context(), &apiv1.BanNodeRequest{Node: "node-1"})
		wantReason(t, api.FromStatus(err), api.LedgerFull)
		if nodes := listNodes(t, s.CA()); nodes[0].GetBan() != nil {
			t.Errorf("it is banned: %v", nodes)
		}
		if _, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1"))); err != nil {
			t.Error(err)
		}
	})
	t.Run("a store that is away", func(t *testing.T) {
		s, st := startSwapped(t)
		n := newNode(t, s, "node-1")
		l := n.session()
		st.before = func(context.Context, ca.Revision) error { return errors.New("no route to host") }
		if _, err := adminOf(t, s.CA()).BanNode(t.Context(), &apiv1.BanNodeRequest{Node: "node-1"}); err == nil {
			t.Error("a ban that was not stored")
		}
		if _, err := l.issue(n.item(s.Pod("shop", "web", "web", "node-1"))); err != nil {
			t.Error(err)
		}
	})
	t.Run("unknown outcome", func(t *testing.T) {
		catest.Bubble(t, func(t *testing.T) {
			b := newBare(t, func(cfg *ca.Config) {
				cfg.KeySets = map[string]ca.KeySets{catest.IssuerName: &changingKeys{}}
				cfg.Store = &swapped{cfg.Store, func(context.Context, ca.Revision) error { return api.E(api.StateUnknown, "the commit failed") }}
			})
			b.start()
			_, err := b.admin.BanNode(t.Context(), &apiv1.BanNodeRequest{Node: "12345678-1234-4234-8234-123456789abc"})
			wantReason(t, api.FromStatus(err), api.StateUnknown)
			wantReason(t, <-b.ended, api.StateUnknown)
		})
	})
}

// TestBanSurvivesKill has the ban in the store's file when the answer is there, whatever becomes of the process.
func TestBanSurvivesKill(t *testing.T) {
	s := start(t, catest.Options{})
	newNode(t, s, "node-1").session()
	banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: "node-1"})
	data, err := os.ReadFile(filepath.Join(s.Dir, "signet.db"))
	if err != nil {
		t.Fatal(err)
	}
	s.Kill()
	if err := os.WriteFile(filepath.Join(s.Dir, "signet.db"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	s.Start()
	s.WaitReady()
	n := &node{t: t, s: s, pod: s.AgentPod("node-1")}
	_, _, err = n.attest(nil)
	wantReason(t, err, api.NodeBanned)
}

// TestBannedConnections closes what a banned node has open, though its agent reads nothing and ends nothing.
//
// threat: B06, J14
func TestBannedConnections(t *testing.T) {
	catest.Bubble(t, func(t *testing.T) {
		s := start(t, catest.Options{})
		bad, good := newNode(t, s, "node-1"), newNode(t, s, "node-2")
		raw := map[*node]*tls.Conn{}
		for _, n := range []*node{bad, good} {
			conn, err := s.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			roots := x509bundle.FromX509Authorities(s.TD, s.CA().Bundle().Roots)
			config := tlsconfig.MTLSClientConfig(n.svid, roots, tlsconfig.AuthorizeAny())
			config.NextProtos = []string{"h2"}
			raw[n] = tls.Client(conn, config)
			t.Cleanup(func() { conn.Close() })
			// Nothing is read beyond the server's settings, and no frame is sent.
			if _, err := io.WriteString(raw[n], "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		began := time.Now()
		banNode(t, s.CA(), &apiv1.BanNodeRequest{Node: "node-1"})
		if _, err := io.Copy(io.Discard, raw[bad]); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Logf("the connection ended with %v", err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("the connection was closed after %s", took)
		}
		raw[good].SetReadDeadline(time.Now().Add(time.Minute))
		_, err := io.Copy(io.Discard, raw[good])
		if timeout, ok := errors.AsType[net.Error](err); !ok || !timeout.Timeout() {
			t.Errorf("the connection of another node: %v", err)
		}
		if s.CA().Conns(bad.pod.NodeUID) != 0 || s.CA().Conns(good.pod.NodeUID) != 1 {
			t.Errorf("%d and %d connections are kept", s.CA().Conns(bad.pod.NodeUID), s.CA().Conns(good.pod.NodeUID))
		}
	})
}
