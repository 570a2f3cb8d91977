package ca

import (
	"container/heap"
	"container/list"
	"math"
	"slices"
	"time"
)

// Bounds of what urgency gives a node over its turn in the round, and of how far it moves when others come back who are sent
// away. An honest node needs one such turn for each of its pods, and kubelet runs 110 of them.
const (
	urgentTurns = 128         // at once
	urgentShare = 0.01        // of the turns that are given in urgentTime, where that is less; but one turn
	urgentTime  = time.Minute // until so many are there again
	urgentLook  = 128         // lines that are looked at to say how many are more urgent
	maxCredits  = 1 << 14     // nodes of which it is known, and addresses at the door
)

// lines are those who wait, each in the line of whom he belongs to. All that is asked of them takes a time that grows with the
// logarithm of their number, at most.
type lines struct {
	waiting int
	of      map[string]*line
	round   list.List // of *line, whose turn is next first
	urgent  ranking   // lines that may have a turn out of order, whose first waiter is due first first
	crowded ranking   // all lines, the one that gives up a place first
	broke   list.List // of *line, that would be in urgent but for their credit, who is so for longest first
	arrived uint64    // counts waiters
	granted float64   // turns out of order that a whole credit is now
	credits map[string]credit
	swept   time.Time // when credits that are whole again were forgotten
}

// line is who waits for one.
type line struct {
	who     string
	waiters []*waiter // who is due first first, then who came first; those who are not due come last
	turn    *list.Element
	broke   *list.Element // nil: it is not
	urgent  int           // places in the rankings, from 1; 0: in none
	crowded int
}

// credit is what one had spent at a moment, as shares of a whole: what one is worth follows the pace.
type credit struct {
	turns    float64 // out of order
	promises float64 // of places to come back to, in the order of all
	at       time.Time
	promised time.Time // the last place that was promised outside of that order
}

func newLines() lines {
	return lines{
		of: map[string]*line{}, credits: map[string]credit{}, granted: urgentTurns,
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
	for e := s.broke.Front(); e != nil && s.credit(e.Value.(*line).who, now) >= 1; e = s.broke.Front() {
		s.rank(e.Value.(*line), now)
	}
	for len(s.urgent.list) > 0 {
		l := s.urgent.list[0]
		if s.credit(l.who, now) < 1 {
			s.rank(l, now) // the pace fell since it was ranked
			continue
		}
		c := s.spent(l.who, now)
		c.turns += 1 / s.granted
		s.credits[l.who] = c
		return s.take(l, 0, now)
	}
	return nil
}

// moreUrgent returns how many would go before a newcomer by urgency alone; more than anybody waits for where he has no such turn,
// or it would take long to say. It looks at no line whose first is less urgent, nor at what comes below it in the ranking.
func (s *lines) moreUrgent(who string, w *waiter, now time.Time) int {
	const many = math.MaxInt32 / 4
	n, looked, own := 0, 0, s.of[who]
	if own != nil {
		n = own.ahead(w)
	}
	if w.due.IsZero() || s.credit(who, now) < float64(n+1) {
		return many
	}
	for at := []int{0}; len(at) > 0; {
		i := at[len(at)-1]
		at = at[:len(at)-1]
		if i >= len(s.urgent.list) || !s.urgent.list[i].waiters[0].before(w) {
			continue
		}
		l := s.urgent.list[i]
		if looked++; looked > urgentLook {
			return many
		}
		if l != own {
			n += int(min(float64(l.ahead(w)), s.credit(l.who, now)))
		}
		at = append(at, 2*i+1, 2*i+2)
	}
	return n
}

// grant sets what a credit is worth at a pace; all that may be where it is not known.
func (s *lines) grant(rate float64) {
	s.granted = urgentTurns
	if rate > 0 {
		s.granted = max(1, min(urgentTurns, urgentShare*rate*urgentTime.Seconds()))
	}
}

// spent returns what one has spent by now.
func (s *lines) spent(who string, now time.Time) credit {
	c := s.credits[who]
	back := max(0, now.Sub(c.at).Seconds()) / urgentTime.Seconds()
	c.turns, c.promises, c.at = max(0, c.turns-back), max(0, c.promises-back), now
	return c
}

// credit returns how many turns out of order one may have now.
func (s *lines) credit(who string, now time.Time) float64 { return s.left(s.spent(who, now).turns) }

// left returns what is left of a credit of which so much was spent. It forgives what arithmetic takes.
func (s *lines) left(spent float64) float64 { return (1-spent)*s.granted + 1e-9 }

// promise reports whether one may have another place promised in the order of all, and charges it.
func (s *lines) promise(who string, now time.Time) bool {
	c := s.spent(who, now)
	if s.left(c.promises) < 1 {
		return false
	}
	c.promises += 1 / s.granted
	return s.keep(who, c)
}

// keep remembers c; false where too many are known.
func (s *lines) keep(who string, c credit) bool {
	if _, ok := s.credits[who]; !ok && len(s.credits) >= maxCredits {
		return false
	}
	s.credits[who] = c
	return true
}

// sweep forgets the credits that are whole again, now and then.
func (s *lines) sweep(now time.Time) {
	if now.Sub(s.swept) < urgentTime {
		return
	}
	s.swept = now
	for who := range s.credits {
		if c := s.spent(who, now); c.turns == 0 && c.promises == 0 && !c.promised.After(now) {
			delete(s.credits, who)
		}
	}
}

// rank puts l, which was changed, where it belongs in the rankings.
func (s *lines) rank(l *line, now time.Time) {
	s.crowded.rank(l, len(l.waiters) > 0)
	says := len(l.waiters) > 0 && !l.waiters[0].due.IsZero()
	may := says && s.credit(l.who, now) >= 1
	s.urgent.rank(l, may)
	switch broke := says && !may; {
	case broke && l.broke == nil:
		l.broke = s.broke.PushBack(l)
	case !broke && l.broke != nil:
		s.broke.Remove(l.broke)
		l.broke = nil
	}
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
