//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-ca/signet/agent/csi/csitest"
	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/internal/daemon/daemontest"
	"github.com/signet-ca/signet/internal/envoy"
)

// A peer is one end of a pair: an Envoy, which can be killed, or a Go program in this process.
type peer struct {
	w    *world
	name string
	node *node
	pod  attestortest.Pod
	id   spiffeid.ID
	down outages

	proxy  *envoy.Proxy // nil: a Go program
	listen netip.AddrPort

	mu    sync.Mutex
	envoy *envoy.Envoy // nil while it is dead

	source *workloadapi.X509Source // of a Go program
}

// newPeer makes a peer on a node; it runs once the world does.
func (w *world) newPeer(name string, n *node) (*peer, error) {
	p := &peer{w: w, name: name, node: n, pod: w.pod(name, n)}
	p.id = w.id(p.pod)
	address, err := daemontest.FreeAddress()
	if err == nil {
		p.listen, err = netip.ParseAddrPort(address) // the same each time that it is started
	}
	return p, err
}

// runEnvoy starts the Envoy of a peer, or starts it again, and returns when it takes connections.
func (p *peer) runEnvoy(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	log, err := p.w.log("envoy-" + p.name)
	if err != nil {
		return err
	}
	e, err := envoy.Config{Binary: p.w.cfg.Envoy, Dir: p.w.dir, Proxy: *p.proxy, Log: log}.Run(ctx)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.envoy = e
	p.mu.Unlock()
	p.w.wg.Go(func() {
		<-e.Done()
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.envoy == e {
			p.w.died(fmt.Errorf("envoy %s ended by itself: %w", p.name, errors.Join(e.Err(), errors.New("its log says why"))))
		}
	})
	if _, err := e.Live(ctx); err != nil {
		return err
	}
	for {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", p.listen.String())
		if err == nil {
			return c.Close()
		}
		pause := time.NewTimer(5 * time.Millisecond)
		select {
		case <-ctx.Done():
			return fmt.Errorf("envoy %s does not listen: %w", p.name, err)
		case <-pause.C:
		}
	}
}

// kill ends an Envoy with SIGKILL.
func (p *peer) kill() {
	p.mu.Lock()
	e := p.envoy
	p.envoy = nil
	p.mu.Unlock()
	if e != nil {
		e.Kill()
	}
}

// running is the Envoy of a peer; nil while it is dead, and of a Go program.
func (p *peer) running() *envoy.Envoy {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.envoy
}

// sds is where an Envoy takes its secrets from, with the token of its pod.
func (p *peer) sds(delta bool) (envoy.SDS, error) {
	file := p.w.join(p.name + ".token")
	err := p.w.issuer.WriteToken(file, p.pod, api.WorkloadAudience(p.w.td), tokenTTL)
	return envoy.SDS{Socket: p.node.sds(), TokenFile: file, Delta: delta}, err
}

// open has the volume of a Go program's pod published, and takes its identity over the socket in it.
func (p *peer) open(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	v := csitest.Volume{Pod: p.pod, Volume: "signet"}
	token, err := p.w.issuer.Token(p.pod, api.WorkloadAudience(p.w.td), tokenTTL)
	if err == nil {
		err = p.node.kubelet.Publish(ctx, v, token)
	}
	way := p.w.join(p.name) // the path of a Unix socket has little room
	if err == nil {
		err = os.Symlink(p.node.kubelet.Target(v), way)
	}
	if err != nil {
		return err
	}
	p.source, err = workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+filepath.Join(way, "agent.sock"))))
	return err
}

// serve is what a Go program does as a server, until the world ends: it answers whom it lets in, and tells refused of everybody else.
func (p *peer) serve(caller spiffeid.ID, refused func(string)) error {
	l, err := net.Listen("tcp", p.listen.String())
	if err != nil {
		return err
	}
	config := tlsconfig.MTLSServerConfig(p.source, p.source, tlsconfig.AuthorizeID(caller))
	config.SessionTicketsDisabled = true
	s := &http.Server{Handler: http.HandlerFunc(hello), ReadHeaderTimeout: patience, ErrorLog: log.New(refusals(refused), "", 0)}
	p.w.wg.Go(func() {
		if err := s.Serve(tls.NewListener(l, config)); !errors.Is(err, http.ErrServerClosed) {
			p.w.died(fmt.Errorf("%s: %w", p.name, err))
		}
	})
	p.w.ends = append(p.w.ends, s.Close)
	return nil
}

func hello(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("hello\n")) }

// refusals is told what an http.Server says, and passes on the refusals among it. A connection that ended without a word is the
// client's affair, who counts it.
type refusals func(string)

// Write implements io.Writer; it is called for each line.
func (r refusals) Write(b []byte) (int, error) {
	line := strings.TrimSpace(string(b))
	if !strings.HasSuffix(line, ": EOF") && !strings.HasSuffix(line, "connection reset by peer") && !strings.HasSuffix(line, "broken pipe") {
		r(line)
	}
	return len(b), nil
}

// holds says what a peer has at this moment: its SVID, and its bundle.
func (p *peer) holds(ctx context.Context, generations func([sha]byte) string) string {
	if p.proxy != nil {
		return p.name + ": " + p.dump(ctx)
	}
	svid, err := p.source.GetX509SVID()
	if err != nil {
		return p.name + ": " + err.Error()
	}
	bundle, err := p.source.GetX509BundleForTrustDomain(p.w.td)
	if err != nil {
		return p.name + ": " + err.Error()
	}
	var roots, path []string
	for _, c := range svid.Certificates {
		path = append(path, short(c.AuthorityKeyId))
	}
	for _, c := range bundle.X509Authorities() {
		roots = append(roots, short(c.SubjectKeyId))
	}
	return fmt.Sprintf("%s: an SVID until %s, by %s; bundle %s of %s", p.name, svid.Certificates[0].NotAfter.Format(time.TimeOnly), strings.Join(path, " by "),
		generations(api.BundleHash(bundle.X509Authorities())), strings.Join(roots, " and "))
}

const sha = 32 // bytes of a bundle's hash

// short is the beginning of a key id, as `signet authority list` shows it.
func short(id []byte) string {
	s := hex.EncodeToString(id)
	return s[:min(len(s), 8)]
}

// dump is what an Envoy says that it has: the versions of its secrets begin with the serial number, and with the generation.
func (p *peer) dump(ctx context.Context) string {
	e := p.running()
	if e == nil {
		return "dead"
	}
	b, err := e.Get(ctx, "/config_dump?resource=dynamic_active_secrets")
	if err != nil {
		return err.Error()
	}
	var doc struct {
		Configs []struct {
			Name    string `json:"name"`
			Version string `json:"version_info"`
		} `json:"configs"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return err.Error()
	}
	var all []string
	for _, c := range doc.Configs {
		all = append(all, c.Name+" "+c.Version)
	}
	return strings.Join(all, ", ")
}
