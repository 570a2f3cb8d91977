package upstream

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/api"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/ca/issuance"
	"github.com/signet-ca/signet/ca/journal"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func TestOpen(t *testing.T) {
	sealer := newSealer(t)
	tests := []struct {
		name   string
		config Config
		parts  Parts
		want   api.Reason // empty: it opens
	}{
		{"default", Config{}, Parts{Sealer: sealer}, ""},
		{"shortest", Config{Kind: "selfsigned", TTL: 24 * time.Hour}, Parts{Sealer: sealer}, ""},
		{"P-384", Config{Key: "ecdsa-p384"}, Parts{Sealer: sealer}, ""},
		{"unknown kind", Config{Kind: "vault?"}, Parts{Sealer: sealer}, api.ConfigInvalid},
		{"kind in capitals", Config{Kind: "Selfsigned"}, Parts{Sealer: sealer}, api.ConfigInvalid},
		{"short ttl", Config{TTL: 24*time.Hour - 1}, Parts{Sealer: sealer}, api.ConfigInvalid},
		{"negative ttl", Config{TTL: -time.Hour}, Parts{Sealer: sealer}, api.ConfigInvalid},
		{"unknown key", Config{Key: "dsa-1024"}, Parts{Sealer: sealer}, api.ConfigInvalid},
		{"key that not every verifier knows", Config{Key: "ed25519"}, Parts{Sealer: sealer}, api.ConfigInvalid},
		{"no seal key", Config{}, Parts{}, api.SealKeyMissing},
		{"disk", Config{Kind: "disk", Disk: DiskConfig{KeyFile: "/none/k", CertificateFile: "/none/c"}}, Parts{}, ""},
		{"disk without a key", Config{Kind: "disk", Disk: DiskConfig{CertificateFile: "/none/c"}}, Parts{}, api.ConfigInvalid},
		{"disk without a certificate", Config{Kind: "disk", Disk: DiskConfig{KeyFile: "/none/k"}}, Parts{}, api.ConfigInvalid},
		{"disk with all in one file", Config{Kind: "disk", Disk: DiskConfig{KeyFile: "/none/k", CertificateFile: "/none/k"}}, Parts{}, api.ConfigInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			up, err := Open(tt.config, tt.parts)
			switch {
			case tt.want == "" && (err != nil || up == nil):
				t.Errorf("Open = %v, %v", up, err)
			case tt.want != "" && (api.ReasonOf(err) != tt.want || up != nil):
				t.Errorf("Open = %v, %v; want %s", up, err, tt.want)
			}
		})
	}
}

func TestRegisterTwice(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a second driver of the same name was taken")
		}
	}()
	Register("selfsigned", openSelfsigned)
}

func TestRootFollowsConfig(t *testing.T) {
	tests := []struct {
		config Config
		ttl    time.Duration
		key    string
	}{
		{Config{}, 87600 * time.Hour, "ECDSA P-256"},
		{Config{TTL: 24 * time.Hour, Key: "ecdsa-p384"}, 24 * time.Hour, "ECDSA P-384"},
	}
	for _, tt := range tests {
		t.Run(tt.key, func(t *testing.T) {
			now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
			a, err := open(t, tt.config, Parts{Sealer: newSealer(t)}).(ca.Founder).Found(t.Context(), td, now)
			if err != nil {
				t.Fatal(err)
			}
			cert := parse(t, a)
			if got := cert.NotAfter.Sub(now); got != tt.ttl {
				t.Errorf("the root lives for %s, want %s", got, tt.ttl)
			}
			if got := issuance.KeyName(cert.PublicKey); got != tt.key {
				t.Errorf("the root has a key of %s, want %s", got, tt.key)
			}
		})
	}
}

// TestSealed is the reason of the driver's shape: a key is opened by its seal key, for its authority, of its trust domain,
// and by nothing else. What does not open never leads to a new root.
//
// spiffe: ID-09
func TestSealed(t *testing.T) {
	sealer := newSealer(t)
	up := open(t, Config{}, Parts{Sealer: sealer})
	root, _ := found(t, up.(ca.Founder), td)
	another, _ := found(t, up.(ca.Founder), td)
	otherTD := spiffeid.RequireTrustDomainFromString("example.com")

	tests := []struct {
		name   string
		up     ca.Upstream
		change func(r *ca.MintRequest)
		want   api.Reason
	}{
		{"another seal key", open(t, Config{}, Parts{Sealer: newSealer(t)}), func(*ca.MintRequest) {}, api.SealKeyWrong},
		{"sealed key of another authority", up, func(r *ca.MintRequest) { r.Root.SealedKey = another.SealedKey }, api.SealKeyWrong},
		{"certificate and key under another id", up, func(r *ca.MintRequest) { r.Root.ID = another.ID }, api.SealKeyWrong},
		{"certificate of another authority", up, func(r *ca.MintRequest) { r.Root.Certificate = another.Certificate }, api.UpstreamRefused},
		{"another trust domain", up, func(r *ca.MintRequest) {
			var err error
			if r.CSR, err = issuance.NewIntermediateCSR(otherTD, newKey(t), false); err != nil {
				t.Fatal(err)
			}
			r.TrustDomain = otherTD
		}, api.SealKeyWrong},
		{"a request of another trust domain", up, func(r *ca.MintRequest) { r.TrustDomain = otherTD }, api.IDMismatch},
		{"changed", up, func(r *ca.MintRequest) { r.Root.SealedKey[len(r.Root.SealedKey)-1] ^= 1 }, api.SealKeyWrong},
		{"changed nonce", up, func(r *ca.MintRequest) { r.Root.SealedKey[1] ^= 1 }, api.SealKeyWrong},
		{"cut", up, func(r *ca.MintRequest) { r.Root.SealedKey = r.Root.SealedKey[:8] }, api.SealKeyWrong},
		{"none, as of another upstream", up, func(r *ca.MintRequest) { r.Root.SealedKey = nil }, api.UpstreamRoot},
		{"of a later format", up, func(r *ca.MintRequest) { r.Root.SealedKey[0] = 2 }, api.StateCorrupt},
		{"no key inside", up, func(r *ca.MintRequest) {
			r.Root.SealedKey = sealer.Seal([]byte("nothing"), sealContext(td, root.ID))
		}, api.StateCorrupt},
		{"a key inside that cannot sign", up, func(r *ca.MintRequest) {
			r.Root.SealedKey = sealer.Seal(exchangeKey(t), sealContext(td, root.ID))
		}, api.StateCorrupt},
		{"no certificate", up, func(r *ca.MintRequest) { r.Root.Certificate = []byte{0x30} }, api.StateCorrupt},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := request(t, root)
			r.Root.SealedKey = bytes.Clone(root.SealedKey)
			tt.change(&r)
			chain, err := tt.up.Mint(t.Context(), r)
			if api.ReasonOf(err) != tt.want || chain != nil {
				t.Errorf("Mint = %d certificates, %v; want %s", len(chain), err, tt.want)
			}
		})
	}
	if _, err := up.Mint(t.Context(), request(t, root)); err != nil {
		t.Errorf("the untouched root no longer mints: %v", err)
	}
}

// TestNeverInClear searches the stored record for the root's private key in every form in which it could lie there.
func TestNeverInClear(t *testing.T) {
	sealer := newSealer(t)
	root, _ := found(t, open(t, Config{}, Parts{Sealer: sealer}).(ca.Founder), td)
	j, err := journal.New(td, root)
	if err != nil {
		t.Fatal(err)
	}
	record, err := j.Encode()
	if err != nil {
		t.Fatal(err)
	}
	der, err := sealer.Open(root.SealedKey, sealContext(td, root.ID))
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		t.Fatal(err)
	}
	key := parsed.(*ecdsa.PrivateKey)
	if !key.PublicKey.Equal(parse(t, root).PublicKey) {
		t.Fatal("what is sealed is not the root's key, so the search below would prove nothing")
	}
	scalar, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	// The record is JSON, in which bytes are base64: look into what it decodes to as well.
	haystacks := map[string][]byte{"record": record, "sealed key": root.SealedKey, "certificate": root.Certificate}
	for name, secret := range map[string][]byte{"PKCS #8": der, "SEC 1": sec1, "scalar": scalar} {
		for _, form := range [][]byte{secret, []byte(hex.EncodeToString(secret)), []byte(base64.StdEncoding.EncodeToString(secret))} {
			for where, hay := range haystacks {
				if bytes.Contains(hay, form) {
					t.Errorf("the %s of the root's key lies in clear in the %s", name, where)
				}
			}
		}
	}
	if !bytes.Contains(record, []byte(base64.StdEncoding.EncodeToString(root.SealedKey))) {
		t.Error("the sealed key is not in the record, so the search above proved nothing")
	}
}

// TestSealedAnew proves that two seals of one key tell nothing about each other.
func TestSealedAnew(t *testing.T) {
	s := newSealer(t)
	if a, b := s.Seal([]byte("key"), "c"), s.Seal([]byte("key"), "c"); bytes.Equal(a, b) {
		t.Error("sealing twice gave the same bytes")
	}
}

func newSealer(t *testing.T) *ca.Sealer {
	t.Helper()
	s, err := ca.NewSealer(ca.NewSealKey())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func open(t *testing.T, c Config, p Parts) ca.Upstream {
	t.Helper()
	up, err := Open(c, p)
	if err != nil {
		t.Fatal(err)
	}
	return up
}

// found makes a root and checks what must hold of every root.
func found(t *testing.T, f ca.Founder, td spiffeid.TrustDomain) (journal.Authority, *x509.Certificate) {
	t.Helper()
	a, err := f.Found(t.Context(), td, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert := parse(t, a)
	if err := issuance.LintRoot(cert); err != nil {
		t.Error(err)
	}
	if len(cert.URIs) != 1 || cert.URIs[0].String() != td.IDString() {
		t.Errorf("the root carries %v, want the ID of its trust domain alone", cert.URIs)
	}
	if a.State != journal.Active {
		t.Errorf("the root is %s", a.State)
	}
	if _, err := journal.New(td, a); err != nil {
		t.Errorf("the root does not fit into a record: %v", err)
	}
	return a, cert
}

func parse(t *testing.T, a journal.Authority) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(a.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func request(t *testing.T, root journal.Authority) ca.MintRequest {
	t.Helper()
	r, _ := requestWithKey(t, root, false)
	return r
}

// requestWithKey returns a request that is good, for two days, and its key.
func requestWithKey(t *testing.T, root journal.Authority, exclude bool) (ca.MintRequest, crypto.Signer) {
	t.Helper()
	key, err := issuance.GenerateKey(issuance.KeyP256)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := issuance.NewIntermediateCSR(td, key, exclude)
	if err != nil {
		t.Fatal(err)
	}
	return ca.MintRequest{
		ID: issuance.Fingerprint(key.Public()), TrustDomain: td, Root: root, CSR: csr, NotAfter: time.Now().Add(48 * time.Hour), ExcludeNames: exclude,
	}, key
}

func newKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := issuance.GenerateKey(issuance.KeyP256)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// exchangeKey returns a key for key agreement only, as PKCS #8.
func exchangeKey(t *testing.T) []byte {
	t.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}
