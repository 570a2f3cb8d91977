package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

func (a *app) nodeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "node",
		Short: "Nodes: whose agents are connected, and which are banned",
		Example: "  signet node list\n" +
			"  signet node ban node-7 --reason 'stolen from rack 7' --dry-run",
	}
	c.AddCommand(a.nodeListCommand(), a.nodeBanCommand(), a.nodeAllowCommand())
	return c
}

// A nodeView is what is known of one node.
type nodeView struct {
	header
	Node         string   `json:"node,omitempty"` // its name; empty where only the UID is known
	UID          string   `json:"uid"`
	Cluster      string   `json:"cluster"` // issuer of its tokens
	Connected    bool     `json:"connected"`
	AgentVersion string   `json:"agentVersion,omitempty"`
	Since        string   `json:"since,omitempty"`      // of its oldest session
	Generation   string   `json:"generation,omitempty"` // EPOCH.NUMBER of the bundle that its agent holds
	SPIFFEIDs    []string `json:"spiffeIDs"`            // of its pods
	MoreIDs      int      `json:"moreIDs,omitempty"`    // how many more its agent says that it holds
	ValidUntil   string   `json:"validUntil,omitempty"` // of the last of their SVIDs that the CA knows of
	Ban          *banView `json:"ban,omitempty"`

	since, validUntil time.Time
}

// A banView is a decision about a node.
type banView struct {
	At         string `json:"at"`
	By         string `json:"by"`
	Reason     string `json:"reason,omitempty"`
	ValidUntil string `json:"validUntil,omitempty"` // nothing that the node had at that moment is valid after

	at, validUntil time.Time
}

// A nodeList is the answer of node list.
type nodeList struct {
	header
	Items []*nodeView `json:"items"`
}

func newNodeView(in *apiv1.NodeInfo) *nodeView {
	v := &nodeView{
		header: newHeader("Node", in.GetNode()),
		Node:   in.GetNode(), UID: in.GetNodeUid(), Cluster: in.GetCluster(), Connected: in.GetConnected(), AgentVersion: in.GetAgentVersion(),
		SPIFFEIDs: append([]string{}, in.GetSpiffeIds()...), MoreIDs: int(in.GetMoreIds()), since: timeOf(in.GetSince()), validUntil: timeOf(in.GetValidUntil()),
	}
	if v.Node == "" {
		v.header = newHeader("Node", v.UID)
	}
	if g := in.GetGeneration(); g != 0 {
		v.Generation = api.FromSequence(g).String()
	}
	v.Since, v.ValidUntil = stamp(v.since), stamp(v.validUntil)
	if b := in.GetBan(); b != nil {
		v.Ban = &banView{By: b.GetBy(), Reason: b.GetReason(), at: timeOf(b.GetAt()), validUntil: timeOf(b.GetValidUntil())}
		v.Ban.At, v.Ban.ValidUntil = stamp(v.Ban.at), stamp(v.Ban.validUntil)
	}
	return v
}

func (a *app) listNodes(ctx context.Context, ch *channel) (*nodeList, error) {
	resp, err := ask(ctx, a, ch, ch.ListNodes, &apiv1.ListNodesRequest{})
	if err != nil {
		return nil, err
	}
	l := &nodeList{header: newHeader("NodeList", ""), Items: []*nodeView{}}
	for _, in := range resp.GetNodes() {
		l.Items = append(l.Items, newNodeView(in))
	}
	return l, nil
}

func (a *app) nodeListCommand() *cobra.Command {
	var watch, banned bool
	c := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the nodes whose agents are connected, that hold SVIDs, or that are banned",
		Long: "List the nodes that have a session with the replica that answers, those to which it issued an SVID that has not\n" +
			"expired, and those that are banned. IDENTITIES counts the SPIFFE IDs of their pods: what was issued, and what the\n" +
			"agent says it holds. A node is one UID: made anew under its old name it is another one, and is not banned.",
		Example: "  signet node list\n" +
			"  signet node list -o wide        # cluster, UID, until when its SVIDs are valid, who banned it and why\n" +
			"  signet node list --banned\n" +
			"  signet node list -o jsonpath='{range .items[?(@.connected==false)]}{.node}{\"\\n\"}{end}'",
		Args: noArgs,
	}
	o := outputFlags(c)
	c.Flags().BoolVar(&banned, "banned", false, "only those that are banned")
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on and print what changes")
	list := func(ctx context.Context, ch *channel) (*nodeList, error) {
		l, err := a.listNodes(ctx, ch)
		if err == nil && banned {
			l.Items = slices.DeleteFunc(l.Items, func(v *nodeView) bool { return v.Ban == nil })
		}
		return l, err
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		if watch {
			return a.watch(c.Context(), o, func(ctx context.Context, ch *channel) ([]item, error) {
				l, err := list(ctx, ch)
				if err != nil {
					return nil, err
				}
				return nodeItems(l, a.now()), nil
			})
		}
		l, err := once(a, func(ch *channel) (*nodeList, error) { return list(c.Context(), ch) })
		if err != nil {
			return err
		}
		empty := "no node has a session, holds an SVID or is banned"
		if banned {
			empty = "no node is banned"
		}
		return a.print(o, result{object: l, empty: empty, text: func(bool) []block {
			return []block{{table: nodeTable(l.Items, a.now())}}
		}})
	}
	return c
}

func nodeItems(l *nodeList, now time.Time) []item {
	items := make([]item, len(l.Items))
	for i, v := range l.Items {
		quiet := *v
		quiet.ValidUntil = "" // changes with each renewal
		items[i] = item{
			key:    v.Cluster + "\x00" + v.UID,
			object: v,
			print:  fingerprint(quiet),
			table:  func(bool) *metav1.Table { return nodeTable([]*nodeView{v}, now) },
		}
	}
	return items
}

func nodeTable(items []*nodeView, now time.Time) *metav1.Table {
	var rows [][]string
	for _, v := range items {
		agent, since := "AWAY", "-"
		if v.Connected {
			agent, since = dash(v.AgentVersion), lasted(v.since, now)
		}
		banned, by, reason := "-", "-", "-"
		if v.Ban != nil {
			banned, by, reason = "BANNED "+lasted(v.Ban.at, now), v.Ban.By, dash(v.Ban.Reason)
		}
		rows = append(rows, []string{v.Metadata.Name, agent, since, fmt.Sprint(len(v.SPIFFEIDs) + v.MoreIDs), banned,
			v.Cluster, v.UID, dash(v.Generation), dash(v.nothingAfter()), by, reason})
	}
	return table([]column{{name: "node"}, {name: "agent"}, {name: "since"}, {name: "identities"}, {name: "banned"},
		{name: "cluster", wide: true}, {name: "uid", wide: true}, {name: "generation", wide: true}, {name: "valid-until", wide: true},
		{name: "by", wide: true}, {name: "reason", wide: true}}, rows)
}

// nothingAfter is the time after which nothing that the node holds is valid, as far as it is known: of a banned one for
// certain.
func (v *nodeView) nothingAfter() string {
	if v.Ban != nil && v.Ban.ValidUntil != "" {
		return v.Ban.ValidUntil
	}
	return v.ValidUntil
}

// lasted is for how long something lasts, "41m".
func lasted(t, now time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return duration.HumanDuration(max(0, now.Sub(t)))
}

func (a *app) completeNodes(banned bool) cobra.CompletionFunc {
	return func(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return complete(a, c, a.listNodes, func(l *nodeList) (words []string) {
			for _, v := range l.Items {
				if (v.Ban != nil) == banned {
					words = append(words, v.Metadata.Name)
				}
			}
			return words
		})
	}
}

// validity says until when others take what the node holds for good.
func (v *nodeView) validity(now time.Time) string {
	var parts []string
	switch {
	case v.validUntil.After(now):
		parts = append(parts, "what it holds, until "+v.ValidUntil+" (in "+duration.HumanDuration(v.validUntil.Sub(now))+"), as far as the CA knows")
	case len(v.SPIFFEIDs) == 0:
		parts = append(parts, "nothing that the CA knows of")
	}
	if b := v.Ban; b != nil && b.ValidUntil != "" {
		if !b.validUntil.After(now) {
			return "nothing any more, since " + b.ValidUntil
		}
		parts = append(parts, "in no case after "+b.ValidUntil+" (in "+duration.HumanDuration(b.validUntil.Sub(now))+")")
	}
	return strings.Join(parts, "; ")
}
