package main

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/signet-ca/signet/api"
)

// outcomes says in a word what a kind of entry is.
var outcomes = map[string]string{
	kindIssue:      "issued",
	"attest-agent": "issued, to an agent",
	"mint":         "an intermediate was asked for",
	kindRefuse:     "REFUSED",
	kindBan:        "a node was banned",
	kindAllow:      "the ban of a node was taken back",
	kindRotate:     "the root's rotation was decided on",
	kindBackup:     "a backup was taken away",
	kindRestore:    "the record was restored from a backup",
	"operator":     "an operator came in from elsewhere",
}

// describeDecision is what was asked, found and done, and the page of the reason.
func (a *app) describeDecision(d *decision) []block {
	e := d.Entry
	found := "Found"
	switch e.Type {
	case kindBan, kindAllow:
		found = "Why" // in the operator's words
	case kindRotate, kindBackup, kindRestore:
		found = "What"
	}
	about := known(
		pair{"ID", e.CorrelationID},
		pair{"Outcome", cmp.Or(outcomes[e.Type], e.Type) + e.away()},
		pair{found, whatWasFound(e)},
		pair{"When", when(e, a.now())},
		pair{"Asked", asked(e)},
		pair{"For", whose(e)},
		pair{"SPIFFE ID", e.SPIFFEID},
		pair{"Node", e.Node + uid(e.NodeUID)},
		pair{"Cluster", e.Cluster},
		pair{"Token", e.TokenID},
		pair{"Serial", e.Serial},
		pair{"DNS names", strings.Join(e.DNSNames, ", ")},
		pair{"Valid until", e.NotAfter},
		pair{"Issuer key", e.IssuerKeyID},
		pair{"On record", onRecord(e)},
	)
	blocks := []block{{pairs: about}}
	if e.Reason == string(api.TokenReplayedElsewhere) {
		blocks = append(blocks, describeFirstUse(d))
	}
	if d.Explanation != nil {
		blocks = append(blocks, describePage(d.Explanation)...)
	}
	return blocks
}

// away says that nobody could be asked.
func (e *auditEntry) away() string {
	if e.Grace {
		return ", while the API server was away (docs/api-server-away.md)"
	}
	return ""
}

// known leaves out what there is nothing to say of.
func known(pairs ...pair) (said []pair) {
	for _, p := range pairs {
		if strings.TrimSpace(p.value) != "" {
			said = append(said, p)
		}
	}
	return said
}

func whatWasFound(e *auditEntry) string {
	if e.Reason == "" {
		return e.Detail
	}
	return e.Reason + " (" + cmp.Or(e.Code, "unknown to this build of signet") + ")" + after(": ", e.Detail)
}

// when is the time, and for what happened more than once how often and the last time.
func when(e *auditEntry, now time.Time) string {
	s := instant(e.time, now)
	if e.Count > 1 {
		s = fmt.Sprintf("%d times, first %s", e.Count, s)
		if !e.last.IsZero() {
			s += ", last " + instant(e.last, now)
		}
	}
	return s
}

func instant(t, now time.Time) string {
	if t.IsZero() {
		return ""
	}
	if now.Before(t) {
		return stamp(t)
	}
	return stamp(t) + " (" + duration.HumanDuration(now.Sub(t)) + " ago)"
}

func asked(e *auditEntry) string {
	if e.Method == "" && e.Caller == "" && e.CallerNode == "" {
		return ""
	}
	by := cmp.Or(e.Caller, "somebody unknown")
	return cmp.Or(e.Method, "a call") + ", by " + by + after(" on ", e.CallerNode)
}

func whose(e *auditEntry) string {
	var s string
	if e.Pod != "" || e.PodUID != "" {
		s = "pod " + e.pod() + uid(e.PodUID)
	}
	if e.ServiceAccount != "" {
		account := "service account " + e.ServiceAccount
		if s == "" && e.Namespace != "" {
			account = "service account " + e.Namespace + "/" + e.ServiceAccount
		}
		s = strings.TrimPrefix(s+", "+account, ", ")
	}
	return s
}

func onRecord(e *auditEntry) string {
	switch e.Source {
	case "":
		return ""
	case "sample":
		return fmt.Sprintf("sample %d: in the CA's memory only, gone when it restarts", e.Seq)
	}
	return fmt.Sprintf("%s %d", e.Source, e.Seq)
}

func describeFirstUse(d *decision) block {
	b := block{title: "The first use of this token"}
	first := d.FirstUse
	if first == nil {
		b.pairs = []pair{{"When", "not on record: it is older than the record, was at another replica of the CA, or the record has no token id"}}
		return b
	}
	where := first.Node + uid(first.NodeUID)
	if first.NodeUID != "" && first.NodeUID == d.Entry.NodeUID {
		where += "; the same node, so it came from another volume of it"
	}
	b.pairs = known(
		pair{"When", stamp(first.time)},
		pair{"Where", where},
		pair{"Asked", asked(first)},
		pair{"For", whose(first)},
		pair{"Outcome", cmp.Or(outcomes[first.Type], first.Type) + after(", serial ", first.Serial) + after(", ", first.Reason)},
		pair{"ID", first.CorrelationID},
	)
	return b
}

// after puts lead before what there is to say, and nothing before nothing.
func after(lead, s string) string {
	if s == "" {
		return ""
	}
	return lead + s
}
