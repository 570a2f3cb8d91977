package kube

import (
	"strings"
	"testing"
)

// Whatever a server sends as a list, it is read whole or refused.
func FuzzEach(f *testing.F) {
	f.Add(`{"metadata":{"continue":"x"},"items":[{"metadata":{"name":"a"}},{}]}`)
	f.Add(`{"items":null}`)
	f.Add(`{"items":[null,1]}`)
	f.Add(`{"kind":"Status","code":410}`)
	f.Fuzz(func(t *testing.T, text string) {
		n := 0
		_, err := readItemsAs(strings.NewReader(text), func(o wireObject) error { n++; return nil })
		if err == nil && n > len(text) {
			t.Errorf("%d objects in %d bytes", n, len(text))
		}
	})
}
