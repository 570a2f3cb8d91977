package workloadapi

import (
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/signet-ca/signet/api"
)

// A stream is one call that is open. What blocks (sending, waiting for news) happens in a goroutine of its own, which
// ends when gRPC ends the stream because the handler has returned; the handler waits for that goroutine, for the client's
// patience to run out and for the end of the Server. The Server waits for both. Neither does more than wait: a goroutine keeps
// the stack that it once needed, so what needs much of one is done aside.
type stream struct {
	srv      *Server
	wire     grpc.ServerStream
	call     string
	id       uint64
	patience *time.Timer // ends the stream when the client owes something for too long

	mu       sync.Mutex // guards what follows; held while Delivered is called, so that deliveries come in order
	owed     error      // why the stream ends when patience does
	delivery Delivery
	ended    bool
}

// supervise runs work as the life of a stream, in the handler's goroutine.
func (s *Server) supervise(wire grpc.ServerStream, call string, work func(*stream) error) error {
	leave, err := s.enter()
	if err != nil {
		return s.refuse(call, err)
	}
	defer leave()
	st := &stream{srv: s, wire: wire, call: call, id: s.ids.Add(1), patience: time.NewTimer(s.cfg.Timeout)}
	st.patience.Stop()
	defer st.patience.Stop()
	st.delivery = Delivery{Stream: st.id, Call: call, Open: true}

	done := make(chan error, 1) // room for one, so that work never waits for the handler
	s.wg.Go(func() { done <- contain(func() error { return st.run(work) }) })
	select {
	case err = <-done:
	case <-st.patience.C:
		if err = st.late(); api.ReasonOf(err) == api.SlowConsumer {
			hangUp(wire.Context())
		}
	case <-s.closing.Done():
		err = errStopping()
	}
	if errors.Is(err, errGone) {
		err = nil
	}
	if perr := contain(func() error { st.tell(func(d *Delivery) { d.Open = false }); return nil }); err == nil {
		err = perr
	}
	return s.end(call, st.id, err)
}

func (st *stream) run(work func(*stream) error) error {
	err := aside(func() error {
		if f := st.srv.cfg.Hooks.Opened; f != nil {
			f(st.call)
		}
		st.tell(func(*Delivery) {})
		return nil
	})
	if err != nil {
		return err
	}
	return work(st)
}

// expect starts to wait for something that the client owes; err ends the stream when it does not come in time.
func (st *stream) expect(err error) {
	st.mu.Lock()
	st.owed = err
	st.mu.Unlock()
	st.patience.Reset(st.srv.cfg.Timeout)
}

func (st *stream) late() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.owed
}

// tell reports the stream after change; nothing follows what reports its end.
func (st *stream) tell(change func(*Delivery)) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended {
		return
	}
	change(&st.delivery)
	st.ended = !st.delivery.Open
	if f := st.srv.cfg.Delivered; f != nil && st.call != callReflection {
		f(st.delivery)
	}
}

// errGone ends a stream whose client went away, which it may.
var errGone = errors.New("the client went away")

// passed is an error that is a status already: gRPC's own, which has mostly told the client of it.
type passed struct{ error }

// follow sends the newest response that pick chooses, at once and at each change, until the client goes away or the
// workload is refused.
func (st *stream) follow(pick func(*material) *response) error {
	var last *response
	for {
		var changed <-chan struct{}
		err := aside(func() (err error) {
			last, changed, err = st.offer(pick, last)
			return err
		})
		if err != nil {
			return err
		}
		select {
		case <-changed:
		case <-st.wire.Context().Done():
			return errGone
		case <-st.srv.closing.Done():
			return errStopping()
		}
	}
}

// offer sends what is newer than last until nothing is. It returns what the client holds then, and what is closed by the next
// change.
func (st *stream) offer(pick func(*material) *response, last *response) (*response, <-chan struct{}, error) {
	for {
		m, changed := st.srv.current()
		if m.refused != nil {
			return nil, nil, denied{m.refused}
		}
		r := pick(&m)
		switch {
		case r == nil || r == last || !r.notAfter.IsZero() && !time.Now().Before(r.notAfter):
			return last, changed, nil
		case last != nil && r.digest == last.digest: // a new generation of the same roots: the client holds it already
			st.delivered(r)
			return r, changed, nil
		}
		if err := st.send(r); err != nil {
			return nil, nil, err
		}
		last = r
		st.delivered(r) // what changed meanwhile is merged
	}
}

// send hands one message to the transport. It blocks while the client has no room for it.
func (st *stream) send(r *response) error {
	st.expect(api.E(api.SlowConsumer, "the client did not make room for a message within %s", st.srv.cfg.Timeout))
	if err := st.wire.SendMsg(r.message); err != nil {
		if st.wire.Context().Err() != nil {
			return errGone
		}
		return passed{err}
	}
	st.patience.Stop()
	if f := st.srv.cfg.Hooks.Pushed; f != nil {
		f(st.call)
	}
	return nil
}

func (st *stream) delivered(r *response) {
	st.tell(func(d *Delivery) {
		d.At, d.Serial, d.Generation, d.Hash = time.Now(), r.serial, r.generation, r.hash
	})
}
