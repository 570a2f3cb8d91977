package agent

import (
	"crypto/x509"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"

	"github.com/signet-ca/signet/api"
)

// The clock of a node may be wrong, be set, or have stood still while the machine slept. What is held ends by the wall
// clock, as for everybody who verifies it. When something is due is asked of both clocks, so that neither a long sleep nor
// a clock that was set back delays it. And where what the CA shows is not valid by the clock here, nothing of it is
// believed, but the reason is said with both times: what else would be seen of it is a handshake that fails.

// maxSleep bounds every long wait. The timers of a machine that was suspended, or whose clock was set, are late by as much.
const maxSleep = 20 * time.Second

// until is the time from now to at: what the clock that is nearer to it says.
func until(at, now time.Time) time.Duration {
	return min(at.Sub(now), at.Round(0).Sub(now.Round(0)))
}

// clockSkew returns ClockSkew where a chain of the CA is good in everything but that its leaf is not valid by the clock here;
// nil where that is not what is wrong. What names the leaf.
func (a *Agent) clockSkew(chain []*x509.Certificate, what string, now time.Time) *api.Error {
	leaf := chain[0]
	said, by := "behind", leaf.NotBefore.Sub(now)
	if by <= 0 {
		said, by = "ahead", now.Sub(leaf.NotAfter)
	}
	if by <= 0 {
		return nil
	}
	if _, _, err := x509svid.Verify(chain, a.trust.Load().Bundle, x509svid.WithTime(leaf.NotBefore)); err != nil {
		return nil
	}
	return api.E(api.ClockSkew, "this node's clock says %s and is %s by %s or more: %s is valid from %s to %s",
		now.UTC().Format(time.RFC3339), said, (by + time.Second - 1).Truncate(time.Second), what,
		leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339))
}

// conn is a connection to the CA that knows whether it failed because of the clock, or of what the agent showed.
type conn struct {
	*grpc.ClientConn
	skew    *atomic.Pointer[api.Error]
	refused *atomic.Bool
}

// why returns err, a call's, or what is behind it.
func (c conn) why(err error) error {
	if e := c.skew.Load(); err != nil && e != nil {
		return e
	}
	return err
}

// verifyPeer is what crypto/tls asks about the server's certificates.
type verifyPeer = func(raw [][]byte, chains [][]*x509.Certificate) error

// noteSkew is verify that notes in skew where only the clock is wrong, and that asks once more where the published bundle is newer than
// the one by which it failed.
func (a *Agent) noteSkew(verify verifyPeer, skew *atomic.Pointer[api.Error]) verifyPeer {
	return func(raw [][]byte, chains [][]*x509.Certificate) error {
		err := verify(raw, chains)
		if err == nil {
			return nil
		}
		certs, perr := parseChain(raw)
		if perr != nil {
			return err
		}
		if e := a.clockSkew(certs, "the CA's certificate", time.Now()); e != nil {
			skew.Store(e)
			return err
		}
		if a.takePublished() {
			return verify(raw, chains)
		}
		return err
	}
}

// parseChain parses the certificates of a chain, leaf first; at least one.
func parseChain(raw [][]byte) ([]*x509.Certificate, error) {
	if len(raw) == 0 || len(raw) > maxChain {
		return nil, fmt.Errorf("the chain has %d certificates, want 1 to %d", len(raw), maxChain)
	}
	var certs []*x509.Certificate
	for _, der := range raw {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	return certs, nil
}
