package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/cli-runtime/pkg/printers"

	"github.com/signet-ca/signet/api"
)

// apiVersion is that of everything printed as JSON or YAML. Fields are only ever added.
const apiVersion = "cli.signet.dev/v1"

// A meta is how an object is called: `-o name` prints it, kubectl's tools look for it.
type meta struct {
	Name string `json:"name"`
}

// A header is what every printed object starts with.
type header struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   *meta  `json:"metadata,omitempty"`
}

func newHeader(kind, name string) header {
	h := header{APIVersion: apiVersion, Kind: kind}
	if name != "" {
		h.Metadata = &meta{Name: name}
	}
	return h
}

// A result is the answer to one command, ready for any format.
type result struct {
	object any                              // of a struct that starts with header; for json, yaml, name and jsonpath
	text   func(wide bool) []block          // for table and wide
	raw    map[string]func(io.Writer) error // formats of this command alone, such as pem
	empty  string                           // said on stderr where a table would have no rows
}

// A block is one part of a text: a table, or names with values.
type block struct {
	title string
	pairs []pair
	table *metav1.Table
}

type pair struct{ name, value string }

// A column of a table; wide ones are shown by -o wide only.
type column struct {
	name string
	wide bool
}

func table(columns []column, rows [][]string) *metav1.Table {
	t := &metav1.Table{}
	for _, c := range columns {
		def := metav1.TableColumnDefinition{Name: c.name, Type: "string"}
		if c.wide {
			def.Priority = 1
		}
		t.ColumnDefinitions = append(t.ColumnDefinitions, def)
	}
	for _, r := range rows {
		cells := make([]any, len(r))
		for i, c := range r {
			cells[i] = scrub(c)
		}
		t.Rows = append(t.Rows, metav1.TableRow{Cells: cells})
	}
	return t
}

// output is the value of -o, with --no-headers beside it.
type output struct {
	format    string
	template  *printers.JSONPathPrinter
	allowed   []string
	noHeaders bool
}

// outputFlags adds -o and --no-headers to c; extra are formats that only c knows.
func outputFlags(c *cobra.Command, extra ...string) *output {
	o := &output{format: "table", allowed: append([]string{"table", "wide", "name", "json", "yaml", "jsonpath="}, extra...)}
	c.Flags().VarP(o, "output", "o", "format: "+strings.Join(o.allowed, "|"))
	c.Flags().BoolVar(&o.noHeaders, "no-headers", false, "print no column names")
	c.RegisterFlagCompletionFunc("output", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return o.allowed, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	})
	return o
}

// String returns the format.
func (o *output) String() string { return o.format }

// Type names the value in help.
func (o *output) Type() string { return "FORMAT" }

// Set takes a format, and refuses one that the command does not have.
func (o *output) Set(s string) error {
	if path, ok := strings.CutPrefix(s, "jsonpath="); ok && path != "" {
		p, err := printers.NewJSONPathPrinter(relaxed(path))
		if err != nil {
			return err
		}
		p.AllowMissingKeys(true)
		o.format, o.template = "jsonpath", p
		return nil
	}
	if !slices.Contains(o.allowed, s) || s == "jsonpath=" {
		return fmt.Errorf("one of %s", strings.Join(o.allowed, ", "))
	}
	o.format = s
	return nil
}

// relaxed accepts a bare path, as kubectl does: .items is {.items}.
func relaxed(path string) string {
	if strings.Contains(path, "{") {
		return path
	}
	return "{." + strings.TrimPrefix(path, ".") + "}"
}

func (o *output) isText() bool { return o.format == "table" || o.format == "wide" }

// print writes r to stdout in the format that was asked for.
func (a *app) print(o *output, r result) error {
	var buf bytes.Buffer
	if err := o.render(&buf, r); err != nil {
		return err
	}
	text := buf.Bytes()
	if o.isText() {
		if len(text) == 0 && r.empty != "" {
			a.say("%s", r.empty)
		}
		text = a.pen(a.stdout).words(text)
	}
	_, err := sink{a.stdout, "stdout"}.Write(text)
	return err
}

// A sink is where output goes; its error says so.
type sink struct {
	io.Writer
	name string
}

// Write implements io.Writer.
func (s sink) Write(p []byte) (int, error) {
	n, err := s.Writer.Write(p)
	return n, s.failed(err)
}

func (s sink) failed(err error) error {
	if err == nil {
		return nil
	}
	cause := err
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		cause = pe.Err // without the name of a temporary file
	}
	return &failure{err: api.Wrap(api.OutputFailed, err, fmt.Sprintf("cannot write to %s: %v", s.name, cause))}
}

func (o *output) render(w io.Writer, r result) error {
	if f := r.raw[o.format]; f != nil {
		return f(w)
	}
	if o.isText() {
		for i, b := range r.text(o.format == "wide") {
			if err := o.block(w, b, i == 0); err != nil {
				return err
			}
		}
		return nil
	}
	u, err := tree(r.object)
	if err != nil {
		return err
	}
	return o.object(u, w)
}

func (o *output) block(w io.Writer, b block, first bool) error {
	if !first && (len(b.pairs) > 0 || b.table != nil && len(b.table.Rows) > 0) {
		fmt.Fprintln(w)
		if b.title != "" && !o.noHeaders {
			fmt.Fprintln(w, b.title)
		}
	}
	width := 0
	for _, p := range b.pairs {
		width = max(width, len(p.name))
	}
	for _, p := range b.pairs {
		fmt.Fprintf(w, "%-*s  %s\n", width, p.name, scrub(dash(p.value)))
	}
	if b.table == nil {
		return nil
	}
	p := printers.NewTablePrinter(printers.PrintOptions{NoHeaders: o.noHeaders, Wide: o.format == "wide"})
	return p.PrintObj(b.table, w)
}

func (o *output) object(u *unstructured.Unstructured, w io.Writer) error {
	switch o.format {
	case "json":
		return new(printers.JSONPrinter).PrintObj(u, w)
	case "yaml":
		return new(printers.YAMLPrinter).PrintObj(u, w)
	case "jsonpath":
		if err := o.template.Execute(w, u.Object); err != nil {
			return fmt.Errorf("the template does not fit the object: %w", err)
		}
		return nil
	}
	if !u.IsList() {
		return new(printers.NamePrinter).PrintObj(u, w)
	}
	return u.EachListItem(func(item runtime.Object) error { return new(printers.NamePrinter).PrintObj(item, w) })
}

// tree returns object as the printers want it, every string in it scrubbed: jsonpath and name write strings as they
// are, and so does whoever reads JSON with `jq -r`. Line breaks stay in values named pem, which we encoded ourselves.
func tree(object any) (*unstructured.Unstructured, error) {
	data, err := json.Marshal(object)
	if err != nil {
		return nil, err
	}
	u := new(unstructured.Unstructured)
	if err := u.UnmarshalJSON(data); err != nil {
		return nil, err
	}
	u.Object = scrubTree("", u.Object).(map[string]any)
	return u, nil
}

func scrubTree(key string, v any) any {
	switch v := v.(type) {
	case string:
		if key == "pem" {
			return v
		}
		return scrub(v)
	case []any:
		for i := range v {
			v[i] = scrubTree(key, v[i])
		}
		return v
	case map[string]any:
		for k, child := range v {
			v[k] = scrubTree(k, child)
		}
		return v
	}
	return v
}
