package ca

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"

	"github.com/signet-ca/signet/api"
)

// SealKeyBytes is the length of a seal key: AES-256.
const SealKeyBytes = 32

// sealV1 is the first byte of everything sealed: the format, so that another one can follow.
const sealV1 = 1

// Sealer seals private keys that lie in a record or a backup: AES-256-GCM under a key that is kept apart from them.
type Sealer struct{ aead cipher.AEAD }

// NewSealer returns a Sealer for a key of SealKeyBytes random bytes.
func NewSealer(key []byte) (*Sealer, error) {
	if len(key) != SealKeyBytes {
		return nil, api.E(api.SealKeyWrong, "a seal key has %d bytes, this one has %d", SealKeyBytes, len(key))
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	return &Sealer{aead}, nil
}

// NewSealKey returns a new random seal key.
func NewSealKey() []byte {
	key := make([]byte, SealKeyBytes)
	rand.Read(key)
	return key
}

// Seal encrypts plain. The context (trust domain and authority) is authenticated with it, so that a sealed key cannot be
// moved to another authority.
func (s *Sealer) Seal(plain []byte, context string) []byte {
	return s.aead.Seal([]byte{sealV1}, nil, plain, []byte(context))
}

// Open is the inverse of Seal; SealKeyWrong when the key or the context is another one, or the data was changed.
func (s *Sealer) Open(sealed []byte, context string) ([]byte, error) {
	if len(sealed) == 0 || sealed[0] != sealV1 {
		return nil, api.E(api.StateCorrupt, "the sealed key has an unknown format")
	}
	plain, err := s.aead.Open(nil, nil, sealed[1:], []byte(context))
	if err != nil {
		return nil, api.E(api.SealKeyWrong, "the seal key does not open the key of authority %s", context)
	}
	return plain, nil
}
