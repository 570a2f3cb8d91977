package ca

import (
	"maps"
	"sync"
	"time"
)

// keyUse follows the key of one intermediate from its booking to its end: who signs with it now, and until when what was signed
// is good. A root is removed on the strength of it, so an end counts only when nobody can sign any more.
type keyUse struct {
	mu      sync.Mutex // guards what follows
	signing int
	closing bool
	gone    chan struct{} // closed once it is closing and nobody signs
	last    time.Time     // when the last SVID expires that was signed, or is being signed
}

func newKeyUse() *keyUse { return &keyUse{gone: make(chan struct{})} }

// enter begins the use of the key; false where it is at its end.
func (u *keyUse) enter() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.closing {
		u.signing++
	}
	return !u.closing
}

// leave ends what enter began.
func (u *keyUse) leave() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.signing--
	u.settle()
}

// note says that an SVID that expires then is about to be signed.
func (u *keyUse) note(until time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if until.After(u.last) {
		u.last = until
	}
}

// close lets nobody use the key any more, and returns a channel that is closed when nobody does.
func (u *keyUse) close() <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closing = true
	u.settle()
	return u.gone
}

// settle closes gone when it is time; the caller holds mu.
func (u *keyUse) settle() {
	if u.closing && u.signing == 0 {
		select {
		case <-u.gone:
		default:
			close(u.gone)
		}
	}
}

// ended reports whether nobody can use the key any more, and when the last SVID under it expires.
func (u *keyUse) ended() (last time.Time, ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	select {
	case <-u.gone:
		return u.last, true
	default:
		return u.last, false
	}
}

// keyUses are those of this process, by the id of the request for the intermediate. The zero value is ready.
type keyUses struct {
	mu      sync.Mutex
	of      map[string]*keyUse
	earlier map[string]bool // ids of those that were not at their end by the record when this process read it first
}

// begin returns the use of a key that is about to be booked.
func (k *keyUses) begin(id string) *keyUse {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.of == nil {
		k.of = map[string]*keyUse{}
	}
	if k.of[id] == nil {
		k.of[id] = newKeyUse()
	}
	return k.of[id]
}

// account says of each intermediate on record what has become of its key. One that this process does not know was in the memory
// of an earlier one, and is no more; what that signed last is not known, but how long it could at most be good: counted from the start of
// this one, or, where that is before it was booked, so that a clock was wrong or the record is, until its end. That is counted anew each
// time, since the start may turn out to have been later.
func (k *keyUses) account(all []Minted, started time.Time) []Minted {
	k.mu.Lock()
	defer k.mu.Unlock()
	told := make([]Minted, 0, len(all))
	for _, m := range all {
		u := k.of[m.ID]
		switch {
		case m.Destroyed && !k.earlier[m.ID]:
		case u != nil && m.ID != "":
			m.Leaves, m.Destroyed = u.ended()
		default:
			leaves := m.NotAfter
			if m.Longest > 0 && !m.At.After(started) {
				leaves = earlier(m.NotAfter, started.Add(m.Longest)).UTC()
			}
			if leaves.After(m.Leaves) {
				m.Leaves = leaves
			}
			m.Destroyed = true
			if k.earlier == nil {
				k.earlier = map[string]bool{}
			}
			k.earlier[m.ID] = true
		}
		if !m.Destroyed {
			m.Leaves = time.Time{}
		}
		told = append(told, m)
	}
	return told
}

// startedBy is when a process was started that has been running for so long, by the clock as it is now: where that was set ahead since, as
// on a machine that was behind when it booted, the moment that was noted is too early. It is never before that.
func startedBy(noted, now time.Time, running time.Duration) time.Time {
	if by := now.Add(-running); by.Sub(noted) >= parted {
		return by.Truncate(parted).Add(parted) // the same each time that it is asked, but for a clock that is set in between
	}
	return noted
}

// keysOf is account, of what is on record of this replica.
func (ca *CA) keysOf(all []Minted) []Minted {
	now := time.Now()
	return ca.keys.account(all, startedBy(ca.started.Round(0), now.Round(0), now.Sub(ca.started)))
}

// forget drops what is on record as destroyed, or is not on record any more.
func (k *keyUses) forget(all []Minted) {
	k.mu.Lock()
	defer k.mu.Unlock()
	keep, there := map[string]bool{}, map[string]bool{}
	for _, m := range all {
		keep[m.ID] = keep[m.ID] || !m.Destroyed
		there[m.ID] = true
	}
	maps.DeleteFunc(k.earlier, func(id string, _ bool) bool { return !there[id] })
	for id, u := range k.of {
		if _, ended := u.ended(); ended && !keep[id] {
			delete(k.of, id)
		}
	}
}
