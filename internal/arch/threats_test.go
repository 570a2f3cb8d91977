package arch

import (
	"bytes"
	"fmt"
	"os"
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
func (c threatChapter) partly() bool { return strings.HasPrefix(c.title, "E, F, H, I") }

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
	head, err := os.ReadFile("testdata/threats.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := bytes.NewBuffer(head)
	for _, c := range threatChapters {
		fmt.Fprintf(doc, "\n## %s\n\n", c.title)
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
			fmt.Fprintf(doc, "| %s | %s | %s |\n", r.id, r.title, cell)
		}
	}
	golden(t, "docs/threats.md", doc.Bytes())
}
