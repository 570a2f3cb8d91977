package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor/attestortest"
)

const (
	caDown    = 4 * time.Second // less than the life that is left; longer than it takes until a renewal is due
	agentDown = time.Second
	// lifeBeforeKill is what both certificates must have left when the CA is killed: the outage, and time to come back.
	lifeBeforeKill = caDown + 3*time.Second

	tokenTTL     = 10 * time.Minute // kubelet's shortest
	tokenRefresh = 5 * time.Second
	stopTimeout  = 5 * time.Second // for a program that was asked to end
)

// The workloads; the intruder has an identity like the others, and no business with payments.
const (
	checkout = "checkout"
	payments = "payments"
	intruder = "intruder"
	agentPod = "agent"
)

// demo is one run.
type demo struct {
	cfg    Config
	say    func(who, format string, args ...any)
	dir    *folder
	report Report
	cancel context.CancelCauseFunc // ends everything, with the reason
	wg     sync.WaitGroup          // of all goroutines

	issuer    *attestortest.Issuer
	pods      map[string]attestortest.Pod
	ca, agent *program
	peers     *peers
	traffic   *traffic
}

// Run shows it all: it returns nil when nothing failed and everything was shown, and an *api.Error otherwise. It prints
// to the writers of cfg, leaves no process, and no file but what cfg.Keep or a failure leaves behind.
func Run(ctx context.Context, cfg Config) (err error) {
	if cfg.Stdout == nil {
		cfg.Stdout = io.Discard
	}
	if cfg.Stderr == nil {
		cfg.Stderr = io.Discard
	}
	start := time.Now()
	programs, err := binaries(cfg.BinDir, "signet-ca", "signet-agent")
	if err != nil {
		return err
	}
	d := &demo{cfg: cfg, say: (&progress{start: start, json: cfg.JSON, w: cfg.Stderr}).say}
	if d.dir, err = newFolder(); err != nil {
		return err
	}
	ctx, d.cancel = context.WithCancelCause(ctx)
	err = d.play(ctx, start, programs)
	if cause := context.Cause(ctx); cause != nil { // says more than what failed because of it
		err = cause
	}
	d.end()
	d.report.Millis = time.Since(start).Milliseconds()
	return d.finish(err)
}

// play is the whole demo, from top to bottom.
func (d *demo) play(ctx context.Context, start time.Time, programs map[string]string) error {
	// 1. The stand-in for Kubernetes, then the CA, the agent, and the two workloads.
	if err := d.startIssuer(); err != nil {
		return err
	}
	if err := d.startSignet(ctx, programs); err != nil {
		return err
	}
	if err := d.startPeers(ctx); err != nil {
		return err
	}

	// 2. A constant stream of new mutual TLS connections.
	ids := d.ids()
	d.traffic = newTraffic(d.peers.front, ids[checkout].String(), ids[payments].String())
	trafficCtx, stopTraffic := context.WithCancel(ctx)
	defer stopTraffic()
	began := time.Now()
	trafficDone := make(chan struct{})
	d.wg.Go(func() { defer close(trafficDone); d.traffic.run(trafficCtx) })
	first, err := d.traffic.await(ctx, func(c counts) bool { return !c.first.IsZero() || c.failed > 0 })
	if err != nil {
		return err
	}
	d.report.Ready = time.Since(start).Milliseconds()
	if first.failed == 0 {
		d.say("traffic", "first answer; from now on a new mTLS connection every %d ms", interval.Milliseconds())
		d.say(payments, "its caller is   %s", ids[checkout])
		d.say(checkout, "its upstream is %s", ids[payments])
	}

	// 3. Who has a valid SVID but no business here is refused, and so is who has none.
	if err := d.intrude(ctx, ids); err != nil {
		return err
	}

	// 4. Certificates change under the traffic; the CA dies, and the agent does.
	d.say("waiting", "for both certificates to change (an SVID lives %s, and is renewed at about half of that)", svidTTL)
	if _, err := d.rotated(ctx, counts{}, 1); err != nil {
		return err
	}
	if err := d.killCA(ctx); err != nil {
		return err
	}
	if err := d.killAgent(ctx); err != nil {
		return err
	}
	if _, err := d.rotated(ctx, counts{}, minRotations); err != nil {
		return err
	}

	// 5. The account.
	stopTraffic()
	<-trafficDone
	return d.account(ctx, time.Since(began))
}

func (d *demo) ids() map[string]spiffeid.ID {
	td := spiffeid.RequireTrustDomainFromString(trustDomain)
	ids := map[string]spiffeid.ID{}
	for _, w := range []string{checkout, payments, intruder} {
		ids[w] = spiffeid.RequireFromSegments(td, "ns", namespace, "sa", w)
	}
	return ids
}

// startIssuer starts what stands in for a cluster: tokens, their key set, and the list of pods.
func (d *demo) startIssuer() (err error) {
	if d.issuer, err = attestortest.NewIssuer(attestortest.Config{Issuer: issuerName}); err != nil {
		return err
	}
	d.pods = map[string]attestortest.Pod{agentPod: attestortest.NewPod("signet-system", "signet-agent-0", "signet-agent", nodeName)}
	for _, w := range []string{checkout, payments, intruder} {
		d.pods[w] = attestortest.NewPod(namespace, w+"-0", w, nodeName)
	}
	keys, err := d.serve("issuer", nil, d.issuer.Handler())
	if err != nil {
		return err
	}
	d.say("issuer", "a development stand-in for the Kubernetes API server signs the workloads' tokens, keys at http://%s%s", keys, attestortest.KeysPath)
	return errors.Join(d.writeTokens(), d.dir.writePods(d.pods), d.dir.writePolicy(), d.dir.writeCA("127.0.0.1:0", keys))
}

// writeTokens replaces every token, as kubelet does in its own time.
func (d *demo) writeTokens() error {
	td := spiffeid.RequireTrustDomainFromString(trustDomain)
	var all error
	for name, pod := range d.pods {
		audience := api.WorkloadAudience(td)
		if name == agentPod {
			audience = api.AgentAudience(td)
		}
		all = errors.Join(all, d.issuer.WriteToken(d.dir.tokenFile(name), pod, audience, tokenTTL))
	}
	return all
}

// refreshTokens plays kubelet until ctx ends.
func (d *demo) refreshTokens(ctx context.Context) {
	t := time.NewTicker(tokenRefresh)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if err := d.writeTokens(); err != nil {
				d.cancel(fmt.Errorf("refresh tokens: %w", err))
			}
		case <-ctx.Done():
			return
		}
	}
}

// startSignet makes the trust domain, then runs its CA and the agent of this node.
func (d *demo) startSignet(ctx context.Context, programs map[string]string) error {
	d.wg.Go(func() { d.refreshTokens(ctx) })
	var err error
	if d.ca, err = d.program("signet-ca", programs["signet-ca"], "run", "--config", d.dir.join("ca.yaml")); err != nil {
		return err
	}
	if d.agent, err = d.program("signet-agent", programs["signet-agent"], "run", "--config", d.dir.join("agent.yaml")); err != nil {
		return err
	}
	if err := d.ca.once(ctx, "init", "--config", d.dir.join("ca.yaml")); err != nil {
		return err
	}
	if err := d.ca.start(); err != nil {
		return err
	}
	address, err := d.ca.await(ctx, "grpc")
	if err != nil {
		return err
	}
	listen, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("signet-ca serves at %q: %w", address, err)
	}
	d.say("signet-ca", "serves %s at %s (process %d)", trustDomain, listen, d.ca.pid())
	if err := errors.Join(d.dir.moveCA(listen), d.dir.writeAgent(listen.String())); err != nil {
		return err
	}
	if err := d.agent.start(); err != nil {
		return err
	}
	if _, err := d.agent.await(ctx, "sds"); err != nil {
		return err
	}
	d.say("agent", "serves SDS on %s (process %d)", d.dir.agentSocket(), d.agent.pid())
	return nil
}

func (d *demo) program(name, path string, args ...string) (*program, error) {
	log, err := d.dir.log(name)
	if err != nil {
		return nil, err
	}
	return &program{name: name, path: path, args: args, log: log, died: func(err error) { d.cancel(err) }}, nil
}

// rotated waits until both certificates have changed n times since then.
func (d *demo) rotated(ctx context.Context, since counts, n int) (counts, error) {
	least := func(s, then seen) bool { return s.certificates >= max(then.certificates, 1)+n }
	return d.traffic.await(ctx, func(c counts) bool {
		return least(c.checkout, since.checkout) && least(c.payments, since.payments)
	})
}

// killCA kills the CA while both certificates have life enough left, and starts it again.
func (d *demo) killCA(ctx context.Context) error {
	alive := func(c counts) bool {
		return time.Until(c.checkout.notAfter) > lifeBeforeKill && time.Until(c.payments.notAfter) > lifeBeforeKill
	}
	if _, err := d.traffic.await(ctx, alive); err != nil {
		return err
	}
	return d.outage(ctx, d.ca, caDown, "grpc", "traffic goes on with the certificates that are there")
}

func (d *demo) killAgent(ctx context.Context) error {
	return d.outage(ctx, d.agent, agentDown, "sds", "the proxies keep what they hold")
}

// outage kills a program, starts it again after a while, and waits until certificates change again.
func (d *demo) outage(ctx context.Context, p *program, down time.Duration, what, meanwhile string) error {
	before, died := d.traffic.now.Load(), time.Now()
	p.kill()
	d.say(p.short(), "KILLED (SIGKILL) for %.1f s: %s", down.Seconds(), meanwhile)
	select {
	case <-time.After(down):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := p.start(); err != nil {
		return err
	}
	if _, err := p.await(ctx, what); err != nil {
		return err
	}
	after := d.traffic.now.Load()
	o := Outage{
		Program: p.name, Millis: time.Since(died).Milliseconds(),
		Requests: after.requests - before.requests, Failed: after.failed - before.failed,
	}
	d.say(p.short(), "is back (process %d): %d requests meanwhile, %d failed", p.pid(), o.Requests, o.Failed)
	now, err := d.rotated(ctx, after, 1)
	o.Renewed = err == nil
	d.report.Outages = append(d.report.Outages, o)
	if err == nil {
		d.say(p.short(), "both certificates have been renewed since; %d and %d rotations so far", now.checkout.certificates-1, now.payments.certificates-1)
	}
	return err
}

// account fills the report from what was counted.
func (d *demo) account(ctx context.Context, took time.Duration) error {
	c, ids := d.traffic.now.Load(), d.ids()
	side := func(name string, s seen) Side {
		return Side{
			Name: name, ID: ids[name].String(), Protocol: d.peers.protocol[name], FirstSVID: d.peers.firstSVID[name].Milliseconds(),
			Rotations: s.certificates - 1, LeastLife: s.leastLife.Milliseconds(),
		}
	}
	d.report.Sides = []Side{side(checkout, c.checkout), side(payments, c.payments)}
	d.report.Traffic = Traffic{Requests: c.requests, Failed: c.failed, Failures: c.failures, PerSecond: int(float64(c.requests) / took.Seconds())}
	var err error
	d.report.Traffic.Handshakes, d.report.Traffic.Resumed, err = d.peers.handshakes(ctx)
	return err
}

// end stops everything that is still there, the front first, and waits for it.
func (d *demo) end() {
	if d.peers != nil {
		d.peers.stop()
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), stopTimeout, errors.New("it took too long"))
	defer cancel()
	for _, p := range []*program{d.agent, d.ca} {
		if p == nil {
			continue
		}
		if err := p.stop(ctx); err != nil {
			d.say(p.short(), "%v", err)
		}
		_ = p.log.Close() // nothing more is written
	}
	d.cancel(nil)
	d.wg.Wait()
}

// finish settles the folder and the report. broke is why the demo did not reach its end; nil when it did.
func (d *demo) finish(broke error) error {
	d.report.APIVersion, d.report.Kind, d.report.TrustDomain = "cli.signet.dev/v1", "DemoReport", trustDomain
	d.report.judge()
	var settle error
	switch interrupted := api.ReasonOf(broke) == api.Canceled; {
	case d.cfg.Keep:
		d.report.Logs, settle = d.dir.path, d.dir.keep()
	case (broke != nil || !d.report.Passed) && !interrupted:
		d.report.Logs, settle = d.dir.keepLogs()
		settle = errors.Join(settle, d.dir.remove())
	default:
		settle = d.dir.remove()
	}
	if d.cfg.Keep {
		d.say("kept", "%s", d.dir.path)
	}
	if broke != nil {
		if e, ok := errors.AsType[*api.Error](broke); ok {
			return errors.Join(e, settle)
		}
		return errors.Join(api.E(api.DemoFailed, "%v; the logs are in %s", broke, d.report.Logs), settle)
	}
	if err := d.report.write(d.cfg.Stdout, d.cfg.JSON); err != nil {
		return errors.Join(err, settle)
	}
	return errors.Join(d.report.err(), settle)
}

// serve serves HTTP on a free port of 127.0.0.1 until the demo ends. wrap, unless nil, wraps the listener.
func (d *demo) serve(name string, wrap func(net.Listener) net.Listener, h http.Handler) (netip.AddrPort, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return netip.AddrPort{}, err
	}
	addr := l.Addr().(*net.TCPAddr).AddrPort()
	if wrap != nil {
		l = wrap(l)
	}
	logs, err := d.dir.log(name)
	if err != nil {
		return netip.AddrPort{}, errors.Join(err, l.Close())
	}
	s := &http.Server{Handler: h, ReadHeaderTimeout: requestTimeout, ErrorLog: log.New(logs, "", log.LstdFlags|log.Lmicroseconds)}
	d.wg.Go(func() {
		defer logs.Close()
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			d.cancel(fmt.Errorf("%s: %w", name, err))
		}
	})
	d.closers = append(d.closers, s.Close)
	return addr, nil
}

var _ = os.Getpid
