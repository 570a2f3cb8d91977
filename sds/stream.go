package sds

import (
	"log/slog"
	"time"

	"google.golang.org/grpc"

	"github.com/signet-ca/signet/api"
)

// maxProxyBytes bounds what is kept of a client's name for itself.
const maxProxyBytes = 128

// serve runs one stream from its opening to its end. The handler's goroutine owns the session and does everything but
// reading and sending, which block; those two live in goroutines of their own, which end when gRPC ends the stream
// because the handler has returned. The Server waits for them.
func serve[Req, Resp any](s *Server, wire grpc.BidiStreamingServer[Req, Resp], c codec[Req, Resp]) error {
	w, release, err := s.admit(wire.Context(), c.protocol)
	if err != nil {
		return err
	}
	defer release()
	st := &stream[Req, Resp]{
		srv: s, wire: wire, codec: c, workload: w, session: newSession(w.ID),
		requests: make(chan received[Req]), sent: make(chan error, 1), stop: make(chan struct{}),
		report: Report{Stream: s.ids.Add(1), Protocol: c.protocol, Open: true},
	}
	defer close(st.stop)
	err = contain(st.run)
	st.report.Open = false
	if perr := contain(func() error { st.tell(); return nil }); err == nil {
		err = perr
	}
	return s.end(c.protocol, st.logger(), err)
}

// A stream is one client's conversation.
type stream[Req, Resp any] struct {
	srv      *Server
	wire     grpc.BidiStreamingServer[Req, Resp]
	codec    codec[Req, Resp]
	workload *Workload
	session  *session
	report   Report // the last one

	requests chan received[Req]
	sent     chan error    // the result of the Send that is under way; room for one, so that it never blocks
	stop     chan struct{} // closed when the handler returns

	sending bool
	pushed  time.Time // when the outstanding response was handed over
}

type received[Req any] struct {
	req *Req
	err error
}

// run is the life of a stream. It returns nil when the client ended it.
func (st *stream[Req, Resp]) run() error {
	call(st.srv.cfg.Hooks.Opened, st.codec.protocol)
	expire, stopExpire := expiry(st.workload.ExpireAt, time.Now())
	defer stopExpire()
	st.srv.wg.Go(st.read)
	// patience ends when the client owes us something: its first request, or an answer.
	patience := time.NewTimer(st.srv.cfg.AnswerTimeout)
	defer patience.Stop()
	for {
		if err := st.srv.over(st.workload); err != nil {
			return err
		}
		material, changed := st.workload.Material.Get()
		pushed, err := st.push(material)
		if err != nil {
			return err
		}
		if pushed {
			patience.Reset(st.srv.cfg.AnswerTimeout)
		}
		if st.session.dirty {
			st.tell()
		}
		select {
		case r := <-st.requests:
			if r.err != nil {
				return clientError(r.err)
			}
			if err := st.take(r.req); err != nil {
				return err
			}
		case err := <-st.sent:
			if err != nil {
				return clientError(err)
			}
			st.sending = false
		case <-changed:
		case <-patience.C:
			return st.impatient()
		case <-expire:
			return api.E(api.ReauthRequired, "the token of this stream is about to expire")
		case <-st.workload.Done:
		case <-st.srv.closing.Done():
		case <-st.wire.Context().Done():
			return clientError(st.wire.Context().Err())
		}
		if st.session.asked && st.session.out == nil && !st.sending {
			patience.Stop()
		}
	}
}

// take handles one request.
func (st *stream[Req, Resp]) take(req *Req) error {
	node := st.codec.node(req)
	if err := checkNode(node); err != nil {
		return err
	}
	if node != nil && st.report.Proxy == "" {
		st.report.Proxy = printable(node.GetId(), maxProxyBytes)
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

// push hands over the response that is due, if any and if the last one is on its way.
func (st *stream[Req, Resp]) push(m *Material) (bool, error) {
	if st.sending {
		return false, nil
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
		return false, err
	}
	resp := st.codec.encode(r)
	st.sending, st.pushed = true, time.Now()
	// Send blocks while the client's window is closed; nothing but the end of the stream stops it then.
	st.srv.wg.Go(func() {
		st.sent <- contain(func() error { return st.wire.Send(resp) })
	})
	for _, e := range r.secrets {
		if f := st.srv.cfg.Hooks.Pushed; f != nil {
			f(st.codec.protocol, e.kind())
		}
	}
	return true, nil
}

// read hands requests to the handler, no faster than the client may ask.
func (st *stream[Req, Resp]) read() {
	p := newPace(st.srv.cfg.RequestRate, requestBurst, time.Now())
	for {
		var r received[Req]
		r.err = contain(func() error {
			r.req = new(Req)
			return api.Receive(st.wire.Context(), r.req, MaxRequestBytes, st.wire.RecvMsg)
		})
		select {
		case st.requests <- r:
		case <-st.stop:
			return
		}
		if r.err != nil {
			return
		}
		if d := p.take(time.Now()); d > 0 {
			select {
			case <-time.After(d):
			case <-st.stop:
				return
			}
		}
	}
}

// tell reports the stream as it is now.
func (st *stream[Req, Resp]) tell() {
	st.session.dirty = false
	st.session.report(&st.report)
	if st.workload.Report != nil {
		st.workload.Report(st.report)
	}
}

func (st *stream[Req, Resp]) impatient() error {
	if st.session.asked {
		return api.E(api.SlowConsumer, "a pushed secret was not answered within %s", st.srv.cfg.AnswerTimeout)
	}
	return api.E(api.DeadlineExceeded, "no request came within %s", st.srv.cfg.AnswerTimeout)
}

func (st *stream[Req, Resp]) logger() *slog.Logger {
	return st.srv.log.With("workload", st.workload.Name, "stream", st.report.Stream, "protocol", st.codec.protocol, "proxy", st.report.Proxy)
}
