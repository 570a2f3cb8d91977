package attestor

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // crypto.SHA256
	_ "crypto/sha512" // crypto.SHA384 and crypto.SHA512
	"math/big"
	"slices"
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

// verify reports whether signature is that of key and alg over signed (RFC 7515 section 5.2, RFC 7518 sections 3.3 to 3.5,
// RFC 8037 section 3.1). The key decides about the algorithm, never the token alone.
//
// It works on the bytes of the token as they came. A JWT library would parse the token once more, by rules of its own.
func verify(key crypto.PublicKey, alg string, signed, signature []byte) bool {
	if !slices.Contains(algorithmsOf(key), alg) {
		return false
	}
	if key, ok := key.(ed25519.PublicKey); ok {
		return ed25519.Verify(key, signed, signature)
	}
	hash := hashOf(alg)
	h := hash.New()
	h.Write(signed)
	digest := h.Sum(nil)
	switch key := key.(type) {
	case *rsa.PublicKey:
		if alg[0] == 'P' {
			return rsa.VerifyPSS(key, hash, digest, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(key, hash, digest, signature) == nil
	case *ecdsa.PublicKey:
		n := (key.Params().BitSize + 7) / 8 // r and s side by side, each as long as the curve's order
		if len(signature) != 2*n {
			return false
		}
		r, s := new(big.Int).SetBytes(signature[:n]), new(big.Int).SetBytes(signature[n:])
		return ecdsa.Verify(key, digest, r, s)
	}
	return false
}

// hashOf returns the hash of an algorithm whose name ends in its bits.
func hashOf(alg string) crypto.Hash {
	switch alg[2:] {
	case "384":
		return crypto.SHA384
	case "512":
		return crypto.SHA512
	}
	return crypto.SHA256
}
