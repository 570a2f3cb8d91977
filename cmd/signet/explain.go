package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signet-ca/signet/api"
)

// An explanation is one page of the table of reasons.
type explanation struct {
	header
	Code   string `json:"code"`   // SGN-nnnn
	Reason string `json:"reason"` // TOKEN_AUDIENCE and the like
	Class  string `json:"class"`
	GRPC   string `json:"grpc"` // the gRPC code it travels with
	Title  string `json:"title"`
	Why    string `json:"why"`
	Do     string `json:"do"`
}

type explanationList struct {
	header
	Items []*explanation `json:"items"`
}

func newExplanation(p api.Page) *explanation {
	return &explanation{
		header: newHeader("Explanation", string(p.Reason)),
		Code:   p.Code(),
		Reason: string(p.Reason),
		Class:  p.Kind.String(),
		GRPC:   p.Reason.GRPC().String(),
		Title:  p.Title,
		Why:    p.Why,
		Do:     p.Do,
	}
}

func (a *app) explainCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "explain [CODE|REASON]",
		Short: "Explain an error code or reason, offline",
		Long:  "Explain an error code or reason: what happened, why Signet thinks so, and what to do. Without one, list all.",
		Example: "  signet explain SGN-0106\n" +
			"  signet explain TOKEN_AUDIENCE\n" +
			"  signet explain            # all there are",
		Args: cobra.MaximumNArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			var words []string
			for p := range api.Pages() {
				words = append(words, cobra.CompletionWithDesc(p.Code(), p.Title), cobra.CompletionWithDesc(string(p.Reason), p.Title))
			}
			return words, cobra.ShellCompDirectiveNoFileComp
		},
	}
	o := outputFlags(c)
	c.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return a.print(o, explainAll())
		}
		p, ok := findPage(args[0])
		if !ok {
			near := nearestPage(args[0])
			return &failure{
				err:  api.E(api.NotFound, "there is no code or reason %s", args[0]),
				why:  fmt.Sprintf("This build does not know it; the nearest is %s, %s.", near.Code(), near.Reason),
				next: "signet explain " + near.Code(),
			}
		}
		e := newExplanation(p)
		return a.print(o, result{object: e, text: func(bool) []block { return describePage(e) }})
	}
	return c
}

func explainAll() result {
	l := &explanationList{header: newHeader("ExplanationList", ""), Items: []*explanation{}}
	var rows [][]string
	for p := range api.Pages() {
		e := newExplanation(p)
		l.Items = append(l.Items, e)
		rows = append(rows, []string{e.Code, e.Reason, e.Class, e.Title, e.GRPC})
	}
	return result{object: l, text: func(bool) []block {
		return []block{{table: table([]column{{name: "code"}, {name: "reason"}, {name: "class"}, {name: "title"}, {name: "grpc", wide: true}}, rows)}}
	}}
}

func describePage(e *explanation) []block {
	return []block{
		{pairs: []pair{{"Code", e.Code}, {"Reason", e.Reason}, {"Class", e.Class}, {"What", e.Title}, {"Why", e.Why}, {"Do", e.Do}}},
	}
}

// findPage knows SGN-0106, sgn-106, 0106, 106 and TOKEN_AUDIENCE.
func findPage(word string) (api.Page, bool) {
	w := strings.ToUpper(strings.TrimSpace(word))
	w = strings.TrimPrefix(w, "EXPLANATION.CLI.SIGNET.DEV/")
	digits := strings.TrimLeft(strings.TrimPrefix(w, "SGN-"), "0")
	for p := range api.Pages() {
		if w == string(p.Reason) || digits == fmt.Sprint(p.Number) {
			return p, true
		}
	}
	return api.Page{}, false
}

// nearestPage returns the page whose code or reason takes the fewest changes to reach from word.
func nearestPage(word string) api.Page {
	w := strings.ToUpper(word)
	if len(w) > 64 {
		w = w[:64]
	}
	var best api.Page
	least := -1
	for p := range api.Pages() {
		if d := min(distance(w, p.Code()), distance(w, string(p.Reason))); least < 0 || d < least {
			best, least = p, d
		}
	}
	return best
}

// distance is the number of bytes to insert, remove or replace on the way from x to y (Levenshtein).
func distance(x, y string) int {
	row := make([]int, len(y)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(x) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(y) {
			replace := diagonal
			if x[i] != y[j] {
				replace++
			}
			diagonal = row[j+1]
			row[j+1] = min(replace, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(y)]
}
