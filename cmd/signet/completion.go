package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// completionTimeout is how long a press of Tab may wait for the CA.
const completionTimeout = 2 * time.Second

func (a *app) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish|powershell",
		Short: "Print a shell's completion script",
		Long: "Print a shell's completion script. It completes commands and flags, and asks the CA for SPIFFE IDs, pods,\n" +
			"namespaces, authorities, and who a rotation waits for.",
		Example: "  source <(signet completion bash)\n" +
			"  signet completion zsh > \"${fpath[1]}/_signet\"\n" +
			"  signet completion fish > ~/.config/fish/completions/signet.fish",
		Args:      cobra.MatchAll(oneArg("a shell"), cobra.OnlyValidArgs),
		ValidArgs: []string{"bash", "zsh", "fish", "powershell"},
		RunE: func(c *cobra.Command, args []string) error {
			root := c.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.stdout, true)
			case "zsh":
				return root.GenZshCompletion(a.stdout)
			case "fish":
				return root.GenFishCompletion(a.stdout, true)
			}
			return root.GenPowerShellCompletionWithDesc(a.stdout)
		},
	}
}

// complete asks the CA for words. Whatever goes wrong, the answer is no words: there is no place to show an error.
func complete[R any](a *app, c *cobra.Command, list func(context.Context, *channel) (R, error), words func(R) []string) ([]string, cobra.ShellCompDirective) {
	if cluster, err := a.throughCluster(); err != nil || cluster && !a.operators.given() {
		return nil, cobra.ShellCompDirectiveNoFileComp // nobody's key press is to ask a cluster for a token
	}
	a.timeout = completionTimeout
	r, err := once(a, func(ch *channel) (R, error) { return list(c.Context(), ch) })
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	found := slices.DeleteFunc(words(r), func(w string) bool { return !plainWord(w) })
	slices.Sort(found)
	return slices.Compact(found), cobra.ShellCompDirectiveNoFileComp
}

// plainWord lets through only what no shell acts upon: the words come from peers.
func plainWord(w string) bool {
	return w != "" && !strings.ContainsFunc(w, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-/:", r))
	})
}

func (a *app) completeNamespaces(c *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return complete(a, c, func(ctx context.Context, ch *channel) (*svidList, error) {
		return a.listSVIDs(ctx, ch, &apiv1.ListSVIDsRequest{})
	}, func(l *svidList) (words []string) {
		for _, v := range l.Items {
			words = append(words, v.Namespace)
		}
		return words
	})
}

func (a *app) completeSVIDs(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return complete(a, c, func(ctx context.Context, ch *channel) (*svidList, error) {
		return a.listSVIDs(ctx, ch, &apiv1.ListSVIDsRequest{})
	}, func(l *svidList) (words []string) {
		for _, v := range l.Items {
			if _, err := api.ParseWorkloadID(v.SPIFFEID); err == nil {
				words = append(words, v.SPIFFEID)
			}
			words = append(words, v.Metadata.Name)
		}
		return words
	})
}

func (a *app) completeAuthorities(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return complete(a, c, a.listAuthorities, func(l *authorityList) (words []string) {
		for _, v := range l.all() {
			words = append(words, v.ID)
		}
		return words
	})
}
