package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
	"github.com/signet-ca/signet/internal/run"
)

// credential is the agent's own identity.
type credential struct {
	svid    *x509svid.SVID
	nodeUID string
	renewAt time.Time
}

func (c *credential) good(now time.Time) bool {
	return c != nil && now.Before(c.renewAt) && now.Before(c.svid.Certificates[0].NotAfter)
}

// link is one connection with a live session on it.
type link struct {
	client apiv1.AuthorityClient
	calls  sync.WaitGroup // Issue calls in flight: the connection is closed after them

	mu    sync.Mutex
	ended bool // no new calls
}

// keepSession keeps one session with the CA, with backoff between failures, until ctx ends.
func (a *Agent) keepSession(ctx context.Context) error {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = a.cfg.MinBackoff, a.cfg.MaxBackoff
	b.RandomizationFactor = 0.5
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
		wait := b.NextBackOff()
		e := api.AsError(err)
		a.metrics.sessionFailures.Inc()
		a.log.WarnContext(ctx, "no session with the CA", "reason", string(e.Reason), "detail", e.Detail, "correlation_id", e.CorrelationID, "error", err, "retry_in", wait.String())
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return nil
}

// session attests the agent where that is due, opens a session and serves it to its end. It returns nil when the agent's
// own identity is due for renewal.
func (a *Agent) session(ctx context.Context) error {
	self := a.self.Load()
	if !self.good(time.Now()) {
		fresh, err := a.attestSelf(ctx)
		if err != nil {
			if self == nil || !time.Now().Before(self.svid.Certificates[0].NotAfter) {
				return err
			}
			a.log.WarnContext(ctx, "own identity not renewed, keeping it", "reason", string(api.ReasonOf(err)), "error", err)
			fresh = &credential{svid: self.svid, nodeUID: self.nodeUID, renewAt: time.Now().Add(a.cfg.MaxBackoff)}
		}
		self = fresh
		a.self.Set(self)
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
	stream, err := a.open(ctx, l.client)
	if err != nil {
		return err
	}
	renew := time.NewTimer(time.Until(self.renewAt))
	defer renew.Stop()
	a.metrics.connected.Set(1)
	defer a.metrics.connected.Set(0)
	a.link.Set(l)
	defer func() {
		a.link.Set(nil)
		l.end()
	}()
	return a.serve(ctx, stream, renew.C)
}

// attestSelf obtains the agent's own SVID with its own token, over a connection without a client certificate.
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
	conn, err := a.dial(nil)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	resp, err := apiv1.NewAuthorityClient(conn).AttestAgent(ctx, &apiv1.AttestAgentRequest{
		Evidence: &apiv1.Evidence{Kind: e.Kind, Data: e.Data},
		Csr:      csr,
		Protocol: api.Protocol,
	}, grpc.WaitForReady(false))
	if err != nil {
		return nil, api.FromStatus(err)
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
	c := &credential{svid: svid, nodeUID: nodeUID, renewAt: renewAt(resp.GetRenewAt(), svid.Certificates[0], time.Now())}
	a.cacheSelf(c)
	a.metrics.selfEnd.Set(float64(svid.Certificates[0].NotAfter.Unix()))
	a.log.InfoContext(ctx, "agent attested", "spiffe_id", svid.ID.String(), "not_after", svid.Certificates[0].NotAfter, "renew_at", c.renewAt)
	return c, nil
}

// dial makes a connection to the CA, which is known by its SPIFFE ID under the newest bundle; with an SVID the agent
// shows who it is.
func (a *Agent) dial(svid *x509svid.SVID) (*grpc.ClientConn, error) {
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
	return grpc.NewClient("passthrough:///ca",
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.cfg.Dial(ctx) }),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: a.cfg.Keepalive, Timeout: 10 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(8<<20)),
		grpc.WithDisableServiceConfig(),
	)
}

// open opens a session and waits for its Welcome and for the bundle that comes behind it: bundle before SVID, always.
func (a *Agent) open(ctx context.Context, c apiv1.AuthorityClient) (apiv1.Authority_SessionClient, error) {
	e, err := a.cfg.Prover.Prove(ctx)
	if err != nil {
		return nil, err
	}
	stream, err := c.Session(ctx)
	if err != nil {
		return nil, api.FromStatus(err)
	}
	hello := &apiv1.Hello{Protocol: api.Protocol, Version: a.cfg.Version, Evidence: &apiv1.Evidence{Kind: e.Kind, Data: e.Data}}
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
	case w.GetProtocol() != api.Protocol:
		return nil, api.E(api.ProtocolSkew, "the CA speaks protocol %d, this agent speaks %d", w.GetProtocol(), api.Protocol)
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
	a.log.InfoContext(ctx, "session opened", "replica", w.GetReplica(), "generation", a.trust.Load().Generation.String())
	return stream, nil
}

// serve takes what the CA pushes and reports what changed, until the stream ends, or renew fires (nil).
func (a *Agent) serve(ctx context.Context, stream apiv1.Authority_SessionClient, renew <-chan time.Time) error {
	ctx, cancel := context.WithCancel(ctx)
	planned := false
	ended := make(chan error, 1) // run.All drops the cause of an ended context, so the stream's end is kept here
	err := run.All(ctx,
		run.Task{Name: "receive", Run: func(context.Context) error {
			defer cancel()
			err := a.receive(stream)
			ended <- err
			return nil
		}},
		run.Task{Name: "report", Run: func(ctx context.Context) error {
			defer stream.CloseSend()
			return a.report(ctx, stream)
		}},
		run.Task{Name: "renew", Run: func(ctx context.Context) error {
			select {
			case <-ctx.Done():
			case <-renew:
				planned = true
				cancel()
			}
			return nil
		}},
	)
	cancel()
	if planned {
		return nil
	}
	if err != nil {
		return err
	}
	return <-ended
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
			if err := a.applyKeySets(m.GetKeySets()); err != nil {
				return err
			}
		}
	}
}

// applyKeySets takes over the issuers' key sets, by which Admit checks tokens.
func (a *Agent) applyKeySets(p *apiv1.KeySets) error {
	sets := KeySets{}
	for _, s := range p.GetSets() {
		sets[s.GetIssuer()] = s.GetJwks()
	}
	v, err := a.cfg.Verifier(sets)
	if err != nil {
		return api.Wrap(api.SessionProtocol, err, "the CA sent a key set that does not parse")
	}
	a.verifier.Set(v)
	a.cacheKeySets(sets)
	return nil
}

// report sends all that is held once, then what changed, coalesced.
func (a *Agent) report(ctx context.Context, stream apiv1.Authority_SessionClient) error {
	sent := map[string]*apiv1.Holding{}
	for full := true; ; full = false {
		_, changed := a.changed.Get()
		r := a.nextReport(sent, full)
		if r != nil {
			if err := stream.Send(&apiv1.SessionRequest{Message: &apiv1.SessionRequest_Report{Report: r}}); err != nil {
				return nil // the receiver learns why
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(a.cfg.ReportEvery):
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// nextReport returns what differs from sent, and brings sent up to date; nil when nothing does.
func (a *Agent) nextReport(sent map[string]*apiv1.Holding, full bool) *apiv1.Report {
	t := a.trust.Load()
	r := &apiv1.Report{Full: full, BundleEpoch: t.Generation.Epoch, BundleNumber: t.Generation.Number, BundleHash: t.Hash[:]}
	now := map[string]*apiv1.Holding{}
	for _, id := range a.list() {
		h := id.holding()
		now[h.GetKey()] = h
		if old := sent[h.GetKey()]; full || !proto.Equal(old, h) {
			r.Changed = append(r.Changed, h)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(sent)) {
		if now[k] == nil {
			r.Removed = append(r.Removed, k)
		}
	}
	clear(sent)
	maps.Copy(sent, now)
	return r
}

// linked is a signer over whatever session there is: it waits for one.
type linked struct{ a *Agent }

func (s linked) issue(ctx context.Context, item *apiv1.IssueItem) (*apiv1.SVID, error) {
	l, err := s.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer l.calls.Done()
	resp, err := l.client.Issue(ctx, &apiv1.IssueRequest{Items: []*apiv1.IssueItem{item}})
	if err != nil {
		return nil, api.FromStatus(err)
	}
	if len(resp.GetResults()) != 1 {
		return nil, api.E(api.SVIDRejected, "the CA answered one request with %d results", len(resp.GetResults()))
	}
	switch r := resp.GetResults()[0]; {
	case r.GetSvid() != nil:
		return r.GetSvid(), nil
	case r.GetRefusal() != nil:
		reason := api.Reason(r.GetRefusal().GetReason())
		if !reason.Known() {
			return nil, api.E(api.Internal, "the CA refused with a reason that this agent does not know")
		}
		return nil, &api.Error{Reason: reason, Detail: r.GetRefusal().GetMessage(), CorrelationID: r.GetRefusal().GetCorrelationId()}
	}
	return nil, api.E(api.SVIDRejected, "the CA's result is empty")
}

// acquire waits for a session and enters a call on it.
func (s linked) acquire(ctx context.Context) (*link, error) {
	for {
		l, changed := s.a.link.Get()
		if l != nil && l.enter() {
			return l, nil
		}
		select {
		case <-ctx.Done():
			return nil, api.E(api.CAUnavailable, "there is no session with the CA")
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
