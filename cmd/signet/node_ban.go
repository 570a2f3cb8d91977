package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// maxReason is how many bytes of a reason the record keeps.
const maxReason = 256

// A nodeDecision is what was decided about a node, or would be.
type nodeDecision struct {
	header
	TrustDomain   string    `json:"trustDomain"`
	Generation    string    `json:"generation"` // of the bundle, EPOCH.NUMBER
	Node          *nodeView `json:"node"`
	Changed       bool      `json:"changed"`
	DryRun        bool      `json:"dryRun,omitempty"`
	SessionsEnded uint32    `json:"sessionsEnded,omitempty"`
	CorrelationID string    `json:"correlationID,omitempty"` // under which it is on record
}

// nodeFlags are those that ban and allow share.
type nodeFlags struct {
	cluster, reason string
	dryRun, yes     bool
}

func (f *nodeFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.cluster, "cluster", "", "`ISSUER` of the cluster's tokens, where two clusters have such a node")
	c.Flags().StringVar(&f.reason, "reason", "", "why, in your `WORDS`; goes on record")
	c.Flags().BoolVar(&f.dryRun, "dry-run", false, "say what it would touch, and change nothing")
	c.Flags().BoolVarP(&f.yes, "yes", "y", false, "do not ask for the node's name once more")
}

func (a *app) checkNodeFlags(f *nodeFlags) error {
	if len(f.reason) > maxReason {
		return usageError{fmt.Errorf("--reason has %d bytes, and %d are kept", len(f.reason), maxReason)}
	}
	if !f.yes && !f.dryRun && !a.interactive() {
		return usageError{errors.New("nobody is here to be asked: --dry-run says what it would touch, --yes does it")}
	}
	return nil
}

func (a *app) nodeBanCommand() *cobra.Command {
	var f nodeFlags
	c := &cobra.Command{
		Use:   "ban NODE",
		Short: "End all that a node's agent may do, until it is allowed again",
		Long: "Ban a node, by its name or its UID: its agent's session ends, its own SVID is worth nothing to the CA any more, and\n" +
			"no pod on it is issued anything, whoever asks. It lasts over restarts, until signet node allow.\n\n" +
			"What the node holds stays valid until it expires: workloads verify each other without asking the CA. The answer\n" +
			"says until when. Cut the node off from the network meanwhile; docs/nodes.md says what a stolen node is worth and\n" +
			"what else to do. A node that is made anew under the same name has another UID, and is not banned.",
		Example: "  signet node ban node-7 --dry-run                        # which identities that touches, until when they are valid\n" +
			"  signet node ban node-7 --reason 'stolen from rack 7'\n" +
			"  signet node ban 5e0f1c9a-7a52-4d3f-9a53-3d6f0c1b2a47 --yes -o json",
		Args:              oneArg("the name or the UID of a node"),
		ValidArgsFunction: a.completeNodes(false),
	}
	f.add(c)
	o := outputFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := a.checkNodeFlags(&f); err != nil {
			return err
		}
		d, err := once(a, func(ch *channel) (*nodeDecision, error) { return a.banNode(c.Context(), ch, args[0], &f) })
		if err != nil {
			return err
		}
		if err := a.print(o, result{object: d, text: func(bool) []block { return describeBan(d, a.now()) }}); err != nil {
			return err
		}
		if o.isText() && !d.DryRun {
			a.say("a ban takes nothing back: until then others take what it holds, so keep it from their network. Next: kubectl cordon %s; docs/nodes.md has the rest", shellWord(d.Node.Metadata.Name))
		}
		return nil
	}
	return c
}

// banNode looks first, and asks, and bans then what it has shown: by UID, so that it is no other node meanwhile.
func (a *app) banNode(ctx context.Context, ch *channel, node string, f *nodeFlags) (*nodeDecision, error) {
	d, err := a.aboutTrust(ctx, ch, "NodeBan")
	if err != nil {
		return nil, err
	}
	send := func(r *apiv1.BanNodeRequest) error {
		resp, err := ask(ctx, a, ch, ch.BanNode, r)
		if err != nil {
			return a.nodeFailed(node, err)
		}
		touched := d.Node // as the dry run said: a ban itself is not held up by a list
		d.Node, d.Changed, d.SessionsEnded, d.CorrelationID = newNodeView(resp.GetNode()), resp.GetChanged(), resp.GetSessionsEnded(), resp.GetCorrelationId()
		d.Node.take(touched)
		d.DryRun = r.GetDryRun()
		d.Metadata = d.Node.Metadata
		return nil
	}
	if err := send(&apiv1.BanNodeRequest{Node: node, Cluster: f.cluster, Reason: f.reason, DryRun: true}); err != nil || f.dryRun {
		return d, err
	}
	if !d.Changed { // that it is so already is as good
		d.DryRun = false
		return d, nil
	}
	if !f.yes {
		if err := a.confirm(d, "ban it", describeBan(d, a.now())...); err != nil {
			return nil, err
		}
	}
	return d, send(&apiv1.BanNodeRequest{Node: d.Node.UID, Cluster: d.Node.Cluster, Reason: f.reason})
}

// aboutTrust begins a decision with what it is about.
func (a *app) aboutTrust(ctx context.Context, ch *channel, kind string) (*nodeDecision, error) {
	st, err := ask(ctx, a, ch, ch.GetStatus, &apiv1.GetStatusRequest{})
	if err != nil {
		return nil, err
	}
	g := api.Generation{Epoch: st.GetEpoch(), Number: st.GetNumber()}
	return &nodeDecision{header: newHeader(kind, ""), TrustDomain: st.GetTrustDomain(), Generation: g.String()}, nil
}

// interactive reports whether there is somebody to ask.
func (a *app) interactive() bool {
	in, ok := a.stdin.(*os.File)
	return ok && a.tty(in) && a.tty(a.stderr)
}

// confirm shows the plan and wants the node's name typed.
func (a *app) confirm(d *nodeDecision, what string, plan ...block) error {
	o := output{format: "table"}
	for i, b := range plan {
		if err := o.block(a.stderr, b, i == 0); err != nil {
			return err
		}
	}
	name := d.Node.Metadata.Name
	fmt.Fprintf(a.stderr, "\nType %s to %s: ", scrub(name), what)
	typed, err := bufio.NewReader(io.LimitReader(a.stdin, 1<<10)).ReadString('\n')
	if err != nil && err != io.EOF {
		return err
	}
	if strings.TrimSpace(typed) != name {
		return usageError{fmt.Errorf("that is not %s: nothing was changed", name)}
	}
	return nil
}

func describeBan(d *nodeDecision, now time.Time) []block {
	v := d.Node
	ban := pair{"Banned", banned(v.Ban, now)}
	sessions := plural(int(d.SessionsEnded), "session") + " ended"
	switch {
	case d.DryRun && d.Changed:
		ban = pair{"Would be banned", "by " + v.Ban.By + after(": ", v.Ban.Reason)}
		sessions = plural(int(d.SessionsEnded), "session") + " would end"
	case !d.Changed:
		ban.value += "; it was banned already"
		sessions = ""
	}
	about := known(
		pair{"Trust domain", d.TrustDomain + ", generation " + d.Generation},
		pair{"Node", v.Metadata.Name + uid(v.UID)},
		pair{"Cluster", v.Cluster},
		ban,
		pair{"Agent", sessions},
		pair{"Stays valid", v.validity(now)},
		pair{"On record", d.CorrelationID},
	)
	return []block{{pairs: about}, touched(v)}
}

// take adds the identities of which the dry run before has told; nil: there was none.
func (v *nodeView) take(dry *nodeView) {
	if dry != nil && len(v.SPIFFEIDs) == 0 {
		v.SPIFFEIDs, v.MoreIDs = dry.SPIFFEIDs, dry.MoreIDs
	}
}

// touched lists the identities of a node.
func touched(v *nodeView) block {
	var rows [][]string
	for _, id := range v.SPIFFEIDs {
		rows = append(rows, []string{id})
	}
	if v.MoreIDs > 0 {
		rows = append(rows, []string{fmt.Sprintf("and %d more, as its agent says", v.MoreIDs)})
	}
	return block{table: table([]column{{name: "identity"}}, rows)}
}

func banned(b *banView, now time.Time) string {
	if b == nil {
		return ""
	}
	return instant(b.at, now) + " by " + b.By + after(": ", b.Reason)
}

func (a *app) nodeAllowCommand() *cobra.Command {
	var f nodeFlags
	c := &cobra.Command{
		Use:   "allow NODE",
		Short: "Take the ban of a node back",
		Long: "Take a ban back, by the node's name or its UID. Its agent comes back by itself, within minutes, and with it whoever\n" +
			"owns the node. One that was stolen is installed anew: then it has another UID, and there is nothing to allow.",
		Example: "  signet node allow node-7 --dry-run                      # who banned it, when and why\n" +
			"  signet node allow node-7 --reason 'it was only moved'\n" +
			"  signet node allow 5e0f1c9a-7a52-4d3f-9a53-3d6f0c1b2a47   # of a node that is gone, so that it leaves the list",
		Args:              oneArg("the name or the UID of a node"),
		ValidArgsFunction: a.completeNodes(true),
	}
	f.add(c)
	o := outputFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := a.checkNodeFlags(&f); err != nil {
			return err
		}
		d, err := once(a, func(ch *channel) (*nodeDecision, error) { return a.allowNode(c.Context(), ch, args[0], &f) })
		if err != nil {
			return err
		}
		return a.print(o, result{object: d, text: func(bool) []block { return []block{describeAllow(d, a.now())} }})
	}
	return c
}

// allowNode looks first, and asks, and allows then what it has shown: by UID, so that it is no other node meanwhile.
func (a *app) allowNode(ctx context.Context, ch *channel, node string, f *nodeFlags) (*nodeDecision, error) {
	d, err := a.aboutTrust(ctx, ch, "NodeAllow")
	if err != nil {
		return nil, err
	}
	send := func(r *apiv1.AllowNodeRequest) error {
		resp, err := ask(ctx, a, ch, ch.AllowNode, r)
		if err != nil {
			return a.nodeFailed(node, err)
		}
		touched := d.Node
		d.Node, d.Changed, d.CorrelationID, d.DryRun = newNodeView(resp.GetNode()), resp.GetChanged(), resp.GetCorrelationId(), r.GetDryRun()
		d.Node.take(touched)
		d.Metadata = d.Node.Metadata
		return nil
	}
	if err := send(&apiv1.AllowNodeRequest{Node: node, Cluster: f.cluster, Reason: f.reason, DryRun: true}); err != nil || f.dryRun {
		return d, err
	}
	if !d.Changed { // that it is so already is as good
		d.DryRun = false
		return d, nil
	}
	if !f.yes {
		if err := a.confirm(d, "let its agent in again", describeAllow(d, a.now())); err != nil {
			return nil, err
		}
	}
	return d, send(&apiv1.AllowNodeRequest{Node: d.Node.UID, Cluster: d.Node.Cluster, Reason: f.reason})
}

func describeAllow(d *nodeDecision, now time.Time) block {
	state := "it is not banned any more"
	switch {
	case !d.Changed:
		state = "it was not banned"
	case d.DryRun:
		state = "it would not be banned any more"
	}
	return block{pairs: known(
		pair{"Trust domain", d.TrustDomain + ", generation " + d.Generation},
		pair{"Node", d.Node.Metadata.Name + uid(d.Node.UID)},
		pair{"Cluster", d.Node.Cluster},
		pair{"Allowed", state},
		pair{"Was banned", banned(d.Node.Ban, now)},
		pair{"On record", d.CorrelationID},
	)}
}

// nodeFailed adds what to do about a node that was not found, or found twice.
func (a *app) nodeFailed(node string, err error) error {
	f, ok := errors.AsType[*failure](err)
	if !ok {
		return err
	}
	switch f.err.Reason {
	case api.NotFound:
		f.err = api.Wrap(api.NotFound, f.err, fmt.Sprintf("there is no node %.253s", node))
		f.why = "It has no session, holds no SVID that this CA issued, is not banned, and no cluster of the CA has it now. By its UID it may be banned all the same."
		f.next, f.deaf = "signet node list", true
	case api.NodeAmbiguous:
		f.next, f.deaf = "signet node list -o wide", true
	}
	return f
}

// shellWord is a name as it goes into a line to type, or a placeholder where that would need care.
func shellWord(name string) string {
	if !plainWord(name) {
		return "NODE"
	}
	return name
}
