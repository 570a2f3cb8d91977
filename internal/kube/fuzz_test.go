package kube

import (
	"strings"
	"testing"
)

// Whatever a server sends as a list or a stream, it is read or refused, and nothing without a name or UID is told of.
func FuzzRead(f *testing.F) {
	const pod = `{"metadata":{"name":"a","namespace":"b","uid":"u","resourceVersion":"1","creationTimestamp":null},"spec":{"nodeName":"n"}}`
	f.Add(`{"metadata":{"resourceVersion":"1"},"items":[` + pod + `]}`)
	f.Add(`{"items":null,"metadata":{"continue":"x"}}`)
	f.Add(`{"type":"ADDED","object":` + pod + `}` + "\n" + `{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"2"}}}`)
	f.Add(`{"type":"ERROR","object":{"code":410}}`)
	f.Fuzz(func(t *testing.T, text string) {
		check := func(o Object) {
			if o.UID == "" || o.Name == "" {
				t.Errorf("told of %+v", o)
			}
		}
		// Errors are as good as answers here: what counts is that there is one of them, and no panic.
		_, _ = readList(strings.NewReader(text), func(o Object) error { check(o); return nil })
		w := &Watch{cfg: WatchConfig{Resource: Pods, Apply: func(o Object, _ bool) { check(o) }}}
		if version, err := w.read(strings.NewReader(text), "0", func() {}); err == nil && version == "" {
			t.Error("a stream that ended well leaves no version to go on from")
		}
	})
}
