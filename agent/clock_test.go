package agent_test

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/agent"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca/catest"
)

// A CA whose certificate is not valid by the clock here is not believed, and the log says which clock is off, with both
// times. That is said of nobody else's certificate.
//
// threat: B08, K01, K02
func TestClockSkew(t *testing.T) {
	const day = 24 * time.Hour
	for _, tt := range []struct {
		name     string
		stranger bool
		from, to time.Duration
		want     api.Reason
		says     string
	}{
		{"five minutes behind", false, 5 * time.Minute, day, api.ClockSkew, "this node's clock says 2000-01-01T00:00:0"},
		{"an hour behind", false, time.Hour, day, api.ClockSkew, "and is behind by 1h0m0s or more: the CA's certificate is valid from 2000-01-01T01:00:00Z to 2000-01-02T00:00:00Z"},
		{"ahead", false, -40 * time.Second, -20 * time.Second, api.ClockSkew, "and is ahead by 20s or more: the CA's certificate is valid from 1999-12-31T23:59:20Z to 1999-12-31T23:59:40Z"},
		{"a stranger's", true, time.Hour, day, api.CAUnavailable, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var shown tls.Certificate
				f := newFake(t, replicaID, func(c *tls.Config) {
					c.Certificates, c.GetCertificate = nil, func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &shown, nil }
				})
				r, now := f.root, time.Now()
				if tt.stranger {
					r = newRoot(t)
				}
				shown.PrivateKey = newKey(t)
				shown.Certificate = r.svid(leaf(replicaID, func(c *x509.Certificate) {
					c.NotBefore, c.NotAfter = now.Add(tt.from), now.Add(tt.to)
				}), shown.PrivateKey.(crypto.Signer).Public())
				n := f.start()
				time.Sleep(time.Minute)
				said := n.log.find(noMore, tt.want)
				if len(said) == 0 || n.metric("signet_agent_connected") != 0 {
					t.Fatalf("nothing was said; others: %v", n.log.find(noMore, ""))
				}
				if got := said[0].attrs["detail"]; !strings.Contains(got, tt.says) {
					t.Errorf("it says %q, want %q", got, tt.says)
				}
			})
		})
	}
}

// What is in the cache and is not good yet is not used, but it is not thrown away either: it is the clock that is wrong.
//
// threat: K04
func TestCacheOfTheFuture(t *testing.T) {
	m := newMemory()
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) {
		time.Sleep(25 * time.Hour)
		filling, _, _ := filled(t, s)
		m.entries = filling.entries
	})
	bubble(t, catest.Options{}, func(t *testing.T, s *catest.Server) { // it begins when the first one did
		before := m.names()
		n := newNode(t, s, here, func(c *agent.Config) { c.Cache = m })
		if n.metric("signet_agent_svids") != 0 || len(m.names()) != len(before) {
			t.Errorf("%v SVIDs are held, and of %q there are left %q", n.metric("signet_agent_svids"), before, m.names())
		}
		if said := n.log.find(notUsed, ""); len(said) != 3 || !strings.Contains(said[0].attrs["error"], "behind by 24h59m") {
			t.Errorf("it says %v", said)
		}
		time.Sleep(25 * time.Hour) // the clock is right again
		n = newNode(t, s, here, func(c *agent.Config) { c.Cache = m })
		if n.metric("signet_agent_svids") != 2 {
			t.Errorf("%v SVIDs are held after that", n.metric("signet_agent_svids"))
		}
	})
}
