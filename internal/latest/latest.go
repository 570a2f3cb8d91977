// Package latest delivers values that change over time: newest wins.
//
// It is the only way SVIDs, bundles and key sets travel inside a process. A slow reader skips versions, never blocks
// the writer, and never misses the last one, so no queue can fill and no key can be pushed after a newer one.
package latest

import "sync"

// Value holds the newest value of something that changes. The zero Value holds the zero T and is ready for use. It is
// safe for concurrent use and must not be copied.
type Value[T any] struct {
	mu      sync.Mutex
	v       T
	changed chan struct{} // closed by the next Set; made by the first Get that needs it
}

// Set replaces the value and wakes every reader. It never blocks on a reader.
func (l *Value[T]) Set(v T) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.v = v
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// Get returns the newest value and a channel that is closed when a newer one has been set. To follow a value, call Get,
// use the value, wait for the channel, and call Get again.
func (l *Value[T]) Get() (T, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.v, l.changed
}

// Load returns the newest value.
func (l *Value[T]) Load() T {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.v
}
