package latest

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestValue(t *testing.T) {
	var v Value[string]
	if got := v.Load(); got != "" {
		t.Errorf("the zero Value holds %q", got)
	}
	got, changed := v.Get()
	select {
	case <-changed:
		t.Fatal("changed before anything was set")
	default:
	}
	v.Set("a")
	v.Set("b")
	select {
	case <-changed:
	default:
		t.Fatal("a set value did not wake its reader")
	}
	if got != "" || v.Load() != "b" {
		t.Errorf("first %q, then %q; want nothing, then b", got, v.Load())
	}
	_, one := v.Get()
	_, two := v.Get()
	if one != two {
		t.Error("two readers of one version wait for different channels")
	}
}

// Slow readers skip versions and never hold the writer up, but each one ends at the last version.
func TestValueSlowReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var v Value[int]
		const last = 100
		var wg sync.WaitGroup
		for pause := range 8 {
			wg.Go(func() {
				for seen := 0; seen != last; {
					got, changed := v.Get()
					if got < seen {
						t.Errorf("version %d after %d", got, seen)
					}
					if seen = got; seen != last {
						<-changed
					}
					time.Sleep(time.Duration(pause) * 7 * time.Millisecond)
				}
			})
		}
		start := time.Now()
		for n := range last {
			v.Set(n + 1)
			time.Sleep(time.Millisecond)
		}
		if took := time.Since(start); took != last*time.Millisecond {
			t.Errorf("the writer took %v, want %v: a reader held it up", took, last*time.Millisecond)
		}
		wg.Wait() // a reader that missed the last version would hang here
	})
}

func TestValueConcurrentWriters(t *testing.T) {
	var v Value[int]
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for n := range 1000 {
				v.Set(w*1000 + n)
			}
		})
		wg.Go(func() {
			for range 1000 {
				v.Get()
				v.Load()
			}
		})
	}
	wg.Wait()
	if v.Load()%1000 != 999 {
		t.Errorf("value %d is nobody's last", v.Load())
	}
}

func BenchmarkSetGet(b *testing.B) {
	var v Value[*int]
	x := new(int)
	for b.Loop() {
		v.Get()
		v.Set(x)
	}
}
