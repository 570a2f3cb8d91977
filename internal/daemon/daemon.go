// Package daemon is what signet-ca and signet-agent do alike: the command line, logs, the port of health and metrics, Unix
// sockets, and the end of the process.
//
// Whatever listens is made here, so that the packages with the logic take listeners and connections and run in tests
// without a socket; and what every process with keys in memory must do first (no core dumps) is in one place.
package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/term"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/run"
)

// Exit codes (UX.md): what went wrong, and that the words on the command line were wrong.
const (
	ExitFailed = 1
	ExitUsage  = 2
	// ExitFindings: something is not as it should be.
	ExitFindings = 3
)

// NewLogger returns the process's log: format is "json", "text" or "" (text on a terminal, JSON elsewhere); level is
// "debug", "info" (also ""), "warn" or "error".
func NewLogger(w io.Writer, format, level string) (*slog.Logger, error) {
	var l slog.Level
	switch level {
	case "", "debug", "info", "warn", "error":
		if err := l.UnmarshalText([]byte(cmp.Or(level, "info"))); err != nil {
			return nil, err
		}
	default: // slog would take more: "info+3"
		return nil, api.E(api.ConfigInvalid, "log level %.16q is not debug, info, warn or error", level)
	}
	opts := &slog.HandlerOptions{Level: l}
	if format == "" {
		format = "json"
		if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			format = "text"
		}
	}
	switch format {
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	}
	return nil, api.E(api.ConfigInvalid, "log format %.16q is not json or text", format)
}

// Signals returns a context that ends at the first SIGTERM or SIGINT; a second one ends the process at once.
func Signals() (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// Fail prints an error as people need it: what happened, its code, and what to do.
func Fail(w io.Writer, program string, err error) {
	fmt.Fprintf(w, "%s: %v\n", program, err)
	if e, ok := errors.AsType[*api.Error](err); ok && e.Reason != api.Internal {
		fmt.Fprintf(w, "  why:  %s\n  next: %s\n  more: signet explain %s\n", e.Reason.Page().Why, e.Reason.Page().Do, e.Reason.Code())
	}
}

// HTTP is the port of health and metrics. It holds no secret and takes no command.
type HTTP struct {
	Address    string                 // host:port; empty: no such port
	NotReady   func() []string        // names what is missing; empty when ready
	Collectors []prometheus.Collector // beside those of Go and the process
	Log        *slog.Logger
}

// Task returns the task that serves it. /livez answers while the process runs; /readyz says what is missing, one a line.
func (h HTTP) Task() run.Task {
	return run.Task{Name: "http", Run: func(ctx context.Context) error {
		if h.Address == "" {
			return nil
		}
		l, err := net.Listen("tcp", h.Address)
		if err != nil {
			return err
		}
		h.Log.InfoContext(ctx, "serving", "what", "http", "address", l.Addr().String())
		limited := Limit(l, Limits{Port: "http", Strangers: 128, PerPeer: 32, Patience: 2 * time.Minute, Bytes: 1 << 20, Log: h.Log})
		h.Collectors = append(slices.Clip(h.Collectors), limited)
		s := &http.Server{
			Handler:           h.handler(),
			ReadHeaderTimeout: 5 * time.Second,
			ReadTimeout:       10 * time.Second,
			WriteTimeout:      30 * time.Second,
			MaxHeaderBytes:    16 << 10,
			ErrorLog:          slog.NewLogLogger(h.Log.Handler(), slog.LevelDebug),
		}
		stop := context.AfterFunc(ctx, func() { s.Close() })
		defer stop()
		if err := s.Serve(limited); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}}
}

func (h HTTP) handler() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	reg.MustRegister(h.Collectors...)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if missing := h.NotReady(); len(missing) > 0 {
			http.Error(w, "not ready: "+strings.Join(missing, "\nnot ready: "), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4, DisableCompression: true}))
	return mux
}
