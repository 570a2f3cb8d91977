package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/printers"
)

// auditRows is how many rows of a table are aligned and written at once.
const auditRows = 500

// An auditWriter prints entries in the format that was asked for, as they come: a record can be larger than memory. What
// it writes as JSON or YAML is one AuditEntryList; when the answer breaks off, it is left unfinished, so that no parser
// takes it for the whole. Only jsonpath needs all of it at once.
type auditWriter struct {
	a   *app
	o   *output
	n   int           // entries added
	out *bufio.Writer // to stdout

	waiting []*auditEntry // rows of the next part of the table; for jsonpath all there are
	buf     bytes.Buffer
	tabs    flusher // over buf; kept, so that columns stay where they are
	rows    printers.ResourcePrinter
}

// An auditList is what jsonpath sees, and what JSON and YAML are written as, piece by piece.
type auditList struct {
	header
	Items []*auditEntry `json:"items"`
}

func newAuditWriter(a *app, o *output) *auditWriter {
	w := &auditWriter{a: a, o: o, out: bufio.NewWriter(sink{a.stdout, "stdout"})}
	w.tabs = printers.GetNewTabWriter(&w.buf)
	w.rows = printers.NewTablePrinter(printers.PrintOptions{NoHeaders: o.noHeaders, Wide: o.format == "wide"})
	return w
}

func (w *auditWriter) add(e *auditEntry) error {
	w.n++
	switch w.o.format {
	case "table", "wide":
		if w.waiting = append(w.waiting, e); len(w.waiting) == auditRows {
			return w.table()
		}
		return nil
	case "jsonpath":
		w.waiting = append(w.waiting, e)
		return nil
	}
	u, err := tree(e)
	if err != nil {
		return err
	}
	switch w.o.format {
	case "json":
		head := ",\n        "
		if w.n == 1 {
			head = "{\n    \"apiVersion\": \"" + apiVersion + "\",\n    \"items\": [\n        "
		}
		text, err := json.MarshalIndent(u.Object, "        ", "    ")
		if err != nil {
			return err
		}
		w.out.WriteString(head)
		_, err = w.out.Write(text)
		return err
	case "yaml":
		if w.n == 1 {
			w.out.WriteString("apiVersion: " + apiVersion + "\nitems:\n")
		}
		var doc strings.Builder
		if err := new(printers.YAMLPrinter).PrintObj(u, &doc); err != nil {
			return err
		}
		_, err := w.out.WriteString("- " + strings.ReplaceAll(strings.TrimSuffix(doc.String(), "\n"), "\n", "\n  ") + "\n")
		return err
	}
	return w.o.object(u, w.out)
}

// table writes the rows that wait.
func (w *auditWriter) table() error {
	if len(w.waiting) == 0 {
		return nil
	}
	defer w.buf.Reset()
	if err := w.rows.PrintObj(auditTable(w.waiting, w.o.format == "wide"), w.tabs); err != nil {
		return err
	}
	w.waiting = w.waiting[:0]
	if err := w.tabs.Flush(); err != nil {
		return err
	}
	_, err := w.out.Write(w.a.pen(w.a.stdout).words(w.buf.Bytes()))
	return err
}

// flush writes what there is of an answer that broke off.
func (w *auditWriter) flush() error {
	if w.o.isText() {
		if err := w.table(); err != nil {
			return err
		}
	}
	return w.out.Flush()
}

// end writes what is still missing; empty is said where there is no row.
func (w *auditWriter) end(empty string) error {
	switch {
	case w.o.isText() && w.n == 0:
		w.a.say("%s", empty)
	case w.o.format == "jsonpath" || w.n == 0 && (w.o.format == "json" || w.o.format == "yaml"):
		l := &auditList{header: newHeader("AuditEntryList", ""), Items: w.waiting}
		if l.Items == nil {
			l.Items = []*auditEntry{}
		}
		if err := w.o.render(w.out, result{object: l}); err != nil {
			return err
		}
	case w.o.format == "json":
		w.out.WriteString("\n    ],\n    \"kind\": \"AuditEntryList\"\n}\n")
	case w.o.format == "yaml":
		w.out.WriteString("kind: AuditEntryList\n")
	}
	return w.flush()
}

func auditColumns() []column {
	return []column{
		{name: "time"}, {name: "kind"}, {name: "spiffe-id"}, {name: "pod"}, {name: "node"}, {name: "serial"}, {name: "reason"},
		{name: "id"}, {name: "source", wide: true}, {name: "not-after", wide: true}, {name: "issuer", wide: true},
		{name: "dns-names", wide: true}, {name: "method", wide: true}, {name: "caller", wide: true}, {name: "caller-node", wide: true},
		{name: "pod-uid", wide: true}, {name: "node-uid", wide: true}, {name: "service-account", wide: true}, {name: "cluster", wide: true},
		{name: "token-id", wide: true}, {name: "detail", wide: true},
	}
}

// mark is what stands in place of a reason where nothing was refused: that the API server was away.
func (e *auditEntry) mark() string {
	if e.Grace {
		return "(grace)"
	}
	return ""
}

func auditTable(entries []*auditEntry, wide bool) *metav1.Table {
	var rows [][]string
	for _, e := range entries {
		serial := short(e.Serial)
		if wide {
			serial = dash(e.Serial)
		}
		rows = append(rows, []string{
			dash(stamp(e.time)), dash(e.Type), dash(e.SPIFFEID), dash(e.pod()), dash(cmp.Or(e.Node, e.CallerNode)), serial,
			dash(strings.TrimSpace(cmp.Or(e.Reason, e.mark()) + " " + e.times())), dash(e.CorrelationID),
			fmt.Sprintf("%s %d", dash(e.Source), e.Seq), dash(e.NotAfter), dash(e.IssuerKeyID), dash(strings.Join(e.DNSNames, ",")),
			dash(e.Method), dash(e.Caller), dash(e.CallerNode), dash(e.PodUID), dash(e.NodeUID), dash(e.ServiceAccount), dash(e.Cluster),
			dash(e.TokenID), dash(e.Detail),
		})
	}
	return table(auditColumns(), rows)
}

// writeLine writes an entry as one line of JSON, its fields in the order in which they are declared. A record can have
// tens of millions of entries, so this does not go through tree, which takes several times as long.
func writeLine(w io.Writer, e *auditEntry) error {
	clean := *e
	scrubStrings(reflect.ValueOf(&clean).Elem())
	line, err := json.Marshal(&clean)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// scrubStrings scrubs every string in v, which it may write to; strings in slices, pointers and structs are replaced,
// never written to, as they may be shared.
func scrubStrings(v reflect.Value) {
	switch v.Kind() {
	case reflect.String:
		if v.CanSet() {
			v.SetString(scrub(v.String()))
		}
	case reflect.Struct:
		for _, field := range v.Fields() {
			scrubStrings(field)
		}
	case reflect.Slice:
		if v.CanSet() && v.Len() > 0 {
			replaced := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
			reflect.Copy(replaced, v)
			for i := range replaced.Len() {
				scrubStrings(replaced.Index(i))
			}
			v.Set(replaced)
		}
	case reflect.Pointer:
		if v.CanSet() && !v.IsNil() {
			replaced := reflect.New(v.Type().Elem())
			replaced.Elem().Set(v.Elem())
			scrubStrings(replaced.Elem())
			v.Set(replaced)
		}
	}
}
