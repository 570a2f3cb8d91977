package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/cmd/signet/demo"
)

// defaultSocket is where signet-ca listens for its operator unless its configuration says otherwise.
const defaultSocket = "/run/signet-ca/admin.sock"

// socketEnv names the admin socket where --socket does not.
const socketEnv = "SIGNET_ADMIN_SOCKET"

// app is one invocation: the world it runs in, then what its flags said.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	now            func() time.Time
	tty            func(io.Writer) bool
	poll           time.Duration // between two looks of --watch
	silence        time.Duration // after which a stream of the CA is given up
	version        string        // of the link; empty: the module's

	name      string        // how people call this binary: "signet" or "kubectl signet"
	socket    string        // --socket
	operators operatorFlags // the way to a CA in a cluster
	timeout   time.Duration // --timeout: bounds each request
	started   bool          // a command's own code ran: what fails from here on is no longer a usage error
}

// The groups of help, in the order in which they are shown.
const (
	groupStart   = "start"
	groupLook    = "look"
	groupOperate = "operate"
	groupMigrate = "migrate"
	groupRun     = "run"
)

func helpGroups() []*cobra.Group {
	return []*cobra.Group{
		{ID: groupStart, Title: "Start"},
		{ID: groupLook, Title: "Look"},
		{ID: groupOperate, Title: "Operate"},
		{ID: groupMigrate, Title: "Migrate"},
		{ID: groupRun, Title: "Run"},
	}
}

// commands lists what hangs directly below the root. A new command is one line here and one file beside this one.
func (a *app) commands() []*cobra.Command {
	return []*cobra.Command{
		inGroup(groupStart, demo.Command()),
		inGroup(groupStart, a.installCommand()),
		inGroup(groupStart, a.checkCommand()),
		inGroup(groupStart, a.uninstallCommand()),
		inGroup(groupLook, a.svidCommand()),
		inGroup(groupLook, a.bundleCommand()),
		inGroup(groupLook, a.authorityCommand()),
		inGroup(groupLook, a.nodeCommand()),
		inGroup(groupLook, a.auditCommand()),
		inGroup(groupLook, a.whyCommand()),
		inGroup(groupLook, a.explainCommand()),
		inGroup(groupOperate, a.rotateCommand()),
		inGroup(groupOperate, a.backupCommand()),
		inGroup(groupOperate, a.breakGlassCommand()),
		inGroup(groupRun, a.completionCommand()),
		a.versionCommand(),
		exitCodesTopic(),
	}
}

func inGroup(id string, c *cobra.Command) *cobra.Command {
	c.GroupID = id
	return c
}

// main runs one command line, argv[0] first, and returns the exit code.
func (a *app) main(argv []string) int {
	name, args := invocation(argv)
	a.name = name
	root := a.root()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(context.Background())
	return a.exitCode(cmd, err)
}

// invocation tells from argv[0] how the binary was called. kubectl finds a plugin as kubectl-signet and asks
// kubectl_complete-signet for completions.
func invocation(argv []string) (name string, args []string) {
	if len(argv) == 0 {
		return "signet", nil
	}
	args = argv[1:]
	switch strings.TrimSuffix(filepath.Base(argv[0]), ".exe") {
	case "kubectl-signet":
		return "kubectl signet", args
	case "kubectl_complete-signet":
		return "kubectl signet", append([]string{cobra.ShellCompRequestCmd}, args...)
	}
	return "signet", args
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "signet",
		Short: "Look at and operate a Signet CA",
		Long: "Signet gives each workload of a Kubernetes cluster a short-lived SPIFFE identity. This is its operator's tool;\n" +
			"it speaks to the CA over the CA's admin socket, or through a cluster as kubectl does, as one of three roles.",
		Example: "  signet demo                   # see it work, on this machine\n" +
			"  signet install | kubectl apply -f -\n" +
			"  signet check --wait           # is it working in the cluster? If not, what to do?\n" +
			"  signet svid list              # which pod holds which SVID, and who acknowledged it\n" +
			"  signet svid inspect web.pem   # is this certificate a correct SVID?\n" +
			"  signet rotate status          # which step the root's rotation is at, and who is waited for\n" +
			"  signet backup signet.backup   # all that the CA holds, sealed under its seal key\n" +
			"  signet why 4be1f0a7c2d95e38   # why was this request refused?\n" +
			"  signet explain SGN-0106       # what an error means and what to do",
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: a.name},
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.CompletionOptions.DisableDefaultCmd = true
	root.PersistentFlags().StringVar(&a.socket, "socket", "", "`PATH` of the CA's admin socket (default $"+socketEnv+", then "+defaultSocket+")")
	root.PersistentFlags().DurationVar(&a.timeout, "timeout", 10*time.Second, "give up on a request after this `DURATION`; 0 waits")
	root.MarkPersistentFlagFilename("socket")
	a.operators.add(root)

	root.AddCommand(a.commands()...)
	used := map[string]bool{}
	for _, c := range root.Commands() {
		used[c.GroupID] = true
	}
	for _, g := range helpGroups() {
		if used[g.ID] {
			root.AddGroup(g)
		}
	}
	root.SetHelpFunc(func(c *cobra.Command, _ []string) { a.help(c, a.stdout) })
	root.SetUsageFunc(func(c *cobra.Command) error { a.help(c, a.stderr); return nil })
	root.SetHelpCommand(a.helpCommand())
	root.InitDefaultHelpCmd()
	a.prepare(root)
	return root
}

// prepare gives every command of the tree what all have in common: a command with children shows its help, or says that
// it has no such child; and a.started is set once a command's own code runs.
func (a *app) prepare(c *cobra.Command) {
	if c.HasSubCommands() && !c.Runnable() {
		c.SuggestionsMinimumDistance = 2
		c.Args = cobra.ArbitraryArgs
		c.RunE = func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(c, args[0])
			}
			return c.Help()
		}
	}
	if run := c.RunE; run != nil {
		c.RunE = func(c *cobra.Command, args []string) error {
			if a.timeout < 0 {
				return usageError{fmt.Errorf("--timeout %s is negative", a.timeout)}
			}
			a.started = true
			return run(c, args)
		}
	}
	for _, child := range c.Commands() {
		a.prepare(child)
	}
}

// noArgs refuses arguments.
func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%s takes no argument, and %q is one", c.CommandPath(), args[0])
	}
	return nil
}

// oneArg wants exactly one argument, which what describes.
func oneArg(what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("%s takes one argument, %s; there are %d", c.CommandPath(), what, len(args))
		}
		return nil
	}
}

func unknownCommand(c *cobra.Command, word string) error {
	err := fmt.Errorf("%s has no command %q", c.CommandPath(), word)
	if near := c.SuggestionsFor(word); len(near) > 0 {
		err = fmt.Errorf("%w; did you mean %s?", err, strings.Join(near, ", "))
	}
	return usageError{err}
}
