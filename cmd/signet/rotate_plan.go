package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// A planView is what a rotation or an emergency would do.
type planView struct {
	header
	TrustDomain string        `json:"trustDomain"`
	Generation  string        `json:"generation"` // of the bundle, EPOCH.NUMBER
	Now         string        `json:"now"`        // by the CA's clock
	Emergency   bool          `json:"emergency,omitempty"`
	Compromised string        `json:"compromised,omitempty"` // as it was asked for
	CanMake     bool          `json:"canMake"`
	CannotMake  string        `json:"cannotMake,omitempty"`
	Forecast    *forecastView `json:"forecast"`

	now time.Time
}

func (a *app) planRotation(ctx context.Context, ch *channel, r *apiv1.PlanRotationRequest) (*planView, error) {
	defer a.patient("it is to say what a rotation would do")()
	resp, err := askRotation(ctx, a, ch, ch.PlanRotation, r)
	if err != nil {
		return nil, rotationFailed(err, "")
	}
	v := &planView{
		header: newHeader("RotationPlan", ""), TrustDomain: resp.GetTrustDomain(),
		Generation: api.Generation{Epoch: resp.GetEpoch(), Number: resp.GetNumber()}.String(), now: timeOf(resp.GetNow()),
		Emergency: r.GetEmergency(), Compromised: r.GetCompromised(), CanMake: resp.GetCanMake(), CannotMake: resp.GetCannotMake(),
		Forecast: newForecast(resp.GetForecast()),
	}
	if v.now.IsZero() {
		v.now = a.now()
	}
	v.Now = stamp(v.now)
	if v.Forecast == nil { // an older CA, or none of ours: nothing is known of what would happen
		v.Forecast = newForecast(&apiv1.RotationForecast{})
	}
	v.Metadata = &meta{Name: "new"}
	if v.Forecast.Operation != "" {
		v.Metadata.Name = v.Forecast.Operation
	}
	return v, nil
}

func (a *app) rotatePlanCommand() *cobra.Command {
	var limits limitFlags
	var emergency string
	c := &cobra.Command{
		Use:   "plan",
		Short: "Say what a rotation would do, to whom, and how long it takes; change nothing",
		Long: "Say what a rotation that is begun now would do, step by step: who is affected, how long each step takes, whether the\n" +
			"new root can be cross-signed, and who would be waited for. Where one is under way, what it has left to do. It changes\n" +
			"nothing. The exit code is 3 when something stands in the way now that does not pass by itself.",
		Example: "  signet rotate plan\n" +
			"  signet rotate plan -o wide                    # with nodes, clusters and UIDs\n" +
			"  signet rotate plan --straggler 10m\n" +
			"  signet rotate plan --emergency 7f3a91c2       # what if this root is compromised?",
		Args: noArgs,
	}
	limits.add(c)
	c.Flags().StringVar(&emergency, "emergency", "", "plan for the compromised root `ID` or the beginning of it")
	c.RegisterFlagCompletionFunc("emergency", a.completeRoots)
	o := outputFlags(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		v, err := once(a, func(ch *channel) (*planView, error) {
			r := &apiv1.PlanRotationRequest{Limits: limits.proto()}
			if c.Flags().Changed("emergency") {
				root, err := a.pickRoot(c.Context(), ch, emergency)
				if err != nil {
					return nil, err
				}
				r.Emergency, r.Compromised = true, root
			}
			return a.planRotation(c.Context(), ch, r)
		})
		if err != nil {
			return err
		}
		return a.printPlan(o, v)
	}
	return c
}

func (a *app) printPlan(o *output, v *planView) error {
	if err := a.print(o, result{object: v, text: v.text}); err != nil {
		return err
	}
	if found := v.findings(); len(found) > 0 {
		return &findings{summary: strings.Join(found, "; ")}
	}
	return nil
}

// findings is what stands in the way now.
func (v *planView) findings() (found []string) {
	f := v.Forecast
	if !v.CanMake && f.Next == nil {
		found = append(found, "there is no new root"+after(": ", v.CannotMake))
	}
	if n := f.inTheWay(); n > 0 {
		found = append(found, fmt.Sprintf("%d would be waited for", n))
	}
	if !f.CrossSigned && !v.Emergency && f.Operation == "" {
		found = append(found, "the new root would not be cross-signed: start wants --without-cross")
	}
	return found
}

// inTheWay counts those who would be waited for and could be mended: not who is passed over, nor what ends by itself at a time that is
// known, as the soak of a pod and the life of an SVID do. Whether such a one is among those that the CA does not name is not known.
func (f *forecastView) inTheWay() int {
	n := f.MissingCount
	for _, b := range f.Missing {
		rests := b.Kind == "leaves" || (b.Kind == "pod" || b.Kind == "copy") && !b.until.IsZero()
		if b.Pass != "" || rests {
			n--
		}
	}
	return n
}

func (v *planView) text(wide bool) []block {
	f, now := v.Forecast, v.now
	what := "none is under way; this is what one begun now would do"
	switch {
	case v.Emergency:
		what = "an EMERGENCY begun now; it cannot be rolled back"
		if f.Operation != "" {
			what += ", and takes the place of operation " + f.Operation
		}
	case f.Operation != "":
		what = "operation " + f.Operation + " (" + f.Kind + ") is under way; this is what it has left to do"
	}
	next := "the CA makes it, or its upstream has one"
	switch {
	case f.Next != nil:
		next = f.Next.text(now)
	case !v.CanMake:
		next = "NO" + after(": ", v.CannotMake)
	}
	affects := fmt.Sprintf("%s of the CA, %s, %s with %s", plural(int(f.Replicas), "replica"), plural(int(f.Agents), "agent"), plural(int(f.Pods), "pod"), plural(int(f.Streams), "stream"))
	pairs := known(
		pair{"Trust domain", v.TrustDomain + ", generation " + v.Generation},
		pair{"Rotation", what},
		pair{"Compromised", v.Compromised},
		pair{"Active root", f.Active.text(now)},
		pair{"New root", next},
		pair{"Cross-signed", f.crossText()},
		pair{"Affects", affects},
		pair{"Takes", f.takes(now)},
	)
	if v.Emergency {
		pairs = append(pairs, pair{"Loses mTLS", f.losesText()})
	}
	var rows [][]string
	for _, s := range f.Steps {
		root := "new"
		if s.Authority != "" {
			root = short(s.Authority)
		}
		earliest, latest := s.window(now)
		rows = append(rows, []string{s.Step, root, stepMeaning(s.Step, v.Emergency || f.Kind == "emergency"), earliest, latest})
	}
	return []block{
		{pairs: pairs},
		{table: table([]column{{name: "step"}, {name: "root"}, {name: "what happens"}, {name: "earliest"}, {name: "latest"}}, rows)},
		{title: "Would be waited for:", table: blockerTable(waitees(f.Missing, f.MissingCount), now, wide, false, "")},
		{title: "Cannot acknowledge, so nobody knows whether they use the new bundle; they are given time:",
			table: blockerTable(waitees(f.Unproven, f.UnprovenCount), now, wide, false, "")},
	}
}

// losesText is who loses mTLS in an emergency, and whom that count leaves out.
func (f *forecastView) losesText() string {
	const when = " with an SVID under it, where it is not reissued before the root is removed"
	if f.Unheard == 0 {
		return plural(int(f.Losing), "pod") + when
	}
	return fmt.Sprintf("at least %s%s; %s not been heard of since the CA was started, and the pods there are not counted", plural(int(f.Losing), "pod"), when, nodesHave(int(f.Unheard)))
}

func nodesHave(n int) string {
	if n == 1 {
		return "1 node has"
	}
	return fmt.Sprintf("%d nodes have", n)
}

// takes is how long it is to the last step.
func (f *forecastView) takes(now time.Time) string {
	var earliest, latest time.Time
	endless := len(f.Steps) == 0
	for _, s := range f.Steps {
		if s.earliest.After(earliest) {
			earliest = s.earliest
		}
		if s.latest.After(latest) {
			latest = s.latest
		}
		endless = endless || s.latest.IsZero()
	}
	if earliest.IsZero() {
		return ""
	}
	s := duration.HumanDuration(max(0, earliest.Sub(now))) + " if everybody answers at once; "
	if endless {
		return s + "without an end while somebody is not ready, until you excuse him"
	}
	return s + duration.HumanDuration(max(0, latest.Sub(now))) + " at the latest"
}

func stepMeaning(do string, emergency bool) string {
	switch do {
	case "publish":
		return "the new root is in every bundle; nothing is issued under it"
	case "activate":
		if emergency {
			return "all is issued under it from now on; what is under the compromised root is reissued at once"
		}
		return "SVIDs are issued under it from their next renewal on"
	case "remove":
		if emergency {
			return "the compromised root leaves every bundle; what is still under it is refused"
		}
		return "the old root leaves every bundle, when no SVID under it is left; no way back"
	}
	return "-"
}

func (r *rootView) text(now time.Time) string {
	if r == nil {
		return ""
	}
	return r.ID + after(", ", r.State) + after(", expires ", r.NotAfter) + " (" + until(r.notAfter, now, "EXPIRED") + ")"
}

// waitees is a list of blockers, with a line for those that it does not name.
func waitees(all []*blockerView, count int) (w []waitee) {
	for _, b := range all {
		w = append(w, waitee{"", b})
	}
	if more := count - len(all); more > 0 {
		w = append(w, waitee{"", &blockerView{Name: fmt.Sprintf("and %d more", more), Why: "the CA names no more than these at once"}})
	}
	return w
}
