//go:build envoy

package sds

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/template"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/api"
)

// peerID is whom the Envoy under test talks to.
const peerID = "spiffe://example.org/ns/prod/sa/checkout"

// tokenLife is how long a token lives: short, so that streams are ended and come back while the test runs.
const tokenLife = 3 * time.Second

// rig is one real Envoy, its SDS server over a Unix socket, and a Go peer on either side of it.
type rig struct {
	*pod
	t         *testing.T
	ports     map[string]string // of its listeners, by name
	admin     string
	protocol  string
	reauths   atomic.Int64
	refusals  atomic.Int64
	pushes    atomic.Int64
	restart   func() // the SDS server, on the same socket
	withToken bool
	tokens    sync.Map // when each that was issued expires, by authorization
	clientTLS atomic.Pointer[x509svid.SVID]
	roots     *x509.CertPool

	newestMu sync.Mutex
	newest   map[string]Report // the last report of a stream that asks for these names
}

// startRig starts everything and returns when Envoy's listeners have their secrets. The Go peers trust these roots, too.
func startRig(t *testing.T, apiType string, withToken bool, more ...*x509.Certificate) *rig {
	t.Helper()
	binary := os.Getenv("SIGNET_ENVOY")
	if binary == "" {
		t.Fatal("SIGNET_ENVOY does not name an Envoy binary; run these tests through make")
	}
	dir, err := os.MkdirTemp("", "sds") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &rig{pod: newPod(t), t: t, roots: x509.NewCertPool(), protocol: map[string]string{"GRPC": ProtocolSotW, "DELTA_GRPC": ProtocolDelta}[apiType]}
	r.withToken, r.newest = withToken, map[string]Report{}
	r.onReport = func(s Report) {
		r.newestMu.Lock()
		defer r.newestMu.Unlock()
		if len(s.Names) > 0 {
			r.newest[strings.Join(s.Names, " ")] = s
		}
	}
	for _, root := range append(more, r.root) {
		r.roots.AddCert(root)
	}
	r.set(1)
	r.clientTLS.Store(r.svid(peerID))

	socket, tokenFile := filepath.Join(dir, "s"), ""
	if withToken {
		tokenFile = filepath.Join(dir, "token")
		r.issueTokens(tokenFile)
	}
	r.serve(socket)
	upstream := r.upstream()

	text, err := os.ReadFile("testdata/envoy.yaml.tmpl")
	if err != nil {
		t.Fatal(err)
	}
	var config bytes.Buffer
	err = template.Must(template.New("").Parse(string(text))).Execute(&config, map[string]any{
		"API": apiType, "Socket": socket, "Token": tokenFile, "Own": ownID, "Peer": peerID, "Domain": "spiffe://" + td,
		"Upstream": upstream.Addr().(*net.TCPAddr).Port, "Outbound": []string{"outbound", "impostor"},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "envoy.yaml")
	if err := os.WriteFile(file, config.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	r.run(binary, file, filepath.Join(dir, "admin"))
	return r
}

// issueTokens writes a token as kubelet does, and a fresh one before the old one expires.
func (r *rig) issueTokens(file string) {
	issue := func(i int) {
		token := fmt.Sprintf("token-%d", i)
		r.tokens.Store("Bearer "+token, time.Now().Add(tokenLife))
		if err := errors.Join(os.WriteFile(file+".new", []byte(token), 0o600), os.Rename(file+".new", file)); err != nil {
			r.t.Error(err)
		}
	}
	issue(0)
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	wg.Go(func() {
		tick := time.NewTicker(tokenLife / 2)
		defer tick.Stop()
		for i := 1; ; i++ {
			select {
			case <-tick.C:
				issue(i)
			case <-ctx.Done():
				return
			}
		}
	})
	r.t.Cleanup(func() { cancel(); wg.Wait() })
}

// Open implements Source: on the shared socket the token says who it is, and until when.
func (r *rig) Open(ctx context.Context, md metadata.MD) (*Workload, error) {
	w, err := r.pod.Open(ctx, md)
	if err != nil || !r.withToken {
		return w, err
	}
	end, ok := r.tokens.Load(strings.Join(md.Get("authorization"), " "))
	if !ok || !time.Now().Before(end.(time.Time)) {
		r.refusals.Add(1)
		return nil, api.E(api.TokenExpired, "this is not a token of now")
	}
	w.ExpireAt = end.(time.Time)
	return w, nil
}

// serve serves SDS until the test ends; restart ends it and begins anew, as an agent does that was replaced.
func (r *rig) serve(socket string) {
	start := func() (stop func()) {
		lis, err := net.Listen("unix", socket)
		if err != nil {
			r.t.Fatal(err)
		}
		srv := New(Config{Source: r, MaxStreamsPerWorkload: 32, Hooks: Hooks{
			Pushed: func(string, string) { r.pushes.Add(1) },
			Closed: func(_ string, reason api.Reason) {
				if reason == api.ReauthRequired {
					r.reauths.Add(1)
				}
			},
		}})
		g := grpc.NewServer()
		srv.Register(g)
		var wg sync.WaitGroup
		wg.Go(func() { g.Serve(lis) })
		return func() { srv.Close(); g.Stop(); wg.Wait() }
	}
	stop := start()
	r.restart = func() {
		stop()
		r.newestMu.Lock()
		clear(r.newest) // everything is to be proven anew
		r.newestMu.Unlock()
		stop = start()
	}
	r.t.Cleanup(func() { stop() })
}

// upstream is a TLS server that is the peer, wants an SVID of the Envoy's, and echoes.
func (r *rig) upstream() net.Listener {
	lis, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: r.roots, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate(r.clientTLS.Load()), nil },
	})
	if err != nil {
		r.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(30 * time.Second))
				io.Copy(conn, conn)
			})
		}
	})
	r.t.Cleanup(func() { lis.Close(); wg.Wait() })
	return lis
}

func certificate(s *x509svid.SVID) *tls.Certificate {
	c := &tls.Certificate{PrivateKey: s.PrivateKey}
	for _, cert := range s.Certificates {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return c
}

// run starts Envoy and waits for its listeners.
func (r *rig) run(binary, config, admin string) {
	var log bytes.Buffer
	cmd := exec.Command(binary, "-c", config, "--disable-hot-restart", "--admin-address-path", admin, "--concurrency", "1", "--log-level", "warning")
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if r.t.Failed() {
			r.t.Logf("envoy said:\n%s", log.String())
		}
	})
	r.ports = map[string]string{}
	r.eventually("envoy's listeners", func() bool {
		addr, err := os.ReadFile(admin)
		if err != nil {
			return false
		}
		r.admin = strings.TrimSpace(string(addr))
		var all struct {
			Listeners []struct {
				Name  string `json:"name"`
				Local struct {
					Socket struct {
						Port int `json:"port_value"`
					} `json:"socket_address"`
				} `json:"local_address"`
			} `json:"listener_statuses"`
		}
		if json.Unmarshal(r.get("/listeners?format=json"), &all) != nil {
			return false
		}
		for _, l := range all.Listeners {
			r.ports[l.Name] = fmt.Sprintf("127.0.0.1:%d", l.Local.Socket.Port)
		}
		return len(r.ports) == 4 && strings.HasPrefix(string(r.get("/ready")), "LIVE")
	})
}

func (r *rig) get(path string) []byte {
	resp, err := http.Get("http://" + r.admin + path)
	if err != nil {
		return nil
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return b
}

func (r *rig) eventually(what string, f func() bool) {
	r.t.Helper()
	tick, end := time.NewTicker(10*time.Millisecond), time.After(2*time.Minute)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-end:
			r.t.Fatalf("waited too long for %s", what)
		}
	}
}

// call makes one new TLS connection to a listener as s and returns the serial of what the Envoy showed.
func (r *rig) call(listener string, s *x509svid.SVID) (serial string, err error) {
	conn, err := (&net.Dialer{Timeout: 30 * time.Second}).Dial("tcp", r.ports[listener])
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	c := tls.Client(conn, &tls.Config{
		MinVersion: tls.VersionTLS13,
		// Whatever authorities the server names: it shall refuse, and not the client keep its certificate back.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate(s), nil },
		InsecureSkipVerify:   true, // a SPIFFE ID is no host name: VerifyConnection checks it
		VerifyConnection: func(cs tls.ConnectionState) error {
			inter := x509.NewCertPool()
			for _, c := range cs.PeerCertificates[1:] {
				inter.AddCert(c)
			}
			if id, err := x509svid.IDFromCert(cs.PeerCertificates[0]); err != nil || id.String() != ownID {
				return fmt.Errorf("the server is %v: %v", id, err)
			}
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: r.roots, Intermediates: inter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			return err
		},
	})
	if err := echoed(c); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", c.ConnectionState().PeerCertificates[0].SerialNumber.Bytes()), nil
}

// through makes one connection that Envoy carries on by mTLS to the upstream.
func (r *rig) through(listener string) error {
	conn, err := (&net.Dialer{Timeout: 30 * time.Second}).Dial("tcp", r.ports[listener])
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	return echoed(conn)
}

// echoed sends a word over a fresh connection and wants it back.
func echoed(c net.Conn) error {
	b := []byte("ok")
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}

// live returns the reports of the streams that are open.
func (r *rig) live() []Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	var live []Report
	for _, reports := range r.reports {
		if last := reports[len(reports)-1]; last.Open {
			live = append(live, last)
		}
	}
	return live
}

// proven waits until what is there was acknowledged for every name of the configuration. Streams need not all be open at one
// moment: each ends with its token, and Envoy waits for longer each time before it opens the next, until a message comes.
func (r *rig) proven(m *Material) {
	r.t.Helper()
	hash := m.Trust.Hash()
	r.eventually("acknowledgements", func() bool {
		r.newestMu.Lock()
		defer r.newestMu.Unlock()
		bundles, identities := 0, 0
		for _, s := range r.newest {
			switch {
			case s.WantsBundle && (s.AckedGeneration != m.Trust.Generation() || !bytes.Equal(s.AckedHash, hash[:])):
				return false
			case !s.WantsBundle && s.AckedSerial != m.Identity.Serial():
				return false
			case s.WantsBundle:
				bundles++
			default:
				identities++
			}
		}
		return bundles == 3 && identities == 2 // one stream for each name of the configuration
	})
}
