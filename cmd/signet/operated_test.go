package main

import (
	"bufio"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/signet-ca/signet/ca/catest"
)

// operatedCluster is the API server of a cluster with a real CA in it: the few things that operating it needs.
type operatedCluster struct {
	*httptest.Server
	ca         *catest.Server
	kubeconfig string

	mu     sync.Mutex
	refuse map[string]int // path, to the status that it is answered with
	pods   string         // items of the list, JSON
	tokens []string       // roles that tokens were made for
	life   time.Duration  // of tokens
	bundle *catest.Server // whose bundle is published
	mute   bool           // the CA has no SVID: it ends each handshake
}

const readyPod = `{"metadata":{"name":"signet-ca-0"},"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}`

func newOperated(t *testing.T, o catest.Options) *operatedCluster {
	t.Helper()
	c := &operatedCluster{ca: catest.New(t, o), refuse: map[string]int{}, pods: readyPod, life: 10 * time.Minute}
	c.bundle = c.ca
	c.ca.WaitReady()
	c.Server = httptest.NewUnstartedServer(c)
	c.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	c.EnableHTTP2 = true
	c.StartTLS()
	t.Cleanup(c.Server.Close)
	trust := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate().Raw}))
	c.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"x","contexts":[{"name":"x","context":{"cluster":"x","user":"x"}}],`+
		`"clusters":[{"name":"x","cluster":{"server":%q,"certificate-authority-data":%q}}],"users":[{"name":"x","user":{"token":"person"}}]}`, c.URL, trust)
	if err := os.WriteFile(c.kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

// set changes what the cluster says.
func (c *operatedCluster) set(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

// ServeHTTP implements http.Handler.
func (c *operatedCluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	status, pods, bundle, life := c.refuse[r.URL.Path], c.pods, c.bundle, c.life
	c.mu.Unlock()
	answer := func(status int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(v)
	}
	const accounts = "/api/v1/namespaces/signet-operators/serviceaccounts/"
	switch role, isToken := strings.CutSuffix(strings.TrimPrefix(r.URL.Path, accounts), "/token"); {
	case status != 0:
		answer(status, map[string]any{"message": "no"})
	case r.Header.Get("Authorization") != "Bearer person":
		answer(401, map[string]any{})
	case r.URL.Path == "/api/v1/namespaces/signet-system/configmaps/signet-bundle":
		answer(200, map[string]any{"data": published(bundle)})
	case r.URL.Path == "/api/v1/namespaces/signet-system/pods":
		io.WriteString(jsonOf(w), `{"kind":"PodList","metadata":{},"items":[`+pods+`]}`)
	case isToken && strings.HasPrefix(r.URL.Path, accounts):
		var ask struct {
			Spec struct {
				Audiences         []string
				ExpirationSeconds int
			}
		}
		if err := json.NewDecoder(r.Body).Decode(&ask); err != nil || len(ask.Spec.Audiences) != 1 || ask.Spec.ExpirationSeconds != 600 {
			answer(400, map[string]any{"message": "malformed"})
			return
		}
		c.set(func() { c.tokens = append(c.tokens, role) })
		answer(201, map[string]any{"status": map[string]any{
			"token": c.ca.Person("signet-operators", role, life), "expirationTimestamp": time.Now().Add(life),
		}})
	case r.URL.Path == "/api/v1/namespaces/signet-system/pods/signet-ca-0/portforward":
		c.forward(w, r)
	default:
		answer(404, map[string]any{"message": r.URL.Path})
	}
}

func jsonOf(w http.ResponseWriter) http.ResponseWriter {
	w.Header().Set("Content-Type", "application/json")
	return w
}

// published is the ConfigMap of a CA's bundle.
func published(s *catest.Server) map[string]string {
	b := s.CA().Bundle()
	doc := spiffebundle.FromX509Authorities(b.TrustDomain, b.Roots)
	doc.SetSequenceNumber(b.Generation.Sequence())
	data, _ := doc.Marshal()
	var text []byte
	for _, root := range b.Roots {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})...)
	}
	return map[string]string{bundleJSON: string(data), bundlePEM: string(text)}
}

// forward is the node of the CA's pod.
func (c *operatedCluster) forward(w http.ResponseWriter, r *http.Request) {
	pod, err := c.ca.DialOperators(r.Context())
	if err != nil {
		w.WriteHeader(500)
		return
	}
	defer pod.Close()
	c.mu.Lock()
	if c.mute {
		pod.Close()
	}
	c.mu.Unlock()
	forwardTo(w, r, pod)
}

// forwardTo is the API server's side of a forwarded port; it ends when pod does.
func forwardTo(w http.ResponseWriter, r *http.Request, pod net.Conn) {
	sum := sha1.Sum([]byte(r.Header.Get("Sec-Websocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n"+
		"Sec-WebSocket-Accept: "+base64.StdEncoding.EncodeToString(sum[:])+"\r\n\r\n")
	say := func(channel byte, data []byte) error {
		frame := binary.BigEndian.AppendUint64([]byte{0x82, 127}, uint64(len(data)+1))
		_, err := conn.Write(append(append(frame, channel), data...))
		return err
	}
	say(0, []byte{0xfc, 0x20})
	say(1, []byte{0xfc, 0x20})
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		defer conn.Close()
		for buf := make([]byte, 16<<10); ; {
			n, err := pod.Read(buf)
			if n > 0 && say(0, buf[:n]) != nil || err != nil {
				return
			}
		}
	})
	for {
		data, err := clientFrame(buffered.Reader)
		if err != nil || len(data) == 0 {
			break
		}
		if _, err := pod.Write(data[1:]); err != nil {
			break
		}
	}
	pod.Close()
}

// clientFrame reads one frame of a client.
func clientFrame(r *bufio.Reader) ([]byte, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	size := uint64(head[1] & 0x7f)
	if more := map[uint64]int{126: 2, 127: 8}[size]; more > 0 {
		var b [8]byte
		if _, err := io.ReadFull(r, b[8-more:]); err != nil {
			return nil, err
		}
		size = binary.BigEndian.Uint64(b[:])
	}
	data := make([]byte, size+4)
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, err
	}
	for i := range data[4:] {
		data[4+i] ^= data[i&3]
	}
	return data[4:], nil
}

// listen makes the operators' port one of this machine.
func (c *operatedCluster) listen(t *testing.T) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				pod, err := c.ca.DialOperators(ctx)
				if err != nil {
					return
				}
				defer context.AfterFunc(ctx, func() { conn.Close(); pod.Close() })()
				wg.Go(func() { io.Copy(pod, conn); pod.Close() })
				io.Copy(conn, pod)
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

// as runs the tool with the cluster's kubeconfig and returns what it said.
func (c *operatedCluster) as(t *testing.T, args ...string) (out, talk string, code int) {
	t.Helper()
	a, stdout, stderr := newTestApp(nil)
	code = a.main(append([]string{"signet", "--timeout=1m", "--kubeconfig", c.kubeconfig}, args...))
	return stdout.String(), stderr.String(), code
}
