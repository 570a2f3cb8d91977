package upstream

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-ca/signet/api"
)

// TestDiskAway: files that do not answer, as on another machine that is away, are told of after a while, by everybody who asks; what
// was read before goes on, and one caller alone is left behind. Once they answer again all is well.
func TestDiskAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFiles(t)
		a := newRoot(t)
		f.write(t, a)
		d := open(t, f.config(false), Parts{}).(*disk)
		away := make(chan struct{})
		var held atomic.Int32
		hang := func(path string) stamp {
			held.Add(1)
			<-away
			return stampOf(path)
		}
		fresh := open(t, f.config(false), Parts{}).(*disk)
		fresh.stamp = hang
		if set, err := fresh.look(t.Context(), time.Now()); set != nil || api.ReasonOf(err) != api.UpstreamUnavailable {
			t.Errorf("at the start: %v", err)
		}
		if err := d.Probe(t.Context(), td, a.authority()); err != nil {
			t.Fatal(err)
		}
		d.stamp = hang
		held.Store(0)
		for range 3 {
			begun := time.Now()
			wantRefusal(t, d.Probe(t.Context(), td, a.authority()), api.UpstreamUnavailable, "goes on")
			if took := time.Since(begun); took != lookTime {
				t.Errorf("told after %v", took)
			}
		}
		r := request(t, a.authority())
		begun := time.Now()
		if chain, err := d.Mint(t.Context(), r); err != nil || len(chain) != 1 || time.Since(begun) != lookTime {
			t.Errorf("minting under what was read before, after %v: %v", time.Since(begun), err)
		}
		if n := held.Load(); n != 1 {
			t.Errorf("%d are left behind", n)
		}
		hurried, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begun = time.Now()
		if _, err := d.look(hurried, time.Now()); api.ReasonOf(err) != api.UpstreamUnavailable || time.Since(begun) != time.Second {
			t.Errorf("one who waits for a second alone: after %v: %v", time.Since(begun), err)
		}
		close(away)
		synctest.Wait()
		if err := d.Probe(t.Context(), td, a.authority()); err != nil {
			t.Errorf("once they answer: %v", err)
		}
	})
}
