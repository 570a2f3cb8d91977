package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

func (a *app) svidGetCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "get SPIFFE-ID|NAMESPACE/POD",
		Short: "Show all that is known of the SVIDs of one identity or one pod",
		Long: "Show the SVIDs of one identity, which several pods may hold, or of one pod, with each SDS stream and what it\n" +
			"acknowledged. JSON and YAML are an SVIDList, also for a single one. What `svid list -o name` prints is accepted.",
		Example: "  signet svid get shop/web-1\n" +
			"  signet svid get spiffe://example.org/ns/shop/sa/web -o jsonpath='{.items[*].serial}'",
		Args:              oneArg("a SPIFFE ID or NAMESPACE/POD"),
		ValidArgsFunction: a.completeSVIDs,
	}
	o := outputFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		req, pod, err := svidQuery(args[0])
		if err != nil {
			return usageError{err}
		}
		l, err := once(a, func(ch *channel) (*svidList, error) { return a.listSVIDs(c.Context(), ch, req) })
		if err != nil {
			return err
		}
		if pod != "" {
			l.Items = slices.DeleteFunc(l.Items, func(v *svidView) bool { return v.Pod != pod })
		}
		if len(l.Items) == 0 {
			return &failure{
				err:  api.E(api.NotFound, "no agent with a live session holds an SVID of %s", args[0]),
				why:  "The pod is gone, its agent has no session, or it never got one.",
				next: strings.TrimSpace("signet svid list " + namespaceFlag(req.GetNamespace())),
			}
		}
		return a.print(o, result{object: l, text: func(bool) []block {
			var blocks []block
			for _, v := range l.Items {
				blocks = append(blocks, describeSVID(v, a.now())...)
			}
			return blocks
		}})
	}
	return c
}

func namespaceFlag(ns string) string {
	if ns == "" {
		return ""
	}
	return "-n " + ns
}

// svidQuery reads what `svid get` takes. A pod is filtered here: the CA filters by namespace or SPIFFE ID.
func svidQuery(arg string) (req *apiv1.ListSVIDsRequest, pod string, err error) {
	arg = strings.TrimPrefix(arg, "svid.cli.signet.dev/")
	if strings.Contains(arg, "://") {
		id, err := api.ParseWorkloadID(arg)
		if err != nil {
			return nil, "", fmt.Errorf("%q is not a workload's SPIFFE ID: %w", arg, err)
		}
		return &apiv1.ListSVIDsRequest{SpiffeId: id.String()}, "", nil
	}
	ns, pod, ok := strings.Cut(arg, "/")
	if !ok || ns == "" || pod == "" || strings.Contains(pod, "/") {
		return nil, "", fmt.Errorf("%q is neither a SPIFFE ID nor NAMESPACE/POD", arg)
	}
	return &apiv1.ListSVIDsRequest{Namespace: ns}, pod, nil
}

func describeSVID(v *svidView, now time.Time) []block {
	renewal := "good"
	if v.LastError != "" {
		renewal = "FAILED " + v.LastError
	}
	about := block{pairs: []pair{
		{"SPIFFE ID", v.SPIFFEID},
		{"Pod", v.Namespace + "/" + v.Pod + uid(v.PodUID)},
		{"Node", v.Node + uid(v.NodeUID)},
		{"Serial", v.Serial},
		{"Issuer key", v.IssuerKeyID},
		{"Valid", cmp.Or(v.NotBefore, "?") + " to " + cmp.Or(v.NotAfter, "?")},
		{"Expires in", v.expires(now)},
		{"Renews in", v.renews(now)},
		{"Renewal", renewal},
		{"Reported", v.ReportedAt},
		{"Streams", v.Ack.String()},
	}}
	var rows [][]string
	for _, s := range v.Streams {
		rows = append(rows, []string{s.ID, dash(s.Proxy), dash(s.Protocol), dash(strings.Join(s.Names, ",")), string(s.State),
			short(s.AckedSerial), s.generation(), fmt.Sprint(s.Acks), fmt.Sprint(s.Nacks), dash(s.Nack)})
	}
	streams := block{table: table([]column{{name: "stream"}, {name: "proxy"}, {name: "protocol"}, {name: "names"}, {name: "state"},
		{name: "serial"}, {name: "generation"}, {name: "acks"}, {name: "nacks"}, {name: "rejection"}}, rows)}
	return []block{about, streams}
}

func uid(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}
