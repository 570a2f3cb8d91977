package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// help prints what c does, its example first: most readers look for a line to copy.
func (a *app) help(c *cobra.Command, w io.Writer) {
	c.InitDefaultHelpFlag()
	if !c.Runnable() && !c.HasSubCommands() { // a topic
		fmt.Fprintln(w, strings.TrimSpace(c.Long))
		return
	}
	if c.Example != "" {
		fmt.Fprintf(w, "Examples:\n%s\n\n", a.asCalled(c.Example))
	}
	about := c.Long
	if about == "" {
		about = c.Short
	}
	fmt.Fprintf(w, "%s\n\nUsage:\n", strings.TrimSpace(about))
	if !c.HasAvailableSubCommands() || c.Flags().Lookup("output") != nil { // one that answers has a format
		fmt.Fprintf(w, "  %s\n", c.UseLine())
	}
	if c.HasAvailableSubCommands() {
		fmt.Fprintf(w, "  %s COMMAND\n", c.CommandPath())
	}
	listCommands(w, c)
	if c.HasAvailableLocalFlags() {
		fmt.Fprintf(w, "\nFlags:\n%s", c.LocalFlags().FlagUsages())
	}
	if c.HasAvailableInheritedFlags() {
		fmt.Fprintf(w, "\nGlobal flags:\n%s", c.InheritedFlags().FlagUsages())
	}
	if !c.HasParent() {
		fmt.Fprintf(w, "\n%s COMMAND --help tells more; exit codes: %s help exit-codes\n", c.CommandPath(), c.CommandPath())
	}
}

func listCommands(w io.Writer, c *cobra.Command) {
	section := func(title, group string) {
		headed := false
		for _, s := range c.Commands() {
			shown := s.IsAvailableCommand() || s.IsAdditionalHelpTopicCommand() || s.Name() == "help"
			if !shown || s.Hidden || s.GroupID != group {
				continue
			}
			if !headed {
				fmt.Fprintf(w, "\n%s:\n", title)
				headed = true
			}
			fmt.Fprintf(w, "  %-12s %s\n", s.Name(), s.Short)
		}
	}
	if len(c.Groups()) == 0 {
		section("Commands", "")
		return
	}
	for _, g := range c.Groups() {
		section(g.Title, g.ID)
	}
	section("Also", "")
}

// asCalled rewrites lines to type so that they start with the name under which this binary was called.
func (a *app) asCalled(text string) string {
	if a.name == "signet" {
		return text
	}
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		body := strings.TrimLeft(l, " ")
		if rest, ok := strings.CutPrefix(body, "signet "); ok {
			lines[i] = l[:len(l)-len(body)] + a.name + " " + rest
		}
	}
	return strings.Join(lines, "\n")
}

func (a *app) helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Help about any command",
		Example: "  signet help svid list\n" +
			"  signet help exit-codes",
		RunE: func(c *cobra.Command, args []string) error {
			root := c.Root()
			found, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				if found == nil {
					found = root
				}
				return unknownCommand(found, strings.Join(rest, " "))
			}
			return found.Help()
		},
		ValidArgsFunction: func(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			found, rest, err := c.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			var names []string
			for _, s := range found.Commands() {
				names = append(names, cobra.CompletionWithDesc(s.Name(), s.Short))
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
	}
}

func exitCodesTopic() *cobra.Command {
	return &cobra.Command{
		Use:   "exit-codes",
		Short: "What the exit code of a command means",
		Long: `Exit codes:
  0    good
  1    failed; the error says what, why, and what to type next
  2    usage: the command line is wrong, nothing was done
  3    findings: the command worked, and something is not as it should be
       (svid inspect: the certificate breaks a rule; svid list --check: an
       SVID has expired, its renewal fails, or a proxy rejected it; check:
       something is bad or unknown; uninstall: pods have the volume; rotate
       status: a step waits for somebody, or the rotation that was watched
       ended without being done; rotate plan: something stands in the way
       that does not pass by itself)
  124  timed out; safe to run again
  130  rotate --wait: Ctrl-C ended the waiting; the rotation goes on

A command that a signal ends, ends by that signal. With --watch, Ctrl-C is
how one leaves, and the exit code is 0.`,
	}
}
