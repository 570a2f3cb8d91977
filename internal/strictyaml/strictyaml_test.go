package strictyaml

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

type listen struct {
	Address netip.AddrPort `yaml:"address"`
	Admin   string         `yaml:"adminSocket"`
}

type common struct {
	TrustDomain string `yaml:"trustDomain"`
	Development bool   `yaml:"development"`
}

type rule struct {
	Namespaces []string      `yaml:"namespaces"`
	TTL        time.Duration `yaml:"ttl"`
}

type config struct {
	Common   common            `yaml:",inline"`
	Listen   *listen           `yaml:"listen"`
	TTL      Duration          `yaml:"ttl"`
	Rules    []rule            `yaml:"rules"`
	Labels   map[string]string `yaml:"labels"`
	Replicas int               `yaml:"replicas"`
	Small    uint8             `yaml:"small"`
	Share    float64           `yaml:"share"`
	Upstream Raw               `yaml:"upstream"`
	Plain    string
	Skipped  string `yaml:"-"`
	//lint:ignore U1000 a key must not reach it
	hidden string
}

func TestDecode(t *testing.T) {
	got := config{Replicas: 3, Plain: "default"}
	err := Decode([]byte(`---
trustDomain: example.org   # a comment
development: true
listen:
  address: "127.0.0.1:8443"
ttl: 1h30m
rules:
- namespaces: [a, 'b']
  ttl: 10m
- {namespaces: []}
labels: {version: 1.10, on: yes, port: 0x1F}
small: 255
share: 1
...
`), &got)
	if err != nil {
		t.Fatal(err)
	}
	want := config{
		Common:   common{TrustDomain: "example.org", Development: true},
		Listen:   &listen{Address: netip.MustParseAddrPort("127.0.0.1:8443")},
		TTL:      Duration(90 * time.Minute),
		Rules:    []rule{{Namespaces: []string{"a", "b"}, TTL: 10 * time.Minute}, {Namespaces: []string{}}},
		Labels:   map[string]string{"version": "1.10", "on": "yes", "port": "0x1F"},
		Replicas: 3,
		Small:    255,
		Share:    1,
		Plain:    "default",
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(config{}, Raw{}), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("decoded (-want +got):\n%s", diff)
	}
}

// threat: L08, L09, L10
func TestDecodeRefuses(t *testing.T) {
	deep := strings.Repeat("[", maxDepth+2) + strings.Repeat("]", maxDepth+2)
	for _, tc := range []struct{ name, doc, want string }{
		{"nothing", "", "the document is empty"},
		{"comments", "# a\n# b\n", "the document is empty"},
		{"null", "---\n", "the document is empty"},
		{"not keys", "hello", "line 1: want keys with values, got one value"},
		{"a list", "- a", "line 1: want keys with values, got a list"},
		{"too large", "#" + strings.Repeat("x", MaxBytes), "the document is larger than 1048576 bytes"},
		{"two documents", "ttl: 1h\n---\nttl: 2h\n", "line 2: a second document begins; want one"},
		{"two documents, second empty", "ttl: 1h\n---\n", "line 2: a second document begins; want one"},
		{"syntax", "ttl: 1h\n\tx: y\n", "line 2: found a tab character that violates indentation"},
		{"syntax behind", "ttl: 1h\n---\n{", "line 3: did not find expected node content"},
		{"misspelt", "ttl: 1h\ntrustDomian: x\n", `line 2: unknown key "trustDomian", did you mean "trustDomain"?`},
		{"wrong case", "TTL: 1h\n", `line 1: unknown key "TTL", did you mean "ttl"?`},
		{"nothing near", "colour: red\n", `line 1: unknown key "colour"`},
		{"below a list", "rules:\n- namespace: [a]\n", `line 2: rules[0]: unknown key "namespace", did you mean "namespaces"?`},
		{"unexported", "hidden: x\n", `line 1: unknown key "hidden"`},
		{"excluded", "skipped: a\n", `line 1: unknown key "skipped"`},
		{"Go name of a tagged field", "replica: 1\n", `line 1: unknown key "replica", did you mean "replicas"?`},
		{"twice", "ttl: 1h\nplain: x\nttl: 2h\n", `line 3: key "ttl" is there twice, first in line 1`},
		{"twice in a map", "labels: {a: b, a: c}\n", `line 1: labels: key "a" is there twice, first in line 1`},
		{"twice in a later part", "upstream: {a: b, a: c}\n", `line 1: upstream: key "a" is there twice, first in line 1`},
		{"anchor", "ttl: &x 1h\n", "line 1: ttl: anchors (&name) are not allowed"},
		{"alias", "labels: &x {}\nupstream: *x\n", "line 1: labels: anchors (&name) are not allowed\nline 2: upstream: aliases (*name) are not allowed; write the value out"},
		{"alias to itself", "upstream: &x [*x]\n", "line 1: upstream: anchors (&name) are not allowed\nline 1: upstream[0]: aliases (*name) are not allowed; write the value out"},
		{"key with an anchor", "&x ttl: 1h\n", "line 1: anchors (&name) are not allowed"},
		{"merge", "<<: {ttl: 1h}\n", "line 1: merge keys (<<) are not allowed"},
		{"tag", "ttl: !!binary MWg=\n", `line 1: ttl: tags ("!!binary") are not allowed`},
		{"tag on a key", "!!str ttl: 1h\n", `line 1: tags ("!!str") are not allowed`},
		{"list as a key", "? [a]\n: b\n", "line 1: a key must be a plain word"},
		{"null as a key", "~: b\n", "line 1: a key must be a plain word"},
		{"depth", "upstream: " + deep, "line 1: nested deeper than 32 levels"},
		{"no value", "ttl:\nplain: ~\n", "line 1: ttl: there is no value; give one or remove the key\nline 2: plain: there is no value; give one or remove the key"},
		{"duration without unit", "ttl: 5\n", `line 1: ttl: want a duration such as "90s" or "1h30m", got "5"`},
		{"duration in days", "rules: [{ttl: 1d}]\n", `line 1: rules[0].ttl: want a duration such as "90s" or "1h30m", got "1d"`},
		{"duration as a list", "ttl: [1h]\n", "line 1: ttl: want one value, got a list"},
		{"text", "listen: {address: nowhere}\n", `line 1: listen.address: not an ip:port, got "nowhere"`},
		{"bool in words", "development: yes\n", `line 1: development: want true or false, got "yes"`},
		{"bool in quotes", "development: 'true'\n", `line 1: development: want true or false, got "true"`},
		{"number in quotes", "replicas: '3'\n", `line 1: replicas: want a whole number from -9223372036854775808 to 9223372036854775807, got "3"`},
		{"number too large", "small: 256\n", `line 1: small: want a whole number from 0 to 255, got "256"`},
		{"negative", "small: -1\n", `line 1: small: want a whole number from 0 to 255, got "-1"`},
		{"broken number", "replicas: 1.5\n", `line 1: replicas: want a whole number from -9223372036854775808 to 9223372036854775807, got "1.5"`},
		{"not a number", "share: .nan\n", `line 1: share: want a number, got ".nan"`},
		{"list for a string", "plain: [a]\n", "line 1: plain: want a string, got a list"},
		{"string for a list", "rules: a\n", "line 1: rules: want a list, got one value"},
		{"list for a map", "labels: [a]\n", "line 1: labels: want keys with values, got a list"},
		{"keys for a number", "replicas: {a: b}\n", "line 1: replicas: want a whole number from -9223372036854775808 to 9223372036854775807, got keys with values"},
		{"long and foul", "replicas: \"\\e[2J" + strings.Repeat("x", 99) + "\"\n", `line 1: replicas: want a whole number from -9223372036854775808 to 9223372036854775807, got ".[2J` + strings.Repeat("x", 36) + `..."`},
		{"all at once", "ttl: 5\nreplicas: x\ncolour: red\nttl: 1h\n", "line 1: ttl: want a duration such as \"90s\" or \"1h30m\", got \"5\"\n" +
			"line 2: replicas: want a whole number from -9223372036854775808 to 9223372036854775807, got \"x\"\n" +
			"line 3: unknown key \"colour\"\nline 4: key \"ttl\" is there twice, first in line 1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := Decode([]byte(tc.doc), new(config))
			e, ok := errors.AsType[*Error](err)
			if !ok {
				t.Fatalf("error %v, want an *Error", err)
			}
			if diff := cmp.Diff(tc.want, e.Error()); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeTellsTwenty(t *testing.T) {
	var doc strings.Builder
	for i := range 25 {
		fmt.Fprintf(&doc, "unknown%d: x\n", i)
	}
	err := Decode([]byte(doc.String()), new(config))
	e, ok := errors.AsType[*Error](err)
	if !ok || len(e.Problems) != 20 || e.More != 5 || !strings.HasSuffix(err.Error(), "\nand 5 more") {
		t.Errorf("error %v, want 20 problems and 5 more", err)
	}
}

func TestDecodeTarget(t *testing.T) {
	for _, v := range []any{nil, config{}, (*config)(nil), new(int), new(map[string]string)} {
		t.Run(fmt.Sprintf("%T", v), func(t *testing.T) {
			if err := Decode([]byte("a: b"), v); err == nil || !strings.HasPrefix(err.Error(), "strictyaml: ") {
				t.Errorf("error %v, want the caller's mistake", err)
			}
		})
	}
	if err := Decode([]byte("c: 1"), new(struct{ C chan int })); err == nil || err.Error() != "line 1: c: cannot be read into a Go chan int" {
		t.Errorf("error %v", err)
	}
}

func TestRaw(t *testing.T) {
	type vault struct {
		Address string   `yaml:"address"`
		Timeout Duration `yaml:"timeout"`
	}
	for _, tc := range []struct{ name, doc, want string }{
		{"good", "upstream:\n  address: a\n  timeout: 5s\n", ""},
		{"absent", "ttl: 1h\n", ""},
		{"lines and paths of the whole", "ttl: 1h\nupstream:\n  adress: a\n  timeout: 5\n",
			"line 3: upstream: unknown key \"adress\", did you mean \"address\"?\nline 4: upstream.timeout: want a duration such as \"90s\" or \"1h30m\", got \"5\""},
		{"no value", "upstream:\n", "line 1: upstream: there is no value; give one or remove the key"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var c config
			if err := Decode([]byte(tc.doc), &c); err != nil {
				t.Fatal(err)
			}
			v := vault{Timeout: Duration(time.Second)}
			err := c.Upstream.Decode(&v)
			if tc.want != "" {
				if err == nil || err.Error() != tc.want {
					t.Errorf("error %v, want %s", err, tc.want)
				}
				return
			}
			want := vault{Timeout: Duration(time.Second)}
			if !c.Upstream.IsZero() {
				want = vault{Address: "a", Timeout: Duration(5 * time.Second)}
			}
			if err != nil || v != want {
				t.Errorf("decoded %+v, %v, want %+v", v, err, want)
			}
		})
	}
	if err := (Raw{}).Decode(vault{}); err == nil {
		t.Error("decoded into something that is not a pointer")
	}
}

func TestDecodeFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.yaml")
	if err := DecodeFile(path, new(config)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v, want fs.ErrNotExist", err)
	}
	for _, tc := range []struct{ name, doc, want string }{
		{"good", "ttl: 1h\n", ""},
		{"bad", "a: b\nc: d\n", path + ": line 1: unknown key \"a\"\n" + path + ": line 2: unknown key \"c\""},
		{"large", strings.Repeat("#", MaxBytes+1), path + ": the document is larger than 1048576 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := os.WriteFile(path, []byte(tc.doc), 0o600); err != nil {
				t.Fatal(err)
			}
			err := DecodeFile(path, new(config))
			if got := fmt.Sprint(err); tc.want != "" && got != tc.want || tc.want == "" && err != nil {
				t.Errorf("error %s, want %s", got, tc.want)
			}
		})
	}
}

func TestDurationText(t *testing.T) {
	text, err := Duration(90 * time.Second).MarshalText()
	if err != nil || string(text) != "1m30s" {
		t.Errorf("text %q, %v", text, err)
	}
}

// What we accept is what the YAML package accepts, with the same values, and what we refuse we explain in clean text.
//
// threat: L10
func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		"trustDomain: x\nttl: 1h\nrules: [{namespaces: [a], ttl: 5m}]\n", "a: &a [*a]\n", "<<: {ttl: 1h}", "? [a]\n: b", "ttl: 1h\n---\n",
		"labels: {a: b, a: c}", "!!map {}", "upstream:\n  - {a: {b: [c]}}\n", "share: .inf", "replicas: 0o17", "%YAML 1.1\n---\nttl: 1h", "\ufeffttl: 1h", "\xff\xfea\x00",
		"plain: |\n  a\n  b\n", "small: 1_0", "development: True",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var got config
		if err := Decode(data, &got); err != nil {
			e, ok := errors.AsType[*Error](err)
			if !ok || len(e.Problems) == 0 || len(e.Problems) > maxProblems {
				t.Fatalf("error %#v", err)
			}
			for _, p := range e.Problems {
				if p.Text == "" || p.Line < 0 || clip(p.String(), 4096) != p.String() {
					t.Fatalf("problem %q", p)
				}
			}
			return
		}
		var loose struct {
			Common   common                          `yaml:",inline"`
			Rules    []struct{ Namespaces []string } `yaml:"rules"`
			Labels   map[string]string               `yaml:"labels"`
			Replicas int                             `yaml:"replicas"`
			Plain    string
		}
		if err := yaml.Unmarshal(data, &loose); err != nil {
			t.Fatalf("we accept what the parser refuses: %v", err)
		}
		if loose.Common != got.Common || loose.Replicas != got.Replicas || loose.Plain != got.Plain || len(loose.Rules) != len(got.Rules) || !cmp.Equal(loose.Labels, got.Labels) {
			t.Fatalf("we read %+v, the parser %+v", got, loose)
		}
	})
}
