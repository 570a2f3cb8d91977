package attestor

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"math/big"
	"slices"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// The algorithms that an issuer may sign with (RFC 7518 section 3.1, RFC 8037 section 3.1), by type of key. Only
// asymmetric ones: a key set is public, so a MAC under a "key" from it would prove nothing.
var (
	rsaAlgorithms     = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
	p256Algorithms    = []string{"ES256"}
	p384Algorithms    = []string{"ES384"}
	p521Algorithms    = []string{"ES512"}
	ed25519Algorithms = []string{"EdDSA"}

	algorithms = slices.Concat(rsaAlgorithms, p256Algorithms, p384Algorithms, p521Algorithms, ed25519Algorithms)
)

// algorithmsOf returns those that key may be used with; none for a key that is not one of ours.
func algorithmsOf(key crypto.PublicKey) []string {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return rsaAlgorithms
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return p256Algorithms
		case elliptic.P384():
			return p384Algorithms
		case elliptic.P521():
			return p521Algorithms
		}
	case ed25519.PublicKey:
		if len(key) == ed25519.PublicKeySize {
			return ed25519Algorithms
		}
	}
	return nil
}

// verify reports whether a compact JWS is signed by key with alg (RFC 7515 section 5.2, RFC 7518 section 3, RFC 8037 section
// 3.1). The key decides about the algorithm, never the token alone.
func verify(key crypto.PublicKey, alg string, signed, signature []byte) bool {
	if !slices.Contains(algorithmsOf(key), alg) {
		return false
	}
	hash, digest := hashOf(alg, signed)
	switch key := key.(type) {
	case *rsa.PublicKey:
		if alg[0] == 'P' { // its salt is as long as the hash
			return rsa.VerifyPSS(key, hash, digest, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(key, hash, digest, signature) == nil
	case *ecdsa.PublicKey:
		return verifyPair(key, digest, signature)
	case ed25519.PublicKey:
		return ed25519.Verify(key, signed, signature)
	}
	return false
}

// hashOf returns the hash of an algorithm, and what is signed under it; nothing for EdDSA, which has its own.
func hashOf(alg string, signed []byte) (crypto.Hash, []byte) {
	switch alg[len(alg)-3:] {
	case "256":
		d := sha256.Sum256(signed)
		return crypto.SHA256, d[:]
	case "384":
		d := sha512.Sum384(signed)
		return crypto.SHA384, d[:]
	case "512":
		d := sha512.Sum512(signed)
		return crypto.SHA512, d[:]
	}
	return 0, nil
}

// verifyPair verifies an ECDSA signature as a JWS has it: two numbers, each exactly as long as the curve's order, without any
// encoding (RFC 7518 section 3.4).
func verifyPair(key *ecdsa.PublicKey, digest, signature []byte) bool {
	size := (key.Curve.Params().N.BitLen() + 7) / 8
	if len(signature) != 2*size {
		return false
	}
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1BigInt(new(big.Int).SetBytes(signature[:size]))
		b.AddASN1BigInt(new(big.Int).SetBytes(signature[size:]))
	})
	der, err := b.Bytes()
	return err == nil && ecdsa.VerifyASN1(key, digest, der)
}
