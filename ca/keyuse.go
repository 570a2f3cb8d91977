package ca

import (
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
	mu sync.Mutex
	of map[string]*keyUse
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
// this one, or, where that is before it was booked, so that a clock was wrong or the record is, until its end.
func (k *keyUses) account(all []Minted, started time.Time) []Minted {
	k.mu.Lock()
	defer k.mu.Unlock()
	told := make([]Minted, 0, len(all))
	for _, m := range all {
		if !m.Destroyed {
			if u := k.of[m.ID]; u != nil && m.ID != "" {
				m.Leaves, m.Destroyed = u.ended()
			} else {
				m.Destroyed, m.Leaves = true, m.NotAfter
				if m.Longest > 0 && !m.At.After(started) {
					m.Leaves = earlier(m.NotAfter, started.Add(m.Longest)).UTC()
				}
			}
		}
		if !m.Destroyed {
			m.Leaves = time.Time{}
		}
		told = append(told, m)
	}
	return told
}

// forget drops what is on record as destroyed, or is not on record any more.
func (k *keyUses) forget(all []Minted) {
	k.mu.Lock()
	defer k.mu.Unlock()
	keep := map[string]bool{}
	for _, m := range all {
		keep[m.ID] = keep[m.ID] || !m.Destroyed
	}
	for id, u := range k.of {
		if _, ended := u.ended(); ended && !keep[id] {
			delete(k.of, id)
		}
	}
}
