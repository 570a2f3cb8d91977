package agent

import (
	"context"
	"time"

	"github.com/signet-ca/signet/api"
)

// bannedRetry is the least time between two questions whether the node is still banned: somebody has to allow it, and that
// takes minutes. The CA says a time of its own with each answer.
const bannedRetry = time.Minute

// noteBan notes that the CA has banned this node, and says so once.
func (a *Agent) noteBan(ctx context.Context, e *api.Error) {
	if a.banned.Swap(true) {
		return
	}
	a.metrics.banned.Set(1)
	a.log.ErrorContext(ctx, "this node is banned: what is held is served until it expires, and nothing is renewed", attrs(e)...)
}

// noteAllowed notes that the CA has opened a session.
func (a *Agent) noteAllowed(ctx context.Context) {
	if a.banned.Swap(false) {
		a.metrics.banned.Set(0)
		a.log.InfoContext(ctx, "this node is not banned any more")
	}
}
