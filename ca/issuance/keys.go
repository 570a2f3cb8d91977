package issuance

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/signet-ca/signet/api"
)

// Keys says which types of keys are accepted besides ECDSA P-256, ECDSA P-384 and RSA of 2048 to 4096 bits. The zero
// value accepts those only.
type Keys struct {
	Ed25519 bool // not every Envoy build accepts it
}

// A KeyKind names a type and size of key to generate. The zero value is KeyP256.
type KeyKind string

// The kinds of keys.
const (
	KeyP256    KeyKind = "ecdsa-p256"
	KeyP384    KeyKind = "ecdsa-p384"
	KeyEd25519 KeyKind = "ed25519"
	KeyRSA2048 KeyKind = "rsa-2048"
	KeyRSA3072 KeyKind = "rsa-3072"
	KeyRSA4096 KeyKind = "rsa-4096"
)

// Bounds of an RSA modulus, in bits.
const (
	minRSABits = 2048
	maxRSABits = 4096
)

// GenerateKey makes a private key. An unknown kind is api.ConfigInvalid.
func GenerateKey(kind KeyKind) (crypto.Signer, error) {
	var key crypto.Signer
	var err error
	switch kind {
	case KeyP256, "":
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case KeyP384:
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case KeyEd25519:
		_, key, err = ed25519.GenerateKey(nil)
	case KeyRSA2048:
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	case KeyRSA3072:
		key, err = rsa.GenerateKey(rand.Reader, 3072)
	case KeyRSA4096:
		key, err = rsa.GenerateKey(rand.Reader, 4096)
	default:
		return nil, api.E(api.ConfigInvalid, "unknown kind of key %q", string(kind))
	}
	if err != nil {
		return nil, api.Wrap(api.Internal, err, "no key could be made")
	}
	return key, nil
}

// KeyName returns type and size of a public key as people read it: "ECDSA P-256", "RSA 2048", "Ed25519".
func KeyName(pub crypto.PublicKey) string {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k != nil && k.Curve != nil {
			return "ECDSA " + k.Curve.Params().Name
		}
	case *rsa.PublicKey:
		if k != nil && k.N != nil {
			return fmt.Sprintf("RSA %d", k.N.BitLen())
		}
	case ed25519.PublicKey:
		return "Ed25519"
	}
	return "unknown"
}

// CheckKey reports whether pub is a key that Signet certifies. It is an *api.Error with api.KeyType for a type, curve or
// encoding that is not accepted, api.KeyTooLarge above the limits, and api.WeakKey for a key whose private half others
// may find. Sizes are checked before any arithmetic, so that an absurd key costs nothing.
func CheckKey(pub crypto.PublicKey, allowed Keys) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return checkECDSA(k)
	case *rsa.PublicKey:
		return checkRSA(k)
	case ed25519.PublicKey:
		if !allowed.Ed25519 {
			return api.E(api.KeyType, "Ed25519 keys are not allowed here")
		}
		return checkEd25519(k)
	}
	return api.E(api.KeyType, "keys of this type are not accepted")
}

func checkECDSA(k *ecdsa.PublicKey) error {
	if k == nil || k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
		return api.E(api.KeyType, "the curve is not P-256 or P-384")
	}
	//lint:ignore SA1019 only compared with nil, which Bytes would not survive
	if k.X == nil || k.Y == nil {
		return api.E(api.WeakKey, "the key has no point")
	}
	if _, err := k.Bytes(); err != nil { // fails for infinity and for points off the curve
		return api.Wrap(api.WeakKey, err, "the key's point is not on its curve")
	}
	return nil
}

// checkEd25519 refuses the points of small order. A signature that verifies under one of them proves nothing: anybody can
// make it, for most messages, without a private key (RFC 8032 section 5.1.7 verifies without the cofactor).
func checkEd25519(k ed25519.PublicKey) error {
	if len(k) != ed25519.PublicKeySize {
		return api.E(api.KeyType, "an Ed25519 key has 32 bytes")
	}
	y := [ed25519.PublicKeySize]byte(k)
	y[31] &= 0x7f // the sign of x
	if slices.Contains(smallOrder[:], y) {
		return api.E(api.WeakKey, "the key's point has a small order")
	}
	return nil
}

// smallOrder are the y coordinates, little endian, of the eight points of edwards25519 whose order divides the cofactor,
// with the encodings that are not reduced modulo p = 2^255-19 but decode all the same.
var smallOrder = [...][ed25519.PublicKeySize]byte{
	{0: 0x00},    // order 4
	{0: 0x01},    // order 1: the identity
	filled(0xec), // p-1, order 2
	filled(0xed), // p, that is 0
	filled(0xee), // p+1, that is 1
	{0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0,
		0xd5, 0xdf, 0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05}, // order 8
	{0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f,
		0x2a, 0x20, 0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a}, // order 8
}

// filled returns low, ff, ..., ff, 7f: the numbers around p.
func filled(low byte) (b [ed25519.PublicKeySize]byte) {
	for i := range b {
		b[i] = 0xff
	}
	b[0], b[31] = low, 0x7f
	return b
}

// checkPathKey is the milder rule for keys of authorities above ours: an upstream chose them, often long ago.
func checkPathKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() < minRSABits {
			return fmt.Errorf("has an RSA key of %d bits", k.N.BitLen())
		}
		return nil
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P224() {
			return fmt.Errorf("has a key on P-224")
		}
		return nil
	case ed25519.PublicKey:
		return nil
	}
	return fmt.Errorf("has a key of an unknown type")
}

// strongSignature reports whether certificates signed with a are accepted: no SHA-1, no MD5, nothing unknown.
func strongSignature(a x509.SignatureAlgorithm) bool {
	switch a {
	case x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512, x509.PureEd25519,
		x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
		x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS:
		return true
	}
	return false
}

var (
	oidRSA     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1} // RFC 3279 section 2.3.1
	oidECDSA   = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}     // RFC 5480 section 2.1.1
	oidP256    = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}
	oidP384    = asn1.ObjectIdentifier{1, 3, 132, 0, 34}
	oidEd25519 = asn1.ObjectIdentifier{1, 3, 101, 112} // RFC 8410 section 3
)

// keyAlgorithms maps the DER of each AlgorithmIdentifier that a request's key may have to the type of such keys. Whole
// identifiers are compared, so that parameters (explicit curves, restricted RSA) need no parser.
var keyAlgorithms = sync.OnceValue(func() map[string]x509.PublicKeyAlgorithm {
	return map[string]x509.PublicKeyAlgorithm{
		identifier(oidRSA, asn1.NullBytes):    x509.RSA,
		identifier(oidECDSA, encode(oidP256)): x509.ECDSA,
		identifier(oidECDSA, encode(oidP384)): x509.ECDSA,
		identifier(oidEd25519, nil):           x509.Ed25519,
	}
})

// requestSignatures maps the DER of each AlgorithmIdentifier that a request may be signed with. What is not here is
// refused: SHA-1 and MD5, and RSA-PSS, which no client of ours writes.
var requestSignatures = sync.OnceValue(func() map[string]x509.SignatureAlgorithm {
	pkcs1 := func(n int) asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, n} }
	ecdsaWith := func(n int) asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, n} }
	return map[string]x509.SignatureAlgorithm{
		identifier(pkcs1(11), asn1.NullBytes): x509.SHA256WithRSA, // RFC 4055 section 5
		identifier(pkcs1(12), asn1.NullBytes): x509.SHA384WithRSA,
		identifier(pkcs1(13), asn1.NullBytes): x509.SHA512WithRSA,
		identifier(ecdsaWith(2), nil):         x509.ECDSAWithSHA256, // RFC 5758 section 3.2
		identifier(ecdsaWith(3), nil):         x509.ECDSAWithSHA384,
		identifier(ecdsaWith(4), nil):         x509.ECDSAWithSHA512,
		identifier(oidEd25519, nil):           x509.PureEd25519,
	}
})

func identifier(oid asn1.ObjectIdentifier, params []byte) string {
	return string(encode(pkix.AlgorithmIdentifier{Algorithm: oid, Parameters: asn1.RawValue{FullBytes: params}}))
}

// encode is asn1.Marshal of what cannot fail.
func encode(v any) []byte {
	der, err := asn1.Marshal(v)
	if err != nil {
		panic("issuance: a constant does not encode: " + err.Error())
	}
	return der
}

// keyIDBytes is the length of a key identifier (RFC 7093 section 2, method 1).
const keyIDBytes = 20

// keyID is the subject key identifier of a SubjectPublicKeyInfo: the leftmost 160 bits of the SHA-256 of the key's bits
// (RFC 7093 section 2, method 1).
func keyID(spki []byte) ([]byte, error) {
	der, info := cryptobyte.String(spki), cryptobyte.String(nil)
	var key asn1.BitString
	if !der.ReadASN1(&info, cbasn1.SEQUENCE) || !info.SkipASN1(cbasn1.SEQUENCE) || !info.ReadASN1BitString(&key) {
		return nil, errDER
	}
	sum := sha256.Sum256(key.RightAlign())
	return sum[:keyIDBytes], nil
}

// p256Head is what comes before the point in the DER of a SubjectPublicKeyInfo of a P-256 key (RFC 5480 section 2), which nearly
// all keys are.
var p256Head = []byte{
	0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07,
	0x03, 0x42, 0x00,
}

// p256Point is the length of an uncompressed point (SEC 1 section 2.3.3).
const p256Point = 65

// encodeKey is x509.MarshalPKIXPublicKey.
func encodeKey(pub crypto.PublicKey) ([]byte, error) {
	k, ok := pub.(*ecdsa.PublicKey)
	if !ok || k.Curve != elliptic.P256() {
		return x509.MarshalPKIXPublicKey(pub)
	}
	point, err := k.Bytes()
	if err != nil {
		return nil, err
	}
	return slices.Concat(p256Head, point), nil
}

// decodeKey is x509.ParsePKIXPublicKey.
func decodeKey(spki []byte) (crypto.PublicKey, error) {
	point, ok := bytes.CutPrefix(spki, p256Head)
	if !ok || len(point) != p256Point {
		return x509.ParsePKIXPublicKey(spki)
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
}

// sameKey reports whether two public keys are equal; keys of types without an Equal method never are.
func sameKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// CheckAuthorityKey reports whether pub is a key that an authority above ours may have: ECDSA but for P-224, RSA from 2048
// bits on, Ed25519. The error is api.UpstreamAlgorithm.
func CheckAuthorityKey(pub crypto.PublicKey) error {
	if err := checkPathKey(pub); err != nil {
		return api.Wrap(api.UpstreamAlgorithm, err, "the authority "+err.Error())
	}
	return nil
}
