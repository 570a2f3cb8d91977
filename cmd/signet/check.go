package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/kube"
)

// The results of a check, from the best to the worst.
const (
	resultGood    = "good"
	resultWarning = "warning"
	resultUnknown = "unknown" // it could not be looked at
	resultBad     = "bad"
)

// defaultWait is how long --wait and uninstall --wait have patience.
const defaultWait = 5 * time.Minute

// A checkRow is what one check says of one thing.
type checkRow struct {
	header
	Result string `json:"result"`
	// Object is what it is about, as kubectl names it; a namespaced one is NAMESPACE/KIND/NAME.
	Object string `json:"object,omitempty"`
	Found  string `json:"found"`
	Do     string `json:"do,omitempty"` // a line to type, or what to change

	settled bool // waiting changes nothing
}

// A checkReport is the answer of check.
type checkReport struct {
	header
	Result      string      `json:"result"` // the worst of all
	Server      string      `json:"server"`
	Namespace   string      `json:"namespace"`
	TrustDomain string      `json:"trustDomain,omitempty"`
	Generation  string      `json:"generation,omitempty"` // of the published bundle, EPOCH.NUMBER
	Items       []*checkRow `json:"items"`

	Authority *checkedAuthority `json:"authority,omitempty"` // what the CA says of itself; none where it was not asked
}

func (a *app) checkCommand() *cobra.Command {
	var (
		kf     kubeFlags
		wait   time.Duration
		strict bool
	)
	c := &cobra.Command{
		Use:   "check",
		Short: "What is wrong with the installation on a cluster, and what to do",
		Long: "Look at everything that Signet needs on a Kubernetes cluster and say what is not as it should be, with a line\n" +
			"to type for each. It only reads, with the rights of your kubeconfig, and asks the CA as a viewer; what it may\n" +
			"not see is \"unknown\". With --wait it looks again until nothing is bad, and tells what it waits for.\n\n" +
			"The exit code is 3 when something is bad or unknown, and with --strict also for a warning; 124 when --wait\n" +
			"has run out. docs/check.md tells what each check looks at.",
		Example: "  signet check                         # what is wrong now\n" +
			"  signet check --wait                  # after signet install | kubectl apply -f -\n" +
			"  signet check --wait=2m -o json > check.json\n" +
			"  signet check -o jsonpath='{range .items[?(@.result==\"bad\")]}{.metadata.name}{\"\\n\"}{end}'",
		Args: noArgs,
	}
	kf.add(c)
	o := outputFlags(c)
	c.Flags().DurationVar(&wait, "wait", 0, "look again until all is good, for at most this `DURATION` (without a value 5m)")
	c.Flags().Lookup("wait").NoOptDefVal = defaultWait.String()
	c.Flags().BoolVar(&strict, "strict", false, "a warning counts as well")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if wait < 0 {
			return usageError{fmt.Errorf("--wait %s is negative", wait)}
		}
		cluster, err := a.openCluster(&kf)
		if err != nil {
			return err
		}
		defer cluster.Close()
		var r *checkReport
		var failed error
		if wait > 0 {
			r, failed = a.checkUntil(c.Context(), cluster, &kf, o, wait, strict)
		} else {
			r, failed = a.checkOnce(c.Context(), cluster, &kf)
		}
		if r == nil {
			return failed
		}
		if err := a.print(o, result{object: r, text: r.text}); err != nil {
			return err
		}
		if failed != nil {
			return failed
		}
		return r.outcome(strict)
	}
	return c
}

// outcome is the error that the exit code follows from.
func (r *checkReport) outcome(strict bool) error {
	counts := map[string]int{}
	for _, row := range r.Items {
		counts[row.Result]++
	}
	if counts[resultBad]+counts[resultUnknown] == 0 && (!strict || counts[resultWarning] == 0) {
		return nil
	}
	return &findings{summary: fmt.Sprintf("%d bad, %d unknown, %s", counts[resultBad], counts[resultUnknown], plural(counts[resultWarning], "warning"))}
}

// worst returns the worse of two results.
func worst(x, y string) string {
	order := []string{resultGood, resultWarning, resultUnknown, resultBad}
	if slices.Index(order, y) > slices.Index(order, x) {
		return y
	}
	return x
}

// loud is how a table shows a result: what is not good stands out without colour.
func loud(result string) string {
	if result == resultGood {
		return result
	}
	return strings.ToUpper(result)
}

// text is the report for people: a row for each thing, then what to do, then what it is about.
func (r *checkReport) text(bool) []block {
	var rows, todo [][]string
	for _, row := range r.Items {
		rows = append(rows, []string{row.Metadata.Name, loud(row.Result), dash(row.Object), row.Found})
		if row.Do != "" && row.Result != resultGood {
			todo = append(todo, []string{row.Metadata.Name, dash(row.Object), row.Do})
		}
	}
	blocks := []block{
		{pairs: known(
			pair{"API server", r.Server}, pair{"Namespace", r.Namespace},
			pair{"Trust domain", r.TrustDomain}, pair{"Generation", r.Generation},
		)},
		{title: "", table: table([]column{{name: "Check"}, {name: "Result"}, {name: "Object"}, {name: "Found"}}, rows)},
	}
	if len(todo) > 0 {
		blocks = append(blocks, block{title: "What to do:", table: table([]column{{name: "Check"}, {name: "Object"}, {name: "Do"}}, todo)})
	}
	return blocks
}

// firstLook is how long the first look may take, so that there is a report also where there is little patience.
const firstLook = 30 * time.Second

// checkUntil looks again until nothing is left that waiting could change, or the time is over. The report is that of the
// last look; nil, if it could ask nothing.
func (a *app) checkUntil(ctx context.Context, cluster *kube.Operator, kf *kubeFlags, o *output, wait time.Duration, strict bool) (*checkReport, error) {
	start := time.Now()
	end := start.Add(wait)
	p := a.newWaiting(o)
	defer p.done()
	var last *checkReport
	for limit := start.Add(max(wait, firstLook)); ; limit = end {
		began := time.Now()
		look, cancel := context.WithDeadline(ctx, limit)
		r, err := a.checkOnce(look, cluster, kf)
		whole := look.Err() == nil // or else it says "unknown" of what it had no time for
		cancel()
		switch {
		case whole && err != nil:
			last = nil
			p.show([]want{{"api-server", errorDetail(err)}})
		case whole:
			last = r
			waits := r.waits(strict)
			if p.show(waits); len(waits) == 0 {
				return r, nil
			}
		}
		pause := max(2*a.poll, 3*time.Since(began)) // a large cluster is not asked all the time
		select {
		case <-ctx.Done():
			return last, ctx.Err()
		case <-time.After(min(pause, time.Until(end))):
		}
		if !time.Now().Before(end) {
			return last, a.waitOver(kf, p, wait)
		}
	}
}

// A want is one thing that is waited for.
type want struct{ what, found string }

// waits says what a further look may see changed, in the order of the report: what others wait for comes first.
func (r *checkReport) waits(strict bool) (all []want) {
	for _, row := range r.Items {
		if row.settled || row.Result == resultGood || row.Result == resultWarning && !strict {
			continue
		}
		what := row.Metadata.Name
		if row.Object != "" {
			what += " " + row.Object
		}
		all = append(all, want{what, row.Found})
	}
	return all
}

func (a *app) waitOver(kf *kubeFlags, p *waiting, wait time.Duration) error {
	detail := "the installation is not good after " + wait.String()
	var names []string
	for _, w := range p.last {
		names = append(names, w.what)
	}
	detail += after(": ", clip(strings.Join(names, ", "), maxFound))
	return &failure{
		err:  api.E(api.DeadlineExceeded, "%s", detail),
		why:  "What each waits for is said above. Nothing was changed; it is safe to wait again.",
		next: kf.signet("check", "--wait"),
	}
}

// errorDetail is what an error says without its code.
func errorDetail(err error) string {
	if f, ok := errors.AsType[*failure](err); ok {
		return f.err.Detail
	}
	return err.Error()
}

// A waiting shows on stderr what is waited for: one line that is painted anew on a terminal, a line for each change
// elsewhere, and one of JSON where the answer is JSON.
type waiting struct {
	a       *app
	start   time.Time
	json    bool
	painted bool
	width   int           // of the terminal; 0: there is none
	last    []want        // what is waited for
	told    map[want]bool // what was said already: a pod that wavers between two states is told of once
}

func (a *app) newWaiting(o *output) *waiting {
	p := &waiting{a: a, start: time.Now(), json: o.format == "json", told: map[want]bool{}}
	if !p.json && a.tty(a.stderr) && a.getenv("TERM") != "dumb" {
		p.width = 80
		if f, ok := a.stderr.(*os.File); ok {
			if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 20 {
				p.width = w
			}
		}
	}
	return p
}

// show tells of what is waited for now; none: of nothing any more.
func (p *waiting) show(now []want) {
	if p.width > 0 {
		p.paint(now)
		p.last = now
		return
	}
	still := map[string]bool{}
	for _, w := range now {
		if still[w.what] = true; !p.told[w] {
			p.told[w] = true
			p.line("waiting", w.what, w.found)
		}
	}
	for _, w := range p.last {
		if !still[w.what] {
			still[w.what] = true // once
			maps.DeleteFunc(p.told, func(t want, _ bool) bool { return t.what == w.what })
			p.line("good", w.what, "")
		}
	}
	p.last = now
}

func (p *waiting) line(state, what, found string) {
	if !p.json {
		p.a.say("%s", state+": "+what+after(": ", found))
		return
	}
	line, err := json.Marshal(struct {
		Millis int64  `json:"millis"`
		State  string `json:"state"` // "waiting" or "good"
		What   string `json:"what"`
		Found  string `json:"found,omitempty"`
	}{time.Since(p.start).Milliseconds(), state, scrub(what), scrub(found)})
	if err == nil { // strings and numbers always encode
		fmt.Fprintf(p.a.stderr, "%s\n", line)
	}
}

// paint repaints the one line, which is cut at the terminal's edge.
func (p *waiting) paint(now []want) {
	p.done()
	if len(now) == 0 {
		return
	}
	others := ""
	if n := len(now) - 1; n > 0 {
		others = fmt.Sprintf("%d more and ", n)
	}
	line := fmt.Sprintf("%4ds  waiting for %s%s: %s", int(time.Since(p.start).Seconds()), others, now[0].what, now[0].found)
	runes := []rune(scrub(line))
	fmt.Fprint(p.a.stderr, string(runes[:min(len(runes), p.width-1)]))
	p.painted = true
}

// done removes what was painted.
func (p *waiting) done() {
	if p.painted {
		fmt.Fprint(p.a.stderr, "\r\x1b[K")
		p.painted = false
	}
}
