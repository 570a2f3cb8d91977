package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/cli-runtime/pkg/printers"

	"github.com/signet-ca/signet/api"
)

// An item is one row of something that is watched.
type item struct {
	key    string                        // the same as long as it is the same thing
	print  string                        // changes when the thing does
	object any                           // for machines
	table  func(wide bool) *metav1.Table // for people
}

// The types of events, as Kubernetes calls them.
const (
	eventAdded    = "ADDED"
	eventModified = "MODIFIED"
	eventDeleted  = "DELETED"
)

// fingerprint tells two versions of v apart.
func fingerprint(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error() // cannot happen to our own structs; the same twice is no change
	}
	return string(b)
}

// watch lists every a.poll and prints what differs from the time before, until an interrupt, which is no failure. The
// first listing must succeed. A CA that is away later is waited for.
func (a *app) watch(ctx context.Context, o *output, list func(context.Context, *channel) ([]item, error)) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	ch, err := a.connect()
	if err != nil {
		return err
	}
	defer ch.Close()
	w := newEventWriter(a, o)
	tick := time.NewTicker(a.poll)
	defer tick.Stop()
	last := map[string]item{}
	for first, away := true, false; ; first = false {
		items, err := list(ctx, ch)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && (first || !passing(err)):
			return err
		case err != nil && !away:
			away = true
			a.say("waiting for the CA at %s: %v", ch.where(), err)
		case err == nil:
			if away {
				away = false
				a.say("the CA answers again")
			}
			if last, err = w.differences(last, items); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// passing reports whether the next look may succeed.
func passing(err error) bool {
	var e *api.Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Reason.Kind() {
	case api.KindUnavailable, api.KindDeadline, api.KindExhausted:
		return true
	}
	return false
}

// An eventWriter prints changes: rows below one head for people, one event a line or document for machines.
type eventWriter struct {
	a    *app
	o    *output
	buf  bytes.Buffer
	tabs flusher // over buf; kept, so that columns stay where they are
	rows printers.ResourcePrinter
	yaml printers.YAMLPrinter
}

// flusher is what of a tab writer is used here.
type flusher interface {
	io.Writer
	Flush() error
}

func newEventWriter(a *app, o *output) *eventWriter {
	w := &eventWriter{a: a, o: o}
	w.tabs = printers.GetNewTabWriter(&w.buf)
	w.rows = printers.NewTablePrinter(printers.PrintOptions{NoHeaders: o.noHeaders, Wide: o.format == "wide"})
	return w
}

// differences prints what changed between two listings and returns the newer one by key.
func (w *eventWriter) differences(last map[string]item, items []item) (map[string]item, error) {
	next := make(map[string]item, len(items))
	var added, modified, deleted []item
	for _, it := range items {
		before, known := last[it.key]
		switch {
		case !known:
			added = append(added, it)
		case before.print != it.print:
			modified = append(modified, it)
		}
		next[it.key] = it
	}
	for key, it := range last {
		if _, still := next[key]; !still {
			deleted = append(deleted, it)
		}
	}
	slices.SortFunc(deleted, func(x, y item) int { return strings.Compare(x.key, y.key) })
	return next, errors.Join(w.events(eventAdded, added), w.events(eventModified, modified), w.events(eventDeleted, deleted))
}

func (w *eventWriter) events(kind string, items []item) error {
	if len(items) == 0 {
		return nil
	}
	defer w.buf.Reset()
	if w.o.isText() {
		all := items[0].table(w.o.format == "wide")
		for _, it := range items[1:] {
			all.Rows = append(all.Rows, it.table(w.o.format == "wide").Rows...)
		}
		event := &metav1.WatchEvent{Type: kind, Object: runtime.RawExtension{Object: all}}
		if err := errors.Join(w.rows.PrintObj(event, w.tabs), w.tabs.Flush()); err != nil {
			return err
		}
		_, err := w.a.stdout.Write(w.a.pen(w.a.stdout).words(w.buf.Bytes()))
		return err
	}
	for _, it := range items {
		if err := w.event(kind, it); err != nil {
			return err
		}
	}
	_, err := w.a.stdout.Write(w.buf.Bytes())
	return err
}

func (w *eventWriter) event(kind string, it item) error {
	u, err := tree(it.object)
	if err != nil {
		return err
	}
	event := &metav1.WatchEvent{Type: kind, Object: runtime.RawExtension{Object: u}}
	switch w.o.format {
	case "json":
		return new(printers.JSONPrinter).PrintObj(event, &w.buf)
	case "yaml":
		return w.yaml.PrintObj(event, &w.buf)
	}
	return w.o.object(u, &w.buf)
}
