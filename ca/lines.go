package ca

import (
	"container/heap"
	"container/list"
	"slices"
	"time"
)

// Bounds of what urgency gives a node over its turn in the round. An honest node needs one such turn for each of its pods, and
// kubelet runs 110 of them.
const (
	urgentTurns = 128         // at once
	urgentTime  = time.Minute // until so many are there again
)

// lines are those who wait, each in the line of whom he belongs to. All that is asked of them takes a time that grows with the
// logarithm of their number, at most.
type lines struct {
	waiting int
	of      map[string]*line
	round   list.List // of *line, whose turn is next first
	urgent  ranking   // lines that may have a turn out of order, whose first waiter is due first first
	crowded ranking   // all lines, the one that gives up a place first
	arrived uint64    // counts waiters
	credits map[string]credit
	swept   time.Time // when credits that are whole again were forgotten
}

// line is who waits for one.
type line struct {
	who     string
	waiters []*waiter // who is due first first, then who came first; those who are not due come last
	turn    *list.Element
	urgent  int // places in the rankings, from 1; 0: in none
	crowded int
}

// credit is how many turns out of order one had at a moment.
type credit struct {
	turns float64
	at    time.Time
}

func newLines() lines {
	return lines{
		of: map[string]*line{}, credits: map[string]credit{},
		urgent: ranking{
			before: func(a, b *line) bool { return a.waiters[0].before(b.waiters[0]) },
			place:  func(l *line) *int { return &l.urgent },
		},
		crowded: ranking{
			before: func(a, b *line) bool {
				if len(a.waiters) != len(b.waiters) {
					return len(a.waiters) > len(b.waiters)
				}
				return b.last().before(a.last())
			},
			place: func(l *line) *int { return &l.crowded },
		},
	}
}

func (l *line) last() *waiter { return l.waiters[len(l.waiters)-1] }

// ahead returns how many of l go before w.
func (l *line) ahead(w *waiter) int {
	i, _ := slices.BinarySearchFunc(l.waiters, w, func(x, w *waiter) int {
		if x.before(w) {
			return -1
		}
		return 1
	})
	return i
}

// before is the order within a line, and among the first of several.
func (w *waiter) before(x *waiter) bool {
	switch {
	case w.due.Equal(x.due):
		return w.number < x.number
	case w.due.IsZero(), x.due.IsZero():
		return x.due.IsZero()
	}
	return w.due.Before(x.due)
}

// add puts w where it belongs in who's line.
func (s *lines) add(who string, w *waiter, now time.Time) {
	l := s.of[who]
	if l == nil {
		l = &line{who: who}
		l.turn = s.round.PushBack(l)
		s.of[who] = l
	}
	s.arrived++
	w.number = s.arrived
	l.waiters = slices.Insert(l.waiters, l.ahead(w), w)
	s.waiting++
	s.rank(l, now)
}

// remove takes w out of its line. It is true where w was there.
func (s *lines) remove(who string, w *waiter, now time.Time) bool {
	l := s.of[who]
	if l == nil {
		return false
	}
	i := slices.Index(l.waiters, w)
	if i < 0 {
		return false
	}
	s.take(l, i, now)
	return true
}

// take takes the waiter at i out of l.
func (s *lines) take(l *line, i int, now time.Time) *waiter {
	w := l.waiters[i]
	l.waiters = slices.Delete(l.waiters, i, i+1)
	s.waiting--
	if len(l.waiters) == 0 {
		delete(s.of, l.who)
		s.round.Remove(l.turn)
	}
	s.rank(l, now)
	return w
}

// next takes out whose turn is next, as far as the round says it.
func (s *lines) next(now time.Time) *waiter {
	l := s.round.Front().Value.(*line)
	s.round.MoveToBack(l.turn)
	return s.take(l, 0, now)
}

// nextUrgent takes out who is due first of all whose lines may still have a turn out of order, and charges it to his line; nil
// where there is nobody. Such a turn does not cost the line its place in the round.
func (s *lines) nextUrgent(now time.Time) *waiter {
	if len(s.urgent.list) == 0 {
		return nil
	}
	l := s.urgent.list[0]
	s.credits[l.who] = credit{s.credit(l.who, now) - 1, now}
	return s.take(l, 0, now)
}

// credit returns how many turns out of order one may have now.
func (s *lines) credit(who string, now time.Time) float64 {
	c, ok := s.credits[who]
	if !ok {
		return urgentTurns
	}
	return min(urgentTurns, c.turns+max(0, now.Sub(c.at).Seconds())*urgentTurns/urgentTime.Seconds())
}

// sweep forgets the credits that are whole again, now and then.
func (s *lines) sweep(now time.Time) {
	if now.Sub(s.swept) < urgentTime {
		return
	}
	s.swept = now
	for who := range s.credits {
		if s.credit(who, now) >= urgentTurns {
			delete(s.credits, who)
		}
	}
}

// rank puts l, which was changed, where it belongs in the rankings.
func (s *lines) rank(l *line, now time.Time) {
	s.crowded.rank(l, len(l.waiters) > 0)
	s.urgent.rank(l, len(l.waiters) > 0 && !l.waiters[0].due.IsZero() && s.credit(l.who, now) >= 1)
}

// ranking is a heap of lines. A line knows its place in it.
type ranking struct {
	before func(a, b *line) bool
	place  func(*line) *int
	list   []*line
}

// rank puts l into its place, or out of the ranking.
func (r *ranking) rank(l *line, in bool) {
	switch at := *r.place(l); {
	case in && at == 0:
		heap.Push(r, l)
	case in:
		heap.Fix(r, at-1)
	case at > 0:
		// A line without waiters cannot be compared: it changes places with the last one first, which can.
		n := len(r.list) - 1
		r.Swap(at-1, n)
		r.Pop()
		if at-1 < n {
			heap.Fix(r, at-1)
		}
	}
}

// Len implements heap.Interface.
func (r *ranking) Len() int { return len(r.list) }

// Less implements heap.Interface.
func (r *ranking) Less(i, j int) bool { return r.before(r.list[i], r.list[j]) }

// Swap implements heap.Interface.
func (r *ranking) Swap(i, j int) {
	r.list[i], r.list[j] = r.list[j], r.list[i]
	*r.place(r.list[i]), *r.place(r.list[j]) = i+1, j+1
}

// Push implements heap.Interface.
func (r *ranking) Push(x any) {
	l := x.(*line)
	r.list = append(r.list, l)
	*r.place(l) = len(r.list)
}

// Pop implements heap.Interface.
func (r *ranking) Pop() any {
	n := len(r.list) - 1
	l := r.list[n]
	r.list[n], r.list = nil, r.list[:n]
	*r.place(l) = 0
	return l
}
