package agent

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"math/rand/v2"
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

// applyReissue has everything that is held under one of the roots of an order renewed at moments within the time that it gives. The
// root is compromised: what is under it cannot be told from what its thief makes.
func (a *Agent) applyReissue(r *apiv1.Reissue) {
	under := map[string]bool{}
	for _, id := range r.GetRootKeyIds() {
		under[id] = true
	}
	within := min(max(r.GetWithin().AsDuration(), time.Millisecond), maxReissue)
	roots := a.trust.Load().Bundle.X509Authorities()
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
	a.log.Warn("the CA orders to renew what is under a compromised root", "identities", renewed, "within", within.String())
}
