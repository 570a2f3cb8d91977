package arch

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/signet-ca/signet/api"
)

// reasonParts are the hundreds of the SGN numbers.
var reasonParts = map[int]string{
	1: "Tokens", 2: "Pods and nodes", 3: "Certificate requests", 6: "Agent and CA", 7: "Secrets for proxies",
	8: "State, files and configuration", 9: "Everything else",
}

func TestReasons(t *testing.T) {
	var doc bytes.Buffer
	doc.WriteString("# Reasons\n\n" +
		"Why a request is refused or a process will not start. Each error shows one of these numbers, `signet explain SGN-0102`\n" +
		"prints the same text offline, and scripts and alerts may match on the names: the set only ever grows. Made by `make\n" +
		"generate` from `api/table.go`.\n")
	seen := make(map[int]api.Reason)
	part := 0
	for p := range api.Pages() {
		if other, ok := seen[p.Number]; ok {
			t.Errorf("%s and %s share the number %d", other, p.Reason, p.Number)
		}
		seen[p.Number] = p.Reason
		for _, text := range []string{p.Title, p.Why, p.Do} {
			if strings.TrimSpace(text) == "" || strings.ContainsAny(text, "\n|") {
				t.Errorf("%s: text %q is empty or does not fit on a line", p.Reason, text)
			}
		}
		if n := p.Number / 100; n != part {
			if n < part {
				t.Errorf("%s: the number %d is out of order", p.Reason, p.Number)
			}
			part = n
			title, ok := reasonParts[n]
			if !ok {
				t.Errorf("the numbers from %d00 on have no title", n)
			}
			fmt.Fprintf(&doc, "\n## %s\n", title)
		}
		fmt.Fprintf(&doc, "\n### %s %s\n\n**%s.** %s\n\n%s\n\ngRPC code `%s`; %s.\n", p.Code(), p.Reason, p.Title, p.Why, p.Do, p.Reason.GRPC(), p.Kind)
	}
	golden(t, "docs/reasons.md", doc.Bytes())
}
