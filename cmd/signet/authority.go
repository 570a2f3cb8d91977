package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

func (a *app) authorityCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "authority",
		Short: "Authorities: the roots, and the intermediates that sign SVIDs",
		Example: "  signet authority list\n" +
			"  signet authority show 7f3a91c2   # dates, key, who cross-signed it, who trusts it, what became of it",
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

	Upstream    string            `json:"upstream,omitempty"`  // where its key lives; of a root, where there are several
	KeySealed   bool              `json:"keySealed,omitempty"` // the root's key is in the record
	CrossSigned *crossView        `json:"crossSigned,omitempty"`
	Since       string            `json:"since,omitempty"` // generation of the first bundle that holds the root, EPOCH.NUMBER
	Trusted     *trustView        `json:"trusted,omitempty"`
	Hash        string            `json:"hash,omitempty"` // SHA-256 of the certificate of one that is gone, lower-case hex
	History     []authorityChange `json:"history,omitempty"`

	notAfter time.Time
	since    uint64
}

// A crossView is a root signed by the one before it.
type crossView struct {
	By       string `json:"by"` // id
	NotAfter string `json:"notAfter,omitempty"`
	PEM      string `json:"pem,omitempty"`
}

// A trustView is how many agents hold a bundle with the root.
type trustView struct {
	Agents  int `json:"agents"`
	Holding int `json:"holding"`
}

// An authorityChange is when an authority came into a state, for the last time.
type authorityChange struct {
	State string `json:"state"`
	At    string `json:"at"`

	at time.Time
}

// The states that an authority has outside of the record.
const (
	authorityAnnounced   = "announced"   // its upstream tells of it
	authorityRemoved     = "removed"     // nobody trusts it any more
	authorityCompromised = "compromised" // nor that one, and it was compromised
)

// An authorityList is the answer of authority list.
type authorityList struct {
	header
	TrustDomain string           `json:"trustDomain"`
	Items       []*authorityView `json:"items"`
	Announced   []*authorityView `json:"announced,omitempty"` // that an upstream tells of, and that nobody took up
	Gone        []*authorityView `json:"gone,omitempty"`      // that nobody trusts any more, the last one last
}

// all are those that can be shown.
func (l *authorityList) all() []*authorityView { return slices.Concat(l.Items, l.Announced, l.Gone) }

func (a *app) listAuthorities(ctx context.Context, ch *channel) (*authorityList, error) {
	resp, err := ask(ctx, a, ch, ch.ListAuthorities, &apiv1.ListAuthoritiesRequest{})
	if err != nil {
		return nil, err
	}
	l := &authorityList{header: newHeader("AuthorityList", ""), TrustDomain: resp.GetTrustDomain(), Items: []*authorityView{}}
	for _, in := range resp.GetAuthorities() {
		l.Items = append(l.Items, newAuthorityView(in))
	}
	for _, in := range resp.GetAnnounced() {
		v := newAuthorityView(in)
		v.State = cmp.Or(v.State, authorityAnnounced)
		l.Announced = append(l.Announced, v)
	}
	for _, in := range resp.GetGone() {
		l.Gone = append(l.Gone, newGoneView(in))
	}
	return l, nil
}

func newGoneView(in *apiv1.GoneAuthority) *authorityView {
	v := &authorityView{header: newHeader("Authority", in.GetId()), ID: in.GetId(), Type: "root", State: authorityRemoved, Hash: in.GetHash(), notAfter: timeOf(in.GetNotAfter())}
	if in.GetTainted() {
		v.State = authorityCompromised
	}
	v.NotAfter = stamp(v.notAfter)
	v.change(v.State, in.GetAt())
	return v
}

// change notes when it came into a state, if that is known.
func (v *authorityView) change(state string, at *timestamppb.Timestamp) {
	if t := timeOf(at); !t.IsZero() {
		v.History = append(v.History, authorityChange{State: state, At: stamp(t), at: t})
	}
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
		Upstream:  in.GetUpstream(),
		KeySealed: in.GetKeySealed(),
		since:     in.GetSince(),
	}
	v.NotAfter = stamp(v.notAfter)
	if v.since != 0 {
		v.Since = api.FromSequence(v.since).String()
	}
	if by := in.GetCrossBy(); by != "" {
		v.CrossSigned = &crossView{By: by, NotAfter: stamp(timeOf(in.GetCrossNotAfter()))}
		if c, err := x509.ParseCertificate(in.GetCrossCertificate()); err == nil {
			v.CrossSigned.PEM = pemOf(c)
		}
	}
	v.change("prepared", in.GetPreparedAt())
	v.change("published", in.GetPublishedAt())
	v.change("active", in.GetActiveAt())
	v.change("retiring", in.GetRetiringAt())
	v.change("tainted", in.GetTaintedAt())
	slices.SortStableFunc(v.History, func(x, y authorityChange) int { return x.at.Compare(y.at) })
	if c, err := x509.ParseCertificate(in.GetCertificate()); err == nil {
		v.PEM = pemOf(c)
	}
	return v
}

func (a *app) authorityListCommand() *cobra.Command {
	var watch, gone bool
	c := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the roots and the intermediates of the replica that answers",
		Long: "List the roots and the intermediates of the replica that answers. A root is prepared (nobody has it), published (in\n" +
			"every bundle, and signs nothing), active (SVIDs are issued under it), retiring (in every bundle until the last SVID\n" +
			"under it has expired) or tainted (compromised, and about to go); announced is one that an upstream tells of and that\n" +
			"no rotation has taken up.",
		Example: "  signet authority list\n" +
			"  signet authority list -o wide     # subjects, dates, upstream, cross-signed by, trusted since\n" +
			"  signet authority list --gone      # those as well that nobody trusts any more\n" +
			"  signet authority list -w          # then tell what changes, until Ctrl-C",
		Args: noArgs,
	}
	o := outputFlags(c)
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on and print what changes")
	c.Flags().BoolVar(&gone, "gone", false, "those as well that nobody trusts any more")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if watch && gone {
			return usageError{errors.New("--watch and --gone exclude each other")}
		}
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
			blocks := []block{{table: authorityTable(slices.Concat(l.Items, l.Announced), a.now())}}
			if gone {
				blocks = append(blocks, block{title: "Gone:", table: goneTable(l.Gone, a.now())})
			}
			return blocks
		}})
	}
	return c
}

func authorityItems(l *authorityList, now time.Time) []item {
	all := slices.Concat(l.Items, l.Announced)
	items := make([]item, len(all))
	for i, v := range all {
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
			dash(v.Key), dash(v.Subject), v.ID, dash(v.Parent), dash(v.NotBefore), dash(v.NotAfter), dash(v.Upstream), v.crossBy(), dash(v.Since)})
	}
	return table([]column{{name: "id"}, {name: "type"}, {name: "state"}, {name: "expires"}, {name: "parent"}, {name: "replica"}, {name: "key"},
		{name: "subject", wide: true}, {name: "key-id", wide: true}, {name: "parent-key-id", wide: true}, {name: "not-before", wide: true},
		{name: "not-after", wide: true}, {name: "upstream", wide: true}, {name: "cross-signed-by", wide: true}, {name: "trusted-since", wide: true}}, rows)
}

func (v *authorityView) crossBy() string {
	if v.CrossSigned == nil {
		return "-"
	}
	return short(v.CrossSigned.By)
}

// goneTable lists those that nobody trusts any more, the last one first.
func goneTable(items []*authorityView, now time.Time) *metav1.Table {
	var rows [][]string
	for _, v := range slices.Backward(items) {
		at := "-"
		if len(v.History) > 0 {
			at = lasted(v.History[0].at, now)
		}
		rows = append(rows, []string{short(v.ID), v.State, at, until(v.notAfter, now, "EXPIRED"), v.ID, v.Hash})
	}
	return table([]column{{name: "id"}, {name: "state"}, {name: "ago"}, {name: "expires"}, {name: "key-id", wide: true}, {name: "sha256", wide: true}}, rows)
}

func (a *app) authorityShowCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "show ID",
		Short: "Show one authority",
		Long: "Show one authority, one as well that is only announced or that nobody trusts any more. The beginning of its id is enough\n" +
			"where no other starts with the same. Trusted counts the connected agents whose bundle holds the root.",
		Example: "  signet authority show 7f3a91c2\n" +
			"  signet authority show 7f3a91c2 -o pem | openssl x509 -noout -text\n" +
			"  signet authority show 7f3a91c2 -o cross-pem > cross.pem   # the same key, signed by the root before it",
		Args:              oneArg("the id of an authority"),
		ValidArgsFunction: a.completeAuthorities,
	}
	o := outputFlags(c, "pem", "cross-pem")
	c.RunE = func(c *cobra.Command, args []string) error {
		var l *authorityList
		v, err := once(a, func(ch *channel) (v *authorityView, err error) {
			if l, err = a.listAuthorities(c.Context(), ch); err != nil {
				return nil, err
			}
			if v, err = pickAuthority(l.all(), args[0]); err == nil && v.since != 0 {
				v.Trusted = a.trusted(c.Context(), ch, v.since)
			}
			return v, err
		})
		if err != nil {
			return err
		}
		return a.print(o, result{
			object: v,
			text:   func(bool) []block { return describeAuthority(v, l.TrustDomain, a.now()) },
			raw: map[string]func(io.Writer) error{
				"pem": func(w io.Writer) error { return writePEM(w, v.PEM, v.ID+" has no certificate here: it is gone") },
				"cross-pem": func(w io.Writer) error {
					if v.CrossSigned == nil {
						return writePEM(w, "", v.ID+" is cross-signed by nobody")
					}
					return writePEM(w, v.CrossSigned.PEM, v.ID+" is cross-signed, and the certificate does not parse")
				},
			},
		})
	}
	return c
}

// writePEM writes a certificate; none says why there is none.
func writePEM(w io.Writer, text, none string) error {
	if text == "" {
		return &failure{err: api.E(api.NotFound, "%s", none), why: "There is no such certificate to print.", next: "signet authority list -o wide"}
	}
	_, err := io.WriteString(w, text)
	return err
}

// trusted counts the connected agents whose bundle is of that generation or a later one; nil where that cannot be asked.
func (a *app) trusted(ctx context.Context, ch *channel, since uint64) *trustView {
	resp, err := ask(ctx, a, ch, ch.ListNodes, &apiv1.ListNodesRequest{})
	if err != nil {
		return nil
	}
	t := &trustView{}
	for _, n := range resp.GetNodes() {
		if !n.GetConnected() {
			continue
		}
		t.Agents++
		if n.GetGeneration() >= since {
			t.Holding++
		}
	}
	return t
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

func describeAuthority(v *authorityView, td string, now time.Time) []block {
	key, cross := v.Key, ""
	if v.KeySealed {
		key += ", sealed in the record"
	}
	if x := v.CrossSigned; x != nil {
		cross = "by " + x.By + after(", until ", x.NotAfter)
	}
	pairs := []pair{
		{"ID", v.ID},
		{"Trust domain", td},
		{"Type", v.Type},
		{"State", v.State},
		{"Subject", v.Subject},
		{"Key", key},
		{"Valid", dash(v.NotBefore) + " to " + dash(v.NotAfter)},
		{"Expires in", until(v.notAfter, now, "EXPIRED")},
		{"Signed by", v.Parent},
		{"Replica", v.Replica},
	}
	pairs = append(pairs, known(
		pair{"Upstream", v.Upstream},
		pair{"Cross-signed", cross},
		pair{"Trusted", v.trustText()},
		pair{"SHA-256", v.Hash},
	)...)
	var rows [][]string
	for _, h := range v.History {
		rows = append(rows, []string{h.State, h.At, lasted(h.at, now)})
	}
	return []block{{pairs: pairs}, {title: "History:", table: table([]column{{name: "state"}, {name: "at"}, {name: "ago"}}, rows)}}
}

// trustText says where a root is trusted; empty of an intermediate, which is trusted by its root.
func (v *authorityView) trustText() string {
	if v.Type != "root" {
		return ""
	}
	switch v.State {
	case authorityAnnounced, "prepared":
		return "by nobody so far: it is in no bundle"
	case authorityRemoved, authorityCompromised:
		return "by nobody any more"
	}
	s := ""
	if v.Since != "" {
		s = "in each bundle from generation " + v.Since + " on"
	}
	if t := v.Trusted; t != nil {
		s += fmt.Sprintf("; %d of %s connected hold one", t.Holding, plural(t.Agents, "agent"))
	}
	return s
}
