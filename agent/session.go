package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/internal/run"
)

// credential is the agent's own identity.
type credential struct {
	svid    *x509svid.SVID
	nodeUID string
	renewAt time.Time
	ticket  []byte // came with svid; nil where it has none
}

func (c *credential) good(now time.Time) bool {
	return c != nil && until(c.renewAt, now) > 0 && now.Before(c.svid.Certificates[0].NotAfter)
}

// link is one connection with a live session on it.
type link struct {
	client apiv1.AuthorityClient
	calls  sync.WaitGroup // Issue calls in flight, and who waits for their answers: the connection is closed after them
	asks   asks

	mu    sync.Mutex
	ended bool // no new calls
}

// keepSession keeps one session with the CA, with backoff between failures, until ctx ends.
func (a *Agent) keepSession(ctx context.Context) error {
	b := a.newBackoff()
	for ctx.Err() == nil {
		began := time.Now()
		err := a.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil || api.ReasonOf(err) == api.SessionEnded && time.Since(began) > b.InitialInterval {
			b.Reset()
			continue // a planned end: the next session begins at once
		}
		if time.Since(began) > a.cfg.MaxBackoff {
			b.Reset()
		}
		e := api.AsError(err)
		wait := max(b.NextBackOff(), min(e.RetryAfter, maxRetryAfter))
		a.metrics.sessionFailures.Inc()
		a.trouble.Set(e)
		if e.Reason == api.NodeBanned {
			wait = max(wait, bannedRetry)
			a.noteBan(ctx, e)
		} else {
			a.log.WarnContext(ctx, "no session with the CA", attrs(e, "retry_in", wait.String())...)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return nil
}

// session attests the agent where that is due, opens a session and serves it to its end. It returns nil when the agent has
// a fresh identity, with which the next session is opened.
func (a *Agent) session(ctx context.Context) error {
	self, err := a.identify(ctx)
	if err != nil {
		return err
	}
	conn, err := a.dial(self.svid)
	if err != nil {
		return err
	}
	l := &link{client: apiv1.NewAuthorityClient(conn)}
	defer func() {
		l.calls.Wait()
		conn.Close()
	}()
	ctx, cancel := context.WithDeadline(ctx, self.svid.Certificates[0].NotAfter)
	defer cancel()
	stream, err := a.open(ctx, cancel, l.client, self.ticket)
	if err = conn.why(err); err != nil {
		if e := api.AsError(err); final(e) && e.Reason != api.NodeBanned || conn.refused.Load() {
			// The CA does not believe the identity that it gave us, or not for this node, or it trusts the root no more under which that
			// is: the next try begins with a new one.
			a.self.Set(&credential{svid: self.svid, nodeUID: self.nodeUID, ticket: self.ticket})
		}
		return err
	}
	a.noteAllowed(ctx)
	if e := a.trouble.Load(); e != nil && e.Reason == api.ProtocolSkew {
		a.trouble.Set(nil) // one of the two was upgraded
	}
	a.metrics.connected.Set(1)
	defer a.metrics.connected.Set(0)
	a.link.Set(l)
	defer a.unlink(l)
	return a.serve(ctx, cancel, l, stream)
}

// identify returns the agent's own identity, a fresh one where that is due, or where its root is in the bundle no more: the CA refuses
// that, and its word for it may be lost with the connection. What is held is kept while there is no other.
func (a *Agent) identify(ctx context.Context) (*credential, error) {
	self := a.self.Load()
	if self.good(time.Now()) && a.trusted(self.svid.Certificates) {
		return self, nil
	}
	fresh, err := a.attestSelf(ctx)
	switch {
	case err == nil:
		return fresh, nil
	case self == nil || !time.Now().Before(self.svid.Certificates[0].NotAfter), api.ReasonOf(err) == api.NodeBanned:
		return nil, err
	}
	a.log.WarnContext(ctx, "own identity not renewed, keeping it", attrs(api.AsError(err))...)
	return self, nil
}

// unlink lets nobody begin a call on a connection any more.
func (a *Agent) unlink(l *link) {
	a.link.Set(nil)
	l.end()
}

// attestSelf obtains the agent's own SVID with its own token, over a connection without a client certificate, and installs
// it.
func (a *Agent) attestSelf(ctx context.Context) (*credential, error) {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.IssueTimeout)
	defer cancel()
	e, err := a.cfg.Prover.Prove(ctx)
	if err != nil {
		return nil, err
	}
	key, csr, err := newKey()
	if err != nil {
		return nil, err
	}
	request := &apiv1.AttestAgentRequest{Evidence: &apiv1.Evidence{Kind: e.Kind, Data: e.Data}, Csr: csr,
		Protocol: a.protocols.Newest, OldestProtocol: a.protocols.Oldest}
	resp, err := a.callAttest(ctx, nil, request)
	if self := a.self.Load(); ticketHelps(err) && self != nil && self.ticket != nil && time.Now().Before(self.svid.Certificates[0].NotAfter) {
		// Where its cluster is away the CA may take what is held for it: the ticket, and the key behind this connection.
		request.Renewal = &apiv1.Renewal{Ticket: self.ticket}
		resp, err = a.callAttest(ctx, self.svid, request)
	}
	if err != nil {
		return nil, err
	}
	if err := a.applyTrust(resp.GetBundle()); err != nil {
		return nil, err
	}
	svid, err := a.accept(resp.GetChain(), key)
	if err != nil {
		return nil, err
	}
	nodeUID, ok := api.NodeUID(svid.ID, a.cfg.TrustDomain)
	if !ok {
		return nil, api.E(api.SVIDRejected, "the CA answered with an identity that is not an agent's")
	}
	c := &credential{svid: svid, nodeUID: nodeUID, ticket: a.ticket(resp.GetTicket(), svid.ID.String()), renewAt: renewAt(resp.GetRenewAt(), svid.Certificates[0], time.Now())}
	a.self.Set(c)
	a.cacheSelf(c)
	a.metrics.selfEnd.Set(float64(svid.Certificates[0].NotAfter.Unix()))
	a.log.InfoContext(ctx, "agent attested", "spiffe_id", svid.ID.String(), "not_after", svid.Certificates[0].NotAfter, "renew_at", c.renewAt)
	return c, nil
}

// callAttest asks for the agent's SVID, over a connection of its own that shows svid, or nothing.
func (a *Agent) callAttest(ctx context.Context, svid *x509svid.SVID, r *apiv1.AttestAgentRequest) (*apiv1.AttestAgentResponse, error) {
	conn, err := a.dial(svid)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	resp, err := apiv1.NewAuthorityClient(conn).AttestAgent(ctx, r, grpc.WaitForReady(false))
	if err != nil {
		return nil, conn.why(api.FromStatus(err))
	}
	return resp, nil
}

// What the CA may send ahead of its reader: more than a full batch of SVIDs.
const (
	streamWindow = 512 << 10
	connWindow   = 1 << 20
)

// dial makes a connection to the CA, which is known by its SPIFFE ID under the newest bundle; with an SVID the agent
// shows who it is.
func (a *Agent) dial(svid *x509svid.SVID) (conn, error) {
	replica := func(id spiffeid.ID, _ [][]*x509.Certificate) error {
		if !api.IsReplica(id, a.cfg.TrustDomain) {
			return errors.New("the server is not a CA of this trust domain")
		}
		return nil
	}
	var config *tls.Config
	if svid == nil {
		config = tlsconfig.TLSClientConfig(a, replica)
	} else {
		config = tlsconfig.MTLSClientConfig(svid, a, replica)
	}
	config.MinVersion = tls.VersionTLS13
	config.SessionTicketsDisabled = true
	skew, refused := new(atomic.Pointer[api.Error]), new(atomic.Bool)
	config.VerifyPeerCertificate = a.noteSkew(config.VerifyPeerCertificate, skew)
	c, err := grpc.NewClient("passthrough:///ca",
		grpc.WithTransportCredentials(noteRefusal{credentials.NewTLS(config), refused}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.cfg.Dial(ctx) }),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: a.cfg.Keepalive, Timeout: 10 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(8<<20)),
		// Without an estimate of the network's width, for which each answer would cost the CA a ping and its echo.
		grpc.WithStaticStreamWindowSize(streamWindow),
		grpc.WithStaticConnWindowSize(connWindow),
		grpc.WithDisableServiceConfig(),
	)
	return conn{c, skew, refused}, err
}

// open opens a session and waits for its Welcome and for the bundle that comes behind it: bundle before SVID, always. A CA
// that takes longer than a request may is given up; cancel must end ctx.
func (a *Agent) open(ctx context.Context, cancel context.CancelFunc, c apiv1.AuthorityClient, ticket []byte) (apiv1.Authority_SessionClient, error) {
	patience := time.AfterFunc(a.cfg.IssueTimeout, cancel)
	stream, err := a.handshake(ctx, c, ticket)
	if !patience.Stop() {
		return nil, api.E(api.DeadlineExceeded, "the CA did not open the session within %s", a.cfg.IssueTimeout)
	}
	return stream, err
}

func (a *Agent) handshake(ctx context.Context, c apiv1.AuthorityClient, ticket []byte) (apiv1.Authority_SessionClient, error) {
	e, err := a.cfg.Prover.Prove(ctx)
	if err != nil {
		return nil, err
	}
	stream, err := c.Session(ctx)
	if err != nil {
		return nil, api.FromStatus(err)
	}
	hello := &apiv1.Hello{
		Protocol: a.protocols.Newest, OldestProtocol: a.protocols.Oldest, Version: a.cfg.Version,
		Evidence: &apiv1.Evidence{Kind: e.Kind, Data: e.Data}, Ticket: ticket,
	}
	if err := stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Hello{Hello: hello}}); err != nil {
		_, err = stream.Recv() // the reason comes with the next read
		return nil, api.FromStatus(err)
	}
	m, err := stream.Recv()
	if err != nil {
		return nil, api.FromStatus(err)
	}
	w := m.GetWelcome()
	switch {
	case w == nil:
		return nil, api.E(api.SessionProtocol, "the CA's first message was not Welcome")
	case a.protocols.Common(api.ProtocolsOf(w.GetProtocol(), 0)) == 0:
		return nil, api.E(api.ProtocolSkew, "the CA speaks protocol %d, this agent speaks %s: one of them has to be upgraded", w.GetProtocol(), a.protocols)
	case w.GetTrustDomain() != a.cfg.TrustDomain.Name():
		return nil, api.E(api.SessionProtocol, "the CA is of another trust domain")
	}
	m, err = stream.Recv()
	if err != nil {
		return nil, api.FromStatus(err)
	}
	if m.GetBundle() == nil {
		return nil, api.E(api.SessionProtocol, "the CA's second message was not the bundle")
	}
	if err := a.applyTrust(m.GetBundle()); err != nil {
		return nil, err
	}
	a.log.InfoContext(ctx, "session opened", "replica", w.GetReplica(), "protocol", w.GetProtocol(), "generation", a.trust.Load().Generation.String())
	return stream, nil
}

// serve takes what the CA pushes, reports what changed and renews the agent's own identity, until the stream ends or there
// is a fresh one (nil). cancel must end the stream.
func (a *Agent) serve(ctx context.Context, cancel context.CancelFunc, l *link, stream apiv1.Authority_SessionClient) error {
	renewed := false
	ended := make(chan error, 1) // run.All drops the cause of an ended context, so the stream's end is kept here
	err := run.All(ctx,
		run.Task{Name: "receive", Run: func(context.Context) error {
			defer cancel()
			ended <- a.receive(stream)
			a.unlink(l) // first, so that nobody who is told that there is no session finds this one
			l.abandon()
			return nil
		}},
		run.Task{Name: "report", Run: func(ctx context.Context) error {
			return a.report(ctx, stream)
		}},
		run.Task{Name: "renew", Run: func(ctx context.Context) error {
			if renewed = a.renewSelf(ctx); renewed {
				a.unlink(l)
				l.calls.Wait() // on this connection they are still good
				cancel()
			}
			return nil
		}},
	)
	cancel()
	if renewed {
		return nil
	}
	if err != nil {
		return err
	}
	return <-ended
}

// renewSelf renews the agent's own identity when that is due, while the session goes on, and returns true when it has a
// fresh one; false when ctx ended.
func (a *Agent) renewSelf(ctx context.Context) bool {
	b := a.newBackoff()
	for at := a.self.Load().renewAt; ; at = time.Now().Add(b.NextBackOff()) {
		for wait := until(at, time.Now()); wait > 0; wait = until(at, time.Now()) {
			select {
			case <-ctx.Done():
				return false
			case <-time.After(min(wait, maxSleep)):
			case order := <-a.hurry:
				if order.Before(at) {
					at = order
				}
			}
		}
		_, err := a.attestSelf(ctx)
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		a.log.WarnContext(ctx, "own identity not renewed, keeping it", attrs(api.AsError(err))...)
	}
}

func (a *Agent) receive(stream apiv1.Authority_SessionClient) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return api.FromStatus(err)
		}
		switch {
		case m.GetBundle() != nil:
			if err := a.applyTrust(m.GetBundle()); err != nil {
				return err
			}
		case m.GetKeySets() != nil:
			a.applyKeySets(m.GetKeySets())
			a.applyAway(m.GetKeySets())
		case m.GetReissue() != nil:
			a.applyReissue(m.GetReissue())
		}
	}
}

// applyKeySets takes over the issuers' key sets, by which Admit checks tokens. Where they cannot be used, the last good ones
// stay: the session is worth more than they are.
func (a *Agent) applyKeySets(p *apiv1.KeySets) {
	sets := KeySets{}
	for _, s := range p.GetSets() {
		sets[s.GetIssuer()] = s.GetJwks()
	}
	v, err := a.cfg.Verifier(sets)
	if err != nil {
		a.log.Error("the CA sent key sets that cannot be used, keeping the last good ones", "error", err)
		return
	}
	a.verifier.Set(v)
	a.cacheKeySets(sets)
}

// errNoSession is that of acquire: it says nothing of the workload, nor of the CA's answer to it.
var errNoSession error = api.E(api.CAUnavailable, "there is no session with the CA")

// acquire waits for a session and enters a call on it, which ends with link.calls.Done.
func (a *Agent) acquire(ctx context.Context) (*link, error) {
	for {
		l, changed := a.link.Get()
		if l != nil && l.enter() {
			return l, nil
		}
		select {
		case <-ctx.Done():
			return nil, errNoSession
		case <-changed:
		}
	}
}

// enter begins a call; false when the session has ended.
func (l *link) enter() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended {
		l.calls.Add(1)
	}
	return !l.ended
}

func (l *link) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
}
