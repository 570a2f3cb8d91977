package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/run"
)

func TestNewLogger(t *testing.T) {
	tests := []struct {
		format, level string
		json          bool
		lowest        slog.Level
		wrong         bool
	}{
		{"", "", true, slog.LevelInfo, false}, // not a terminal
		{"json", "debug", true, slog.LevelDebug, false},
		{"json", "info", true, slog.LevelInfo, false},
		{"text", "warn", false, slog.LevelWarn, false},
		{"text", "error", false, slog.LevelError, false},
		{"xml", "", false, 0, true},
		{"JSON", "", false, 0, true},
		{"", "trace", false, 0, true},
		{"", "WARN", false, 0, true},
		{"", "info+3", false, 0, true},
		{"", "warning", false, 0, true},
	}
	for _, tt := range tests {
		t.Run(tt.format+" "+tt.level, func(t *testing.T) {
			var out bytes.Buffer
			log, err := NewLogger(&out, tt.format, tt.level)
			if tt.wrong {
				if api.ReasonOf(err) != api.ConfigInvalid || log != nil {
					t.Errorf("%v, %v; want %s", log, err, api.ConfigInvalid)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !log.Enabled(t.Context(), tt.lowest) || log.Enabled(t.Context(), tt.lowest-1) {
				t.Errorf("%s is not the lowest level", tt.lowest)
			}
			log.Log(t.Context(), tt.lowest, "hello", "who", "you")
			if got := json.Valid(out.Bytes()); got != tt.json || !strings.Contains(out.String(), "hello") {
				t.Errorf("JSON is %t, want %t: %s", got, tt.json, out.String())
			}
		})
	}
}

// TestNewLoggerOutput proves that the format follows from what is written to, where none is asked for.
func TestNewLoggerOutput(t *testing.T) {
	file, err := os.Create(t.TempDir() + "/log")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	log, err := NewLogger(file, "", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := log.Handler().(*slog.JSONHandler); !ok {
		t.Errorf("into a file: %T", log.Handler())
	}
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("there are no terminals: %v", err)
	}
	defer terminal.Close()
	for format, text := range map[string]bool{"": true, "json": false} {
		log, err := NewLogger(terminal, format, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := log.Handler().(*slog.TextHandler); ok != text {
			t.Errorf("format %q on a terminal: %T", format, log.Handler())
		}
	}
}

func TestFail(t *testing.T) {
	page := api.SocketUnsafe.Page()
	if page.Why == "" || page.Do == "" {
		t.Fatal("the reason has no page, so this proves nothing")
	}
	full := "  why:  " + page.Why + "\n  next: " + page.Do + "\n  more: signet explain " + page.Code() + "\n"
	unsafe := api.E(api.SocketUnsafe, "it is there")
	tests := []struct {
		name string
		err  error
		want string
	}{
		{"reason", unsafe, "signet-ca: it is there (SOCKET_UNSAFE, " + page.Code() + ")\n" + full},
		{"wrapped", fmt.Errorf("admin: %w", unsafe), "signet-ca: admin: it is there (SOCKET_UNSAFE, " + page.Code() + ")\n" + full},
		{"cause is not shown", api.Wrap(api.SocketUnsafe, errors.New("secret"), "it is there"), "signet-ca: it is there (SOCKET_UNSAFE, " + page.Code() + ")\n" + full},
		{"no reason", errors.New("disk on fire"), "signet-ca: disk on fire\n"},
		{"internal", api.E(api.Internal, "oh"), "signet-ca: oh (INTERNAL, " + api.Internal.Code() + ")\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			Fail(&out, "signet-ca", tt.err)
			if out.String() != tt.want {
				t.Errorf("got\n%swant\n%s", out.String(), tt.want)
			}
		})
	}
}

// lines is a writer that passes on each write, which a slog handler makes one line.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

// startHTTP runs h's task on a free port of the loopback and returns its URL, and a function that ends it and returns its
// error.
func startHTTP(t *testing.T, h HTTP) (string, func() error) {
	t.Helper()
	out := make(lines, 16)
	h.Address, h.Log = "127.0.0.1:0", slog.New(slog.NewJSONHandler(out, nil))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- run.All(ctx, h.Task()) }()
	end := func() error { cancel(); return <-ended }
	select {
	case line := <-out:
		var entry struct{ What, Address string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.What != "http" {
			t.Fatalf("log %s: %v", line, err)
		}
		return "http://" + entry.Address, end
	case err := <-ended:
		t.Fatalf("ended at once: %v", err)
		return "", nil
	}
}

func TestHTTP(t *testing.T) {
	var missing atomic.Pointer[[]string]
	missing.Store(new([]string{"no intermediate", "the ledger failed"}))
	counter := prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_test_total", Help: "A test."})
	url, end := startHTTP(t, HTTP{NotReady: func() []string { return *missing.Load() }, Collectors: []prometheus.Collector{counter}})
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	do := func(method, path string) (int, string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	want := func(method, path string, code int, body string) {
		t.Helper()
		if gotCode, got := do(method, path); gotCode != code || body != "" && got != body {
			t.Errorf("%s %s: %d %q, want %d %q", method, path, gotCode, got, code, body)
		}
	}
	want("GET", "/livez", 200, "ok\n") // alive, though not ready
	want("GET", "/readyz", 503, "not ready: no intermediate\nnot ready: the ledger failed\n")
	missing.Store(new([]string(nil)))
	want("GET", "/readyz", 200, "ok\n")
	for _, path := range []string{"/livez", "/readyz", "/metrics"} {
		for _, method := range []string{"POST", "PUT", "DELETE"} {
			want(method, path, 405, "")
		}
	}
	for _, path := range []string{"/", "/debug/pprof/", "/livez/", "/metrics/x"} {
		want("GET", path, 404, "")
	}
	counter.Inc()
	code, metrics := do("GET", "/metrics")
	for _, m := range []string{"\ngo_goroutines ", "\nsignet_test_total 1\n"} {
		if code != 200 || !strings.Contains(metrics, m) {
			t.Errorf("metrics (%d) lack %q", code, m)
		}
	}

	// It ends although somebody is connected and says nothing.
	c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := end(); err != nil {
		t.Errorf("the task ended with %v", err)
	}
	if c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://")); err == nil {
		c.Close()
		t.Error("the port is still open")
	}
}

func TestHTTPAddress(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	if err := (HTTP{Log: log}).Task().Run(t.Context()); err != nil {
		t.Errorf("no address: %v", err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if err := (HTTP{Address: taken.Addr().String(), Log: log}).Task().Run(t.Context()); err == nil {
		t.Error("served on a port that is taken")
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (HTTP{Address: "127.0.0.1:0", Log: log}).Task().Run(ended); err != nil {
		t.Errorf("a context that has ended: %v", err)
	}
}
