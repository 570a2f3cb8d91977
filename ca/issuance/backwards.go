package issuance

import (
	"encoding/binary"

	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// backwards writes DER from its end to its beginning: what an element holds is there, and its length known, when its header is
// written, so nothing is moved and nothing is counted before.
type backwards struct {
	buf []byte
	at  int // buf[at:] is written
}

// newBackwards returns one with room for so many bytes; it grows.
func newBackwards(room int) *backwards { return &backwards{make([]byte, room), room} }

// len is how much is written.
func (w *backwards) len() int { return len(w.buf) - w.at }

// bytes returns what is written.
func (w *backwards) bytes() []byte { return w.buf[w.at:] }

// next returns the n bytes before all others.
func (w *backwards) next(n int) []byte {
	if n > w.at {
		grown := make([]byte, 2*len(w.buf)+n)
		at := len(grown) - copy(grown[len(grown)-w.len():], w.bytes())
		w.buf, w.at = grown, at
	}
	w.at -= n
	return w.buf[w.at : w.at+n]
}

func (w *backwards) put(b []byte)       { copy(w.next(len(b)), b) }
func (w *backwards) putString(s string) { copy(w.next(len(s)), s) }

// wrap makes all that was written since len was end the content of an element.
func (w *backwards) wrap(tag cbasn1.Tag, end int) {
	n := w.len() - end
	if n < 0x80 {
		w.put([]byte{byte(tag), byte(n)})
		return
	}
	var length [9]byte
	binary.BigEndian.PutUint64(length[1:], uint64(n))
	i := 1
	for length[i] == 0 {
		i++
	}
	length[i-1] = 0x80 | byte(len(length)-i)
	w.put(length[i-1:])
	w.put([]byte{byte(tag)})
}
