// Package strictyaml reads configuration and refuses whatever it does not understand completely.
//
// A key that is misspelt, there twice or in the wrong place would otherwise leave a default standing where the operator
// believes to have set a policy; in an authority that is a hole. So every key must be known and unique, every value of
// its field's type, and there are no second ways to write a thing: no anchors, aliases or merge keys (with which a few
// bytes grow to gigabytes), no tags, no second document, no durations as bare numbers. All problems are told at once,
// each with its line and, where one is near, the name that was meant.
package strictyaml

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// MaxBytes is the size of the largest document that is read.
const MaxBytes = 1 << 20

const (
	maxDepth    = 32 // nesting; configuration has four or five levels
	maxProblems = 20 // told at once
	maxQuoted   = 40 // bytes of the document repeated in a message
)

// Duration is a length of time, written as time.ParseDuration reads it: "90s", "1h30m". A bare number is refused, since
// nobody knows its unit. Fields of type time.Duration are read alike.
type Duration time.Duration

// String returns the duration as time.Duration writes it.
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText returns String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what time.ParseDuration reads.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return errors.New(`want a duration such as "90s" or "1h30m"`)
	}
	*d = Duration(v)
	return nil
}

// A Problem is one thing that is wrong with a document.
type Problem struct {
	Line int    // 1-based; 0 where the whole document is meant
	Path string // of the value within the document: "policy.rules[2].ttl"; empty for the document itself
	Text string // what is wrong, lower case, at most a few bytes of the document quoted
}

// String is "line LINE: PATH: TEXT", without what is empty.
func (p Problem) String() string {
	s := p.Text
	if p.Path != "" {
		s = p.Path + ": " + s
	}
	if p.Line > 0 {
		s = "line " + strconv.Itoa(p.Line) + ": " + s
	}
	return s
}

// Error is every problem of a document, by line.
type Error struct {
	File     string // empty for Decode
	Problems []Problem
	More     int // problems beyond those listed
}

// Error returns the problems, one a line.
func (e *Error) Error() string {
	var b strings.Builder
	for i, p := range e.Problems {
		if i > 0 {
			b.WriteByte('\n')
		}
		if e.File != "" {
			b.WriteString(e.File + ": ")
		}
		b.WriteString(p.String())
	}
	if e.More > 0 {
		fmt.Fprintf(&b, "\nand %d more", e.More)
	}
	return b.String()
}

// Decode reads the one document in data into v, a pointer to a struct. Keys are those of the `yaml:"name"` tags, or the
// field's name in lower case. What the document does not mention keeps the value that v had. An error about the document
// is an *Error; v is then in no defined state.
func Decode(data []byte, v any) error {
	target := reflect.ValueOf(v)
	if target.Kind() != reflect.Pointer || target.IsNil() || target.Elem().Kind() != reflect.Struct {
		return fmt.Errorf("strictyaml: cannot decode into %T, want a pointer to a struct", v)
	}
	root, err := parse(data)
	if err != nil {
		return err
	}
	var d decoder
	d.structure(root, "", 0)
	if !d.broken {
		d.value(root, target.Elem(), "")
	}
	return d.err()
}

// DecodeFile is Decode of the file path, whose name then stands before each problem. A file that cannot be read gives
// the error of package os.
func DecodeFile(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxBytes+1))
	if err != nil {
		return err
	}
	err = Decode(data, v)
	if e, ok := errors.AsType[*Error](err); ok {
		e.File = path
	}
	return err
}

// Raw is a part of a document whose type is known only later, such as the section of a driver. The zero Raw was not in
// the document.
type Raw struct {
	node *yaml.Node
	path string
}

// IsZero reports whether the document had no such part.
func (r Raw) IsZero() bool { return r.node == nil }

// Decode reads the part into v, as the function Decode does; lines are those of the whole document. A part that was not
// there leaves v as it is.
func (r Raw) Decode(v any) error {
	target := reflect.ValueOf(v)
	if target.Kind() != reflect.Pointer || target.IsNil() {
		return fmt.Errorf("strictyaml: cannot decode into %T, want a pointer", v)
	}
	if r.node == nil {
		return nil
	}
	var d decoder
	d.value(r.node, target.Elem(), r.path)
	return d.err()
}

// parse returns the root of the only document in data.
func parse(data []byte) (*yaml.Node, error) {
	if len(data) > MaxBytes {
		return nil, whole(fmt.Sprintf("the document is larger than %d bytes", MaxBytes))
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, whole("the document is empty")
	case err != nil:
		return nil, syntaxError(err)
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil, whole("the document is empty")
	}
	var second yaml.Node
	switch err := dec.Decode(&second); {
	case errors.Is(err, io.EOF):
		return root, nil
	case err != nil:
		return nil, syntaxError(err)
	}
	return nil, &Error{Problems: []Problem{{Line: second.Line, Text: "a second document begins; want one"}}}
}

func whole(text string) error { return &Error{Problems: []Problem{{Text: text}}} }

var yamlLine = regexp.MustCompile(`^line (\d+): `)

// syntaxError takes apart what the parser says: "yaml: line 3: did not find expected key".
func syntaxError(err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	p := Problem{}
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		p.Line, _ = strconv.Atoi(m[1])
		text = text[len(m[0]):]
	}
	p.Text = clip(text, 4*maxQuoted)
	return &Error{Problems: []Problem{p}}
}

// decoder collects problems instead of stopping at the first.
type decoder struct {
	problems []Problem
	broken   bool // the tree is not one that may be walked by type
}

func (d *decoder) problem(n *yaml.Node, path, format string, args ...any) {
	d.problems = append(d.problems, Problem{Line: n.Line, Path: path, Text: fmt.Sprintf(format, args...)})
}

func (d *decoder) err() error {
	if len(d.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(d.problems, func(a, b Problem) int { return cmp.Compare(a.Line, b.Line) })
	n := min(len(d.problems), maxProblems)
	return &Error{Problems: d.problems[:n], More: len(d.problems) - n}
}

// structure checks what holds for any document, whatever its type: no anchors, no tags, unique scalar keys.
func (d *decoder) structure(n *yaml.Node, path string, depth int) {
	switch {
	case depth > maxDepth:
		d.broken = true
		d.problem(n, "", "nested deeper than %d levels", maxDepth)
		return
	case n.Kind == yaml.AliasNode:
		d.broken = true
		d.problem(n, path, "aliases (*name) are not allowed; write the value out")
		return
	case n.Anchor != "":
		d.problem(n, path, "anchors (&name) are not allowed")
	case n.Style&yaml.TaggedStyle != 0:
		d.broken = true
		d.problem(n, path, "tags (%s) are not allowed", quote(n.Tag))
	}
	switch n.Kind {
	case yaml.SequenceNode:
		for i, item := range n.Content {
			d.structure(item, fmt.Sprintf("%s[%d]", path, i), depth+1)
		}
	case yaml.MappingNode:
		first := make(map[string]int) // key to the line of its first use
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, value := n.Content[i], n.Content[i+1]
			d.key(key, path, first)
			d.structure(value, join(path, key.Value), depth+1)
		}
	}
}

func (d *decoder) key(key *yaml.Node, path string, first map[string]int) {
	switch {
	case key.Kind != yaml.ScalarNode || key.Tag == "!!null":
		d.broken = true
		d.problem(key, path, "a key must be a plain word")
	case key.Tag == "!!merge":
		d.broken = true
		d.problem(key, path, "merge keys (<<) are not allowed")
	case key.Anchor != "":
		d.problem(key, path, "anchors (&name) are not allowed")
	case key.Style&yaml.TaggedStyle != 0:
		d.broken = true
		d.problem(key, path, "tags (%s) are not allowed", quote(key.Tag))
	case first[key.Value] != 0:
		d.problem(key, path, "key %s is there twice, first in line %d", quote(key.Value), first[key.Value])
	default:
		first[key.Value] = key.Line
	}
}

func join(path, key string) string {
	key = clip(key, maxQuoted)
	if path == "" {
		return key
	}
	return path + "." + key
}

func quote(s string) string { return strconv.Quote(clip(s, maxQuoted)) }

// clip keeps messages short and their reader's terminal and log whole.
func clip(s string, limit int) string {
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "..."
	}
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '.'
		}
		return r
	}, s)
}
