package canary

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/binary"
	"math/big"
	"math/rand/v2"
)

// keyMarker is how the scalar of every key of NewKey begins.
const keyMarker = "the-canary-7d1f93" + "-key-"

// NewKey makes a P-256 key that can be searched for: its scalar begins with 22 bytes that no other secret has, and ends
// with ten drawn at random. Whoever prints it, in PEM, DER, hex or as a number, prints a marker. It needs no entropy, which
// a synctest bubble under FIPS 140 has none of, and is worth nothing outside tests.
func NewKey() (*ecdsa.PrivateKey, error) {
	scalar := binary.BigEndian.AppendUint16([]byte(keyMarker), uint16(rand.Uint32()))
	scalar = binary.BigEndian.AppendUint64(scalar, rand.Uint64())
	return ecdsa.ParseRawPrivateKey(elliptic.P256(), scalar)
}

// AddKeys has the search look for every key of NewKey.
func (s *Search) AddKeys() {
	const name = "a private key"
	s.Add(name, []byte(keyMarker))
	// Two numbers that begin with the same bytes begin with the same digits: those that the least and the most share.
	first := new(big.Int).SetBytes(append([]byte(keyMarker), make([]byte, 10)...)).String()
	last := new(big.Int).SetBytes(append([]byte(keyMarker), bytes.Repeat([]byte{0xff}, 10)...)).String()
	n := 0
	for n < len(first) && first[n] == last[n] {
		n++
	}
	s.names, s.forms = append(s.names, name), append(s.forms, bytes.Clone([]byte(first[:n])))
}
