package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func (a *app) rotateStatusCommand() *cobra.Command {
	var watch bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Say which step the rotation is at, how far it is, and who is waited for and why",
		Long: "Say where the rotation stands: its steps, how many agents and pods hold the bundle, who is waited for and why, with\n" +
			"the words of an Envoy that rejected it, and until when. Who is excused and who is passed over stand apart.\n\n" +
			"The exit code is 0 when none is under way or the next step is about to be taken, and 3 when a step waits for somebody\n" +
			"or the CA cannot go on. With --watch it goes on until the rotation is over: 0 when it is done, 3 when it ended\n" +
			"otherwise. Ctrl-C ends the watching alone; the rotation goes on.",
		Example: "  signet rotate status\n" +
			"  signet rotate status -o wide       # nodes, clusters, UIDs, who can be forced over, and what was before\n" +
			"  signet rotate status --watch       # painted anew on a terminal, else a line for each change\n" +
			"  signet rotate status -w -o json    # an event a line\n" +
			"  signet rotate status -o jsonpath='{range .gates[*].blockers[?(@.nack)]}{.name}{\"\\t\"}{.nack}{\"\\n\"}{end}'",
		Args: noArgs,
	}
	o := outputFlags(c)
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on until the rotation is over")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if watch {
			return a.follow(c.Context(), o, follow{})
		}
		v, err := once(a, func(ch *channel) (*rotationView, error) { return a.rotation(c.Context(), ch) })
		if err != nil {
			return err
		}
		if err := a.print(o, result{object: v, text: v.text}); err != nil {
			return err
		}
		return v.finding()
	}
	return c
}

// finding is what the exit code of status follows from.
func (v *rotationView) finding() error {
	switch g := v.next(); {
	case v.State == rotationTrouble:
		return &findings{summary: "the CA cannot go on: " + v.Trouble.Reason + after(": ", v.Trouble.Detail)}
	case v.State == rotationWaiting && g.rests():
		return &findings{summary: fmt.Sprintf("it waits to %s, for %d, which ends by itself%s", stepText(g.Step, g.Authority), g.Blocking, after(" ", v.ends(g)))}
	case v.State == rotationWaiting:
		return &findings{summary: fmt.Sprintf("it waits to %s, for %d; who is in the way can be mended, excused (signet rotate excuse) or waited for", stepText(g.Step, g.Authority), g.Blocking)}
	}
	return nil
}
