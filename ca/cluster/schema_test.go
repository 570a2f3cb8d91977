package cluster

import (
	"testing"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca/issuance"
)

// Beside the bundle it says which schema the CA's record has, brings that up to date without an alarm, and puts a foreign
// change right with one. Copies do not say it: nobody decides anything by them.
//
// threat: E23
func TestPublishRecordSchema(t *testing.T) {
	t.Parallel()
	s := newShown(t) // nothing watches: each step is one publication
	b := newBundle(api.Generation{Epoch: 1, Number: 1}, newRoots(t, issuance.KeyP256)...)
	annotation := func(path string) (any, bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		metadata, _ := s.objects[path]["metadata"].(map[string]any)
		annotations, _ := metadata["annotations"].(map[string]any)
		v, ok := annotations[RecordSchema]
		return v, ok
	}
	change := func(schema string) {
		o := map[string]any{"data": s.data(copyIn(home)), "metadata": map[string]any{"annotations": map[string]any{RecordSchema: schema}}}
		s.set(copyIn(home), o)
	}
	for _, step := range []struct {
		name   string
		change func()
		schema int // of the record now
		want   any // nil: none
		alarms float64
	}{
		{"not known", func() {}, 0, nil, 0},
		{"known", func() {}, 1, "1", 0},
		{"raised", func() {}, 2, "2", 0},
		{"the same", func() {}, 2, "2", 0},
		{"changed", func() { change("999") }, 2, "2", 1},
		{"emptied", func() { change("") }, 2, "2", 2},
		{"of a restored record", func() {}, 1, "1", 2},
		{"changed while it is raised", func() { change("7") }, 2, "2", 2}, // who did it cannot be told
	} {
		step.change()
		now := *b
		now.RecordSchema = step.schema
		if err := s.p.Publish(t.Context(), &now); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if got, _ := annotation(copyIn(home)); got != step.want {
			t.Errorf("%s: the annotation is %v, want %v", step.name, got, step.want)
		}
		if !s.copied(t, home, b) {
			t.Errorf("%s: the bundle is not there", step.name)
		}
		if n := value(t, s.metrics, "signet_bundle_reverts_total", "kind", kindBundle); n != step.alarms {
			t.Errorf("%s: %v reverts, want %v", step.name, n, step.alarms)
		}
	}
	s.run(t)
	s.becomes(t, "the copy", func() bool { return s.copied(t, "shop", b) })
	if v, ok := annotation(copyIn("shop")); ok {
		t.Errorf("the copy says %v", v)
	}
}
