package audit

import (
	"sync"
	"testing"
)

// Whoever waits for a lull comes back, however much is going on, and at once when the ledger is closed.
func TestLullEnds(t *testing.T) {
	l, err := newLull()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	for range 2 { // always ready to run
		wg.Go(func() {
			for sum := 0; ; sum++ {
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	for range 3 {
		l.wait()
	}
	close(done)
	wg.Wait()
	for range 200 {
		l.wait()
	}
	l.close()
	l.wait()
}
