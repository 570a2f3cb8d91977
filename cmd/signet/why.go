package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-ca/signet/api"
	apiv1 "github.com/signet-ca/signet/api/v1"
)

// maxDecisions bounds what one correlation id is answered with. There is one entry, or two where the second says what
// became of the first.
const maxDecisions = 16

// A decision is one entry on record with what is to be known about it.
type decision struct {
	header
	Entry       *auditEntry  `json:"entry"`
	Explanation *explanation `json:"explanation,omitempty"` // of the reason of a refusal, where this build knows it
	// FirstUse is, for a token that was used in another place before, the entry of the first use that is on record.
	FirstUse *auditEntry `json:"firstUse,omitempty"`
}

// A decisionList is the answer of why.
type decisionList struct {
	header
	Items []*decision `json:"items"`
}

func (a *app) whyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "why CORRELATION-ID",
		Short: "Why a request was refused, or what was issued for it",
		Long: "Tell what was asked, what the CA found and what to do, for the correlation id that an error, a log line or\n" +
			"audit shows: 16 hex digits. Other words around it are ignored, so a whole line may be pasted.",
		Example: "  signet why 4be1f0a7c2d95e38\n" +
			"  signet why \"refused (POD_DELETED, SGN-0201), correlation id 4be1f0a7c2d95e38\"\n" +
			"  signet audit --refused --last 1 -o name | xargs signet why   # the newest refusal",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return fmt.Errorf("%s takes a correlation id, and there is none", c.CommandPath())
			}
			return nil
		},
		ValidArgsFunction: a.completeRefusals,
	}
	o := outputFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		id, err := correlationID(strings.Join(args, " "))
		if err != nil {
			return usageError{err}
		}
		l, err := once(a, func(ch *channel) (*decisionList, error) { return a.decisions(c.Context(), ch, id) })
		if err != nil {
			return err
		}
		return a.print(o, result{object: l, text: func(bool) []block {
			var blocks []block
			for _, d := range l.Items {
				blocks = append(blocks, a.describeDecision(d)...)
			}
			return blocks
		}})
	}
	return c
}

var (
	correlationShape = regexp.MustCompile(`^[0-9a-f]{16}$`) // see api.NewCorrelationID
	wordShape        = regexp.MustCompile(`[0-9A-Za-z_-]+`)
)

func isCorrelationID(s string) bool { return correlationShape.MatchString(s) }

// correlationID finds the one correlation id in what was typed or pasted.
func correlationID(text string) (string, error) {
	var found []string
	for _, w := range wordShape.FindAllString(text, -1) {
		if id := strings.ToLower(w); isCorrelationID(id) && !slices.Contains(found, id) {
			found = append(found, id)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", errors.New("a correlation id is 16 hex digits, and " + notAnID(text))
	}
	return "", fmt.Errorf("more than one correlation id: %s; which?", strings.Join(found, ", "))
}

// notAnID says what else was typed, where that is plain to see.
func notAnID(text string) string {
	word := strings.TrimSpace(text)
	if len(word) > 64 {
		return "there is none in what was given"
	}
	if p, ok := findPage(word); ok {
		return fmt.Sprintf("%q is none; for a code: signet explain %s", word, p.Code())
	}
	if f := new(auditFilter); f.setSerial(word) == nil && f.req.Serial != "" {
		return fmt.Sprintf("%q is none; for a serial number: signet audit --serial %s", word, f.req.Serial)
	}
	return fmt.Sprintf("there is none in %q", word)
}

func (a *app) decisions(ctx context.Context, ch *channel, id string) (*decisionList, error) {
	var seen tally
	defer a.waiting(ch.where(), &seen)()
	l := &decisionList{header: newHeader("DecisionList", ""), Items: []*decision{}}
	err := a.streamAudit(ctx, ch, &apiv1.ListAuditRequest{CorrelationId: id}, &seen, func(e *auditEntry) error {
		d := &decision{header: newHeader("Decision", id), Entry: e}
		if r := api.Reason(e.Reason); r.Known() {
			d.Explanation = newExplanation(r.Page())
		}
		if l.Items = append(l.Items, d); len(l.Items) == maxDecisions {
			return errEnough
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, d := range l.Items {
		if d.Entry.Reason != string(api.TokenReplayedElsewhere) || d.Entry.TokenID == "" {
			continue
		}
		if d.FirstUse, err = a.firstUse(ctx, ch, d.Entry); err != nil {
			return nil, err
		}
	}
	if len(l.Items) == 0 {
		return nil, &failure{
			err: api.E(api.NotFound, "correlation id %s is not on record", id),
			why: "Of refusals of unknown callers, and under overload, the CA keeps a sample, until it restarts. Or it is older than the record reaches " +
				"back, or another replica of the CA or an agent refused: their logs have it.",
			next: "signet audit --refused --since 1h",
		}
	}
	return l, nil
}

// firstUse returns the first issuance for the token of a refusal, or where there is none the first that is on record of
// the token at all; nil when that is this refusal.
func (a *app) firstUse(ctx context.Context, ch *channel, refused *auditEntry) (*auditEntry, error) {
	req := &apiv1.ListAuditRequest{TokenId: refused.TokenID}
	if !refused.time.IsZero() {
		req.Until = timestamppb.New(refused.time)
	}
	var first *auditEntry
	err := a.streamAudit(ctx, ch, req, new(tally), func(e *auditEntry) error {
		switch {
		case e.Cluster != refused.Cluster: // token ids are unique within one issuer only
		case e.Type != kindRefuse:
			first = e
			return errEnough
		case first == nil && e.Reason != refused.Reason:
			first = e
		}
		return nil
	})
	return first, err
}

// completeRefusals offers the ids of the newest refusals, with their reasons.
func (a *app) completeRefusals(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	a.timeout = completionTimeout
	words, err := once(a, func(ch *channel) (words []string, err error) {
		err = a.streamAudit(c.Context(), ch, &apiv1.ListAuditRequest{Kinds: []string{kindRefuse}, Last: 20}, new(tally), func(e *auditEntry) error {
			if r := api.Reason(e.Reason); isCorrelationID(e.CorrelationID) && r.Known() {
				words = append(words, cobra.CompletionWithDesc(e.CorrelationID, string(r)))
			}
			return nil
		})
		return words, err
	})
	if err != nil {
		words = nil
	}
	slices.Reverse(words)
	return words, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
}
