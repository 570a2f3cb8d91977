package issuance

//lint:file-ignore SA1019 these tests make keys that no current library would

import (
	"bytes"
	"crypto"
	"crypto/dsa"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"math/big"
	"sync"
	"testing"

	"github.com/signet-ca/signet/api"
)

var testRSA = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

func TestGenerateKey(t *testing.T) {
	for _, tt := range []struct {
		kind KeyKind
		name string
	}{
		{"", "ECDSA P-256"},
		{KeyP256, "ECDSA P-256"},
		{KeyP384, "ECDSA P-384"},
		{KeyEd25519, "Ed25519"},
		{KeyRSA2048, "RSA 2048"},
		{KeyRSA3072, "RSA 3072"},
		{KeyRSA4096, "RSA 4096"},
	} {
		t.Run(string(tt.kind), func(t *testing.T) {
			if testing.Short() && tt.kind == KeyRSA4096 {
				t.Skip("takes seconds")
			}
			key := newKey(t, tt.kind)
			if got := KeyName(key.Public()); got != tt.name {
				t.Errorf("name %q, want %q", got, tt.name)
			}
			if err := CheckKey(key.Public(), Keys{Ed25519: true}); err != nil {
				t.Errorf("a fresh key is refused: %v", err)
			}
		})
	}
	_, err := GenerateKey("rsa-1024")
	wantReason(t, err, api.ConfigInvalid)
}

func TestKeyName(t *testing.T) {
	for _, pub := range []crypto.PublicKey{nil, 7, (*ecdsa.PublicKey)(nil), &ecdsa.PublicKey{}, (*rsa.PublicKey)(nil), &rsa.PublicKey{}} {
		if got := KeyName(pub); got != "unknown" {
			t.Errorf("%T: %q", pub, got)
		}
	}
}

// threat: C13, C14, C15, C16, CVE-2017-15361
func TestCheckKey(t *testing.T) {
	rsaKey := must(testRSA())(t)
	n := func(edit func(n *big.Int)) *rsa.PublicKey {
		v := new(big.Int).Set(rsaKey.N)
		edit(v)
		return &rsa.PublicKey{N: v, E: 65537}
	}
	e := func(e int) *rsa.PublicKey { return &rsa.PublicKey{N: rsaKey.N, E: e} }
	point := func(c elliptic.Curve, edit func(k *ecdsa.PublicKey)) *ecdsa.PublicKey {
		k := must(ecdsa.GenerateKey(c, rand.Reader))(t).PublicKey
		edit(&k)
		return &k
	}
	same := func(*ecdsa.PublicKey) {}
	p256 := elliptic.P256()
	tests := []struct {
		name string
		pub  crypto.PublicKey
		keys Keys
		want api.Reason
	}{
		{"p-256", point(p256, same), Keys{}, ""},
		{"p-384", point(elliptic.P384(), same), Keys{}, ""},
		{"p-224", point(elliptic.P224(), same), Keys{}, api.KeyType},
		{"p-521", point(elliptic.P521(), same), Keys{}, api.KeyType},
		{"generic p-256", point(p256, func(k *ecdsa.PublicKey) { k.Curve = p256.Params() }), Keys{}, api.KeyType},
		{"no curve", point(p256, func(k *ecdsa.PublicKey) { k.Curve = nil }), Keys{}, api.KeyType},
		{"no point", &ecdsa.PublicKey{Curve: p256}, Keys{}, api.WeakKey},
		{"nil ecdsa", (*ecdsa.PublicKey)(nil), Keys{}, api.KeyType},
		{"infinity", &ecdsa.PublicKey{Curve: p256, X: new(big.Int), Y: new(big.Int)}, Keys{}, api.WeakKey},
		{"off the curve", point(p256, func(k *ecdsa.PublicKey) { k.Y = new(big.Int).Add(k.Y, big.NewInt(1)) }), Keys{}, api.WeakKey},
		{"not reduced", point(p256, func(k *ecdsa.PublicKey) { k.X = new(big.Int).Add(k.X, p256.Params().P) }), Keys{}, api.WeakKey},
		{"negative", point(p256, func(k *ecdsa.PublicKey) { k.X = new(big.Int).Neg(k.X) }), Keys{}, api.WeakKey},

		{"ed25519", newKey(t, KeyEd25519).Public(), Keys{Ed25519: true}, ""},
		{"ed25519 not allowed", newKey(t, KeyEd25519).Public(), Keys{}, api.KeyType},
		{"short ed25519", make(ed25519.PublicKey, 31), Keys{Ed25519: true}, api.KeyType},
		{"nil ed25519", ed25519.PublicKey(nil), Keys{Ed25519: true}, api.KeyType},

		{"rsa 2048", &rsaKey.PublicKey, Keys{}, ""},
		{"nil rsa", (*rsa.PublicKey)(nil), Keys{}, api.WeakKey},
		{"no modulus", &rsa.PublicKey{E: 65537}, Keys{}, api.WeakKey},
		{"zero modulus", &rsa.PublicKey{N: new(big.Int), E: 65537}, Keys{}, api.WeakKey},
		{"negative modulus", n(func(n *big.Int) { n.Neg(n) }), Keys{}, api.WeakKey},
		{"rsa 1024", n(func(n *big.Int) { n.Rsh(n, 1024) }), Keys{}, api.WeakKey},
		{"rsa 2047", n(func(n *big.Int) { n.Rsh(n, 1) }), Keys{}, api.WeakKey},
		{"rsa 2049", n(func(n *big.Int) { n.Lsh(n, 1).Add(n, big.NewInt(1)) }), Keys{}, api.KeyType},
		{"rsa 4104", n(func(n *big.Int) { n.Lsh(n, 2056).Add(n, big.NewInt(1)) }), Keys{}, api.KeyTooLarge},
		{"rsa 1 Mbit", n(func(n *big.Int) { n.Lsh(n, 1<<20) }), Keys{}, api.KeyTooLarge},
		{"even modulus", n(func(n *big.Int) { n.SetBit(n, 0, 0) }), Keys{}, api.WeakKey},
		{"exponent 65537", e(65537), Keys{}, ""},
		{"exponent 65539", e(65539), Keys{}, ""},
		{"exponent 2^31-1", e(1<<31 - 1), Keys{}, ""},
		{"exponent 2^31+1", e(1<<31 + 1), Keys{}, api.KeyTooLarge},
		{"exponent -1", e(-1), Keys{}, api.WeakKey},
		{"exponent 0", e(0), Keys{}, api.WeakKey},
		{"exponent 1", e(1), Keys{}, api.WeakKey},
		{"exponent 3", e(3), Keys{}, api.WeakKey},
		{"exponent 65535", e(65535), Keys{}, api.WeakKey},
		{"exponent 65538", e(65538), Keys{}, api.WeakKey},
		{"factor 3", n(func(n *big.Int) { multipleOf(n, 3) }), Keys{}, api.WeakKey},
		{"factor 751", n(func(n *big.Int) { multipleOf(n, 751) }), Keys{}, api.WeakKey},
		{"close primes", &rsa.PublicKey{N: closePrimes(t, 4), E: 65537}, Keys{}, api.WeakKey},
		{"equal primes", &rsa.PublicKey{N: closePrimes(t, 0), E: 65537}, Keys{}, api.WeakKey},
		{"broken generator", &rsa.PublicKey{N: rocaModulus(t), E: 65537}, Keys{}, api.WeakKey},

		{"nil", nil, Keys{Ed25519: true}, api.KeyType},
		{"dsa", &dsa.PublicKey{}, Keys{Ed25519: true}, api.KeyType},
		{"x25519", must(ecdh.X25519().GenerateKey(rand.Reader))(t).PublicKey(), Keys{Ed25519: true}, api.KeyType},
		{"private key", rsaKey, Keys{Ed25519: true}, api.KeyType},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { wantReason(t, CheckKey(tt.pub, tt.keys), tt.want) })
	}
}

// multipleOf makes n an odd multiple of p of the same size.
func multipleOf(n *big.Int, p int64) {
	f := big.NewInt(p)
	n.Sub(n, new(big.Int).Mod(n, f))
	if n.Bit(0) == 0 {
		n.Sub(n, f)
	}
}

// closePrimes returns the product of two primes of 1024 bits with apart-1 primes between them.
func closePrimes(t *testing.T, apart int) *big.Int {
	t.Helper()
	p := must(rand.Prime(rand.Reader, 1024))(t)
	q := new(big.Int).Set(p)
	for range apart {
		for q.Add(q, big.NewInt(2)); !q.ProbablyPrime(10); q.Add(q, big.NewInt(2)) {
		}
	}
	return q.Mul(p, q)
}

// rocaModulus returns a modulus made in the way of the broken generator: primes of the form k*M + (65537^a mod M), where M
// is the product of the first primes.
func rocaModulus(t *testing.T) *big.Int {
	t.Helper()
	m := big.NewInt(2)
	for _, p := range smallPrimes().list {
		if p <= rocaPrime {
			m.Mul(m, new(big.Int).SetUint64(p))
		}
	}
	prime := func() *big.Int {
		for {
			a := must(rand.Int(rand.Reader, m))(t)
			k := must(rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(1022-m.BitLen()))))(t)
			k.SetBit(k, 1023-m.BitLen(), 1).SetBit(k, 1024-m.BitLen(), 1)
			p := new(big.Int).Exp(big.NewInt(65537), a, m)
			if p.Add(p, k.Mul(k, m)).BitLen() == 1024 && p.ProbablyPrime(10) {
				return p
			}
		}
	}
	for {
		if n := new(big.Int).Mul(prime(), prime()); n.BitLen() == 2048 {
			return n
		}
	}
}

// The points of small order are refused for a reason: a signature that anybody can make verifies under each of them.
//
// threat: C16
func TestSmallOrderKeysAreForgeable(t *testing.T) {
	for i, y := range smallOrder {
		for _, sign := range []byte{0, 0x80} {
			t.Run(fmt.Sprintf("%d/%x", i, sign), func(t *testing.T) {
				pub := y
				pub[31] |= sign
				wantReason(t, CheckKey(ed25519.PublicKey(pub[:]), Keys{Ed25519: true}), api.WeakKey)

				// R is a point of small order too and S is zero: it verifies whenever R equals -k times the key.
				forged := false
				for m := byte(0); m < 200 && !forged; m++ {
					for _, r := range smallOrder {
						for _, rs := range []byte{0, 0x80} {
							signature := make([]byte, ed25519.SignatureSize)
							copy(signature, r[:])
							signature[31] |= rs
							forged = forged || ed25519.Verify(pub[:], []byte{m}, signature)
						}
					}
				}
				// Not every pair of y and sign is a point: x = 0 has no negative.
				if !forged && !(sign == 0x80 && (i == 1 || i == 2 || i == 4)) {
					t.Error("no signature was forged: not a point of small order?")
				}
			})
		}
	}
}

func BenchmarkCheckKey(b *testing.B) {
	for _, kind := range []KeyKind{KeyP256, KeyP384, KeyEd25519, KeyRSA2048, KeyRSA4096} {
		pub := newKey(b, kind).Public()
		b.Run(string(kind), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := CheckKey(pub, Keys{Ed25519: true}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// Keys of the common kind are encoded and decoded here, and everything about it is as in crypto/x509.
func TestKeyEncoding(t *testing.T) {
	for _, kind := range []KeyKind{KeyP256, KeyP384, KeyEd25519, KeyRSA2048} {
		pub := newKey(t, kind).Public()
		want := must(x509.MarshalPKIXPublicKey(pub))(t)
		if got := must(encodeKey(pub))(t); !bytes.Equal(got, want) {
			t.Errorf("%s: encoded as %x, want %x", kind, got, want)
		}
		if got := must(decodeKey(want))(t); !sameKey(got, pub) {
			t.Errorf("%s: decoded as %v", kind, got)
		}
	}
	good := must(encodeKey(newKey(t, KeyP256).Public()))(t)
	point := len(p256Head)
	if point+p256Point != len(good) {
		t.Fatalf("a key of %d bytes", len(good))
	}
	for name, edit := range map[string]func([]byte) []byte{
		"off the curve":     func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"compressed":        func(b []byte) []byte { b[point] = 2 + b[len(b)-1]&1; return b },
		"hybrid":            func(b []byte) []byte { b[point] = 6 + b[len(b)-1]&1; return b },
		"infinity":          func(b []byte) []byte { clear(b[point:]); return b },
		"beyond the field":  func(b []byte) []byte { copy(b[point+1:], bytes.Repeat([]byte{0xff}, 32)); return b },
		"one byte less":     func(b []byte) []byte { return b[:len(b)-1] },
		"one byte more":     func(b []byte) []byte { return append(b, 0) },
		"only its head":     func(b []byte) []byte { return b[:point] },
		"nothing":           func([]byte) []byte { return nil },
		"unused bits":       func(b []byte) []byte { b[point-1] = 1; return b },
		"of another curve":  func(b []byte) []byte { b[22] = 6; return b },
		"of another length": func(b []byte) []byte { b[1]--; return b },
	} {
		t.Run(name, func(t *testing.T) {
			spki := edit(bytes.Clone(good))
			_, want := x509.ParsePKIXPublicKey(spki)
			if key, err := decodeKey(spki); err == nil || want == nil {
				t.Errorf("decoded as %v; crypto/x509 says %v", key, want)
			}
		})
	}
}
