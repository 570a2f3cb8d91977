package arch

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// A test, one row of its table, or a script names the rows of docs/threats.md that it proves in a comment right above it:
//
//	// threat: A01, C14
//
// A row stands in one of the tables of threats_table_test.go; one that no test proves needs words there, either why it
// cannot arise or which later part of the product it belongs to.
var (
	threatMarker = regexp.MustCompile(`^(?://|#) ?threat:\s*([^/\s].*)$`)
	threatName   = regexp.MustCompile(`^([A-N]\d{2}|CVE-\d{4}-\d{4,6}|GO-\d{4}-\d{4}|GHSA-[0-9a-z]{4}(-[0-9a-z]{4})*)$`)
)

// threat is one thing that somebody may try. Words are about what no test proves, and may be empty where tests prove all.
type threat struct{ id, title, words string }

type threatChapter struct {
	title, about string
	rows         []threat
}

// partly tells the chapter of which only those rows are shown that something is proven of: parts of theirs are to come.
func (c threatChapter) partly() bool { return strings.HasPrefix(c.title, "B, ") }

func TestThreats(t *testing.T) {
	known := make(map[string]bool)
	for _, c := range threatChapters {
		for _, r := range c.rows {
			if known[r.id] || !threatName.MatchString(r.id) {
				t.Errorf("%s is there twice, or is no name of a threat", r.id)
			}
			if strings.ContainsAny(r.title+r.words, "|\n") {
				t.Errorf("%s: its text does not fit on a line", r.id)
			}
			known[r.id] = true
		}
	}
	all := proofsOf(t, threatMarker, threatName, known)
	var doc bytes.Buffer
	doc.WriteString(threatsHead)
	for _, c := range threatChapters {
		fmt.Fprintf(&doc, "\n## %s\n\n", c.title)
		if c.about != "" {
			doc.WriteString(c.about + "\n\n")
		}
		doc.WriteString("| | tried | proven by |\n|---|---|---|\n")
		for _, r := range c.rows {
			if c.partly() && len(all[r.id]) == 0 {
				continue
			}
			cell := r.words
			if proven := all[r.id]; len(proven) > 0 {
				cell = strings.TrimSuffix(list(proven)+". "+r.words, ". ")
			} else if r.words == "" {
				t.Errorf("no test proves %s (%s), and no words say why", r.id, r.title)
			}
			fmt.Fprintf(&doc, "| %s | %s | %s |\n", r.id, r.title, cell)
		}
	}
	golden(t, "docs/threats.md", doc.Bytes())
}

const threatsHead = "# Threats\n\n" +
	"What somebody may try against Signet, and which test proves that it comes to nothing. Assets, worst loss first: the keys\n" +
	"that sign, the state of a rotation, what opens an upstream, the trust bundle, the keys of workloads, their tokens on the\n" +
	"way, the policy, the ledger, and that there is issuance at all. Those who try: a workload, somebody who owns a node or\n" +
	"its agent, somebody on the network, the admin of a namespace, a holder of a stolen file, an upstream, a careless operator.\n\n" +
	"Every refusal has a reason of [one closed table](reasons.md), its gRPC code and a correlation id; it holds no token, key,\n" +
	"certificate request or name of somebody else; nothing is issued, by ledger and by metric; and it is never internal. The\n" +
	"suites of `integration/adversarial` ask that of some eight thousand variants, made by code, over real gRPC. What is not\n" +
	"claimed: whoever may create tokens or pods in a namespace is every identity in it, and whoever owns a node is every pod\n" +
	"on it, for as long as the node is trusted and one lifetime longer.\n\n" +
	"Made by `make generate` from the comments `// threat: ID, ...` above tests and from the words of\n" +
	"`internal/arch/threats_table_test.go`.\n"
