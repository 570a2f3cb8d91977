// Package demo is `signet demo`: the main job of Signet shown in one command, on real processes.
//
// It starts signet-ca and signet-agent, two real Envoys (Go programs' worth of TLS where there is no Envoy) that take
// their certificates from the agent, and a constant stream of new mutual TLS connections between them. While that runs,
// SVIDs rotate, an intruder knocks, the CA and the agent are killed and come back; the report counts what failed.
//
// What it shows is real but for one part: the tokens of the workloads come from a stand-in inside this process, because
// there is no Kubernetes here. All state lives in one folder of this user alone, in memory where the system offers that;
// it goes away with the demo, and so does every process, even when the demo is killed.
package demo

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
)

// EnvoyEnv names the environment variable with the path of the Envoy to show Signet with.
const EnvoyEnv = "SIGNET_ENVOY"

// Config says how to run a demo. Its zero value runs one beside the running executable and prints nothing.
type Config struct {
	BinDir  string // folder of signet-ca and signet-agent; empty: that of the running executable
	Envoy   string // path of an Envoy; empty: $SIGNET_ENVOY, then .cache/envoy/VERSION/envoy, then PATH
	NoEnvoy bool   // show it with Go peers even where there is an Envoy
	Keep    bool   // leave the folder with all configurations and logs behind, keys and tokens too
	JSON    bool   // progress as NDJSON, the report as one JSON object

	Stdout io.Writer // the report; nil: nowhere
	Stderr io.Writer // progress; nil: nowhere

	bases []string // where the demo's folder may be made, best first; nil: in memory, else where temporary files are
}

// formats of -o.
var formats = []string{"table", "json"}

// Command returns `signet demo`. Its exit codes are those of the tool: 0 when nothing failed and the intruder was
// refused, 1 otherwise, 2 for usage, 124 when --timeout passed first; a signal ends it by that signal once everything is
// cleaned up.
func Command() *cobra.Command {
	var cfg Config
	var format string
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "demo",
		Short: "Show it all on this machine: two Envoys, mTLS, rotation, kills, an intruder",
		Long: "Starts a CA, an agent and two Envoys on this machine, sends requests through them on a new mutual TLS connection\n" +
			"each, and shows that none fails while certificates rotate every few seconds, while the CA is killed, and while the\n" +
			"agent is killed; and that a workload with a valid SVID of its own is refused where it has no business.\n\n" +
			"Everything listens on loopback or Unix sockets, lives in one temporary folder, and is gone at the end. Tokens come\n" +
			"from a stand-in for the Kubernetes API server. Without an Envoy the same is shown with Go programs.",
		Example: "  signet demo\n" +
			"  signet demo --no-envoy\n" +
			"  signet demo -o json | jq .passed",
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) > 0:
				return fmt.Errorf("demo takes no argument, and not %q", args[0])
			case !slices.Contains(formats, format):
				return fmt.Errorf("-o %s is not one of %s", format, strings.Join(formats, ", "))
			case cfg.NoEnvoy && cfg.Envoy != "":
				return fmt.Errorf("--no-envoy and --envoy exclude each other")
			case timeout < 0:
				return fmt.Errorf("--timeout %s is negative", timeout)
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error {
			cfg.JSON, cfg.Stdout, cfg.Stderr = format == "json", c.OutOrStdout(), c.ErrOrStderr()
			return interruptible(c.Context(), timeout, cfg)
		},
	}
	c.Flags().StringVar(&cfg.BinDir, "bin-dir", "", "folder with signet-ca and signet-agent (default: that of signet)")
	c.Flags().StringVar(&cfg.Envoy, "envoy", "", "path of Envoy (default $"+EnvoyEnv+", then "+cachedEnvoy+", then PATH)")
	c.Flags().BoolVar(&cfg.NoEnvoy, "no-envoy", false, "use Go programs in place of Envoy")
	c.Flags().BoolVar(&cfg.Keep, "keep", false, "leave the folder behind: configurations, logs, keys and tokens")
	c.Flags().StringVarP(&format, "output", "o", "table", "format: "+strings.Join(formats, "|"))
	c.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "give up after this long; 0 waits")
	_ = c.MarkFlagDirname("bin-dir") // the flags are defined above
	_ = c.MarkFlagFilename("envoy")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// interruptible runs a demo that a signal or the timeout ends. After a signal it cleans up and then ends by that very
// signal, so that a shell sees what happened.
func interruptible(ctx context.Context, timeout time.Duration, cfg Config) error {
	signals := make(chan os.Signal, 1)
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(sig) { // by nohup, say
			signal.Notify(signals, sig)
		}
	}
	defer signal.Stop(signals)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if timeout > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, timeout, api.E(api.DeadlineExceeded, "the demo did not end within %s", timeout))
		defer stop()
	}
	result := make(chan error, 1)
	go func() { result <- Run(ctx, cfg) }()
	select {
	case err := <-result:
		return err
	case sig := <-signals:
		cancel(api.E(api.Canceled, "ended by signal %q", sig))
		err := <-result // cleaning up takes a moment and cannot be interrupted
		signal.Reset(sig)
		if self, ferr := os.FindProcess(os.Getpid()); ferr == nil && self.Signal(sig) == nil {
			<-time.After(time.Second) // the signal ends the process before
		}
		return err
	}
}
