package sds

import (
	"cmp"
	"errors"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/signet-ca/signet/api"
)

// maxProxyBytes bounds what is kept of a client's name for itself.
const maxProxyBytes = 128

// serve runs one stream from its opening to its end.
//
// A node has thousands of streams on which nothing happens for hours, and a goroutine keeps the stack that it once needed for
// as long as it lives. So a stream has one goroutine, gRPC's own, which waits for requests and needs little. Whatever happens
// (a request, new material, the end of somebody's patience) is dealt with in a goroutine that ends with it: see act.
func serve[Req, Resp any](s *Server, wire grpc.BidiStreamingServer[Req, Resp], c *codec[Req, Resp]) error {
	st, err := aside(func() (st *stream[Req, Resp], err error) {
		err = s.shield(c.protocol, func() (err error) {
			st, err = open(s, wire, c)
			return err
		})
		return st, err
	})
	if err != nil {
		return err
	}
	defer s.wg.Done()
	st.read()
	<-st.over
	return st.status
}

// A stream is one client's conversation.
type stream[Req, Resp any] struct {
	srv      *Server
	wire     grpc.BidiStreamingServer[Req, Resp]
	in       api.Receiver
	codec    *codec[Req, Resp]
	workload *Workload
	number   uint64        // by which it is reported
	over     chan struct{} // closed when the stream has ended: all that is left is for the handler to return
	status   error         // what the client is told; set before over is closed

	mu      sync.Mutex // guards what follows; nothing blocks under it
	ended   bool       // whoever set it ends the stream, and nobody else does anything with it
	session session
	proxy   string // what the client calls itself
	flock   *flock
	sending bool
	pushed  time.Time // when the outstanding response was handed over

	patience time.Time   // when the client has owed us something for too long: its first request, or an answer; zero: nothing
	expire   time.Time   // when the stream ends because its evidence does; zero: never
	timer    *time.Timer // for the earlier of the two; nil where there is neither
	armed    time.Time   // when it fires
}

// open lets a stream in. The Server waits for its handler from here on.
func open[Req, Resp any](s *Server, wire grpc.BidiStreamingServer[Req, Resp], c *codec[Req, Resp]) (*stream[Req, Resp], error) {
	w, err := s.admit(wire.Context(), c.protocol)
	if err != nil {
		return nil, err
	}
	s.wg.Add(1)
	st := &stream[Req, Resp]{
		srv: s, wire: wire, in: api.NewReceiver(wire.Context()), codec: c, workload: w, number: s.ids.Add(1),
		over: make(chan struct{}), session: *newSession(w.ID),
	}
	st.act(func() error {
		now := time.Now()
		st.patience, st.expire = now.Add(s.cfg.AnswerTimeout), expiry(w.ExpireAt, now)
		st.flock = s.join(w, st) // before it looks at the material for the first time: it misses nothing
		call(s.cfg.Hooks.Opened, c.protocol)
		return nil
	}, func() {})
	return st, nil
}

// errGone ends a stream whose client went away, which it may.
var errGone = errors.New("the client went away")

// act takes what has happened and does what is due then. It calls turned when it has, before anything that may block: Send does
// while the client's window is closed, and nothing but the end of the stream stops it then.
func (st *stream[Req, Resp]) act(event func() error, turned func()) {
	resp, err := st.turn(event)
	turned()
	for resp != nil && err == nil {
		sent := contain(func() error { return st.wire.Send(resp) })
		resp, err = st.turn(func() error {
			st.sending = false
			return clientGone(sent)
		})
	}
	if err != nil {
		st.finish(err)
	}
}

// turn takes one event and returns the response that is due then, if any. Turns of one stream come one after the other. An
// error ends the stream, and is returned once: whoever gets it calls finish.
func (st *stream[Req, Resp]) turn(event func() error) (resp *Resp, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended {
		return nil, nil
	}
	err = contain(func() (err error) {
		if err := event(); err != nil {
			return err
		}
		if err := st.srv.over(st.workload); err != nil {
			return err
		}
		if resp, err = st.push(st.workload.Material.Load()); err != nil {
			return err
		}
		if st.session.dirty {
			st.tell(true)
		}
		return nil
	})
	if err != nil {
		st.ended = true
		return nil, err
	}
	now := time.Now()
	switch {
	case resp != nil:
		st.patience = now.Add(st.srv.cfg.AnswerTimeout)
	case st.session.asked && st.session.out == nil && !st.sending:
		st.patience = time.Time{}
	}
	st.arm(now)
	return resp, nil
}

// finish is the end of a stream. Its place is free before the client hears of it, who may come back at once.
func (st *stream[Req, Resp]) finish(err error) {
	if st.timer != nil {
		st.timer.Stop()
	}
	if st.flock != nil {
		st.srv.part(st.flock, st)
	}
	if errors.Is(err, errGone) {
		err = nil
	}
	if perr := contain(func() error { st.tell(false); return nil }); err == nil {
		err = perr
	}
	st.status = st.srv.shield(st.codec.protocol, func() error { return st.srv.end(st.codec.protocol, st.logger(), err) })
	st.srv.dismiss(st.workload)
	st.in.End(st.status)
	close(st.over)
}

// arm sets the timer for what ends the stream next, if anything does.
func (st *stream[Req, Resp]) arm(now time.Time) {
	next := st.patience
	if next.IsZero() || !st.expire.IsZero() && st.expire.Before(next) {
		next = st.expire
	}
	if st.timer != nil && next.Equal(st.armed) {
		return
	}
	if st.timer != nil {
		st.timer.Stop()
	}
	st.timer, st.armed = nil, next
	if !next.IsZero() {
		st.timer = time.AfterFunc(next.Sub(now), st.late)
	}
}

// late is called by the timer, perhaps by one that was stopped too late.
func (st *stream[Req, Resp]) late() {
	st.mu.Lock()
	if st.ended {
		st.mu.Unlock()
		return
	}
	st.srv.wg.Add(1) // the handler is still there
	st.mu.Unlock()
	defer st.srv.wg.Done()
	st.act(func() error {
		now := time.Now()
		switch {
		case !st.expire.IsZero() && !now.Before(st.expire):
			return api.E(api.ReauthRequired, "the token of this stream is about to expire")
		case !st.patience.IsZero() && !now.Before(st.patience):
			return st.impatient()
		}
		st.armed = time.Time{}
		return nil
	}, func() {})
}

// read waits for requests until the stream is over, and takes them no faster than the client may ask.
func (st *stream[Req, Resp]) read() {
	p := newPace(st.srv.cfg.RequestRate, requestBurst, time.Now())
	for {
		err := st.in.Wait()
		taken := make(chan struct{})
		st.srv.wg.Go(func() { st.request(err, taken) })
		select {
		case <-taken:
		case <-st.over:
			return
		}
		if err != nil {
			return
		}
		if d := p.take(time.Now()); d > 0 {
			select {
			case <-time.After(d):
			case <-st.over:
				return
			}
		}
	}
}

// request takes the request that has begun, unless waiting for it failed.
func (st *stream[Req, Resp]) request(err error, taken chan<- struct{}) {
	req := new(Req)
	if err == nil {
		err = contain(func() error { return st.in.Receive(req, MaxRequestBytes, st.wire.RecvMsg) })
	}
	st.act(func() error {
		if err != nil {
			return clientGone(err)
		}
		return st.take(req)
	}, func() { close(taken) })
}

// woken implements member.
func (st *stream[Req, Resp]) woken(turned func()) {
	st.act(func() error { return nil }, turned)
}

// clientGone is clientError for the middle of a stream: what ends it there is an error in any case.
func clientGone(err error) error {
	if err == nil {
		return nil
	}
	return cmp.Or(clientError(err), errGone)
}

// take handles one request.
func (st *stream[Req, Resp]) take(req *Req) error {
	node := st.codec.node(req)
	if err := checkNode(node); err != nil {
		return err
	}
	if node != nil && st.proxy == "" {
		st.proxy = printable(node.GetId(), maxProxyBytes)
	}
	a, err := st.codec.decode(req)
	if err != nil {
		return err
	}
	result, err := st.session.handle(a)
	switch result {
	case acknowledged, rejected:
		if f := st.srv.cfg.Hooks.Answered; f != nil {
			f(st.codec.protocol, result == acknowledged, time.Since(st.pushed))
		}
		if result == rejected {
			st.logger().Warn("proxy refused a secret", "error", st.session.nack)
		}
	case ignored:
		call(st.srv.cfg.Hooks.Ignored, st.codec.protocol)
	}
	return err
}

// push returns the response that is due, if any and if the last one is on its way.
func (st *stream[Req, Resp]) push(m *Material) (*Resp, error) {
	if st.sending {
		return nil, nil
	}
	r, err := st.session.next(m, time.Now())
	if n := st.session.leftOut; n > 0 {
		st.session.leftOut = 0
		st.logger().Warn("names that belong to somebody else were left out", "count", n)
		for range n {
			call(st.srv.cfg.Hooks.LeftOut, st.workload.Name)
		}
	}
	if err != nil || r == nil {
		return nil, err
	}
	st.sending, st.pushed = true, time.Now()
	for _, e := range r.secrets {
		if f := st.srv.cfg.Hooks.Pushed; f != nil {
			f(st.codec.protocol, e.kind())
		}
	}
	return st.codec.encode(r), nil
}

// tell reports the stream as it is now.
func (st *stream[Req, Resp]) tell(open bool) {
	st.session.dirty = false
	if st.workload.Report == nil {
		return
	}
	r := Report{Stream: st.number, Proxy: st.proxy, Protocol: st.codec.protocol, Open: open}
	st.session.report(&r)
	st.workload.Report(r)
}

func (st *stream[Req, Resp]) impatient() error {
	if st.session.asked {
		return api.E(api.SlowConsumer, "a pushed secret was not answered within %s", st.srv.cfg.AnswerTimeout)
	}
	return api.E(api.DeadlineExceeded, "no request came within %s", st.srv.cfg.AnswerTimeout)
}

func (st *stream[Req, Resp]) logger() *slog.Logger {
	return st.srv.log.With("workload", st.workload.Name, "stream", st.number, "protocol", st.codec.protocol, "proxy", st.proxy)
}
