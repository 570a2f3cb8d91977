// Package envoytest runs real Envoys inside tests: the harness of the integration tests, over internal/envoy.
package envoytest

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/internal/envoy"
)

// BinaryEnv names the environment variable with the path of the Envoy to test with.
const BinaryEnv = "SIGNET_ENVOY"

// Binary returns the path of an Envoy, and skips the test where there is none.
func Binary(t testing.TB) string {
	t.Helper()
	path, err := envoy.Find(os.Getenv(BinaryEnv))
	if err != nil {
		t.Skipf("no Envoy: %v (set %s)", err, BinaryEnv)
	}
	return path
}

// Run starts an Envoy that ends with the test. Its log is part of the test's output when the test fails. It may still
// wait for its certificate: see envoy.Envoy.Live.
func Run(t testing.TB, p envoy.Proxy) *envoy.Envoy {
	t.Helper()
	log := new(buffer)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e, err := envoy.Config{Binary: Binary(t), Dir: t.TempDir(), Proxy: p, Log: log}.Run(ctx)
	if err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	t.Cleanup(func() {
		e.Kill()
		if t.Failed() {
			t.Logf("log of Envoy %s:\n%s", p.Name, log)
		}
	})
	return e
}

// Backend serves plain HTTP on a free port of 127.0.0.1 until the test ends.
func Backend(t testing.TB, h http.Handler) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	t.Cleanup(func() { _ = srv.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// Get sends one request on a connection of its own and returns the response with its body read.
func Get(ctx context.Context, url string) (*http.Response, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, "", err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, string(b), err
}

// buffer is a bytes.Buffer for a process that writes while a test reads.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
