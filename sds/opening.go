package sds

import (
	"context"
	"slices"
	"time"

	"github.com/signet-ca/signet/api"
)

// retryAfter is when whoever came too fast should come back.
const retryAfter = time.Second

// opening is the crowd at the door: streams of which the Source has not said yet whose they are. Server.mu guards it.
type opening struct {
	n     int
	of    map[string][]*opener // by peer, the newest last
	paces map[string]*pace     // by peer
}

// opener is one stream at the door.
type opener struct {
	end context.CancelCauseFunc // of its Open
}

// knock finds a place at the door for a stream of peer; done gives it back. When all are taken, the newest stream of the
// peer with the most has to go, unless it is this one.
func (s *Server) knock(peer string, end context.CancelCauseFunc) (done func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if peer != "" && !s.paceOf(peer).allow(time.Now()) {
		return nil, &api.Error{Reason: api.StreamLimit, Detail: "streams are opened too fast", RetryAfter: retryAfter}
	}
	o := &s.opening
	if o.n >= s.cfg.MaxOpening {
		fullest, most := "", len(o.of[peer])
		for k, of := range o.of {
			if len(of) > most {
				fullest, most = k, len(of)
			}
		}
		full := &api.Error{Reason: api.StreamLimit, Detail: "too many streams wait to be told apart", RetryAfter: retryAfter}
		if most == len(o.of[peer]) {
			return nil, full
		}
		newest := o.of[fullest][most-1]
		o.remove(fullest, newest)
		newest.end(full)
	}
	x := &opener{end}
	o.of[peer] = append(o.of[peer], x)
	o.n++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		o.remove(peer, x)
	}, nil
}

// remove takes x out where it is still in.
func (o *opening) remove(peer string, x *opener) {
	of := o.of[peer]
	i := slices.Index(of, x)
	if i < 0 {
		return
	}
	o.n--
	if of = slices.Delete(of, i, i+1); len(of) == 0 {
		delete(o.of, peer)
		return
	}
	o.of[peer] = of
}

// paceOf returns the pace of a peer; the caller holds the lock. Peers that have rested are forgotten when there are too
// many, and all of them where none has.
func (s *Server) paceOf(peer string) *pace {
	paces := s.opening.paces
	if p := paces[peer]; p != nil {
		return p
	}
	now := time.Now()
	if len(paces) >= maxPeers {
		for k, p := range paces {
			if now.Sub(p.last) >= p.full {
				delete(paces, k)
			}
		}
		if len(paces) >= maxPeers {
			clear(paces)
		}
	}
	p := newPace(s.cfg.OpenRate, openBurst, now)
	paces[peer] = p
	return p
}
