package sds

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/signet-ca/signet/api"
)

// admit lets a stream or fetch in, once the Source has said whose it is; dismiss must be called when it has ended. An error is
// a status, as it goes to the client.
func (s *Server) admit(ctx context.Context, protocol string) (*Workload, error) {
	if err := s.enter(); err != nil {
		return nil, s.refuse(protocol, "", err)
	}
	w, err := s.open(ctx)
	if err != nil {
		s.leave()
		return nil, s.refuse(protocol, "", err)
	}
	if err := s.own(w); err != nil {
		s.release(w)
		s.leave()
		return nil, s.refuse(protocol, w.Name, err)
	}
	return w, nil
}

// dismiss gives back what admit took.
func (s *Server) dismiss(w *Workload) {
	s.mu.Lock()
	if s.owned[w.Material]--; s.owned[w.Material] == 0 {
		delete(s.owned, w.Material)
	}
	s.mu.Unlock()
	s.release(w)
	s.leave()
}

// release tells the Source that a Workload is no longer used. A panic there must not keep the stream's place for ever.
func (s *Server) release(w *Workload) {
	if w == nil || w.Release == nil {
		return
	}
	if err := contain(func() error { w.Release(); return nil }); err != nil {
		s.explain(s.log.With("workload", w.Name), "release failed", err)
	}
}

// enter counts one stream or fetch against the whole Server.
func (s *Server) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		return errStopping()
	}
	if s.streams >= s.cfg.MaxStreams {
		return api.E(api.StreamLimit, "the agent has reached its limit of %d streams", s.cfg.MaxStreams)
	}
	s.streams++
	s.wg.Add(1)
	return nil
}

func (s *Server) leave() {
	s.mu.Lock()
	s.streams--
	s.mu.Unlock()
	s.wg.Done()
}

// own counts a stream against its workload. Workloads are told apart by their Material, which the Source shares among
// the streams of one, and not by a name that two could have.
func (s *Server) own(w *Workload) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owned[w.Material] >= s.cfg.MaxStreamsPerWorkload {
		return api.E(api.StreamLimit, "the workload has reached its limit of %d streams", s.cfg.MaxStreamsPerWorkload)
	}
	s.owned[w.Material]++
	return nil
}

// open asks the Source who speaks.
func (s *Server) open(ctx context.Context) (w *Workload, err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done, err := s.knock(s.cfg.Peer(ctx), cancel)
	if err != nil {
		return nil, err
	}
	defer done()
	defer context.AfterFunc(s.closing, func() { cancel(nil) })() // the Source must not hold up Close
	err = contain(func() (err error) {
		w, err = s.cfg.Source.Open(ctx, md)
		return err
	})
	displaced, _ := errors.AsType[*api.Error](context.Cause(ctx))
	switch {
	case s.closing.Err() != nil:
		err = errStopping()
	case displaced != nil:
		err = displaced
	case err != nil:
	case w == nil || w.Material == nil:
		err = errors.New("the source returned no workload")
	case !w.ExpireAt.IsZero() && !time.Now().Before(w.ExpireAt):
		err = api.E(api.ReauthRequired, "the token of this stream has expired")
	}
	if err != nil {
		s.release(w)
	}
	return w, err
}

// over returns why nothing more may be pushed to w, nil while it may.
func (s *Server) over(w *Workload) error {
	select {
	case <-w.Done:
		return w.ended()
	case <-s.closing.Done():
		return errStopping()
	default:
		return nil
	}
}

// ended returns why the Source ended the workload's streams.
func (w *Workload) ended() error {
	if w.Err != nil {
		if err := w.Err(); err != nil {
			return err
		}
	}
	return api.E(api.AgentStopping, "the workload is no longer served here")
}

func errStopping() error {
	return api.E(api.AgentStopping, "the agent is stopping")
}
