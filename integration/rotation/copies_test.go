//go:build integration

package rotation

import (
	"os"
	"slices"
	"strings"
	"testing"

	apiv1 "github.com/signet-ca/signet/api/v1"
)

// TestFileInTheWay begins a rotation while one of the two files that show the bundle cannot be written. It is named, with the reason, and
// stands in the way until it can be.
func TestFileInTheWay(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, long)
	const place = "file/bundle.pem"
	file := w.join("bundle/bundle.pem")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(file, 0o700); err != nil { // it is in the way, whoever runs the test
		t.Fatal(err)
	}
	if out := w.must(3, "rotate", "plan"); !strings.Contains(out, place) {
		t.Errorf("the plan does not name it:\n%s", out)
	}
	w.must(0, "rotate", "start", "--id=files", "--reason=test", "--soak=1s")
	w.await("it waits for the file alone", func(r *apiv1.Rotation) bool {
		return newRootIs("published")(r) && slices.Equal(waits(r), []string{"activate: " + place})
	})
	s, code := w.status()
	const why = "it cannot be written: PUBLISH_FAILED"
	if b, ok := s.blocker(place); code != 3 || !ok || !strings.Contains(b.Why, why) {
		t.Errorf("exit code %d, %+v", code, s.Gates)
	}
	if b, ok := s.blocker("file/bundle.json"); !ok || b.Pass != "unproven" {
		t.Errorf("the other file: %+v", b)
	}
	if out := w.must(3, "rotate", "status"); !strings.Contains(out, place) || !strings.Contains(out, why) {
		t.Errorf("people are not told:\n%s", out)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	w.await("the new root is active", newRootIs("active"))
	w.connected(1)
}
