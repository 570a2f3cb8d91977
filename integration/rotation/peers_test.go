//go:build integration

package rotation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/signet-ca/signet/internal/envoy"
)

// peer is a workload that follows its SVID and bundle by SDS.
type peer struct {
	*envoy.Source
	name string
	id   spiffeid.ID
}

// peer starts a workload on the node of an agent, which has its first SVID when this returns.
func (w *world) peer(a *agent, name string, delta bool) *peer {
	w.t.Helper()
	id, token := w.workload(a, name)
	p := &peer{envoy.NewSource(w.client(a, name, token, delta)), name, id}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { p.Follow(ctx) })
	w.t.Cleanup(func() { stop(); wg.Wait() })
	first, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	if err := p.Ready(first); err != nil {
		w.t.Fatalf("%s has no SVID: %v", name, err)
	}
	return p
}

// expired tells whether the SVID that it has is.
func (p *peer) expired() bool {
	svid, err := p.GetX509SVID()
	return err != nil || !time.Now().Before(svid.Certificates[0].NotAfter)
}

// trusts tells whether a root is in the bundle that the peer has.
func (p *peer) trusts(root string) bool {
	b, err := p.GetX509BundleForTrustDomain(trustDomain)
	if err != nil {
		return false
	}
	for _, c := range b.X509Authorities() {
		if fmt.Sprintf("%x", c.SubjectKeyId) == root {
			return true
		}
	}
	return false
}

// under tells whether the SVID that the peer has was issued under a root.
func (p *peer) under(root string) bool {
	svid, err := p.GetX509SVID()
	return err == nil && slices.ContainsFunc(svid.Certificates, func(c *x509.Certificate) bool { return fmt.Sprintf("%x", c.AuthorityKeyId) == root })
}

// pair is two peers of which one connects to the other, again and again, each time anew.
type pair struct {
	client, server *peer
	address        string

	mu      sync.Mutex
	made    int
	failed  []error // while both SVIDs were good
	excused int     // while one was not
}

// pace is how long a pair pauses between two connections.
const pace = 25 * time.Millisecond

// connect has client connect to server until the test is over, and fails the test for each connection that fails.
func (w *world) connect(client, server *peer) *pair {
	w.t.Helper()
	config := tlsconfig.MTLSServerConfig(server, server, tlsconfig.AuthorizeID(client.id))
	config.SessionTicketsDisabled = true // a full handshake each time
	l, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		w.t.Fatal(err)
	}
	p := &pair{client: client, server: server, address: l.Addr().String()}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { serve(l) })
	wg.Go(func() { p.load(ctx) })
	w.t.Cleanup(func() {
		stop()
		l.Close()
		wg.Wait()
		p.judge(w.t)
	})
	return p
}

// serve says a word to who proved who he is, and it can only come after that.
func serve(l net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			io.WriteString(c, "hello")
		})
	}
}

func (p *pair) load(ctx context.Context) {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		stale := p.client.expired() || p.server.expired() // it may have another one once that has failed
		err := p.once(ctx)
		if ctx.Err() != nil {
			return
		}
		p.mu.Lock()
		switch p.made++; {
		case err == nil:
		case stale || p.client.expired() || p.server.expired():
			p.excused++
		default:
			p.failed = append(p.failed, fmt.Errorf("%s: %w", time.Now().UTC().Format("15:04:05.000"), err))
		}
		p.mu.Unlock()
	}
}

// once makes one connection.
func (p *pair) once(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	d := tls.Dialer{Config: tlsconfig.MTLSClientConfig(p.client, p.client, tlsconfig.AuthorizeID(p.server.id))}
	c, err := d.DialContext(ctx, "tcp", p.address)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	_, err = io.ReadAll(c)
	return err
}

// count is how many connections were made, and how many of them could not be while an SVID had expired.
func (p *pair) count() (made, excused int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.made, p.excused
}

// more waits until so many connections were made from now on.
func (p *pair) more(t testing.TB, n int) {
	t.Helper()
	from, _ := p.count()
	eventually(t, fmt.Sprintf("%d more connections from %s to %s", n, p.client.name, p.server.name), func(context.Context) error {
		if made, _ := p.count(); made < from+n {
			return fmt.Errorf("%d so far", made-from)
		}
		return nil
	})
}

func (p *pair) judge(t testing.TB) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.failed) > 0 || p.made == 0 {
		t.Errorf("%s to %s: of %d connections %d failed, the first with %v", p.client.name, p.server.name, p.made, len(p.failed), p.failed[:min(len(p.failed), 3)])
	}
	t.Logf("%s to %s: %d connections, %d failed, %d while an SVID had expired", p.client.name, p.server.name, p.made, len(p.failed), p.excused)
}
