package agent

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"math/rand/v2"
	"slices"
	"time"

	apiv1 "github.com/signet-ca/signet/api/v1"
)

// maxReissue bounds the time over which the CA can spread what it orders.
const maxReissue = time.Hour

// rootAbove returns the id of the root above a chain, lower-case hex: of the first certificate from the leaf upwards that one of the
// roots has issued, by its key id. The chain may go on to a root before that, which has signed this one. Where there is none, it is the
// id that the chain ends with.
func rootAbove(chain, roots []*x509.Certificate) string {
	last := ""
	for _, c := range chain {
		for _, r := range roots {
			if len(r.SubjectKeyId) > 0 && bytes.Equal(c.AuthorityKeyId, r.SubjectKeyId) {
				return hex.EncodeToString(r.SubjectKeyId)
			}
		}
		last = hex.EncodeToString(c.AuthorityKeyId)
	}
	return last
}

// trusted reports whether a chain is under a root of the bundle that is held.
func (a *Agent) trusted(chain []*x509.Certificate) bool {
	roots := a.trust.Load().Bundle.X509Authorities()
	root := rootAbove(chain, roots)
	return slices.ContainsFunc(roots, func(r *x509.Certificate) bool { return hex.EncodeToString(r.SubjectKeyId) == root })
}

// applyReissue has everything that is held under one of the roots of an order renewed at moments within the time that it gives. The
// root is compromised: what is under it cannot be told from what its thief makes.
func (a *Agent) applyReissue(r *apiv1.Reissue) {
	under := map[string]bool{}
	for _, id := range r.GetRootKeyIds() {
		under[id] = true
	}
	within := min(max(r.GetWithin().AsDuration(), time.Millisecond), maxReissue)
	a.shunned.Store(&shunned{under, within}) // before what is held is looked at: see replaceAtOnce
	renewed := a.hasten(under, a.trust.Load().Bundle.X509Authorities(), within)
	a.log.Warn("the CA orders to renew what is under a compromised root", "identities", renewed, "within", within.String())
}

// shunned are the compromised roots of an order, by id, and the time that it gives.
type shunned struct {
	roots  map[string]bool
	within time.Duration
}

// goneWithin is the time over which is renewed what is held under a root that was removed.
const goneWithin = 10 * time.Second

// hasten has everything that is held under one of the roots of under renewed at moments within that time, the agent's own SVID
// included, and returns of how many identities. Roots are those of the bundle in which they are.
func (a *Agent) hasten(under map[string]bool, roots []*x509.Certificate, within time.Duration) int {
	renewed := 0
	for _, id := range a.list() {
		h := id.held.Load()
		if h.SVID == nil || !under[rootAbove(h.SVID.Certificates, roots)] {
			continue
		}
		renewed++
		at := time.Now().Add(rand.N(within))
		id.set(func(h Held) Held {
			if h.RenewAt.After(at) {
				h.RenewAt = at
			}
			return h
		})
		select {
		case id.wake <- struct{}{}: // its keeper looks at the time anew
		default:
		}
	}
	if self := a.self.Load(); self != nil && under[rootAbove(self.svid.Certificates, roots)] {
		select {
		case a.hurry <- time.Now().Add(rand.N(within)):
		default:
		}
	}
	return renewed
}

// replaceAtOnce returns h, what an identity has just been given and holds, as it is then held: renewed soon where it is under a root
// that is compromised, or that the bundle has lost meanwhile. It was signed a moment before the CA signed under another one, and on its
// way when that was said. Where that comes again and again it is asked for ever more rarely.
func (a *Agent) replaceAtOnce(id *Identity, h Held) Held {
	good, within := a.trusted(h.SVID.Certificates), goneWithin
	if s := a.shunned.Load(); good && s != nil && s.roots[rootAbove(h.SVID.Certificates, a.trust.Load().Bundle.X509Authorities())] {
		good, within = false, s.within
	}
	if good {
		id.again = 0
		return h
	}
	at := time.Now().Add(rand.N(min(within<<min(id.again, 12), maxReissue)))
	id.again++
	id.set(func(h Held) Held {
		if h.RenewAt.After(at) {
			h.RenewAt = at
		}
		return h
	})
	return id.held.Load()
}
