package sds

import (
	"maps"
	"slices"

	"github.com/signet-ca/signet/internal/latest"
)

// A flock is the streams of one workload. One goroutine waits for its news and for its end, where otherwise each of them
// would.
type flock struct {
	flockKey
	members map[member]struct{} // guarded by Server.mu
	left    chan struct{}       // closed when the last member has left
}

// flockKey is what the members of a flock have in common.
type flockKey struct {
	material *latest.Value[*Material]
	done     <-chan struct{}
}

// member is a stream of either protocol.
type member interface {
	// woken has it look what has changed. It calls turned once, soon, and may block after that.
	woken(turned func())
}

// join makes m a member of its workload's flock: from here on it is woken by what changes.
func (s *Server) join(w *Workload, m member) *flock {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := flockKey{w.Material, w.Done}
	f := s.flocks[k]
	if f == nil {
		f = &flock{flockKey: k, members: map[member]struct{}{}, left: make(chan struct{})}
		s.flocks[k] = f
		_, changed := f.material.Get() // before m looks
		s.wg.Go(func() { s.follow(f, changed) })
	}
	f.members[m] = struct{}{}
	return f
}

// part takes m out of its flock.
func (s *Server) part(f *flock, m member) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if delete(f.members, m); len(f.members) == 0 {
		delete(s.flocks, f.flockKey)
		close(f.left)
	}
}

// follow wakes a flock whenever there is something new for it, until its last member has left. It wakes one after the other, each
// in a goroutine of its own that goes on to send: who reads slowly holds up nobody, and thousands do not need the memory of
// work at once.
func (s *Server) follow(f *flock, changed <-chan struct{}) {
	done, closing := f.done, s.closing.Done()
	turned := make(chan struct{})
	for {
		select {
		case <-changed:
			_, changed = f.material.Get()
		case <-done:
			done = nil
		case <-closing:
			closing = nil
		case <-f.left:
			return
		}
		s.mu.Lock()
		members := slices.Collect(maps.Keys(f.members))
		s.mu.Unlock()
		for _, m := range members {
			s.wg.Go(func() { m.woken(func() { turned <- struct{}{} }) })
			<-turned
		}
	}
}
