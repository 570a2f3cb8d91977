package main

import (
	"context"
	"crypto/x509"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

func (a *app) authorityCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "authority",
		Short: "Authorities: the roots, and the intermediates that sign SVIDs",
		Example: "  signet authority list\n" +
			"  signet authority show 7f3a91",
	}
	c.AddCommand(a.authorityListCommand(), a.authorityShowCommand())
	return c
}

// An authorityView is one root or intermediate.
type authorityView struct {
	header
	ID        string `json:"id"`    // lower-case hex of the subject key id
	Type      string `json:"type"`  // root or intermediate
	State     string `json:"state"` // of the rotation
	Subject   string `json:"subject,omitempty"`
	Parent    string `json:"parent,omitempty"` // id of the authority that signed it; its own for a root
	Replica   string `json:"replica,omitempty"`
	Key       string `json:"key,omitempty"`
	NotBefore string `json:"notBefore,omitempty"`
	NotAfter  string `json:"notAfter,omitempty"`
	PEM       string `json:"pem,omitempty"`

	notAfter time.Time
}

// An authorityList is the answer of authority list.
type authorityList struct {
	header
	TrustDomain string           `json:"trustDomain"`
	Items       []*authorityView `json:"items"`
}

func (a *app) listAuthorities(ctx context.Context, ch *channel) (*authorityList, error) {
	resp, err := ask(ctx, a, ch, ch.ListAuthorities, &apiv1.ListAuthoritiesRequest{})
	if err != nil {
		return nil, err
	}
	l := &authorityList{header: newHeader("AuthorityList", ""), TrustDomain: resp.GetTrustDomain(), Items: []*authorityView{}}
	for _, in := range resp.GetAuthorities() {
		l.Items = append(l.Items, newAuthorityView(in))
	}
	return l, nil
}

func newAuthorityView(in *apiv1.AuthorityInfo) *authorityView {
	v := &authorityView{
		header:    newHeader("Authority", in.GetId()),
		ID:        in.GetId(),
		Type:      in.GetKind(),
		State:     in.GetState(),
		Subject:   in.GetSubject(),
		Parent:    in.GetParent(),
		Replica:   in.GetReplica(),
		Key:       in.GetKey(),
		NotBefore: stamp(timeOf(in.GetNotBefore())),
		notAfter:  timeOf(in.GetNotAfter()),
	}
	v.NotAfter = stamp(v.notAfter)
	if c, err := x509.ParseCertificate(in.GetCertificate()); err == nil {
		v.PEM = pemOf(c)
	}
	return v
}

func (a *app) authorityListCommand() *cobra.Command {
	var watch bool
	c := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the roots and the intermediates of the replica that answers",
		Example: "  signet authority list\n" +
			"  signet authority list -w   # then tell what changes, until Ctrl-C",
		Args: noArgs,
	}
	o := outputFlags(c)
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on and print what changes")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if watch {
			return a.watch(c.Context(), o, func(ctx context.Context, ch *channel) ([]item, error) {
				l, err := a.listAuthorities(ctx, ch)
				if err != nil {
					return nil, err
				}
				return authorityItems(l, a.now()), nil
			})
		}
		l, err := once(a, func(ch *channel) (*authorityList, error) { return a.listAuthorities(c.Context(), ch) })
		if err != nil {
			return err
		}
		return a.print(o, result{object: l, empty: "the CA has no authority", text: func(bool) []block {
			return []block{{table: authorityTable(l.Items, a.now())}}
		}})
	}
	return c
}

func authorityItems(l *authorityList, now time.Time) []item {
	items := make([]item, len(l.Items))
	for i, v := range l.Items {
		items[i] = item{
			key:    v.Type + "\x00" + v.ID + "\x00" + v.Replica,
			object: v,
			print:  fingerprint(v),
			table:  func(bool) *metav1.Table { return authorityTable([]*authorityView{v}, now) },
		}
	}
	return items
}

func authorityTable(items []*authorityView, now time.Time) *metav1.Table {
	var rows [][]string
	for _, v := range items {
		parent := short(v.Parent)
		if v.Parent == v.ID {
			parent = "self"
		}
		rows = append(rows, []string{short(v.ID), v.Type, dash(v.State), until(v.notAfter, now, "EXPIRED"), parent, dash(v.Replica),
			dash(v.Key), dash(v.Subject), v.ID, dash(v.Parent), dash(v.NotBefore), dash(v.NotAfter)})
	}
	return table([]column{{name: "id"}, {name: "type"}, {name: "state"}, {name: "expires"}, {name: "parent"}, {name: "replica"}, {name: "key"},
		{name: "subject", wide: true}, {name: "key-id", wide: true}, {name: "parent-key-id", wide: true}, {name: "not-before", wide: true},
		{name: "not-after", wide: true}}, rows)
}

func (a *app) authorityShowCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "show ID",
		Short: "Show one authority",
		Long:  "Show one authority. The beginning of its id is enough where no other starts with the same.",
		Example: "  signet authority show 7f3a91\n" +
			"  signet authority show 7f3a91 -o pem | openssl x509 -noout -text",
		Args:              oneArg("the id of an authority"),
		ValidArgsFunction: a.completeAuthorities,
	}
	o := outputFlags(c, "pem")
	c.RunE = func(c *cobra.Command, args []string) error {
		l, err := once(a, func(ch *channel) (*authorityList, error) { return a.listAuthorities(c.Context(), ch) })
		if err != nil {
			return err
		}
		v, err := pickAuthority(l.Items, args[0])
		if err != nil {
			return err
		}
		return a.print(o, result{
			object: v,
			text:   func(bool) []block { return []block{describeAuthority(v, l.TrustDomain, a.now())} },
			raw: map[string]func(io.Writer) error{"pem": func(w io.Writer) error {
				_, err := io.WriteString(w, v.PEM)
				return err
			}},
		})
	}
	return c
}

// pickAuthority finds the one authority whose id is, or alone starts with, what was typed.
func pickAuthority(all []*authorityView, typed string) (*authorityView, error) {
	id := strings.ToLower(strings.TrimPrefix(typed, "authority.cli.signet.dev/"))
	var found []*authorityView
	for _, v := range all {
		if v.ID == id {
			return v, nil
		}
		if id != "" && strings.HasPrefix(v.ID, id) {
			found = append(found, v)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, &failure{err: api.E(api.NotFound, "there is no authority %s", typed),
			why: "No root and no intermediate of the replica that answered has this id.", next: "signet authority list"}
	}
	var ids []string
	for _, v := range found {
		ids = append(ids, v.ID)
	}
	return nil, &failure{err: api.E(api.NotFound, "%s is the beginning of more than one authority", typed),
		why: "It fits " + strings.Join(slices.Sorted(slices.Values(ids)), ", ") + ".", next: "signet authority show " + ids[0]}
}

func describeAuthority(v *authorityView, td string, now time.Time) block {
	return block{pairs: []pair{
		{"ID", v.ID},
		{"Trust domain", td},
		{"Type", v.Type},
		{"State", v.State},
		{"Subject", v.Subject},
		{"Key", v.Key},
		{"Valid", dash(v.NotBefore) + " to " + dash(v.NotAfter)},
		{"Expires in", until(v.notAfter, now, "EXPIRED")},
		{"Signed by", v.Parent},
		{"Replica", v.Replica},
	}}
}
