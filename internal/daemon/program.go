package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

// Program is the command line of a daemon whose configuration, loaded, is a C. It has the commands `run` and
// `check-config` and those of Others; all take --config, --log-format and --log-level.
type Program[C any] struct {
	Name    string // of the binary: "signet-ca"
	Short   string // what it is, one line
	Version string
	Config  string // where the configuration lies unless --config says otherwise
	// Load reads the configuration and reports all that is wrong with it; it changes nothing.
	Load func(path string) (C, error)

	// Run is the daemon itself; its context ends at SIGTERM or SIGINT.
	Run      func(ctx context.Context, c C, log *slog.Logger) error
	RunShort string // one line
	RunLong  string // empty: RunShort

	// Check looks at what Load does not, changes nothing, and returns what `check-config` says beside "PATH is good".
	Check      func(c C) (string, error)
	CheckShort string // one line

	Others []Command[C]
}

// Command is a command of one daemon alone.
type Command[C any] struct {
	Name  string
	Short string // one line
	Long  string // empty: Short
	Do    func(ctx context.Context, c C, out io.Writer) error
	Flags func(c *cobra.Command) // adds flags of its own; nil: there are none
	// Look is in place of Do for a command that takes one word at most, named by Words: "[DIR]". It loads the configuration
	// only if it needs it. Word is empty where there is none.
	Words string
	Look  func(ctx context.Context, load func() (C, error), word string, out io.Writer) error
	// Others are what a command consists of that has neither Do nor Look.
	Others []Command[C]
}

// Findings is returned by a command that did what it should and found that something is not as it should be.
type Findings struct{ Text string }

// Error returns the text.
func (f *Findings) Error() string { return f.Text }

// Main runs the command line of the process and returns its exit code. Before it reads a byte it makes sure that a crash
// leaves no keys on a disk.
func (p Program[C]) Main() int {
	if err := Harden(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: core dumps could not be turned off: %v\n", p.Name, err)
		return ExitFailed
	}
	return p.execute(os.Args[1:], os.Stdout, os.Stderr)
}

func (p Program[C]) execute(args []string, stdout, stderr io.Writer) int {
	root := p.root(stderr)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.Execute()
	if err == nil {
		return 0
	}
	Fail(stderr, p.Name, err)
	if errors.As(err, new(usageError)) {
		return ExitUsage
	}
	if _, ok := errors.AsType[*Findings](err); ok {
		return ExitFindings
	}
	return ExitFailed
}

// usageError marks what was wrong with the command line itself.
type usageError struct{ error }

// Unwrap returns the error within.
func (e usageError) Unwrap() error { return e.error }

// Usage marks an error of a command as one of its command line: exit code 2.
func Usage(err error) error { return usageError{err} }

// root returns the whole command line. The daemon's log goes to stderr.
func (p Program[C]) root(stderr io.Writer) *cobra.Command {
	var config, logFormat, logLevel string
	run := p.command("run", p.RunShort, p.RunLong, func(*cobra.Command) error {
		log, err := NewLogger(stderr, logFormat, logLevel)
		if err != nil {
			return usageError{err}
		}
		c, err := p.Load(config)
		if err != nil {
			return err
		}
		ctx, stop := Signals()
		defer stop()
		return p.Run(ctx, c, log)
	})
	check := p.command("check-config", p.CheckShort, "", func(cmd *cobra.Command) error {
		c, err := p.Load(config)
		if err != nil {
			return err
		}
		what, err := p.Check(c)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is good: %s\n", config, what)
		return err
	})
	root := &cobra.Command{
		Use:           p.Name,
		Short:         p.Short,
		Version:       p.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noArgs("unknown command"),
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %s --help", err, c.CommandPath())}
	})
	flags := root.PersistentFlags()
	flags.StringVar(&config, "config", p.Config, "the configuration file")
	flags.StringVar(&logFormat, "log-format", "", "json or text (default: text on a terminal, json elsewhere)")
	flags.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	root.AddCommand(run, check)
	var examples []string
	load := func() (C, error) { return p.Load(config) }
	for _, o := range p.Others {
		cmd := p.other(p.Name, o, load)
		root.AddCommand(cmd)
		examples = append(examples, cmd.Example)
	}
	root.Example = strings.Join(append(examples, run.Example), "\n")
	return root
}

// other returns the command line of one command of the daemon's own.
func (p Program[C]) other(parent string, o Command[C], load func() (C, error)) *cobra.Command {
	var cmd *cobra.Command
	switch {
	case len(o.Others) > 0:
		cmd = p.command(o.Name, o.Short, o.Long, func(cmd *cobra.Command) error { return cmd.Help() })
		cmd.Args = noArgs("unknown command")
		var examples []string
		for _, inner := range o.Others {
			sub := p.other(parent+" "+o.Name, inner, load)
			cmd.AddCommand(sub)
			examples = append(examples, sub.Example)
		}
		cmd.Example = strings.Join(examples, "\n")
	case o.Look != nil:
		cmd = p.command(o.Name, o.Short, o.Long, nil)
		cmd.Use = strings.TrimSpace(o.Name + " " + o.Words)
		cmd.Args = func(c *cobra.Command, args []string) error { return noArgs("unexpected")(c, args[min(1, len(args)):]) }
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			ctx, stop := Signals()
			defer stop()
			return o.Look(ctx, load, strings.Join(args, ""), cmd.OutOrStdout())
		}
		cmd.Example = "  " + parent + " " + cmd.Use
		if o.Flags != nil {
			o.Flags(cmd)
		}
	default:
		cmd = p.command(o.Name, o.Short, o.Long, func(cmd *cobra.Command) error {
			c, err := load()
			if err != nil {
				return err
			}
			return o.Do(cmd.Context(), c, cmd.OutOrStdout())
		})
		if o.Flags != nil {
			o.Flags(cmd)
		}
	}
	return cmd
}

func (p Program[C]) command(name, short, long string, do func(*cobra.Command) error) *cobra.Command {
	return &cobra.Command{
		Use:     name,
		Short:   short,
		Long:    long,
		Example: "  " + p.Name + " " + name + " --config " + p.Config,
		Args:    noArgs("unexpected"),
		RunE:    func(cmd *cobra.Command, _ []string) error { return do(cmd) },
	}
}

// noArgs refuses words that mean nothing, and calls them what.
func noArgs(what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageError{fmt.Errorf("%s %q; see %s --help", what, args[0], c.CommandPath())}
		}
		return nil
	}
}
