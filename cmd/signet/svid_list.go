package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	apiv1 "github.com/signet-ca/signet/api/v1"
)

func (a *app) svidListCommand() *cobra.Command {
	var namespace string
	var check, watch bool
	c := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the SVIDs that agents hold, and who acknowledged them",
		Long: "List the SVIDs that agents with a live session say they hold, of all namespaces unless -n names one.\n" +
			"ACK sums up the streams of the pod: ACK when each took the newest of all it subscribed to, SENT when one of the\n" +
			"Workload API, which cannot answer, was sent it, WAIT while one has not answered, NACK when one rejected something.\n" +
			"With -o wide each stream has a row, with its own words.",
		Example: "  signet svid list                        # all of them\n" +
			"  signet svid list -n shop -o wide        # one row a stream, with what it acknowledged or rejected\n" +
			"  signet svid list --check > /dev/null    # exit code 3 when one is expired, failing or rejected\n" +
			"  signet svid list -w                     # then tell what changes, until Ctrl-C\n" +
			"  signet svid list -o jsonpath='{range .items[?(@.state!=\"Valid\")]}{.metadata.name}{\"\\n\"}{end}'",
		Args: noArgs,
	}
	o := outputFlags(c)
	c.Flags().StringVarP(&namespace, "namespace", "n", "", "only this `NAMESPACE`")
	all := c.Flags().BoolP("all-namespaces", "A", false, "all namespaces, as without -n")
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on and print what changes")
	c.Flags().BoolVar(&check, "check", false, "exit with 3 when an SVID is expired or overdue, fails to renew or was rejected")
	c.RegisterFlagCompletionFunc("namespace", a.completeNamespaces)
	c.RunE = func(c *cobra.Command, _ []string) error {
		switch {
		case *all && namespace != "":
			return usageError{errors.New("-n and -A exclude each other")}
		case watch && check:
			return usageError{errors.New("--watch and --check exclude each other")}
		}
		req := &apiv1.ListSVIDsRequest{Namespace: namespace}
		if watch {
			return a.watch(c.Context(), o, func(ctx context.Context, ch *channel) ([]item, error) {
				l, err := a.listSVIDs(ctx, ch, req)
				if err != nil {
					return nil, err
				}
				return svidItems(l, a.now()), nil
			})
		}
		l, err := once(a, func(ch *channel) (*svidList, error) { return a.listSVIDs(c.Context(), ch, req) })
		if err != nil {
			return err
		}
		where := "no agent with a live session holds an SVID"
		if namespace != "" {
			where += " in namespace " + namespace
		}
		if err := a.print(o, result{object: l, empty: where, text: func(wide bool) []block {
			return []block{{table: svidTable(l.Items, a.now(), wide)}}
		}}); err != nil || !check {
			return err
		}
		return a.checkSVIDs(l)
	}
	return c
}

func (a *app) listSVIDs(ctx context.Context, ch *channel, req *apiv1.ListSVIDsRequest) (*svidList, error) {
	resp, err := ask(ctx, a, ch, ch.ListSVIDs, req)
	if err != nil {
		return nil, err
	}
	return newSVIDList(resp.GetHoldings(), a.now()), nil
}

// checkSVIDs names what is wrong on stderr, one line an SVID.
func (a *app) checkSVIDs(l *svidList) error {
	bad := 0
	for _, v := range l.Items {
		if p := v.problems(); len(p) > 0 {
			bad++
			a.say("%s %s: %s", v.Metadata.Name, v.SPIFFEID, strings.Join(p, "; "))
		}
	}
	if bad == 0 {
		return nil
	}
	return &findings{summary: fmt.Sprintf("not as it should be: %d of %s", bad, plural(len(l.Items), "SVID"))}
}

func svidColumns() []column {
	return []column{
		{name: "namespace"}, {name: "pod"}, {name: "spiffe-id"}, {name: "serial"}, {name: "expires"}, {name: "renews"}, {name: "ack"},
		{name: "node", wide: true}, {name: "node-uid", wide: true}, {name: "issuer", wide: true}, {name: "error", wide: true},
		{name: "stream", wide: true}, {name: "proxy", wide: true}, {name: "protocol", wide: true}, {name: "names", wide: true},
		{name: "generation", wide: true}, {name: "state", wide: true}, {name: "rejection", wide: true},
	}
}

// svidTable has a row for each SVID; when wide, one for each of its streams, or one where there is none.
func svidTable(items []*svidView, now time.Time, wide bool) *metav1.Table {
	var rows [][]string
	for _, v := range items {
		serial := short(v.Serial)
		if wide {
			serial = dash(v.Serial)
		}
		row := []string{
			dash(v.Namespace), dash(v.Pod), v.SPIFFEID, serial, v.expires(now), v.renews(now), v.Ack.String(),
			dash(v.Node), dash(v.NodeUID), dash(v.IssuerKeyID), dash(v.LastError),
		}
		if !wide || len(v.Streams) == 0 {
			rows = append(rows, append(row, "-", "-", "-", "-", "-", "-", "-"))
			continue
		}
		for _, s := range v.Streams {
			rows = append(rows, append(row[:len(row):len(row)],
				s.ID, dash(s.Proxy), dash(s.Protocol), dash(strings.Join(s.Names, ",")), s.generation(), string(s.State), dash(s.Nack)))
		}
	}
	return table(svidColumns(), rows)
}

// generation is that of the bundle it acknowledged, "1.5"; "1.4/1.5" when another was pushed, "-/1.5" where it acknowledges
// nothing; "-" without a bundle.
func (s streamView) generation() string {
	if s.AckedGeneration == s.PushedGeneration {
		return dash(s.AckedGeneration)
	}
	return dash(s.AckedGeneration) + "/" + s.PushedGeneration
}

// svidItems prepares a listing for watching. When it was reported is no change worth a line.
func svidItems(l *svidList, now time.Time) []item {
	items := make([]item, len(l.Items))
	for i, v := range l.Items {
		quiet := *v
		quiet.ReportedAt = ""
		items[i] = item{
			key:    v.Node + "\x00" + v.NodeUID + "\x00" + v.Key,
			object: v,
			print:  fingerprint(quiet),
			table:  func(wide bool) *metav1.Table { return svidTable([]*svidView{v}, now, wide) },
		}
	}
	return items
}
