package demo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/internal/envoy"
)

const (
	caDown    = 3 * time.Second // a renewal comes due meanwhile, as a rule
	agentDown = time.Second
	// lifeBeyond is what both certificates must have left when a program is killed, besides the time for which it stays
	// dead: for it to start again and renew on a busy machine.
	lifeBeyond = 4 * time.Second

	startTimeout = 15 * time.Second // until a program serves
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

	closing chan struct{} // closed when no request is under way any more

	issuer    *attestortest.Issuer
	keys      netip.AddrPort // where its key set is served
	pods      map[string]attestortest.Pod
	ca, agent *envoy.Program
	envoy     string     // path; empty: Go peers
	logs      []*os.File // of the processes
	peers     *peers
	traffic   *traffic
	firstSVID time.Duration // from opening an SDS stream to having the SVID, seen by a Go client
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
	d := &demo{cfg: cfg, closing: make(chan struct{}), say: (&progress{start: start, json: cfg.JSON, w: cfg.Stderr}).say}
	if d.envoy, err = d.findEnvoy(ctx); err != nil {
		return err
	}
	if cfg.bases == nil {
		cfg.bases = defaultBases()
	}
	if d.dir, err = newFolder(cfg.bases); err != nil {
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
	d.wg.Go(func() { d.traffic.follow(trafficCtx, d.rotation) })

	// 3. What happens under it.
	err := d.disturb(ctx, start, ids)

	// 4. The account, whatever came of it.
	stopTraffic()
	<-trafficDone
	return errors.Join(err, d.account(ctx, time.Since(began)))
}

// disturb does to the running traffic what must not disturb it.
func (d *demo) disturb(ctx context.Context, start time.Time, ids map[string]spiffeid.ID) error {
	first, err := d.traffic.await(ctx, requestTimeout, "there is no answer", func(c counts) bool { return c.requests > c.failed })
	if err != nil {
		return err
	}
	d.report.Ready = first.first.Sub(start).Milliseconds()
	d.say("traffic", "first answer; from now on a new mTLS connection every %d ms", interval.Milliseconds())
	d.say(payments, "its caller is   %s", ids[checkout])
	d.say(checkout, "its upstream is %s", ids[payments])

	// Who has a valid SVID but no business here is refused, and so is who has none.
	if err := d.intrude(ctx, ids); err != nil {
		return err
	}

	// Certificates change; the CA dies, and comes back; the agent does.
	d.say("waiting", "for both certificates to change: an SVID lives %s, and is renewed at a third to a half of that", svidTTL)
	if _, err := d.rotated(ctx, counts{}, 1); err != nil {
		return err
	}
	if err := d.outage(ctx, d.ca, caDown, "grpc", "traffic goes on with the certificates that are there"); err != nil {
		return err
	}
	if err := d.outage(ctx, d.agent, agentDown, "sds", "the proxies keep what they hold"); err != nil {
		return err
	}
	_, err = d.rotated(ctx, counts{}, minRotations)
	return err
}

// rotation tells of a new certificate.
func (d *demo) rotation(side string, s seen) {
	d.say(side, "rotated: new certificate %.8s; the one before had %.1f s left", s.serial, s.lifeAtChange.Seconds())
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
	l, keys, err := listen()
	if err != nil {
		return err
	}
	if err := d.serve("issuer", l, d.issuer.Handler()); err != nil {
		return err
	}
	d.say("issuer", "a development stand-in for the Kubernetes API server signs the workloads' tokens, keys at http://%s%s", keys, attestortest.KeysPath)
	d.keys = keys
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
	if err := envoy.Run(ctx, envoy.Command{Name: "signet-ca init", Path: programs["signet-ca"], Args: []string{"init", "--config", d.dir.join("ca.yaml")}, Log: d.ca.Log}); err != nil {
		return err
	}
	if err := d.ca.Start(); err != nil {
		return err
	}
	address, err := d.await(ctx, d.ca, "grpc")
	if err != nil {
		return err
	}
	d.say(d.ca.Name, "serves %s at %s (process %d)", trustDomain, address, d.ca.Pid())
	// It comes back at the same address: agents know it by that.
	if err := errors.Join(d.dir.writeCA(address, d.keys), d.dir.writeAgent(address)); err != nil {
		return err
	}
	if err := d.agent.Start(); err != nil {
		return err
	}
	if _, err := d.await(ctx, d.agent, "sds"); err != nil {
		return err
	}
	d.say(d.agent.Name, "serves SDS on %s (process %d)", d.dir.agentSocket(), d.agent.Pid())
	return nil
}

func (d *demo) program(name, path string, args ...string) (*envoy.Program, error) {
	log, err := d.dir.log(name)
	if err != nil {
		return nil, err
	}
	d.logs = append(d.logs, log)
	return &envoy.Program{Name: name, Path: path, Args: args, Log: log, Died: func(err error) { d.cancel(err) }}, nil
}

// await returns the address at which a program serves what, once it does.
func (d *demo) await(ctx context.Context, p *envoy.Program, what string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("not within %s", startTimeout))
	defer cancel()
	return p.Await(ctx, what)
}

// rotated waits until both certificates have changed n times since then. They have to within two lives for each.
func (d *demo) rotated(ctx context.Context, since counts, n int) (counts, error) {
	enough := func(s, then seen) bool { return s.certificates >= max(then.certificates, 1)+n }
	return d.traffic.await(ctx, time.Duration(2*n)*svidTTL, "certificates do not change", func(c counts) bool {
		return enough(c.checkout, since.checkout) && enough(c.payments, since.payments)
	})
}

// outage kills a program while both certificates have life enough left, starts it again after a while, and waits until
// certificates change again.
func (d *demo) outage(ctx context.Context, p *envoy.Program, down time.Duration, what, meanwhile string) error {
	alive := func(c counts) bool {
		return time.Until(c.checkout.notAfter) > down+lifeBeyond && time.Until(c.payments.notAfter) > down+lifeBeyond
	}
	before, err := d.traffic.await(ctx, 2*svidTTL, "certificates are not renewed in good time", alive)
	if err != nil {
		return err
	}
	died := time.Now()
	p.Kill()
	d.say(p.Name, "KILLED (SIGKILL) for %.1f s: %s", down.Seconds(), meanwhile)
	select {
	case <-time.After(down):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := p.Start(); err != nil {
		return err
	}
	if _, err := d.await(ctx, p, what); err != nil {
		return err
	}
	after := d.traffic.now.Load()
	o := Outage{
		Program: p.Name, Millis: time.Since(died).Milliseconds(),
		Requests: after.requests - before.requests, Failed: after.failed - before.failed,
	}
	d.say(p.Name, "is back (process %d): %d requests meanwhile, %d failed", p.Pid(), o.Requests, o.Failed)
	now, err := d.rotated(ctx, after, 1)
	o.Renewed = err == nil
	d.report.Outages = append(d.report.Outages, o)
	if err == nil {
		d.say(p.Name, "both certificates have been renewed since; %d and %d rotations so far", now.checkout.certificates-1, now.payments.certificates-1)
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
	d.report.FirstSVID = d.firstSVID.Milliseconds()
	d.report.Sides = []Side{side(checkout, c.checkout), side(payments, c.payments)}
	d.report.Traffic = Traffic{Requests: c.requests, Failed: c.failed, Failures: c.failures, PerSecond: int(float64(c.requests) / took.Seconds())}
	if ctx.Err() != nil {
		return nil // who is to be asked may be gone
	}
	var err error
	if d.report.Traffic.Handshakes, d.report.Traffic.Resumed, err = d.peers.handshakes(ctx); err != nil {
		return err
	}
	d.report.Issuance, err = d.issuance(ctx)
	return err
}

// issuance reads from the CA's metrics how many SVIDs it has issued since it came back, and how long one took.
func (d *demo) issuance(ctx context.Context) (Issuance, error) {
	address, err := d.await(ctx, d.ca, "http")
	if err != nil {
		return Issuance{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return Issuance{}, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return Issuance{}, fmt.Errorf("metrics of signet-ca: %w", err)
	}
	defer resp.Body.Close()
	var sum, count float64
	lines := bufio.NewScanner(io.LimitReader(resp.Body, 1<<20))
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		switch name {
		case "signet_issue_duration_seconds_sum":
			sum, err = strconv.ParseFloat(value, 64)
		case "signet_issue_duration_seconds_count":
			count, err = strconv.ParseFloat(value, 64)
		}
		if err != nil {
			return Issuance{}, fmt.Errorf("metrics of signet-ca: %w", err)
		}
	}
	if count == 0 {
		return Issuance{}, lines.Err()
	}
	return Issuance{SVIDs: int(count), MeanMicros: int64(sum / count * 1e6)}, lines.Err()
}

// end stops everything that is still there and waits for it.
func (d *demo) end() {
	d.cancel(nil)
	close(d.closing)
	if d.peers != nil {
		d.peers.stop()
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), stopTimeout, fmt.Errorf("it took longer than %s", stopTimeout))
	defer cancel()
	for _, p := range []*envoy.Program{d.agent, d.ca} {
		if p == nil {
			continue
		}
		if err := p.Stop(ctx); err != nil {
			d.say(p.Name, "%v", err)
		}
	}
	d.wg.Wait()
	for _, l := range d.logs {
		_ = l.Close() // nothing more is written
	}
}

// finish settles the folder and prints the report. broke is why the demo did not reach its end; nil when it did.
func (d *demo) finish(broke error) error {
	d.report.APIVersion, d.report.Kind, d.report.TrustDomain = "cli.signet.dev/v1", "DemoReport", trustDomain
	interrupted := api.ReasonOf(broke) == api.Canceled
	d.report.judge(broke)
	var err error
	switch {
	case d.cfg.Keep:
		d.report.Logs = d.dir.path
		err = d.dir.keep()
		d.say("kept", "%s", d.dir.path)
	case d.report.Passed || interrupted:
		err = d.dir.remove()
	default:
		d.report.Logs, err = d.dir.keepLogs()
		err = errors.Join(err, d.dir.remove())
	}
	if interrupted {
		d.say("ended", "every process is stopped")
	} else if d.traffic != nil {
		err = errors.Join(err, d.report.write(d.cfg.Stdout, d.cfg.JSON))
	}
	if e, ok := errors.AsType[*api.Error](broke); ok {
		told := *e
		if d.report.Logs != "" {
			told.Detail += "; the logs are in " + d.report.Logs
		}
		return errors.Join(&told, err)
	}
	return errors.Join(d.report.err(), err)
}

// serve serves HTTP on l until the demo closes: longer than its context lives, or the last requests would fail.
func (d *demo) serve(name string, l net.Listener, h http.Handler) error {
	logs, err := d.dir.log(name)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	s := &http.Server{Handler: h, ReadHeaderTimeout: requestTimeout, ErrorLog: log.New(logs, "", log.LstdFlags|log.Lmicroseconds)}
	d.wg.Go(func() {
		defer logs.Close()
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			d.cancel(fmt.Errorf("%s: %w", name, err))
		}
	})
	d.wg.Go(func() {
		<-d.closing
		_ = s.Close() // nothing is under way any more
	})
	return nil
}

// listen listens on a free port of 127.0.0.1.
func listen() (net.Listener, netip.AddrPort, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	return l, l.Addr().(*net.TCPAddr).AddrPort(), nil
}
