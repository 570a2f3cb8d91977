// Command signet-agent keeps the identities of one node fresh and serves them to the node's workloads.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/internal/daemon"
)

// version is set at build time.
var version = "devel"

func main() { os.Exit(realMain()) }

func realMain() int {
	if err := daemon.Harden(); err != nil {
		fmt.Fprintln(os.Stderr, "signet-agent: core dumps could not be turned off:", err)
		return daemon.ExitFailed
	}
	if err := newCommand().Execute(); err != nil {
		daemon.Fail(os.Stderr, "signet-agent", err)
		if errors.As(err, new(usageError)) {
			return daemon.ExitUsage
		}
		return daemon.ExitFailed
	}
	return 0
}

// usageError marks what was wrong with the command line itself.
type usageError struct{ error }

// Unwrap returns the error within.
func (e usageError) Unwrap() error { return e.error }

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "signet-agent",
		Short:         "Keep the identities of one node fresh",
		Example:       "  signet-agent run --config /etc/signet/agent.yaml",
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command %q; see %s --help", args[0], c.CommandPath())}
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %s --help", err, c.CommandPath())}
	})
	o := &options{}
	root.PersistentFlags().StringVar(&o.config, "config", "/etc/signet/agent.yaml", "the configuration file")
	root.PersistentFlags().StringVar(&o.logFormat, "log-format", "", "json or text (default: text on a terminal, json elsewhere)")
	root.PersistentFlags().StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
	root.AddCommand(runCommand(o), checkCommand(o))
	return root
}

// noArgs refuses words that mean nothing.
func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("unexpected %q; see %s --help", args[0], c.CommandPath())}
	}
	return nil
}

type options struct{ config, logFormat, logLevel string }
