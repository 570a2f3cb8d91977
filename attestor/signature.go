package attestor

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"slices"

	"github.com/go-jose/go-jose/v4"
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

// verify reports whether a compact JWS is signed by key with alg (RFC 7515 section 5.2). The key decides about the
// algorithm, never the token alone.
func verify(key crypto.PublicKey, alg string, token []byte) bool {
	if !slices.Contains(algorithmsOf(key), alg) {
		return false
	}
	jws, err := jose.ParseSignedCompact(string(token), []jose.SignatureAlgorithm{jose.SignatureAlgorithm(alg)})
	if err != nil {
		return false
	}
	if _, err = jws.Verify(key); err != nil {
		return false
	}
	k, ok := key.(*rsa.PublicKey)
	return !ok || alg[0] != 'P' || verifySalt(k, alg, token)
}

// verifySalt reports whether the salt of an RSA-PSS signature is as long as the hash, as RFC 7518 section 3.5 has it: the
// library takes any length.
func verifySalt(key *rsa.PublicKey, alg string, token []byte) bool {
	hash := map[string]crypto.Hash{"PS256": crypto.SHA256, "PS384": crypto.SHA384, "PS512": crypto.SHA512}[alg]
	end := bytes.LastIndexByte(token, '.')
	signature, err := strictBase64.AppendDecode(nil, token[end+1:])
	if err != nil || hash == 0 {
		return false
	}
	h := hash.New()
	h.Write(token[:end])
	return rsa.VerifyPSS(key, hash, h.Sum(nil), signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
}
