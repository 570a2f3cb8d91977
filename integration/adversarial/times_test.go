package adversarial

import (
	"fmt"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca/catest"
)

// TestTimes asks with every mixture of times around the edges: expiry has no leeway, issue and start have five seconds,
// a life has a day. The clock stands still on a whole second, so an edge is an edge.
//
// threat: A04, A05, A06, K10
func TestTimes(t *testing.T) {
	const skew, longest = attestor.MaxSkew, attestor.DefaultMaxLifetime
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second)))
		now := time.Now()
		seconds := func(list ...int) (all []time.Duration) {
			for _, s := range list {
				all = append(all, time.Duration(s)*time.Second)
			}
			return all
		}
		day := int(longest / time.Second)
		for _, exp := range seconds(-3600, -61, -60, -59, -1, 0, 1, 60, 3600, day-1, day, day+1, 365*day) {
			for _, iat := range seconds(-day-1, -day, -day+1, -3600, -1, 0, 1, 4, 5, 6, 600) {
				for _, nbf := range append(seconds(-1, 0, 5, 6, 600), none) {
					var want []api.Reason
					if exp <= iat {
						want = append(want, api.TokenMalformed)
					}
					if exp <= 0 {
						want = append(want, api.TokenExpired)
					}
					if iat > skew || nbf > skew && nbf != none {
						want = append(want, api.TokenNotYetValid)
					}
					if exp-iat > longest {
						want = append(want, api.TokenTTLTooLong)
					}
					v := variant{row: "A04", name: fmt.Sprint("exp ", exp, ", iat ", iat, ", nbf ", nbf), want: want}
					if len(want) == 0 {
						v.harmless = "the token is good now"
					}
					v.item = r.item(r.token(at("exp", now.Add(exp)), at("iat", now.Add(iat)), func(d *attestortest.Draft) {
						if delete(d.Claims, "nbf"); nbf != none {
							d.Claims["nbf"] = now.Add(nbf).Unix()
						}
					}))
					r.ask(v)
				}
			}
		}
		if !time.Now().Equal(now) {
			t.Errorf("the clock went on by %s", time.Since(now))
		}
		r.tell(800)
	})
}

// none stands for a claim that is missing.
const none = time.Duration(1<<63 - 1)

func at(claim string, when time.Time) func(*attestortest.Draft) {
	return func(d *attestortest.Draft) { d.Claims[claim] = when.Unix() }
}

// TestTokenAges waits until a good token is not good any more. No leeway of whoever issued it is relied on.
//
// threat: A04
func TestTokenAges(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second)))
		token := r.token()
		for _, v := range []variant{
			{name: "a second before", row: "A04", item: r.item(token)},
			{name: "at its expiry", row: "A04", item: r.item(token), want: one(api.TokenExpired)},
		} {
			left := time.Hour - time.Second
			if len(v.want) > 0 {
				left = time.Second
			}
			time.Sleep(left)
			r.ask(v)
		}
	})
}
