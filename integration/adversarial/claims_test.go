package adversarial

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/attestor/attestortest"
	"github.com/signet-ca/signet/ca/catest"
)

// claim is one place in a token, the row of the table that it belongs to, and what each kind of harm to it must lead to.
type claim struct {
	row     string
	path    string // with dots; "kubernetes.io" is one name
	missing []api.Reason
	null    []api.Reason
	kind    []api.Reason              // of another JSON type
	text    func(s string) api.Reason // another string; empty: equal meaning
}

func one(r api.Reason) []api.Reason               { return []api.Reason{r} }
func always(r api.Reason) func(string) api.Reason { return func(string) api.Reason { return r } }

var (
	uidText       = regexp.MustCompile(`\A[A-Za-z0-9-]{1,64}\z`)
	subdomainText = regexp.MustCompile(`\A[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*\z`)
)

// formed returns what a well-formed other value leads to, and what any other does.
func formed(form *regexp.Regexp, good, bad api.Reason) func(string) api.Reason {
	return func(s string) api.Reason {
		if form.MatchString(s) && len(s) <= 253 {
			return good
		}
		return bad
	}
}

// orEmpty is another reason for the empty string, which is as if there were none.
func orEmpty(empty api.Reason, f func(string) api.Reason) func(string) api.Reason {
	return func(s string) api.Reason {
		if s == "" {
			return empty
		}
		return f(s)
	}
}

func claims() []claim {
	malformed, subject, node := one(api.TokenMalformed), one(api.SubjectMalformed), one(api.NodeUnverifiable)
	return []claim{
		{"A01", "aud", one(api.TokenAudience), one(api.TokenAudience), malformed, always(api.TokenAudience)},
		{"A04", "exp", malformed, malformed, malformed, always(api.TokenMalformed)},
		{"A05", "iat", malformed, malformed, malformed, always(api.TokenMalformed)},
		{"A05", "nbf", nil, malformed, malformed, always(api.TokenMalformed)},
		{"A24", "iss", one(api.IssuerUnknown), one(api.IssuerUnknown), one(api.IssuerUnknown), always(api.IssuerUnknown)},
		{"A23", "jti", nil, malformed, malformed, formed(uidText, "", api.TokenMalformed)},
		{"A18", "sub", subject, subject, subject, always(api.SubjectMalformed)},
		{"A13", "kubernetes.io", malformed, malformed, malformed, always(api.TokenMalformed)},
		{"A18", "kubernetes.io/namespace", subject, subject, subject, always(api.SubjectMalformed)},
		{"A18", "kubernetes.io/serviceaccount", subject, subject, subject, always(api.SubjectMalformed)},
		{"A18", "kubernetes.io/serviceaccount/name", subject, subject, subject, always(api.SubjectMalformed)},
		{"A10", "kubernetes.io/serviceaccount/uid", subject, subject, subject, formed(uidText, api.PodMismatch, api.SubjectMalformed)},
		{"A13", "kubernetes.io/pod", one(api.TokenNotPodBound), subject, subject, always(api.SubjectMalformed)},
		{"A12", "kubernetes.io/pod/name", subject, subject, subject, formed(subdomainText, api.PodMismatch, api.SubjectMalformed)},
		{"A12", "kubernetes.io/pod/uid", subject, subject, subject, formed(uidText, api.PodUnknown, api.SubjectMalformed)},
		{"A16", "kubernetes.io/node", node, node, node, always(api.NodeUnverifiable)},
		{"A15", "kubernetes.io/node/name", node, node, node, orEmpty(api.NodeUnverifiable, formed(subdomainText, api.NodeMismatch, api.SubjectMalformed))},
		{"A17", "kubernetes.io/node/uid", node, node, node, orEmpty(api.NodeUnverifiable, formed(uidText, api.NodeMismatch, api.SubjectMalformed))},
	}
}

// texts are other strings for one that was good. None of them is equal to it.
func texts(good string) map[string]string {
	return map[string]string{
		"empty": "", "a space": " ", "a dot": ".", "two dots": "..", "a star": "*", "a slash": "/",
		"NUL behind": good + "\x00", "space behind": good + " ", "space before": " " + good, "newline behind": good + "\n",
		"slash behind": good + "/", "dots behind": good + "/..", "dots before": "../" + good, "colon behind": good + ":x",
		"percent": good + "%2e", "query": good + "?x", "fragment": good + "#x", "two of it": good + good, "comma": good + "," + good,
		"a letter more": good + "x", "a letter less": good[:len(good)-1], "a letter before": "x" + good, "somebody's": stranger + "-1",
		"upper case": upper(good), "hyphen behind": good + "-", "dot behind": good + ".", "underscore": good + "_x",
		"Cyrillic": "а" + good[1:], "full width": "ｗ" + good[1:], "joiner": good + "\u200d", "right to left": "\u202e" + good,
		"combining": good + "\u0301", "soft hyphen": good + "\u00ad", "BOM": "\ufeff" + good, "quote": good + `"`, "backslash": good + `\`,
		"brace": good + "{namespace}", "template": "{serviceAccount}", "shell": "$(" + good + ")", "pattern": "[a-z]+", "300 bytes": strings.Repeat("a", 300),
		"254 bytes": strings.Repeat("a", 254), "line of a log": good + "\n{\"level\":\"error\"}",
	}
}

// upper is s in other letters; a text without letters gets one.
func upper(s string) string {
	if u := strings.ToUpper(s); u != s {
		return u
	}
	return s + "X"
}

// threat: A01, A04, A05, A10, A12, A13, A15, A16, A17, A18, A23, A24, CVE-2024-5798
func TestClaims(t *testing.T) {
	withRig(t, catest.Options{}, func(t *testing.T, r *rig) {
		for _, c := range claims() {
			r.harm(c)
		}
		r.tell(1000)
	})
}

// harm asks with a token in which one claim was changed in every way.
func (r *rig) harm(c claim) {
	r.t.Helper()
	path := strings.Split(c.path, "/")
	draft := func() object { return objectOf(r.Tokens.Draft(r.pod, api.WorkloadAudience(r.TD), time.Hour).Claims) }
	var value any
	draft().edit(path, func(m member) []member { value = m.value; return nil })
	good, isText := value.(string)
	if list, ok := value.([]any); ok { // aud
		good, isText = list[0].(string), true
	}
	try := func(what string, want []api.Reason, harmless string, f func(member) []member) {
		r.t.Helper()
		token := r.sign(draft().edit(path, f))
		r.ask(variant{row: c.row, name: c.path + ": " + what, item: r.item(token), want: want, harmless: harmless})
	}
	set := func(what string, want []api.Reason, harmless string, v any) {
		r.t.Helper()
		try(what, want, harmless, func(m member) []member { return []member{{m.name, v}} })
	}
	malformed := one(api.TokenMalformed)
	var optional string
	if c.missing == nil {
		optional = "the claim may be left out"
	}
	try("missing", c.missing, optional, func(member) []member { return nil })
	set("null", c.null, "", nil)
	for what, v := range sorted(wrongTypes()) {
		want := c.kind
		if _, isList := value.([]any); isList && what == "empty list" {
			want = c.missing // of no audience
		}
		if !isText && !isObject(value) && what == "a number" {
			continue // times are tried elsewhere
		}
		if _, ok := v.(object); ok && c.path == "kubernetes.io" {
			want = one(api.SubjectMalformed) // an object, but nobody's
		}
		set(what, want, "", v)
	}
	set("too deep", malformed, "", nested(9))
	set("2000 deep", malformed, "", nested(2000))
	set("300 values", malformed, "", make([]int, 300))
	set("above 16 KiB", one(api.TokenTooLarge), "", strings.Repeat("a", 17<<10))
	set("beyond every number", c.kind, "", json.RawMessage("1e400"))
	for what, twin := range sorted(twins(path[len(path)-1])) {
		try("twice, "+what, malformed, "", func(m member) []member { return []member{m, {twin, m.value}} })
		try("twice, another first, "+what, malformed, "", func(m member) []member { return []member{{twin, stranger}, m} })
		try("twice, another last, "+what, malformed, "", func(m member) []member { return []member{m, {twin, stranger}} })
	}
	try("in upper case instead", c.missing, optional, func(m member) []member { return []member{{strings.ToUpper(m.name), m.value}} })
	try("with a space in its name", c.missing, optional, func(m member) []member { return []member{{m.name + " ", m.value}} })
	try("its name escaped", nil, "JSON writes one name in several ways", func(m member) []member {
		return []member{{fmt.Sprintf(`\u%04x%s`, m.name[0], m.name[1:]), m.value}}
	})
	if isText {
		for what, s := range sorted(texts(good)) {
			want, harmless := c.text(s), ""
			if want == "" {
				harmless = "the issuer may call its token anything well-formed"
			}
			set(what, one(want), harmless, s)
		}
	} else {
		set("a text", one(c.text("x")), "", "x")
	}
}

func isObject(v any) bool { _, ok := v.(object); return ok }

func wrongTypes() map[string]any {
	return map[string]any{
		"true": true, "false": false, "a number": 1, "a fraction": 0.5, "below zero": -1, "a number as 1e2": json.RawMessage("1e2"),
		"empty list": []any{}, "list of null": []any{nil}, "list of a number": []any{7}, "empty object": object{}, "object": object{{"name", 7}},
		"list of a list": []any{[]any{"x"}}, "list of an object": []any{object{{"x", 1}}},
	}
}

// twins are names that some parser takes for the same as name.
func twins(name string) map[string]string {
	t := map[string]string{"same name": name, "upper case": strings.ToUpper(name), "escaped": fmt.Sprintf(`\u%04x%s`, name[0], name[1:])}
	if strings.Contains(name, "s") {
		t["long s"] = strings.Replace(name, "s", "ſ", 1)
	}
	if strings.Contains(name, "k") {
		t["Kelvin"] = strings.Replace(name, "k", "\u212a", 1)
	}
	return t
}

// sign makes a token of these claims with the issuer's own key.
func (r *rig) sign(claims any, change ...func(*attestortest.Draft)) []byte {
	r.t.Helper()
	d := r.Tokens.Draft(r.pod, "", time.Hour)
	raw, ok := claims.([]byte)
	if !ok {
		raw = marshal(r.t, claims)
	}
	d.RawClaims = raw
	for _, c := range change {
		c(d)
	}
	token, err := d.Compact()
	if err != nil {
		r.t.Fatal(err)
	}
	return []byte(token)
}
