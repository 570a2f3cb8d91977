package upstream_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
	"github.com/signet-ca/signet/ca/store"
	"github.com/signet-ca/signet/ca/upstream"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func sealer(t *testing.T) *ca.Sealer {
	t.Helper()
	s, err := ca.NewSealer(ca.NewSealKey())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func selfsigned(t *testing.T, c upstream.Config, s *ca.Sealer) interface {
	ca.Upstream
	ca.Founder
} {
	t.Helper()
	up, err := upstream.Open(c, upstream.Parts{Sealer: s})
	if err != nil {
		t.Fatal(err)
	}
	return up.(interface {
		ca.Upstream
		ca.Founder
	})
}

func want(t *testing.T, err error, r api.Reason) {
	t.Helper()
	if err == nil || api.ReasonOf(err) != r {
		t.Fatalf("%v, want %s", err, r)
	}
}

func key(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestSelfsigned makes a root and mints under it; the CA's own check finds nothing wrong, not even a weakness.
//
// spiffe: ID-09, X-05, X-06, X-09
func TestSelfsigned(t *testing.T) {
	for _, tt := range []struct {
		name   string
		config upstream.Config
		ttl    time.Duration
		key    string
	}{
		{"by default", upstream.Config{}, 87600 * time.Hour, "ECDSA P-256"},
		{"by name", upstream.Config{Kind: "selfsigned", TTL: 48 * time.Hour, Key: "ecdsa-p384"}, 48 * time.Hour, "ECDSA P-384"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			up := selfsigned(t, tt.config, sealer(t))
			now := time.Now()
			a, err := up.Found(t.Context(), td, now)
			if err != nil {
				t.Fatal(err)
			}
			j, err := journal.New(td, a)
			if err != nil {
				t.Fatalf("the root does not make a record: %v", err)
			}
			roots, err := j.Roots()
			if err != nil {
				t.Fatal(err)
			}
			root := roots[0]
			if got := root.NotAfter.Sub(now).Round(time.Second); got < tt.ttl-time.Second || got > tt.ttl {
				t.Errorf("the root lives for %s, want %s", got, tt.ttl)
			}
			if got := issuance.KeyName(root.PublicKey); got != tt.key {
				t.Errorf("the root's key is %s, want %s", got, tt.key)
			}
			k := key(t)
			end := now.Add(24 * time.Hour).Truncate(time.Second)
			chain, err := up.Mint(t.Context(), ca.MintRequest{TrustDomain: td, Root: a, PublicKey: k.Public(), NotAfter: end, ExcludeNames: true})
			if err != nil {
				t.Fatal(err)
			}
			got, err := issuance.CheckIntermediate(issuance.IntermediateCheck{
				TrustDomain: td, PublicKey: k.Public(), Chain: chain, Roots: roots, MinLifetime: time.Hour,
			}, now)
			if err != nil || len(got.Warnings) > 0 || !got.NotAfter.Equal(end) {
				t.Errorf("the intermediate: %+v (%v)", got, err)
			}
		})
	}
}

// TestMintRefuses mints nothing with what is not the root's own.
func TestMintRefuses(t *testing.T) {
	s := sealer(t)
	up := selfsigned(t, upstream.Config{}, s)
	a, err := up.Found(t.Context(), td, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	b, err := up.Found(t.Context(), td, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	good := ca.MintRequest{TrustDomain: td, Root: a, PublicKey: key(t).Public(), NotAfter: time.Now().Add(time.Hour)}
	for _, tt := range []struct {
		name   string
		sealer *ca.Sealer
		change func(*ca.MintRequest)
		want   api.Reason
	}{
		{"another seal key", sealer(t), func(*ca.MintRequest) {}, api.SealKeyWrong},
		{"the key of another root", s, func(r *ca.MintRequest) { r.Root.SealedKey = b.SealedKey }, api.SealKeyWrong},
		{"another trust domain", s, func(r *ca.MintRequest) { r.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org") }, api.SealKeyWrong},
		{"damaged", s, func(r *ca.MintRequest) {
			r.Root.SealedKey = bytes.Clone(r.Root.SealedKey)
			r.Root.SealedKey[20] ^= 1
		}, api.SealKeyWrong},
		{"no key", s, func(r *ca.MintRequest) { r.Root.SealedKey = nil }, api.StateCorrupt},
		{"something else sealed", s, func(r *ca.MintRequest) { r.Root.SealedKey = s.Seal([]byte("x"), td.Name()+"/"+a.ID) }, api.StateCorrupt},
		{"a key that is not the root's", s, func(r *ca.MintRequest) {
			der, err := x509.MarshalPKCS8PrivateKey(key(t))
			if err != nil {
				t.Fatal(err)
			}
			r.Root.SealedKey = s.Seal(der, td.Name()+"/"+a.ID)
		}, api.UpstreamRefused},
		{"an end that has passed", s, func(r *ca.MintRequest) { r.NotAfter = time.Now().Add(-time.Second) }, api.ConfigInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := good
			tt.change(&r)
			chain, err := selfsigned(t, upstream.Config{}, tt.sealer).Mint(t.Context(), r)
			want(t, err, tt.want)
			if chain != nil {
				t.Error("something was signed")
			}
		})
	}
	if _, err := up.Mint(t.Context(), good); err != nil {
		t.Errorf("what it was made from: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	parts := upstream.Parts{Sealer: sealer(t)}
	for _, tt := range []struct {
		name   string
		config upstream.Config
		parts  upstream.Parts
		want   api.Reason
	}{
		{"unknown kind", upstream.Config{Kind: "vault9"}, parts, api.ConfigInvalid},
		{"no seal key", upstream.Config{}, upstream.Parts{}, api.SealKeyMissing},
		{"short root", upstream.Config{TTL: 24*time.Hour - 1}, parts, api.ConfigInvalid},
		{"negative TTL", upstream.Config{TTL: -time.Hour}, parts, api.ConfigInvalid},
		{"unknown key", upstream.Config{Key: "rsa-1024"}, parts, api.ConfigInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := upstream.Open(tt.config, tt.parts)
			want(t, err, tt.want)
		})
	}
}

func TestRegisterTwice(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a driver was replaced")
		}
	}()
	upstream.Register(upstream.Kinds()[0], nil)
}

// TestKeyNeverInClear searches the store's file for the root's private key, as it is encoded and as the bare number.
func TestKeyNeverInClear(t *testing.T) {
	s := sealer(t)
	up := selfsigned(t, upstream.Config{}, s)
	path := filepath.Join(t.TempDir(), "signet.db")
	st, closeStore, err := store.Open(t.Context(), store.Config{Path: path}, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Init(t.Context(), td, st, up, nil); err != nil {
		t.Fatal(err)
	}
	j, _, err := st.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	root := j.ActiveAuthority()
	if _, err := up.Mint(t.Context(), ca.MintRequest{TrustDomain: td, Root: root, PublicKey: key(t).Public(), NotAfter: time.Now().Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	if err := closeStore(); err != nil {
		t.Fatal(err)
	}
	der, err := s.Open(root.SealedKey, td.Name()+"/"+root.ID)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := parsed.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, secret := range map[string][]byte{"PKCS #8": der, "a part of it": der[20:60], "the number": scalar} {
		for coding, text := range encodings(secret) {
			if bytes.Contains(data, text) {
				t.Errorf("%s of the root is in the store, %s", name, coding)
			}
		}
	}
	if !bytes.Contains(data, []byte(root.ID)) {
		t.Error("the store does not hold the root at all")
	}
}

// encodings are the ways in which bytes can lie in a file. In base64, three bytes that are cut off at either end make it
// hit at any offset.
func encodings(secret []byte) map[string][]byte {
	all := map[string][]byte{"raw": secret, "in hex": []byte(hex.EncodeToString(secret))}
	for skip := range 3 {
		text := base64.StdEncoding.EncodeToString(secret[skip:])
		all[fmt.Sprint("in base64 from byte ", skip)] = []byte(text[:len(text)-4])
	}
	return all
}
