package attestortest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	_ "crypto/sha512" // crypto.SHA384 and crypto.SHA512
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"math/big"
)

// signingKey is one key of an issuer. It is never changed once made.
type signingKey struct {
	kid  string
	alg  string
	jwk  map[string]string // its public half (RFC 7517)
	sign func(input []byte) ([]byte, error)
}

func newSigningKey(alg string) (*signingKey, error) {
	var signer crypto.Signer
	var err error
	hash := crypto.SHA256
	switch {
	case len(alg) == 5 && alg[2:] == "384":
		hash = crypto.SHA384
	case len(alg) == 5 && alg[2:] == "512":
		hash = crypto.SHA512
	}
	k := &signingKey{alg: alg, jwk: map[string]string{"use": "sig", "alg": alg}}
	switch alg {
	case "RS256", "RS384", "RS512", "PS256", "PS384", "PS512":
		signer, err = rsa.GenerateKey(rand.Reader, 2048)
	case "ES256":
		signer, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ES384":
		signer, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "ES512":
		signer, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case "EdDSA":
		_, signer, err = ed25519.GenerateKey(rand.Reader)
	default:
		return nil, fmt.Errorf("algorithm %q is not one of RS256 to PS512, ES256 to ES512, EdDSA", alg)
	}
	if err != nil {
		return nil, err
	}
	switch key := signer.(type) {
	case *rsa.PrivateKey:
		k.publishRSA(&key.PublicKey)
		k.sign = func(in []byte) ([]byte, error) { return signRSA(key, alg[0] == 'P', hash, in) }
	case *ecdsa.PrivateKey:
		if err := k.publishEC(&key.PublicKey); err != nil {
			return nil, err
		}
		k.sign = func(in []byte) ([]byte, error) { return signEC(key, hash, in) }
	case ed25519.PrivateKey:
		k.jwk["kty"], k.jwk["crv"], k.jwk["x"] = "OKP", "Ed25519", b64(key[32:])
		k.sign = func(in []byte) ([]byte, error) { return ed25519.Sign(key, in), nil }
	}
	if k.kid, err = keyID(signer.Public()); err != nil {
		return nil, err
	}
	k.jwk["kid"] = k.kid
	return k, nil
}

func (k *signingKey) publishRSA(pub *rsa.PublicKey) {
	e := binary.BigEndian.AppendUint32(nil, uint32(pub.E))
	k.jwk["kty"], k.jwk["n"], k.jwk["e"] = "RSA", b64(pub.N.Bytes()), b64(e[1:]) // 65537, three bytes
}

func (k *signingKey) publishEC(pub *ecdsa.PublicKey) error {
	point, err := pub.Bytes() // 4, x, y
	if err != nil {
		return err
	}
	n := len(point) / 2
	k.jwk["kty"], k.jwk["crv"] = "EC", pub.Params().Name
	k.jwk["x"], k.jwk["y"] = b64(point[1:1+n]), b64(point[1+n:])
	return nil
}

// keyID is what Kubernetes uses: the SHA-256 of the public key's DER.
func keyID(pub crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return b64(sum[:]), nil
}

func signRSA(key *rsa.PrivateKey, pss bool, hash crypto.Hash, input []byte) ([]byte, error) {
	digest := sum(hash, input)
	if pss {
		return rsa.SignPSS(rand.Reader, key, hash, digest, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
	}
	return rsa.SignPKCS1v15(nil, key, hash, digest)
}

// signEC returns r and s side by side, each as long as the curve's order (RFC 7518 section 3.4).
func signEC(key *ecdsa.PrivateKey, hash crypto.Hash, input []byte) ([]byte, error) {
	r, s, err := ecdsa.Sign(rand.Reader, key, sum(hash, input))
	if err != nil {
		return nil, err
	}
	n := (key.Params().BitSize + 7) / 8
	return append(fill(r, n), fill(s, n)...), nil
}

func fill(x *big.Int, n int) []byte { return x.FillBytes(make([]byte, n)) }

func sum(hash crypto.Hash, input []byte) []byte {
	h := hash.New()
	h.Write(input)
	return h.Sum(nil)
}

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
