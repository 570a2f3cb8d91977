package ca

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/internal/latest"
)

// Bounds of how long an API server may be away, and of what is told as one absence.
const (
	DefaultGrace = 4 * time.Hour
	MaxGrace     = 24 * time.Hour

	// awayAfter is how long a cluster must not have been seen by this process, counted from when that was found out, so that a
	// hiccup of a watch does not count, nor a clock that was set or a machine that slept: then all is old, and not asked for
	// again yet. What is held lasts longer.
	awayAfter = 15 * time.Second
	// awayAtStart is how long it must not have been seen by a process that has never seen it: the first lists of a large
	// cluster take their time.
	awayAtStart = time.Minute
	// settled is how long a cluster must have been seen again, but for hiccups, for its absence to be over. A shorter return neither begins
	// a new grace nor has kubelets had the time to bring fresh tokens.
	settled = 5 * time.Minute

	// freshMemory is how much older than its own record of what was seen the directory's memory may be, before the grace
	// counts from the memory: deletions in between are not in it.
	freshMemory = 10 * time.Minute

	lookEvery = 5 * time.Second
	// A heartbeat is written this often: by a replica that is alone, and among others.
	beatAlone = time.Minute
	beatAmong = 10 * time.Second
	// beatFresh is how long ago another replica may have been heard that sees the cluster, and how old what was heard of all
	// may be where there are others; alone it may be older.
	beatFresh      = 45 * time.Second
	beatFreshAlone = 2 * beatAlone
	// leaveWithin is the time in which the agents of a replica that sees nothing are sent to the others.
	leaveWithin = 10 * time.Second
)

// sights is what this replica knows of how it sees clusters. The rule of known renewals begins here: whether a cluster is
// away, and since when. It is nil where that rule is off.
type sights struct {
	directory Rememberer
	issuers   []string
	grace     time.Duration
	started   time.Time

	away latest.Value[map[string]time.Time] // since when, of clusters whose known workloads are renewed; for agents
	gone latest.Value[map[string]bool]      // clusters that another replica sees and this one does not

	mu     sync.Mutex // guards what follows
	of     map[string]*sight
	heard  map[voice]heard
	listen time.Time // when the others were listened to last, by the own clock; zero: never
	among  bool      // there are others
}

// voice is what one replica says of one cluster.
type voice struct{ replica, issuer string }

// heard is what was heard of a voice. That it sees the cluster is told by its saying something else than before, so that the
// clocks of two machines need not agree.
type heard struct {
	seen      time.Time // by its clock
	cut       bool      // it says that it does not see the cluster itself
	after, at time.Time // by the own clock: it has said so between these two; after is zero where that is not known
}

// sight is how one cluster is seen.
type sight struct {
	Sight
	again time.Time // since when it is seen without a gap, while Since is set; zero while it is not
	lost  time.Time // since when it is known that it is not seen; zero while it is
	// memory is up to when everything is in the directory's memory, where the grace counts from that; zero: from Since.
	memory time.Time
}

// newSights returns nil where the rule is off: without a grace, without a directory that remembers, or without tickets.
func newSights(cfg Config, now time.Time) *sights {
	d, ok := cfg.Directory.(Rememberer)
	if !ok || cfg.Grace == 0 || cfg.Sealer == nil {
		return nil
	}
	s := &sights{directory: d, grace: cfg.Grace, started: now, issuers: slices.Sorted(maps.Keys(cfg.KeySets)), of: map[string]*sight{}}
	for _, issuer := range s.issuers {
		s.of[issuer] = &sight{}
	}
	return s
}

// restore takes over what this replica wrote down before it was started anew: a restart begins no new grace.
func (s *sights) restore(r Replica) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for issuer, was := range r.Clusters {
		if of := s.of[issuer]; of != nil {
			of.Sight = was
		}
	}
}

// look asks how a cluster is seen at this moment, and returns it; away says that it has not been for long enough to count.
func (s *sights) look(issuer string, now time.Time) (seen Sight, away bool) {
	upTo, current := s.directory.Seen(issuer)
	s.mu.Lock()
	defer s.mu.Unlock()
	of := s.of[issuer]
	if of == nil {
		return Sight{}, false
	}
	if current || upTo.After(of.Seen) {
		of.Seen = upTo
	}
	if !current {
		if of.lost.IsZero() {
			of.lost = now
		}
		wait, never := awayAfter, upTo.Before(s.started)
		if never {
			wait = awayAtStart
		}
		if now.Sub(of.lost) < wait {
			return of.Sight, false // no absence, nor the end of a return
		}
		of.again = time.Time{}
		if of.Since.IsZero() {
			of.Since = of.Seen
		}
		// What a process that has never seen the cluster says of pods is from the directory's memory.
		if of.memory = (time.Time{}); never && !upTo.IsZero() && upTo.Before(of.Since.Add(-freshMemory)) {
			of.memory = upTo
		}
		return of.Sight, true
	}
	of.lost, of.memory = time.Time{}, time.Time{}
	if of.Since.IsZero() {
		return of.Sight, false
	}
	if of.again.IsZero() {
		of.again = now
	}
	if elapsed(now, of.again) >= settled {
		of.Since, of.again = time.Time{}, time.Time{}
	}
	return of.Sight, false
}

// absence says since when a cluster is away whose known workloads may be renewed: the zero time while it is seen, or only just
// was. An error is why nothing of it is renewed although it is away.
func (s *sights) absence(issuer string, now time.Time) (since time.Time, err error) {
	if s == nil {
		return time.Time{}, nil
	}
	seen, away := s.look(issuer, now)
	if !away {
		return time.Time{}, nil
	}
	gone := elapsed(now, s.graceFrom(issuer, seen))
	elsewhere, known := s.seenElsewhere(issuer, now)
	switch {
	case elsewhere:
		return time.Time{}, api.E(api.DirectoryUnavailable, "the cluster cannot be seen by this replica; another one sees it")
	case !known:
		return time.Time{}, api.E(api.DirectoryUnavailable, "the cluster cannot be seen by this replica; whether another one sees it is not known yet")
	case seen.Since.IsZero():
		return time.Time{}, api.E(api.DirectoryUnavailable, "the cluster was never seen by this replica")
	case seen.Since.Sub(now) > time.Minute: // the clock was set back since it was written down
		return time.Time{}, api.E(api.GraceOver, "when the cluster was last seen is not known: it is in the future by the CA's clock")
	case gone >= s.grace:
		return time.Time{}, api.E(api.GraceOver, "what is known of the cluster is %s old, and the grace is %s", gone.Round(time.Second), s.grace)
	}
	return seen.Since, nil
}

// graceFrom is when the grace of an absence begins: when the cluster was last seen, or up to when what is remembered of it is
// complete. A token counts by the former, whatever is remembered.
func (s *sights) graceFrom(issuer string, seen Sight) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if of := s.of[issuer]; of != nil && !of.memory.IsZero() {
		return of.memory
	}
	return seen.Since
}

// elapsed is the time from then to now. Time that the machine slept counts, and so does time by which its clock was set
// back: only what both clocks deny has not passed.
func elapsed(now, then time.Time) time.Duration {
	return max(now.Sub(then), now.Round(0).Sub(then.Round(0)))
}

// startSight reads what was written down of clusters, before anything is issued. What cannot be read is not known: then
// nothing is renewed by tickets before a cluster was seen once.
func (ca *CA) startSight(ctx context.Context) {
	if ca.sights == nil {
		return
	}
	ca.replica.Lock()
	defer ca.replica.Unlock()
	r, err := ReplicaOf(ctx, ca.cfg.Store, ca.cfg.Replica)
	if err != nil {
		ca.log.ErrorContext(ctx, "heartbeat not read", "error", err)
		return
	}
	ca.sights.restore(r)
}

// keepSight looks at the clusters, tells agents which are away, and keeps this replica's heartbeat in the store until ctx
// ends. It fails only when a write has an unknown outcome.
func (ca *CA) keepSight(ctx context.Context) error {
	s := ca.sights
	if s == nil {
		return nil
	}
	b := heartbeat{ca: ca}
	for {
		now := time.Now()
		all := map[string]Sight{}
		for _, issuer := range s.issuers {
			all[issuer], _ = s.look(issuer, now)
		}
		if err := b.beat(ctx, all, now); err != nil { // before it is decided by what the others say
			return err
		}
		away, gone := map[string]time.Time{}, map[string]bool{}
		for _, issuer := range s.issuers {
			seen, unseen := s.look(issuer, now)
			ca.metrics.setAway(issuer, unseen, s.graceFrom(issuer, seen), s.started, now)
			since, err := s.absence(issuer, now)
			elsewhere, _ := s.seenElsewhere(issuer, now)
			switch {
			case err == nil && !since.IsZero():
				away[issuer] = since
			case unseen && elsewhere:
				gone[issuer] = true
			}
		}
		ca.logAway(ctx, s.away.Load(), away)
		tell(&s.away, away)
		tell(&s.gone, gone)
		select {
		case <-ctx.Done():
			return b.write(context.WithoutCancel(ctx), all, now) // what the next start counts from
		case <-time.After(lookEvery):
		}
	}
}

// logAway says which clusters are away from now on, and which are no more.
func (ca *CA) logAway(ctx context.Context, was, is map[string]time.Time) {
	for issuer, since := range is {
		if _, ok := was[issuer]; !ok {
			ca.log.WarnContext(ctx, "the cluster is away: what is known is renewed by tickets", "cluster", issuer, "since", since, "grace", ca.cfg.Grace.String())
		}
	}
	for issuer := range was {
		if _, ok := is[issuer]; !ok {
			ca.log.WarnContext(ctx, "nothing is renewed by tickets any more: the cluster is seen again, or the grace is over", "cluster", issuer)
		}
	}
}

// tell sets a value that is another than before.
func tell[V comparable](of *latest.Value[map[string]V], v map[string]V) {
	if !maps.Equal(of.Load(), v) {
		of.Set(v)
	}
}

// hear takes over what the others have written down.
func (s *sights) hear(replicas []Replica, own string, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[voice]heard{}
	s.among = false
	for _, r := range replicas {
		if r.Name == own {
			continue
		}
		for issuer, said := range r.Clusters {
			v := voice{r.Name, issuer}
			h, before := s.heard[v]
			if !before || !h.seen.Equal(said.Seen) {
				h.seen, h.at, h.after = said.Seen, now, time.Time{}
				if before {
					h.after = s.listen
				}
			}
			h.cut = !said.Since.IsZero() && !said.Seen.After(said.Since)
			all[v] = h
			s.among = s.among || now.Sub(said.Seen).Abs() <= time.Hour || elapsed(now, h.at) <= beatFresh
		}
	}
	s.heard, s.listen = all, now
}

// seenElsewhere reports whether another replica sees a cluster that this one does not: it has said so since sight was lost
// here. Until that is known of all who did see it, and while nobody could be listened to, it is not known.
func (s *sights) seenElsewhere(issuer string, now time.Time) (elsewhere, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fresh := beatFreshAlone
	if s.among {
		fresh = beatFresh
	}
	known = !s.listen.IsZero() && elapsed(now, s.listen) <= fresh
	of := s.of[issuer]
	for v, h := range s.heard {
		if v.issuer != issuer || h.cut || elapsed(now, h.at) > beatFresh || of == nil {
			continue
		}
		if h.after.After(of.lost.Add(beatAmong)) { // what it wrote at first may be of before the loss
			return true, true
		}
		known = false
	}
	return false, known
}

// accompanied reports whether there are other replicas.
func (s *sights) accompanied() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.among
}

// heartbeat writes down how this replica sees the clusters, and reads what the others wrote. It is used by one goroutine.
type heartbeat struct {
	ca      *CA
	written map[string]Sight
	tried   time.Time
}

// beat writes where it is due: at once when a cluster was lost or came back, else from time to time, and not at all while
// nothing changes. Others are listened to as often.
func (b *heartbeat) beat(ctx context.Context, all map[string]Sight, now time.Time) error {
	every := beatAlone
	if b.ca.sights.accompanied() {
		every = beatAmong
	}
	turned := !maps.EqualFunc(all, b.written, func(a, b Sight) bool { return a.Since.Equal(b.Since) })
	if !b.tried.IsZero() && elapsed(now, b.tried) < every && (!turned || elapsed(now, b.tried) < lookEvery) {
		return nil
	}
	return b.write(ctx, all, now)
}

// write writes what has changed, and reads what others wrote.
func (b *heartbeat) write(ctx context.Context, all map[string]Sight, now time.Time) error {
	b.tried = now
	err := b.exchange(ctx, all, now)
	switch {
	case err == nil || api.ReasonOf(err) == api.StateUnknown:
		return err
	case ctx.Err() == nil:
		b.ca.log.WarnContext(ctx, "heartbeat not written", "error", err)
	}
	return nil
}

func (b *heartbeat) exchange(ctx context.Context, all map[string]Sight, now time.Time) error {
	ca := b.ca
	ca.replica.Lock()
	defer ca.replica.Unlock()
	replicas, err := ca.cfg.Store.Replicas(ctx)
	if err != nil {
		return err
	}
	own := Replica{Name: ca.cfg.Replica}
	if i := slices.IndexFunc(replicas, func(r Replica) bool { return r.Name == own.Name }); i >= 0 {
		own = replicas[i]
	}
	ca.sights.hear(replicas, own.Name, now)
	if maps.EqualFunc(all, own.Clusters, func(a, b Sight) bool { return a.Seen.Equal(b.Seen) && a.Since.Equal(b.Since) }) {
		b.written = all
		return nil
	}
	own.Clusters = all
	if err := ca.cfg.Store.SaveReplica(ctx, own); err != nil {
		return err
	}
	b.written = all
	return nil
}

// awaySince returns since when clusters are away whose known workloads are renewed, and a channel that is closed when that
// has changed.
func (ca *CA) awaySince() (map[string]time.Time, <-chan struct{}) {
	if ca.sights == nil {
		return nil, nil
	}
	return ca.sights.away.Get()
}

// elsewhere reports whether another replica sees a cluster that this one does not, and returns a channel that is closed when
// that may have changed.
func (ca *CA) elsewhere(issuer string) (bool, <-chan struct{}) {
	if ca.sights == nil {
		return false, nil
	}
	gone, changed := ca.sights.gone.Get()
	return gone[issuer], changed
}

// leaveAfter is when an agent is sent away whose cluster another replica sees: not all of them at the same moment.
func leaveAfter() time.Duration { return rand.N(leaveWithin) }
