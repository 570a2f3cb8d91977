package cluster

import (
	"bytes"
	"context"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
)

// shelf is a place where a bundle is published, and into which others write too.
type shelf struct {
	publish func(context.Context, *ca.Bundle) error
	anew    func() // another process publishes from now on
	write   func(data map[string]string)
	holds   func(*ca.Bundle) bool
	log     func() string
	metrics *Metrics
}

func fileShelf(t *testing.T) *shelf {
	dir, log := t.TempDir(), &bytes.Buffer{}
	s := &shelf{log: log.String, metrics: NewMetrics()}
	s.anew = func() { s.publish = NewFilePublisher(dir, slog.New(slog.NewTextHandler(log, nil)), s.metrics).Publish }
	s.write = func(data map[string]string) {
		for name, content := range data {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.holds = func(b *ca.Bundle) bool {
		want, err := documents(b)
		return err == nil && string(read(t, filepath.Join(dir, BundleJSON))) == want[BundleJSON] && string(read(t, filepath.Join(dir, BundlePEM))) == want[BundlePEM]
	}
	s.anew()
	return s
}

func configMapShelf(t *testing.T) *shelf {
	a := newShown(t) // nothing watches: each step is one publication
	s := &shelf{metrics: a.metrics, publish: func(ctx context.Context, b *ca.Bundle) error { return a.p.Publish(ctx, b) }}
	s.anew = func() { a.p.last = nil }
	s.write = func(data map[string]string) { a.set(copyIn(home), map[string]any{"data": toAny(data)}) }
	s.holds = func(b *ca.Bundle) bool { return a.copied(t, home, b) }
	s.log = func() string {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.log.String()
	}
	return s
}

// TestForeignBundle has somebody else write where the bundle is published. A number that no CA can have come to keeps nobody from his
// place; one that another CA may have come to does, and so do other roots of our number that this process did not replace itself.
//
// threat: E05
func TestForeignBundle(t *testing.T) {
	roots := newRoots(t, issuance.KeyP256, issuance.KeyP256)
	ours := newBundle(api.Generation{Epoch: 7, Number: 3}, roots[0])
	top := api.EpochAt(time.Now()) + 1<<16 // the highest that is plausible, for an hour at most: then there is one more
	for name, open := range map[string]func(*testing.T) *shelf{"files": fileShelf, "ConfigMap": configMapShelf} {
		for _, tt := range []struct {
			name   string
			number api.Generation // of what somebody writes
			roots  int
			mine   bool // this process has published before
			want   api.Reason
			alarm  string // in the log; empty: none is raised
		}{
			{"an earlier one of ours", api.Generation{Epoch: 7, Number: 2}, 1, false, "", ""},
			{"an earlier one", api.Generation{Epoch: 7, Number: 2}, 1, true, "", "put right"},
			{"a later one", api.Generation{Epoch: 7, Number: 4}, 1, true, api.BundleRollback, ""},
			{"the latest there can be", api.Generation{Epoch: top, Number: math.MaxUint32}, 1, true, api.BundleRollback, ""},
			{"one that cannot be", api.Generation{Epoch: top + 2, Number: 1}, 1, true, "", "no CA can have come to"},
			{"one that cannot be, at a start", api.Generation{Epoch: top + 2, Number: 1}, 1, false, "", "no CA can have come to"},
			{"the last number, with our own roots", api.Generation{Epoch: math.MaxUint32, Number: math.MaxUint32}, 0, false, "", "no CA can have come to"},
			{"our number", ours.Generation, 1, true, "", string(api.BundleEquivocation)},
			{"our number, at a start", ours.Generation, 1, false, api.BundleEquivocation, ""},
			{"ours", ours.Generation, 0, false, "", ""},
		} {
			t.Run(name+"/"+tt.name, func(t *testing.T) {
				s := open(t)
				if err := s.publish(t.Context(), ours); err != nil {
					t.Fatal(err)
				}
				if !tt.mine {
					s.anew()
				}
				foreign := newBundle(tt.number, roots[tt.roots])
				data, err := documents(foreign)
				if err != nil {
					t.Fatal(err)
				}
				s.write(data)
				err = s.publish(t.Context(), ours)
				left := ours
				if tt.want != "" {
					left = foreign
				}
				if api.ReasonOf(err) != tt.want && !(err == nil && tt.want == "") || !s.holds(left) {
					t.Errorf("%v, want %q; it holds what it should: %t", err, tt.want, s.holds(left))
				}
				alarms, failures := 0.0, 0.0
				if tt.alarm != "" {
					alarms = 1
				}
				if tt.want != "" {
					failures = 1
				}
				if n := value(t, s.metrics, "signet_bundle_reverts_total", "kind", kindBundle); n != alarms || !strings.Contains(s.log(), tt.alarm) {
					t.Errorf("%v alarms; the log:\n%s", n, s.log())
				}
				if n := value(t, s.metrics, "signet_bundle_write_failures_total", "cause", string(tt.want)); n != failures {
					t.Errorf("%v failures", n)
				}
				if err := s.publish(t.Context(), newBundle(api.Generation{Epoch: 7, Number: 4}, roots[0])); (err == nil) != (tt.want == "" || tt.want == api.BundleEquivocation) {
					t.Errorf("the next one: %v", err)
				}
			})
		}
	}
}
