package ca

import (
	"context"
	"crypto/tls"
	"time"

	"github.com/signet-ca/signet/api"
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
