package csi

import (
	"net"
	"path/filepath"
	"sync"
)

// socket is a listener that outlives the file it listens on: where that is replaced, whoever accepts goes on with the new
// one, and connections that came over the old one stay as they are. It never removes the file: by a path through an open
// folder, what is removed may be another pod's by then.
type socket struct {
	path string // as kubelet names it, for people

	mu      sync.Mutex // guards what follows
	current *net.UnixListener
	id      fileID        // of current's file
	closed  bool          // nobody accepts
	changed chan struct{} // closed when one of them changes
}

func newSocket(dir string) *socket {
	return &socket{path: filepath.Join(dir, SocketName), changed: make(chan struct{})}
}

// replace listens on l from now on; it closes l where nobody accepts any longer.
func (s *socket) replace(l *net.UnixListener, id fileID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		l.Close()
		return
	}
	if s.current != nil {
		s.current.Close()
	}
	s.current, s.id = l, id
	s.change()
}

// change wakes who waits; the caller holds mu.
func (s *socket) change() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// listening reports whether there is a file that somebody accepts on, and that file's identity.
func (s *socket) listening() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current != nil || s.closed
}

func (s *socket) file() fileID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.id
}

// reopen lets somebody accept again after Close, once there is a new file.
func (s *socket) reopen() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = false
}

// Accept implements net.Listener.
func (s *socket) Accept() (net.Conn, error) {
	for {
		s.mu.Lock()
		current, closed, changed := s.current, s.closed, s.changed
		s.mu.Unlock()
		if closed {
			return nil, &net.OpError{Op: "accept", Net: "unix", Addr: s.Addr(), Err: net.ErrClosed}
		}
		if current == nil {
			<-changed
			continue
		}
		c, err := current.Accept()
		if err == nil {
			return c, nil
		}
		s.mu.Lock()
		replaced := s.current != current && !s.closed
		s.mu.Unlock()
		if !replaced {
			return nil, err
		}
	}
}

// Close implements net.Listener.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	if s.current != nil {
		err = s.current.Close()
		s.current = nil
	}
	if !s.closed {
		s.closed = true
		s.change()
	}
	return err
}

// Addr implements net.Listener.
func (s *socket) Addr() net.Addr { return &net.UnixAddr{Name: s.path, Net: "unix"} }
