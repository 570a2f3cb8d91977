package ca

import (
	"context"
	"crypto/tls"
	"fmt"
	"time"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// SetBundle replaces the trust bundle, as a rotation step does.
func (ca *CA) SetBundle(b *Bundle) { ca.bundle.Set(b) }

// Self returns the replica's own identity with its key, which never leaves the process but in a test.
func (ca *CA) Self() *tls.Certificate { return ca.signing.Load().self }

// RefreshSigning replaces what is due at that time.
func (ca *CA) RefreshSigning(ctx context.Context, now time.Time) error {
	return ca.refreshSigning(ctx, now)
}

// Speak says which protocols it speaks with agents from now on.
func (ca *CA) Speak(p api.Protocols) { ca.protocols = p }

// Reload reads the record anew, as where another replica changed it.
func (ca *CA) Reload(ctx context.Context) error { return ca.reload(ctx) }

// DropSessions forgets the sessions of a node, as their ends do.
func (ca *CA) DropSessions(nodeUID string) { ca.sessions.drop(nodeUID) }

// Conns returns how many connections of a node's agent are open.
func (ca *CA) Conns(nodeUID string) int {
	ca.conns.mu.Lock()
	defer ca.conns.mu.Unlock()
	return len(ca.conns.byNode[nodeUID])
}

// Keys returns how many keys of intermediates it follows.
func (ca *CA) Keys() int {
	ca.keys.mu.Lock()
	defer ca.keys.mu.Unlock()
	return len(ca.keys.of)
}

// Fill takes every turn of workloads and every place, for nodes that nobody has, whose requests are due in a minute. It is for a
// CA that does nothing else.
func (ca *CA) Fill(ctx context.Context, nodes int) {
	g, due := ca.work, time.Now().Add(time.Minute)
	for i := 0; ; i++ {
		if w, err := g.line(ctx, fmt.Sprint("node-of-nobody-", i%nodes), due.Add(time.Duration(i))); w == nil && err != nil {
			return
		}
	}
}

// IssueOne issues one item for the agent of a node that has a session.
func (ca *CA) IssueOne(ctx context.Context, nodeUID, nodeName string, item *apiv1.IssueItem) *apiv1.IssueResult {
	return (&authority{ca: ca}).issueItem(ctx, asker{nodeUID: nodeUID, nodeName: nodeName}, item)
}
